"""Plain pyarrow over a Unix-domain socket, with gzip- and deflate-compressed requests.

Usage: python gzip_over_unix.py HOST PORT DATA_DIR (the socket is DATA_DIR/socket)
"""

from __future__ import annotations

import sys

import pyarrow as pa
import pyarrow.flight as flight

from arrow_types import Uploader, check_equal, with_time

# grpc_compression_algorithm of gRPC core.
ALGORITHMS = {"none": 0, "deflate": 1, "gzip": 2}


def main() -> int:
    socket = f"grpc+unix://{sys.argv[3]}/socket"
    for name, algorithm in ALGORITHMS.items():
        # gRPC's C++ makes the socket's path its `:authority`, which HTTP/2 libraries refuse: name another.
        options = [("grpc.default_compression_algorithm", algorithm), ("grpc.default_authority", "localhost")]
        client = flight.connect(socket, generic_options=options)
        upload = Uploader(client, f"over-{name}")
        batch = with_time("text", pa.array([f"row {row} of a text that shrinks" for row in range(20_000)]))
        upload.put("topic", [batch, batch.slice(5, 100)])
        upload.finalize()
        sent = pa.Table.from_batches([batch, batch.slice(5, 100)]).sort_by("timestamp_ns")
        got = upload.get("topic")
        assert got.num_rows == sent.num_rows, f"{name}: {got.num_rows} rows"
        check_equal("topic", sent, got)
    print(f"OK {', '.join(ALGORITHMS)} over a Unix-domain socket")
    return 0


if __name__ == "__main__":
    sys.exit(main())
