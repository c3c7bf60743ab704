"""The exercises of notebook 06: mistakes are told where they show, and seeds make variants."""

import pytest

from hmmlab.exercises import exercise
from hmmlab.exercises.rules import Kind
from hmmlab.exercises.tape import Intervals, RaiseEvents, ReadTheTape
from judging import but, judged, told_wrong

NAMES = ["raise_events", "read_the_tape", "answer_at_once", "intervals", "ignorable"]
SEEDS = range(1, 13)


def ignoring(rule: str) -> str:
    return f"def ignore(event, owner, me):\n    return {rule}"


def lines(name: str, *text: str) -> str:
    return f"{exercise(name).exercise.answer} = {chr(10).join(text)!r}"


def solved(name: str) -> list[str]:
    """Lines of a solution that is a text of lines."""
    return exercise(name).exercise.solution().splitlines()[1:-1]


ASK = "if not range.blockable and any(self.machine.holders(self.lock)):\n            return False"
TAKE = "yield from self.machine.down_write(self.lock)"
GIVE = "self.machine.up_write(self.lock)"
FORGET = "self.forget(int(range.start[0]), int(range.end[-1]))"

WRONG = [
    ("raise_events", lines("raise_events", "munmap A 9 4"), "0 of 4 events: .* was not raised"),
    ("raise_events", lines("raise_events", "unmap A 0 4"), "Line 1, 'unmap A 0 4'"),
    ("raise_events", lines("raise_events", "mremap A 0 2 B"), "Event [12] is UNMAP, raised by"),
    ("raise_events", lines("raise_events", *solved("raise_events"), "mremap A 2 2 Z"), "too many"),
    ("raise_events", lines("raise_events", "madvise B 0 1 dontneed"), "B"),
    ("read_the_tape", lines("read_the_tape", *solved("read_the_tape")[:-1]), "there is one more"),
    ("read_the_tape", lines("read_the_tape", *solved("read_the_tape"), "CLEAR A 0 1"), "is none"),
    ("read_the_tape", lines("read_the_tape", "fork"), "a region and two numbers"),
    ("read_the_tape", lines("read_the_tape", "RELEASE A 0 1"), "raised by"),
    ("answer_at_once", but("answer_at_once", (ASK, "pass")), "must not sleep"),
    ("answer_at_once", but("answer_at_once", (" and any(self.machine.holders(self.lock))", "")),
     "lock was free"),
    ("answer_at_once", but("answer_at_once", ("not range.blockable and ", "")), "not be refused"),
    ("answer_at_once", but("answer_at_once", ("return False", "return True")), "said True"),
    ("answer_at_once", but("answer_at_once", (FORGET, "pass")), "stale"),
    ("answer_at_once", but("answer_at_once", (TAKE, "yield from ()"), (GIVE, "")), "did not wait"),
    ("answer_at_once", but("answer_at_once", (GIVE, "")), "still held"),
    ("answer_at_once",
     but("answer_at_once", ("mmu_interval_set_seq(self.machine, subscription, cur_seq)", "")),
     "not noted"),
    ("answer_at_once", but("answer_at_once", (ASK, f"{FORGET}\n        {ASK}")), "changed the"),
    ("intervals", "intervals = [(0, 64)]", r"needless retries; \d would do"),
    ("intervals", "intervals = [(0, 4)]", "would miss"),
    ("intervals", "intervals = [(0, 32), (32, 48), (48, 64)]", "room for two"),
    ("intervals", "intervals = [(0, 32), (32, 64)]", "needless"),
    ("ignorable", ignoring("event.name == 'MIGRATE'"), "stale"),
    ("ignorable", ignoring("owner == me or event.name == 'SOFT_DIRTY'"), "may still write"),
    ("ignorable", ignoring("owner == me or event.name == 'PROTECTION_PAGE'"), "may still write"),
    ("ignorable", ignoring("owner == me or event.name == 'EXCLUSIVE'"), "thinks that it is alone"),
    ("ignorable", ignoring("False"), "not ignored"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "code", "reason"), WRONG)
def test_a_wrong_answer_is_told_why_and_where(name, code, reason):
    assert told_wrong(name, code, reason).trace is not None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["raise_events", "read_the_tape", "intervals"])
def test_every_variant_has_a_solution(name, seed):
    verdict = judged(name, exercise(name, seed).exercise.solution(), seed)
    assert (verdict.kind, verdict.reason) == (Kind.RIGHT, "")


@pytest.mark.parametrize("kind", [RaiseEvents, ReadTheTape, Intervals])
def test_seeds_make_variants(kind):
    assert len({kind(seed).question() for seed in SEEDS}) >= 10


def test_another_way_to_raise_them_is_as_good():
    asked = exercise("raise_events").exercise
    others = {
        "UNMAP": ["mmap X 3 rw private", "munmap X 1 1"],
        "CLEAR": ["mmap Y 1 rw shared", "madvise Y 0 1 dontneed"],
        "PROTECTION_VMA": ["mprotect A 0 2 r"],
        "PROTECTION_PAGE": ["fork kid", "exit kid"],
        "SOFT_DIRTY": ["clear_refs 4"],
        "MIGRATE": ["to_dev d0 A 2 2"],
        "EXCLUSIVE": ["exclusive d0 A 3 1"],
    }
    answer = "\n".join(line for event in asked.wanted for line in others[event])
    verdict = asked.judge(answer)
    assert (verdict.kind, verdict.reason) == (Kind.RIGHT, "")


def test_a_whole_interval_is_never_the_best():
    for seed in SEEDS:
        best, intervals = Intervals(seed).fewest()
        assert len(intervals) == 2
        verdict = judged("intervals", "intervals = [(0, 64)]", seed)
        assert int(verdict.reason.split()[0]) > best


def test_the_tape_is_read_whatever_the_spacing():
    solution = "\n".join(f"  {line.lower()}  " for line in solved("read_the_tape"))
    assert exercise("read_the_tape").exercise.judge(solution).kind is Kind.RIGHT
