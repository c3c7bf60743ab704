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
from hmmlab.model.ksm import ksm_scan
from hmmlab.model.mm_types import mm_root, vma_lookup
from hmmlab.model.mmu_notifier import (
    EVERYTHING,
    Event,
    MmuNotifierRange,
    invalidate_range_start,
    mmu_notifier_release,
)
from hmmlab.model.move_pages import sys_move_pages
from hmmlab.model.oom_kill import oom_reap_task_mm
from hmmlab.model.page_ref import get_page, put_page
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


def reclaim(p, a):
    p.madvise(a, "pageout")


def compaction(p, a):
    p.run("move_pages", sys_move_pages(p.machine, p.mm, a.start, a.stop, 1))


@pytest.mark.parametrize("change", [reclaim, compaction])
def test_clear_is_also_what_the_kernel_does_on_its_own(process, listen, change):
    """Migration, compaction, reclaim, in seed 003's own list."""
    a = process.mmap(2)
    process.store(a, [1, 2])
    listener = listen()
    change(process, a)
    assert [range.event for range in listener.starts] == [CLEAR] * 2
    assert [(range.start, range.end) for range in listener.starts] == [
        (page.start, page.stop) for page in a
    ]


def test_protection_page_is_of_pages_and_not_of_the_mapping(process, listen):
    a = process.mmap(2)
    process.store(a, 1)
    listener = listen()
    process.fork()
    assert [range.event for range in listener.starts] == [PROTECTION_PAGE]
    assert listener.starts[0].vma == vma_lookup(process.machine, process.mm, a.start).row


def test_soft_dirty_is_of_everything_and_of_no_mapping(process, listen):
    a = process.mmap(2)
    process.store(a, 1)
    listener = listen()
    process.clear_refs()
    (range,) = listener.starts
    assert (range.event, range.vma, range.start) == (SOFT_DIRTY, 0, 0)
    assert range.end == EVERYTHING


def test_migration_was_a_clear_then(process, listen, device):
    a = process.mmap(2)
    process.store(a, 1)
    listener = listen()
    device.to_dev(a)
    assert [range.event for range in listener.starts] == [CLEAR]
    assert listener.starts[0].vma == 0  # nobody said of which mapping, before 5.9


def test_the_end_of_an_address_space_was_no_event(machine, process, run, listen):
    listener = listen()
    ended = []
    listener.release = ended.append
    run(mmu_notifier_release(machine, process.mm))
    assert listener.heard == [] and ended == [process.mm]


# --- blockable (patches 1 to 3) -------------------------------------------------------------------


def test_blockable_is_a_flag_that_the_start_sets(machine, process, run, listen):
    """It is not among the flags that a range begins with."""
    assert (MMU_NOTIFIER_RANGE_BLOCKABLE, MMU_NOTIFIER_USE_CHANGE_PTE) == (1, 2)
    assert not mmu_notifier_range_blockable(mmu_notifier_range_init(CLEAR, 0, 0, 1, 2, 3))
    assert mmu_notifier_range_blockable(mmu_notifier_range_init(CLEAR, 1, 0, 1, 2, 3))
    listener = listen()
    for blockable in (True, False):
        change = MmuNotifierRange.one(process.mm, Event.UNMAP, 1, 2, blockable=blockable)
        run(invalidate_range_start(machine, change))
    assert [mmu_notifier_range_blockable(range) for range in listener.starts] == [True, False]


def test_only_the_reaper_may_not_sleep(machine, process, listen):
    a = process.mmap(2)
    process.store(a, 1)
    listener = listen()
    process.run("reap", oom_reap_task_mm(machine, process.mm))
    process.munmap(a)
    assert [mmu_notifier_range_blockable(range) for range in listener.starts] == [False, True]
    assert [range.event for range in listener.starts] == [UNMAP, UNMAP]


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


@pytest.mark.parametrize("proposed", [True, False])
def test_equal_pages_that_merge_are_the_other_two_places(machine, process, listen, proposed):
    """Seed 003 calls change_pte "a KSM thing"."""
    a = process.mmap(2)
    process.store(a, 7)
    kvm = listen(Kvm, use_change_pte=proposed)
    root = mm_root(machine, process.mm)
    before = pfn_of(read_range(machine, root, a.start, a.stop)).tolist()
    kvm.table.update(zip(range(a.start, a.stop), before, strict=True))
    assert process.run("ksm", ksm_scan(machine, process.mm, a.start, a.stop)) == 1
    # One page is write-protected, the other also replaced.
    assert [mmu_notifier_range_use_change_pte(range) for range in kvm.starts] == [proposed] * 3
    assert kvm.heard == ["start", "change_pte", "end"] * 3
    now = pfn_of(read_range(machine, root, a.start, a.stop)).tolist()
    assert now[0] == now[1]
    assert list(kvm.table.values()) == (now if proposed else [])


def test_change_pte_is_not_called_where_the_word_stays(machine, process, listen):
    """A page that may not be written already is write-protected, and nothing is set."""
    a = process.mmap(3)
    process.store(a, 7)
    process.run("ksm", ksm_scan(machine, process.mm, a.start, a.start + 2))
    frame = pfn_of(read_range(machine, mm_root(machine, process.mm), a.start + 2, a.stop))
    get_page(machine, frame)  # somebody holds it, so it is not protected and not merged
    kvm = listen(Kvm, use_change_pte=True)
    process.run("ksm", ksm_scan(machine, process.mm, a.start, a.stop))
    assert kvm.heard and "change_pte" not in kvm.heard
    put_page(machine, frame)
