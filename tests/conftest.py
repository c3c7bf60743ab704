"""What holds for every test: nobody's own files are written, and no widget outlives its test."""

import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from hmmlab.exercises.progress import VARIABLE

# No test asserts a time, and so neither does hypothesis.
hypothesis.settings.register_profile("hmmlab", deadline=None)
hypothesis.settings.load_profile("hmmlab")


@pytest.fixture(autouse=True)
def progress(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a learner who has just begun."""
    path = tmp_path_factory.mktemp("learner") / "progress.json"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


@pytest.fixture(autouse=True)
def no_widgets_left() -> Iterator[None]:
    """Close all widgets; ipywidgets keeps each, and so its trace, until somebody does."""
    yield
    if widgets := sys.modules.get("ipywidgets"):
        widgets.Widget.close_all()
