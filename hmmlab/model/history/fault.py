"""The page fault that a lookup of 2017 to 2019 makes on the device's behalf.

Those kernels gave the fault leave to drop the mmap_lock where it had to wait: always until 5.3,
whatever the caller's ``block`` said, and only with HMM_FAULT_ALLOW_RETRY since 5.4. In Linux it is
the lock of a page that such a fault waits for; here it is whatever the fault waits for.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.history.era import EAGAIN, EFAULT
from hmmlab.model.machine import KernelError, Machine, Routine
from hmmlab.model.memory import handle_mm_fault
from hmmlab.model.mm_types import Vma, mm_lock, vma_at

__all__ = ["fault_pages"]


def fault_pages(
    machine: Machine, vma: Vma, start: int, end: int, write: bool, *, may_retry: bool
) -> Routine[int]:
    """Fault pages ``start`` to ``end - 1``, all for reading or all for writing.

    Returns 0; -EFAULT when a fault failed; -EAGAIN when one had to wait, and then the mmap_lock is
    no longer held.
    """
    for first, last in machine.chunks(start, end):
        with machine.bulk(last - first):
            vpns = np.arange(first, last)
            fault = handle_mm_fault(machine, vma_at(machine, vma.row), vpns, write, remote=True)
            try:
                for step in fault:
                    if step.lock and may_retry:
                        fault.close()
                        machine.up_read(mm_lock(machine, vma.mm))
                        yield machine.step(
                            "The fault of {range} would have to wait: it gives the mmap_lock up.",
                            vma.mm,
                            first,
                            last,
                        )
                        return -EAGAIN
                    yield step
            except KernelError:
                return -EFAULT
    return 0
