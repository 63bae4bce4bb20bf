"""Plain pyarrow, v0 protocol: every Arrow type that can be stored comes back to the letter.

Usage: python arrow_types.py HOST PORT [DATA_DIR]
"""

from __future__ import annotations

import datetime
import decimal
import json
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

ROWS = 500


def columns() -> dict[str, pa.Array]:
    """One column per type, each with nulls where the type allows, NaN payloads and -0.0 among floats."""
    n = range(ROWS)
    def every(k: int, make: Any) -> list[Any]:
        return [None if i % k == 0 else make(i) for i in n]

    base = datetime.datetime(2026, 1, 1)
    floats = [float("nan"), -0.0, float("inf"), 1.5] * (ROWS // 4)
    struct = pa.struct([pa.field("x", pa.float64(), False), pa.field("deep", pa.struct([pa.field("s", pa.string())]))])
    return {
        "int8": pa.array(every(7, lambda i: i % 100), pa.int8()),
        "uint64": pa.array(every(7, lambda i: 2**64 - 1 - i), pa.uint64()),
        "float16": pa.array(np.arange(ROWS, dtype=np.float16)),
        "float32": pa.array(floats, pa.float32()),
        "float64": pa.array(floats, pa.float64()),
        "bool": pa.array(every(3, lambda i: i % 2 == 0)),
        "string": pa.array(every(5, lambda i: "ü" * (i % 9))),
        "large_string": pa.array(every(5, str), pa.large_string()),
        "string_view": pa.array(every(5, lambda i: "long enough not to be inlined " + str(i)), pa.string_view()),
        "binary": pa.array(every(5, lambda i: bytes([i % 256]) * i), pa.binary()),
        "large_binary": pa.array(every(5, lambda i: b"x" * (i % 5)), pa.large_binary()),
        "binary_view": pa.array(every(5, lambda i: b"0123456789abcdef" * (i % 3)), pa.binary_view()),
        "fixed_binary": pa.array(every(5, lambda i: i.to_bytes(4, "big")), pa.binary(4)),
        "date32": pa.array(every(5, lambda i: base.date() + datetime.timedelta(i)), pa.date32()),
        "date64": pa.array(every(5, lambda i: base.date() + datetime.timedelta(i)), pa.date64()),
        "time64": pa.array(every(5, lambda i: i * 1000), pa.time64("ns")),
        "timestamp": pa.array(every(5, lambda i: i * 10**9 + i), pa.timestamp("ns", "UTC")),
        "timestamp_s": pa.array(every(5, lambda i: i), pa.timestamp("s")),
        "duration": pa.array(every(5, lambda i: i), pa.duration("us")),
        "decimal": pa.array(every(5, lambda i: decimal.Decimal(i) / 100), pa.decimal128(20, 2)),
        "null": pa.nulls(ROWS),
        "list": pa.array(every(6, lambda i: list(range(i % 4))), pa.list_(pa.int32())),
        "nested_list": pa.array(every(6, lambda i: [[1.0] * (i % 3), None, []]), pa.list_(pa.list_(pa.float32()))),
        "named_list": pa.array(every(6, lambda i: [i]), pa.list_(pa.field("element", pa.int64(), False))),
        "large_list": pa.array(every(6, lambda i: ["a"] * (i % 3)), pa.large_list(pa.string())),
        "fixed_list": pa.array([[float(i)] * 9 for i in n], pa.list_(pa.float64(), 9)),
        "list_of_struct": pa.array(every(6, lambda i: [{"x": 1.0, "deep": None}] * (i % 3)), pa.list_(struct)),
        "map": pa.array(every(6, lambda i: [(str(k), k) for k in range(i % 3)]), pa.map_(pa.string(), pa.int32())),
        "struct": pa.array(every(6, lambda i: {"x": float(i), "deep": {"s": str(i)}}), struct),
    }


class Uploader:
    """The v0 protocol by hand."""

    def __init__(self, client: flight.FlightClient, sequence: str) -> None:
        self.client = client
        self.sequence = sequence
        self.key = self.action("sequence_create", name=sequence, user_metadata={})["key"]

    def action(self, action: str, /, **body: Any) -> Any:
        results = list(self.client.do_action(flight.Action(action, json.dumps(body).encode())))
        return json.loads(results[0].body.to_pybytes()).get("response")

    def put(self, topic: str, batches: list[pa.RecordBatch], options: pa.ipc.IpcWriteOptions | None = None) -> None:
        name = f"{self.sequence}/{topic}"
        created = self.action(
            "topic_create", sequence_key=self.key, name=name, serialization_format="default", ontology_tag="any", user_metadata={}
        )
        command = json.dumps({"topic": {"name": name, "key": created["key"]}}).encode()
        call = flight.FlightCallOptions(write_options=options) if options else None
        writer, _ = self.client.do_put(flight.FlightDescriptor.for_command(command), batches[0].schema, call)
        for batch in batches:
            writer.write_batch(batch)
        writer.done_writing()
        writer.close()

    def get(self, topic: str) -> pa.Table:
        return self.client.do_get(flight.Ticket(f"{self.sequence}/{topic}".encode())).read_all()

    def finalize(self) -> None:
        self.action("sequence_finalize", name=self.sequence, key=self.key)


def check_equal(topic: str, sent: pa.Table, got: pa.Table) -> None:
    plain = got.schema.remove_metadata()
    assert plain.equals(sent.schema.remove_metadata(), check_metadata=False), f"{topic}: {plain} is not {sent.schema}"
    assert got.num_rows == sent.num_rows, f"{topic}: {got.num_rows} rows, not {sent.num_rows}"
    for name in sent.schema.names:
        one, other = sent[name].combine_chunks(), got[name].combine_chunks()
        same = one.equals(other) if not pa.types.is_floating(one.type) else one.fill_null(0).to_numpy().tobytes() == other.fill_null(0).to_numpy().tobytes()
        assert same or one.to_pylist() == other.to_pylist(), f"{topic}.{name} came back changed"


def with_time(name: str, values: pa.Array) -> pa.RecordBatch:
    times = pa.array(range(len(values)), pa.int64())
    schema = pa.schema([pa.field("timestamp_ns", pa.int64(), False), pa.field(name, values.type)])
    return pa.record_batch([times, values], schema=schema)


def check_types(upload: Uploader) -> None:
    everything = columns()
    fields = [pa.field("timestamp_ns", pa.int64(), False)] + [pa.field(name, array.type) for name, array in everything.items()]
    batch = pa.record_batch([pa.array(range(ROWS), pa.int64()), *everything.values()], schema=pa.schema(fields))
    upload.put("all", [batch.slice(0, 200), batch.slice(200, 1), batch.slice(201)])
    for codec in ("lz4", "zstd"):
        upload.put(codec, [batch], pa.ipc.IpcWriteOptions(compression=codec))
    for topic in ("all", "lz4", "zstd"):
        check_equal(topic, pa.Table.from_batches([batch]), upload.get(topic))


def check_nulls(upload: Uploader) -> None:
    """Large batches of columns that hold nothing but nulls, among them a struct over values that nobody sees."""
    rows = 4000
    some = pa.array(range(rows), pa.int64())
    unseen = pa.StructArray.from_arrays([some, some.cast(pa.string())], ["n", "s"], mask=pa.array([True] * rows))
    arrays = {name: pa.nulls(rows, array.type) for name, array in columns().items() if "view" not in name}
    arrays |= {"unseen": unseen, "seen": some, "unseen_too": pa.array(unseen, unseen.type)}
    fields = [pa.field("timestamp_ns", pa.int64(), False)] + [pa.field(name, array.type) for name, array in arrays.items()]
    batch = pa.record_batch([some, *arrays.values()], schema=pa.schema(fields))
    upload.put("nulls", [batch.slice(0, 3), batch.slice(3, rows - 100), batch.slice(rows - 97)])
    check_equal("nulls", pa.Table.from_batches([batch]), upload.get("nulls"))


def check_dictionaries(upload: Uploader) -> None:
    """An int8-keyed dictionary replaced several times in one chunk: 400 distinct values in all."""
    batches = []
    for block in range(4):
        keys = pa.array([None if i % 10 == 0 else i % 100 for i in range(ROWS)], pa.int8())
        values = pa.array([f"value {block} {i}" for i in range(100)])
        batch = with_time("state", pa.DictionaryArray.from_arrays(keys, values))
        times = pa.array(range(block * ROWS, block * ROWS + ROWS), pa.int64())
        batches.append(batch.set_column(0, batch.schema.field(0), times))
    upload.put("dictionary", batches)
    got = upload.get("dictionary")
    assert got.schema.field("state").type == batches[0].schema.field("state").type, got.schema
    sent = [value for batch in batches for value in batch.column("state").to_pylist()]
    assert got["state"].to_pylist() == sent, "the dictionary's values came back changed"


def main() -> int:
    client = flight.connect(f"grpc://{sys.argv[1]}:{sys.argv[2]}")
    upload = Uploader(client, "types")
    check_types(upload)
    check_nulls(upload)
    check_dictionaries(upload)
    upload.finalize()
    info = client.get_flight_info(flight.FlightDescriptor.for_path("types"))
    names = sorted(endpoint.ticket.ticket.decode() for endpoint in info.endpoints)
    assert names == ["types/all", "types/dictionary", "types/lz4", "types/nulls", "types/zstd"], names
    print(f"OK {len(columns())} types, plain and compressed, without a value, and replaced dictionaries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
