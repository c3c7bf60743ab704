"""Snapshots by the test device, after lib/test_hmm.c: a subscription, and one byte a page."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.entry import (
    HMM_PFN_ERROR,
    HMM_PFN_ORDER_SHIFT,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    Words,
    hmm_pfn_to_pfn,
)
from hmmlab.model.machine import Machine
from hmmlab.model.memremap import is_device_private_page, of_pagemap
from hmmlab.model.mmu_notifier import MmuNotifierRange, mmu_interval_set_seq
from hmmlab.model.page import ZERO_PFN, is_zone_device
from hmmlab.model.state import State

__all__ = ["SnapshotSubscriber", "dmirror_mkentry"]

# Bytes of a snapshot (lib/test_hmm_uapi.h).
PROT_ERROR = 0xFF
PROT_READ = 0x01
PROT_WRITE = 0x02
PROT_PMD = 0x04
PROT_PUD = 0x08
PROT_ZERO = 0x10
PROT_DEV_PRIVATE_LOCAL = 0x20
PROT_DEV_PRIVATE_REMOTE = 0x30
PROT_DEV_COHERENT_LOCAL = 0x40
PROT_DEV_COHERENT_REMOTE = 0x50


class SnapshotSubscriber:
    """The subscription that a snapshot makes for its own range: it only notes that it was hit."""

    takes_series = True

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def invalidate(self, subscription: int, range: MmuNotifierRange, cur_seq: int) -> bool:
        """Note the hit in the sequence number."""
        mmu_interval_set_seq(self.machine, subscription, cur_seq)
        return True


def dmirror_mkentry(state: State, reader: int, hmm_pfns: Words) -> NDArray[np.uint8]:
    """What device ``reader`` tells of pages with these words: PROT_* bytes, uint8, one a word."""
    pfns = hmm_pfn_to_pfn(hmm_pfns)
    order = (hmm_pfns >> np.uint64(HMM_PFN_ORDER_SHIFT)) & np.uint64(31)
    device = is_zone_device(state, pfns)
    owner = of_pagemap(state, "owner", pfns)
    private = is_device_private_page(state, pfns)
    local = np.where(
        owner == reader,
        np.where(private, PROT_DEV_PRIVATE_LOCAL, PROT_DEV_COHERENT_LOCAL),
        np.where(private, PROT_DEV_PRIVATE_REMOTE, PROT_DEV_COHERENT_REMOTE),
    )
    kind = np.where(device, local, np.where(pfns == ZERO_PFN, PROT_ZERO, 0))
    kind |= np.where((hmm_pfns & np.uint64(HMM_PFN_WRITE)) != 0, PROT_WRITE, PROT_READ)
    kind |= np.where(order == 9, PROT_PMD, 0) | np.where(order == 18, PROT_PUD, 0)
    kind = np.where((hmm_pfns & np.uint64(HMM_PFN_VALID)) != 0, kind, 0)
    kind = np.where((hmm_pfns & np.uint64(HMM_PFN_ERROR)) != 0, PROT_ERROR, kind)
    return kind.astype(np.uint8)
