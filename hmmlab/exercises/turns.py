"""An exercise on orders of turns (notebook 03): find the one in which a driver is overtaken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hmmlab.exercises.rules import Exercise, Trial, Wrong
from hmmlab.invariants.promise import broken_promise
from hmmlab.model.driver import Driver
from hmmlab.model.hmm import HmmRange
from hmmlab.model.machine import Machine, Routine, Steps
from hmmlab.model.process import Process
from hmmlab.model.race import Race, Run

__all__ = ["CheckThenLock", "LostUpdate", "discard_and_read"]


class CheckThenLock(Driver):
    """A driver that asks whether its answer holds, and takes its lock a moment later."""

    def look(self, range: HmmRange) -> Routine[None]:
        """Look until the answer holds; returns with the lock, but not the one it asked under."""
        yield from super().look(range)
        self.machine.up_write(self.lock)
        yield self.machine.step(
            "The answer for {range} holds, so it will be mapped.", range.mm, range.start, range.end
        )
        yield from self.machine.down_write(self.lock)


def discard_and_read(
    driver: type[Driver], count: int = 4, discarded: slice = slice(0, 2)
) -> Callable[[], dict[str, Steps]]:
    """A race: the CPU throws pages away while the device reads all of them."""

    def build() -> dict[str, Steps]:
        process = Process(Machine(ram_pages=4096))
        pages = process.mmap(count)
        process.store(pages, np.arange(100, 100 + count))
        device = process.attach(driver)
        cpu = process.steps.madvise(pages[discarded], "dontneed")
        return {"CPU": cpu, "device": device.steps.read(pages)}

    return build


class LostUpdate(Exercise):
    """Find an order of turns in which `CheckThenLock` loses an update.

    The CPU discards the first pages of a region, while the device reads the whole. When both have
    returned, another process fills some new pages with 7. Then the process stores 500 in page 0,
    and the device reads page 0. It should read 500.

    Answer with the `order` of turns, a word of `c` (CPU) and `d` (device). When it ends, the CPU
    goes on to its end, and then the device.
    """

    rounds = 3
    answer = "order"
    starter = 'order = "..."'
    hints = (
        "It must look before the pages are thrown away, and map after they are.",
        "When it asks whether the answer still holds, the answer must still hold. The change comes "
        "after that question, and before the lock.",
        "Let the device go on until it says that it will map. Then let the CPU go on to its end.",
    )

    def solution(self) -> str:
        """The first order that a search through all of them finds."""
        found = Race(discard_and_read(CheckThenLock)).every_order(broken_promise)
        return f'{self.answer} = "{found.first}"'

    def rule(self, answer: Any, trial: Trial) -> None:
        """The careless driver reads something else than 500 then, and the correct one reads 500."""
        count = int(trial.rng.integers(3, 9))
        discarded = slice(0, int(trial.rng.integers(1, count)))
        run, data = self._read_after(CheckThenLock, str(answer), count, discarded)
        if data == 500:
            assert run.trace is not None
            why = "The device reads 500: in this order nothing was lost."
            raise Wrong(why, run.trace, len(run.trace))
        correct, data = self._read_after(Driver, str(answer), count, discarded)
        assert data == 500, f"the correct driver reads {data} after {correct.order}"

    @staticmethod
    def _read_after(
        driver: type[Driver], order: str, count: int, discarded: slice
    ) -> tuple[Run, int]:
        run = Race(discard_and_read(driver, count, discarded)).run(order)
        run.finish()
        process = next(iter(run.machine.objects["process"].values()))
        page = process.region("A", count)[0]
        other = Process(run.machine, "other")
        other.store(other.mmap(count), 7)  # the frames that were given up are somebody else's now
        process.store(page, 500)
        return run, int(process.files["d0"].read(page)[0])
