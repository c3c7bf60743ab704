"""Time a story that is told again and again, and take the medians."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from time import perf_counter, process_time
from typing import Any, NamedTuple

__all__ = ["Median", "Story", "medians"]

#: Rounds that count at least. One more goes before them, to warm up.
ROUNDS = 5

#: Seconds for which short rounds go on: of five that take milliseconds, a neighbour may meet three.
ENOUGH = 1.0

#: Seconds after which a measurement is content with the rounds that it has.
PATIENCE = 120.0

#: What is measured: an endless generator that yields operations by name, each to be timed when it
#: is yielded, and is sent what they return. What it does between two yields is not timed. A round
#: ends where a name comes again.
Story = Generator[tuple[str, Callable[[], object]], Any, None]


class Median(NamedTuple):
    """The median of some rounds, in seconds of the CPU.

    Nothing here waits for anything but a CPU, so that on a machine to itself it is the time that
    passes; on another the neighbours do not count.
    """

    seconds: float
    rounds: int


def medians(story: Story) -> dict[str, Median]:
    """Median time of each operation of a story.

    They are of :data:`ROUNDS` rounds, or as many as fit into :data:`ENOUGH` seconds; of fewer only
    where those would take longer than :data:`PATIENCE`. The first does not count if there is a
    second.
    """
    seconds: dict[str, list[float]] = {}
    began = perf_counter()
    answer = None
    with closing(story), _no_garbage_collection():
        while True:
            name, act = story.send(answer)
            taken = seconds.setdefault(name, [])
            if taken and name == next(iter(seconds)):  # a round is over
                passed = perf_counter() - began
                if passed > PATIENCE or (len(taken) > ROUNDS and passed > ENOUGH):
                    break
            start = process_time()
            answer = act()
            taken.append(process_time() - start)
    counted = {name: taken[1:] or taken for name, taken in seconds.items()}
    return {name: Median(statistics.median(taken), len(taken)) for name, taken in counted.items()}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
