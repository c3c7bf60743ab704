"""The index, which ``make lab`` opens: no lesson, so it has a form of its own.

It has a title, a few lines, and the course. What it shows is saved as it is for a learner who has
just begun, whoever saves it. When the first cell of a notebook changes, ``save_outputs.py`` renews
it.
"""

from pathlib import Path

import nbformat

from hmmlab.widgets import Course

HOME = Path(__file__).parents[2] / "notebooks"
INDEX = nbformat.read(HOME / "index.ipynb", as_version=4)


def test_it_is_one_screen():
    nbformat.validate(INDEX)
    text, code = INDEX.cells
    assert text.cell_type == "markdown" and text.source.startswith("# ")
    assert len(text.source) < 700
    assert code.cell_type == "code" and len(code.source.splitlines()) <= 4
    assert INDEX.metadata.kernelspec.name == "python3" and "widgets" not in INDEX.metadata


def test_it_was_saved_as_a_learner_finds_it_who_has_just_begun():
    """Before anything has run the table is there, with its links, and says nothing is solved."""
    (output,) = INDEX.cells[1].outputs
    shown, _ = Course(HOME)._repr_mimebundle_()
    assert output.data == {key: shown[key] for key in ("text/plain", "text/html")}


def test_it_leads_to_the_first_notebook_and_to_the_glossary():
    first = min(path.name for path in HOME.glob("[0-9]*.ipynb"))
    for name in (first, "glossary.ipynb"):
        assert f"({name})" in INDEX.cells[0].source
        assert (HOME / name).exists()
