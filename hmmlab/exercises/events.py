"""Exercises on why a driver is called (notebook 06)."""

from __future__ import annotations

from typing import Any

from hmmlab.exercises.promise import first_break
from hmmlab.exercises.rules import Exercise, Trial
from hmmlab.model.machine import KernelError
from hmmlab.model.mmu_notifier import MmuNotifierRange
from hmmlab.model.test_hmm import Dmirror

__all__ = ["Ignorable"]


class Ignorable(Exercise):
    """Pick the calls that a driver may ignore.

    `event` is an `Event`, `owner` the device that makes the change itself, or 0, and `me` the
    number of this device. Return True where this driver, which maps what it migrates, may leave
    its table as it is. Ignore all that you may, and nothing else.
    """

    answer = "ignore"
    starter = """
from hmmlab.model.mmu_notifier import Event


def ignore(event, owner, me):
    ...
"""
    model_answer = """
        from hmmlab.model.mmu_notifier import Event


        def ignore(event, owner, me):
            return event is Event.MIGRATE and owner == me
    """
    hints = (
        "Who makes the change? There is one that the driver makes, and cleans up after, itself.",
        "Another device's migration takes pages away from this one, under the same event.",
        "The event says what, the owner says who: it takes both.",
    )

    def rule(self, answer: Any, trial: Trial) -> None:
        """With what is left of the calls no entry is stale, and what is its own is not told."""
        process, rng = trial.process, trial.rng
        told: list[tuple[str, int]] = []

        class Picky(Dmirror):
            takes_series = False

            def invalidate(self, subscription: int, range: MmuNotifierRange, cur_seq: int) -> Any:
                if answer(range.event, range.owner, self.device):
                    return True
                told.append((range.event.name, range.owner))
                return super().invalidate(subscription, range, cur_seq)

        device, rival = process.attach(Picky, "d0", 1), process.attach(Dmirror, "d1", 2)
        changes = [
            ("read", lambda some: process.mprotect(some, "r")),
            ("write", lambda some: process.madvise(some, "dontneed")),
            ("read", process.munmap),
            ("write", lambda some: process.clear_refs()),
            ("read", rival.to_dev),
            ("read", device.to_dev),
        ]
        for which in rng.permutation(len(changes)).tolist():
            access, change = changes[which]
            some = process.mmap(4)
            process.store(some, 7)
            device.read(some) if access == "read" else device.write(some, 8)
            since = len(trial.trace)
            told.clear()
            try:
                change(some)
            except KernelError as error:
                raise trial.wrong(f"The device's own migration went wrong: {error}.") from None
            broken = first_break(trial.trace, some, device.file, since=since)
            if broken:
                raise trial.wrong(f"{_last(trial)}: {broken[1]}", broken[0])
            own = [name for name, owner in told if owner == device.device]
            if own:
                why = f"{own[0]} of its own was not ignored: the driver forgot what it maps itself."
                raise trial.wrong(why, since + 1)


def _last(trial: Trial) -> str:
    return trial.trace.operations[-1].text
