//! Questions to the real program: what the index decides, what is read, what is refused.

use crate::harness::{
    Client, Server, action, check_refused, create_sequence, encode, last_watermark, put_descriptor, run,
};
use arrow::array::{ArrayRef, BinaryArray, Float64Array, Int64Array, RecordBatch, StringArray, StructArray};
use arrow::datatypes::{DataType, Field, Fields, Schema};
use futures::stream;
use serde_json::{Value, json};
use std::sync::Arc;
use tonic::Code;

pub(crate) async fn topic(client: &mut Client, key: &str, name: &str, tag: &str, batches: Vec<RecordBatch>) {
    let body = json!({ "sequence_key": key, "name": name, "serialization_format": "default",
        "ontology_tag": tag, "user_metadata": {} });
    let answer = action(client, "topic_create", body).await.expect("topic_create");
    let topic_key = answer["key"].as_str().expect("a key").to_owned();
    let schema = batches[0].schema();
    let messages = encode(put_descriptor(name, &topic_key), schema, stream::iter(batches));
    let results = client.do_put(messages).await.expect("put").into_inner();
    last_watermark(results).await.expect("a clean end");
}

pub(crate) async fn finalize(client: &mut Client, name: &str, key: &str) {
    action(client, "sequence_finalize", json!({ "name": name, "key": key })).await.expect("finalize");
}

/// A vector a row: `x` as given, the rest zero.
pub(crate) fn vectors(first: i64, xs: &[f64]) -> RecordBatch {
    let zeros = || Arc::new(Float64Array::from(vec![0.0; xs.len()])) as ArrayRef;
    let axes = Fields::from(["x", "y", "z"].map(|axis| Field::new(axis, DataType::Float64, true)).to_vec());
    let columns: Vec<ArrayRef> = vec![Arc::new(Float64Array::from(xs.to_vec())), zeros(), zeros()];
    let time: Vec<i64> = (first..).take(xs.len()).collect();
    let frames = StringArray::from(vec!["base"; xs.len()]);
    let schema = Schema::new(vec![
        Field::new("timestamp_ns", DataType::Int64, false),
        Field::new("acceleration", DataType::Struct(axes.clone()), false),
        Field::new("frame_id", DataType::Utf8, true),
    ]);
    let acceleration = StructArray::new(axes, columns, None);
    let columns: Vec<ArrayRef> = vec![Arc::new(Int64Array::from(time)), Arc::new(acceleration), Arc::new(frames)];
    RecordBatch::try_new(Arc::new(schema), columns).expect("a batch")
}

async fn ask(client: &mut Client, ontology: Value) -> Value {
    let body = json!({ "ontology": ontology, "explain": true, "intervals": true });
    action(client, "query", body).await.expect("an answer")
}

/// Two sequences of 40 blocks of 1000 rows; `x` is the number of the block, in the second one 100 more.
pub(crate) async fn two_drives(client: &mut Client) {
    for (name, offset) in [("one", 0.0), ("two", 100.0)] {
        let key = create_sequence(client, name).await;
        let blocks = (0..40).map(|block| vectors(block * 1000, &[block as f64 + offset; 1000])).collect();
        topic(client, &key, &format!("{name}/imu"), "shaken", blocks).await;
        finalize(client, name, &key).await;
    }
}

#[test]
fn inv_6_the_index_answers_without_reading_where_it_can_and_reads_only_columns_where_not() {
    run(async {
        let server = Server::start(&["chunk_bytes=128KiB"]);
        let mut client = server.client().await;
        two_drives(&mut client).await;
        let answer = ask(&mut client, json!({ "shaken.acceleration.x": { "$gt": 138.5 } })).await;
        assert_eq!(answer["items"].as_array().expect("items").len(), 1, "{answer}");
        assert_eq!(answer["items"][0]["sequence"], "two");
        assert_eq!(answer["items"][0]["topics"][0]["intervals"], json!([{ "start_ns": 39000, "end_ns": 39999 }]));
        let explain = &answer["explain"];
        let count = |key: &str| explain[key].as_u64().expect("a count");
        assert!(count("chunks_considered") > 10, "{explain}");
        assert!(count("chunks_read") <= 1, "{explain}");
        assert!(count("bytes_read") * 10 < count("bytes_stored"), "{explain}");
        // Decided by the index alone: all rows of all chunks.
        let answer = ask(&mut client, json!({ "shaken.acceleration.norm": { "$geq": 0 } })).await;
        assert_eq!(answer["items"].as_array().expect("items").len(), 2);
        assert_eq!(answer["explain"]["bytes_read"], 0, "{answer}");
        assert_eq!(answer["items"][0]["topics"][0]["intervals"], json!([{ "start_ns": 0, "end_ns": 39999 }]));
        let answer = ask(&mut client, json!({ "shaken.frame_id": { "$eq": "bass" } })).await;
        assert_eq!(answer["items"], json!([]));
        assert_eq!(answer["explain"]["bytes_read"], 0, "{answer}");
    });
}

#[test]
fn rows_in_the_tail_and_packed_and_unpacked_chunks_are_all_found() {
    run(async {
        let mut server = Server::start(&["chunk_bytes=64KiB"]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "live").await;
        let body = json!({ "sequence_key": key, "name": "live/imu", "serialization_format": "default",
            "ontology_tag": "shaken", "user_metadata": {} });
        let topic_key = action(&mut client, "topic_create", body).await.expect("topic_create")["key"].clone();
        let (more, rows) = tokio::sync::mpsc::channel(4);
        let rows = tokio_stream::wrappers::ReceiverStream::new(rows);
        let descriptor = put_descriptor("live/imu", topic_key.as_str().expect("a key"));
        let messages = encode(descriptor, vectors(0, &[]).schema(), rows);
        let mut results = client.clone().do_put(messages).await.expect("put").into_inner();
        for block in 0..8 {
            more.send(vectors(block * 1000, &[block as f64; 1000])).await.expect("sent");
        }
        more.send(vectors(8000, &[77.0])).await.expect("sent");
        while let Some(mark) = results.message().await.expect("a watermark") {
            let mark: Value = serde_json::from_slice(&mark.app_metadata).expect("JSON");
            if mark["rows"] == 8001 {
                break;
            }
        }
        let found = ask(&mut client, json!({ "shaken.acceleration.x": { "$gt": 6.5 } })).await;
        let interval = json!([{ "start_ns": 7000, "end_ns": 8000 }]);
        assert_eq!(found["items"][0]["topics"][0]["intervals"], interval, "{found}");
        drop(more);
        while results.message().await.expect("a clean end").is_some() {}
        finalize(&mut client, "live", &key).await;
        let packed = ask(&mut client, json!({ "shaken.acceleration.x": { "$gt": 6.5 } })).await;
        assert_eq!(packed["items"][0]["topics"][0]["intervals"], interval, "{packed}");
        let data = server.data().to_owned();
        let again = {
            server.stop();
            let server = Server::start_on(&data, &["chunk_bytes=64KiB"]);
            let mut client = server.client().await;
            ask(&mut client, json!({ "shaken.acceleration.x": { "$gt": 6.5 } })).await
        };
        assert_eq!(again["items"], packed["items"]);
    });
}

#[test]
fn windows_say_where_the_rows_of_two_ontologies_coincide() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "drive").await;
        topic(&mut client, &key, "drive/a", "left", vec![vectors(0, &[0.0, 1.0, 1.0, 1.0, 0.0])]).await;
        topic(&mut client, &key, "drive/b", "right", vec![vectors(0, &[1.0, 1.0, 1.0, 0.0, 0.0])]).await;
        finalize(&mut client, "drive", &key).await;
        let both = json!({ "left.acceleration.x": { "$eq": 1 }, "right.acceleration.x": { "$eq": 1 } });
        let answer = ask(&mut client, both).await;
        assert_eq!(answer["items"][0]["windows"], json!([{ "start_ns": 1, "end_ns": 2 }]));
        let either =
            json!({ "$or": [{ "left.acceleration.x": { "$gt": 5 } }, { "right.acceleration.x": { "$eq": 1 } }] });
        let answer = ask(&mut client, either).await;
        let topics: Vec<&Value> = answer["items"][0]["topics"].as_array().expect("topics").iter().collect();
        assert_eq!(topics.len(), 1);
        assert_eq!(topics[0]["locator"], "drive/b");
        let not = json!({ "left.acceleration.x": { "$eq": 1 }, "$not": { "left.timestamp_ns": { "$leq": 2 } } });
        let answer = ask(&mut client, not).await;
        assert_eq!(answer["items"][0]["topics"][0]["intervals"], json!([{ "start_ns": 3, "end_ns": 3 }]));
    });
}

#[test]
fn misspelt_tags_fields_and_kinds_are_refused_with_their_neighbour() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let refused = async |client: &mut Client, ontology: Value, names: &[&str]| {
            let answer = action(client, "query", json!({ "ontology": ontology })).await;
            check_refused(answer, Code::InvalidArgument, names);
        };
        refused(&mut client, json!({ "IMUU.acceleration.x": "$ex" }), &["IMUU", "`IMU`"]).await;
        refused(&mut client, json!({ "IMU.acceleraton.x": "$ex" }), &["IMU.acceleraton.x", "`acceleration.x`"]).await;
        refused(&mut client, json!({ "IMU.acceleration.x": { "$eq": "1" } }), &["IMU.acceleration.x", "a text"]).await;
        refused(&mut client, json!({ "IMU.acceleration": { "$gt": 1 } }), &["IMU.acceleration", "struct"]).await;
        refused(&mut client, json!({ "IMU.acceleration": { "$within": [0, 0, 1, 1] } }), &["IMU.acceleration"]).await;
        let old = action(&mut client, "query", json!({ "ontology": { "imu.acceleration.x": { "$gt": 1 } } })).await;
        assert_eq!(old.expect("older tags are known")["items"], json!([]));
    });
}

#[test]
fn strict_mode_takes_registered_schemas_only_and_names_the_first_difference() {
    run(async {
        let server = Server::start(&["ontology=strict"]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "drive").await;
        let body = |name: &str, tag: &str| {
            json!({ "sequence_key": key, "name": name, "serialization_format": "default", "ontology_tag": tag,
                "user_metadata": {} })
        };
        let a = action(&mut client, "topic_create", body("drive/a", "shaken")).await.expect("create");
        let b = action(&mut client, "topic_create", body("drive/b", "Temperature")).await.expect("create");
        let batch = vectors(0, &[1.0]);
        let put = crate::harness::put(&mut client, "drive/a", a["key"].as_str().expect("key"), vec![batch.clone()]);
        check_refused(put.await, Code::InvalidArgument, &["shaken", "not registered"]);
        let put = crate::harness::put(&mut client, "drive/b", b["key"].as_str().expect("key"), vec![batch.clone()]);
        check_refused(put.await, Code::InvalidArgument, &["Temperature", "`variance`", "expected double"]);
        let schema = json!([
            { "name": "timestamp_ns", "type": "int64", "nullable": false },
            { "name": "acceleration", "type": "struct", "nullable": false, "fields": [
                { "name": "x", "type": "double" }, { "name": "y", "type": "double" }, { "name": "z", "type": "double" }] },
            { "name": "frame_id", "type": "string" },
        ]);
        let registered = action(&mut client, "ontology_register", json!({ "tag": "shaken", "schema": schema })).await;
        assert_eq!(registered.expect("registered")["version"], 1);
        let put = crate::harness::put(&mut client, "drive/a", a["key"].as_str().expect("key"), vec![batch]);
        put.await.expect("taken now");
        let known = action(&mut client, "ontology_get", json!({ "tag": "shaken" })).await.expect("known");
        assert_eq!(known["index"][0]["norm"], "acceleration.norm");
        let all = action(&mut client, "ontology_list", json!({})).await.expect("a list");
        assert_eq!(all["ontologies"].as_array().expect("a list").len(), 61);
        let wrong = json!({ "tag": "x", "schema": [{ "name": "a", "type": "int7" }] });
        check_refused(action(&mut client, "ontology_register", wrong).await, Code::InvalidArgument, &["int7"]);
    });
}

#[test]
fn one_tag_with_two_types_is_taken_noted_and_asked_version_by_version() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "fleet").await;
        let batch = |column: ArrayRef| {
            let fields = vec![("timestamp_ns", Arc::new(Int64Array::from(vec![1])) as ArrayRef), ("level", column)];
            let batch = RecordBatch::try_from_iter(fields).expect("a batch");
            RecordBatch::try_new(
                Arc::new(Schema::new(vec![
                    Field::new("timestamp_ns", DataType::Int64, false),
                    Field::new("level", batch.column(1).data_type().clone(), true),
                ])),
                batch.columns().to_vec(),
            )
            .expect("a batch")
        };
        topic(&mut client, &key, "fleet/old", "tank", vec![batch(Arc::new(Int64Array::from(vec![7])))]).await;
        topic(&mut client, &key, "fleet/new", "tank", vec![batch(Arc::new(StringArray::from(vec!["full"])))]).await;
        finalize(&mut client, "fleet", &key).await;
        let number = ask(&mut client, json!({ "tank.level": { "$gt": 5 } })).await;
        assert_eq!(number["items"][0]["topics"][0]["locator"], "fleet/old");
        let text = ask(&mut client, json!({ "tank.level": { "$eq": "full" } })).await;
        assert_eq!(text["items"][0]["topics"][0]["locator"], "fleet/new");
        let descriptor =
            arrow_flight::FlightDescriptor::new_cmd(json!({ "resource_locator": "fleet/new" }).to_string());
        let info = client.get_flight_info(descriptor).await.expect("info").into_inner();
        let metadata: Value = serde_json::from_slice(&info.endpoint[0].app_metadata).expect("JSON");
        let note = metadata["flightbox_ontology"]["note"].as_str().expect("a note");
        assert!(note.contains("`level`") && note.contains("int64") && note.contains("string"), "{note}");
    });
}

#[test]
fn a_blob_beside_a_scalar_is_never_read_for_a_question_about_the_scalar() {
    run(async {
        let server = Server::start(&["chunk_bytes=4MiB"]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "cam").await;
        let frames = |first: i64| {
            let blob = vec![7_u8; 100_000];
            let columns: Vec<(&str, ArrayRef)> = vec![
                ("timestamp_ns", Arc::new(Int64Array::from((first..first + 10).collect::<Vec<_>>()))),
                ("data", Arc::new(BinaryArray::from_vec(vec![blob.as_slice(); 10]))),
                ("width", Arc::new(Int64Array::from((first..first + 10).collect::<Vec<_>>()))),
            ];
            RecordBatch::try_from_iter(columns).expect("a batch")
        };
        topic(&mut client, &key, "cam/front", "frames", (0..20).map(|block| frames(block * 10)).collect()).await;
        finalize(&mut client, "cam", &key).await;
        let answer = ask(&mut client, json!({ "frames.width": { "$eq": 105 } })).await;
        assert_eq!(answer["items"][0]["topics"][0]["intervals"], json!([{ "start_ns": 105, "end_ns": 105 }]));
        let explain = &answer["explain"];
        assert!(explain["chunks_read"].as_u64().expect("a count") >= 1);
        assert!(explain["bytes_stored"].as_u64().expect("a count") > 20_000_000, "{explain}");
        assert!(explain["bytes_read"].as_u64().expect("a count") < 10_000, "{explain}");
    });
}

#[test]
fn filters_give_one_result_a_window_and_none_for_none() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "drive").await;
        topic(&mut client, &key, "drive/a", "left", vec![vectors(0, &[1.0, 1.0, 0.0, 0.0, 0.0, 1.0])]).await;
        topic(&mut client, &key, "drive/b", "right", vec![vectors(0, &[0.0, 1.0, 1.0, 1.0, 0.0, 0.0])]).await;
        finalize(&mut client, "drive", &key).await;
        let one = json!({ "$eq": 1 });
        let left = json!({ "locator": "drive/a", "clustering_dt_ns": 2, "ontology": { "left.acceleration.x": one } });
        let right = json!({ "locator": "drive/b", "clustering_dt_ns": 1, "ontology": { "right.acceleration.x": one } });
        let clusters = all_results(&mut client, "topic_filter_clusterize", left.clone()).await;
        assert_eq!(
            clusters,
            [
                json!({ "id": 0, "ts": { "start_ns": 0, "end_ns": 1 } }),
                json!({ "id": 1, "ts": { "start_ns": 5, "end_ns": 5 } })
            ]
        );
        let both = json!({ "topics": [left, right], "intersect_dt_ns": 0 });
        let windows = all_results(&mut client, "topic_filter_intersect", both).await;
        assert_eq!(windows, [json!({ "id": 0, "ts": { "start_ns": 1, "end_ns": 1 } })]);
        let nothing = json!({ "locator": "drive/a", "ontology": { "left.acceleration.x": { "$gt": 5 } } });
        assert!(all_results(&mut client, "topic_filter_clusterize", nothing).await.is_empty());
        let other = json!({ "locator": "drive/a", "ontology": { "right.acceleration.x": one } });
        check_refused(action(&mut client, "topic_filter_clusterize", other).await, Code::InvalidArgument, &["left"]);
        let none = json!({ "locator": "drive/a", "ontology": {} });
        check_refused(action(&mut client, "topic_filter_clusterize", none).await, Code::InvalidArgument, &["drive/a"]);
    });
}

async fn all_results(client: &mut Client, name: &str, body: Value) -> Vec<Value> {
    let action = arrow_flight::Action { r#type: name.to_owned(), body: body.to_string().into() };
    let mut results = client.do_action(action).await.expect("an answer").into_inner();
    let mut all = Vec::new();
    while let Some(result) = results.message().await.expect("a result") {
        let envelope: Value = serde_json::from_slice(&result.body).expect("JSON");
        assert_eq!(envelope["action"], name);
        all.push(envelope["response"].clone());
    }
    all
}

#[test]
fn inv_4_notifications_disappear_with_what_they_are_on() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        create_sequence(&mut client, "drive").await;
        let note = json!({ "locator": "drive", "notification_type": "error", "msg": "it broke" });
        action(&mut client, "sequence_notification_create", note).await.expect("left");
        let list = json!({ "locator": "drive" });
        let all = action(&mut client, "sequence_notification_list", list.clone()).await.expect("a list");
        assert_eq!(all["notifications"][0]["msg"], "it broke");
        assert_eq!(all["notifications"][0]["name"], "drive");
        let v0 = action(&mut client, "sequence_notify_list", json!({ "name": "drive" })).await.expect("a list");
        assert_eq!(v0["notifies"][0]["notify_type"], "error");
        action(&mut client, "sequence_delete", list.clone()).await.expect("deleted");
        check_refused(
            action(&mut client, "sequence_notification_list", list.clone()).await,
            Code::NotFound,
            &["drive"],
        );
        create_sequence(&mut client, "drive").await;
        let none = action(&mut client, "sequence_notification_list", list).await.expect("a list");
        assert_eq!(none["notifications"], json!([]));
        let other = json!({ "locator": "drive", "notification_type": "warning", "msg": "x" });
        let other = action(&mut client, "sequence_notification_create", other).await;
        check_refused(other, Code::InvalidArgument, &["warning"]);
    });
}

#[test]
fn layers_and_keys_have_the_shapes_of_their_protocols() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let layers = action(&mut client, "layer_list", json!({})).await.expect("layers");
        assert_eq!(layers["layers"][0]["name"], "default");
        action(&mut client, "layer_create", json!({ "name": "raw", "description": "d" })).await.expect("made");
        let update = json!({ "prev_name": "raw", "curr_name": "rare", "curr_description": "e" });
        action(&mut client, "layer_update", update).await.expect("renamed");
        let layers = action(&mut client, "layer_list", json!({})).await.expect("layers");
        assert_eq!(layers["layers"][1], json!({ "name": "rare", "description": "e" }));
        action(&mut client, "layer_delete", json!({ "name": "rare" })).await.expect("gone");
        check_refused(action(&mut client, "layer_delete", json!({ "name": "rare" })).await, Code::NotFound, &["rare"]);
        let key = json!({ "permissions": "write", "description": "car 7" });
        let token = action(&mut client, "api_key_create", key).await.expect("a key");
        let token = token["api_key_token"].as_str().expect("a token").to_owned();
        let fingerprint = json!({ "api_key_fingerprint": token.rsplit('_').next() });
        let status = action(&mut client, "api_key_status", fingerprint.clone()).await.expect("a status");
        assert_eq!(status["description"], "car 7");
        assert_eq!(status["expires_at_ns"], Value::Null);
        action(&mut client, "api_key_revoke", fingerprint.clone()).await.expect("gone");
        check_refused(action(&mut client, "api_key_status", fingerprint).await, Code::NotFound, &["API key"]);
    });
}
