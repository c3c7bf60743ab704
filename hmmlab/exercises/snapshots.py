"""Exercises on what a look finds, and what a request costs (notebook 03)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hmmlab.exercises.kinds import Story
from hmmlab.exercises.rules import Exercise, Trial
from hmmlab.model.driver import Driver
from hmmlab.model.entry import HMM_PFN_REQ_FAULT, HMM_PFN_VALID, Words
from hmmlab.model.hmm import HmmRange, hmm_range_fault
from hmmlab.model.machine import Routine
from hmmlab.model.memory import Faults
from hmmlab.model.mm_types import mm_lock, mm_root
from hmmlab.model.mmu_notifier import mmu_interval_read_begin
from hmmlab.model.page_table import read_range
from hmmlab.model.region import Pages

__all__ = ["FewestFaults", "SnapshotBytes", "handled_pages", "look_up"]

#: What a byte of a snapshot says (lib/test_hmm_uapi.h).
BYTES = {
    0x00: "nothing is there",
    0x01: "a frame that may be read",
    0x02: "a frame that may be written",
    0x11: "the zero page, which may be read",
    0x22: "a page on the device that may be written",
    0xFF: "an error: nobody may read there",
}


def look_up(
    device: Driver,
    pages: Pages,
    words: ArrayLike = 0,
    *,
    default_flags: int = 0,
    pfn_flags_mask: int = 0,
) -> Words:
    """Look pages up once, without the loop around it; by default a snapshot.

    Parameters
    ----------
    words
        The requests: one for all, or one a page.

    Returns
    -------
    The answers, uint64 of shape (len(pages),).

    Raises
    ------
    KernelError
        What ``hmm_range_fault`` refuses, EBUSY too.
    """
    asked = np.broadcast_to(np.asarray(words, np.uint64), (len(pages),)).copy()
    span = (pages.mm, device.subscription, 0, pages.start, pages.stop)
    range = HmmRange(*span, asked, default_flags, pfn_flags_mask, device.device)
    device.process.run(f"look up {device.process.in_words(pages)}", _ask(device, range))
    return range.hmm_pfns


def _ask(device: Driver, range: HmmRange) -> Routine[None]:
    """Call ``hmm_range_fault`` as a driver does: a number first, then the mmap_lock."""
    machine = device.machine
    range.notifier_seq = yield from mmu_interval_read_begin(machine, range.notifier)
    lock = mm_lock(machine, range.mm)
    yield from machine.down_read(lock)
    try:
        yield from hmm_range_fault(machine, range)
    finally:
        machine.up_read(lock)


def handled_pages(trial: Trial, since: int = 0) -> NDArray[np.int64]:
    """Pages for which ``handle_mm_fault`` was called from position ``since`` on, once a call."""
    details = [event.step.detail for event in trial.trace.events[since:]]
    calls = [detail.vpns for detail in details if isinstance(detail, Faults)]
    return np.concatenate([np.zeros(0, np.int64), *calls])


class SnapshotBytes(Story):
    """Predict the bytes of the last snapshot, two hex digits a page.

    `00` nothing there, `01` may be read, `02` may be written, `11` the zero page, `22` a page on
    this device that may be written, `ff` an error: nobody may read there.
    """

    rounds = 1
    answer = "prediction"
    starter = 'prediction = "..."'
    hints = (
        "Go page by page, and ask of each: who touched it last, and what for?",
        "A snapshot only looks, so the first one changes nothing for the second.",
        "A first touch that reads maps the zero page, and it is all the same whether the CPU reads "
        "or the device. `mprotect` and `munmap` come last, and decide.",
    )

    def story(self, trial: Trial) -> Pages:
        """Eight pages, each in a state of its own, on places that are drawn."""
        process, rng = trial.process, trial.rng
        at = rng.permutation(8).tolist()
        pages = process.mmap(8)
        device = process.open()
        stored, shielded, moved, hidden, gone = at[:5]
        for page in sorted((stored, shielded, moved)):
            process.store(pages[page], 7)
        process.load(pages[at[5]])
        device.snapshot(pages)
        device.read(pages[at[6]])
        device.to_dev(pages[moved])
        process.mprotect(pages[shielded], "r")
        process.mprotect(pages[hidden], "none")
        process.munmap(pages[gone])
        return pages

    def last_lines(self, told: Pages) -> list[str]:
        """The operation that is asked about."""
        return ["  snapshot d0 A 0 8"]

    def solution(self) -> str:
        """The bytes that the model's test device gives."""
        trial = self.trial()
        return f'{self.answer} = "{self._bytes(trial, self.story(trial)).tobytes().hex(" ")}"'

    @staticmethod
    def _bytes(trial: Trial, pages: Pages) -> NDArray[np.uint8]:
        device = trial.process.files["d0"]
        found: NDArray[np.uint8] = device.snapshot(pages)  # type: ignore[attr-defined]
        return found

    def rule(self, answer: Any, trial: Trial) -> None:
        """Every byte is the test device's; a wrong one shows the step that made the page so."""
        pages = self.story(trial)
        end = len(trial.trace)
        truth = self._bytes(trial, pages).tolist()
        try:
            given = list(bytes.fromhex(str(answer).replace("0x", "").replace(",", " ")))
        except ValueError:
            raise trial.wrong(f"{answer!r} is not two hex digits a page.") from None
        if len(given) != len(truth):
            raise trial.wrong(f"{len(given)} bytes for {len(truth)} pages.")
        for page, (said, is_) in enumerate(zip(given, truth, strict=True)):
            if said != is_:
                why = f"Page {page} is {is_:02x}, {BYTES[is_]}; not {said:02x}."
                raise trial.wrong(why, self._since(trial, pages[page], end))

    @staticmethod
    def _since(trial: Trial, page: Pages, end: int) -> int:
        """The last position at which the page's word or its mapping changed."""
        since, before = end, None
        for replay in trial.trace.replay():
            if replay.position > end:
                break
            state = replay.state
            word = int(read_range(state, mm_root(state, page.mm), page.start, page.stop)[0])
            vmas = state["vma.flags"][
                (state["vma.mm"] == page.mm)
                & (state["vma.start"] <= page.start)
                & (state["vma.end"] > page.start)
            ].tolist()
            if before is not None and (word, vmas) != before:
                since = replay.position
            before = word, vmas
        return since


class FewestFaults(Exercise):
    """Write `ranges`: what to ask for, so that no page is faulted in vain.

    `there` and `wanted` are bool arrays, one value a page of one mapping: which pages the CPU's
    table has, and which the device will read. Return a list of `(first, stop)`. Each becomes one
    `hmm_range_fault` with `default_flags = HMM_PFN_REQ_FAULT`, in your order. All pages of
    `wanted` must come back valid, and `handle_mm_fault` must not be called for any other page, nor
    for one that is there.
    """

    answer = "ranges"
    starter = """
import numpy as np


def ranges(there, wanted):
    ...
"""
    model_answer = """
        import numpy as np


        def ranges(there, wanted):
            return [(page, page + 1) for page in np.flatnonzero(wanted).tolist()]
    """
    hints = (
        "Which pages are faulted when a walk stops? More than the one that stopped it.",
        "From the first page that lacks something, all to the end of the range are faulted.",
        "So nothing may stand in a range, behind its first missing page, that you would not have "
        "faulted. A range of one page has nothing behind it.",
    )

    def rule(self, answer: Any, trial: Trial) -> None:
        """Ask as told; count what was faulted, and look at what came back."""
        process, rng = trial.process, trial.rng
        count = int(rng.integers(10, 17))
        pages = process.mmap(count)
        kinds = rng.permutation(np.arange(count) % 4)
        there, wanted = kinds % 2 == 1, kinds >= 2
        for page in np.flatnonzero(there).tolist():
            process.store(pages[page], 7)
        device = process.attach(Driver)
        valid = np.zeros(count, np.bool_)
        since = len(trial.trace)
        for first, stop in answer(there.copy(), wanted.copy()):
            if not 0 <= first < stop <= count:
                raise trial.wrong(f"({first}, {stop}) is no range of these {count} pages.")
            words = look_up(device, pages[int(first) : int(stop)], default_flags=HMM_PFN_REQ_FAULT)
            valid[first:stop] = (words & np.uint64(HMM_PFN_VALID)) != 0
            for page in (handled_pages(trial, since) - pages.start).tolist():
                if there[page] or not wanted[page]:
                    what = "is there already" if there[page] else "is wanted by nobody"
                    raise trial.wrong(f"Page {page} was faulted, and it {what}.")
            since = len(trial.trace)
        for page in np.flatnonzero(wanted & ~valid).tolist():
            raise trial.wrong(f"Page {page} is wanted, and nobody asked for it.")
