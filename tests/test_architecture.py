"""ARCHITECTURE.md is true: every room is listed, and imports only from rooms above it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hmmlab"
MODEL = PACKAGE / "model"
ROOMS_TOLD = (ROOT / "ARCHITECTURE.md").read_text().split("## Rooms")[1].split("\n## ")[0]
LISTED = re.findall(r"\b(\w+)\.py", ROOMS_TOLD.split("  model/ ")[1].split("  exercises/")[0])
ROOMS = sorted(path.stem for path in MODEL.glob("*.py") if path.stem != "__init__")

#: What the files of each folder may import of the others. Only the course shows progress.
FOLDERS = {
    "model": set(),
    "invariants": {"model"},
    "exercises": {"invariants", "model"},
    "widgets": {"invariants", "model"},
    "bench": {"model"},
}
COURSE = PACKAGE / "widgets" / "course.py"


def imported(path: Path) -> list[list[str]]:
    """Modules of the package that a file imports when it is imported, as their names' parts."""
    nodes = ast.parse(path.read_text()).body
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return [parts[1:] for parts in (name.split(".") for name in names) if parts[0] == "hmmlab"]


def test_every_room_is_listed_once():
    listed = [room for room in LISTED if room in ROOMS]
    assert sorted(listed) == ROOMS


def test_every_file_beside_the_folders_is_listed_once():
    above = ROOMS_TOLD.split("  model/ ")[0]
    listed = re.findall(r"^  (\w+)\.py ", above, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in PACKAGE.glob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_above_it(room):
    above = set(LISTED[: LISTED.index(room)])
    names = {name for folder, name, *_ in imported(MODEL / f"{room}.py") if folder == "model"}
    assert names <= above, names - above


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_it_builds_on(folder):
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        others = {parts[0] for parts in imported(path) if (PACKAGE / parts[0]).is_dir()} - {folder}
        allowed = FOLDERS[folder] | ({"exercises"} if path == COURSE else set())
        assert others <= allowed, f"{path.name} imports {others - allowed}"
