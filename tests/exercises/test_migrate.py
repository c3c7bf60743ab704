"""The exercises of notebook 05: wrong answers, and what they build."""

import re

import pytest

from hmmlab.exercises import exercise
from hmmlab.exercises.rules import Kind
from judging import judged, told_wrong

BUILD = "from hmmlab.exercises.migrate import pin, pipe\ndef build(process, pages, stay):\n    "
GATES = (
    "from hmmlab.exercises.migrate import pin, pipe\n"
    "def build(process, left_out, given_back, refused):\n    "
)
#: A driver's loop, with its test, what it does with a frame, and what it does without one.
ALLOC = """
from hmmlab.model.entry import MIGRATE_PFN_MIGRATE as M, MIGRATE_PFN_VALID as V

def alloc_and_copy(src, dst, card):
    for i, word in enumerate(src):
        if {test}:
            dst[i] = card.take()
            {body}
"""
FILL = "if dst[i]: card.copy(word, dst[i]) if word & V else card.clear(dst[i])"


def alloc(test: str = "word & M", body: str = FILL) -> str:
    return ALLOC.format(test=test, body=body)


#: Wrong answers that a learner would give, and words of what is said of them.
WRONG = [
    ("left_behind", BUILD + 'process.mprotect(stay, "r")', "went to the device"),
    ("left_behind", BUILD + 'process.madvise(pages, "pageout")', "stayed behind"),
    ("left_behind", BUILD + 'process.madvise(stay, "dontneed")', "data is lost"),
    ("left_behind", BUILD + "pipe(process, pages)", "stayed behind"),
    ("alloc_and_copy", alloc(body="dst[i] and card.copy(word, dst[i])"), "names no frame"),
    ("alloc_and_copy", alloc(body="word & V and dst[i] and card.copy(word, dst[i])"), "left on"),
    ("alloc_and_copy", alloc(test="True"), "without M"),
    ("alloc_and_copy", alloc(test="word & V"), "there was room"),
    ("alloc_and_copy", alloc(body="card.clear(dst[i]) if dst[i] else 0"), "data is lost"),
    (
        "alloc_and_copy",
        alloc(body="card.copy(word, dst[i]) if word & V else card.clear(dst[i])"),
        "the card was full",
    ),
    ("alloc_and_copy", alloc(body=FILL + "\n            card.take()"), "some are lost"),
    ("alloc_and_copy", alloc(body=FILL + "\n            src[i] = 0"), "src has changed"),
    (
        "alloc_and_copy",
        "def alloc_and_copy(src, dst, card):\n    dst[:] = [5 for word in src]",
        "no frame of the card",
    ),
    ("who_goes", 'prediction = "mmmmmmff"', "'s', not 'm'"),
    ("who_goes", 'prediction = "smsmssss"', "'f', not 's'"),
    ("who_goes", 'prediction = "smm"', "3 letters for 8 pages"),
    ("count_the_copies", "prediction = {'collected': 0, 'copied': 0}", "'collected' is not 0"),
    (
        "count_the_copies",
        "prediction = {'collected': 10, 'copied': 10, 'arrived': 9}",
        "'copied' is not 10.*nowhere else",
    ),
    ("three_gates", GATES + "pin(process, left_out)", "given back, and is moved"),
    ("three_gates", GATES + "pipe(process, left_out)", "left out, and is given back"),
    (
        "three_gates",
        GATES + "pin(process, left_out)\n    pipe(process, given_back)\n"
        '    process.madvise(refused, "pageout")\n    process.load(refused)',
        "refused, and is moved",
    ),
]


@pytest.mark.parametrize(("name", "code", "reason"), WRONG)
def test_a_wrong_answer_is_told_why_and_where(name, code, reason):
    assert told_wrong(name, code, reason).trace is not None


@pytest.mark.parametrize(
    "line",
    [
        "pin(process, stay)",
        "pipe(process, stay)",
        'process.madvise(stay, "pageout")',
        'process.madvise(stay, "pageout"); process.fork("c"); process.load(stay)',
    ],
)
def test_there_are_several_ways_to_stay(line):
    assert judged("left_behind", BUILD + line).kind is Kind.RIGHT


def test_a_page_may_be_left_out_by_swap_as_well():
    code = exercise("three_gates").exercise.solution()
    other = code.replace("pin(process, left_out)", 'process.madvise(left_out, "pageout")')
    assert other != code and judged("three_gates", other).kind is Kind.RIGHT


@pytest.mark.parametrize("seed", range(1, 9))
def test_a_story_has_every_letter_and_the_counts_differ(seed):
    letters = re.search(r'"(\w+)"', exercise("who_goes", seed).exercise.solution())
    assert letters and set(letters[1]) == set("mfs")
    solution = exercise("count_the_copies", seed).exercise.solution()
    collected, copied, arrived = map(int, re.findall(r"\d+", solution))
    assert collected > arrived > 0 and copied not in (0, collected)
