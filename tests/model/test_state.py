"""Columns: zero means absent, copies are of their own, and equality covers every row."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hmmlab.invariants import violations
from hmmlab.model.machine import Machine
from hmmlab.model.process import Process
from hmmlab.model.state import State

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


def test_columns_of_one_table_grow_together():
    columns = State({"page.a": np.int64, "page.b": np.uint8, "page": np.uint8, "pages": np.int8}, 4)
    columns.put("page.b", 50_000, 1)
    assert columns["page.a"][50_000] == 0 and columns["page.a"].size == columns["page.b"].size
    assert columns["page"].size == columns["pages"].size < 50_000
    assert columns.difference(State({n: c.dtype for n, c in columns.items()}, 4)).keys() == {
        "page.b"
    }


def test_a_machine_outlives_thousands_of_processes():
    process = Process(Machine(1024))
    region = process.mmap(2)
    process.store(region, 1)
    for _ in range(4200):  # a block of a column has 4096 rows
        process.fork().exit()
    trace = process.machine.record()
    child = process.fork()
    child.open(0).read(child.here(region))
    assert violations(process.machine) == []
    assert trace.replay().seek(len(trace)).state == process.machine.copy()


def test_a_process_has_thousands_of_mappings():
    process = Process(Machine(16384))
    for word in range(4200):
        process.store(process.mmap(1, kind="shared"), word)
    assert violations(process.machine) == []


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


@given(ROWS, ROWS)
def test_blank_rows_are_all_zero_and_alike_tells_what_stands_there(written, asked):
    columns, asked = state(), np.array(asked)
    columns.put("b", 50_000, 0)  # they may all be read
    columns.put("b", np.array(written), 7)
    values = columns["b"][asked]
    found = columns.alike("b", asked)
    assert np.broadcast_to(found, values.shape).tolist() == values.tolist()
    assert found.size == 1 or len(set(values.tolist())) > 1
    if columns.is_blank("b", asked):
        assert not values.any()
    elif asked.max() >> 12 != 50_000 >> 12:  # a write reaches from its first row to its last
        assert min(written) >> 12 <= asked.max() >> 12
        assert asked.min() >> 12 <= max(written) >> 12


def test_what_a_column_does_not_have_is_not_blank():
    columns = state()
    assert columns.is_blank("a", slice(0, 4096))
    assert not columns.is_blank("a", slice(4000, 5000))
    assert not columns.is_blank("a", slice(0, 0))
    assert columns.alike("a", slice(0, 0)).size == 0


def test_zeros_are_not_written_where_nothing_ever_was():
    written = []
    machine = Machine(1024)
    machine.attach(
        SimpleNamespace(wrote=lambda column, _, __, new: written.append((column, new.size)))
    )
    machine.write("page.private", slice(0, 900), 0)
    assert written == [] and machine.used("page.private") == 0
    machine.write("page.private", slice(5, 9), 3)
    machine.write("page.private", slice(0, 900), 0)
    machine.write("pte", slice(0, 20_000), 0)  # there is room for them afterwards
    assert written == [("page.private", 4), ("page.private", 900), ("pte", 20_000)]
    assert machine["pte"].size >= 20_000 and not machine["page.private"].any()
