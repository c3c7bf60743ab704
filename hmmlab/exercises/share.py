"""Exercises on sharing an address space (notebook 02)."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from hmmlab.exercises.kinds import PredictNumbers, PredictStates
from hmmlab.exercises.linked_list import FIELD_BYTES, NODE_PAGES, LinkedList, follow
from hmmlab.exercises.rules import Exercise, Trial
from hmmlab.model.driver import Driver
from hmmlab.model.geometry import PAGE_SIZE
from hmmlab.model.machine import KernelError
from hmmlab.model.process import Process
from hmmlab.model.region import Pages
from hmmlab.model.rows import row_numbers, unique_rows
from hmmlab.model.trace import Operation, Trace

__all__ = ["BytesThatMove", "Permission", "Repoint", "WhatTheDeviceKnows", "copied_bytes"]

_SPARE = "nowhere"


def card_memory(trial: Trial, pages: int) -> tuple[Process, Pages]:
    """Memory of a card that shares nothing: other addresses than the process has."""
    card = Process(trial.machine, "card")
    card.region(_SPARE, 1)
    return card, card.mmap(pages, name="card")


def copied_bytes(trace: Trace, *operations: Operation) -> int:
    """Bytes that operations copied from page to page, counted in what their steps wrote."""
    copies = ("dmirror_migrate_alloc_and_copy", "dmirror_devmem_fault_alloc_and_copy")
    events = [event for asked in operations for event in trace.events[asked.first : asked.last]]
    pages = 0
    for event in events:
        if event.step.function in copies:  # a new frame is cleared first, and then copied into
            rows = [row_numbers(w.rows) for w in event.writes if w.column == "page.content"]
            pages += unique_rows(np.concatenate(rows)).size if rows else 0
    return PAGE_SIZE * pages


class Repoint(Exercise):
    """Write `repoint`, which says what the field `next` of a node's copy must hold.

    A list lies in a region that begins at address `source`. It is copied, node by node in the same
    places, to a card whose memory begins at `target`. `next` is the pointer in the process's node.
    """

    answer = "repoint"
    starter = "def repoint(next, source, target):\n    ..."
    model_answer = """
        def repoint(next, source, target):
            return next and next - source + target
    """
    hints = (
        "The card has its own addresses. Where does an old `next` lead there?",
        "A node keeps its distance from the beginning of its region.",
        "That distance is `next - source`. And what says that the list ends?",
    )

    def rule(self, answer: Any, trial: Trial) -> None:
        """The card follows the copy and finds the same values."""
        rng = trial.rng
        count = int(rng.integers(2, 6))
        values = rng.integers(1, 100, count).tolist()
        nodes = LinkedList(trial.process, values, rng.permutation(count).tolist(), name="list")
        card, memory = card_memory(trial, NODE_PAGES * count)
        fields = trial.process.load(nodes.pages).tolist()
        for slot in range(0, len(fields), NODE_PAGES):
            fields[slot] = answer(fields[slot], nodes.pages.va, memory.va)
            if not isinstance(fields[slot], int) or fields[slot] < 0:
                raise trial.wrong(f"It returned {fields[slot]!r}, which is no address.")
        card.store(memory, fields)
        seen = []
        try:
            head = nodes.head - nodes.pages.va + memory.va
            for value in islice(follow(card.load, memory, head), count + 1):
                seen.append(value)
        except KernelError as error:
            after = f"after {seen}" if seen else "at once"
            end = " The list should have ended there." if len(seen) == count else ""
            raise trial.wrong(
                f"The card follows `next` to nowhere {after} ({error}).{end}"
            ) from None
        if seen != values:
            raise trial.wrong(f"The card reads {seen}, the process {values}.")


class WhatTheDeviceKnows(PredictStates):
    """Predict the device's table after these operations, one letter a page.

    `w` read-write, `r` read-only, `.` no entry. The driver forgets what it is told of, and no more.
    """

    hints = (
        "The device knows the pages that it has read, and no others.",
        "An `mprotect` or a `madvise dontneed` makes it forget; a later read brings an entry back.",
        "An entry that is fetched again gives the rights of today: `r` for a read-only page, and "
        "for a discarded one, which is then the zero page that all share.",
    )

    def story(self, trial: Trial) -> Pages:
        """Part of a list is followed, protected, discarded, and followed a little again."""
        rng, process = trial.rng, trial.process
        count = 4
        order = rng.permutation(count).tolist()
        nodes = LinkedList(process, rng.integers(1, 100, count).tolist(), order)
        device = process.attach(Driver)
        list(islice(nodes.follow(device.read), 3))
        first = NODE_PAGES * int(order[1])
        process.mprotect(nodes.pages[first : first + NODE_PAGES], "r")
        process.madvise(nodes.value_of(0), "dontneed")
        device.read(nodes.next_of(0))
        device.read(nodes.next_of(1))
        if rng.integers(2):
            device.read(nodes.value_of(0))
        return nodes.pages


class Permission(Exercise):
    """Write `reply`, the kernel's answer to a device that never saw the page.

    `prot` is what the process may do there: "rw", "r", "none", or None where nothing is mapped.
    `access` is "read" or "write". Answer "ok", "EPERM" or "EFAULT".
    """

    answer = "reply"
    starter = "def reply(prot, access):\n    ..."
    model_answer = """
        def reply(prot, access):
            if prot is None or prot == "none":
                return "EFAULT"
            if prot == "r" and access == "write":
                return "EPERM"
            return "ok"
    """
    hints = (
        "The device's fault is handled as if the process itself had touched the page.",
        "There is one answer for a page that exists and forbids this, and another where the "
        "device finds nothing to read.",
        "EPERM: a write to a page that one may only read. EFAULT: no mapping, or no access.",
    )
    rounds = 2

    def rule(self, reply: Any, trial: Trial) -> None:
        """Each word is what the model's kernel answers."""
        prots = trial.rng.permutation(np.array(["rw", "r", "none", ""], object)).tolist()
        process = trial.process
        pages = process.mmap(len(prots))
        process.store(pages, 7)
        for page, prot in enumerate(prots):
            if not prot:
                process.munmap(pages[page])
            elif prot != "rw":
                process.mprotect(pages[page], prot)
        for access in ("read", "write"):
            device = process.attach(Driver)  # one that knows nothing
            for page, prot in enumerate(prots):
                said, truth = reply(prot or None, access), "ok"
                try:
                    device.read(pages[page]) if access == "read" else device.write(pages[page], 8)
                except KernelError as error:
                    truth = str(error).partition(":")[0]
                if said != truth:
                    what = f"page with {prot!r}" if prot else "page that is not mapped"
                    raise trial.wrong(f"A {access} of a {what} is answered {truth}, not {said}.")


class BytesThatMove(PredictNumbers):
    """A process changes some values of a list, and the device adds the list up again.

    How many bytes are copied, in each of three worlds?
    """

    starter = 'prediction = {"copied": ..., "mirrored": ..., "migrated": ...}'
    hints = (
        "Copied: the card cannot know which field has changed. Mirrored: whose frames does the "
        "device read?",
        "A field is 8 bytes, and a node has two. What moves between RAM and a device's memory is "
        "a page, and a touch by the CPU moves one.",
        "Mirrored is 0. Copied is nodes x 2 x 8. Migrated is changes x 4096: the device reads "
        "what came home where it lies.",
    )

    def numbers(self, trial: Trial) -> tuple[int, list[int]]:
        """How many nodes there are, and which of them change."""
        count = int(trial.rng.integers(5, 9))
        changes = int(trial.rng.integers(2, 4))
        return count, sorted(trial.rng.choice(count, changes, replace=False).tolist())

    def question(self) -> str:
        """What is asked, with this seed's numbers."""
        count, changed = self.numbers(self.trial())
        return (
            f"{super().question()}\n\n"
            f"The list has {count} nodes of two fields of {FIELD_BYTES} bytes. {len(changed)} "
            f"values change, each in a page of its own.\n"
            "  copied    the card has a copy; nobody notes what changes\n"
            "  mirrored  the device follows the process's pointers in RAM\n"
            f"  migrated  all pages ({PAGE_SIZE} bytes) have moved to the device before"
        )

    def count(self, trial: Trial) -> dict[str, tuple[int, int, str]]:
        """Do it in a mirror, and then with pages that have moved."""
        count, changed = self.numbers(trial)
        process = trial.process
        nodes = LinkedList(
            process, list(range(1, count + 1)), trial.rng.permutation(count).tolist()
        )
        device = process.open()
        list(nodes.follow(device.read))
        found = {}
        for world in ("mirrored", "migrated"):
            if world == "migrated":
                device.to_dev(nodes.pages)
            before = len(trial.trace.operations)
            for node in changed:
                process.store(nodes.value_of(node), 500)
            shown = len(trial.trace)
            list(nodes.follow(device.read))
            number = copied_bytes(trial.trace, *trial.trace.operations[before:])
            found[world] = number, shown, _WHY[world]
        everything = NODE_PAGES * FIELD_BYTES * count
        return {"copied": (everything, found["mirrored"][1], _WHY["copied"]), **found}


_WHY = {
    "copied": "nobody told the card what changed, so every field is copied again.",
    "mirrored": "the device reads the frames that the process has written.",
    "migrated": "each value that the CPU touches brings one page home, and the device then reads "
    "it in RAM.",
}
