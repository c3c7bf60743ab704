"""Exercises that check themselves by running the model.

from hmmlab.exercises import exercise

permission = exercise("permission")
print(permission)          # what is asked
permission.check(answer)   # right, wrong and why, or not attempted
permission.hint()
permission.solution()

``exercise("permission", seed=7)`` is a variant with other inputs.
"""

from hmmlab.exercises.desk import Desk
from hmmlab.exercises.events import Ignorable
from hmmlab.exercises.look import FaultLoop, RequestFlags
from hmmlab.exercises.migrate import LeftBehind
from hmmlab.exercises.mirror import Invalidate
from hmmlab.exercises.rules import Exercise, Verdict
from hmmlab.exercises.share import BytesThatMove, Permission, Repoint, WhatTheDeviceKnows

__all__ = ["EXERCISES", "Desk", "Exercise", "Verdict", "exercise"]

#: Every exercise by its name, and by the number of its notebook.
EXERCISES: dict[str, dict[str, type[Exercise]]] = {
    "01": {"invalidate": Invalidate},
    "02": {
        "repoint": Repoint,
        "what_the_device_knows": WhatTheDeviceKnows,
        "permission": Permission,
        "bytes_that_move": BytesThatMove,
    },
    "03": {"fault_loop": FaultLoop, "request_flags": RequestFlags},
    "05": {"left_behind": LeftBehind},
    "06": {"ignorable": Ignorable},
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
