"""Exercises on what migrates and what does not (notebook 05)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from hmmlab.exercises.kinds import PredictNumbers, Story
from hmmlab.exercises.rules import Exercise, Trial
from hmmlab.invariants.promise import device_letters
from hmmlab.migrations import Fate, Migration, migrations
from hmmlab.model.machine import KernelError
from hmmlab.model.mm_types import VM_READ, vma_lookup
from hmmlab.model.pins import pin_user_pages, vmsplice
from hmmlab.model.process import Process
from hmmlab.model.region import Pages
from hmmlab.model.test_hmm import Dmirror

__all__ = ["CountTheCopies", "LeftBehind", "ThreeGates", "WhoGoes", "pin", "pipe"]


def pin(process: Process, where: Pages) -> None:
    """Pin pages for long, as a buffer registered with io_uring; a process has one such buffer."""
    routine = pin_user_pages(process.machine, process.mm, where.start, where.stop)
    process.run(f"pin {process.in_words(where)}", routine)


def pipe(process: Process, where: Pages) -> None:
    """Put pages into a pipe, which holds a plain reference to each."""
    routine = vmsplice(process.machine, process.mm, where.start, where.stop)
    process.run(f"hold {process.in_words(where)}", routine)


def _take(trial: Trial, device: Dmirror, pages: Pages) -> Migration:
    """Let the device ask for all of ``pages``. Returns the migration, of at most 64 pages."""
    with suppress(KernelError):  # the driver says ENOENT where one did not move
        device.to_dev(pages)
    return migrations(trial.trace, len(trial.trace.operations) - 1)[0]


def _still_reads(trial: Trial, pages: Pages, values: list[int]) -> None:
    """The process can read its pages, and finds in them what it wrote."""
    process = trial.process
    for page in range(len(pages)):
        vma = vma_lookup(trial.machine, process.mm, pages.start + page)
        if vma is None or not vma.flags & VM_READ:
            raise trial.wrong(f"The process may no longer read page {page}.")
    read = process.load(pages).tolist()
    if read != values:
        raise trial.wrong(f"The process reads {read} now; its data is lost.")


class LeftBehind(Exercise):
    """Build pages that a migration leaves behind.

    The device will be told to take all of `pages`. Write `build` so that those in `stay` (a slice
    of `pages`) do not go, the others do, and the process can still read all of them. There are
    several ways; `process.load`, `store`, `madvise`, `mprotect`, `fork` are at hand, and
    `pin(process, some)`, `pipe(process, some)`.
    """

    answer = "build"
    starter = """
from hmmlab.exercises.migrate import pin, pipe


def build(process, pages, stay):
    ...
"""
    model_answer = """
        def build(process, pages, stay):
            process.madvise(stay, "pageout")
    """
    hints = (
        "Which pages of the story stayed, though nobody had told them to?",
        "A page stays that is in swap, or that somebody holds whom the migration does not know.",
        "`pin`, `pipe`, or `process.madvise(stay, ...)`: any one of them, on `stay` alone.",
    )

    def rule(self, answer: Any, trial: Trial) -> None:
        """Migrate, and look who is where."""
        process = trial.process
        pages = process.mmap(8)
        values = list(range(100, 108))
        process.store(pages, values)
        device = process.open()
        first = int(trial.rng.integers(0, 5))
        stay = pages[first : first + int(trial.rng.integers(1, 4))]
        answer(process, pages, stay)
        with suppress(KernelError):  # the driver says ENOENT where one did not move
            device.to_dev(pages)
        end = len(trial.trace)
        letters = device_letters(trial.machine, pages)
        _still_reads(trial, pages, values)
        for page in range(len(pages)):
            staying = stay.start <= pages.start + page < stay.stop
            moved = letters[page].isupper()
            if moved and staying:
                raise trial.wrong(f"Page {page} went to the device, and should have stayed.", end)
            if not moved and not staying:
                raise trial.wrong(f"Page {page} stayed behind, and should have gone.", end)


class ThreeGates(Exercise):
    """Stop a page at each of the three gates.

    Of four written pages, all four are asked for. Write `build` so that collect leaves out the page
    `left_out`, unmap gives back `given_back`, and `refused` is copied and then refused; the fourth
    moves. Each is one page; which is which is drawn. The process must read all four afterwards.
    """

    answer = "build"
    starter = """
from hmmlab.exercises.migrate import pin, pipe


def build(process, left_out, given_back, refused):
    ...
"""
    model_answer = """
        from hmmlab.exercises.migrate import pin, pipe


        def build(process, left_out, given_back, refused):
            pin(process, left_out)
            process.madvise(refused, "pageout")
            process.fork("child")
            process.load(refused)
            pipe(process, given_back)
    """
    hints = (
        "The story at the beginning has a page at every gate. What had happened to pages 3, 4, 6?",
        "Collect leaves out what is pinned or in swap. Unmap counts references, and finds one too "
        "many on a page in a pipe.",
        "Refused is what is in the swap cache: a page that came back from swap while somebody "
        "else still has it there. `fork` after the page-out makes that somebody.",
    )
    _WANTED = (Fate.LEFT_OUT, Fate.GIVEN_BACK, Fate.REFUSED, Fate.MOVED)

    def rule(self, answer: Any, trial: Trial) -> None:
        """Migrate, and hold every page's fate against its part."""
        process = trial.process
        pages = process.mmap(4)
        values = trial.rng.integers(100, 200, 4).tolist()
        process.store(pages, values)
        device = process.open()
        parts = trial.rng.permutation(4).tolist()
        answer(process, *(pages[page] for page in parts[:3]))
        migration = _take(trial, device, pages)
        end = len(trial.trace)
        fates = migration.fates(end)
        for page, wanted in zip(parts, self._WANTED, strict=True):
            if fates[page] is not wanted:
                what = f"Page {page} was to be {wanted.value}, and is {fates[page].value}."
                raise trial.wrong(what, _decided(migration, page))
        _still_reads(trial, pages, values)


def _decided(migration: Migration, page: int) -> int:
    """The position at which what becomes of a page was told for the first time."""
    last = migration.told[-1][0]
    final = migration.fates(last)[page]
    return next(when for when, _, _ in migration.told if migration.fates(when)[page] is final)


# --- predictions ----------------------------------------------------------------------------------

#: What can happen to a page after the fork; each takes the process and the page.
_DEEDS: tuple[Callable[[Process, Pages], Any], ...] = (
    lambda process, page: process.store(page, 500),
    lambda process, page: process.madvise(page, "dontneed"),
    pipe,
)


class WhoGoes(Story):
    """Predict what becomes of each page, one letter a page.

    `m` it moves with its data, `f` it is empty and a new frame fills it, `s` it stays as it is.
    """

    rounds = 1
    answer = "prediction"
    starter = 'prediction = "..."'
    hints = (
        "Empty pages are filled, and so is the zero page: nothing was there to be copied.",
        "Shared by fork: both processes' words are frozen, and the page moves for both. What is "
        "held, pinned or swapped stays.",
        "And who came back from swap after the fork? The child still has it there: it is copied, "
        "and refused.",
    )

    def story(self, trial: Trial) -> tuple[Pages, Dmirror]:
        """Eight pages, some page-outs, a fork, a pin, and two deeds, on pages that are drawn."""
        process, rng = trial.process, trial.rng
        device = process.open()
        pages = process.mmap(8)
        process.store(pages[:6], range(100, 106))
        process.load(pages[6])
        swapped, back, pinned, *others = rng.permutation(6).tolist()
        for page in (swapped, back):
            process.madvise(pages[page], "pageout")
        process.fork("child")
        process.load(pages[back])
        pin(process, pages[pinned])
        for deed, page in zip(rng.permutation(len(_DEEDS)).tolist()[:2], others, strict=False):
            _DEEDS[deed](process, pages[page])
        return pages, device

    def last_lines(self, told: tuple[Pages, Dmirror]) -> list[str]:
        """The operation that is asked about, and how many letters there are."""
        pages, device = told
        return [f"  {device.say('to_dev', pages)}", "", f"{len(pages)} letters."]

    def solution(self) -> str:
        """The letters that the model comes to."""
        trial = self.trial()
        migration = self._run(trial)
        return f'{self.answer} = "{self._letters(migration, len(trial.trace))}"'

    def _run(self, trial: Trial) -> Migration:
        pages, device = self.story(trial)
        return _take(trial, device, pages)

    @staticmethod
    def _letters(migration: Migration, position: int) -> str:
        known = {Fate.MOVED: "m", Fate.FILLED: "f"}
        return "".join(known.get(fate, "s") for fate in migration.fates(position))

    def rule(self, answer: Any, trial: Trial) -> None:
        """Every letter is the model's; a wrong one is shown where it was decided."""
        migration = self._run(trial)
        truth = self._letters(migration, len(trial.trace))
        given = str(answer).replace(" ", "")
        if len(given) != len(truth):
            raise trial.wrong(f"{len(given)} letters for {len(truth)} pages.")
        for page, (said, is_) in enumerate(zip(given, truth, strict=True)):
            if said != is_:
                fate = migration.fates(len(trial.trace))[page]
                what = f"Page {page} is {is_!r}, not {said!r}: in the end it is {fate.value}."
                raise trial.wrong(what, _decided(migration, page))


class CountTheCopies(PredictNumbers):
    """Count what one migration does, page by page.

    `collected`: the entries with M when `migrate_vma_setup` returns. `copied`: the pages whose data
    the driver copies. `arrived`: the pages that live in device memory in the end.
    """

    starter = 'prediction = {"collected": ..., "copied": ..., "arrived": ...}'
    hints = (
        "M stands for what may move: pages with data, and empty ones. Who was given back has none.",
        "Only what has data is copied. Is everything that is copied welcome?",
        "A page in the swap cache is copied in vain. So copied is the data pages with M, and "
        "arrived is collected less those in vain.",
    )

    def numbers(self, trial: Trial) -> dict[str, int]:
        """How many pages of each kind there are."""
        rng = trial.rng
        kinds = ("written", "zero", "empty", "held", "cached")
        return dict(
            zip(kinds, rng.integers([3, 1, 2, 1, 1], [6, 3, 4, 3, 4]).tolist(), strict=True)
        )

    def question(self) -> str:
        """What is asked, with this seed's numbers."""
        count = self.numbers(self.trial())
        return (
            f"{super().question()}\n\n"
            f"  {count['written']} pages are written\n"
            f"  {count['zero']} were only read, and map the zero page\n"
            f"  {count['empty']} were never touched\n"
            f"  {count['held']} are written, and in a pipe\n"
            f"  {count['cached']} came back from swap, and are in the swap cache still"
        )

    def count(self, trial: Trial) -> dict[str, tuple[int, int, str]]:
        """Make such pages, migrate them all, and read the arrays."""
        process, count = trial.process, self.numbers(trial)
        pages = process.mmap(sum(count.values()))
        ends = np.cumsum(list(count.values())).tolist()
        parts = dict(zip(count, map(pages.__getitem__, map(slice, [0, *ends], ends)), strict=True))
        process.store(parts["cached"], 7)
        process.madvise(parts["cached"], "pageout")
        process.fork("child")
        process.load(parts["cached"])
        process.store(parts["written"], 1)
        process.load(parts["zero"])
        process.store(parts["held"], 3)
        pipe(process, parts["held"])
        device = process.open()
        migration = _take(trial, device, pages)
        told = {phase: (when, now) for when, phase, now in migration.told}
        (unmap, after_setup), (copy, copied), (pages_at, done) = (
            told[phase] for phase in ("unmap", "copy", "pages")
        )
        return {
            "collected": (
                after_setup.cpages,
                unmap,
                "empty pages count, and what a pipe holds was given back.",
            ),
            "copied": (
                int((copied.valid & (copied.dst != 0)).sum()),
                copy,
                "the driver copies where src names a page and M stands, and nowhere else.",
            ),
            "arrived": (
                done.marked(),
                pages_at,
                "empty pages arrive as new frames; the swap cache's are refused.",
            ),
        }
