"""An operation of a learner's driver, and something that happens in the middle of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hmmlab.exercises.rules import Trial
from hmmlab.model.driver import Driver
from hmmlab.model.machine import Steps
from hmmlab.model.state import Rows

__all__ = ["LockWatch", "interrupt", "locked_out"]


class LockWatch:
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

    def began(self, number: int, text: str, actor: str) -> None:
        """Nothing to note."""

    def ended(self, number: int, result: Any) -> None:
        """Nothing to note."""

    def stepped(self, number: int, step: Any) -> None:
        """Nothing to note."""

    def wrote(self, column: str, rows: Rows, old: Any, new: Any) -> None:
        """Note it where nobody holds the lock."""
        if column == self.column and not any(self.trial.machine.holders(self.driver.lock)):
            self.unlocked.append(len(self.trial.trace))


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
