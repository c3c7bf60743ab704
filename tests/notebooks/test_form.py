"""The form that all lessons share, so that a learner who knows one finds the way in the next.

A lesson is a notebook whose name begins with its number. The index and the glossary are none:
``test_index.py`` and ``test_glossary.py`` say what they keep to. What a notebook prints is held by
strict nbval; ``save_outputs.py`` beside this file renews it.
"""

import re
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))

#: Characters on a line of text, in a lab 1,280 px wide with its sidebar open.
WIDTH = 110
#: What a widget says of its state: its class, and in brackets what it shows.
STATE_LINE = re.compile(r"^([A-Z]\w+)\(.+\)$", re.MULTILINE)
#: Kernel functions that a text may name although the model has none of that name.
UNMODELLED = {"dmirror_range_fault", "list_add", "mn_itree_inv_end", "mn_itree_inv_start_range"}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> NotebookNode:
    notebook = nbformat.read(request.param, as_version=4)
    nbformat.validate(notebook)
    return notebook


def shown(line: str) -> str:
    """A line of text as it is read, without where its links lead."""
    return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", line)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def printed(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def value(cell: NotebookNode) -> str | None:
    """Text of the value that a cell shows; a notebook shows widgets so, and prints the rest."""
    shown = [output for output in cell.outputs if output.output_type == "execute_result"]
    return shown[0].data["text/plain"] if shown else None


def test_it_starts_on_any_computer_and_carries_no_state(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        assert re.fullmatch(r"\d\d-[a-z]+(-[a-z0-9]+)*", cell.id), "a name that stays, please"


def test_it_was_run_once_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type in ("execute_result", "stream"), cell.id
            assert output.get("name") != "stderr", cell.id


def test_its_outputs_name_nothing_of_one_computer_or_one_run(notebook):
    telltale = re.compile(r"/(home|root|Users|tmp|var|work)/|\b[A-Z]:\\| at 0x|\bmodel_id\b")
    for cell in code_cells(notebook):
        assert not telltale.search(str(cell.outputs)), cell.id


def test_it_reaches_only_for_files_beside_it(notebook):
    home = ROOT / "notebooks"
    link, file = r"\]\((?!https?:|#)([^)#]+)", r'(?:Path\(|open\(|play\(|recording=)"([^"]+)"'
    for cell in notebook.cells:
        for name in re.findall(file if cell.cell_type == "code" else link, cell.source):
            path = (home / name).resolve()
            assert path.is_relative_to(home) and path.exists(), f"{cell.id}: {name}"


def test_it_begins_with_a_question_the_aim_the_needs_and_the_time(notebook):
    title = notebook.cells[0].source
    assert title.startswith("# ") and "?" in title
    for promise in ("You will learn", "You need", "Time:"):
        assert promise in title


def test_the_first_cell_to_run_gives_something_to_drag(notebook):
    first = notebook.cells[1]
    assert first.cell_type == "code" and len(first.source.splitlines()) <= 12
    assert STATE_LINE.fullmatch(value(first) or "")


def test_every_widget_is_followed_by_its_state_in_words(notebook):
    cells = code_cells(notebook)
    assert value(cells[-1]) is None
    for cell, following in pairwise(cells):
        if shown := value(cell):
            widget = STATE_LINE.fullmatch(shown)
            assert widget, f"{cell.id} shows no widget: print it"
            assert widget[1] in STATE_LINE.findall(printed(following)), following.id


def test_a_question_stands_before_every_answer(notebook):
    asked = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            asked = cell.source
        else:
            assert "?" in asked, f"{cell.id} answers what nobody asked"


def test_no_cell_lets_a_widget_say_what_the_learner_is_asked_to_find(notebook):
    """After Run All a race stands as its cell made it; only its button shows what is found."""
    assert [cell.id for cell in code_cells(notebook) if "try_every_order" in cell.source] == []


def test_no_more_than_six_lines_of_text_without_something_to_do(notebook):
    for cell_id, lines in passages(notebook):
        assert len(lines) <= 6, f"{cell_id}: {len(lines)} lines\n" + "\n".join(lines)


def passages(notebook: NotebookNode) -> Iterator[tuple[str, list[str]]]:
    """Prose between cells of code and headings, as lines; lists and tables are easier to read."""
    lines: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = []
            continue
        for line in cell.source.splitlines():
            if line.startswith("#"):
                lines = []
            elif not re.match(r"\s*([-|<]|\d+\.)", line):
                lines += textwrap.wrap(shown(line), WIDTH)
            yield cell.id, lines


def test_lists_are_short_and_so_are_their_items(notebook):
    for cell in texts(notebook):
        items = re.findall(r"^\s*(?:-|\d+\.) (.+)$", shown(cell.source), re.MULTILINE)
        assert len(items) <= 6, cell.id
        assert all(len(item) <= 2 * WIDTH for item in items), cell.id
        assert cell.source.count("\n|") <= 10, cell.id


def test_it_ends_with_five_lines_to_remember_and_what_to_read(notebook):
    *_, remember, read = texts(notebook)
    assert remember.source.startswith("## Remember\n")
    assert len(re.findall(r"^\d\. ", remember.source, re.MULTILINE)) == 5
    assert read.source.startswith("## Read next\n")
    assert re.search(r"`\w+/\w+\.c`.*: .*`\w+`", read.source), "a kernel file, and what in it"


def test_kernel_names_are_those_of_the_model(notebook):
    sources = (ROOT / "hmmlab").rglob("*.py")
    known = {name for path in sources for name in re.findall(r"\w+", path.read_text())}
    mentioned = {
        name
        for cell in texts(notebook)
        for name in re.findall(r"`([a-z][a-z0-9]*(?:_[a-z0-9]+)+)(?:\(\))?`", cell.source)
    }
    assert mentioned
    assert mentioned <= known | UNMODELLED
