//! Actions: one function each, JSON in and out, shapes as protocol.md section 2 has them.

use crate::flight::dialect::{Connection, Dialect, Hint};
use crate::flight::list::total_bytes;
use crate::flight::questions;
use crate::flight::service::Shared;
use crate::flight::status::{invalid, of_storage};
use crate::lifecycle::notes::Subject;
use crate::lifecycle::upload::compression_asked;
use crate::lifecycle::{
    DeleteRule, LifecycleError, Locator, NewTopic, UploadKey, check_tag, find_sequence, find_topic, is_locked,
    parse_uuid,
};
use crate::limits;
use crate::query::times::Interval;
use serde_json::{Map, Value, json};
use storage::catalog::Look;
use storage::chunk::Format;
use storage::ids::{SequenceId, SessionId};
use storage::verify::verify_catalog;
use tonic::Status;

/// Every action with its description, for ListActions.
pub(crate) const ACTIONS: [(&str, &str); 41] = [
    ("sequence_create", "Create a sequence: {name|locator, user_metadata} -> {key} (v0) or nothing."),
    ("sequence_finalize", "v0: lock a sequence whose topics are all locked: {name, key, accept_partial?}."),
    ("sequence_abort", "v0: delete an unlocked sequence with everything in it: {name, key}."),
    ("sequence_delete", "Delete a sequence: {name} (v0, unlocked only) or {locator}."),
    ("sequence_system_info", "v0: size, lock state and creation time of a sequence: {name}."),
    ("session_create", "Open a session of a sequence: {locator} -> {uuid, locator}."),
    ("session_finalize", "Lock a session whose topics are all locked: {session_uuid, accept_partial?}."),
    ("session_delete", "Delete a session with its topics: {session_uuid} or {locator}."),
    ("topic_create", "Create a topic: {sequence_key, name, …} -> {key} (v0) or {session_uuid, locator, …} -> {uuid}."),
    ("topic_delete", "Delete a topic: {name} (v0, unlocked only) or {locator}."),
    ("topic_system_info", "v0: chunks, size, lock state and creation time of a topic: {name}."),
    (
        "topic_status",
        "What is durable of a topic, to resume from: {locator|name} -> {rows, batches, bytes, last_time_ns, …}.",
    ),
    (
        "verify",
        "Read a topic and compare every byte: {locator} -> {chunks, bytes, findings, …}; {} or {sequence}: what there is.",
    ),
    ("recovery", "The receipt of the last recovery that found something."),
    ("version", "The protocol version this server speaks."),
    ("info", "Version and limits; with {\"flightbox\": true} also the state of the appliance."),
    (
        "query",
        "Find sequences and topics: {sequence, topic, ontology, limit, explain, intervals, join_dt_ns} -> {items}.",
    ),
    (
        "topic_filter_clusterize",
        "Windows of matching rows of a topic: {locator, clustering_dt_ns, ontology, timestamp_range}.",
    ),
    (
        "topic_filter_intersect",
        "Windows where topics match at once: {topics: [{locator, ontology, …}], intersect_dt_ns}.",
    ),
    ("ontology_list", "All registered ontologies, every version."),
    ("ontology_get", "One ontology with its schema and index: {tag, version?}."),
    ("ontology_register", "Register a schema under a tag: {tag, schema | ipc}."),
    ("sequence_notification_create", "Leave a notification on a sequence: {locator, notification_type, msg}."),
    ("sequence_notification_list", "Notifications of a sequence: {locator} -> {notifications}."),
    ("sequence_notification_purge", "Remove the notifications of a sequence: {locator}."),
    ("topic_notification_create", "Leave a notification on a topic: {locator, notification_type, msg}."),
    ("topic_notification_list", "Notifications of a topic: {locator} -> {notifications}."),
    ("topic_notification_purge", "Remove the notifications of a topic: {locator}."),
    ("sequence_notify_create", "v0: leave a notification on a sequence: {name, notify_type, msg}."),
    ("sequence_notify_list", "v0: notifications of a sequence: {name} -> {notifies}."),
    ("sequence_notify_purge", "v0: remove the notifications of a sequence: {name}."),
    ("topic_notify_create", "v0: leave a notification on a topic: {name, notify_type, msg}."),
    ("topic_notify_list", "v0: notifications of a topic: {name} -> {notifies}."),
    ("topic_notify_purge", "v0: remove the notifications of a topic: {name}."),
    ("layer_create", "v0: make a layer: {name, description}."),
    ("layer_delete", "v0: remove a layer: {name}."),
    ("layer_update", "v0: rename and describe a layer: {prev_name, curr_name, curr_description}."),
    ("layer_list", "v0: all layers: {} -> {layers}."),
    ("api_key_create", "Make an API key: {permissions, description, expires_at_ns?} -> {api_key_token}."),
    ("api_key_status", "Look at an API key: {api_key_fingerprint}."),
    ("api_key_revoke", "Remove an API key: {api_key_fingerprint}."),
];

/// The protocol generation this server presents itself as.
const PROTOCOL_VERSION: (u32, u32, u32) = (0, 7, 0);

/// The fields of a request body.
struct Body {
    action: String,
    fields: Map<String, Value>,
}

impl Body {
    fn parse(action: &str, bytes: &[u8]) -> Result<Self, Status> {
        if bytes.is_empty() {
            return Ok(Self { action: action.to_owned(), fields: Map::new() });
        }
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(fields)) => Ok(Self { action: action.to_owned(), fields }),
            Ok(other) => Err(invalid(format!("the body of action `{action}` is {}, not a JSON object", kind(&other)))),
            Err(error) => Err(invalid(format!("the body of action `{action}` is not JSON: {error}"))),
        }
    }

    fn has(&self, key: &str) -> bool {
        self.fields.contains_key(key)
    }

    fn text(&self, key: &str) -> Result<&str, Status> {
        match self.fields.get(key) {
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(invalid(format!("action `{}`: `{key}` is {}, not a text", self.action, kind(other)))),
            None => Err(invalid(format!("action `{}` needs the field `{key}`", self.action))),
        }
    }

    /// A flag that is off unless it is given.
    fn flag(&self, key: &str) -> Result<bool, Status> {
        match self.fields.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(invalid(format!("action `{}`: `{key}` is {}, not a flag", self.action, kind(other)))),
        }
    }

    /// The resource, by whichever of both generations' keys is there.
    fn name_or_locator(&self) -> Result<(&'static str, &str), Status> {
        if self.has("name") { Ok(("name", self.text("name")?)) } else { Ok(("locator", self.text("locator")?)) }
    }

    fn user_metadata(&self) -> Result<String, Status> {
        match self.fields.get("user_metadata") {
            None | Some(Value::Null) => Ok("{}".to_owned()),
            Some(object @ Value::Object(_)) => {
                let text = object.to_string();
                if text.len() > limits::USER_METADATA_BYTES_MAX {
                    return Err(invalid(format!(
                        "action `{}`: `user_metadata` has {} bytes, over the limit of {}",
                        self.action,
                        text.len(),
                        limits::USER_METADATA_BYTES_MAX
                    )));
                }
                Ok(text)
            }
            Some(other) => {
                Err(invalid(format!("action `{}`: `user_metadata` is {}, not an object", self.action, kind(other))))
            }
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a flag",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// What a call tells about its client.
fn hint(action: &str, body: &Body) -> Hint {
    match action {
        "info" => Hint::Info,
        "version" => Hint::Version,
        "sequence_finalize" | "sequence_abort" | "sequence_system_info" | "topic_system_info" => Hint::V0,
        "session_delete" if body.has("session_uuid") => Hint::SessionDeleteByUuid,
        "session_create" | "session_finalize" | "session_delete" => Hint::Session,
        // Its keys are looked at by `Connection::note_query`; layers are v0's alone.
        "query" => Hint::Nothing,
        name if name.starts_with("layer_") => Hint::V0,
        _ if body.has("name") => Hint::V0,
        _ if body.has("locator") => Hint::Session,
        _ => Hint::Nothing,
    }
}

/// What an action answers.
pub(crate) enum Answer {
    /// One Result with this body.
    One(Vec<u8>),
    /// A Result for each window, in the full envelope; none for none.
    Windows(String, Vec<Interval>),
}

impl Answer {
    /// The bodies of the Results, made one by one.
    pub(crate) fn bodies(self) -> Box<dyn Iterator<Item = Vec<u8>> + Send> {
        match self {
            Self::One(body) => Box::new(std::iter::once(body)),
            Self::Windows(action, windows) => {
                Box::new(windows.into_iter().enumerate().map(move |(id, (start, end))| {
                    let window = json!({ "id": id, "ts": { "start_ns": start, "end_ns": end } });
                    json!({ "action": action, "response": window }).to_string().into_bytes()
                }))
            }
        }
    }
}

/// Whether a caller that goes away takes the action with it: what only asks, not what changes something.
pub(crate) fn only_asks(action: &str) -> bool {
    matches!(action, "query" | "topic_filter_clusterize" | "topic_filter_intersect")
}

/// Runs an action.
pub(crate) async fn run(shared: &Shared, connection: &Connection, action: &str, body: &[u8]) -> Result<Answer, Status> {
    let body = Body::parse(action, body)?;
    let dialect = connection.note(hint(action, &body));
    let response = match action {
        "sequence_create" => sequence_create(shared, &body).await?,
        "sequence_finalize" => sequence_finalize(shared, &body).await?,
        "sequence_abort" => sequence_abort(shared, &body).await?,
        "sequence_delete" => sequence_delete(shared, connection, &body).await?,
        "sequence_system_info" => sequence_system_info(shared, &body)?,
        "session_create" => session_create(shared, connection, &body).await?,
        "session_finalize" => session_finalize(shared, &body).await?,
        "session_delete" => session_delete(shared, &body).await?,
        "topic_create" => topic_create(shared, &body).await?,
        "topic_delete" => topic_delete(shared, &body).await?,
        "topic_system_info" => topic_system_info(shared, &body)?,
        "topic_status" => topic_status(shared, &body).await?,
        "verify" => verify(shared, &body).await?,
        "recovery" => {
            let receipt = crate::recovery::last_receipt(&shared.lifecycle.catalog).map_err(|e| of_storage(&e))?;
            serde_json::to_value(receipt).map_err(|error| Status::internal(error.to_string()))?
        }
        "version" => version(),
        "info" => info(shared, &body)?,
        "query" => questions::query(shared, connection, &body.fields).await?,
        "topic_filter_clusterize" => {
            return Ok(Answer::Windows(action.to_owned(), questions::clusterize(shared, &body.fields).await?));
        }
        "topic_filter_intersect" => {
            return Ok(Answer::Windows(action.to_owned(), questions::intersection(shared, &body.fields).await?));
        }
        "ontology_list" => questions::ontology_list(shared),
        "ontology_get" => questions::ontology_get(shared, &body.fields)?,
        "ontology_register" => questions::ontology_register(shared, &body.fields).await?,
        "layer_create" => {
            let (name, description) = (body.text("name")?.to_owned(), body.text("description")?.to_owned());
            shared.lifecycle.put_layer(None, name, description).await?;
            Value::Null
        }
        "layer_update" => {
            let (name, description) = (body.text("curr_name")?.to_owned(), body.text("curr_description")?.to_owned());
            shared.lifecycle.put_layer(Some(body.text("prev_name")?.to_owned()), name, description).await?;
            Value::Null
        }
        "layer_delete" => {
            shared.lifecycle.delete_layer(body.text("name")?.to_owned()).await?;
            Value::Null
        }
        "layer_list" => {
            let layers = shared.lifecycle.layers()?;
            let layers = layers.into_iter().map(|(name, text)| json!({ "name": name, "description": text }));
            json!({ "layers": layers.collect::<Vec<_>>() })
        }
        "api_key_create" => api_key_create(shared, &body).await?,
        "api_key_status" => api_key_status(shared, &body)?,
        "api_key_revoke" => {
            shared.lifecycle.revoke_key(body.text("api_key_fingerprint")?.to_owned()).await?;
            Value::Null
        }
        other => match other.split_once("_noti") {
            Some((thing @ ("sequence" | "topic"), rest)) => notification(shared, &body, thing, rest).await?,
            _ => return Err(unknown(other)),
        },
    };
    let envelope = match (response, dialect) {
        (Value::Null, Dialect::V0) => json!({ "action": "empty" }),
        (response, _) => json!({ "action": action, "response": response }),
    };
    Ok(Answer::One(envelope.to_string().into_bytes()))
}

fn unknown(action: &str) -> Status {
    let known: Vec<&str> = ACTIONS.iter().map(|(name, _)| *name).collect();
    invalid(format!("there is no action `{action}`; known are {}", known.join(", ")))
}

/// Notifications under both spellings: `notify` (v0) and `notification`.
async fn notification(shared: &Shared, body: &Body, thing: &str, rest: &str) -> Result<Value, Status> {
    let v0 = rest.starts_with("fy_");
    let key = if v0 { "name" } else { "locator" };
    let subject = |body: &Body| -> Result<Subject, Status> {
        let text = body.text(key)?;
        Ok(match thing {
            "sequence" => Subject::Sequence(Locator::sequence(key, text)?),
            _ => Subject::Topic(Locator::topic(key, text)?),
        })
    };
    match rest {
        "fy_create" | "fication_create" => {
            let kind = body.text(if v0 { "notify_type" } else { "notification_type" })?;
            // Any other makes the clients' own listing raise.
            if kind != "error" {
                return Err(invalid(format!("the notification type {kind:?} is unknown; clients know only `error`")));
            }
            let text = body.text("msg")?;
            shared.lifecycle.notify(subject(body)?, kind.to_owned(), text.to_owned()).await?;
            Ok(Value::Null)
        }
        "fy_list" | "fication_list" => {
            let subject = subject(body)?;
            let (list, kind) = if v0 { ("notifies", "notify_type") } else { ("notifications", "notification_type") };
            let all: Vec<Value> = shared
                .lifecycle
                .notifications(&subject)?
                .into_iter()
                .map(|note| {
                    let created = datetime(note.created_at_ns);
                    json!({ "name": subject.name(), kind: note.kind, "msg": note.text, "created_datetime": created })
                })
                .collect();
            Ok(json!({ list: all }))
        }
        "fy_purge" | "fication_purge" => {
            shared.lifecycle.purge_notifications(subject(body)?).await?;
            Ok(Value::Null)
        }
        _ => Err(unknown(&body.action)),
    }
}

async fn api_key_create(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let expires = match body.fields.get("expires_at_ns") {
        None | Some(Value::Null) => None,
        Some(value) => {
            Some(value.as_i64().ok_or_else(|| invalid(format!("`expires_at_ns` is {value}, not nanoseconds")))?)
        }
    };
    let (permissions, description) = (body.text("permissions")?.to_owned(), body.text("description")?.to_owned());
    let token = shared.lifecycle.create_key(permissions, description, expires).await?;
    Ok(json!({ "api_key_token": token }))
}

fn api_key_status(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let fingerprint = body.text("api_key_fingerprint")?;
    let key = shared.lifecycle.key(fingerprint)?;
    Ok(json!({
        "api_key_fingerprint": fingerprint,
        "description": key.description,
        "created_at_ns": key.created_at_ns,
        "expires_at_ns": key.expires_at_ns,
    }))
}

async fn sequence_create(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let (key, name) = body.name_or_locator()?;
    let v0 = key == "name";
    let record = shared.lifecycle.create_sequence(Locator::sequence(key, name)?, body.user_metadata()?, v0).await?;
    Ok(if v0 { json!({ "key": record.id.to_string() }) } else { Value::Null })
}

fn v0_key(body: &Body) -> Result<(String, SequenceId), Status> {
    let name = Locator::sequence("name", body.text("name")?)?;
    Ok((name, SequenceId(parse_uuid("key", body.text("key")?)?)))
}

async fn sequence_finalize(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let (name, key) = v0_key(body)?;
    shared.lifecycle.finalize_sequence(name, key, body.flag("accept_partial")?).await?;
    Ok(Value::Null)
}

async fn sequence_abort(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let (name, key) = v0_key(body)?;
    shared.lifecycle.abort_sequence(name, key).await?;
    Ok(Value::Null)
}

async fn sequence_delete(shared: &Shared, connection: &Connection, body: &Body) -> Result<Value, Status> {
    let (key, name) = body.name_or_locator()?;
    let name = Locator::sequence(key, name)?;
    let rule = if key == "name" { DeleteRule::Unlocked } else { DeleteRule::Anything };
    match shared.lifecycle.delete_sequence(name.clone(), rule).await {
        // 0.3 deletes twice and shows its user the second answer.
        Err(LifecycleError::NotFound { .. }) if connection.just_deleted(&name) => Ok(Value::Null),
        Err(error) => Err(error.into()),
        Ok(()) => {
            connection.note_deleted(&name);
            Ok(Value::Null)
        }
    }
}

fn sequence_system_info(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let catalog = &shared.lifecycle.catalog;
    let sequence = find_sequence(catalog, &Locator::sequence("name", body.text("name")?)?)?;
    let mut bytes = 0;
    for topic in catalog.topics_of(sequence.id).map_err(|e| of_storage(&e))? {
        bytes += total_bytes(&catalog.totals(topic.no).map_err(|e| of_storage(&e))?);
    }
    let sessions = catalog.sessions_of(sequence.id).map_err(|e| of_storage(&e))?;
    Ok(json!({
        "total_size_bytes": bytes,
        "is_locked": is_locked(&sessions),
        "created_datetime": datetime(sequence.created_at_ns),
    }))
}

async fn session_create(shared: &Shared, connection: &Connection, body: &Body) -> Result<Value, Status> {
    let sequence = Locator::sequence("locator", body.text("locator")?)?;
    let session = shared.lifecycle.create_session(sequence).await?;
    let uuid = session.id.to_string();
    Ok(if connection.old_session_reply(shared.config.legacy_session_reply) {
        json!({ "uuid": uuid })
    } else {
        json!({ "uuid": uuid, "locator": session.locator })
    })
}

async fn session_finalize(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let id = SessionId(parse_uuid("session_uuid", body.text("session_uuid")?)?);
    shared.lifecycle.finalize_session(id, body.flag("accept_partial")?).await?;
    Ok(Value::Null)
}

async fn session_delete(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let by_id = if body.has("session_uuid") {
        Some(SessionId(parse_uuid("session_uuid", body.text("session_uuid")?)?))
    } else {
        None
    };
    let locator =
        if by_id.is_none() { body.text("locator")?.trim_start_matches('/').to_owned() } else { String::new() };
    shared
        .lifecycle
        .delete_session(move |txn| {
            let (found, name) = match by_id {
                Some(id) => (txn.session(id)?, id.to_string()),
                None => (txn.session_by_locator(&locator)?, locator),
            };
            found.ok_or(LifecycleError::NotFound { what: "session", name })
        })
        .await?;
    Ok(Value::Null)
}

async fn topic_create(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let v0 = body.has("sequence_key") || body.has("name");
    let (upload_key, key, name) = if v0 {
        let id = SequenceId(parse_uuid("sequence_key", body.text("sequence_key")?)?);
        (UploadKey::Sequence(id), "name", body.text("name")?)
    } else {
        let id = SessionId(parse_uuid("session_uuid", body.text("session_uuid")?)?);
        (UploadKey::Session(id), "locator", body.text("locator")?)
    };
    let tag = body.text("ontology_tag")?;
    check_tag("ontology_tag", tag)?;
    let format_name = body.text("serialization_format")?;
    let format = Format::from_name(format_name).ok_or_else(|| {
        invalid(format!("`serialization_format` = {format_name:?} is none of default, ragged, image"))
    })?;
    let user_metadata = body.user_metadata()?;
    compression_asked(&user_metadata).map_err(invalid)?;
    let new = NewTopic { locator: Locator::topic(key, name)?, ontology_tag: tag.to_owned(), format, user_metadata };
    let record = shared.lifecycle.create_topic(upload_key, new).await?;
    let id = record.id.to_string();
    Ok(if v0 { json!({ "key": id }) } else { json!({ "uuid": id }) })
}

async fn topic_delete(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let (key, name) = body.name_or_locator()?;
    let rule = if key == "name" { DeleteRule::Unlocked } else { DeleteRule::Anything };
    shared.lifecycle.delete_topic(Locator::topic(key, name)?, rule).await?;
    Ok(Value::Null)
}

fn topic_system_info(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let catalog = &shared.lifecycle.catalog;
    let topic = find_topic(catalog, &Locator::topic("name", body.text("name")?)?)?;
    let totals = catalog.totals(topic.no).map_err(|e| of_storage(&e))?;
    Ok(json!({
        "chunks_number": totals.chunks,
        "total_size_bytes": total_bytes(&totals),
        "is_locked": topic.completed_at_ns.is_some(),
        "created_datetime": datetime(topic.created_at_ns),
    }))
}

/// What a client needs to go on after it lost its connection or its server.
async fn topic_status(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let (key, name) = body.name_or_locator()?;
    let (topic, totals, uploading) = shared.lifecycle.topic_status(Locator::topic(key, name)?).await?;
    let partial = shared.lifecycle.catalog.topic_partial(topic.no).map_err(|e| of_storage(&e))?;
    let damaged = shared.lifecycle.catalog.damaged(topic.no).map_err(|e| of_storage(&e))?;
    Ok(json!({
        "locator": topic.locator,
        "locked": topic.completed_at_ns.is_some(),
        "partial": partial.is_some() && topic.completed_at_ns.is_some(),
        "uploading": uploading,
        "rows": totals.rows,
        "batches": totals.batches,
        "bytes": totals.data_bytes,
        "last_time_ns": totals.time.map(|time| time.1),
        "damaged_rows": damaged.iter().map(|damage| damage.end_row - damage.first_row).sum::<u64>(),
    }))
}

/// Without a locator: the catalog's own damage, and the topics to ask for one by one.
async fn verify(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let checker = shared.checker();
    if body.has("locator") {
        let locator = Locator::topic("locator", body.text("locator")?)?;
        let looked = checker.topic(&locator, |_| {}).await?;
        return serde_json::to_value(looked).map_err(|error| Status::internal(error.to_string()));
    }
    let sequence =
        if body.has("sequence") { Some(Locator::sequence("sequence", body.text("sequence")?)?) } else { None };
    if let Some(name) = &sequence {
        find_sequence(&shared.lifecycle.catalog, name)?;
    }
    let catalog = shared.lifecycle.catalog.clone();
    let findings = questions::turn(shared).await?.aside("verify", move || verify_catalog(&catalog)).await;
    let findings = findings.map_err(|e| of_storage(&e))?;
    let topics = checker.topics(sequence.as_deref()).map_err(|e| of_storage(&e))?;
    let topics: Vec<String> = topics.into_iter().map(|topic| topic.locator).collect();
    Ok(json!({ "findings": findings, "topics": topics }))
}

fn version() -> Value {
    let (major, minor, patch) = PROTOCOL_VERSION;
    json!({
        "version": format!("{major}.{minor}.{patch}"),
        "semver": { "major": major, "minor": minor, "patch": patch, "pre": "" },
    })
}

fn info(shared: &Shared, body: &Body) -> Result<Value, Status> {
    let mut info = version();
    let config = json!({
        "grpc_max_decode_message_size": shared.config.message_bytes_max,
        "grpc_max_encode_message_size": shared.config.message_bytes_max,
        "grpc_target_encode_message_size": limits::OUTGOING_BATCH_BYTES,
    });
    if let Some(object) = info.as_object_mut() {
        object.insert("config".to_owned(), config);
        // An extension, only where asked for: clients get exactly the keys they know.
        if body.fields.get("flightbox") == Some(&Value::Bool(true)) {
            object.insert("flightbox".to_owned(), shared.appliance_info().map_err(|e| of_storage(&e))?);
        }
    }
    Ok(info)
}

/// As clients parse it: `YYYY-MM-DD HH:MM:SS.mmm UTC`.
fn datetime(ns: i64) -> String {
    format!("{} UTC", crate::when::show(ns))
}

/// Reads every field of a body as any action would; for fuzzing.
#[cfg(any(test, feature = "hostile"))]
pub(super) fn read_all(action: &str, bytes: &[u8]) -> Result<(), Status> {
    let body = Body::parse(action, bytes)?;
    hint(action, &body);
    let read = [
        body.name_or_locator().and_then(|(key, text)| Locator::topic(key, text).map_err(Into::into)).map(|_| ()),
        body.name_or_locator().and_then(|(key, text)| Locator::sequence(key, text).map_err(Into::into)).map(|_| ()),
        body.user_metadata().map(|_| ()),
        body.flag("accept_partial").map(|_| ()),
        body.text("ontology_tag").and_then(|tag| check_tag("ontology_tag", tag).map_err(Into::into)),
        body.text("session_uuid").and_then(|text| parse_uuid("session_uuid", text).map_err(Into::into)).map(|_| ()),
    ];
    read.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_clients_parse_them() {
        assert_eq!(datetime(0), "1970-01-01 00:00:00.000 UTC");
        assert_eq!(datetime(951_782_400_000_000_000), "2000-02-29 00:00:00.000 UTC");
        assert_eq!(datetime(1_795_342_030_756_999_999), "2026-11-22 10:07:10.756 UTC");
    }
}
