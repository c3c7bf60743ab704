"""A state, and what several predicates want to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.entry import (
    HUGE,
    RW,
    SPECIAL,
    SWP_DEVICE_WRITE,
    Bools,
    Pfns,
    Words,
    is_device_private,
    is_present,
    is_swap_type,
    pfn_of,
    swap_offset_pfn,
    swap_type,
)
from hmmlab.model.geometry import ENTRIES, LEVEL_PAGES, LEVELS, PAGE_SHIFT
from hmmlab.model.mm_types import mm_root
from hmmlab.model.page import PHYSICAL_PAGES, page_rows
from hmmlab.model.state import State

__all__ = [
    "MANY",
    "Look",
    "data_frames",
    "device_pfns",
    "frames_named",
    "maps_frame",
    "may_write",
]


#: How many violations of one kind are told.
MANY = 20


@dataclass(frozen=True)
class Space:
    """What hangs under one root.

    ``tables`` are the numbers of its tables by level; ``firsts`` the first page of each PTE table
    and ``huge`` whether a PMD word maps its 2 MiB itself. ``rows`` are the rows of the words that
    are not empty, of pages ``vpns``.
    """

    name: str
    root: int
    tables: dict[str, NDArray[np.int64]]
    firsts: Pfns
    huge: Bools
    vpns: Pfns
    rows: NDArray[np.int64]
    words: Words


def space_of(state: State, name: str, root: int) -> Space:
    bases, tables = np.zeros(1, np.int64), np.array([root])
    found, huge = {"pgd": tables}, np.zeros(1, np.bool_)
    for upper, level in pairwise(LEVELS):
        words = state[upper].reshape(-1, ENTRIES)[tables]
        which, entries = np.nonzero(words)
        bases = bases[which] + entries * LEVEL_PAGES[upper]
        pointers = words[which, entries]
        tables, huge = (pointers >> np.uint64(PAGE_SHIFT)).astype(np.int64), pointers & HUGE != 0
        found[level] = tables
    words = state["pte"].reshape(-1, ENTRIES)[tables]
    which, entries = np.nonzero(words)
    rows = tables[which] * ENTRIES + entries
    return Space(
        name, root, found, bases, huge, bases[which] + entries, rows, words[which, entries]
    )


class Look:
    """A state, and what several predicates want to know of it."""

    def __init__(self, state: State) -> None:
        self.state = state
        alive = np.flatnonzero(state["mm.root"] > 0).tolist()
        self.spaces = {mm: space_of(state, f"mm {mm}", mm_root(state, mm)) for mm in alive}
        files = np.flatnonzero(state["device_file.mm"]).tolist()
        roots = state["device_file.root"]
        self.files = {
            file: space_of(state, f"device file {file}", int(roots[file])) for file in files
        }

    @cached_property
    def words(self) -> Words:
        """The words of all address spaces that are not empty."""
        parts = [space.words for space in self.spaces.values()]
        return np.concatenate([np.zeros(0, np.uint64), *parts])

    @cached_property
    def mapped(self) -> Pfns:
        """Frames that words map: present and counted ones, and device entries."""
        return frames_named(self.words)[maps_frame(self.words)]

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """How many entries map each row of the page columns."""
        rows = page_rows(self.state, self.mapped)
        return np.bincount(rows, minlength=self.state["page.mapcount"].size)


def maps_frame(words: Words) -> Bools:
    """Whether words map a frame that counts them."""
    present = is_present(words) & ((words & SPECIAL) == 0)
    return present | (is_swap_type(words) & is_device_private(words))


def frames_named(words: Words) -> Pfns:
    """Frames that words name, where they do."""
    return np.where(is_present(words), pfn_of(words), swap_offset_pfn(words))


def data_frames(state: State, words: Words) -> Pfns:
    """Frames that hold the data of pages: those that words name, or those behind device frames."""
    frames = frames_named(words)
    private = is_swap_type(words) & is_device_private(words)
    rows = page_rows(state, np.where(private, frames, 0))
    return np.where(private, state["page.private"][rows], frames)


def may_write(words: Words) -> Bools:
    """Whether words allow a write, to whoever has the data."""
    private = is_swap_type(words) & is_device_private(words)
    return np.where(private, swap_type(words) == SWP_DEVICE_WRITE, (words & RW) != 0)


def device_pfns(state: State, rows: NDArray[np.int64]) -> Pfns:
    """Frame numbers of rows of device memory."""
    return state.ram_pages + PHYSICAL_PAGES - 1 - rows
