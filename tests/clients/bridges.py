"""The client's own bridges: real MCAP and ROS 2 files go into the recorder by the SDK's injectors
(the published command-line programs, unmodified) and come back equal, message by message.

Guarantees, for a ROS 2 bag as MCAP, the same bag as sqlite3, and an MCAP file with protobuf and JSON:
- every message is there, in order, at its log time, by the topic's stream and by the sequence's;
- every field is what was written, blobs byte by byte; types the SDK has no adapter for (a stock
  one, an own one, and all of plain MCAP) arrive as `Unmodeled`, built from the recorder's schema;
- what the bridges keep beside the data (`_ros_`, `_mcap_` metadata) is whole: the SDK's extractors
  make files of it again in which every message equals the original one to the byte.

The MCAP injector of 0.7.0 takes only protobuf and JSON channels; CDR (ROS 2) inside an MCAP file is
the ROS injector's. The input files (bridge_inputs.py) are in a temporary folder.

Usage: python bridges.py HOST PORT [DATA_DIR]      (DATA_DIR, the recorder's folder, is not touched)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import uuid
from collections import Counter, defaultdict
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from mcap.reader import make_reader
from mosaicolabs import Image, Message, MosaicoClient
from mosaicolabs.bridges.mcap import MCAPExtractorConfig, MCAPSequenceExtractor
from mosaicolabs.bridges.ros import ROSExtractorConfig, ROSSequenceExtractor
from mosaicolabs.models.core.unmodeled import Unmodeled
from rosbags.rosbag2 import StoragePlugin
from rosbags.typesys import Stores

from bridge_inputs import MCAP_CHANNELS, PUBLISH_LEAD_NS, ROS_CHANNELS, Channel, Fields, in_time_order, write_bag, write_mcap


class Recording:
    """One input file, the injector for it, and the sequence it becomes."""

    def __init__(self, program: str, file: Path, channels: list[Channel]) -> None:
        self.program = program
        self.file = file
        self.channels = channels
        self.sequence = f"{file.stem}-{file.suffix[1:]}-{uuid.uuid4().hex[:8]}"
        self.is_mcap = program == "mcap"

    def expected(self, channel: Channel, index: int) -> Fields:
        fields = channel.expected(channel.payload(index))
        if self.is_mcap:
            fields["publish_time_ns"] = channel.time_ns(index) - PUBLISH_LEAD_NS
        return fields


def upload(recording: Recording, host: str, port: int) -> None:
    program = Path(sys.executable).parent / f"mosaicolabs.{recording.program}_injector"
    arguments = [str(recording.file), "--name", recording.sequence, "--host", host, "--port", str(port)]
    options = ["--metadata", '{"driver": "città"}', "--topic-metadata", '{"/imu/data": {"unit": "m/s2"}}']
    done = subprocess.run([str(program), *arguments, *options], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{recording.program} injector: exit code {done.returncode}\n{said}"
    for word in ("Error", "ERROR", "WARNING", "Skipped"):
        assert word not in said, f"{recording.program} injector was not content: {word}\n{said}"


def check_sequence(client: MosaicoClient, recording: Recording) -> None:
    name = recording.sequence
    handler = client.sequence_handler(name)
    assert handler is not None, f"{name} is not there"
    topics = sorted(channel.topic for channel in recording.channels)
    assert sorted(handler.topics) == topics, f"{name}: topics {handler.topics}, not {topics}"
    kept = {"driver": "città", f"{'mcap' if recording.is_mcap else 'rosbag'}_injection": recording.file.name}
    assert handler.user_metadata == kept, f"{name}: metadata {handler.user_metadata}, not {kept}"
    found: Counter[str] = Counter()
    stream = handler.get_data_streamer()
    for (topic, message), (time_ns, _, _) in zip(stream, in_time_order(recording.channels), strict=True):
        assert message.timestamp_ns == time_ns, f"{name}: {message.timestamp_ns} in place of {time_ns}"
        channel = next(channel for channel in recording.channels if channel.topic == topic)
        check_message(recording, channel, found[topic], message)
        found[topic] += 1


def check_topic(client: MosaicoClient, recording: Recording, channel: Channel) -> int:
    where = f"{recording.sequence}{channel.topic}"
    handler = client.topic_handler(recording.sequence, channel.topic)
    assert handler is not None, f"{where} is not there"
    check_metadata(where, recording, channel, handler.user_metadata)
    stream = handler.get_data_streamer()
    assert stream.msg_count == channel.count, f"{where}: {stream.msg_count} messages, not {channel.count}"
    for index, message in zip(range(channel.count), stream, strict=True):
        check_message(recording, channel, index, message)
    return channel.count


def check_metadata(where: str, recording: Recording, channel: Channel, metadata: Fields) -> None:
    source = metadata["_mcap_" if recording.is_mcap else "_ros_"]
    assert source["source_file"] == recording.file.name, f"{where}: came from {source['source_file']}"
    unit = "m/s2" if channel.topic == "/imu/data" else None
    assert metadata.get("unit") == unit, f"{where}: unit {metadata.get('unit')}, not {unit}"
    if not recording.is_mcap:
        assert source["msgtype"] == channel.type_name, f"{where}: is a {source['msgtype']}"


def check_message(recording: Recording, channel: Channel, index: int, message: Message) -> None:
    where = f"{recording.sequence}{channel.topic} message {index}"
    time_ns = channel.time_ns(index)
    assert message.timestamp_ns == time_ns, f"{where}: at {message.timestamp_ns}, not {time_ns}"
    assert isinstance(message.data, channel.ontology), f"{where}: is a {type(message.data).__name__}"
    found = message.data.raw_data if isinstance(message.data, Unmodeled) else message.data.model_dump()
    if isinstance(message.data, Image):  # The ROS adapter made a PNG of the pixels.
        found["data"] = bytes(message.data.to_linear_pixels())
    expected = recording.expected(channel, index)
    for name in found.keys() | expected.keys():
        one, other = found.get(name, "nothing"), expected.get(name, "nothing")
        assert one == other, f"{where}: {name} is {one!r:.300}, not {other!r:.300}"


def extract(recording: Recording, host: str, port: int, folder: Path) -> Path:
    """The SDK's way back, into a new MCAP file."""
    place = {"saving_path": folder, "sequence_name": recording.sequence, "host": host, "port": port, "log_level": "ERROR"}
    if recording.is_mcap:
        extractor = MCAPSequenceExtractor(MCAPExtractorConfig(**place))
    else:
        form = {"ros_distro": Stores.ROS2_JAZZY, "storage_plugin": StoragePlugin.MCAP}
        extractor = ROSSequenceExtractor(ROSExtractorConfig(**place, **form))
    extractor.run()
    return folder / recording.sequence / f"{recording.sequence}.mcap"


def raw_messages(file: Path) -> dict[str, list[tuple]]:
    """By topic, what an MCAP file says of each message, in order."""
    topics = defaultdict(list)
    with file.open("rb") as stream:
        for schema, channel, message in make_reader(stream).iter_messages():
            what = (channel.message_encoding, schema.name, message.log_time, message.publish_time)
            topics[channel.topic].append((*what, message.data))
    return topics


def check_extracted(recording: Recording, extracted: Path, original: Path) -> None:
    found, expected = raw_messages(extracted), raw_messages(original)
    assert found.keys() == expected.keys(), f"{extracted}: topics {[*found]}, not {[*expected]}"
    for topic, messages in expected.items():
        counts = len(found[topic]), len(messages)
        assert counts[0] == counts[1], f"{extracted}: {topic} has {counts[0]} messages, not {counts[1]}"
        for index, (one, other) in enumerate(zip(found[topic], messages)):
            assert one == other, f"{extracted}: {topic} message {index} is {one!r:.300}, not {other!r:.300}"


def run(host: str, port: int, folder: Path) -> tuple[int, int]:
    bag = write_bag(folder / "drive", StoragePlugin.MCAP)
    lite = write_bag(folder / "lite", StoragePlugin.SQLITE3)
    plain = write_mcap(folder / "plain.mcap")
    recordings = [
        (Recording("ros", bag, ROS_CHANNELS), bag),
        (Recording("ros", lite, ROS_CHANNELS), bag),  # The same messages, in a file that is no MCAP.
        (Recording("mcap", plain, MCAP_CHANNELS), plain),
    ]
    messages = 0
    for recording, original in recordings:
        upload(recording, host, port)
        with MosaicoClient.connect(host, port) as client:
            check_sequence(client, recording)
            messages += sum(check_topic(client, recording, channel) for channel in recording.channels)
        with redirect_stderr(StringIO()):  # Its progress bars.
            extracted = extract(recording, host, port, folder)
        check_extracted(recording, extracted, original)
    return messages, sum(len(recording.channels) for recording, _ in recordings)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        messages, topics = run(sys.argv[1], int(sys.argv[2]), Path(folder))
    print(f"bridges: {messages} messages equal over {topics} topics")
    return 0


if __name__ == "__main__":
    sys.exit(main())
