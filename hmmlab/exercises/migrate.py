"""Exercises on what migrates and what does not (notebook 05)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from hmmlab.exercises.promise import device_letters
from hmmlab.exercises.rules import Exercise, Trial
from hmmlab.model.machine import KernelError
from hmmlab.model.mm_types import VM_READ, vma_lookup

__all__ = ["LeftBehind"]


class LeftBehind(Exercise):
    """Build pages that a migration leaves behind.

    The device will be told to take all of `pages`. Write `build` so that those in `stay` (a slice
    of `pages`) do not go, the others do, and the process can still read all of them.
    """

    answer = "build"
    starter = """
from hmmlab.model.pins import pin_user_pages


def build(process, pages, stay):
    ...
"""
    model_answer = """
        from hmmlab.model.pins import pin_user_pages


        def build(process, pages, stay):
            pin = pin_user_pages(process.machine, process.mm, stay.start, stay.stop)
            process.run("pin", pin)
    """
    hints = (
        "A migration gives a page up when somebody holds it whom it does not know.",
        "Swapped pages, file pages and pinned pages stay. One of these can be done to some pages.",
        '`process.run("pin", pin_user_pages(process.machine, process.mm, first, last))`.',
    )

    def rule(self, answer: Any, trial: Trial) -> None:
        """Migrate, and look who is where."""
        process = trial.process
        pages = process.mmap(8)
        process.store(pages, range(100, 108))
        device = process.open()
        first = int(trial.rng.integers(0, 5))
        stay = pages[first : first + int(trial.rng.integers(1, 4))]
        answer(process, pages, stay)
        for page in range(len(pages)):
            vma = vma_lookup(trial.machine, process.mm, pages.start + page)
            if vma is None or not vma.flags & VM_READ:
                raise trial.wrong(f"The process may no longer read page {page}.")
        with suppress(KernelError):  # the driver says ENOENT where one did not move
            device.to_dev(pages)
        end = len(trial.trace)
        letters = device_letters(trial.machine, pages)
        for page in range(len(pages)):
            staying = stay.start <= pages.start + page < stay.stop
            moved = letters[page].isupper()
            if moved and staying:
                raise trial.wrong(f"Page {page} went to the device, and should have stayed.", end)
            if not moved and not staying:
                raise trial.wrong(f"Page {page} stayed behind, and should have gone.", end)
        read = process.load(pages).tolist()
        if read != list(range(100, 108)):
            raise trial.wrong(f"The process reads {read} now; its data is lost.")
