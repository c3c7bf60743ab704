"""hmm_mirror_register and hmm_mirror_unregister, 2017 to 2019.

A driver registers a mirror of an address space and hears of its changes through
``sync_cpu_device_pagetables``. :mod:`~hmmlab.model.history.struct_hmm` says when, in the patch of
April 2017 and in 4.14, and :mod:`~hmmlab.model.history.mirror_2018` for the kernels after them.
Functions answer as theirs did: 0 or a negative errno.
"""

from __future__ import annotations

from hmmlab.model.history.era import EINVAL, ENOMEM, Era
from hmmlab.model.history.ranges import ranges_of
from hmmlab.model.history.struct_hmm import (
    Hmm,
    HmmMirror,
    free_hmm,
    hmm_of,
    mirrors_of,
    unlist,
)
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.mm_types import mm_lock
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    mmu_notifier_register,
    mmu_notifier_unregister,
)
from hmmlab.model.state import State

__all__ = [
    "hmm_mirror_register",
    "hmm_mirror_unregister",
    "hmm_register",
    "kmalloc",
    "mmu_notifier_invalidate_page",
]


def kmalloc(state: State) -> bool:
    """Whether the kernel can have a little memory for itself: not where RAM is used up."""
    used = int(state["zone.used"][:2].sum())
    return used < state.ram_pages or bool(state["zone.free"][:2].any())


@kernel("mm/hmm.c, 2017")
def hmm_register(machine: Machine, mm: int, era: Era = Era.APRIL_2017) -> Routine[int]:
    """Row of the struct hmm of an address space, which is made when there is none.

    Returns 0 when that failed, for whatever reason; in 5.4, which has ``mmu_notifier_get`` instead,
    a negative errno that says the reason. Two may make one at once; then the first to publish it
    wins, and the other gives his own up. It is published when its notifier is registered; from 4.20
    to 5.2 before that ("fix race between hmm_mirror_unregister() and mmu_notifier callback").

    Raises
    ------
    ValueError
        When the address space has a struct hmm of another kernel, or that kernel has none.
    """
    if era not in Hmm.of_era:
        raise ValueError(f"{era.label} has no struct hmm; it came in April 2017 and went in 5.5")
    hmm = hmm_of(machine, mm)
    if hmm and _listens(machine, hmm):
        return _same_era(machine, hmm, era)
    if hmm:  # of an address space that is gone
        free_hmm(machine, hmm)
    if not kmalloc(machine):
        return -ENOMEM if era is Era.V5_4 else 0
    hmm = machine.take("hmm.era")
    listener = Hmm.of_era[era](machine, era, hmm)
    machine.objects.setdefault("hmm", {})[hmm] = listener
    machine.write("hmm.era", hmm, era)
    machine.write("hmm.mirrors_lock", hmm, machine.new_lock("the mirrors_sem"))
    if Era.V4_20 <= era < Era.V5_3:
        machine.write("hmm.mm", hmm, mm)
    try:
        notifier = yield from mmu_notifier_register(machine, mm, listener)
    except KernelError as error:
        free_hmm(machine, hmm)
        return -error.errno if era is Era.V5_4 else 0
    winner = hmm_of(machine, mm)
    if winner and winner != hmm:
        yield from mmu_notifier_unregister(machine, notifier)
        free_hmm(machine, hmm)
        return _same_era(machine, winner, era)
    machine.write("hmm.notifier", hmm, notifier)
    machine.write("hmm.mm", hmm, mm)
    return hmm


def _listens(machine: Machine, hmm: int) -> bool:
    """Whether the notifier of a struct hmm is still registered, or about to be."""
    notifier = int(machine["hmm.notifier"][hmm])
    if not notifier:
        return True
    listener = machine.objects["notifier"].get(notifier)
    return bool(machine["notifier.mm"][notifier]) and listener is machine.objects["hmm"][hmm]


def _same_era(state: State, hmm: int, era: Era) -> int:
    there = Era(int(state["hmm.era"][hmm]))
    if there is not era:
        raise ValueError(f"this address space has a struct hmm of {there.label}, not {era.label}")
    return hmm


@kernel("mm/hmm.c, 2017")
def hmm_mirror_register(
    machine: Machine, mirror: HmmMirror | None, mm: int, era: Era = Era.APRIL_2017
) -> Routine[int]:
    """Let a mirror hear of an address space, before all that do already.

    It takes the mmap_lock for writing itself, which was the caller's part.

    Returns
    -------
    0; -EINVAL where the mirror, its callbacks or the address space is missing; -ENOMEM when there
    is no struct hmm, whatever the true cause, which only 5.4 tells.
    """
    if not mm or mirror is None or mirror.ops is None:
        return -EINVAL
    lock = mm_lock(machine, mm)
    yield from machine.down_write(lock)
    try:
        hmm = yield from hmm_register(machine, mm, era)
        if hmm <= 0:
            return hmm or -ENOMEM
        while machine["hmm.forgot_mm"][hmm]:  # 4.17: "it is about to be destroyed, try again"
            yield machine.step("It tries again, for hmm->mm is empty.", mm, lock="an empty hmm->mm")
        mirrors = int(machine["hmm.mirrors_lock"][hmm])
        yield from machine.down_write(mirrors)
        mirror.hmm, mirror.row = hmm, machine.take("hmm_mirror.hmm")
        machine.write("hmm_mirror.hmm", mirror.row, hmm)
        machine.write("hmm_mirror.order", mirror.row, int(machine["hmm_mirror.order"].max()) + 1)
        machine.objects.setdefault("hmm_mirror", {})[mirror.row] = mirror
        machine.up_write(mirrors)
    finally:
        machine.up_write(lock)
    yield machine.step("The mirror is the first of the list now.", mm)
    return 0


@kernel("mm/hmm.c, 2017")
def hmm_mirror_unregister(machine: Machine, mirror: HmmMirror) -> Routine[None]:
    """Take a mirror off the list.

    Until 4.16 that is all: the struct hmm and its notifier live as long as the address space.
    Since 4.17 the last mirror takes them along; in 5.2 and 5.3 the last mirror or range. From 4.17
    to 5.1 *every* mirror empties ``hmm->mm`` as it goes; others that are still there then keep the
    struct hmm for ever, and whoever wants to register one more tries again without end. A second
    call does nothing.
    """
    if not mirror.row:
        return
    hmm = int(machine["hmm_mirror.hmm"][mirror.row])
    era, mm = Era(int(machine["hmm.era"][hmm])), int(machine["hmm.mm"][hmm])
    mirrors = int(machine["hmm.mirrors_lock"][hmm])
    yield from machine.down_write(mirrors)
    unlist(machine, mirror)
    last = not mirrors_of(machine, hmm)
    if era in (Era.V5_2, Era.V5_3):
        last &= not ranges_of(machine, hmm).size
    forgot = bool(machine["hmm.forgot_mm"][hmm])
    if Era.V4_17 <= era < Era.V5_2:
        machine.write("hmm.forgot_mm", hmm, 1)
    if era >= Era.V4_17:
        mirror.hmm = 0
    machine.up_write(mirrors)
    yield machine.step("The mirror hears no more.", mm)
    if era >= Era.V4_17 and last and not forgot:
        if era is Era.V4_17:  # mm->hmm is emptied first, and a change between is one too early
            machine.write("hmm.mm", hmm, 0)
            yield machine.step("mm->hmm is empty, and the notifier still registered.", mm)
        yield from mmu_notifier_unregister(machine, int(machine["hmm.notifier"][hmm]))
        free_hmm(machine, hmm)


@kernel("mm/mmu_notifier.c, 2017")
def mmu_notifier_invalidate_page(machine: Machine, mm: int, vpn: int) -> Routine[None]:
    """Tell the struct hmm that one page has changed, without a start and an end.

    Kernels up to 4.12 called it where one word changed under the page-table lock. The merged HMM
    never had the callback, so later struct hmms do not hear of it.
    """
    hmm = hmm_of(machine, mm)
    if hmm and machine["hmm.era"][hmm] == Era.APRIL_2017:
        range = MmuNotifierRange.one(mm, Event.CLEAR, vpn, vpn + 1)
        yield from machine.objects["hmm"][hmm].invalidate_page(range)
