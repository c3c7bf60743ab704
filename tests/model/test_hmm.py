"""hmm_range_fault: a range asks what its pages would ask one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmlab.model.entry import HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE
from hmmlab.model.hmm import HmmRange, hmm_range_fault
from hmmlab.model.machine import KernelError, Machine
from hmmlab.model.mmu_notifier import mmu_interval_read_begin
from hmmlab.model.process import Process

REQUESTS = [0, HMM_PFN_REQ_FAULT, HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE]
PAGES = 6


def looked(requests, prepare, batches):
    """The answers to ``requests``, asked in ``batches`` of so many pages; or the error."""
    process = Process(Machine(4096))
    where = process.mmap(PAGES)
    device = process.open(0)
    prepare(process, device, where)
    asked = np.array(requests, np.uint64)

    def ask(first, last):
        range = HmmRange(
            process.mm,
            device.subscription,
            0,
            where.start + first,
            where.start + last,
            asked[first:last],
            pfn_flags_mask=HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE,
            dev_private_owner=device.device,
        )
        range.notifier_seq = yield from mmu_interval_read_begin(process.machine, range.notifier)
        yield from hmm_range_fault(process.machine, range)

    try:
        for first in range(0, PAGES, batches):
            process.run("look", ask(first, first + batches))
    except KernelError as error:
        return error.errno
    return [hex(int(word) >> 61) for word in asked]


PREPARED = {
    "empty": lambda process, device, where: None,
    "written": lambda process, device, where: process.store(where, 1),
    "zero pages": lambda process, device, where: process.load(where),
    "on the device": lambda process, device, where: (process.store(where, 1), device.to_dev(where)),
    "some of each": lambda process, device, where: (
        process.store(where[0:4], 1),
        device.to_dev(where[2:4]),
        process.load(where[4]),
    ),
    "read-only": lambda process, device, where: (
        process.store(where, 1),
        process.mprotect(where, "r"),
    ),
}


@pytest.mark.parametrize("prepare", PREPARED.values(), ids=PREPARED.keys())
@given(requests=st.lists(st.sampled_from(REQUESTS), min_size=PAGES, max_size=PAGES))
def test_a_range_answers_as_its_pages_do(prepare, requests):
    """Only a fault of a whole chunk brings more pages than were asked for."""
    whole, single = (looked(requests, prepare, batches) for batches in (PAGES, 1))
    if isinstance(whole, int) or isinstance(single, int):
        assert whole == single
        return
    for asked, of_range, of_page in zip(requests, whole, single, strict=True):
        assert of_range == of_page or not asked & HMM_PFN_REQ_WRITE
        assert int(of_range, 16) >= int(of_page, 16)
