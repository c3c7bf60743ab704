"""What was solved is kept, in a file that is whole or not there; a broken file breaks nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hmmlab.exercises import exercise
from hmmlab.exercises.progress import VARIABLE, Progress
from hmmlab.exercises.rules import Kind


def test_a_check_is_recorded_and_right_stays_right(progress, capsys):
    desk = exercise("repoint")
    desk.check(...)
    assert not progress.exists()
    desk.check(lambda next, source, target: next)
    assert Progress().states == {"repoint": Kind.WRONG}
    desk.check(lambda next, source, target: next and next - source + target)
    desk.check(lambda next, source, target: next)
    assert Progress().states == {"repoint": Kind.RIGHT}
    assert "progress" not in capsys.readouterr().out


def test_to_start_again_forgets_everything(progress):
    Progress().record("permission", Kind.RIGHT)
    Progress().start_again()
    assert Progress().states == {} and json.loads(progress.read_text()) == {}


def test_two_notebooks_keep_one_file(progress):
    """Each check reads before it writes."""
    exercise("repoint").check(lambda next, source, target: next)
    exercise("permission").check(lambda prot, access: "ok")
    assert set(Progress().states) == {"repoint", "permission"}
    assert [path.name for path in progress.parent.iterdir()] == ["progress.json"]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"repoint": "perfect"}',
        b'{"repoint": []}',
        b"\xff\xfe",
        b"[" * 9999,
    ],
)
def test_a_damaged_file_is_set_aside_with_one_line(progress, capsys, text):
    progress.write_bytes(text)
    exercise("repoint").check(lambda next, source, target: next)
    said = capsys.readouterr().out.splitlines()
    complaint = f"{progress} was damaged; it is progress.json.damaged now, and you start anew."
    assert said.count(complaint) == 1
    assert progress.with_name("progress.json.damaged").read_bytes() == text
    assert Progress().states == {"repoint": Kind.WRONG} and not Progress().complaint


def test_a_file_that_cannot_be_written_costs_a_line_and_no_answer(tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").write_text("a file where a folder is wanted")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "taken" / "progress.json"))
    exercise("repoint").check(lambda next, source, target: next and next - source + target)
    right, complaint = capsys.readouterr().out.splitlines()
    assert right.startswith("Right on") and complaint.startswith("Your progress cannot be")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(progress, monkeypatch):
    Progress().record("permission", Kind.RIGHT)
    before = progress.read_bytes()

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    late = Progress()
    late.record("repoint", Kind.RIGHT)
    assert "No space left" in late.complaint
    assert progress.read_bytes() == before
    assert [path.name for path in progress.parent.iterdir()] == ["progress.json"]


def test_the_file_lies_where_jupyter_keeps_data(tmp_path):
    code = "from hmmlab.exercises.progress import Progress; print(Progress().path)"
    environment = {**os.environ, "JUPYTER_DATA_DIR": str(tmp_path), VARIABLE: ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == tmp_path / "hmmlab" / "progress.json"
