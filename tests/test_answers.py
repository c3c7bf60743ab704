"""What an answer tells of an operation's way: in reader's names, and in the kernel's order."""

import pytest

from hmmlab import Machine, Process, Session
from hmmlab.answers import Known
from hmmlab.model.region import REGION_PAGES

STORY = ["open d0 0", "mmap A 64 rw private", "store A 0 64 1", "mmap B 2 rw private"]


def test_a_page_has_a_place_where_a_region_has_room():
    process = Process(Machine(ram_pages=4096))
    known, a = Known(process), process.mmap(2, name="A")
    assert known.place(a.start) == ("A", 0)
    assert known.place(a.start + REGION_PAGES - 1) == ("A", REGION_PAGES - 1)
    assert known.place(a.start - 1) is None


@pytest.mark.parametrize("line", ["to_dev d0 A 0 64", "fork c", "madvise A 3 9 dontneed"])
def test_events_and_faults_come_in_the_kernels_order_at_every_grain(line):
    bulk, single = (Session(grain=grain).play([*STORY, line]) for grain in (1 << 16, 1))
    assert bulk.answers == single.answers
    assert bulk.answers[-1]["notify"]


def test_only_what_has_a_name_is_told():
    session = Session().play(STORY)
    process = session.process
    outside = process.mmap(1)
    process.store(outside, 1)
    process.regions.pop(outside.name)
    told = session.do("fork c")["notify"]
    assert [(event["region"], event["start"], event["end"]) for event in told] == [("A", 0, 64)]
    assert len([*session._heard._ranges()]) == 2
    (whole,) = session.do("clear_refs 4")["notify"]
    assert (whole["mm"], whole["event"]) == ("p0", "SOFT_DIRTY")
    assert (whole["region"], whole["start"], whole["end"]) == ("*", 0, -1)


def test_each_operation_is_heard_alone():
    session = Session().play(STORY)
    assert session.do("madvise A 0 1 dontneed")["notify"]
    assert session.do("load A 1 1")["notify"] == []
    assert session.do("load B 0 1")["faults_handled"] == [["B", 0, 0, 0]]
    assert "handle_mm_fault" in [name for _, name in session.calls]
