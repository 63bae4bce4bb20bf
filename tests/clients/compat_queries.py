"""Query builders and temporal filters of the installed generation: every operator finds exactly what it must."""

from compat_world import *

# ---- Queries ----


def answer(client, *queries):
    """{sequence: topics} of this run's sequences: other runs may have left theirs."""
    response = client.query(*queries)
    check("the answer has no sequence twice", len(response), len({item.sequence.name for item in response}))
    return {i.sequence.name: sorted(t.name for t in i.topics) for i in response if i.sequence.name in BASE}


def finds(client, what, letters, topics, *queries):
    expected = {name: sorted(topics) for letter, name in (("a", A), ("b", B)) if letter in letters}
    check(f"query {what}", answer(client, *queries), expected)


def operators_are_known(_client):
    """The table at the top misses no operator of this version."""
    fields = {"number": IMU.Q.acceleration.x, "string": String.Q.data, "bool": Boolean.Q.data}
    classes = {kind: type(field) for kind, field in fields.items()} | {"metadata": MetadataField}
    for kind, cls in classes.items():
        public = {name for name in dir(cls) if not name.startswith("_") and callable(getattr(cls, name))}
        check(f"operators of a {kind}", public, OPERATORS[kind])


# fmt: off
NUMBERS = [
    ("eq", 75.0, "a"), ("eq", 75, "a"), ("eq", 75.25, ""), ("eq", 1149.5, "b"), ("neq", 75.0, "ab"),
    ("lt", 0.5, "a"), ("lt", 0.0, ""), ("leq", 0.0, "a"), ("leq", -0.5, ""), ("gt", 1149.0, "b"),
    ("gt", 1149.5, ""), ("geq", 1149.5, "b"), ("geq", 1150.0, ""), ("geq", 0.0, "ab"),
    ("between", [149.5, 1000.0], "ab"), ("between", [149.6, 999.9], ""), ("between", [3.5, 3.5], "a"),
    ("in_", [0.25, 3.5], "a"), ("in_", [0.25], ""), ("in_", [3.5, 1003.5], "ab"),
    ("outside", [0.0, 1149.5], ""), ("outside", [0.0, 1149.0], "b"), ("outside", [0.5, 1149.5], "a"),
]
CONSTANTS = [
    ("eq", 9.75, "ab"), ("neq", 9.75, ""), ("neq", 9.5, "ab"), ("in_", [9.75, 1.0], "ab"),
    ("in_", [9.5, 1.0], ""), ("lt", 9.75, ""), ("leq", 9.75, "ab"), ("gt", 9.75, ""), ("geq", 9.75, "ab"),
    ("between", [9.75, 10.0], "ab"), ("outside", [9.75, 9.75], ""), ("outside", [9.8, 10.0], "ab"),
]
INTEGERS = [
    ("eq", 3, "b"), ("eq", 1, "a"), ("eq", 2, ""), ("neq", 1, "b"), ("neq", 2, "ab"), ("lt", 1.5, "a"),
    ("gt", 2, "b"), ("geq", 3.5, ""), ("leq", 0, ""), ("in_", [2, 3], "b"), ("between", [1, 3], "ab"),
    ("outside", [1, 2], "b"),
]
TIMES = [
    ("eq", at(5), "ab"), ("eq", at(5) + 1, ""), ("gt", at(298), "ab"), ("gt", at(299), ""),
    ("geq", at(299), "ab"), ("geq", at(299) + 1, ""), ("lt", at(0), ""), ("lt", at(0) + 1, "ab"),
    ("leq", at(0), "ab"), ("leq", at(0) - 1, ""), ("between", [at(7) - 1, at(7)], "ab"),
    ("between", [at(7) + 1, at(8) - 1], ""), ("in_", [at(9) + 1, at(9) - 1], ""),
    ("outside", [at(0), at(299)], ""), ("outside", [at(0), at(299) - 1], "ab"),
]
# `match` in ontologies exists server-side since 0.6 only (globs): older ones get the exact text.
STRINGS = [
    ("eq", "note 007", "a"), ("eq", "note 7", ""), ("eq", "NOTE 007", ""), ("neq", "note 007", "ab"),
    ("match", "note 007", "a"), ("in_", ["memo 299", "x"], "b"), ("in_", ["x", "y"], ""),
    ("lt", "memo 000", ""), ("lt", "note", "b"), ("leq", "memo 000", "b"), ("gt", "note 299", ""),
    ("gt", "memo 299", "a"), ("geq", "note 299", "a"), ("between", ["memo 2", "memo 4"], "b"),
    ("between", ["memo 3", "note"], ""), ("outside", ["memo 000", "note 299"], ""),
    ("outside", ["memo 000", "note 298"], "a"),
]
GLOBS = [
    ("match", "note*", "a"), ("match", "*o 29?", "b"), ("match", "note ##9", "a"), ("match", "note", ""),
    ("match", "?emo [01]*", "b"), ("match", "*[3-9]99", ""), ("match", "* 007", "ab"),
]
FRAMES = [
    ("eq", "base_link", "ab"), ("eq", "tool_0", "a"), ("in_", ["tool_1000", "z"], "b"), ("eq", "tool", ""),
]
FLAGS = [("eq", True, "a"), ("eq", False, "ab")]
# Rows have no list, an empty one, or [-step, base + 2]: `any` and `all` of an empty one are false.
ANY = [
    ("eq", 2.0, "a"), ("eq", 1002.0, "b"), ("lt", -298.5, "ab"), ("lt", -299.0, ""), ("neq", 2.0, "ab"),
    ("in_", [1002.0, 7.0], "b"), ("between", [1.5, 2.5], "a"), ("outside", [-299.0, 2.0], "b"),
]
ALL = [("gt", 0.0, ""), ("leq", 2.0, "a"), ("neq", 2.0, "b"), ("between", [-299.0, 2.0], "a")]
FIRST = [("leq", -299.0, "ab"), ("gt", 0.0, ""), ("eq", -2.0, "ab")]
SECOND = [("eq", 1002.0, "b"), ("neq", 2.0, "b")]
NOWHERE = [("gt", -1e9, ""), ("neq", 1.0, "")]
# Key of the user metadata, operator, value, who has it.
METADATA_CASES = [
    ("driver", "eq", "ada", "a"), ("driver", "eq", "eve", ""), ("trip", "eq", 7, "a"),
    ("ok", "eq", True, "a"), ("ok", "eq", False, "b"), ("speed", "eq", 1.5, "a"),
    ("city", "eq", "Città di Castello", "a"), ("nested.k", "eq", 1.5, "a"),
    ("nested.deep.name", "eq", "south", "b"), ("absent", "eq", 1, ""), ("nested", "eq", "x", ""),
    ("trip", "eq", "7", ""), ("trip", "lt", 70, "a"), ("trip", "leq", 70, "ab"), ("trip", "lt", 7, ""),
    ("nested.k", "gt", 0, "a"), ("speed", "geq", -3.0, "ab"), ("speed", "gt", 1.5, ""),
    ("trip", "between", [7, 69], "a"), ("trip", "between", [7, 70], "ab"), ("trip", "between", [8, 69], ""),
    ("driver", "neq", "ada", "b"), ("trip", "neq", 7, "b"), ("only_a", "ex", True, "a"),
    ("only_a", "ex", False, "b"), ("absent", "ex", True, ""), ("absent", "ex", False, "ab"),
    ("nested.deep.name", "ex", True, "ab"),
]
METADATA_CASES_5 = [("driver", "lt", "b", "a"), ("driver", "geq", "ada", "ab"), ("city", "gt", "R", "b")]
METADATA_CASES_6 = [
    ("driver", "in_", ["eve", "bob"], "b"), ("trip", "in_", [1, 2], ""), ("trip", "in_", [7, 70], "ab"),
    ("driver", "match", "a*", "a"), ("driver", "match", "a", ""), ("city", "match", "Citt? di*", "a"),
    ("trip", "outside", [7, 69], "b"), ("trip", "outside", [0, 100], ""),
    ("driver", "between", ["b", "c"], "b"), ("tags", "eq", "red", "a"), ("tags[*]", "eq", "blue", "b"),
    ("tags", "match", "gr*", "a"), ("tags", "eq", "x", ""), ("nested.*.name", "eq", "south", "b"),
    ("**.name", "eq", "north", "a"), ("*.k", "lt", 0, "b"), ("**.k", "eq", "north", ""),
]
METADATA_CASES_OF_TOPICS = [
    ("sensor.rate", "geq", 100, "ab", ["/imu"]), ("sensor.rate", "gt", 100, "", []),
    ("sensor.path", "eq", "/note", "ab", ["/note"]), ("series", "eq", "s1000", "b", list(TOPICS)),
    ("ok", "eq", True, "ab", ["/imu"]), ("sensor.rate", "between", [1, 100], "ab", list(TOPICS)),
]
# fmt: on


def ontology_operators(client):
    fields = [
        ("/imu", IMU.Q.acceleration.x, "number", NUMBERS),
        ("/imu", IMU.Q.angular_velocity.z, "number", CONSTANTS),
        ("/gps/front", GPS.Q.status.service, "number", INTEGERS),
        ("/imu", IMU.Q.timestamp_ns, "number", TIMES),
        ("/note", String.Q.data, "string", STRINGS + (GLOBS if MODERN else [])),
        ("/imu", frame_id_of(IMU), "string", FRAMES),
        ("/flag", Boolean.Q.data, "bool", FLAGS),
    ]
    if MODERN:
        covariance, points = IMU.Q.acceleration.covariance, sdk.Polygon.Q.points
        fields += [
            ("/imu", covariance.any(), "number", ANY),
            ("/imu", covariance.all(), "number", ALL),
            ("/imu", covariance[0], "number", FIRST),
            ("/imu", covariance[1], "number", SECOND),
            ("/imu", covariance[2], "number", NOWHERE),
            ("/shape", points.any().x, "number", [("eq", 2.0, "a"), ("eq", 3.0, ""), ("geq", 1002.0, "b")]),
            ("/shape", points.all().y, "number", [("eq", 199.0, "ab"), ("eq", 196.0, ""), ("lt", 0.0, "")]),
            ("/shape", points[2].x, "number", [("eq", 1002.0, "b"), ("eq", 1.0, "")]),
            ("/imu", sdk.QueryableNumeric("IMU.acceleration.x"), "number", NUMBERS[:4]),
            ("/note", sdk.QueryableString("String.data"), "string", STRINGS[:2]),
            ("/flag", sdk.QueryableBool("Boolean.data"), "bool", FLAGS),
        ]
    for topic, field, kind, cases in fields:
        for op, value, letters in cases:
            if op in OPERATORS[kind]:
                expression = getattr(field, op)(value)
                finds(client, f"{expression.to_dict()}", letters, [topic], QueryOntologyCatalog(expression))
    if MODERN:
        for pattern in ("", "x" * 257):
            bad = QueryOntologyCatalog(String.Q.data.match(pattern))
            check_raises("a bad pattern", lambda query=bad: client.query(query))


def unknown_tags_are_refused(client):
    """A misspelt tag must not look like an answer; tags of the older generations are known."""
    if MODERN:
        nonsense = QueryOntologyCatalog(sdk.QueryableNumeric("NoSuchTag.x").gt(0.0))
        check_raises("unknown tag", lambda: client.query(nonsense), "NoSuchTag")


def expressions_of_one_tag_meet_in_one_row(client):
    x, y = IMU.Q.acceleration.x, IMU.Q.acceleration.y
    both = QueryOntologyCatalog(x.between(100.0, 149.5)).with_expression(y.leq(49.5))
    finds(client, "x high and y low", "a", ["/imu"], both)
    between = QueryOntologyCatalog(x.between(100.0, 149.5), y.between(100.0, 149.5))
    finds(client, "x and y both high, never in one row", "", [], between)
    two_tags = QueryOntologyCatalog(x.leq(1.0), GPS.Q.position.x.leq(45.0), String.Q.data.eq("note 000"))
    finds(client, "three tags of one sequence", "a", ["/imu", "/gps/front", "/note"], two_tags)
    crossed = QueryOntologyCatalog(x.leq(1.0), GPS.Q.position.x.geq(1045.0))
    finds(client, "one tag in A, the other in B", "", [], crossed)
    check_raises("one key twice", lambda: QueryOntologyCatalog(x.gt(1.0), x.lt(2.0)), "only once")


def names_tags_and_creation_times(client):
    everything, sequence, topic = list(TOPICS), QuerySequence, QueryTopic
    finds(client, "name", "a", everything, sequence().with_name(A))
    finds(client, "name is no prefix", "", [], sequence().with_name(A[:-1]))
    finds(client, "name has case", "", [], sequence().with_name(A.upper()))
    run = QuerySequence().with_user_metadata("run", eq=RUN)
    for name in ("imu", "/imu"):
        finds(client, f"topic {name}", "ab", ["/imu"], topic().with_name(name), run)
    finds(client, "topic imux", "", [], topic().with_name("imux"), run)
    finds(client, "topic front without its folder", "", [], topic().with_name("front"), run)
    if MODERN:
        patterns = {f"*{RUN}*": "ab", f"compat-{RUN}-?": "ab", f"*{RUN}-[b-z]": "b", RUN: "", f"{RUN}*": ""}
        topics = {"/[in]*": ["/imu", "/note"]}
        topics |= dict.fromkeys(("gps/*", "/gps/*", "*front", "[gx]*/?????", "gps/front"), ["/gps/front"])
        nothing = ["front", "/fron", "IMU"]
    else:
        patterns = {RUN: "ab", f"{RUN}-b": "b", f"{RUN}-c": ""}
        topics = {"front": ["/gps/front"], "gps/": ["/gps/front"], "im": ["/imu"]}
        nothing = ["IMU", "imux"]
    for pattern, letters in {A: "a", **patterns}.items():
        finds(client, f"name match {pattern}", letters, everything, sequence().with_name_match(pattern))
    for pattern, names in topics.items():
        finds(client, f"topic match {pattern}", "ab", names, topic().with_name_match(pattern), run)
    for pattern in nothing:
        finds(client, f"topic match {pattern}", "", [], topic().with_name_match(pattern), run)
    for name, (ontology, _, _) in TOPICS.items():
        finds(client, f"tag of {name}", "ab", [name], topic().with_ontology_tag(tag_of(ontology)), run)
    finds(client, "unknown tag", "", [], topic().with_ontology_tag("NoSuchTag"))
    creation_times_are_inclusive(client, run)


def creation_times_are_inclusive(client, run):
    a, b = (client.sequence_handler(name).created_timestamp for name in (A, B))
    check("B is younger", a < b)
    cases = [(a, None, "ab"), (a + 1, None, "b"), (b + 1, None, ""), (None, a, "a"), (None, a - 1, "")]
    for start, end, letters in [*cases, (None, b, "ab"), (a, a, "a"), (a, b, "ab"), (a + 1, b - 1, "")]:
        times = {"time_start": start and creation_time(start), "time_end": end and creation_time(end)}
        query = QuerySequence().with_created_timestamp(**times)
        finds(client, f"created {start}..{end}", letters, list(TOPICS), query)
    imu_at = creation_time(client.topic_handler(A, "/imu").created_timestamp)
    only_imu = QueryTopic().with_created_timestamp(time_start=imu_at, time_end=imu_at)
    finds(client, "topic created at", "a", ["/imu"], only_imu, run)


def user_metadata_operators(client):
    cases = METADATA_CASES + (METADATA_CASES_5 if MINOR >= 5 else []) + (METADATA_CASES_6 if MODERN else [])
    check("every metadata operator has a case", {op for _, op, _, _ in cases} >= OPERATORS["metadata"])
    for key, op, value, letters in cases:
        if op in OPERATORS["metadata"]:
            query = QuerySequence().with_user_metadata(key, **{op: value}).with_user_metadata("run", eq=RUN)
            finds(client, f"sequence metadata {key} {op} {value}", letters, list(TOPICS), query)
    for key, op, value, letters, topics in METADATA_CASES_OF_TOPICS:
        query = QueryTopic().with_user_metadata(key, **{op: value}).with_user_metadata("run", eq=RUN)
        finds(client, f"topic metadata {key} {op} {value}", letters, topics, query)
    check_raises(
        "two operators", lambda: QuerySequence().with_user_metadata("trip", gt=1, lt=2), "exactly one"
    )
    if MINOR == 3:
        old = QuerySequence().with_expression(sdk.Sequence.Q.user_metadata["driver"].eq("ada"))
        finds(client, "deprecated with_expression", "a", list(TOPICS), old.with_user_metadata("run", eq=RUN))


def combinations_are_and(client):
    in_a, x = QuerySequence().with_name(A), IMU.Q.acceleration.x
    imus, notes = QueryTopic().with_name("/imu"), QueryTopic().with_name("/note")
    finds(client, "sequence and topic", "a", ["/imu"], in_a, imus)
    finds(client, "all three", "a", ["/imu"], in_a, imus, QueryOntologyCatalog(x.gt(1.0)))
    finds(client, "ontology in no chosen topic", "", [], in_a, notes, QueryOntologyCatalog(x.gt(1.0)))
    finds(client, "ontology in no chosen sequence", "", [], in_a, QueryOntologyCatalog(x.gt(1000.0)))
    nobody = QuerySequence().with_user_metadata("driver", eq="nobody-" + RUN)
    finds(client, "ontology in sequences of nobody", "", [], nobody, QueryOntologyCatalog(x.gt(1.0)))
    two = QuerySequence().with_name_match(f"*{RUN}*" if MODERN else RUN).with_user_metadata("nested.k", gt=0)
    finds(client, "two conditions of one part", "a", list(TOPICS), two)
    item = client.query(query=Query(in_a, imus))[0]
    check("a Query object", (item.sequence.name, [t.name for t in item.topics]), (A, ["/imu"]))


def responses_become_queries(client):
    found = client.query(QuerySequence().with_name(B), QueryTopic().with_name("/imu"))
    check("len, is_empty, index", (len(found), found.is_empty(), found[0].sequence.name), (1, False, B))
    finds(client, "to_query_sequence", "b", list(TOPICS), found.to_query_sequence())
    run = QuerySequence().with_user_metadata("run", eq=RUN)
    finds(client, "to_query_topic", "ab", ["/imu"], found.to_query_topic(), run)
    both = client.query(run).to_query_sequence()
    finds(client, "chained", "b", ["/imu"], both, QueryOntologyCatalog(IMU.Q.acceleration.x.gt(500.0)))
    if MODERN:
        check("topics carry their tag", found[0].topics[0].ontology_tag, "IMU")
    empty = client.query(QuerySequence().with_name("nothing-" + RUN))
    check("empty answer", (len(empty), empty.is_empty()), (0, True))
    check_raises("to_query_sequence of nothing", empty.to_query_sequence, "empty response", ValueError)
    check_raises("to_query_topic of nothing", empty.to_query_topic, "empty response", ValueError)


def timestamp_ranges(client):
    """0.3 to 0.5: first and last row that satisfies all predicates of the topic's tag."""
    if MODERN:
        return
    q, run = IMU.Q.acceleration, QuerySequence().with_name(A)
    cases = [([q.z.eq(1.0)], 50, 129), ([q.x.gt(60.0), q.z.eq(1.0)], 124, 129), ([q.x.eq(2.0)], 4, 4)]
    for expressions, first, last in cases:
        item = client.query(QueryOntologyCatalog(*expressions, include_timestamp_range=True), run)[0]
        found = [(t.name, t.timestamp_range.start, t.timestamp_range.end) for t in item.topics]
        check(f"timestamp_range {first}..{last}", found, [("/imu", at(first), at(last))])
    two = QueryOntologyCatalog(q.z.eq(1.0), GPS.Q.position.z.eq(1.0), include_timestamp_range=True)
    ranges = {t.name: t.timestamp_range for t in client.query(two, run)[0].topics}
    found = {name: (r.start, r.end) for name, r in ranges.items()}
    check("timestamp_range per tag", found, {"/imu": (at(50), at(129)), "/gps/front": (at(56), at(104))})
    not_asked = client.query(QueryOntologyCatalog(q.z.eq(1.0)), run)[0].topics[0].timestamp_range
    check("no timestamp_range unless asked", not_asked, None)


# ---- Temporal filters (0.6 and later) ----


def spans(clusters):
    check("cluster ids count from 0", [c.id for c in clusters], list(range(len(clusters))))
    return [
        ((c.timerange.start - START_NS) / STEP_NS, (c.timerange.end - START_NS) / STEP_NS) for c in clusters
    ]


def clusters(client):
    if not MODERN:
        return
    catalog = QueryOntologyCatalog(IMU.Q.acceleration.z.eq(1.0))
    topic = client.query(catalog, QuerySequence().with_name(A))[0].topics[0]
    check("one cluster without a distance", spans(topic.clusterize()), [(50, 129)])
    check("a distance of one step", spans(topic.clusterize(STEP_NS)), [(50, 59), (100, 119), (124, 129)])
    check(
        "a gap equal to the distance stays inside",
        spans(topic.clusterize(5 * STEP_NS)),
        [(50, 59), (100, 129)],
    )
    check("a gap above the distance splits", len(topic.clusterize(5 * STEP_NS - 1)), 3)
    check("a distance below the step: every row", len(topic.clusterize(STEP_NS - 1)), 36)
    window = sdk.TimestampRange(at(55), at(110))
    check("half-open range", spans(topic.clusterize(STEP_NS, window)), [(55, 59), (100, 109)])
    check("nothing in the range", topic.clusterize(STEP_NS, sdk.TimestampRange(at(0), at(50))), [])
    check_raises("an empty range", lambda: topic.clusterize(STEP_NS, sdk.TimestampRange(at(9), at(9))))
    without = client.query(QuerySequence().with_name(A), QueryTopic().with_name("/imu"))[0].topics[0]
    check_raises("clusterize without an expression", without.clusterize)
    item = client.query(two_pulses(), QuerySequence().with_name(A))[0]
    found = {name: spans(c) for name, c in item.clusterize_all({"IMU": STEP_NS}, 2 * STEP_NS).items()}
    check("clusterize_all", found, {"/imu": [(50, 59), (100, 119), (124, 129)], "/gps/front": [(56, 104)]})


def two_pulses():
    return QueryOntologyCatalog(IMU.Q.acceleration.z.eq(1.0), GPS.Q.position.z.eq(1.0))


def intersections(client):
    if not MODERN:
        return
    distances = {"IMU": STEP_NS, "GPS": 2 * STEP_NS}
    a, b = (client.query(two_pulses(), QuerySequence().with_name(name))[0] for name in (A, B))
    first, second = a.topics
    twice = [(56, 59), (100, 104)]
    check("of a sequence", spans(a.intersect(clustering_map=distances)), twice)
    check("of topics", spans(first.intersect(second, clustering_map=distances)), twice)
    check("order does not matter", spans(second.intersect(first, clustering_map=distances)), twice)
    check("whole clusters by default", spans(a.intersect()), [(56, 104)])
    check("one distance for all", spans(a.intersect(override_clustering_dt_ns=5 * STEP_NS)), twice)
    check("apart", b.intersect(clustering_map=distances), [])
    near = b.intersect(intersect_dt_ns=4 * STEP_NS, clustering_map=distances)
    check("apart by less than the distance: middle of the gap, widened by it", spans(near), [(60, 61)])
    check("apart by more", b.intersect(intersect_dt_ns=3 * STEP_NS - 1, clustering_map=distances), [])
    check_raises("two sequences", lambda: a.intersect(b))
    one = client.query(QueryOntologyCatalog(IMU.Q.acceleration.z.eq(1.0)))[0]
    check_raises("one topic", one.intersect)
