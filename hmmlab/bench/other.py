"""What is measured besides operations: memory, what recording costs, how long a seek takes."""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial

import numpy as np

from hmmlab.bench.model import a_process
from hmmlab.bench.rounds import Story, medians
from hmmlab.model.trace import Replay

__all__ = ["bytes_per_page", "import_ms", "recording"]

#: Times that a fresh interpreter imports something.
_IMPORTS = 5


def bytes_per_page(pages: int) -> dict[str, float]:
    """Bytes of all columns that a mapped page takes, and one that the device has.

    Both are in the CPU's and in the device's page table. A page on the device has a label there and
    a frame of RAM behind it; the frame that it left counts as well, for its row was used.
    """
    process, where = a_process(pages)
    device = process.open(0)
    before = process.machine.nbytes
    process.store(where, 1)
    device.read(where)
    resident = process.machine.nbytes
    device.to_dev(where)
    migrated = process.machine.nbytes
    return {
        "bytes_per_resident_page": (resident - before) / pages,
        "bytes_per_migrated_page": (migrated - before) / pages,
    }


def recording(pages: int) -> dict[str, float]:
    """What it costs to record four operations, and to seek across the trace and back."""
    found = {recorded: medians(_four_operations(pages, recorded)) for recorded in (False, True)}
    silent, recorded = (
        sum(median.seconds for name, median in found[which].items() if name != "seek")
        for which in (False, True)
    )
    return {
        "recorded_over_silent": recorded / silent,
        "seek_end_and_back_ms": found[True]["seek"].seconds * 1e3,
    }


def _four_operations(pages: int, recorded: bool) -> Story:
    process, where = a_process(pages)
    machine = process.machine
    values = np.arange(pages, dtype=np.uint64)
    while True:
        trace = machine.record() if recorded else None
        yield "store", partial(process.store, where, values)
        yield "mprotect", partial(process.mprotect, where, "r")
        yield "load", partial(process.load, where)
        yield "dontneed", partial(process.madvise, where, "dontneed")
        if trace:
            machine.detach(trace)
            replay = trace.replay()
            yield "seek", partial(_there_and_back, replay)
        process.mprotect(where, "rw")


def _there_and_back(replay: Replay) -> None:
    replay.seek(len(replay.trace)).seek(0)


def import_ms(module: str) -> float:
    """Milliseconds that a fresh interpreter takes to import ``module``, the median of five."""
    code = (
        "import sys, time; t = time.perf_counter(); __import__(sys.argv[1]); "
        "print(time.perf_counter() - t)"
    )
    seconds = [
        float(subprocess.check_output([sys.executable, "-c", code, module]))
        for _ in range(_IMPORTS + 1)
    ]
    return statistics.median(seconds[1:]) * 1e3
