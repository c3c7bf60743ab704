"""A browser that only applies the messages knows what Python knows."""

import random

import numpy as np
import pytest

from hmmlab.widgets import reading
from hmmlab.widgets.page_table_grid import PageTableGrid
from hmmlab.widgets.playhead import Playhead


class Browser:
    """What store.js keeps, in Python."""

    def __init__(self, grid: PageTableGrid) -> None:
        self.grid = grid
        self.kinds: list[str] = []
        state = grid.get_state()["_whole"]
        self.take(state, state["codes"], state["marks"])
        grid.send = self.receive

    def take(self, whole, codes, marks):
        self.serial, self.blocks, self.frames = whole["serial"], whole["blocks"], whole["frames"]
        self.codes = np.frombuffer(codes, np.uint8).copy()
        self.take_marks(marks)

    def take_marks(self, runs):
        ends = np.frombuffer(runs, np.uint32).reshape(-1, 2)
        self.marks = np.array([at for start, stop in ends for at in range(start, stop)])

    def receive(self, message, buffers):
        self.kinds.append(message["kind"])
        assert message["serial"] == self.serial + 1
        if message["kind"] == "whole":
            self.take(message, *buffers)
            return
        places, codes, marks = buffers
        self.serial = message["serial"]
        self.codes[np.frombuffer(places, np.uint32)] = np.frombuffer(codes, np.uint8)
        self.take_marks(marks)
        self.blocks = message.get("blocks", self.blocks)
        self.frames = message.get("frames", self.frames)

    def check(self):
        playhead = self.grid.playhead
        fresh = PageTableGrid(Playhead(playhead.trace, playhead.position))
        assert np.array_equal(self.codes, fresh.codes)
        assert np.array_equal(self.marks, fresh.marks)
        assert (self.blocks, self.frames) == (fresh.blocks, fresh.frames)


@pytest.fixture
def grid(playhead):
    return PageTableGrid(playhead)


def test_messages_reproduce_the_whole(grid):
    browser = Browser(grid)
    random.seed(7)
    positions = list(range(grid.playhead.length + 1))
    for position in [*positions[::-1], *positions, *random.choices(positions, k=40)]:
        grid.playhead.position = position
        browser.check()
    assert {"whole", "change"} == set(browser.kinds)


def test_a_new_operation_reaches_the_browser(session, grid):
    browser = Browser(grid)
    for line in ("store A 10 2 5", "mmap C 700 rw private", "store C 0 700 1", "close d0"):
        session.do(line)
        browser.check()


def test_a_small_change_is_a_small_message(session, playhead):
    session.do("mmap C 20000 rw private")
    session.do("store C 0 20000 1")
    grid = PageTableGrid(playhead)
    sent = []
    grid.send = lambda message, buffers: sent.append((message["kind"], buffers))
    session.do("madvise C 512 8 dontneed")
    [(kind, buffers)] = sent
    assert kind == "change"
    assert sum(map(len, buffers)) < 200


def test_a_step_that_changes_no_page_sends_nothing(session, playhead):
    grid = PageTableGrid(playhead)
    session.do("read d0 B 0 2")
    session.do("read d0 B 0 2")
    sent = []
    grid.send = lambda *message: sent.append(message)
    session.do("read d0 B 0 2")
    assert not sent


def test_a_browser_that_is_behind_gets_the_whole(grid):
    sent = []
    grid.send = lambda message, buffers: sent.append(message["kind"])
    grid._answer(grid, {"kind": "hello", "serial": grid.serial}, [])
    assert sent == []
    grid._answer(grid, {"kind": "hello", "serial": grid.serial - 1}, [])
    assert sent == ["whole"]


def test_codes_are_those_of_the_reading(grid, playhead):
    state = playhead.replay.state
    file, _ = playhead.device_of(1)
    for block in grid.blocks:
        span = block["start"], block["stop"]
        cpu = reading.cpu_states(state, block["mm"], *span)
        device = reading.device_states(state, file, *span)
        for at, vpn in enumerate(range(*span)):
            assert grid.codes_of((block["mm"], vpn)) == (cpu[at], device[at])
    assert grid.codes_of((1, 0)) is None


def test_marks_are_the_pages_that_the_step_wrote(session, playhead):
    session.do("store A 10 1 5")
    grid = PageTableGrid(playhead)
    marked = set()
    for position in range(playhead.span(playhead.operation)[0], playhead.length + 1):
        playhead.position = position
        marked |= set(grid.marks.tolist())
    at = next(block for block in grid.blocks if block["name"] == "A")["at"]
    half = grid.codes.size // 2
    assert {mark for mark in marked if mark < half} == {at + 10}
    # The device forgets the zero page there, and the page past it (the driver's inclusive end).
    assert {mark - half for mark in marked if mark >= half} == {at + 10, at + 11}


def test_selection_and_hover_are_the_playheads(grid, playhead):
    grid.selected = (1, grid.blocks[0]["start"] + 5)
    assert playhead.selected == grid.selected
    playhead.hovered = (1, grid.blocks[1]["start"])
    assert grid.hovered == playhead.hovered
    playhead.selected = None
    assert grid.selected is None


def test_of_many_frames_those_around_the_selected_pages_are_drawn(session, playhead, monkeypatch):
    monkeypatch.setattr("hmmlab.widgets.page_table_grid.MAX_FRAMES", 5)
    grid = PageTableGrid(playhead)
    browser = Browser(grid)
    all_frames = reading.frames(playhead.replay.state, [], 1000)
    assert [frames.total for frames in all_frames] == [f["total"] for f in grid.frames]
    first = playhead.trace.names.of(1)["B"][0]
    seen = []
    for vpn in range(first, first + 20):
        playhead.selected = (1, vpn)
        pfns = reading.page_frames(playhead.replay.state, 1, vpn)
        cells = [cell for strip in browser.frames for cell in strip["cells"]]
        assert len(cells) <= 10
        assert {(pfn, 1, vpn) for pfn in pfns} <= set(cells)
        for strip, whole in zip(browser.frames, all_frames, strict=True):
            assert strip["cells"] == whole.cells[strip["first"] : strip["first"] + 5]
        seen += pfns
    assert len(set(seen)) > 20  # some of them with a frame of the device's before one of RAM


def test_tables_that_no_step_has_filled_yet_are_empty(session):
    session.do("mmap C 20000 rw private")
    session.do("store C 0 20000 1")
    first, last = Playhead(session.trace).span(len(session.trace.operations) - 1)
    seen = []
    for position in range(first, last + 1):
        grid = PageTableGrid(Playhead(session.trace, position))
        end = next(block for block in grid.blocks if block["name"] == "C")["stop"]
        seen.append(grid.codes_of((1, end - 1)))
    assert (seen[0], seen[-1]) == ((1, 0), (4, 0)), "empty at first, at last read-write"
