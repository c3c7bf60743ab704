"""What has changed since 6.1."""

import numpy as np
import pytest

from hmmlab import Machine, Process
from hmmlab.model import entry
from hmmlab.model.driver import Driver
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.history import today
from hmmlab.model.history.dma_today import (
    HmmDmaMap,
    hmm_dma_map_alloc,
    hmm_dma_map_pfn,
    hmm_dma_unmap_pfn,
)
from hmmlab.model.hmm import HmmRange, hmm_range_fault
from hmmlab.model.machine import KernelError
from hmmlab.model.mmu_notifier import Event, MmuNotifierRange

V, W, ERROR = entry.HMM_PFN_VALID, entry.HMM_PFN_WRITE, entry.HMM_PFN_ERROR
STICKY = today.HMM_PFN_STICKY


@pytest.fixture
def request_of(process, subscribe):
    """A request of 6.1 for pages."""

    def make(pages, **rest):
        pfns = np.zeros(len(pages), np.uint64)
        return HmmRange(process.mm, *subscribe(pages), pages.start, pages.stop, pfns, **rest)

    return make


def test_the_flags_take_the_top_eleven_bits():
    assert today.HMM_PFN_FLAGS == ((1 << 64) - 1) & ~((1 << 53) - 1)
    assert (today.HMM_PFN_DMA_MAPPED, today.HMM_PFN_P2PDMA, today.HMM_PFN_P2PDMA_BUS) == (
        1 << 60,
        1 << 59,
        1 << 58,
    )
    assert STICKY == 7 << 58


@pytest.mark.parametrize("order", [0, 9, 18])
def test_the_order_has_moved_and_the_rest_stays(order):
    old = np.array([123456 | V | W | order << 56, ERROR, 0], np.uint64)
    new = today.hmm_pfns_since_6_16(old)
    assert today.hmm_pfn_to_pfn(new).tolist() == [123456, 0, 0]
    assert today.hmm_pfn_to_map_order(new).tolist() == [order, 0, 0]
    assert (new & np.uint64(V | W | ERROR)).tolist() == [V | W, ERROR, 0]


def test_nothing_but_the_sticky_flags_is_kept():
    before = np.array([(1 << 64) - 1], np.uint64)
    assert today.hmm_pfns_since_6_16(np.zeros(1, np.uint64), before).tolist() == [STICKY]


def test_an_answer_keeps_the_sticky_flags(machine, process, run, request_of):
    a = process.mmap(3)
    process.store(a[:2], 1)
    range = request_of(a)
    range.hmm_pfns[:] = [today.HMM_PFN_DMA_MAPPED, STICKY, today.HMM_PFN_P2PDMA]
    run(today.hmm_range_fault(machine, range))
    assert (range.hmm_pfns & np.uint64(V | W)).tolist() == [V | W, V | W, 0]
    assert (range.hmm_pfns & np.uint64(STICKY)).tolist() == [
        today.HMM_PFN_DMA_MAPPED,
        STICKY,
        today.HMM_PFN_P2PDMA,
    ]
    plain = request_of(a)
    run(hmm_range_fault(machine, plain))
    assert today.hmm_pfn_to_pfn(range.hmm_pfns)[:2].tolist() == [
        int(word) & ((1 << 53) - 1) for word in plain.hmm_pfns[:2]
    ]


def test_a_fault_says_itself_why_it_fails(machine, process, run, request_of, use_up_ram):
    a = process.mmap(2)
    process.store(a[0], 1)
    ranges = [request_of(a, default_flags=V | W) for _ in range(2)]
    use_up_ram()
    for function, range_, errno in zip(
        (hmm_range_fault, today.hmm_range_fault), ranges, (14, 12), strict=True
    ):
        with pytest.raises(KernelError) as error:
            run(function(machine, range_))
        assert error.value.errno == errno


def test_other_refusals_are_as_in_6_1(machine, process, run, request_of):
    a = process.mmap(3)
    process.store(a, 1)
    process.mprotect(a[1:], "r")
    range = request_of(a, default_flags=V | W)
    range.hmm_pfns[:] = today.HMM_PFN_DMA_MAPPED
    with pytest.raises(KernelError, match="EPERM"):
        run(today.hmm_range_fault(machine, range))
    assert range.hmm_pfns[0] & np.uint64(V | W) == V | W
    assert range.hmm_pfns[1:].tolist() == [today.HMM_PFN_DMA_MAPPED] * 2
    process.munmap(a)
    with pytest.raises(KernelError, match="EBUSY"):
        run(today.hmm_range_fault(machine, range))


@pytest.mark.parametrize(
    "event, owner, now",
    [
        (Event.EXCLUSIVE, 0, Event.CLEAR),
        (Event.EXCLUSIVE, 2, Event.EXCLUSIVE),
        (Event.MIGRATE, 0, Event.MIGRATE),
        (Event.UNMAP, 0, Event.UNMAP),
    ],
)
def test_breaking_exclusive_access_is_a_clear(event, owner, now):
    change = MmuNotifierRange.one(1, event, 1, 2, owner=owner)
    assert today.event_since_6_15(change) is now


@pytest.mark.parametrize("pages, advice", [(1, None), (3, None), (512, "hugepage")])
def test_taking_exclusive_access_is_none_even_where_nobody_says_his_name(pages, advice):
    """The test device names no owner, so that alone does not tell the two apart."""
    machine = Machine(1 << 14)
    process, heard = Process(machine), []

    class Ear(Driver):
        def invalidate(self, subscription, range, cur_seq):
            heard.append((range.event, range.owner, today.event_since_6_15(range)))
            return super().invalidate(subscription, range, cur_seq)

    device = process.open()
    process.attach(Ear)
    a = process.mmap(pages)
    if advice:
        process.madvise(a, advice)
    process.store(a, 1)
    heard.clear()
    where = a if advice is None else a[:1]
    process.run("exclusive", device.make_exclusive(where.start, where.stop))
    taken = {change for change in heard if change[0] is Event.EXCLUSIVE}
    assert taken == {(Event.EXCLUSIVE, 0, Event.EXCLUSIVE)}
    heard.clear()
    process.load(a[0])
    assert (Event.EXCLUSIVE, 0, Event.CLEAR) in heard


def src_of(frames, flags=entry.MIGRATE_PFN_MIGRATE):
    return entry.migrate_pfn(frames) | np.uint64(flags)


def test_a_whole_huge_page_is_one_entry():
    vpns = np.arange(1024 - 3, 1024 + PMD_PAGES + 3)
    frames = np.arange(2048 - 3, 2048 + PMD_PAGES + 3)
    src = src_of(frames)
    now = today.migrate_pfns_since_6_19(src, vpns)
    assert now[3] == src[3] | np.uint64(today.MIGRATE_PFN_COMPOUND)
    assert not now[4 : 3 + PMD_PAGES].any()
    assert (now[:3] == src[:3]).all() and (now[3 + PMD_PAGES :] == src[3 + PMD_PAGES :]).all()


@pytest.mark.parametrize("spoil", ["frames", "pages", "flags", "short"])
def test_what_is_no_huge_page_stays_in_pieces(spoil):
    vpns, frames = np.arange(1024, 1024 + PMD_PAGES), np.arange(2048, 2048 + PMD_PAGES)
    src = src_of(frames)
    if spoil == "frames":
        src = src_of(frames + 1)
    elif spoil == "pages":
        vpns = vpns + 1
    elif spoil == "flags":
        src[77] = 0
    else:
        src, vpns = src[:-1], vpns[:-1]
    assert (today.migrate_pfns_since_6_19(src, vpns) == src).all()


def test_whole_huge_pages_are_asked_for():
    assert (today.MIGRATE_PFN_COMPOUND, today.MIGRATE_VMA_SELECT_COMPOUND) == (1 << 4, 8)


# --- hmm_dma_map ----------------------------------------------------------------------------------


@pytest.fixture
def mapped(machine, process, run, request_of):
    """Two pages that were read, of which one is mapped for DMA, and what looks them up again."""
    a = process.mmap(2)
    process.load(a)
    map = HmmDmaMap()
    assert hmm_dma_map_alloc(machine, map, 2) == 0
    assert map.pfn_list.tolist() == map.dma_list.tolist() == [0, 0]

    def look(**rest):
        request = request_of(a, **rest)
        request.hmm_pfns[:] = map.pfn_list
        run(today.hmm_range_fault(machine, request))
        map.pfn_list[:] = request.hmm_pfns

    look()
    hmm_dma_map_pfn(map, np.array([0]))
    return a, map, look


def test_a_page_is_mapped_where_its_hmm_pfn_says(mapped):
    _, map, _ = mapped
    assert map.dma_list[0] == today.hmm_pfn_to_pfn(map.pfn_list)[0]
    flags = map.pfn_list & np.uint64(V | today.HMM_PFN_DMA_MAPPED)
    assert flags.tolist() == [V | today.HMM_PFN_DMA_MAPPED, V]


def test_a_page_that_is_looked_up_again_is_not_mapped_again(mapped):
    _, map, look = mapped
    map.dma_list[0] = 77  # if it were mapped now, it would be elsewhere
    look()
    assert hmm_dma_map_pfn(map, np.array([0, 1])).tolist() == [77, map.dma_list[1]]


def test_who_does_not_unmap_keeps_the_old_address(mapped, process):
    a, map, look = mapped
    old = int(map.dma_list[0])
    process.store(a, 5)  # the zero page gives way to pages of their own
    look()
    new = today.hmm_pfn_to_pfn(map.pfn_list)
    assert hmm_dma_map_pfn(map, np.array([0])) == old != new[0]
    assert hmm_dma_unmap_pfn(map, np.array([0, 1])).tolist() == [True, False]
    assert hmm_dma_unmap_pfn(map, np.array([0])).tolist() == [False]
    assert hmm_dma_map_pfn(map, np.array([0, 1])).tolist() == new.tolist()


def test_unmapping_takes_all_sticky_flags(mapped):
    _, map, _ = mapped
    map.pfn_list[0] |= np.uint64(STICKY)
    hmm_dma_unmap_pfn(map, np.array([0]))
    assert not map.pfn_list[0] & np.uint64(STICKY) and map.pfn_list[0] & np.uint64(V)


def test_no_memory_for_the_lists(machine, use_up_ram):
    give_back = use_up_ram()
    assert hmm_dma_map_alloc(machine, HmmDmaMap(), 2) == -12
    give_back()
