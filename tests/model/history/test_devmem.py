"""Device memory and migrate_vma(): seed 004 ("mm/hmm/devmem ... v7", 16 August 2017) and 4.14."""

import numpy as np
import pytest

from hmmlab.invariants import violations
from hmmlab.model.access import get_user_pages
from hmmlab.model.entry import RW, is_device_private, pfn_of, swap_offset_pfn
from hmmlab.model.geometry import PAGE_SIZE, SECTION_PAGES
from hmmlab.model.history import migrate_2017
from hmmlab.model.history.devmem_2017 import (
    IORES_DESC_DEVICE_PRIVATE_MEMORY,
    IORES_DESC_DEVICE_PUBLIC_MEMORY,
    VM_FAULT_ERROR,
    VM_FAULT_HWPOISON,
    VM_FAULT_MAJOR,
    VM_FAULT_MINOR,
    VM_FAULT_OOM,
    VM_FAULT_SIGBUS,
    VM_FAULT_SIGSEGV,
    HmmDevmem,
    Resource,
    hmm_devmem_add,
    hmm_devmem_add_resource,
    hmm_devmem_page_get_drvdata,
    hmm_devmem_page_set_drvdata,
    hmm_devmem_pages_create,
    hmm_devmem_remove,
    hmm_vma_alloc_locked_page,
    page_count,
)
from hmmlab.model.history.migrate_2017 import (
    MIGRATE_PFN_DEVICE,
    MIGRATE_PFN_ERROR,
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    migrate_pfn,
    migrate_vma,
)
from hmmlab.model.machine import KernelError
from hmmlab.model.memremap import memunmap_pages, pagemap_of
from hmmlab.model.mm_types import VM_HUGETLB, VM_PFNMAP, mm_lock, mm_root, vma_lookup
from hmmlab.model.page import PG_LOCKED, PHYSICAL_PAGES, page_rows, set_flags
from hmmlab.model.page_ref import get_page, put_page
from hmmlab.model.page_table import read_range, word_row
from hmmlab.model.swap_fault import FAULT_FLAG_REMOTE, FAULT_FLAG_WRITE

SECTION = SECTION_PAGES * PAGE_SIZE
V, M, L, W, D = (
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_WRITE,
    MIGRATE_PFN_DEVICE,
)


class Card:
    """A driver of 2017: its memory, a free list of its own, and the migrations both ways."""

    def __init__(self, machine, process, run):
        self.machine, self.process, self.run = machine, process, run
        self.free_pages, self.freed, self.faults, self.calls = [], [], [], []
        self.answer = None
        self.skip = ()

    def add(self, size=SECTION):
        self.devmem = self.run(hmm_devmem_add(self.machine, self, "card", size))
        assert isinstance(self.devmem, HmmDevmem)
        self.free_pages = [self.devmem.pfn_first + i for i in range(64)]
        return self.devmem

    # --- struct hmm_devmem_ops
    def free(self, devmem, page):
        assert (page_count(self.machine, page) == 1).all()
        self.freed += page.tolist()
        self.free_pages += page.tolist()

    def fault(self, devmem, vma, addr, page, flags, pmdp):
        self.faults.append((addr, page, flags, pmdp))
        if self.answer is not None:
            return self.answer
        return self.bring_home(vma, addr)

    def bring_home(self, vma, addr):
        answer = yield from self.migrate(vma, addr, addr + 1, "home")
        assert answer == 0
        return VM_FAULT_MINOR

    # --- struct migrate_vma_ops
    def alloc_and_copy(self, vma, src, dst, start, end, private):
        self.calls.append(("alloc_and_copy", src.tolist(), start, end, private))
        content = self.machine["page.content"]
        for i in np.flatnonzero(src & np.uint64(M)).tolist():
            if i in self.skip:
                dst[i] = MIGRATE_PFN_ERROR | V
                continue
            if private == "home":
                frame = hmm_vma_alloc_locked_page(self.machine, vma, np.array([start + i]))
                bits = L
            else:
                frame = np.array([self.free_pages.pop(0)])
                get_page(self.machine, frame)
                set_flags(self.machine, frame, PG_LOCKED)
                bits = L | D
            if src[i] & np.uint64(V):
                old = page_rows(self.machine, np.array([int(src[i]) >> MIGRATE_PFN_SHIFT]))
                new = page_rows(self.machine, frame)
                self.machine.write("page.content", new, content[old])
            dst[i] = migrate_pfn(frame)[0] | np.uint64(bits)

    def finalize_and_map(self, vma, src, dst, start, end, private):
        self.calls.append(("finalize_and_map", src.tolist(), start, end, private))

    def migrate(self, vma, start, end, private="to the card"):
        self.src, self.dst = np.zeros((2, end - start), np.uint64)
        return migrate_vma(self.machine, self, vma, start, end, self.src, self.dst, private)

    def take(self, pages):
        lock = mm_lock(self.machine, self.process.mm)

        def locked():
            yield from self.machine.down_read(lock)
            vma = vma_lookup(self.machine, self.process.mm, pages.start)
            answer = yield from self.migrate(vma, pages.start, pages.stop)
            self.machine.up_read(lock)
            return answer

        return self.run(locked())

    def words(self, pages):
        return read_range(
            self.machine, mm_root(self.machine, self.process.mm), pages.start, pages.stop
        )


@pytest.fixture
def card(machine, process, run):
    return Card(machine, process, run)


# --- seed 004: hmm_devmem_add ---------------------------------------------------------------------


@pytest.mark.parametrize("size, sections", [(1, 1), (SECTION, 1), (SECTION + 1, 2)])
def test_the_size_is_rounded_up_to_sections(card, size, sections):
    devmem = card.add(size)
    assert devmem.pfn_last - devmem.pfn_first == sections * SECTION_PAGES


def test_the_search_goes_from_the_top_downwards_in_steps_of_the_size(machine, run, card):
    for pagemap in np.flatnonzero(machine["pagemap.last"]).tolist():
        memunmap_pages(machine, pagemap)  # the test devices', which are at the top
    one = card.add(SECTION)
    assert one.pfn_last == PHYSICAL_PAGES
    # Steps of three sections do not meet the first free place, but the next multiple.
    three = run(hmm_devmem_add(machine, card, "card", 3 * SECTION))
    assert three.pfn_first == PHYSICAL_PAGES - 6 * SECTION_PAGES
    two = run(hmm_devmem_add(machine, card, "card", 2 * SECTION))
    assert two.pfn_first == PHYSICAL_PAGES - 8 * SECTION_PAGES


def test_the_place_is_reserved_as_memory_of_a_device(card):
    """-1UL before there is a place, then the whole resource (struct hmm_devmem)."""
    nowhere = HmmDevmem(card, "card")
    assert (nowhere.pfn_first, nowhere.pfn_last, nowhere.resource) == (-1, -1, None)
    devmem = card.add()
    assert devmem.resource == Resource(
        devmem.pfn_first, devmem.pfn_last, IORES_DESC_DEVICE_PRIVATE_MEMORY
    )
    assert (IORES_DESC_DEVICE_PRIVATE_MEMORY, IORES_DESC_DEVICE_PUBLIC_MEMORY) == (6, 7)
    assert (devmem.ops, devmem.device) == (card, "card")


def test_nothing_is_enomem(machine, run, card):
    assert run(hmm_devmem_add(machine, card, "card", 0)) == -12


def test_no_place_is_erange(machine, run, card):
    assert run(hmm_devmem_add(machine, card, "card", 1 << 45)) == -34
    assert machine.objects.get("hmm_devmem", {}) == {}


def test_no_memory_is_enomem(machine, run, card, use_up_ram):
    give_back = use_up_ram()
    assert run(hmm_devmem_add(machine, card, "card", SECTION)) == -12
    give_back()
    assert isinstance(run(hmm_devmem_add(machine, card, "card", SECTION)), HmmDevmem)


@pytest.mark.parametrize("first, last, warns", [(0, 1024, False), (4000, 5000, True)])
def test_memory_that_is_ram_is_enxio(machine, steps, card, first, last, warns):
    machine.ram_pages = SECTION_PAGES if not warns else 4096
    devmem = HmmDevmem(card, "card")
    devmem.pfn_first, devmem.pfn_last = first, last
    creating = steps(hmm_devmem_pages_create(machine, devmem))
    texts = [step.text for step in creating]
    assert creating.result == -6 and devmem.pagemap == 0
    assert any("Warning" in text for text in texts) is warns


def test_a_section_of_another_chunk_is_ebusy(machine, steps, card):
    """Seed 004 logs it as a collision of mappings (``dev_err``)."""
    first = card.add()
    devmem = HmmDevmem(card, "other card")
    devmem.pfn_first, devmem.pfn_last = first.pfn_first - 10, first.pfn_first + 10
    creating = steps(hmm_devmem_pages_create(machine, devmem))
    assert [step.text for step in creating] == [
        "other card collides with memory that is there already."
    ]
    assert creating.result == -16
    assert pagemap_of(machine, np.array([first.pfn_first])) == [first.pagemap]


def test_every_page_points_to_its_pagemap_and_idles_at_one_reference(machine, card):
    devmem = card.add()
    pages = np.array([devmem.pfn_first, devmem.pfn_last - 1])
    assert pagemap_of(machine, pages).tolist() == [devmem.pagemap] * 2
    assert page_count(machine, pages).tolist() == [1, 1]
    assert page_count(machine, np.array([2])).tolist() == [0]  # free RAM has none


def test_drvdata_is_a_word_of_the_drivers_own(machine, card):
    devmem = card.add()
    pages = np.arange(devmem.pfn_first, devmem.pfn_first + 3)
    assert hmm_devmem_page_get_drvdata(machine, pages).tolist() == [0, 0, 0]
    hmm_devmem_page_set_drvdata(machine, pages, [1, 2, (1 << 64) - 1])
    assert hmm_devmem_page_get_drvdata(machine, pages).tolist() == [1, 2, (1 << 64) - 1]
    hmm_devmem_page_set_drvdata(machine, pages[:2], 9)
    assert hmm_devmem_page_get_drvdata(machine, pages).tolist() == [9, 9, (1 << 64) - 1]


# --- 4.14: hmm_devmem_add_resource ----------------------------------------------------------------


PUBLIC = IORES_DESC_DEVICE_PUBLIC_MEMORY


def test_memory_that_the_cpu_reaches_is_mapped_and_freed_and_never_faults(machine, process, card):
    first = PHYSICAL_PAGES - 32 * SECTION_PAGES
    res = Resource(first, first + SECTION_PAGES, PUBLIC)
    card.devmem = card.run(hmm_devmem_add_resource(machine, card, "card", res))
    assert (card.devmem.pfn_first, card.devmem.pfn_last) == (res.start, res.end)
    card.free_pages = list(range(first, first + 8))
    a = process.mmap(2)
    process.store(a, [5, 6])
    card.take(a)
    assert pfn_of(card.words(a)).tolist() == [first, first + 1]
    assert process.load(a).tolist() == [5, 6] and card.faults == []
    assert not is_device_private(card.words(a)).any()
    process.munmap(a[1])
    assert card.freed == [first + 1] and violations(machine) == []


def test_the_resource_must_be_public_and_nobodys(machine, run, card, use_up_ram):
    first = PHYSICAL_PAGES - 32 * SECTION_PAGES
    edges = first, first + SECTION_PAGES
    private = Resource(*edges, IORES_DESC_DEVICE_PRIVATE_MEMORY)
    assert run(hmm_devmem_add_resource(machine, card, "card", private)) == -22
    ram = Resource(0, SECTION_PAGES, PUBLIC)
    assert run(hmm_devmem_add_resource(machine, card, "card", ram)) == -6
    free = use_up_ram()
    assert run(hmm_devmem_add_resource(machine, card, "card", Resource(*edges, PUBLIC))) == -12
    free()
    card.devmem = run(hmm_devmem_add_resource(machine, card, "card", Resource(*edges, PUBLIC)))
    assert isinstance(card.devmem, HmmDevmem) and card.devmem.public
    assert card.devmem.resource == Resource(*edges, PUBLIC)
    assert run(hmm_devmem_add_resource(machine, card, "card", Resource(*edges, PUBLIC))) == -16


# --- seed 004: free and fault ---------------------------------------------------------------------


def test_free_is_called_when_the_count_falls_to_1(machine, process, card):
    card.add()
    a = process.mmap(2)
    process.store(a, [5, 6])
    card.take(a)
    used = swap_offset_pfn(card.words(a))
    assert page_count(machine, used).tolist() == [2, 2] and card.freed == []
    process.munmap(a[0])
    assert card.freed == [used[0]] and page_count(machine, used).tolist() == [1, 2]


def test_a_cpu_fault_goes_to_the_driver_with_its_arguments(machine, process, card):
    card.add()
    a = process.mmap(3)
    process.store(a, [5, 6, 7])
    card.take(a)
    used = swap_offset_pfn(card.words(a)).tolist()
    assert process.load(a[1]).tolist() == [6]
    pmd = word_row(machine, mm_root(machine, process.mm), a[1].start, "pmd")
    assert card.faults == [(a[1].start, used[1], 0, pmd)]  # flags: read, by the CPU
    assert is_device_private(card.words(a)).tolist() == [True, False, True]
    assert card.freed == [used[1]] and violations(machine) == []
    assert process.load(a).tolist() == [5, 6, 7] and card.freed == [used[i] for i in (1, 0, 2)]


def test_the_flags_of_a_fault_say_who_touched_and_how(machine, process, run, card):
    card.add()
    a = process.mmap(4)
    process.store(a, [5, 6, 7, 8])
    card.take(a)
    process.load(a[0])
    process.store(a[1], 9)
    run(get_user_pages(machine, process.mm, a[2].start, a[2].stop, True, remote=True))
    run(get_user_pages(machine, process.mm, a[3].start, a[3].stop, False, remote=True))
    write, remote = FAULT_FLAG_WRITE, FAULT_FLAG_REMOTE
    assert [flags for _, _, flags, _ in card.faults] == [0, write, write | remote, remote]
    assert (write, remote) == (0x01, 0x80)


def test_the_mmap_lock_is_held_when_the_driver_is_called(machine, process, card):
    """For reading at least, says seed 004 of ``fault``, so that the mapping is still there."""
    card.add()
    a = process.mmap(1)
    process.store(a, 5)
    card.take(a)
    held = []
    bring_home = card.bring_home
    lock = mm_lock(machine, process.mm)
    card.bring_home = lambda *args: held.append(machine.holders(lock)) or bring_home(*args)
    process.load(a)
    assert held == [(False, 1)]


def test_a_driver_may_bring_more_than_one_page_home(process, card):
    """An optimization that seed 004 allows, if the page that faulted goes before the others."""
    card.add()
    a = process.mmap(4)
    process.store(a, [5, 6, 7, 8])
    card.take(a)

    def all_of_them(vma, addr):
        for page in [addr, *(set(range(a.start, a.stop)) - {addr})]:  # the faulting one first
            yield from card.migrate(vma, page, page + 1, "home")
        return VM_FAULT_MAJOR

    card.bring_home = all_of_them
    assert process.load(a[2]).tolist() == [7]
    assert [fault[0] for fault in card.faults] == [a.start + 2]
    assert not is_device_private(card.words(a)).any() and len(card.freed) == 4
    assert process.load(a).tolist() == [5, 6, 7, 8] and len(card.faults) == 1


@pytest.mark.parametrize(
    "answer, signal, errno",
    [
        (VM_FAULT_SIGBUS, 7, 0),
        (VM_FAULT_HWPOISON, 7, 0),
        (VM_FAULT_SIGSEGV, 11, 0),
        (VM_FAULT_OOM, 0, 12),
    ],
)
def test_a_driver_that_fails_kills_or_has_no_memory(process, card, answer, signal, errno):
    card.add()
    a = process.mmap(1)
    process.store(a, 5)
    card.take(a)
    card.answer = answer
    with pytest.raises(KernelError) as error:
        process.load(a)
    assert (error.value.signal, error.value.errno) == (signal, errno)
    assert page_count(card.machine, swap_offset_pfn(card.words(a))).tolist() == [2]


def test_the_codes_of_a_fault():
    """As include/linux/mm.h of 4.14 has them."""
    assert (VM_FAULT_MINOR, VM_FAULT_MAJOR) == (0, 4)
    assert VM_FAULT_ERROR == 0x873 and VM_FAULT_ERROR & VM_FAULT_MAJOR == 0


def test_hmm_vma_alloc_locked_page(machine, process, use_up_ram):
    a = process.mmap(2)
    vma = vma_lookup(machine, process.mm, a.start)
    frames = hmm_vma_alloc_locked_page(machine, vma, np.arange(a.start, a.stop))
    assert (machine["page.flags"][frames] & PG_LOCKED).all() and frames.size == 2
    put_page(machine, frames)
    use_up_ram()
    assert hmm_vma_alloc_locked_page(machine, vma, np.arange(a.start, a.stop)).size == 0


# --- seed 004: hmm_devmem_remove ------------------------------------------------------------------


def test_remove_waits_until_all_pages_are_free(machine, process, card, steps):
    devmem = card.add()
    first, number = devmem.pfn_first, devmem.pagemap
    a = process.mmap(1)
    process.store(a, 5)
    card.take(a)
    removing = steps(hmm_devmem_remove(machine, devmem))
    assert next(removing).lock and next(removing).lock
    process.munmap(a)
    removing.run()
    assert pagemap_of(machine, np.array([first])).tolist() == [0] and devmem.pagemap == 0
    assert number not in machine.objects["hmm_devmem"]
    assert card.add().pfn_first == first  # the place is free again


def test_removing_nothing_does_nothing(machine, steps):
    assert list(steps(hmm_devmem_remove(machine, None))) == []


# --- migrate_vma() --------------------------------------------------------------------------------


def test_the_bits_of_4_14():
    assert [1 << bit for bit in range(6)] == [V, M, L, W, D, MIGRATE_PFN_ERROR]
    assert migrate_pfn(np.array([3])).tolist() == [3 << 6 | 1]


def test_the_driver_is_called_twice_with_the_words_of_its_time(process, card):
    card.add()
    a = process.mmap(3)
    process.store(a[:2], [5, 6])
    process.mprotect(a[1], "r")
    frames = pfn_of(card.words(a[:2])).tolist()
    vma_end = a[:1]
    assert card.take(vma_end) == 0
    assert card.calls[0] == (
        "alloc_and_copy",
        [frames[0] << 6 | V | M | L | W],
        a.start,
        a.start + 1,
        "to the card",
    )
    assert card.calls[1][0] == "finalize_and_map" and card.calls[1][1] == card.calls[0][1]
    card.calls.clear()
    card.take(a[1])
    assert card.calls[0][1] == [frames[1] << 6 | V | M | L]
    card.calls.clear()
    card.take(a[2])  # a hole: MIGRATE and no page
    assert [call[1] for call in card.calls] == [[M], [M]]
    assert is_device_private(card.words(a)).all()


def test_device_memory_of_anybody_is_collected_with_device_set(process, card):
    card.add()
    a = process.mmap(1)
    process.store(a, 5)
    card.take(a)
    frame = int(swap_offset_pfn(card.words(a))[0])
    card.calls.clear()
    process.load(a)
    assert card.calls[0][1] == [frame << 6 | V | M | L | W | D]
    assert (card.words(a) & np.uint64(RW)).all()


def test_an_error_leaves_the_page_where_it_is(process, card):
    card.add()
    a = process.mmap(2)
    process.store(a, [5, 6])
    before = pfn_of(card.words(a)).tolist()
    card.skip = (0,)
    assert card.take(a) == 0
    assert [word & M for word in card.calls[1][1]] == [0, M]
    card.skip = ()
    assert pfn_of(card.words(a))[0] == before[0] and process.load(a).tolist() == [5, 6]


def test_with_nothing_to_move_the_driver_is_not_called(machine, process, card):
    card.add()
    a = process.mmap(1)
    process.store(a, 5)
    frame = pfn_of(card.words(a))
    get_page(machine, frame)  # somebody holds it
    assert card.take(a) == 0
    assert card.calls == [] and card.src.tolist() == [0]
    put_page(machine, frame)


def test_wrong_arguments_are_einval(machine, process, run, card):
    card.add()
    a = process.mmap(2)
    vma = vma_lookup(machine, process.mm, a.start)
    src, dst = np.zeros((2, 2), np.uint64)

    def answer(ops=card, vma=vma, start=a.start, end=a.stop, src=src, dst=dst):
        return run(migrate_vma(machine, ops, vma, start, end, src, dst))

    assert answer(vma=None) == -22
    assert answer(vma=vma._replace(flags=vma.flags | VM_HUGETLB)) == -22
    assert answer(vma=vma._replace(flags=vma.flags | VM_PFNMAP)) == -22
    assert answer(start=a.start - 1) == -22 and answer(end=a.stop + 1) == -22
    assert answer(end=a.start) == -22 and answer(ops=None) == -22
    assert answer(src=None) == -22 and answer(dst=None) == -22
    assert card.calls == []


def test_the_bits_that_have_gone():
    """DEVICE and ERROR in 5.4, LOCKED in 5.16."""
    from hmmlab.model import entry

    kept = {name for name in dir(migrate_2017) if name.startswith("MIGRATE_PFN_")}
    now = {name for name in dir(entry) if name.startswith("MIGRATE_PFN_")}
    gone = kept - now - {"MIGRATE_PFN_SHIFT"}
    assert gone == {"MIGRATE_PFN_LOCKED", "MIGRATE_PFN_DEVICE", "MIGRATE_PFN_ERROR"}
