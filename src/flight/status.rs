//! Errors to gRPC codes, in one exhaustive table: a new variant must choose.

use crate::lifecycle::LifecycleError;
use crate::ontology::RegistryError;
use storage::StorageError;
use tonic::{Code, Status};

/// The status of a life-cycle error.
pub(crate) fn of_lifecycle(error: &LifecycleError) -> Status {
    let code = match error {
        LifecycleError::AlreadyExists { .. } => Code::AlreadyExists,
        LifecycleError::NotFound { .. } => Code::NotFound,
        LifecycleError::WrongKey { .. } | LifecycleError::OutsideSequence { .. } => Code::PermissionDenied,
        LifecycleError::Locked { .. }
        | LifecycleError::TopicUnlocked { .. }
        | LifecycleError::Busy { .. }
        | LifecycleError::HasRows { .. }
        | LifecycleError::Gap { .. }
        | LifecycleError::OtherBatch { .. }
        | LifecycleError::OtherUpload { .. } => Code::FailedPrecondition,
        LifecycleError::Full { .. } => Code::ResourceExhausted,
        LifecycleError::Invalid { .. } => Code::InvalidArgument,
        LifecycleError::Registry(error) => return of_registry(error),
        LifecycleError::Storage(error) => return of_storage(error),
    };
    Status::new(code, error.to_string())
}

/// The status of a schema that is not taken.
pub(crate) fn of_registry(error: &RegistryError) -> Status {
    let code = match error {
        RegistryError::Unknown { .. } | RegistryError::OtherSchema { .. } | RegistryError::TooLarge { .. } => {
            Code::InvalidArgument
        }
        RegistryError::Full { .. } => Code::ResourceExhausted,
        RegistryError::Storage(error) => return of_storage(error),
    };
    Status::new(code, error.to_string())
}

/// The status of a storage error.
pub(crate) fn of_storage(error: &StorageError) -> Status {
    // Whichever notices first, the chunk or the watch over the space: the client is told alike.
    if error.is_full_disk() {
        return disk_is_full(&error.to_string());
    }
    let code = match error {
        StorageError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Code::NotFound,
        StorageError::Io { .. } | StorageError::Directory(_) => Code::Internal,
        StorageError::Catalog { .. } | StorageError::Away { .. } => Code::Unavailable,
        StorageError::Decode { .. } | StorageError::Checksum { .. } => Code::DataLoss,
        StorageError::Unstorable { .. } | StorageError::Format { .. } => Code::InvalidArgument,
        StorageError::Gone => Code::Aborted,
        // `StorageError` is non-exhaustive: what a later version adds is the server's fault.
        _ => Code::Internal,
    };
    Status::new(code, error.to_string())
}

/// The refusal of what the disk has no room for.
pub(crate) fn disk_is_full(what: &str) -> Status {
    Status::resource_exhausted(format!("the recorder's disk is full: {what}; delete or move recordings"))
}

impl From<LifecycleError> for Status {
    fn from(error: LifecycleError) -> Self {
        of_lifecycle(&error)
    }
}

/// A refusal of something the client sent: what, which value, what would be right.
pub(crate) fn invalid(text: impl Into<String>) -> Status {
    Status::invalid_argument(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(error: LifecycleError, code: Code) {
        assert_eq!(of_lifecycle(&error).code(), code, "{error}");
    }

    #[test]
    fn each_refusal_has_its_code() {
        check(LifecycleError::AlreadyExists { what: "topic", name: "s/t".into() }, Code::AlreadyExists);
        check(LifecycleError::NotFound { what: "topic", name: "s/t".into() }, Code::NotFound);
        check(
            LifecycleError::WrongKey { what: "topic", name: "s/t".into(), key: uuid::Uuid::nil() },
            Code::PermissionDenied,
        );
        check(LifecycleError::Busy { topic: "s/t".into() }, Code::FailedPrecondition);
        check(
            LifecycleError::Invalid { key: "name", value: String::new(), why: "is empty".into() },
            Code::InvalidArgument,
        );
        let full = LifecycleError::Storage(StorageError::io("write", "/x", std::io::ErrorKind::StorageFull.into()));
        let told = of_lifecycle(&full).message().to_owned();
        assert!(told.contains("the recorder's disk is full: write /x") && told.contains("delete or move"), "{told}");
        check(full, Code::ResourceExhausted);
    }
}
