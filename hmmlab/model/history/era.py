"""The kernels whose interfaces differ, and the error numbers with which their functions answer."""

from __future__ import annotations

import enum

__all__ = [
    "EAGAIN",
    "EBUSY",
    "EFAULT",
    "EINVAL",
    "ENOMEM",
    "ENXIO",
    "EPERM",
    "ERANGE",
    "Era",
    "error_name",
]

EPERM, ENXIO, EAGAIN, ENOMEM, EFAULT, EBUSY, EINVAL, ERANGE = 1, 6, 11, 12, 14, 16, 22, 34

_NAMES = {
    EPERM: "EPERM",
    ENXIO: "ENXIO",
    EAGAIN: "EAGAIN",
    ENOMEM: "ENOMEM",
    EFAULT: "EFAULT",
    EBUSY: "EBUSY",
    EINVAL: "EINVAL",
    ERANGE: "ERANGE",
}


class Era(enum.IntEnum):
    """A kernel, or a patch series, oldest first; each differs from the one before it.

    =========== ==========================================================================
    APRIL_2017  "mm/hmm/mirror", v2: mirrors are told at the end of a change, nothing else
    V4_14       looked-up ranges are tracked, and struct hmm marks those that changed
    V4_17       mirrors may have a release callback; unregistering forgets the mm
    V4_20       mirrors are told at the start, with a ``struct hmm_update``, and may refuse
    V5_2        running changes are counted; a range is valid again when there are none
    V5_3        an invalid range is -EBUSY, and the lock stays held; ``block`` is heeded
    V5_4        a snapshot is a flag of the fault; a mirror gets the notifier's own range
    V5_5        no mirrors and no struct hmm: interval notifiers; 5.6 is the same
    V5_7        no flags any more: a request decides
    V6_1        the reference
    TODAY       what has changed since
    =========== ==========================================================================

    Untold are the months in which the interfaces were as in a neighbour: 5.8, whose words are those
    of 6.1 without an order, and 5.9 to 6.0, which lack device-exclusive access until 5.14 and
    coherent device memory until 6.0.
    """

    APRIL_2017 = 1
    V4_14 = 2
    V4_17 = 3
    V4_20 = 4
    V5_2 = 5
    V5_3 = 6
    V5_4 = 7
    V5_5 = 8
    V5_7 = 9
    V6_1 = 10
    TODAY = 11

    @property
    def label(self) -> str:
        """As people say it: ``April 2017``, ``5.2``, ``today``."""
        words = self.name.removeprefix("V").replace("_", "." if self.name[0] == "V" else " ")
        return words.lower() if self is Era.TODAY else words.capitalize()


def error_name(answer: int) -> str:
    """An answer as kernel programmers write it: ``-EBUSY``, or the number that it is."""
    return f"-{_NAMES[-answer]}" if -answer in _NAMES else str(answer)
