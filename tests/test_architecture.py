"""ARCHITECTURE.md is true: every room is listed, and imports only from rooms above it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "hmmlab" / "model"
LISTED = re.findall(
    r"\b(\w+)\.py",
    (ROOT / "ARCHITECTURE.md").read_text().split("  model/ ")[1].split("  exercises/")[0],
)
ROOMS = sorted(path.stem for path in MODEL.glob("*.py") if path.stem != "__init__")


def imported(room: str) -> set[str]:
    """Rooms that a room imports when it runs."""
    tree = ast.parse((MODEL / f"{room}.py").read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    modules = [node.module.split(".") for node in nodes]
    return {names[2] for names in modules if names[:2] == ["hmmlab", "model"]}


def test_every_room_is_listed_once():
    listed = [room for room in LISTED if room in ROOMS]
    assert sorted(listed) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_above_it(room):
    above = set(LISTED[: LISTED.index(room)])
    assert imported(room) <= above, imported(room) - above
