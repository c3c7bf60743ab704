"""The glossary: sorted words of two lines, and links that arrive, in both directions.

A lesson links to a word at its first use, as ``[frames](glossary.ipynb#cell-id=frame)``: by the
word's cell, which JupyterLab finds in a notebook that it has just opened, where a heading it does
not. nbconvert knows it too, and Voila opens the page at its top. ``link_back.py`` beside this file
renews the words' lists of lessons.
"""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
HOME = ROOT / "notebooks"
GLOSSARY = nbformat.read(HOME / "glossary.ipynb", as_version=4)
LESSONS = sorted(HOME.glob("[0-9][0-9]_*.ipynb"))

#: Characters of two lines, as test_form.py measures them.
TWO_LINES = 2 * 110
#: Names of Linux that a meaning may have although the model has none of that name.
UNMODELLED = {"dev_pagemap", "mm_struct", "page_free", "vm_area_struct"}

spec = importlib.util.spec_from_file_location("link_back", Path(__file__).with_name("link_back.py"))
link_back = importlib.util.module_from_spec(spec)
spec.loader.exec_module(link_back)


def entries() -> list[re.Match[str]]:
    return [entry for cell in GLOSSARY.cells[1:] for entry in link_back.ENTRY.finditer(cell.source)]


def anchors() -> set[str]:
    return {f"cell-id={cell.id}" for cell in GLOSSARY.cells[1:]}


def test_each_cell_is_a_word():
    nbformat.validate(GLOSSARY)
    assert all(cell.cell_type == "markdown" for cell in GLOSSARY.cells)
    assert [entry[0] for entry in entries()] == [cell.source for cell in GLOSSARY.cells[1:]]
    ids = [cell.id for cell in GLOSSARY.cells[1:]]
    assert ids == [entry["word"].replace(" ", "-") for entry in entries()]
    assert 40 <= len(ids) <= 70


def test_its_words_are_sorted():
    words = [entry["word"].casefold() for entry in entries()]
    assert words == sorted(set(words))


def test_a_meaning_has_two_lines_at_most():
    assert [entry["word"] for entry in entries() if len(entry["meaning"]) > TWO_LINES] == []


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_link_arrives_and_a_word_is_linked_at_its_first_use_only(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    words = re.findall(r"\]\(glossary\.ipynb(?:#([^)]*))?\)", text)
    assert set(words) - {""} <= anchors(), set(words) - anchors()
    assert len(words) == len(set(words))


def test_links_elsewhere_arrive_too():
    for path in (HOME / "index.ipynb", HOME / "glossary.ipynb"):
        text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
        for name, _, anchor in re.findall(r"\]\(([^)#]+\.ipynb)(#([^)]*))?\)", text):
            assert (HOME / name).exists(), name
            assert not anchor or anchor in anchors()


def test_a_word_leads_back_to_the_lessons_that_link_to_it():
    found = link_back.links()
    for entry in entries():
        assert entry[0] == link_back.renewed(entry, found), "run link_back.py"


def test_every_word_is_met_in_a_lesson():
    assert {cell.id for cell in GLOSSARY.cells[1:]} == set(link_back.links())


def test_kernel_names_are_those_of_the_model():
    sources = (ROOT / "hmmlab").rglob("*.py")
    known = {name for path in sources for name in re.findall(r"\w+", path.read_text())}
    text = "\n".join(entry["meaning"] for entry in entries())
    named = set(re.findall(r"`(?:struct )?(\w+_\w+)`", text))
    assert named and named <= known | UNMODELLED, named - known - UNMODELLED
