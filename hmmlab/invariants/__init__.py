"""What holds after every step, as predicates over columns.

:func:`violations` names every one that does not hold. Some speak only while nothing runs: in the
middle of an operation the operation itself holds references and locks, and pages are on their way.
"""

from __future__ import annotations

from hmmlab.invariants.frames import (
    device_frames,
    exclusive,
    free_lists,
    mapcounts,
    references,
    reverse,
    swap_counts,
    users,
)
from hmmlab.invariants.look import Look
from hmmlab.invariants.mirrors import mirrors, sequences
from hmmlab.invariants.tables import huge_pages, nothing_runs, tables, vmas
from hmmlab.model.state import State

__all__ = ["violations"]


def violations(state: State, *, quiet: bool = True) -> list[str]:
    """Sentences about what should hold and does not; an empty list when all is well.

    Parameters
    ----------
    quiet
        Whether no operation is running.
    """
    look = Look(state)
    found = [
        *tables(look),
        *vmas(look),
        *mapcounts(look),
        *swap_counts(look),
        *sequences(state),
        *mirrors(look),
    ]
    if quiet:
        found += [
            *nothing_runs(look),
            *references(look),
            *free_lists(state),
            *device_frames(state),
            *huge_pages(look),
            *exclusive(look),
            *reverse(look),
            *users(state),
        ]
    return found
