"""Rows: slices and numbers say the same."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hmmlab.model.rows import are_unique, as_rows, first_and_last, row_numbers, unique_rows

NUMBERS = st.lists(st.integers(0, 9), max_size=40)


@given(st.one_of(NUMBERS, st.integers(0, 40).map(lambda n: [*range(3, n)][:: 1 if n % 2 else -1])))
def test_rows_are_the_same_as_a_slice_or_as_numbers(numbers):
    rows = as_rows(np.array(numbers, np.int64))
    assert row_numbers(rows).tolist() == numbers
    assert first_and_last(rows) == (min(numbers, default=0), max(numbers, default=-1))
    assert are_unique(row_numbers(rows)) == (len({*numbers}) == len(numbers))
    contiguous = len(numbers) > 0 and numbers in (
        [*range(numbers[0], numbers[-1] + 1)],
        [*range(numbers[0], numbers[-1] - 1, -1)],
    )
    assert isinstance(rows, slice) == (contiguous and (numbers[-1] > 0 or numbers[0] == 0))


def test_first_and_last():
    assert first_and_last(slice(3, 9)) == (3, 8)
    assert first_and_last(np.array([5, 2, 9])) == (2, 9)
    assert first_and_last(4) == (4, 4)
    assert first_and_last(np.zeros(0, np.int64)) == (0, -1)


@given(st.lists(st.integers(-5, 5)))
def test_unique_rows(rows):
    assert unique_rows(np.array(rows, np.int64)).tolist() == sorted(set(rows))
