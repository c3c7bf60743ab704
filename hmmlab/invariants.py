"""What holds after every step, as predicates over columns.

:func:`violations` names every one that does not hold. Some speak only while nothing runs: in the
middle of an operation the operation itself holds references that no column names.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.entry import (
    DEVICE_VALID,
    SPECIAL,
    Pfns,
    Words,
    device_pfn,
    is_device_exclusive,
    is_device_private,
    is_migration,
    is_present,
    is_swap_type,
    is_swapped,
    pfn_of,
    swap_offset,
    swap_offset_pfn,
)
from hmmlab.model.geometry import ENTRIES, PMD_PAGES, USER_VPN_END
from hmmlab.model.mm_types import mm_is_alive, mm_root, vmas_of
from hmmlab.model.page import (
    GUP_PIN_COUNTING_BIAS,
    PHYSICAL_PAGES,
    ZERO_PFN,
    frames_of,
    is_device_private_page,
    page_rows,
)
from hmmlab.model.page_table import read_range, walk
from hmmlab.model.state import State

__all__ = ["violations"]


def violations(state: State, *, quiet: bool = True) -> list[str]:
    """Sentences about what should hold and does not; an empty list when all is well.

    Parameters
    ----------
    quiet
        Whether no operation is running.
    """
    found = [
        *_mapcounts(state),
        *_sequences(state),
        *_mirrors(state),
        *_tables(state),
        *_vmas(state),
        *_swap_counts(state),
    ]
    return [*found, *_references(state), *_free_lists(state)] if quiet else found


def _spaces(state: State) -> list[int]:
    return [int(mm) for mm in np.flatnonzero(state["mm.root"] > 0)]


def _mapped_words(state: State, root: int) -> Words:
    """All words of an address space that are not empty."""
    parts = [
        state["pte"][run.row : run.row + run.stop - run.start]
        for run in walk(state, root, 0, USER_VPN_END)
        if run.row >= 0
    ]
    words = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
    return words[words != 0]


def _everything_mapped(state: State) -> Words:
    """The words of all address spaces that are not empty."""
    return np.concatenate(
        [
            np.zeros(0, np.uint64),
            *(_mapped_words(state, mm_root(state, mm)) for mm in _spaces(state)),
        ]
    )


def _named(words: Words) -> Pfns:
    """Frames that words map: present and counted ones, and device entries."""
    present = is_present(words) & ((words & SPECIAL) == 0)
    private = is_swap_type(words) & is_device_private(words)
    return np.concatenate([pfn_of(words[present]), swap_offset_pfn(words[private])])


def _counts(state: State) -> NDArray[np.int64]:
    """How many entries map each row of the page columns."""
    rows = page_rows(state, _named(_everything_mapped(state)))
    return np.bincount(rows, minlength=state["page.mapcount"].size)


def _mapcounts(state: State) -> Iterator[str]:
    counts = _counts(state)
    for row in np.flatnonzero(counts != state["page.mapcount"]).tolist():
        yield (
            f"frame row {row} is mapped {counts[row]} times, "
            f"its mapcount is {state['page.mapcount'][row]}"
        )


def _references(state: State) -> Iterator[str]:
    """While nothing runs, it is known who holds every reference.

    Mappings do, caches, device-exclusive entries, and device frames their backing.
    """
    expected = _counts(state)
    device = np.flatnonzero(state["page.refcount"][state.ram_pages :] > 0) + state.ram_pages
    private = is_device_private_page(state, _pfns(state, device))
    backing = state["page.private"][device[private]]
    np.add.at(expected, backing[backing > 0], 1)
    cached = state["cache.page"]
    np.add.at(expected, cached[cached > 0], 1)
    swap_cache = state["swap.cache"]
    np.add.at(expected, swap_cache[swap_cache > 0], 1)
    np.add.at(expected, state["lru.lazyfree"][: int(state["lru.lazyfree_count"][0])], 1)
    held = np.flatnonzero(state["held.pfn"])
    claims = np.where(state["held.kind"][held] == 2, GUP_PIN_COUNTING_BIAS, 1)
    np.add.at(expected, page_rows(state, state["held.pfn"][held]), claims)
    zeros = int(state["huge_zero.pfn"][0])
    if zeros:
        expected[zeros : zeros + PMD_PAGES] += 1
    words = _everything_mapped(state)
    exclusive = words[is_swap_type(words) & is_device_exclusive(words)]
    np.add.at(expected, page_rows(state, swap_offset_pfn(exclusive)), 1)
    pool = state["hugetlb.head"]
    expected[frames_of(pool[pool > 0])] += 1
    expected[ZERO_PFN] = 1
    size = min(expected.size, state["page.refcount"].size)
    for row in np.flatnonzero(expected[:size] != state["page.refcount"][:size]).tolist():
        yield (
            f"frame row {row} has {state['page.refcount'][row]} references, "
            f"{expected[row]} are known"
        )


def _pfns(state: State, rows: NDArray[np.int64]) -> Pfns:
    """Frame numbers of rows of device memory."""
    return state.ram_pages + PHYSICAL_PAGES - 1 - rows


def _swap_counts(state: State) -> Iterator[str]:
    """A slot counts the words and the files that name it."""
    words = _everything_mapped(state)
    files = state["cache.page"]
    slots = np.concatenate([swap_offset(words[is_swapped(words)]), -files[files < 0]])
    named, counts = np.unique(slots, return_counts=True)
    known = np.flatnonzero(state["swap.count"])
    for slot in np.union1d(named, known).tolist():
        users = int(counts[named == slot].sum())
        count = int(state["swap.count"][slot]) if slot < state["swap.count"].size else 0
        if users != count:
            yield f"slot {slot} is named {users} times and counts {count}"


def _free_lists(state: State) -> Iterator[str]:
    half = state.ram_pages // 2
    for zone in (0, 1):
        free = state[f"zone.free_list.{zone}"][: int(state["zone.free"][zone])]
        if np.unique(free).size != free.size:
            yield f"a frame stands twice on the free list of node {zone}"
        if state["page.refcount"][free].any():
            yield f"a frame on the free list of node {zone} is in use"
        first = zone * half
        used = int(state["zone.used"][zone])
        end = first + half
        top = end - int(state["zone.huge"][zone])
        spans = (slice(first, first + used), slice(max(top, first + used), end))
        in_use = sum(int((state["page.refcount"][span] > 0).sum()) for span in spans)
        used += end - top
        reserved = 1 if zone == 0 else 0  # frame 0 names nothing
        if used != in_use + free.size + reserved:
            lost = used - in_use - free.size - reserved
            yield f"{lost} frames of node {zone} are neither free nor in use"


def _sequences(state: State) -> Iterator[str]:
    for mm in _spaces(state):
        odd = bool(state["mm.invalidate_seq"][mm] & 1)
        if odd and not state["mm.active_invalidations"][mm]:
            yield f"the sequence number of mm {mm} is odd, and no invalidation runs"


def _mirrors(state: State) -> Iterator[str]:
    """While no invalidation runs, a device entry names what the CPU's table names.

    The test driver breaks this between two files of one device: each takes the migrations of the
    other for its own.
    """
    files = np.flatnonzero(state["device_file.mm"])
    for file in files.tolist():
        mm, device = (int(state[f"device_file.{column}"][file]) for column in ("mm", "device"))
        alone = int((state["device_file.device"][files] == device).sum()) == 1
        if state["mm.active_invalidations"][mm] or not alone or not mm_is_alive(state, mm):
            continue
        root = int(state["device_file.root"][file])
        for run in walk(state, root, 0, USER_VPN_END):
            if run.row < 0:
                continue
            words = state["pte"][run.row : run.row + run.stop - run.start]
            cpu = read_range(state, mm_root(state, mm), run.start, run.stop)
            for page in np.flatnonzero(_stale(state, words, cpu)).tolist():
                yield f"device file {file} keeps a stale entry for page {run.start + page:#x}"


def _stale(state: State, words: Words, cpu: Words) -> NDArray[np.bool_]:
    swap = is_swap_type(cpu)
    private = swap & is_device_private(cpu)
    frames = np.where(swap, swap_offset_pfn(cpu), pfn_of(cpu))
    backing = state["page.private"][page_rows(state, np.where(private, frames, 0))]
    data = np.where(private, backing, frames)
    valid = (words & np.uint64(DEVICE_VALID)) != 0
    moving = swap & is_migration(cpu)
    return valid & ~moving & ((cpu == 0) | (data != device_pfn(words)))


def _tables(state: State) -> Iterator[str]:
    """Page tables exist only where a mapping is, and none is used twice."""
    roots = {mm_root(state, mm): mm for mm in _spaces(state)}
    files = np.flatnonzero(state["device_file.mm"])
    seen: list[int] = []
    for root in [*roots, *state["device_file.root"][files].tolist()]:
        spans = [(v.start, v.end) for v in vmas_of(state, roots[root])] if root in roots else None
        for run in walk(state, root, 0, USER_VPN_END):
            if run.row < 0:
                continue
            seen += range(run.row // ENTRIES, (run.row + run.stop - run.start) // ENTRIES)
            if spans is None:
                continue
            for first in range(run.start, run.stop, PMD_PAGES):
                if not any(a < first + PMD_PAGES and b > first for a, b in spans):
                    yield f"a page table at page {first:#x} serves no mapping"
    if len(set(seen)) != len(seen):
        yield "a page table hangs in two places"


def _vmas(state: State) -> Iterator[str]:
    """Mappings do not overlap, and nothing is mapped outside them."""
    for mm in _spaces(state):
        last = 0
        for vma in vmas_of(state, mm):
            if vma.start < last or vma.start >= vma.end:
                yield f"mm {mm}: a mapping at page {vma.start:#x} overlaps or is empty"
            if last < vma.start:
                yield from _unmapped(state, mm, last, vma.start)
            last = vma.end
        yield from _unmapped(state, mm, last, USER_VPN_END)


def _unmapped(state: State, mm: int, start: int, stop: int) -> Iterator[str]:
    for run in walk(state, mm_root(state, mm), start, stop):
        if run.row >= 0 and state["pte"][run.row : run.row + run.stop - run.start].any():
            yield f"mm {mm}: something is mapped outside every mapping, from page {run.start:#x}"
