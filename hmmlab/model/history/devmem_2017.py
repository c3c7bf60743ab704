"""hmm_devmem_add and hmm_devmem_remove: memory of a device as ZONE_DEVICE, 4.14 to 5.2.

Nothing real stands behind the physical addresses of such memory: HMM looks for a free place in
physical space, from the top downwards, and gives it struct pages, so that the rest of the kernel
can handle it. Managing the pages is the driver's business.

In those kernels an idle ZONE_DEVICE page holds one reference, and the driver gets it back when the
count falls to 1. The machine counts as 6.1 does, where an idle page has none; :func:`page_count`
tells the old number.

Source: "mm/hmm/devmem: device memory hotplug using ZONE_DEVICE", v7, August 2017; mm/hmm.c of 4.14.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hmmlab.model.entry import Pfns
from hmmlab.model.geometry import PAGE_SIZE, SECTION_PAGES, align_down, align_up
from hmmlab.model.history.era import EBUSY, EINVAL, ENOMEM, ENXIO, ERANGE
from hmmlab.model.history.mirror_2017 import kmalloc
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.memremap import (
    MEMORY_DEVICE_COHERENT,
    MEMORY_DEVICE_PRIVATE,
    memremap_pages,
    memunmap_pages,
    pagemap_of,
)
from hmmlab.model.mm_types import Vma, mm_root
from hmmlab.model.page import PG_LOCKED, PHYSICAL_PAGES, is_zone_device, page_rows, set_flags
from hmmlab.model.page_alloc import alloc_pages
from hmmlab.model.page_table import word_row
from hmmlab.model.rows import as_rows
from hmmlab.model.state import State

__all__ = [
    "HMM_DEVMEM_OWNER",
    "IORES_DESC_DEVICE_PRIVATE_MEMORY",
    "IORES_DESC_DEVICE_PUBLIC_MEMORY",
    "VM_FAULT_ERROR",
    "VM_FAULT_FALLBACK",
    "VM_FAULT_HWPOISON",
    "VM_FAULT_HWPOISON_LARGE",
    "VM_FAULT_MAJOR",
    "VM_FAULT_MINOR",
    "VM_FAULT_OOM",
    "VM_FAULT_SIGBUS",
    "VM_FAULT_SIGSEGV",
    "HmmDevmem",
    "HmmDevmemOps",
    "Resource",
    "hmm_devmem_add",
    "hmm_devmem_add_resource",
    "hmm_devmem_page_get_drvdata",
    "hmm_devmem_page_set_drvdata",
    "hmm_devmem_pages_create",
    "hmm_devmem_remove",
    "hmm_vma_alloc_locked_page",
    "page_count",
]

#: What the machine notes as owner of such memory: before 5.7 nobody asked whose it was.
HMM_DEVMEM_OWNER = -1

#: What a piece of physical space is (``IORES_DESC_*`` of 4.14).
IORES_DESC_DEVICE_PRIVATE_MEMORY, IORES_DESC_DEVICE_PUBLIC_MEMORY = 6, 7

VM_FAULT_MINOR = 0
VM_FAULT_OOM = 0x0001
VM_FAULT_SIGBUS = 0x0002
VM_FAULT_MAJOR = 0x0004
VM_FAULT_HWPOISON = 0x0010
VM_FAULT_HWPOISON_LARGE = 0x0020
VM_FAULT_SIGSEGV = 0x0040
VM_FAULT_FALLBACK = 0x0800
VM_FAULT_ERROR = (
    VM_FAULT_OOM
    | VM_FAULT_SIGBUS
    | VM_FAULT_SIGSEGV
    | VM_FAULT_HWPOISON
    | VM_FAULT_HWPOISON_LARGE
    | VM_FAULT_FALLBACK
)

_SIGBUS, _SIGSEGV = 7, 11

Machine.declare("page.hmm_data", np.uint64, "2017: the word that a driver keeps in a device page")


class HmmDevmemOps(Protocol):
    """What a driver provides (``struct hmm_devmem_ops``)."""

    def free(self, devmem: HmmDevmem, page: Pfns) -> None:
        """Nobody uses these pages any more: their count fell to 1, in this order."""

    def fault(
        self, devmem: HmmDevmem, vma: Vma, addr: int, page: int, flags: int, pmdp: int
    ) -> int | Generator[Any, Any, int]:
        """The CPU, or get_user_pages, touched a page of device memory: bring it back to RAM.

        The mmap_lock is held, so that ``vma`` holds. Other pages may come home along with this one,
        but this one goes first.

        Parameters
        ----------
        addr
            Page number.
        page
            Frame that was seen there; a hint, for it may be gone.
        flags
            FAULT_FLAG_* bits: WRITE where the page is to be written, REMOTE where somebody else
            than the process's CPU asks. How the fault may wait, and whether it came from user
            space, is left out.
        pmdp
            Row of the PMD's word in the ``pmd`` column.

        Returns
        -------
        VM_FAULT_MINOR or VM_FAULT_MAJOR, or a bit of VM_FAULT_ERROR.
        """


@dataclass(frozen=True, slots=True)
class Resource:
    """A piece of physical space (``struct resource``): frames ``start`` to ``end - 1``, and what.

    ``desc`` is IORES_DESC_DEVICE_PRIVATE_MEMORY for memory of a device, or
    IORES_DESC_DEVICE_PUBLIC_MEMORY where the CPU can reach it.
    """

    start: int
    end: int
    desc: int


class HmmDevmem:
    """A chunk of device memory (``struct hmm_devmem``), made by :func:`hmm_devmem_add`.

    Attributes
    ----------
    ops, device
        The driver's callbacks, and its device's name.
    pfn_first, pfn_last
        First frame, and the one past the last; -1 before there is a place.
    pagemap
        Number of its pagemap; 0 when it has no struct pages.
    public
        Whether the CPU can reach the memory (MEMORY_DEVICE_PUBLIC).
    faulting
        Frames that the CPU is faulting on at this moment, int64. Here such a fault holds a
        reference, which it did not in 2017.
    """

    def __init__(self, ops: HmmDevmemOps, device: str, *, public: bool = False) -> None:
        self.ops, self.device, self.public = ops, device, public
        self.pfn_first = self.pfn_last = -1
        self.pagemap = 0
        self.faulting: Pfns = np.zeros(0, np.int64)

    def __repr__(self) -> str:
        return f"HmmDevmem({self.device!r}, frames {self.pfn_first:#x} to {self.pfn_last:#x})"

    @property
    def resource(self) -> Resource | None:
        """The piece of physical space that is reserved for it; None before there is a place."""
        desc = IORES_DESC_DEVICE_PRIVATE_MEMORY
        if self.public:
            desc = IORES_DESC_DEVICE_PUBLIC_MEMORY
        return None if self.pfn_first < 0 else Resource(self.pfn_first, self.pfn_last, desc)

    def page_free(self, machine: Machine, pfns: Pfns) -> None:
        """Hand pages back to the driver (``hmm_devmem_free``)."""
        self.ops.free(self, pfns)

    def migrate_to_ram(
        self, machine: Machine, vma: Vma, vpns: Pfns, pfns: Pfns, flags: int
    ) -> Routine[None]:
        """Pass the faults on to the driver, one after another (``hmm_devmem_fault``).

        Raises
        ------
        KernelError
            ENOMEM, SIGSEGV, or SIGBUS for anything else that the driver answers.
        """
        root = mm_root(machine, vma.mm)
        before = self.faulting
        self.faulting = np.concatenate([before, pfns])
        try:
            for addr, page in zip(vpns.tolist(), pfns.tolist(), strict=True):  # over faults
                pmdp = word_row(machine, root, addr, "pmd")
                answer = self.ops.fault(self, vma, addr, page, flags, pmdp)
                code = (yield from answer) if isinstance(answer, Generator) else answer
                if code & VM_FAULT_OOM:
                    raise KernelError(ENOMEM, f"{self.device} has no memory for page {addr:#x}")
                if code & VM_FAULT_ERROR:
                    signal = _SIGSEGV if code & VM_FAULT_SIGSEGV else _SIGBUS
                    raise KernelError(0, f"{self.device} lost page {addr:#x}", signal=signal)
        finally:
            self.faulting = before


# --- add and remove -------------------------------------------------------------------------------


@kernel("mm/hmm.c, 4.14")
def hmm_devmem_add(
    machine: Machine, ops: HmmDevmemOps, device: str, size: int
) -> Routine[HmmDevmem | int]:
    """Give a device ``size`` bytes of memory with struct pages, rounded up to whole sections.

    Returns
    -------
    The new chunk; -ENOMEM where the kernel has no memory for its own notes, or nothing is asked
    for; -ERANGE where physical space has no place; what :func:`hmm_devmem_pages_create` answers.
    """
    if not kmalloc(machine) or size <= 0:
        return -ENOMEM
    devmem = HmmDevmem(ops, device)
    pages = align_up(-(-size // PAGE_SIZE), SECTION_PAGES)
    first = PHYSICAL_PAGES - pages
    while first > pages and _intersects(machine, first, first + pages):
        first -= pages
    if first <= pages:
        return -ERANGE
    devmem.pfn_first, devmem.pfn_last = first, first + pages
    refused = yield from hmm_devmem_pages_create(machine, devmem)
    return refused or devmem


def _intersects(machine: Machine, first: int, last: int) -> bool:
    """Whether frames belong to anything that is known (``region_intersects``)."""
    if first < machine.ram_pages:
        return True
    taken = machine["pagemap.last"] != 0
    overlap = (machine["pagemap.first"] < last) & (machine["pagemap.last"] > first)
    return bool((taken & overlap).any())


@kernel("mm/hmm.c, 4.14")
def hmm_devmem_add_resource(
    machine: Machine, ops: HmmDevmemOps, device: str, res: Resource
) -> Routine[HmmDevmem | int]:
    """Give memory that a device really has, and the CPU can reach, its struct pages.

    Its pages are mapped as any other page, so ``fault`` is never called; ``free`` is. No driver
    ever used it. What became of the idea is coherent device memory, in 6.0, and as that it is told
    here.

    Returns
    -------
    The new chunk; -EINVAL where the resource is none of that kind; -ENOMEM where the kernel has no
    memory for its own notes; what :func:`hmm_devmem_pages_create` answers.
    """
    if res.desc != IORES_DESC_DEVICE_PUBLIC_MEMORY:
        return -EINVAL
    if not kmalloc(machine):
        return -ENOMEM
    devmem = HmmDevmem(ops, device, public=True)
    devmem.pfn_first, devmem.pfn_last = res.start, res.end
    refused = yield from hmm_devmem_pages_create(machine, devmem)
    return refused or devmem


@kernel("mm/hmm.c, 4.14")
def hmm_devmem_pages_create(machine: Machine, devmem: HmmDevmem) -> Routine[int]:
    """Give the sections of a chunk struct pages, without mapping them for the kernel.

    Returns
    -------
    0; -ENXIO where they hold RAM, wholly or, with a warning, beside the chunk's own resource
    (REGION_MIXED); -EBUSY where one belongs to another chunk.
    """
    first = align_down(devmem.pfn_first, SECTION_PAGES)
    last = align_up(devmem.pfn_last, SECTION_PAGES)
    if first < machine.ram_pages:
        if last > machine.ram_pages:
            yield machine.step(f"Warning: {devmem.device} wants memory that is partly RAM.")
        return -ENXIO
    sections = np.arange(first, last, SECTION_PAGES)
    if pagemap_of(machine, sections).any():
        yield machine.step(f"{devmem.device} collides with memory that is there already.")
        return -EBUSY
    kind = MEMORY_DEVICE_COHERENT if devmem.public else MEMORY_DEVICE_PRIVATE
    devmem.pagemap = memremap_pages(machine, first, last - first, HMM_DEVMEM_OWNER, devmem, kind)
    machine.objects.setdefault("hmm_devmem", {})[devmem.pagemap] = devmem
    yield machine.step(f"{devmem.device} has {last - first} pages of device memory.")
    return 0


@kernel("mm/hmm.c, 4.14")
def hmm_devmem_remove(machine: Machine, devmem: HmmDevmem | None) -> Routine[None]:
    """Take a chunk away, once nobody uses a page of it any more; nothing for None."""
    if devmem is None:
        return
    rows = as_rows(page_rows(machine, np.arange(devmem.pfn_last - 1, devmem.pfn_first - 1, -1)))
    while machine["page.refcount"][rows].any():
        yield machine.step(
            f"It waits until nobody uses the memory of {devmem.device}.",
            lock=f"the pages of {devmem.device}",
        )
    memunmap_pages(machine, devmem.pagemap)
    del machine.objects["hmm_devmem"][devmem.pagemap]
    devmem.pagemap = 0
    yield machine.step(f"The memory of {devmem.device} is gone.")


# --- pages ----------------------------------------------------------------------------------------


def page_count(state: State, pfns: Pfns) -> NDArray[np.int32]:
    """References to frames as kernels before 5.18 count them: one more for device memory."""
    counts = state["page.refcount"][page_rows(state, pfns)]
    return counts + is_zone_device(state, pfns).astype(np.int32)


def hmm_devmem_page_set_drvdata(machine: Machine, page: Pfns, data: ArrayLike) -> None:
    """Set the driver's own word in device pages; ``data`` is uint64, one or one a page."""
    machine.write("page.hmm_data", as_rows(page_rows(machine, page)), np.asarray(data, np.uint64))


def hmm_devmem_page_get_drvdata(state: State, page: Pfns) -> NDArray[np.uint64]:
    """The driver's own word in device pages, uint64 of the shape of ``page``."""
    rows = page_rows(state, page)
    words = state["page.hmm_data"]
    inside = rows < words.size
    return np.where(inside, words[np.where(inside, rows, 0)], np.uint64(0))


def hmm_vma_alloc_locked_page(machine: Machine, vma: Vma, addr: Pfns) -> Pfns:
    """New frames of RAM for pages ``addr`` of a mapping, locked; none where RAM is used up."""
    try:
        pfns, rows = alloc_pages(machine, addr.size)
    except KernelError:
        return np.zeros(0, np.int64)
    set_flags(machine, pfns, PG_LOCKED, rows=rows)
    return pfns
