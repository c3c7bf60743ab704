"""One for all: an array of shape (1,) that stands for n says what the n would."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmlab.model import entry
from hmmlab.model.alike import alike, all_of, any_of, how_many, part_of, rows_where, some
from hmmlab.model.geometry import PAGE_SHIFT

MASKS = st.integers(1, 6).flatmap(
    lambda size: st.one_of(
        st.lists(st.booleans(), min_size=size, max_size=size),
        st.booleans().map(lambda value: [value] * size),
    )
)


@given(MASKS)
def test_a_mask_and_its_stand_in_choose_the_same(listed):
    mask = np.array(listed)
    short, size = alike(mask), mask.size
    assert short.size == (1 if len(set(listed)) == 1 else size)
    assert any_of(short) == mask.any()
    assert all_of(short) == mask.all()
    assert how_many(short, size) == mask.sum()
    values = np.arange(size) * 10
    assert some(values, short).tolist() == values[mask].tolist()
    assert values[rows_where(short, size)].tolist() == values[mask].tolist()
    chosen = int(mask.sum())
    for first in range(chosen):
        part = part_of(rows_where(short, size), first, chosen)
        assert values[part].tolist() == values[mask][first:].tolist()


def test_a_value_for_all_stays_one_unless_none_is_chosen():
    one = np.array([7])
    assert some(one, np.array([False, True, True])).tolist() == [7]
    assert some(one, np.array([False, False])).size == 0


def test_what_stands_for_all_is_no_view():
    column = np.full(5, 3)
    short = alike(column)
    column[:] = 9
    assert short.tolist() == [3]


PFN = st.integers(1, 1 << 22)
PRESENT = st.builds(
    lambda pfn, prot: int(entry.present_word(pfn, prot)),
    PFN,
    st.sampled_from([0x27, 0x67, 0x25, 0x865, 1 << 63 | 0x867, 0x225, entry.PROTNONE | 0x60]),
)
SWAPPED = st.builds(
    lambda kind, pfn, soft: int(entry.swap_word(kind, np.array([pfn]))[0]) | soft,
    st.integers(0, entry.SWP_DEVICE_EXCLUSIVE_READ),
    PFN,
    st.sampled_from([0, entry.SWP_SOFT_DIRTY]),
)
FROZEN = st.builds(
    lambda prot, pfn, writable, exclusive: int(
        entry.migration_word(
            entry.present_word(np.array([pfn]), prot),
            np.array([pfn]),
            np.array([writable]),
            np.array([exclusive]),
        )[0]
    ),
    st.sampled_from([0x27, 0x67, 0x865, 0x847]),
    PFN,
    st.booleans(),
    st.booleans(),
)
WORDS = st.one_of(
    *(st.lists(kind, min_size=1, max_size=6) for kind in (PRESENT, SWAPPED, FROZEN, st.just(0))),
    st.lists(st.one_of(PRESENT, SWAPPED, FROZEN, st.just(0)), min_size=1, max_size=6),
)

QUESTIONS = [
    entry.is_present,
    entry.is_swap_type,
    entry.is_device_private,
    entry.is_device_exclusive,
    lambda words: entry.is_swap_type(words) & entry.is_migration(words),
    lambda words: entry.is_swap_type(words) & entry.is_swapped(words),
    lambda words: entry.is_present(words) & ((words & np.uint64(entry.RW)) != 0),
    lambda words: entry.is_present(words) & ((words & np.uint64(entry.SOFT_DIRTY)) != 0),
    lambda words: entry.is_swap_type(words) & ((words & np.uint64(entry.SWP_SOFT_DIRTY)) != 0),
    lambda words: words == 0,
    lambda words: np.where(entry.is_swap_type(words), entry.swap_type(words), -1),
    lambda words: np.where(
        entry.is_swap_type(words) & entry.is_migration(words), entry.migration_marks(words), 0
    ),
]


@given(WORDS)
def test_marks_tell_all_but_the_frame(listed):
    words = np.array(listed, np.uint64)
    marks, pfns = entry.marks_and_pfns(words)
    for question in QUESTIONS:
        expected = question(words)
        assert np.broadcast_to(question(marks), words.shape).tolist() == expected.tolist()
    one_by_one = [int(entry.marks_and_pfns(words[at : at + 1])[1][0]) for at in range(words.size)]
    assert pfns.tolist() == one_by_one


@pytest.mark.parametrize("marks", [0x27, 0x867])
def test_alike_but_for_their_frames_is_alike(marks):
    words = entry.present_word(np.array([5, 900, 17]), marks)
    assert entry.marks_of(words).tolist() == [marks]
    assert (words >> np.uint64(PAGE_SHIFT)).tolist() == [5, 900, 17]
