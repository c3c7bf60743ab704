"""The course: what it says of the notebooks, and of what was solved."""

import json
from html.parser import HTMLParser
from pathlib import Path

from hmmlab.exercises import EXERCISES
from hmmlab.exercises.progress import Progress
from hmmlab.exercises.rules import Kind
from hmmlab.widgets import Course
from hmmlab.widgets.course import lessons

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


class Links(HTMLParser):
    """Collects what a page links to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found += [dict(attrs)["href"]] if tag == "a" else []


def html(course: Course) -> str:
    return course.table.outputs[0]["data"]["text/html"]


def test_it_tells_of_every_notebook_what_its_first_cell_tells():
    course = Course(NOTEBOOKS)
    names = sorted(path.name for path in NOTEBOOKS.glob("[0-9]*.ipynb"))
    assert Links(html(course)).found == names
    for lesson in course.lessons:
        assert lesson.title and lesson.question.endswith("?") and lesson.needs and lesson.time
        assert not set("*`[") & set(lesson.title + lesson.question + lesson.needs)
        assert lesson.exercises == list(EXERCISES.get(lesson.number, {}))


def test_a_notebook_of_ones_own_needs_no_form(tmp_path):
    for name, cells in (("10_my_own", [{"source": ["Hello"]}]), ("11_<b>", [])):
        (tmp_path / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))
    assert [lesson.title for lesson in lessons(tmp_path)] == ["10_my_own", "11_<b>"]
    assert "11_&lt;b&gt;.ipynb" in html(Course(tmp_path))


def test_its_text_is_the_same_whatever_was_solved():
    """Strict nbval compares what a notebook shows, on the machine of a learner too."""
    fresh, _ = Course(NOTEBOOKS)._repr_mimebundle_()
    Progress().record("repoint", Kind.RIGHT)
    course = Course(NOTEBOOKS)
    again, _ = course._repr_mimebundle_()
    assert [fresh[key] == again[key] for key in ("text/plain", "text/html")] == [True, True]
    assert "✓" in html(course) and "✓" not in again["text/html"]


def test_a_refresh_shows_what_another_notebook_has_solved():
    course = Course(NOTEBOOKS)
    assert course.line.value.count("0 of ") == 1 and course.again.disabled
    Progress().record("repoint", Kind.RIGHT)
    Progress().record("permission", Kind.WRONG)
    course.refresh.click()
    assert "1 of " in course.line.value and "1 tried" in course.line.value
    table = html(course).partition("</style>")[2]
    assert (table.count("✓"), table.count("◐")) == (1, 1)
    assert not course.again.disabled


def test_to_start_again_asks_first():
    Progress().record("repoint", Kind.RIGHT)
    course = Course(NOTEBOOKS)
    course.again.click()
    assert course.yes in course.buttons.children and Progress().states
    course.no.click()
    assert course.yes not in course.buttons.children and Progress().states
    course.again.click()
    course.yes.click()
    assert Progress().states == {} and "0 of " in course.line.value


def test_it_says_when_the_file_was_damaged(progress):
    progress.write_text("{")
    assert "was damaged" in Course(NOTEBOOKS).line.value
