"""hmm_device_new and hmm_device_put: a device that stands for many, 4.14 to 5.2.

It was meant for drivers of several devices that share one memory, and nobody ever used it.

Source: mm/hmm.c, include/linux/hmm.h of 4.14 (``struct hmm_device``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hmmlab.model.history.era import EBUSY, ENOMEM
from hmmlab.model.history.mirror_2017 import kmalloc
from hmmlab.model.machine import Machine

__all__ = ["HMM_DEVICE_MAX", "HmmDevice", "hmm_device_new", "hmm_device_put"]

#: Minor numbers that there are.
HMM_DEVICE_MAX = 256

Machine.declare("hmm_device.used", np.int32, "2017: 1 for a minor number that a device has")


class HmmDevice:
    """A device that HMM made (``struct hmm_device``).

    Attributes
    ----------
    minor
        Its number, -1 once it is gone.
    drvdata
        What its driver keeps with it.
    """

    def __init__(self, minor: int, drvdata: Any) -> None:
        self.minor, self.drvdata = minor, drvdata

    @property
    def name(self) -> str:
        """Its name: ``hmm_device0``."""
        return f"hmm_device{self.minor}"


def hmm_device_new(machine: Machine, drvdata: Any) -> HmmDevice | int:
    """A new device with the lowest free minor number; -ENOMEM, or -EBUSY where all are used."""
    if not kmalloc(machine):
        return -ENOMEM
    used = machine.reserve("hmm_device.used", slice(0, HMM_DEVICE_MAX))[:HMM_DEVICE_MAX]
    free = np.flatnonzero(used == 0)
    if not free.size:
        return -EBUSY
    minor = int(free[0])
    machine.write("hmm_device.used", minor, 1)
    return HmmDevice(minor, drvdata)


def hmm_device_put(machine: Machine, hmm_device: HmmDevice) -> None:
    """Give the device up, and its number back. A second call does nothing."""
    if hmm_device.minor >= 0:
        machine.write("hmm_device.used", hmm_device.minor, 0)
        hmm_device.minor = -1
