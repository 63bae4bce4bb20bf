//! The command line against the real program: questions, listings, ontologies, and the index made anew.

use crate::harness::{Server, create_sequence, flightbox, flightbox_may_fail, run};
use crate::query::{finalize, topic, two_drives, vectors};
use serde_json::Value;
use storage::catalog::Catalog;
use storage::catalog::keys::Family;

/// Runs a command against a server.
fn ask(server: &Server, arguments: &[&str]) -> (String, bool) {
    let listen = server.address.to_string();
    let all: Vec<&str> = arguments.iter().copied().chain(["--listen", &listen]).collect();
    // A command blocks: the server must go on meanwhile.
    tokio::task::block_in_place(|| flightbox_may_fail(&all))
}

#[track_caller]
fn check(server: &Server, arguments: &[&str], parts: &[&str]) -> String {
    let (output, succeeded) = ask(server, arguments);
    assert!(succeeded, "{arguments:?}:\n{output}");
    for part in parts {
        assert!(output.contains(part), "{arguments:?} does not say {part:?}:\n{output}");
    }
    output
}

async fn recorded() -> Server {
    let server = Server::start(&["chunk_bytes=128KiB"]);
    let mut client = server.client().await;
    two_drives(&mut client).await;
    server
}

#[test]
fn a_question_is_answered_with_intervals_and_what_it_cost() {
    run(async {
        let server = recorded().await;
        let found = ["two", "/imu", "shaken", "1 interval(s)", "1970-01-01 00:00:00.000", "ruled out", "%"];
        check(&server, &["query", "shaken.acceleration.x > 138.5"], &found);
        let json = check(&server, &["query", "--json", "shaken.acceleration.x between 3 and 4"], &[]);
        let json: Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(json["items"][0]["topics"][0]["intervals"][0]["start_ns"], 3000);
        let (output, succeeded) = ask(&server, &["query", "shaken.acceleration.x > 1000"]);
        assert!(!succeeded && output.contains("nothing found"), "{output}");
        let (output, succeeded) = ask(&server, &["query", "shaken.acceleration.x >> 1"]);
        assert!(!succeeded && output.contains("^"), "{output}");
        let (output, succeeded) = ask(&server, &["query", "shaken.acceleration.w > 1"]);
        assert!(!succeeded && output.contains("shaken.acceleration.w"), "{output}");
        let (output, succeeded) = ask(&server, &["query", "shaken within 1,2,3,4"]);
        assert!(!succeeded && output.contains("no position"), "{output}");
        check(&server, &["query", "sequence match 't*' and topic.tag = 'shaken'"], &["two"]);
    });
}

#[test]
fn fetch_writes_only_the_rows_of_the_matching_windows() {
    run(async {
        let server = recorded().await;
        let dir = server.data().join("fetched");
        let to = dir.display().to_string();
        let question = "shaken.acceleration.x between 3 and 4";
        check(&server, &["query", question, "--fetch", &to, "--format", "csv"], &["2000 rows"]);
        let csv = std::fs::read_to_string(dir.join("one/imu.csv")).expect("the file");
        let lines: Vec<&str> = csv.lines().collect();
        assert_eq!(lines[0], "timestamp_ns,acceleration.x,acceleration.y,acceleration.z,frame_id");
        assert_eq!(lines[1], "3000,3.0,0.0,0.0,base");
        assert_eq!((lines.len(), lines[2000]), (2001, "4999,4.0,0.0,0.0,base"));
        check(&server, &["query", question, "--fetch", &to], &["2000 rows"]);
        let parquet = std::fs::read(dir.join("one/imu.parquet")).expect("the file");
        assert!(parquet.ends_with(b"PAR1"));
    });
}

#[test]
fn ls_and_show_say_what_is_there() {
    run(async {
        let server = recorded().await;
        check(&server, &["ls"], &["one", "two", "locked", "1 topics", "40000 rows"]);
        let fitting = check(&server, &["ls", "t*"], &["two"]);
        assert!(!fitting.contains("one"), "{fitting}");
        check(&server, &["show", "one"], &["one", "locked", "/imu", "shaken", "40000"]);
        check(&server, &["show", "one/imu"], &["40000 rows", "ontology shaken version 1", "acceleration.norm"]);
        let (output, succeeded) = ask(&server, &["show", "three"]);
        assert!(!succeeded && output.contains("three"), "{output}");
    });
}

#[test]
fn ontologies_are_listed_shown_added_and_checked() {
    run(async {
        let server = Server::start(&[]);
        check(&server, &["ontology", "list"], &["IMU", "version 1", "builtin"]);
        check(&server, &["ontology", "show", "GPS"], &["position.x", "position within"]);
        let (output, succeeded) = ask(&server, &["ontology", "show", "Gps1"]);
        assert!(!succeeded && output.contains("did you mean `GPS`"), "{output}");
        let file = server.data().join("tank.json");
        let fields =
            r#"[{"name": "timestamp_ns", "type": "int64", "nullable": false}, {"name": "level", "type": "double"}]"#;
        std::fs::write(&file, fields).expect("written");
        let file = file.display().to_string();
        assert!(tokio::task::block_in_place(|| flightbox(&["ontology", "check", &file])).contains("can be stored"));
        check(&server, &["ontology", "add", "Tank", &file], &["Tank version 1"]);
        check(&server, &["ontology", "add", "Tank", &file], &["Tank version 1"]);
        std::fs::write(&file, r#"[{"name": "level", "type": "dubble"}]"#).expect("written");
        let (output, succeeded) = tokio::task::block_in_place(|| flightbox_may_fail(&["ontology", "check", &file]));
        assert!(!succeeded && output.contains("dubble"), "{output}");
    });
}

#[test]
fn inv_6_a_lost_index_is_noticed_and_made_anew_from_the_segments() {
    let mut server = Server::start(&["chunk_bytes=64KiB"]);
    run(async {
        let mut client = server.client().await;
        two_drives(&mut client).await;
        let key = create_sequence(&mut client, "short").await;
        topic(&mut client, &key, "short/imu", "shaken", vec![vectors(0, &[0.5, f64::NAN])]).await;
        finalize(&mut client, "short", &key).await;
    });
    server.stop();
    let data = server.data().display().to_string();
    let before = flightbox(&["reindex", "--check", "--data", &data]);
    assert!(before.contains("3 topics") && before.contains("0 different"), "{before}");
    {
        let catalog = Catalog::open(&server.data().join("catalog"), false).expect("the catalog");
        let mut group = catalog.group().expect("a group");
        let lose = |txn: &mut storage::catalog::Txn<'_>| -> storage::error::Result<()> {
            txn.delete_prefix(Family::Skip, b"b".to_vec());
            Ok(())
        };
        group.change(lose).expect("changed");
        group.commit().expect("committed");
    }
    let (lost, equal) = flightbox_may_fail(&["reindex", "--check", "--data", &data]);
    assert!(!equal && lost.contains("one/imu"), "{lost}");
    flightbox(&["reindex", "--data", &data]);
    assert!(flightbox(&["reindex", "--check", "--data", &data]).contains("0 different"));
    let folder = server.data().to_owned();
    let again = Server::start_on(&folder, &[]);
    let found = flightbox(&["query", "shaken.acceleration.x = 0.5", "--listen", &again.address.to_string()]);
    assert!(found.contains("short"), "{found}");
}
