"""The sequence protocol, step by step, and who is told what."""

import pytest

from hmmlab.model.machine import Actor, KernelError, Steps
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
    mmu_notifier_register,
)


class Listener:
    takes_series = False

    def __init__(self, machine, willing=True):
        self.machine, self.willing, self.heard = machine, willing, []

    def invalidate(self, subscription, range, cur_seq):
        self.heard.append((range.event, int(range.start[0]), int(range.end[-1]), cur_seq))
        if not self.willing and not range.blockable:
            return False
        mmu_interval_set_seq(self.machine, subscription, cur_seq)
        return True

    def invalidate_range_start(self, range):
        self.heard.append(("start", int(range.start[0])))

    def invalidate_range_end(self, range):
        self.heard.append(("end", int(range.start[0])))


def run(machine, routine):
    return Steps(machine, "test", Actor("test"), routine).run()


def change(mm, start, end, **rest):
    return MmuNotifierRange.one(mm, Event.CLEAR, start, end, **rest)


def subscribe(machine, mm, start, end, **rest):
    listener = Listener(machine, **rest)
    return listener, run(machine, mmu_interval_notifier_insert(machine, mm, start, end, listener))


def test_nothing_is_raised_before_anybody_subscribes(machine, process):
    a = process.mmap(4)
    trace = machine.record()
    process.mprotect(a, "r")
    assert not any("notifier" in event.step.function for event in trace.events)


def test_the_number_is_odd_only_while_a_hit_runs(machine, process):
    mm = process.mm
    listener, subscription = subscribe(machine, mm, 10, 20)
    assert (machine["mm.invalidate_seq"][mm], machine["interval.seq"][subscription]) == (2, 1)
    seq = run(machine, mmu_interval_read_begin(machine, subscription))
    miss, hit = change(mm, 20, 30), change(mm, 19, 21)
    run(machine, invalidate_range_start(machine, miss))
    run(machine, invalidate_range_end(machine, miss))
    assert listener.heard == [] and machine["mm.invalidate_seq"][mm] == 2
    run(machine, invalidate_range_start(machine, hit))
    assert machine["mm.invalidate_seq"][mm] == 3
    assert listener.heard == [(Event.CLEAR, 19, 21, 3)]
    assert mmu_interval_read_retry(machine, subscription, seq)
    run(machine, invalidate_range_end(machine, hit))
    assert machine["mm.invalidate_seq"][mm] == 4


def test_overlapping_invalidations_share_one_odd_number(machine, process):
    mm = process.mm
    listener, _ = subscribe(machine, mm, 0, 100)
    one, two = change(mm, 1, 2), change(mm, 3, 4)
    run(machine, invalidate_range_start(machine, one))
    run(machine, invalidate_range_start(machine, two))
    run(machine, invalidate_range_end(machine, one))
    assert machine["mm.invalidate_seq"][mm] == 3
    run(machine, invalidate_range_end(machine, two))
    assert machine["mm.invalidate_seq"][mm] == 4
    assert [seq for *_, seq in listener.heard] == [3, 3]


def test_a_series_counts_as_if_one_at_a_time(machine, process):
    mm = process.mm
    listener, subscription = subscribe(machine, mm, 5, 8)
    import numpy as np

    series = MmuNotifierRange.each(mm, Event.CLEAR, np.arange(4, 10))
    run(machine, invalidate_range_start(machine, series))
    run(machine, invalidate_range_end(machine, series))
    assert listener.heard == [(Event.CLEAR, v, v + 1, s) for v, s in ((5, 3), (6, 5), (7, 7))]
    assert machine["mm.invalidate_seq"][mm] == 8
    assert machine["interval.seq"][subscription] == 7


def test_read_begin_waits_for_the_hit_to_end(machine, process):
    mm = process.mm
    _, subscription = subscribe(machine, mm, 0, 10)
    hit = change(mm, 1, 2)
    run(machine, invalidate_range_start(machine, hit))
    waiting = iter(
        Steps(machine, "wait", Actor("a"), mmu_interval_read_begin(machine, subscription))
    )
    assert next(waiting).lock
    run(machine, invalidate_range_end(machine, hit))
    assert not next(waiting).lock


def test_a_subscription_made_or_ended_while_a_hit_runs_is_deferred(machine, process):
    mm = process.mm
    _, first = subscribe(machine, mm, 0, 10)
    hit = change(mm, 1, 2)
    run(machine, invalidate_range_start(machine, hit))
    late, second = subscribe(machine, mm, 0, 10)
    assert machine["interval.deferred"][second] == 1
    removal = Steps(machine, "remove", Actor("a"), mmu_interval_notifier_remove(machine, first))
    assert next(removal).lock and machine["interval.mm"][first] == mm
    run(machine, invalidate_range_end(machine, hit))
    assert machine["interval.mm"][first] == 0 and machine["interval.deferred"][second] == 0
    assert late.heard == []
    list(removal)


def test_who_cannot_sleep_refuses_a_range_that_is_not_blockable(machine, process):
    mm = process.mm
    subscribe(machine, mm, 0, 10, willing=False)
    with pytest.raises(KernelError, match="EAGAIN"):
        run(machine, invalidate_range_start(machine, change(mm, 1, 2, blockable=False)))
    assert machine["mm.active_invalidations"][mm] == 0
    assert machine["mm.invalidate_seq"][mm] % 2 == 0


def test_classic_notifiers_hear_starts_and_ends(machine, process):
    mm = process.mm
    listener = Listener(machine)
    run(machine, mmu_notifier_register(machine, mm, listener))
    a = process.mmap(4)
    process.store(a, 1)
    process.munmap(a[:2])
    assert listener.heard == [("start", a.start), ("end", a.start)]


def test_an_empty_interval_is_refused(machine, process):
    with pytest.raises(KernelError, match="EOVERFLOW"):
        subscribe(machine, process.mm, 5, 5)


class Classic(Listener):
    """A classic notifier that may refuse, and may have an end."""

    def __init__(self, machine, answer=0):
        super().__init__(machine)
        self.answer = answer

    def invalidate_range_start(self, range):
        super().invalidate_range_start(range)
        return self.answer


def test_a_classic_notifier_may_refuse_and_all_that_started_hear_an_end(machine, process):
    mm = process.mm
    willing, refusing = Classic(machine), Classic(machine, answer=-11)
    refusing.invalidate_range_end = None  # who may refuse has no end
    for listener in (refusing, willing):
        run(machine, mmu_notifier_register(machine, mm, listener))
    with pytest.raises(KernelError, match="EAGAIN"):
        run(machine, invalidate_range_start(machine, change(mm, 3, 5, blockable=False)))
    assert refusing.heard == [("start", 3)]
    assert willing.heard == [("start", 3), ("end", 3)]
    run(machine, invalidate_range_start(machine, change(mm, 6, 7)))  # it may sleep: no refusal
    assert willing.heard[2:] == [("start", 6)]


def test_before_5_12_nobody_heard_an_end_after_a_refusal(machine, process):
    willing, refusing = Classic(machine), Classic(machine, answer=-11)
    willing.unpaired = True
    for listener in (willing, refusing):
        run(machine, mmu_notifier_register(machine, process.mm, listener))
    with pytest.raises(KernelError, match="EAGAIN"):
        run(machine, invalidate_range_start(machine, change(process.mm, 3, 5, blockable=False)))
    assert willing.heard == [("start", 3)]


def test_intervals_are_asked_first_and_their_refusal_is_the_last_word(machine, process):
    classic = Classic(machine)
    run(machine, mmu_notifier_register(machine, process.mm, classic))
    subscribe(machine, process.mm, 0, 8, willing=False)
    with pytest.raises(KernelError, match="EAGAIN"):
        run(machine, invalidate_range_start(machine, change(process.mm, 3, 5, blockable=False)))
    assert classic.heard == [] and not machine["mm.active_invalidations"][process.mm]


def test_a_refusing_classic_notifier_leaves_the_intervals_waiting(machine, process):
    """The kernel has no end for them: only a process that dies comes here."""
    _, subscription = subscribe(machine, process.mm, 0, 8)
    run(machine, mmu_notifier_register(machine, process.mm, Classic(machine, answer=-11)))
    with pytest.raises(KernelError, match="EAGAIN"):
        run(machine, invalidate_range_start(machine, change(process.mm, 3, 5, blockable=False)))
    assert machine["mm.active_invalidations"][process.mm] == 1
    begin = Steps(machine, "begin", Actor("x"), mmu_interval_read_begin(machine, subscription))
    assert next(begin).lock == "invalidate_seq"


@pytest.mark.parametrize("which", ["removed", "never made", "0", "negative"])
def test_nobody_looks_under_a_subscription_that_is_not_there(machine, process, which):
    _, subscription = subscribe(machine, process.mm, 0, 8)
    run(machine, mmu_interval_notifier_remove(machine, subscription))
    number = {"removed": subscription, "never made": 10**6, "0": 0, "negative": -1}[which]
    with pytest.raises(ValueError, match=f"subscription {number} is not there"):
        run(machine, mmu_interval_read_begin(machine, number))
