"""Operations: public methods that act at once, or give their steps to whoever asks for those."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from hmmlab.model.machine import Routine, Steps

__all__ = ["StepsOf", "operation"]

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")


def operation(
    plan: Callable[Concatenate[S, P], tuple[str, Routine[R]]],
) -> Callable[Concatenate[S, P], R]:
    """Make a public method of a plan: a method that returns a description and a routine.

    ``thing.method(...)`` runs the routine and returns its answer; ``thing.steps.method(...)``
    returns it as :class:`Steps` instead. ``thing`` has a ``machine`` and an ``actor``.
    """

    @functools.wraps(plan)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        answer: R = _prepare(self, plan, *args, **kwargs).run()
        return answer

    run.plan = plan  # type: ignore[attr-defined]
    return run


def _prepare(
    thing: Any, plan: Callable[..., tuple[str, Routine[Any]]], *args: Any, **kw: Any
) -> Steps:
    text, body = plan(thing, *args, **kw)
    return Steps(thing.machine, text, thing.actor, body)


class StepsOf:
    """The operations of a thing, each returned as :class:`Steps` and not run."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __getattr__(self, name: str) -> Callable[..., Steps]:
        plan = getattr(getattr(type(self._thing), name, None), "plan", None)
        if plan is None:
            raise AttributeError(f"{type(self._thing).__name__} has no operation {name!r}")
        return functools.partial(_prepare, self._thing, plan)

    def __dir__(self) -> list[str]:
        kind = type(self._thing)
        return [name for name in dir(kind) if hasattr(getattr(kind, name), "plan")]
