"""One scenario in all eras: every column is run, and the known holes are in them."""

import numpy as np
import pytest

from hmmlab.model.history import Era
from hmmlab.model.history.era import error_name
from hmmlab.model.history.eras import CHANGES, COLUMNS, DRIVERS, SCENARIOS, side_by_side
from hmmlab.model.mm_types import mm_lock
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)

STALE = "so the device has"


def stale(told):
    return {era: cell != ("stale entries: 0",) for era, cell in told.row(STALE).items()}


@pytest.fixture(scope="module")
def between():
    return side_by_side()


@pytest.fixture(scope="module")
def during():
    return side_by_side("during")


def test_the_columns_are_six_kernels(between):
    assert between.eras == COLUMNS
    assert set(COLUMNS) <= set(DRIVERS) == set(Era)
    assert [era.label for era in between.eras] == [
        "April 2017",
        "4.14",
        "5.2",
        "5.4",
        "6.1",
        "today",
    ]


def test_a_change_between_look_and_lock_is_unseen_in_2017_and_from_5_2_to_5_4(between):
    """Seed 001 has nothing to ask; 5.2 to 5.4 ask and hear "valid"; 4.14 and 6.1 look again."""
    assert stale(between) == {
        Era.APRIL_2017: True,
        Era.V4_14: False,
        Era.V5_2: True,
        Era.V5_4: True,
        Era.V6_1: False,
        Era.TODAY: False,
    }
    asked = between.row("it takes its lock")
    assert asked[Era.APRIL_2017] == ()
    assert asked[Era.V4_14][0] == "hmm_vma_range_done = False"
    assert asked[Era.V5_2][0] == asked[Era.V5_4][0] == "hmm_range_valid = True"
    assert asked[Era.V6_1][0] == "mmu_interval_read_retry = True"


def test_during_a_change_everybody_since_4_14_looks_again_or_waits(during):
    assert [era for era, is_stale in stale(during).items() if is_stale] == [Era.APRIL_2017]
    told = during.row("the CPU begins a change")
    assert told[Era.APRIL_2017] == told[Era.V4_14] == ("hmm->sequence = 1",)
    assert told[Era.V5_2] == ("sync_cpu_device_pagetables(0, 4)", "hmm->notifiers = 1")
    assert told[Era.V6_1] == ("invalidate(CLEAR, 0, 4)", "invalidate_seq = 3")
    look = during.row("the device looks the range up")
    assert look[Era.V4_14] == ("hmm_vma_fault = 0",)
    assert look[Era.V5_2] == ("hmm_range_register = 0",)
    assert look[Era.V6_1] == ("(waits for invalidate_seq)",)


def test_what_each_kernel_counts():
    """A number that nobody reads until 4.19, none in 4.20, running changes in 5.2, then parity."""
    begun = side_by_side("during", eras=tuple(DRIVERS)).row("the CPU begins a change")
    counted = {era: cell[-1] for era, cell in begun.items()}
    for era in DRIVERS:
        if era < Era.V5_2:
            assert counted[era] == f"hmm->sequence = {int(era < Era.V4_20)}"
        else:
            number = "hmm->notifiers = 1" if era < Era.V5_5 else "invalidate_seq = 3"
            assert counted[era] == number


def test_april_2017_has_no_start_where_pages_go_one_by_one():
    """Reclaim calls ``invalidate_page``, after the change; the merged HMM never had that."""
    eras = (Era.APRIL_2017, Era.V4_14)
    begun = side_by_side("during", change="pageout", eras=eras).row("the CPU begins a change")
    heard = [f"sync_cpu_device_pagetables({page}, {page + 1})" for page in range(4)]
    assert begun[Era.APRIL_2017] == (*heard, "hmm->sequence = 4")
    assert begun[Era.V4_14] == ("hmm->sequence = 1",)


def test_callbacks_move_from_the_end_to_the_start(during):
    end = during.row("the CPU ends the change")
    called = {era for era, cell in end.items() if "sync_cpu_device_pagetables(0, 4)" in cell}
    assert called == {Era.APRIL_2017, Era.V4_14}


def test_who_holds_the_mmap_lock_makes_munmap_wait():
    told = side_by_side(change="munmap")
    waits = {
        era
        for era, cell in told.row("the CPU changes the range").items()
        if any("waits for the mmap_lock" in call for call in cell)
    }
    assert waits == {Era.V4_14, Era.V5_2, Era.V5_4}
    assert stale(told)[Era.APRIL_2017]
    assert "hmm_range_fault = -EFAULT" in told.row("it takes its lock")[Era.V6_1]


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "memory"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_scenario_runs_in_every_era(scenario, change):
    told = side_by_side(scenario, change=change, eras=tuple(DRIVERS))
    assert all((moment, era) in told.cells for moment in told.moments for era in DRIVERS)
    opened = told.row("the device opens")
    for era, cell in opened.items():
        mirrors = era < Era.V5_5
        assert cell == (("hmm_mirror_register = 0",) if mirrors else (INSERT,))
    late = [era for era in DRIVERS if era >= Era.V5_7]
    assert not any(stale(told)[era] for era in late)


INSERT = "mmu_interval_notifier_insert"


def test_every_era_but_two_kinds_sees_a_change_between_look_and_lock():
    """April 2017 has nothing to ask, and 5.2 to 5.4 have forgotten by then."""
    told = side_by_side(eras=tuple(DRIVERS))
    blind = {era for era, is_stale in stale(told).items() if is_stale}
    assert blind == {Era.APRIL_2017, Era.V5_2, Era.V5_3, Era.V5_4}


def test_until_5_6_the_page_of_another_device_is_taken_for_ones_own():
    told = side_by_side(change="migrate", eras=tuple(DRIVERS))
    assert {era for era, is_stale in stale(told).items() if not is_stale} == {
        Era.V5_7,
        Era.V6_1,
        Era.TODAY,
    }
    heard = told.row("the CPU changes the range")
    assert heard[Era.V5_7][0] == "invalidate(CLEAR, 0, 4)"  # MIGRATE is of 5.9
    assert heard[Era.V6_1][0] == "invalidate(MIGRATE, 0, 4)"


def test_a_page_in_swap_has_no_answer_in_5_2_and_5_3():
    told = side_by_side("during", change="pageout", eras=tuple(DRIVERS))
    mute = {
        era
        for era in DRIVERS
        if any("no answer" in call for moment in told.moments for call in told.cells[moment, era])
    }
    assert mute == {Era.V5_2, Era.V5_3}


def test_the_zero_page_is_an_error_from_5_2_to_5_4():
    told = side_by_side("untouched", eras=tuple(DRIVERS))
    refused = {era for era, cell in told.row("it reads").items() if "(refused: EFAULT)" in cell}
    assert refused == {Era.V5_2, Era.V5_3, Era.V5_4}


def test_a_hole_is_refused_in_every_era():
    told = side_by_side("hole", eras=tuple(DRIVERS))
    assert all("(refused: EFAULT)" in cell for cell in told.row("it reads").values())
    assert told.row(STALE) == dict.fromkeys(DRIVERS, ("stale entries: 0",))


# --- device memory --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memory():
    return side_by_side("memory", eras=tuple(DRIVERS))


OLD = [Era.V4_14, Era.V4_17, Era.V4_20, Era.V5_2, Era.V5_3]
NEW = [Era.V5_4, Era.V5_5, Era.V5_7, Era.V6_1, Era.TODAY]


def test_the_pages_go_to_the_card_in_every_kernel_that_has_device_memory(memory):
    held = {era for era, cell in memory.row("so on the card are").items() if cell == ("pages: 8",)}
    assert held == set(OLD + NEW)
    read = memory.row("the CPU reads page 1")
    assert all(cell[-1] == "(reads 101)" for cell in read.values())


def test_migrate_vma_calls_the_driver_until_5_3_and_is_called_in_three_parts_since(memory):
    """Seed 002 on the three steps that 5.4 exports, so that nobody needs callbacks."""
    moved = memory.row("it takes the pages")
    for era in OLD:
        assert moved[era] == ("alloc_and_copy(0, 8)", "finalize_and_map(0, 8)", "migrate_vma = 0")
    for era in NEW:
        assert [call.split("(")[0] for call in moved[era]] == [
            "migrate_vma_setup",
            "",
            "migrate_vma_pages",
            "migrate_vma_finalize",
        ]


def test_the_names_of_device_memory(memory):
    """Seed 002: mm: remove hmm_devmem_add; add a migrate_to_ram method to dev_pagemap_ops."""
    got, touched = memory.row("the card gets memory"), memory.row("the CPU reads page 1")
    for era in OLD[:-1]:
        assert got[era] == ("hmm_devmem_add: 32768 pages",)
        assert touched[era][0] == "hmm_devmem_ops.fault(1, 2)"
        assert "hmm_devmem_ops.free x 1" in touched[era]
    for era in [Era.V5_3, *NEW]:
        assert "memremap_pages: 32768 pages" in got[era][1]
        assert touched[era][0] == "dev_pagemap_ops.migrate_to_ram(1, 2)"
    goes = memory.row("the card goes")
    assert {era for era, cell in goes.items() if cell == ("hmm_devmem_remove",)} == set(OLD[:3])


def test_what_a_migration_says_of_the_pages_it_wants(memory):
    said = {era: cell[0] for era, cell in memory.row("it takes the pages").items() if era in NEW}
    assert said[Era.V5_5] == "migrate_vma_setup(): cpages = 8"
    assert said[Era.V5_7] == "migrate_vma_setup(src_owner): cpages = 8"
    assert said[Era.V6_1] == "migrate_vma_setup(pgmap_owner, flags): cpages = 8"


def test_before_6_1_a_faulted_page_is_free_before_its_migration_returns(memory):
    """Nobody but the table held it; since 6.1 the fault does."""
    for era, cell in memory.row("the CPU reads page 1").items():
        if era is Era.APRIL_2017:
            continue
        freed = next(i for i, call in enumerate(cell) if "free x 1" in call)
        last = "migrate_vma = 0" if era in OLD else "migrate_vma_finalize"
        assert (freed < cell.index(last)) is (era < Era.V6_1)


def test_it_prints_as_a_table(between):
    lines = str(between).splitlines()
    assert lines[0] == SCENARIOS["between"][0]
    at = [lines[1].index(era.label) for era in COLUMNS]
    row = next(line for line in lines if line.startswith("it takes its lock"))
    assert row[at[1] :].startswith("hmm_vma_range_done = False")
    assert row[at[4] :].startswith("mmu_interval_read_retry = True")


def test_a_column_reads_from_top_to_bottom(between):
    column = between.column(Era.V6_1)
    assert list(column) == list(between.moments)
    calls = [call for cell in column.values() for call in cell]
    assert calls.index("mmu_interval_read_retry = True") < calls.index(
        "mmu_interval_read_retry = False"
    )


def test_some_eras_only():
    told = side_by_side(eras=(Era.V5_4, Era.V4_14))
    assert told.eras == (Era.V5_4, Era.V4_14)


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="expected one of between, during, hole"):
        side_by_side("later")
    with pytest.raises(ValueError, match="expected one of dontneed"):
        side_by_side(change="reboot")


def test_errors_have_their_names():
    assert [error_name(n) for n in (-11, -16, -14, 8, 0, -99)] == [
        "-EAGAIN",
        "-EBUSY",
        "-EFAULT",
        "8",
        "0",
        "-99",
    ]


@pytest.mark.parametrize("era", [Era.V5_2, Era.V5_3, Era.V5_4], ids=lambda era: era.label)
def test_waiting_for_a_valid_range_holds_no_lock(machine, process, run, era):
    """Seed 002 on the completion of 5.2: the mapping is looked up again after the wait."""
    device = process.attach(DRIVERS[era])
    a = process.mmap(4)
    process.store(a, range(4))
    change = MmuNotifierRange.one(process.mm, Event.CLEAR, a.start, a.stop)
    run(invalidate_range_start(machine, change))
    reading = device.steps.read(a[:2])
    next(step for step in reading if step.function == "hmm_range_wait_until_valid")
    assert machine.holders(mm_lock(machine, process.mm)) == (False, 0)
    process.munmap(a[2:])  # so the mapping is another one when the device comes back
    run(invalidate_range_end(machine, change))
    assert reading.run().tolist() == [0, 1]
    device.close()


@pytest.mark.parametrize("era", DRIVERS, ids=lambda era: era.label)
def test_each_driver_reads_writes_and_refuses(machine, process, era):
    device = process.attach(DRIVERS[era])
    a = process.mmap(4)
    process.store(a, range(4))
    assert device.read(a).tolist() == [0, 1, 2, 3]
    device.write(a[1:3], [8, 9])
    assert process.load(a).tolist() == [0, 8, 9, 3]
    process.mprotect(a[:2], "r")
    assert not device.entries(a.start, a.start + 2).any()
    assert np.count_nonzero(device.entries(a.start, a.stop)) == 2
    process.munmap(a)
    device.close()
