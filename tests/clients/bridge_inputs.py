"""The input files of bridges.py: a drive as a ROS 2 bag, and one as an MCAP file with protobuf and JSON.

Messages are functions of their index, so they are computed again for every comparison. Beside each
payload stands what the SDK has to show for it, all fields, spelled out independently of its adapters.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2
from mcap.writer import Writer as McapWriter
from mcap_protobuf.schema import register_schema
from mosaicolabs import GPS, IMU, CompressedImage, Image
from mosaicolabs.bridges.ros import FrameTransform, PointCloud2
from mosaicolabs.models.core.unmodeled import Unmodeled
from rosbags.interfaces import Nodetype
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as BagWriter
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

Fields = dict[str, Any]

START_NS = 1_700_000_000_000_000_000
DURATION_NS = 5_000_000_000
PUBLISH_LEAD_NS = 1_234  # An MCAP message is published a little before it is logged.

PROBE = "flightbox_msgs/msg/Probe"
PROBE_DEFINITION = """
std_msgs/Header header
bool armed
int8 small
uint64 large
float32 ratio
float64 value
string text
uint8[] blob
float32[3] axis
string[] names
geometry_msgs/Point[] corners
builtin_interfaces/Duration elapsed
"""
STORE = get_typestore(Stores.ROS2_JAZZY)
STORE.register(get_types_from_msg(PROBE_DEFINITION, PROBE))


@dataclass(frozen=True)
class Channel:
    """A topic of an input file: how many messages, of which type, and what each one holds."""

    topic: str
    type_name: str
    count: int
    payload: Callable[[int], Fields]
    ontology: type = Unmodeled
    expected: Callable[[Fields], Fields] = lambda written: written

    def time_ns(self, index: int) -> int:
        return START_NS + index * DURATION_NS // self.count


def in_time_order(channels: list[Channel]) -> list[tuple[int, Channel, int]]:
    moments = [(channel.time_ns(i), channel, i) for channel in channels for i in range(channel.count)]
    return sorted(moments, key=lambda moment: moment[0])


# What the ROS 2 messages hold: every field of the type, so that nothing is left to a default.


def stamp(index: int) -> Fields:
    return {"sec": 1_700_000_000 + index, "nanosec": index * 999_983 % 1_000_000_000}


def header(index: int, frame_id: str) -> Fields:
    """Every fifth one is empty: the adapters make None of it."""
    empty = index % 5 == 4
    return {"stamp": {"sec": 0, "nanosec": 0} if empty else stamp(index), "frame_id": "" if empty else frame_id}


def point(index: int) -> Fields:
    return {"x": index / 7, "y": -index / 3, "z": 1e-300}


def compressed_image(index: int) -> Fields:
    noise = random.Random(index)
    data = noise.randbytes(noise.randint(1_000, 40_000))
    return {"header": header(index, "camera"), "format": "jpeg", "data": data}


def raw_image(index: int) -> Fields:
    """Rows with two bytes of padding."""
    data = random.Random(index).randbytes(50 * 24)
    size = {"height": 24, "width": 16, "step": 50}
    return {"header": header(index, "camera"), **size, "encoding": "rgb8", "is_bigendian": 0, "data": data}


def cloud(index: int) -> Fields:
    """A message without any point among them."""
    points = index * 37 % 500
    names = ["x", "y", "z", "intensity"]
    fields = [{"name": name, "offset": 4 * i, "datatype": 7, "count": 1} for i, name in enumerate(names)]
    data = np.random.default_rng(index).random(4 * points, dtype=np.float32).tobytes()
    shape = {"height": 1, "width": points, "point_step": 16, "row_step": 16 * points}
    flags = {"is_bigendian": False, "is_dense": True}
    return {"header": header(index, "lidar"), **shape, "fields": fields, **flags, "data": data}


def covariance(index: int, scale: float) -> list[float]:
    """Zeros, for unknown, on every third one."""
    return [0.0] * 9 if index % 3 == 0 else [scale * (i + 1) for i in range(9)]


def imu(index: int) -> Fields:
    return {
        "header": header(index, "imu"),
        "orientation": {"x": 0.0, "y": 0.0, "z": 0.6, "w": 0.8},
        "orientation_covariance": covariance(index, 0.1),
        "angular_velocity": {"x": index / 11, "y": float("inf"), "z": -0.0},
        "angular_velocity_covariance": covariance(index + 1, 0.01),
        "linear_acceleration": {"x": index / 7, "y": -index / 3, "z": 9.80665},
        "linear_acceleration_covariance": covariance(index + 2, 0.001),
    }


def fix(index: int) -> Fields:
    position = {"latitude": 45.46 + index * 1e-6, "longitude": 9.19 - index * 1e-6, "altitude": 120.0 + index}
    status = {"status": index % 4 - 1, "service": 1 + index % 2}
    known = index % 3 != 0
    errors = {"position_covariance": covariance(index, 2.0), "position_covariance_type": 2 if known else 0}
    return {"header": header(index, "gps"), "status": status, **position, **errors}


def transform(index: int, child: int) -> Fields:
    rotation = {"x": 0.0, "y": 0.0, "z": 0.6, "w": 0.8}
    move = {"translation": point(index), "rotation": rotation}
    return {"header": header(index, "map"), "child_frame_id": f"link {child} è", "transform": move}


def transforms(index: int) -> Fields:
    return {"transforms": [transform(index + child, child) for child in range(index % 4)]}


def diagnostics(index: int) -> Fields:
    values = [{"key": f"temperature {i}", "value": str(index / 3)} for i in range(index % 4)]
    one = {"level": index % 4, "name": "disk", "message": "è caldo", "hardware_id": "", "values": values}
    return {"header": header(index, ""), "status": [one] * (index % 3)}


def probe(index: int) -> Fields:
    return {
        "header": header(index, "probe"),
        "armed": index % 2 == 0,
        "small": -(index % 128),
        "large": 2**64 - 1 - index,
        "ratio": index / 8,
        "value": index / 9,
        "text": "é" * (index % 5),
        "blob": list(random.Random(index).randbytes(index % 300)),
        "axis": [0.5, -index / 4, 1e10],
        "names": [f"name {i}" for i in range(index % 3)],
        "corners": [point(i) for i in range(index % 4)],
        "elapsed": {"sec": -index, "nanosec": 999_999_999},
    }


# What the SDK's adapters make of them, all fields, spelled out here a second time.

BARE = {"header": None, "covariance": None, "covariance_type": None}


def header_read(written: Fields) -> Fields | None:
    if not written["frame_id"] and written["stamp"] == {"sec": 0, "nanosec": 0}:
        return None
    time = {"seconds": written["stamp"]["sec"], "nanoseconds": written["stamp"]["nanosec"]}
    return {"timestamp": time, "frame_id": written["frame_id"], "sample_counter": None}


def same_with_header(written: Fields) -> Fields:
    return {**written, "header": header_read(written["header"])}


def raw_image_read(written: Fields) -> Fields:
    read = same_with_header(written)
    stride = read.pop("step")
    return {**read, "stride": stride, "is_bigendian": bool(read["is_bigendian"]), "format": "png"}


def vector_read(written: Fields, errors: list[float]) -> Fields:
    return {**BARE, **written, "covariance": errors if any(errors) else None}


def imu_read(written: Fields) -> Fields:
    names = {"orientation": "orientation", "angular_velocity": "angular_velocity", "acceleration": "linear_acceleration"}
    read = {name: vector_read(written[ros], written[f"{ros}_covariance"]) for name, ros in names.items()}
    return {"header": header_read(written["header"]), **read}


def fix_read(written: Fields) -> Fields:
    place = {"x": written["latitude"], "y": written["longitude"], "z": written["altitude"]}
    position = vector_read(place, written["position_covariance"])
    if position["covariance"]:
        position["covariance_type"] = written["position_covariance_type"]
    status = {**written["status"], "satellites": None, "hdop": None, "vdop": None}
    return {"header": header_read(written["header"]), "position": position, "velocity": None, "status": status}


def transform_read(written: Fields) -> Fields:
    parts = {name: vector_read(part, []) for name, part in written["transform"].items()}
    frames = {"header": header_read(written["header"]), "target_frame_id": written["child_frame_id"]}
    return {**BARE, **frames, **parts}


def transforms_read(written: Fields) -> Fields:
    return {"transforms": [transform_read(one) for one in written["transforms"]]}


ROS_CHANNELS = [
    Channel("/camera/front", "sensor_msgs/msg/CompressedImage", 60, compressed_image, CompressedImage, same_with_header),
    Channel("/camera/raw", "sensor_msgs/msg/Image", 20, raw_image, Image, raw_image_read),
    Channel("/lidar/top", "sensor_msgs/msg/PointCloud2", 40, cloud, PointCloud2, same_with_header),
    Channel("/imu/data", "sensor_msgs/msg/Imu", 300, imu, IMU, imu_read),
    Channel("/gps/fix", "sensor_msgs/msg/NavSatFix", 50, fix, GPS, fix_read),
    Channel("/tf", "tf2_msgs/msg/TFMessage", 100, transforms, FrameTransform, transforms_read),
    Channel("/diagnostics", "diagnostic_msgs/msg/DiagnosticArray", 50, diagnostics),
    Channel("/probe", PROBE, 100, probe),
]


def ros_object(type_name: str, values: Fields) -> Any:
    fields = {name: ros_value(node, values[name]) for name, node in STORE.fielddefs[type_name][1]}
    return STORE.types[type_name](**fields)


def ros_value(node: Any, value: Any) -> Any:
    kind, detail = node
    if kind is Nodetype.BASE:
        return value
    if kind is Nodetype.NAME:
        return ros_object(detail, value)
    item_kind, item = detail[0]
    if item_kind is Nodetype.NAME:
        return [ros_object(item, one) for one in value]
    if item[0] == "string":
        return value
    return np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.array(value, item[0])


def write_bag(folder: Path, plugin: StoragePlugin) -> Path:
    """A ROS 2 bag; the file with the messages is the one of it that the injector takes."""
    with BagWriter(folder, version=9, storage_plugin=plugin) as bag:
        opened = {c.topic: bag.add_connection(c.topic, c.type_name, typestore=STORE) for c in ROS_CHANNELS}
        for time_ns, channel, index in in_time_order(ROS_CHANNELS):
            message = ros_object(channel.type_name, channel.payload(index))
            bag.write(opened[channel.topic], time_ns, STORE.serialize_cdr(message, channel.type_name))
    return next(file for file in folder.iterdir() if file.suffix in {".mcap", ".db3"})


# The MCAP file: protobuf with every kind of field, and JSON. The SDK has no adapter for either.

PROTO = {
    "Vector": "double x, double y, double z",
    "Camera": "Timestamp stamp, string frame_id, bytes data, string format",
    "Field": "string name, uint32 offset, uint32 type",
    "Cloud": "Timestamp stamp, string frame_id, uint32 point_stride, repeated Field fields, bytes data",
    "Motion": "Timestamp stamp, fixed64 counter, sint64 offset_ns, bool valid, float temperature,"
    " Vector acceleration, Vector angular_velocity, repeated double covariance, repeated Vector trail",
}
JSON_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "level": {"type": "integer"},
        "load": {"type": "number"},
        "alarm": {"type": "boolean"},
        "disk": {"type": "object", "properties": {"path": {"type": "string"}, "free": {"type": "integer"}}},
        "history": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    },
}


def proto_classes() -> dict[str, Any]:
    """Classes of the messages of `PROTO`, without a compiler."""
    file = descriptor_pb2.FileDescriptorProto(name="drive.proto", package="drive", syntax="proto3")
    file.dependency.append(timestamp_pb2.DESCRIPTOR.name)
    for name, fields in PROTO.items():
        message = file.message_type.add(name=name)
        for number, field in enumerate(fields.split(","), 1):
            *repeated, kind, field_name = field.split()
            message.field.add(name=field_name, number=number, label=3 if repeated else 1, **proto_type(kind))
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"drive.{name}")) for name in PROTO}


def proto_type(kind: str) -> Fields:
    if kind == "Timestamp":
        return {"type": 11, "type_name": ".google.protobuf.Timestamp"}
    if kind in PROTO:
        return {"type": 11, "type_name": f".drive.{kind}"}
    return {"type": descriptor_pb2.FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")}


def proto_stamp(index: int) -> Fields:
    return {"seconds": 1_700_000_000 + index, "nanos": 1 + index * 999_983 % 999_999_999}


def proto_camera(index: int) -> Fields:
    image = compressed_image(index)
    return {"stamp": proto_stamp(index), "frame_id": "camera", "data": image["data"], "format": "jpeg"}


def proto_cloud(index: int) -> Fields:
    points = cloud(index)
    fields = [{"name": f["name"], "offset": f["offset"], "type": f["datatype"]} for f in points["fields"]]
    return {
        "stamp": proto_stamp(index),
        "frame_id": "" if index % 4 else "lidar",
        "point_stride": points["point_step"],
        "fields": fields[: index % 5],
        "data": points["data"],
    }


def proto_motion(index: int) -> Fields:
    """An absent message, as protobuf allows, is None."""
    return {
        "stamp": proto_stamp(index),
        "counter": 2**64 - 1 - index,
        "offset_ns": -(2**62) - index,
        "valid": index % 2 == 0,
        "temperature": index / 8,
        "acceleration": point(index),
        "angular_velocity": point(index) if index % 3 else None,
        "covariance": [index / 10] * (index % 4),
        "trail": [point(i) for i in range(index % 3)],
    }


def json_status(index: int) -> Fields:
    return {
        "name": "è caldo" * (index % 3),
        "level": -(2**62) - index,
        "load": index / 7,
        "alarm": index % 2 == 0,
        "disk": {"path": "/", "free": 2**53 + index},
        "history": [[float(i)] * i for i in range(index % 4)],
    }


MCAP_CHANNELS = [
    Channel("/camera/front", "Camera", 60, proto_camera),
    Channel("/lidar/top", "Cloud", 40, proto_cloud),
    Channel("/imu/data", "Motion", 300, proto_motion),
    Channel("/status", "json", 50, json_status),
]


def write_mcap(file: Path) -> Path:
    classes = proto_classes()
    writer = McapWriter(str(file))
    writer.start()
    schema = {name: register_schema(writer, classes[name]) for name in ("Camera", "Cloud", "Motion")}
    schema["json"] = writer.register_schema("drive.Status", "jsonschema", json.dumps(JSON_SCHEMA).encode())
    opened = {}
    for channel in MCAP_CHANNELS:
        encoding = "json" if channel.type_name == "json" else "protobuf"
        opened[channel.topic] = writer.register_channel(channel.topic, encoding, schema[channel.type_name])
    for time_ns, channel, index in in_time_order(MCAP_CHANNELS):
        values = channel.payload(index)
        if channel.type_name == "json":
            data = json.dumps(values).encode()
        else:
            data = classes[channel.type_name](**values).SerializeToString(deterministic=True)
        writer.add_message(opened[channel.topic], time_ns, data, publish_time=time_ns - PUBLISH_LEAD_NS)
    writer.finish()
    return file
