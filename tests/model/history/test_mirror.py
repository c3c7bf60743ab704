"""Mirrors: seed 001 ("mm/hmm/mirror ... v2", 21 April 2017), and the kernels after it."""

import numpy as np
import pytest

from hmmlab.model.entry import is_present
from hmmlab.model.history import (
    Era,
    HmmMirror,
    HmmUpdateType,
    hmm_mirror_register,
    hmm_mirror_unregister,
    hmm_sequence,
    mirror_2017,
    mmu_notifier_invalidate_page,
)
from hmmlab.model.history.mirror_2017 import hmm_register
from hmmlab.model.history.mirror_2018 import HmmUpdate
from hmmlab.model.history.ranges import TrackedRange, is_valid, track
from hmmlab.model.history.struct_hmm import hmm_mm_destroy, hmm_of
from hmmlab.model.machine import KernelError
from hmmlab.model.mm_types import mm_lock, mm_root
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
    mmu_notifier_release,
)
from hmmlab.model.page_table import read_range

ERAS = [Era.APRIL_2017, Era.V4_14, Era.V4_17, Era.V4_20, Era.V5_2, Era.V5_3, Era.V5_4]
AT_THE_END = ERAS[:3]
AT_THE_START = ERAS[3:]


def change(process, start, end, **rest):
    return MmuNotifierRange.one(process.mm, Event.CLEAR, start, end, **rest)


def spans(listener):
    """The ranges that a listener heard of, in whatever form its kernel gives them."""
    found = []
    for update in listener.heard:
        if len(update) == 3:
            found.append(update[1:])
        elif isinstance(update[0], HmmUpdate):
            found.append((update[0].start, update[0].end))
        else:
            found.append((int(update[0].start[0]), int(update[0].end[-1])))
    return found


def tracked(machine, process, start, end):
    range = TrackedRange(start, end, np.full(end - start, 7, np.uint64))
    track(machine, hmm_of(machine, process.mm), range, valid=True)
    return range


# --- seed 001: registering ------------------------------------------------------------------------


def test_the_first_mirror_makes_the_struct_hmm_and_the_next_finds_it(machine, process, register):
    assert hmm_of(machine, process.mm) == 0
    register()
    first = hmm_of(machine, process.mm)
    assert first and machine["hmm.sequence"][first] == 0
    register()
    assert hmm_of(machine, process.mm) == first
    assert (machine["notifier.mm"] == process.mm).sum() == 1


def test_nothing_may_be_missing(machine, process, run):
    for mirror, mm in ((None, process.mm), (HmmMirror(None), process.mm), (HmmMirror(object()), 0)):
        assert run(hmm_mirror_register(machine, mirror, mm)) == -22
    assert hmm_of(machine, process.mm) == 0


def test_no_memory_for_a_struct_hmm(machine, process, run, use_up_ram):
    give_back = use_up_ram()
    assert run(hmm_mirror_register(machine, HmmMirror(object()), process.mm)) == -12
    give_back()
    assert run(hmm_mirror_register(machine, HmmMirror(object()), process.mm)) == 0


def test_enomem_stands_for_every_cause(machine, process, run, monkeypatch):
    def interrupted(*args):
        yield from ()
        raise KernelError(4, "a signal")

    monkeypatch.setattr(mirror_2017, "mmu_notifier_register", interrupted)
    assert run(hmm_mirror_register(machine, HmmMirror(object()), process.mm)) == -12
    assert hmm_of(machine, process.mm) == 0


def test_5_4_says_why_there_is_no_struct_hmm(machine, process, run, monkeypatch, use_up_ram):
    """It has ``mmu_notifier_get``, and passes its error on."""
    give_back = use_up_ram()
    register = hmm_mirror_register(machine, HmmMirror(object()), process.mm, Era.V5_4)
    assert run(register) == -12
    give_back()

    def interrupted(*args):
        yield from ()
        raise KernelError(4, "a signal")

    monkeypatch.setattr(mirror_2017, "mmu_notifier_register", interrupted)
    register = hmm_mirror_register(machine, HmmMirror(object()), process.mm, Era.V5_4)
    assert run(register) == -4


def test_the_mmap_lock_is_held_until_the_mirror_is_on_the_list(machine, process, register, steps):
    """In write mode, says seed 001 in capital letters."""
    register()
    lock = mm_lock(machine, process.mm)
    mirrors = int(machine["hmm.mirrors_lock"][hmm_of(machine, process.mm)])
    machine.write("lock.readers", mirrors, 1)  # a callback runs
    registering = steps(hmm_mirror_register(machine, HmmMirror(object()), process.mm))
    assert next(registering).lock == "the mirrors_sem"
    assert machine.holders(lock) == (True, 0)
    machine.write("lock.readers", mirrors, 0)
    assert registering.run() == 0 and machine.holders(lock) == (False, 0)


@pytest.mark.parametrize("era", ERAS, ids=lambda era: era.label)
def test_until_4_19_a_change_before_the_struct_hmm_is_published_is_a_bug(
    machine, process, steps, run, era
):
    """The notifier comes first, and its callbacks want mm->hmm: VM_BUG_ON(!hmm)."""
    next(steps(hmm_register(machine, process.mm, era)))
    start = invalidate_range_start(machine, change(process, 1, 2))
    if era < Era.V4_20:
        with pytest.raises(ValueError, match="no struct hmm: a BUG"):
            run(start)
    else:
        run(start)


@pytest.mark.parametrize("era", ERAS[1:], ids=lambda era: era.label)
def test_4_17_takes_mm_hmm_away_before_the_notifier(machine, process, register, steps, run, era):
    """ "fix race between hmm_mirror_unregister() and mmu_notifier callback", in 4.20."""
    mirror, _ = register(era)
    going = steps(hmm_mirror_unregister(machine, mirror))
    bugs = 0
    for _ in going:
        try:
            run(invalidate_range_start(machine, change(process, 1, 2)))
            run(invalidate_range_end(machine, change(process, 1, 2)))
        except ValueError:
            bugs += 1
    assert bool(bugs) is (era is Era.V4_17)


@pytest.mark.parametrize("era", [Era.V4_20, Era.V5_2], ids=lambda era: era.label)
def test_from_4_20_to_5_2_it_is_published_first(machine, process, steps, run, monkeypatch, era):
    one = steps(hmm_register(machine, process.mm, era))
    next(one)
    hmm = hmm_of(machine, process.mm)
    assert hmm and run(hmm_register(machine, process.mm, era)) == hmm  # so there is no race
    assert one.run() == hmm and (machine["notifier.mm"] == process.mm).sum() == 1


@pytest.mark.parametrize("era", ERAS, ids=lambda era: era.label)
def test_no_notifier_no_struct_hmm(machine, process, run, monkeypatch, era):
    def interrupted(*args):
        yield from ()
        raise KernelError(4, "a signal")

    monkeypatch.setattr(mirror_2017, "mmu_notifier_register", interrupted)
    mirror = HmmMirror(object())
    answer = run(hmm_mirror_register(machine, mirror, process.mm, era))
    assert answer == (-4 if era is Era.V5_4 else -12) and mirror.row == 0
    assert hmm_of(machine, process.mm) == 0 and not machine["hmm.era"].any()


def test_while_two_register_the_winner_hears_all_twice(machine, process, steps, register, run):
    """Both notifiers are registered, and the callbacks of both take mm->hmm for their own."""
    one, two = (steps(hmm_register(machine, process.mm), name) for name in ("one", "two"))
    next(one), next(two)
    one.run()
    _, listener = register()
    run(invalidate_range_start(machine, change(process, 1, 2)))
    run(invalidate_range_end(machine, change(process, 1, 2)))
    assert hmm_sequence(machine, process.mm) == 2 and spans(listener) == [(1, 2)] * 2
    two.run()


def test_who_loses_the_race_returns_the_winners_struct_hmm(machine, process, steps):
    one, two = (steps(hmm_register(machine, process.mm), name) for name in ("one", "two"))
    next(one), next(two)  # both have registered a notifier, and published nothing
    assert (machine["notifier.mm"] == process.mm).sum() == 2
    winner, loser = one.run(), two.run()
    assert winner == loser == hmm_of(machine, process.mm)
    assert (machine["notifier.mm"] == process.mm).sum() == 1


def test_the_newest_mirror_is_called_first(machine, process, register, run):
    order = []
    for name in ("older", "newer"):
        _, listener = register()
        listener.sync_cpu_device_pagetables = lambda *_, name=name: order.append(name)
    run(invalidate_range_start(machine, change(process, 1, 2)))
    run(invalidate_range_end(machine, change(process, 1, 2)))
    assert order == ["newer", "older"]


def test_unregistering_only_takes_the_mirror_off_the_list(machine, process, register, run):
    mirror, listener = register()
    run(hmm_mirror_unregister(machine, mirror))
    process.store(process.mmap(2), 1)
    a = process.mmap(2)
    process.munmap(a)
    assert listener.heard == []
    assert hmm_of(machine, process.mm) and hmm_sequence(machine, process.mm) == 1


# --- seed 001: what happens at a change -----------------------------------------------------------


def test_a_start_counts_and_the_end_calls(machine, process, register, run):
    _, listener = register()
    run(invalidate_range_start(machine, change(process, 3, 5)))
    assert (hmm_sequence(machine, process.mm), listener.heard) == (1, [])
    run(invalidate_range_end(machine, change(process, 3, 5)))
    assert hmm_sequence(machine, process.mm) == 1
    assert listener.heard == [(HmmUpdateType.HMM_UPDATE_INVALIDATE, 3, 5)]


def test_the_only_update_type_is_0():
    assert {kind.name: kind.value for kind in HmmUpdateType} == {"HMM_UPDATE_INVALIDATE": 0}


def test_invalidate_page_counts_and_calls_at_once_for_one_page(machine, process, register, run):
    _, listener = register()
    run(mmu_notifier_invalidate_page(machine, process.mm, 9))
    assert hmm_sequence(machine, process.mm) == 1
    assert listener.heard == [(HmmUpdateType.HMM_UPDATE_INVALIDATE, 9, 10)]


@pytest.mark.parametrize("era", [Era.APRIL_2017, Era.V4_14], ids=lambda era: era.label)
def test_reclaim_told_of_single_pages_in_april_2017(machine, process, register, era):
    """``invalidate_page``: no start and no end, and the word has changed when it is called."""
    _, listener = register(era)
    a = process.mmap(2)
    process.store(a, 5)
    root, there = mm_root(machine, process.mm), []
    heard = listener.sync_cpu_device_pagetables

    def look(mirror, *update):
        there.append(is_present(read_range(machine, root, *update[1:])).any())
        return heard(mirror, *update)

    listener.sync_cpu_device_pagetables = look
    trace = machine.record()
    process.madvise(a, "pageout")
    called = {step.function for step in (event.step for event in trace.events)}
    assert ("hmm_invalidate_page" in called) is (era is Era.APRIL_2017)
    assert ("hmm_invalidate_range_start" in called) is (era is Era.V4_14)
    assert spans(listener) == [(page.start, page.stop) for page in a] and there == [False, False]
    assert hmm_sequence(machine, process.mm) == 2


def test_the_merged_hmm_does_not_hear_of_single_pages(machine, process, register, run):
    _, listener = register(Era.V4_14)
    run(mmu_notifier_invalidate_page(machine, process.mm, 9))
    assert hmm_sequence(machine, process.mm) == 0 and listener.heard == []


def test_mirrors_are_read_locked_while_they_are_called(machine, process, register, run):
    _, listener = register()
    lock = int(machine["hmm.mirrors_lock"][hmm_of(machine, process.mm)])
    held = []
    listener.sync_cpu_device_pagetables = lambda *_: held.append(machine.holders(lock))
    run(invalidate_range_end(machine, change(process, 1, 2)))
    assert held == [(False, 1)] and machine.holders(lock) == (False, 0)


def test_hole_2017_the_device_still_maps_a_page_when_it_is_gone(machine, process, register):
    """Callbacks only at range_end: between the change and the end the mirror knows nothing."""
    _, listener = register()
    a = process.mmap(1)
    process.store(a, 5)
    munmap = process.steps.munmap(a)
    next(step for step in munmap if step.function == "unmap_page_range")
    rows = slice(2, machine.ram_pages)
    assert not machine["page.mapcount"][rows].any()  # nobody maps the frame any more
    assert machine["page.refcount"][rows].sum() == 1  # it is freed after the end, with the TLB
    assert listener.heard == []
    munmap.run()
    assert spans(listener) == [(a.start, a.stop)]


# --- the later kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize("era", ERAS, ids=lambda era: era.label)
def test_a_callback_is_a_synchronous_call(machine, process, register, era):
    """Seed 001: it returns when the device's page table is updated and its TLBs are flushed."""
    order = []
    for name in ("older", "newer"):

        def slow(*_, name=name):
            for part in ("begins", "ends"):
                order.append(f"{name} {part}")
                yield machine.step("It flushes a TLB of the device.")
            return 0

        register(era)[1].sync_cpu_device_pagetables = slow
    a = process.mmap(1)
    process.store(a, 5)
    munmap = process.steps.munmap(a)
    next(step for step in munmap if step.text.startswith("It flushes"))
    word = read_range(machine, mm_root(machine, process.mm), a.start, a.stop)
    assert order == ["newer begins"]
    assert bool(is_present(word).all()) is (era in AT_THE_START)
    munmap.run()
    assert order == ["newer begins", "newer ends", "older begins", "older ends"]


@pytest.mark.parametrize("era", ERAS, ids=lambda era: era.label)
def test_when_each_kernel_calls(machine, process, register, run, era):
    _, listener = register(era)
    run(invalidate_range_start(machine, change(process, 3, 5)))
    early = len(listener.heard)
    run(invalidate_range_end(machine, change(process, 3, 5)))
    assert (early, len(listener.heard)) == ((0, 1) if era in AT_THE_END else (1, 1))
    assert spans(listener) == [(3, 5)]
    assert hmm_sequence(machine, process.mm) == (era in AT_THE_END)


def test_4_20_passes_a_struct_hmm_update(machine, process, register, run):
    _, listener = register(Era.V4_20)
    run(invalidate_range_start(machine, change(process, 3, 5, blockable=False)))
    assert listener.heard == [(HmmUpdate(3, 5, HmmUpdateType.HMM_UPDATE_INVALIDATE, False),)]


def test_5_4_passes_the_notifiers_range(machine, process, register, run):
    _, listener = register(Era.V5_4)
    range = change(process, 3, 5)
    run(invalidate_range_start(machine, range))
    assert listener.heard[0][0].event is Event.CLEAR and listener.heard[0][0].start == [3]


@pytest.mark.parametrize("era", AT_THE_START, ids=lambda era: era.label)
def test_a_mirror_may_refuse_a_change_that_may_not_sleep(machine, process, register, run, era):
    """In 5.2 that gets lost ("mm/hmm: Fix error flows in hmm_invalidate_range_start")."""
    _, older = register(era, answer=-11)
    _, newer = register(era, answer=-11)
    hmm = machine.objects["hmm"][hmm_of(machine, process.mm)]
    assert run(hmm.invalidate_range_start(change(process, 3, 5))) == 0
    assert (len(newer.heard), len(older.heard)) == (1, 1)
    answer = run(hmm.invalidate_range_start(change(process, 3, 5, blockable=False)))
    assert answer == (0 if era is Era.V5_2 else -11)
    assert (len(newer.heard), len(older.heard)) == (2, 1)  # the others are not asked any more


def test_until_4_19_an_answer_means_nothing(machine, process, register, run):
    register(Era.V4_17, answer=-11)
    hmm = machine.objects["hmm"][hmm_of(machine, process.mm)]
    assert run(hmm.invalidate_range_start(change(process, 3, 5, blockable=False))) == 0


@pytest.mark.parametrize("era", AT_THE_START, ids=lambda era: era.label)
def test_a_change_that_may_not_sleep_does_not_wait_for_the_list(
    machine, process, register, run, era
):
    """Since 5.2, that is; 4.20 sleeps all the same."""
    _, listener = register(era)
    hmm = machine.objects["hmm"][hmm_of(machine, process.mm)]
    run(machine.down_write(int(machine["hmm.mirrors_lock"][hmm.row])))  # somebody registers
    start = hmm.invalidate_range_start(change(process, 3, 5, blockable=False))
    if era is Era.V4_20:
        with pytest.raises(RuntimeError, match="the mirrors_sem"):
            run(start)
    else:
        assert run(start) == -11
    assert listener.heard == []


@pytest.mark.parametrize("era, left", [(Era.V5_2, 1), (Era.V5_3, 0), (Era.V5_4, 0)])
def test_5_2_forgets_to_count_a_refused_change_back(machine, process, register, run, era, left):
    """So no range is ever valid again ("mm/hmm: Fix error flows ...")."""
    register(era)
    hmm = machine.objects["hmm"][hmm_of(machine, process.mm)]
    lock = int(machine["hmm.mirrors_lock"][hmm.row])
    run(machine.down_write(lock))
    with pytest.raises(KernelError, match="EAGAIN"):
        run(invalidate_range_start(machine, change(process, 3, 5, blockable=False)))
    machine.up_write(lock)
    assert machine["hmm.notifiers"][hmm.row] == left


@pytest.mark.parametrize("era", [Era.V5_2, Era.V5_3, Era.V5_4])
def test_a_refusal_that_is_lost_is_counted_as_any_change(machine, process, register, run, era):
    register(era, answer=-11)
    hmm = hmm_of(machine, process.mm)
    refused = change(process, 3, 5, blockable=False)
    if era is Era.V5_2:
        run(invalidate_range_start(machine, refused))
        assert machine["hmm.notifiers"][hmm] == 1
        run(invalidate_range_end(machine, refused))
    else:
        with pytest.raises(KernelError, match="EAGAIN"):
            run(invalidate_range_start(machine, refused))
    assert machine["hmm.notifiers"][hmm] == 0


@pytest.mark.parametrize("era", ERAS[1:], ids=lambda era: era.label)
@pytest.mark.parametrize(
    "start, end, touched",
    [(10, 14, True), (12, 13, True), (8, 10, True), (8, 9, False), (14, 15, False)],
)
def test_a_change_that_ends_where_a_range_begins_touches_it(
    machine, process, register, run, era, start, end, touched
):
    register(era)
    range = tracked(machine, process, 10, 14)
    run(invalidate_range_start(machine, change(process, start, end)))
    if era in AT_THE_END:
        assert is_valid(machine, range)
        run(invalidate_range_end(machine, change(process, start, end)))
    assert is_valid(machine, range) is not touched


def test_the_changed_pfns_are_emptied_until_5_1_and_stay_from_5_2_on(
    machine, process, register, run
):
    register(Era.V4_20)
    range = tracked(machine, process, 10, 14)
    run(invalidate_range_start(machine, change(process, 12, 20)))
    assert range.pfns.tolist() == [7, 7, 0, 0]


def test_4_20_marks_again_at_the_end_who_looked_meanwhile(machine, process, register, run):
    register(Era.V4_20)
    run(invalidate_range_start(machine, change(process, 10, 11)))
    range = tracked(machine, process, 10, 14)
    run(invalidate_range_end(machine, change(process, 10, 11)))
    assert not is_valid(machine, range) and range.pfns.tolist() == [0, 7, 7, 7]


@pytest.mark.parametrize("era", [Era.V5_2, Era.V5_4])
def test_5_2_every_range_is_valid_again_after_the_last_change(machine, process, register, run, era):
    """The hole: a completed change of this very range leaves no trace."""
    register(era)
    range = tracked(machine, process, 10, 14)
    one, two = change(process, 10, 11), change(process, 50, 51)
    for start in (one, two):
        run(invalidate_range_start(machine, start))
    run(invalidate_range_end(machine, one))
    assert not is_valid(machine, range)
    run(invalidate_range_end(machine, two))
    assert is_valid(machine, range) and range.pfns.tolist() == [7, 7, 7, 7]


def test_4_17_the_last_mirror_takes_the_struct_hmm_along(machine, process, register, run):
    mirror, _ = register(Era.V4_17)
    run(hmm_mirror_unregister(machine, mirror))
    assert hmm_of(machine, process.mm) == 0
    assert not (machine["notifier.mm"] == process.mm).any()
    run(hmm_mirror_unregister(machine, mirror))  # a second time: nothing
    register(Era.V4_20)


def test_4_17_a_mirror_that_goes_empties_hmm_mm_under_the_others(machine, process, register, run):
    one, _ = register(Era.V4_17)
    two, listener = register(Era.V4_17)
    run(hmm_mirror_unregister(machine, one))
    with pytest.raises(RuntimeError, match="an empty hmm->mm"):  # it tries again without end
        run(hmm_mirror_register(machine, HmmMirror(object()), process.mm, Era.V4_17))
    run(hmm_mirror_unregister(machine, two))
    assert hmm_of(machine, process.mm)  # nobody frees it any more
    assert listener.heard == []


def test_5_2_counts_its_mirrors_instead(machine, process, register, run):
    one, _ = register(Era.V5_2)
    two, _ = register(Era.V5_2)
    run(hmm_mirror_unregister(machine, one))
    register(Era.V5_2)
    assert not machine["hmm.forgot_mm"].any()
    assert two.row


@pytest.mark.parametrize(
    "era, called, listed",
    [(Era.V4_14, 0, 1), (Era.V4_17, 2, 0), (Era.V5_2, 2, 0), (Era.V5_3, 2, 2), (Era.V5_4, 2, 2)],
    ids=str,
)
def test_who_hears_of_the_end_of_the_address_space(
    machine, process, register, run, era, called, listed
):
    heard, listed_then = [], []
    for _ in range(2):
        mirror, listener = register(era)

        def release(mirror):
            heard.append(mirror)
            listed_then.append(mirror.row != 0)

        listener.release = release
    hmm = hmm_of(machine, process.mm)
    run(machine.objects["hmm"][hmm].release(process.mm))
    assert len(heard) == called
    assert heard[:1] == ([mirror] if called else [])  # the newest first
    assert sum(listed_then) == (listed if called else 0)
    assert machine["hmm.dead"][hmm] == (era is Era.V5_2)


@pytest.mark.parametrize("era", ERAS[2:], ids=lambda era: era.label)
def test_a_mirror_that_goes_when_it_hears_of_the_end(machine, process, register, run, era):
    """Since 5.3 it may not: the list is locked for reading."""
    mirror, listener = register(era)
    listener.release = lambda mirror: hmm_mirror_unregister(machine, mirror)
    hmm = machine.objects["hmm"][hmm_of(machine, process.mm)]
    if era < Era.V5_3:
        run(hmm.release(process.mm))
        assert mirror.row == 0
    else:
        with pytest.raises(RuntimeError, match="the mirrors_sem"):  # it waits for itself
            run(hmm.release(process.mm))


@pytest.mark.parametrize("era, called", [(Era.V4_17, 1), (Era.V5_2, 1), (Era.V5_3, 2)])
def test_who_is_off_the_list_in_time_is_not_called(machine, process, register, run, era, called):
    """Until 5.2 the list is asked for its first entry again and again."""
    heard = []
    (older, _), (newer, listener) = register(era), register(era)

    def release(mirror):
        heard.append(mirror)
        if era < Era.V5_3:
            yield from hmm_mirror_unregister(machine, older)

    listener.release = release
    older.ops.release = heard.append
    run(machine.objects["hmm"][hmm_of(machine, process.mm)].release(process.mm))
    assert heard == [newer, older][:called]


@pytest.mark.parametrize("era", ERAS, ids=lambda era: era.label)
def test_an_address_space_that_ends_takes_its_struct_hmm_along(
    machine, process, register, run, era
):
    _, listener = register(era)
    released = []
    listener.release = released.append
    run(mmu_notifier_release(machine, process.mm))
    assert len(released) == (era >= Era.V4_17) and listener.heard == []
    register(era)  # one that has the same number has nothing of it
    assert hmm_sequence(machine, process.mm) == 0
    assert not machine["hmm.dead"][hmm_of(machine, process.mm)]


def test_the_struct_hmm_goes_with_the_address_space(machine, process, register):
    register()
    hmm_mm_destroy(machine, process.mm)
    assert hmm_of(machine, process.mm) == 0 and not machine["notifier.mm"].any()


def test_one_address_space_is_of_one_kernel(machine, process, register, run):
    register(Era.V4_14)
    with pytest.raises(ValueError, match=r"4\.14, not 5\.2"):
        run(hmm_mirror_register(machine, HmmMirror(object()), process.mm, Era.V5_2))
    with pytest.raises(ValueError, match=r"6\.1 has no struct hmm"):
        run(hmm_mirror_register(machine, HmmMirror(object()), process.mm, Era.V6_1))
