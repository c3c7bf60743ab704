"""The learner's desk: an exercise with ``check()``, ``hint()`` and ``solution()``, which show.

What is right is known to :mod:`hmmlab.exercises.rules` only; here it is said and drawn.
"""

from __future__ import annotations

from textwrap import fill
from typing import Any

from hmmlab.exercises.progress import Progress
from hmmlab.exercises.rules import Exercise, Kind, Verdict

__all__ = ["Desk"]

#: Characters of a line; a notebook would break a longer one within a word.
_WIDTH = 100


class Desk:
    """An exercise on the learner's desk; ``print(desk)`` says what is asked."""

    def __init__(self, exercise: Exercise, name: str) -> None:
        self.exercise, self.name = exercise, name
        self._hints_given = 0

    def __repr__(self) -> str:
        return f"Desk({self.exercise!r})"

    def __str__(self) -> str:
        return self.exercise.question()

    def check(self, answer: Any) -> None:
        """Judge an answer, say so, and show the step at which a wrong one goes wrong.

        What came of it is kept in the learner's :class:`~hmmlab.exercises.progress.Progress`.
        """
        verdict = self.exercise.judge(answer)
        for line in self.say(verdict).splitlines():
            print(fill(line, _WIDTH))
        self._keep(verdict)
        if verdict.kind is Kind.WRONG and verdict.trace is not None:
            from IPython.display import display

            from hmmlab.widgets import show

            view = show(verdict.trace, position=verdict.position, charts=False)
            display(view)  # type: ignore[no-untyped-call]

    def _keep(self, verdict: Verdict) -> None:
        if verdict.kind is Kind.NOT_ATTEMPTED:
            return
        progress = Progress()
        progress.record(self.name, verdict.kind)
        if progress.complaint:
            print(progress.complaint)

    def say(self, verdict: Verdict) -> str:
        """A verdict in words."""
        if verdict.kind is Kind.RIGHT:
            rounds = self.exercise.rounds
            tried = f" on {rounds} inputs that you have not seen" if rounds > 1 else ""
            return f"Right{tried}."
        if verdict.kind is Kind.NOT_ATTEMPTED:
            return f"Not attempted yet: fill in `{self.exercise.answer}`, and run the cell again."
        where = f" Below, at step {verdict.position}." if verdict.trace is not None else ""
        return f"Not yet. {verdict.reason}{where}"

    def hint(self) -> None:
        """Give a hint, each time one that says more."""
        hints = self.exercise.hints
        self._hints_given = min(self._hints_given + 1, len(hints))
        print(f"Hint {self._hints_given} of {len(hints)}: {hints[self._hints_given - 1]}")

    def solution(self) -> None:
        """Show an answer that passes."""
        print(self.exercise.solution())
