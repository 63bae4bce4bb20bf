"""Records half a minute of a simulated car drive through the public Python SDK, then reads a window back.

The car follows a curved road near 45.46 N, 9.19 E. One motion, integrated at 1 kHz, feeds every
sensor (`drive_sensors.py`), so they agree with each other: position integrates speed and heading,
the IMU measures the derivative of the speed and v * yaw rate, wheels turn with the ground, the
lidar sees a ground plane and the buildings along the road from where the car is, the camera sees
the road's curvature and the lane markings of the distance driven.

Needs mosaicolabs 0.7 and what that installs (numpy, pillow, pyarrow).

Usage: python drive.py HOST PORT [--seconds 30] [--json FILE] [--realtime]
Then asks where the car braked harder than 0.5 g inside a box.
Exit code: 0 if the window read back has exactly the messages recorded in it, in order, and the answer is
when the car did brake there; else 1.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from mosaicolabs import GPS, IMU, Message, MosaicoClient, QueryOntologyCatalog, QuerySequence, setup_sdk_logging

from drive_sensors import (
    BRAKING_S,
    METERS_PER_DEGREE_EAST,
    METERS_PER_DEGREE_NORTH,
    NS_PER_STEP,
    ORIGIN_LATITUDE,
    ORIGIN_LONGITUDE,
    STEPS_PER_SECOND,
    VEHICLE_MASS_KG,
    WHEELBASE_M,
    CameraSensor,
    GpsSensor,
    ImuSensor,
    JointSensor,
    LidarSensor,
    Sensor,
    simulate,
)

# --- Recording ---


@dataclass
class Tally:
    """What was pushed to one topic."""

    ontology: str
    rows: int = 0
    payload_bytes: int = 0


def schedule(sensors: Iterable[Sensor]) -> Iterator[tuple[int, Sensor]]:
    """All measurements of the drive in time order, as a recorder on the vehicle would get them."""
    return heapq.merge(*(steps_of(sensor) for sensor in sensors), key=lambda item: item[0])


def steps_of(sensor: Sensor) -> Iterator[tuple[int, Sensor]]:
    return ((step, sensor) for step in sensor.steps())


def record(
    client: MosaicoClient, sequence: str, sensors: list[Sensor], realtime: bool
) -> tuple[dict[str, Tally], dict[str, float]]:
    """Pushes the whole drive; returns what was pushed per topic, and the seconds it took."""
    tallies = {sensor.topic: Tally(sensor.ontology.__name__) for sensor in sensors}
    seconds = (sensors[0].motion.steps - 1) / STEPS_PER_SECOND
    progress = Progress(seconds)
    started = time.monotonic()
    with client.sequence_create(sequence, metadata=sequence_metadata(seconds)) as writer:
        topics = {}
        for sensor in sensors:
            topics[sensor.topic] = writer.topic_create(sensor.topic, sensor.metadata(), sensor.ontology)
            if topics[sensor.topic] is None:  # The SDK logs the server's error and returns None.
                raise RuntimeError(f"topic_create({sensor.topic}) was refused, see the log above")
        for step, sensor in schedule(sensors):
            if realtime:
                time.sleep(max(0.0, started + step / STEPS_PER_SECOND - time.monotonic()))
            message = sensor.message(step)
            topics[sensor.topic].push(message)
            count(tallies[sensor.topic], message)
            progress.show(step / STEPS_PER_SECOND, tallies)
        progress.finish(tallies)
        dropped = sum(topic.dropped_record_count for topic in topics.values())
        pushed = time.monotonic()
    if dropped:  # Too large for one message: the SDK only notifies.
        raise RuntimeError(f"the SDK dropped {dropped} records")
    return tallies, {"push": pushed - started, "finalize": time.monotonic() - pushed}


def sequence_metadata(seconds: float) -> dict[str, Any]:
    return {
        "vehicle": {"name": "simulated car", "mass_kg": VEHICLE_MASS_KG, "wheelbase_m": WHEELBASE_M},
        "route": {"origin": {"latitude": ORIGIN_LATITUDE, "longitude": ORIGIN_LONGITUDE}},
        "drive_seconds": seconds,
    }


def count(tally: Tally, message: Message) -> None:
    tally.rows += 1
    tally.payload_bytes += 8 + payload_bytes(message.data, type(message.data).__msco_pyarrow_struct__)


def payload_bytes(value: Any, kind: pa.DataType) -> int:
    """Bytes of the values alone, as Arrow holds them: without offsets, validity or padding."""
    if value is None:
        return 0
    if pa.types.is_struct(kind):
        return sum(payload_bytes(getattr(value, child.name), child.type) for child in kind)
    if pa.types.is_list(kind) and pa.types.is_primitive(kind.value_type):
        return len(value) * kind.value_type.bit_width // 8
    if pa.types.is_list(kind):
        return sum(payload_bytes(item, kind.value_type) for item in value)
    return len(value) if pa.types.is_binary(kind) or pa.types.is_string(kind) else kind.bit_width // 8


class Progress:
    """A bar on a terminal, a line every few seconds elsewhere."""

    bar_width = 30
    bar_interval_s = 0.1
    line_interval_s = 3.0

    def __init__(self, drive_seconds: float) -> None:
        self.drive_seconds = drive_seconds
        self.terminal = sys.stdout.isatty()
        self.started = self.shown = time.monotonic()

    def show(self, drive_second: float, tallies: dict[str, Tally]) -> None:
        now = time.monotonic()
        if now - self.shown < (self.bar_interval_s if self.terminal else self.line_interval_s):
            return
        self.shown = now
        self._print(drive_second, tallies)

    def finish(self, tallies: dict[str, Tally]) -> None:
        self._print(self.drive_seconds, tallies)
        if self.terminal:
            print()

    def _print(self, drive_second: float, tallies: dict[str, Tally]) -> None:
        elapsed = max(time.monotonic() - self.started, 1e-9)
        rows = sum(tally.rows for tally in tallies.values())
        megabytes = sum(tally.payload_bytes for tally in tallies.values()) / 1e6
        text = (
            f"{drive_second:5.1f}/{self.drive_seconds:.1f} s of drive  {rows:6d} messages  "
            f"{megabytes:7.1f} MB  {megabytes / elapsed:5.1f} MB/s"
        )
        if not self.terminal:
            print(text, flush=True)
            return
        filled = round(self.bar_width * drive_second / self.drive_seconds)
        bar = "#" * filled + "." * (self.bar_width - filled)
        print(f"\r[{bar}] {text}", end="", flush=True)


# --- Reading back ---


@dataclass
class WindowCheck:
    """What a half-open time window held, and what it should have held."""

    expected: dict[str, int]
    read: dict[str, int] = field(default_factory=dict)
    in_order: bool = True
    wrong_values: int = 0

    @property
    def good(self) -> bool:
        return self.read == self.expected and self.in_order and self.wrong_values == 0


def check_window(
    messages: Iterable[tuple[str, Message]], sensors: list[Sensor], start_ns: int, end_ns: int
) -> WindowCheck:
    """Reads `messages` to the end; compares counts, time order and every value."""
    by_topic = {sensor.topic: sensor for sensor in sensors}
    check = WindowCheck(
        {topic: count_between(sensor, start_ns, end_ns) for topic, sensor in by_topic.items()}
    )
    previous_ns = start_ns
    for topic, message in messages:
        check.read[topic] = check.read.get(topic, 0) + 1
        check.in_order &= previous_ns <= message.timestamp_ns < end_ns
        previous_ns = message.timestamp_ns
        step = (message.timestamp_ns - sensors[0].start_ns) // NS_PER_STEP
        check.wrong_values += message != by_topic[topic].message(step)
    return check


def count_between(sensor: Sensor, start_ns: int, end_ns: int) -> int:
    return sum(start_ns <= sensor.start_ns + step * NS_PER_STEP < end_ns for step in sensor.steps())


def read_back(
    client: MosaicoClient, sequence: str, sensors: list[Sensor], window_s: tuple[float, float]
) -> dict[str, Any]:
    """Checks one window on the IMU topic and on the whole sequence."""
    start_ns, end_ns = (sensors[0].start_ns + round(second * 1e9) for second in window_s)
    imu = [sensor for sensor in sensors if isinstance(sensor, ImuSensor)]
    topic_handler = client.topic_handler(sequence, imu[0].topic)
    sequence_handler = client.sequence_handler(sequence)
    if topic_handler is None or sequence_handler is None:
        raise RuntimeError(f"{sequence} cannot be opened, see the log above")
    stream = topic_handler.get_data_streamer(start_timestamp_ns=start_ns, end_timestamp_ns=end_ns)
    checks = {"imu": check_window(((imu[0].topic, message) for message in stream), imu, start_ns, end_ns)}
    merged = sequence_handler.get_data_streamer(start_timestamp_ns=start_ns, end_timestamp_ns=end_ns)
    checks["sequence"] = check_window(merged, sensors, start_ns, end_ns)
    for name, check in checks.items():
        verdict = "as recorded" if check.good else f"WRONG, expected {check.expected}"
        read = sum(check.read.values())
        print(f"window {window_s[0]:g}..{window_s[1]:g} s of {name}: {read} messages, {verdict}")
    return {
        "start_ns": start_ns,
        "end_ns": end_ns,
        "good": all(check.good for check in checks.values()),
        **{name: asdict(check) for name, check in checks.items()},
    }


# --- The question ---

HALF_G = 0.5 * 9.80665
BOX_HALF_WIDTH_M = 60.0


def braking_question(sequence: str, motion: Motion) -> dict[str, Any]:
    """Where did the car brake harder than 0.5 g, inside a box around the first of the two places?"""
    at = min(round((BRAKING_S[0] + 0.4) * STEPS_PER_SECOND), motion.steps)
    latitude = ORIGIN_LATITUDE + float(motion.north[at]) / METERS_PER_DEGREE_NORTH
    longitude = ORIGIN_LONGITUDE + float(motion.east[at]) / METERS_PER_DEGREE_EAST
    north, east = BOX_HALF_WIDTH_M / METERS_PER_DEGREE_NORTH, BOX_HALF_WIDTH_M / METERS_PER_DEGREE_EAST
    box = [round(corner, 6) for corner in (latitude - north, longitude - east, latitude + north, longitude + east)]
    corners = ",".join(f"{corner:.6f}" for corner in box)
    text = f"sequence = '{sequence}' and IMU.acceleration.x < {-HALF_G:.4f} and GPS within {corners}"
    return {"text": text, "box": box}


def ask_by_the_client(client: MosaicoClient, sequence: str, box: list[float]) -> list[tuple[int, int]]:
    """The same question through the SDK: matching topics, then the windows in which they match at once."""
    south, west, north, east = box
    found = client.query(
        QuerySequence().with_name(sequence),
        QueryOntologyCatalog(
            IMU.Q.acceleration.x.lt(-HALF_G),
            GPS.Q.position.x.between([south, north]),
            GPS.Q.position.y.between([west, east]),
        ),
    )
    gaps = {"IMU": 50_000_000, "GPS": 200_000_000}  # Ten samples of the one, two of the other.
    windows = [cluster for item in found for cluster in item.intersect(clustering_map=gaps)]
    return [(window.timerange.start, window.timerange.end) for window in windows]


def ask(client: MosaicoClient, sequence: str, motion: Motion, start_ns: int) -> dict[str, Any]:
    """Asks, and compares with when the simulated car did brake there."""
    question = braking_question(sequence, motion)
    question["windows"] = ask_by_the_client(client, sequence, question["box"])
    hard = (np.flatnonzero(motion.acceleration < -HALF_G) + 0.0) / STEPS_PER_SECOND
    there = hard[np.abs(hard - BRAKING_S[0]) < 2]
    slack_ns = 100_000_000  # The accelerometer is noisy.
    expected = [start_ns + round(edge * 1e9) for edge in (there.min(), there.max())] if there.size else []
    question["good"] = (len(question["windows"]) > 0) == bool(expected) and all(
        expected[0] - slack_ns <= first and last <= expected[1] + slack_ns for first, last in question["windows"]
    )
    return question


# --- The program ---


def run(host: str, port: int, seconds: float, realtime: bool) -> dict[str, Any]:
    """Records and verifies a drive; returns the report."""
    started = time.monotonic()
    start_ns = time.time_ns() // 1_000_000_000 * 1_000_000_000
    motion = simulate(seconds)
    kinds = (ImuSensor, GpsSensor, JointSensor, CameraSensor, LidarSensor)
    sensors: list[Sensor] = [kind(motion, start_ns) for kind in kinds]
    sequence = time.strftime("drive-%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:4]
    window_s = (seconds / 3, min(seconds / 3 + 2, seconds))
    with MosaicoClient.connect(host, port) as client:
        print(f"recording {seconds:g} s as {sequence}, {motion.distance[-1]:.0f} m of road", flush=True)
        tallies, wall = record(client, sequence, sensors, realtime)
        read_started = time.monotonic()
        window = read_back(client, sequence, sensors, window_s)
        question = ask(client, sequence, motion, start_ns)
    wall["read"] = time.monotonic() - read_started
    wall["total"] = time.monotonic() - started
    return {
        "sequence": sequence,
        "sdk": version("mosaicolabs"),
        "drive_seconds": seconds,
        "rows": sum(tally.rows for tally in tallies.values()),
        "payload_bytes": sum(tally.payload_bytes for tally in tallies.values()),
        "topics": {topic: asdict(tally) for topic, tally in tallies.items()},
        "wall_seconds": {name: round(value, 3) for name, value in wall.items()},
        "window": window,
        "question": question,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the drive (default 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a report")
    parser.add_argument("--realtime", action="store_true", help="push at the pace of the drive")
    arguments = parser.parse_args()
    if arguments.seconds < 1:
        parser.error(f"--seconds {arguments.seconds:g} is too short; use 1 or more")
    setup_sdk_logging(level="WARNING")  # The SDK logs many errors instead of raising them.
    report = run(arguments.host, arguments.port, arguments.seconds, arguments.realtime)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    wall = report["wall_seconds"]
    good = report["window"]["good"] and report["question"]["good"]
    print(
        f"{'OK' if good else 'FAILED'} {report['sequence']}: {report['rows']} messages, "
        f"{report['payload_bytes'] / 1e6:.1f} MB in {wall['push'] + wall['finalize']:.1f} s, "
        f"{wall['total']:.1f} s in all"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
