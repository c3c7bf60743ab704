"""hmmlab: learn how a device shares a process's memory in Linux.

from hmmlab import Machine, Process, show

machine = Machine()
trace = machine.record()
process = Process(machine)
device = process.open(0)
a = process.mmap(16)
process.store(a, range(100, 116))
device.read(a)
show(trace)
"""

from typing import TYPE_CHECKING, Any

from hmmlab.model.driver import Driver
from hmmlab.model.machine import BULK, KernelError, Machine
from hmmlab.model.process import Process
from hmmlab.model.region import Pages
from hmmlab.model.test_hmm import Dmirror
from hmmlab.model.trace import Replay, Step, Trace
from hmmlab.scenario import ScenarioError
from hmmlab.session import Session

if TYPE_CHECKING:
    from hmmlab.saving import Saved, SaveError, load, save
    from hmmlab.widgets import show

__all__ = [
    "BULK",
    "Dmirror",
    "Driver",
    "KernelError",
    "Machine",
    "Pages",
    "Process",
    "Replay",
    "SaveError",
    "Saved",
    "ScenarioError",
    "Session",
    "Step",
    "Trace",
    "load",
    "save",
    "show",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load the widgets, and files with their sums, only when they are first used."""
    if name == "show":
        from hmmlab.widgets import show

        return show
    if name in ("SaveError", "Saved", "load", "save"):
        from hmmlab import saving

        return getattr(saving, name)
    raise AttributeError(f"module 'hmmlab' has no attribute {name!r}")
