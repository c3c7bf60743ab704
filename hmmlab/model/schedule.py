"""Who goes next: several operations on one machine, a step of one and then a step of another.

An operation that waits for a lock yields a step that says so, and is asked again when its turn
comes. Operations are deterministic, so an order of turns tells everything: the same order gives
the same run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from hmmlab.model.machine import KernelError, Steps
from hmmlab.model.trace import Step

__all__ = ["interleave", "turns"]


def turns(count: int) -> Iterator[int]:
    """The fair order without end: 0, 1, ... ``count - 1``, 0, 1, ..."""
    while True:
        yield from range(count)


def interleave(
    operations: Sequence[Steps], order: Iterable[int] | None = None
) -> list[tuple[int, Step]]:
    """Run operations by turns until all have ended.

    Parameters
    ----------
    operations
        What to run; each keeps its own answer in ``result``, a KernelError where it was refused.
    order
        Whose turn it is, as indices of ``operations``; a turn of one that has ended is skipped.
        When the order ends, they go on in fair turns; without one, they do from the beginning.

    Returns
    -------
    Who took each step, and the step.

    Raises
    ------
    ValueError
        When the order names an operation that is not there.
    RuntimeError
        When all that are left wait for each other.
    """
    taken: list[tuple[int, Step]] = []
    running = set(range(len(operations)))
    waiting: set[int] = set()
    for turn in _then_fair(order, len(operations)):
        if not running:
            return taken
        if not 0 <= turn < len(operations):
            raise ValueError(f"turn of operation {turn}; expected 0 to {len(operations) - 1}")
        if turn not in running:
            continue
        try:
            step = next(operations[turn])
        except (StopIteration, KernelError):
            running.discard(turn)
            waiting.clear()
            continue
        taken.append((turn, step))
        if not step.lock:
            waiting.clear()
            continue
        waiting.add(turn)
        if waiting >= running:
            names = ", ".join(f"{operations[i].text!r} for {step.lock}" for i in sorted(running))
            raise RuntimeError(f"all that are left wait: {names}")
    return taken


def _then_fair(order: Iterable[int] | None, count: int) -> Iterator[int]:
    yield from order or ()
    yield from turns(count)
