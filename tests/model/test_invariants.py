"""Each invariant, broken on purpose, is noticed: by its own sentence and by no silence."""

import numpy as np
import pytest

from hmmlab import Machine, Process
from hmmlab.invariants import violations
from hmmlab.model.entry import (
    DEVICE_WRITE,
    RW,
    SWP_MIGRATION_WRITE,
    device_word,
    present_word,
    swap_word,
)
from hmmlab.model.geometry import ENTRIES, PMD_PAGES
from hmmlab.model.ksm import ksm_scan
from hmmlab.model.mm_types import mm_lock, mm_root, vmas_of
from hmmlab.model.page import PG_ANON, PG_KSM, PG_LOCKED, ZERO_PFN
from hmmlab.model.page_table import alloc_tables, set_huge, table_of, word_row
from hmmlab.model.rmap import rmap_walk
from hmmlab.model.vma import new_vma

PAGES = 16
TOUCHED = 8  # the first pages of A, of which the device has the first two


@pytest.fixture
def world():
    """A process with frames in RAM, on the device, shared with a child and on the free list."""
    machine = Machine(4096)
    process = Process(machine)
    device = process.open(0)
    a = process.mmap(PAGES)
    process.store(a[:TOUCHED], range(TOUCHED))
    device.to_dev(a[:2])
    device.read(a[:TOUCHED])
    process.store(a[TOUCHED:], 1)
    process.madvise(a[TOUCHED:], "dontneed")
    assert violations(machine) == []
    return machine, process, device, a


def row(machine, process, vpn):
    return word_row(machine, mm_root(machine, process.mm), vpn)


def frame(machine, process, vpn):
    return int(machine["pte"][row(machine, process, vpn)] >> np.uint64(12)) & 0xFFFFF


def a_mapping_too_many(machine, process, device, a):
    machine.add("page.mapcount", frame(machine, process, a.start + 5), 1)


def a_mapping_too_few(machine, process, device, a):
    machine.add("page.mapcount", frame(machine, process, a.start + 5), -1)


def a_word_is_lost(machine, process, device, a):
    machine.write("pte", row(machine, process, a.start + 5), 0)


def a_reference_leaks(machine, process, device, a):
    machine.add("page.refcount", frame(machine, process, a.start + 5), 1)


def a_reference_is_dropped_twice(machine, process, device, a):
    machine.write("page.refcount", frame(machine, process, a.start + 5), 0)


def the_zero_page_is_freed(machine, process, device, a):
    machine.write("page.refcount", ZERO_PFN, 0)


def a_backing_frame_leaks(machine, process, device, a):
    on_device = np.flatnonzero(machine["page.refcount"][machine.ram_pages :] > 0)
    machine.add("page.refcount", int(machine["page.private"][machine.ram_pages + on_device[0]]), 1)


def a_frame_is_freed_twice(machine, process, device, a):
    free = int(machine["zone.free"][0])
    machine.write("zone.free_list.0", free, machine["zone.free_list.0"][free - 1])
    machine.write("zone.free", 0, free + 1)


def a_frame_in_use_is_free(machine, process, device, a):
    machine.write("zone.free_list.0", 0, frame(machine, process, a.start + 5))


def a_frame_is_forgotten(machine, process, device, a):
    machine.add("zone.free", 0, -1)


def a_sequence_stays_odd(machine, process, device, a):
    machine.add("mm.invalidate_seq", process.mm, 1)


def the_device_keeps_a_page_that_is_gone(machine, process, device, a):
    device.store_entries(a.start + 12, device_word(np.array([7]), 1))


def the_device_has_another_frame(machine, process, device, a):
    other = frame(machine, process, a.start + 6)
    device.store_entries(a.start + 5, device_word(np.array([other]), 1))


def the_device_has_another_frame_behind_its_own(machine, process, device, a):
    other = frame(machine, process, a.start + 6)
    device.store_entries(a.start, device_word(np.array([other]), 1))


def a_table_outlives_its_mapping(machine, process, device, a):
    alloc_tables(machine, mm_root(machine, process.mm), 1 << 30, (1 << 30) + 1)


def a_table_hangs_in_two_places(machine, process, device, a):
    root = mm_root(machine, process.mm)
    pmd = word_row(machine, root, a.start, "pmd")
    machine.write("pmd", pmd + 1, machine["pmd"][pmd])


def the_device_shares_a_table_with_the_cpu(machine, process, device, a):
    mine = table_of(machine, device.root, a.start, "pmd") * ENTRIES
    theirs = word_row(machine, mm_root(machine, process.mm), a.start, "pmd")
    machine.write("pmd", mine + theirs % ENTRIES, machine["pmd"][theirs])


def two_mappings_overlap(machine, process, device, a):
    new_vma(machine, process.mm, a.start + 4, a.stop + 4, 3, a.start + 4)


def a_mapping_is_empty(machine, process, device, a):
    new_vma(machine, process.mm, a.stop + 4, a.stop + 4, 3, a.stop + 4)


def a_mapping_ends_too_early(machine, process, device, a):
    (vma,) = vmas_of(machine, process.mm)
    machine.write("vma.end", vma.row, a.start + 3)


def a_page_is_mapped_beyond(machine, process, device, a):
    machine.write("pte", row(machine, process, a.stop + 3), present_word(np.array([9]), 0)[0])


def a_page_is_mapped_before(machine, process, device, a):
    (vma,) = vmas_of(machine, process.mm)
    machine.write("vma.start", vma.row, a.start + 3)


def a_word_may_write_a_shared_frame(machine, process, device, a):
    machine.write("page.flags", frame(machine, process, a.start + 5), PG_ANON)


def an_exclusive_frame_is_shared(machine, process, device, a):
    at = row(machine, process, a.start + 6)
    machine.write("pte", at, machine["pte"][row(machine, process, a.start + 5)])
    machine.write("page.mapcount", frame(machine, process, a.start + 5), 2)


def the_reverse_map_has_lost_a_mapping(machine, process, device, a):
    machine.add("page.index", frame(machine, process, a.start + 5), 1)


def ksm_has_forgotten_a_sharer(machine, process, device, a):
    process.store(a[5:6], 7)
    process.store(a[6:7], 7)
    process.run("ksm", ksm_scan(machine, process.mm, a.start + 5, a.start + 7))
    assert violations(machine) == []
    machine.write("ksm_item.node", int(np.flatnonzero(machine["ksm_item.node"])[0]), 0)


def a_page_stays_locked(machine, process, device, a):
    pfn = frame(machine, process, a.start + 5)
    machine.write("page.flags", pfn, machine["page.flags"][pfn] | PG_LOCKED)


def a_migration_entry_stays(machine, process, device, a):
    pfn = frame(machine, process, a.start + 5)
    entry = swap_word(SWP_MIGRATION_WRITE, np.array([pfn]))[0]
    machine.write("pte", row(machine, process, a.start + 5), entry)


def a_lock_is_kept(machine, process, device, a):
    machine.write("lock.writer", mm_lock(machine, process.mm), 1)


def an_invalidation_never_ends(machine, process, device, a):
    machine.write("mm.active_invalidations", process.mm, 1)


def a_subscription_keeps_an_even_number(machine, process, device, a):
    machine.add("interval.seq", device.subscription, 1)


def a_subscription_keeps_a_number_of_the_future(machine, process, device, a):
    machine.add("interval.seq", device.subscription, 1000)


def a_table_is_lost(machine, process, device, a):
    pmd = word_row(machine, mm_root(machine, process.mm), a.start, "pmd")
    machine.write("pmd", pmd, 0)


def a_table_is_free_and_hangs(machine, process, device, a):
    table = table_of(machine, mm_root(machine, process.mm), a.start, "pte")
    machine.write("pte.free_list", 0, table)
    machine.write("table.free", 3, 1)


def a_device_frame_is_lost(machine, process, device, a):
    machine.add("dmirror_device.fresh", 0, -1)


def a_device_frame_is_free_and_in_use(machine, process, device, a):
    pfn = int(machine["dmirror_device.chunk"][0] + machine["dmirror_device.fresh"][0])
    machine.write("dmirror_device.free_list.0", 0, pfn)
    machine.write("dmirror_device.free", 0, 1)


def the_device_may_write_where_the_cpu_may_not(machine, process, device, a):
    words = device.entries(a.start + 5, a.start + 6)
    device.store_entries(a.start + 5, words | np.uint64(DEVICE_WRITE))
    at = row(machine, process, a.start + 5)
    machine.write("pte", at, machine["pte"][at] & ~np.uint64(RW))


def a_slot_counts_one_too_many(machine, process, device, a):
    process.madvise(a[4:6], "pageout")
    machine.add("swap.count", int(np.flatnonzero(machine["swap.count"])[0]), 1)


def a_slot_does_not_know_its_frame(machine, process, device, a):
    machine.write("page.swap", frame(machine, process, a.start + 5), 300)


def an_anon_vma_counts_one_too_many(machine, process, device, a):
    machine.add("anon_vma.active", 1, 1)


def a_huge_word_stands_for_small_pages(machine, process, device, a):
    set_huge(machine, mm_root(machine, process.mm), a.start, huge=True)


@pytest.mark.parametrize(
    ("breaking", "sentence"),
    [
        (a_mapping_too_many, "is mapped 1 times, its mapcount is 2"),
        (a_mapping_too_few, "is mapped 1 times, its mapcount is 0"),
        (a_word_is_lost, "is mapped 0 times, its mapcount is 1"),
        (a_reference_leaks, "has 2 references, 1 are known"),
        (a_reference_is_dropped_twice, "has 0 references, 1 are known"),
        (the_zero_page_is_freed, "frame row 1 has 0 references, 1 are known"),
        (a_backing_frame_leaks, "has 2 references, 1 are known"),
        (a_frame_is_freed_twice, "a frame stands twice on the free list of node 0"),
        (a_frame_in_use_is_free, "a frame on the free list of node 0 is in use"),
        (a_frame_is_forgotten, "1 frames of node 0 are neither free nor in use"),
        (a_sequence_stays_odd, "the sequence number of mm 1 is odd, and no invalidation runs"),
        (the_device_keeps_a_page_that_is_gone, "device file 1 keeps a stale entry for page"),
        (the_device_has_another_frame, "device file 1 keeps a stale entry for page"),
        (the_device_has_another_frame_behind_its_own, "device file 1 keeps a stale entry for"),
        (a_table_outlives_its_mapping, "a page table at page 0x40000000 serves no mapping"),
        (a_table_hangs_in_two_places, "a page table hangs in two places"),
        (the_device_shares_a_table_with_the_cpu, "a page table hangs in two places"),
        (two_mappings_overlap, "overlaps or is empty"),
        (a_mapping_is_empty, "overlaps or is empty"),
        (a_mapping_ends_too_early, "is mapped outside every mapping"),
        (a_page_is_mapped_beyond, "is mapped outside every mapping"),
        (a_page_is_mapped_before, "is mapped outside every mapping"),
        (a_word_may_write_a_shared_frame, "may be written, and others may share its frame"),
        (an_exclusive_frame_is_shared, "belongs to one alone and is mapped 2 times"),
        (the_reverse_map_has_lost_a_mapping, "is mapped 1 times, rmap_walk finds 0"),
        (ksm_has_forgotten_a_sharer, "is mapped 2 times, rmap_walk finds 1"),
        (a_page_stays_locked, "a page is locked, and no operation runs"),
        (a_migration_entry_stays, "a migration entry is left, and no operation runs"),
        (a_lock_is_kept, "a lock is held, and no operation does"),
        (an_invalidation_never_ends, "an invalidation runs, and no operation does"),
        (a_subscription_keeps_an_even_number, "subscription 1 keeps sequence number"),
        (a_subscription_keeps_a_number_of_the_future, "subscription 1 keeps sequence number"),
        (a_table_is_lost, "a PTE table is neither free nor hangs anywhere"),
        (a_table_is_free_and_hangs, "a PTE table that is free hangs somewhere"),
        (a_device_frame_is_lost, "1 frames of unit 0 are neither free nor in use"),
        (a_device_frame_is_free_and_in_use, "a frame on the free list of unit 0 is in use"),
        (the_device_may_write_where_the_cpu_may_not, "device file 1 keeps a stale entry for"),
        (a_slot_counts_one_too_many, "is named 1 times and counts 2"),
        (a_slot_does_not_know_its_frame, "do not know each other"),
        (an_anon_vma_counts_one_too_many, "anon_vma.active of 1 is 2, 1 mappings use it"),
        (a_huge_word_stands_for_small_pages, "stands for no huge page"),
    ],
)
def test_what_is_broken_is_noticed(world, breaking, sentence):
    breaking(*world)
    assert any(sentence in said for said in violations(world[0])), violations(world[0])


@pytest.mark.parametrize("breaking", [a_reference_leaks, a_frame_is_forgotten])
def test_in_the_middle_of_an_operation_references_may_be_held(world, breaking):
    breaking(*world)
    assert violations(world[0], quiet=False) == []


def test_while_an_invalidation_runs_the_device_may_be_behind(world):
    machine, process, device, a = world
    machine.add("mm.active_invalidations", process.mm, 1)
    a_sequence_stays_odd(machine, process, device, a)
    the_device_keeps_a_page_that_is_gone(machine, process, device, a)
    assert violations(machine, quiet=False) == []


def test_a_parent_whose_page_its_child_gave_to_ksm_is_found_by_nobody():
    """As in Linux: KSM keeps the anon_vma of the mapping that it scanned, the child's."""
    machine = Machine(4096)
    parent = Process(machine)
    a = parent.mmap(4)
    parent.store(a[0:1], 7)
    parent.store(a[1:2], 7)
    child = parent.fork()
    child.run("ksm", ksm_scan(machine, child.mm, a.start, a.stop))
    assert violations(machine) == []
    merged = np.flatnonzero(machine["page.flags"] & PG_KSM)
    assert machine["page.mapcount"][merged].tolist() == [3]
    assert rmap_walk(machine, merged).maps.sum() == 2


def test_another_mappings_tables_are_its_own(world):
    machine, process, _, _ = world
    b = process.mmap(2 * PMD_PAGES)
    process.store(b, 1)
    process.munmap(b[:PMD_PAGES])
    assert violations(machine) == []


def test_a_subscription_that_was_hit_keeps_that_number(world):
    """So whoever looked before must look again."""
    machine, process, device, a = world
    before = int(machine["mm.invalidate_seq"][process.mm])
    process.mprotect(a, "r")
    assert machine["mm.invalidate_seq"][process.mm] == before + 2
    assert machine["interval.seq"][device.subscription] == before + 1
