"""Measure the model against the host's kernel, against copying, and against a loop over pages.

:func:`bench` measures, :func:`table` shows. The same story is told of three parties, and of a
fourth at one size:

    model     this package, on numpy columns
    host      the kernel that we run on, to a child process of ours, through mmap(2)
    copy      numpy, which copies as many bytes as the operation must touch
    loop      a textbook's simulator, a Python loop over pages

Every figure is the median of five rounds or more, after one that does not count.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from hmmlab.bench import model, other, textbook
from hmmlab.bench.rounds import ROUNDS, Median, Story, medians
from hmmlab.model.machine import Machine

__all__ = ["SIZES", "bench", "table"]

#: Pages of each size that is measured.
SIZES = (4_096, 65_536, 1_048_576)

#: The loop, and the bytes a page, are measured at no more pages than this.
_MODERATE = 65_536

#: Bytes of the host's memory that its story takes for each page: the page, its copy, and some air.
_HOST_BYTES = 3 * 4096

#: A figure, or none.
_Figure = float | None


def bench(
    sizes: Iterable[int] = SIZES, say: Callable[[str], object] = lambda what: None
) -> dict[str, Any]:
    """Measure everything.

    Parameters
    ----------
    sizes
        Numbers of pages.
    say
        Is told what is being measured.

    Returns
    -------
    ``rows`` for each operation and size, ``loop`` for each operation, and ``other``. Times are in
    nanoseconds a page, a call for ``invalidate_one_page``; None where there is no figure.
    """
    sizes = tuple(sizes)
    fewer: list[str] = []

    def tell(party: str, story: Story, pages: int) -> dict[str, Median]:
        say(f"{party}, {pages:,} pages")
        return _noted(party, pages, medians(story), fewer)

    def model_tells(pages: int) -> dict[str, Median]:
        mapping = tell("model, mapping", model.life_of_a_mapping(pages), pages)
        return mapping | tell("model, mirror", model.life_of_a_mirror(pages), pages)

    rows, seen = [], {}
    for pages in sizes:
        say(f"host, {pages:,} pages")
        host = _noted("host", pages, _host(pages), fewer)
        mine = seen[pages] = model_tells(pages)
        copies = tell("copy", _copying(pages), pages)
        rows += [_row(name, pages, mine, host, copies) for name in model.OPERATIONS]
    moderate = min(_MODERATE, max(sizes))
    mine = seen.get(moderate) or model_tells(moderate)
    loop = tell("loop", textbook.life_of_a_mapping(moderate), moderate)
    say("memory, recording and import")
    return {
        "rows": rows,
        "loop": [_loop_row(name, moderate, loop, mine) for name in loop],
        "other": {
            **other.bytes_per_page(moderate),
            **other.recording(max(sizes)),
            "import_ms": other.import_ms("hmmlab"),
            "import_numpy_ms": other.import_ms("numpy"),
            "host": _host_name(),
            "fewer_rounds": fewer,
        },
    }


def _noted(party: str, pages: int, found: dict[str, Median], fewer: list[str]) -> dict[str, Median]:
    """``found``, once it is noted where there was no time for all rounds."""
    rounds = min((median.rounds for median in found.values()), default=ROUNDS)
    if rounds < ROUNDS:
        fewer.append(f"{party}, {pages} pages: {rounds}")
    return found


def _copying(pages: int) -> Story:
    machine = Machine(16)
    sizes = {
        name: pages * sum(machine[column].itemsize for column in columns)
        for name, columns in model.COLUMNS.items()
    }
    source, target = np.ones((2, max(sizes.values())), np.uint8)
    while True:
        for name, size in sizes.items():
            yield name, partial(np.copyto, target[:size], source[:size])


# --- the host -------------------------------------------------------------------------------------


def _host(pages: int) -> dict[str, Median]:
    """What the host's kernel takes; nothing where it is no Linux, or short of memory."""
    if sys.platform != "linux" or _free_bytes() < pages * _HOST_BYTES:
        return {}
    output = subprocess.check_output([sys.executable, "-m", "hmmlab.bench.host", str(pages)])
    return {name: Median(*median) for name, median in json.loads(output).items()}


def _free_bytes() -> int:
    with open("/proc/meminfo") as meminfo:
        words = dict(line.split(":") for line in meminfo)
    return int(words["MemAvailable"].split()[0]) * 1024


def _host_name() -> str:
    return f"{platform.system()} {platform.release()}, {platform.machine()}"


# --- rows -----------------------------------------------------------------------------------------


def _per_page(found: dict[str, Median], name: str, pages: int) -> _Figure:
    calls = model.CALLS if name == "invalidate_one_page" else pages
    return found[name].seconds / calls * 1e9 if name in found else None


def _ratio(over: _Figure, under: _Figure) -> _Figure:
    return over / under if over is not None and under else None


def _row(
    name: str,
    pages: int,
    mine: dict[str, Median],
    host: dict[str, Median],
    copies: dict[str, Median],
) -> dict[str, Any]:
    of_model, of_host, of_copy = (_per_page(found, name, pages) for found in (mine, host, copies))
    return {
        "operation": name,
        "pages": pages,
        "model_ns_per_page": of_model,
        "host_ns_per_page": of_host,
        "host_over_model": _ratio(of_host, of_model),
        "copy_ns_per_page": of_copy,
        "model_over_copy": _ratio(of_model, of_copy),
    }


def _loop_row(
    name: str, pages: int, loop: dict[str, Median], mine: dict[str, Median]
) -> dict[str, Any]:
    of_loop, of_model = (_per_page(found, name, pages) for found in (loop, mine))
    return {
        "operation": name,
        "pages": pages,
        "loop_ns_per_page": of_loop,
        "model_ns_per_page": of_model,
        "loop_over_model": _ratio(of_loop, of_model),
    }


# --- the table ------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """A report as text, for people."""
    parts = [_columns(report[part]) for part in ("rows", "loop") if report[part]]
    rest = "\n".join(f"{name}: {_shown(value)}" for name, value in report["other"].items())
    return "\n\n".join([*parts, rest])


def _columns(rows: list[dict[str, Any]]) -> str:
    heads = [name.replace("_per_page", "/page").replace("_", " ") for name in rows[0]]
    cells = [heads, *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        for line in cells
    )


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "; ".join(value) or "none" if isinstance(value, list) else str(value)
