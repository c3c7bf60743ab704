"""What an exercise is, and how an answer to it is judged. Nothing here draws or prints.

An exercise runs the model on inputs that the learner does not see, drawn from a seed, and holds
the answer against the rule. Silence is right: :meth:`Exercise.rule` raises :class:`Wrong` with a
reason and the step at which the answer goes wrong, and returns where nothing does.
"""

from __future__ import annotations

import dis
import enum
import inspect
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from hmmlab.model.driver import Driver
from hmmlab.model.machine import Actor, KernelError, Machine, Steps
from hmmlab.model.process import Process
from hmmlab.model.trace import Trace

__all__ = ["Exercise", "Kind", "Trial", "Verdict", "Wrong", "attempted"]

D = TypeVar("D", bound=Driver)

#: Steps, or calls within one, after which a learner's driver is said never to end.
_PATIENCE = 2000


class Wrong(Exception):  # noqa: N818 - a verdict, not a failure of the program
    """The answer is wrong, for a reason; ``position`` of ``trace`` is where it shows.

    Where there is no step to show, ``trace`` is None.
    """

    def __init__(self, reason: str, trace: Trace | None = None, position: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.trace, self.position = reason, trace, position


class Kind(enum.Enum):
    """The three things that can be said of an answer."""

    RIGHT = "right"
    WRONG = "wrong"
    NOT_ATTEMPTED = "not attempted"


@dataclass(frozen=True)
class Verdict:
    """What is said of an answer, and where it shows, as in :class:`Wrong`."""

    kind: Kind
    reason: str = ""
    trace: Trace | None = None
    position: int = 0


class _Impatient(Actor):
    """An actor that does not go round for ever between two steps."""

    def __init__(self, name: str, trial: Trial) -> None:
        super().__init__(name)
        self.trial = trial

    def enter(self, function: str, times: int = 1, up: int = 0) -> None:
        """Note the call, unless there were too many."""
        super().enter(function, times, up)
        if len(self.entered) > _PATIENCE:
            raise self.trial.wrong(f"It never ends: it calls {function} again and again.")


class Trial:
    """One run of the model for one answer: a fresh machine that is recorded, and a process.

    Attributes
    ----------
    rng
        Draws the input; the same seed and round give the same input.
    round
        Which of an exercise's rounds it is, from 0.
    """

    def __init__(self, rng: np.random.Generator, round: int = 0) -> None:
        self.rng, self.round = rng, round
        self.machine = Machine()
        self.trace = self.machine.record()
        self.process = Process(self.machine)

    def wrong(self, reason: str, position: int | None = None) -> Wrong:
        """The answer is wrong at ``position``, by default at the last step. Raise what it returns.

        >>> raise trial.wrong("page 3 is stale")
        """
        return Wrong(reason, self.trace, len(self.trace) if position is None else position)

    def attach(self, driver: type[D]) -> D:
        """Let a learner's driver mirror the process. It may not go round for ever."""
        device = self.process.attach(driver)
        device.actor = _Impatient(device.name, self)
        return device

    def finish(self, steps: Steps) -> Any:
        """Run steps to their end and return the operation's answer.

        Raises
        ------
        Wrong
            When they do not end, or wait for what nobody will give up.
        KernelError
            What the kernel refuses.
        """
        for count, step in enumerate(steps):
            if step.lock:
                raise self.wrong(f"{steps.text!r} waits for {step.lock}, and nobody gives it up.")
            if count > _PATIENCE:
                raise self.wrong(f"It never ends: {steps.text!r} has taken {count} steps.")
        return steps.result


class Exercise:
    """One question to the learner; the docstring of a subclass is its text.

    Parameters
    ----------
    seed
        Draws the inputs. A teacher's variant is the same exercise with another seed.

    Attributes
    ----------
    answer
        Name that the starter and the solution define.
    starter, model_answer
        Python that the learner begins with, and that passes.
    hints
        Each says a little more than the one before.
    rounds
        How many inputs an answer is tried on.
    """

    answer: ClassVar[str]
    starter: ClassVar[str]
    model_answer: ClassVar[str] = ""
    hints: ClassVar[tuple[str, ...]]
    rounds: ClassVar[int] = 6

    def __init__(self, seed: int = 1) -> None:
        self.seed = seed

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seed={self.seed})"

    def trial(self, round: int = 0) -> Trial:
        """A fresh trial with the input of one round."""
        return Trial(np.random.default_rng([self.seed, round]), round)

    def question(self) -> str:
        """What is asked."""
        return inspect.cleandoc(type(self).__doc__ or "")

    def solution(self) -> str:
        """Python that defines a right answer."""
        return inspect.cleandoc(self.model_answer)

    def rule(self, answer: Any, trial: Trial) -> None:
        """Try ``answer`` on one input. Silence is right.

        Raises
        ------
        Wrong
            When it breaks the rule.
        """
        raise NotImplementedError

    def judge(self, answer: Any) -> Verdict:
        """Try ``answer`` on every input, and say what came of it."""
        if not attempted(answer):
            return Verdict(Kind.NOT_ATTEMPTED)
        for round in range(self.rounds):
            trial = self.trial(round)
            try:
                self.rule(answer, trial)
            except Wrong as wrong:
                return Verdict(Kind.WRONG, wrong.reason, wrong.trace, wrong.position)
            except NotImplementedError:
                return Verdict(Kind.NOT_ATTEMPTED)
            except Exception as error:  # the learner's code may raise anything
                return self._raised(error, trial)
        return Verdict(Kind.RIGHT)

    @staticmethod
    def _raised(error: Exception, trial: Trial) -> Verdict:
        what = str(error) if isinstance(error, KernelError) else f"{type(error).__name__}: {error}"
        steps = len(trial.trace)
        return Verdict(Kind.WRONG, f"It raised {what}.", trial.trace if steps else None, steps)


# --- was anything written? ------------------------------------------------------------------------

#: What a body of ``...``, ``pass`` or a docstring compiles to.
_NOTHING = {"RESUME", "NOP", "COPY_FREE_VARS", "POP_TOP", "RETURN_VALUE", "CACHE"}
_NOTHING |= {"RETURN_GENERATOR", "LOAD_CONST", "RETURN_CONST"}


def attempted(answer: Any) -> bool:
    """Whether an answer holds more than its starter's ``...`` does.

    ``...`` anywhere in it, ``None``, an empty collection, a function without a body and a class
    with such a function are no attempt.
    """
    if answer is None or answer is ...:
        return False
    if isinstance(answer, type):
        functions = [f for f in vars(answer).values() if isinstance(f, types.FunctionType)]
        return all(map(attempted, functions)) and not any(v is ... for v in vars(answer).values())
    if isinstance(answer, types.FunctionType):
        return _has_a_body(answer)
    if isinstance(answer, str):
        return answer.strip() not in ("", "...")
    if isinstance(answer, np.ndarray):
        return bool(answer.size)
    if isinstance(answer, Mapping):
        return bool(answer) and all(map(attempted, answer.values()))
    if isinstance(answer, Iterable):
        items = list(answer)
        return bool(items) and all(map(attempted, items))
    return True


def _has_a_body(function: types.FunctionType) -> bool:
    constants = function.__code__.co_consts
    if any(constant is ... for constant in constants):
        return False
    nothing = (None, function.__doc__)
    return any(
        step.opname not in _NOTHING
        or (step.opname.endswith("_CONST") and step.argval not in nothing)
        for step in dis.get_instructions(function)
    )
