"""Splitting and merging: which neighbours become one mapping again, and which never do."""

from hmmlab.model.mm_types import find_vma, vma_lookup, vmas_of


def layout(machine, process):
    return [
        (v.start - 0x200000, v.end - 0x200000, v.permissions) for v in vmas_of(machine, process.mm)
    ]


def test_protecting_a_part_and_back_merges_again(machine, process):
    a = process.mmap(12)
    process.mprotect(a[4:8], "r")
    assert layout(machine, process) == [(0, 4, "rw-p"), (4, 8, "r--p"), (8, 12, "rw-p")]
    process.mprotect(a[4:8], "rw")
    assert layout(machine, process) == [(0, 12, "rw-p")]


def test_a_boundary_moves_up_and_down(machine, process):
    a = process.mmap(12)
    process.mprotect(a[:4], "r")
    process.mprotect(a[4:6], "r")
    assert layout(machine, process) == [(0, 6, "r--p"), (6, 12, "rw-p")]
    process.mprotect(a[2:6], "rw")
    assert layout(machine, process) == [(0, 2, "r--p"), (2, 12, "rw-p")]


def test_pages_promised_stay_promised_and_keep_mappings_apart(machine, process):
    """A mapping born read-only owes no memory; once part of it was writable, that part does."""
    a = process.mmap(8, "r")
    process.mprotect(a[:4], "rw")
    process.mprotect(a[:4], "r")
    assert layout(machine, process) == [(0, 4, "r--p"), (4, 8, "r--p")]


def test_neighbours_share_an_anon_vma_and_merge(machine, process):
    a = process.mmap(12)
    process.mprotect(a[4:8], "r")
    process.store(a[:4], 1)
    process.store(a[8:], 2)
    first, _, last = vmas_of(machine, process.mm)
    assert first.anon_vma and last.anon_vma and first.anon_vma != last.anon_vma
    process.mprotect(a[4:8], "rw")
    # The middle joined one side; the two sides keep two anon_vmas and stay apart.
    assert len(layout(machine, process)) == 2


def test_a_middle_that_was_touched_first_binds_both_sides(machine, process):
    a = process.mmap(12)
    process.store(a[5], 7)
    process.mprotect(a[4:8], "r")
    assert len({v.anon_vma for v in vmas_of(machine, process.mm)}) == 1
    process.mprotect(a[4:8], "rw")
    assert layout(machine, process) == [(0, 12, "rw-p")]


def test_finding(machine, process):
    a = process.mmap(4)
    process.munmap(a[1:3])
    assert vma_lookup(machine, process.mm, a.start + 1) is None
    assert find_vma(machine, process.mm, a.start + 1).start == a.start + 3
    assert find_vma(machine, process.mm, a.start + 4) is None


def test_region_bases_follow_the_recordings(process):
    assert [process.mmap(1).va for _ in range(3)] == [0x2_0000_0000, 0x2_1000_0000, 0x2_2000_0000]


def test_a_region_of_a_million_pages_keeps_its_neighbours_away(process):
    big = process.mmap(1 << 20)
    assert process.mmap(1).start >= big.stop
