//! The registry of ontologies: which schemas a tag has, and whether a topic's schema is one of them.
//!
//! Guarantees: a registered version never changes; versions are made inside committer groups, so two
//! topics that bring the same new schema at once get one version. Kept in the catalog, held in memory:
//! a DoPut is checked against it before a byte of data is taken.
//! Knows no gRPC and no file.

use crate::config::OntologyMode;
use crate::ingest::committer::CommitHandle;
use crate::limits;
use crate::when::now_ns;
use arrow::datatypes::SchemaRef;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use storage::StorageError;
use storage::catalog::keys::{self, Family};
use storage::catalog::{Catalog, Look, Txn};
use storage::ontology::{Difference, Ontology, Origin, Relation, builtin, relate};

/// Why a schema is not taken.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum RegistryError {
    #[error("the ontology tag `{tag}` is not registered, and this server takes registered ones only: {remedy}")]
    Unknown { tag: String, remedy: String },
    #[error("the schema is none of ontology `{tag}`: {difference} (version {version}); register it or send that one")]
    OtherSchema { tag: String, version: u32, difference: Difference },
    #[error("the schema of ontology `{tag}` has {bytes} bytes, over the limit of {most}")]
    TooLarge { tag: String, bytes: usize, most: usize },
    #[error("the registry is full: its schemas have {most} bytes; use registered tags, or set ontology = \"strict\"")]
    Full { most: usize },
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// All versions by tag, oldest first.
type Versions = BTreeMap<String, Vec<Arc<Ontology>>>;

/// The registry. Written only inside committer groups.
#[derive(Debug)]
pub(crate) struct Registry {
    mode: OntologyMode,
    versions: RwLock<Versions>,
}

impl Registry {
    /// Reads the registry; what comes with this program is added where it is missing.
    pub(crate) async fn load(
        catalog: &Catalog,
        committer: &CommitHandle,
        mode: OntologyMode,
    ) -> Result<Arc<Self>, RegistryError> {
        let mut versions = Versions::new();
        for record in catalog.ontologies()? {
            let ontology = Arc::new(Ontology::load(record)?);
            versions.entry(ontology.record.tag.clone()).or_default().push(ontology);
        }
        let registry = Arc::new(Self { mode, versions: RwLock::new(versions) });
        let shipped: Vec<Ontology> =
            builtin()?.into_iter().filter(|shipped| registry.same(shipped).is_none()).collect();
        if !shipped.is_empty() {
            let into = Arc::clone(&registry);
            committer
                .change(move |txn, _| {
                    for ontology in shipped {
                        into.add(txn, ontology)?;
                    }
                    Ok::<_, RegistryError>(())
                })
                .await?;
        }
        Ok(registry)
    }

    /// One without the shipped ontologies, which take a while to read.
    #[cfg(test)]
    pub(crate) fn empty(mode: OntologyMode) -> Arc<Self> {
        Arc::new(Self { mode, versions: RwLock::default() })
    }

    /// A schema on its way to the registry: what takes time is done here, outside of the committer.
    pub(crate) fn offer(tag: &str, wire: &SchemaRef, origin: Origin) -> Result<Ontology, RegistryError> {
        let offered = Ontology::new(tag, 0, origin, now_ns(), Arc::clone(wire))?;
        if offered.record.schema.len() > limits::ONTOLOGY_BYTES_MAX {
            let most = limits::ONTOLOGY_BYTES_MAX;
            return Err(RegistryError::TooLarge { tag: tag.to_owned(), bytes: offered.record.schema.len(), most });
        }
        Ok(offered)
    }

    /// The version that a topic's schema is, registered now if the mode allows; with a note when the
    /// schema gives a field another type than the tag's newest version.
    pub(crate) fn admit(
        &self,
        txn: &mut Txn<'_>,
        offered: Ontology,
    ) -> Result<(Arc<Ontology>, Option<String>), RegistryError> {
        let tag = offered.record.tag.clone();
        if self.mode == OntologyMode::Strict && self.same(&offered).is_none() {
            let newest = self.get(&tag, None);
            return Err(match newest.map(|newest| (newest.record.version, relate(&newest.wire, &offered.wire))) {
                Some((version, Relation::Changed { difference } | Relation::Compatible { difference })) => {
                    RegistryError::OtherSchema { tag, version, difference }
                }
                Some((_, Relation::Same)) | None => {
                    let remedy = match self.nearest(&tag) {
                        Some(near) => format!("did you mean `{near}`? Or add it by `flightbox ontology add`"),
                        None => "add it by `flightbox ontology add`".to_owned(),
                    };
                    RegistryError::Unknown { tag, remedy }
                }
            });
        }
        self.adopt(txn, offered)
    }

    /// As [`Self::admit`] in mode `open`, whatever the mode: for topics that are here already.
    pub(crate) fn adopt(
        &self,
        txn: &mut Txn<'_>,
        offered: Ontology,
    ) -> Result<(Arc<Ontology>, Option<String>), RegistryError> {
        let newest = self.get(&offered.record.tag, None);
        let changed =
            newest.filter(|newest| newest.fingerprint != offered.fingerprint).and_then(|newest| {
                match relate(&newest.wire, &offered.wire) {
                    Relation::Changed { difference } => Some((newest.record.version, difference)),
                    Relation::Same | Relation::Compatible { .. } => None,
                }
            });
        let note = changed.map(|(version, difference)| {
            format!("differs from version {version} of `{}` in {difference}", offered.record.tag)
        });
        Ok((self.register(txn, offered)?, note))
    }

    /// Registers a schema; the version that is there already if it is the same.
    pub(crate) fn register(&self, txn: &mut Txn<'_>, offered: Ontology) -> Result<Arc<Ontology>, RegistryError> {
        match self.same(&offered) {
            Some(known) => {
                // Known here, and missing there after a commit that failed.
                let key = keys::ontology(&known.record.tag, known.record.version);
                if txn.get(Family::Ontologies, &key)?.is_none() {
                    txn.put(Family::Ontologies, key, &known.record)?;
                }
                Ok(known)
            }
            None => self.add(txn, offered),
        }
    }

    fn add(&self, txn: &mut Txn<'_>, mut offered: Ontology) -> Result<Arc<Ontology>, RegistryError> {
        let mut all = self.versions.write().unwrap_or_else(PoisonError::into_inner);
        let bytes: usize = all.values().flatten().map(|known| known.record.schema.len()).sum();
        if bytes + offered.record.schema.len() > limits::REGISTRY_BYTES_MAX {
            return Err(RegistryError::Full { most: limits::REGISTRY_BYTES_MAX });
        }
        let versions = all.entry(offered.record.tag.clone()).or_default();
        offered.record.version = versions.last().map_or(1, |last| last.record.version + 1);
        let ontology = Arc::new(offered);
        let key = keys::ontology(&ontology.record.tag, ontology.record.version);
        txn.put(Family::Ontologies, key, &ontology.record)?;
        versions.push(Arc::clone(&ontology));
        Ok(ontology)
    }

    fn same(&self, offered: &Ontology) -> Option<Arc<Ontology>> {
        let all = self.versions.read().unwrap_or_else(PoisonError::into_inner);
        all.get(&offered.record.tag)?.iter().find(|known| known.fingerprint == offered.fingerprint).cloned()
    }

    /// A version, or the newest.
    pub(crate) fn get(&self, tag: &str, version: Option<u32>) -> Option<Arc<Ontology>> {
        let all = self.versions.read().unwrap_or_else(PoisonError::into_inner);
        let versions = all.get(tag)?;
        match version {
            Some(version) => versions.iter().find(|known| known.record.version == version).cloned(),
            None => versions.last().cloned(),
        }
    }

    /// All versions of a tag, oldest first.
    pub(crate) fn versions(&self, tag: &str) -> Vec<Arc<Ontology>> {
        let all = self.versions.read().unwrap_or_else(PoisonError::into_inner);
        all.get(tag).cloned().unwrap_or_default()
    }

    /// Everything, by tag.
    pub(crate) fn all(&self) -> Vec<Arc<Ontology>> {
        let all = self.versions.read().unwrap_or_else(PoisonError::into_inner);
        all.values().flatten().cloned().collect()
    }

    /// The registered tag that is most like this one.
    pub(crate) fn nearest(&self, tag: &str) -> Option<String> {
        let all = self.versions.read().unwrap_or_else(PoisonError::into_inner);
        nearest(tag, all.keys().map(String::as_str))
    }
}

/// The candidate most like a word, letters' case and `_` apart; `None` if none is much like it.
pub(crate) fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    let plain = |text: &str| text.replace('_', "").to_lowercase();
    let wanted = plain(word);
    candidates
        .map(|candidate| (distance(&wanted, &plain(candidate)), candidate))
        .min()
        .filter(|(distance, _)| *distance <= wanted.chars().count().div_ceil(3))
        .map(|(_, candidate)| candidate.to_owned())
}

/// Levenshtein distance, of short words.
fn distance(a: &str, b: &str) -> usize {
    const WORD_MAX: usize = 64;
    let b: Vec<char> = b.chars().take(WORD_MAX).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().take(WORD_MAX).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_word_finds_its_neighbour_and_a_strange_one_does_not() {
        let tags = ["IMU", "GPS", "ForceTorque", "Image"];
        assert_eq!(nearest("imu", tags.into_iter()).as_deref(), Some("IMU"));
        assert_eq!(nearest("force_torqe", tags.into_iter()).as_deref(), Some("ForceTorque"));
        assert_eq!(nearest("Thermometer", tags.into_iter()), None);
    }
}
