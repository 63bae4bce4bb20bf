"""Every published generation of the Python SDK, unmodified, gets every answer its own API promises.

Runs under mosaicolabs 0.3.2, 0.4.3, 0.5.0, 0.6.3 or 0.7.0 and guarantees, for the installed one: what
was written is listed, described and streamed back equal, in half-open windows too; every operator of
every query builder finds exactly the sequences and topics it must (often none); time ranges, clusters
and intersections are exact; error policies, notifications and deletions leave what they must; and a
sequence which another generation left behind is readable as far as the generations can be.

Usage: python compat.py HOST PORT [DATA_DIR] [--only SECTION,...] [--leave] [--read NAME ...]
`--leave` leaves the sequence compat_<version>_kept for the `--read` of other versions.
Exit code: 0 and one line with the number of checks; 1 and every failed check.
Where the wire contract leaves a choice, the expected answer is the row semantics of its section 9.
"""

import argparse
import sys
import time
import traceback

import compat_world as world
from compat_queries import *

# ---- Listing, handlers, streams ----


def listing_and_handlers(client):
    check("both sequences are listed", {A, B} <= set(client.list_sequences()))
    if MODERN:
        check("sequence_exists", [client.sequence_exists(A), client.sequence_exists(A + "x")], [True, False])
        check("topic_exists", [client.topic_exists(A, "/imu"), client.topic_exists(A, "/im")], [True, False])
    if MINOR < 7:
        check("version() has text", bool(client.version()["version"]))
    check("unknown sequence", client.sequence_handler(A + "x"), None)
    check("unknown topic", client.topic_handler(A, "/nothing"), None)
    check_raises("a second sequence of that name", lambda: client.sequence_create(A, {}).__enter__())
    for name in (A, B):
        handler = client.sequence_handler(name)
        check("name", handler.name, name)
        check("user_metadata", handler.user_metadata, METADATA[name])
        check("topics", sorted(handler.topics), sorted(TOPICS))
        check("one locked session", [session.locked for session in handler.sessions], [True])
        session = handler.sessions[0]
        check("session topics", sorted(session.topics), sorted(TOPICS))
        check("session times", session.created_timestamp <= session.completed_timestamp)
        check("sequence bounds", (handler.timestamp_ns_min, handler.timestamp_ns_max), (at(0), at(398)))
        check("created now", abs(handler.created_timestamp - time.time_ns()) < 600e9)
        sizes = [topic_is_described(client, name, topic) for topic in TOPICS]
        check("sequence size is the sum of its topics", handler.total_size_bytes, sum(sizes))


def topic_is_described(client, name, topic):
    handler = client.topic_handler(name, topic)
    sent = messages(BASE[name], topic)
    check(f"{topic} name", (handler.sequence_name, handler.name), (name, topic))
    check(f"{topic} user_metadata", handler.user_metadata, topic_metadata(BASE[name], topic))
    check(f"{topic} tag", handler.ontology_tag, tag_of(TOPICS[topic][0]))
    check(f"{topic} locked", handler.locked, True)
    check(f"{topic} has chunks and bytes", handler.chunks_number >= 1 and handler.total_size_bytes > 0)
    bounds = (handler.timestamp_ns_min, handler.timestamp_ns_max)
    check(f"{topic} bounds", bounds, (sent[0].timestamp_ns, sent[-1].timestamp_ns))
    return handler.total_size_bytes


def topics_stream_back_equal(client):
    for name in (A, B):
        for topic in TOPICS:
            for start, end in [(None, None), (50, 60), (60, None), (None, 60), (0, 398), (50, 51)]:
                window = bounds_of(start, end)
                stream = client.topic_handler(name, topic).get_data_streamer(**window)
                expected = messages(BASE[name], topic, *filled(window))
                first, last = expected[0].timestamp_ns, expected[-1].timestamp_ns
                what = f"{topic} [{start}, {end})"
                if MODERN:
                    found = (stream.msg_count, stream.timestamp_ns_min, stream.timestamp_ns_max)
                    check(f"{what} rows, first and last time", found, (len(expected), first, last))
                check(f"{what} next_timestamp", stream.next_timestamp(), first)
                check(what, list(stream), expected)
    between_rows = {"start_timestamp_ns": at(50) + 1, "end_timestamp_ns": at(51)}
    check("window without rows", stored(client, A, "/imu", **between_rows), [])


def sequences_stream_back_merged(client):
    handler = client.sequence_handler(B)
    for start, end in [(None, None), (50, 60), (250, None), (None, 1)]:
        for topics in ([], ["/imu", "/gps/front"]):
            window = bounds_of(start, end)
            pairs = list(handler.get_data_streamer(topics, **window))
            times = [m.timestamp_ns for _, m in pairs]
            check(f"merged [{start}, {end}) is in time order", times == sorted(times))
            found = {topic: [m for t, m in pairs if t == topic] for topic in TOPICS}
            chosen = topics or TOPICS
            sent = {t: messages(BASE[B], t, *filled(window)) if t in chosen else [] for t in TOPICS}
            check(f"merged [{start}, {end}) of {topics}", found, sent)
    check_raises("a foreign topic", lambda: handler.get_data_streamer(["/no"]), "Invalid input", ValueError)


def bounds_of(start, end):
    start, end = (None if step is None else at(step) for step in (start, end))
    return {"start_timestamp_ns": start, "end_timestamp_ns": end}


def filled(window):
    start, end = window.values()
    return START_NS if start is None else start, END_NS if end is None else end


# ---- Error policies, notifications, updates, deletions ----


class Boom(Exception):
    pass


def fail_while_writing(client, name, policy):
    """40 rows are on the server, 10 still in the client, one topic has none; then user code fails."""
    try:
        with client.sequence_create(name, {"run": RUN}, on_error=policy) as writer:
            topic = writer.topic_create("/imu", {}, IMU)
            writer.topic_create("/nothing", {}, String)
            for i in range(50):
                if i == 40:
                    flush(topic)
                topic.push(imu(0.0, i))
            raise Boom("boom " + RUN)
    except Boom as error:
        check(f"{policy} lets the user's error through", str(error), "boom " + RUN)


def policy_delete_leaves_nothing(client):
    name = f"compat-{RUN}-delete"
    fail_while_writing(client, name, SessionLevelErrorPolicy.Delete)
    check("Delete: gone from the list", name in client.list_sequences(), False)
    check("Delete: no sequence handler", fresh(client).sequence_handler(name), None)
    check("Delete: no topic handler", client.topic_handler(name, "/imu"), None)
    with client.sequence_create(name, {}) as writer:
        writer.topic_create("/note", {}, String).push(note(0.0, 1))
    check("Delete: the name is free", stored(client, name, "/note"), [note(0.0, 1)])
    client.sequence_delete(name)


def policy_report_keeps_what_arrived(client):
    name = f"compat-{RUN}-report"
    fail_while_writing(client, name, SessionLevelErrorPolicy.Report)
    handler = fresh(client).sequence_handler(name)
    check("Report: topics", sorted(handler.topics), ["/imu", "/nothing"])
    check("Report: the session is finalized", [s.locked for s in handler.sessions], [True])
    check("Report: every row that was sent", stored(client, name, "/imu"), messages(0.0, "/imu")[:40])
    merged = [m for _, m in handler.get_data_streamer()]
    check("Report: the sequence streams", merged, messages(0.0, "/imu")[:40])
    empty = client.topic_handler(name, "/nothing")
    check(
        "Report: an empty topic has no bounds", (empty.timestamp_ns_min, empty.timestamp_ns_max), (None, None)
    )
    check_raises("Report: no stream of no data", empty.get_data_streamer, "might contain no data", ValueError)


def notifications_are_listed_and_cleared(client):
    name = f"compat-{RUN}-notices"
    fail_while_writing(client, name, SessionLevelErrorPolicy.Report)
    check_notice("sequence", client.list_sequence_notifications(name), name, None)
    check_notice("topic", client.list_topic_notifications(name, "/imu"), name, "/imu")
    check_notice("empty topic", client.list_topic_notifications(name, "/nothing"), name, "/nothing")
    client.clear_topic_notifications(name, "/imu")
    check("cleared topic", client.list_topic_notifications(name, "/imu"), [])
    check("the other topic keeps its own", len(client.list_topic_notifications(name, "/nothing")), 1)
    check("the sequence keeps its own", len(client.list_sequence_notifications(name)), 1)
    client.clear_sequence_notifications(name)
    client.clear_sequence_notifications(name)
    check("cleared sequence", client.list_sequence_notifications(name), [])
    check("nothing to report", client.list_sequence_notifications(A), [])


def check_notice(what, notices, sequence, topic):
    check(f"{what}: one notification", len(notices), 1)
    for notice in notices:
        check(f"{what}: where", (notice.sequence_name, notice.topic_name), (sequence, topic))
        check(f"{what}: type", notice.type.value, "error")
        check(f"{what}: text", "boom " + RUN in notice.message)
        age = datetime.now(timezone.utc) - notice.created_datetime
        check(f"{what}: when", timedelta(minutes=-1) < age < timedelta(minutes=10))


def topic_policies(client):
    """Ignore goes on, Finalize closes one topic with what it had sent, Raise ends the session."""
    name = f"compat-{RUN}-topics"
    with client.sequence_create(name, {}) as writer:
        ignoring = writer.topic_create("/ignore", {}, IMU, on_error=TopicLevelErrorPolicy.Ignore)
        finalizing = writer.topic_create("/finalize", {}, IMU, on_error=TopicLevelErrorPolicy.Finalize)
        for i in range(30):
            ignoring.push(imu(0.0, i))
            finalizing.push(imu(0.0, i))
        flush(finalizing)
        for topic in (ignoring, finalizing):
            with topic:
                raise Boom("boom " + RUN)
        check("Finalize: closed", (ignoring.is_active, finalizing.is_active), (True, False))
        ignoring.push(imu(0.0, 30))
    check("Ignore: all rows", stored(client, name, "/ignore"), messages(0.0, "/imu")[:31])
    check("Finalize: the rows that were sent", stored(client, name, "/finalize"), messages(0.0, "/imu")[:30])
    for topic in ("/ignore", "/finalize"):
        check_notice(topic, client.list_topic_notifications(name, topic), name, topic)
    check("topic errors are not the sequence's", client.list_sequence_notifications(name), [])
    try:
        with client.sequence_create(name + "-raise", {}) as writer, writer.topic_create("/imu", {}, IMU):
            raise Boom("boom " + RUN)
    except Boom:
        check_notice("Raise", client.list_sequence_notifications(name + "-raise"), name + "-raise", None)


def updates_and_deletions(client):
    name = f"compat-{RUN}-update"
    write(client, name, 0.0, {"run": "other"})
    with client.sequence_handler(name).update() as writer:
        writer.topic_create("/late", {}, String).push(note(0.0, 7))
    try:
        with fresh(client).sequence_handler(name).update(on_error=SessionLevelErrorPolicy.Delete) as writer:
            writer.topic_create("/never", {}, String).push(note(0.0, 8))
            raise Boom("boom")
    except Boom:
        pass
    handler = fresh(client).sequence_handler(name)
    check("update: two sessions, the failed one is gone", len(handler.sessions), 2)
    check("update: topics of both", sorted(handler.topics), sorted([*TOPICS, "/late"]))
    check("update: readable", stored(client, name, "/late"), [note(0.0, 7)])
    late = next(session for session in handler.sessions if session.topics == ["/late"])
    client.session_delete(session_key(late))
    handler = fresh(client).sequence_handler(name)
    check("session_delete: its topics are gone", sorted(handler.topics), sorted(TOPICS))
    check("session_delete: no handler of its topic", client.topic_handler(name, "/late"), None)
    total = sum(count for _, count, _ in TOPICS.values())
    check("session_delete: the rest streams", len(list(handler.get_data_streamer())), total)
    check_raises("session_delete again", lambda: client.session_delete(session_key(late)))
    for suffix in ("update", "report", "notices", "topics", "topics-raise"):
        if f"compat-{RUN}-{suffix}" in client.list_sequences():
            client.sequence_delete(f"compat-{RUN}-{suffix}")
    left = [s for s in client.list_sequences() if RUN in s and s not in BASE]
    check("sequence_delete: gone from the list", left, [])
    check("sequence_delete: no sequence handler", fresh(client).sequence_handler(name), None)
    check("sequence_delete: no topic handler", client.topic_handler(name, "/imu"), None)
    # Not `name`: a repeat on one connection may be answered well, 0.3 itself repeats its last one.
    check_raises("sequence_delete of nothing", lambda: client.sequence_delete(A + "x"), kind=KeyError)


def deleted_is_not_found_by_query(client):
    client.sequence_delete(B)
    finds(client, "after deletion", "a", list(TOPICS), QuerySequence().with_user_metadata("run", eq=RUN))
    finds(client, "rows after deletion", "", [], QueryOntologyCatalog(IMU.Q.acceleration.x.eq(1149.5)))


# ---- What another version left ----

KEPT_TOPICS = ["/flag", "/gps/front", "/imu", "/note"]


def leave(client):
    name = f"compat_{VERSION.replace('.', '_')}_kept"
    if name in client.list_sequences():
        client.sequence_delete(name)
    TOPICS.pop("/shape", None)
    write(client, name, KEPT_BASE, {"writer": VERSION, "nested": {"k": 1.5}})


def minor_of(name):
    return int(name.split("_")[2])


def read(client, name):
    writer = name.removeprefix("compat_").removesuffix("_kept").replace("_", ".")
    modern_writer = minor_of(name) >= 6
    check(f"{name} is listed", name in client.list_sequences())
    handler = client.sequence_handler(name)
    check(f"{name} metadata", handler.user_metadata, {"writer": writer, "nested": {"k": 1.5}})
    check(f"{name} topics", sorted(handler.topics), KEPT_TOPICS)
    check(f"{name} bounds", (handler.timestamp_ns_min, handler.timestamp_ns_max), (at(0), at(398)))
    for topic in KEPT_TOPICS:
        topic_handler, tag = client.topic_handler(name, topic), TOPICS[topic][0].__name__
        check(f"{name}{topic} tag", topic_handler.ontology_tag, tag if modern_writer else tag.lower())
        check(f"{name}{topic} metadata", topic_handler.user_metadata["sensor"]["path"], topic)
        for window in (bounds_of(None, None), bounds_of(50, 60)):
            expected = messages(KEPT_BASE, topic, *filled(window))
            stream = topic_handler.get_data_streamer(**window)
            if modern_writer == MODERN:
                check(f"{name}{topic} messages", list(stream), expected)
            elif modern_writer:
                check_raises(
                    f"{name}{topic}", lambda s=stream: list(s), "No ontology registered with tag", ValueError
                )
            else:
                unmodeled_is_equal(f"{name}{topic}", list(stream), expected)
    if MODERN or not modern_writer:
        check(f"{name} merged", len(list(handler.get_data_streamer())), 1000)


def query_what_another_version_wrote(client, name):
    """Tags are text: 0.6 and 0.7 find older rows by their old tags, older versions find new topics."""
    modern_writer, only = minor_of(name) >= 6, QuerySequence().with_name(name)
    tag = "IMU" if modern_writer else "imu"
    found = client.query(only, QueryTopic().with_ontology_tag(tag))
    check(f"{name} by tag", [[t.name for t in item.topics] for item in found], [["/imu"]])
    check(
        f"{name} by wrong tag", client.query(only, QueryTopic().with_ontology_tag(tag.swapcase())).is_empty()
    )
    if MODERN:
        x = sdk.QueryableNumeric(f"{tag}.acceleration.x")
        found = client.query(only, QueryOntologyCatalog(x.eq(KEPT_BASE + 0.5)))
        check(
            f"{name} by value",
            [(t.name, t.ontology_tag) for item in found for t in item.topics],
            [("/imu", tag)],
        )
        check(f"{name} clusters", spans(found[0].topics[0].clusterize()), [(1, 1)])
    else:
        found = client.query(only, QueryOntologyCatalog(IMU.Q.acceleration.x.eq(KEPT_BASE + 0.5)))
        check(
            f"{name} by value", [t.name for i in found for t in i.topics], [] if modern_writer else ["/imu"]
        )


def unmodeled_is_equal(what, found, expected):
    check(f"{what} is Unmodeled", {isinstance(m.data, sdk.Unmodeled) for m in found}, {True})
    check(f"{what} times", [m.timestamp_ns for m in found], [m.timestamp_ns for m in expected])
    for field in set(expected[0].data.model_dump()) - {"header"}:
        read_back = [without_header(m.data.raw_data[field]) for m in found]
        check(f"{what} {field}", read_back, [without_header(m.data.model_dump()[field]) for m in expected])


def without_header(value):
    """From 0.6 on nested values have a header of their own, which the older ones lack."""
    return {k: v for k, v in value.items() if k != "header"} if isinstance(value, dict) else value


SECTIONS = {
    "streams": [listing_and_handlers, topics_stream_back_equal, sequences_stream_back_merged],
    "query": [
        operators_are_known,
        ontology_operators,
        unknown_tags_are_refused,
        expressions_of_one_tag_meet_in_one_row,
        names_tags_and_creation_times,
        user_metadata_operators,
        combinations_are_and,
        responses_become_queries,
        timestamp_ranges,
    ],
    "filters": [clusters, intersections],
    "policies": [policy_delete_leaves_nothing, policy_report_keeps_what_arrived],
    "notifications": [notifications_are_listed_and_cleared, topic_policies],
    "deletes": [updates_and_deletions],
    "deleted_query": [deleted_is_not_found_by_query],
}


def run(what, action, *arguments):
    try:
        action(*arguments)
    except Exception:
        world.failures.append(f"{what} ended by an exception:\n{traceback.format_exc()}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("data_dir", nargs="?", help="taken and ignored: other checks need it")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections: " + ",".join(SECTIONS))
    parser.add_argument("--leave", action="store_true")
    parser.add_argument("--read", action="append", default=[], metavar="NAME")
    arguments = parser.parse_args()
    sdk.setup_sdk_logging(level="CRITICAL")  # Most failures here are wanted ones.
    with MosaicoClient.connect(arguments.host, arguments.port) as client:
        sections = [section for section in arguments.only.split(",") if section]
        if sections:
            for name in (A, B):
                run(f"write {name}", write, client, name, BASE[name], METADATA[name])
        for section in sections:
            for action in SECTIONS[section]:
                run(f"{section}: {action.__name__}", action, client)
        if sections:
            for name in set(BASE) & set(client.list_sequences()):
                client.sequence_delete(name)
        if arguments.leave:
            run("leave", leave, client)
        for name in arguments.read:
            run(f"read {name}", read, fresh(client), name)
            run(f"query {name}", query_what_another_version_wrote, client, name)
    for failure in world.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    print(f"compat {VERSION}: {world.checks} checks" + (f", {len(world.failures)} FAILED" if world.failures else ""))
    return 1 if world.failures else 0


if __name__ == "__main__":
    sys.exit(main())
