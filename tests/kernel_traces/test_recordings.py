"""The judge: every recording that the model should answer, at more than one grain."""

from pathlib import Path

import pytest

from hmmlab.invariants import violations
from hmmlab.kernel_traces import (
    KNOWN_CALLS,
    RECORDERS_OWN,
    judge,
    read_recording,
    reduce_calls,
    scenario_of,
    without_recorders_own,
)
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
CALLS = [
    path for path in sorted(HERE.glob("calls/*.jsonl")) if str(path.relative_to(HERE)) not in GAPS
]


def named(paths):
    return [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in paths]


def test_there_are_recordings():
    assert len(RECORDINGS) >= 180
    assert all((HERE / name).is_file() for name in GAPS)


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


# --- the kernel's own calls -----------------------------------------------------------------------


@pytest.mark.parametrize("path", named(CALLS))
def test_calls_stand_in_the_kernels_order(path):
    verdict = judge(read_recording(path), path.name)
    assert verdict.kind == "same", verdict.text + "\n" + verdict.detail[:2000]


def test_every_lesson_has_its_calls():
    lessons = {path.stem for path in HERE.glob("lessons/*.jsonl")}
    assert lessons <= {path.stem for path in CALLS}


def test_every_recorded_call_is_known():
    recorded = {
        name
        for path in CALLS
        for answer in read_recording(path)
        for _, name in answer.get("calls", [])
    }
    assert recorded == KNOWN_CALLS


@pytest.mark.parametrize("path", named(CALLS))
def test_the_model_calls_as_often_as_its_events_and_faults_say(path):
    """What the recorder's own calls could hide is counted by what has addresses."""
    recording = read_recording(path)
    session = Session(grain=1, record=False)
    for operation, theirs in zip(parse(scenario_of(recording)), recording, strict=True):
        answer = session.perform(operation)
        if answer["proc"] != "p0" or "calls" not in theirs:
            continue
        if operation.verb == "ksm":  # a kernel thread does most of it, and is not heard
            continue
        called = [name for _, name in session.calls]
        starts = called.count("__mmu_notifier_invalidate_range_start")
        assert starts == len(answer["notify"]), operation.text
        assert called.count("handle_mm_fault") == len(answer["faults_handled"]), operation.text


def test_the_recorder_has_the_same_mappings_of_its_own_in_every_fork():
    found = set()
    for path in CALLS:
        recording = read_recording(path)
        session = Session(grain=1, record=False)
        for operation, theirs in zip(parse(scenario_of(recording)), recording, strict=True):
            session.perform(operation)
            if operation.verb == "fork" and theirs["proc"] == "p0":
                recorded = reduce_calls(theirs["calls"])
                kept = without_recorders_own(recorded, reduce_calls(session.calls))
                copies = (0, "copy_page_range")
                found.add(recorded.count(copies) - kept.count(copies))
    assert found == {10}


def test_known_calls_keep_their_order_and_nesting():
    calls = [(0, "__x64_sys_munmap"), (1, "do_vmi_munmap"), (2, "unmap_vmas"), (1, "free_pgtables")]
    reduced = [(0, "__x64_sys_munmap"), (1, "unmap_vmas"), (1, "free_pgtables")]
    assert reduce_calls(calls) == reduced
    moved = [(0, "migrate_pages"), (1, "try_to_migrate"), (1, "remove_migration_ptes")]
    assert reduce_calls(moved) == [(0, "try_to_migrate")]  # inlined there, and only there
    assert reduce_calls(moved[2:]) == [(0, "remove_migration_ptes")]


def test_only_what_the_recorder_may_call_by_itself_is_taken_for_its_own():
    fault, wp = [(0, "handle_mm_fault")], [(0, "handle_mm_fault"), (1, "do_wp_page")]
    munmap = [(0, "__x64_sys_munmap"), (1, "unmap_vmas")]
    assert without_recorders_own(fault + wp + munmap, wp + munmap) == wp + munmap
    assert without_recorders_own(wp + munmap, fault + munmap) == munmap  # a fault is missing
    assert without_recorders_own(fault + munmap, []) == munmap  # a system call is never its own
    inside = [(0, "hmm_range_fault"), (1, "handle_mm_fault")]
    assert without_recorders_own(inside, inside[:1]) == inside
    assert {"handle_mm_fault", "copy_page_range"} == RECORDERS_OWN <= KNOWN_CALLS


@pytest.mark.parametrize("path", named(CALLS[::4]))
def test_a_call_too_many_or_too_few_is_told(path):
    """A recording from which a call inside others is gone, or in which one stands twice."""
    recording = read_recording(path)
    for change in (lambda calls, i: calls.pop(i), lambda calls, i: calls.insert(i, calls[i])):
        at = next(i for i, answer in enumerate(recording) if _inner(answer))
        changed = list(recording)
        changed[at] = {**recording[at], "calls": list(recording[at]["calls"])}
        change(changed[at]["calls"], _inner(recording[at]))
        verdict = judge(changed, path.name)
        assert (verdict.kind, verdict.matched) == ("differs", at)


def _inner(answer):
    """Where a known call without others within it stands, in a tree that is not the recorder's."""
    calls = answer.get("calls", []) if answer["proc"] == "p0" else []
    root = ""
    for i, (depth, name) in enumerate(calls):
        root = root if depth else name
        within = i + 1 < len(calls) and calls[i + 1][0] > depth
        if depth and not within and name in KNOWN_CALLS and root not in RECORDERS_OWN:
            return i
    return 0


# --- scenarios and invariants ---------------------------------------------------------------------


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
