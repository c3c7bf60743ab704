"""Answers to exercises, as text that a learner would write, and what is said of them."""

import re

from hmmlab.exercises import exercise
from hmmlab.exercises.rules import Kind, Verdict


def judged(name: str, code: str, seed: int = 1) -> Verdict:
    """What is said of the answer that some code defines."""
    asked = exercise(name, seed).exercise
    defined: dict[str, object] = {}
    exec(compile(code, f"<{name}>", "exec"), defined)
    return asked.judge(defined[asked.answer])


def but(name: str, *edits: tuple[str, str]) -> str:
    """The solution of an exercise with some of its text replaced."""
    code = exercise(name).exercise.solution()
    for old, new in edits:
        assert old in code
        code = code.replace(old, new)
    return code


def told_wrong(name: str, code: str, reason: str, seed: int = 1) -> Verdict:
    """The answer is told wrong for this reason, at a step of its trace where it has one."""
    verdict = judged(name, code, seed)
    assert verdict.kind is Kind.WRONG
    assert re.search(reason, verdict.reason), verdict.reason
    assert verdict.trace is None or 0 < verdict.position <= len(verdict.trace)
    return verdict
