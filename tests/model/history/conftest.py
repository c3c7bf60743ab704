"""Machines of other years: the history room is imported before any machine is made."""

import numpy as np
import pytest

import hmmlab.model.history.eras
import hmmlab.model.history.events_2019
import hmmlab.model.history.migrate_2017  # noqa: F401
from hmmlab import Machine, Process
from hmmlab.model.history import Era, HmmMirror, hmm_mirror_register
from hmmlab.model.history.walk_2018 import HmmRange
from hmmlab.model.machine import Actor, Steps
from hmmlab.model.mmu_notifier import (
    mmu_interval_notifier_insert,
    mmu_interval_read_begin,
    mmu_interval_set_seq,
)

#: What the drivers of these tests answer for "error", "nothing" and "special" (``values[]``).
VALUES = ERROR, NONE, SPECIAL = 8, 32, 16


class Listener:
    """A mirror's callbacks, which keep what they heard and answer what they are told to."""

    def __init__(self, name="mirror", answer=0):
        self.name, self.answer, self.heard = name, answer, []

    def sync_cpu_device_pagetables(self, mirror, *update):
        self.heard.append(update)
        return self.answer


class Subscriber:
    """An interval subscription that only notes that it was hit."""

    takes_series = False

    def __init__(self, machine):
        self.machine = machine

    def invalidate(self, subscription, range, cur_seq):
        mmu_interval_set_seq(self.machine, subscription, cur_seq)
        return True


@pytest.fixture
def machine():
    return Machine(4096)


@pytest.fixture
def process(machine):
    return Process(machine)


@pytest.fixture
def device(process):
    return process.open(0)


@pytest.fixture
def run(machine):
    """Run a routine to its end and return its answer."""
    return lambda routine: Steps(machine, "test", Actor("test"), routine).run()


@pytest.fixture
def steps(machine):
    """A routine as steps that have not run."""
    return lambda routine, name="test": Steps(machine, name, Actor(name), routine)


@pytest.fixture
def register(machine, process, run):
    """Register a mirror of some era; returns it with what it hears."""

    def make(era=Era.APRIL_2017, **rest):
        listener = Listener(**rest)
        mirror = HmmMirror(listener)
        assert run(hmm_mirror_register(machine, mirror, process.mm, era)) == 0
        return mirror, listener

    return make


@pytest.fixture
def subscribe(machine, process, run):
    """Subscribe to pages; returns the subscription, and the number to look under."""

    def make(pages):
        subscription = run(
            mmu_interval_notifier_insert(
                machine, process.mm, pages.start, pages.stop, Subscriber(machine)
            )
        )
        return subscription, run(mmu_interval_read_begin(machine, subscription))

    return make


@pytest.fixture
def range_over(subscribe):
    """A range of 5.5 to 5.7 over pages, under a subscription of its own."""

    def make(pages, pfns=None, **rest):
        pfns = np.zeros(len(pages), np.uint64) if pfns is None else pfns
        tracked = HmmRange(pages.start, pages.stop, pfns, values=VALUES, **rest)
        tracked.notifier, tracked.notifier_seq = subscribe(pages)
        return tracked

    return make


@pytest.fixture
def use_up_ram(machine):
    """Hand out every frame of RAM. Returns a function that frees them again."""
    from hmmlab.model.page_alloc import alloc_pages
    from hmmlab.model.page_ref import put_page

    def use_up():
        free = int(machine["zone.free"][:2].sum())
        unused = machine.ram_pages - int(machine["zone.used"][:2].sum())
        taken, _ = alloc_pages(machine, free + unused)
        return lambda: put_page(machine, taken)

    return use_up
