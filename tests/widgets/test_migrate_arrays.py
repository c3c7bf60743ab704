import re

import pytest

from hmmlab import Session
from hmmlab.migrations import PHASES, migrations
from hmmlab.widgets import MigrateArrays, show
from hmmlab.widgets.migrate_arrays import BAND, MOST

LINES = [
    "open d0 0",
    "mmap A 4 rw private",
    "store A 0 2 100",
    "hold A 1 1",
    "to_dev d0 A 0 4",
    "load A 0 1",
]


@pytest.fixture
def session():
    return Session().play(LINES)


@pytest.fixture
def arrays(session):
    return MigrateArrays(session.trace, session.trace.operations[4].first)


def cells(arrays, name):
    found = [page[name] for page in arrays.table.pages]
    return [cell["flags"] if isinstance(cell, dict) else cell for cell in found]


def test_before_a_migration_there_is_nothing(arrays):
    assert repr(arrays) == f"MigrateArrays(step {arrays.playhead.position} of " + (
        f"{arrays.playhead.length}: no migration)"
    )
    assert arrays.table.pages == [] and all(button.disabled for button in arrays.phases.values())
    assert "No migration" in arrays.sentence.value


def test_it_follows_the_playhead(arrays, session):
    (migration,) = migrations(session.trace, 4)
    told = {}
    for phase in PHASES:
        arrays.playhead.position = migration.phases[phase][1]
        told[phase] = cells(arrays, "src"), cells(arrays, "dst"), cells(arrays, "fate")
        assert f": {phase} A pages 0 to 3, src " in repr(arrays)
    assert told["collect"][0] == ["V M W", "V M W", "M", "M"]
    assert told["unmap"][0] == ["V M W", "0", "M", "M"]
    assert told["copy"][1] == ["V W", "0", "V W", "V W"]
    assert told["finalize"][2] == ["moved", "given back", "filled", "filled"]


def test_at_its_first_step_the_arrays_are_empty(arrays, session):
    arrays.playhead.position = session.trace.operations[4].first + 1
    assert cells(arrays, "src") == ["0"] * 4 and cells(arrays, "fate") == [""] * 4
    assert repr(arrays).endswith("collect A pages 0 to 3)")


def test_a_button_goes_to_the_end_of_its_phase(arrays, session):
    (migration,) = migrations(session.trace, 4)
    arrays.playhead.position = session.trace.operations[4].first + 1
    for phase in reversed(PHASES):
        arrays.phases[phase].click()
        assert arrays.playhead.position == migration.phases[phase][1]
        marked = [p for p, b in arrays.phases.items() if "hmm-now" in b._dom_classes]
        assert marked == [phase]


def test_on_the_way_home_there_is_no_map(arrays, session):
    arrays.playhead.position = len(session.trace)
    assert [p for p, b in arrays.phases.items() if b.disabled] == ["map"]
    assert cells(arrays, "fate") == ["moved"] and "It is over" in arrays.sentence.value


def test_what_changed_in_the_phase_is_marked(arrays, session):
    (migration,) = migrations(session.trace, 4)
    arrays.playhead.position = migration.phases["unmap"][1]
    assert [page["src"]["changed"] for page in arrays.table.pages] == [False, True, False, False]
    assert not any(page["dst"]["changed"] for page in arrays.table.pages)


def test_it_shares_a_views_playhead_and_selected_page(session):
    view = show(session, charts=False)
    arrays = MigrateArrays(view.playhead)
    arrays.table.selected = (1, 2097152)
    assert view.playhead.selected == (1, 2097152)
    assert len(arrays.children) == 3  # no timeline of its own
    assert len(MigrateArrays(session.trace).children) == 4


def test_it_reads_and_holds_nothing(arrays, session):
    seen = {}
    for position in [*range(len(session.trace) + 1), *reversed(range(len(session.trace) + 1))]:
        arrays.playhead.position = position
        shown = repr(arrays), arrays.sentence.value, repr(arrays.table.pages)
        assert seen.setdefault(position, shown) == shown


def test_of_many_pages_it_shows_those_around_the_selected_one():
    session = Session().play(["open d0 0", "mmap A 60 rw private", "store A 0 50 1"])
    session.do("to_dev d0 A 0 60")
    arrays = MigrateArrays(session.trace)
    assert len(arrays.table.pages) == MOST and f"{MOST} of 60 pages." in arrays.table.notes
    assert arrays.table.pages[0]["name"] == "A 0" and MOST % BAND == 0
    first = arrays.table.pages[0]["page"][1]
    arrays.playhead.selected = (1, first + 40)
    assert [arrays.table.pages[i]["name"] for i in (0, -1)] == ["A 32", "A 59"]
    assert re.search(r"src 50 VMW, 10 M, dst 60 VW\)$", repr(arrays))
