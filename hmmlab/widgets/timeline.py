"""Where the playhead is in the trace, and how to move it."""

from __future__ import annotations

import html
from typing import Any

import anywidget
import ipywidgets
from traitlets import Int, List, Unicode, link

from hmmlab.model.trace import Event, Trace
from hmmlab.widgets.page_table_grid import front
from hmmlab.widgets.parts import TEXT, push_button
from hmmlab.widgets.playhead import Playhead

__all__ = ["StepList", "Timeline", "step_rows"]

#: Steps of an operation that are listed at once, around the current one.
MAX_STEPS = 128

#: Milliseconds a step, by the name of the speed.
SPEEDS = {"slow": 2000, "normal": 1000, "fast": 400, "very fast": 120}

#: Where a step is that no function of the kernel takes: the CPU just executes the program.
OUTSIDE = "(user space)"

Row = tuple[int, str, int, str]


class Timeline(ipywidgets.VBox):
    """Play, pause, step, jump; and the sentence of the current step.

    Parameters
    ----------
    playhead
        The playhead to move.
    """

    def __init__(self, playhead: Playhead) -> None:
        self.playhead = playhead
        self.first = push_button("First", "Go before the first step", self._to_first)
        self.back = push_button(f"◀{TEXT} Step", "One step back", lambda: self._move(-1))
        self.play = push_button(f"▶{TEXT} Play", "Play the steps one after another", self._toggle)
        self.forward = push_button(f"Step ▶{TEXT}", "One step forward", lambda: self._move(1))
        self.last = push_button("Last", "Go after the last step", self._to_last)
        # ipywidgets' Play keeps time in the browser; its own buttons need a font that a page
        # without JupyterLab asks the net for, so it stays out of sight.
        self.clock = ipywidgets.Play(
            value=playhead.position, min=0, max=playhead.length, interval=1000
        )
        self.clock.layout.display = "none"
        self.slider = ipywidgets.IntSlider(
            description="Step", min=0, max=playhead.length, value=playhead.position, readout=False
        )
        self.slider.layout.flex = "1 1 120px"
        self.slider.layout.min_width = "120px"
        self.slider.style.description_width = "initial"
        self.count = ipywidgets.Label()
        self.speed = ipywidgets.Dropdown(options=SPEEDS, value=1000, description="Speed")
        self.speed.style.description_width = "initial"
        self.speed.layout.width = "150px"
        self.operation_back = push_button(
            f"◀{TEXT} Previous", "To the operation before", lambda: self._move_operation(-1)
        )
        self.operation = ipywidgets.Dropdown(description="Operation")
        self.operation.style.description_width = "initial"
        self.operation.layout.flex = "1 1 200px"
        self.operation.layout.width = "auto"
        self.operation_forward = push_button(
            f"Next ▶{TEXT}", "To the next operation", lambda: self._move_operation(1)
        )
        self.sentence = ipywidgets.HTML()
        self.sentence.add_class("hmm-sentence")
        self._following = False
        row = ipywidgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="2px")
        super().__init__(
            [
                ipywidgets.HBox(
                    [self.first, self.back, self.play, self.forward, self.last, self.slider,
                     self.count, self.speed, self.clock],
                    layout=row,
                ),
                ipywidgets.HBox(
                    [self.operation_back, self.operation, self.operation_forward], layout=row
                ),
                self.sentence,
            ]
        )  # fmt: skip
        link((self.clock, "value"), (self.slider, "value"))
        link((self.clock, "interval"), (self.speed, "value"))
        self.slider.observe(self._slid, "value")
        self.clock.observe(self._played, "playing")
        self.operation.observe(self._jumped, "value")
        playhead.observe(self._follow, ["position", "length"])
        self._follow()

    def __repr__(self) -> str:
        return f"Timeline({self._count()})"

    def play_from(self, position: int) -> None:
        """Go to a position and play from there to the end."""
        self.playhead.position = position
        self.clock.playing = True

    # --- what the buttons do ----------------------------------------------------------------------
    def _to_first(self) -> None:
        self.playhead.position = 0

    def _to_last(self) -> None:
        self.playhead.position = self.playhead.length

    def _move(self, steps: int) -> None:
        goal = self.playhead.position + steps
        self.playhead.position = min(max(goal, 0), self.playhead.length)

    def _move_operation(self, by: int) -> None:
        goal = self.playhead.operation + by
        if goal < 0:
            self.playhead.position = 0
        elif goal < len(self.playhead.trace.operations):
            self.playhead.position = self.playhead.span(goal)[1]

    def _toggle(self) -> None:
        if not self.clock.playing and self.playhead.position == self.playhead.length:
            self.playhead.position = 0
        self.clock.playing = not self.clock.playing

    # --- what the sliders and lists say -----------------------------------------------------------
    def _slid(self, change: Any) -> None:
        if not self._following:
            self.playhead.position = min(change["new"], self.playhead.length)

    def _jumped(self, change: Any) -> None:
        if not self._following and change["new"] is not None:
            wanted = change["new"]
            self.playhead.position = 0 if wanted < 0 else self.playhead.span(wanted)[1]

    def _played(self, change: Any) -> None:
        playing = change["new"]
        self.play.description = f"‖{TEXT} Pause" if playing else f"▶{TEXT} Play"
        self.play.tooltip = "Stop playing" if playing else "Play the steps one after another"

    # --- following --------------------------------------------------------------------------------
    def _follow(self, change: Any = None) -> None:
        playhead = self.playhead
        trace = playhead.trace
        self._following = True  # what follows are echoes, not wishes
        try:
            if self.slider.max != playhead.length:
                self.slider.max = self.clock.max = playhead.length
            self.slider.value = playhead.position
            if len(self.operation.options) != len(trace.operations) + 1:
                before = [("before the first", -1)]
                names = [(f"{i + 1}. {op.text}", i) for i, op in enumerate(trace.operations)]
                self.operation.options = before + names
            self.operation.value = playhead.operation
        finally:
            self._following = False
        self.first.disabled = self.back.disabled = playhead.position == 0
        self.forward.disabled = self.last.disabled = playhead.position == playhead.length
        self.operation_back.disabled = playhead.position == 0
        self.operation_forward.disabled = playhead.operation + 1 >= len(trace.operations)
        self.count.value = self._count()
        self.sentence.value = self._sentence()

    def _count(self) -> str:
        return f"{self.playhead.position} of {self.playhead.length}"

    def _sentence(self) -> str:
        event = self.playhead.replay.event
        if event is None:
            return '<p role="status">Before the first step.</p>'
        step, names = event.step, self.playhead.trace.names
        who = f"<b>{html.escape(step.actor)}</b>"
        if step.function:
            who += f" in <code>{html.escape(step.function)}</code>"
        return f'<p role="status">{who}: {html.escape(names.sentence(step))}</p>'


class StepList(anywidget.AnyWidget):
    """The steps of the current operation, each under the kernel functions that led to it.

    Parameters
    ----------
    playhead
        The playhead to follow; clicking a step moves it.
    """

    _esm = front("make.js", "listbox.js", "steps.js")
    _css = front("style.css")

    rows: List[Row] = List().tag(sync=True)
    current = Int(0).tag(sync=True)
    prefix = Unicode().tag(sync=True)

    def __init__(self, playhead: Playhead) -> None:
        self.playhead = playhead
        self._listed: tuple[int, int, int] | None = None
        super().__init__()
        self.prefix = f"hmm-step-{self.model_id}"
        self._follow()
        playhead.observe(self._follow, ["position", "length"])
        self.observe(self._chosen, "current")

    def __repr__(self) -> str:
        return f"StepList({len(self.rows)} rows, at step {self.playhead.position})"

    def _follow(self, change: Any = None) -> None:
        position, operation = self.playhead.position, self.playhead.operation
        first, last = self.playhead.span(operation) if operation >= 0 else (1, 0)
        # Whole halves, so that most steps leave the list as it is.
        half = MAX_STEPS // 2
        start = max(
            first, min(first + (position - first) // half * half - half // 2, last - MAX_STEPS)
        )
        stop = min(start + MAX_STEPS, last)
        with self.hold_sync():
            if (operation, start, stop) != self._listed:
                self._listed = operation, start, stop
                self.rows = step_rows(self.playhead.trace, operation, start, stop)
            self.current = position

    def _chosen(self, change: Any) -> None:
        if change["new"] != self.playhead.position and 0 < change["new"] <= self.playhead.length:
            self.playhead.position = change["new"]


def step_rows(trace: Trace, operation: int, first: int, last: int) -> list[Row]:
    """List calls and steps of one operation as rows of depth, function, position and sentence.

    Those at positions ``first`` to ``last`` are listed.

    A function that was entered without a step of its own has position 0; calls of one function in
    a row are one row.
    """
    rows: list[Row] = []
    for position in range(first, last + 1):
        event = trace.events[position - 1]
        if event.operation == operation:
            rows += _rows_of(event, position, trace)
    return rows


def _rows_of(event: Event, position: int, trace: Trace) -> list[Row]:
    step = event.step
    calls: list[tuple[int, str, int]] = []
    for depth, function in step.calls:
        if calls and calls[-1][:2] == (depth, function):
            calls[-1] = depth, function, calls[-1][2] + 1
        else:
            calls.append((depth, function, 1))
    # The step stands in the row of the function that took it, if that was entered just now.
    if calls and calls[-1] == (step.depth, step.function, 1):
        calls.pop()
    rows = [
        (depth, function if times == 1 else f"{function} × {times}", 0, "")
        for depth, function, times in calls
    ]
    function = step.function or OUTSIDE
    return [*rows, (step.depth, function, position, trace.names.sentence(step))]
