"""Process: a task with an address space, and what it asks of the kernel.

    machine = Machine()
    process = Process(machine)
    device = process.open(0)
    a = process.mmap(16)
    process.store(a, range(16))
    device.read(a[4:8])

Every method acts at once. ``process.steps.store(a, 1)`` is the same operation as steps, which have
not happened yet.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hmmlab.model.access import user_access
from hmmlab.model.dmirror_device import UNITS
from hmmlab.model.driver import Driver
from hmmlab.model.fork import dup_mmap
from hmmlab.model.machine import Actor, Machine, Routine
from hmmlab.model.madvise import ADVICE, sys_madvise
from hmmlab.model.mlock import sys_mlock
from hmmlab.model.mm_types import flags_of_prot, new_mm
from hmmlab.model.mmap import KINDS, close_unmapped_files, exit_mmap, sys_mmap, sys_munmap
from hmmlab.model.mprotect import sys_mprotect
from hmmlab.model.mremap import sys_mremap
from hmmlab.model.names import free_name
from hmmlab.model.operation import StepsOf, operation
from hmmlab.model.pins import close_holders, share_holders
from hmmlab.model.region import REGION_PAGES, REGION_START, Pages
from hmmlab.model.task_mmu import clear_refs_soft_dirty, read_pagemap
from hmmlab.model.test_hmm import Dmirror

__all__ = ["Process"]

D = TypeVar("D", bound=Driver)
R = TypeVar("R")


class Process:
    """A task with an address space of its own.

    Parameters
    ----------
    machine
        Where it runs.
    name
        What the reader calls it; the default is p0, p1, and so on.

    Attributes
    ----------
    mm
        Number of its address space.
    regions
        First page of every region by name, in the order of first mention.
    """

    def __init__(self, machine: Machine, name: str | None = None) -> None:
        self.machine = machine
        self.name = name if name is not None else f"p{len(machine.names.processes)}"
        self.actor = Actor(self.name)
        self.regions: dict[str, int] = {}
        self.files: dict[str, Driver] = {}
        self._slots = 0
        self._live_in(new_mm(machine, self.name))

    def _live_in(self, mm: int) -> None:
        self.mm = mm
        self.machine.objects.setdefault("process", {})[mm] = self
        self.machine.names.processes[mm] = self.name

    def __repr__(self) -> str:
        return f"Process({self.name!r}, regions {', '.join(self.regions) or 'none yet'})"

    @property
    def steps(self) -> StepsOf:
        """The operations as steps that have not run: ``process.steps.store(a, 1)``."""
        return StepsOf(self)

    # --- names ------------------------------------------------------------------------------------
    def region(self, name: str, pages: int) -> Pages:
        """The first ``pages`` pages of the region ``name``, which gets a place when it is new."""
        if name not in self.regions:
            self.regions[name] = REGION_START + self._slots * REGION_PAGES
            self._slots += max(1, -(-pages // REGION_PAGES))
        start = self.regions[name]
        if pages:
            self.machine.names.learn(self.mm, name, start, start + pages)
        return Pages(name, self.mm, start, start + pages)

    def here(self, where: Pages) -> Pages:
        """The pages of this process that have the addresses of another's."""
        return Pages(where.name, self.mm, where.start, where.stop)

    def in_words(self, where: Pages) -> str:
        """``where`` as the scenario language has it: region, offset, pages.

        Raises
        ------
        ValueError
            When it belongs to another address space, or is empty.
        """
        if where.mm != self.mm:
            raise ValueError(f"{where} is not in the address space of {self.name}")
        if not len(where):
            raise ValueError(f"{where} is empty; expected at least one page")
        return f"{where.name} {where.start - self.regions[where.name]} {len(where)}"

    @staticmethod
    def words(where: Pages, values: ArrayLike) -> NDArray[np.uint64]:
        """``values`` as one 64-bit word a page; a single one stands for all.

        Raises
        ------
        ValueError
            When they are neither one nor as many as the pages, or not whole numbers.
        """
        given = np.asarray(values if not isinstance(values, range) else list(values))
        if given.dtype.kind not in "iu":
            raise ValueError(f"values of {given.dtype}; expected whole numbers of 64 bits")
        if given.shape not in ((), (1,), (len(where),)):
            raise ValueError(f"{given.size} values for {len(where)} pages of {where.name}")
        return np.broadcast_to(given, (len(where),)).astype(np.uint64, order="C")

    # --- devices ----------------------------------------------------------------------------------
    def open(self, unit: int = 0, name: str | None = None) -> Dmirror:
        """Open /dev/hmm_dmirror``unit``; the file is called ``name``, by default d0, d1, ...

        Raises
        ------
        ValueError
            When there is no such unit.
        """
        if unit not in UNITS:
            raise ValueError(f"unit {unit}; expected one of {UNITS}")
        return self.attach(Dmirror, name, unit + 1)

    def attach(self, driver: type[D], name: str | None = None, device: int = 1) -> D:
        """Let a driver of your own mirror this process. Returns its open file."""
        name = name if name is not None else f"d{len(self.files)}"
        file = driver(self, name, device)
        file.open()
        self.files[name] = file
        return file

    # --- life -------------------------------------------------------------------------------------
    @operation
    def fork(self, name: str | None = None) -> tuple[str, Routine[Process]]:
        """A child with a copy of every mapping; it inherits the open device files.

        ``child.here(a)`` are its pages at the addresses of ``a``. An inherited file still drives
        this process's address space.
        """
        name = name if name is not None else f"p{len(self.machine.names.processes)}"
        return f"fork {name}", self.clone(name)

    def clone(self, name: str) -> Routine[Process]:
        """The routine behind :meth:`fork`."""
        mm = yield from dup_mmap(self.machine, self.mm, name)
        child = object.__new__(type(self))
        child.machine, child.name, child.actor = self.machine, name, Actor(name)
        child.regions, child.files, child._slots = dict(self.regions), dict(self.files), self._slots
        child._live_in(mm)
        self.machine.names.inherit(self.mm, mm)
        for file in self.files.values():
            file.get()
        share_holders(self.machine, mm, self.mm)
        return child

    @operation
    def exit(self) -> tuple[str, Routine[None]]:
        """The process ends: first its memory goes, then its files are closed."""
        return f"exit {self.name}", self.do_exit()

    def do_exit(self) -> Routine[None]:
        """The routine behind :meth:`exit`."""
        yield from exit_mmap(self.machine, self.mm)
        for file in list(self.files.values()):
            yield from file.close_file()
        self.files.clear()
        close_holders(self.machine, self.mm)
        yield from close_unmapped_files(self.machine)

    # --- system calls -----------------------------------------------------------------------------
    @operation
    def mmap(
        self,
        pages: int,
        prot: str = "rw",
        name: str | None = None,
        kind: str = "private",
        device: Driver | None = None,
    ) -> tuple[str, Routine[Pages]]:
        """Map ``pages`` pages of memory.

        Parameters
        ----------
        prot
            Letters of ``rwx``, or ``none``.
        kind
            "private" or "shared" anonymous memory, or "file_private", "file_shared": a fresh file
            whose page i holds 7000 + i; "hugetlb" huge pages from the pool, a multiple of 512
            pages; "mixed" the open file ``device``, which has a page of zeros everywhere at once.
        name
            What to call the region; the default is the next free letter. A region that has a
            place already is mapped there anew.

        Raises
        ------
        ValueError
            For no pages, a protection or a kind that is none, a device where it does not belong.
        KernelError
            ENOMEM when the pool has not so many huge pages left.
        """
        if (kind == "mixed") != (device is not None):
            raise ValueError(f"device {device} for kind {kind!r}; expected one for 'mixed' alone")
        if device is not None:
            device.check_open()
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}; expected one of {', '.join(KINDS)}")
        if pages < 1:
            raise ValueError(f"mmap of {pages} pages; expected at least 1")
        flags_of_prot(prot)
        where = self.region(name if name is not None else free_name(self.regions), pages)
        words = f"{kind} {device.name}" if device is not None else kind
        file = device.file if device is not None else 0
        return f"mmap {where.name} {pages} {prot} {words}", self._mapped(where, prot, kind, file)

    def _mapped(self, where: Pages, prot: str, kind: str, file: int) -> Routine[Pages]:
        yield from sys_mmap(self.machine, self.mm, where.start, len(where), prot, kind, file)
        return where

    @operation
    def munmap(self, where: Pages) -> tuple[str, Routine[None]]:
        """Unmap pages."""
        routine = sys_munmap(self.machine, self.mm, where.start, where.stop)
        return f"munmap {self.in_words(where)}", routine

    @operation
    def mprotect(self, where: Pages, prot: str) -> tuple[str, Routine[None]]:
        """Give pages another protection.

        Raises
        ------
        KernelError
            ENOMEM at the first page that is not mapped; those before it have changed.
        """
        flags_of_prot(prot)
        routine = sys_mprotect(self.machine, self.mm, where.start, where.stop, prot)
        return f"mprotect {self.in_words(where)} {prot}", routine

    @operation
    def madvise(self, where: Pages, advice: str) -> tuple[str, Routine[None]]:
        """Advise the kernel about pages.

        ``dontneed`` throws them away, ``free`` lets them be thrown away, ``pageout`` writes them to
        swap, ``populate_write`` fills them; all of it is in
        :data:`~hmmlab.model.madvise.ADVICE`.

        Raises
        ------
        ValueError
            For an advice that is none.
        KernelError
            ENOMEM where some are not mapped; the rest has been done.
        """
        if advice not in ADVICE:
            raise ValueError(f"advice {advice!r}; expected one of {', '.join(ADVICE)}")
        routine = sys_madvise(self.machine, self.mm, where.start, where.stop, advice)
        return f"madvise {self.in_words(where)} {advice}", routine

    @operation
    def mlock(self, where: Pages) -> tuple[str, Routine[None]]:
        """Bring pages in, and keep them in RAM.

        Raises
        ------
        KernelError
            ENOMEM where some are not mapped, or may not be accessed.
        """
        routine = sys_mlock(self.machine, self.mm, where.start, where.stop)
        return f"mlock {self.in_words(where)}", routine

    @operation
    def mremap(self, where: Pages, name: str | None = None) -> tuple[str, Routine[Pages]]:
        """Move pages to the beginning of another region. Returns them at their new place.

        Raises
        ------
        KernelError
            EFAULT when they are not all in one mapping.
        """
        words = self.in_words(where)
        to = self.region(name if name is not None else free_name(self.regions), len(where))
        return f"mremap {words} {to.name}", self._moved(where, to)

    def _moved(self, where: Pages, to: Pages) -> Routine[Pages]:
        yield from sys_mremap(self.machine, self.mm, where.start, len(where), to.start)
        return to

    @operation
    def clear_refs(self) -> tuple[str, Routine[None]]:
        """Forget which pages were written (soft-dirty), and notice every write from now on."""
        return "clear_refs 4", clear_refs_soft_dirty(self.machine, self.mm)

    @operation
    def run(self, text: str, routine: Routine[R]) -> tuple[str, Routine[R]]:
        """Run any kernel or driver routine as an operation called ``text``."""
        return text, routine

    # --- access -----------------------------------------------------------------------------------
    @operation
    def load(self, where: Pages) -> tuple[str, Routine[NDArray[np.uint64]]]:
        """The CPU reads the first eight bytes of each page, uint64 of shape (len(where),).

        Raises
        ------
        KernelError
            SIGSEGV where nothing is mapped, or nothing may be accessed.
        """
        return f"load {self.in_words(where)}", user_access(
            self.machine, self.mm, where.start, where.stop
        )

    @operation
    def store(self, where: Pages, values: ArrayLike) -> tuple[str, Routine[None]]:
        """The CPU writes ``values`` (one, or one a page) into the pages' first eight bytes.

        Raises
        ------
        KernelError
            SIGSEGV at the first page that may not be written; those before it are.
        """
        words = self.words(where, values)
        return f"store {self.in_words(where)}", self._stored(where, words)

    def _stored(self, where: Pages, words: NDArray[np.uint64]) -> Routine[None]:
        yield from user_access(self.machine, self.mm, where.start, where.stop, words)

    def pagemap(self, where: Pages) -> NDArray[np.uint64]:
        """/proc/self/pagemap: PM_* bits of each page, uint64 of shape (len(where),)."""
        self.in_words(where)
        return read_pagemap(self.machine, self.mm, where.start, where.stop)
