"""What two machines have in common whatever grain they ran at.

Which frame of RAM and which page table is handed out may differ with the grain, since no answer
shows it; all else must not. So a machine is read with its frames numbered anew, in the order in
which a walk over everything that names one meets them.
"""

import numpy as np

from hmmlab.model.entry import (
    HUGE,
    device_pfn,
    is_device_exclusive,
    is_device_private,
    is_migration,
    is_present,
    is_swap_type,
    pfn_of,
    swap_offset_pfn,
)
from hmmlab.model.geometry import ENTRIES, LEVEL_PAGES, PAGE_SHIFT
from hmmlab.model.memremap import is_device_private_page
from hmmlab.model.mm_types import mm_root
from hmmlab.model.page import PG_KSM, PHYSICAL_PAGES, page_rows

__all__ = ["difference", "reading"]

#: Columns that are told otherwise, or that say which frame or table was handed out.
_TOLD = (
    *("pgd", "pud", "pmd", "pte", "mm.root", "device_file.root", "table.used", "table.free"),
    *("pgd.free_list", "pud.free_list", "pmd.free_list", "pte.free_list"),
    *("zone.used", "zone.free", "zone.huge", "zone.free_list.0", "zone.free_list.1"),
    "ksm_node.pfn",
)
#: Columns of frames: by one name, and with the frames' own columns behind it.
_NAMING = ("cache.page", "swap.cache", "held.pfn", "huge_zero.pfn", "hugetlb.head")
#: Frames that wait in a batch: as many as its count says.
_BATCHES = ("lru.lazyfree", "lru.mlock")
_OF_FRAMES = ("refcount", "mapcount", "flags", "content", "mapping", "index", "swap")


def _table(machine, root):
    """Pages whose words are not empty, the words, and where page tables hang."""
    firsts, tables, huge = np.zeros(1, np.int64), np.array([root]), None
    for level in ("pgd", "pud", "pmd"):
        words = machine[level].reshape(-1, ENTRIES)[tables]
        which, entries = np.nonzero(words)
        firsts = firsts[which] + entries * LEVEL_PAGES[level]
        words = words[which, entries]
        tables, huge = (words >> np.uint64(PAGE_SHIFT)).astype(np.int64), words & HUGE
    words = machine["pte"].reshape(-1, ENTRIES)[tables]
    which, entries = np.nonzero(words)
    return firsts[which] + entries, words[which, entries], np.stack([firsts, huge.astype(np.int64)])


def reading(machine):
    """Everything about a machine but the numbers of RAM frames and of page tables.

    Returns a dict from what it is to an array or a list.
    """
    told, frames = {}, []

    def name(what, pfns):
        """Tell of frames later, once it is known what all of them are called."""
        frames.append((what, np.asarray(pfns, np.int64)))

    for mm in np.flatnonzero(machine["mm.root"] > 0).tolist():
        vpns, words, hung = _table(machine, mm_root(machine, mm))
        present, swap = is_present(words), is_swap_type(words)
        by_offset = swap & (
            is_device_private(words) | is_device_exclusive(words) | is_migration(words)
        )
        named = present | by_offset
        pfns = np.where(present, pfn_of(words), np.where(by_offset, swap_offset_pfn(words), 0))
        low = np.uint64(0x8000000000000FFF)
        high = np.uint64(0xF8000000000001FF)
        bits = np.where(present, words & low, np.where(by_offset, words & high, words))
        told |= {f"mm {mm} pages": vpns, f"mm {mm} bits": bits, f"mm {mm} tables": hung}
        name(f"mm {mm} frames", np.where(named, pfns, 0))
    for file in np.flatnonzero(machine["device_file.mm"]).tolist():
        vpns, words, hung = _table(machine, int(machine["device_file.root"][file]))
        told |= {f"file {file} pages": vpns, f"file {file} bits": words & np.uint64(0xFFF)}
        told[f"file {file} tables"] = hung
        name(f"file {file} frames", device_pfn(words))
    for column in _NAMING:
        name(column, np.trim_zeros(machine[column], "b"))
    # A node whose merged page has gone waits for the next scan; its frame may be anybody's.
    nodes = np.flatnonzero(machine["ksm_node.pfn"])
    rows = page_rows(machine, machine["ksm_node.pfn"][nodes])
    there = (machine["page.flags"][rows] & PG_KSM != 0) & (machine["page.mapping"][rows] == nodes)
    told |= {"ksm nodes": nodes, "ksm nodes that are there": nodes[there]}
    name("ksm_node.pfn", machine["ksm_node.pfn"][nodes[there]])
    for batch in _BATCHES:
        waiting = machine[batch][: int(machine[f"{batch}_count"][0])]
        name(batch, abs(waiting))
        told[f"new in {batch}"] = waiting < 0
    rows = machine.ram_pages + np.flatnonzero(machine["page.refcount"][machine.ram_pages :])
    for column in (*_OF_FRAMES, "compound"):
        told[f"device frames {column}"] = machine[f"page.{column}"][rows]
    told["device frames"] = rows
    # A device-private frame names the frame behind it, a coherent one the file that has it.
    backed = is_device_private_page(machine, machine.ram_pages + PHYSICAL_PAGES - 1 - rows)
    name("device frames private", machine["page.private"][rows[backed]])
    told["device frames of files"] = machine["page.private"][rows[~backed]]

    everything = np.concatenate([pfns for _, pfns in frames])
    ram = everything[(everything > 0) & (everything < machine.ram_pages)]
    known, first = np.unique(ram, return_index=True)
    heads = machine["page.compound"][page_rows(machine, known)]
    number = np.zeros(known.size, np.int64)
    number[np.argsort(first)] = np.arange(1, known.size + 1)

    def called(pfns):
        at = np.minimum(np.searchsorted(known, pfns), max(known.size - 1, 0))
        found = known[at] == pfns if known.size else np.zeros(pfns.size, bool)
        return np.where(found, number[at] if known.size else 0, pfns)

    told |= {what: called(pfns) for what, pfns in frames}
    order = page_rows(machine, known[np.argsort(first)])
    for column in _OF_FRAMES:
        told[f"frames {column}"] = machine[f"page.{column}"][order]
    told["frames place in a huge page"] = np.where(heads > 0, known - heads, -1)[np.argsort(first)]

    told["tables in use"] = (machine["table.used"] - machine["table.free"])[:4]
    free = machine["dmirror_device.free"]
    for column in machine:
        if column in _TOLD or column in _NAMING or column.startswith("page."):
            continue
        if column in _BATCHES:
            continue
        values = machine[column]
        if column.startswith("dmirror_device.free_list."):
            values = values[: int(free[int(column[-1])])]
        told[column] = np.trim_zeros(values, "b")
    return told


def difference(one, other):
    """What differs between two readings: sentences, none where they are the same."""
    found = []
    for what in sorted(one.keys() | other.keys()):
        mine, theirs = one.get(what), other.get(what)
        if mine is None or theirs is None or not np.array_equal(mine, theirs):
            found.append(f"{what}: {_short(mine)} and {_short(theirs)}")
    return found


def _short(values):
    text = str(values).replace("\n", " ")
    return text if len(text) < 300 else text[:300] + " ..."
