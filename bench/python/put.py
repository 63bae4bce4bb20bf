"""The client most people have: DoPut by pyarrow, one stream a topic, a thread each.

    put.py ADDRESS STREAMS BYTES

Sends 8 MiB blobs; prints the seconds until every call has ended well, and the bytes of the bodies.
"""

import json
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

BLOB_BYTES = 8 << 20


def action(client, name, body):
    answer = next(iter(client.do_action(flight.Action(name, json.dumps(body).encode()))))
    return json.loads(answer.body.to_pybytes())["response"]


def upload(client, descriptor, message, count, errors):
    try:
        writer, _ = client.do_put(descriptor, message.schema)
        for _ in range(count):
            writer.write_batch(message)
        writer.close()
    except Exception as error:
        errors.append(error)


def main():
    address, streams, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    client = flight.FlightClient(f"grpc://{address}", generic_options=[("grpc.max_send_message_length", -1)])
    blob = np.random.default_rng(1).bytes(BLOB_BYTES)
    message = pa.record_batch({"timestamp_ns": pa.array([1]), "data": pa.array([blob], pa.binary())})
    key = action(client, "sequence_create", {"name": "bench", "user_metadata": {}})["key"]
    uploads, errors = [], []
    count = max(1, size // streams // message.nbytes)
    for at in range(streams):
        name = f"bench/cam{at}"
        topic = {"sequence_key": key, "name": name, "serialization_format": "image", "ontology_tag": "frames"}
        made = action(client, "topic_create", {**topic, "user_metadata": {}})
        descriptor = flight.FlightDescriptor.for_command(json.dumps({"topic": {"name": name, "key": made["key"]}}))
        uploads.append(threading.Thread(target=upload, args=(client, descriptor, message, count, errors)))
    started = time.monotonic()
    for thread in uploads:
        thread.start()
    for thread in uploads:
        thread.join()
    if errors:
        raise SystemExit(f"put failed: {errors[0]}")
    print(time.monotonic() - started, count * streams * message.nbytes)


main()
