"""Migrations as a trace tells them: their phases, the two arrays, and what became of each page.

    (migration,) = migrations(trace, operation)
    migration.at(migration.phases["unmap"][1]).src
    migration.fates(len(trace))

Steps of a migration carry the ``MigrateVma`` as it was then; here they are put together again.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from hmmlab.model.entry import (
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    Bools,
    Words,
)
from hmmlab.model.migrate_vma import MigrateVma
from hmmlab.model.trace import Event, Trace

__all__ = ["PHASES", "Fate", "Migration", "letters", "migrations"]

#: What happens in a migration, in order: two phases of setup, then the driver and the kernel by
#: turns.
PHASES = ("collect", "unmap", "copy", "pages", "map", "finalize")

#: The kernel functions in which a phase begins.
_BEGIN = {
    "migrate_vma_setup": "collect",
    "migrate_device_unmap": "unmap",
    "migrate_vma_pages": "pages",
    "migrate_vma_finalize": "finalize",
}
#: What the driver does when it has its turn after a phase.
_DRIVER = {"collect": "copy", "unmap": "copy", "copy": "copy", "pages": "map", "map": "map"}


class Fate(enum.Enum):
    """What has become of a page so far; the value is the word for it."""

    LEFT_OUT = "left out"
    FROZEN = "frozen"
    EMPTY = "empty"
    GIVEN_BACK = "given back"
    COPIED = "copied"
    NEW = "new frame"
    NO_DST = "no dst"
    REFUSED = "refused"
    TAKEN = "taken"
    MOVED = "moved"
    FILLED = "filled"


_FATES = list(Fate)
_NUMBER = {fate: number for number, fate in enumerate(_FATES)}


@dataclass
class Migration:
    """One ``migrate_vma_setup`` of an operation and what followed it.

    Attributes
    ----------
    phases
        First and last position of each phase that took a step, by its name in :data:`PHASES`.
    told
        The arrays as steps told of them: a position, the phase it is in, and the migration.
    """

    phases: dict[str, tuple[int, int]] = field(default_factory=dict)
    told: list[tuple[int, str, MigrateVma]] = field(default_factory=list)

    @property
    def first(self) -> int:
        """Position after its first step."""
        return min(first for first, _ in self.phases.values())

    @property
    def mm(self) -> int:
        """Its address space."""
        vma = self.told[0][2].vma
        assert vma is not None
        return vma.mm

    def phase(self, position: int) -> str:
        """The phase that a position, at or after the first, is in or has come after."""
        begun = {first: phase for phase, (first, _) in self.phases.items() if first <= position}
        return begun[max(begun)]

    def at(self, position: int) -> MigrateVma | None:
        """The arrays as they were told last; None before the first time."""
        known = [migrate for when, _, migrate in self.told if when <= position]
        return known[-1] if known else None

    def fates(self, position: int) -> list[Fate]:
        """What has become of each page by then; empty before anything was told."""
        known = [(phase, migrate) for when, phase, migrate in self.told if when <= position]
        if not known:
            return []
        phase, now = known[-1]
        valid, wanted = now.valid, now.migrating
        given = (now.dst & np.uint64(MIGRATE_PFN_VALID)) != 0
        ever_valid = np.logical_or.reduce([migrate.valid for _, migrate in known])
        ever_wanted = np.logical_or.reduce([migrate.migrating for _, migrate in known])
        words = np.full(valid.size, _NUMBER[Fate.LEFT_OUT])

        def say(fate: Fate, which: Bools) -> None:
            words[which] = _NUMBER[fate]

        # What a page without MIGRATE has come to; the later line is the closer one.
        say(Fate.NO_DST, ever_wanted)
        say(Fate.TAKEN, ever_wanted & given)
        say(Fate.GIVEN_BACK, ever_valid)
        say(Fate.NO_DST, valid)
        say(Fate.REFUSED, valid & given)
        if phase in ("collect", "unmap"):
            say(Fate.FROZEN, wanted & valid)
            say(Fate.EMPTY, wanted & ~valid)
        elif phase == "copy":
            say(Fate.NO_DST, wanted)
            say(Fate.COPIED, wanted & valid & given)
            say(Fate.NEW, wanted & ~valid & given)
        else:
            say(Fate.MOVED, wanted & valid)
            say(Fate.FILLED, wanted & ~valid)
        return [_FATES[number] for number in words.tolist()]


def letters(words: Words) -> list[str]:
    """Flags of src or dst words as letters: V valid, M migrate, W write; "0" where none is set."""
    flags = ((MIGRATE_PFN_VALID, "V"), (MIGRATE_PFN_MIGRATE, "M"), (MIGRATE_PFN_WRITE, "W"))
    return [
        "".join(letter for bit, letter in flags if word & bit) or "0" for word in words.tolist()
    ]


def migrations(trace: Trace, operation: int) -> list[Migration]:
    """The migrations of an operation that collected anything, in order."""
    asked = trace.operations[operation]
    last = asked.last if asked.finished else len(trace)
    found: list[Migration] = []
    phase, depth = "", 0
    for position in range(asked.first + 1, last + 1):
        event = trace.events[position - 1]
        if event.operation != operation:
            continue
        for level, function in _turns(event):
            if function == "migrate_vma_setup":
                found.append(Migration())
                depth = level
            if function in _BEGIN:
                phase = _BEGIN[function] if found else ""
            elif level <= depth:
                phase = _DRIVER.get(phase, "")
        if phase:
            found[-1].phases[phase] = found[-1].phases.get(phase, (position, 0))[0], position
            if isinstance(event.step.detail, MigrateVma):
                found[-1].told.append((position, phase, event.step.detail))
    return [migration for migration in found if migration.told]


def _turns(event: Event) -> Iterator[tuple[int, str]]:
    """The functions entered on the way to a step, and the one that took it."""
    step = event.step
    yield from step.calls
    if (step.depth, step.function) not in step.calls and step.function not in _BEGIN:
        yield step.depth, step.function
