"""hmm_range_*: 5.2 to 5.7, after the patch notes of seed 002."""

import numpy as np
import pytest

from hmmlab.model.entry import SWP_MIGRATION_READ, pfn_of, swap_word
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.history import Era, fault, hmm_mirror_unregister
from hmmlab.model.history.range_2019 import (
    HMM_FAULT_ALLOW_RETRY,
    HMM_FAULT_SNAPSHOT,
    HMM_RANGE_DEFAULT_TIMEOUT,
    hmm_range_fault,
    hmm_range_register,
    hmm_range_snapshot,
    hmm_range_unregister,
    hmm_range_valid,
    hmm_range_wait_until_valid,
)
from hmmlab.model.history.range_2020 import hmm_range_fault_5_7
from hmmlab.model.history.struct_hmm import hmm_of
from hmmlab.model.history.walk_2018 import HmmPfnFlag, HmmPfnValue, HmmRange
from hmmlab.model.machine import KernelError
from hmmlab.model.mm_types import VM_MIXEDMAP, mm_lock, mm_root, vma_lookup
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.page_table import read_range, rows_of_range

V, W, PRIVATE = 1, 2, 4
VALUES = ERROR, NONE, SPECIAL = 8, 32, 16
ERAS = [Era.V5_2, Era.V5_3, Era.V5_4]
FAULTS = 0  # in 5.2 and 5.3 "do not block", in 5.4 no flag


class Case:
    """A process with a mirror of some era, and one range of it."""

    def __init__(self, machine, process, run, era, mirror):
        self.machine, self.process, self.run, self.era = machine, process, run, era
        self.mirror = mirror
        self.lock = mm_lock(machine, process.mm)

    def register(self, pages, **rest):
        rest = {"values": VALUES, "default_flags": V, **rest}
        self.range = HmmRange(pfns=np.zeros(len(pages), np.uint64), **rest)
        assert self.run(self.registering(self.range, pages)) == 0
        return self.range

    def registering(self, range, pages):
        """``hmm_range_register`` with the arguments of its kernel."""
        if self.era is Era.V5_4:
            range.start, range.end = pages.start, pages.stop
            return hmm_range_register(self.machine, range, self.mirror)
        of = self.process.mm if self.era is Era.V5_2 else self.mirror
        return hmm_range_register(self.machine, range, of, pages.start, pages.stop)

    def locked(self, routine):
        """Run with the mmap_lock held; returns the answer and whether the lock still is."""

        def body():
            yield from self.machine.down_read(self.lock)
            return (yield from routine)

        answer = self.run(body())
        held = self.machine.holders(self.lock)[1] == 1
        if held:
            self.machine.up_read(self.lock)
        return answer, held

    def fault(self, how=FAULTS):
        return self.locked(hmm_range_fault(self.machine, self.range, how))

    def snapshot(self):
        if self.era >= Era.V5_4:
            return self.fault(HMM_FAULT_SNAPSHOT)
        return self.locked(hmm_range_snapshot(self.machine, self.range))

    def flags(self):
        return (self.range.pfns & np.uint64(63)).tolist()

    def begin(self, pages):
        change = MmuNotifierRange.one(self.process.mm, Event.CLEAR, pages.start, pages.stop)
        self.run(invalidate_range_start(self.machine, change))
        return lambda: self.run(invalidate_range_end(self.machine, change))

    def put_word(self, page, word):
        root = mm_root(self.machine, self.process.mm)
        self.machine.write("pte", rows_of_range(self.machine, root, page.start, page.stop), word)


@pytest.fixture
def case_of(machine, process, run, register):
    def make(era):
        mirror, _ = register(era)
        return Case(machine, process, run, era, mirror)

    return make


@pytest.fixture(params=ERAS, ids=lambda era: era.label)
def case(request, case_of):
    return case_of(request.param)


def written(process, pages=4):
    a = process.mmap(pages)
    process.store(a, range(pages))
    return a


# --- names and numbers ----------------------------------------------------------------------------


def test_the_numbers():
    assert (HMM_FAULT_ALLOW_RETRY, HMM_FAULT_SNAPSHOT) == (1, 2)
    assert HMM_RANGE_DEFAULT_TIMEOUT == 1000
    assert [flag.name for flag in HmmPfnFlag] == [
        "HMM_PFN_VALID",
        "HMM_PFN_WRITE",
        "HMM_PFN_DEVICE_PRIVATE",
    ]
    assert [value.name for value in HmmPfnValue] == [
        "HMM_PFN_ERROR",
        "HMM_PFN_NONE",
        "HMM_PFN_SPECIAL",
    ]


# --- hmm_range_register ---------------------------------------------------------------------------


def test_edges_must_fit_and_the_range_not_be_empty(machine, process, run, register):
    register(Era.V5_2)
    for start, end, shift in ((8, 8, 12), (9, 8, 12), (8, 20, 16), (3, 16, 16)):
        routine = hmm_range_register(machine, HmmRange(), process.mm, start, end, shift)
        assert run(routine) == -22
    assert run(hmm_range_register(machine, HmmRange(), process.mm, 16, 32, 16)) == 0


def test_5_2_a_dying_address_space_has_no_ranges(case_of, machine, process):
    case = case_of(Era.V5_2)
    a = written(process)
    tracked = case.register(a)
    hmm = hmm_of(machine, process.mm)
    case.run(machine.objects["hmm"][hmm].release(process.mm))
    assert case.run(case.registering(HmmRange(), a)) == -14
    assert not hmm_range_valid(machine, tracked)
    assert case.run(hmm_range_wait_until_valid(machine, tracked)) is False
    assert case.fault() == (-14, True) and case.snapshot() == (-14, True)


@pytest.mark.parametrize("era", ERAS[1:], ids=lambda era: era.label)
def test_since_5_3_it_is_the_address_space_itself_that_is_asked(case_of, process, era):
    """``mmget_not_zero`` in ``hmm_range_register``; nothing is noted in the struct hmm."""
    case = case_of(era)
    a = written(process)
    process.exit()
    assert not case.machine["hmm.dead"].any()
    assert case.run(case.registering(HmmRange(), a)) == -14


def test_a_wrong_range_makes_no_struct_hmm(machine, process, run):
    assert run(hmm_range_register(machine, HmmRange(), process.mm, 8, 8)) == -22
    assert hmm_of(machine, process.mm) == 0


@pytest.mark.parametrize("mirror_first", [True, False])
def test_until_5_3_a_range_holds_the_struct_hmm_too(case, machine, process, mirror_first):
    """ "use reference counting for HMM struct": mirrors and ranges count alike."""
    case.register(written(process))
    hmm = hmm_of(machine, process.mm)
    if mirror_first:
        case.run(hmm_mirror_unregister(machine, case.mirror))
        assert bool(hmm_of(machine, process.mm)) is (case.era < Era.V5_4)
        hmm_range_unregister(machine, case.range)
    else:
        hmm_range_unregister(machine, case.range)
        assert hmm_of(machine, process.mm) == hmm
        case.run(hmm_mirror_unregister(machine, case.mirror))
    assert hmm_of(machine, process.mm) == 0
    assert not (machine["notifier.mm"] == process.mm).any()


def test_a_range_registered_during_a_change_is_not_valid_at_first(case, machine, process):
    a = written(process)
    end = case.begin(process.mmap(1, name="elsewhere"))
    case.register(a)
    assert not hmm_range_valid(machine, case.range)
    end()
    assert hmm_range_valid(machine, case.range)


def test_a_range_that_is_not_registered(case, machine):
    with pytest.raises(ValueError, match="not registered"):
        case.run(hmm_range_fault(machine, HmmRange(), True))


def test_unregistered_it_is_neither_valid_nor_told(case, machine, process):
    a = written(process)
    case.register(a)
    hmm_range_unregister(machine, case.range)
    assert not hmm_range_valid(machine, case.range) and case.range.row == 0
    assert not machine["hmm_range.hmm"].any()


# --- waiting (seed 002: "provide a completion mechanism for them to wait") ------------------------


def test_waiting_ends_with_the_change(case, machine, process, steps):
    a = written(process)
    case.register(a)
    end = case.begin(a)
    waiting = steps(hmm_range_wait_until_valid(machine, case.range))
    next(waiting), next(waiting)
    end()
    assert waiting.run() is True


def test_waiting_ends_with_the_time(case, machine, process):
    a = written(process)
    case.register(a)
    end = case.begin(a)
    assert case.run(hmm_range_wait_until_valid(machine, case.range, 5)) is False
    end()


# --- counts (seed 002: "returning the number of populated entries in pfns array") -----------------


def test_lookups_return_how_many_pages(case, process):
    a = written(process)
    case.register(a[1:])
    assert case.snapshot() == (3, True)
    assert case.flags() == [V | W] * 3
    assert case.fault() == (3, True)


def test_a_snapshot_faults_nothing_in(case, process):
    a = process.mmap(3)
    process.store(a[1], 1)
    case.register(a)
    assert case.snapshot() == (3, True)
    assert case.flags() == [NONE, V | W, NONE]


def test_hole_the_count_is_short_where_the_range_ends_without_a_page_table(case, process):
    """Seed 002, for 5.8: ``last`` is not updated "consistently", and nothing looks at the count."""
    a = process.mmap(3 * PMD_PAGES)
    process.store(a[0], 1)
    case.register(a)
    counted = a.stop - 1 - (a.stop - 1) % PMD_PAGES - a.start  # the last table that is missing
    assert 2 * PMD_PAGES <= counted < len(a)
    assert case.snapshot() == (counted, True)
    assert case.flags() == [V | W] + [NONE] * (len(a) - 1)  # all of them are answered
    process.store(a[-1], 1)
    assert case.snapshot() == (len(a), True)


def test_hole_a_gap_at_the_end_is_not_counted_either(case, process):
    a = written(process, 6)
    process.mmap(1, name="above")
    process.munmap(a[4:])
    case.register(a)
    assert case.snapshot() == (4, True)
    assert case.flags() == [V | W] * 4 + [NONE] * 2


def test_frames_stand_above_the_shift(case, machine, process):
    a = written(process)
    case.register(a, pfn_shift=20)
    case.snapshot()
    words = read_range(machine, mm_root(machine, process.mm), a.start, a.stop)
    assert case.range.device_entry_to_pfn(case.range.pfns).tolist() == pfn_of(words).tolist()
    assert (case.range.pfns >> np.uint64(20)).tolist() == pfn_of(words).tolist()


def test_a_lookup_goes_over_several_mappings_and_gaps(case, process):
    a = written(process, 6)
    process.munmap(a[2])
    process.mprotect(a[4:], "r")
    case.register(a)
    assert case.snapshot() == (6, True)
    assert case.flags() == [V | W, V | W, NONE, V | W, V, V]
    assert case.fault() == (-14, True)
    assert case.flags() == [V | W, V | W, NONE, NONE, NONE, NONE]


# --- default_flags and pfn_flags_mask (seed 002) --------------------------------------------------


def test_default_flags_ask_for_every_page(case, process):
    a = process.mmap(3)
    process.store(process.mmap(1, name="x"), 1)
    case.register(a, default_flags=V | W)
    assert case.fault() == (3, True) and case.flags() == [V | W] * 3


def test_the_mask_lets_pages_ask_for_more(case, process):
    a = written(process, 4)
    process.mprotect(a, "r")
    process.mprotect(a, "rw")  # the words stay read-only until somebody writes
    process.madvise(a[3], "dontneed")
    case.register(a, default_flags=0, pfn_flags_mask=0)
    case.range.pfns[:] = V | W
    assert case.fault() == (4, True) and case.flags()[3] == NONE  # the mask hides it
    hmm_range_unregister(case.machine, case.range)
    case.register(a, default_flags=0, pfn_flags_mask=V | W)
    case.range.pfns[3] = V | W
    assert case.fault() == (4, True) and case.flags()[3] == V | W


@pytest.mark.parametrize("default", [0, V | W])
def test_hole_what_pages_ask_for_is_forgotten_when_their_chunk_is_faulted(
    case, machine, process, device, default
):
    """The first page is brought home by a read fault, which empties all pfns from it on."""
    a = written(process, 2)
    device.to_dev(a[0])
    words = read_range(machine, mm_root(machine, process.mm), a.start, a.stop)
    case.put_word(a[1], words[1:] & ~np.uint64(2))  # present, and not writable
    case.register(a, default_flags=default, pfn_flags_mask=V | W | PRIVATE)
    case.range.pfns[:] = [V | PRIVATE, V | W]
    assert case.fault() == (2, True)
    # What the range asks of all pages is not forgotten.
    assert case.flags() == [V | W, V | W if default else V]


# --- device memory --------------------------------------------------------------------------------


def test_device_memory_stays_unless_it_is_asked_for(case, process, device):
    a = written(process, 2)
    device.to_dev(a)
    case.register(a)
    assert case.fault() == (2, True) and case.flags() == [V | W | PRIVATE] * 2
    hmm_range_unregister(case.machine, case.range)
    case.register(a, default_flags=V | PRIVATE)
    case.fault()
    assert case.flags() == [V | W] * 2 and process.load(a).tolist() == [0, 1]


# --- errors ---------------------------------------------------------------------------------------


def test_no_mapping_is_efault(case, process):
    a = written(process, 2)
    process.munmap(a)
    case.register(a)
    assert case.fault() == (-14, True) and case.snapshot() == (-14, True)


def test_a_mapping_of_device_memory_is_efault(case, machine, process):
    a = written(process, 2)
    vma = vma_lookup(machine, process.mm, a.start)
    machine.write("vma.flags", vma.row, vma.flags | VM_MIXEDMAP)
    case.register(a)
    assert case.fault() == (-14, True) and case.snapshot() == (-14, True)


def test_what_cannot_be_read_is_eperm_and_all_pfns_are_none(case, process):
    a = written(process, 3)
    process.mprotect(a[2], "none")
    case.register(a)
    assert case.fault() == (-1, True) and case.flags() == [NONE] * 3
    case.range.pfns[:] = 0
    assert case.snapshot() == (-1, True) and case.flags() == [NONE] * 3


def test_hole_writing_what_is_read_only_faults_without_end_until_5_3(case, process):
    a = written(process, 3)
    process.mprotect(a[1:], "r")
    case.register(a, default_flags=V | W)
    if case.era < Era.V5_4:
        with pytest.raises(RuntimeError, match="the right to write"):
            case.fault()
    else:
        assert case.fault() == (-1, True)
        assert case.flags() == [V | W, NONE, NONE]


def test_a_failing_fault_is_efault_and_none_from_there_on(case, process, monkeypatch):
    a = written(process, 3)
    process.madvise(a[1:], "dontneed")

    def no_memory(*args, **rest):
        yield from ()
        raise KernelError(12, "no memory")

    monkeypatch.setattr(fault, "handle_mm_fault", no_memory)
    case.register(a)
    assert case.fault() == (-14, True) and case.flags() == [V | W, NONE, NONE]


def test_hole_the_zero_page_is_special_and_so_an_error(case, process):
    a = process.mmap(2)
    process.store(a[0], 1)
    process.load(a[1])
    case.register(a)
    # The snapshot of 5.2 and 5.3 does not look at what the walk answers, and comes out short.
    if case.era < Era.V5_4:
        assert case.snapshot() == (1, True) and case.flags() == [V | W, SPECIAL]
    assert case.fault() == (-14, True) and case.flags() == [V | W, NONE]


def test_hole_a_moving_page_counts_as_absent(case, process):
    a = written(process, 2)
    words = read_range(case.machine, mm_root(case.machine, process.mm), a.start, a.stop)
    case.put_word(a[1], swap_word(SWP_MIGRATION_READ, np.array([2])))
    case.register(a)
    assert case.fault() == (2, True) and case.flags() == [V | W, NONE]
    case.put_word(a[1], words[1:])


def test_hole_until_5_3_a_page_that_is_swapped_out_counts_as_absent(case, process):
    a = written(process, 2)
    process.madvise(a[1], "pageout")
    case.register(a)
    assert case.snapshot() == (2, True) and case.flags() == [V | W, NONE]
    case.range.pfns[:] = 0
    assert case.fault() == (2, True)
    assert (case.flags()[1] & V != 0) is (case.era >= Era.V5_4)


# --- seed 002: "We should not have two different error codes for the same condition." -------------


@pytest.mark.parametrize(
    "era, at_start, held",
    [(Era.V5_2, -11, False), (Era.V5_3, -16, True), (Era.V5_4, -16, True)],
    ids=str,
)
def test_an_invalid_range_and_the_lock(case_of, process, era, at_start, held):
    case = case_of(era)
    a = written(process)
    case.register(a)
    end = case.begin(a)
    assert case.fault() == (at_start, held)
    snapshot, still = case.snapshot()
    assert (snapshot, still) == (at_start, True)  # a snapshot never gives the lock up
    end()


def test_invalidated_while_it_faults_is_ebusy_in_every_kernel(case, machine, process, steps):
    a = process.mmap(2)
    process.store(process.mmap(1, name="x"), 1)
    case.register(a, default_flags=V | W)

    def body():
        yield from machine.down_read(case.lock)
        return (yield from hmm_range_fault(machine, case.range, FAULTS))

    looking = steps(body())
    next(step for step in looking if step.function == "handle_mm_fault")
    end = case.begin(a)
    assert looking.run() == -16 and machine.holders(case.lock) == (False, 1)
    assert case.flags() == [NONE, NONE]
    machine.up_read(case.lock)
    end()


@pytest.mark.parametrize(
    "era, how, gives_up",
    [
        (Era.V5_2, True, True),
        (Era.V5_2, False, True),
        (Era.V5_3, True, False),
        (Era.V5_3, False, True),
        (Era.V5_4, HMM_FAULT_ALLOW_RETRY, True),
        (Era.V5_4, 0, False),
    ],
    ids=str,
)
def test_eagain_when_a_fault_gave_the_lock_up(
    case_of, process, monkeypatch, steps, era, how, gives_up
):
    case = case_of(era)

    def waits(machine, vma, vpns, write, remote):
        yield machine.step("It waits for the page.", vma.mm, lock="a page")

    monkeypatch.setattr(fault, "handle_mm_fault", waits)
    a = process.mmap(1)
    case.register(a)
    if gives_up:
        assert case.fault(how) == (-11, False) and case.flags() == [NONE]
    else:
        with pytest.raises(RuntimeError, match="a page"):  # it waits, with the lock held
            case.fault(how)
        assert case.machine.holders(case.lock) == (False, 1)


def test_5_4_has_no_snapshot_of_its_own(case_of, process):
    case = case_of(Era.V5_4)
    case.register(written(process))
    with pytest.raises(ValueError, match="HMM_FAULT_SNAPSHOT"):
        case.run(hmm_range_snapshot(case.machine, case.range))


# --- the hole -------------------------------------------------------------------------------------


def test_hole_a_completed_change_between_two_looks_is_unseen(case, machine, process):
    a = written(process)
    case.register(a)
    case.fault()
    seen = case.range.pfns.copy()
    assert hmm_range_valid(machine, case.range)
    process.madvise(a, "dontneed")
    assert hmm_range_valid(machine, case.range)  # "valid", and the frames are gone
    assert case.range.pfns.tolist() == seen.tolist()
    assert not read_range(machine, mm_root(machine, process.mm), a.start, a.stop).any()


# --- 5.7 ------------------------------------------------------------------------------------------


def test_5_7_counts_pages_and_has_no_flags(machine, process, run, range_over):
    a = process.mmap(3)
    process.store(a[0], 1)
    process.load(a[1])
    snapshot = range_over(a)
    assert run(hmm_range_fault_5_7(machine, snapshot, process.mm)) == 3
    assert (snapshot.pfns & np.uint64(63)).tolist() == [V | W, V, NONE]
    faulted = range_over(a, default_flags=V | W)
    # Writing the zero page raises a CLEAR, so the sequence number has changed.
    assert run(hmm_range_fault_5_7(machine, faulted, process.mm)) == -16
    again = range_over(a, default_flags=V | W)
    assert run(hmm_range_fault_5_7(machine, again, process.mm)) == 3
    assert (again.pfns & np.uint64(63)).tolist() == [V | W] * 3


def test_5_7_counts_short_too(machine, process, run, range_over):
    a = process.mmap(3 * PMD_PAGES)
    process.store(a[0], 1)
    last = a.stop - 1 - (a.stop - 1) % PMD_PAGES
    assert run(hmm_range_fault_5_7(machine, range_over(a), process.mm)) == last - a.start
    process.munmap(a[1:])
    assert run(hmm_range_fault_5_7(machine, range_over(a), process.mm)) == 1


def test_5_7_errors_leave_the_rest_as_it_was(machine, process, run, range_over):
    a = process.mmap(4)
    process.store(a, 1)
    process.mprotect(a[2:], "r")
    range = range_over(a, default_flags=V | W, pfns=np.full(4, 1 << 40, np.uint64))
    assert run(hmm_range_fault_5_7(machine, range, process.mm)) == -1
    assert (range.pfns & np.uint64(63)).tolist()[:2] == [V | W] * 2
    assert range.pfns[2:].tolist() == [1 << 40] * 2


def test_5_7_a_gap_is_an_error_entry_or_efault(machine, process, run, range_over):
    a = process.mmap(3)
    process.store(a, 1)
    process.munmap(a[1])
    snapshot = range_over(a)
    assert run(hmm_range_fault_5_7(machine, snapshot, process.mm)) == 3
    assert (snapshot.pfns & np.uint64(63)).tolist() == [V | W, ERROR, V | W]
    asked = range_over(a, default_flags=V)
    assert run(hmm_range_fault_5_7(machine, asked, process.mm)) == -14


def test_5_7_knows_whose_device_memory_it_is(machine, process, run, range_over, device):
    a = process.mmap(1)
    process.store(a, 3)
    device.to_dev(a)
    mine = range_over(a, default_flags=V, dev_private_owner=device.device)
    assert run(hmm_range_fault_5_7(machine, mine, process.mm)) == 1
    assert (mine.pfns & np.uint64(63)).tolist() == [V | W]
    assert device.snapshot(a).tolist() == [0x22]
    process.mprotect(a, "r")
    process.mprotect(a, "rw")  # its entry stays read-only, and is not faulted for all that
    write = range_over(a, default_flags=V | W, dev_private_owner=device.device)
    assert run(hmm_range_fault_5_7(machine, write, process.mm)) == 1
    assert (write.pfns & np.uint64(63)).tolist() == [V]
    assert device.snapshot(a).tolist() == [0x21]
    foreign = range_over(a, default_flags=V, dev_private_owner=9)
    # It comes home by a migration of the device, which is a change of the range.
    assert run(hmm_range_fault_5_7(machine, foreign, process.mm)) == -16
    assert device.snapshot(a).tolist() == [0x01]
