"""Every exercise: its solution passes, its starter is no attempt, plausible mistakes are told."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hmmlab.exercises import EXERCISES, exercise
from hmmlab.exercises.rules import Exercise, Kind, Verdict, attempted

NAMES = [name for room in EXERCISES.values() for name in room]
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"

COPY_ALL = {"copied": 0, "mirrored": 0, "migrated": 0}

INVALIDATE = """
from hmmlab import Driver
from hmmlab.model.mmu_notifier import mmu_interval_set_seq


class Mine(Driver):
    def invalidate(self, subscription, range, cur_seq):
        {body}
"""
LOCK = "yield from self.machine.down_write(self.lock)"
NUMBER = "mmu_interval_set_seq(self.machine, subscription, cur_seq)"
FORGET = "self.forget(int(range.start[0]), int(range.end[0]))"
UNLOCK = "self.machine.up_write(self.lock)"
REST = "return True"


def invalidate(*lines: str) -> str:
    return INVALIDATE.format(body="\n        ".join((*lines, REST)))


def but(name: str, *edits: tuple[str, str]) -> str:
    """The solution of an exercise with some of its text replaced."""
    code = exercise(name).exercise.solution()
    for old, new in edits:
        assert old in code
        code = code.replace(old, new)
    return code


def reply(body: str) -> str:
    return f"def reply(prot, access):\n    return {body}"


NO_RETRY = (
    "if not mmu_interval_read_retry(machine, range.notifier, range.notifier_seq):",
    "if True:",
)
BEGIN = (
    "range.notifier_seq = yield from mmu_interval_read_begin(machine, range.notifier)",
    "pass",
)
LOCK_LATE = (
    """yield from machine.down_write(self.lock)
            if not mmu_interval_read_retry(machine, range.notifier, range.notifier_seq):
                return
            machine.up_write(self.lock)""",
    """if not mmu_interval_read_retry(machine, range.notifier, range.notifier_seq):
                yield from machine.down_write(self.lock)
                return""",
)

#: Wrong answers that a learner would give, and words of what is said of them.
WRONG = [
    ("invalidate", invalidate(REST), "stale|may still write"),
    ("invalidate", invalidate(LOCK, NUMBER, UNLOCK), "stale|may still write"),
    ("invalidate", invalidate(LOCK, FORGET, UNLOCK), "did not notice the change"),
    ("invalidate", invalidate(FORGET, NUMBER), "nobody holds the lock"),
    ("invalidate", invalidate(LOCK, NUMBER, "self.forget(0, 1 << 36)", UNLOCK), "was forgotten"),
    ("invalidate", invalidate(LOCK, NUMBER, FORGET), "gives it up|still held"),
    ("repoint", "def repoint(next, source, target):\n    return next", "nowhere"),
    ("repoint", "def repoint(next, source, target):\n    return next - source + target", "ended"),
    ("repoint", "def repoint(next, source, target):\n    return next and next + target", "nowhere"),
    ("repoint", "def repoint(next, source, target):\n    return 0", "the process"),
    ("what_the_device_knows", 'prediction = "wwwwwwww"', r"Page \d is '[r.]'"),
    ("what_the_device_knows", 'prediction = "........"', r"Page \d is '[wr]'"),
    ("what_the_device_knows", 'prediction = "www"', "3 letters for 8 pages"),
    ("permission", reply('"ok"'), "EPERM|EFAULT"),
    ("permission", reply('"ok" if prot else "EFAULT"'), "EPERM|EFAULT"),
    ("permission", reply('"EPERM" if access[0] not in (prot or "") else "ok"'), "EFAULT"),
    ("bytes_that_move", f"prediction = {COPY_ALL}", "'copied' is not 0.*every field"),
    ("bytes_that_move", "prediction = {'copied': 8}", "every field"),
    ("bytes_that_move", but("bytes_that_move", ("'mirrored': 0", "'mirrored': 16")), "frames"),
    ("fault_loop", but("fault_loop", NO_RETRY), "overtaken"),
    ("fault_loop", but("fault_loop", ("if error.errno != 16:", "if True:")), "EBUSY"),
    ("fault_loop", but("fault_loop", LOCK_LATE), "overtaken"),
    (
        "fault_loop",
        but("fault_loop", BEGIN, ("while True:", f"{BEGIN[0]}\n        while True:")),
        "never ends",
    ),
    ("fault_loop", but("fault_loop", ("machine.up_read(mmap_lock)", "pass")), "gives it up|held"),
    (
        "request_flags",
        but(
            "request_flags",
            ("FAULT, HMM_PFN_REQ_WRITE, words", "FAULT | HMM_PFN_REQ_WRITE, 0, words"),
        ),
        "EPERM",
    ),
    (
        "request_flags",
        but("request_flags", ("FAULT, HMM_PFN_REQ_WRITE, words", "FAULT, 0, words")),
        "read-only",
    ),
    (
        "request_flags",
        but("request_flags", ("return HMM_PFN_REQ_FAULT,", "return 0,")),
        "without a frame",
    ),
    (
        "left_behind",
        "def build(process, pages, stay):\n    process.load(stay)",
        "went to the device",
    ),
    (
        "left_behind",
        "def build(process, pages, stay):\n    process.fork('c')",
        "went to the device",
    ),
    ("left_behind", "def build(process, pages, stay):\n    process.munmap(stay)", "no longer read"),
    ("ignorable", "def ignore(event, owner, me):\n    return event.name == 'MIGRATE'", "stale"),
    (
        "ignorable",
        "def ignore(event, owner, me):\n    return owner == me or event == 4",
        "may still write",
    ),
    ("ignorable", "def ignore(event, owner, me):\n    return False", "not ignored"),
]


def judged(name: str, code: str, seed: int = 1) -> Verdict:
    asked = exercise(name, seed).exercise
    defined: dict[str, object] = {}
    exec(compile(code, f"<{name}>", "exec"), defined)
    return asked.judge(defined[asked.answer])


@pytest.mark.parametrize("seed", [1, 7])
@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes_with_any_seed(name, seed):
    verdict = judged(name, exercise(name, seed).exercise.solution(), seed)
    assert (verdict.kind, verdict.reason) == (Kind.RIGHT, "")


@pytest.mark.parametrize("name", NAMES)
def test_the_starter_is_no_attempt(name):
    asked = exercise(name).exercise
    assert judged(name, asked.starter).kind is Kind.NOT_ATTEMPTED
    assert len(asked.hints) >= 3


@pytest.mark.parametrize(("name", "code", "reason"), WRONG)
def test_a_wrong_answer_is_told_why_and_where(name, code, reason):
    verdict = judged(name, code)
    assert verdict.kind is Kind.WRONG
    assert re.search(reason, verdict.reason), verdict.reason
    assert verdict.trace is not None and 0 < verdict.position <= len(verdict.trace)


def test_every_exercise_has_two_wrong_answers():
    assert all(sum(wrong == name for wrong, *_ in WRONG) >= 2 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_draw_the_inputs(name):
    asked = type(exercise(name).exercise)
    draws = [asked(seed).trial(3).rng.integers(1 << 40) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert exercise(name, 5).exercise.question() == exercise(name, 5).exercise.question()


def test_what_is_no_attempt():
    def empty(): ...

    def documented():
        """Only this."""

    def half():
        flags = ...
        return flags

    def written(value):
        return value

    assert not any(map(attempted, (None, ..., [], "...", [1, ...], {"a": ...}, empty, half)))
    assert not attempted(documented)
    assert all(map(attempted, (0, "w", [0], {"a": 0}, written, lambda: 3)))


def test_an_answer_that_raises_is_wrong_and_says_so():
    verdict = judged("repoint", "def repoint(next, source, target):\n    return next / 0")
    assert verdict.kind is Kind.WRONG and "ZeroDivisionError" in verdict.reason


def test_hints_grow_and_the_last_stays(capsys):
    desk = exercise("repoint")
    for _ in range(4):
        desk.hint()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:11] for line in lines] == ["Hint 1 of 3", "Hint 2 of 3", *["Hint 3 of 3"] * 2]


def test_a_wrong_answer_is_shown_in_the_widget(capsys):
    desk = exercise("what_the_device_knows")
    desk.check("wwwwwwww")
    said = capsys.readouterr().out
    position = desk.exercise.judge("wwwwwwww").position
    assert said.startswith("Not yet. Page") and f"AddressSpaceView(step {position} of" in said
    desk.check("...")
    assert capsys.readouterr().out.startswith("Not attempted yet")


def test_an_unknown_name_is_answered_with_the_known():
    with pytest.raises(ValueError, match="repoint"):
        exercise("nothing")


def test_the_rules_draw_nothing():
    """The checking code has no display: it loads without a widget."""
    code = (
        "import sys, hmmlab.exercises as e;"
        "e.exercise('permission').exercise.judge(lambda p, a: 1);"
        "assert not {'ipywidgets', 'IPython', 'hmmlab.widgets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("number", EXERCISES)
def test_the_notebook_gives_each_exercise_its_starter(number):
    found = list(NOTEBOOKS.glob(f"{number}_*.ipynb"))
    source = found[0].read_text(encoding="utf-8") if found else ""
    given = [name for name in EXERCISES[number] if f'exercise(\\"{name}\\"' in source]
    for name in given:
        last = ast.unparse(ast.parse(EXERCISES[number][name].starter).body[-1]).splitlines()[0]
        assert last.replace('"', '\\"') in source or "prediction = " in source
    if number == "02":
        assert given == list(EXERCISES[number])


def test_an_exercise_says_what_it_asks():
    assert issubclass(EXERCISES["02"]["repoint"], Exercise)
    assert str(exercise("repoint")).startswith("Write `repoint`")
