"""Driver: the part of a device driver that mirrors one process's address space.

A driver has a page table of its own, a lock for it, and one subscription to the process's changes.
Two things make it correct, and both are here: :meth:`Driver.invalidate` forgets under the lock and
notes the sequence number; :meth:`Driver.fault_range` looks under a sequence number and, holding the
lock, throws the answer away when that number has changed.

A learner's driver subclasses :class:`Driver` and overrides what it wants to do otherwise; the
callback :meth:`Driver.invalidate` may be a plain function or a generator of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hmmlab.model.alike import alike, all_of, any_of
from hmmlab.model.entry import (
    DEVICE_VALID,
    DEVICE_WRITE,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_WRITE,
    Pfns,
    Words,
    device_pfn,
    device_word,
    hmm_pfn_to_pfn,
)
from hmmlab.model.geometry import USER_VPN_END
from hmmlab.model.hmm import HmmRange, commuting_batches, hmm_range_fault
from hmmlab.model.machine import BLOCK, Actor, KernelError, Machine, Routine, kernel
from hmmlab.model.memremap import is_device_private_page
from hmmlab.model.mm_types import mm_lock
from hmmlab.model.mmu_notifier import (
    EVERYTHING,
    MmuNotifierRange,
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
)
from hmmlab.model.operation import StepsOf, operation
from hmmlab.model.page import pfn_to_page
from hmmlab.model.page_table import (
    alloc_tables,
    free_pgtables,
    free_root,
    new_root,
    read_range,
    rows_of_range,
    walk,
)
from hmmlab.model.region import Pages
from hmmlab.model.rows import as_rows

if TYPE_CHECKING:
    from hmmlab.model.process import Process

__all__ = ["Answer", "Driver", "backing"]

_EFAULT, _EBUSY = 14, 16

#: From the bit HMM_PFN_WRITE to the bit DEVICE_WRITE.
_WRITE_SHIFT = HMM_PFN_WRITE.bit_length() - DEVICE_WRITE.bit_length()

Machine.declare("device_file.mm", np.int32, "address space that an open device file mirrors")
Machine.declare("device_file.root", np.int64, "root of its device page table")
Machine.declare("device_file.device", np.int32, "number of the device; it owns private memory")
Machine.declare("device_file.users", np.int32, "processes that have it open")
Machine.declare("device_file.subscription", np.int32, "its interval subscription")


@dataclass
class Answer:
    """What a device operation returns: data where it returns any, and what it counted.

    ``cpages`` are the pages that were dealt with, ``faults`` the successful fault rounds.
    """

    data: NDArray[Any] | None = None
    cpages: int = 0
    faults: int = 0


def backing(machine: Machine, pfns: Pfns) -> Pfns:
    """Frames that hold the data of ``pfns``: themselves, unless their device says otherwise."""
    rows = pfn_to_page(machine, pfns)
    device = is_device_private_page(machine, pfns, rows)
    if not any_of(device):
        return pfns
    behind = machine["page.private"][rows]
    return behind.copy() if all_of(device) else np.where(device, behind, pfns)


class Driver:
    """One open file of a device, which mirrors the address space of ``process``.

    Parameters
    ----------
    process
        Whose address space.
    name
        What the reader calls this file, such as ``d0``.
    device
        Number of the device, from 1. Files of one device own its private memory together.

    Attributes
    ----------
    machine, mm
        Where it lives.
    file
        Row of its ``device_file.*`` columns.
    subscription
        Number of its interval subscription.
    lock
        The lock of its page table.
    """

    #: Pages that the driver faults at a time.
    batch = 64
    #: Whether :meth:`invalidate` takes a series of ranges at once.
    takes_series = False

    def __init__(self, process: Process, name: str, device: int = 1) -> None:
        self.machine: Machine = process.machine
        self.process, self.mm, self.name, self.device = process, process.mm, name, device
        self.actor = Actor(name)
        self.lock = self.machine.new_lock(f"the page-table lock of {name}")
        self.file = self.subscription = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r} on {self.process.name!r})"

    @property
    def steps(self) -> StepsOf:
        """The operations as steps that have not run: ``device.steps.read(a)``."""
        return StepsOf(self)

    # --- what one asks of it ----------------------------------------------------------------------
    @operation
    def open(self) -> tuple[str, Routine[Driver]]:
        """Open the device: subscribe to every change of the address space."""
        return f"open {self.name} {self.device - 1}", self.open_file()

    @operation
    def close(self) -> tuple[str, Routine[None]]:
        """Close the file: end the subscription and forget everything."""
        self.check_open()
        return f"close {self.name}", self.close_file()

    @operation
    def read(self, where: Pages) -> tuple[str, Routine[NDArray[np.uint64]]]:
        """The device reads the first eight bytes of each page, uint64 of shape (len(where),).

        Raises
        ------
        KernelError
            EFAULT where a page is not mapped or may not be read.
        """
        return self.say("read", where), self._data_of(self.read_pages(where.start, where.stop))

    @operation
    def write(self, where: Pages, values: ArrayLike) -> tuple[str, Routine[int]]:
        """The device writes ``values`` (one, or one a page) into the pages' first eight bytes.

        Returns how many pages were written.

        Raises
        ------
        KernelError
            EPERM where the mapping forbids it, EFAULT where nothing is mapped; pages written
            before stay written.
        """
        words = self.process.words(where, values)
        return self.say("write", where), self._cpages_of(self.write_pages(where.start, words))

    def check_open(self) -> None:
        """Raise ValueError when the file is not open."""
        if not self.file or self.machine["device_file.mm"][self.file] != self.mm:
            raise ValueError(f"{self.name} is not open")

    def say(self, verb: str, where: Pages) -> str:
        """The operation in words of the scenario language, once ``where`` is found valid.

        Raises
        ------
        ValueError
            When the file is closed, or the pages belong to another address space.
        """
        self.check_open()
        return f"{verb} {self.name} {self.process.in_words(where)}"

    @staticmethod
    def _data_of(routine: Routine[Answer]) -> Routine[NDArray[Any]]:
        answer = yield from routine
        assert answer.data is not None
        return answer.data

    @staticmethod
    def _cpages_of(routine: Routine[Answer]) -> Routine[int]:
        return (yield from routine).cpages

    # --- its page table ---------------------------------------------------------------------------
    @property
    def root(self) -> int:
        """Root of the device page table."""
        return int(self.machine["device_file.root"][self.file])

    def entries(self, start: int, stop: int) -> Words:
        """Words of the device page table, uint64 of shape (stop - start,), 0 where nothing is."""
        return read_range(self.machine, self.root, start, stop)

    def store_entries(self, start: int, words: Words) -> None:
        """Set the words of pages ``start`` on."""
        stop = start + words.size
        alloc_tables(self.machine, self.root, start, stop)
        self.machine.write("pte", rows_of_range(self.machine, self.root, start, stop), words)

    def forget(self, start: int, stop: int, among: NDArray[np.bool_] | None = None) -> int:
        """Empty the words of pages ``start`` to ``stop - 1``, or of those ``among`` them.

        Returns how many words there were.
        """
        start, stop = max(start, 0), min(stop, USER_VPN_END)
        dropped = 0
        for run in walk(self.machine, self.root, start, stop):
            if run.row < 0:
                continue
            words = self.machine["pte"][run.row : run.row + run.stop - run.start]
            used = words != 0
            if among is not None:
                used &= among[run.start - start : run.stop - start]
            count = int(np.count_nonzero(used))
            if count == used.size:
                self.machine.write("pte", slice(run.row, run.row + count), 0)
            elif count:
                self.machine.write("pte", as_rows(run.row + np.flatnonzero(used)), 0)
            dropped += count
        return dropped

    def backing(self, pfns: Pfns) -> Pfns:
        """Frames that hold the data of ``pfns``: themselves, unless the device says otherwise."""
        return backing(self.machine, pfns)

    # --- open and close ---------------------------------------------------------------------------
    @kernel("driver", "open")
    def open_file(self) -> Routine[Driver]:
        """Subscribe to every change of the address space."""
        machine = self.machine
        self.file = machine.take("device_file.mm")
        machine.objects.setdefault("device_file", {})[self.file] = self
        machine.names.files[self.file] = self.name
        self.subscription = yield from mmu_interval_notifier_insert(
            machine, self.mm, 0, EVERYTHING - 1, self
        )
        for column, value in (
            ("mm", self.mm),
            ("root", new_root(machine)),
            ("device", self.device),
            ("subscription", self.subscription),
            ("users", 1),
        ):
            machine.write(f"device_file.{column}", self.file, value)
        return self

    def get(self) -> None:
        """One more process has the file open."""
        self.machine.add("device_file.users", self.file, 1)

    def close_file(self) -> Routine[None]:
        """One process less has the file open; the last one releases it."""
        self.machine.add("device_file.users", self.file, -1)
        if self.machine["device_file.users"][self.file]:
            yield self.machine.step(f"{self.name} stays open elsewhere.", self.mm)
        else:
            yield from self.release_file()

    @kernel("driver", "release")
    def release_file(self) -> Routine[None]:
        """End the subscription and forget everything."""
        yield from mmu_interval_notifier_remove(self.machine, self.subscription)
        yield from self.give_back_memory()
        self.forget(0, USER_VPN_END)
        free_pgtables(self.machine, self.root, 0, USER_VPN_END, 0, USER_VPN_END)
        free_root(self.machine, self.root)
        for column in ("mm", "root", "device", "subscription"):
            self.machine.write(f"device_file.{column}", self.file, 0)

    def give_back_memory(self) -> Routine[None]:
        """Bring device memory back to RAM, where the device has any."""
        yield from ()

    # --- the two halves of a correct mirror -------------------------------------------------------
    def invalidate(self, subscription: int, range: MmuNotifierRange, cur_seq: int) -> Any:
        """The pages of ``range`` are about to change: forget them.

        Returns
        -------
        True; False only where the range is not blockable and the lock is taken.
        """
        if any(self.machine.holders(self.lock)) and not range.blockable:
            return False
        return self._invalidate(range, cur_seq)

    @kernel("driver", "invalidate")
    def _invalidate(self, range: MmuNotifierRange, cur_seq: int) -> Routine[bool]:
        yield from self.machine.down_write(self.lock)
        mmu_interval_set_seq(self.machine, self.subscription, cur_seq)
        start, stop = int(range.start[0]), int(range.end[-1])
        dropped = self.forget(start, stop)
        self.machine.up_write(self.lock)
        yield self.machine.step(
            f"{self.name} forgets {{range}}: {dropped} entries.", self.mm, start, stop
        )
        return True

    @kernel("driver", "fault")
    def fault_range(self, start: int, stop: int, write: bool) -> Routine[None]:
        """Fault pages into the device page table, a batch at a time.

        Raises
        ------
        KernelError
            EFAULT or EPERM, as :func:`~hmmlab.model.hmm.hmm_range_fault` says; batches before the
            failing one stay.
        """
        flags = HMM_PFN_REQ_FAULT | (HMM_PFN_REQ_WRITE if write else 0)
        first = start
        while first < stop:  # over batches, or as many at once as commute
            last = commuting_batches(
                self.machine, self.mm, first, stop, self.batch, write=write, owner=self.device
            )
            range = HmmRange(
                self.mm,
                self.subscription,
                0,
                first,
                last,
                np.zeros(last - first, np.uint64),
                default_flags=flags,
                dev_private_owner=self.device,
                batch=self.batch if last - first > self.batch else 0,
            )
            yield from self.look(range)
            try:
                self.map_answers(range)
            finally:
                self.machine.up_write(self.lock)
            yield self.machine.step(f"{self.name} maps {{range}}.", self.mm, first, last)
            first = last

    @kernel("driver", "range_fault")
    def look(self, range: HmmRange) -> Routine[None]:
        """Ask until the answer holds. Returns with the lock taken and the answer in ``range``."""
        machine = self.machine
        while True:
            range.notifier_seq = yield from mmu_interval_read_begin(machine, range.notifier)
            lock = mm_lock(machine, range.mm)
            yield from machine.down_read(lock)
            try:
                yield from hmm_range_fault(machine, range)
            except KernelError as error:
                if error.errno != _EBUSY:
                    raise
                yield machine.step(
                    "{range}: invalidated meanwhile, so it looks again.",
                    range.mm,
                    range.start,
                    range.end,
                )
                continue
            finally:
                machine.up_read(lock)
            yield machine.step(
                f"It has let go of the mmap_lock. Before {self.name} has its own lock, {{range}} "
                "may change.",
                range.mm,
                range.start,
                range.end,
            )
            yield from machine.down_write(self.lock)
            if not mmu_interval_read_retry(machine, range.notifier, range.notifier_seq):
                return
            machine.up_write(self.lock)
            yield machine.step(
                "The answer for {range} is stale, so it looks again.",
                range.mm,
                range.start,
                range.end,
            )

    def map_answers(self, range: HmmRange) -> None:
        """Put a valid answer into the device page table; the lock is held.

        Raises
        ------
        KernelError
            EFAULT where a write was asked for and the answer does not allow it, which only a
            device-private page of one's own can bring about; pages before it are mapped.
        """
        answers = range.hmm_pfns
        refused = False
        if range.default_flags & HMM_PFN_REQ_WRITE:
            writable = alike(answers & np.uint64(HMM_PFN_WRITE)) != 0
            stop = self._leading(writable, answers.size)
            refused = stop < answers.size
            answers = answers[:stop]
        stop = answers.size
        flags = alike(answers & np.uint64(HMM_PFN_WRITE)) >> np.uint64(_WRITE_SHIFT)
        flags |= np.uint64(DEVICE_VALID)
        if stop:
            pfns = self.backing(hmm_pfn_to_pfn(answers))
            self.store_entries(range.start, device_word(pfns, flags))
        if refused:
            place = self.machine.names.place(self.mm, range.start + stop, range.start + stop + 1)
            raise KernelError(_EFAULT, f"{place}: the page on the device may not be written")

    # --- reading and writing through it -----------------------------------------------------------
    @kernel("driver", "read")
    def read_pages(self, start: int, stop: int) -> Routine[Answer]:
        """The device reads the first word of each page, faulting what it lacks.

        Raises
        ------
        KernelError
            What :meth:`fault_range` raises; then nothing is returned.
        """
        answer = Answer(np.zeros(stop - start, np.uint64))
        while True:
            yield from self.machine.down_write(self.lock)
            self.copy_out(start, stop, answer)
            self.machine.up_write(self.lock)
            if answer.cpages == stop - start:
                yield self.machine.step(f"{self.name} reads {{range}}.", self.mm, start, stop)
                return answer
            at = start + answer.cpages
            yield self.machine.step(f"{self.name} does not know {{range}}.", self.mm, at, stop)
            yield from self.fault_range(at, stop, write=False)
            answer.faults += 1

    def copy_out(self, start: int, stop: int, answer: Answer) -> None:
        """Copy pages in order, from the first not yet copied to the first that is not mapped."""
        assert answer.data is not None
        for first in np.arange(start + answer.cpages, stop, BLOCK).tolist():  # over blocks
            words = self.entries(first, min(first + BLOCK, stop))
            known = self._leading(alike(words & np.uint64(DEVICE_VALID)) != 0, words.size)
            rows = pfn_to_page(self.machine, device_pfn(words[:known]))
            copied = answer.data[answer.cpages : answer.cpages + known]
            copied[:] = self.machine["page.content"][rows]
            answer.cpages += known
            if known < words.size:
                return

    @kernel("driver", "write")
    def write_pages(self, start: int, values: Words) -> Routine[Answer]:
        """The device writes ``values`` (uint64), one to the first word of each page.

        Raises
        ------
        KernelError
            What :meth:`fault_range` raises; pages written before stay written.
        """
        stop = start + values.size
        answer = Answer()
        both = np.uint64(DEVICE_VALID | DEVICE_WRITE)
        while True:
            yield from self.machine.down_write(self.lock)
            at = start + answer.cpages
            words = self.entries(at, stop)
            known = self._leading(alike(words & both) == both, words.size)
            if known:
                rows = pfn_to_page(self.machine, device_pfn(words[:known]))
                self.machine.write(
                    "page.content", rows, values[answer.cpages : answer.cpages + known]
                )
                answer.cpages += known
            self.machine.up_write(self.lock)
            if known:
                yield self.machine.step(f"{self.name} writes {{range}}.", self.mm, at, at + known)
            at += known
            if at == stop:
                return answer
            yield self.machine.step(f"{self.name} may not write {{range}} yet.", self.mm, at, stop)
            yield from self.fault_range(at, stop, write=True)
            answer.faults += 1

    @staticmethod
    def _leading(known: NDArray[np.bool_], size: int) -> int:
        """How many at the beginning of ``size`` are True."""
        return size if all_of(known) else int(np.argmin(known))
