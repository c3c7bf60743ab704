"""The operations of the scenario language: what each runs on a machine, and what it returns.

A method a verb, under the verb's own name. System calls run as the process, and commands of the
device as its file; an answer has the keys that a recording of a real kernel has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmmlab.answers import Known
from hmmlab.model.access import user_access
from hmmlab.model.driver import Answer, Driver
from hmmlab.model.ksm import ksm_scan
from hmmlab.model.lru import fill_new, lru_add_drain
from hmmlab.model.machine import Actor, KernelError, Machine, Routine, Steps
from hmmlab.model.madvise import sys_madvise
from hmmlab.model.mlock import sys_mlock
from hmmlab.model.mmap import sys_mmap, sys_munmap
from hmmlab.model.move_pages import sys_move_pages
from hmmlab.model.mprotect import sys_mprotect
from hmmlab.model.mremap import sys_mremap
from hmmlab.model.pins import pin_user_pages, unpin_user_pages, vmsplice, vmsplice_end
from hmmlab.model.task_mmu import (
    PM_FILE,
    PM_MMAP_EXCLUSIVE,
    PM_PRESENT,
    PM_SOFT_DIRTY,
    PM_SWAP,
    clear_refs_soft_dirty,
    read_pagemap,
)
from hmmlab.model.test_hmm import Dmirror
from hmmlab.scenario import Operation

__all__ = ["Execution", "Family"]

#: The processes of a scenario by their line of descent: ``()`` reads it, ``("c1",)`` is a child.
Family = dict[tuple[str, ...], Known]

#: The recorded reader's buffer for so many pages is memory of its own that it has just written, and
#: which has filled the batch of new pages (M_MMAP_THRESHOLD of malloc).
_NEW_BUFFER = 32

_PAGEMAP = (
    (PM_PRESENT, "P"),
    (PM_SWAP, "S"),
    (PM_FILE, "F"),
    (PM_MMAP_EXCLUSIVE, "X"),
    (PM_SOFT_DIRTY, "D"),
)


class Execution:
    """One operation, run by the process that its line names.

    Parameters
    ----------
    machine
        Where to run.
    family
        The processes that there are; a fork adds one, and an exit takes some away.
    operation
        What to run.
    """

    def __init__(self, machine: Machine, family: Family, operation: Operation) -> None:
        self.machine, self.family, self.operation = machine, family, operation
        self.args = operation.args
        self.known = family[operation.who]
        self.process = self.known.process

    def run(self) -> dict[str, Any]:
        """Run it to its end; gives what it returned, with the keys of the recordings.

        ``ret`` is negative where the kernel refused: an errno, or for loads and stores a signal.
        """
        answer: dict[str, Any] = getattr(self, f"_{self.operation.verb}")()
        return answer

    def _run(self, body: Routine[Any], actor: Actor | None = None) -> tuple[int, Any]:
        """``ret``, and what the routine returned where it succeeded."""
        actor = actor or self.process.actor
        try:
            return 0, Steps(self.machine, self.operation.text, actor, body).run()
        except KernelError as error:
            return (-error.signal if error.signal else -error.errno), None

    def _ret(self, body: Routine[Any]) -> dict[str, Any]:
        """Answer of a routine that returns nothing to tell."""
        return {"ret": self._run(body)[0]}

    # --- the process's operations -----------------------------------------------------------------
    def _span(self) -> tuple[int, int]:
        start = self.process.region(self.args["region"], 0).start + self.args["off"]
        return start, start + self.args["pages"]

    def _call(self, routine: Callable[..., Routine[Any]], *rest: Any) -> Routine[Any]:
        """A system call for the pages that the line names."""
        return routine(self.machine, self.process.mm, *self._span(), *rest)

    def _fork(self) -> dict[str, Any]:
        ret, child = self._run(self.process.clone(self.args["child"]))
        if child is not None:
            who = (*self.operation.who, self.args["child"])
            self.family[who] = Known(child, dict(self.known.devices), dict(self.known.mms))
        return {"ret": ret}

    def _exit(self) -> dict[str, Any]:
        who = (*self.operation.who, self.args["child"])
        lines = [line for line in sorted(self.family) if line[: len(who)] == who]
        ended = [self.family.pop(line).process for line in lines]

        def leave() -> Routine[None]:  # children of the child hear no more, and leave after it
            for process in ended:
                yield from process.do_exit()

        return {"ret": self._run(leave(), ended[0].actor)[0]}

    def _mmap(self) -> dict[str, Any]:
        args, process = self.args, self.process
        start = process.region(args["region"], args["pages"]).start
        if "at_region" in args:
            start = process.regions[args["at_region"]] + args["at_off"]
        file = self._driver().file if "device" in args else 0
        where = start, args["pages"]
        body = sys_mmap(self.machine, process.mm, *where, args["prot"], args["kind"], file)
        return self._ret(body)

    def _munmap(self) -> dict[str, Any]:
        return self._ret(self._call(sys_munmap))

    def _mprotect(self) -> dict[str, Any]:
        return self._ret(self._call(sys_mprotect, self.args["prot"]))

    def _madvise(self) -> dict[str, Any]:
        return self._ret(self._call(sys_madvise, self.args["advice"]))

    def _mlock(self) -> dict[str, Any]:
        return self._ret(self._call(sys_mlock))

    def _mremap(self) -> dict[str, Any]:
        start, stop = self._span()
        to = self.process.region(self.args["new"], self.args["pages"]).start
        return self._ret(sys_mremap(self.machine, self.process.mm, start, stop - start, to))

    def _clear_refs(self) -> dict[str, Any]:
        return self._ret(clear_refs_soft_dirty(self.machine, self.process.mm))

    def _ksm(self) -> dict[str, Any]:
        ret, shared = self._run(self._call(ksm_scan))
        return {"ret": ret or shared}

    def _move_pages(self) -> dict[str, Any]:
        ret, found = self._run(self._call(sys_move_pages, self.args["node"]))
        return {"status": found[1].tolist(), "ret": ret or found[0]}

    def _hold(self) -> dict[str, Any]:
        ret, held = self._run(self._call(vmsplice))
        return {"ret": ret or held}

    def _unhold(self) -> dict[str, Any]:
        return self._ret(vmsplice_end(self.machine, self.process.mm))

    def _pin(self) -> dict[str, Any]:
        return self._ret(self._call(pin_user_pages))

    def _unpin(self) -> dict[str, Any]:
        return self._ret(unpin_user_pages(self.machine, self.process.mm))

    def _load(self) -> dict[str, Any]:
        ret, data = self._run(self._call(user_access))
        return {"ret": ret} if ret else {"data": data.tolist(), "ret": ret}

    def _store(self) -> dict[str, Any]:
        values = _counting(self.args["value"], self.args["pages"])
        return self._ret(self._call(user_access, values))

    def _pagemap(self) -> dict[str, Any]:
        machine, mm = self.machine, self.process.mm
        start, stop = self._span()

        def look() -> Routine[Any]:
            machine.called("walk_page_range", stop - start)  # the recorder asks page by page
            yield machine.step("/proc/self/pagemap is read.", mm, start, stop)
            return read_pagemap(machine, mm, start, stop)

        ret, words = self._run(look())
        letters = [
            "".join(letter for bit, letter in _PAGEMAP if word & bit) for word in words.tolist()
        ]
        return {"pagemap": letters, "ret": ret}

    # --- the device's operations ------------------------------------------------------------------
    def _driver(self) -> Driver:
        return self.known.devices[self.args["device"]]

    def _dmirror(self) -> Dmirror:
        driver = self._driver()
        assert isinstance(driver, Dmirror)
        return driver

    def _open(self) -> dict[str, Any]:
        name, process = self.args["device"], self.process
        driver = Dmirror(process, name, self.args["unit"] + 1)
        process.files[name] = self.known.devices[name] = driver
        self.known.mms[process.mm] = process.name
        return {"ret": self._run(_opened(driver), driver.actor)[0]}

    def _close(self) -> dict[str, Any]:
        name, driver = self.args["device"], self._driver()
        answer = {"ret": self._run(driver.close_file(), driver.actor)[0]}
        del self.known.devices[name], self.process.files[name]
        return answer

    def _ioctl(
        self, routine: Callable[..., Routine[Answer]], *, data: bool = False
    ) -> dict[str, Any]:
        """``routine`` of the device, which gets the first page and the page past the last."""
        start, stop = self._span()
        if stop - start >= _NEW_BUFFER:
            fill_new(self.machine)
        body = _checked(routine, start, stop)
        ret, answer = self._run(body, self._driver().actor)
        answer = answer or Answer()
        found = {"ret": ret, "cpages": answer.cpages, "faults": answer.faults}
        if answer.data is not None and data and not ret:
            found["data"] = answer.data.tolist()
        return found

    def _read(self) -> dict[str, Any]:
        return self._ioctl(self._driver().read_pages, data=True)

    def _write(self) -> dict[str, Any]:
        driver, values = self._driver(), _counting(self.args["value"], self.args["pages"])
        return self._ioctl(lambda start, _: driver.write_pages(start, values))

    def _to_dev(self) -> dict[str, Any]:
        return self._ioctl(self._dmirror().migrate_to_device, data=True)

    def _to_sys(self) -> dict[str, Any]:
        return self._ioctl(self._dmirror().migrate_to_system)

    def _exclusive(self) -> dict[str, Any]:
        return self._ioctl(self._dmirror().make_exclusive, data=True)

    def _check_exclusive(self) -> dict[str, Any]:
        return self._ioctl(self._dmirror().check_atomic)

    def _release(self) -> dict[str, Any]:
        driver = self._dmirror()
        ret, answer = self._run(driver.release_memory(), driver.actor)
        return {"ret": ret, "cpages": answer.cpages, "faults": answer.faults}

    def _snapshot(self) -> dict[str, Any]:
        driver, out = self._dmirror(), np.zeros(self.args["pages"], np.uint8)
        found = self._ioctl(lambda start, _: driver.snapshot_pages(start, out))
        return {**found, "snapshot": out.tobytes().hex()} if out.size else found


def _opened(driver: Driver) -> Routine[None]:
    """Open a device. The recorded reader unmaps a page of its own then, which drains batches."""
    yield from driver.open_file()
    lru_add_drain(driver.machine, 0)


def _checked(routine: Callable[..., Routine[Answer]], start: int, stop: int) -> Routine[Answer]:
    """The routine, or EINVAL for no pages, which every command of the test device refuses."""
    if stop <= start:
        raise KernelError(22, "no pages")
    return (yield from routine(start, stop))


def _counting(first: int, pages: int) -> NDArray[np.uint64]:
    return np.uint64(first) + np.arange(pages, dtype=np.uint64)
