"""A linked list in a process's memory, whose nodes lie where a shuffle puts them.

A node has two fields, ``next`` and ``value``. The model keeps the first eight bytes of each page,
so each field has a page to itself: ``next`` is at the node's address, ``value`` one page on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hmmlab.model.geometry import PAGE_SHIFT, PAGE_SIZE
from hmmlab.model.process import Process
from hmmlab.model.region import Pages

__all__ = ["FIELD_BYTES", "NODE_PAGES", "LinkedList", "page_at"]

#: Pages of a node: one for ``next``, one for ``value``.
NODE_PAGES = 2
#: Bytes of a field.
FIELD_BYTES = 8

Read = Callable[[Pages], Any]


def page_at(near: Pages, address: int) -> Pages:
    """The page that holds ``address``, in the address space of ``near``."""
    vpn = address >> PAGE_SHIFT
    return Pages(near.name, near.mm, vpn, vpn + 1)


class LinkedList:
    """A list of ``values``; ``head`` is the address of its first node.

    Parameters
    ----------
    process
        Who makes it.
    values
        One whole number a node.
    order
        Which slot of the region each node takes; one after another where it is not given.

    Attributes
    ----------
    pages
        The region, two pages a node.
    addresses
        Address of each node, in the order of the list.
    """

    def __init__(
        self,
        process: Process,
        values: Sequence[int],
        order: Sequence[int] | None = None,
        name: str | None = None,
    ) -> None:
        slots = list(order) if order is not None else list(range(len(values)))
        if sorted(slots) != list(range(len(values))):
            raise ValueError(f"order {slots}; expected every slot from 0 to {len(values) - 1} once")
        self.process, self.values = process, list(values)
        self.pages = process.mmap(NODE_PAGES * len(values), name=name)
        self.addresses = [self.pages.va + NODE_PAGES * PAGE_SIZE * slot for slot in slots]
        self.head = self.addresses[0]
        words = dict(zip(slots, zip([*self.addresses[1:], 0], values, strict=True), strict=True))
        process.store(self.pages, [field for slot in sorted(words) for field in words[slot]])

    def __len__(self) -> int:
        return len(self.addresses)

    def follow(self, read: Read, head: int | None = None) -> Iterator[int]:
        """The values in order, each field read with ``read``: ``process.load``, ``device.read``."""
        return follow(read, self.pages, self.head if head is None else head)

    def next_of(self, node: int) -> Pages:
        """Page of the field ``next`` of a node, counted in the order of the list."""
        return page_at(self.pages, self.addresses[node])

    def value_of(self, node: int) -> Pages:
        """Page of the field ``value`` of a node."""
        return page_at(self.pages, self.addresses[node] + PAGE_SIZE)


def follow(read: Read, near: Pages, address: int) -> Iterator[int]:
    """Follow pointers from ``address`` to 0; ``near`` tells the address space."""
    while address:
        here = page_at(near, address)
        address = int(read(here)[0])
        yield int(read(Pages(near.name, near.mm, here.start + 1, here.stop + 1))[0])
