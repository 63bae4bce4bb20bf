//! What ARCHITECTURE.md promises about the tree, checked.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file of ours, as (path from the root, text).
fn sources() -> Vec<(String, String)> {
    ["src", "storage/src", "bench/src", "tests"]
        .iter()
        .flat_map(|dir| crate::harness::files_below(&root().join(dir)))
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .map(|path| (relative(&path), std::fs::read_to_string(&path).expect("readable")))
        .collect()
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).expect("below the root").display().to_string()
}

/// Lines of code that name a crate: `name::` at the start of a path, or `use name`.
fn names_crate(text: &str, name: &str) -> bool {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).any(|line| {
        line.match_indices(&format!("{name}::")).any(|(at, _)| {
            let before = line.get(..at).and_then(|head| head.chars().next_back());
            before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':' && c != '"' && c != '/')
        })
    })
}

#[track_caller]
fn check_room(name: &str, rooms: &[&str]) {
    let strangers: Vec<String> = sources()
        .into_iter()
        .filter(|(path, text)| !path.starts_with("tests/") && !path.starts_with("bench/") && names_crate(text, name))
        .map(|(path, _)| path)
        .filter(|path| !rooms.iter().any(|room| path.starts_with(room)))
        .collect();
    assert!(strangers.is_empty(), "{name} belongs to {rooms:?}, but is named in {strangers:?}");
}

#[test]
fn inv_11_only_the_flight_room_names_tonic_and_arrow_flight() {
    check_room("tonic", &["src/flight/"]);
    check_room("arrow_flight", &["src/flight/"]);
}

#[test]
fn one_outside_crate_has_one_room() {
    check_room("rocksdb", &["storage/src/catalog/"]);
    check_room("tokio_uring", &["storage/src/uring/"]);
    check_room("io_uring", &["storage/src/uring/"]);
    check_room("crossbeam", &["src/ingest/lane.rs"]);
    check_room("hdrhistogram", &["src/stats.rs"]);
    check_room("sd_notify", &["src/systemd.rs"]);
    check_room("core_affinity", &["src/daemon.rs"]);
    check_room("mimalloc", &["storage/src/uring/"]);
    check_room("libmimalloc_sys", &["storage/src/uring/"]);
    check_room("clap", &["src/cli/"]);
    check_room("toml", &["src/config/"]);
    check_room("ulid", &["src/lifecycle/mod.rs"]);
    check_room("sha2", &["src/lifecycle/api_keys.rs"]);
    check_room("base64", &["src/flight/questions.rs"]);
}

#[test]
fn unsafe_code_is_in_one_room() {
    for (path, text) in sources() {
        let found = text.lines().any(|line| {
            let code = line.split("//").next().unwrap_or("").trim_start();
            ["unsafe {", "unsafe impl", "unsafe fn"].iter().any(|word| {
                code.match_indices(word)
                    .any(|(at, _)| !code[..at].ends_with(|c: char| c == '_' || c == '"' || c.is_alphanumeric()))
            })
        });
        assert!(!found || path.starts_with("storage/src/uring/") || path == "tests/tidy.rs", "unsafe in {path}");
    }
}

#[test]
fn every_file_opens_with_what_it_is_for() {
    for (path, text) in sources() {
        assert!(text.starts_with("//! "), "{path} has no header");
    }
}

#[test]
fn every_invariant_of_the_map_is_cited_by_a_test_or_listed_as_open() {
    let map = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("the map");
    let numbers = |text: &str| -> BTreeSet<u32> {
        let upper = text.to_uppercase().replace("INV_", "INV-");
        let after =
            |at: usize| upper.get(at + 4..).unwrap_or("").chars().take_while(char::is_ascii_digit).collect::<String>();
        upper.match_indices("INV-").filter_map(|(at, _)| after(at).parse().ok()).collect()
    };
    let promised = numbers(&map);
    assert_eq!(promised, (1..=12).collect(), "the map states INV-1 to INV-12");
    let open = map.lines().find(|line| line.starts_with("Open: ")).map(numbers).unwrap_or_default();
    let mut tested = BTreeSet::new();
    for (_, text) in sources() {
        for line in text.lines().filter(|line| line.trim_start().contains("fn inv_")) {
            // `inv_1_and_2_after` cites both.
            let name = line.split("fn ").nth(1).unwrap_or("").split('(').next().unwrap_or("");
            let parts = name
                .trim_start_matches("inv_")
                .split('_')
                .take_while(|part| *part == "and" || part.parse::<u32>().is_ok());
            tested.extend(parts.filter_map(|part| part.parse::<u32>().ok()));
        }
    }
    for number in promised {
        let listed = open.contains(&number);
        assert!(
            tested.contains(&number) || listed,
            "INV-{number} is neither cited by a test's name nor listed as open"
        );
    }
}
