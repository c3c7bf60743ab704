"""One scenario told in all eras: the calls of each kernel, moment by moment, side by side.

    print(side_by_side())
    print(side_by_side("during", change="mprotect"))
    print(side_by_side("hole", eras=tuple(DRIVERS)))
    print(side_by_side("memory"))

Every column is run: each era has a driver of its own on a machine of its own, and a cell holds what
that driver called and was called in that moment. Eras in which nothing of the table changes are
left out unless they are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from hmmlab.model.entry import DEVICE_WRITE, RW, device_pfn, is_present, pfn_of
from hmmlab.model.history.drivers import Driver61, DriverToday, EraDriver
from hmmlab.model.history.era import Era
from hmmlab.model.history.interval_drivers import Driver55, Driver57
from hmmlab.model.history.memory_drivers import MEMORY_DRIVERS, MemoryDriver
from hmmlab.model.history.mirror_drivers import (
    Driver52,
    Driver53,
    Driver54,
    Driver414,
    Driver417,
    Driver420,
    Driver2017,
)
from hmmlab.model.machine import KernelError, Machine, Steps
from hmmlab.model.mm_types import mm_root
from hmmlab.model.page_table import read_range
from hmmlab.model.process import Process
from hmmlab.model.region import Pages
from hmmlab.model.schedule import interleave
from hmmlab.model.trace import Step

__all__ = ["CHANGES", "COLUMNS", "DRIVERS", "SCENARIOS", "SideBySide", "side_by_side"]

#: The driver of each era.
DRIVERS: dict[Era, type[EraDriver]] = {
    kind.era: kind
    for kind in (
        Driver2017,
        Driver414,
        Driver417,
        Driver420,
        Driver52,
        Driver53,
        Driver54,
        Driver55,
        Driver57,
        Driver61,
        DriverToday,
    )
}

#: The eras that are told when nobody says which.
COLUMNS = (Era.APRIL_2017, Era.V4_14, Era.V5_2, Era.V5_4, Era.V6_1, Era.TODAY)

_RAM_PAGES = 4096
_PAGES, _CHANGED = 8, 4


@dataclass(frozen=True)
class SideBySide:
    """A scenario in several eras.

    Attributes
    ----------
    scenario
        What happens, in words.
    eras
        The columns, oldest first.
    moments
        The rows, in order.
    cells
        The calls of each moment and era.
    """

    scenario: str
    eras: tuple[Era, ...]
    moments: tuple[str, ...]
    cells: dict[tuple[str, Era], tuple[str, ...]]

    def row(self, moment: str) -> dict[Era, tuple[str, ...]]:
        """What each era calls at one moment."""
        return {era: self.cells[moment, era] for era in self.eras}

    def column(self, era: Era) -> dict[str, tuple[str, ...]]:
        """What one era calls, moment by moment."""
        return {moment: self.cells[moment, era] for moment in self.moments}

    def __str__(self) -> str:
        head = ["", *(era.label for era in self.eras)]
        body = [
            lines
            for moment in self.moments
            for lines in zip_longest(
                [moment], *(self.cells[moment, era] for era in self.eras), fillvalue=""
            )
        ]
        table = [head, *(list(lines) for lines in body)]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        rows = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in table]
        return "\n".join([self.scenario, *(row.rstrip() for row in rows)])


# --- what the CPU does ----------------------------------------------------------------------------

#: What the CPU does with the first pages of the range, by name.
CHANGES: dict[str, Callable[[Process, Pages], Steps]] = {
    "dontneed": lambda process, pages: process.steps.madvise(pages, "dontneed"),
    "munmap": lambda process, pages: process.steps.munmap(pages),
    "mprotect": lambda process, pages: process.steps.mprotect(pages, "r"),
    "mremap": lambda process, pages: process.steps.mremap(pages),
    "fork": lambda process, pages: process.steps.fork(),
    "pageout": lambda process, pages: process.steps.madvise(pages, "pageout"),
    "migrate": lambda process, pages: process.files["other"].steps.to_dev(pages),
    "store": lambda process, pages: process.steps.store(pages, 900),
}


# --- what happens ---------------------------------------------------------------------------------


class _Stage:
    """A process, a device of some era, and eight written pages; the CPU will change four."""

    def __init__(self, era: Era, change: str) -> None:
        self.era, self.machine = era, Machine(_RAM_PAGES)
        self.process = Process(self.machine)
        self.device: EraDriver = DRIVERS[era](self.process, "d0")
        self.process.files["d0"] = self.device
        if change == "migrate":
            self.process.open(1, "other")
        self.pages = self.process.mmap(_PAGES)
        self.process.store(self.pages, range(100, 100 + _PAGES))
        self.change = change
        self.read = self.device.steps.read

    @functools.cached_property
    def card(self) -> MemoryDriver:
        """A card with memory of its own, in place of the device."""
        return MEMORY_DRIVERS[self.era](self.process)

    @functools.cached_property
    def cpu(self) -> Steps:
        """What the CPU does, not yet begun when it is asked for first."""
        return CHANGES[self.change](self.process, self.pages[:_CHANGED])

    def until(self, steps: Steps, done: Callable[[Step], bool]) -> None:
        """Advance an operation until a step is the one, or it has to wait, or it ends."""
        try:
            for step in steps:
                if step.lock:
                    self.device.note(f"(waits for {step.lock})")
                if step.lock or done(step):
                    return
        except KernelError as error:
            self.device.note(f"(refused: {error.args[0].split(':')[0]})")

    def outcome(self) -> tuple[str, ...]:
        """How many entries of the device name another frame than the CPU's, or allow more."""
        start, stop = self.pages.start, self.pages.stop
        mine = self.device.entries(start, stop)
        cpu = read_range(self.machine, mm_root(self.machine, self.process.mm), start, stop)
        same = is_present(cpu) & (pfn_of(cpu) == device_pfn(mine))
        too_much = ((mine & np.uint64(DEVICE_WRITE)) != 0) & ((cpu & np.uint64(RW)) == 0)
        stale = (mine != 0) & (~same | too_much)
        count = int(np.count_nonzero(stale))
        return (f"stale entries: {count}",)


Moments = Iterator[tuple[str, tuple[str, ...]]]


def _reads(stage: _Stage) -> Moments:
    """The device reads the range, and closes."""
    device = stage.device
    device.open()
    yield "the device opens", device.take_calls()
    stage.until(stage.read(stage.pages), lambda step: False)
    yield "it reads", device.take_calls()
    yield "so the device has", stage.outcome()
    device.close()
    yield "the device closes", device.take_calls()


def _hole(stage: _Stage) -> Moments:
    stage.process.munmap(stage.pages[2:4])
    yield from _reads(stage)


def _untouched(stage: _Stage) -> Moments:
    stage.process.madvise(stage.pages, "dontneed")
    stage.process.load(stage.pages)  # so each page is the zero page
    yield from _reads(stage)


def _between(stage: _Stage) -> Moments:
    device = stage.device
    device.open()
    yield "the device opens", device.take_calls()
    read = stage.read(stage.pages)
    stage.until(read, lambda step: step.function == "looked")
    yield "it looks the range up", device.take_calls()
    stage.until(stage.cpu, lambda step: False)
    yield "the CPU changes the range", (*device.take_calls(), device.counter())
    stage.until(read, lambda step: False)
    yield "it takes its lock", device.take_calls()
    stage.until(stage.cpu, lambda step: False)
    yield "the CPU goes on, if it had to wait", device.take_calls()
    yield "so the device has", stage.outcome()
    device.close()
    yield "the device closes", device.take_calls()


def _during(stage: _Stage) -> Moments:
    device = stage.device
    device.open()
    yield "the device opens", device.take_calls()
    stage.until(stage.cpu, lambda step: step.function == device.told_in)
    yield "the CPU begins a change", (*device.take_calls(), device.counter())
    read = stage.read(stage.pages)
    stage.until(read, lambda step: step.function in ("looked", "hmm_range_wait_until_valid"))
    yield "the device looks the range up", device.take_calls()
    stage.until(stage.cpu, lambda step: False)
    yield "the CPU ends the change", (*device.take_calls(), device.counter())
    interleave([steps for steps in (read, stage.cpu) if not steps.ended])
    yield "the device takes its lock", device.take_calls()
    yield "so the device has", stage.outcome()
    device.close()
    yield "the device closes", device.take_calls()


def _memory(stage: _Stage) -> Moments:
    card, process, pages = stage.card, stage.process, stage.pages
    process.run("the card gets memory", card.add())
    yield "the card gets memory", card.take_calls()
    process.run("it takes the pages", card.take(pages))
    yield "it takes the pages", card.take_calls()
    yield "so on the card are", (f"pages: {card.held(pages)}",)
    values = process.load(pages[1:2]).tolist()
    yield "the CPU reads page 1", (*card.take_calls(), f"(reads {values[0]})")
    process.munmap(pages)
    yield "the CPU unmaps all", card.take_calls()
    process.run("the card goes", card.remove())
    yield "the card goes", card.take_calls()


#: What happens, by name: a sentence, and the moments of it.
SCENARIOS: dict[str, tuple[str, Callable[[_Stage], Moments]]] = {
    "between": (
        "A device faults eight pages; between its look and its lock the CPU changes four.",
        _between,
    ),
    "during": ("A device faults eight pages while a change of four of them runs.", _during),
    "hole": ("A device faults eight pages, of which the CPU has unmapped two.", _hole),
    "untouched": ("A device faults eight pages that the CPU has only read.", _untouched),
    "memory": ("A card takes eight pages to its own memory; the CPU reads one of them.", _memory),
}


def side_by_side(
    scenario: str = "between",
    *,
    change: str = "dontneed",
    eras: Sequence[Era] = COLUMNS,
) -> SideBySide:
    """Run a scenario in several eras.

    Parameters
    ----------
    scenario
        A name in :data:`SCENARIOS`.
    change
        A name in :data:`CHANGES`: what the CPU does meanwhile, in ``between`` and ``during``.
    eras
        The columns; each must have a driver.

    Raises
    ------
    ValueError
        For a name or an era that is none of these.
    """
    for name, known in ((scenario, SCENARIOS), (change, CHANGES)):
        if name not in known:
            raise ValueError(f"{name!r}; expected one of {', '.join(known)}")
    missing = [era.label for era in eras if era not in DRIVERS]
    if missing:
        raise ValueError(f"no driver for {', '.join(missing)}")
    sentence, moments_of = SCENARIOS[scenario]
    cells: dict[tuple[str, Era], tuple[str, ...]] = {}
    moments: dict[str, None] = {}
    for era in eras:
        for moment, calls in moments_of(_Stage(era, change)):
            moments[moment] = None
            cells[moment, era] = calls
    return SideBySide(sentence, tuple(eras), tuple(moments), cells)
