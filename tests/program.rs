//! The program as systemd and an operator meet it.

use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

fn flightbox() -> Command {
    Command::new(env!("CARGO_BIN_EXE_flightbox"))
}

#[test]
fn systemd_is_told_ready_after_recovery_and_stopping_on_sigterm() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).expect("a notify socket");
    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out");
    let mut child = flightbox()
        .args(["serve", "--listen", "127.0.0.1:0", "--data"])
        .arg(folder.path().join("data"))
        .env("NOTIFY_SOCKET", &path)
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let wait_for = |what: &str| {
        let mut buffer = [0; 4096];
        loop {
            let count = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("no {what}: {error}"));
            let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
            if text.lines().any(|line| line == what) {
                return text;
            }
        }
    };
    assert!(wait_for("READY=1").contains("STATUS=listening on 127.0.0.1:"));
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)
        .expect("SIGTERM");
    wait_for("STOPPING=1");
    assert!(child.wait().expect("ends").success());
}

#[test]
fn doctor_prints_a_line_a_check_and_info_without_a_server_says_how_to_start_one() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let doctor = flightbox().args(["doctor", "--data"]).arg(folder.path()).output().expect("runs");
    let text = String::from_utf8_lossy(&doctor.stdout);
    for check in ["kernel", "cores", "memlock", "engine", "O_DIRECT", "file system", "free space", "write cache"] {
        assert!(text.lines().any(|line| line.contains(check)), "{check} is missing in:\n{text}");
    }
    let info = flightbox().args(["info", "--listen", "127.0.0.1:1"]).output().expect("runs");
    assert!(!info.status.success());
    assert!(String::from_utf8_lossy(&info.stderr).contains("flightbox serve"));
}

#[test]
fn a_misspelt_setting_is_refused_by_name_wherever_it_stands() {
    let run = |command: &mut Command| {
        let output = command.output().expect("runs");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let by_flag = run(flightbox().args(["doctor", "--set", "chunk_byte=1MiB"]));
    assert!(by_flag.contains("chunk_byte") && by_flag.contains("chunk_bytes"), "{by_flag}");
    let by_env = run(flightbox().arg("doctor").env("FLIGHTBOX_WRITER", "2"));
    assert!(by_env.contains("FLIGHTBOX_WRITER") && by_env.contains("writers"), "{by_env}");
}
