import re
import subprocess
import sys
from pathlib import Path

import ipywidgets
import pytest

import hmmlab.widgets
from hmmlab import Session
from hmmlab.widgets import AddressSpaceView, show

FRONT = Path(hmmlab.widgets.__file__).with_name("front")


def all_widgets(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from all_widgets(child)


def test_a_session_has_controls_and_a_trace_has_none(session):
    assert hasattr(show(session), "controls")
    assert not hasattr(show(session, controls=False), "controls")
    assert not hasattr(show(session.trace), "controls")


@pytest.mark.parametrize("source", [None, 7, "mirror.txt"])
def test_what_cannot_be_shown_is_refused(source):
    with pytest.raises(TypeError, match="takes a Session or a Trace, not"):
        show(source)


def test_a_position_that_is_none_is_refused(session):
    with pytest.raises(ValueError, match=f"position 999: this trace has 0 to {len(session.trace)}"):
        show(session, position=999)


def test_the_state_line(session):
    view = show(session, charts=False)
    end = len(session.trace)
    assert repr(view) == (
        f"AddressSpaceView(step {end} of {end}: 2 regions 56 pages, "
        "CPU 24 empty 15 rw 7 on device, device 7 rw local 4 ro 1 rw)"
    )
    assert repr(view) == f"AddressSpaceView({view.summary.value})"
    view.playhead.position = 0
    assert repr(view) == f"AddressSpaceView(step 0 of {end}: nothing mapped)"


def test_every_widget_has_a_repr_that_is_always_the_same(session):
    def texts():
        view = show(session, recording=session.answers)
        return [repr(widget) for widget in all_widgets(view)]

    first, second = texts(), texts()
    assert first == second
    assert not any(re.search(r"0x[0-9a-f]{6}| at 0x|model_id", text) for text in first)


def test_a_recording_may_be_a_file_or_objects(session, tmp_path):
    import json

    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in session.answers))
    for recording in (path, str(path), iter(session.answers)):
        view = show(session, recording=recording, charts=False)
        assert view.badge.verdict.kind == "same"


def test_walking_the_trace_moves_every_part(session):
    view = show(session)
    for position in (0, 7, 1, len(session.trace)):
        view.playhead.position = position
        assert view.timeline.slider.value == position
        assert view.steps.current == position
        assert f"step {position} of" in view.summary.value


def test_two_views_of_one_trace_move_apart(session):
    one, two = show(session, charts=False), show(session, charts=False)
    one.playhead.position = 3
    assert two.playhead.position == len(session.trace)


def test_a_fresh_session_can_be_shown():
    view = show(Session())
    assert isinstance(view, AddressSpaceView)
    assert "nothing mapped" in repr(view)


def test_bqplot_is_only_loaded_for_charts():
    code = (
        "import sys; from hmmlab import Session, show; show(Session(), charts=False);"
        "sys.exit('bqplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_text_is_smaller_than_11_pixels():
    for path in FRONT.iterdir():
        sizes = re.findall(r"font(?:-size)?: ?(\d+)px|`(\d+)px \$\{FONT", path.read_text("utf-8"))
        assert all(int(a or b) >= 11 for a, b in sizes), path.name


def test_controls_is_an_ipywidgets_box(session):
    view = show(session, charts=False)
    assert isinstance(view.controls, ipywidgets.VBox)
