"""How the model's answers compare with a recording of a real Linux."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets

from hmmlab.kernel_traces import KERNEL, Verdict, compare
from hmmlab.widgets.playhead import Playhead

__all__ = ["Badge"]

#: An operation's answer, as in ``traces/``.
Answer = Mapping[str, Any]

_MARKS = {"same": "✓", "differs": "✗", "unrecorded": "○"}


class Badge(ipywidgets.VBox):
    """The verdict in one line; under it, folded away, both answers of the current operation.

    Parameters
    ----------
    playhead
        The playhead whose operation is compared.
    recording
        The recorded answers in order.
    """

    def __init__(self, playhead: Playhead, recording: Sequence[Answer]) -> None:
        self.playhead, self.recording = playhead, recording
        self.line = ipywidgets.HTML()
        self.both = ipywidgets.HTML()
        super().__init__([self.line, self.both])
        self.add_class("hmm-badge")
        playhead.observe(self._follow, ["position", "revision"])
        self._follow()

    def __repr__(self) -> str:
        return f"Badge({self.verdict.text})"

    def _follow(self, change: Any = None) -> None:
        if change is None or change["name"] == "revision":
            # A session leaves its answer in the trace; other operations have other results.
            results = [operation.result for operation in self.playhead.trace.operations]
            self.answers = [result for result in results if isinstance(result, dict)]
            self.verdict: Verdict = compare(self.answers, self.recording)
            kind, text = self.verdict.kind, escape(self.verdict.text)
            self.line.value = (
                f'<span class="hmm-verdict hmm-{kind}"><b aria-hidden="true">{_MARKS[kind]}</b> '
                f"{text}</span>"
            )
        self.both.value = self._answers()

    def _answers(self) -> str:
        operation = self.playhead.operation
        result = self.playhead.trace.operations[operation].result if operation >= 0 else None
        if not isinstance(result, dict):
            return ""
        at = next(i for i, answer in enumerate(self.answers) if answer is result)
        model: Answer = result
        recorded = self.recording[at] if at < len(self.recording) else None
        rows = []
        for key in {**model, **(recorded or {})}:
            ours = _text(model, key)
            theirs = _text(recorded, key) if recorded is not None else "not recorded"
            same = recorded is None or model.get(key) == recorded.get(key)
            rows.append(
                f'<tr{"" if same else " class=hmm-differs"}><th scope="row">{escape(key)}</th>'
                f"<td>{escape(theirs)}</td><td>{escape(ours)}</td></tr>"
            )
        titles = ("key", KERNEL, "model")
        head = "".join(f'<th scope="col">{title}</th>' for title in titles)
        return (
            f"<details><summary>Answers of operation {at + 1}: "
            f"<code>{escape(str(model.get('op', '')))}</code></summary>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></details>"
        )


def _text(answer: Answer, key: str) -> str:
    return json.dumps(answer[key]) if key in answer else "no such key"
