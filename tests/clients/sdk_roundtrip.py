"""Writes 10,000 messages through the public Python SDK, reads them back, compares every value.

Works with mosaicolabs 0.5.0 and 0.7.0 (later 0.5.x and 0.7.x should do): the few differences are
behind `MODERN`. Messages are functions of their index, so what was pushed is computed again for the
comparison and never kept.

Checks: listing, sequence and topic metadata, ontology tags, time bounds, every message of every
topic (class and full value), the merged stream of the sequence, half-open time windows of topics
and of the sequence, optionally deletion. The `note` topic is pushed out of time order on purpose.

Usage: python roundtrip.py HOST PORT [--delete]
Exit code: 0 and one line with counts; 1 and the details of each mismatch.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Optional

import pyarrow as pa
from mosaicolabs import (
    GPS,
    IMU,
    CompressedImage,
    GPSStatus,
    ImageFormat,
    Message,
    MosaicoClient,
    MosaicoField,
    MosaicoType,
    Point3d,
    Quaternion,
    Serializable,
    Vector3d,
    setup_sdk_logging,
)
from mosaicolabs.models.futures import Lidar

SDK_VERSION = version("mosaicolabs")
# From 0.6 on the header is part of the data, and a map is a dict; before, the header was in the
# message envelope, and a dict field was written as JSON text (so a map has to be a list of pairs).
MODERN = tuple(int(part) for part in SDK_VERSION.split(".")[:2]) >= (0, 6)

START_NS = 1_700_000_000_000_000_000
DURATION_NS = 50_000_000_000
IMAGE_BYTES_MIN = 1_000
IMAGE_BYTES_MAX = 60_000
DETAILS_MAX = 20

if MODERN:
    from mosaicolabs import Header, Time

    MapField = dict[str, MosaicoType.int32]
else:
    MapField = MosaicoType.annotate(list[tuple[str, int]], pa.map_(pa.string(), pa.int32()))


class RoundtripNote(Serializable):
    """A user-defined ontology class with the Arrow types that storage formats like to lose."""

    grid: MosaicoType.matrix(MosaicoType.float64) = MosaicoField(description="list of lists")
    counters: MapField = MosaicoField(description="map")
    direction: MosaicoType.list_(MosaicoType.float32, list_size=3) = MosaicoField(
        description="fixed-size list"
    )
    rotation: MosaicoType.matrix(MosaicoType.float64, rows=2, cols=2) = MosaicoField(
        description="fixed-size matrix"
    )
    bias: Optional[MosaicoType.list_(MosaicoType.float32, list_size=3)] = MosaicoField(default=None)
    corners: MosaicoType.list_(Point3d) = MosaicoField(description="list of structs")
    text: Optional[MosaicoType.string] = MosaicoField(default=None)


@dataclass(frozen=True)
class Plan:
    """A topic to write: how many messages, of which class, and what message `index` holds."""

    topic: str
    ontology: type[Serializable]
    count: int
    payload: Callable[[int], Serializable]
    shuffled: bool = False

    @property
    def metadata(self) -> dict[str, Any]:
        return {"sensor": {"model": self.topic.strip("/"), "rate_hz": self.count / 50}, "tags": ["a", "b"]}

    def timestamp_ns(self, index: int) -> int:
        return START_NS + index * DURATION_NS // self.count

    def message(self, index: int) -> Message:
        return envelope(self.timestamp_ns(index), index, self.payload(index))

    def push_order(self) -> Iterable[int]:
        order = list(range(self.count))
        if self.shuffled:
            random.Random(self.topic).shuffle(order)
        return order

    def indices(self, start_ns: int | None, end_ns: int | None) -> list[int]:
        """Messages of the half-open window, in time order."""
        low = START_NS if start_ns is None else start_ns
        high = START_NS + DURATION_NS if end_ns is None else end_ns
        return [i for i in range(self.count) if low <= self.timestamp_ns(i) < high]


def envelope(timestamp_ns: int, index: int, data: Serializable) -> Message:
    """A message with a header on every second one, in the place where this SDK has it."""
    if index % 2:
        return Message(timestamp_ns=timestamp_ns, data=data)
    if not MODERN:
        return Message(timestamp_ns=timestamp_ns, data=data, frame_id="base", sequence_id=index)
    if "header" in type(data).model_fields:
        data.header = Header(
            timestamp=Time.from_nanoseconds(timestamp_ns - 1_000), frame_id="base", sample_counter=index
        )
    return Message(timestamp_ns=timestamp_ns, data=data)


def imu(index: int) -> IMU:
    orientation = Quaternion(x=0.0, y=0.0, z=0.6, w=0.8, covariance=[0.1] * 16) if index % 3 else None
    return IMU(
        acceleration=Vector3d(x=index / 7, y=-index / 3, z=9.80665),
        angular_velocity=Vector3d(x=1e-300, y=float("inf"), z=-0.1 * index),
        orientation=orientation,
    )


def gps(index: int) -> GPS:
    status = GPSStatus(status=index % 3, service=1, satellites=7 + index % 9, hdop=0.8) if index % 5 else None
    return GPS(
        position=Point3d(x=45.46 + index * 1e-6, y=9.19 - index * 1e-6, z=120.0),
        velocity=Vector3d(x=1.5, y=index / 10, z=0.0, covariance_type=2) if index % 4 else None,
        status=status,
    )


def image(index: int) -> CompressedImage:
    """Random bytes: nothing on the way may look into, or shrink, an image."""
    noise = random.Random(index)
    return CompressedImage(
        data=noise.randbytes(noise.randint(IMAGE_BYTES_MIN, IMAGE_BYTES_MAX)), format=ImageFormat.JPEG
    )


def lidar(index: int) -> Lidar:
    points = 100 + index % 200
    return Lidar(
        x=[as_float32(point * 0.1 + index) for point in range(points)],
        y=[as_float32(-point * 0.01) for point in range(points)],
        z=[0.5] * points,
        intensity=[as_float32(point / points) for point in range(points)] if index % 2 else None,
        beam_id=list(range(points)),
        point_timestamp=[index + point * 1e-6 for point in range(points)],
    )


def note(index: int) -> RoundtripNote:
    # No empty map: SDK 0.7.0 itself turns one into None when it reads (`_fix_empty_dicts`).
    counters = [("é" * (1 + index % 3), index), ("b", -index)]
    return RoundtripNote(
        grid=[[float(column) for column in range(row)] for row in range(index % 5)],
        counters=dict(counters) if MODERN else counters,
        direction=[1.0, as_float32(index * 0.3), -0.5],
        rotation=[[0.0, -1.0], [1.0, index / 9]],
        bias=[as_float32(index * 0.1)] * 3 if index % 2 else None,
        corners=[Point3d(x=float(i), y=index / 11, z=-1.0) for i in range(index % 4)],
        text=f"note {index}" if index % 3 else None,
    )


def as_float32(value: float) -> float:
    """The double nearest to what a 32-bit column can hold."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


PLANS = [
    Plan("/imu/front", IMU, 5_000, imu),
    Plan("/gps", GPS, 1_000, gps),
    Plan("/camera/front", CompressedImage, 2_000, image),
    Plan("/lidar/top", Lidar, 500, lidar),
    Plan("/note", RoundtripNote, 1_500, note, shuffled=True),
]


@dataclass
class Report:
    """Counts comparisons and keeps the first mismatches."""

    comparisons: int = 0
    failures: int = 0
    details: list[str] = field(default_factory=list)

    def equal(self, what: str, found: Any, expected: Any) -> None:
        self.check(what, found == expected, lambda: f"found {found!r}, expected {expected!r}")

    def check(self, what: str, good: bool, detail: Callable[[], str] = lambda: "is not so") -> None:
        self.comparisons += 1
        if good:
            return
        self.failures += 1
        if len(self.details) < DETAILS_MAX:
            self.details.append(f"{what}: {detail()[:2_000]}")


def write(client: MosaicoClient, sequence: str, metadata: dict[str, Any]) -> None:
    with client.sequence_create(sequence, metadata=metadata) as writer:
        for plan in PLANS:
            topic = writer.topic_create(plan.topic, metadata=plan.metadata, ontology_type=plan.ontology)
            if topic is None:  # The SDK logs the server's error and returns None.
                raise RuntimeError(f"topic_create({plan.topic}) was refused, see the log above")
            for index in plan.push_order():
                topic.push(plan.message(index))


def verify_sequence(client: MosaicoClient, sequence: str, metadata: dict[str, Any], report: Report) -> None:
    report.check("list_sequences", sequence in client.list_sequences())
    handler = client.sequence_handler(sequence)
    if handler is None:
        raise RuntimeError(f"sequence_handler({sequence}) is None, see the log above")
    report.equal("sequence topics", sorted(handler.topics), sorted(plan.topic for plan in PLANS))
    report.equal("sequence user_metadata", handler.user_metadata, metadata)
    report.equal("sequence timestamp_ns_min", handler.timestamp_ns_min, START_NS)
    last = max(plan.timestamp_ns(plan.count - 1) for plan in PLANS)
    report.equal("sequence timestamp_ns_max", handler.timestamp_ns_max, last)
    report.equal("sequence sessions locked", [session.locked for session in handler.sessions], [True])
    report.check("sequence total_size_bytes", 0 < handler.total_size_bytes)


def verify_topic(client: MosaicoClient, sequence: str, plan: Plan, report: Report) -> None:
    handler = client.topic_handler(sequence, plan.topic)
    if handler is None:
        raise RuntimeError(f"topic_handler({plan.topic}) is None, see the log above")
    report.equal(f"{plan.topic} name", handler.name, plan.topic)
    report.equal(f"{plan.topic} user_metadata", handler.user_metadata, plan.metadata)
    report.equal(f"{plan.topic} ontology_tag", handler.ontology_tag, plan.ontology.ontology_tag())
    storage_format = getattr(handler.serialization_format, "value", handler.serialization_format)
    report.equal(f"{plan.topic} format", storage_format, plan.ontology.__serialization_format__.value)
    report.equal(f"{plan.topic} locked", handler.locked, True)
    report.equal(f"{plan.topic} timestamp_ns_min", handler.timestamp_ns_min, plan.timestamp_ns(0))
    report.equal(
        f"{plan.topic} timestamp_ns_max", handler.timestamp_ns_max, plan.timestamp_ns(plan.count - 1)
    )
    if MODERN:
        report.equal(f"{plan.topic} schema", handler.ontology_schema, plan.ontology.__msco_pyarrow_struct__)
    for start_ns, end_ns in topic_windows(plan):
        window = f"{plan.topic} [{start_ns}, {end_ns})"
        stream = handler.get_data_streamer(start_timestamp_ns=start_ns, end_timestamp_ns=end_ns)
        expected = plan.indices(start_ns, end_ns)
        if MODERN:
            report.equal(f"{window} msg_count", stream.msg_count, len(expected))
        compare_messages(window, stream, plan, expected, report)


def topic_windows(plan: Plan) -> Iterator[tuple[int | None, int | None]]:
    """Everything, then windows whose edges lie exactly on messages."""
    first, last = plan.timestamp_ns(0), plan.timestamp_ns(plan.count - 1)
    quarter, half = plan.timestamp_ns(plan.count // 4), plan.timestamp_ns(plan.count // 2)
    yield None, None
    yield quarter, half
    yield half, None
    yield None, quarter
    yield first, last  # The last message is outside.
    yield last, last + 1  # One message.
    yield quarter + 1, quarter + 2  # None, although inside the topic.


def compare_messages(
    what: str, stream: Iterable[Message], plan: Plan, expected: list[int], report: Report
) -> None:
    found = 0
    for message in stream:
        if found < len(expected):
            compare_message(f"{what} message {found}", message, plan, expected[found], report)
        found += 1
    report.equal(f"{what} count", found, len(expected))


def compare_message(what: str, found: Message, plan: Plan, index: int, report: Report) -> None:
    expected = plan.message(index)
    report.check(what, found == expected, lambda: difference(found, expected))
    report.check(
        f"{what} class", type(found.data) is plan.ontology, lambda: f"is {type(found.data).__name__}"
    )


def difference(found: Message, expected: Message) -> str:
    """The fields in which two messages differ."""
    left = {"timestamp_ns": found.timestamp_ns, **found.data.model_dump()}
    right = {"timestamp_ns": expected.timestamp_ns, **expected.data.model_dump()}
    names = [name for name in left.keys() | right.keys() if left.get(name) != right.get(name)]
    parts = [
        f"{n}: found {str(left.get(n))[:200]}, expected {str(right.get(n))[:200]}" for n in sorted(names)
    ]
    return "; ".join(parts) or f"envelope: found {found!r:.300}, expected {expected!r:.300}"


def verify_merged(client: MosaicoClient, sequence: str, report: Report) -> None:
    """Streams the sequence: time order over all topics, and each topic's messages in their order."""
    handler = client.sequence_handler(sequence)
    assert handler is not None  # `verify_sequence` has it already.
    quarter, half = START_NS + DURATION_NS // 4, START_NS + DURATION_NS // 2
    for start_ns, end_ns in [(None, None), (quarter, half), (None, START_NS + 1)]:
        window = f"sequence [{start_ns}, {end_ns})"
        stream = handler.get_data_streamer(start_timestamp_ns=start_ns, end_timestamp_ns=end_ns)
        expected = {plan.topic: plan.indices(start_ns, end_ns) for plan in PLANS}
        found = compare_merged(window, stream, expected, report)
        report.equal(f"{window} counts", dict(found), {topic: len(rows) for topic, rows in expected.items()})


def compare_merged(
    window: str, stream: Iterable[tuple[str, Message]], expected: dict[str, list[int]], report: Report
) -> Counter[str]:
    plans = {plan.topic: plan for plan in PLANS}
    found: Counter[str] = Counter()
    previous_ns = 0
    for topic, message in stream:
        report.equal(f"{window} late message", max(previous_ns, message.timestamp_ns), message.timestamp_ns)
        previous_ns = message.timestamp_ns
        if found[topic] < len(expected[topic]):
            index = expected[topic][found[topic]]
            compare_message(f"{window} {topic} message {found[topic]}", message, plans[topic], index, report)
        found[topic] += 1
    return found


def verify_deletion(client: MosaicoClient, sequence: str, report: Report) -> None:
    client.sequence_delete(sequence)
    report.check("deleted sequence is not listed", sequence not in client.list_sequences())


def run(host: str, port: int, delete: bool) -> tuple[Report, str]:
    report = Report()
    sequence = f"roundtrip-{uuid.uuid4().hex[:12]}"
    metadata = {
        "vehicle": {"name": "città", "sensors": ["imu", "gps"], "mass_kg": 1650.5, "electric": True},
        "run": 7,
        "empty": {},
    }
    with MosaicoClient.connect(host, port) as client:
        started = time.monotonic()
        write(client, sequence, metadata)
        written = time.monotonic()
        verify_sequence(client, sequence, metadata, report)
        for plan in PLANS:
            verify_topic(client, sequence, plan, report)
        verify_merged(client, sequence, report)
        if delete:
            verify_deletion(client, sequence, report)
        finished = time.monotonic()
    counts = ", ".join(f"{plan.ontology.__name__} {plan.count}" for plan in PLANS)
    total = sum(plan.count for plan in PLANS)
    return report, (
        f"mosaicolabs {SDK_VERSION}: {sequence}, {total} messages ({counts}), "
        f"{report.comparisons} comparisons, written in {written - started:.1f} s, "
        f"verified in {finished - written:.1f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("data_dir", nargs="?", help="taken and ignored: other checks need it")
    parser.add_argument("--delete", action="store_true", help="delete the sequence at the end")
    arguments = parser.parse_args()
    setup_sdk_logging(level="WARNING")  # The SDK logs many errors instead of raising them.
    report, summary = run(arguments.host, arguments.port, arguments.delete)
    for detail in report.details:
        print(f"MISMATCH {detail}", file=sys.stderr)
    print(f"{'FAILED' if report.failures else 'OK'} {summary}, {report.failures} mismatches")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
