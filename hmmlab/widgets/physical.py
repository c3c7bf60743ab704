"""What the columns say about device memory: its chunks, its frames, and the driver's free list.

Pure reading of a :class:`~hmmlab.model.state.State`, as in :mod:`hmmlab.widgets.reading`; nothing
here draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.dmirror_device import UNITS
from hmmlab.model.entry import Pfns
from hmmlab.model.memremap import MEMORY_DEVICE_COHERENT, is_device_private_page
from hmmlab.model.page import PG_LOCKED, ZERO_PFN, page_rows
from hmmlab.model.rmap import rmap_walk
from hmmlab.model.state import State
from hmmlab.model.trace import Replay
from hmmlab.widgets import reading
from hmmlab.widgets.playhead import Page

__all__ = ["Chunk", "Frame", "chunks", "frames_of", "free_list", "ram_in_use"]

#: Columns of ``struct page`` whose change marks a frame.
_WATCHED = ("refcount", "mapcount", "flags", "content", "private", "mapping")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Device memory of one pagemap: frames ``first`` to ``last - 1``.

    Attributes
    ----------
    pagemap
        Its number, which every ``struct page`` of it carries (``page->pgmap``).
    kind
        "device-private" or "device-coherent".
    owner
        Whose it is, in words.
    unit
        Unit of the test device, or -1 where another driver has it.
    used
        Frames with references.
    """

    pagemap: int
    first: int
    last: int
    kind: str
    owner: str
    unit: int
    used: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame of device memory, and who knows it.

    Attributes
    ----------
    pages
        The pages, as (mm, vpn), whose entries name it.
    turn
        In how many allocations the driver hands it out, from 1; 0 where that is not known.
    behind
        Frame of RAM that holds its data; 0 where it does so itself, or where it is free.
    changed
        Whether the current step changed its ``struct page``.
    """

    pfn: int
    refcount: int
    mapcount: int
    locked: bool
    pages: tuple[Page, ...]
    turn: int
    behind: int
    changed: bool


def chunks(state: State) -> list[Chunk]:
    """All device memory, from the top of physical space downwards."""
    found = []
    for pagemap in np.flatnonzero(state["pagemap.last"]).tolist():
        first, last, owner, kind = (
            int(state[f"pagemap.{column}"][pagemap])
            for column in ("first", "last", "owner", "type")
        )
        rows = page_rows(state, np.array([last - 1, first]))
        used = np.count_nonzero(state["page.refcount"][rows[0] : rows[1] + 1])
        unit = owner - 1 if owner - 1 in UNITS else -1
        files = [label for file, label, _ in reading.device_files(state)
                 if state["device_file.device"][file] == owner]  # fmt: skip
        who = f"unit {unit}" if unit >= 0 else "another driver"
        found.append(
            Chunk(
                pagemap,
                first,
                last,
                "device-coherent" if kind == MEMORY_DEVICE_COHERENT else "device-private",
                f"{who} ({', '.join(files)})" if files else who,
                unit,
                int(used),
            )
        )
    return sorted(found, key=lambda chunk: -chunk.first)


def free_list(state: State, unit: int, most: int) -> Pfns:
    """Up to ``most`` free frames of a unit of the test device, in the order of handing out.

    Those that came back first in, last out; then those of the newest chunk that were never out.
    """
    free = int(state["dmirror_device.free"][unit])
    back = state[f"dmirror_device.free_list.{unit}"][max(free - most, 0) : free][::-1]
    fresh = int(state["dmirror_device.fresh"][unit])
    top = int(state["dmirror_device.chunk"][unit]) + fresh
    new = np.arange(top - 1, top - 1 - min(fresh, most - back.size), -1)
    return np.concatenate([back, new])


def frames_of(replay: Replay, chunk: Chunk, start: int, stop: int) -> list[Frame]:
    """Frames of a chunk, counted from its last downwards: the ``start``-th to before ``stop``."""
    state = replay.state
    pfns = np.arange(chunk.last - 1 - start, max(chunk.last - 1 - stop, chunk.first - 1), -1)
    rows = page_rows(state, pfns)
    changed = np.zeros(pfns.size, np.bool_)
    for column in _WATCHED:
        changed |= np.isin(rows, replay.changed(f"page.{column}"))
    turns: dict[int, int] = {}
    if chunk.unit >= 0:
        order = free_list(state, chunk.unit, stop + int(state["dmirror_device.free"][chunk.unit]))
        turns = {pfn: turn for turn, pfn in enumerate(order.tolist(), 1)}
    private = is_device_private_page(state, pfns)
    owners = _mapped_by(state, pfns)
    columns = (state[f"page.{name}"][rows] for name in ("refcount", "mapcount", "flags", "private"))
    numbers = zip(*(column.tolist() for column in columns), strict=True)
    return [
        Frame(
            pfn=pfn,
            refcount=references,
            mapcount=mapped,
            locked=bool(flags & PG_LOCKED),
            pages=tuple(owners.get(pfn, ())),
            turn=0 if references else turns.get(pfn, 0),
            behind=word if own and references else 0,
            changed=mark,
        )
        for pfn, (references, mapped, flags, word), own, mark in zip(
            pfns.tolist(), numbers, private.tolist(), changed.tolist(), strict=True
        )
    ]


def _mapped_by(state: State, pfns: Pfns) -> dict[int, list[Page]]:
    """Find the pages whose entries name each frame."""
    found = rmap_walk(state, pfns)
    owners: dict[int, list[Page]] = {}
    columns = (pfns[found.which], state["vma.mm"][found.vma], found.vpn, found.maps)
    for pfn, mm, vpn, mapped in zip(*(column.tolist() for column in columns), strict=True):
        if mapped:
            owners.setdefault(pfn, []).append((mm, vpn))
    return owners


def ram_in_use(state: State) -> tuple[int, int]:
    """Frames of RAM in use, in node 0 and in node 1; the zero page does not count."""
    counts: NDArray[np.int32] = state["page.refcount"][: state.ram_pages]
    half = state.ram_pages // 2
    low, high = np.count_nonzero(counts[:half]), np.count_nonzero(counts[half:])
    return int(low) - int(counts[ZERO_PFN] != 0), int(high)
