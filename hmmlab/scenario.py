"""The scenario language: parse it, run it on a machine, and give the answers of the recordings.

A scenario is a text with one operation a line. :func:`parse` checks all of it before anything runs;
a :class:`Session` runs operations one by one on a machine of its own, and answers each with the
same keys as the recordings of a real kernel have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from hmmlab.model.driver import Answer, Driver
from hmmlab.model.machine import BULK, KernelError, Machine, Routine, Steps
from hmmlab.model.memory import Faults, user_access
from hmmlab.model.mm_types import flags_of_prot
from hmmlab.model.mmap import (
    sys_madvise_dontneed,
    sys_mmap,
    sys_mprotect,
    sys_mremap,
    sys_munmap,
)
from hmmlab.model.mmu_notifier import EVERYTHING, MmuNotifierRange
from hmmlab.model.pagemap import (
    PM_FILE,
    PM_MMAP_EXCLUSIVE,
    PM_PRESENT,
    PM_SOFT_DIRTY,
    PM_SWAP,
    read_pagemap,
)
from hmmlab.model.process import Process
from hmmlab.model.region import REGION_PAGES
from hmmlab.model.state import Rows
from hmmlab.model.test_hmm import PRIVATE_UNITS, Dmirror
from hmmlab.model.trace import Step, Trace

__all__ = ["Operation", "ScenarioError", "Session", "Unsupported", "parse", "run"]

ADVICE = (
    "dontneed free hugepage nohugepage pageout cold remove populate_read populate_write collapse "
    "wipeonfork dontfork"
).split()
KINDS = ("private", "shared", "file_private", "file_shared", "hugetlb", "mixed")
UNITS = (0, 1, 2, 3)

_RANGE = ("region", "off", "pages")
_DEVICE_RANGE = ("device", *_RANGE)

#: What each operation takes. A trailing mark of ``mmap`` is parsed by hand.
_GRAMMAR: dict[str, tuple[str, ...]] = {
    "open": ("new device", "unit"),
    "close": ("device",),
    "mmap": ("new region", "pages", "prot", "kind"),
    "munmap": _RANGE,
    "mprotect": (*_RANGE, "prot"),
    "mremap": (*_RANGE, "new region"),
    "madvise": (*_RANGE, "advice"),
    "mlock": _RANGE,
    "load": _RANGE,
    "store": (*_RANGE, "value"),
    "read": _DEVICE_RANGE,
    "write": (*_DEVICE_RANGE, "value"),
    "to_dev": _DEVICE_RANGE,
    "to_sys": _DEVICE_RANGE,
    "snapshot": _DEVICE_RANGE,
    "exclusive": _DEVICE_RANGE,
    "check_exclusive": _DEVICE_RANGE,
    "release": ("device",),
    "fork": ("new child",),
    "exit": ("child",),
    "pin": _RANGE,
    "unpin": (),
    "hold": _RANGE,
    "unhold": (),
    "clear_refs": ("clear",),
    "ksm": _RANGE,
    "move_pages": (*_RANGE, "node"),
    "pagemap": _RANGE,
}


class ScenarioError(ValueError):
    """A line that is no operation: what was expected there."""


class Unsupported(Exception):
    """An operation of the language that the model does not have yet."""


class Operation(NamedTuple):
    """One parsed line.

    ``text`` is the operation as written, without ``on CHILD``; ``who`` is the chain of children it
    is for, empty for the process that reads the scenario; ``args`` has a value for each word.
    """

    line: int
    text: str
    who: tuple[str, ...]
    verb: str
    args: dict[str, Any]


# --- parsing --------------------------------------------------------------------------------------


@dataclass
class _Scope:
    """The names that one process knows."""

    regions: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    children: dict[str, _Scope] = field(default_factory=dict)


def _number(word: str, what: str, last: int) -> int:
    try:
        value = int(word, 16 if word.startswith("0x") else 10)
    except ValueError:
        value = -1
    if not 0 <= value <= last or not word[0].isdigit() or "_" in word or not word.isascii():
        raise ScenarioError(f"expected {what}, a number from 0 to {last}, not {word!r}")
    return value


def _word(kind: str, word: str, scope: _Scope) -> Any:
    """The value of one word where ``kind`` is expected."""
    if kind == "value":
        return _number(word, "a value", (1 << 64) - 1)
    if kind in ("off", "pages"):
        return _number(word, "a number of pages", REGION_PAGES)
    choices: tuple[str, ...] = ()
    if kind == "region":
        choices = tuple(scope.regions)
    elif kind == "device":
        choices = tuple(scope.devices)
    elif kind == "child":
        choices = tuple(scope.children)
    elif kind == "kind":
        choices = KINDS
    elif kind == "advice":
        choices = tuple(ADVICE)
    elif kind in ("unit", "node", "clear"):
        choices = {"unit": ("0", "1", "2", "3"), "node": ("0", "1"), "clear": ("4",)}[kind]
    elif kind == "prot":
        try:
            flags_of_prot(word)
        except ValueError as error:
            raise ScenarioError(f"expected a protection: {error}") from None
        return word
    elif not (word.isascii() and word.isidentifier() and len(word) < 16):
        raise ScenarioError(f"expected a name for a {kind.split()[1]}, not {word!r}")
    else:
        return word
    if word not in choices:
        known = ", ".join(choices) or "none is known here yet"
        raise ScenarioError(f"expected {_A[kind]}, one of {known}; not {word!r}")
    return int(word) if kind in ("unit", "node", "clear") else word


_A = {
    "region": "a region",
    "device": "an open device",
    "child": "a child",
    "kind": "a kind of mapping",
    "advice": "an advice",
    "unit": "a unit",
    "node": "a node",
    "clear": "what to clear",
}


def _parse_words(words: list[str], scope: _Scope) -> tuple[tuple[str, ...], str, dict[str, Any]]:
    """Who, verb and arguments of a line; tells ``scope`` the names it makes."""
    verb = words[0]
    if verb == "on":
        if len(words) < 3:
            raise ScenarioError("expected 'on CHILD OPERATION'")
        child = _word("child", words[1], scope)
        who, verb, args = _parse_words(words[2:], scope.children[child])
        return (child, *who), verb, args
    if verb not in _GRAMMAR:
        raise ScenarioError(f"expected an operation, not {verb!r}")
    kinds, rest = _GRAMMAR[verb], words[1:]
    args: dict[str, Any] = {}
    if verb == "mmap" and len(rest) > len(kinds):
        args, rest = _mmap_tail(rest, scope)
    if len(rest) != len(kinds):
        wanted = " ".join(kind.split()[-1].upper() for kind in kinds)
        raise ScenarioError(f"expected '{(verb + ' ' + wanted).strip()}', not {' '.join(words)!r}")
    for kind, word in zip(kinds, rest, strict=True):
        args[kind.split()[-1] if kind != "new region" or verb == "mmap" else "new"] = _word(
            kind, word, scope
        )
    if args.get("kind") == "mixed" and "device" not in args:
        raise ScenarioError("expected 'mmap REGION PAGES PROT mixed DEVICE'")
    if args.get("off", 0) + args.get("pages", 0) > REGION_PAGES:
        raise ScenarioError(f"expected at most {REGION_PAGES} pages of a region")
    _tell(scope, verb, args)
    return (), verb, args


def _mmap_tail(rest: list[str], scope: _Scope) -> tuple[dict[str, Any], list[str]]:
    """``mixed DEVICE`` or ``at REGION OFF`` behind the four words of an mmap."""
    head, tail = rest[:4], rest[4:]
    if head[3] == "mixed" and len(tail) == 1:
        return {"device": _word("device", tail[0], scope)}, head
    if len(tail) == 3 and tail[0] == "at":
        at = {"at_region": _word("region", tail[1], scope), "at_off": _word("off", tail[2], scope)}
        return at, head
    raise ScenarioError("expected 'at REGION OFF' or 'mixed DEVICE' behind an mmap")


def _tell(scope: _Scope, verb: str, args: dict[str, Any]) -> None:
    new = args.get("new") or (args.get("region") if verb == "mmap" else None)
    if new and new not in scope.regions:
        scope.regions.append(new)
    if verb == "open":
        if args["device"] in scope.devices:
            raise ScenarioError(f"expected a new name, {args['device']!r} is open already")
        scope.devices.append(args["device"])
    elif verb == "close":
        scope.devices.remove(args["device"])
    elif verb == "fork":
        if args["child"] in scope.children:
            raise ScenarioError(f"expected a new name, {args['child']!r} is alive")
        child = _Scope(list(scope.regions), list(scope.devices))
        scope.children[args["child"]] = child
    elif verb == "exit":
        del scope.children[args["child"]]


def _parse_line(line: int, text: str, scope: _Scope) -> Operation | None:
    words = text.split()
    if not words or words[0].startswith("#"):
        return None
    who, verb, args = _parse_words(words, scope)
    for _ in who:
        text = text.strip().split(None, 2)[2]
    return Operation(line, text.strip(), who, verb, args)


def parse(text: str, name: str = "scenario") -> list[Operation]:
    """The operations of a scenario.

    Raises
    ------
    ScenarioError
        ``name:line: what was expected`` for the first line that is none.
    """
    scope, operations = _Scope(), []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            operation = _parse_line(number, line, scope)
        except ScenarioError as error:
            raise ScenarioError(f"{name}:{number}: {error}") from None
        if operation:
            operations.append(operation)
    return operations


# --- answers --------------------------------------------------------------------------------------


class _Events:
    """An observer that keeps what notifiers and faults a step tells of."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.calls: list[tuple[int, str]] = []

    def began(self, text: str, actor: str) -> None:
        self.steps.clear()
        self.calls.clear()

    def ended(self, result: Any) -> None:
        pass

    def wrote(self, column: str, rows: Rows, old: Any, new: Any) -> None:
        pass

    def stepped(self, step: Step) -> None:
        self.calls.extend(step.calls)
        if step.detail is not None:
            self.steps.append(step)

    def notify(self) -> Iterator[tuple[MmuNotifierRange, int, int]]:
        """Every range that was started: its series, first page, and page past the last."""
        found = [
            (step.group, int(s), int(e), step.detail)
            for step in self.steps
            if isinstance(step.detail, MmuNotifierRange)
            for s, e in zip(step.detail.start, step.detail.end, strict=True)
        ]
        return ((detail, s, e) for _, s, e, detail in _in_kernel_order(found))

    def faults(self) -> Iterator[tuple[Faults, int]]:
        """Every call of handle_mm_fault: what it was, and the page."""
        found = [
            (step.group, int(vpn), 0, step.detail)
            for step in self.steps
            if isinstance(step.detail, Faults)
            for vpn in step.detail.vpns
        ]
        return ((detail, vpn) for _, vpn, _, detail in _in_kernel_order(found))


_Found = tuple[int, int, int, Any]


def _in_kernel_order(found: list[_Found]) -> list[_Found]:
    """Sort the iterations of each loop that was taken in bulk by page, and nothing else."""
    ordered: list[_Found] = []
    at = 0
    while at < len(found):
        end = at + 1
        while end < len(found) and found[end][0] == found[at][0] != 0:
            end += 1
        ordered += sorted(found[at:end], key=lambda item: item[1])
        at = end
    return ordered


@dataclass
class _Known:
    """What one process of a scenario has names for."""

    process: Process
    devices: dict[str, Driver] = field(default_factory=dict)
    mms: dict[int, str] = field(default_factory=dict)


_PAGEMAP = (
    (PM_PRESENT, "P"),
    (PM_SWAP, "S"),
    (PM_FILE, "F"),
    (PM_MMAP_EXCLUSIVE, "X"),
    (PM_SOFT_DIRTY, "D"),
)


class Session:
    """Operations of the scenario language, run one by one on a machine.

    Parameters
    ----------
    machine
        Where to run; by default a new machine.
    grain
        Grain of the new machine: 1 makes a step of every page.

    Attributes
    ----------
    machine, trace
        Where it runs, and the record of it.
    answers
        One dict an operation, with the keys of the recordings.
    """

    def __init__(
        self, machine: Machine | None = None, *, grain: int = BULK, record: bool = True
    ) -> None:
        self.machine = machine if machine is not None else Machine(grain=grain)
        self.trace: Trace | None = self.machine.record() if record else None
        self._events = _Events()
        self.machine.attach(self._events)
        self.answers: list[dict[str, Any]] = []
        self._scope = _Scope()
        self._known = {"p0": _Known(Process(self.machine, "p0"))}

    def __repr__(self) -> str:
        return f"Session({len(self.answers)} operations)"

    @property
    def process(self) -> Process:
        """The process that reads the scenario."""
        return self._known["p0"].process

    @property
    def devices(self) -> dict[str, Driver]:
        """The open device files by name."""
        return self._known["p0"].devices

    @property
    def calls(self) -> list[tuple[int, str]]:
        """Depth and name of every kernel function that the last operation called."""
        return list(self._events.calls)

    def do(self, line: str) -> dict[str, Any]:
        """Run one operation, such as ``store A 0 4 100``, and return its answer.

        Raises
        ------
        ScenarioError
            When it is no operation; nothing has happened then.
        Unsupported
            When the model does not have it yet; nothing has happened then.
        """
        scope = copy.deepcopy(self._scope)
        operation = _parse_line(len(self.answers) + 1, line, scope)
        if operation is None:
            raise ScenarioError("expected an operation, not an empty line or a remark")
        answer = self.perform(operation)
        self._scope = scope
        return answer

    def perform(self, operation: Operation) -> dict[str, Any]:
        """Run one parsed operation and return its answer."""
        check_supported(operation)
        name = operation.who[-1] if operation.who else "p0"
        known = self._known[name]
        answer: dict[str, Any] = {"proc": name, "op": operation.text}
        answer.update(getattr(self, f"_{operation.verb}")(operation, known, operation.args))
        if operation.verb not in ("open",):
            answer["notify"] = self._notify(known)
            answer["faults_handled"] = self._faults(known)
        self.answers.append(answer)
        if self.trace is not None:
            self.trace.operations[-1].result = answer
        return answer

    def _run(self, operation: Operation, known: _Known, body: Routine[Any]) -> tuple[int, Any]:
        """``ret`` of an operation, and what it returned where it succeeded."""
        driver = known.devices.get(operation.args.get("device", ""))
        actor = driver.actor if driver else known.process.actor
        try:
            return 0, Steps(self.machine, operation.text, actor, body).run()
        except KernelError as error:
            return (-error.signal if error.signal else -error.errno), None

    # --- events in the reader's names -------------------------------------------------------------
    def _place(self, known: _Known, vpn: int) -> tuple[str, int] | None:
        for name, first in known.process.regions.items():
            if first <= vpn < first + REGION_PAGES:
                return name, first
        return None

    def _notify(self, known: _Known) -> list[dict[str, Any]]:
        events = []
        for range, start, end in self._events.notify():
            place = self._place(known, start)
            if start == 0 and end == EVERYTHING:
                region, first, last = "*", 0, -1
            elif place:
                region, first, last = place[0], start - place[1], end - place[1]
            else:
                continue
            events.append(
                {
                    "mm": known.mms.get(range.mm, "?"),
                    "event": range.event.name,
                    "region": region,
                    "start": first,
                    "end": last,
                    "owner": int(range.owner != 0),
                }
            )
        return events

    def _faults(self, known: _Known) -> list[list[Any]]:
        calls = []
        for faults, vpn in self._events.faults():
            place = self._place(known, vpn)
            if place:
                calls.append([place[0], vpn - place[1], int(faults.write), int(faults.remote)])
        return calls

    # --- the operations ---------------------------------------------------------------------------
    def _span(self, known: _Known, args: dict[str, Any]) -> tuple[Process, int, int]:
        process = known.process
        start = process.regions[args["region"]] + args["off"]
        return process, start, start + args["pages"]

    def _call(
        self, routine: Callable[..., Routine[Any]], operation: Operation, known: _Known, *rest: Any
    ) -> dict[str, Any]:
        process, start, stop = self._span(known, operation.args)
        body = routine(self.machine, process.mm, start, stop, *rest)
        return {"ret": self._run(operation, known, body)[0]}

    def _open(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        process = known.process
        driver = Dmirror(process, args["device"], args["unit"] + 1)
        process.files[args["device"]] = known.devices[args["device"]] = driver
        known.mms[process.mm] = process.name
        return {"ret": self._run(operation, known, driver.open_file())[0]}

    def _close(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        answer = {"ret": self._run(operation, known, known.devices[args["device"]].close_file())[0]}
        del known.devices[args["device"]], known.process.files[args["device"]]
        return answer

    def _mmap(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        process = known.process
        where = process.region(args["region"], args["pages"])
        start = where.start
        if "at_region" in args:
            start = process.regions[args["at_region"]] + args["at_off"]
        body = sys_mmap(self.machine, process.mm, start, args["pages"], args["prot"])
        return {"ret": self._run(operation, known, body)[0]}

    def _munmap(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        return self._call(sys_munmap, operation, known)

    def _mprotect(
        self, operation: Operation, known: _Known, args: dict[str, Any]
    ) -> dict[str, Any]:
        return self._call(sys_mprotect, operation, known, args["prot"])

    def _madvise(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        return self._call(sys_madvise_dontneed, operation, known)

    def _mremap(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        process, start, stop = self._span(known, args)
        to = process.region(args["new"], args["pages"]).start
        body = sys_mremap(self.machine, process.mm, start, stop - start, to)
        return {"ret": self._run(operation, known, body)[0]}

    def _load(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        process, start, stop = self._span(known, args)
        body = user_access(self.machine, process.mm, start, stop)
        ret, data = self._run(operation, known, body)
        return {"ret": ret} if ret else {"data": data.tolist(), "ret": ret}

    def _store(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        process, start, stop = self._span(known, args)
        values = _counting(args["value"], stop - start)
        body = user_access(self.machine, process.mm, start, stop, values)
        return {"ret": self._run(operation, known, body)[0]}

    def _pagemap(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        process, start, stop = self._span(known, args)

        def look() -> Routine[Any]:
            yield self.machine.step("/proc/self/pagemap is read.", process.mm, start, stop)
            return read_pagemap(self.machine, process.mm, start, stop)

        ret, words = self._run(operation, known, look())
        letters = [
            "".join(letter for bit, letter in _PAGEMAP if word & bit) for word in words.tolist()
        ]
        return {"pagemap": letters, "ret": ret}

    # --- the device's operations ------------------------------------------------------------------
    def _ioctl(
        self,
        operation: Operation,
        known: _Known,
        routine: Callable[..., Routine[Answer]],
        *, data: bool = False,
    ) -> dict[str, Any]:
        """``routine`` of the device, which gets the first page and the page past the last."""
        _, start, stop = self._span(known, operation.args)
        ret, answer = self._run(operation, known, _checked(routine, start, stop))
        answer = answer or Answer()
        found = {"ret": ret, "cpages": answer.cpages, "faults": answer.faults}
        if data and not ret:
            found["data"] = answer.data.tolist()
        return found

    def _read(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        driver = known.devices[args["device"]]
        return self._ioctl(operation, known, driver.read_pages, data=True)

    def _write(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        driver = known.devices[args["device"]]
        return self._ioctl(
            operation,
            known,
            lambda start, stop: driver.write_pages(start, _counting(args["value"], stop - start)),
        )

    def _to_dev(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        return self._ioctl(operation, known, _dmirror(known, args).migrate_to_device, data=True)

    def _to_sys(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        return self._ioctl(operation, known, _dmirror(known, args).migrate_to_system)

    def _snapshot(
        self, operation: Operation, known: _Known, args: dict[str, Any]
    ) -> dict[str, Any]:
        out = np.zeros(args["pages"], np.uint8)
        driver = _dmirror(known, args)
        found = self._ioctl(operation, known, lambda start, _: driver.snapshot_pages(start, out))
        return {**found, "snapshot": out.tobytes().hex()} if out.size else found


def _dmirror(known: _Known, args: dict[str, Any]) -> Dmirror:
    driver = known.devices[args["device"]]
    assert isinstance(driver, Dmirror)
    return driver


def _checked(routine: Callable[..., Routine[Answer]], start: int, stop: int) -> Routine[Answer]:
    """The routine, or EINVAL for no pages, which every command of the test device refuses."""
    if stop <= start:
        raise KernelError(22, "no pages")
    return (yield from routine(start, stop))


def _counting(first: int, pages: int) -> np.ndarray:
    return np.uint64(first) + np.arange(pages, dtype=np.uint64)


def check_supported(operation: Operation) -> None:
    """Raise Unsupported for what the model does not have yet."""
    args = operation.args
    missing = not hasattr(Session, f"_{operation.verb}")
    missing |= bool(operation.who)
    missing |= operation.verb == "mmap" and args["kind"] != "private"
    missing |= operation.verb == "madvise" and args["advice"] != "dontneed"
    missing |= operation.verb == "open" and args["unit"] not in PRIVATE_UNITS
    if missing:
        raise Unsupported(f"the model does not have {operation.text!r} yet")


def run(operations: list[Operation], session: Session | None = None) -> Iterator[dict[str, Any]]:
    """Run operations one after another on a session, by default a new one without a trace."""
    session = session if session is not None else Session(record=False)
    for operation in operations:
        yield session.perform(operation)
