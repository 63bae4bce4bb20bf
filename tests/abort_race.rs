//! Abort and finalize fired at random moments of a running upload.

use crate::harness::{
    Client, Server, action, blob_batch, create_sequence, create_topic, encode, files_below, get, last_watermark,
    put_descriptor, run, times,
};
use arrow_flight::FlightDescriptor;
use futures::{StreamExt, stream};
use serde_json::json;
use std::time::Duration;

const ROUNDS: u64 = 500;
const STREAMS: usize = 4;

#[test]
fn inv_3_and_4_abort_and_finalize_at_random_moments_leave_all_or_nothing() {
    run(async {
        let server = Server::start(&["chunk_bytes=256KiB", "commit_interval=2ms"]);
        let client = server.client().await;
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 0..ROUNDS {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let wait = Duration::from_micros((seed >> 33) % 12_000);
            race(&server, client.clone(), &format!("race{round}"), wait, round % 2 == 0).await;
        }
        let segments = files_below(&server.data().join("sequences"));
        let segments = segments.iter().filter(|path| path.extension().is_some_and(|extension| extension == "parquet"));
        assert_eq!(segments.count(), files_below(&server.data().join("browse")).len());
    });
}

async fn race(server: &Server, mut client: Client, sequence: &str, wait: Duration, abort: bool) {
    let key = create_sequence(&mut client, sequence).await;
    let mut uploads = Vec::new();
    for index in 0..STREAMS {
        let name = format!("{sequence}/t{index}");
        let topic = create_topic(&mut client, &key, &name, "image").await;
        let batches = stream::iter(0..12).map(|number| blob_batch(number * 10, 10, 4000));
        let messages = encode(put_descriptor(&name, &topic), blob_batch(0, 0, 0).schema(), batches);
        let mut client = client.clone();
        uploads.push(tokio::spawn(async move { last_watermark(client.do_put(messages).await?.into_inner()).await }));
    }
    tokio::time::sleep(wait).await;
    let call = if abort { "sequence_abort" } else { "sequence_finalize" };
    let fired = action(&mut client, call, json!({ "name": sequence, "key": key })).await;
    let mut ended = Vec::new();
    for upload in uploads {
        ended.push(upload.await.expect("an upload's task"));
    }
    match (abort, fired) {
        (true, fired) => {
            fired.expect("an unlocked sequence can always be aborted");
            check_gone(server, &mut client, sequence).await;
        }
        (false, Ok(_)) => {
            // Finalize won only if every topic had ended: then nothing changes any more.
            assert!(ended.iter().all(Result::is_ok));
            check_whole(&mut client, sequence).await;
        }
        (false, Err(_)) => {
            assert!(ended.iter().all(Result::is_ok), "{ended:?}");
            action(&mut client, "sequence_finalize", json!({ "name": sequence, "key": key }))
                .await
                .expect("finalize at last");
            check_whole(&mut client, sequence).await;
        }
    }
}

async fn check_gone(server: &Server, client: &mut Client, sequence: &str) {
    let descriptor = FlightDescriptor::new_path(vec![sequence.to_owned()]);
    client.get_flight_info(descriptor).await.expect_err("an aborted sequence has no name");
    for index in 0..STREAMS {
        get(client, format!("{sequence}/t{index}")).await.expect_err("an aborted topic has no rows");
    }
    assert!(!server.data().join("browse").join(sequence).is_dir());
}

async fn check_whole(client: &mut Client, sequence: &str) {
    for index in 0..STREAMS {
        let rows = get(client, format!("{sequence}/t{index}")).await.expect("get");
        assert_eq!(times(&rows), (0..120).collect::<Vec<_>>());
    }
}
