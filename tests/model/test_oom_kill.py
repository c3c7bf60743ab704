"""The reaper of a process out of memory: it waits for nobody."""

import pytest

from hmmlab import Driver
from hmmlab.invariants import violations
from hmmlab.model.mm_types import mm_lock
from hmmlab.model.oom_kill import oom_reap_task_mm


class Asked(Driver):
    heard = ()

    def invalidate(self, subscription, range, cur_seq):
        self.heard = (*self.heard, range)
        return super().invalidate(subscription, range, cur_seq)


@pytest.fixture
def mirror(process):
    return process.attach(Asked)


def reap(machine, process):
    return process.run("reap", oom_reap_task_mm(machine, process.mm))


def test_pages_go_and_mappings_stay(machine, process, mirror):
    own, shared = process.mmap(4), process.mmap(4, kind="shared")
    process.store(own, 7)
    process.store(shared, 7)
    mirror.read(own)
    mirror.heard = ()
    assert reap(machine, process) is True
    (range,) = mirror.heard
    assert (range.event.name, range.blockable) == ("UNMAP", False)
    assert (int(range.start[0]), int(range.end[0])) == (own.start, own.stop)
    assert not mirror.entries(own.start, own.stop).any()
    assert process.load(own).tolist() == [0] * 4, "the mapping is there, its pages are new"
    assert process.load(shared).tolist() == [7] * 4
    assert violations(machine) == []


def test_a_subscriber_that_would_sleep_is_passed_over(machine, process, mirror):
    a = process.mmap(4)
    process.store(a, 7)
    mirror.read(a)
    machine.write("lock.writer", mirror.lock, 1)
    assert reap(machine, process) is False
    assert process.load(a).tolist() == [7] * 4 and mirror.entries(a.start, a.stop).all()
    assert not machine["mm.active_invalidations"][process.mm]
    machine.write("lock.writer", mirror.lock, 0)
    assert reap(machine, process) is True
    assert not mirror.entries(a.start, a.stop).any()
    assert violations(machine) == []


def test_a_taken_mmap_lock_is_not_waited_for(machine, process, mirror):
    a = process.mmap(1)
    process.store(a, 7)
    machine.write("lock.writer", mm_lock(machine, process.mm), 1)
    assert reap(machine, process) is False
    machine.write("lock.writer", mm_lock(machine, process.mm), 0)
    assert process.load(a).tolist() == [7] and mirror.heard == ()
