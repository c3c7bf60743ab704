"""What the patch notes and tables of the four seeds say, row by row, where no other test does."""

import numpy as np
import pytest

from hmmlab import Machine, Process
from hmmlab.model.driver import Driver
from hmmlab.model.entry import HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE, HMM_PFN_VALID, HMM_PFN_WRITE
from hmmlab.model.history import (
    Era,
    HmmMirror,
    hmm_mirror_register,
    hmm_mirror_unregister,
    lookup_2017,
)
from hmmlab.model.history.device_2017 import HMM_DEVICE_MAX, hmm_device_new, hmm_device_put
from hmmlab.model.history.dma_2019 import (
    DmaDataDirection,
    dma_direction,
    hmm_range_dma_map,
    hmm_range_dma_unmap,
)
from hmmlab.model.history.range_2019 import (
    HMM_FAULT_SNAPSHOT,
    hmm_range_fault,
    hmm_range_register,
    hmm_range_snapshot,
    hmm_range_valid,
    hmm_vma_fault,
    hmm_vma_range_done,
)
from hmmlab.model.history.range_2020 import hmm_range_fault_5_5, hmm_range_fault_5_7
from hmmlab.model.history.struct_hmm import hmm_of
from hmmlab.model.history.walk_2018 import HmmRange, WalkHow, walk_vma
from hmmlab.model.machine import KernelError
from hmmlab.model.mm_types import VM_MIXEDMAP, mm_lock, mm_root, vma_lookup
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
    mmu_interval_read_retry,
)
from hmmlab.model.page import PG_DIRTY, page_rows
from hmmlab.model.page_table import read_range

V, W = 1, 2
VALUES = ERROR, NONE, SPECIAL = 8, 32, 16
EAGAIN, EFAULT, EBUSY, EINVAL, EPERM, ENOMEM = 11, 14, 16, 22, 1, 12


def a_range(pages, **rest):
    rest = {"values": VALUES, "default_flags": V, **rest}
    return HmmRange(pages.start, pages.stop, np.zeros(len(pages), np.uint64), **rest)


def low(range):
    return (range.pfns & np.uint64(63)).tolist()


def locked(machine, mm, routine):
    """With the mmap_lock; the answer, and whether it is held at the end."""

    def body():
        yield from machine.down_read(mm_lock(machine, mm))
        answer = yield from routine
        held = machine.holders(mm_lock(machine, mm))[1] == 1
        if held:
            machine.up_read(mm_lock(machine, mm))
        return answer, held

    return body()


def frames(machine, process, pages):
    return read_range(machine, mm_root(machine, process.mm), pages.start, pages.stop)


# --- seed 001: struct hmm_mirror ------------------------------------------------------------------


@pytest.mark.parametrize("era", [Era.APRIL_2017, Era.V4_14, Era.V4_17, Era.V5_2])
def test_a_mirror_points_to_its_struct_hmm(machine, process, run, register, era):
    mirror, _ = register(era)
    assert mirror.hmm == hmm_of(machine, process.mm) > 0
    run(hmm_mirror_unregister(machine, mirror))
    assert bool(mirror.hmm) is (era < Era.V4_17)  # nobody emptied it before


# --- seed 002: mm/hmm: remove hmm_mirror and related ----------------------------------------------


@pytest.mark.parametrize("era", [Era.V5_5, Era.V5_7, Era.V6_1, Era.TODAY])
def test_since_5_5_there_are_no_mirrors(machine, process, run, era):
    with pytest.raises(ValueError, match=r"went in 5\.5"):
        run(hmm_mirror_register(machine, HmmMirror(object()), process.mm, era))


# --- seed 002: the arguments of hmm_range_register ------------------------------------------------


def test_5_2_takes_the_address_space_and_makes_a_struct_hmm(machine, process, run):
    a = process.mmap(2)
    assert run(hmm_range_register(machine, HmmRange(), process.mm, a.start, a.stop)) == 0
    assert hmm_of(machine, process.mm)


def test_5_3_takes_the_mirror_and_the_edges(machine, process, run, register):
    a = process.mmap(2)
    mirror, _ = register(Era.V5_3)
    assert run(hmm_range_register(machine, HmmRange(), mirror, a.start, a.stop)) == 0
    with pytest.raises(ValueError, match=r"5\.3 takes start and end"):
        run(hmm_range_register(machine, HmmRange(), mirror))


def test_5_4_has_the_edges_from_the_range(machine, process, run, register):
    a = process.mmap(2)
    mirror, _ = register(Era.V5_4)
    tracked = a_range(a)
    assert run(hmm_range_register(machine, tracked, mirror)) == 0 and tracked.row
    assert run(hmm_range_register(machine, HmmRange(5, 5), mirror)) == -EINVAL
    with pytest.raises(ValueError, match=r"since 5\.4 they stand in the range"):
        run(hmm_range_register(machine, HmmRange(), mirror, a.start, a.stop))


def test_a_mirror_of_another_kernel_or_of_none_is_refused(machine, process, run, register):
    mirror, _ = register(Era.V5_2)
    with pytest.raises(ValueError, match=r"the mirror is 5\.2; only 5\.3 and 5\.4"):
        run(hmm_range_register(machine, HmmRange(), mirror, 8, 9))
    with pytest.raises(ValueError, match="registered with nothing"):
        run(hmm_range_register(machine, HmmRange(), HmmMirror(object()), 8, 9))


# --- seed 002: HMM_FAULT_SNAPSHOT, and that it could go -------------------------------------------


def test_a_snapshot_is_the_same_under_three_names(run):
    """5.3 has a function, 5.4 a flag, 5.7 a request that asks for nothing."""
    seen = []
    for era in (Era.V5_3, Era.V5_4, Era.V5_5, Era.V5_7):
        machine = Machine(4096)
        process = Process(machine)
        a = process.mmap(6)
        process.store(a[:4], range(4))
        process.mprotect(a[:2], "r")
        device = process.attach(_Subscriber)
        tracked = a_range(a, default_flags=0 if era is Era.V5_7 else V)
        tracked.notifier, tracked.notifier_seq = device.subscription, 1
        if era < Era.V5_5:
            mirror = HmmMirror(_Deaf())
            process.run("register", hmm_mirror_register(machine, mirror, process.mm, era))
            edges = (a.start, a.stop) if era is Era.V5_3 else ()
            process.run("range", hmm_range_register(machine, tracked, mirror, *edges))
        look = _snapshot(era, machine, tracked, process.mm)
        assert process.run("look", locked(machine, process.mm, look)) == (6, True)
        seen.append(low(tracked))
    assert seen[0] == [V, V, V | W, V | W, NONE, NONE]
    assert all(flags == seen[0] for flags in seen)


def _snapshot(era, machine, tracked, mm):
    if era is Era.V5_3:
        return hmm_range_snapshot(machine, tracked)
    if era is Era.V5_4:
        return hmm_range_fault(machine, tracked, HMM_FAULT_SNAPSHOT)
    if era is Era.V5_5:
        return hmm_range_fault_5_5(machine, tracked, mm, HMM_FAULT_SNAPSHOT)
    return hmm_range_fault_5_7(machine, tracked, mm)


class _Deaf:
    def sync_cpu_device_pagetables(self, mirror, *update):
        return 0


class _Subscriber(Driver):
    pass


# --- seed 002: "remove the driver-specific formats", 5.8 ------------------------------------------


def test_since_5_8_request_and_answer_are_the_same_bits():
    assert (HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE) == (HMM_PFN_VALID, HMM_PFN_WRITE)
    assert HMM_PFN_VALID == 1 << 63 and HMM_PFN_WRITE == 1 << 62


# --- the old names that 5.2 and 5.3 keep ----------------------------------------------------------


@pytest.fixture(params=[Era.V5_2, Era.V5_3], ids=lambda era: era.label)
def old_names(request, machine, process, run, register):
    mirror, _ = register(request.param)
    of = process.mm if request.param is Era.V5_2 else mirror

    def look(range):
        return run(locked(machine, process.mm, hmm_vma_fault(machine, of, range, True)))

    return look


def test_hmm_vma_fault_asks_each_page_for_what_it_says(machine, process, old_names):
    a = process.mmap(3)
    process.store(a[0], 1)
    tracked = a_range(a)
    tracked.pfns[:] = [V, 0, 0]
    assert old_names(tracked) == (0, True)
    assert low(tracked) == [V | W, NONE, NONE]
    assert hmm_vma_range_done(machine, tracked) is True and not tracked.row


def test_hole_the_old_range_done_does_not_see_a_change_that_is_over(machine, process, old_names):
    a = process.mmap(2)
    process.store(a, 1)
    tracked = a_range(a)
    tracked.pfns[:] = V
    assert old_names(tracked) == (0, True)
    process.madvise(a, "dontneed")
    assert hmm_vma_range_done(machine, tracked) is True


def test_hmm_vma_fault_gives_up_after_a_second_and_leaves_the_range_tracked(
    machine, process, run, old_names
):
    a = process.mmap(2)
    change = MmuNotifierRange.one(process.mm, Event.CLEAR, a.start, a.stop)
    tracked = a_range(a)
    other = process.mmap(1)  # makes the struct hmm exist in 5.2 too
    process.store(other, 1)
    first = a_range(other)
    assert old_names(first)[0] == 0
    run(invalidate_range_start(machine, change))
    assert old_names(tracked) == (-EAGAIN, False)
    assert tracked.row and not hmm_range_valid(machine, tracked)
    run(invalidate_range_end(machine, change))


def test_hmm_vma_fault_passes_errors_on_and_ends_the_tracking(machine, process, old_names):
    a = process.mmap(2, "none")
    tracked = a_range(a)
    tracked.pfns[:] = V
    assert old_names(tracked) == (-EPERM, True) and not tracked.row


# --- hmm_range_dma_map and hmm_range_dma_unmap, 5.2 to 5.4 ----------------------------------------


@pytest.fixture(params=[Era.V5_2, Era.V5_4], ids=lambda era: era.label)
def mapped(request, machine, process, run, register):
    mirror, _ = register(request.param)

    def make(pages, **rest):
        tracked = a_range(pages, **rest)
        if request.param is Era.V5_2:
            routine = hmm_range_register(machine, tracked, process.mm, pages.start, pages.stop)
        else:
            routine = hmm_range_register(machine, tracked, mirror)
        assert run(routine) == 0
        daddrs = np.full(len(pages), -1)
        how = request.param is Era.V5_2  # "block", or no flag
        how = how if request.param is Era.V5_2 else 0
        routine = hmm_range_dma_map(machine, tracked, daddrs, how)
        return run(locked(machine, process.mm, routine)), tracked, daddrs

    return make


def test_dma_map_faults_in_and_maps(machine, process, mapped):
    a = process.mmap(4)
    process.store(a[:2], 5)
    process.mprotect(a[:1], "r")
    (answer, held), tracked, daddrs = mapped(a[:2])
    assert (answer, held) == (2, True)
    assert daddrs.tolist() == tracked.device_entry_to_pfn(tracked.pfns).tolist()
    both, one = DmaDataDirection.DMA_BIDIRECTIONAL, DmaDataDirection.DMA_TO_DEVICE
    assert (int(both), int(one)) == (0, 1)
    assert dma_direction(tracked).tolist() == [one, both]


def test_a_page_that_nobody_asked_for_is_not_mapped(process, mapped):
    a = process.mmap(2)
    process.store(a[0], 5)
    (answer, _), _, daddrs = mapped(a, default_flags=0)
    assert answer == 1 and daddrs[0] > 0 and daddrs[1] == 0


def test_dma_unmap_empties_and_dirties_what_could_be_written(machine, process, mapped):
    a = process.mmap(3)
    process.store(a, 5)
    process.mprotect(a[:1], "r")
    _, tracked, daddrs = mapped(a)
    rows = page_rows(machine, daddrs.copy())
    assert not (machine["page.flags"][rows] & PG_DIRTY).any()
    assert hmm_range_dma_unmap(machine, tracked, daddrs, dirty=True) == 3
    assert daddrs.tolist() == [0, 0, 0] and low(tracked) == [NONE] * 3
    assert ((machine["page.flags"][rows] & PG_DIRTY) != 0).tolist() == [False, True, True]
    assert hmm_range_dma_unmap(machine, tracked, daddrs, dirty=False) == 0


def test_dma_refusals(machine, process, mapped):
    a = process.mmap(2, "none")
    (answer, held), tracked, daddrs = mapped(a, default_flags=V | W)
    assert (answer, held) == (-EPERM, True)
    assert hmm_range_dma_unmap(machine, tracked, None, dirty=False) == -EINVAL
    assert hmm_range_dma_unmap(machine, HmmRange(3, 3), daddrs, dirty=False) == -EINVAL


def test_dma_map_undoes_all_when_the_range_is_invalidated_meanwhile(
    machine, process, run, register, steps
):
    machine.grain = 1
    mirror, _ = register(Era.V5_4)
    a = process.mmap(3)
    process.store(a, 5)
    tracked, daddrs = a_range(a), np.full(3, -1)
    assert run(hmm_range_register(machine, tracked, mirror)) == 0
    mapping = steps(locked(machine, process.mm, hmm_range_dma_map(machine, tracked, daddrs, 0)))
    next(step for step in mapping if step.function == "hmm_range_dma_map")
    assert daddrs[0] > 0
    change = MmuNotifierRange.one(process.mm, Event.CLEAR, a.start, a.stop)
    run(invalidate_range_start(machine, change))
    mapping.run()
    assert mapping.result == (-EBUSY, True) and not daddrs.any()
    run(invalidate_range_end(machine, change))


# --- 5.5: interval subscriptions ------------------------------------------------------------------


def test_5_5_closes_the_hole_of_5_2(machine, process, run, range_over):
    """A change that began and ended between two looks has left its mark."""
    a = process.mmap(2)
    process.store(a, 1)
    tracked = range_over(a, default_flags=V)
    look = hmm_range_fault_5_5(machine, tracked, process.mm)
    assert run(locked(machine, process.mm, look)) == (2, True)
    process.madvise(a, "dontneed")
    assert mmu_interval_read_retry(machine, tracked.notifier, tracked.notifier_seq)
    assert run(hmm_range_fault_5_5(machine, tracked, process.mm)) == -EBUSY


def test_5_5_the_zero_page_is_a_page_like_any_other(machine, process, run, range_over):
    a = process.mmap(2)
    process.load(a)
    tracked = range_over(a, default_flags=V)
    assert run(hmm_range_fault_5_5(machine, tracked, process.mm)) == 2
    assert low(tracked) == [V, V]


@pytest.mark.parametrize("era, absent", [(Era.V5_5, NONE), (Era.V5_7, ERROR)], ids=["5.5", "5.7"])
def test_what_nobody_asks_for_is_no_error_since_5_5(machine, process, run, range_over, era, absent):
    """ "mm/hmm: make full use of walk_page_range()": gaps and what cannot be read are skipped."""
    a = process.mmap(5)
    process.store(a, 1)
    process.munmap(a[1])
    process.mprotect(a[3], "none")
    seen = range_over(a)
    assert run(_look_2020(era, machine, seen, process.mm)) == 5
    assert low(seen) == [V | W, absent, V | W, absent, V | W]
    process.munmap(a)
    nothing = range_over(a)
    assert run(_look_2020(era, machine, nothing, process.mm)) == 0  # a gap does not count
    assert low(nothing) == [absent] * 5


def _look_2020(era, machine, tracked, mm):
    look = hmm_range_fault_5_5 if era is Era.V5_5 else hmm_range_fault_5_7
    return look(machine, tracked, mm)


@pytest.mark.parametrize("era", [Era.V5_5, Era.V5_7], ids=["5.5", "5.7"])
@pytest.mark.parametrize(
    "spoil, errno, marks",
    [
        (lambda p, page: p.munmap(page), EFAULT, ERROR),
        (lambda p, page: p.mprotect(page, "none"), EFAULT, 7),
        (lambda p, page: p.mprotect(page, "r"), EPERM, NONE),
    ],
    ids=["gap", "unreadable", "read-only"],
)
def test_what_is_asked_for_and_cannot_be_had(
    machine, process, run, range_over, era, spoil, errno, marks
):
    """Until 5.6 the page is marked; no kernel since 5.5 touches those behind it."""
    a = process.mmap(3)
    process.store(a, 1)
    spoil(process, a[1])
    asked = range_over(a, pfns=np.full(3, 7, np.uint64), default_flags=V | W)
    assert run(_look_2020(era, machine, asked, process.mm)) == -errno
    assert low(asked) == [V | W, marks if era is Era.V5_5 else 7, 7]


@pytest.mark.parametrize("era", [Era.V5_5, Era.V5_7], ids=["5.5", "5.7"])
def test_the_page_whose_fault_fails_is_an_error_until_5_6(
    machine, process, run, range_over, monkeypatch, era
):
    """As the comment above hmm_range_fault() says."""
    from hmmlab.model.history import fault

    handle = fault.handle_mm_fault
    a = process.mmap(4)
    process.store(a, 1)
    process.madvise(a[1:], "dontneed")

    def no_memory_for_page_2(machine, vma, vpns, write, remote):
        for vpn in vpns:
            if vpn == a.start + 2:
                raise KernelError(12, "no memory")
            yield from handle(machine, vma, np.array([vpn]), write, remote=remote)

    monkeypatch.setattr(fault, "handle_mm_fault", no_memory_for_page_2)
    asked = range_over(a, pfns=np.full(4, 7, np.uint64), default_flags=V | W)
    assert run(_look_2020(era, machine, asked, process.mm)) == -EFAULT
    assert low(asked) == ([V | W, NONE, ERROR, 7] if era is Era.V5_5 else [V | W, 7, 7, 7])


def test_5_5_refuses_device_mappings_and_5_7_only_who_asks(machine, process, run, range_over):
    a = process.mmap(2)
    process.store(a, 1)
    vma = vma_lookup(machine, process.mm, a.start)
    machine.write("vma.flags", vma.row, vma.flags | VM_MIXEDMAP)
    assert run(hmm_range_fault_5_5(machine, range_over(a), process.mm)) == -EFAULT
    seen = range_over(a)
    assert run(hmm_range_fault_5_7(machine, seen, process.mm)) == 2
    assert low(seen) == [ERROR, ERROR]
    asked = range_over(a, default_flags=V)
    assert run(hmm_range_fault_5_7(machine, asked, process.mm)) == -EFAULT


# --- huge pages in the old walks ------------------------------------------------------------------


@pytest.fixture
def huge(run):
    machine = Machine(1 << 14)
    process = Process(machine)
    a = process.mmap(1024)
    process.madvise(a, "hugepage")
    process.store(a[0], 7)
    process.store(a[512], 8)
    return process, a


@pytest.mark.parametrize("era", [Era.V4_17, Era.V5_4, Era.V5_7])
def test_one_page_that_lacks_something_makes_all_of_a_huge_word_fault(huge, era):
    process, a = huge
    machine = process.machine
    process.fork()  # takes the right to write from both words
    tracked = a_range(a, default_flags=0)
    tracked.pfn_flags_mask = (1 << 64) - 1
    tracked.pfns[100] = V | W  # only this page asks for more than it has
    vma = vma_lookup(machine, process.mm, a.start)
    walk = walk_vma(machine, tracked, vma, a.start, a.stop, WalkHow(era, fault=True))
    answer, last = process.run("walk", walk)
    assert (answer, last) == (-EBUSY, a.start)  # from the first page of the word on
    words = frames(machine, process, a[:512])
    assert ((words & 2) != 0).all()  # all of it may be written now
    snapshot = walk_vma(machine, tracked, vma, a.start, a.stop, WalkHow(era, fault=False))
    if era < Era.V5_7:
        assert process.run("walk", snapshot) == (0, a.stop)
        assert low(tracked) == [V | W] * 512 + [V] * 512  # the other word is not asked


def test_the_huge_page_of_zeros_is_no_error_in_5_4(run, register):
    machine = Machine(1 << 14)
    process = Process(machine)
    a = process.mmap(512)
    process.madvise(a, "hugepage")
    process.load(a[0])
    tracked = a_range(a)
    vma = vma_lookup(machine, process.mm, a.start)
    walk = walk_vma(machine, tracked, vma, a.start, a.stop, WalkHow(Era.V5_4, fault=True))
    assert process.run("walk", walk) == (0, a.stop)
    assert low(tracked) == [V] * 512


# --- hmm_device -----------------------------------------------------------------------------------


def test_there_are_256_minor_numbers(machine, use_up_ram):
    devices = [hmm_device_new(machine, i) for i in range(HMM_DEVICE_MAX)]
    assert [device.minor for device in devices] == list(range(256))
    assert devices[7].name == "hmm_device7" and devices[7].drvdata == 7
    assert hmm_device_new(machine, None) == -EBUSY
    hmm_device_put(machine, devices[7])
    hmm_device_put(machine, devices[7])
    assert hmm_device_new(machine, "new").minor == 7
    free = use_up_ram()
    assert hmm_device_new(machine, None) == -ENOMEM
    free()


def test_4_14_reads_huge_words_page_by_page_and_faults_all_of_one(huge):
    process, a = huge
    machine = process.machine
    mirror = HmmMirror(_Deaf())
    process.run("register", hmm_mirror_register(machine, mirror, process.mm, Era.V4_14))
    process.fork()
    pfns, tracked = np.zeros(1024, np.uint64), lookup_2017.HmmRange()
    vma = vma_lookup(machine, process.mm, a.start)
    look = lookup_2017.hmm_vma_get_pfns(machine, vma, tracked, a.start, a.stop, pfns)
    assert process.run("look", look) == 0
    seen = lookup_2017.hmm_pfn_t_to_pfn(pfns)
    assert (np.diff(seen[:512]) == 1).all() and (np.diff(seen[512:]) == 1).all()
    assert lookup_2017.hmm_vma_range_done(machine, vma, tracked)
    look = lookup_2017.hmm_vma_fault(
        machine, vma, tracked, a.start + 100, a.start + 101, pfns[:1], True, True
    )
    assert process.run("look", locked(machine, process.mm, look)) == (0, True)
    assert pfns[0] & np.uint64(lookup_2017.HMM_PFN_WRITE)
    # Its own fault has split and copied, which is a change of the range.
    assert lookup_2017.hmm_vma_range_done(machine, vma, tracked) is False
