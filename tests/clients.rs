//! The published Python clients and readers, unmodified, against the real program.
//!
//! `./x test` makes their private environments and says where they are (`TEST_VENVS`).

use crate::harness::{Server, flightbox};
use std::path::PathBuf;
use std::process::Command;

fn run_python(generation: &str, script: &str, server: &Server) {
    run_python_with(generation, script, server, &[]);
}

fn run_python_with(generation: &str, script: &str, server: &Server, more: &[&str]) {
    let venvs = std::env::var_os("TEST_VENVS").expect("TEST_VENVS is not set: run the tests by `./x test`");
    let python = PathBuf::from(venvs).join(format!("venv-{generation}/bin/python"));
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(script);
    let output = Command::new(&python)
        .arg(&script)
        .args(["127.0.0.1", &server.address.port().to_string()])
        .arg(server.data())
        .args(more)
        .output()
        .expect("python runs");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{} {}:\n{text}", python.display(), script.display());
    eprintln!("{text}");
}

#[test]
fn mosaicolabs_0_7_0_gets_back_10_000_messages_equal() {
    let mut server = Server::start(&[]);
    run_python("0.7.0", "sdk_roundtrip.py", &server);
    server.stop();
    // What ingest put into the index is what the segments say, for every type these clients send.
    let output = flightbox(&["reindex", "--check", "--data", &server.data().display().to_string()]);
    assert!(output.contains("0 different"), "{output}");
}

#[test]
fn mosaicolabs_0_5_0_gets_back_10_000_messages_equal() {
    let mut server = Server::start(&["chunk_bytes=1MiB"]);
    run_python("0.5.0", "sdk_roundtrip.py", &server);
    server.stop();
}

#[test]
fn plain_pyarrow_speaks_v0_and_gets_every_arrow_type_back_to_the_letter() {
    let server = Server::start(&["chunk_bytes=64KiB"]);
    run_python("0.7.0", "arrow_types.py", &server);
}

#[test]
fn duckdb_and_pyarrow_open_the_browse_files_and_row_groups_are_block_aligned() {
    let server = Server::start(&["chunk_bytes=256KiB", "segment_bytes=1MiB"]);
    run_python("0.7.0", "browse_files.py", &server);
}

#[test]
fn gzip_and_deflate_requests_are_taken_over_a_unix_domain_socket() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let socket = format!("unix_socket={}", folder.path().join("socket").display());
    let server = Server::start_on(folder.path(), &[&socket]);
    run_python("0.7.0", "gzip_over_unix.py", &server);
}

#[test]
fn mosaicolabs_0_7_0_gets_every_answer_its_api_promises() {
    let server = Server::start(&[]);
    run_python("0.7.0", "compat.py", &server);
}

#[test]
fn mosaicolabs_0_5_0_gets_every_answer_its_api_promises() {
    let server = Server::start(&[]);
    run_python("0.5.0", "compat.py", &server);
}

/// All published generations on one server, and each reads what each other one left behind. Run by
/// `./x compat`, which makes their environments.
#[test]
#[ignore = "needs the environments of five client generations: ./x compat"]
fn every_published_generation_is_served_and_reads_what_the_others_wrote() {
    const ALL: [&str; 5] = ["0.3.2", "0.4.3", "0.5.0", "0.6.3", "0.7.0"];
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    // The one conflict that the wire cannot settle (protocol.md 8.2, conflict 1) is a setting.
    for (setting, generations) in [("true", ["0.3.2", "0.4.3", "0.6.3", "0.7.0"].as_slice()), ("false", &["0.5.0"])] {
        let mut server = Server::start_on(folder.path(), &[&format!("legacy_session_reply={setting}")]);
        for generation in generations {
            run_python_with(generation, "compat.py", &server, &["--leave"]);
        }
        server.stop();
    }
    let mut server = Server::start_on(folder.path(), &[]);
    for generation in ALL {
        let mut more = vec!["--only".to_owned(), String::new()];
        for other in ALL {
            more.extend(["--read".to_owned(), format!("compat_{}_kept", other.replace('.', "_"))]);
        }
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        run_python_with(generation, "compat.py", &server, &more);
    }
    server.stop();
}

#[test]
fn the_clients_own_mcap_and_ros_2_bridges_bring_files_in_and_out_message_by_message() {
    let server = Server::start(&[]);
    run_python("0.7.0", "bridges.py", &server);
}
