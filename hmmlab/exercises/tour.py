"""Exercises of the tour (notebook 00): what a story takes and tells, and where its pages are."""

from __future__ import annotations

from hmmlab.exercises.kinds import PredictNumbers, PredictStates, Story
from hmmlab.exercises.rules import Trial
from hmmlab.model.driver import Driver
from hmmlab.model.mmu_notifier import MmuNotifierRange
from hmmlab.model.page_alloc import free_ram
from hmmlab.model.region import Pages

__all__ = ["FourPages", "FramesAndCalls", "WhereTheyAre"]


class _Told(Story, PredictNumbers):
    """Numbers of a story whose operations the learner sees."""

    def story(self, trial: Trial) -> dict[str, tuple[int, int, str]]:
        """Whoever counts tells the story."""
        return self.count(trial)


class FramesAndCalls(_Told):
    """Count what this story takes, and what it tells.

    `frames`: how many frames of memory A has in the end. `told`: how often the device is told.
    """

    starter = 'prediction = {"frames": ..., "told": ...}'
    hints = (
        "A frame is taken when a page is first written, by whomever, and given back when the page "
        "is discarded.",
        "The device is told when something goes that it might have: a right, a page, an address.",
        "One operation tells once, of however many pages.",
    )

    def count(self, trial: Trial) -> dict[str, tuple[int, int, str]]:
        """Both sides touch pages; some are discarded, and one is made read-only."""
        process, rng = trial.process, trial.rng
        before = free_ram(trial.machine)
        pages, device = process.mmap(8), process.open(0)
        written, discarded = int(rng.integers(2, 6)), int(rng.integers(1, 3))
        process.store(pages[:written], 100)
        device.read(pages[: written - 1])
        device.write(pages[6], 7)
        process.madvise(pages[:discarded], "dontneed")
        gone = len(trial.trace)
        process.mprotect(pages[written - 1], "r")
        steps = [(at, event.step.detail) for at, event in enumerate(trial.trace.events, 1)]
        told = [(at, part) for at, part in steps if isinstance(part, MmuNotifierRange)]
        return {
            "frames": (
                before - free_ram(trial.machine),
                gone,
                f"{written} pages were written by the CPU, 1 by the device, {discarded} discarded.",
            ),
            "told": (
                sum(part.start.size for _, part in told),
                told[-1][0],
                "`madvise` and `mprotect` take something away; nothing else here does.",
            ),
        }


class FourPages(PredictStates):
    """Predict what the device's table holds at the end, one letter a page.

    `w` read-write, `r` read-only, `.` no entry. The driver forgets what it is told of, and no more.
    """

    hints = (
        "Go through it page by page: what did the device get, and what was taken from it since?",
        "`mprotect` and `madvise dontneed` both make it forget. Only its own read fetches again.",
        "What it fetches again has the rights that the process has by then.",
    )

    def story(self, trial: Trial) -> Pages:
        """The device reads four pages; one is protected, one discarded, and one is read again."""
        process = trial.process
        pages = process.mmap(4)
        process.store(pages, 7)
        device = trial.attach(Driver)
        device.read(pages)
        first, second, third = trial.rng.permutation(4)[:3].tolist()
        process.mprotect(pages[first], "r")
        process.madvise(pages[second], "dontneed")
        process.mprotect(pages[third], "r")
        device.read(pages[first])
        return pages


class WhereTheyAre(_Told):
    """Say where the pages of A are in the end.

    `device`: pages in the device's memory. `ram`: pages with a frame of RAM. `nowhere`: pages
    without either.
    """

    starter = 'prediction = {"device": ..., "ram": ..., "nowhere": ...}'
    hints = (
        "What was written has a frame. A migration takes it along, and the frame of RAM goes back.",
        "A touch by the CPU brings home the pages that it touches, and no other.",
        "The three numbers add up to eight.",
    )

    def count(self, trial: Trial) -> dict[str, tuple[int, int, str]]:
        """Some pages are written, some of these move, and the CPU reads a few of them."""
        process, rng = trial.process, trial.rng
        pages, device = process.mmap(8), process.open(0)
        written = int(rng.integers(4, 8))
        moved = int(rng.integers(3, written + 1))
        touched = int(rng.integers(1, moved))
        process.store(pages[:written], 100)
        device.to_dev(pages[:moved])
        away = len(trial.trace)
        process.load(pages[:touched])
        end = len(trial.trace)
        home = written - moved + touched
        on_device = int((trial.machine["page.refcount"][trial.machine.ram_pages :] > 0).sum())
        return {
            "device": (on_device, end, f"{moved} pages moved, and {touched} of them came home."),
            "ram": (home, end, f"{touched} came home to the {written - moved} that never left."),
            "nowhere": (8 - written, away, f"nobody wrote the last {8 - written}."),
        }
