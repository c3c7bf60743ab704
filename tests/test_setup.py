"""The three descriptions of the environment agree, and hold nothing of one machine."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def pins() -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in map(pin, CONSTRAINTS)}


def pin(line: str) -> tuple[str, str]:
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)==(\d[\w.]*)", line)
    assert match, f"not name==version: {line!r}"
    return match[1], match[2]


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for group in (PROJECT["dependencies"], *extras) for line in group]


def test_every_dependency_is_pinned_to_a_version_that_it_admits():
    pinned = pins()
    for requirement in requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} has no line in constraints.txt"
        assert version in requirement.specifier


def test_constraints_are_sorted_and_name_nothing_twice():
    names = [canonicalize_name(pin(line)[0]) for line in CONSTRAINTS]
    assert names == sorted(set(names))


def test_conda_gets_the_same_environment():
    *conda, pip = ENVIRONMENT["dependencies"]
    name, _, version = conda[0].partition("=")
    assert name == "python"
    assert version in SpecifierSet(PROJECT["requires-python"])
    assert conda[1:] == ["pip"]
    extras = ",".join(sorted(PROJECT["optional-dependencies"]))
    assert pip == {"pip": ["-c constraints.txt", f"-e .[{extras}]"]}
    assert ENVIRONMENT["channels"] == ["conda-forge"]
    assert ENVIRONMENT["name"] == PROJECT["name"]
