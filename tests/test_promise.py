"""The promise of a mirror: its letters, where it is broken, and that the invariants agree."""

import numpy as np
import pytest

from hmmlab import Driver, Machine, Process, Session
from hmmlab.invariants import violations
from hmmlab.invariants.look import data_frames, may_write
from hmmlab.invariants.promise import broken_promise, device_letters, first_break
from hmmlab.model.entry import device_pfn
from hmmlab.model.mm_types import mm_root
from hmmlab.model.page_table import read_range


class Deaf(Driver):
    """Hears of every change and forgets nothing."""

    def invalidate(self, subscription, range, cur_seq):
        return True


def mirrored(driver: type[Driver]) -> tuple[Process, Driver]:
    """A process whose four pages a device has written."""
    process = Process(Machine(ram_pages=4096))
    device = process.attach(driver)
    device.write(process.mmap(4), 7)
    return process, device


def change(process: Process) -> None:
    """Page 0 loses a right, page 1 is thrown away."""
    a = process.region("A", 4)
    process.mprotect(a[0], "r")
    process.madvise(a[1], "dontneed")


def test_letters_are_what_the_device_may_do():
    process, device = mirrored(Driver)
    a = process.region("A", 4)
    assert device_letters(process.machine, a) == "wwww"
    change(process)
    assert device_letters(process.machine, a) == "..ww"
    device.read(a)
    assert device_letters(process.machine, a) == "rrww"
    assert not broken_promise(process.machine) and not violations(process.machine)


def test_what_a_deaf_driver_keeps_is_told_by_letters_words_and_invariants():
    process, _ = mirrored(Deaf)
    trace, a = process.machine.record(), process.region("A", 4)
    assert first_break(trace, a) is None
    change(process)
    assert device_letters(process.machine, a) == "+!ww"
    assert (
        broken_promise(process.machine) == "The device may still write A page 0; the CPU may not."
    )
    position, why = first_break(trace, a)
    assert why == broken_promise(process.machine) and position == trace.operations[0].last
    told = [text for text in violations(process.machine) if "stale entry" in text]
    assert [f"{a.start + page:#x}" in text for page, text in enumerate(told)] == [True, True]


def test_nothing_is_promised_while_a_change_runs():
    process, _ = mirrored(Deaf)
    discard = process.steps.madvise(process.region("A", 4), "dontneed")
    next(step for step in discard if step.function == "unmap_page_range")
    assert "!" in device_letters(process.machine, process.region("A", 4))
    assert not broken_promise(process.machine)
    discard.run()
    assert "stale" in broken_promise(process.machine)


@pytest.mark.parametrize(("prot", "letters"), [("rw", "WWww"), ("r", "RRrr")])
def test_a_page_on_the_device_has_its_data_behind_its_frame(prot, letters):
    story = ["open d0 0", "mmap A 4 rw private", "store A 0 4 7", f"mprotect A 0 4 {prot}"]
    session = Session(Machine(ram_pages=1 << 16)).play([*story, "to_dev d0 A 0 2", "read d0 A 0 4"])
    machine, a = session.machine, session.process.region("A", 4)
    assert device_letters(machine, a) == letters
    words = read_range(machine, mm_root(machine, a.mm), a.start, a.stop)
    named = device_pfn(session.devices["d0"].entries(a.start, a.stop))
    assert np.array_equal(data_frames(machine, words), named)
    assert may_write(words).tolist() == [prot == "rw"] * 4
