//! What systemd is told: ready after recovery, stopping, and one line of status.
//! Without systemd (no `NOTIFY_SOCKET`) every call does nothing.

use sd_notify::NotifyState;

/// Recovery is done and the sockets are open.
pub(crate) fn ready(status: &str) {
    // A service manager that cannot be told finds out by its own time-outs.
    sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(status)]).ok();
}

/// Shutdown has begun.
pub(crate) fn stopping() {
    sd_notify::notify(&[NotifyState::Stopping, NotifyState::Status("draining uploads, sealing segments")]).ok(); // As above.
}

/// What is going on.
pub(crate) fn status(text: &str) {
    sd_notify::notify(&[NotifyState::Status(text)]).ok(); // As above.
}
