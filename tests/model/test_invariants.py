"""Each invariant, broken on purpose, is noticed: by its own sentence and by no silence."""

import numpy as np
import pytest

from hmmlab import Machine, Process
from hmmlab.invariants import violations
from hmmlab.model.entry import device_word, present_word
from hmmlab.model.geometry import ENTRIES, PMD_PAGES
from hmmlab.model.mm_types import mm_root, new_vma, vmas_of
from hmmlab.model.page import ZERO_PFN
from hmmlab.model.page_table import alloc_tables, table_of, word_row

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
        (a_mapping_ends_too_early, "something is mapped outside every mapping"),
        (a_page_is_mapped_beyond, "something is mapped outside every mapping"),
        (a_page_is_mapped_before, "something is mapped outside every mapping"),
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


def test_another_mappings_tables_are_its_own(world):
    machine, process, _, _ = world
    b = process.mmap(2 * PMD_PAGES)
    process.store(b, 1)
    process.munmap(b[:PMD_PAGES])
    assert violations(machine) == []
