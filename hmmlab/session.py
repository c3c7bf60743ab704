"""Session: operations of the scenario language on a machine, with answers like the recordings'.

Every operation becomes one dict with the keys that a recording of a real kernel has: what it
returned, which notifier ranges it started and which faults it handled, in the kernel's order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.access import user_access
from hmmlab.model.dmirror_device import UNITS
from hmmlab.model.driver import Answer, Driver
from hmmlab.model.ksm import ksm_scan
from hmmlab.model.machine import BULK, KernelError, Machine, Routine, Steps
from hmmlab.model.madvise import ADVICE, sys_madvise
from hmmlab.model.memory import Faults
from hmmlab.model.mlock import sys_mlock
from hmmlab.model.mmap import KINDS, sys_mmap, sys_munmap
from hmmlab.model.mmu_notifier import EVERYTHING, MmuNotifierRange
from hmmlab.model.move_pages import sys_move_pages
from hmmlab.model.mprotect import sys_mprotect
from hmmlab.model.mremap import sys_mremap
from hmmlab.model.pins import pin_user_pages, unpin_user_pages, vmsplice, vmsplice_end
from hmmlab.model.process import Process
from hmmlab.model.region import REGION_PAGES
from hmmlab.model.state import Rows
from hmmlab.model.task_mmu import (
    PM_FILE,
    PM_MMAP_EXCLUSIVE,
    PM_PRESENT,
    PM_SOFT_DIRTY,
    PM_SWAP,
    clear_refs_soft_dirty,
    read_pagemap,
)
from hmmlab.model.test_hmm import Dmirror
from hmmlab.model.trace import Step, Trace
from hmmlab.scenario import Operation, ScenarioError, Scope, parse, parse_line

__all__ = ["Session", "UnsupportedError", "run"]


class UnsupportedError(ValueError):
    """An operation of the language that the model does not have yet."""


class _Events:
    """An observer that keeps what the steps of one operation tell: events, faults, calls.

    What a kernel thread does after it is not heard; what one does within it raises events, but its
    calls are not the operation's.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all, and follow the next operation."""
        self.steps: list[Step] = []
        self.calls: list[tuple[int, str]] = []
        self._number, self._actor = 0, ""

    def began(self, number: int, text: str, actor: str) -> None:
        if not self._number:
            self._number, self._actor = number, actor

    def ended(self, number: int, result: Any) -> None:
        pass

    def wrote(self, column: str, rows: Rows, old: Any, new: Any) -> None:
        pass

    def stepped(self, number: int, step: Step) -> None:
        if number != self._number:
            return
        if step.actor == self._actor:
            self.calls.extend(step.calls)
        if step.detail is not None:
            self.steps.append(step)

    def called(self, number: int, calls: tuple[tuple[int, str], ...]) -> None:
        if number == self._number:
            self.calls.extend(calls)

    def notify(self) -> Iterator[tuple[MmuNotifierRange, int, int]]:
        """Every range that was started: its series, first page, and page past the last."""
        found: list[_Found] = []
        for step in self.steps:
            if isinstance(step.detail, MmuNotifierRange):
                series = step.detail
                order = series.start if series.order is None else series.order
                rows = zip(order.tolist(), series.start.tolist(), series.end.tolist(), strict=True)
                found += [(step.group, key, (series, start, end)) for key, start, end in rows]
        return _in_kernel_order(found)

    def faults(self) -> Iterator[tuple[Faults, int]]:
        """Every call of handle_mm_fault: what it was, and the page."""
        found = [
            (step.group, vpn, (step.detail, vpn))
            for step in self.steps
            if isinstance(step.detail, Faults)
            for vpn in step.detail.vpns.tolist()
        ]
        return _in_kernel_order(found)


_Found = tuple[int, int, Any]


def _in_kernel_order(found: list[_Found]) -> Iterator[Any]:
    """Sort what each loop that was taken in bulk did by iteration, and nothing else."""
    at = 0
    while at < len(found):
        end = at + 1
        while end < len(found) and found[end][0] == found[at][0] != 0:
            end += 1
        yield from (item for _, _, item in sorted(found[at:end], key=lambda entry: entry[1]))
        at = end


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
        self._scope = Scope()
        self._known: dict[tuple[str, ...], _Known] = {(): _Known(Process(self.machine, "p0"))}

    def __repr__(self) -> str:
        return f"Session({len(self.answers)} operations)"

    @property
    def process(self) -> Process:
        """The process that reads the scenario."""
        return self._known[()].process

    @property
    def devices(self) -> dict[str, Driver]:
        """The open device files by name."""
        return self._known[()].devices

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
        UnsupportedError
            When the model does not have it yet; nothing has happened then.
        """
        scope = self._names()
        operation = parse_line(len(self.answers) + 1, line, scope)
        if operation is None:
            raise ScenarioError("expected an operation, not an empty line or a remark")
        answer = self.perform(operation)
        self._scope = scope
        return answer

    def _names(self) -> Scope:
        """The scenario's names, and those that the process was given by its own methods."""
        scope, known = copy.deepcopy(self._scope), self._known[()]
        scope.mapped += [name for name in known.process.regions if name not in scope.mapped]
        for name, file in known.process.files.items():
            opened = isinstance(file, Dmirror) and self.machine["device_file.users"][file.file]
            if opened and name not in scope.devices:
                scope.devices.append(name)
                known.devices[name] = file
                known.mms[known.process.mm] = known.process.name
        return scope

    def play(self, scenario: str | Path | Iterable[str]) -> Session:
        """Run a whole scenario, a file or its lines, and return the session.

        Raises
        ------
        ScenarioError
            When a line is no operation; nothing has happened then.
        UnsupportedError
            When the model does not have one yet; nothing has happened then.
        """
        if isinstance(scenario, str | Path):
            name, text = str(scenario), Path(scenario).read_text(encoding="utf-8")
        else:
            name, text = "scenario", "\n".join(scenario)
        scope = self._names()
        operations = parse(text, name, scope)
        for operation in operations:
            check_supported(operation)
        self._scope = scope
        for operation in operations:
            self.perform(operation)
        return self

    def perform(self, operation: Operation) -> dict[str, Any]:
        """Run one parsed operation and return its answer."""
        check_supported(operation)
        if operation.who not in self._known:
            raise UnsupportedError(f"{operation.who[-1]} was never born: its fork was refused")
        known = self._known[operation.who]
        begun = len(self.trace.operations) if self.trace is not None else 0
        self._events.clear()
        answer: dict[str, Any] = {"proc": known.process.name, "op": operation.text}
        answer.update(getattr(self, f"_{operation.verb}")(operation, known, operation.args))
        if operation.verb not in ("open", "exit"):
            answer["notify"] = self._notify(known)
            answer["faults_handled"] = self._faults(known)
        self.answers.append(answer)
        if self.trace is not None:
            self.trace.operations[begun].result = answer
        return answer

    def _run(self, operation: Operation, known: _Known, body: Routine[Any]) -> tuple[int, Any]:
        """``ret`` of an operation, and what it returned where it succeeded."""
        driver = known.devices.get(operation.args.get("device", ""))
        actor = driver.actor if driver and operation.verb != "mmap" else known.process.actor
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
        start = process.region(args["region"], 0).start + args["off"]
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

    def _fork(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        ret, child = self._run(operation, known, known.process.clone(args["child"]))
        if child is None:
            return {"ret": ret}
        who = (*operation.who, args["child"])
        self._known[who] = _Known(child, dict(known.devices), dict(known.mms))
        return {"ret": ret}

    def _exit(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        who = (*operation.who, args["child"])
        ended = [self._known.pop(key) for key in sorted(self._known) if key[: len(who)] == who]

        def leave() -> Routine[None]:  # children of the child hear no more, and leave after it
            for child in ended:
                yield from child.process.do_exit()

        return {"ret": self._run(operation, ended[0], leave())[0]}

    def _mmap(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        process = known.process
        where = process.region(args["region"], args["pages"])
        start = where.start
        if "at_region" in args:
            start = process.regions[args["at_region"]] + args["at_off"]
        device_file = known.devices[args["device"]].file if "device" in args else 0
        body = sys_mmap(
            self.machine,
            process.mm,
            start,
            args["pages"],
            args["prot"],
            args["kind"],
            device_file,
        )
        return {"ret": self._run(operation, known, body)[0]}

    def _munmap(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        return self._call(sys_munmap, operation, known)

    def _mprotect(
        self, operation: Operation, known: _Known, args: dict[str, Any]
    ) -> dict[str, Any]:
        return self._call(sys_mprotect, operation, known, args["prot"])

    def _madvise(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        return self._call(sys_madvise, operation, known, args["advice"])

    def _mlock(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        return self._call(sys_mlock, operation, known)

    def _mremap(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        process, start, stop = self._span(known, args)
        to = process.region(args["new"], args["pages"]).start
        body = sys_mremap(self.machine, process.mm, start, stop - start, to)
        return {"ret": self._run(operation, known, body)[0]}

    def _clear_refs(
        self, operation: Operation, known: _Known, args: dict[str, Any]
    ) -> dict[str, Any]:
        body = clear_refs_soft_dirty(self.machine, known.process.mm)
        return {"ret": self._run(operation, known, body)[0]}

    def _ksm(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        process, start, stop = self._span(known, args)
        ret, shared = self._run(operation, known, ksm_scan(self.machine, process.mm, start, stop))
        return {"ret": ret or shared}

    def _move_pages(
        self, operation: Operation, known: _Known, args: dict[str, Any]
    ) -> dict[str, Any]:
        process, start, stop = self._span(known, args)
        body = sys_move_pages(self.machine, process.mm, start, stop, args["node"])
        ret, found = self._run(operation, known, body)
        return {"status": found[1].tolist(), "ret": ret or found[0]}

    def _hold(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        process, start, stop = self._span(known, args)
        ret, held = self._run(operation, known, vmsplice(self.machine, process.mm, start, stop))
        return {"ret": ret or held}

    def _unhold(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        body = vmsplice_end(self.machine, known.process.mm)
        return {"ret": self._run(operation, known, body)[0]}

    def _pin(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        return self._call(pin_user_pages, operation, known)

    def _unpin(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        body = unpin_user_pages(self.machine, known.process.mm)
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
            self.machine.called("walk_page_range", stop - start)  # the recorder asks page by page
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
        *,
        data: bool = False,
    ) -> dict[str, Any]:
        """``routine`` of the device, which gets the first page and the page past the last."""
        _, start, stop = self._span(known, operation.args)
        ret, answer = self._run(operation, known, _checked(routine, start, stop))
        answer = answer or Answer()
        found = {"ret": ret, "cpages": answer.cpages, "faults": answer.faults}
        if answer.data is not None and data and not ret:
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

    def _exclusive(
        self, operation: Operation, known: _Known, args: dict[str, Any]
    ) -> dict[str, Any]:
        return self._ioctl(operation, known, _dmirror(known, args).make_exclusive, data=True)

    def _check_exclusive(
        self, operation: Operation, known: _Known, args: dict[str, Any]
    ) -> dict[str, Any]:
        return self._ioctl(operation, known, _dmirror(known, args).check_atomic)

    def _release(self, operation: Operation, known: _Known, args: dict[str, Any]) -> dict[str, Any]:
        ret, answer = self._run(operation, known, _dmirror(known, args).release_memory())
        return {"ret": ret, "cpages": answer.cpages, "faults": answer.faults}

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


def _counting(first: int, pages: int) -> NDArray[np.uint64]:
    return np.uint64(first) + np.arange(pages, dtype=np.uint64)


def check_supported(operation: Operation) -> None:
    """Raise UnsupportedError for what the model does not have yet."""
    args = operation.args
    missing = not hasattr(Session, f"_{operation.verb}")
    missing |= operation.verb == "mmap" and args["kind"] not in KINDS
    missing |= operation.verb == "madvise" and args["advice"] not in ADVICE
    missing |= operation.verb == "open" and args["unit"] not in UNITS
    if missing:
        raise UnsupportedError(f"the model does not have {operation.text!r} yet")


def run(operations: list[Operation], session: Session | None = None) -> Iterator[dict[str, Any]]:
    """Run operations one after another on a session, by default a new one without a trace."""
    session = session if session is not None else Session(record=False)
    for operation in operations:
        yield session.perform(operation)
