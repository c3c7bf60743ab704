"""Exercises on what a driver answers when it is called (notebook 06)."""

from __future__ import annotations

from typing import Any

import numpy as np

from hmmlab.exercises.rules import Exercise, Trial
from hmmlab.invariants.promise import first_break
from hmmlab.model.driver import Driver
from hmmlab.model.entry import DEVICE_ATOMIC
from hmmlab.model.machine import KernelError
from hmmlab.model.mmu_notifier import MmuNotifierRange
from hmmlab.model.oom_kill import oom_reap_task_mm
from hmmlab.model.region import Pages
from hmmlab.model.test_hmm import Dmirror

__all__ = ["AnswerAtOnce", "Ignorable"]


class Ignorable(Exercise):
    """Pick the calls that a driver may ignore.

    `event` is an `Event`, `owner` the number of the device that makes the change itself, or 0, and
    `me` the number of this device. Return True where this driver, which maps what it migrates, may
    leave its table as it is. Ignore all that you may, and nothing else.
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
        "The event says what, the owner says who. What others do to your pages is your business.",
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
            ("write", lambda some: process.fork()),
            ("read", rival.to_dev),
            ("read", device.to_dev),
            ("exclusive", process.load),
        ]
        for which in rng.permutation(len(changes)).tolist():
            access, change = changes[which]
            some = process.mmap(4)
            process.store(some, 7)
            if access == "read":
                device.read(some)
            elif access == "write":
                device.write(some, 8)
            else:
                words = f"exclusive {device.name} {process.in_words(some)}"
                process.run(words, device.make_exclusive(some.start, some.stop))
            since = len(trial.trace)
            told.clear()
            try:
                change(some)
            except KernelError as error:
                raise trial.wrong(f"The device's own migration went wrong: {error}.") from None
            broken = first_break(trial.trace, some, device.file, since=since)
            if broken:
                raise trial.wrong(f"{_last(trial)}: {broken[1]}", broken[0])
            if access == "exclusive" and _claims_any(device, some):
                why = f"{_last(trial)}: the CPU took {some.name} back, and the device still thinks "
                raise trial.wrong(f"{why}that it is alone.")
            own = [name for name, owner in told if owner == device.device]
            if own:
                why = f"{own[0]} of its own was not ignored: the driver forgot what it maps itself."
                raise trial.wrong(why, since + 1)


class AnswerAtOnce(Exercise):
    """Write a callback that never sleeps when it may not.

    Another thread of the driver may hold `self.lock`. If `range.blockable`, wait for it; if not,
    answer at once: False where you cannot do the work now, and then leave everything as it is.
    In any case True means done: the range forgotten, the number noted, the lock given up.
    """

    answer = "Mine"
    starter = """
from hmmlab import Driver
from hmmlab.model.mmu_notifier import mmu_interval_set_seq


class Mine(Driver):
    def invalidate(self, subscription, range, cur_seq):
        # any(self.machine.holders(self.lock))             is it taken?
        # yield from self.machine.down_write(self.lock)    take it; may sleep
        # mmu_interval_set_seq(self.machine, subscription, cur_seq)
        # self.forget(int(range.start[0]), int(range.end[-1]))
        # self.machine.up_write(self.lock)
        ...
"""
    model_answer = """
        from hmmlab import Driver
        from hmmlab.model.mmu_notifier import mmu_interval_set_seq


        class Mine(Driver):
            def invalidate(self, subscription, range, cur_seq):
                if not range.blockable and any(self.machine.holders(self.lock)):
                    return False
                yield from self.machine.down_write(self.lock)
                mmu_interval_set_seq(self.machine, subscription, cur_seq)
                self.forget(int(range.start[0]), int(range.end[-1]))
                self.machine.up_write(self.lock)
                return True
    """
    hints = (
        "There are four cases: blockable or not, and the lock free or taken. In how many of them "
        "can you do the work?",
        "Only one of the four is answered with False. A call that may sleep is never refused.",
        "Ask first, before anything is touched: `if not range.blockable and ...: return False`. "
        "Then the four lines as they stand in the starter.",
    )

    def rule(self, answer: Any, trial: Trial) -> None:
        """Each of the four cases, in an order of its own, ends as it must."""
        process, machine = trial.process, trial.machine
        device = trial.attach(answer)
        for case in trial.rng.permutation(4).tolist():
            blockable, taken = bool(case & 1), bool(case & 2)
            where = process.mmap(4)
            process.store(where, 7)
            device.read(where)
            if taken:
                machine.write("lock.writer", device.lock, 1)
            before = int(machine["interval.seq"][device.subscription])
            if blockable:
                _may_sleep(trial, device, where, taken)
            elif taken:
                _must_refuse(trial, device, where)
                continue
            elif not _reaped(trial):
                raise trial.wrong("The lock was free, and yet the reaper was refused.")
            broken = first_break(trial.trace, where, device.file)
            if broken:
                raise trial.wrong(f"{_last(trial)}: {broken[1]}", broken[0])
            if any(machine.holders(device.lock)):
                raise trial.wrong(f"{_last(trial)}: the lock is still held.")
            if machine["interval.seq"][device.subscription] == before:
                what = "the number was not noted, so a look-up would not notice the change."
                raise trial.wrong(f"{_last(trial)}: {what}")
            process.munmap(where)


def _may_sleep(trial: Trial, device: Driver, where: Pages, taken: bool) -> None:
    """A blockable change; if the lock is taken it must wait for it, and then be done."""
    steps = trial.process.steps.madvise(where, "dontneed")
    waited = False
    try:
        for step in steps:
            if step.lock:
                if waited or not taken:
                    raise trial.wrong(f"It waits for {step.lock} for ever.")
                waited = True
                if _known(device, where) < len(where):
                    raise trial.wrong("It changed the table while another thread held the lock.")
                trial.machine.write("lock.writer", device.lock, 0)
    except KernelError:
        raise trial.wrong("The call might have slept: it must not be refused.") from None
    if taken and not waited:
        raise trial.wrong("Another thread held the lock, and the callback did not wait for it.")


def _must_refuse(trial: Trial, device: Driver, where: Pages) -> None:
    """A change that may not sleep, while the lock is taken: refused now, and done later."""
    if _reaped(trial):
        raise trial.wrong("It said True while another thread held the lock of its table.")
    if _known(device, where) < len(where):
        raise trial.wrong("It said False, and changed the table all the same.")
    trial.machine.write("lock.writer", device.lock, 0)
    if not _reaped(trial):
        raise trial.wrong("The lock is free again, and the reaper is still refused.")
    trial.process.munmap(where)


def _reaped(trial: Trial) -> bool:
    """Let the reaper empty the process; whether nobody refused."""
    body = oom_reap_task_mm(trial.machine, trial.process.mm)
    steps = trial.process.steps.run("the reaper", body)
    for step in steps:
        if step.lock:
            raise trial.wrong(f"It waits for {step.lock}. This call must not sleep.")
    return bool(steps.result)


def _known(device: Driver, where: Pages) -> int:
    return int((device.entries(where.start, where.stop) != 0).sum())


def _claims_any(device: Dmirror, where: Pages) -> bool:
    """Whether the device's table says of any page that the device alone may touch it."""
    return bool((device.entries(where.start, where.stop) & np.uint64(DEVICE_ATOMIC)).any())


def _last(trial: Trial) -> str:
    return trial.trace.operations[-1].text
