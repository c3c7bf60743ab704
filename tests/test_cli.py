"""The command line, as its users meet it: what is printed where, and the exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hmmlab.cli import main

LESSONS = Path(__file__).parent / "kernel_traces" / "lessons"


@pytest.fixture
def scenario(tmp_path):
    def write(*lines):
        path = tmp_path / "s.txt"
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def test_run_prints_the_recorded_answers(capsys):
    assert main(["run", str(LESSONS / "mirror.txt")]) == 0
    out, err = capsys.readouterr()
    printed = [json.loads(line) for line in out.splitlines()]
    recorded = [json.loads(line) for line in (LESSONS / "mirror.jsonl").read_text().splitlines()]
    assert printed == recorded
    assert err == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("frob A 0 1", "expected an operation, not 'frob'"),
        ("store A 0 1", "expected 'store REGION OFF PAGES VALUE'"),
        ("store A 0 1 2 3", "expected 'store REGION OFF PAGES VALUE'"),
        ("store A 0 1 many", "expected a value"),
        ("store A 0 1 -5", "expected a value"),
        ("store A 0 1 18446744073709551616", "expected a value"),
        ("load Z 0 1", "expected a region, one of A; not 'Z'"),
        ("load A 0 x", "expected a number of pages"),
        ("mprotect A 0 1 rq", "expected letters of 'rwx' or 'none', not 'rq'"),
        ("read d7 A 0 1", "expected an open device, one of d0; not 'd7'"),
        ("open d0 0", "'d0' is open already"),
        ("open d1 9", "expected a unit, one of 0, 1, 2, 3; not '9'"),
        ("mmap B 70000 rw private", "0 to 65536"),
        ("mmap B 4 rw wooden", "expected a kind of mapping"),
        ("mmap B 4 rw mixed", "mixed DEVICE"),
        ("mmap B 4 rw private at", "at REGION OFF"),
        ("madvise A 0 1 hurry", "expected an advice"),
        ("on c0 load A 0 1", "expected a child, and none is known here yet"),
        ("on", "expected 'on CHILD OPERATION'"),
        ("exit", "expected 'exit CHILD'"),
        ("load A 65536 1", "at most 65536 pages"),
        ("mmap 4 4 rw private", "expected a name for a region"),
    ],
)
def test_a_malformed_scenario_runs_nothing(scenario, capsys, line, expected):
    path = scenario("open d0 0", "mmap A 4 rw private", "", "# a remark", line)
    assert main(["run", path]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{path}:5: ") and expected in err and err.count("\n") == 1


def test_an_operation_to_come_keeps_the_answers_so_far(scenario, capsys, monkeypatch):
    monkeypatch.delattr("hmmlab.operations.Execution._ksm")
    path = scenario("open d0 0", "mmap A 4 rw private", "ksm A 0 1", "load A 0 1")
    assert main(["run", path]) == 3
    out, err = capsys.readouterr()
    assert [json.loads(line)["op"] for line in out.splitlines()] == [
        "open d0 0",
        "mmap A 4 rw private",
    ]
    assert err.startswith(f"{path}:3: ") and "ksm A 0 1" in err and err.count("\n") == 1


def test_bytes_that_are_no_text(tmp_path, capsys):
    path = tmp_path / "s.txt"
    path.write_bytes(b"open d0 0\n\xff\xfe\n")
    assert main(["run", str(path)]) == 2
    assert main(["replay", str(path)]) == 2
    assert main(["run", str(tmp_path / "none.txt")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 3 and "s.txt:2: expected text in UTF-8" in err


def test_replay_says_how_each_recording_compares(capsys):
    paths = [str(LESSONS / name) for name in ("mirror.jsonl", "batches.jsonl")]
    assert main(["replay", *paths]) == 0
    out, _ = capsys.readouterr()
    assert out.splitlines() == [
        "mirror.jsonl: 20/20 operations as Linux 6.1.192",
        "batches.jsonl: 13/13 operations as Linux 6.1.192",
    ]


def test_replay_shows_the_first_difference(tmp_path, capsys):
    lines = (LESSONS / "mirror.jsonl").read_text().splitlines()
    altered = json.loads(lines[6])
    altered["data"] = [901]
    path = tmp_path / "mirror.jsonl"
    path.write_text("\n".join([*lines[:6], json.dumps(altered), *lines[7:]]))
    assert main(["replay", str(path)]) == 1
    out, _ = capsys.readouterr()
    assert "operation 7 (read d0 A 3 1), key data" in out
    assert "Linux 6.1.192: [901]" in out and "model: [900]" in out


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"proc": "p0", "op": 3}', '{"proc": "p0"', "x"])
def test_replay_of_what_is_no_recording(tmp_path, capsys, text):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    assert main(["replay", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"{path}:1: expected") and err.count("\n") == 1


def test_replay_of_a_recording_whose_operation_is_none(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text('{"proc": "p0", "op": "frob", "ret": 0}\n')
    assert main(["replay", str(path)]) == 2
    assert "expected an operation" in capsys.readouterr().err


def test_the_program_itself():
    done = subprocess.run(
        [sys.executable, "-m", "hmmlab.cli", "replay", str(LESSONS / "mirror.jsonl")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "mirror.jsonl: 20/20 operations as Linux 6.1.192\n"


def test_importing_the_package_loads_numpy_and_nothing_heavier():
    code = "import sys, hmmlab; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "'numpy'" in loaded
    for heavy in ("ipywidgets", "traitlets", "bqplot", "pandas", "anywidget", "tqdm"):
        assert f"'{heavy}'" not in loaded


@pytest.mark.parametrize(
    ("lines", "waits"),
    [
        (  # the unit gives up its memory, and a pipe holds a page of it
            ["open k 2", "to_dev k A 0 2", "hold A 0 1", "release k"],
            "k waits for a page of the device",
        ),
        (  # KSM scans past a merged page on a device and forgets who shares it: Linux 6.1 stops
            # with a BUG at the migration entry that stays behind
            [
                *("open d 0", "ksm A 0 4", "to_dev d A 0 4", "fork c", "on c ksm A 0 4"),
                *("to_dev d A 0 4", "on c store A 0 2 7"),
            ],
            "c waits for migration_entry_wait",
        ),
    ],
)
def test_what_would_wait_for_ever_ends_in_one_line(scenario, capsys, lines, waits):
    begin = ["mmap A 4 rw private", *(f"store A {page} 1 7" for page in range(4))]
    path = scenario(*begin, *lines)
    assert main(["run", path]) == 3
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(begin) + len(lines) - 1
    assert err == f"{path}:{len(begin) + len(lines)}: {waits}, and nobody else runs\n"
