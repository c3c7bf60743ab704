"""Physical memory: the frames told are those of the columns, at every step."""

import numpy as np
import pytest

from hmmlab import Session
from hmmlab.model.page import PHYSICAL_PAGES, page_rows
from hmmlab.widgets import PhysicalMemory, reading, show
from hmmlab.widgets.frames import WINDOW
from hmmlab.widgets.physical import chunks, free_list

LINES = """
open d0 0
open d1 1
open d2 2
mmap A 8 rw private
store A 0 8 100
to_dev d0 A 0 6
load A 2 1
store A 4 1 504
to_dev d0 A 6 2
to_dev d1 A 4 1
to_dev d2 A 2 1
fork c
on c load A 0 1
munmap A 1 1
close d0
""".strip().splitlines()

TOP = PHYSICAL_PAGES - 1


@pytest.fixture
def story() -> Session:
    return Session().play(LINES)


@pytest.fixture
def memory(story) -> PhysicalMemory:
    return PhysicalMemory(story.trace)


def after(memory, line):
    texts = [operation.text for operation in memory.playhead.trace.operations]
    memory.playhead.position = memory.playhead.span(texts.index(line))[1]


def holders(memory):
    return [cell["holder"] for cell in memory.grid.cells]


def test_the_frame_freed_last_is_handed_out_first(memory):
    after(memory, "store A 4 1 504")
    assert holders(memory)[:7] == ["A 0", "A 1", "free", "A 3", "free", "A 5", "free"]
    turns = [frame.turn for frame in memory.grid.frames[:7]]
    assert turns == [0, 0, 2, 0, 1, 0, 3]
    assert "free, next to be handed out" in memory.grid.cells[4]["told"]
    after(memory, "to_dev d0 A 6 2")
    assert holders(memory)[:6] == ["A 0", "A 1", "A 7", "A 3", "A 6", "A 5"]


def test_the_free_list_is_what_the_driver_hands_out(story):
    session = Session()
    for line in LINES[:8]:
        session.do(line)
    promised = free_list(session.machine, 0, 2).tolist()
    session.do("to_dev d0 A 6 2")
    page = session.trace.names.of(1)["A"][0]
    given = [reading.page_frames(session.machine, 1, page + at)[0] for at in (6, 7)]
    assert given == promised == [TOP - 4, TOP - 2]


def test_what_is_told_of_frames_is_what_the_columns_hold(memory):
    for position in range(memory.playhead.length + 1):
        memory.playhead.position = position
        state = memory.playhead.replay.state
        for pagemap in [chunk.pagemap for chunk in memory.grid.chunks]:
            memory.grid.chunk = pagemap
            for frame in memory.grid.frames:
                row = page_rows(state, np.array([frame.pfn]))[0]
                assert frame.refcount == state["page.refcount"][row]
                assert frame.mapcount == state["page.mapcount"][row]
                named = len(frame.pages)  # also by migration entries, which do not map
                assert named == frame.mapcount or (frame.locked and named > frame.mapcount)
                assert (frame.refcount == 0) == (frame.turn > 0)
                for mm, vpn in frame.pages:
                    assert frame.pfn in reading.page_frames(state, mm, vpn)


def test_changed_frames_are_those_that_the_step_wrote(memory):
    for position in range(1, memory.playhead.length + 1):
        memory.playhead.position = position - 1
        before = memory.playhead.replay.state.copy()
        memory.playhead.position = position
        after = memory.playhead.replay.state
        for frame in memory.grid.frames:
            row = page_rows(after, np.array([frame.pfn]))[0]
            if before["page.refcount"][row] != after["page.refcount"][row]:
                assert frame.changed


def test_a_selected_page_brings_its_chunk_and_its_frame(story):
    view = show(story.trace, charts=False)
    memory = PhysicalMemory(view.playhead)
    after(memory, "to_dev d2 A 2 1")
    page = story.trace.names.of(1)["A"][0]
    for offset, unit in ((4, 1), (2, 2), (0, 0)):
        view.playhead.selected = (1, page + offset)
        assert memory.grid.shown.unit == unit
        assert [1, page + offset] in memory.grid.cells[0]["pages"]
    memory.grid.selected = (1, page + 3)
    assert view.playhead.selected == view.grid.selected == (1, page + 3)


def test_a_frame_with_two_mappings_names_both(memory):
    after(memory, "fork c")
    assert holders(memory)[0] == "p0 A 0 & c A 0"
    assert memory.grid.cells[0]["counts"] == "ref 2 map 2"


def test_a_frame_on_its_way_is_told_as_such(memory):
    texts = [operation.text for operation in memory.playhead.trace.operations]
    first, last = memory.playhead.span(texts.index("to_dev d0 A 0 6"))
    seen = set()
    for position in range(first, last + 1):
        memory.playhead.position = position
        seen |= set(holders(memory))
    assert "in transit" in seen and {f"A {page}" for page in range(6)} <= seen


def test_the_map_goes_from_the_top_to_zero_without_a_hole(memory):
    places = memory.grid.places
    addresses = [int(place["address"], 16) for place in places]
    assert addresses == sorted(addresses, reverse=True) and addresses[-1] == 0
    kinds = [place["kind"] for place in places]
    assert kinds == [*["device-private"] * 2, *["device-coherent"] * 2, "gap", "RAM", "RAM"]
    assert [place["size"] for place in places] == [*["256 MiB"] * 4, "64 TiB", "2 GiB", "2 GiB"]


def test_windows_turn_through_a_chunk(memory):
    after(memory, "to_dev d0 A 6 2")
    memory.grid.window = 1
    assert memory.grid.frames[0].pfn == TOP - WINDOW
    assert memory.grid.more
    memory.grid.window = 65536 // WINDOW
    assert len(memory.grid.cells) == 65536 % WINDOW and not memory.grid.more


def test_the_state_line(memory):
    after(memory, "to_dev d0 A 6 2")
    position, length = memory.playhead.position, memory.playhead.length
    assert repr(memory) == (
        f"PhysicalMemory(step {position} of {length}: unit 0 (d0): "
        f"from 0x3ffffffff down A 0, A 1, A 7, A 3, A 6, A 5; next 0x3fffffff9)"
    )
    assert memory.summary.value in repr(memory)
    memory.playhead.position = 0
    assert "unit 0: no frame in use; next 0x3ffffffff" in repr(memory)


def test_a_unit_without_memory_is_refused(memory):
    memory.show_unit(2)
    assert memory.grid.shown.kind == "device-coherent"
    with pytest.raises(ValueError, match="unit 7 has no device memory"):
        memory.show_unit(7)


def test_device_memory_that_is_given_up_leaves_a_gap():
    session = Session().play(["open d0 0", "release d0"])
    memory = PhysicalMemory(session.trace)
    assert [place["kind"] for place in memory.grid.places][:2] == ["gap", "device-private"]
    assert all(chunk.unit != 0 for chunk in chunks(session.machine))
