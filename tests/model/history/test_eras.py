"""One scenario in all eras: every column is run, and the known holes are in them."""

import numpy as np
import pytest

from hmmlab.model.history import Era
from hmmlab.model.history.era import error_name
from hmmlab.model.history.eras import CHANGES, COLUMNS, DRIVERS, SCENARIOS, side_by_side

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


@pytest.mark.parametrize("scenario", SCENARIOS)
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


def test_a_page_in_swap_has_no_answer_from_4_17_to_5_3():
    told = side_by_side("during", change="pageout", eras=tuple(DRIVERS))
    mute = {
        era
        for era in DRIVERS
        if any("no answer" in call for moment in told.moments for call in told.cells[moment, era])
    }
    assert mute == {Era.V4_17, Era.V4_20, Era.V5_2, Era.V5_3}


def test_the_zero_page_is_an_error_from_5_2_to_5_4():
    told = side_by_side("untouched", eras=tuple(DRIVERS))
    refused = {era for era, cell in told.row("it reads").items() if "(refused: EFAULT)" in cell}
    assert refused == {Era.V5_2, Era.V5_3, Era.V5_4}


def test_a_hole_is_refused_in_every_era():
    told = side_by_side("hole", eras=tuple(DRIVERS))
    assert all("(refused: EFAULT)" in cell for cell in told.row("it reads").values())
    assert told.row(STALE) == dict.fromkeys(DRIVERS, ("stale entries: 0",))


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
