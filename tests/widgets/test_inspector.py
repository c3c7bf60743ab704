import re

import pytest

from hmmlab.widgets.inspector import Inspector
from hmmlab.widgets.one_page import inspect


@pytest.fixture
def inspector(playhead):
    return Inspector(playhead)


def page(playhead, name, offset):
    return 1, playhead.trace.names.of(1)[name][0] + offset


def test_without_a_page_it_says_how_to_choose_one(inspector):
    assert "Select a page" in inspector.value


def test_a_present_word_is_shown_bit_by_bit(inspector, playhead):
    playhead.selected = page(playhead, "B", 0)
    assert "<h3>B page 0</h3>" in inspector.value
    for name in ("NX", "pfn", "DIRTY", "ACCESSED", "USER", "RW", "PRESENT"):
        assert f'<th scope="row">{name}</th>' in inspector.value
    for title in ("CPU", "d0", "Frame", "VMA"):
        assert re.search(f"<h4>[^<]*{title}", inspector.value), title


def test_a_page_on_the_device_shows_its_entry(inspector, playhead):
    playhead.selected = page(playhead, "B", 5)
    assert "DEVICE_WRITE" in inspector.value and "offset" in inspector.value


def test_every_page_at_every_step_can_be_taken_apart(inspector, playhead):
    for position in range(playhead.length + 1):
        playhead.position = position
        for name in ("A", "B"):
            for offset in (0, 2, 5, 9, 15):
                playhead.selected = page(playhead, name, offset)
                assert f"{name} page {offset}" in inspector.value


def test_bits_of_a_word_are_64_and_say_what_the_word_says(inspector, playhead):
    mm, vpn = page(playhead, "B", 0)
    for section in inspect(playhead.replay.state, mm, vpn, playhead.device_of(mm)[0]):
        if section.bits:
            assert sum(high - low + 1 for high, low, *_ in section.bits) == 64
            word = int(dict(row[:2] for row in section.rows)["word"], 16)
            assert word == sum(value << low for _, low, _, value, _ in section.bits)


def test_it_follows_the_playhead(inspector, playhead):
    playhead.selected = page(playhead, "B", 5)
    end = inspector.value
    playhead.position -= 4
    playhead.position = playhead.span(7)[1]
    assert inspector.value != end
