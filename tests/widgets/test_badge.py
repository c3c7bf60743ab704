import copy

import pytest

from hmmlab.widgets.badge import Badge
from hmmlab.widgets.controls import Controls


@pytest.fixture
def recording(session):
    return copy.deepcopy(session.answers)


def test_same(playhead, recording):
    badge = Badge(playhead, recording)
    assert badge.verdict.kind == "same"
    assert "hmm-same" in badge.line.value and "12/12 operations" in badge.line.value


def test_differs_and_shows_both_answers(playhead, recording):
    recording[4]["data"][1] = 999
    badge = Badge(playhead, recording)
    assert "hmm-differs" in badge.line.value and "operation 5" in badge.line.value
    playhead.position = playhead.span(4)[1]
    assert "999" in badge.both.value and "101" in badge.both.value
    assert badge.both.value.count("<tr class=hmm-differs>") == 1


def test_own_operations_are_not_recorded(session, playhead, recording):
    badge = Badge(playhead, recording)
    Controls(session, playhead).do("store A 10 1 5")
    assert badge.verdict.kind == "unrecorded"
    assert "not recorded" in badge.both.value


def test_before_the_first_operation_there_is_no_answer(playhead, recording):
    badge = Badge(playhead, recording)
    playhead.position = 0
    assert badge.both.value == ""


def test_the_repr_is_the_verdict(playhead, recording):
    assert repr(Badge(playhead, recording)) == "Badge(12/12 operations as Linux 6.1.192)"
