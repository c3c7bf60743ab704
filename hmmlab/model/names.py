"""The reader's names for address spaces, regions and device files.

They are no state of the machine, which knows numbers only; whoever reads it shares one set of them.
"""

from __future__ import annotations

from collections.abc import Container
from itertools import count, product
from string import ascii_uppercase
from typing import Protocol

__all__ = ["Names", "free_name"]


def free_name(used: Container[str]) -> str:
    """The first of A, B, ... Z, AA, AB, ... that is not in ``used``."""
    names = ("".join(name) for size in count(1) for name in product(ascii_uppercase, repeat=size))
    return next(name for name in names if name not in used)


class _Step(Protocol):
    @property
    def mm(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def text(self) -> str: ...


class Names:
    """The reader's names, and sentences that use them.

    Attributes
    ----------
    regions
        First page and page past the last of each named region, by address space and name.
    processes
        Names of address spaces by their number.
    files
        Names of open device files by their number.
    """

    def __init__(self) -> None:
        self.regions: dict[int, dict[str, tuple[int, int]]] = {}
        self.processes: dict[int, str] = {}
        self.files: dict[int, str] = {}

    def learn(self, mm: int, name: str, start: int, stop: int) -> None:
        """Call the pages from ``start`` to ``stop`` of ``mm`` by a name; a longer range wins."""
        mine = self.regions.setdefault(mm, {})
        first, last = mine.get(name, (start, stop))
        mine[name] = (first, max(last, stop))

    def inherit(self, parent: int, child: int) -> None:
        """Let a child know the regions of its parent."""
        self.regions[child] = dict(self.of(parent))

    def everywhere(self) -> list[str]:
        """All names of regions, those of the oldest address space first."""
        return list(dict.fromkeys(name for mine in self.regions.values() for name in mine))

    def of(self, mm: int) -> dict[str, tuple[int, int]]:
        """All names of one address space with their ranges."""
        return self.regions.get(mm, {})

    def place(self, mm: int, start: int, stop: int) -> str:
        """A range in words, such as ``A page 5`` or ``A pages 0 to 15``."""
        for name, (first, last) in self.of(mm).items():
            if first <= start < last:
                a, b = start - first, stop - first - 1
                return f"{name} page {a}" if a >= b else f"{name} pages {a} to {b}"
        if start == 0 and stop > 1 << 36:
            return "the whole address space"
        return f"pages {start:#x} to {stop - 1:#x}" if stop > start + 1 else f"page {start:#x}"

    def sentence(self, step: _Step) -> str:
        """What a step did, in one sentence."""
        one = step.stop - step.start == 1
        return step.text.format(
            range=self.place(step.mm, step.start, step.stop),
            are="is" if one else "are",
            s="s" if one else "",
        )
