"""Orders of turns: one of them, back, and all of them held against a search that merges nothing."""

import warnings

import pytest

from hmmlab import Driver, Machine, Process
from hmmlab.exercises.turns import CheckThenLock, discard_and_read
from hmmlab.invariants.promise import broken_promise
from hmmlab.model.race import Race

#: Places for numbers: what two operations count up, and how many have done so.
VALUE, DONE = 40, 41


def count_up(locked: bool) -> Race:
    """Two operations that each add one to a value: read it, and write what was read plus one."""

    def add(machine, lock):
        if locked:
            yield from machine.down_write(lock)
        value = int(machine["page.content"][VALUE])
        yield machine.step("It has read.")
        machine.write("page.content", VALUE, value + 1)
        if locked:
            machine.up_write(lock)
        machine.add("page.content", DONE, 1)

    def build():
        process = Process(Machine(ram_pages=4096))
        machine, lock = process.machine, process.machine.new_lock("the lock")
        return {name: process.steps.run(name, add(machine, lock)) for name in "ab"}

    return Race(build)


def lost(state) -> str:
    value, done = state["page.content"][[VALUE, DONE]].tolist()
    return f"{value} after two" if done == 2 != value else ""


def test_a_lost_update_is_found_in_each_order_that_loses_it():
    found = count_up(locked=False).every_order(lost)
    # aabb and bbaa count to 2; abab, abba, baab and baba do not.
    assert (found.total, found.wrong, found.stuck, found.endless) == (6, 4, 0, False)
    assert (found.first, found.why) == ("abab", "1 after two")


def test_a_lock_leaves_the_orders_that_keep_all():
    found = count_up(locked=True).every_order(lost)
    # aabb, and abab, in which b waits: once it has, nothing happens until a goes on. And so for b.
    race = count_up(locked=True)
    assert (found.total, found.wrong, found.stuck) == one_by_one(race, lost)
    assert (found.wrong, found.stuck, found.endless) == (0, 0, False)


def reading(driver: type[Driver]) -> Race:
    """The CPU stores in two pages while a device reads four."""

    def build():
        process = Process(Machine(ram_pages=4096))
        pages = process.mmap(4)
        process.store(pages, 7)
        device = process.attach(driver)
        return {"CPU": process.steps.store(pages[:2], 9), "device": device.steps.read(pages)}

    return Race(build)


def one_by_one(race, judge, order="", bad=False) -> tuple[int, int, int]:
    """Count all orders, those that go wrong and those that get stuck, merging nothing."""
    run = race.run(order)
    bad = bad or bool(judge(run.machine))
    if not run.going:
        return 1, int(bad), 0
    counts = []
    for who in run.going:
        if run.take(who):
            counts.append(one_by_one(race, judge, order + who[0].lower(), bad))
            run = race.run(order)
    return tuple(map(sum, zip(*counts, strict=True))) if counts else (1, int(bad), 1)


@pytest.mark.parametrize("driver", [Driver, CheckThenLock])
def test_merging_states_loses_no_order(driver):
    race = reading(driver)
    found = race.every_order(broken_promise)
    assert (found.total, found.wrong, found.stuck) == one_by_one(race, broken_promise)
    assert found.total > 20 and not found.wrong and not found.endless


def test_the_first_wrong_order_goes_wrong_at_its_last_turn():
    careless = Race(discard_and_read(CheckThenLock))
    found = careless.every_order(broken_promise)
    assert 0 < found.wrong < found.total
    assert broken_promise(careless.run(found.first).machine) == found.why
    assert not broken_promise(careless.run(found.first[:-1]).machine)


def test_the_same_order_gives_the_same_run():
    careful = Race(discard_and_read(Driver))
    one, two = careful.run("ddcdcc"), careful.run("dd cdcc")
    assert one.order == two.order == "ddcdcc"
    assert [turn.step for turn in one.turns] == [turn.step for turn in two.turns]
    assert not one.machine.difference(two.machine)
    assert not one.trace.replay().seek(len(one.trace)).state.difference(one.machine)


def test_a_turn_of_one_that_waits_or_has_returned_is_none():
    run = Race(discard_and_read(Driver)).run("cd")
    assert run.take("device") and run.waiting == {"device": "invalidate_seq"}
    assert not run.take("device")
    assert run.order == "cdd"
    assert run.finish() and not run.going
    assert not any(run.take(name) for name in run.operations)


class NoUnlock(Driver):
    """A driver whose callback keeps the lock."""

    def invalidate(self, subscription, range, cur_seq):
        yield from self.machine.down_write(self.lock)
        return True


class Restless(Driver):
    """A driver that never finds its answer good enough."""

    def look(self, range):
        while True:
            yield self.machine.step("Once more.", range.mm, range.start, range.end)


def test_a_lock_that_is_kept_is_stuck_in_some_orders():
    found = Race(discard_and_read(NoUnlock)).every_order(broken_promise)
    assert 0 < found.stuck < found.total
    assert "device waits for the page-table lock of d0" in found.why
    run = Race(discard_and_read(NoUnlock)).run(found.first)
    assert not run.finish() and run.going == ["device"]


def test_an_order_that_comes_back_to_where_it_was_never_ends():
    found = Race(discard_and_read(Restless)).every_order(broken_promise)
    assert found.endless and not found.wrong
    assert not Race(discard_and_read(Restless)).run().finish()


def test_an_operation_that_is_refused_has_returned():
    def build():
        process = Process(Machine(ram_pages=4096))
        pages = process.mmap(2, "r")
        return {"CPU": process.steps.store(pages, 1), "load": process.steps.load(pages)}

    assert Race(build).run("cccc").going == ["load"]
    assert Race(build).every_order(broken_promise).wrong == 0


def test_what_cannot_race_is_refused():
    def build(*names):
        process = Process(Machine(ram_pages=4096))
        pages = process.mmap(2)
        return {name: process.steps.load(pages) for name in names}

    with pytest.raises(ValueError, match="2 operations on 1 machines, with first letters c;"):
        Race(lambda: build("CPU", "child"))
    with pytest.raises(ValueError, match="2 operations on 2 machines"):
        Race(lambda: {"a": build("x")["x"], "b": build("y")["y"]})
    with pytest.raises(ValueError, match="turn 'z'; expected one of c"):
        Race(lambda: build("CPU")).run("z")


def test_what_a_race_does_not_run_is_dropped_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Race(discard_and_read(Driver)).run("d")
