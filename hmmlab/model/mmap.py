"""The system calls that change an address space: mmap, munmap, mprotect, madvise, mremap.

Source: mm/mmap.c, mm/mprotect.c, mm/madvise.c, mm/mremap.c.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.entry import (
    DIRTY,
    PRESENT,
    RW,
    SOFT_DIRTY,
    SPECIAL,
    SWP_DEVICE_EXCLUSIVE_READ,
    SWP_DEVICE_EXCLUSIVE_WRITE,
    SWP_DEVICE_READ,
    SWP_DEVICE_WRITE,
    SWP_MIGRATION_READ_EXCLUSIVE,
    SWP_MIGRATION_WRITE,
    SWP_SOFT_DIRTY,
    Words,
    is_present,
    is_swap_type,
    pfn_of,
    swap_offset,
    swap_type,
    swap_word,
    with_protection,
)
from hmmlab.model.geometry import PMD_PAGES, USER_VPN_END
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.memory import unmap_page_range
from hmmlab.model.mm_types import (
    VM_ACCESS_FLAGS,
    VM_ACCOUNT,
    VM_HUGETLB,
    VM_MAYEXEC,
    VM_MAYREAD,
    VM_MAYWRITE,
    VM_NORESERVE,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_WRITE,
    Vma,
    anon_vma_clone,
    find_vma,
    find_vma_prev,
    flags_of_prot,
    mm_lock,
    mm_root,
    new_vma,
    remove_vma,
    split_vma,
    vm_page_prot,
    vma_at,
    vma_lookup,
    vma_merge,
    vmas_in,
)
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.page import PG_ANON_EXCLUSIVE, page_rows
from hmmlab.model.page_table import (
    alloc_tables,
    free_pgtables,
    populated_pmds,
    read_range,
    rows_of_range,
    walk,
    word_row,
)

__all__ = ["sys_madvise_dontneed", "sys_mmap", "sys_mprotect", "sys_mremap", "sys_munmap"]

_ENOMEM, _EFAULT, _EINVAL = 12, 14, 22


# --- mmap and munmap ------------------------------------------------------------------------------


@kernel("mm/mmap.c", "__x64_sys_mmap")
def sys_mmap(machine: Machine, mm: int, start: int, pages: int, prot: str) -> Routine[None]:
    """Map private anonymous memory at page ``start``, in place of what is there (MAP_FIXED).

    Raises
    ------
    KernelError
        EINVAL for no pages; ENOMEM beyond the address space.
    """
    if pages <= 0:
        raise KernelError(_EINVAL, f"mmap of {pages} pages")
    if start < 0 or start + pages > USER_VPN_END:
        raise KernelError(_ENOMEM, f"pages {start:#x} to {start + pages:#x} leave the user half")
    flags = flags_of_prot(prot) | VM_MAYREAD | VM_MAYWRITE | VM_MAYEXEC
    if flags & VM_WRITE:
        flags |= VM_ACCOUNT
    lock = mm_lock(machine, mm)
    yield from machine.down_write(lock)
    try:
        yield from _munmap(machine, mm, start, start + pages)
        _, prev = find_vma_prev(machine, mm, start)
        vma = vma_merge(machine, mm, prev, start, start + pages, flags, 0, start)
        if vma is None:
            vma = new_vma(machine, mm, start, start + pages, flags, start)
        machine.write("vma.flags", vma.row, vma.flags | VM_SOFTDIRTY)
        yield machine.step(
            "{range}: promised by a mapping, and not one page is there yet.",
            mm,
            start,
            start + pages,
        )
    finally:
        machine.up_write(lock)


@kernel("mm/mmap.c", "__x64_sys_munmap")
def sys_munmap(machine: Machine, mm: int, start: int, stop: int) -> Routine[None]:
    """Unmap pages ``start`` to ``stop - 1``, mapped or not.

    Raises
    ------
    KernelError
        EINVAL for an empty range or one beyond the address space.
    """
    if not 0 <= start < stop <= USER_VPN_END:
        raise KernelError(_EINVAL, f"munmap of pages {start:#x} to {stop:#x}")
    lock = mm_lock(machine, mm)
    yield from machine.down_write(lock)
    try:
        yield from _munmap(machine, mm, start, stop)
    finally:
        machine.up_write(lock)


def _munmap(machine: Machine, mm: int, start: int, stop: int) -> Routine[None]:
    """Cut the mappings at the borders, empty what lies between, and free its tables."""
    for edge in (start, stop):
        vma = vma_lookup(machine, mm, edge)
        if vma and vma.start < edge:
            split_vma(machine, vma, edge)
    doomed = list(vmas_in(machine, mm, start, stop))
    if not doomed:
        return
    above, _ = find_vma_prev(machine, mm, doomed[-1].end)
    _, below = find_vma_prev(machine, mm, doomed[0].start)
    machine.called("lru_add_drain")
    yield from unmap_vmas(machine, mm, doomed, start, stop)
    machine.called("free_pgtables")
    free_pgtables(
        machine,
        mm_root(machine, mm),
        doomed[0].start,
        doomed[-1].end,
        below.end if below else 0,
        above.start if above else USER_VPN_END,
    )
    for vma in doomed:
        remove_vma(machine, vma)
    yield machine.step("The mapping of {range} is gone.", mm, start, stop)


@kernel("mm/memory.c")
def unmap_vmas(
    machine: Machine, mm: int, doomed: list[Vma], start: int, stop: int
) -> Routine[None]:
    """Empty several mappings inside one UNMAP of the whole range."""
    range = MmuNotifierRange.one(mm, Event.UNMAP, start, stop, vma=doomed[0].row)
    yield from invalidate_range_start(machine, range)
    for vma in doomed:
        yield from unmap_page_range(machine, vma, max(vma.start, start), min(vma.end, stop))
    yield from invalidate_range_end(machine, range)


# --- mprotect -------------------------------------------------------------------------------------


@kernel("mm/mprotect.c", "__x64_sys_mprotect")
def sys_mprotect(machine: Machine, mm: int, start: int, stop: int, prot: str) -> Routine[None]:
    """Give pages ``start`` to ``stop - 1`` another protection, mapping by mapping.

    Raises
    ------
    KernelError
        ENOMEM at the first page that is not mapped; the mappings before it have changed.
    """
    access = flags_of_prot(prot)
    if stop <= start:
        return
    lock = mm_lock(machine, mm)
    yield from machine.down_write(lock)
    try:
        at = start
        vma, prev = find_vma_prev(machine, mm, start)
        if vma and vma.start < start:
            prev = vma
        while True:
            if vma is None or vma.start > at:
                place = machine.names.place(mm, at, at + 1)
                raise KernelError(_ENOMEM, f"{place} is not mapped")
            end = min(vma.end, stop)
            flags = (vma.flags & ~VM_ACCESS_FLAGS) | access
            prev = yield from mprotect_fixup(machine, vma, prev, at, end, flags)
            at = max(end, prev.end)
            if at >= stop:
                return
            vma = find_vma(machine, mm, prev.end)
            if vma and vma.start != at:
                vma = None
    finally:
        machine.up_write(lock)


@kernel("mm/mprotect.c")
def mprotect_fixup(
    machine: Machine, vma: Vma, prev: Vma | None, start: int, stop: int, flags: int
) -> Routine[Vma]:
    """Change the part of one mapping; returns the mapping that holds the part now."""
    if flags == vma.flags:
        return vma
    if flags & VM_WRITE and not vma.flags & (
        VM_ACCOUNT | VM_WRITE | VM_HUGETLB | VM_SHARED | VM_NORESERVE
    ):
        flags |= VM_ACCOUNT  # promised memory stays promised, so this bit never goes again
    merged = vma_merge(machine, vma.mm, prev, start, stop, flags, vma.anon_vma, vma.pgoff_of(start))
    if merged is None:
        if start != vma.start:
            _, vma = split_vma(machine, vma, start)
        if stop != vma.end:
            vma, _ = split_vma(machine, vma, stop)
    else:
        vma = merged
    machine.write("vma.flags", vma.row, flags)
    vma = vma_at(machine, vma.row)
    yield from change_protection(machine, vma, start, stop)
    return vma


@kernel("mm/mprotect.c")
def change_protection(machine: Machine, vma: Vma, start: int, stop: int) -> Routine[None]:
    """Change the words of a mapping: one PROTECTION_VMA for each 1 GiB run that has a table."""
    root = mm_root(machine, vma.mm)
    for first, last in populated_pmds(machine, root, start, stop):
        range = MmuNotifierRange.one(vma.mm, Event.PROTECTION_VMA, first, last, vma=vma.row)
        yield from invalidate_range_start(machine, range)
        changed = 0
        for run in walk(machine, root, first, last):
            if run.row < 0:
                continue
            rows = slice(run.row, run.row + run.stop - run.start)
            words = machine["pte"][rows].copy()
            protected = _protected(machine, vma, words)
            changed += int((protected != words).sum())
            machine.write("pte", rows, protected)
        yield machine.step(
            f"{{range}}: {changed} words have the rights of {vma.permissions} now.",
            vma.mm,
            first,
            last,
        )
        yield from invalidate_range_end(machine, range)


def _protected(machine: Machine, vma: Vma, words: Words) -> Words:
    """Words with the rights that the mapping has now (``change_pte_range``)."""
    changed = words.copy()
    present = is_present(words)
    if present.any():
        new = with_protection(words[present], vm_page_prot(vma.flags))
        if vma.flags & VM_WRITE and not vma.flags & VM_SHARED:
            new = np.where(_may_be_writable(machine, new), new | np.uint64(RW), new)
        changed[present] = new
    special = np.flatnonzero(~present & (words != 0))
    if special.size:
        changed[special] = _write_protected(words[special])
    return changed


def _may_be_writable(machine: Machine, words: Words) -> np.ndarray:
    """Pages whose write fault would make them writable at once (``can_change_pte_writable``)."""
    normal = ((words & PRESENT) != 0) & ((words & SPECIAL) == 0)
    frames = page_rows(machine, np.where(normal, pfn_of(words), 0))
    owned = (machine["page.flags"][frames] & PG_ANON_EXCLUSIVE) != 0
    return normal & ((words & DIRTY) != 0) & owned


_READABLE = {
    SWP_MIGRATION_WRITE: SWP_MIGRATION_READ_EXCLUSIVE,
    SWP_DEVICE_WRITE: SWP_DEVICE_READ,
    SWP_DEVICE_EXCLUSIVE_WRITE: SWP_DEVICE_EXCLUSIVE_READ,
}


def _write_protected(words: Words) -> Words:
    """Swap-type words without the right to write: it is never given back to them."""
    changed = words.copy()
    kinds = swap_type(words)
    for writable, readable in _READABLE.items():
        mine = kinds == writable
        new = swap_word(readable, swap_offset(words[mine]))
        if writable != SWP_DEVICE_WRITE:  # a device page's soft-dirty bit is lost
            new |= words[mine] & np.uint64(SWP_SOFT_DIRTY)
        changed[mine] = new
    return changed


# --- madvise --------------------------------------------------------------------------------------


@kernel("mm/madvise.c", "__x64_sys_madvise")
def sys_madvise_dontneed(machine: Machine, mm: int, start: int, stop: int) -> Routine[None]:
    """Throw the pages away and keep the mapping (MADV_DONTNEED).

    Raises
    ------
    KernelError
        ENOMEM when part of the range is not mapped; the rest has been emptied all the same.
    """
    lock = mm_lock(machine, mm)
    yield from machine.down_read(lock)
    try:
        at = start
        for vma in list(vmas_in(machine, mm, start, stop)):
            yield from zap_page_range_single(
                machine, vma, max(vma.start, start), min(vma.end, stop)
            )
            at = vma.end if vma.start <= at else at
        if at < stop:
            raise KernelError(_ENOMEM, f"{machine.names.place(mm, at, stop)}: not all mapped")
    finally:
        machine.up_read(lock)


@kernel("mm/memory.c")
def zap_page_range_single(machine: Machine, vma: Vma, start: int, stop: int) -> Routine[None]:
    """Empty a part of one mapping inside a CLEAR of it."""
    machine.called("lru_add_drain")
    range = MmuNotifierRange.one(vma.mm, Event.CLEAR, start, stop, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    yield from unmap_page_range(machine, vma, start, stop)
    yield from invalidate_range_end(machine, range)


# --- mremap ---------------------------------------------------------------------------------------


@kernel("mm/mremap.c", "__x64_sys_mremap")
def sys_mremap(machine: Machine, mm: int, start: int, pages: int, to: int) -> Routine[None]:
    """Move ``pages`` pages from page ``start`` to page ``to`` (MREMAP_MAYMOVE | MREMAP_FIXED).

    Raises
    ------
    KernelError
        EFAULT when the pages are not all in one mapping; EINVAL for no pages, for ranges that
        overlap, or beyond the address space.
    """
    stop = start + pages
    if pages <= 0 or not 0 <= to <= USER_VPN_END - pages or (start < to + pages and to < stop):
        raise KernelError(_EINVAL, f"mremap of {pages} pages from {start:#x} to {to:#x}")
    lock = mm_lock(machine, mm)
    yield from machine.down_write(lock)
    try:
        yield from _munmap(machine, mm, to, to + pages)
        machine.called("vma_to_resize")
        vma = vma_lookup(machine, mm, start)
        if vma is None or vma.end < stop:
            place = machine.names.place(mm, start, stop)
            raise KernelError(_EFAULT, f"{place}: not all in one mapping")
        yield from _move_vma(machine, vma, start, stop, to)
    finally:
        machine.up_write(lock)


def _move_vma(machine: Machine, vma: Vma, start: int, stop: int, to: int) -> Routine[None]:
    """A mapping at the new place, the words moved over, and the old place unmapped."""
    mm, pages = vma.mm, stop - start
    # A mapping without pages of its own forgets where it came from, to merge more easily.
    pgoff = vma.pgoff_of(start) if vma.anon_vma else to
    _, prev = find_vma_prev(machine, mm, to)
    new = vma_merge(machine, mm, prev, to, to + pages, vma.flags, vma.anon_vma, pgoff)
    if new is None:
        new = new_vma(machine, mm, to, to + pages, vma.flags, pgoff)
        anon_vma_clone(machine, new, vma)
    # The old one may have grown into the new one.
    vma = vma_lookup(machine, mm, start) or vma
    yield from move_page_tables(machine, vma, start, stop, to)
    yield from _munmap(machine, mm, start, stop)


@kernel("mm/mremap.c")
def move_page_tables(machine: Machine, vma: Vma, start: int, stop: int, to: int) -> Routine[None]:
    """Move words, or whole page tables where both places allow it, inside one UNMAP of the old."""
    root = mm_root(machine, vma.mm)
    range = MmuNotifierRange.one(vma.mm, Event.UNMAP, start, stop, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    for run in list(walk(machine, root, start, stop)):
        if run.row < 0:
            continue
        first, last = run.start, run.stop
        if (to - start) % PMD_PAGES == 0:  # whole tables: their words keep every bit
            head = min(last, -(-first // PMD_PAGES) * PMD_PAGES)
            tail = max(head, last // PMD_PAGES * PMD_PAGES)
            _move_words(machine, root, first, head, to - start)
            if head < tail:
                _move_tables(machine, root, head, tail, to - start)
            first = tail
        _move_words(machine, root, first, last, to - start)
    yield machine.step("What {range} held has moved to its new place.", vma.mm, start, stop)
    yield from invalidate_range_end(machine, range)


def _move_words(machine: Machine, root: int, start: int, stop: int, shift: int) -> None:
    """Move words one by one; each is marked soft-dirty, for its address has a new meaning."""
    words = read_range(machine, root, start, stop)
    if not words.any():
        if stop > start:
            alloc_tables(machine, root, start + shift, stop + shift)
        return
    alloc_tables(machine, root, start + shift, stop + shift)
    mark = np.where(is_present(words), np.uint64(SOFT_DIRTY), np.uint64(0))
    mark = np.where(is_swap_type(words), np.uint64(SWP_SOFT_DIRTY), mark)
    machine.write("pte", rows_of_range(machine, root, start, stop), 0)
    machine.write("pte", rows_of_range(machine, root, start + shift, stop + shift), words | mark)


def _move_tables(machine: Machine, root: int, start: int, stop: int, shift: int) -> None:
    """Hang page tables in at another place (``move_normal_pmd``)."""
    alloc_tables(machine, root, start + shift, stop + shift, "pmd")
    for at in np.arange(start, stop, PMD_PAGES).tolist():  # over page tables
        old = word_row(machine, root, at, "pmd")
        new = word_row(machine, root, at + shift, "pmd")
        word = machine["pmd"][old]
        machine.write("pmd", old, 0)
        machine.write("pmd", new, word)
