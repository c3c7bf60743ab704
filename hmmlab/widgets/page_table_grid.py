"""Both page tables side by side, and the frames behind them, drawn on canvases in the browser.

The states of all pages are one uint8 array: first those of the CPU's table, block after block, then
those of the device's in the same order. The browser gets it whole when it opens the widget or when
the mappings change, and after that only the cells that a step changed. Every message has a number;
a browser that missed one asks for the whole again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
from numpy.typing import NDArray
from traitlets import Dict, Int, Tuple, link

from hmmlab.widgets import reading
from hmmlab.widgets.palette import CPU_STATES, DEVICE_STATES, PageState
from hmmlab.widgets.playhead import Page, Playhead

__all__ = ["PageTableGrid", "front"]

#: Frames of one kind that are drawn; with more in use, those around the selected page's.
MAX_FRAMES = 512

_FRONT = Path(__file__).with_name("front")


def front(*names: str) -> str:
    """Text of one or more files for the browser, joined in this order into one module."""
    return "\n".join((_FRONT / name).read_text(encoding="utf-8") for name in names)


class PageTableGrid(anywidget.AnyWidget):
    """The page table of the CPU and that of the device, the same page at the same place.

    Parameters
    ----------
    playhead
        The playhead to follow.
    """

    _esm = front("store.js", "make.js", "paint.js", "block.js", "map.js", "frames.js", "grid.js")
    _css = front("style.css")

    # Computed whenever the browser asks for the widget's state, so it is never out of date.
    _whole = Dict().tag(sync=True, to_json=lambda _, grid: grid._whole_message())
    selected = Tuple(Int(), Int(), default_value=None, allow_none=True).tag(sync=True)
    hovered = Tuple(Int(), Int(), default_value=None, allow_none=True).tag(sync=True)

    def __init__(self, playhead: Playhead) -> None:
        self.playhead = playhead
        self.serial = 0
        self._read()
        super().__init__(selected=playhead.selected, hovered=playhead.hovered)
        link((playhead, "selected"), (self, "selected"))
        link((playhead, "hovered"), (self, "hovered"))
        playhead.observe(self._follow, ["position", "length", "device"])
        playhead.observe(self._look, "selected")
        self.on_msg(self._answer)

    def __repr__(self) -> str:
        return f"PageTableGrid({len(self.blocks)} regions, {self.codes.size // 2} pages)"

    def codes_of(self, page: Page) -> tuple[int, int] | None:
        """Codes of a page in the CPU's table and the device's; None when no block shows it."""
        mm, vpn = page
        for block in self.blocks:
            if block["mm"] == mm and block["start"] <= vpn < block["stop"]:
                at = block["at"] + vpn - block["start"]
                return int(self.codes[at]), int(self.codes[at + self.codes.size // 2])
        return None

    # --- reading ----------------------------------------------------------------------------------
    def _read(self) -> None:
        """Read all that is drawn, at the playhead's position."""
        replay = self.playhead.replay
        state, names = replay.state, self.playhead.trace.names
        self.blocks: list[dict[str, Any]] = []
        self.devices: list[str] = []
        cpu, device, cpu_marks, device_marks = [], [], [], []
        at = 0
        for mm, process in reading.address_spaces(state):
            file, label = self.playhead.device_of(mm)
            if label and label not in self.devices:
                self.devices.append(label)
            for block in reading.blocks(state, names, mm):
                span = block.start, block.stop
                cpu.append(reading.cpu_states(state, mm, *span))
                device.append(
                    reading.device_states(state, file, *span) if file
                    else np.zeros(span[1] - span[0], np.uint8)
                )  # fmt: skip
                marks = reading.changed_pages(replay, mm, *span)
                cpu_marks.append(marks[0])
                device_marks.append(marks[1])
                drawn = {**asdict(block), "process": process, "at": at}
                self.blocks.append(drawn)
                at += span[1] - span[0]
        self.codes = _joined([*cpu, *device], np.uint8)
        self.marks = np.flatnonzero(_joined([*cpu_marks, *device_marks], np.bool_))
        self.frames = self._read_frames()

    def _read_frames(self) -> list[dict[str, Any]]:
        """Read the strips of frames, around the selected page's."""
        state, selected = self.playhead.replay.state, self.playhead.selected
        near = reading.page_frames(state, *selected) if selected else []
        kinds = zip(("RAM", "Device memory"), reading.frames(state, near, MAX_FRAMES), strict=True)
        return [
            {"title": title, "total": kind.total, "first": kind.first, "cells": kind.cells}
            for title, kind in kinds
        ]

    # --- telling the browser ----------------------------------------------------------------------
    def _whole_message(self) -> dict[str, Any]:
        return {
            "serial": self.serial,
            "blocks": self.blocks,
            "devices": self.devices,
            "frames": self.frames,
            "states": [_legend(CPU_STATES), _legend(DEVICE_STATES)],
            "codes": self.codes.tobytes(),
            "marks": _runs(self.marks),
        }

    def _follow(self, change: Any) -> None:
        blocks, devices, codes, frames = self.blocks, self.devices, self.codes, self.frames
        marks = self.marks
        self._read()
        moved = blocks != self.blocks or devices != self.devices
        if moved and list(map(_place, blocks)) != list(map(_place, self.blocks)):
            self._send_whole()
            return
        changed = np.flatnonzero(codes != self.codes)
        same = frames == self.frames
        if same and not moved and not changed.size and np.array_equal(marks, self.marks):
            return
        # A cell costs five bytes as a change and one as a part of the whole.
        if changed.size * 5 > self.codes.size + 4096:
            self._send_whole()
            return
        self.serial += 1
        message: dict[str, Any] = {"kind": "change", "serial": self.serial}
        if not same:
            message["frames"] = self.frames
        if moved:
            message |= {"blocks": self.blocks, "devices": self.devices}
        buffers = [
            changed.astype(np.uint32).tobytes(),
            self.codes[changed].tobytes(),
            _runs(self.marks),
        ]
        self.send(message, buffers)

    def _look(self, change: Any) -> None:
        """Show the frames around those of a page that was just selected."""
        frames = self._read_frames()
        if frames != self.frames:
            self.frames = frames
            self.serial += 1
            message = {"kind": "change", "serial": self.serial, "frames": frames}
            self.send(message, [b"", b"", _runs(self.marks)])

    def _send_whole(self) -> None:
        self.serial += 1
        message = {"kind": "whole", **self._whole_message()}
        buffers = [message.pop("codes"), message.pop("marks")]
        self.send(message, buffers)

    def _answer(self, _: Any, message: dict[str, Any], buffers: Iterable[Any]) -> None:
        if message.get("kind") == "hello" and message.get("serial") != self.serial:
            self._send_whole()


def _place(block: dict[str, Any]) -> tuple[Any, ...]:
    """Which cells of the array a block has."""
    return tuple(block[key] for key in ("mm", "name", "start", "stop", "at"))


def _joined(parts: list[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _runs(places: NDArray[np.int64]) -> bytes:
    """Ascending places as runs: pairs of first place and place past the last, as uint32."""
    breaks = np.flatnonzero(np.diff(places) > 1)
    first, last = np.concatenate([[0], breaks + 1]), np.append(breaks, places.size - 1)
    ends = np.stack([places[first], places[last] + 1], axis=1) if places.size else places
    return ends.astype(np.uint32).tobytes()


def _legend(states: tuple[PageState, ...]) -> list[dict[str, Any]]:
    return [asdict(state) for state in states]
