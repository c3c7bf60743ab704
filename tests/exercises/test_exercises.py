"""Every exercise: its solution passes, its starter is no attempt, plausible mistakes are told."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hmmlab.exercises import EXERCISES, exercise
from hmmlab.exercises.rules import Exercise, Kind, attempted
from judging import but, judged, told_wrong

NAMES = [name for room in EXERCISES.values() for name in room]
LESSONS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9][0-9]_*.ipynb"))
RECORDING = Path(__file__).parents[1] / "kernel_traces" / "probes" / "who_is_told.jsonl"

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


def reply(body: str) -> str:
    return f"def reply(prot, access):\n    return {body}"


def must_retry(condition: str) -> str:
    return f"def must_retry(history, interval):\n    return {condition}"


#: Compares with the pages that were looked up, not with the interval.
BY_PAGES = """(lambda at, first, stop: any(
    what == "start" and b > first and a < stop for what, a, b in history[at:]
))(*next((at, *it[1:]) for at, it in enumerate(history) if it[0] == "begin"))"""
#: Takes ranges that touch for ranges that overlap.
TOUCHING = """any(
    what == "start" and b >= interval[0] and a <= interval[1]
    for what, a, b in history[[it[0] for it in history].index("begin"):]
)"""

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
    (
        "frames_and_calls",
        'prediction = {"frames": 8, "told": 2}',
        "'frames' is not 8: .* discarded",
    ),
    ("frames_and_calls", 'prediction = {"told": 2}', "'frames' is missing"),
    ("where_they_are", 'prediction = {"device": 0, "ram": 4, "nowhere": 4}', "'device' is not 0"),
    ("where_they_are", 'prediction = {"device": 8, "ram": 0, "nowhere": 0}', "came home"),
    ("four_pages", 'prediction = "rrrr"', r"Page \d is '[w.]'"),
    ("four_pages", 'prediction = "r.rw"', "Page 2 is '.'.* not 'r'"),
    ("who_is_told", 'prediction = "........"', "Operation 4, `store A 6 1`, is 'C'.*zero page"),
    ("who_is_told", 'prediction = "...CPCP."', "is '.', not 'P'.*no page tables"),
    ("who_is_told", 'prediction = "C.C"', "3 letters for 8"),
    (
        "order_of_calls",
        'order = "ABCDEF"',
        r"A \(the driver takes.* is too early. E comes before it",
    ),
    ("order_of_calls", 'order = "EFACBD"', r"F \(the words.* is too early. A comes before it"),
    ("order_of_calls", 'order = "EEEEEE"', "Each letter from A to F"),
    (
        "must_retry",
        must_retry("any(what == 'start' for what, *_ in history)"),
        "True for .* still the same",
    ),
    ("must_retry", must_retry("history[-1][0] == 'start'"), "the number"),
    ("must_retry", must_retry(BY_PAGES), "False for .* has changed"),
    ("must_retry", must_retry(TOUCHING), "True for .* still the same"),
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
    assert told_wrong(name, code, reason).trace is not None


def test_every_exercise_has_two_wrong_answers():
    """Here, or in the list of the same name of a file beside this one."""
    lists = [
        statement.value
        for path in Path(__file__).parent.glob("test_*.py")
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "WRONG"
    ]
    told = [ast.literal_eval(row.elts[0]) for rows in lists for row in rows.elts]
    assert [name for name in NAMES if told.count(name) < 2] == []


def test_linux_gives_the_letters_of_who_is_told():
    """The real kernel was asked the operations of seed 1, and two more."""
    asked = exercise("who_is_told").exercise
    told = {"": ".", "UNMAP": "U", "CLEAR": "C", "PROTECTION_VMA": "P"}
    recorded = [json.loads(line) for line in RECORDING.read_text(encoding="utf-8").splitlines()]
    letters = {
        answer["op"]: told["".join(event["event"] for event in answer.get("notify", []))]
        for answer in recorded
    }
    lines = re.findall(r"^  +\d   (.+)$", asked.question(), re.MULTILINE)
    said = [letter for line in lines for op, letter in letters.items() if op.startswith(line)]
    assert asked.solution() == f'prediction = "{"".join(said)}"'


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


@pytest.mark.parametrize("notebook", LESSONS, ids=lambda path: path.stem)
def test_the_notebook_gives_each_of_its_exercises_with_the_starter(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    desks = dict(
        reversed(match)
        for source in code
        for match in re.findall(r'(\w+) = exercise\("(\w+)"', source)
    )
    asked = EXERCISES.get(notebook.name[:2], {})
    assert list(desks) == list(asked), "each of them, in this order, and no others"
    for name, kind in asked.items():
        given = [source for source in code if f"{desks[name]}.check({kind.answer})" in source]
        assert len(given) == 1, f"{name} is checked once"
        starter = ast.unparse(ast.parse(kind.starter).body[-1])
        bodies = [ast.unparse(statement) for statement in ast.parse(given[0]).body]
        assert starter in bodies, f"{name} begins with\n{kind.starter}"


def test_every_exercise_belongs_to_a_notebook():
    assert set(EXERCISES) <= {path.name[:2] for path in LESSONS}


def test_an_exercise_says_what_it_asks():
    assert issubclass(EXERCISES["02"]["repoint"], Exercise)
    assert str(exercise("repoint")).startswith("Write `repoint`")
