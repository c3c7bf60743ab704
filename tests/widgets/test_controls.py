import re

import pytest

from hmmlab import Session
from hmmlab.widgets.controls import _COMMANDS, Controls, outcome
from hmmlab.widgets.playhead import Playhead


@pytest.fixture
def controls(session, playhead):
    return Controls(session, playhead)


def press(controls, text):
    [line] = [line for line, (name, _) in _COMMANDS.items() if name == text]
    controls.buttons[line].click()
    return controls.session.answers[-1]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Map", "mmap C 3 rw private"),
        ("Load", "load B 2 3"),
        ("Store", "store B 2 3 50"),
        ("Protect", "mprotect B 2 3 r"),
        ("Discard", "madvise B 2 3 dontneed"),
        ("Unmap", "munmap B 2 3"),
        ("Read", "read d0 B 2 3"),
        ("Write", "write d0 B 2 3 50"),
        ("Snapshot", "snapshot d0 B 2 3"),
        ("To device", "to_dev d0 B 2 3"),
        ("To RAM", "to_sys d0 B 2 3"),
        ("Close", "close d0"),
    ],
)
def test_a_button_runs_its_line(controls, text, line):
    controls.region.value, controls.page.value, controls.pages.value = "B", 2, 3
    controls.value.value, controls.prot.value = 50, "r" if text == "Protect" else "rw"
    answer = press(controls, text)
    assert answer["op"] == controls.line.value == line
    assert line in controls.answer.value and "hmm-bad" not in controls.answer.value
    assert controls.playhead.position == controls.playhead.length


def test_a_machine_without_anything_offers_what_can_be_done():
    session = Session()
    controls = Controls(session, Playhead(session.trace))
    able = {name for line, (name, _) in _COMMANDS.items() if not controls.buttons[line].disabled}
    assert able == {"Map", "Open d0"}
    assert press(controls, "Open d0")["ret"] == 0
    assert press(controls, "Map")["op"] == "mmap A 4 rw private"
    assert press(controls, "Store")["ret"] == 0
    assert press(controls, "Read")["data"] == [100, 101, 102, 103]


def test_open_gives_way_to_what_an_open_device_does(controls):
    buttons = {name: controls.buttons[line] for line, (name, _) in _COMMANDS.items()}
    assert buttons["Open d0"].layout.display == "none" and buttons["Read"].layout.display == ""
    press(controls, "Close")
    assert buttons["Open d0"].layout.display == "" and buttons["Read"].layout.display == "none"


def test_a_refusal_is_one_sentence(controls):
    controls.do("munmap B 0 4")
    controls.do("load B 0 1")
    assert "SIGSEGV" in controls.answer.value and "hmm-bad" in controls.answer.value
    controls.do("read d0 B 0 1")
    assert "EFAULT" in controls.answer.value


@pytest.mark.parametrize("line", ["fly A", "store A", "read d7 A 0 1"])
def test_a_wrong_line_changes_nothing(controls, line):
    operations, length = len(controls.session.answers), controls.playhead.length
    controls.do(line)
    assert re.search(rf"{line}: .*(expected|does not have)", controls.answer.value)
    assert "hmm-bad" in controls.answer.value
    assert (len(controls.session.answers), controls.playhead.length) == (operations, length)


def test_an_empty_line_does_nothing(controls):
    before = controls.answer.value
    controls.run.click()
    assert controls.answer.value == before


def test_acting_from_the_past_goes_to_the_new_end(controls):
    controls.playhead.position = 3
    press(controls, "Load")
    assert controls.playhead.position == controls.playhead.length


def test_steps_are_played_for_who_wants_to_watch(session, playhead):
    played = []
    controls = Controls(session, playhead, played.append)
    controls.watch.value = True
    before = playhead.length
    controls.do("to_dev d0 B 0 4")
    assert played == [before + 1]


def test_the_selected_page_fills_in_the_inputs(controls, playhead):
    start, _ = playhead.trace.names.of(1)["B"]
    playhead.selected = (1, start + 9)
    assert (controls.region.value, controls.page.value) == ("B", 9)


@pytest.mark.parametrize(
    ("answer", "text", "bad"),
    [
        ({"op": "read d0 A 0 1", "ret": -14}, "-14, EFAULT (Bad address)", True),
        ({"op": "store A 0 1 1", "ret": -11}, "SIGSEGV: the process would be killed", True),
        ({"op": "load A 0 2", "ret": 0, "data": [1, 2]}, "data 1, 2.", False),
        ({"op": "snapshot d0 A 0 2", "ret": 0, "snapshot": "02ff"}, "snapshot 02, ff", False),
        (
            {
                "op": "munmap A 0 4",
                "ret": 0,
                "notify": [{"event": "UNMAP", "region": "A", "start": 0, "end": 4}],
            },
            "the device was told: UNMAP A 0–3",
            False,
        ),
        ({"op": "load A 0 1", "ret": 0, "faults_handled": [[]]}, "1 page fault.", False),
        ({"op": "load A 0 99", "ret": 0, "data": list(range(99))}, "and 83 more", False),
    ],
)
def test_outcomes(answer, text, bad):
    said, refused = outcome(answer)
    assert text in said and said.startswith(answer["op"]) and refused is bad
