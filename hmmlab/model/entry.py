"""Bit layouts: the x86-64 PTE, swap-type entries, hmm_pfn, MIGRATE_PFN and the device's PTE.

Every function here works on whole arrays: words are uint64 of any shape, masks are bool of that
shape, frame numbers are int64 of that shape. A present word is what the CPU's page walker reads:

    bit  0  PRESENT       bit  5  ACCESSED    bit  9  SPECIAL (no struct page behind it)
    bit  1  RW            bit  6  DIRTY       bit 11  SOFT_DIRTY
    bit  2  USER          bit  8  PROTNONE    bit 63  NX
    bits 12-45  page frame number (stored inverted while PRESENT is clear)

A word that is neither empty nor present is a swap-type entry:

    bits 59-63  type      bits 9-58  offset, inverted     bit 3  EXCLUSIVE     bit 1  SOFT_DIRTY

Source: arch/x86/include/asm/pgtable_types.h, pgtable_64.h, include/linux/swapops.h, hmm.h,
migrate.h of Linux 6.1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.alike import alike, any_of, some
from hmmlab.model.geometry import MAX_PHYSMEM_BITS, PAGE_SHIFT
from hmmlab.model.rows import ascend, descend

__all__ = [
    "ACCESSED",
    "DEVICE_ATOMIC",
    "DEVICE_VALID",
    "DEVICE_WRITE",
    "DIRTY",
    "HMM_PFN_ERROR",
    "HMM_PFN_FLAGS",
    "HMM_PFN_ORDER_SHIFT",
    "HMM_PFN_REQ_FAULT",
    "HMM_PFN_REQ_WRITE",
    "HMM_PFN_VALID",
    "HMM_PFN_WRITE",
    "HUGE",
    "MIGRATE_PFN_MIGRATE",
    "MIGRATE_PFN_VALID",
    "MIGRATE_PFN_WRITE",
    "NX",
    "PFN_MASK",
    "PRESENT",
    "PROTNONE",
    "RW",
    "SOFT_DIRTY",
    "SPECIAL",
    "SWP_DEVICE_EXCLUSIVE_READ",
    "SWP_DEVICE_EXCLUSIVE_WRITE",
    "SWP_DEVICE_READ",
    "SWP_DEVICE_WRITE",
    "SWP_EXCLUSIVE",
    "SWP_MIGRATION_READ",
    "SWP_MIGRATION_READ_EXCLUSIVE",
    "SWP_MIGRATION_WRITE",
    "SWP_MIG_DIRTY",
    "SWP_MIG_YOUNG",
    "SWP_SOFT_DIRTY",
    "TABLE",
    "USER",
    "Bools",
    "Pfns",
    "Words",
    "device_pfn",
    "device_word",
    "has_pfn",
    "hmm_pfn_to_pfn",
    "is_device_exclusive",
    "is_device_private",
    "is_migration",
    "is_present",
    "is_swap_type",
    "is_swapped",
    "marks_and_pfns",
    "marks_of",
    "migrate_flags",
    "migrate_pfn",
    "migrate_pfn_to_pfn",
    "migration_marks",
    "migration_word",
    "pfn_of",
    "pfns_beside",
    "present_word",
    "repeats_device_private",
    "swap_offset",
    "swap_offset_pfn",
    "swap_type",
    "swap_word",
    "with_protection",
]

Words = NDArray[np.uint64]
Bools = NDArray[np.bool_]
Pfns = NDArray[np.int64]

# --- present words --------------------------------------------------------------------------------
PRESENT = 1 << 0
RW = 1 << 1
USER = 1 << 2
ACCESSED = 1 << 5
DIRTY = 1 << 6
PROTNONE = 1 << 8
SPECIAL = 1 << 9
SOFT_DIRTY = 1 << 11
NX = 1 << 63
PFN_MASK = ((1 << MAX_PHYSMEM_BITS) - 1) & ~((1 << PAGE_SHIFT) - 1)

#: Flags of a word that points to a table: PRESENT, RW, USER, ACCESSED, DIRTY.
TABLE = 0x67

#: Bit of a PMD word that maps 2 MiB at once (_PAGE_PSE); see :mod:`hmmlab.model.page_table`.
HUGE = 1 << 7

#: What a change of protection keeps of a word (``_PAGE_CHG_MASK``).
_KEPT_BY_PROTECTION = SPECIAL | ACCESSED | DIRTY | SOFT_DIRTY

# --- swap-type entries (MAX_SWAPFILES is 23 in the reference configuration) -----------------------
SWP_MIGRATION_READ = 23
SWP_MIGRATION_READ_EXCLUSIVE = 24
SWP_MIGRATION_WRITE = 25
SWP_DEVICE_WRITE = 26
SWP_DEVICE_READ = 27
SWP_DEVICE_EXCLUSIVE_WRITE = 28
SWP_DEVICE_EXCLUSIVE_READ = 29

SWP_SOFT_DIRTY = 1 << 1
SWP_EXCLUSIVE = 1 << 3

_TYPE_SHIFT = 59
_OFFSET_SHIFT = 9
_OFFSET_BITS = _TYPE_SHIFT - _OFFSET_SHIFT
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1
_SWP_PFN_BITS = MAX_PHYSMEM_BITS - PAGE_SHIFT
_SWP_PFN_MASK = (1 << _SWP_PFN_BITS) - 1

#: Bits of a migration entry's offset: the PTE it replaced was accessed, or dirty.
SWP_MIG_YOUNG = 1 << _SWP_PFN_BITS
SWP_MIG_DIRTY = 1 << (_SWP_PFN_BITS + 1)

#: From the bits ACCESSED and DIRTY of a word to those two of an offset.
_MARKS_SHIFT = SWP_MIG_YOUNG.bit_length() - ACCESSED.bit_length()
#: From the bit SOFT_DIRTY of a word to SWP_SOFT_DIRTY.
_SOFT_DIRTY_SHIFT = SOFT_DIRTY.bit_length() - SWP_SOFT_DIRTY.bit_length()

#: Every bit of a word.
_WORD = (1 << 64) - 1

# --- hmm_pfns (the request and the answer share the bits) -----------------------------------------
HMM_PFN_VALID = HMM_PFN_REQ_FAULT = 1 << 63
HMM_PFN_WRITE = HMM_PFN_REQ_WRITE = 1 << 62
HMM_PFN_ERROR = 1 << 61
HMM_PFN_ORDER_SHIFT = 56
HMM_PFN_FLAGS = 0xFF << HMM_PFN_ORDER_SHIFT

# --- migrate_vma src and dst ----------------------------------------------------------------------
MIGRATE_PFN_VALID = 1 << 0
MIGRATE_PFN_MIGRATE = 1 << 1
MIGRATE_PFN_WRITE = 1 << 3
_MIGRATE_PFN_SHIFT = 6

# --- the page table of the test device: the tags of its xarray as bits ----------------------------
DEVICE_VALID = 1 << 0
DEVICE_WRITE = 1 << 1
DEVICE_ATOMIC = 1 << 2


def is_present(words: Words) -> Bools:
    """Whether the kernel counts a word as present: PRESENT or, for PROT_NONE, PROTNONE."""
    return (words & (PRESENT | PROTNONE)) != 0


def is_swap_type(words: Words) -> Bools:
    """Whether a word is neither empty nor present (``is_swap_pte``)."""
    return (words != 0) & ~is_present(words)


def present_word(pfns: Pfns | int, prot: int) -> Words:
    """Word that maps ``pfns`` with the bits ``prot`` (``pfn_pte``)."""
    field = np.asarray(np.asarray(pfns, np.int64) << PAGE_SHIFT).view(np.uint64)
    if not prot & PRESENT:
        field = ~field & np.uint64(PFN_MASK)
    field |= np.uint64(prot)
    return field


def pfn_of(words: Words) -> Pfns:
    """Frame number that a present word names (``pte_pfn``)."""
    flipped = words
    if not np.bitwise_and.reduce(words, axis=None) & np.uint64(PRESENT):
        flipped = np.where((words & PRESENT) != 0, words, ~words)
    field = np.asarray(flipped & np.uint64(PFN_MASK))
    field >>= np.uint64(PAGE_SHIFT)
    return field.view(np.int64)


def with_protection(words: Words, prot: int) -> Words:
    """Present words with the protection bits ``prot``, as old as they were (``pte_modify``)."""
    prot &= ~_KEPT_BY_PROTECTION
    if prot & PRESENT and np.bitwise_and.reduce(words) & np.uint64(PRESENT):
        # Frame numbers stay as they are written.
        changed: Words = words & np.uint64(PFN_MASK | _KEPT_BY_PROTECTION)
        changed |= np.uint64(prot)
        return changed
    return present_word(pfn_of(words), prot) | (words & np.uint64(_KEPT_BY_PROTECTION))


def swap_word(types: NDArray[np.integer] | int, offsets: Pfns) -> Words:
    """Swap-type word of ``types`` and ``offsets`` (``swp_entry_to_pte``)."""
    words = (np.asarray(offsets, np.int64) << _OFFSET_SHIFT).view(np.uint64)
    rest = np.asarray(types).astype(np.uint64) << np.uint64(_TYPE_SHIFT)
    rest |= np.uint64(_OFFSET_MASK << _OFFSET_SHIFT)
    if words.size < rest.size:
        return words ^ rest
    words ^= rest
    return words


def swap_type(words: Words) -> NDArray[np.int64]:
    """Type of a swap-type word."""
    return (words >> np.uint64(_TYPE_SHIFT)).view(np.int64)


def swap_offset(words: Words) -> NDArray[np.int64]:
    """Offset of a swap-type word, flags of a migration entry included."""
    return ((~words >> np.uint64(_OFFSET_SHIFT)) & np.uint64(_OFFSET_MASK)).view(np.int64)


def swap_offset_pfn(words: Words) -> Pfns:
    """Frame number that a migration or device entry names (``swp_offset_pfn``)."""
    field = np.asarray(~words)
    field >>= np.uint64(_OFFSET_SHIFT)
    field &= np.uint64(_SWP_PFN_MASK)
    return field.view(np.int64)


def marks_of(words: Words) -> Words:
    """The words without the frames that they name, one for all where they are alike so.

    All that can be asked of a word besides its frame can be asked of its marks.
    """
    return _marks_and_field(words)[0]


def pfns_beside(words: Words, marks: Words) -> Pfns:
    """The frames that words name, all of them present, whose marks these are."""
    pfns = words ^ marks
    pfns >>= np.uint64(PAGE_SHIFT)
    return pfns.view(np.int64)


def marks_and_pfns(words: Words) -> tuple[Words, Pfns]:
    """The marks of words, uint64 of shape (n,), and the frames that they name; 0 for none.

    A present word names a frame, and so does a migration or device entry.
    """
    marks, field = _marks_and_field(words)
    if field == PFN_MASK:
        return marks, pfns_beside(words, marks)
    if field:
        return marks, swap_offset_pfn(words)
    named = np.where(has_pfn(marks), swap_offset_pfn(marks), 0)
    named = np.where(is_present(marks), pfn_of(marks), named)
    return marks, named if marks.size == words.size else np.broadcast_to(named, words.shape)


#: The least migration or device entry: no present word has bits so high.
_NAMES_A_FRAME = SWP_MIGRATION_READ << _TYPE_SHIFT


def _marks_and_field(words: Words) -> tuple[Words, int]:
    """The marks of words, and the bits in which all of them name their frames.

    0 where they name none or are of several kinds; then the words are their marks.
    """
    first = words.item(0) if words.size else 0
    if first & PRESENT:
        field = PFN_MASK
    elif first >= _NAMES_A_FRAME:
        field = _SWP_PFN_MASK << _OFFSET_SHIFT
    else:
        return alike(words), 0
    # The bits that all words have, and those that any has: to ask so leaves no array behind.
    every = int(np.bitwise_and.reduce(words))
    if not (int(np.bitwise_or.reduce(words)) ^ every) & ~field:
        return np.array([every & ~field], np.uint64), field
    if every & PRESENT if field == PFN_MASK else words.min() >= _NAMES_A_FRAME:
        return words & np.uint64(~field & _WORD), field
    return words, 0


def migration_word(words: Words, pfns: Pfns, writable: Bools, exclusive: Bools) -> Words:
    """Migration entries of ``pfns`` in place of ``words``, which keep the marks of those.

    ``words`` are present or device entries, or their marks; ``writable`` says more than
    ``exclusive``.
    """
    # The three types follow one another, from the least rights to the most.
    kind = np.maximum(exclusive.view(np.uint8), writable.view(np.uint8) << 1) + SWP_MIGRATION_READ
    kept = words & np.uint64(ACCESSED | DIRTY)  # which no device entry has
    kept <<= np.uint64(_MARKS_SHIFT + _OFFSET_SHIFT)
    present = is_present(words)
    soft_dirty = words & np.uint64(SWP_SOFT_DIRTY)
    if present.any():
        carried = (words & np.uint64(SOFT_DIRTY)) >> np.uint64(_SOFT_DIRTY_SHIFT)
        soft_dirty = carried if present.all() else np.where(present, carried, soft_dirty)
    kept |= soft_dirty
    entries = swap_word(kind, pfns)
    entries ^= kept  # an offset is written inverted
    return entries


def migration_marks(words: Words) -> Words:
    """ACCESSED, DIRTY and SOFT_DIRTY as a migration entry keeps them."""
    marks = ~words
    marks >>= np.uint64(_OFFSET_SHIFT + _MARKS_SHIFT)
    marks &= np.uint64(ACCESSED | DIRTY)
    marks |= (words & np.uint64(SWP_SOFT_DIRTY)) << np.uint64(_SOFT_DIRTY_SHIFT)
    return marks


def is_device_private(words: Words) -> Bools:
    """Whether a word names a device-private page, writable or not.

    Only a swap-type word has such a type, or one of those below: the bits of a present word that
    stand there are never set so.
    """
    kind = swap_type(words)
    return (kind == SWP_DEVICE_WRITE) | (kind == SWP_DEVICE_READ)


def repeats_device_private(words: Words, marks: Words) -> Bools:
    """Which words, of shape (n,), name a device-private page that one before them names too.

    ``marks`` are theirs. One for all where none does.
    """
    mine = is_device_private(marks)
    if not any_of(mine):
        return np.array([False])
    pfns = swap_offset_pfn(some(words, mine))
    if ascend(pfns) or descend(pfns):
        return np.array([False])
    found = np.zeros(words.size, np.bool_)
    private = np.flatnonzero(np.broadcast_to(mine, words.shape))
    order = np.argsort(pfns, kind="stable")
    again = np.flatnonzero(pfns[order][1:] == pfns[order][:-1]) + 1
    found[private[order[again]]] = True
    return found


def is_migration(words: Words) -> Bools:
    """Whether a swap-type word is a migration entry of any kind."""
    kind = swap_type(words)
    return (kind >= SWP_MIGRATION_READ) & (kind <= SWP_MIGRATION_WRITE)


def is_device_exclusive(words: Words) -> Bools:
    """Whether a swap-type word names a page that a device has to itself, writable or not."""
    kind = swap_type(words)
    return (kind == SWP_DEVICE_EXCLUSIVE_WRITE) | (kind == SWP_DEVICE_EXCLUSIVE_READ)


def is_swapped(words: Words) -> Bools:
    """Whether a swap-type word names a slot of a swap device."""
    return is_swap_type(words) & (swap_type(words) < SWP_MIGRATION_READ)


def has_pfn(words: Words) -> Bools:
    """Whether a swap-type word names a frame of memory: migration and device entries do."""
    kind = swap_type(words)
    return (kind >= SWP_MIGRATION_READ) & (kind <= SWP_DEVICE_EXCLUSIVE_READ)


def hmm_pfn_to_pfn(hmm_pfns: Words) -> Pfns:
    """Frame number in an hmm_pfn."""
    return (hmm_pfns & np.uint64((1 << HMM_PFN_ORDER_SHIFT) - 1)).view(np.int64)


def migrate_pfn(pfns: Pfns, flags: NDArray[np.unsignedinteger] | int = 0) -> Words:
    """A src or dst entry that names ``pfns`` (``migrate_pfn``: VALID is set), with ``flags``."""
    entries = (pfns << _MIGRATE_PFN_SHIFT).view(np.uint64)
    entries |= np.asarray(flags | np.uint64(MIGRATE_PFN_VALID))
    return entries


def migrate_pfn_to_pfn(entries: Words) -> Pfns:
    """Frame number of a src or dst entry that has VALID."""
    return (entries >> np.uint64(_MIGRATE_PFN_SHIFT)).view(np.int64)


def migrate_flags(entries: Words) -> NDArray[np.uint8]:
    """MIGRATE_PFN_* bits of src or dst entries, one for all where they are alike."""
    return alike(entries.astype(np.uint8) & np.uint8((1 << _MIGRATE_PFN_SHIFT) - 1))


def device_word(pfns: Pfns, flags: NDArray[np.uint64] | int) -> Words:
    """Word of a device page table: the backing page's frame and its DEVICE_* flags."""
    words = (pfns << PAGE_SHIFT).view(np.uint64)
    words |= np.asarray(flags, np.uint64)
    return words


def device_pfn(words: Words) -> Pfns:
    """Frame number in a device page-table word."""
    return (words >> np.uint64(PAGE_SHIFT)).view(np.int64)
