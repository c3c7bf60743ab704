"""Page size, page-table levels, and the way from an address to its indices.

x86-64 with four levels: each table is one 4 KiB page of 512 words of eight bytes.

    63        48 47     39 38     30 29     21 20     12 11         0
    [ sign ext ] [  PGD  ] [  PUD  ] [  PMD  ] [  PTE  ] [  offset  ]

``va`` is a virtual address in bytes; ``vpn`` is a virtual page number, ``va >> 12``; ``pfn`` is a
page frame number. Ranges are half-open.
"""

from __future__ import annotations

__all__ = [
    "ENTRIES",
    "LEVELS",
    "LEVEL_PAGES",
    "LEVEL_SHIFT",
    "MAX_PHYSMEM_BITS",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "PMD_PAGES",
    "PUD_PAGES",
    "SECTION_PAGES",
    "USER_VPN_END",
    "align_down",
    "align_up",
    "index",
]

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT

#: Words in one table of any level.
ENTRIES = 512

#: From the root to the leaf.
LEVELS = ("pgd", "pud", "pmd", "pte")

#: How far a vpn is shifted to give the index into a table of this level.
LEVEL_SHIFT = {"pgd": 27, "pud": 18, "pmd": 9, "pte": 0}

#: Pages that one word of a table of this level covers.
LEVEL_PAGES = {level: 1 << shift for level, shift in LEVEL_SHIFT.items()}

PMD_PAGES = LEVEL_PAGES["pmd"]
PUD_PAGES = LEVEL_PAGES["pud"]

#: First vpn above user space (47 address bits).
USER_VPN_END = 1 << 35

#: Bits of a physical address (x86-64 with four levels; arch/x86/include/asm/sparsemem.h).
MAX_PHYSMEM_BITS = 46

#: Pages of one memory section, 128 MiB: the unit of memory hotplug.
SECTION_PAGES = 1 << 15


def index(vpn: int, level: str) -> int:
    """Index of ``vpn`` in a table of ``level``."""
    return (vpn >> LEVEL_SHIFT[level]) & (ENTRIES - 1)


def align_down(vpn: int, pages: int) -> int:
    """Largest multiple of ``pages`` (a power of two) that is not above ``vpn``."""
    return vpn & -pages


def align_up(vpn: int, pages: int) -> int:
    """Smallest multiple of ``pages`` (a power of two) that is not below ``vpn``."""
    return (vpn + pages - 1) & -pages
