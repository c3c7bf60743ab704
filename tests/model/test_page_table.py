"""Tables in pools: a walk agrees with going down the levels, and tables come and go as needed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hmmlab.model.geometry import PMD_PAGES, PUD_PAGES, USER_VPN_END
from hmmlab.model.machine import Machine
from hmmlab.model.page_table import (
    alloc_tables,
    free_pgtables,
    new_root,
    populated_pmds,
    read_range,
    rows_of,
    walk,
    word_row,
)

STARTS = st.lists(st.integers(0, 4 * PUD_PAGES), min_size=1, max_size=12, unique=True)


@given(STARTS, st.integers(1, 3 * PMD_PAGES))
def test_walk_agrees_with_the_levels(pages, length):
    machine = Machine(64)
    root = new_root(machine)
    for page in pages:
        alloc_tables(machine, root, page, page + 1)
        machine.write("pte", word_row(machine, root, page), page + 1)
    start = min(pages)
    stop = start + length
    runs = list(walk(machine, root, start, stop))
    assert [run.start for run in runs] == [start, *(run.stop for run in runs[:-1])]
    assert runs[-1].stop == stop
    for run in runs:
        for page in {run.start, run.stop - 1}:
            expected = word_row(machine, root, page)
            assert expected == (run.row + page - run.start if run.row >= 0 else -1)
    words = read_range(machine, root, start, stop)
    expected = [page + 1 if page in set(pages) else 0 for page in range(start, stop)]
    assert words.tolist() == expected
    ordered = np.array(sorted(pages))
    rows = np.arange(machine["pte"].size)[rows_of(machine, root, ordered)]
    assert machine["pte"][rows].tolist() == (ordered + 1).tolist()


def test_tables_are_freed_only_when_no_neighbour_needs_them():
    machine = Machine(64)
    root = new_root(machine)
    alloc_tables(machine, root, 0, 2 * PMD_PAGES)
    free_pgtables(machine, root, 100, 2 * PMD_PAGES, 50, 4 * PUD_PAGES)
    assert populated_pmds(machine, root, 0, PUD_PAGES) == [(0, PUD_PAGES)]
    assert word_row(machine, root, PMD_PAGES) == -1
    free_pgtables(machine, root, 0, 100, 0, USER_VPN_END)
    assert populated_pmds(machine, root, 0, PUD_PAGES) == []
    assert machine["table.free"].tolist()[:4] == [0, 1, 1, 2]


def test_populated_pmds_of_the_worked_example():
    """Pages only in the second GiB, the first of them 6 MiB and 5 pages into it."""
    machine = Machine(64)
    root = new_root(machine)
    first = 2 * PUD_PAGES + 3 * PMD_PAGES
    alloc_tables(machine, root, first + 5, first + 6)
    found = populated_pmds(machine, root, PUD_PAGES, 4 * PUD_PAGES)
    assert found == [(first, 3 * PUD_PAGES)]
    assert populated_pmds(machine, root, first + 3, first + 7) == [(first + 3, first + 7)]
