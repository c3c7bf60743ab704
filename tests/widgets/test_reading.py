"""What the columns say about pages: each state once, with its facts."""

import numpy as np
import pytest

from hmmlab import Machine, Session
from hmmlab.widgets import reading
from hmmlab.widgets.one_page import inspect
from hmmlab.widgets.palette import CPU_STATES, DEVICE_STATES

#: A page of each state of the CPU's table: its name, what leads to it, and the page.
STATES = {
    "empty": ("", 0),
    "zero page": ("load A 0 1", 0),
    "read-only": ("store A 0 1 5; mprotect A 0 1 r", 0),
    "read-write": ("store A 0 1 5", 0),
    "no access": ("store A 0 1 5; mprotect A 0 1 none", 0),
    "on the device (read-write)": ("store A 0 1 5; to_dev d0 A 0 1", 0),
    "on the device (read-only)": ("store A 0 1 5; mprotect A 0 1 r; to_dev d0 A 0 1", 0),
    "device-exclusive": ("store A 0 1 5; exclusive d0 A 0 1", 0),
    "swapped out": ("store A 0 1 5; madvise A 0 1 pageout", 0),
    "device-coherent": ("open c0 2; store A 0 1 5; to_dev c0 A 0 1", 0),
    "huge, read-write": ("madvise A 0 1024 hugepage; store A 0 1 5", 511),
    "huge, read-only": (
        "madvise A 0 1024 hugepage; store A 0 1 5; mprotect A 0 1024 r",
        300,
    ),
}


def after(story: str) -> Session:
    lines = ["open d0 0", "mmap A 1024 rw private", *story.split("; ")]
    return Session(Machine(ram_pages=1 << 16)).play(filter(None, lines))


def cpu_code(session: Session, offset: int) -> int:
    mm, first = session.process.mm, session.process.regions["A"]
    return int(reading.cpu_states(session.machine, mm, first, first + 1024)[offset])


def sections(session: Session, offset: int) -> dict[str, dict[str, str]]:
    page = session.process.regions["A"] + offset
    found = inspect(session.machine, session.process.mm, page, 1)
    return {section.title: {row[0]: row[1] for row in section.rows} for section in found}


@pytest.mark.parametrize("name", STATES)
def test_every_state_is_read_from_the_words(name):
    story, offset = STATES[name]
    assert CPU_STATES[cpu_code(after(story), offset)].name == name


def test_only_a_hole_and_a_page_on_its_way_are_left():
    fleeting = {"no mapping", "migration entry"}
    assert {state.name for state in CPU_STATES} == set(STATES) | fleeting
    assert cpu_code(after("munmap A 3 1"), 3) == 0


def test_a_page_is_seen_on_its_way():
    session = after("store A 0 1 5; to_dev d0 A 0 1")
    move = session.trace.operations[-1]
    first = session.process.regions["A"]
    replay = session.trace.replay()
    seen = set()
    for position in range(move.first, move.last + 1):
        state = replay.seek(position).state
        seen |= set(reading.cpu_states(state, session.process.mm, first, first + 1).tolist())
    assert next(state.code for state in CPU_STATES if state.name == "migration entry") in seen


def test_a_page_in_swap_has_a_slot_and_no_frame():
    session = after("store A 0 1 77; madvise A 0 1 pageout")
    facts = sections(session, 0)
    assert facts["Swap slot"]["content"] == "77" and facts["Swap slot"]["cache"] == "none"
    assert "slot" in facts["CPU's page-table word"] and "Frame" not in facts
    assert (
        reading.page_frames(session.machine, session.process.mm, session.process.regions["A"]) == []
    )


def test_a_huge_page_shows_the_one_word_that_maps_it():
    session = after("madvise A 0 1024 hugepage; store A 0 1 5")
    first, last = sections(session, 0), sections(session, 511)
    title = "CPU's PMD word, for all 512 pages around"
    assert first[title]["word"] == last[title]["word"]
    assert int(first["Frame"]["pfn"], 16) + 511 == int(last["Frame"]["pfn"], 16)
    assert last["Frame"]["compound"] == first["Frame"]["pfn"]


def test_an_entry_for_a_page_that_went_to_swap_is_stale():
    """The test driver forgets in time; what a driver would see that did not is made by hand."""
    session = after("store A 0 2 5; read d0 A 0 2")
    machine, first = session.machine, session.process.regions["A"]
    before = machine.copy()
    session.do("madvise A 0 2 pageout")
    root = int(machine["device_file.root"][1])
    rows = reading.walk(machine, root, first, first + 2)
    row = next(iter(rows)).row
    machine.write("pte", slice(row, row + 2), before["pte"][row : row + 2])
    codes = reading.device_states(machine, 1, first, first + 2)
    assert [DEVICE_STATES[code].name for code in codes] == ["stale", "stale"]


def test_a_child_has_a_block_of_its_own():
    session = after("store A 0 2 5; fork c1; on c1 store A 0 1 9")
    spaces = reading.address_spaces(session.machine)
    assert [name for _, name in spaces] == ["p0", "c1"]
    first = session.process.regions["A"]
    codes = [reading.cpu_states(session.machine, mm, first, first + 2) for mm, _ in spaces]
    assert np.array_equal(codes[0], [3, 3]) and np.array_equal(codes[1], [4, 3])
