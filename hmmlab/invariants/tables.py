"""Page tables, mappings, huge words, and what may only be there while something runs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hmmlab.invariants.look import MANY, Look, frames_named
from hmmlab.model.entry import is_migration, is_present, is_swap_type
from hmmlab.model.geometry import ENTRIES, LEVELS, PMD_PAGES
from hmmlab.model.mm_types import vmas_of
from hmmlab.model.page import PG_LOCKED

__all__ = ["huge_pages", "nothing_runs", "tables", "vmas"]


def tables(look: Look) -> Iterator[str]:
    """Page tables exist only where a mapping is, none is used twice, and none is lost."""
    state = look.state
    for mm, space in look.spaces.items():
        vmas = vmas_of(state, mm)
        starts = np.array([vma.start for vma in vmas], np.int64)
        ends = np.array([vma.end for vma in vmas], np.int64)
        # Mappings that begin before the table's end, less those that end before its beginning.
        serves = np.searchsorted(starts, space.firsts + PMD_PAGES) > np.searchsorted(
            ends, space.firsts, "right"
        )
        for first in space.firsts[~serves][:MANY].tolist():
            yield f"a page table at page {first:#x} serves no mapping"
    for number, level in enumerate(LEVELS):
        spaces = (*look.spaces.values(), *look.files.values())
        tables = np.concatenate([np.zeros(0, np.int64), *(s.tables[level] for s in spaces)])
        if np.unique(tables).size != tables.size:
            yield "a page table hangs in two places"
        free = state[f"{level}.free_list"][: int(state["table.free"][number])]
        if np.unique(free).size != free.size or np.isin(tables, free).any():
            yield f"a {level.upper()} table that is free hangs somewhere, or is free twice"
        elif np.unique(tables).size != int(state["table.used"][number]) - free.size:
            yield f"a {level.upper()} table is neither free nor hangs anywhere"
        if state[level].reshape(-1, ENTRIES)[free].any():
            yield f"a free {level.upper()} table is not empty"


def vmas(look: Look) -> Iterator[str]:
    """Mappings do not overlap, and nothing is mapped outside them."""
    for mm, space in look.spaces.items():
        last = 0
        inside = np.zeros(space.vpns.size, np.bool_)
        for vma in vmas_of(look.state, mm):
            if vma.start < last or vma.start >= vma.end:
                yield f"mm {mm}: a mapping at page {vma.start:#x} overlaps or is empty"
            last = vma.end
            inside[slice(*np.searchsorted(space.vpns, (vma.start, vma.end)))] = True
        for vpn in space.vpns[~inside][:MANY].tolist():
            yield f"mm {mm}: page {vpn:#x} is mapped outside every mapping"


def huge_pages(look: Look) -> Iterator[str]:
    """A huge word stands for all of one huge page, and only pages that are whole have one."""
    state = look.state
    for space in look.spaces.values():
        words = state["pte"].reshape(-1, ENTRIES)[space.tables["pte"][space.huge]]
        pfns = frames_named(words)
        whole = (is_present(words) & (pfns == pfns[:, :1] + np.arange(ENTRIES))).all(axis=1)
        whole &= pfns[:, 0] % PMD_PAGES == 0
        for first in space.firsts[space.huge][~whole][:MANY].tolist():
            yield f"{space.name}: the huge word of page {first:#x} stands for no huge page"


def nothing_runs(look: Look) -> Iterator[str]:
    """While nothing runs, nobody holds a lock, and nothing is under way."""
    state = look.state
    for column, what in (
        ("lock.writer", "a lock is held"),
        ("lock.readers", "a lock is held"),
        ("mm.active_invalidations", "an invalidation runs"),
        ("interval.deferred", "a subscription waits"),
    ):
        if state[column].any():
            yield f"{what}, and no operation does"
    if ((state["page.flags"] & PG_LOCKED) != 0).any():
        yield "a page is locked, and no operation runs"
    if (is_swap_type(look.words) & is_migration(look.words)).any():
        yield "a migration entry is left, and no operation runs"
