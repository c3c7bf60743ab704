"""The notifier events: seed 003 ("mmu notifier provide context informations", v5, 19 Feb 2019)."""

import numpy as np
import pytest

from hmmlab.model.entry import RW, pfn_of
from hmmlab.model.history.events_2019 import (
    MMU_NOTIFIER_RANGE_BLOCKABLE,
    MMU_NOTIFIER_USE_CHANGE_PTE,
    MmuNotifierEvent,
    mmu_notifier_range_blockable,
    mmu_notifier_range_init,
    mmu_notifier_range_update_to_read_only,
    mmu_notifier_range_use_change_pte,
    mmu_notifier_register_2019,
)
from hmmlab.model.mm_types import mm_root, vma_lookup
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_start,
    mmu_notifier_release,
)
from hmmlab.model.page_table import read_range

UNMAP, CLEAR, PROTECTION_VMA, PROTECTION_PAGE, SOFT_DIRTY = MmuNotifierEvent


class Listener:
    def __init__(self, machine):
        self.machine, self.starts, self.heard, self.answer = machine, [], [], None

    def invalidate_range_start(self, range):
        self.starts.append(range)
        self.heard.append("start")
        return self.answer

    def invalidate_range_end(self, range):
        self.heard.append("end")


class Kvm(Listener):
    """A listener with a table of its own that keeps what it can."""

    def __init__(self, machine):
        super().__init__(machine)
        self.table, self.thrown_away = {}, 0

    def invalidate_range_start(self, range):
        super().invalidate_range_start(range)
        if mmu_notifier_range_use_change_pte(range):
            return
        for page in [page for page in self.table if range.start <= page < range.end]:
            del self.table[page]
            self.thrown_away += 1

    def change_pte(self, mm, address, pte):
        self.heard.append("change_pte")
        if address in self.table:
            self.table[address] = int(pfn_of(np.array([pte], np.uint64))[0])


@pytest.fixture
def listen(machine, process, run):
    def make(kind=Listener, **rest):
        listener = kind(machine)
        run(mmu_notifier_register_2019(machine, process.mm, listener, **rest))
        return listener

    return make


def cow(process):
    """A page mapped read-only whose next write copies: the zero page."""
    a = process.mmap(1)
    process.load(a)
    return a


# --- the five events ------------------------------------------------------------------------------


def test_there_are_five_events():
    assert [event.name for event in MmuNotifierEvent] == [
        "MMU_NOTIFY_UNMAP",
        "MMU_NOTIFY_CLEAR",
        "MMU_NOTIFY_PROTECTION_VMA",
        "MMU_NOTIFY_PROTECTION_PAGE",
        "MMU_NOTIFY_SOFT_DIRTY",
    ]
    assert [int(event) for event in MmuNotifierEvent] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "change, events",
    [
        (lambda p, a: p.munmap(a), [UNMAP]),
        (lambda p, a: p.mremap(a), [UNMAP, UNMAP]),
        (lambda p, a: p.madvise(a, "dontneed"), [CLEAR]),
        (lambda p, a: p.mprotect(a, "r"), [PROTECTION_VMA]),
    ],
    ids=["munmap", "mremap", "dontneed", "mprotect"],
)
def test_the_events_of_the_cover_letter(process, listen, change, events):
    a = process.mmap(4)
    process.store(a, 1)
    listener = listen()
    change(process, a)
    assert [range.event for range in listener.starts] == events
    assert all((range.start, range.end) == (a.start, a.stop) for range in listener.starts)
    assert all(range.vma for range in listener.starts)
    assert listener.heard == ["start", "end"] * len(events)


@pytest.mark.parametrize("now", [Event.PROTECTION_PAGE, Event.SOFT_DIRTY])
def test_the_other_two(machine, process, run, listen, now):
    listener = listen()
    run(invalidate_range_start(machine, MmuNotifierRange.one(process.mm, now, 1, 2)))
    assert [int(range.event) for range in listener.starts] == [int(now)]


def test_migration_was_a_clear_then(process, listen, device):
    a = process.mmap(2)
    process.store(a, 1)
    listener = listen()
    device.to_dev(a)
    assert [range.event for range in listener.starts] == [CLEAR]


def test_the_end_of_an_address_space_was_no_event(machine, process, run, listen):
    listener = listen()
    ended = []
    listener.release = ended.append
    run(mmu_notifier_release(machine, process.mm))
    assert listener.heard == [] and ended == [process.mm]


# --- blockable (patches 1 to 3) -------------------------------------------------------------------


def test_blockable_is_a_flag(machine, process, run, listen):
    assert (MMU_NOTIFIER_RANGE_BLOCKABLE, MMU_NOTIFIER_USE_CHANGE_PTE) == (1, 2)
    assert mmu_notifier_range_blockable(mmu_notifier_range_init(CLEAR, 0, 0, 1, 2, 3))
    listener = listen()
    for blockable in (True, False):
        change = MmuNotifierRange.one(process.mm, Event.UNMAP, 1, 2, blockable=blockable)
        run(invalidate_range_start(machine, change))
    assert [mmu_notifier_range_blockable(range) for range in listener.starts] == [True, False]


@pytest.mark.parametrize("blockable, answer", [(True, 0), (False, -11)])
def test_only_a_change_that_may_not_sleep_can_be_refused(
    machine, process, run, listen, blockable, answer
):
    listener = listen()
    listener.answer = -11
    adapter = machine.objects["notifier"][int(np.flatnonzero(machine["notifier.mm"])[-1])]
    change = MmuNotifierRange.one(process.mm, Event.UNMAP, 1, 2, blockable=blockable)
    assert run(adapter.invalidate_range_start(change)) == answer


# --- update to read-only (patch 8) ----------------------------------------------------------------


@pytest.mark.parametrize(
    "prot, answer", [("r", True), ("none", False), ("rw", True)], ids=["r", "none", "rw"]
)
def test_update_to_read_only_asks_the_new_flags(machine, process, listen, prot, answer):
    a = process.mmap(2)
    process.store(a, 1)
    if prot == "rw":
        process.mprotect(a, "r")
    listener = listen()
    said = []
    listener.invalidate_range_end = lambda range: said.append(
        mmu_notifier_range_update_to_read_only(machine, range)
    )
    process.mprotect(a, prot)
    # An upgrade passes too: the mapping can be read, and more is not asked.
    assert said == [answer]


def test_update_to_read_only_needs_the_mapping_and_the_event(machine, process):
    a = process.mmap(1)
    vma = vma_lookup(machine, process.mm, a.start).row
    for event, row, answer in (
        (PROTECTION_VMA, vma, True),
        (PROTECTION_VMA, 0, False),
        (PROTECTION_PAGE, vma, False),
        (CLEAR, vma, False),
    ):
        range = mmu_notifier_range_init(event, 0, row, process.mm, a.start, a.stop)
        assert mmu_notifier_range_update_to_read_only(machine, range) is answer


# --- change_pte (patch 9) -------------------------------------------------------------------------


@pytest.mark.parametrize("proposed", [True, False])
def test_only_the_ninth_patch_marks_a_copy_on_write(process, listen, proposed):
    a = cow(process)
    listener = listen(use_change_pte=proposed)
    process.store(a, 1)
    assert [mmu_notifier_range_use_change_pte(range) for range in listener.starts] == [proposed]
    assert listener.starts[0].event is CLEAR
    process.madvise(a, "dontneed")
    assert mmu_notifier_range_use_change_pte(listener.starts[-1]) is False


@pytest.mark.parametrize("proposed, kept", [(True, 1), (False, 0)])
def test_without_the_mark_the_start_throws_away_what_change_pte_could_keep(
    machine, process, listen, proposed, kept
):
    a = cow(process)
    kvm = listen(Kvm, use_change_pte=proposed)
    kvm.table[a.start] = 1
    process.store(a, 1)
    assert kvm.heard == ["start", "change_pte", "end"]
    assert len(kvm.table) == kept and kvm.thrown_away == 1 - kept
    if kept:
        word = read_range(machine, mm_root(machine, process.mm), a.start, a.stop)
        assert kvm.table[a.start] == pfn_of(word)[0] and (word & np.uint64(RW)).all()


def test_change_pte_is_called_for_nothing_else(process, listen):
    a = process.mmap(2)
    process.store(a, 1)
    kvm = listen(Kvm, use_change_pte=True)
    process.mprotect(a, "r")
    process.munmap(a)
    assert kvm.heard == ["start", "end"] * 2
