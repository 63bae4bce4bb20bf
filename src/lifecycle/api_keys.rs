//! API keys: made, looked at and revoked. A token is shown once; the catalog keeps its SHA-256.
//!
//! Form of a token (protocol.md 2.7): `msco_` + 32 of `[a-z0-9]`, letters and digits, + `_` + 8 hex
//! digits, the fingerprint, which are the start of the SHA-256 of the 32. Keys are not enforced yet.

use crate::lifecycle::{Lifecycle, LifecycleError};
use crate::limits;
use crate::when::now_ns;
use sha2::{Digest, Sha256};
use storage::catalog::Look;
use storage::catalog::keys::Family;
use storage::catalog::records::KeyRecord;
use uuid::Uuid;

type Result<T> = std::result::Result<T, LifecycleError>;

const PERMISSIONS: [&str; 4] = ["read", "write", "delete", "manage"];
const LETTERS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// A fresh random token.
fn new_token() -> String {
    loop {
        let random = [Uuid::new_v4(), Uuid::new_v4()];
        let payload: String = random
            .iter()
            .flat_map(|uuid| uuid.as_bytes())
            .map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()]))
            .collect();
        let has = |kind: fn(&u8) -> bool| payload.bytes().any(|byte| kind(&byte));
        // One client generation insists on both.
        if has(u8::is_ascii_digit) && has(u8::is_ascii_lowercase) {
            return format!("msco_{payload}_{}", hex(&Sha256::digest(&payload), 4));
        }
    }
}

fn hex(bytes: &[u8], take: usize) -> String {
    bytes.iter().take(take).map(|byte| format!("{byte:02x}")).collect()
}

impl Lifecycle {
    /// Makes a key; returns its token.
    pub(crate) async fn create_key(
        &self,
        permissions: String,
        description: String,
        expires_at_ns: Option<i64>,
    ) -> Result<String> {
        if !PERMISSIONS.contains(&permissions.as_str()) {
            let why = format!("is none of {}", PERMISSIONS.join(", "));
            return Err(LifecycleError::Invalid { key: "permissions", value: permissions, why });
        }
        super::notes::check_description(&description)?;
        self.committer
            .change(move |txn, _| {
                if txn.records::<KeyRecord>(Family::Keys, b"")?.len() >= limits::API_KEYS_MAX {
                    let remedy = "revoke one first";
                    return Err(LifecycleError::Full { what: "API keys", most: limits::API_KEYS_MAX, remedy });
                }
                let mut token = new_token();
                while txn.get(Family::Keys, fingerprint(&token).as_bytes())?.is_some() {
                    token = new_token();
                }
                let record = KeyRecord {
                    hash: Sha256::digest(&token).into(),
                    permissions,
                    description,
                    created_at_ns: now_ns(),
                    expires_at_ns,
                };
                txn.put(Family::Keys, fingerprint(&token).as_bytes().to_vec(), &record)?;
                Ok(token)
            })
            .await
    }

    /// A key by its fingerprint.
    pub(crate) fn key(&self, fingerprint: &str) -> Result<KeyRecord> {
        let found = self.catalog.record(Family::Keys, fingerprint.as_bytes())?;
        found.ok_or_else(|| LifecycleError::NotFound { what: "API key", name: fingerprint.to_owned() })
    }

    /// Removes a key.
    pub(crate) async fn revoke_key(&self, fingerprint: String) -> Result<()> {
        self.committer
            .change(move |txn, _| {
                if txn.get(Family::Keys, fingerprint.as_bytes())?.is_none() {
                    return Err(LifecycleError::NotFound { what: "API key", name: fingerprint });
                }
                txn.delete(Family::Keys, fingerprint.into_bytes());
                Ok(())
            })
            .await
    }
}

fn fingerprint(token: &str) -> String {
    token.rsplit('_').next().unwrap_or("").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_the_form_that_clients_check() {
        let token = new_token();
        let parts: Vec<&str> = token.split('_').collect();
        let ["msco", payload, fingerprint] = parts.as_slice() else { panic!("{token}") };
        assert_eq!((payload.len(), fingerprint.len()), (32, 8));
        assert!(payload.bytes().all(|byte| LETTERS.contains(&byte)));
        assert_ne!(new_token(), token);
    }
}
