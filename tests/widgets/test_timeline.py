import pytest

from hmmlab import Session
from hmmlab.widgets.playhead import Playhead
from hmmlab.widgets.timeline import MAX_STEPS, StepList, Timeline, step_rows


@pytest.fixture
def timeline(playhead):
    return Timeline(playhead)


def rows_of(session, operation):
    return step_rows(session.trace, operation, *Playhead(session.trace).span(operation))


def test_every_step_has_a_row_and_a_sentence(session):
    trace = session.trace
    positions = []
    for operation in range(len(trace.operations)):
        for depth, function, position, sentence in rows_of(session, operation):
            assert depth >= 0 and function
            assert bool(position) == bool(sentence)
            positions += [position] if position else []
    assert positions == list(range(1, len(trace) + 1))


def test_calls_stand_above_the_step_that_they_led_to(session):
    operation = next(
        at for at, op in enumerate(session.trace.operations) if op.text.startswith("mprotect")
    )
    functions = [row[1] for row in rows_of(session, operation)]
    assert functions.index("__x64_sys_mprotect") < functions.index("change_protection")


def test_calls_of_one_function_in_a_row_are_one_row(session):
    rows = [row for at in range(len(session.answers)) for row in rows_of(session, at)]
    assert any(" × " in function for _, function, _, _ in rows)


def test_a_long_operation_shows_the_steps_around_the_current_one():
    session = Session(grain=64)
    session.do("open d0 0")
    session.do("mmap C 3000 rw private")
    session.do("store C 0 3000 1")
    session.do("to_dev d0 C 0 3000")
    playhead = Playhead(session.trace)
    steps = StepList(playhead)
    first, last = playhead.span(playhead.operation)
    assert last - first > 2 * MAX_STEPS
    for position in [*range(first, last, 9), last]:
        playhead.position = position
        listed = [row[2] for row in steps.rows if row[2]]
        assert position in listed
        assert listed == list(range(listed[0], listed[0] + MAX_STEPS + 1))
    playhead.position = 0
    assert steps.rows == []


def test_choosing_a_step_moves_the_playhead(playhead):
    steps = StepList(playhead)
    steps.current = 3
    assert playhead.position == 3
    playhead.position = 5
    assert steps.current == 5


def test_buttons_step_and_stop_at_the_ends(timeline, playhead):
    assert timeline.forward.disabled and timeline.last.disabled
    timeline.back.click()
    assert playhead.position == playhead.length - 1
    timeline.first.click()
    assert playhead.position == 0
    assert timeline.first.disabled and timeline.back.disabled and timeline.operation_back.disabled
    timeline.forward.click()
    assert playhead.position == timeline.slider.value == timeline.clock.value == 1


def test_operations_are_reached_by_their_ends(timeline, playhead):
    timeline.first.click()
    for operation in range(len(playhead.trace.operations)):
        timeline.operation_forward.click()
        assert playhead.operation == timeline.operation.value == operation
        assert playhead.position == playhead.span(operation)[1]
    timeline.operation.value = 2
    assert playhead.position == playhead.span(2)[1]
    timeline.operation.value = -1
    assert playhead.position == 0


def test_slider_and_clock_move_the_playhead(timeline, playhead):
    timeline.slider.value = 4
    assert playhead.position == 4
    timeline.clock.value = 6  # as the browser does while it plays
    assert playhead.position == timeline.slider.value == 6


def test_play_at_the_end_begins_anew(timeline, playhead):
    timeline.play.click()
    assert playhead.position == 0 and timeline.clock.playing
    assert "Pause" in timeline.play.description
    timeline.play.click()
    assert not timeline.clock.playing and "Play" in timeline.play.description


def test_play_from_a_step(timeline, playhead):
    timeline.play_from(3)
    assert playhead.position == 3 and timeline.clock.playing


def test_speed_is_the_clocks_interval(timeline):
    timeline.speed.value = 400
    assert timeline.clock.interval == 400


def test_the_sentence_is_the_steps(timeline, playhead):
    step = playhead.replay.event.step
    assert playhead.trace.names.sentence(step) in timeline.sentence.value
    playhead.position = 0
    assert "Before the first step" in timeline.sentence.value


def test_a_new_operation_is_offered(session, timeline):
    session.do("store A 10 1 5")
    text, at = timeline.operation.options[-1]
    assert text.endswith("store A 10 1 5") and timeline.operation.value == at
