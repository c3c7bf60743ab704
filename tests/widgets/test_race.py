import re

import pytest

from hmmlab import Driver, Machine, Process
from hmmlab.exercises.turns import CheckThenLock, discard_and_read
from hmmlab.model.race import Orders
from hmmlab.widgets import RaceView
from hmmlab.widgets.race import sum_up


@pytest.fixture
def view() -> RaceView:
    return RaceView(discard_and_read(CheckThenLock))


def texts(view: RaceView) -> list[str]:
    """The turns that are shown, without their marks."""
    rows = view.lanes.value.split("<tr")[2:]
    return [" ".join(re.sub(r"<[^>]*>", " ", row.partition(">")[2]).split()) for row in rows]


def test_a_button_takes_a_turn_and_back_takes_it_back(view):
    view.buttons["device"].click()
    view.buttons["CPU"].click()
    assert view.order == "dc" and view.playhead.position == 2
    assert texts(view)[0] == "1 read d0 does not know A pages 0 to 3."
    assert "A change is under way" in view.status.value
    before = view.run.machine
    view.back.click()
    assert view.order == "d" and len(texts(view)) == 1
    assert view.run.machine is not before  # machines never run backwards
    view.restart.click()
    assert view.order == "" and not texts(view)
    assert view.back.disabled and view.restart.disabled


def test_the_tables_beneath_are_those_of_the_moment(view):
    view.order = "dddddccccc"
    codes = view.grid.codes.copy()
    assert repr(view) == "RaceView(dddddccccc: CPU 2 empty 2 rw, device none, nothing wrong)"
    view.take("device")
    assert "device 2 rw 2 stale, wrong" in repr(view)
    assert "hmm-bad" in view.status.value and "A page 0" in view.status.value
    view.go_back()
    assert (view.grid.codes == codes).all()


def test_stepping_and_jumping_come_to_the_same(view):
    for turn in "ddcdccd":
        view.take({"c": "CPU", "d": "device"}[turn])
    stepped = repr(view), view.lanes.value, view.status.value, view.grid.codes.tolist()
    other = RaceView(discard_and_read(CheckThenLock))
    other.order = "ddcdccd"
    other.order = view.order
    assert (
        repr(other),
        other.lanes.value,
        other.status.value,
        other.grid.codes.tolist(),
    ) == stepped


def test_who_waits_is_seen_to_wait_and_adds_no_turn():
    view = RaceView(discard_and_read(Driver))
    view.order = "cdd"
    assert "hmm-waits" in view.lanes.value
    assert texts(view)[-1] == "3 mmu_interval_read_begin It waits until the invalidation ends."
    view.buttons["device"].click()
    assert view.order == "cdd"
    assert "device still waits for invalidate_seq." in view.status.value


def test_every_order_goes_to_the_first_that_is_wrong(view):
    view.every.click()
    assert view.wrong and view.order == view.every_order().first
    assert "break the promise" in view.verdict.value and not view.every.disabled


def test_a_search_from_a_cell_spoils_nothing(view):
    view.order = "dd"
    before = repr(view), view.lanes.value, view.status.value, view.verdict.value
    assert view.every_order() == view.race.every_order(view.judge)
    assert (repr(view), view.lanes.value, view.status.value, view.verdict.value) == before
    assert view.verdict.value == ""


def test_every_order_of_a_correct_driver_stays_where_it_is():
    view = RaceView(discard_and_read(Driver))
    view.order = "ddc"
    view.every.click()
    assert view.order == "ddc" and "nothing goes wrong in any of them" in view.verdict.value


def test_what_is_returned_or_refused_is_told_and_escaped():
    def build():
        process = Process(Machine(ram_pages=4096))
        pages = process.mmap(2, "r")
        steps = process.steps
        return {"CPU": steps.store(pages, 1), "<b>": steps.run("<i>", process.machine.down_read(0))}

    view = RaceView(build)
    view.order = "cc<<"
    assert "<i>" not in view.lanes.value and "&lt;b&gt;" in view.lanes.value
    assert texts(view)[-1].endswith("returns")
    assert any("is refused: SIGSEGV" in text for text in texts(view))
    assert all(button.disabled for button in view.buttons.values())
    assert "All have returned" in view.status.value


def test_a_letter_that_is_none_is_refused_and_changes_nothing(view):
    view.order = "dd"
    with pytest.raises(ValueError, match="turn 'x'"):
        view.order = "ddx"
    assert view.order == "dd" and repr(view).startswith("RaceView(dd: ")
    view.order = "d d"
    assert view.order == "dd" and view.run.trace is view.playhead.trace


def test_it_tells_orders_and_stays_where_it_is(view, capsys):
    view.order = "d"
    view.tell(["", "dd"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20] for line in lines] == ["RaceView(no turn yet", "RaceView(dd: CPU 4 r"]
    assert view.order == "d"


def test_the_table_of_turns_is_read_aloud_as_one(view):
    view.order = "d"
    html = view.lanes.value
    assert 'role="region" aria-label="Turns so far"' in html and 'tabindex="0"' in html
    assert html.count('scope="col"') == 3 and html.count('scope="row"') == 1
    assert 'aria-current="step"' in html and 'role="status"' in view.status.value


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Orders(1), "Tried 1 order: nothing goes wrong in any of them."),
        (
            Orders(1200, 3, 0, False, "dc", "It is stale."),
            "Tried 1,200 orders: 3 break the promise. The first is shown: It is stale.",
        ),
        (
            Orders(9, 0, 2, False, "d", "Nobody can go on."),
            "Tried 9 orders: in 2 all that are left wait for ever. "
            "The first is shown: Nobody can go on.",
        ),
        (
            Orders(9, 1, 2, True, "d", "It goes round."),
            "Some orders never end. Some break the promise. The first is shown: It goes round.",
        ),
    ],
)
def test_what_came_of_every_order_in_words(found, text):
    assert sum_up(found) == text
