import pytest
from traitlets import TraitError

from hmmlab import Session
from hmmlab.widgets.playhead import Playhead


def test_it_begins_at_the_end_or_where_it_is_told(session):
    assert Playhead(session.trace).position == len(session.trace)
    assert Playhead(session.trace, 3).replay.position == 3


def test_observers_find_the_replay_in_place(playhead):
    seen = []
    playhead.observe(lambda change: seen.append(playhead.replay.position), "position")
    for position in (2, 9, 0, playhead.length):
        playhead.position = position
    assert seen == [2, 9, 0, playhead.length]


def test_there_and_back_is_the_same_state(playhead):
    before = playhead.replay.state.copy()
    for position in (0, playhead.length // 2, 1, playhead.length):
        playhead.position = position
    assert playhead.replay.state == before


@pytest.mark.parametrize("position", [-1, 10_000])
def test_a_position_that_is_none_changes_nothing(playhead, position):
    before = playhead.position
    with pytest.raises(TraitError, match=f"position {position}: this trace has 0 to "):
        playhead.position = position
    assert playhead.position == playhead.replay.position == before


def test_at_the_end_it_moves_with_the_end(session, playhead):
    session.do("store B 30 2 1")
    assert playhead.position == playhead.length == len(session.trace)
    assert not playhead.replay.state.difference(session.machine)


def test_elsewhere_it_stays(session, playhead):
    playhead.position = 4
    session.do("store B 30 2 1")
    assert (playhead.position, playhead.length) == (4, len(session.trace))


def test_a_closed_one_follows_no_more(session, playhead):
    playhead.close()
    length = playhead.length
    session.do("store B 30 2 1")
    assert playhead.length == length


def test_spans_of_operations_tile_the_trace(session, playhead):
    at = 0
    for operation in range(len(session.trace.operations)):
        first, last = playhead.span(operation)
        assert first == at + 1 and last >= first
        at = last
    assert at == playhead.length


def test_the_device_is_the_first_one_that_is_open(playhead):
    assert playhead.device_of(1)[1] == "d0"
    playhead.position = 0
    assert playhead.device_of(1) == (0, "")


def test_it_turns_to_another_trace_and_tells_even_where_the_number_is_the_same(playhead):
    playhead.selected = (1, 2)
    heard = []
    playhead.observe(lambda change: heard.append(change["new"]), "position")
    for trace in (playhead.trace, Session().play(["mmap A 2 rw private"]).trace):
        left = playhead.trace
        playhead.turn_to(trace)
        assert (playhead.trace, playhead.position) == (trace, len(trace))
        assert not playhead.replay.state.difference(trace.replay().seek(len(trace)).state)
        assert playhead.refresh in trace.listeners
        assert trace is left or playhead.refresh not in left.listeners
    assert len(heard) == 2
