"""What the lookups of 2017 to 2020 find in page tables, and the two waits that all of them know.

Every walk of those years tells the same kinds of words apart; they differ in what they answer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hmmlab.model.entry import (
    RW,
    SWP_DEVICE_WRITE,
    Bools,
    Pfns,
    Words,
    is_device_private,
    is_migration,
    is_present,
    is_swap_type,
    is_swapped,
    pfn_of,
    swap_offset_pfn,
    swap_type,
)
from hmmlab.model.machine import Machine
from hmmlab.model.trace import Step

__all__ = ["Found", "cannot_be_written", "find", "migration_entry_wait"]


class Found(NamedTuple):
    """What some words are: arrays of one value a word.

    ``present`` maps a page, ``private`` names one in device memory, ``swapped`` one in swap;
    ``moving`` waits for a migration; ``odd`` is any other word that is not empty. ``writable`` and
    ``frames`` (0 for none) are those of present and private words.
    """

    present: Bools
    private: Bools
    swapped: Bools
    moving: Bools
    odd: Bools
    writable: Bools
    frames: Pfns


def find(words: Words) -> Found:
    """Tell some words apart."""
    present, swap = is_present(words), is_swap_type(words)
    private = swap & is_device_private(words)
    moving = swap & is_migration(words)
    swapped = is_swapped(words)
    writable = np.where(private, swap_type(words) == SWP_DEVICE_WRITE, (words & RW) != 0)
    return Found(
        present,
        private,
        swapped,
        moving,
        swap & ~private & ~moving & ~swapped,
        writable & (present | private),
        np.where(present, pfn_of(words), np.where(private, swap_offset_pfn(words), 0)),
    )


def migration_entry_wait(machine: Machine, mm: int, vpn: int) -> Step:
    """The step of a walk that waits until the migration of page ``vpn`` ends."""
    text = "It waits until the migration of {range} ends."
    return machine.step(text, mm, vpn, vpn + 1, lock="migration_entry_wait")


def cannot_be_written(machine: Machine, mm: int, start: int, stop: int) -> Step:
    """The step of a walk that faults without end, for until 5.3 nobody asks what is allowed."""
    text = "{range} cannot be written; it faults, and faults again."
    return machine.step(text, mm, start, stop, lock="the right to write")
