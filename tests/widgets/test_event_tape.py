import json

import pytest
from traitlets import TraitError

from hmmlab import Driver, Machine, Process, Session
from hmmlab.model.mmu_notifier import Event, mmu_interval_notifier_insert, mmu_notifier_register
from hmmlab.widgets import EventTape, Playhead
from hmmlab.widgets.event_tape import EVENT_KINDS, MAX_EVENTS

STORY = """
open d0 0
mmap A 8 rw private
store A 0 8 100
read d0 A 2 6
madvise A 0 2 dontneed
mprotect A 4 4 r
clear_refs 4
to_dev d0 A 2 2
mremap A 4 4 B
""".strip().splitlines()


@pytest.fixture
def told():
    return Session().play(STORY)


@pytest.fixture
def tape(told):
    return EventTape(Playhead(told.trace))


def names(tape):
    return [EVENT_KINDS[row[2]].event.name for row in tape.rows]


def test_every_kind_has_its_place_and_a_glyph_of_its_own():
    assert [kind.event for kind in EVENT_KINDS] == list(Event)
    assert len({kind.glyph for kind in EVENT_KINDS}) == len(EVENT_KINDS)
    assert len({kind.colour for kind in EVENT_KINDS}) == len(EVENT_KINDS)


def test_the_tape_reads_as_the_answers_do(told, tape):
    raised = [event["event"] for answer in told.answers for event in answer.get("notify", [])]
    assert names(tape) == raised
    assert len(raised) == 6


def test_a_row_says_where_for_whom_and_by_what(tape):
    clear, protect, dirty, migrate, *_, last = tape.rows
    assert clear[3:5] == ("A pages 0 to 1", [0.0, 0.25])
    assert clear[5:] == ("d0 forgets 1", "", "madvise A 0 2 dontneed")
    assert protect[3:5] == ("A pages 4 to 7", [0.5, 1.0])
    assert dirty[3:5] == ("the whole address space", [0.0, 1.0])
    assert migrate[5:] == ("d0 knows nothing", "d0", "to_dev d0 A 2 2")
    assert last[3] == "A pages 4 to 7" and last[7] == "mremap A 4 4 B"


def test_it_follows_the_playhead(tape):
    playhead = tape.playhead
    for position in range(playhead.length + 1):
        playhead.position = position
        assert tape.current == sum(row[1] <= position for row in tape.rows)
    playhead.position = 0
    assert repr(tape) == "EventTape(before the first of 6 events)"


def test_to_go_to_an_event_is_to_be_where_it_has_just_been_told(tape):
    for number in (4, 1, 6):
        tape.go(number)
        assert tape.current == number
        assert tape.playhead.position == tape.rows[number - 1][1]
        step = tape.playhead.replay.event.step
        assert step.detail.event.name == names(tape)[number - 1]
    with pytest.raises(ValueError, match="1 to 6"):
        tape.go(7)


def test_the_browser_asks_for_an_event(tape):
    tape._handle_custom_msg({"go": 2}, [])
    assert tape.current == 2
    tape._handle_custom_msg({"go": 70}, [])
    assert tape.current == 2


def test_a_filter_leaves_some_kinds(tape):
    tape.go(3)
    tape.shown = ["UNMAP", "CLEAR"]
    assert names(tape) == ["CLEAR", "UNMAP", "UNMAP"]
    assert tape.current == 1
    assert "of 3 events of 2 kinds" in repr(tape)
    counts = {name: count for name, *_, count in tape.kinds}
    assert counts["MIGRATE"] == 1, "what is not shown is counted all the same"
    with pytest.raises(TraitError, match="UNMAPPED"):
        tape.shown = ["UNMAPPED"]


def test_what_happens_next_is_taken_in(told, tape):
    assert tape.current == 6
    told.do("munmap A 0 1")
    assert tape.current == 7 and names(tape)[-1] == "UNMAP"


def test_who_is_not_subscribed_there_is_not_told():
    machine = Machine()
    trace, process = machine.record(), Process(machine)
    a = process.mmap(8)
    process.store(a, 7)
    process.madvise(a, "dontneed")  # nobody listens: no event at all
    device = process.attach(Driver)
    narrow = Driver(process, "narrow")
    insert = mmu_interval_notifier_insert(machine, process.mm, a.start, a.start + 2, narrow)
    process.run("insert", insert)
    process.madvise(a[0:1], "dontneed")
    process.madvise(a[2:3], "dontneed")
    device.close()
    process.madvise(a[2:3], "dontneed")
    tape = EventTape(Playhead(trace))
    told = ["d0 knows nothing, interval 2", "d0 knows nothing", "nobody"]
    assert [row[5] for row in tape.rows] == told


class Plain(Driver):
    """Its callback is no generator, so what it does is in no step of its own."""

    def invalidate(self, subscription, range, cur_seq):
        if range.event is not Event.CLEAR:
            self.forget(int(range.start[0]), int(range.end[-1]))
        return True


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Driver, ["d0 forgets 2", "d0 forgets 6", "d0 knows nothing"]),
        (Plain, ["d0 forgets nothing", "d0 forgets 8", "d0 knows nothing"]),
    ],
)
def test_it_says_what_a_device_did_when_it_was_told(kind, told):
    machine = Machine()
    trace, process = machine.record(), Process(machine)
    device = process.attach(kind)
    a = process.mmap(8)
    process.store(a, 7)
    device.read(a)
    process.madvise(a[2:4], "dontneed")
    process.mprotect(a, "r")
    process.munmap(a)
    tape = EventTape(Playhead(trace))
    assert [row[5] for row in tape.rows] == told


def test_what_two_devices_do_is_told_apart():
    lines = ["open d0 0", "open d1 1", "mmap A 4 rw private", "store A 0 4 1", "read d0 A 0 4",
             "read d1 A 0 4", "to_dev d0 A 0 4"]  # fmt: skip
    tape = EventTape(Playhead(Session().play(lines).trace))
    assert [row[5:7] for row in tape.rows] == [("d0 forgets nothing, d1 forgets 4", "d0")]


def test_a_classic_notifier_is_told_too():
    class Listener:
        def invalidate_range_start(self, range): ...

        def invalidate_range_end(self, range): ...

    machine = Machine()
    trace, process = machine.record(), Process(machine)
    process.run("register", mmu_notifier_register(machine, process.mm, Listener()))
    process.madvise(process.mmap(1), "dontneed")
    assert EventTape(Playhead(trace)).rows[0][5] == "notifier 1"


def test_the_end_of_a_process_is_an_event():
    machine = Machine()
    trace, process = machine.record(), Process(machine)
    process.attach(Driver)
    process.mmap(1)
    process.exit()
    tape = EventTape(Playhead(trace))
    assert names(tape) == ["RELEASE", "UNMAP"]


def test_two_address_spaces_are_told_apart():
    machine = Machine()
    trace, first, second = machine.record(), Process(machine), Process(machine)
    for process in (first, second):
        process.attach(Driver, f"of-{process.name}")
        process.madvise(process.mmap(1), "dontneed")
    tape = EventTape(Playhead(trace))
    assert [row[3] for row in tape.rows] == ["p0: A page 0", "p1: A page 0"]
    assert [row[5] for row in tape.rows] == ["of-p0 knows nothing", "of-p1 knows nothing"]


def test_a_series_is_one_row_that_says_how_often():
    session = Session().play(["open d0 0", "mmap A 64 rw private", "load A 0 64", "store A 0 64 1"])
    tape = EventTape(Playhead(session.trace))
    assert sum(count for *_, count in tape.kinds) == 64 == len(session.answers[-1]["notify"])
    assert tape.rows[0][3] == "A pages 0 to 63, 64 times"


def test_a_long_tape_lists_what_is_around_the_playhead():
    machine = Machine()
    trace, process = machine.record(), Process(machine)
    process.attach(Driver)
    a = process.mmap(1)
    for _ in range(3 * MAX_EVENTS):
        process.madvise(a, "dontneed")
    tape = EventTape(Playhead(trace))
    for number in (1, 2, MAX_EVENTS, 2 * MAX_EVENTS + 1, 3 * MAX_EVENTS):
        tape.go(number)
        listed = [row[0] for row in tape.rows]
        assert number == tape.current and number in listed and len(listed) == MAX_EVENTS
        assert {number - 1, number + 1} & {*range(1, 3 * MAX_EVENTS + 1)} <= {*listed}


def test_an_empty_tape_says_so():
    tape = EventTape(Playhead(Machine().record()))
    assert repr(tape) == "EventTape(no events)"
    json.dumps(tape.get_state(["rows", "kinds", "shown", "current"]))
