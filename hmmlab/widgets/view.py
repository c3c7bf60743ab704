"""The side-by-side view: everything about one trace, composed around one playhead."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np

from hmmlab.model.trace import Trace
from hmmlab.widgets.badge import Badge
from hmmlab.widgets.controls import Controls, Session
from hmmlab.widgets.inspector import Inspector
from hmmlab.widgets.page_table_grid import PageTableGrid
from hmmlab.widgets.palette import CPU_STATES, DEVICE_STATES, PageState
from hmmlab.widgets.playhead import Playhead
from hmmlab.widgets.state_line import PlayheadLine
from hmmlab.widgets.timeline import StepList, Timeline

__all__ = ["AddressSpaceView", "counts_in_words", "show"]


class AddressSpaceView(PlayheadLine, ipywidgets.VBox):
    """A process's page table and a device's, side by side, at any step of a trace.

    Make one with :func:`show`.

    Attributes
    ----------
    playhead
        Move it (``view.playhead.position = 5``) and every part follows.
    """

    def __init__(
        self,
        playhead: Playhead,
        *,
        session: Session | None = None,
        recording: list[dict[str, Any]] | None = None,
        charts: bool = True,
        controls: bool = True,
    ) -> None:
        self.playhead = playhead
        self.grid = PageTableGrid(playhead)
        self.timeline = Timeline(playhead)
        self.steps = StepList(playhead)
        self.inspector = Inspector(playhead)
        self.summary = ipywidgets.Label()
        self.summary.add_class("hmm-summary")
        parts: list[ipywidgets.Widget] = []
        if recording is not None:
            self.badge = Badge(playhead, recording)
            parts.append(self.badge)
        heading = ipywidgets.HTML("<h3>Steps of this operation</h3>")
        step_box = ipywidgets.VBox([heading, self.steps])
        step_box.add_class("hmm-step-box")
        self.grid.add_class("hmm-tables-box")
        self.steps.add_class("hmm-step-list")
        body = ipywidgets.HBox([self.grid, step_box, self.inspector])
        body.add_class("hmm-body")
        if session is not None and controls:
            self.controls = Controls(session, playhead, self.timeline.play_from)
            body.children = (self.grid, step_box, self.controls, self.inspector)
            body.add_class("hmm-live")
        parts += [self.timeline, body]
        if charts:
            from hmmlab.widgets.charts import Overview, Residency

            self.charts = ipywidgets.HBox([Residency(playhead), Overview(self.grid)])
            self.charts.add_class("hmm-charts")
            parts.append(self.charts)
        super().__init__([*parts, self.summary])
        self.add_class("hmm-view")
        playhead.observe(self._follow, ["position", "length", "device"])
        self._follow()

    def _line(self) -> str:
        blocks = self.grid.blocks
        pages = self.grid.codes.size // 2
        if not blocks:
            return f"{self._step()}: nothing mapped"
        what = blocks[0]["name"] if len(blocks) == 1 else f"{len(blocks)} regions"
        cpu = counts_in_words(self.grid.codes[:pages], CPU_STATES)
        device = counts_in_words(self.grid.codes[pages:], DEVICE_STATES)
        line = f"{self._step()}: {what} {pages} pages, CPU {cpu}"
        return f"{line}, device {device}" if self.grid.devices else f"{line}, no device"

    def _follow(self, change: Any = None) -> None:
        self.summary.value = self._line()


def show(
    source: Session | Trace,
    *,
    recording: str | Path | Iterable[Mapping[str, Any]] | None = None,
    charts: bool = True,
    controls: bool = True,
    position: int | None = None,
) -> AddressSpaceView:
    """Show a session or a trace: both page tables, the steps, the selected page.

    Parameters
    ----------
    source
        A session, which can be acted on, or a trace.
    recording
        The answers of a real kernel to compare with: a ``.jsonl`` file or its objects.
    charts
        Whether to draw the charts.
    controls
        Whether a session gets buttons.
    position
        The step to begin at; the end when it is not given.

    Raises
    ------
    TypeError
        When ``source`` is neither.
    ValueError
        When the trace has no such position.
    """
    trace = source if isinstance(source, Trace) else getattr(source, "trace", None)
    if not isinstance(trace, Trace):
        raise TypeError(f"show() takes a Session or a Trace, not {type(source).__name__}")
    if position is not None and not 0 <= position <= len(trace):
        raise ValueError(f"position {position}: this trace has 0 to {len(trace)}")
    session = None if isinstance(source, Trace) else source
    return AddressSpaceView(
        Playhead(trace, position),
        session=session,
        recording=None if recording is None else _answers(recording),
        charts=charts,
        controls=controls,
    )


def _answers(recording: str | Path | Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(recording, str | Path):
        lines = Path(recording).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    return [dict(answer) for answer in recording]


def counts_in_words(codes: Any, states: tuple[PageState, ...]) -> str:
    """Pages by state, most first, without the pages that have none."""
    counts = np.bincount(codes, minlength=len(states))
    order = sorted((s for s in states if s.code and counts[s.code]), key=lambda s: -counts[s.code])
    return " ".join(f"{counts[state.code]} {state.short}" for state in order[:3]) or "none"
