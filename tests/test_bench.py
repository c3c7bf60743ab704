"""The bench: what it reports, and that the parties do the same; never how long anything takes."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from hmmlab import KernelError
from hmmlab.bench import bench, host, model, rounds, table, textbook
from hmmlab.bench.other import bytes_per_page
from hmmlab.cli import main
from hmmlab.invariants import violations
from hmmlab.model.entry import PRESENT, RW
from hmmlab.model.mm_types import mm_root
from hmmlab.model.page import PG_ANON_EXCLUSIVE, page_rows
from hmmlab.model.page_table import read_range
from hmmlab.model.state import State

PAGES = 600  # more than one page table

#: How the names of columns begin that have a row a page.
PER_PAGE = ("page.", "zone.free_list", "dmirror_device.free_list")


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hmmlab.bench.other._IMPORTS", 1)
        return bench([64])


def test_the_report_has_exactly_what_it_promises(report):
    assert list(report) == ["rows", "loop", "other"]
    assert [row["operation"] for row in report["rows"]] == list(model.OPERATIONS)
    for row in report["rows"]:
        assert list(row) == [
            "operation",
            "pages",
            "model_ns_per_page",
            "host_ns_per_page",
            "host_over_model",
            "copy_ns_per_page",
            "model_over_copy",
        ]
        assert row["pages"] == 64 and row["model_ns_per_page"] > 0
        for ratio, over, under in (
            ("host_over_model", "host", "model"),
            ("model_over_copy", "model", "copy"),
        ):
            a, b = row[f"{over}_ns_per_page"], row[f"{under}_ns_per_page"]
            assert row[ratio] == (a / b if a and b else None)
    without_host = [row["operation"] for row in report["rows"] if row["host_ns_per_page"] is None]
    assert without_host == ["device_read", "to_dev", "cpu_fault_back", "invalidate_one_page"]
    assert [row["operation"] for row in report["rows"] if not row["copy_ns_per_page"]] == [
        "invalidate_one_page"
    ]
    assert [row["operation"] for row in report["loop"]] == [
        name for name in model.OPERATIONS if name not in [*without_host]
    ]
    assert report["other"]["fewer_rounds"] == []
    assert json.loads(json.dumps(report)) == report


def test_the_table_has_a_line_a_row(report):
    lines = table(report).splitlines()
    for row in [*report["rows"], *report["loop"]]:
        assert any(line.startswith(row["operation"] + " ") for line in lines)
    assert "-" in next(line for line in lines if line.startswith("to_dev")).split()


@pytest.mark.parametrize("word", ["0", "-4", "many", str(1 << 40)])
def test_pages_out_of_bounds(capsys, word):
    with pytest.raises(SystemExit) as end:
        main(["bench", "--pages", word])
    assert end.value.code == 2 and "--pages" in capsys.readouterr().err


def test_a_median_leaves_out_the_first_round_and_tidies_up():
    told = []

    def story():
        try:
            while True:
                told.append((yield "one", lambda: "answer"))
                yield "two", lambda: None
        finally:
            told.append("closed")

    found = rounds.medians(story())
    assert list(found) == ["one", "two"]
    assert [median.rounds for median in found.values()] == [rounds.ROUNDS] * 2
    assert told == ["answer"] * (rounds.ROUNDS + 1) + ["closed"]


def test_without_patience_one_round_must_do(monkeypatch):
    monkeypatch.setattr(rounds, "PATIENCE", -1.0)

    def story():
        while True:
            yield "one", lambda: None

    assert rounds.medians(story())["one"].rounds == 1


# --- the parties do the same ----------------------------------------------------------------------


def flags_and_counts(process, where):
    """Of each page whether it is present and writable; its counts, content, owner and place."""
    machine = process.machine
    words = read_range(machine, mm_root(machine, process.mm), where.start, where.stop)
    present = (words & np.uint64(PRESENT)) != 0
    rows = page_rows(
        machine,
        np.where(present, (words >> np.uint64(12)) & np.uint64(0xFFFFFF), 0).astype(np.int64),
    )
    columns = [
        machine[f"page.{name}"][rows] * present for name in ("refcount", "mapcount", "content")
    ]
    columns += [
        ((machine["page.flags"][rows] & PG_ANON_EXCLUSIVE) != 0) & present,
        np.where(present, machine["page.index"][rows] - where.start, -1),
    ]
    return [
        present.tolist(),
        ((words & np.uint64(RW)) != 0).tolist(),
        *(c.tolist() for c in columns),
    ]


def same_of_textbook(space):
    entries = [space.entry(vpn) for vpn in range(space.pages)]
    frames = [entry.frame if entry else None for entry in entries]
    return [
        [entry is not None for entry in entries],
        [bool(entry and entry.flags & 2) for entry in entries],
        *(
            [getattr(f, name) if f else 0 for f in frames]
            for name in ("refcount", "mapcount", "content", "exclusive")
        ),
        [f.index if f else -1 for f in frames],
    ]


def test_the_textbook_does_what_the_model_does():
    process, where = model.a_process(PAGES)
    space = textbook.Space(PAGES)
    child = twin = None

    def check():
        assert same_of_textbook(space) == flags_and_counts(process, where)
        if twin:
            assert same_of_textbook(child) == flags_and_counts(twin, twin.here(where))
        assert violations(process.machine) == []

    for act, again in [
        (lambda: process.store(where, range(PAGES)), lambda: space.store(range(PAGES))),
        (lambda: process.mprotect(where, "r"), lambda: space.mprotect(False)),
        (lambda: process.mprotect(where, "rw"), lambda: space.mprotect(True)),
    ]:
        act(), again()
        check()
    twin, child = process.fork(), space.fork()
    check()
    process.store(where, range(7, PAGES + 7)), space.store(range(7, PAGES + 7))
    check()
    twin.store(twin.here(where), 5), child.store([5] * PAGES)
    check()
    process.madvise(where, "dontneed"), space.dontneed()
    check()
    space.mprotect(False), process.mprotect(where, "r")
    with pytest.raises(PermissionError):
        space.store([1])
    with pytest.raises(KernelError, match="SIGSEGV"):
        process.store(where[:1], 1)
    process.munmap(where), space.munmap()
    assert space.root == {} and not any(space.snapshot())


def test_every_party_tells_the_same_story():
    stories = [
        rounds.medians(story(16))
        for story in (model.life_of_a_mapping, host.life_of_a_mapping, textbook.life_of_a_mapping)
    ]
    mapping = [name for name in model.OPERATIONS if name in stories[0]]
    assert len(mapping) == 6
    for story in stories:
        assert [name for name in story if name != "snapshot"] == mapping


@pytest.mark.parametrize("story", [model.life_of_a_mapping, model.life_of_a_mirror])
def test_a_story_leaves_the_machine_in_order(story):
    story = story(PAGES)
    name, act = next(story)
    machine = story.gi_frame.f_locals["process"].machine
    for _ in range(14):
        name, act = story.send(act())
        assert violations(machine) == [], name
    story.close()


def test_the_mirror_of_the_story_goes_to_the_device_and_back():
    story = model.life_of_a_mirror(PAGES)
    name, act = next(story)
    while name != "to_dev":
        name, act = story.send(act())
    process = story.gi_frame.f_locals["process"]
    where = story.gi_frame.f_locals["where"]
    bytes_ = lambda: process.files["d0"].snapshot(where).tolist()  # noqa: E731
    act()
    assert bytes_() == [0x22] * PAGES
    name, act = story.send(None)
    act()
    assert bytes_() == [0x02] * PAGES


@pytest.mark.parametrize("life", [model.life_of_a_mapping, model.life_of_a_mirror])
def test_the_copy_counts_exactly_the_columns_that_an_operation_touches(life, monkeypatch):
    story = life(PAGES)
    answer, touched = None, {}
    for _ in range(13):  # in the second round frames come from the free lists
        name, act = story.send(answer)
        machine = story.gi_frame.f_locals["process"].machine
        read = set()

        def noting(state, column, read=read, get=State.__getitem__):
            read.add(column)
            return get(state, column)

        trace = machine.record()
        with monkeypatch.context() as patch:
            patch.setattr(State, "__getitem__", noting)
            answer = act()
        machine.detach(trace)
        written = Counter()
        for event in trace.events:
            for write in event.writes:
                written[write.column] += write.new.size
        read |= {column for column, rows in written.items() if rows >= PAGES}
        touched[name] = {c for c in read if c == "pte" or c.startswith(PER_PAGE)}
    touched.pop("invalidate_one_page", None)
    assert touched == {name: set(model.COLUMNS[name]) for name in touched}


def test_importing_the_package_loads_numpy_and_nothing_heavier():
    code = (
        "import numpy, sys; before = set(sys.modules); "
        "import hmmlab; print(*set(sys.modules) - before)"
    )
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "hmmlab.model.process" in loaded
    heavy = {"zipfile", "hashlib", "lzma", "ipywidgets", "traitlets", "bqplot", "pandas"}
    assert not heavy & set(loaded)


def test_bytes_a_page_are_counted_in_columns():
    found = bytes_per_page(8192)
    assert 40 < found["bytes_per_resident_page"] < found["bytes_per_migrated_page"] < 200
