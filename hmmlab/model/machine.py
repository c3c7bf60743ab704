"""The machine: who runs, and which locks are held.

Kernel and driver code is written as generators marked with :func:`kernel`; each yields a
:class:`~hmmlab.model.trace.Step` where another CPU or the device could run. :meth:`Machine.run`
drives one to its end; :mod:`hmmlab.model.schedule` interleaves several.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno as errno_names
import functools
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, ClassVar, ParamSpec, TypeVar

import numpy as np

from hmmlab.model.door import Door
from hmmlab.model.geometry import USER_VPN_END
from hmmlab.model.trace import Step

__all__ = [
    "BLOCK",
    "BULK",
    "Actor",
    "KernelError",
    "Machine",
    "Routine",
    "Steps",
    "StuckError",
    "UnrunOperationWarning",
    "kernel",
]

P = ParamSpec("P")
R = TypeVar("R")

#: The type of a kernel function: it yields steps and returns an answer.
Routine = Generator[Step, None, R]

#: A grain without bound: iterations of a loop that commute become one step, up to BLOCK of them.
BULK = 1 << 62

#: Pages that a long loop in bulk takes at once. The arrays of a quarter as many would stay in a
#: faster cache, and yet cost more: a block of a migration costs a millisecond whatever its size.
BLOCK = 1 << 16

#: RAM of the recordings' machine: 4 GiB.
DEFAULT_RAM_PAGES = 1 << 20


class KernelError(Exception):
    """What the kernel answers where it refuses: an errno, or the signal that kills the task.

    Attributes
    ----------
    errno
        The positive errno (14 for EFAULT), or 0 when a signal was sent.
    signal
        Number of the signal (11 for SIGSEGV), or 0.
    """

    def __init__(self, errno: int, message: str, *, signal: int = 0) -> None:
        self.errno, self.signal = errno, signal
        name = errno_names.errorcode.get(errno) or {11: "SIGSEGV", 7: "SIGBUS"}.get(signal, "?")
        super().__init__(f"{name}: {message}")


class StuckError(RuntimeError):
    """An operation waits for something that nobody will do, as it would in the kernel."""


class UnrunOperationWarning(UserWarning):
    """Steps were made and dropped, and nothing happened: run them, or iterate over them."""


class Actor:
    """Who runs an operation: a name, and the kernel functions it is in."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stack: list[str] = []
        self.entered: list[tuple[int, str]] = []

    def enter(self, function: str, times: int = 1, up: int = 0) -> None:
        """Note that ``function`` is called ``times`` times, by the function ``up`` levels out."""
        self.entered.extend([(len(self.stack) - up, function)] * times)

    def __repr__(self) -> str:
        return f"Actor({self.name!r})"


def kernel(
    source: str, name: str = ""
) -> Callable[[Callable[P, Routine[R]]], Callable[P, Routine[R]]]:
    """Mark a generator as a function of the kernel or of a driver.

    Its first argument is the machine, or an object that has one as ``machine``.

    Parameters
    ----------
    source
        The file it is after, such as ``mm/mprotect.c``.
    name
        Its name there, when it differs from the Python name.
    """

    def mark(function: Callable[P, Routine[R]]) -> Callable[P, Routine[R]]:
        called = name or function.__name__

        @functools.wraps(function)
        def traced(*args: P.args, **kwargs: P.kwargs) -> Routine[R]:
            first: Any = args[0]
            actor = (first if isinstance(first, Machine) else first.machine).actor
            actor.enter(called)
            actor.stack.append(called)
            try:
                return (yield from function(*args, **kwargs))
            finally:
                actor.stack.pop()

        traced.source = source  # type: ignore[attr-defined]
        return traced

    return mark


#: Flushes, and what is freed with them, after the last step of an operation: no step of their own.
_PART_OF_THE_LAST_STEP = ("flush_tlb_mm_range", "tlb_finish_mmu")


class Steps(Iterator[Step]):
    """An operation that has not happened yet. Iterate over its steps, or call :meth:`run`.

    Attributes
    ----------
    result
        What the operation returned, once it has ended.
    may_rest
        Whether it may be dropped unrun, without a warning.
    """

    may_rest = False

    def __init__(self, machine: Machine, text: str, actor: Actor, body: Routine[Any]) -> None:
        self.machine, self.text, self.actor, self._body = machine, text, actor, body
        self.started = self.ended = False
        self.result: Any = None
        self.number = self._group = 0

    def __repr__(self) -> str:
        state = "ended" if self.ended else "running" if self.started else "not started"
        return f"Steps({self.text!r}, {state})"

    @property
    def routine(self) -> Routine[Any]:
        """The generator behind it; who wants to know where it stands looks at its frame."""
        return self._body

    def __next__(self) -> Step:
        if self.ended:
            raise StopIteration
        machine = self.machine
        outer, machine.actor = machine.actor, self.actor
        machine.group, self._group = self._group, machine.group
        try:
            if not self.started:
                self.started = True
                machine.running += 1
                self.number = machine.next_operation()
                machine.tell("began", self.number, self.text, self.actor.name)
            step = next(self._body)
        except StopIteration as stop:
            self._end(stop.value, "It is done.")
            raise
        except KernelError as error:
            self._end(error, f"Refused, {error}.")
            raise
        finally:
            machine.actor = outer
            machine.group, self._group = self._group, machine.group
        machine.tell("stepped", self.number, step)
        return step

    def _end(self, result: Any, text: str) -> None:
        self.ended, self.result = True, result
        self.machine.running -= 1
        entered = self.actor.entered
        if (
            entered
            and entered[0][1] in _PART_OF_THE_LAST_STEP
            and not isinstance(result, KernelError)
        ):
            self.machine.tell_called(self.number, tuple(entered))
            entered.clear()
        elif entered:  # what was called after the last step
            depth, function = self.actor.entered[-1]
            step = self.machine.step(text.replace("{", "{{").replace("}", "}}"))
            step = dataclasses.replace(step, function=function, depth=depth)
            self.machine.tell("stepped", self.number, step)
        self.machine.tell("ended", self.number, result)
        self.machine.run_woken()

    def run(self) -> Any:
        """Run to the end and return the operation's answer.

        Raises
        ------
        KernelError
            What the kernel refuses.
        StuckError
            When it waits for a lock that nobody will release.
        """
        for step in self:
            if step.lock:
                raise StuckError(f"{self.actor.name} waits for {step.lock}, and nobody else runs")
        return self.result

    def __del__(self) -> None:
        if self.started and not self.ended:  # dropped half-way, and so never to end
            self.machine.running -= 1
        if not self.started and not self.ended and not self.may_rest:
            warnings.warn(
                f"the steps of {self.text!r} were never run", UnrunOperationWarning, stacklevel=2
            )


class Machine(Door):
    """A small Linux memory-management kernel.

    Parameters
    ----------
    ram_pages
        Pages of RAM, in two NUMA nodes of half each; the default is the recordings' 4 GiB.
    grain
        How many iterations of a kernel loop one step takes: 1 shows every page, :data:`BULK` (the
        default) takes as many at once as commute. The columns, the answers and the order of the
        events are the same at every grain.

    Raises
    ------
    ValueError
        When ``ram_pages`` or ``grain`` is too small.
    """

    _boot: ClassVar[list[Callable[[Machine], None]]] = []
    _threads: ClassVar[dict[str, tuple[str, Callable[[Machine], Routine[None]]]]] = {}

    def __init__(self, ram_pages: int = DEFAULT_RAM_PAGES, *, grain: int = BULK) -> None:
        if not 16 <= ram_pages <= USER_VPN_END:
            raise ValueError(f"ram_pages is {ram_pages}; expected 16 to {USER_VPN_END}")
        if grain < 1:
            raise ValueError(f"grain is {grain}; expected at least 1 iteration a step")
        super().__init__(ram_pages)
        self.grain = grain
        self.actor = Actor("boot")
        self.objects: dict[str, dict[int, Any]] = {}
        self._lock_names: list[str] = []
        self.group = self._groups = self._operations = 0
        self.running = 0  # operations that have begun and not ended
        for boot in self._boot:
            boot(self)

    def __repr__(self) -> str:
        return f"Machine({self.ram_pages} pages of RAM)"

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    # --- what rooms say when they are imported ----------------------------------------------------
    @classmethod
    def at_boot(cls, function: Callable[[Machine], None]) -> Callable[[Machine], None]:
        """Call ``function`` with every new machine."""
        cls._boot.append(function)
        return function

    @classmethod
    def kernel_thread(
        cls, name: str, woken: str
    ) -> Callable[[Callable[[Machine], Routine[None]]], Callable[[Machine], Routine[None]]]:
        """Mark a routine as a kernel thread: it runs when row 0 of column ``woken`` is not 0.

        When a thread runs is a matter of timing in the kernel. Here it is one rule: as soon as it
        has been woken and no operation is under way.
        """

        def mark(body: Callable[[Machine], Routine[None]]) -> Callable[[Machine], Routine[None]]:
            cls._threads[name] = (woken, body)
            return body

        return mark

    # --- who runs ---------------------------------------------------------------------------------
    def next_operation(self) -> int:
        """Number of an operation that begins."""
        self._operations += 1
        return self._operations

    def run_woken(self) -> None:
        """Run the kernel threads that have been woken, unless an operation is under way."""
        for name, (woken, body) in self._threads.items():
            if not self.running and self[woken][:1].any():
                Steps(self, name, Actor(name), body(self)).run()

    def run_as(self, actor: Actor, body: Routine[R]) -> Routine[R]:
        """Take the steps of ``body`` as another actor, for whom this operation waits."""
        while True:
            outer, self.actor = self.actor, actor
            try:
                step = next(body)
            except StopIteration as stop:
                answer: R = stop.value
                return answer
            finally:
                self.actor = outer
            yield step

    def step(
        self,
        text: str,
        mm: int = 0,
        start: int = 0,
        stop: int = 0,
        *,
        lock: str = "",
        detail: Any = None,
    ) -> Step:
        """The step to yield: the current actor's innermost function has done what ``text`` says."""
        actor = self.actor
        calls = tuple(actor.entered)
        actor.entered.clear()
        function = actor.stack[-1] if actor.stack else ""
        depth = max(len(actor.stack) - 1, 0)
        return Step(
            function, depth, actor.name, mm, start, stop, text, calls, lock, detail, self.group
        )

    @contextlib.contextmanager
    def bulk(self, iterations: int) -> Iterator[None]:
        """Mark the steps within as ``iterations`` of one loop, taken kind after kind."""
        outermost = iterations > 1 and not self.group
        if outermost:
            self._groups += 1
            self.group = self._groups
        try:
            yield
        finally:
            if outermost:
                self.group = 0

    def called(self, function: str, times: int = 1, up: int = 0) -> None:
        """Note calls of a function that takes no step of its own."""
        if times > 0 and self._observers:
            self.actor.enter(function, times, up)

    @contextlib.contextmanager
    def within(self, function: str) -> Iterator[None]:
        """Note a call of a function that takes no step of its own, and what is called in it."""
        self.called(function)
        self.actor.stack.append(function)
        try:
            yield
        finally:
            self.actor.stack.pop()

    def called_in_turn(self, *calls: tuple[str, Any]) -> None:
        """Note calls of one iteration after another: of each function where its mask is True.

        A mask is a bool array of one value an iteration.
        """
        if self._observers:
            names = [function for function, _ in calls]
            _, which = np.nonzero(np.stack([mask for _, mask in calls], axis=1))
            depth = len(self.actor.stack)
            self.actor.entered.extend([(depth, names[i]) for i in which.tolist()])

    def chunks(self, start: int, stop: int) -> Iterable[tuple[int, int]]:
        """The iterations from ``start`` to ``stop`` of a kernel loop, as many a step as allowed.

        In bulk that is :data:`BLOCK`, for arrays that leave every cache cost several times as much.
        """
        size = min(self.grain, BLOCK, stop - start)
        return ((at, min(at + size, stop)) for at in range(start, stop, max(size, 1)))

    # --- locks ------------------------------------------------------------------------------------
    def new_lock(self, name: str) -> int:
        """A lock that nobody holds."""
        lock = len(self._lock_names)
        self._lock_names.append(name)
        self.reserve("lock.writer", lock)
        return lock

    def holders(self, lock: int) -> tuple[bool, int]:
        """Whether a writer holds the lock, and how many readers do."""
        return bool(self["lock.writer"][lock]), int(self["lock.readers"][lock])

    def _wait(self, lock: int) -> Step:
        name = self._lock_names[lock]
        return self.step(f"It waits until somebody gives up {name}.", lock=name)

    def down_write(self, lock: int) -> Routine[None]:
        """Take a lock for oneself; wait while anybody else holds it."""
        while any(self.holders(lock)):
            yield self._wait(lock)
        self.write("lock.writer", lock, 1)

    def up_write(self, lock: int) -> None:
        """Give up a lock that was taken with :meth:`down_write`."""
        self.write("lock.writer", lock, 0)

    def down_read(self, lock: int) -> Routine[None]:
        """Take a lock beside other readers; wait while a writer holds it."""
        while self["lock.writer"][lock]:
            yield self._wait(lock)
        self.add("lock.readers", lock, 1)

    def up_read(self, lock: int) -> None:
        """Give up a lock that was taken with :meth:`down_read`."""
        self.add("lock.readers", lock, -1)


Machine.declare("lock.writer", np.int32, "1 while somebody holds the lock alone")
Machine.declare("lock.readers", np.int32, "how many hold the lock together")
