"""Frames and where they are: the search for free physical space."""

import pytest

from hmmlab.model.geometry import PAGE_SIZE, SECTION_PAGES
from hmmlab.model.history.devmem_2017 import hmm_devmem_add
from hmmlab.model.memremap import free_mem_region
from hmmlab.model.page import PHYSICAL_PAGES


@pytest.mark.parametrize(("sections", "below_the_top"), [(1, 9), (2, 10), (3, 12), (5, 15)])
def test_a_free_region_is_searched_in_steps_of_its_size(machine, process, sections, below_the_top):
    """From the top down, past the four chunks of two sections: get_free_mem_region of 6.1."""
    first = free_mem_region(machine, sections * SECTION_PAGES)
    assert first == PHYSICAL_PAGES - below_the_top * SECTION_PAGES
    adding = hmm_devmem_add(machine, None, "card", sections * SECTION_PAGES * PAGE_SIZE)
    assert process.run("hmm_devmem_add", adding).pfn_first == first, "as in 2017"
