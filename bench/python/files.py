"""Writers that people use instead of a server: plain Parquet by pyarrow, MCAP by its Python library.

    files.py parquet|mcap PROFILE BYTES PATH

Prints the seconds it took, from the first message to the file closed and synced.
"""

import os
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BLOB_BYTES = 8 << 20
POINTS = 130_000
IMU_ROWS = 20_000
MCAP_CHUNK_BYTES = 16 << 20


def batch(profile):
    """One message of a profile, as in bench/src/profile.rs; the IMU flattened to its numbers."""
    noise = np.random.default_rng(1)
    if profile == "image":
        return pa.record_batch(
            {"timestamp_ns": pa.array([1]), "data": pa.array([noise.bytes(BLOB_BYTES)], pa.binary())}
        )
    if profile == "lidar":
        points = {
            name: pa.array([noise.random(POINTS, np.float32)], pa.list_(pa.float32()))
            for name in ("x", "y", "z", "intensity")
        }
        return pa.record_batch({"timestamp_ns": pa.array([1]), **points})
    if profile == "imu":
        columns = {f"f{at}": pa.array(noise.random(IMU_ROWS)) for at in range(33)}
        return pa.record_batch({"timestamp_ns": pa.array(np.arange(IMU_ROWS)), **columns})
    raise SystemExit(f"there is no profile {profile!r}")


def parquet(message, count, path):
    with open(path, "wb") as file:
        with pq.ParquetWriter(file, message.schema) as writer:
            for _ in range(count):
                writer.write_batch(message)
        file.flush()
        os.fsync(file.fileno())


def mcap(message, count, path):
    from mcap.writer import CompressionType, Writer

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, message.schema) as stream:
        stream.write_batch(message)
    payload = sink.getvalue().to_pybytes()
    with open(path, "wb") as file:
        writer = Writer(file, chunk_size=MCAP_CHUNK_BYTES, compression=CompressionType.NONE)
        writer.start()
        schema = writer.register_schema(name="bench", encoding="", data=b"")
        channel = writer.register_channel(topic="/bench", message_encoding="arrow", schema_id=schema)
        for number in range(count):
            writer.add_message(channel_id=channel, log_time=number, publish_time=number, data=payload)
        writer.finish()
        file.flush()
        os.fsync(file.fileno())


def main():
    kind, profile, size, path = sys.argv[1:]
    message = batch(profile)
    count = max(1, int(size) // message.nbytes)
    started = time.monotonic()
    {"parquet": parquet, "mcap": mcap}[kind](message, count, path)
    print(time.monotonic() - started, count * message.nbytes)


main()
