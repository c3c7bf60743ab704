"""The kernel that we run on does the same operations to this process, through mmap(2).

It is a program, so that what it does to itself happens in a process of its own:
``python -m hmmlab.bench.host PAGES`` prints each operation's median as JSON.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hmmlab.bench.rounds import Story, medians

__all__ = ["life_of_a_mapping", "main"]

_PAGE = mmap.PAGESIZE


def life_of_a_mapping(pages: int) -> Story:
    """Private anonymous memory in pages of the base size, from mmap to munmap."""
    words = np.zeros(pages, np.uint64)
    while True:
        memory = mmap.mmap(-1, pages * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        yield "store_first_touch", partial(_store, memory)
        yield "snapshot", partial(_read_pagemap, memory, words)
        yield "mprotect", partial(_mprotect, memory, mmap.PROT_READ)
        _mprotect(memory, mmap.PROT_READ | mmap.PROT_WRITE)
        with _Child() as child:
            yield "fork", child.fork
            yield "store_cow", partial(_store, memory)
        yield "dontneed", partial(memory.madvise, mmap.MADV_DONTNEED)
        _store(memory)
        yield "munmap", memory.close


def _store(memory: mmap.mmap) -> None:
    """Write the first eight bytes of each page."""
    np.frombuffer(memory, np.uint64)[:: _PAGE // 8] = 1


def _address(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def _read_pagemap(memory: mmap.mmap, words: NDArray[np.uint64]) -> None:
    """Read /proc/self/pagemap of all pages into ``words``, uint64 of shape (pages,)."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(_address(memory) // _PAGE * words.itemsize)
        if pagemap.readinto(words.data) != words.nbytes:
            raise OSError("/proc/self/pagemap ends too early")


def _mprotect(memory: mmap.mmap, prot: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(_address(memory)), ctypes.c_size_t(len(memory)), prot):
        raise OSError(ctypes.get_errno(), "mprotect")


class _Child:
    """A process made by :meth:`fork` that lives, and does nothing, until the block is over."""

    def __enter__(self) -> _Child:
        self.listen, self.tell = os.pipe()
        self.pid = 0
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.tell)
        if self.pid:
            os.waitpid(self.pid, 0)
        os.close(self.listen)

    def fork(self) -> None:
        """Fork."""
        pid = os.fork()
        if not pid:
            os.close(self.tell)
            os.read(self.listen, 1)  # until nobody can tell it anything any more
            os._exit(0)
        self.pid = pid


def main(pages: int) -> None:
    """Print the median of each operation, as ``{name: [seconds, rounds]}``."""
    print(json.dumps(medians(life_of_a_mapping(pages))))


if __name__ == "__main__":
    main(int(sys.argv[1]))
