"""What the columns say about pages, in the words that the views show.

Pure reading of a :class:`~hmmlab.model.state.State` (a machine's or a replay's) into arrays of
state codes and lists of facts; nothing here draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hmmlab.invariants.look import data_frames, device_pfns
from hmmlab.model import entry
from hmmlab.model.mm_types import mm_root, vmas_in
from hmmlab.model.names import Names
from hmmlab.model.page import ZERO_PFN, is_zone_device, page_rows
from hmmlab.model.page_table import huge_blocks, read_range, walk
from hmmlab.model.rmap import rmap_walk
from hmmlab.model.state import State
from hmmlab.model.trace import Replay

__all__ = [
    "Block",
    "Frames",
    "address_spaces",
    "blocks",
    "changed_pages",
    "cpu_states",
    "device_files",
    "device_states",
    "frames",
    "page_frames",
]

Codes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Block:
    """A named region: pages ``start`` to ``stop - 1``, and its VMAs as (start, stop, ``rw-p``)."""

    name: str
    mm: int
    start: int
    stop: int
    vmas: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames in use of one kind: how many, and some of them from number ``first`` on.

    ``cells`` are (pfn, mm, vpn) with a page that the frame holds; mm is 0 where there is none.
    """

    total: int
    first: int
    cells: list[tuple[int, int, int]]


# --- where to look --------------------------------------------------------------------------------


def address_spaces(state: State) -> list[tuple[int, str]]:
    """Number and name of every address space."""
    mms = np.flatnonzero(state["mm.root"]).tolist()
    return [(mm, state.names.processes.get(mm, f"mm {mm}")) for mm in mms]


def device_files(state: State) -> list[tuple[int, str, int]]:
    """Number, name and mirrored address space of every open device file."""
    mms = state["device_file.mm"]
    files = np.flatnonzero(mms).tolist()
    return [(file, state.names.files.get(file, f"file {file}"), int(mms[file])) for file in files]


def blocks(state: State, names: Names, mm: int) -> list[Block]:
    """The named regions of an address space that have a mapping now, by address."""
    found = []
    for name, (start, stop) in sorted(names.of(mm).items(), key=lambda item: item[1]):
        vmas = tuple(
            (max(vma.start, start), min(vma.end, stop), vma.permissions)
            for vma in vmas_in(state, mm, start, stop)
        )
        if vmas:
            found.append(Block(name, mm, start, stop, vmas))
    return found


# --- codes of states ------------------------------------------------------------------------------

_SWAP_CODES = np.full(32, 10, np.uint8)
_SWAP_CODES[entry.SWP_DEVICE_WRITE] = 6
_SWAP_CODES[entry.SWP_DEVICE_READ] = 7
_SWAP_CODES[[entry.SWP_DEVICE_EXCLUSIVE_WRITE, entry.SWP_DEVICE_EXCLUSIVE_READ]] = 8
_SWAP_CODES[entry.SWP_MIGRATION_READ : entry.SWP_MIGRATION_WRITE + 1] = 9


def cpu_states(state: State, mm: int, start: int, stop: int) -> Codes:
    """Codes of :data:`~hmmlab.widgets.palette.CPU_STATES` for pages ``start`` to ``stop - 1``."""
    codes = np.zeros(stop - start, np.uint8)
    for vma in vmas_in(state, mm, start, stop):
        codes[max(vma.start - start, 0) : vma.end - start] = 1
    root = mm_root(state, mm)
    words = read_range(state, root, start, stop)
    accessible = (words & entry.PRESENT) != 0
    huge = huge_blocks(state, root, np.arange(start, stop))
    writable = (words & entry.RW) != 0
    codes[accessible] = 3
    codes[accessible & huge] = 13
    codes[accessible & writable] = 4
    codes[accessible & writable & huge] = 12
    codes[accessible & ((words & entry.SPECIAL) != 0)] = 2
    codes[~accessible & entry.is_present(words)] = 5
    coherent = accessible & is_zone_device(state, entry.pfn_of(words))
    codes[coherent] = 11
    away = entry.is_swap_type(words)
    codes[away] = _SWAP_CODES[entry.swap_type(words[away])]
    return codes


def device_states(state: State, file: int, start: int, stop: int) -> Codes:
    """Codes of :data:`~hmmlab.widgets.palette.DEVICE_STATES` for pages of a device file."""
    words = read_range(state, int(state["device_file.root"][file]), start, stop)
    cpu = read_range(state, mm_root(state, int(state["device_file.mm"][file])), start, stop)
    mapped, writable = (
        (words & np.uint64(bit)) != 0 for bit in (entry.DEVICE_VALID, entry.DEVICE_WRITE)
    )
    present = entry.is_present(cpu)
    private = entry.is_swap_type(cpu) & entry.is_device_private(cpu)
    data = data_frames(state, cpu)
    codes = np.where(mapped, np.where(writable, 2, 1), 0).astype(np.uint8)
    codes[mapped & private] += 2
    # While a page moves, its entry names neither; whoever moves it takes care of the device.
    moving = entry.is_swap_type(cpu) & entry.is_migration(cpu)
    known = present | private | (entry.is_swap_type(cpu) & entry.is_device_exclusive(cpu))
    codes[mapped & ~moving & (~known | (data != entry.device_pfn(words)))] = 6
    codes[mapped & ((words & np.uint64(entry.DEVICE_ATOMIC)) != 0)] = 5
    return codes


def changed_pages(
    replay: Replay, mm: int, start: int, stop: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pages the current step changed in the CPU's table and in a device's."""
    changed = replay.changed("pte")
    state = replay.state
    roots = [mm_root(state, mm)]
    files = [file for file, _, mirrored in device_files(state) if mirrored == mm]
    device_roots = [int(state["device_file.root"][file]) for file in files]
    cpu = _pages_of_rows(state, roots, changed, start, stop)
    return cpu, _pages_of_rows(state, device_roots, changed, start, stop)


def _pages_of_rows(
    state: State, roots: list[int], rows: NDArray[np.int64], start: int, stop: int
) -> NDArray[np.bool_]:
    pages = np.zeros(stop - start, np.bool_)
    for root in roots if rows.size else []:
        for run in walk(state, root, start, stop):
            if run.row >= 0:
                ends = np.searchsorted(rows, (run.row, run.row + run.stop - run.start))
                pages[rows[slice(*ends)] - run.row + run.start - start] = True
    return pages


def frames(state: State, near: list[int], most: int) -> tuple[Frames, Frames]:
    """Frames in use in RAM, ascending, and on the device, in the order of handing out.

    Of many, ``most`` are read: those around a frame of ``near``, or else the first.
    """
    used = np.flatnonzero(state["page.refcount"][: state.used("page.refcount")])
    used = used[used != ZERO_PFN]
    ram = used[used < state.ram_pages]
    device = device_pfns(state, used[used >= state.ram_pages])
    holders = state["page.private"][page_rows(state, device)]
    kinds = []
    for pfns in (ram, device):
        found = np.flatnonzero(np.isin(pfns, near))
        first = int(found[0]) // most * most if found.size else 0
        shown = pfns[first : first + most]
        pages = _pages_of(state, shown)
        if pfns is ram:
            # The device's frames that a frame of RAM stands behind.
            behind = np.isin(holders, shown)
            owners = _pages_of(state, device[behind])
            for pfn, owner in zip(holders[behind].tolist(), device[behind].tolist(), strict=True):
                if owner in owners:
                    pages.setdefault(pfn, owners[owner])
        cells = [(pfn, *pages.get(pfn, (0, 0))) for pfn in shown.tolist()]
        kinds.append(Frames(len(pfns), first, cells))
    return kinds[0], kinds[1]


def _pages_of(state: State, pfns: NDArray[np.int64]) -> dict[int, tuple[int, int]]:
    """Find a page, as (mm, vpn), for each frame that one maps."""
    found = rmap_walk(state, pfns)
    mms = state["vma.mm"][found.vma]
    columns = (pfns[found.which], mms, found.vpn)
    return {pfn: (mm, vpn) for pfn, mm, vpn in zip(*(c.tolist() for c in columns), strict=True)}


def page_frames(state: State, mm: int, vpn: int) -> list[int]:
    """Frames of a page: the one that its word names, and the one that holds the data behind it.

    For a page in swap it is the one in the swap cache, if there is one.
    """
    words = read_range(state, mm_root(state, mm), vpn, vpn + 1)
    word = int(words[0])
    if not word or (word & entry.SPECIAL and word & entry.PRESENT):
        return []
    if entry.is_swapped(words)[0]:
        cached = int(state["swap.cache"][entry.swap_offset(words)[0]])
        return [cached] if cached else []
    present = bool(entry.is_present(words)[0])
    pfn = int((entry.pfn_of if present else entry.swap_offset_pfn)(words)[0])
    data = int(data_frames(state, words)[0])
    return [pfn, data] if data not in (0, pfn) else [pfn]
