"""What a page can be in each of the two page tables, and how each state looks.

A state is told by its glyph as well as by its colour. The colours are those of Okabe and Ito, which
people with any colour vision keep apart, with tints and greys around them; a hue means the same in
both tables: blues map RAM, orange and vermilion map device memory.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CPU_STATES", "DEVICE_STATES", "PageState"]


@dataclass(frozen=True, slots=True)
class PageState:
    """One state of a page in a page table.

    Attributes
    ----------
    code
        Its number in an array of states, and its place in the tuple below.
    name
        What a label and the legend call it.
    short
        What the state line calls it.
    glyph
        One character, drawn in the page's cell.
    colour_light, colour_dark
        Colour of the cell in a light and in a dark theme.
    sentence
        What it means.
    """

    code: int
    name: str
    short: str
    glyph: str
    colour_light: str
    colour_dark: str
    sentence: str


#: The states of a page in the table that the CPU walks.
CPU_STATES = (
    PageState(
        0, "no mapping", "unmapped", "/", "#fafafa", "#161616",
        "No VMA covers the page: touching it ends in SIGSEGV.",
    ),
    PageState(
        1, "empty", "empty", "·", "#e2e2e2", "#3b3b3b",
        "A VMA covers the page and its PTE is empty: the first touch is a page fault.",
    ),
    PageState(
        2, "zero page", "zero", "0", "#c9e6f7", "#aecbdc",
        "Mapped read-only to the one zero page that all readers share.",
    ),
    PageState(
        3, "read-only", "ro", "r", "#56b4e9", "#56b4e9",
        "Mapped to a frame; the CPU may read it, and a write is a page fault.",
    ),
    PageState(
        4, "read-write", "rw", "w", "#0072b2", "#1673ad",
        "Mapped to a frame that the CPU may read and write.",
    ),
    PageState(
        5, "no access", "none", "×", "#8c8c8c", "#808080",
        "Mapped to a frame, but PROT_NONE: any touch ends in SIGSEGV.",
    ),
    PageState(
        6, "on the device (read-write)", "on device", "D", "#d55e00", "#d96a14",
        "A device-private entry: the data is in device memory, and a touch by the CPU brings it "
        "back. The entry is writable.",
    ),
    PageState(
        7, "on the device (read-only)", "on device ro", "d", "#e69f00", "#e69f00",
        "A device-private entry: the data is in device memory, and a touch by the CPU brings it "
        "back. The entry is read-only.",
    ),
    PageState(
        8, "device-exclusive", "exclusive", "e", "#cc79a7", "#cc79a7",
        "The frame stays in RAM, but for now only the device may touch it; the CPU takes it back "
        "with a page fault.",
    ),
    PageState(
        9, "migration entry", "migrating", "m", "#009e73", "#0fa67c",
        "The page is on its way: whoever touches it waits until the migration has ended.",
    ),
    PageState(
        10, "swapped out", "swapped", "s", "#8f7ac2", "#9a86cc",
        "The data is in swap; a touch reads it back.",
    ),
    PageState(
        11, "device-coherent", "coherent", "c", "#a8431f", "#c25a35",
        "Mapped to device memory that the CPU can reach by itself.",
    ),
    PageState(
        12, "huge, read-write", "huge rw", "H", "#00496f", "#8fd0f5",
        "Part of a huge page that the CPU may read and write: one PMD word maps all 512 pages.",
    ),
    PageState(
        13, "huge, read-only", "huge ro", "h", "#7fa8c4", "#6f9ab5",
        "Part of a huge page that the CPU may only read: one PMD word maps all 512 pages.",
    ),
)  # fmt: skip

#: The states of a page in the table of the device.
DEVICE_STATES = (
    PageState(
        0, "not mapped", "unmapped", "·", "#e2e2e2", "#3b3b3b",
        "The device has no entry: its next access has to ask the CPU's table.",
    ),
    PageState(
        1, "read-only", "ro", "r", "#56b4e9", "#56b4e9",
        "The device reads the frame in RAM; a write has to ask the CPU's table.",
    ),
    PageState(
        2, "read-write", "rw", "w", "#0072b2", "#1673ad",
        "The device reads and writes the frame in RAM.",
    ),
    PageState(
        3, "read-only in device memory", "ro local", "d", "#e69f00", "#e69f00",
        "The data is in the device's own memory, and the entry is read-only.",
    ),
    PageState(
        4, "read-write in device memory", "rw local", "D", "#d55e00", "#d96a14",
        "The data is in the device's own memory, and the entry is writable.",
    ),
    PageState(
        5, "exclusive", "exclusive", "e", "#cc79a7", "#cc79a7",
        "The device alone may touch the frame, for atomic operations.",
    ),
    PageState(
        6, "stale", "stale", "!", "#f0e442", "#f0e442",
        "The entry names a frame that the CPU's table no longer maps: what a mirror must never "
        "keep.",
    ),
)  # fmt: skip
