"""The course on one screen: its notebooks, what each asks and needs, and what is solved so far."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets

from hmmlab.exercises import EXERCISES
from hmmlab.exercises.progress import Progress
from hmmlab.exercises.rules import Kind
from hmmlab.widgets.page_table_grid import front
from hmmlab.widgets.parts import push_button
from hmmlab.widgets.state_line import StateLine

__all__ = ["Course", "Lesson", "lessons"]

_MARKS = {
    Kind.RIGHT: ("right", "✓", "solved"),
    Kind.WRONG: ("wrong", "◐", "tried"),
    Kind.NOT_ATTEMPTED: ("not", "○", "not yet tried"),
}

#: A saved table that nobody has run yet is shown without its style sheet.
_LEFT = 'style="text-align: left; vertical-align: top"'


@dataclass(frozen=True)
class Lesson:
    """A notebook as its first cell tells of it; what the cell does not say is empty."""

    path: Path
    title: str = ""
    question: str = ""
    needs: str = ""
    time: str = ""

    @property
    def number(self) -> str:
        """The two digits that its name begins with."""
        return self.path.name[:2]

    @property
    def exercises(self) -> list[str]:
        """Names of its exercises."""
        return list(EXERCISES.get(self.number, {}))


def lessons(folder: Path) -> Iterator[Lesson]:
    """The numbered notebooks of a folder, in their order."""
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        text = "".join(notebook["cells"][0]["source"]) if notebook["cells"] else ""
        yield Lesson(
            path,
            title=_said(r"^# (.+)$", text) or path.stem,
            question=_said(r"^\*\*(.+\?)\*\*$", text),
            needs=_said(r"^- \*You need:?\*:? (.+)$", text).rstrip("."),
            time=_said(r"^- \*Time:\* (.+?)(?:[,;.]| with ).*$", text),
        )


def _said(pattern: str, text: str) -> str:
    """What follows in the text, without marks of Markdown."""
    found = re.search(pattern, text, re.MULTILINE)
    linked = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", found[1]) if found else ""
    return re.sub("[*`]", "", linked)


class Course(StateLine, ipywidgets.VBox):
    """The notebooks of a folder with links, and the learner's progress.

    A notebook that was saved, and not run yet, shows the same table without the progress.

    Parameters
    ----------
    folder
        Where the notebooks lie; by default beside the notebook that shows it.
    """

    def __init__(self, folder: str | Path = ".") -> None:
        self.lessons = list(lessons(Path(folder)))
        # Rich output, since there the lab itself opens what a link names.
        self.table = ipywidgets.Output()
        self.line = ipywidgets.HTML()
        self.again = push_button("Start again ...", "Forget which exercises are solved", self._ask)
        self.yes = push_button("Yes, forget all", "This cannot be undone", self._start_again)
        self.no = push_button("No, keep it", "Nothing is lost", self._refresh)
        self.refresh = push_button("Refresh", "Look again what is solved", self._refresh)
        self.sure = ipywidgets.Label("Forget which exercises you have solved?")
        row = ipywidgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="2px 8px")
        self.buttons = ipywidgets.HBox(layout=row)
        super().__init__([self.line, self.table, self.buttons])
        self._refresh()

    def _line(self) -> str:
        return f"{len(self.lessons)} notebooks, {len(self.exercises)} exercises"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Show the widget; where there is none yet, the table as on the first day."""
        bundle, metadata = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "text/html": _table(self.lessons, {})}, metadata

    @property
    def exercises(self) -> list[str]:
        """Names of all exercises."""
        return [name for lesson in self.lessons for name in lesson.exercises]

    # --- what its buttons do ----------------------------------------------------------------------
    def _refresh(self) -> None:
        self._show(Progress())
        self.buttons.children = (self.refresh, self.again)

    def _ask(self) -> None:
        self.buttons.children = (self.sure, self.yes, self.no)

    def _start_again(self) -> None:
        progress = Progress()
        progress.start_again()
        self._show(progress)
        self.buttons.children = (self.refresh, self.again)

    def _show(self, progress: Progress) -> None:
        style = f"<style>{front('course.css')}</style>"
        table = {"text/html": style + _table(self.lessons, progress.states)}
        self.table.outputs = ({"output_type": "display_data", "data": table, "metadata": {}},)
        states = [progress.states.get(name) for name in self.exercises]
        solved, tried = states.count(Kind.RIGHT), states.count(Kind.WRONG)
        line = f"{solved} of {len(states)} exercises solved" + (f", {tried} tried" * bool(tried))
        self.line.value = (
            f'<p role="status" style="margin: 0">{escape(line)}. {escape(progress.complaint)}</p>'
        )
        self.again.disabled = not progress.states


def _table(course: list[Lesson], states: Mapping[str, Kind]) -> str:
    rows = "".join(_row(lesson, states) for lesson in course)
    titles = ("Notebook", "Time and needs", "Exercises")
    head = "".join(f'<th scope="col" {_LEFT}>{title}</th>' for title in titles)
    return (
        '<table class="hmm-course"><colgroup><col class="hmm-what"><col class="hmm-needs"><col>'
        f"</colgroup><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _row(lesson: Lesson, states: Mapping[str, Kind]) -> str:
    link = f'<a href="{escape(lesson.path.name)}">{lesson.number} {escape(lesson.title)}</a>'
    exercises = " ".join(
        _exercise(name, states.get(name, Kind.NOT_ATTEMPTED)) for name in lesson.exercises
    )
    time, needs = (escape(words[:1].upper() + words[1:]) for words in (lesson.time, lesson.needs))
    return (
        f"<tr><td {_LEFT}>{link}<br>{escape(lesson.question)}</td>"
        f"<td {_LEFT}>{time}<br>{needs}</td>"
        f'<td {_LEFT} role="list">{exercises}</td></tr>'
    )


def _exercise(name: str, kind: Kind) -> str:
    """Mark and name in one line, in a notebook's file too, where no style sheet is."""
    css, mark, words = _MARKS[kind]
    name = escape(name).replace("_", "&nbsp;")
    return (
        f'<span role="listitem" class="hmm-exercise hmm-{css}" title="{words}">'
        f'<b role="img" aria-label="{words}:">{mark}</b>&nbsp;{name}</span>'
    )
