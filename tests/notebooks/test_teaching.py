"""The teacher's page is true: what it quotes is in the notebooks, and what it shows runs."""

import re
from pathlib import Path

import nbformat
import pytest

from hmmlab.exercises import EXERCISES
from hmmlab.exercises.rules import Kind

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
LESSONS = {path.name[:2]: path for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}

BELIEFS = re.findall(r'^\| (".+") \| (\d\d)', PAGE, re.MULTILINE)
BLOCKS = re.findall(r"^```python\n(.+?)^```", PAGE, re.MULTILINE | re.DOTALL)


def text(number: str) -> str:
    cells = nbformat.read(LESSONS[number], as_version=4).cells
    source = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", source)


@pytest.mark.parametrize(("quoted", "number"), BELIEFS, ids=lambda value: value[:30])
def test_every_belief_is_met_where_it_says(quoted, number):
    for belief in re.findall(r'"([^"]+)"', quoted):
        assert f'"{belief}"' in text(number)


def test_every_belief_of_a_heading_is_in_the_table():
    beliefs = " ".join(quoted for quoted, _ in BELIEFS)
    for number in LESSONS:
        for heading in re.findall(r'^## (".+)$', text(number), re.MULTILINE):
            for belief in re.findall(r'"([^".]+)\.?"', heading):
                assert belief in beliefs, f"{number}: {belief}"


def test_the_course_is_all_of_it():
    rows = re.findall(r"^\| \[(\d\d)[^]]*\]\(\.\./([^)]+)\) .*\| (\d+) \|$", PAGE, re.MULTILINE)
    assert [number for number, *_ in rows] == sorted(LESSONS)
    for number, path, exercises in rows:
        assert (ROOT / path) == LESSONS[number]
        assert int(exercises) == len(EXERCISES[number])


@pytest.mark.parametrize("page", ["docs/teaching.md", "README.md"])
def test_its_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = [(ROOT / page).parent / path for path in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
    assert [path for path in paths if not path.exists()] == []
    assert {path.resolve() for path in paths} >= set(LESSONS.values())


def test_what_it_shows_runs(capsys):
    for block in BLOCKS:
        exec(compile(block, "teaching.md", "exec"), {"__name__": "teaching"})
    assert "frames does a mapping" in capsys.readouterr().out


def test_its_exercise_is_a_good_one():
    shown: dict[str, object] = {"__name__": "teaching"}
    exec(compile(BLOCKS[-1], "teaching.md", "exec"), shown)
    asked = shown["FramesInUse"](3)

    def judged(code: str) -> Kind:
        exec(code, shown)
        return asked.judge(shown["frames"]).kind

    assert judged(asked.solution()) is Kind.RIGHT
    assert judged(asked.starter) is Kind.NOT_ATTEMPTED
    for wrong in ("pages", "touched + 1"):
        assert judged(f"def frames(pages, touched):\n    return {wrong}") is Kind.WRONG
