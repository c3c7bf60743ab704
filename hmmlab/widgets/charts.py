"""Charts that follow the playhead: the whole address space at a glance, and pages by state.

bqplot is slow to import and needs pandas, so it is imported where a chart is made.
"""

from __future__ import annotations

from typing import Any

import ipywidgets
import numpy as np
from numpy.typing import NDArray

from hmmlab.model.trace import Replay
from hmmlab.widgets import reading
from hmmlab.widgets.page_table_grid import PageTableGrid
from hmmlab.widgets.palette import CPU_STATES, DEVICE_STATES, PageState
from hmmlab.widgets.playhead import Playhead

__all__ = ["Overview", "Residency", "binned", "count_states"]

#: Cells of one overview: what bqplot's HeatMap draws within a tenth of a second.
MAX_CELLS = 65_536

#: Positions at which the pages of each state are counted, and pages that are counted: at most.
MAX_COUNTS = 256
MAX_COUNTED = 1 << 24

#: No toolbar: its icons need a font that a page without JupyterLab asks the net for.
_STILL = {"animation_duration": 0, "display_toolbar": False}

_NO_MARGIN = dict.fromkeys(("top", "bottom", "left", "right"), 2)


class Overview(ipywidgets.VBox):
    """Heat maps of the whole address space: the CPU's table beside the device's.

    Parameters
    ----------
    grid
        The widget whose states are drawn: one array is read for both.
    """

    def __init__(self, grid: PageTableGrid) -> None:
        self.grid = grid
        self.caption = ipywidgets.HTML()
        self._marks: list[Any] = []
        figures = [
            self._figure("CPU page table", CPU_STATES),
            self._figure("Device page table", DEVICE_STATES),
        ]
        row = ipywidgets.Layout(flex_flow="row wrap")
        super().__init__([self.caption, ipywidgets.HBox(figures, layout=row)])
        self._follow()
        # The grid observes the same playhead and was made first: its codes are the new ones.
        grid.playhead.observe(self._follow, ["position", "length", "device"])

    def __repr__(self) -> str:
        return f"Overview({self.grid.codes.size // 2} pages)"

    def _figure(self, title: str, states: tuple[PageState, ...]) -> Any:
        import bqplot

        # A heat map cannot ask the theme: its greys let the paper through, light or dark.
        colours = [state.colour_light for state in states]
        empty = "rgba(128, 128, 128, 0.35)"
        colours[:2] = (
            ["rgba(128, 128, 128, 0.08)", empty] if states is CPU_STATES else [empty, colours[1]]
        )
        scales = {
            "x": bqplot.LinearScale(), "y": bqplot.LinearScale(reverse=True),
            "color": bqplot.ColorScale(colors=colours, min=0, max=len(states) - 1),
        }  # fmt: skip
        mark = bqplot.HeatMap(x=[0, 1], y=[0, 1], color=np.zeros((2, 2), np.uint8), scales=scales)
        self._marks.append(mark)
        figure = bqplot.Figure(marks=[mark], fig_margin=_NO_MARGIN, **_STILL)
        figure.layout = ipywidgets.Layout(width="auto", height="150px", min_width="200px")
        box = ipywidgets.VBox([ipywidgets.HTML(f"<p>{title}</p>"), figure])
        box.layout = ipywidgets.Layout(flex="1 1 220px")
        return box

    def _follow(self, change: Any = None) -> None:
        pages = self.grid.codes.size // 2
        width, share = _shape(pages)
        for table, mark in enumerate(self._marks):
            codes = binned(self.grid.codes[table * pages : (table + 1) * pages], share)
            cells = np.zeros(max(-(-codes.size // width), 2) * width, np.uint8)
            cells[: codes.size] = codes
            image = cells.reshape(-1, width)
            if np.array_equal(mark.color, image):
                continue
            with mark.hold_sync():
                if mark.color.shape != image.shape:
                    mark.x, mark.y = np.arange(width), np.arange(image.shape[0])
                mark.color = image
        names = ", ".join(block["name"] for block in self.grid.blocks) or "nothing mapped"
        each = "a page" if share == 1 else f"{share} pages, in the rarest of their states"
        self.caption.value = (
            f"<h3>The whole address space</h3><p>{names}, row by row of {width} cells; "
            f"a cell is {each}.</p>"
        )


class Residency(ipywidgets.VBox):
    """How many pages each state of the CPU's table has, over the steps of the trace.

    Parameters
    ----------
    playhead
        The playhead to mark.
    """

    def __init__(self, playhead: Playhead) -> None:
        import bqplot

        self.playhead = playhead
        self.caption = ipywidgets.HTML()
        self._counts: dict[int, NDArray[np.int64]] = {}
        self._replay = playhead.trace.replay()  # its own: it goes where the playhead is not
        scales = {"x": bqplot.LinearScale(), "y": bqplot.LinearScale(min=0)}
        self._across = scales["x"]
        self._areas = bqplot.Lines(
            x=[0, 1], y=[0, 0], scales=scales, interpolation="step-after", fill="bottom",
            stroke_width=0, fill_opacities=[1.0],
        )  # fmt: skip
        self._here = bqplot.Lines(
            x=[0, 0], y=[0, 1], scales=scales, colors=["#7f7f7f"], stroke_width=3
        )
        axes = [
            bqplot.Axis(scale=scales["x"], label="step", tick_format="d", grid_lines="none"),
            bqplot.Axis(scale=scales["y"], side="left", label="pages", tick_format="d"),
        ]
        figure = bqplot.Figure(
            marks=[self._areas, self._here], axes=axes, padding_y=0, **_STILL,
            fig_margin={"top": 8, "bottom": 40, "left": 54, "right": 12},
        )  # fmt: skip
        figure.layout = ipywidgets.Layout(width="auto", height="220px")
        super().__init__([self.caption, figure])
        self._grow()
        playhead.observe(self._grow, ["length"])
        playhead.observe(self._mark, ["position"])

    def __repr__(self) -> str:
        return f"Residency(steps 0 to {self.playhead.length})"

    def _grow(self, change: Any = None) -> None:
        end = self.playhead.length
        self._counts |= count_states(self._replay, [end])
        most = max(min(MAX_COUNTS, MAX_COUNTED // max(int(self._counts[end].sum()), 1)), 32)
        stride = 1
        while end >= stride * most:
            stride *= 2  # so that most of what was counted stays in use as the trace grows
        steps = np.union1d(np.arange(0, end, stride), [end])
        missing = [int(step) for step in steps if int(step) not in self._counts]
        self._counts |= count_states(self._replay, missing)
        table = np.array([self._counts[int(step)] for step in steps])
        # Pages that no VMA covers are no pages of anybody.
        shown = [state for state in CPU_STATES if state.code and table[:, state.code].any()]
        counts = (
            table[:, [state.code for state in shown]].T if shown else np.zeros((1, len(steps)), int)
        )
        # A step's counts reach halfway to its neighbours, and the marker stands in their middle.
        edges = np.concatenate([[-0.5], (steps[1:] + steps[:-1]) / 2, [end + 0.5]])
        stacked = np.cumsum(counts[::-1], axis=0)[::-1]
        stacked = np.where(stacked, stacked, -1)  # out of sight: an area of 0 would leave a line
        self._across.min, self._across.max = -0.5, end + 0.5
        with self._areas.hold_sync():
            self._areas.x = edges
            # The area of the sum of all states is drawn first, and the others over it.
            self._areas.y = np.concatenate([stacked, stacked[:, -1:]], axis=1)
            self._areas.colors = [_colour(state) for state in shown] or ["#7f7f7f"]
            self._areas.fill_colors = self._areas.colors
            self._areas.fill_opacities = [1.0] * len(counts)
        self.caption.value = (
            "<h3>Pages by state in the CPU's table, over the steps</h3>"
            f'<ul class="hmm-legend">{"".join(map(_chip, shown))}</ul>'
        )
        self._top = max(int(table[:, 1:].max(initial=0)), 1)
        self._mark()

    def _mark(self, change: Any = None) -> None:
        at = self.playhead.position
        with self._here.hold_sync():
            self._here.x = np.array([at, at])
            self._here.y = np.array([0, self._top])


def _colour(state: PageState) -> str:
    """Choose a colour that suits a light and a dark theme."""
    return "var(--jp-border-color2)" if state.name == "empty" else state.colour_light


def _chip(state: PageState) -> str:
    style = f"background:{_colour(state)}"
    return f'<li><span class="hmm-chip" style="{style}"></span>{state.name}</li>'


def count_states(replay: Replay, positions: list[int]) -> dict[int, NDArray[np.int64]]:
    """Count the pages in each state of the CPU's table at some positions."""
    counts = {}
    for position in positions:
        state = replay.seek(position).state
        total = np.zeros(len(CPU_STATES), np.int64)
        for mm, _ in reading.address_spaces(state):
            for block in reading.blocks(state, replay.trace.names, mm):
                codes = reading.cpu_states(state, mm, block.start, block.stop)
                total += np.bincount(codes, minlength=len(CPU_STATES))
        counts[position] = total
    return counts


def binned(codes: NDArray[np.uint8], share: int) -> NDArray[np.uint8]:
    """Give one code for each ``share`` pages: the highest, which is the rarest in ordinary use."""
    if share == 1:
        return codes
    padded = np.zeros(-(-codes.size // share) * share, np.uint8)
    padded[: codes.size] = codes
    folded: NDArray[np.uint8] = padded.reshape(-1, share).max(axis=1)
    return folded


def _shape(pages: int) -> tuple[int, int]:
    """Choose cells in a row, and pages in a cell."""
    share = 1
    while pages > share * MAX_CELLS:
        share *= 2
    cells = max(-(-pages // share), 1)
    width = 8
    while width * width < cells * 2:
        width *= 2
    return width, share
