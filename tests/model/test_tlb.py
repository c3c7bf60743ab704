"""When pages are freed: after the notifier's end and the flush; and who is heard meanwhile."""

import numpy as np
import pytest

from hmmlab import Machine, Process
from hmmlab.model.machine import Actor, Steps
from hmmlab.session import Session


def free_pages(machine):
    return int(machine["zone.free"][:2].sum())


def calls_of(machine, operation):
    """The functions that an operation calls, in order."""
    trace = machine.record()
    operation()
    calls = [name for event in trace.events for _, name in event.step.calls]
    machine.detach(trace)
    return calls


def test_a_page_is_freed_after_the_end_of_the_change(machine, process, device):
    """Whoever is told of the end finds the page mapped nowhere, and still nobody else's."""
    a = process.mmap(4)
    process.store(a, 7)
    before = free_pages(machine)
    steps = process.steps.munmap(a)
    end = "__mmu_notifier_invalidate_range_end"
    next(step for step in steps if step.function == end)
    rows = slice(2, machine.ram_pages)
    assert not machine["page.mapcount"][rows].any() and free_pages(machine) == before
    steps.run()
    assert free_pages(machine) == before + 4


def test_a_device_private_page_is_in_no_tlb_and_freed_at_once(machine, process, device):
    a = process.mmap(4)
    process.store(a, 7)
    device.to_dev(a)
    calls = calls_of(machine, lambda: process.madvise(a, "dontneed"))
    end = calls.index("__mmu_notifier_invalidate_range_end")
    assert calls.index("free_zone_device_page") < end < calls.index("tlb_finish_mmu")
    assert "flush_tlb_mm_range" not in calls


def test_a_coherent_page_waits_for_the_flush(machine, process):
    device = process.open(2)
    a = process.mmap(4)
    process.store(a, 7)
    device.to_dev(a)
    calls = calls_of(machine, lambda: process.madvise(a, "dontneed"))
    assert calls.index("flush_tlb_mm_range") < calls.index("free_zone_device_page")


@pytest.mark.parametrize("pages, batches", [(1, 1), (8, 1), (9, 2), (512, 2), (518, 2), (519, 3)])
def test_pages_are_freed_in_batches(machine, process, pages, batches):
    a = process.mmap(pages + 1)
    process.store(a, 7)
    calls = calls_of(machine, lambda: process.madvise(a[:pages], "dontneed"))
    assert calls.count("lru_add_drain") == 1 + batches  # one before anything is unmapped


def test_only_what_a_tlb_may_hold_is_flushed(machine, process):
    a = process.mmap(4)
    assert "flush_tlb_mm_range" not in calls_of(machine, lambda: process.madvise(a, "dontneed"))
    process.store(a, 7)
    down = calls_of(machine, lambda: process.mprotect(a, "none"))
    up = calls_of(machine, lambda: process.mprotect(a, "rw"))
    assert down.count("flush_tlb_mm_range") == 1 and "flush_tlb_mm_range" not in up


def test_devices_are_told_of_a_flush_once_anybody_has_subscribed(machine, process):
    a = process.mmap(4)
    process.store(a, 7)
    told = "__mmu_notifier_invalidate_range"
    assert told not in calls_of(machine, lambda: process.madvise(a[:1], "dontneed"))
    process.open(0)
    assert told in calls_of(machine, lambda: process.madvise(a[1:2], "dontneed"))


def test_very_many_pages_do_not_wait_for_the_end():
    machine = Machine(1 << 16)
    process = Process(machine)
    a = process.mmap(40_000)
    process.store(a, 7)
    calls = calls_of(machine, lambda: process.munmap(a))
    assert calls.index("flush_tlb_mm_range") < calls.index("free_pgtables")
    assert machine["page.refcount"][2 : machine.ram_pages].sum() == 0


# --- kernel threads -------------------------------------------------------------------------------


@pytest.fixture
def thp():
    machine = Machine(1 << 14)
    return machine, Process(machine)


def collapsible(process):
    """2 MiB of small pages, in memory that may be huge: it wakes khugepaged."""
    a = process.mmap(512)
    process.store(a, 7)
    process.madvise(a, "hugepage")
    return a


def test_khugepaged_runs_after_an_operation_of_the_process(thp):
    machine, process = thp
    trace = machine.record()
    a = collapsible(process)
    assert [operation.actor for operation in trace.operations][-1] == "khugepaged"
    assert machine["khugepaged.awake"][0] == 0
    device = process.open(0)
    assert set(device.snapshot(a).tolist()) == {0x06}  # one huge page, writable


def test_khugepaged_does_so_for_a_session_too():
    session = Session(Machine(1 << 14))
    session.play(["open d0 0", "mmap A 512 rw private", "store A 0 512 7"])
    answer = session.do("madvise A 0 512 hugepage")
    assert answer["notify"] == []  # it is not heard in the operation that woke it
    assert session.trace.operations[-1].actor == "khugepaged"
    assert session.trace.operations[-2].result == answer
    assert session.do("snapshot d0 A 0 2")["snapshot"] == "0606"


def test_khugepaged_waits_while_an_operation_is_under_way(thp):
    machine, process = thp
    other = Process(machine)
    open_ended = other.steps.store(other.mmap(4), 1)
    next(open_ended)
    a = collapsible(process)
    assert machine["khugepaged.awake"][0] == 1
    open_ended.run()
    assert machine["khugepaged.awake"][0] == 0
    assert set(process.open(0).snapshot(a).tolist()) == {0x06}


def test_an_operation_that_is_dropped_is_not_waited_for(thp):
    machine, process = thp
    dropped = process.steps.store(process.mmap(4), 1)
    next(dropped)
    del dropped
    collapsible(process)
    assert machine["khugepaged.awake"][0] == 0 and machine.running == 0


def test_ksmd_scans_and_the_process_only_advises(machine):
    session = Session(machine)
    session.play(["open d0 0", "mmap A 2 rw private", "store A 0 1 5", "store A 1 1 5"])
    assert session.do("ksm A 0 2")["ret"] == 1
    actors = {event.step.actor for event in session.trace.events if "ksm" in event.step.function}
    assert "ksmd" in actors
    assert [name for _, name in session.calls if "madvise" in name] == ["__x64_sys_madvise"]
    assert not any("notifier" in name for _, name in session.calls)  # these are ksmd's
    assert [event["event"] for event in session.answers[-1]["notify"]] == ["CLEAR"] * 3


def test_steps_of_another_actor_return_their_answer(machine):
    def inner():
        yield machine.step("inside")
        return np.int64(3)

    def outer():
        return (yield from machine.run_as(Actor("thread"), inner()))

    steps = Steps(machine, "test", Actor("me"), outer())
    assert [step.actor for step in steps] == ["thread"] and steps.result == 3
