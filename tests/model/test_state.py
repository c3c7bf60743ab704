"""Columns: zero means absent, copies are of their own, and equality covers every row."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hmmlab.model.machine import Machine
from hmmlab.model.state import State, first_and_last, unique_rows

ROWS = st.lists(st.integers(0, 50_000), min_size=1, max_size=30, unique=True)


def state():
    return State({"a": np.int64, "b": np.uint8}, 64)


@given(ROWS)
def test_writing_grows_and_copies_are_equal_until_one_changes(rows):
    one = state()
    one.put("a", np.array(rows), np.arange(1, len(rows) + 1))
    two = one.copy()
    assert one == two
    assert two["a"][rows].tolist() == list(range(1, len(rows) + 1))
    two.put("a", rows[0], -5)
    assert one != two and one.difference(two) == {"a": np.array([rows[0]])}
    two.put("a", rows[0], 1)
    assert one == two


@given(ROWS)
def test_writing_zeros_is_no_difference(rows):
    one, two = state(), state()
    two.put("b", np.array(rows), 7)
    assert one != two
    two.put("b", np.array(rows), 0)
    assert one == two


def test_first_and_last():
    assert first_and_last(slice(3, 9)) == (3, 8)
    assert first_and_last(np.array([5, 2, 9])) == (2, 9)
    assert first_and_last(4) == (4, 4)
    assert first_and_last(np.zeros(0, np.int64)) == (0, -1)


@given(st.lists(st.integers(-5, 5)))
def test_unique_rows(rows):
    assert unique_rows(np.array(rows, np.int64)).tolist() == sorted(set(rows))


def test_add_counts_rows_that_repeat_and_is_recorded():
    machine = Machine(1024)
    trace = machine.record()
    machine.tell("began", 1, "test", "nobody")
    rows = np.array([7, 9, 7, 7])
    machine.add("page.refcount", rows, 2)
    machine.tell("stepped", 1, machine.step("added"))
    machine.tell("ended", 1, None)
    assert machine["page.refcount"][[7, 9]].tolist() == [6, 2]
    replay = trace.replay()
    assert replay.state["page.refcount"][[7, 9]].tolist() == [0, 0]
    assert replay.seek(1).state == machine.copy()
    assert replay.seek(0).state == trace.base


def test_a_small_machine_is_small():
    assert Machine().nbytes < 2 << 20
