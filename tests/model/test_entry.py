"""Bit layouts, held against words taken apart by hand and against round trips."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmlab.model import entry

PFNS = st.lists(st.integers(0, (1 << 34) - 1), min_size=1, max_size=20)
#: PRESENT USER ACCESSED NX, as a private anonymous page has them.
READ_ONLY = entry.PRESENT | entry.USER | entry.ACCESSED | entry.NX


def words(*values):
    return np.array(values, np.uint64)


def test_a_word_of_a_written_page():
    word = entry.present_word(np.array([0x12345]), READ_ONLY | entry.RW | entry.DIRTY)
    assert word.tolist() == [0x8000000012345067]
    assert entry.pfn_of(word).tolist() == [0x12345]


def test_the_frame_is_inverted_while_the_word_is_not_present():
    word = entry.present_word(np.array([0]), entry.PROTNONE | entry.ACCESSED)
    assert word.tolist() == [0x3FFFFFFFF120]
    assert entry.is_present(word).all() and not entry.is_swap_type(word).any()


def test_a_writable_device_private_entry():
    word = entry.swap_word(entry.SWP_DEVICE_WRITE, np.array([0]))
    assert word.tolist() == [(26 << 59) | (((1 << 50) - 1) << 9)]
    assert not entry.is_present(word).any()
    assert entry.is_swap_type(word).all() and entry.is_device_private(word).all()


@given(PFNS, st.sampled_from([READ_ONLY, READ_ONLY | entry.RW, entry.PROTNONE | entry.ACCESSED]))
def test_present_words_keep_their_frame(pfns, prot):
    word = entry.present_word(np.array(pfns), prot)
    assert entry.pfn_of(word).tolist() == pfns
    changed = entry.with_protection(word | np.uint64(entry.DIRTY), entry.PROTNONE)
    assert entry.pfn_of(changed).tolist() == pfns
    assert ((changed & entry.DIRTY) != 0).all() and ((changed & entry.RW) == 0).all()
    assert (entry.pfn_of(entry.with_protection(changed, READ_ONLY)) == pfns).all()


@given(PFNS, st.integers(23, 29), st.booleans(), st.booleans())
def test_swap_entries_keep_type_frame_and_age(pfns, kind, young, dirty):
    flags = young * entry.SWP_MIG_YOUNG + dirty * entry.SWP_MIG_DIRTY
    word = entry.swap_word(kind, np.array(pfns) + flags)
    assert (entry.swap_type(word) == kind).all()
    assert entry.swap_offset_pfn(word).tolist() == pfns
    assert ((entry.swap_offset(word) & entry.SWP_MIG_YOUNG) != 0).all() == young
    assert ((entry.swap_offset(word) & entry.SWP_MIG_DIRTY) != 0).all() == dirty
    assert entry.is_swap_type(word).all()


@given(PFNS)
def test_migrate_and_device_words_keep_their_frame(pfns):
    array = np.array(pfns)
    assert entry.migrate_pfn_to_pfn(entry.migrate_pfn(array)).tolist() == pfns
    flags = entry.DEVICE_VALID | entry.DEVICE_WRITE
    assert entry.device_pfn(entry.device_word(array, flags)).tolist() == pfns


@pytest.mark.parametrize(
    ("name", "bit"), [("HMM_PFN_VALID", 63), ("HMM_PFN_WRITE", 62), ("HMM_PFN_ERROR", 61)]
)
def test_hmm_pfn_bits_of_6_1(name, bit):
    assert getattr(entry, name) == 1 << bit
    assert entry.HMM_PFN_REQ_FAULT == entry.HMM_PFN_VALID
    assert entry.hmm_pfn_to_pfn(words((1 << bit) | (9 << 56) | 0x1234)).tolist() == [0x1234]
