"""States can be told apart without colour, and their glyphs can be read on their colours."""

import itertools

import pytest

from hmmlab.widgets.palette import CPU_STATES, DEVICE_STATES

TABLES = pytest.mark.parametrize("states", [CPU_STATES, DEVICE_STATES], ids=["cpu", "device"])
THEMES = pytest.mark.parametrize("theme", ["colour_light", "colour_dark"])


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@TABLES
def test_a_code_is_the_place_of_its_state(states):
    assert [state.code for state in states] == list(range(len(states)))


@TABLES
def test_names_glyphs_and_short_names_are_unique(states):
    for field in ("name", "glyph", "short"):
        values = [getattr(state, field) for state in states]
        assert len(set(values)) == len(values), field
    assert all(len(state.glyph) == 1 for state in states)


@TABLES
@THEMES
def test_colours_differ(states, theme):
    for a, b in itertools.combinations(states, 2):
        assert getattr(a, theme) != getattr(b, theme)


@TABLES
@THEMES
def test_a_glyph_can_be_read_on_its_colour(states, theme):
    # The browser writes black on what is brighter than 0.179, else white (paint.js).
    for state in states:
        back = luminance(getattr(state, theme))
        ink = 0.0 if back > 0.179 else 1.0
        contrast = (max(back, ink) + 0.05) / (min(back, ink) + 0.05)
        assert contrast >= 4.5, (state.name, contrast)
