"""One operation at every grain, stepped or run, forwards and backwards: always the same."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmmlab.invariants import violations
from hmmlab.kernel_traces import judge, read_recording
from hmmlab.model.machine import BULK, Machine
from hmmlab.session import Session
from readings import difference, reading

PROBES = Path(__file__).parents[1] / "kernel_traces" / "probes"
PAGES = 70  # more than one batch of the driver


@st.composite
def operation(draw):
    offset = draw(st.integers(0, PAGES - 1))
    pages = draw(st.integers(1, PAGES - offset))
    verb = draw(
        st.sampled_from(
            [
                "load",
                "store",
                "store",
                "dontneed",
                "mprotect",
                "munmap",
                "mremap",
                "read",
                "write",
                "to_dev",
                "to_dev",
                "to_sys",
                "snapshot",
                "pagemap",
            ]
        )
    )
    span = f"A {offset} {pages}"
    value = draw(st.integers(0, 1000))
    prot = draw(st.sampled_from(["r", "rw", "rw", "none"]))
    return {
        "store": f"store {span} {value}",
        "dontneed": f"madvise {span} dontneed",
        "mprotect": f"mprotect {span} {prot}",
        "mremap": f"mremap {span} B",
        "write": f"write d0 {span} {value}",
    }.get(
        verb,
        f"{verb} d0 {span}"
        if verb in ("read", "to_dev", "to_sys", "snapshot")
        else f"{verb} {span}",
    )


SCENARIOS = st.lists(operation(), min_size=1, max_size=12)
BEGIN = ["open d0 0", f"mmap A {PAGES} rw private"]
SLOW = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def session_of(lines, grain, *, record=False):
    session = Session(Machine(4096, grain=grain), record=record)
    for line in [*BEGIN, *lines]:
        session.do(line)
    return session


@SLOW
@given(SCENARIOS)
def test_every_grain_gives_the_same(lines):
    bulk, some, single = (session_of(lines, grain) for grain in (BULK, 9, 1))
    assert bulk.answers == some.answers == single.answers
    for other in (some, single):
        assert difference(reading(bulk.machine), reading(other.machine)) == []
    assert violations(bulk.machine) == []
    assert violations(single.machine) == []


@SLOW
@given(SCENARIOS, st.integers(0, 10_000))
def test_forwards_and_backwards_change_nothing(lines, somewhere):
    session = session_of(lines, 16, record=True)
    trace = session.trace
    replay = trace.replay()
    end = replay.seek(len(trace)).state.copy()
    assert end == session.machine.copy()
    middle = somewhere % (len(trace) + 1)
    there = replay.seek(middle).state.copy()
    assert replay.seek(0).state == trace.base
    assert replay.seek(middle).state == there
    assert replay.seek(len(trace)).state == end
    assert violations(there, quiet=False) == []


@SLOW
@given(SCENARIOS)
def test_recording_changes_nothing(lines):
    assert session_of(lines, BULK, record=True).machine.copy() == (
        session_of(lines, BULK).machine.copy()
    )


def test_stepping_is_running():
    stepped, run = Machine(4096), Machine(4096)
    from hmmlab import Process

    results = []
    for machine, by_steps in ((stepped, True), (run, False)):
        process = Process(machine)
        device = process.open(0)
        a = process.mmap(100)
        if by_steps:
            operation = process.steps.store(a, range(100))
            names = [step.function for step in operation]
            assert "handle_mm_fault" in names
            reading_steps = device.steps.read(a)
            list(reading_steps)
            results.append(reading_steps.result)
        else:
            process.store(a, range(100))
            results.append(device.read(a))
    assert (results[0] == results[1]).all()
    assert stepped.copy() == run.copy()


@pytest.mark.parametrize("grain", [1, 5, BULK])
def test_content_survives_every_journey(grain):
    session = Session(Machine(4096, grain=grain), record=False)
    for line in [*BEGIN, "store A 0 70 1", "to_dev d0 A 0 70", "write d0 A 10 5 900"]:
        assert session.do(line)["ret"] == 0
    expected = [*range(1, 11), *range(900, 905), *range(16, 71)]
    assert session.do("load A 0 70")["data"] == expected
    assert session.do("to_dev d0 A 0 70")["data"] == expected
    assert session.do("to_sys d0 A 0 70")["cpages"] == 70
    assert session.do("read d0 A 0 70")["data"] == expected


# --- several batches of a driver at once ----------------------------------------------------------

WIDE = 3 * 64 + 40  # four batches from page 0
MIRRORS = [
    *("open d0 0", "open d1 1", "open c0 2"),
    f"mmap A {WIDE} rw private",
]


@st.composite
def wide_operation(draw):
    offset = draw(st.sampled_from([0, 0, 0, 3, 64, 100]))
    pages = draw(st.sampled_from([WIDE - offset, WIDE - offset, 64, 65, 1, 128]))
    span = f"A {offset} {min(pages, WIDE - offset)}"
    device = draw(st.sampled_from(["d0", "d0", "d1", "c0"]))
    verb = draw(
        st.sampled_from(
            ["load", "store", "read", "write", "to_dev", "to_dev", "to_sys", "snapshot"]
        )
    )
    rare = draw(
        st.sampled_from(["dontneed", "free", "mprotect", "munmap", "fork", "on_child", "exclusive"])
    )
    one = f"A {draw(st.integers(0, WIDE - 1))} {draw(st.integers(1, 3))}"
    verb = draw(st.sampled_from([verb, verb, rare]))
    return {
        "load": f"load {span}",
        "store": f"store {draw(st.sampled_from([span, one]))} {draw(st.integers(0, 1000))}",
        "write": f"write {device} {span} 7000",
        "dontneed": f"madvise {one} dontneed",
        "free": f"madvise {one} free",
        "mprotect": f"mprotect {one} {draw(st.sampled_from(['r', 'none']))}",
        "munmap": f"munmap {one}",
        "fork": "fork K",
        "on_child": f"on K store {one} 9000",
        "exclusive": f"exclusive d0 {one}",
    }.get(verb, f"{verb} {device} {span}")


def wide_session(lines, grain, begin=MIRRORS):
    session = Session(Machine(8192, grain=grain), record=False)
    forked = False
    for line in [*begin, *lines]:
        if line.startswith(("fork", "on")) and (line == "fork K") == forked:
            continue
        forked |= line == "fork K"
        words = line.split()
        if words[0] in ("load", "store", "madvise", "mprotect", "munmap") and len(words) > 3:
            line = " ".join([*words[:3], str(min(int(words[3]), WIDE - int(words[2]))), *words[4:]])
        session.do(line)
    return session


@SLOW
@given(st.lists(wide_operation(), min_size=2, max_size=10))
def test_batches_at_once_are_batch_by_batch(lines):
    bulk, some, single = (wide_session(lines, grain) for grain in (BULK, 100, 1))
    for one, other in ((bulk, some), (bulk, single)):
        for mine, theirs in zip(one.answers, other.answers, strict=True):
            assert mine == theirs
        assert difference(reading(one.machine), reading(other.machine)) == []
        assert violations(one.machine) == violations(other.machine) == []


@pytest.mark.parametrize(
    "lines",
    [
        # Holes in some batches, zero pages in others, and a device that hears of both.
        ["store A 0 20 1", "load A 70 30", "read d1 A 0 100", f"to_dev d0 A 0 {WIDE}"],
        # Shared pages: each batch tells of its copies before the next one migrates.
        ["store A 0 232 1", "fork K", "read d1 A 0 232", f"to_dev d0 A 0 {WIDE}"],
        ["store A 0 232 1", "fork K", f"write d0 A 0 {WIDE} 500", "read d1 A 0 232"],
        ["load A 0 232", "read d0 A 0 232", "read d1 A 0 232", f"write d0 A 0 {WIDE} 500"],
        # Pages of another device in a later batch.
        ["to_dev d1 A 100 10", "store A 0 80 1", f"to_dev d0 A 0 {WIDE}", "snapshot d0 A 0 232"],
        ["to_dev d1 A 100 10", f"read d0 A 0 {WIDE}", f"write d0 A 0 {WIDE} 1"],
        ["to_dev c0 A 100 90", f"to_dev d0 A 0 {WIDE}", f"to_sys c0 A 0 {WIDE}"],
        # Refused in a later batch: what came before stays.
        ["mprotect A 150 1 r", f"write d0 A 0 {WIDE} 1", "snapshot d0 A 0 232"],
        ["munmap A 150 1", f"read d0 A 0 {WIDE}", f"to_dev d0 A 0 {WIDE}", "snapshot d0 A 0 232"],
        ["mprotect A 150 1 none", f"to_dev d0 A 0 {WIDE}", f"to_sys d0 A 0 {WIDE}"],
        [
            f"to_dev d0 A 0 {WIDE}",
            "mprotect A 0 232 r",
            "mprotect A 0 232 rw",
            "write d0 A 0 232 1",
        ],
        # Frames go back and come again, last in, first out.
        ["store A 0 232 1", f"to_dev d0 A 3 {WIDE - 3}", "to_sys d0 A 50 100", "to_dev d0 A 0 90"],
        [f"to_dev d0 A 0 {WIDE}", "load A 10 120", "store A 3 1 5", f"to_dev d0 A 0 {WIDE}"],
        ["store A 0 232 1", "madvise A 100 20 free", "fork K", "to_dev d0 A 0 232"],
        [
            "store A 0 232 1",
            "pin A 130 2",
            f"to_dev d0 A 0 {WIDE}",
            "hold A 60 2",
            "to_dev d0 A 0 9",
        ],
    ],
)
def test_batches_that_meet_something(lines):
    bulk, single = (wide_session(lines, grain) for grain in (BULK, 1))
    assert bulk.answers == single.answers
    assert difference(reading(bulk.machine), reading(single.machine)) == []
    assert violations(bulk.machine) == violations(single.machine) == []


@pytest.mark.parametrize("ram", [600, 700, 800])
@pytest.mark.parametrize("verb", ["to_dev d0 A 0 600", "write d0 A 0 600 1"])
def test_batches_when_memory_ends(ram, verb):
    begin = ["open d0 0", "mmap A 600 rw private", "store A 0 200 1", "fork K"]
    sessions = [Session(Machine(ram, grain=grain), record=False) for grain in (BULK, 64, 1)]
    for session in sessions:
        for line in begin:
            session.do(line)
    answers = [session.do(verb) for session in sessions]
    assert answers[0]["ret"] == answers[1]["ret"] == answers[2]["ret"]


@pytest.mark.parametrize(
    ("lines", "wide"),
    [
        # A device does not hear of its own pages coming home, and hears of what lies between them.
        (["store A 0 8 1", "fork K", "to_dev d1 A 4 2"], "store A 0 8 9"),
        (["store A 0 8 1", "to_dev d0 A 0 4", "to_dev d1 A 3 2", "to_dev d0 A 5 3"], "load A 0 8"),
        (["store A 0 8 1", "to_dev d0 A 2 4", "fork K", "to_sys d0 A 4 1"], "store A 0 8 9"),
        (["store A 0 8 1", "to_dev d0 A 2 2", "exclusive d1 A 5 3"], "load A 0 8"),
        (["store A 0 8 1", "to_dev d0 A 1 2", "to_dev d1 A 4 2", "fork K"], "write d0 A 0 8 5"),
        (["store A 0 8 1", "to_dev d0 A 1 2", "to_dev d1 A 4 2"], "read d1 A 0 8"),
    ],
)
def test_who_does_not_hear_keeps_the_number_that_it_heard(lines, wide):
    bulk, some, single = (wide_session([*lines, wide], grain) for grain in (BULK, 3, 1))
    for other in (some, single):
        assert bulk.answers == other.answers
        assert (bulk.machine["interval.seq"] == other.machine["interval.seq"]).all()
        assert difference(reading(bulk.machine), reading(other.machine)) == []


@pytest.mark.parametrize("grain", [BULK, 2, 1])
def test_relatives_are_visited_in_each_pages_own_order(grain):
    """The first page is known to the oldest and the youngest alone, the second to all three."""
    recording = read_recording(PROBES / "rmap_order_of_relatives.jsonl")
    assert judge(recording, "rmap_order_of_relatives", grain=grain).kind == "same"
