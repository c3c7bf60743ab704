"""Exercises that check themselves by running the model.

from hmmlab.exercises import exercise

permission = exercise("permission")
print(permission)          # what is asked
permission.check(answer)   # right, wrong and why, or not attempted
permission.hint()
permission.solution()

``exercise("permission", seed=7)`` is a variant with other inputs.
"""

from hmmlab.exercises.alloc import AllocAndCopy
from hmmlab.exercises.desk import Desk
from hmmlab.exercises.device_frames import HomeOrder, ReadWord
from hmmlab.exercises.device_memory import FreeAndFault, Place
from hmmlab.exercises.events import AnswerAtOnce, Ignorable
from hmmlab.exercises.look import FaultLoop, RequestFlags
from hmmlab.exercises.migrate import CountTheCopies, LeftBehind, ThreeGates, WhoGoes
from hmmlab.exercises.mirror import Invalidate, MustRetry
from hmmlab.exercises.rules import Exercise, Verdict
from hmmlab.exercises.share import BytesThatMove, Permission, Repoint, WhatTheDeviceKnows
from hmmlab.exercises.snapshots import FewestFaults, SnapshotBytes
from hmmlab.exercises.tape import Intervals, RaiseEvents, ReadTheTape
from hmmlab.exercises.told import OrderOfCalls, WhoIsTold
from hmmlab.exercises.tour import FourPages, FramesAndCalls, WhereTheyAre
from hmmlab.exercises.turns import LostUpdate

__all__ = ["EXERCISES", "Desk", "Exercise", "Verdict", "exercise"]

#: Every exercise by its name, and by the number of its notebook.
EXERCISES: dict[str, dict[str, type[Exercise]]] = {
    "00": {
        "frames_and_calls": FramesAndCalls,
        "four_pages": FourPages,
        "where_they_are": WhereTheyAre,
    },
    "01": {
        "who_is_told": WhoIsTold,
        "order_of_calls": OrderOfCalls,
        "must_retry": MustRetry,
        "invalidate": Invalidate,
    },
    "02": {
        "repoint": Repoint,
        "what_the_device_knows": WhatTheDeviceKnows,
        "permission": Permission,
        "bytes_that_move": BytesThatMove,
    },
    "03": {
        "snapshot_bytes": SnapshotBytes,
        "request_flags": RequestFlags,
        "fewest_faults": FewestFaults,
        "lost_update": LostUpdate,
        "fault_loop": FaultLoop,
    },
    "04": {
        "place": Place,
        "home_order": HomeOrder,
        "read_word": ReadWord,
        "free_and_fault": FreeAndFault,
    },
    "05": {
        "left_behind": LeftBehind,
        "alloc_and_copy": AllocAndCopy,
        "count_the_copies": CountTheCopies,
        "who_goes": WhoGoes,
        "three_gates": ThreeGates,
    },
    "06": {
        "raise_events": RaiseEvents,
        "read_the_tape": ReadTheTape,
        "answer_at_once": AnswerAtOnce,
        "intervals": Intervals,
        "ignorable": Ignorable,
    },
}


def exercise(name: str, seed: int = 1) -> Desk:
    """Take an exercise to your desk.

    Parameters
    ----------
    name
        One of :data:`EXERCISES`.
    seed
        Draws the inputs; another seed makes another variant.

    Raises
    ------
    ValueError
        When there is none of that name.
    """
    known = {key: kind for room in EXERCISES.values() for key, kind in room.items()}
    if name not in known:
        raise ValueError(f"no exercise {name!r}; there are {', '.join(known)}")
    return Desk(known[name](seed), name)
