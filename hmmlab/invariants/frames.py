"""Who maps a frame, who holds it, where it is free, and who finds it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hmmlab.invariants.look import MANY, Look, device_pfns, frames_named, maps_frame
from hmmlab.model.anon_vma import anon_vma_chain
from hmmlab.model.entry import (
    RW,
    SWP_DEVICE_WRITE,
    is_device_exclusive,
    is_present,
    is_swap_type,
    is_swapped,
    swap_offset,
    swap_offset_pfn,
    swap_type,
)
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.memremap import is_device_private_page
from hmmlab.model.mm_types import VM_MERGEABLE, vmas_of
from hmmlab.model.page import (
    PG_ANON,
    PG_ANON_EXCLUSIVE,
    PG_KSM,
    ZERO_PFN,
    frames_of,
    page_rows,
)
from hmmlab.model.rmap import rmap_walk
from hmmlab.model.state import State

__all__ = [
    "device_frames",
    "exclusive",
    "free_lists",
    "mapcounts",
    "references",
    "reverse",
    "swap_counts",
    "users",
]


def mapcounts(look: Look) -> Iterator[str]:
    """A frame counts the words that map it."""
    counts, told = look.counts, look.state["page.mapcount"]
    for row in np.flatnonzero(counts != told)[:MANY].tolist():
        yield f"frame row {row} is mapped {counts[row]} times, its mapcount is {told[row]}"


def references(look: Look) -> Iterator[str]:
    """While nothing runs, it is known who holds every reference.

    Mappings do, caches, device-exclusive entries, and device frames their backing.
    """
    state, expected = look.state, look.counts.copy()
    expected[ZERO_PFN] = 1  # its mappings hold none
    device = np.flatnonzero(state["page.refcount"][state.ram_pages :] > 0) + state.ram_pages
    private = is_device_private_page(state, device_pfns(state, device))
    backing = state["page.private"][device[private]]
    np.add.at(expected, backing[backing > 0], 1)
    cached = state["cache.page"]
    np.add.at(expected, cached[cached > 0], 1)
    swap_cache = state["swap.cache"]
    np.add.at(expected, swap_cache[swap_cache > 0], 1)
    for batch in ("lru.lazyfree", "lru.mlock"):
        waiting = state[batch][: int(state[f"{batch}_count"][0])]
        np.add.at(expected, page_rows(state, waiting[waiting > 0]), 1)
    held = np.flatnonzero(state["held.pfn"])
    np.add.at(expected, page_rows(state, state["held.pfn"][held]), state["held.references"][held])
    zeros = int(state["huge_zero.pfn"][0])
    if zeros:
        expected[zeros : zeros + PMD_PAGES] += 1
    exclusive = look.words[is_swap_type(look.words) & is_device_exclusive(look.words)]
    np.add.at(expected, page_rows(state, swap_offset_pfn(exclusive)), 1)
    pool = state["hugetlb.head"]
    expected[frames_of(pool[pool > 0])] += 1
    told = state["page.refcount"]
    for row in np.flatnonzero(expected[: told.size] != told[: expected.size])[:MANY].tolist():
        yield f"frame row {row} has {told[row]} references, {expected[row]} are known"


def free_lists(state: State) -> Iterator[str]:
    """Every frame of RAM is in use, or free once."""
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


def device_frames(state: State) -> Iterator[str]:
    """Every frame of the test device's memory is in use, or free once."""
    for unit in np.flatnonzero(state["dmirror_device.chunk"]).tolist():
        free = state[f"dmirror_device.free_list.{unit}"][: int(state["dmirror_device.free"][unit])]
        if np.unique(free).size != free.size:
            yield f"a frame stands twice on the free list of unit {unit}"
        if state["page.refcount"][page_rows(state, free)].any():
            yield f"a frame on the free list of unit {unit} is in use"
        chunks = np.flatnonzero(state["pagemap.owner"] == unit + 1)
        total = in_use = 0
        for chunk in chunks.tolist():
            first, last = (int(state[f"pagemap.{edge}"][chunk]) for edge in ("first", "last"))
            rows = page_rows(state, np.array([last - 1, first]))
            in_use += int((state["page.refcount"][rows[0] : rows[1] + 1] > 0).sum())
            total += last - first
        lost = total - in_use - free.size - int(state["dmirror_device.fresh"][unit])
        if lost:
            yield f"{lost} frames of unit {unit} are neither free nor in use"


def exclusive(look: Look) -> Iterator[str]:
    """A private page that somebody may write in place is that one's alone (``PageAnonExclusive``).

    So it is mapped once, and a page that is not exclusive is mapped by no writable word.
    """
    state = look.state
    flags = state["page.flags"]
    owned = (flags & (PG_ANON | PG_ANON_EXCLUSIVE)) == PG_ANON | PG_ANON_EXCLUSIVE
    for row in np.flatnonzero(owned & (look.counts > 1))[:MANY].tolist():
        yield f"frame row {row} belongs to one alone and is mapped {look.counts[row]} times"
    for space in look.spaces.values():
        words = space.words
        maps = np.flatnonzero(maps_frame(words))
        words = words[maps]
        writable = np.where(
            is_present(words), (words & RW) != 0, swap_type(words) == SWP_DEVICE_WRITE
        )
        of = flags[page_rows(state, frames_named(words))]
        wrong = writable & ((of & PG_ANON) != 0) & ((of & PG_ANON_EXCLUSIVE) == 0)
        for vpn in space.vpns[maps[wrong]][:MANY].tolist():
            yield f"{space.name}: page {vpn:#x} may be written, and others may share its frame"


def reverse(look: Look) -> Iterator[str]:
    """Who asks a frame's anon_vma, file or KSM node finds all that map it (``rmap_walk``).

    All but the relatives of a merged page of whom KSM does not know.
    """
    state, counts = look.state, look.counts - _unknown_to_ksm(look)
    rows = np.flatnonzero(look.counts)
    pfns = np.where(rows < state.ram_pages, rows, device_pfns(state, rows))
    flags = state["page.flags"][rows]
    known = (state["page.mapping"][rows] != 0) | ((flags & (PG_ANON | PG_KSM)) != 0)
    places = rmap_walk(state, pfns[known])
    words = state["pte"][np.maximum(places.row, 0)]
    maps = places.maps & (places.row >= 0) & maps_frame(words)
    found = np.bincount(places.which[maps], minlength=int(known.sum()))
    for at in np.flatnonzero(found != counts[rows[known]])[:MANY].tolist():
        row = int(rows[known][at])
        yield f"frame row {row} is mapped {counts[row]} times, rmap_walk finds {found[at]}"


def _unknown_to_ksm(look: Look) -> NDArray[np.int64]:
    """How many words that map each row of the page columns KSM cannot know of.

    Who gives a page to KSM that its parent has too leaves only its own anon_vma there, to which
    the parent's mapping does not belong. Linux does not find the parent either (mm/ksm.c,
    ``try_to_merge_with_ksm_page``). What KSM scans itself, it knows.
    """
    state, counts = look.state, np.zeros_like(look.counts)
    if not (state["page.flags"] & PG_KSM).any():
        return counts
    items = np.flatnonzero(state["ksm_item.node"])
    users = np.stack([state["ksm_item.node"][items], state["ksm_item.vpn"][items]])
    for mm, space in look.spaces.items():
        maps = np.flatnonzero(maps_frame(space.words))
        rows = page_rows(state, frames_named(space.words[maps]))
        merged = (state["page.flags"][rows] & PG_KSM) != 0
        rows, vpns = rows[merged], space.vpns[maps[merged]]
        for vma in vmas_of(state, mm):
            if vma.flags & VM_MERGEABLE:
                continue
            inside = (vpns >= vma.start) & (vpns < vma.end)
            of = state["avc.anon_vma"][anon_vma_chain(state, vma)]
            known = users[:, np.isin(state["ksm_item.anon_vma"][items], of)]
            asked = np.stack([state["page.mapping"][rows[inside]], vpns[inside]])
            is_known = (asked[:, :, None] == known[:, None, :]).all(axis=0).any(axis=1)
            np.add.at(counts, rows[inside][~is_known], 1)
    return counts


def swap_counts(look: Look) -> Iterator[str]:
    """A slot counts the words and the files that name it, and knows its frame as the frame it."""
    state, files = look.state, look.state["cache.page"]
    slots = np.concatenate([swap_offset(look.words[is_swapped(look.words)]), -files[files < 0]])
    counts = state["swap.count"]
    named, users = np.unique(slots, return_counts=True)
    told = np.where(named < counts.size, counts[np.minimum(named, counts.size - 1)], 0)
    for slot, has, count in zip(named.tolist(), users.tolist(), told.tolist(), strict=True):
        if has != count:
            yield f"slot {slot} is named {has} times and counts {count}"
    for slot in np.setdiff1d(np.flatnonzero(counts), named)[:MANY].tolist():
        yield f"slot {slot} is named 0 times and counts {counts[slot]}"
    cached = np.flatnonzero(state["swap.cache"])
    frames = np.flatnonzero(state["page.swap"])
    if not np.array_equal(np.sort(state["swap.cache"][cached]), frames) or not np.array_equal(
        state["page.swap"][state["swap.cache"][cached]], cached
    ):
        yield "a frame in the swap cache and its slot do not know each other"


def users(state: State) -> Iterator[str]:
    """Files, reservations and anon_vmas count the mappings that use them.

    A file may have a descriptor beside them.
    """
    live = state["vma.mm"] != 0
    for column, by, others in (
        ("file.users", "vma.file", 1),
        ("resv.users", "vma.resv", 0),
        ("anon_vma.active", "vma.anon_vma", 0),
    ):
        users = state[by][live]
        counts = state[column]
        counted = np.bincount(users[users > 0], minlength=counts.size)[: counts.size]
        wrong = (counts < counted) | (counts > counted + others)
        for row in np.flatnonzero(wrong)[:MANY].tolist():
            yield f"{column} of {row} is {counts[row]}, {counted[row]} mappings use it"
