"""The test device's file, after lib/test_hmm.c: /dev/hmm_dmirror0 and 1, and what they are asked.

Four things here are this driver's habits and no rule of the kernel; each is marked "habit" where
it stands: batches of 64 pages, an invalidation that forgets one page too many, a migration that
reads back without faulting, and a close that empties the whole device.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.access import make_device_exclusive_range
from hmmlab.model.alike import alike, all_of, any_of, how_many, rows_where, some
from hmmlab.model.dmirror_device import DmirrorDevice, fill_dst
from hmmlab.model.dmirror_snapshot import SnapshotSubscriber, dmirror_mkentry
from hmmlab.model.driver import Answer, Driver, backing
from hmmlab.model.entry import (
    DEVICE_ATOMIC,
    DEVICE_VALID,
    DEVICE_WRITE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    Pfns,
    device_word,
    migrate_flags,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from hmmlab.model.hmm import HmmRange
from hmmlab.model.machine import BLOCK, BULK, KernelError, Routine, kernel
from hmmlab.model.migrate import migrate_vma_finalize, migrate_vma_pages, migrate_vma_setup
from hmmlab.model.migrate_vma import (
    SELECT_DEVICE_COHERENT,
    SELECT_DEVICE_PRIVATE,
    SELECT_SYSTEM,
    MigrateVma,
    commuting_migrations,
)
from hmmlab.model.mm_types import VM_READ, VM_WRITE, Vma, mm_lock, vma_lookup
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_set_seq,
)
from hmmlab.model.operation import operation
from hmmlab.model.page import PG_LOCKED, pfn_to_page, set_flags
from hmmlab.model.page_ref import put_page
from hmmlab.model.region import Pages
from hmmlab.model.rows import row_numbers
from hmmlab.model.trace import Step

__all__ = ["Dmirror"]

#: From the bit MIGRATE_PFN_WRITE to the bit DEVICE_WRITE.
_WRITE_SHIFT = MIGRATE_PFN_WRITE.bit_length() - DEVICE_WRITE.bit_length()

_EPERM, _ENOENT, _EBUSY, _EINVAL = 1, 2, 16, 22


class Dmirror(Driver):
    """An open file of the test device (``struct dmirror``); made by ``Process.open``."""

    takes_series = True

    @property
    def selects(self) -> int:
        """Which pages its migrations to RAM collect (``dmirror_select_device``)."""
        return SELECT_DEVICE_COHERENT if self.mdevice.coherent else SELECT_DEVICE_PRIVATE

    @property
    def mdevice(self) -> DmirrorDevice:
        """The unit that was opened."""
        device: DmirrorDevice = self.machine.objects["dmirror_device"][self.device - 1]
        return device

    # --- what one asks of it ----------------------------------------------------------------------
    @operation
    def snapshot(self, where: Pages) -> tuple[str, Routine[NDArray[np.uint8]]]:
        """Look at the pages without faulting: one PROT_* byte each, uint8 of shape (len(where),).

        0x00 nothing, 0x01 read-only, 0x02 read-write, 0x11 zero page, 0x21 and 0x22 in this
        device's private memory, 0x41 and 0x42 in its coherent memory, 0x51 and 0x52 in another's,
        0x05 and 0x06 part of a huge page, 0xff no mapping or no access.
        """
        out = np.zeros(len(where), np.uint8)
        return self.say("snapshot", where), self._data_of(self.snapshot_pages(where.start, out))

    @operation
    def to_dev(self, where: Pages) -> tuple[str, Routine[NDArray[np.uint64]]]:
        """Migrate pages to the device, and read them back from there.

        Raises
        ------
        KernelError
            EINVAL where nothing is mapped or readable; ENOENT when a page did not move. What moved
            before stays there.
        """
        routine = self.migrate_to_device(where.start, where.stop)
        return self.say("to_dev", where), self._data_of(routine)

    @operation
    def to_sys(self, where: Pages) -> tuple[str, Routine[int]]:
        """Migrate pages back to RAM. Returns how many moved; those in RAM already do not count.

        Raises
        ------
        KernelError
            EINVAL where nothing is mapped or readable; what moved before stays there.
        """
        routine = self.migrate_to_system(where.start, where.stop)
        return self.say("to_sys", where), self._cpages_of(routine)

    @operation
    def release(self) -> tuple[str, Routine[int]]:
        """Give up all memory of the device: what any process has there comes back to RAM.

        Returns 0. The next migration to the device makes new memory.
        """
        self.check_open()
        return f"release {self.name}", self._cpages_of(self.release_memory())

    # --- invalidation -----------------------------------------------------------------------------
    def invalidate(
        self, subscription: int, range: MmuNotifierRange, cur_seq: int
    ) -> bool | Routine[bool]:
        """Forget the range, unless it is a migration of one's own, which cleans up after itself."""
        if range.event is Event.MIGRATE and range.owner == self.device:
            return self._ignore(range)
        if not range.blockable and any(self.machine.holders(self.lock)):
            return False
        return self._drop(range, cur_seq)

    @kernel("lib/test_hmm.c", "dmirror_interval_invalidate")
    def _ignore(self, range: MmuNotifierRange) -> Routine[bool]:
        yield self.machine.step(
            f"{self.name} migrates {{range}} itself, and so ignores it.",
            range.mm,
            int(range.start[0]),
            int(range.end[-1]),
        )
        return True

    @kernel("lib/test_hmm.c", "dmirror_interval_invalidate")
    def _drop(self, range: MmuNotifierRange, cur_seq: int) -> Routine[bool]:
        yield from self.machine.down_write(self.lock)
        mmu_interval_set_seq(self.machine, self.subscription, cur_seq)
        start, stop = int(range.start.min()), int(range.end.max())
        # Habit: the page that begins at the end is forgotten too.
        if range.size == 1:
            dropped = self.forget(start, stop + 1)
        else:
            edges = np.zeros(stop + 2 - start, np.int64)
            np.add.at(edges, range.start - start, 1)
            np.add.at(edges, range.end + 1 - start, -1)
            dropped = self.forget(start, stop + 1, among=np.cumsum(edges)[:-1] > 0)
        self.machine.up_write(self.lock)
        yield self.machine.step(
            f"{self.name} forgets {{range}}, and the page after it: {dropped} entries.",
            range.mm,
            start,
            stop,
        )
        return True

    # --- snapshot ---------------------------------------------------------------------------------
    @kernel("lib/test_hmm.c", "dmirror_snapshot")
    def snapshot_pages(self, start: int, out: NDArray[np.uint8]) -> Routine[Answer]:
        """Look without faulting: one byte a page into ``out``, uint8 of shape (pages,).

        Raises
        ------
        KernelError
            What the walk raises; bytes of the batches before it are there.
        """
        answer = Answer(out)
        # Looking changes nothing, so that batches commute.
        batch = BLOCK if self.machine.grain == BULK else self.batch
        for first in np.arange(start, start + out.size, batch).tolist():  # over batches
            last = min(first + batch, start + out.size)
            range = HmmRange(
                self.mm,
                0,
                0,
                first,
                last,
                np.zeros(last - first, np.uint64),
                dev_private_owner=self.device,
            )
            subscriber = SnapshotSubscriber(self.machine)
            range.notifier = yield from mmu_interval_notifier_insert(
                self.machine, self.mm, first, last, subscriber
            )
            try:
                yield from self.look(range)
                self.machine.up_write(self.lock)
                out[first - start : last - start] = dmirror_mkentry(
                    self.machine, self.device, range.hmm_pfns
                )
            finally:
                yield from mmu_interval_notifier_remove(self.machine, range.notifier)
            answer.cpages += last - first
        return answer

    # --- migration --------------------------------------------------------------------------------
    def _batches(self, start: int, stop: int, flags: int) -> Iterator[MigrateVma]:
        """Batches of the range, each in one mapping. Habit: 64 pages, counted from the start.

        In bulk as many are one migration as commute.

        Raises
        ------
        KernelError
            EINVAL where nothing is mapped or it cannot be read; batches before it are done.
        """
        at = start
        while at < stop:
            vma = vma_lookup(self.machine, self.mm, at)
            if vma is None or not vma.flags & VM_READ:
                place = self.machine.names.place(self.mm, at, at + 1)
                raise KernelError(_EINVAL, f"{place}: nothing there that can be read")
            limit = min(stop, vma.end)
            end = commuting_migrations(self.machine, vma, at, limit, self.batch, flags)
            batch = self.batch if end - at > self.batch else 0
            yield MigrateVma(vma, np.arange(at, end), self.device, flags, batch=batch)
            at = end

    @kernel("lib/test_hmm.c", "dmirror_migrate_to_device")
    def migrate_to_device(self, start: int, stop: int) -> Routine[Answer]:
        """Move pages from RAM to the device, then read the range back through its page table.

        Raises
        ------
        KernelError
            EINVAL where nothing is mapped; ENOENT where a page did not move. What moved stays.
        """
        lock = mm_lock(self.machine, self.mm)
        yield from self.machine.down_read(lock)
        try:
            for migrate in self._batches(start, stop, SELECT_SYSTEM):
                with self.machine.bulk(migrate.batches):
                    yield from migrate_vma_setup(self.machine, migrate)
                    yield from self._copy_to_device(migrate)
                    yield from migrate_vma_pages(self.machine, migrate)
                    yield from self._map_migrated(migrate)
                    yield from migrate_vma_finalize(self.machine, migrate)
        finally:
            self.machine.up_read(lock)
        return (yield from self._read_back(start, stop))

    def _read_back(self, start: int, stop: int) -> Routine[Answer]:
        """Habit: what was moved or taken is read through the page table, without faulting."""
        answer = Answer(np.zeros(stop - start, np.uint64))
        yield from self.machine.down_write(self.lock)
        self.copy_out(start, stop, answer)
        self.machine.up_write(self.lock)
        if answer.cpages < stop - start:
            at = start + answer.cpages
            place = self.machine.names.place(self.mm, at, at + 1)
            raise KernelError(_ENOENT, f"{place} is not in the page table of {self.name}")
        return answer

    @kernel("lib/test_hmm.c", "dmirror_migrate_alloc_and_copy")
    def _copy_to_device(self, migrate: MigrateVma) -> Routine[None]:
        _, wanted = migrate.valid_and_migrating()
        assert migrate.vma is not None
        copied = taken = 0
        if any_of(wanted):
            src, at = some(migrate.src, wanted), rows_where(wanted, migrate.src.size)
            frames = self.mdevice.alloc_pages(src.size, self.file)
            taken = frames.size
            if taken < src.size:
                src, at = src[:taken], row_numbers(at)[:taken]
            flags = migrate_flags(src)
            valid = (flags & np.uint8(MIGRATE_PFN_VALID)) != 0
            copied = how_many(valid, taken)
            source = pfn_to_page(self.machine, migrate_pfn_to_pfn(src))
            content = self.machine["page.content"][source]
            if copied < taken:
                content = np.where(valid, content, np.uint64(0))
            target = pfn_to_page(self.machine, backing(self.machine, frames))
            self.machine.write("page.content", target, content)
            flags = flags & np.uint8(MIGRATE_PFN_WRITE)
            if migrate.vma.flags & VM_WRITE and copied < taken:
                flags = flags | (~valid * np.uint8(MIGRATE_PFN_WRITE))
            migrate.dst[at] = migrate_pfn(frames, flags)
        yield self._migration_step(
            migrate,
            f"Of {{range}}, {self.name} copies {copied}; empty, and given a new frame: "
            f"{taken - copied}.",
        )

    def _migration_step(self, migrate: MigrateVma, text: str) -> Step:
        first, last = int(migrate.vpns[0]), int(migrate.vpns[-1]) + 1
        return self.machine.step(text, self.mm, first, last, detail=migrate.now(self.machine))

    @kernel("lib/test_hmm.c", "dmirror_migrate_finalize_and_map")
    def _map_migrated(self, migrate: MigrateVma) -> Routine[None]:
        yield from self.machine.down_write(self.lock)
        _, migrating = migrate.valid_and_migrating()
        done = migrating & alike(migrate.dst != 0)
        start, stop = int(migrate.vpns[0]), int(migrate.vpns[-1]) + 1
        if any_of(done):
            dst = some(migrate.dst, done)
            writable = migrate_flags(dst).astype(np.uint64) & np.uint64(MIGRATE_PFN_WRITE)
            writable >>= np.uint64(_WRITE_SHIFT)
            frames = self.backing(migrate_pfn_to_pfn(dst))
            entries = device_word(frames, writable | np.uint64(DEVICE_VALID))
            if not all_of(done):
                words = self.entries(start, stop)
                words[done] = entries
                entries = words
            self.store_entries(start, entries)
        self.machine.up_write(self.lock)
        yield self._migration_step(
            migrate, f"{self.name} maps {how_many(done, stop - start)} of {{range}}."
        )

    @kernel("lib/test_hmm.c", "dmirror_migrate_to_system")
    def migrate_to_system(self, start: int, stop: int) -> Routine[Answer]:
        """Move pages of this device back to RAM; pages elsewhere stay where they are.

        Raises
        ------
        KernelError
            EINVAL where nothing is mapped; batches before it have moved.
        """
        answer = Answer()
        lock = mm_lock(self.machine, self.mm)
        yield from self.machine.down_read(lock)
        try:
            for migrate in self._batches(start, stop, self.selects):
                with self.machine.bulk(migrate.batches):
                    yield from migrate_vma_setup(self.machine, migrate)
                    yield from self._copy_to_ram(migrate)
                    yield from migrate_vma_pages(self.machine, migrate)
                    valid, migrating = migrate.valid_and_migrating()
                    answer.cpages += how_many(valid & migrating, migrate.vpns.size)
                    yield from migrate_vma_finalize(self.machine, migrate)
        finally:
            self.machine.up_read(lock)
        return answer

    @kernel("lib/test_hmm.c", "dmirror_devmem_fault")
    def devmem_fault(self, vma: Vma, vpns: Pfns, pfns: Pfns) -> Routine[None]:
        """Bring pages that the CPU touched back to RAM, each by a migration of its own."""
        migrate = MigrateVma(vma, vpns, self.device, self.selects, pfns, each=True)
        yield from migrate_vma_setup(self.machine, migrate)
        yield from self._copy_to_ram(migrate)
        yield from migrate_vma_pages(self.machine, migrate)
        yield from migrate_vma_finalize(self.machine, migrate)

    @kernel("lib/test_hmm.c", "dmirror_devmem_fault_alloc_and_copy")
    def _copy_to_ram(self, migrate: MigrateVma) -> Routine[None]:
        valid, migrating = migrate.valid_and_migrating()
        wanted = valid & migrating
        count = how_many(wanted, migrate.vpns.size)
        if count:
            start, stop = int(migrate.vpns[0]), int(migrate.vpns[-1]) + 1
            among = None
            if count < stop - start:
                among = np.zeros(stop - start, np.bool_)
                among[some(migrate.vpns, wanted) - start] = True
            self.forget(start, stop, among)
            fill_dst(self.machine, migrate, wanted)
        yield self._migration_step(
            migrate, f"Of {{range}}, {self.name} copies {count} to RAM, and forgets what moves."
        )

    # --- exclusive access -------------------------------------------------------------------------
    @kernel("lib/test_hmm.c", "dmirror_exclusive")
    def make_exclusive(self, start: int, stop: int) -> Routine[Answer]:
        """Take pages for atomic operations, a batch at a time, then read the range back.

        Raises
        ------
        KernelError
            EBUSY when a page of a batch could not be had; batches before it stay exclusive, and so
            does what was converted in this one. ENOENT when the page table lost one again.
        """
        lock = mm_lock(self.machine, self.mm)
        yield from self.machine.down_read(lock)
        try:
            for first in np.arange(start, stop, self.batch).tolist():  # over batches
                yield from self._take_batch(first, min(first + self.batch, stop))
        finally:
            self.machine.up_read(lock)
        return (yield from self._read_back(start, stop))

    def _take_batch(self, start: int, stop: int) -> Routine[None]:
        machine = self.machine
        busy = KernelError(
            _EBUSY, f"{machine.names.place(self.mm, start, stop)}: not all to be had"
        )
        try:
            pfns, mine = yield from make_device_exclusive_range(machine, self.mm, start, stop, 0)
        except KernelError:
            raise busy from None
        if pfns.size == stop - start and any_of(mine):  # habit: all fetched, or none is mapped
            yield from machine.down_write(self.lock)
            words = self.entries(start, stop)
            words[mine] = device_word(pfns[mine], DEVICE_VALID | DEVICE_ATOMIC)
            self.store_entries(start, words)
            machine.up_write(self.lock)
        if any_of(mine):
            set_flags(machine, pfns[mine], off=PG_LOCKED)
        put_page(machine, pfns)
        if not all_of(mine) or pfns.size < stop - start:
            raise busy
        yield machine.step(f"{self.name} has {{range}} to itself.", self.mm, start, stop)

    @kernel("lib/test_hmm.c", "dmirror_check_atomic")
    def check_atomic(self, start: int, stop: int) -> Routine[Answer]:
        """Whether the device has none of the pages to itself.

        Raises
        ------
        KernelError
            EPERM when it has one.
        """
        atomic = (self.entries(start, stop) & np.uint64(DEVICE_ATOMIC)) != 0
        yield self.machine.step(
            f"{self.name} has {int(atomic.sum())} pages of {{range}} to itself.",
            self.mm,
            start,
            stop,
        )
        if any_of(atomic):
            at = start + int(np.argmax(atomic))
            raise KernelError(
                _EPERM, f"{self.machine.names.place(self.mm, at, at + 1)} is exclusive"
            )
        return Answer()

    # --- close ------------------------------------------------------------------------------------
    def give_back_memory(self) -> Routine[None]:
        """Habit: closing any file empties the device, for every process, chunk by chunk."""
        for first, last in list(self.mdevice.chunks()):
            yield from self.mdevice.evict_chunk(first, last)

    @kernel("lib/test_hmm.c", "dmirror_fops_unlocked_ioctl")
    def release_memory(self) -> Routine[Answer]:
        """Give up all memory of the device, of every process (the ioctl RELEASE)."""
        yield from self.mdevice.remove_chunks()
        return Answer()
