"""What the columns say about pages, in the words that the views show.

Pure reading of a :class:`~hmmlab.model.state.State` (a machine's or a replay's) into arrays of
state codes and lists of facts; nothing here draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hmmlab.model import entry
from hmmlab.model.entry import Words
from hmmlab.model.geometry import PAGE_SHIFT, PMD_PAGES, align_down
from hmmlab.model.machine import Machine
from hmmlab.model.mm_types import VM_FLAG_NAMES, mm_root, vma_lookup, vmas_in
from hmmlab.model.names import Names
from hmmlab.model.page import PAGE_FLAGS, ZERO_PFN, is_zone_device, page_rows
from hmmlab.model.page_table import huge_blocks, read_range, walk
from hmmlab.model.rmap import rmap_walk
from hmmlab.model.state import State
from hmmlab.model.trace import Replay

__all__ = [
    "Block",
    "Frames",
    "Section",
    "address_spaces",
    "blocks",
    "changed_pages",
    "cpu_states",
    "device_files",
    "device_states",
    "frames",
    "inspect",
    "page_frames",
]

Codes = NDArray[np.uint8]
Fact = tuple[str, str, str]
Bits = tuple[int, int, str, int, str]
Fields = tuple[tuple[int, int, str, str], ...]


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


@dataclass(frozen=True, slots=True)
class Section:
    """A part of what there is to know about a page.

    ``rows`` are (label, value, explanation); ``bits`` are (highest bit, lowest bit, name, value,
    meaning) from bit 63 down, the name empty where a field is not used.
    """

    title: str
    rows: list[Fact]
    bits: list[Bits] = field(default_factory=list)


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
    codes[accessible] = np.where(huge, 13, 3)[accessible]
    codes[accessible & writable] = np.where(huge, 12, 4)[accessible & writable]
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
    data = _data_frames(state, cpu)
    codes = np.where(mapped, np.where(writable, 2, 1), 0).astype(np.uint8)
    codes[mapped & private] += 2
    # While a page moves, its entry names neither; whoever moves it takes care of the device.
    moving = entry.is_swap_type(cpu) & entry.is_migration(cpu)
    known = present | private | (entry.is_swap_type(cpu) & entry.is_device_exclusive(cpu))
    codes[mapped & ~moving & (~known | (data != entry.device_pfn(words)))] = 6
    codes[mapped & ((words & np.uint64(entry.DEVICE_ATOMIC)) != 0)] = 5
    return codes


def _data_frames(state: State, words: Words) -> NDArray[np.int64]:
    """Frames that hold the data of pages: those that words name, or those behind device frames."""
    present = entry.is_present(words)
    frames = np.where(present, entry.pfn_of(words), entry.swap_offset_pfn(words))
    private = entry.is_swap_type(words) & entry.is_device_private(words)
    rows = page_rows(state, np.where(private, frames, 0))
    return np.where(private, state["page.private"][rows], frames)


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
    device = _device_pfns(state, used[used >= state.ram_pages])
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


def _device_pfns(state: State, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Frame numbers of rows of device memory, which ascend as frame numbers descend."""
    first = page_rows(state, np.array([state.ram_pages]))[0]
    return state.ram_pages + first - rows


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
    data = int(_data_frames(state, words)[0])
    return [pfn, data] if data not in (0, pfn) else [pfn]


# --- one page taken apart -------------------------------------------------------------------------

_PRESENT_FIELDS: Fields = (
    (63, 63, "NX", "code here may not run"),
    (62, 46, "", ""),
    (45, 12, "pfn", "the frame"),
    (11, 11, "SOFT_DIRTY", "written since clear_refs (software)"),
    (10, 10, "", ""),
    (9, 9, "SPECIAL", "the zero page: not counted"),
    (8, 8, "PROTNONE", "present, but nobody may access it"),
    (7, 7, "", ""),
    (6, 6, "DIRTY", "the CPU wrote here"),
    (5, 5, "ACCESSED", "the CPU looked here"),
    (4, 3, "", ""),
    (2, 2, "USER", "user space may access it"),
    (1, 1, "RW", "may be written"),
    (0, 0, "PRESENT", "the CPU follows this word"),
)
_HUGE_FIELDS: Fields = tuple(
    (7, 7, "PSE", "this PMD word maps 2 MiB by itself") if high == 7 else (high, low, name, meaning)
    for high, low, name, meaning in _PRESENT_FIELDS
)
_SWAP_FIELDS: Fields = (
    (63, 59, "type", "what kind of entry this is"),
    (58, 9, "offset", "the frame or the slot (stored inverted)"),
    (8, 4, "", ""),
    (3, 3, "EXCLUSIVE", "shared with nobody (swap only)"),
    (2, 2, "", ""),
    (1, 1, "SOFT_DIRTY", "written since clear_refs"),
    (0, 0, "PRESENT", "clear: the CPU faults here"),
)
_DEVICE_FIELDS: Fields = (
    (63, 46, "", ""),
    (45, 12, "pfn", "the frame that holds the data"),
    (11, 3, "", ""),
    (2, 2, "ATOMIC", "the device alone may access it"),
    (1, 1, "WRITE", "the device may write"),
    (0, 0, "VALID", "the device follows this word"),
)
_SWAP_NAMES = {
    value: name.removeprefix("SWP_")
    for name, value in vars(entry).items()
    if name.startswith(("SWP_DEVICE_", "SWP_MIGRATION_"))
}


def _take_apart(words: Words, fields: Fields) -> list[Bits]:
    word = int(words[0])
    return [
        (high, low, name, (word >> low) & ((1 << (high - low + 1)) - 1), meaning)
        for high, low, name, meaning in fields
    ]


def inspect(state: State, mm: int, vpn: int, file: int) -> list[Section]:
    """All there is to know about a page: its words, its frame, its mapping.

    ``file`` is the device file whose table is looked at, 0 for none.
    """
    root = mm_root(state, mm)
    words = read_range(state, root, vpn, vpn + 1)
    sections = [_cpu_section(state, root, vpn, words)]
    if file:
        device_root = int(state["device_file.root"][file])
        device = int(read_range(state, device_root, vpn, vpn + 1)[0])
        label = state.names.files.get(file, str(file))
        sections.append(_device_section(device, f"{label}'s page-table word"))
    swapped = bool(entry.is_swapped(words)[0])
    if swapped:
        sections.append(_slot_section(state, int(entry.swap_offset(words)[0])))
    titles = ("Frame in the swap cache" if swapped else "Frame", "Frame of RAM behind the device's")
    for pfn, title in zip(page_frames(state, mm, vpn), titles, strict=False):
        sections.append(_frame_section(state, pfn, title))
    if _is_zero_page(words):
        pfn = int(entry.pfn_of(words)[0])
        sections.append(Section("Frame", [("pfn", f"{pfn:#x}", "zeros, which nobody counts")]))
    sections.append(_vma_section(state, mm, vpn))
    return sections


def _is_zero_page(words: Words) -> bool:
    return bool(words[0] & np.uint64(entry.SPECIAL)) and bool(words[0] & np.uint64(entry.PRESENT))


def _cpu_section(state: State, root: int, vpn: int, words: Words) -> Section:
    title = "CPU's page-table word"
    if not words[0]:
        return Section(title, [("word", "0", "empty: a touch is a page fault")])
    fields = _PRESENT_FIELDS
    if huge_blocks(state, root, np.array([vpn]))[0]:
        title, fields = "CPU's PMD word, for all 512 pages around", _HUGE_FIELDS
        first = align_down(vpn, PMD_PAGES)
        words = read_range(state, root, first, first + 1) | np.uint64(entry.HUGE)
    shown = ("word", f"{int(words[0]):#018x}", "")
    if entry.is_present(words)[0]:
        pfn = int(entry.pfn_of(words)[0])
        where = "the zero page" if _is_zero_page(words) else "a frame of memory"
        return Section(title, [shown, ("pfn", f"{pfn:#x}", where)], _take_apart(words, fields))
    kind = int(entry.swap_type(words)[0])
    rows = [shown, ("type", _SWAP_NAMES.get(kind, "swap"), f"type {kind}: not for the CPU")]
    if entry.is_swapped(words)[0]:
        slot = int(entry.swap_offset(words)[0])
        rows.append(("slot", f"{slot:#x}", "where the page lies on the swap device"))
    else:
        pfn = int(entry.swap_offset_pfn(words)[0])
        rows.append(("pfn", f"{pfn:#x}", "the frame that the entry names"))
    return Section(title, rows, _take_apart(words, _SWAP_FIELDS))


def _slot_section(state: State, slot: int) -> Section:
    rows = [("slot", f"{slot:#x}", "of the swap device")]
    for column in ("count", "content"):
        rows.append((column, str(state[f"swap.{column}"][slot]), Machine.meaning(f"swap.{column}")))
    cached = int(state["swap.cache"][slot])
    rows.append(("cache", f"{cached:#x}" if cached else "none", "its frame in the swap cache"))
    return Section("Swap slot", rows)


def _device_section(word: int, title: str) -> Section:
    if not word:
        return Section(title, [("word", "0", "empty: the device must fault first")])
    bits = _take_apart(np.array([word], np.uint64), _DEVICE_FIELDS)
    return Section(title, [("word", f"{word:#018x}", "")], bits)


def _frame_section(state: State, pfn: int, title: str) -> Section:
    row = int(page_rows(state, np.array([pfn]))[0])
    bits = int(state["page.flags"][row])
    flags = " ".join(name for bit, name in enumerate(PAGE_FLAGS) if bits >> bit & 1) or "none"
    where = "device memory" if pfn >= state.ram_pages else "RAM"
    rows = [("pfn", f"{pfn:#x}", where), ("flags", flags, "")]
    for column in ("refcount", "mapcount", "content"):
        rows.append((column, str(state[f"page.{column}"][row]), Machine.meaning(f"page.{column}")))
    if head := int(state["page.compound"][row]):
        rows.append(("compound", f"{head:#x}", "first frame of the huge page that it is part of"))
    if slot := int(state["page.swap"][row]):
        rows.append(("swap", f"{slot:#x}", "its slot: the frame is in the swap cache"))
    return Section(title, rows)


def _vma_section(state: State, mm: int, vpn: int) -> Section:
    vma = vma_lookup(state, mm, vpn)
    if vma is None:
        return Section("VMA", [("mapping", "none", "touching the page ends in SIGSEGV")])
    names = " ".join(name for bit, name in VM_FLAG_NAMES.items() if vma.flags & bit)
    table = f"{vpn // PMD_PAGES:#x}"
    return Section(
        "VMA",
        [
            ("pages", f"{vma.start:#x} to {vma.end - 1:#x}", f"{vma.pages} pages"),
            ("address", f"{vpn << PAGE_SHIFT:#x}", f"in the 2 MiB run {table}"),
            ("permissions", vma.permissions, "as in /proc/self/maps"),
            ("flags", names, ""),
            ("pgoff", f"{vma.pgoff:#x}", "offset of its first page in what is mapped"),
            ("anon_vma", str(vma.anon_vma or "none"), "who knows the mappings of its pages"),
        ],
    )
