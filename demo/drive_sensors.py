"""The simulated car of `drive.py`: one motion, the world around it, and the sensors on board.

Frames: ENU for positions (x east, y north), vehicle x forward, y left, z up; yaw counterclockwise
from east. Every sensor is a pure function of the step, so a recording can be checked by computing
it again. Knows nothing of connections, topics being written, or time passing.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from mosaicolabs import (
    GPS,
    IMU,
    CompressedImage,
    GPSStatus,
    Header,
    ImageFormat,
    Message,
    Point3d,
    Quaternion,
    RobotJoint,
    Serializable,
    Time,
    Vector3d,
)
from mosaicolabs.models.futures import Lidar
from numpy.typing import NDArray
from PIL import Image as Picture

Floats = NDArray[np.float64]

STEPS_PER_SECOND = 1_000
NS_PER_STEP = 1_000_000_000 // STEPS_PER_SECOND
SEED = 7

GRAVITY = 9.80665
WHEELBASE_M = 2.7
TRACK_M = 1.6
WHEEL_RADIUS_M = 0.33
VEHICLE_MASS_KG = 1_500.0
STEERING_RATIO = 15.0
BRAKING_S = (12.0, 22.0)  # When the car brakes hard.
CURVATURE_MAX = 0.012  # 1/m: 83 m of radius, 2.7 m/s² sideways at 15 m/s.

ORIGIN_LATITUDE = 45.46
ORIGIN_LONGITUDE = 9.19
ORIGIN_ALTITUDE_M = 120.0
METERS_PER_DEGREE_NORTH = 111_150.0
METERS_PER_DEGREE_EAST = 111_320.0 * math.cos(math.radians(ORIGIN_LATITUDE))


# --- The vehicle and the world ---


@dataclass(frozen=True)
class Motion:
    """The vehicle's path, one element per millisecond."""

    east: Floats
    north: Floats
    yaw: Floats
    speed: Floats
    acceleration: Floats
    curvature: Floats
    yaw_rate: Floats
    distance: Floats

    @property
    def steps(self) -> int:
        return len(self.speed)


def simulate(seconds: float) -> Motion:
    """Pulls away, then keeps varying the speed around 14 m/s through left and right bends; brakes hard twice."""
    t = np.arange(round(seconds * STEPS_PER_SECOND) + 1) / STEPS_PER_SECOND
    speed = (1 - np.exp(-t / 6)) * (14 + 1.2 * np.sin(2 * np.pi * t / 10))
    for start in BRAKING_S:
        # 4.2 m/s lost within 0.8 s (0.8 g at the worst), regained over 5 s.
        speed -= 4.2 * (smooth_step((t - start) / 0.8) - smooth_step((t - start - 1.5) / 5))
    curvature = CURVATURE_MAX * np.sin(2 * np.pi * t / 14)
    yaw_rate = speed * curvature
    yaw = 0.5 + integral(yaw_rate)
    return Motion(
        east=integral(speed * np.cos(yaw)),
        north=integral(speed * np.sin(yaw)),
        yaw=yaw,
        speed=speed,
        acceleration=np.gradient(speed, 1 / STEPS_PER_SECOND),
        curvature=curvature,
        yaw_rate=yaw_rate,
        distance=integral(speed),
    )


def smooth_step(x: Floats) -> Floats:
    """From 0 to 1 while x goes from 0 to 1, with no jump in its slope."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def integral(rate: Floats) -> Floats:
    """Trapezoids from the start to each step; 0 at the first."""
    areas = (rate[1:] + rate[:-1]) / 2 / STEPS_PER_SECOND
    return np.concatenate([[0.0], np.cumsum(areas)])


@dataclass(frozen=True)
class Box:
    """A building: lower and upper corner in ENU meters."""

    low: Floats
    high: Floats


def buildings(motion: Motion) -> list[Box]:
    """A building every 15 m of road, left and right in turn, never on the road."""
    noise = np.random.default_rng(SEED)
    path = np.stack([motion.east, motion.north], axis=1)[::20]
    boxes = []
    for number, place in enumerate(np.arange(0.0, motion.distance[-1], 15.0)):
        step = int(np.searchsorted(motion.distance, place))
        side = (1 if number % 2 else -1) * noise.uniform(16, 24)
        center = np.array(
            [
                motion.east[step] - side * math.sin(motion.yaw[step]),
                motion.north[step] + side * math.cos(motion.yaw[step]),
            ]
        )
        half = noise.uniform(3, 6, size=2)
        if np.all(np.max(np.abs(path - center) - half, axis=1) > 5):
            height = noise.uniform(5, 15)
            boxes.append(Box(np.array([*(center - half), 0.0]), np.array([*(center + half), height])))
    return boxes


# --- Sensors ---


class Sensor(ABC):
    """A topic of the recording: a pure function from the step to what is measured there."""

    topic: str
    ontology: type[Serializable]
    rate_hz: int
    frame_id: str

    def __init__(self, motion: Motion, start_ns: int) -> None:
        self.motion = motion
        self.start_ns = start_ns

    @abstractmethod
    def measure(self, step: int, header: Header) -> Serializable:
        """What the sensor reads at `step`."""

    def message(self, step: int) -> Message:
        timestamp_ns = self.start_ns + step * NS_PER_STEP
        counter = step * self.rate_hz // STEPS_PER_SECOND
        header = Header(
            timestamp=Time.from_nanoseconds(timestamp_ns), frame_id=self.frame_id, sample_counter=counter
        )
        return Message(timestamp_ns=timestamp_ns, data=self.measure(step, header))

    def steps(self) -> range:
        return range(0, self.motion.steps - 1, STEPS_PER_SECOND // self.rate_hz)

    def metadata(self) -> dict[str, Any]:
        return {"sensor": {"rate_hz": self.rate_hz, "frame_id": self.frame_id, "simulated": True}}


class ImuSensor(Sensor):
    """Specific force and turn rate at the rear axle, with a little noise."""

    topic, ontology, rate_hz, frame_id = "/imu", IMU, 200, "base_link"

    def __init__(self, motion: Motion, start_ns: int) -> None:
        super().__init__(motion, start_ns)
        noise = np.random.default_rng(SEED + 1)
        self.force_noise = noise.normal(0, 0.02, size=(motion.steps, 3))
        self.turn_noise = noise.normal(0, 0.001, size=(motion.steps, 3))

    def measure(self, step: int, header: Header) -> IMU:
        motion = self.motion
        sideways = motion.speed[step] * motion.yaw_rate[step]
        force = np.array([motion.acceleration[step], sideways, GRAVITY]) + self.force_noise[step]
        turn = np.array([0.0, 0.0, motion.yaw_rate[step]]) + self.turn_noise[step]
        half_yaw = motion.yaw[step] / 2
        return IMU(
            header=header,
            acceleration=Vector3d.from_list(force.tolist()),
            angular_velocity=Vector3d.from_list(turn.tolist()),
            orientation=Quaternion(x=0.0, y=0.0, z=math.sin(half_yaw), w=math.cos(half_yaw)),
        )


class GpsSensor(Sensor):
    """WGS 84 position, and velocity as the SDK has it: north, east, up."""

    topic, ontology, rate_hz, frame_id = "/gps", GPS, 10, "gps_antenna"

    def measure(self, step: int, header: Header) -> GPS:
        motion = self.motion
        speed, yaw = float(motion.speed[step]), float(motion.yaw[step])
        position = Point3d(
            x=ORIGIN_LATITUDE + float(motion.north[step]) / METERS_PER_DEGREE_NORTH,
            y=ORIGIN_LONGITUDE + float(motion.east[step]) / METERS_PER_DEGREE_EAST,
            z=ORIGIN_ALTITUDE_M,
        )
        velocity = Vector3d(x=speed * math.sin(yaw), y=speed * math.cos(yaw), z=0.0)
        status = GPSStatus(status=2, service=1, satellites=14, hdop=0.7, vdop=1.1)
        return GPS(header=header, position=position, velocity=velocity, status=status)


class JointSensor(Sensor):
    """Steering wheel and the four wheels: angle, rate, torque."""

    topic, ontology, rate_hz, frame_id = "/joints", RobotJoint, 50, "base_link"
    names = ["steering_wheel", "wheel_front_left", "wheel_front_right", "wheel_rear_left", "wheel_rear_right"]

    def __init__(self, motion: Motion, start_ns: int) -> None:
        super().__init__(motion, start_ns)
        steering = STEERING_RATIO * np.arctan(WHEELBASE_M * motion.curvature)
        left = motion.speed - motion.yaw_rate * TRACK_M / 2
        right = motion.speed + motion.yaw_rate * TRACK_M / 2
        swing = motion.yaw_rate * WHEELBASE_M  # Sideways speed of the front axle.
        wheels = [
            speed / WHEEL_RADIUS_M for speed in (np.hypot(left, swing), np.hypot(right, swing), left, right)
        ]
        drive = VEHICLE_MASS_KG * motion.acceleration * WHEEL_RADIUS_M / 2  # Front-wheel drive.
        drag = np.full_like(drive, 5.0)
        self.positions = np.stack([steering, *(integral(wheel) for wheel in wheels)], axis=1)
        self.velocities = np.stack([np.gradient(steering, 1 / STEPS_PER_SECOND), *wheels], axis=1)
        self.efforts = np.stack([0.8 * motion.speed * motion.yaw_rate, drive, drive, drag, drag], axis=1)

    def measure(self, step: int, header: Header) -> RobotJoint:
        return RobotJoint(
            header=header,
            names=self.names,
            positions=self.positions[step].tolist(),
            velocities=self.velocities[step].tolist(),
            efforts=self.efforts[step].tolist(),
        )


class CameraSensor(Sensor):
    """JPEG frames of the road ahead.

    A frame depends on the bend and on where in its 9 m period the lane marking is; each pair is
    rendered once. A JPEG comment with the time of the frame keeps every payload distinct.
    """

    topic, ontology, rate_hz, frame_id = "/camera/front", CompressedImage, 20, "camera_front"
    width, height, horizon = 1280, 720, 300
    focal_px, camera_height_m = 1_000.0, 1.5
    marking_period_m = 9
    bends_each_side = 4

    def __init__(self, motion: Motion, start_ns: int) -> None:
        super().__init__(motion, start_ns)
        rows = np.arange(self.horizon + 1, self.height)[:, None]
        columns = np.arange(self.width)[None, :]
        self.ahead = self.focal_px * self.camera_height_m / (rows - self.horizon)
        self.left = (self.width / 2 - columns) * self.ahead / self.focal_px
        self.grain = np.random.default_rng(SEED + 2).normal(0, 5, size=(self.height, self.width, 1))
        self.frames: dict[tuple[int, int], bytes] = {}

    def measure(self, step: int, header: Header) -> CompressedImage:
        bend = round(self.motion.curvature[step] / CURVATURE_MAX * self.bends_each_side)
        phase = int(self.motion.distance[step]) % self.marking_period_m
        if (bend, phase) not in self.frames:
            self.frames[bend, phase] = self.render(bend / self.bends_each_side * CURVATURE_MAX, phase)
        text = f"frame {header.sample_counter} at {self.start_ns + step * NS_PER_STEP} ns".encode()
        return CompressedImage(
            header=header, data=with_comment(self.frames[bend, phase], text), format=ImageFormat.JPEG
        )

    def render(self, curvature: float, phase_m: float) -> bytes:
        """Sky, grass, asphalt, two edge lines and a dashed middle line, in perspective."""
        aside = np.abs(self.left - curvature * self.ahead**2 / 2)
        dashed = (self.ahead + phase_m) % self.marking_period_m < 3
        ground = np.where((aside < 4.0)[..., None], (88, 88, 92), (70, 120, 58)).astype(float)
        ground[(np.abs(aside - 3.6) < 0.08) | ((aside < 0.08) & dashed)] = (235, 235, 225)
        sky = np.linspace((110, 160, 220), (205, 222, 240), self.horizon + 1)[:, None, :]
        scene = np.concatenate([np.broadcast_to(sky, (self.horizon + 1, self.width, 3)), ground])
        pixels = np.clip(scene + self.grain, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Picture.fromarray(pixels).save(buffer, format="JPEG", quality=80)
        return buffer.getvalue()


def with_comment(jpeg: bytes, text: bytes) -> bytes:
    """The same picture with a comment segment after the start marker."""
    return jpeg[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + jpeg[2:]


class LidarSensor(Sensor):
    """A 32-beam spinning lidar on the roof: rays against the ground plane and the buildings."""

    topic, ontology, rate_hz, frame_id = "/lidar/top", Lidar, 10, "lidar_top"
    height_m = 1.9
    range_max_m = 80.0
    beams, azimuths = 32, 1080

    def __init__(self, motion: Motion, start_ns: int) -> None:
        super().__init__(motion, start_ns)
        self.boxes = buildings(motion)
        elevation, azimuth = np.meshgrid(
            np.radians(np.linspace(-25, 3, self.beams)),
            np.linspace(-np.pi, np.pi, self.azimuths, endpoint=False),
            indexing="ij",
        )
        flat = np.cos(elevation)
        rays = [flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)]
        self.rays = np.stack([ray.ravel() for ray in rays]).astype(np.float32)
        self.beam_ids = np.repeat(np.arange(self.beams), self.azimuths)

    def measure(self, step: int, header: Header) -> Lidar:
        ranges, on_ground = self.cast(step)
        noise = np.random.default_rng(SEED + step)
        hit = ranges < self.range_max_m
        measured = ranges[hit] + noise.normal(0, 0.02, size=np.count_nonzero(hit)).astype(np.float32)
        x, y, z = (self.rays[:, hit] * measured).tolist()
        brightness = np.where(on_ground[hit], np.float32(0.2), np.float32(0.6)) / (1 + measured / 40)
        return Lidar(
            header=header, x=x, y=y, z=z, intensity=brightness.tolist(), beam_id=self.beam_ids[hit].tolist()
        )

    def cast(self, step: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Range per ray to the nearest surface (infinite for the sky), and whether that is the ground."""
        cosine, sine = np.cos(self.motion.yaw[step]), np.sin(self.motion.yaw[step])
        turned = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]], dtype=np.float32) @ self.rays
        origin = np.array([self.motion.east[step], self.motion.north[step], self.height_m])
        with np.errstate(divide="ignore"):
            inverse = 1 / turned
        ground = np.where(turned[2] < 0, -self.height_m * inverse[2], np.inf).astype(np.float32)
        ranges = ground.copy()
        for box in self.boxes:
            if np.linalg.norm((box.low + box.high)[:2] / 2 - origin[:2]) < self.range_max_m + 10:
                np.minimum(ranges, box_ranges(box, origin, inverse), out=ranges)
        return ranges, ranges == ground


def box_ranges(box: Box, origin: Floats, inverse: NDArray[np.float32]) -> NDArray[np.float32]:
    """Slab method: where each ray enters the box; infinite where it misses."""
    near = (box.low - origin).astype(np.float32)[:, None] * inverse
    far = (box.high - origin).astype(np.float32)[:, None] * inverse
    entry = np.max(np.minimum(near, far), axis=0)
    leave = np.min(np.maximum(near, far), axis=0)
    return np.where((0 < entry) & (entry <= leave), entry, np.float32(np.inf))
