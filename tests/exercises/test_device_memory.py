"""Exercises on device memory: plausible mistakes, each told for its reason."""

import re

import numpy as np
import pytest

from hmmlab import Machine, Process
from hmmlab.exercises import exercise
from hmmlab.exercises.card import Card
from hmmlab.exercises.device_frames import words_of
from hmmlab.exercises.rules import Kind
from hmmlab.model.geometry import SECTION_PAGES
from hmmlab.model.history.devmem_2017 import VM_FAULT_MINOR, VM_FAULT_SIGBUS
from hmmlab.model.page import PHYSICAL_PAGES
from judging import but, judged, told_wrong

HOME = 'answer = yield from self.migrate(vma, addr, addr + 1, "RAM")'

WRONG = [
    ("place", but("place", ("first -= pages", "first -= SECTION")), "has stepped past it"),
    ("place", but("place", ("sections * SECTION", "-(-size // PAGE)")), "beginning of a section"),
    ("place", but("place", ("if not any", "if True or not any")), "in the way"),
    ("place", but("place", ("first > pages", "first > 0")), "-34.*the search ends before it"),
    ("place", but("place", ("first = (1 << 34) - pages", "first = 1 << 34")), "beyond physical"),
    ("place", but("place", ("return first", "return hex(first)")), "which is no frame"),
    ("place", "def place(size, taken):\n    return 1 << 20", "there is a place above it"),
    (
        "place",
        but("place", ("while first > pages", "while first > (1 << 34) - 2 * pages")),
        "that there is none",
    ),
    ("read_word", but("read_word", ("~word", "word")), "returned"),
    ("read_word", but("read_word", ("(26, 27)", "(26,)")), "returned None"),
    ("read_word", but("read_word", ("kind not in (26, 27)", "word & 1")), "not None"),
    ("read_word", but("read_word", ("kind == 26", "word & 2 > 0")), "returned"),
    ("read_word", but("read_word", (" & ((1 << 34) - 1)", "")), "returned"),
    ("home_order", "prediction = [0, 1, 2, 3, 4, 5, 6]", "not on the device|is on the device"),
    ("read_word", but("read_word", ("return pfn, kind == 26", "return pfn")), "neither None nor"),
    ("free_and_fault", but("free_and_fault", ("return VM", "answer = VM")), "no VM_FAULT code"),
    ("home_order", "prediction = [7]", "not on the device|is on the device"),
    ("free_and_fault", but("free_and_fault", ("self.free_pages.extend", "list")), "is lost"),
    ("free_and_fault", but("free_and_fault", (HOME, "answer = yield from ()")), "SIGBUS"),
    ("free_and_fault", but("free_and_fault", (HOME, "answer = 0")), "faults there for ever"),
    ("free_and_fault", but("free_and_fault", ("addr + 1,", "addr + 4096,")), "SIGBUS"),
    (
        "free_and_fault",
        but("free_and_fault", ("return VM", "self.free_pages.append(page)\n        return VM")),
        "2 times|is using it",
    ),
    (
        "free_and_fault",
        but("free_and_fault", ("self.free_pages.extend(page.tolist())", "self.seen = page")),
        "is lost",
    ),
]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("name", "code", "reason"), WRONG)
def test_a_wrong_answer_is_told_why_and_where(name, code, reason, seed):
    verdict = told_wrong(name, code, reason, seed)
    # Where nothing is mapped there is nothing to show.
    assert (verdict.trace is None) == (name == "place")


@pytest.mark.parametrize("seed", range(1, 9))
def test_an_order_that_knows_no_free_list_is_wrong(seed):
    """Whoever takes the frames for given as the pages ascend is told who comes first."""
    asked = exercise("home_order", seed).exercise
    truth = re.findall(r"\d", asked.solution())
    naive = sorted(map(int, truth), reverse=True)
    verdict = asked.judge(naive)
    assert verdict.kind is Kind.WRONG and "Number" in verdict.reason
    assert verdict.position < len(verdict.trace), "the device is still open there"


def test_driver_that_brings_more_pages_home_is_right():
    """As the patch allows: the page that was touched first, and then others."""
    more = but(
        "free_and_fault",
        (HOME, f'{HOME}\n        yield from self.migrate(vma, addr - 1, addr, "RAM")'),
    )
    assert judged("free_and_fault", more).kind is Kind.RIGHT


def test_the_texts_say_what_the_model_has():
    assert PHYSICAL_PAGES == 1 << 34 and SECTION_PAGES == 1 << 15
    assert VM_FAULT_MINOR != VM_FAULT_SIGBUS


@pytest.fixture
def process():
    return Process(Machine(4096))


class Quiet(Card):
    def free(self, devmem, page):
        self.free_pages.extend(page.tolist())

    def fault(self, devmem, vma, addr, page, flags, pmdp):
        answer = yield from self.migrate(vma, addr, addr + 1, "RAM")
        return VM_FAULT_MINOR if answer == 0 else VM_FAULT_SIGBUS


def test_a_card_without_frames_leaves_pages_where_they_are(process):
    card = Quiet(process, 2)
    pages = process.mmap(4)
    process.store(pages, [5, 6, 7, 8])
    assert card.take(pages) == 0 and card.free_pages == []
    away = [word & 1 == 0 for word in words_of(process.machine, pages)]
    assert away == [True, True, False, False]
    assert process.load(pages).tolist() == [5, 6, 7, 8] and len(card.free_pages) == 2
    assert process.load(pages).dtype == np.uint64


def test_a_card_says_where_pages_can_go(process):
    with pytest.raises(ValueError, match="expected 'card' or 'RAM'"):
        Quiet(process, 1).migrate(None, 0, 1, "disk")
