"""The reader's names for address spaces, regions and device files.

They are no state of the machine, which knows numbers only; whoever reads it shares one set of them.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["Names"]


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
        First page and page past the last of each named region, by (mm, name).
    processes
        Names of address spaces by their number.
    files
        Names of open device files by their number.
    """

    def __init__(self) -> None:
        self.regions: dict[tuple[int, str], tuple[int, int]] = {}
        self.processes: dict[int, str] = {}
        self.files: dict[int, str] = {}

    def learn(self, mm: int, name: str, start: int, stop: int) -> None:
        """Call the pages from ``start`` to ``stop`` of ``mm`` by a name; a longer range wins."""
        old = self.regions.get((mm, name), (start, stop))
        self.regions[mm, name] = (old[0], max(old[1], stop))

    def inherit(self, parent: int, child: int) -> None:
        """Let a child know the regions of its parent."""
        for name, pages in self.of(parent).items():
            self.regions[child, name] = pages

    def of(self, mm: int) -> dict[str, tuple[int, int]]:
        """All names of one address space with their ranges."""
        return {name: pages for (owner, name), pages in self.regions.items() if owner == mm}

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
