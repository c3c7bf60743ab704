"""The judge: every recording that the model should answer, at more than one grain."""

from pathlib import Path

import pytest

from hmmlab.invariants import violations
from hmmlab.kernel_traces import judge, read_recording
from hmmlab.model.machine import BULK
from hmmlab.scenario import parse
from hmmlab.session import Session

HERE = Path(__file__).parent
#: Recordings that the model does not answer yet, each with the reason.
GAPS = dict(
    line.split(": ", 1)
    for line in (HERE / "gaps.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
RECORDINGS = sorted(path for path in HERE.glob("**/*.jsonl") if path.parent.name != "calls")
ANSWERS = [path for path in RECORDINGS if str(path.relative_to(HERE)) not in GAPS]
CALLS = sorted(HERE.glob("calls/*.jsonl"))


def named(paths):
    return [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in paths]


def test_there_are_recordings():
    assert len(RECORDINGS) >= 180 and len(CALLS) >= 3
    assert GAPS.keys() <= {str(path.relative_to(HERE)) for path in RECORDINGS}


@pytest.mark.parametrize("name", GAPS)
def test_a_gap_is_still_one(name):
    """A recording that is answered by now must leave the list."""
    assert judge(read_recording(HERE / name), name).kind != "same"


@pytest.mark.parametrize("path", named(ANSWERS))
def test_answers(path):
    recording = read_recording(path)
    verdict = judge(recording, path.name)
    assert verdict.kind == "same", verdict.text + "\n" + verdict.detail
    assert verdict.matched == verdict.total == len(recording)


@pytest.mark.parametrize("grain", [1, 7, 64])
@pytest.mark.parametrize("path", named(ANSWERS[::12]))
def test_answers_at_a_finer_grain(path, grain):
    verdict = judge(read_recording(path), path.name, grain=grain)
    assert verdict.kind == "same", verdict.text + "\n" + verdict.detail


@pytest.mark.parametrize("path", named(CALLS))
def test_calls_stand_in_the_kernels_order(path):
    verdict = judge(read_recording(path), path.name)
    assert verdict.kind == "same", verdict.text


@pytest.mark.parametrize("path", named(sorted(HERE.glob("*/*.txt"))))
def test_a_scenario_is_the_text_of_its_recording(path):
    recording = read_recording(path.with_suffix(".jsonl"))
    assert [op.text for op in parse(path.read_text())] == [answer["op"] for answer in recording]


@pytest.mark.parametrize("path", named(sorted(HERE.glob("random/*/*.txt"))[::7]))
def test_invariants_hold_after_every_operation(path):
    session = Session(grain=BULK, record=False)
    for operation in parse(path.read_text()):
        session.perform(operation)
        assert violations(session.machine) == [], operation.text


def test_invariants_hold_after_every_step_of_the_mirror_lesson():
    session = Session(grain=1)
    for operation in parse((HERE / "lessons/mirror.txt").read_text()):
        session.perform(operation)
    for replay in session.trace.replay():
        assert violations(replay.state, quiet=False) == [], replay.event
