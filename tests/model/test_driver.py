"""A learner's own driver, the public interface, and how it refuses what makes no sense."""

import gc
import warnings

import numpy as np
import pytest

from hmmlab import BULK, Driver, KernelError, Machine, Process
from hmmlab.invariants import violations
from hmmlab.model.machine import Actor, Steps, UnrunOperationWarning
from hmmlab.model.mmu_notifier import mmu_interval_set_seq
from hmmlab.model.page import ZERO_PFN
from hmmlab.model.schedule import interleave
from hmmlab.model.task_mmu import PM_PRESENT, PM_SOFT_DIRTY


class Forgetful(Driver):
    """Hears of a change and keeps its entries: a mirror that is wrong."""

    def invalidate(self, subscription, range, cur_seq):
        mmu_interval_set_seq(self.machine, subscription, cur_seq)
        return True


class Counting(Driver):
    """Plain callback, no generator: it is called for every range, one after another."""

    heard = ()

    def invalidate(self, subscription, range, cur_seq):
        self.heard = (*self.heard, (range.event.name, int(range.start[0]), int(range.end[0])))
        mmu_interval_set_seq(self.machine, subscription, cur_seq)
        self.forget(int(range.start[0]), int(range.end[-1]))
        return True


def test_the_base_driver_is_a_correct_mirror(process):
    device = process.attach(Driver, "mine")
    a = process.mmap(200)
    process.store(a, range(200))
    assert (device.read(a) == np.arange(200)).all()
    device.write(a[5:8], [7, 8, 9])
    assert process.load(a[5:8]).tolist() == [7, 8, 9]
    process.mprotect(a[:100], "r")
    assert (device.entries(a.start, a.start + 100) == 0).all()
    assert (device.entries(a.start + 100, a.stop) != 0).all()
    with pytest.raises(KernelError, match="EPERM"):
        device.write(a[0], 1)
    device.close()
    with pytest.raises(ValueError, match="not open"):
        device.read(a)


def test_a_driver_that_forgets_nothing_is_found_out(machine, process):
    device = process.attach(Forgetful)
    a = process.mmap(4)
    process.store(a, 1)
    device.read(a)
    assert violations(machine) == []
    process.madvise(a, "dontneed")
    assert [text for text in violations(machine) if "stale" in text]


@pytest.mark.parametrize("grain", [1, BULK])
def test_a_plain_callback_hears_every_range_of_a_series(grain):
    process = Process(Machine(4096, grain=grain))
    a = process.mmap(5)
    process.load(a)
    device = process.attach(Counting)
    process.store(a, range(5))
    assert device.heard == tuple(("CLEAR", a.start + i, a.start + i + 1) for i in range(5))


def test_reading_untouched_memory_takes_none(machine, process, device):
    a = process.mmap(8)
    before = int(machine["zone.used"][0])
    assert device.read(a).tolist() == [0] * 8
    assert int(machine["zone.used"][0]) == before
    assert (device.snapshot(a) == 0x11).all()
    assert machine["page.refcount"][ZERO_PFN] == 1


def test_mirroring_pins_nothing(machine, process, device):
    a = process.mmap(8)
    process.store(a, 1)
    counts = machine["page.refcount"][:32].copy()
    device.read(a)
    assert (machine["page.refcount"][:32] == counts).all()


def test_pagemap_is_numpy(process):
    a = process.mmap(3)
    process.store(a[1], 5)
    bits = process.pagemap(a)
    assert bits.dtype == np.uint64 and bits.shape == (3,)
    assert ((bits & PM_PRESENT) != 0).tolist() == [False, True, False]
    assert ((bits & PM_SOFT_DIRTY) != 0).all()


def test_regions_slice_like_arrays(process):
    a = process.mmap(10)
    assert len(a) == 10 and len(a[2:5]) == 3 and len(a[3]) == 1
    assert a[-1].start == a.stop - 1 and a[2:5][1].start == a.start + 3
    with pytest.raises(IndexError, match="10 pages"):
        a[10]
    with pytest.raises(ValueError, match="step"):
        a[::2]


def test_what_makes_no_sense_is_refused_with_its_numbers(process, device):
    a = process.mmap(4)
    other = Process(process.machine)
    for call, words in (
        (lambda: process.store(a, [1, 2]), "2 values for 4 pages of A"),
        (lambda: process.store(a, 1.5), "whole numbers"),
        (lambda: process.load(a[2:2]), "empty"),
        (lambda: other.load(a), "not in the address space of p1"),
        (lambda: process.mmap(0), "mmap of 0 pages"),
        (lambda: process.mprotect(a, "wr!"), "expected letters of 'rwx'"),
        (lambda: process.madvise(a, "hurry"), "expected one of dontneed"),
        (lambda: process.open(7), "unit 7"),
        (lambda: Machine(3), "ram_pages is 3"),
        (lambda: Machine(grain=0), "grain is 0"),
        (lambda: process.machine.record().replay().seek(5), "position 5"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_signal_names_the_page_and_why(process):
    a = process.mmap(4)
    process.mprotect(a[2:], "r")
    with pytest.raises(KernelError, match="SIGSEGV: A page 2: the mapping is r--p") as caught:
        process.store(a, 9)
    assert caught.value.signal == 11 and caught.value.errno == 0
    assert process.load(a).tolist() == [9, 9, 0, 0]


def test_ram_runs_out_with_enomem_and_nothing_lost(machine, process):
    small = Process(Machine(64))
    a = small.mmap(100)
    with pytest.raises(KernelError, match="ENOMEM"):
        small.store(a, 1)
    assert violations(small.machine) == []


def test_steps_that_are_dropped_warn_with_their_name(process):
    a = process.mmap(2)
    with pytest.warns(UnrunOperationWarning, match="store A 0 2"):
        process.steps.store(a, 1)
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process.steps.store(a, 1).run()
    assert "store" in dir(process.steps)
    with pytest.raises(AttributeError, match="no operation 'region'"):
        process.steps.region  # noqa: B018


@pytest.mark.parametrize("order", [None, [0] * 3 + [1] * 9, [1] * 4 + [0] * 20, [0, 1, 1] * 20])
def test_interleaved_operations_never_leave_a_stale_entry(machine, process, device, order):
    a = process.mmap(70)
    process.store(a, 3)
    reading, protecting = device.steps.read(a[:64]), process.steps.mprotect(a, "r")
    taken = interleave([reading, protecting], order)
    assert {who for who, _ in taken} == {0, 1}
    assert reading.result.tolist() == [3] * 64
    assert violations(machine) == []


def test_an_invalidation_between_looking_and_mapping_makes_the_device_look_again(
    machine, process, device
):
    """The heart of the protocol: the answer was right, and is stale when the lock is taken."""
    a = process.mmap(4)
    process.store(a, 3)
    reading = device.steps.read(a)
    for step in reading:
        if step.function == "walk_page_range":
            break
    process.madvise(a, "dontneed")
    texts = [step.text for step in reading]
    assert any("stale" in text for text in texts)
    assert reading.result.tolist() == [0] * 4
    assert violations(machine) == []


def test_two_who_wait_for_each_other_are_found(machine):
    one, two = machine.new_lock("one"), machine.new_lock("two")

    def both(first, second):
        yield from machine.down_write(first)
        yield machine.step("has the first")
        yield from machine.down_write(second)

    operations = [
        Steps(machine, "ab", Actor("ab"), both(one, two)),
        Steps(machine, "ba", Actor("ba"), both(two, one)),
    ]
    with pytest.raises(RuntimeError, match="all that are left wait"):
        interleave(operations)
    idle = Steps(machine, "idle", Actor("idle"), iter(()))
    with pytest.raises(ValueError, match="turn of operation 3"):
        interleave([idle], [3])
    assert interleave([idle]) == []
