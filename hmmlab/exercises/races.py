"""Those who listen to a trial, and what happens in the middle of a driver's operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hmmlab.exercises.rules import Trial
from hmmlab.model.driver import Driver
from hmmlab.model.machine import Machine, Steps
from hmmlab.model.mmu_notifier import MmuNotifierRange, mmu_interval_set_seq
from hmmlab.model.rows import Rows

__all__ = ["LockWatch", "Subscriber", "WriteWatch", "interrupt", "locked_out"]


class WriteWatch:
    """An observer that hears of writes alone; what it does with one, ``wrote`` says."""

    def began(self, number: int, text: str, actor: str) -> None:
        """Nothing to note."""

    def ended(self, number: int, result: Any) -> None:
        """Nothing to note."""

    def stepped(self, number: int, step: Any) -> None:
        """Nothing to note."""


class LockWatch(WriteWatch):
    """An observer that notes writes to a column while a driver's lock is not held.

    Attributes
    ----------
    unlocked
        Positions of the trace at which it happened.
    """

    def __init__(self, trial: Trial, driver: Driver, column: str) -> None:
        self.trial, self.driver, self.column = trial, driver, column
        self.unlocked: list[int] = []
        trial.machine.attach(self)

    def wrote(self, column: str, rows: Rows, old: Any, new: Any) -> None:
        """Note it where nobody holds the lock."""
        if column == self.column and not any(self.trial.machine.holders(self.driver.lock)):
            self.unlocked.append(len(self.trial.trace))


class Subscriber:
    """Notes the number, as every driver must, so that look-ups see a change; it has no table."""

    takes_series = False

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def invalidate(self, subscription: int, range: MmuNotifierRange, cur_seq: int) -> bool:
        """Note the number."""
        mmu_interval_set_seq(self.machine, subscription, cur_seq)
        return True


def interrupt(trial: Trial, steps: Steps, after: int, meanwhile: Callable[[], Any]) -> Any:
    """Take ``after`` steps, let something happen, and go on to the end.

    Raises
    ------
    Wrong, KernelError
        As :meth:`Trial.finish`; what happens meanwhile may wait for nothing.
    """
    for _ in range(after):
        if next(steps, None) is None:
            break
    meanwhile()
    return trial.finish(steps)


def locked_out(trial: Trial, driver: Driver, steps: Steps, meanwhile: Callable[[], Any]) -> Any:
    """Run a look-up whose driver's lock is taken when it wants to map.

    When the lock is given up, ``meanwhile`` comes first.
    """
    for step in steps:  # until it has looked, and goes on to map
        if step.function == "walk_page_range":
            break
    trial.machine.write("lock.writer", driver.lock, 1)
    for step in steps:
        if step.lock:
            break
    trial.machine.write("lock.writer", driver.lock, 0)
    meanwhile()
    return trial.finish(steps)
