"""Migrations as a trace tells them: phases, arrays, and what became of each page."""

import numpy as np
import pytest

from hmmlab import KernelError, Machine, Process, Session
from hmmlab.exercises.migrate import pin, pipe
from hmmlab.migrations import PHASES, Fate, letters, migrations
from hmmlab.model.migrate_vma import SELECT_SYSTEM, MigrateVma
from hmmlab.model.mm_types import vma_lookup

#: A page at every gate; see notebook 05.
STORY = """
open d0 0
mmap A 8 rw private
store A 3 5 103
madvise A 5 2 pageout
fork c
store A 0 1 100
load A 1 1
pin A 3 1
hold A 4 1
load A 6 1
to_dev d0 A 0 8
load A 0 8
""".strip().splitlines()
FATES = ["moved", "filled", "filled", "left out", "given back", "left out", "refused", "moved"]


def begun(pages=4, written=4, grain=1 << 62):
    machine = Machine(4096, grain=grain)
    trace, process = machine.record(), Process(machine)
    device, where = process.open(), process.mmap(pages)
    if written:
        process.store(where[:written], range(100, 100 + written))
    return trace, process, device, where


@pytest.mark.parametrize("grain", [1, 3, 1 << 62])
def test_a_page_at_every_gate(grain):
    session = Session(grain=grain).play(STORY)
    (migration,) = migrations(session.trace, 10)
    end = session.trace.operations[10].last
    assert [fate.value for fate in migration.fates(end)] == FATES
    assert list(migration.phases) == list(PHASES)
    told = [migration.at(migration.phases[phase][1]) for phase in ("collect", "unmap", "pages")]
    assert letters(told[0].src) == ["VMW", "M", "M", "0", "VM", "0", "VM", "VM"]
    assert letters(told[1].src) == ["VMW", "M", "M", "0", "0", "0", "VM", "VM"]
    assert letters(told[2].src) == ["VMW", "M", "M", "0", "0", "0", "V", "VM"]
    assert letters(told[2].dst) == ["VW", "VW", "VW", "0", "0", "0", "V", "V"]
    # migrate_vma_pages refuses a page, and leaves what setup has counted.
    assert [(now.cpages, now.marked()) for now in told] == [(6, 6), (5, 5), (5, 4)]


def test_phases_follow_each_other_and_cover_the_migration():
    session = Session(grain=1).play(STORY)
    (migration,) = migrations(session.trace, 10)
    spans = [migration.phases[phase] for phase in PHASES]
    assert [first for first, _ in spans[1:]] == [last + 1 for _, last in spans[:-1]]
    operation = session.trace.operations[10]
    assert operation.first < migration.first and spans[-1][1] <= operation.last
    for phase, (first, last) in migration.phases.items():
        assert {migration.phase(position) for position in range(first, last + 1)} == {phase}


def test_before_anything_is_told_nothing_is_known():
    session = Session().play(STORY)
    (migration,) = migrations(session.trace, 10)
    assert migration.at(migration.first) is None and migration.fates(migration.first) == []


def test_faults_of_the_cpu_are_migrations_of_their_own():
    session = Session(grain=1).play(STORY)
    touches = migrations(session.trace, 11)
    assert [touch.told[0][2].vpns.size for touch in touches] == [1] * 4
    assert all("map" not in touch.phases for touch in touches)


def test_two_operations_by_turns_are_kept_apart():
    trace, process, device, pages = begun()
    moving, reading = device.steps.to_dev(pages), process.steps.load(pages[0])
    while next(moving).function != "migrate_device_unmap":
        pass
    assert next(step for step in reading if step.lock)
    moving.run()
    reading.run()
    there, back = (migrations(trace, at) for at in (3, 4))
    assert [len(there), len(back)] == [1, 1]
    assert there[0].fates(len(trace)) == [Fate.MOVED] * 4
    assert back[0].told[0][2].vpns.tolist() == [pages.start]
    with pytest.raises(StopIteration):
        next(reading)


def test_a_hole_that_is_filled_meanwhile_is_taken():
    trace, process, device, pages = begun(written=3)
    moving = device.steps.to_dev(pages)
    while next(moving).function != "migrate_device_unmap":
        pass
    process.store(pages[3], 700)
    with pytest.raises(KernelError, match="ENOENT"):
        moving.run()
    (migration,) = migrations(trace, 3)
    assert migration.fates(len(trace)) == [*[Fate.MOVED] * 3, Fate.TAKEN]
    assert process.load(pages[3])[0] == 700


def test_a_driver_may_give_no_frame():
    trace, process, _, pages = begun(written=2)
    from hmmlab.model.migrate import migrate_vma_finalize, migrate_vma_pages, migrate_vma_setup

    vma = vma_lookup(process.machine, process.mm, pages.start)
    migrate = MigrateVma(vma, np.arange(pages.start, pages.stop), 1, SELECT_SYSTEM)

    def decline():
        for part in (migrate_vma_setup, migrate_vma_pages, migrate_vma_finalize):
            yield from part(process.machine, migrate)

    process.run("decline", decline())
    (migration,) = migrations(trace, len(trace.operations) - 1)
    assert migration.fates(len(trace)) == [Fate.NO_DST] * 4
    assert "copy" not in migration.phases and process.load(pages).tolist() == [100, 101, 0, 0]


def test_nothing_is_copied_where_nobody_listens():
    machine = Machine(4096)
    migrate = MigrateVma(None, np.arange(4), 1, SELECT_SYSTEM)
    assert migrate.now(machine) is None
    machine.record()
    copied = migrate.now(machine)
    migrate.src[:] = 3
    assert copied is not None and not copied.src.any()


def test_an_operation_without_a_migration_has_none():
    trace, process, _, pages = begun()
    pipe(process, pages[0])
    pin(process, pages[1])
    assert not any(migrations(trace, at) for at in range(len(trace.operations)))
    process.exit()
    assert migrations(trace, len(trace.operations) - 1) == []
