"""What the compatibility checks share: how the generations differ, what is written, how a check is counted."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta, timezone
from importlib.metadata import version

import mosaicolabs as sdk
from mosaicolabs import (
    GPS,
    IMU,
    Boolean,
    GPSStatus,
    Message,
    MosaicoClient,
    Point3d,
    Query,
    QueryOntologyCatalog,
    QuerySequence,
    QueryTopic,
    SessionLevelErrorPolicy,
    String,
    TopicLevelErrorPolicy,
    Vector3d,
)

# ---- What differs between the versions ----

VERSION = version("mosaicolabs")
MINOR = int(VERSION.split(".")[1])
MODERN = MINOR >= 6  # The header is part of the data, tags are class names, globs, lists, filters.

if MODERN:
    from mosaicolabs.query.generation.mixins import (
        _QueryableDynamicValue as MetadataField,
    )
else:
    from mosaicolabs.models.query.generation.mixins import (
        _QueryableDynamicValue as MetadataField,
    )

ORDER = {"lt", "leq", "gt", "geq"}
OPERATORS = {
    "bool": {"eq"},
    "number": {"eq", "neq", "in_", "between"} | ORDER,
    "string": {"eq", "match", "in_"},
    "metadata": {"eq", "between"} | ORDER,
}
OPERATORS["string"] |= ORDER if MINOR >= 5 else {"neq"}
if MINOR >= 5:
    OPERATORS["metadata"] |= {"neq", "ex"}
if MODERN:
    OPERATORS["number"] |= {"outside"}
    OPERATORS["string"] |= {"between", "outside"}
    OPERATORS["metadata"] |= {"match", "in_", "outside"}


def tag_of(ontology):
    return ontology.ontology_tag() if MODERN else ontology.__ontology_tag__


def frame_id_of(ontology):
    return ontology.Q.header.frame_id if MODERN else ontology.Q.frame_id


def message(timestamp_ns, data, frame_id=None):
    if not MODERN:
        return Message(timestamp_ns=timestamp_ns, data=data, frame_id=frame_id)
    if frame_id is not None:
        data.header = sdk.Header(timestamp=sdk.Time.from_nanoseconds(timestamp_ns), frame_id=frame_id)
    return Message(timestamp_ns=timestamp_ns, data=data)


def creation_time(nanoseconds):
    return nanoseconds if MODERN else sdk.Time.from_nanoseconds(nanoseconds)


def session_key(session):
    return session.locator if MINOR >= 5 else session.uuid


def flush(writer):
    """Sends the rows pushed so far: no version has a public call for it, 0.3 does it in a thread."""
    writer._wrstate._write_current_batch()
    if hasattr(writer._wrstate, "_wait_for_pending_writes"):
        writer._wrstate._wait_for_pending_writes()


# ---- What is written ----

START_NS = 1_700_000_000_000_000_000
STEP_NS = 10_000_000
END_NS = START_NS + 10_000 * STEP_NS  # After all rows.
RUN = uuid.uuid4().hex[:10]
A, B = f"compat-{RUN}-a", f"compat-{RUN}-b"  # All values of B are 1000 higher.
BASE = {A: 0.0, B: 1000.0}
KEPT_BASE = 5000.0
# fmt: off
METADATA = {
    A: {"run": RUN, "driver": "ada", "trip": 7, "ok": True, "speed": 1.5, "city": "Città di Castello",
        "nested": {"k": 1.5, "deep": {"name": "north"}}, "tags": ["red", "green"], "only_a": "yes"},
    B: {"run": RUN, "driver": "bob", "trip": 70, "ok": False, "speed": -3.0, "city": "Rome",
        "nested": {"k": -3.0, "deep": {"name": "south"}}, "tags": ["blue"]},
}
# fmt: on


def at(step):
    return START_NS + step * STEP_NS


def imu(base, i):
    """z is 1 in steps 50..59, 100..119 and 124..129; no row has both x and y above base + 100."""
    pulse = 50 <= i < 60 or 100 <= i < 120 or 124 <= i < 130
    covariance = (None, [], [-float(i), base + 2.0], [-float(i), base + 2.0])[i % 4]
    data = IMU(
        acceleration=Vector3d(x=base + i / 2, y=base + 149.5 - i / 2, z=float(pulse), covariance=covariance),
        angular_velocity=Vector3d(x=0.0, y=-0.25, z=9.75),
    )
    return message(at(i), data, None if i % 5 == 4 else "base_link" if i % 2 else f"tool_{base:.0f}")


def gps(base, i):
    """Every second step. z is 1 in steps 56..104, in B 62..70."""
    first, last = (62, 70) if base == BASE[B] else (56, 104)
    status = GPSStatus(status=i % 3, service=1 if base == 0.0 else 3, satellites=5 + i % 3, hdop=0.5)
    data = GPS(
        position=Point3d(x=base + 45 + i / 4, y=9.0, z=float(first <= 2 * i <= last)),
        status=status if i % 4 else None,
    )
    return message(at(2 * i), data)


def note(base, i):
    return message(at(i), String(data=f"{'memo' if base else 'note'} {i:03}"))


def flag(base, i):
    return message(at(i), Boolean(data=base == 0.0 and i >= 100))


def shape(base, i):
    points = [Point3d(x=base + corner, y=float(i), z=0.0) for corner in range(i % 4)]
    return message(at(i), sdk.Polygon(points=points))


TOPICS = {
    "/imu": (IMU, 300, imu),
    "/gps/front": (GPS, 200, gps),
    "/note": (String, 300, note),
    "/flag": (Boolean, 200, flag),
}
if MODERN:
    TOPICS["/shape"] = (sdk.Polygon, 200, shape)


def topic_metadata(base, topic):
    rate = 100 if topic == "/imu" else 50
    return {
        "run": RUN,
        "sensor": {"path": topic, "rate": rate},
        "ok": topic == "/imu",
        "series": f"s{base:.0f}",
    }


def messages(base, topic, start_ns=START_NS, end_ns=END_NS):
    _, count, payload = TOPICS[topic]
    return [m for m in (payload(base, i) for i in range(count)) if start_ns <= m.timestamp_ns < end_ns]


def write(client, name, base, metadata):
    with client.sequence_create(name, metadata) as writer:
        for topic, (ontology, _, _) in TOPICS.items():
            topic_writer = writer.topic_create(topic, topic_metadata(base, topic), ontology)
            for m in messages(base, topic):
                topic_writer.push(m)


# ---- Checks ----

checks = 0
failures = []


def check(what, found, expected=True):
    global checks
    checks += 1
    if found != expected:
        failures.append(f"{what}: found {found!r:.600}, expected {expected!r:.600}")


def check_raises(what, action, text="", kind=Exception):
    try:
        result = action()
    except kind as error:
        check(f"{what} says `{text}`, it says `{error}`", text in str(error))
    except Exception as error:
        check(f"{what} raises {kind.__name__}", type(error).__name__, kind.__name__)
    else:
        check(f"{what} raises {kind.__name__}", result, "an exception")


def fresh(client):
    """Forgets the cached handlers, which would hide what the server says now."""
    client.clear_sequence_handlers_cache()
    client.clear_topic_handlers_cache()
    return client


def stored(client, name, topic, **window):
    return list(client.topic_handler(name, topic).get_data_streamer(**window))
