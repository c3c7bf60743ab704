"""Session: operations of the scenario language on a machine, with answers like the recordings'.

Every operation becomes one dict with the keys that a recording of a real kernel has: what it
returned, which notifier ranges it started and which faults it handled, in the kernel's order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hmmlab.answers import Heard, Known
from hmmlab.model.dmirror_device import UNITS
from hmmlab.model.driver import Driver
from hmmlab.model.machine import BULK, Machine
from hmmlab.model.madvise import ADVICE
from hmmlab.model.mmap import KINDS
from hmmlab.model.process import Process
from hmmlab.model.test_hmm import Dmirror
from hmmlab.model.trace import Trace
from hmmlab.operations import Execution, Family
from hmmlab.scenario import Operation, ScenarioError, Scope, parse, parse_line

__all__ = ["Session", "UnsupportedError", "run"]


class UnsupportedError(ValueError):
    """An operation of the language that the model does not have yet."""


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
        self._heard = Heard()
        self.machine.attach(self._heard)
        self.answers: list[dict[str, Any]] = []
        self._scope = Scope()
        self._family: Family = {(): Known(Process(self.machine, "p0"))}

    def __repr__(self) -> str:
        return f"Session({len(self.answers)} operations)"

    @property
    def process(self) -> Process:
        """The process that reads the scenario."""
        return self._family[()].process

    @property
    def devices(self) -> dict[str, Driver]:
        """The open device files by name."""
        return self._family[()].devices

    @property
    def calls(self) -> list[tuple[int, str]]:
        """Depth and name of every kernel function that the last operation called."""
        return list(self._heard.calls)

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
        scope, known = copy.deepcopy(self._scope), self._family[()]
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
        if operation.who not in self._family:
            raise UnsupportedError(f"{operation.who[-1]} was never born: its fork was refused")
        known = self._family[operation.who]
        begun = len(self.trace.operations) if self.trace is not None else 0
        self._heard.clear()
        answer: dict[str, Any] = {"proc": known.process.name, "op": operation.text}
        answer.update(Execution(self.machine, self._family, operation).run())
        if operation.verb not in ("open", "exit"):
            answer["notify"] = self._heard.notify(known)
            answer["faults_handled"] = self._heard.faults_handled(known)
        self.answers.append(answer)
        if self.trace is not None:
            self.trace.operations[begun].result = answer
        return answer


def check_supported(operation: Operation) -> None:
    """Raise UnsupportedError for what the model does not have yet."""
    args = operation.args
    missing = not hasattr(Execution, f"_{operation.verb}")
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
