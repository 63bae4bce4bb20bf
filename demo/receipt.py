"""Prints the receipt of a recorded drive: what was stored, how fast, and where to open it.

Usage: flightbox info --json | python receipt.py DRIVE_JSON DATA_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def milliseconds(microseconds: int) -> str:
    return f"{microseconds / 1000:.1f} ms"


def receipt(drive: dict[str, Any], info: dict[str, Any], data_dir: Path) -> list[str]:
    """The receipt's lines."""
    wall = drive["wall_seconds"]
    recorded_seconds = wall["push"] + wall["finalize"]
    ack = next(station for station in info["stations"] if station["station"] == "ack")
    browse = data_dir / "browse" / drive["sequence"]
    files = sorted(browse.rglob("*.parquet"))
    lines = ["", f"receipt of {drive['sequence']}", "-" * 64]
    for topic, tally in drive["topics"].items():
        megabytes = tally["payload_bytes"] / 1e6
        lines.append(f"{topic:<24} {tally['ontology']:<16} {tally['rows']:>7} rows {megabytes:>8.1f} MB")
    since = info["since_start"]
    lines += [
        "-" * 64,
        f"topics {len(drive['topics'])}   rows {drive['rows']}   payload {drive['payload_bytes']:,} bytes",
        f"chunks {since['chunks']}   {drive['payload_bytes'] / 1e6 / recorded_seconds:.1f} MB/s "
        f"(the Python client makes the data while it sends)",
        f"durable acknowledgement p50 {milliseconds(ack['p50_us'])}, p99 {milliseconds(ack['p99_us'])}",
        f"engine {info['engine']}, direct I/O {'yes' if info['direct_io'] else 'no'}, "
        f"written by the ring {sum(info['ring_bytes'].values()) - info['ring_bytes']['read']:,} bytes",
        f"window read back: {'as recorded' if drive['window']['good'] else 'WRONG'}",
        f"asked by the client: {'as driven' if drive['question']['good'] else 'WRONG'}",
        f"{len(files)} Parquet files under {browse}",
        f"  e.g. duckdb -c \"select count(*) from '{files[0]}'\"" if files else "  none: this is a fault",
        "",
    ]
    return lines


def main() -> int:
    drive = json.loads(Path(sys.argv[1]).read_text())
    info = json.load(sys.stdin)
    print("\n".join(receipt(drive, info, Path(sys.argv[2]))))
    return 0 if drive["window"]["good"] and drive["question"]["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
