"""hmm_vma_get_pfns, hmm_vma_fault, hmm_vma_range_done: 4.14, and 4.17 in a driver's encoding."""

import numpy as np
import pytest

from hmmlab import Machine, Process
from hmmlab.model.entry import SWP_DEVICE_EXCLUSIVE_READ, SWP_MIGRATION_READ, pfn_of, swap_word
from hmmlab.model.history import Era, HmmMirror, hmm_mirror_register, lookup_2017, lookup_2018
from hmmlab.model.history.lookup_2017 import (
    HMM_PFN_DEVICE_UNADDRESSABLE,
    HMM_PFN_EMPTY,
    HMM_PFN_ERROR,
    HMM_PFN_READ,
    HMM_PFN_SPECIAL,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HmmRange,
    hmm_pfn_t_from_pfn,
    hmm_pfn_t_to_pfn,
    hmm_vma_fault,
    hmm_vma_get_pfns,
    hmm_vma_range_done,
)
from hmmlab.model.history.ranges import is_valid
from hmmlab.model.history.struct_hmm import hmm_of
from hmmlab.model.history.walk_2018 import HmmRange as HmmRange2018
from hmmlab.model.machine import BULK, Actor, KernelError, Steps
from hmmlab.model.memory import Faults
from hmmlab.model.mm_types import VM_HUGETLB, VM_PFNMAP, mm_lock, mm_root, vma_lookup
from hmmlab.model.page_table import read_range, rows_of_range

RW = HMM_PFN_VALID | HMM_PFN_READ | HMM_PFN_WRITE
RO = HMM_PFN_VALID | HMM_PFN_READ


class Listener:
    def sync_cpu_device_pagetables(self, *update):
        pass


class Case:
    """A process with a mirror of 4.14, and lookups of a region of it."""

    def __init__(self, machine, process, run):
        self.machine, self.process, self.run = machine, process, run
        self.range = HmmRange()

    def vma(self, pages):
        return vma_lookup(self.machine, self.process.mm, pages.start)

    def words(self, pages):
        root = mm_root(self.machine, self.process.mm)
        return read_range(self.machine, root, pages.start, pages.stop)

    def put_word(self, page, word):
        root = mm_root(self.machine, self.process.mm)
        rows = rows_of_range(self.machine, root, page.start, page.stop)
        self.machine.write("pte", rows, word)

    def snapshot(self, pages, pfns=None, vma=None):
        pfns = np.full(len(pages), 99, np.uint64) if pfns is None else pfns
        routine = hmm_vma_get_pfns(
            self.machine, vma or self.vma(pages), self.range, pages.start, pages.stop, pfns
        )
        return self.run(routine), pfns

    def fault(self, pages, write=False, block=True, pfns=None):
        pfns = np.full(len(pages), 99, np.uint64) if pfns is None else pfns
        self.last_pfns = pfns
        return hmm_vma_fault(
            self.machine,
            self.vma(pages),
            self.range,
            pages.start,
            pages.stop,
            pfns,
            write,
            block,
        )

    def done(self, pages):
        return hmm_vma_range_done(self.machine, self.vma(pages), self.range)


@pytest.fixture
def case(machine, process, run, register):
    register(Era.V4_14)
    return Case(machine, process, run)


def flags_of(pfns):
    return (pfns & np.uint64(127)).tolist()


# --- the encoding ---------------------------------------------------------------------------------


def test_the_bits_of_4_14():
    bits = [RO - HMM_PFN_READ, HMM_PFN_READ, HMM_PFN_WRITE, HMM_PFN_ERROR, HMM_PFN_EMPTY]
    bits += [HMM_PFN_SPECIAL, HMM_PFN_DEVICE_UNADDRESSABLE]
    assert bits == [1 << bit for bit in range(7)]
    frames = np.array([0, 5, 1 << 34])
    words = hmm_pfn_t_from_pfn(frames)
    assert words.tolist() == [1, (5 << 7) | 1, (1 << 41) | 1]
    assert hmm_pfn_t_to_pfn(words).tolist() == frames.tolist()
    assert hmm_pfn_t_to_pfn(np.array([HMM_PFN_EMPTY], np.uint64)).tolist() == [-1]


def test_what_a_snapshot_says_of_each_page(case, machine, process, device):
    a = process.mmap(8)
    process.store(a[:4], 1)
    process.load(a[4])
    device.to_dev(a[2])
    case.put_word(a[5], swap_word(SWP_MIGRATION_READ, np.array([9])))
    case.put_word(a[6], swap_word(SWP_DEVICE_EXCLUSIVE_READ, np.array([9])))
    answer, pfns = case.snapshot(a)
    assert answer == 0
    assert flags_of(pfns) == [
        RW,
        RW,
        RW | HMM_PFN_DEVICE_UNADDRESSABLE,
        RW,
        RO,
        0,
        HMM_PFN_ERROR,
        HMM_PFN_EMPTY,
    ]
    assert hmm_pfn_t_to_pfn(pfns)[:2].tolist() == pfn_of(case.words(a[:2])).tolist()
    case.put_word(a[5:7], 0)


def test_a_mapping_without_read_has_valid_words_without_read(case, process):
    a = process.mmap(2)
    process.store(a, 1)
    process.mprotect(a, "none")
    _, pfns = case.snapshot(a)
    assert flags_of(pfns) == [HMM_PFN_VALID, HMM_PFN_VALID]


# --- errors and tracking --------------------------------------------------------------------------


def test_a_range_that_leaves_the_mapping(case, process, run):
    a = process.mmap(4)
    outside = process.region("A", 6)
    assert case.snapshot(outside, vma=case.vma(a))[0] == -22
    assert case.run(case.fault(outside)) == -22
    assert case.range.row == 0


def test_no_mirror_is_registered(machine, process, run):
    case, a = Case(machine, process, run), process.mmap(2)
    assert case.snapshot(a)[0] == -22
    assert run(case.fault(a)) == -22


def test_no_memory_for_a_struct_hmm(machine, process, run, use_up_ram):
    case, a = Case(machine, process, run), process.mmap(2)
    use_up_ram()
    assert case.snapshot(a)[0] == -12
    pfns = np.full(2, 99, np.uint64)
    assert run(case.fault(a, pfns=pfns)) == -12 and pfns.tolist() == [0, 0]


@pytest.mark.parametrize("flag", [VM_HUGETLB, VM_PFNMAP])
def test_special_mappings_are_refused_by_the_snapshot_and_not_by_the_fault(
    case, machine, process, flag
):
    a = process.mmap(2)
    machine.write("vma.flags", case.vma(a).row, case.vma(a).flags | flag)
    answer, pfns = case.snapshot(a)
    assert answer == -22 and pfns.tolist() == [HMM_PFN_SPECIAL] * 2
    assert case.range.row == 0
    pfns[:] = 99
    assert case.run(case.fault(a, pfns=pfns)) == 0
    assert pfns.tolist() == [HMM_PFN_SPECIAL] * 2
    assert case.range.row and case.done(a) is True


def test_the_range_is_tracked_until_done(case, machine, process):
    a = process.mmap(4)
    process.store(a, 1)
    case.snapshot(a)
    assert is_valid(machine, case.range)
    process.madvise(a[1:3], "dontneed")
    assert flags_of(case.range.pfns) == [RW, 0, 0, RW]
    assert case.done(a) is False
    case.snapshot(a)
    process.madvise(a[1:3], "dontneed")
    case.range.row = 0  # a driver that forgets: the kernel still writes into its array
    assert flags_of(case.range.pfns) == [RW, 0, 0, RW]


def test_done_says_true_when_nothing_changed(case, process):
    a = process.mmap(4)
    other = process.mmap(4, name="other")
    process.store(other, 1)
    case.snapshot(a)
    process.madvise(other, "dontneed")
    assert case.done(a) is True and case.range.row == 0


def test_done_on_an_empty_range_is_a_bug(case, process):
    a = process.mmap(1)
    with pytest.raises(ValueError, match="never looked up"):
        case.done(a)


# --- faulting -------------------------------------------------------------------------------------


def test_a_fault_populates_the_rest_of_the_page_table(case, process):
    a = process.mmap(600)
    process.store(a[0], 1)
    part = a[0:4]
    assert case.run(case.fault(part)) == 0
    assert flags_of(case.range.pfns) == [RW, RO, RO, RO]
    assert (case.words(a)[4:] == 0).all()  # the range bounds it
    case.done(part)
    assert case.run(case.fault(a[0:520], write=True)) == 0
    assert flags_of(case.range.pfns) == [RW] * 520


def test_one_missing_page_makes_its_whole_table_fault_from_the_first_page_on(
    case, machine, process
):
    a = process.mmap(8)
    process.store(a, 1)
    process.madvise(a[5], "dontneed")
    trace = machine.record()
    assert case.run(case.fault(a)) == 0
    details = [event.step.detail for event in trace.events]
    faults = [detail.vpns.tolist() for detail in details if isinstance(detail, Faults)]
    assert [vpn for vpns in faults for vpn in vpns] == list(range(a.start, a.stop))


def test_a_page_that_is_swapped_out_is_0_and_brought_in_by_a_fault(case, process):
    a = process.mmap(2)
    process.store(a, [3, 4])
    process.madvise(a[1], "pageout")
    _, pfns = case.snapshot(a)
    assert flags_of(pfns) == [RW, 0]
    case.done(a)
    assert case.run(case.fault(a)) == 0
    assert (case.range.pfns & np.uint64(HMM_PFN_VALID)).all()


@pytest.mark.parametrize("write", [False, True])
def test_a_lookup_is_the_same_page_by_page_and_in_bulk(write):
    found = []
    for grain in (1, 7, BULK):
        machine = Machine(4096, grain=grain)
        process = Process(machine)
        run = lambda routine: Steps(machine, "test", Actor("test"), routine).run()  # noqa: B023, E731
        run(hmm_mirror_register(machine, HmmMirror(Listener()), process.mm, Era.V4_14))
        case = Case(machine, process, run)
        a = process.mmap(700)
        process.store(a[3:300], 1)
        process.load(a[300:320])
        assert run(case.fault(a, write=write)) == 0
        frames = np.unique(hmm_pfn_t_to_pfn(case.range.pfns))
        found.append((flags_of(case.range.pfns), frames.size, case.done(a)))
    assert found[0] == found[1] == found[2]


def test_a_page_of_another_device_is_not_brought_back_by_reading(case, process, device):
    a = process.mmap(1)
    process.store(a, 7)
    device.to_dev(a)
    assert case.run(case.fault(a)) == 0
    assert flags_of(case.range.pfns) == [RW | HMM_PFN_DEVICE_UNADDRESSABLE]


def test_a_read_only_device_page_is_brought_back_by_writing(case, process, device):
    a = process.mmap(1)
    process.store(a, 7)
    device.to_dev(a)
    process.mprotect(a, "r")
    process.mprotect(a, "rw")  # the device entry stays read-only
    assert case.run(case.fault(a, write=True)) == 0
    assert flags_of(case.range.pfns) == [RW] and process.load(a) == [7]


def test_a_failing_fault_empties_from_its_table_on_and_ends_the_tracking(
    case, machine, process, monkeypatch
):
    from hmmlab.model.history import fault

    a = process.mmap(600)
    split = 512 - a.start % 512
    process.store(a[:split], 1)

    def no_memory(*args, **rest):
        yield from ()
        raise KernelError(12, "no memory")

    monkeypatch.setattr(fault, "handle_mm_fault", no_memory)
    pfns = np.full(600, 99, np.uint64)
    assert case.run(case.fault(a, pfns=pfns)) == -14
    assert set(flags_of(pfns[:split])) == {RW}
    assert (pfns[split:] == 0).all()
    assert case.range.row == 0


def test_ebusy_when_the_fault_gave_the_lock_up(case, machine, process, run, monkeypatch):
    from hmmlab.model.history import fault

    def waits(machine, vma, vpns, write, remote):
        yield machine.step("It waits for the page.", vma.mm, lock="a page")

    monkeypatch.setattr(fault, "handle_mm_fault", waits)
    a, lock = process.mmap(2), mm_lock(machine, process.mm)

    def locked(block):
        yield from machine.down_read(lock)
        return (yield from case.fault(a, block=block))

    for block in (True, False):
        assert run(locked(block)) == -16
        assert machine.holders(lock) == (False, 0)
        assert case.last_pfns.tolist() == [0, 0] and case.range.row == 0


def test_a_write_that_is_forbidden_faults_without_end(case, process):
    a = process.mmap(1)
    process.store(a, 1)
    process.mprotect(a, "r")
    with pytest.raises(RuntimeError, match="the right to write"):
        case.run(case.fault(a, write=True))


def test_a_migrating_page_is_waited_for(case, machine, process, steps):
    a = process.mmap(2)
    process.store(a, 1)
    word = case.words(a[1])
    case.put_word(a[1], swap_word(SWP_MIGRATION_READ, np.array([2])))
    looking = steps(case.fault(a))
    assert any(step.lock == "migration_entry_wait" for step in (next(looking) for _ in range(4)))
    case.put_word(a[1], word)
    assert looking.run() == 0 and flags_of(case.range.pfns) == [RW, RW]


# --- 4.17: the driver's own encoding --------------------------------------------------------------


@pytest.fixture
def range_4_17(machine, process, register):
    register(Era.V4_17)

    def make(pages, **rest):
        pfns = np.zeros(len(pages), np.uint64)
        vma = vma_lookup(machine, process.mm, pages.start)
        return HmmRange2018(pages.start, pages.stop, pfns, vma=vma, **rest)

    return make


def test_a_driver_chooses_its_bits(machine, process, run, range_4_17):
    a = process.mmap(3)
    process.store(a[0], 1)
    process.load(a[1])
    range = range_4_17(a, flags=(8, 32, 2), values=(77, 88, 99), pfn_shift=8)
    assert run(lookup_2018.hmm_vma_get_pfns(machine, range)) == 0
    frame = int(pfn_of(read_range(machine, mm_root(machine, process.mm), a.start, a.start + 1))[0])
    assert range.pfns.tolist() == [frame << 8 | 8 | 32, 1 << 8 | 8, 88]
    assert range.device_entry_to_pfn(range.pfns).tolist() == [frame, 1, -1]
    assert lookup_2018.hmm_vma_range_done(machine, range) is True


def test_each_page_says_what_it_wants(machine, process, run, range_4_17):
    a = process.mmap(3)
    range = range_4_17(a)
    range.pfns[1] = range.flags[0] | range.flags[1]
    assert run(lookup_2018.hmm_vma_fault(machine, range, True)) == 0
    words = read_range(machine, mm_root(machine, process.mm), a.start, a.stop)
    # No table was there, so the hole is faulted whole, for writing since one page wants that.
    assert (words != 0).all()
    assert ((range.pfns & range.write_bit) != 0).all()


@pytest.mark.parametrize("function", ["get_pfns", "fault"])
def test_a_mapping_that_cannot_be_read_is_eperm(machine, process, run, range_4_17, function):
    a = process.mmap(2, "none")
    range = range_4_17(a, values=(1, 2, 4))
    if function == "fault":
        routine = lookup_2018.hmm_vma_fault(machine, range, True)
    else:
        routine = lookup_2018.hmm_vma_get_pfns(machine, range)
    assert run(routine) == -1 and range.pfns.tolist() == [2, 2] and range.row == 0


def test_the_other_errors_of_4_17(machine, process, run, range_4_17):
    a = process.mmap(2)
    range = range_4_17(a, values=(1, 2, 4))
    vma = vma_lookup(machine, process.mm, a.start)
    range.vma = vma._replace(end=vma.end - 1)
    assert run(lookup_2018.hmm_vma_get_pfns(machine, range)) == -22
    range.vma = vma._replace(flags=vma.flags | VM_PFNMAP)
    assert run(lookup_2018.hmm_vma_fault(machine, range, True)) == -22
    assert range.pfns.tolist() == [4, 4]


def test_hole_4_17_writes_what_is_read_only_without_end(machine, process, run, range_4_17):
    a = process.mmap(2)
    process.store(a, 1)
    process.mprotect(a, "r")
    range = range_4_17(a)
    range.pfns[:] = range.flags[0] | range.flags[1]
    with pytest.raises(RuntimeError, match="the right to write"):
        run(lookup_2018.hmm_vma_fault(machine, range, True))


def test_4_17_needs_a_mirror_and_memory(machine, process, run, use_up_ram):
    a = process.mmap(2)
    range = HmmRange2018(a.start, a.stop, np.full(2, 9, np.uint64), values=(1, 2, 4))
    with pytest.raises(ValueError, match=r"range\.vma is not set"):
        run(lookup_2018.hmm_vma_get_pfns(machine, range))
    range.vma = vma_lookup(machine, process.mm, a.start)
    give_back = use_up_ram()
    assert run(lookup_2018.hmm_vma_get_pfns(machine, range)) == -12
    assert range.pfns.tolist() == [9, 9]  # only the fault empties them
    assert run(lookup_2018.hmm_vma_fault(machine, range, True)) == -12
    assert range.pfns.tolist() == [2, 2]
    give_back()
    assert run(lookup_2018.hmm_vma_get_pfns(machine, range)) == -22
    assert hmm_of(machine, process.mm)


def test_4_17_done_on_an_empty_range_is_a_bug(machine, range_4_17, process):
    with pytest.raises(ValueError, match="never looked up"):
        lookup_2018.hmm_vma_range_done(machine, range_4_17(process.mmap(1)[:0]))


def test_4_17_promises_eagain_and_answers_ebusy(machine, process, run, range_4_17, monkeypatch):
    """The comment above hmm_vma_fault() has the other number for a lock that was given up."""
    from hmmlab.model.history import fault

    def waits(machine, vma, vpns, write, remote):
        yield machine.step("It waits for the page.", vma.mm, lock="a page")

    monkeypatch.setattr(fault, "handle_mm_fault", waits)
    a, lock = process.mmap(2), mm_lock(machine, process.mm)
    range = range_4_17(a, values=(1, 32, 4))
    range.pfns[:] = range.flags[0]

    def locked():
        yield from machine.down_read(lock)
        return (yield from lookup_2018.hmm_vma_fault(machine, range, True))

    assert run(locked()) == -16 and machine.holders(lock) == (False, 0)
    assert range.pfns.tolist() == [32, 32] and range.row == 0


def test_4_17_brings_a_page_in_swap_in_and_waits_for_one_that_moves(case_4_17, steps):
    """Only the "minor optimization" of 5.2 forgets them (seed 002)."""
    process, machine, range_4_17 = case_4_17
    a = process.mmap(2)
    process.store(a, [3, 4])
    process.madvise(a[1], "pageout")
    root = mm_root(machine, process.mm)
    row = rows_of_range(machine, root, a.start, a.start + 1)
    word = machine["pte"][row].copy()
    machine.write("pte", row, swap_word(SWP_MIGRATION_READ, np.array([2])))
    range = range_4_17(a)
    range.pfns[:] = range.flags[0]
    looking = steps(lookup_2018.hmm_vma_fault(machine, range, True))
    next(step for step in looking if step.lock == "migration_entry_wait")
    machine.write("pte", row, word)
    assert looking.run() == 0
    words = read_range(machine, root, a.start, a.stop)
    assert range.device_entry_to_pfn(range.pfns).tolist() == pfn_of(words).tolist()


@pytest.fixture
def case_4_17(process, machine, range_4_17):
    return process, machine, range_4_17


def test_until_5_1_only_the_pages_themselves_ask(case_4_17, run):
    """default_flags and pfn_flags_mask came in 5.2, to save the "pre-fill" (seed 002)."""
    process, machine, range_4_17 = case_4_17
    a = process.mmap(2)
    range = range_4_17(a, values=(1 << 3, 32, 1 << 4))
    range.default_flags = range.pfn_flags_mask = range.flags[0]
    assert run(lookup_2018.hmm_vma_fault(machine, range, True)) == 0
    assert range.pfns.tolist() == [32, 32]
    assert lookup_2018.hmm_vma_range_done(machine, range)
    range.pfns[:], range.pfn_flags_mask = range.flags[0], 0
    assert run(lookup_2018.hmm_vma_fault(machine, range, True)) == 0
    assert ((range.pfns & range.valid_bit) != 0).all()


def test_until_5_1_the_first_page_that_lacks_something_speaks_for_all(case_4_17, run):
    process, machine, range_4_17 = case_4_17
    a = process.mmap(3)
    range = range_4_17(a)
    valid, write = range.flags[:2]
    range.pfns[:] = [valid, valid | write, 0]
    assert run(lookup_2018.hmm_vma_fault(machine, range, True)) == 0
    assert (range.pfns & np.uint64(3)).tolist() == [valid] * 3  # read for all, and the wish is gone


def test_lookup_2017_is_of_4_14(machine, process, run, register):
    register(Era.V5_2)
    a = process.mmap(1)
    vma = vma_lookup(machine, process.mm, a.start)
    pfns = np.zeros(1, np.uint64)
    with pytest.raises(ValueError, match=r"5\.2, not 4\.14"):
        run(lookup_2017.hmm_vma_get_pfns(machine, vma, HmmRange(), a.start, a.stop, pfns))
