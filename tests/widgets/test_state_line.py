"""Every widget with a state line says it in the same way, whichever library it is made with."""

import re

import pytest

from hmmlab import Driver, show
from hmmlab.exercises.turns import discard_and_read
from hmmlab.widgets import EventTape, MigrateArrays, PhysicalMemory, Playhead, RaceView

AT_A_PLAYHEAD = {
    "AddressSpaceView": lambda trace: show(trace, charts=False),
    "EventTape": lambda trace: EventTape(Playhead(trace)),
    "MigrateArrays": MigrateArrays,
    "PhysicalMemory": PhysicalMemory,
}
ALL = {**AT_A_PLAYHEAD, "RaceView": lambda trace: RaceView(discard_and_read(Driver))}


@pytest.mark.parametrize("name", ALL)
def test_the_text_is_the_whole_line_and_names_nothing_of_this_run(name, session):
    widget = ALL[name](session.trace)
    bundle, _ = widget._repr_mimebundle_()
    assert bundle["text/plain"] == repr(widget) == f"{name}({widget._line()})"
    assert not re.search(r" at 0x|\n|…", repr(widget))
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id


def test_a_long_line_is_not_cut(session):
    view = show(session, charts=False)
    assert len(repr(view)) > 110  # where ipywidgets would cut it
    assert view._repr_mimebundle_()[0]["text/plain"].endswith(")")


@pytest.mark.parametrize("name", AT_A_PLAYHEAD)
def test_it_tells_steps_and_stays_where_it_is(name, session, capsys):
    widget = AT_A_PLAYHEAD[name](session.trace)
    widget.playhead.position = 5
    expected = []
    for position in (0, len(session.trace)):
        widget.playhead.position = position
        expected.append(repr(widget))
    widget.playhead.position = 5
    widget.tell([0, len(session.trace)])
    assert capsys.readouterr().out.splitlines() == expected and expected[0] != expected[1]
    assert widget.playhead.position == 5
