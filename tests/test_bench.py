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
from hmmlab.model.entry import HMM_PFN_VALID, HMM_PFN_WRITE, PFN_MASK, pfn_of
from hmmlab.model.hmm import HmmRange
from hmmlab.model.mm_types import mm_root
from hmmlab.model.page import page_rows
from hmmlab.model.page_table import read_range
from hmmlab.model.state import State

PAGES = 600  # more than one page table

#: How the names of columns begin that have a row a page.
PER_PAGE = ("page.", "zone.free_list", "dmirror_device.free_list")


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hmmlab.bench.other._IMPORTS", 1)
        patch.setattr(rounds, "ENOUGH", 0.0)
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


def test_a_median_leaves_out_the_first_round_and_tidies_up(monkeypatch):
    monkeypatch.setattr(rounds, "ENOUGH", 0.0)
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


def test_short_rounds_go_on(monkeypatch):
    monkeypatch.setattr(rounds, "ENOUGH", 0.05)

    def story():
        while True:
            yield "one", lambda: None

    assert rounds.medians(story())["one"].rounds > rounds.ROUNDS


def test_without_patience_one_round_must_do(monkeypatch):
    monkeypatch.setattr(rounds, "PATIENCE", -1.0)

    def story():
        while True:
            yield "one", lambda: None

    assert rounds.medians(story())["one"].rounds == 1


# --- the parties do the same ----------------------------------------------------------------------


#: What the textbook's frames keep: all of ``struct page``.
FRAME = ("refcount", "mapcount", "flags", "content", "mapping", "swap", "compound", "private")


def state_of(process, where):
    """Of each page the bits of its word, 0 where there is none, and all of its frame."""
    machine = process.machine
    words = read_range(machine, mm_root(machine, process.mm), where.start, where.stop)
    present = words != 0
    rows = page_rows(machine, pfn_of(words[present]))
    told = {name: machine[f"page.{name}"][rows].tolist() for name in FRAME}
    told["index"] = (machine["page.index"][rows] - where.start).tolist()
    return {"words": (words & np.uint64(~PFN_MASK & (1 << 64) - 1)).tolist()} | told


def state_of_textbook(space):
    entries = [space.entry(vpn) for vpn in range(PAGES)]
    frames = [entry.frame for entry in entries if entry]
    told = {name: [getattr(frame, name) for frame in frames] for name in (*FRAME, "index")}
    return {"words": [entry.flags if entry else 0 for entry in entries]} | told


def test_the_textbook_keeps_what_the_model_keeps():
    process, where = model.a_process(PAGES)
    space = textbook.Space(textbook.Memory())
    space.mmap(0, PAGES)
    (mapping,) = space.mappings
    child = twin = None
    frames = process.machine["zone.used"][0] - process.machine["zone.free"][0]

    def store(space, *values):
        for vpn, value in enumerate(values):
            space.store(vpn, value)

    def check():
        for own, other, pages in ((space, process, where), (child, twin, where)):
            if other:
                theirs = state_of(other, other.here(pages))
                for name, values in state_of_textbook(own).items():
                    assert (name, values) == (name, theirs[name])
        assert violations(process.machine) == []

    for act, again in [
        (lambda: process.store(where, range(PAGES)), lambda: store(space, *range(PAGES))),
        (lambda: process.mprotect(where, "r"), lambda: space.mprotect(mapping, False)),
        (lambda: process.mprotect(where, "rw"), lambda: space.mprotect(mapping, True)),
    ]:
        act(), again()
        check()
    twin, child = process.fork(), space.fork()
    check()
    process.mprotect(where, "r"), space.mprotect(mapping, False)
    process.mprotect(where, "rw"), space.mprotect(mapping, True)
    check()
    process.store(where, range(7, PAGES + 7)), store(space, *range(7, PAGES + 7))
    check()
    twin.store(twin.here(where), 5), store(child, *[5] * PAGES)
    check()
    process.madvise(where[:300], "dontneed"), space.dontneed(0, 300)
    check()
    process.store(where, 9), store(space, *[9] * PAGES)
    check()
    space.mprotect(mapping, False), process.mprotect(where, "r")
    with pytest.raises(PermissionError, match="page 0 is read-only"):
        space.store(0, 1)
    with pytest.raises(KernelError, match="SIGSEGV"):
        process.store(where[:1], 1)
    process.munmap(where), space.munmap(mapping)
    assert space.root == {} and not any(space.snapshot(0, PAGES))
    with pytest.raises(PermissionError, match="nothing is mapped at page 0"):
        space.store(0, 1)
    child.munmap(child.mappings[0]), twin.exit()
    left = process.machine["zone.used"][0] - process.machine["zone.free"][0]
    assert space.memory.frames == len(space.memory.free) and left == frames
    assert not any(getattr(frame, name) for frame in space.memory.free for name in RESET)


#: What a frame forgets when it is freed.
RESET = ("refcount", "mapcount", "flags", "mapping", "index", "swap", "compound", "private")


def test_the_textbook_sees_what_the_model_sees():
    process, where = model.a_process(8)
    space = textbook.Space(textbook.Memory())
    space.mmap(0, 8)
    for vpn in (0, 1, 2, 5):
        space.store(vpn, 1)
        process.store(where[vpn : vpn + 1], 1)
    space.fork(), process.fork()
    space.store(1, 2), process.store(where[1:2], 2)
    answer, device = np.zeros(8, np.uint64), process.open(0)
    range = HmmRange(process.mm, device.subscription, 0, where.start, where.stop, answer)
    process.run("snapshot", model._look(process.machine, range))
    bits = HMM_PFN_VALID | HMM_PFN_WRITE
    assert [pfn & bits for pfn in space.snapshot(0, 8)] == (answer & np.uint64(bits)).tolist()


def test_every_party_tells_the_same_story(monkeypatch):
    monkeypatch.setattr(rounds, "ENOUGH", 0.0)
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
