"""DuckDB and pyarrow open what `browse/` shows, without any tool of ours.

Usage: python browse_files.py HOST PORT DATA_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.flight as flight
import pyarrow.parquet as pq

from arrow_types import Uploader

BATCHES = 40
ROWS = 100


def batch(number: int) -> pa.RecordBatch:
    first = number * ROWS
    times = pa.array(range(first, first + ROWS), pa.int64())
    point = pa.array([{"x": float(i), "label": f"point {i}"} for i in range(ROWS)])
    blobs = pa.array([bytes([number]) * 1000] * ROWS, pa.binary())
    schema = pa.schema(
        [pa.field("timestamp_ns", pa.int64(), False), pa.field("point", point.type), pa.field("data", pa.binary(), False)]
    )
    return pa.record_batch([times, point, blobs], schema=schema)


def check_alignment(files: list[Path]) -> int:
    groups = 0
    for file in files:
        metadata = pq.ParquetFile(file).metadata
        for index in range(metadata.num_row_groups):
            start = metadata.row_group(index).column(0).data_page_offset
            assert start % 4096 == 0, f"{file}: row group {index} starts at {start}"
            groups += 1
    return groups


def main() -> int:
    host, port, data_dir = sys.argv[1:4]
    upload = Uploader(flight.connect(f"grpc://{host}:{port}"), "drive")
    batches = [batch(number) for number in range(BATCHES)]
    upload.put("cam/front", batches)
    upload.finalize()
    folder = Path(data_dir) / "browse" / "drive" / "cam" / "front"
    files = sorted(folder.glob("*.parquet"))
    assert len(files) > 1, f"{files}: the topic should have several segments"
    groups = check_alignment(files)
    assert groups > len(files), f"{groups} row groups in {len(files)} files"
    sent = pa.Table.from_batches(batches)
    assert pq.read_table(folder).equals(sent), "pyarrow reads other rows than were sent"
    query = f"select count(*), min(timestamp_ns), max(timestamp_ns), sum(octet_length(data)), max(point.x) from '{folder}/*.parquet'"
    found = duckdb.connect().execute(query).fetchone()
    rows = BATCHES * ROWS
    assert found == (rows, 0, rows - 1, rows * 1000, ROWS - 1.0), found
    pruned = duckdb.connect().execute(f"select count(*) from '{folder}/*.parquet' where timestamp_ns < 150").fetchone()
    assert pruned == (150,), pruned
    print(f"OK {len(files)} files, {groups} row groups, all at block boundaries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
