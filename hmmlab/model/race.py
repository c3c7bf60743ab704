"""A race: some operations on one machine, in any order of turns, and in every one.

A machine never runs backwards, and its operations are deterministic. So a race is a function that
builds the machine and its operations anew, and an order of turns tells everything: to go back is
to build again and take a turn less, and to try every order is to build again at every fork.

    def build():
        process = Process(Machine(ram_pages=4096))
        pages = process.mmap(4)
        device = process.attach(Mine)
        return {"CPU": process.steps.madvise(pages, "dontneed"), "device": device.steps.read(pages)}

    Race(build).run("ddcc")
    Race(build).every_order(broken_promise)

An order is a word of the operations' first letters, lower-case: ``"ddc"`` is two turns of *device*
and then one of *CPU*. A turn is what an operation does up to its next step, or to its return.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from hmmlab.model.machine import Actor, KernelError, Machine, Steps
from hmmlab.model.rows import Rows, row_numbers
from hmmlab.model.state import State
from hmmlab.model.trace import Step, Trace

__all__ = ["Orders", "Race", "Run", "Turn"]

#: Turns after which an order is said never to end.
PATIENCE = 100

#: Builds a machine, and the operations that race on it by their names.
Build = Callable[[], Mapping[str, Steps]]

#: Says what is wrong with a machine, "" when nothing is.
Judge = Callable[[State], str]


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn that was taken.

    Attributes
    ----------
    who
        Name of the operation.
    step
        Its step; None where it returned.
    """

    who: str
    step: Step | None


class Run:
    """One run of a race, turn by turn. It only goes on.

    Attributes
    ----------
    machine, operations
        What was built.
    trace
        The record of it from the first turn on; None when it was not asked for.
    turns
        The turns so far.
    """

    def __init__(self, operations: Mapping[str, Steps], *, record: bool = True) -> None:
        self.operations = dict(operations)
        for steps in self.operations.values():
            steps.may_rest = True
        machines = {id(steps.machine): steps.machine for steps in self.operations.values()}
        letters = {letter(name) for name in self.operations}
        if len(machines) != 1 or len(letters) != len(self.operations):
            raise ValueError(
                f"{len(self.operations)} operations on {len(machines)} machines, with first "
                f"letters {', '.join(sorted(letters))}; expected one machine and a letter each"
            )
        self.machine: Machine = next(iter(machines.values()))
        self.trace: Trace | None = self.machine.record() if record else None
        self.turns: list[Turn] = []
        self._waiting: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"Run({self.order!r})"

    @property
    def order(self) -> str:
        """The turns so far, one letter each."""
        return "".join(letter(turn.who) for turn in self.turns)

    @property
    def going(self) -> list[str]:
        """Names of the operations that have not returned."""
        return [name for name, steps in self.operations.items() if not steps.ended]

    @property
    def waiting(self) -> dict[str, str]:
        """What each operation waited for at its last turn, by name, of those that did."""
        return {name: lock for name, lock in self._waiting.items() if lock}

    def take(self, who: str) -> bool:
        """Let one operation take a turn.

        Returns
        -------
        Whether anything happened: no for one that has returned, or that still waits.
        """
        steps = self.operations[who]
        if steps.ended:
            return False
        waited = self._waiting.get(who, "")
        step: Step | None
        try:
            step = next(steps)
        except (StopIteration, KernelError):
            step = None
        self._waiting[who] = step.lock if step else ""
        if waited and step and step.lock == waited:
            return False
        self.turns.append(Turn(who, step))
        return True

    def follow(self, order: str) -> Self:
        """Take turns in an order of letters, large or small, and return the run.

        Blanks do not count.

        Raises
        ------
        ValueError
            When a letter names no operation.
        """
        names = {letter(name): name for name in self.operations}
        for turn in "".join(order.lower().split()):
            if turn not in names:
                raise ValueError(f"turn {turn!r}; expected one of {', '.join(names)}")
            self.take(names[turn])
        return self

    def finish(self) -> bool:
        """Let all go on, one to its end or until it waits, then the next. Whether all returned."""
        while self.going:
            moved = False
            for who in self.going:
                while len(self.turns) < PATIENCE and self.take(who):
                    moved = True
                    if self._waiting[who] or self.operations[who].ended:
                        break
            if not moved:
                return False
        return True


@dataclass(slots=True)
class Orders:
    """What came of the orders of turns.

    Attributes
    ----------
    total
        How many orders there are.
    wrong
        In how many of them something was wrong at some moment.
    stuck
        In how many all that were left waited for each other.
    endless
        Whether some order never ends; the counts say nothing then.
    first
        The turns up to the moment at which the first that is wrong, stuck or endless shows it.
    why
        What is wrong there.
    """

    total: int = 0
    wrong: int = 0
    stuck: int = 0
    endless: bool = False
    first: str | None = None
    why: str = ""

    def add(self, other: Orders) -> None:
        """Count the orders of another fork too."""
        self.total += other.total
        self.wrong += other.wrong
        self.stuck += other.stuck
        self.endless |= other.endless
        if self.first is None:
            self.first, self.why = other.first, other.why


class Race:
    """Operations that race against each other.

    Parameters
    ----------
    build
        Makes a machine, and returns the operations on it, not begun, by names whose first letters
        differ. It is called once a run, and must build the same each time.
    """

    def __init__(self, build: Build) -> None:
        self.build = build
        self.names = tuple(self.run().operations)

    def __repr__(self) -> str:
        return f"Race({', '.join(self.names)})"

    def run(self, order: str = "") -> Run:
        """Build, and take turns in an order of letters; blanks do not count.

        Turns in which nothing happens are not in the order of the run that is returned.

        Raises
        ------
        ValueError
            When a letter names no operation.
        """
        return Run(self.build()).follow(order)

    def every_order(self, judge: Judge) -> Orders:
        """Try every order of turns.

        Orders that have come to the same state go on in the same way, and are tried once: the
        columns are the same then, and so is where each operation stands, with its variables.
        """
        return _Search(self, judge).from_here(_Watched(self.build()))


def letter(name: str) -> str:
    """The letter that stands for an operation in an order."""
    return name[0].lower()


# --- every order ----------------------------------------------------------------------------------


@dataclass
class _Search:
    """A search through all orders, which remembers what comes after a state."""

    race: Race
    judge: Judge
    known: dict[Hashable, Orders | None] = field(default_factory=dict)

    def from_here(self, run: _Watched) -> Orders:
        """All orders that begin with the turns of ``run``, which is used up."""
        why = self.judge(run.machine)
        key = (run.key(), bool(why))
        if key in self.known:
            return self._again(run, self.known[key])
        self.known[key] = None  # on the way here
        order, found = run.order, Orders()
        if len(run.turns) > PATIENCE:
            found = Orders(1, 0, 0, True, order, _ENDLESS)
        elif not run.going:
            found.total = 1
        else:
            self._fork(run, order, found)
        if why:
            found = Orders(found.total, found.total, found.stuck, found.endless, order, why)
        depth = len(order)
        self.known[key] = _shifted(found, found.first[depth:] if found.first is not None else None)
        return found

    def _fork(self, run: _Watched, order: str, found: Orders) -> None:
        live, last = run, run.going[-1]
        for who in run.going:
            if not live.take(who):  # it still waits, and nothing has happened
                continue
            found.add(self.from_here(live))
            if who != last:
                live = _Watched(self.race.build()).follow(order)
        if not found.total:
            waits = " and ".join(f"{name} waits for {lock}" for name, lock in run.waiting.items())
            found.add(Orders(1, 0, 1, False, order, f"Nobody can go on: {waits}."))

    def _again(self, run: _Watched, known: Orders | None) -> Orders:
        if known is None:  # it has come back to where it was
            return Orders(1, 0, 0, True, run.order, _ENDLESS)
        return _shifted(known, run.order + known.first if known.first is not None else None)


_ENDLESS = "It has come back to where it was, and goes round for ever."


def _shifted(found: Orders, first: str | None) -> Orders:
    return Orders(found.total, found.wrong, found.stuck, found.endless, first, found.why)


class _Watched(Run):
    """A run that knows in what state it is. It keeps no trace, only which cells have changed."""

    def __init__(self, operations: Mapping[str, Steps]) -> None:
        super().__init__(operations, record=False)
        self._before: dict[tuple[str, int], Any] = {}
        self.machine.attach(self)

    def began(self, number: int, text: str, actor: str) -> None:
        """Nothing to note."""

    def ended(self, number: int, result: Any) -> None:
        """Nothing to note."""

    def stepped(self, number: int, step: Step) -> None:
        """Nothing to note."""

    def wrote(self, column: str, rows: Rows, old: Any, new: Any) -> None:
        """Note what stood in a cell before the first change."""
        before = np.broadcast_to(old, row_numbers(rows).shape)
        for row, value in zip(row_numbers(rows).tolist(), before.tolist(), strict=True):
            self._before.setdefault((column, row), value)

    def key(self) -> Hashable:
        """What the rest of the run depends on: the columns, and where each operation stands."""
        cells = [
            (column, row, value)
            for (column, row), before in self._before.items()
            if (value := self.machine[column][row].item()) != before
        ]
        seen: dict[int, tuple[int, object]] = {}
        actors = [
            (name, steps.ended, self._waiting.get(name, ""), tuple(_frames(steps.routine, seen)))
            for name, steps in self.operations.items()
        ]
        return frozenset(cells), tuple(actors)


def _frames(routine: Any, seen: dict[int, tuple[int, object]]) -> Iterator[Hashable]:
    """Where a generator stands, and those that it waits for, each with its variables."""
    while isinstance(routine, types.GeneratorType):
        frame = routine.gi_frame
        if frame is None:
            return
        yield routine.gi_code.co_qualname, frame.f_lasti, _digest(dict(frame.f_locals), seen)
        routine = routine.gi_yieldfrom


def _digest(value: Any, seen: dict[int, tuple[int, object]]) -> Hashable:
    """What can be told apart of a variable. The machine's columns are told apart elsewhere."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, np.generic)):
        return value
    if isinstance(value, (State, Actor, type, types.FunctionType, types.ModuleType)):
        return type(value).__name__
    if id(value) in seen:
        return seen[id(value)][0]
    seen[id(value)] = len(seen), value  # which lives on meanwhile, so its id is nobody else's
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, types.GeneratorType):
        return tuple(_frames(value, seen))
    if isinstance(value, Mapping):
        return tuple((_digest(k, seen), _digest(v, seen)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_digest(item, seen) for item in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(_digest(item, seen) for item in value)
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return type(value).__name__, _digest({**held, **getattr(value, "__dict__", {})}, seen)
