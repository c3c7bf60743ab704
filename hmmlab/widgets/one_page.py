"""One page taken apart: its words bit by bit, its frame, its slot, its mapping.

Pure reading of a :class:`~hmmlab.model.state.State`, as in :mod:`hmmlab.widgets.reading`; nothing
here draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hmmlab.model import entry
from hmmlab.model.entry import Words
from hmmlab.model.geometry import PAGE_SHIFT, PMD_PAGES, align_down
from hmmlab.model.machine import Machine
from hmmlab.model.mm_types import VM_FLAG_NAMES, mm_root, vma_lookup
from hmmlab.model.page import PAGE_FLAGS, page_rows
from hmmlab.model.page_table import is_huge, read_range
from hmmlab.model.state import State
from hmmlab.widgets.reading import page_frames

__all__ = ["Section", "inspect"]

Fact = tuple[str, str, str]
Bits = tuple[int, int, str, int, str]
Fields = tuple[tuple[int, int, str, str], ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of what there is to know about a page.

    ``rows`` are (label, value, explanation); ``bits`` are (highest bit, lowest bit, name, value,
    meaning) from bit 63 down, the name empty where a field is not used.
    """

    title: str
    rows: list[Fact]
    bits: list[Bits] = field(default_factory=list)


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
    if is_huge(state, root, vpn):
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
