//! A type for every number that names something, so that swapped arguments do not compile.

use serde::{Deserialize, Serialize};
use std::fmt;
use uuid::Uuid;

macro_rules! uuid_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A fresh random id.
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }
            /// The 16 bytes used in catalog keys.
            pub fn bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

uuid_newtype!(
    /// A sequence; in v0 also the key that allows writing it.
    SequenceId
);
uuid_newtype!(
    /// A session: one upload into a sequence.
    SessionId
);
uuid_newtype!(
    /// A topic as clients know it: the key that allows one DoPut into it.
    TopicId
);
uuid_newtype!(
    /// One segment file; bound into every checksum of the file.
    SegmentId
);

/// A topic as the catalog knows it. Given out once and never again, so it is also the
/// topic's *generation*: a name used again gets another number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TopicNo(pub u64);

impl fmt::Display for TopicNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
