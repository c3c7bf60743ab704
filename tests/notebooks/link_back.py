"""Renew the glossary's lists of the notebooks that link to each of its words: ``link_back.py``."""

import re
from pathlib import Path

import nbformat

HOME = Path(__file__).parents[2] / "notebooks"

#: A word's heading, what it means, its kernel file; then the notebooks, which are renewed.
ENTRY = re.compile(
    r"(?P<told>#### (?P<word>.+)\n(?P<meaning>.+)  \n\*See\* `(?P<file>[a-z0-9_/]+\.[ch])`)"
    r"(?P<met>(?:, (?:\*and\* )?\[\d\d\]\([^)]+\))*)\."
)


def links() -> dict[str, list[str]]:
    """Names of the lessons that link to a cell of the glossary, by the cell's id."""
    found: dict[str, list[str]] = {}
    for path in sorted(HOME.glob("[0-9][0-9]_*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        for word in dict.fromkeys(re.findall(r"\]\(glossary\.ipynb#cell-id=([^)]*)\)", text)):
            found.setdefault(word, []).append(path.name)
    return found


def renewed(entry: re.Match[str], found: dict[str, list[str]]) -> str:
    """An entry with the notebooks that link to it. A space of its word is a hyphen in its id."""
    names = found.get(entry["word"].replace(" ", "-"), [])
    met = ", ".join(f"[{name[:2]}]({name})" for name in names)
    return f"{entry['told']}, *and* {met}." if met else f"{entry['told']}."


if __name__ == "__main__":
    glossary = nbformat.read(HOME / "glossary.ipynb", as_version=4)
    found = links()
    for cell in glossary.cells[1:]:
        cell.source = ENTRY.sub(lambda entry: renewed(entry, found), cell.source)
    nbformat.write(glossary, HOME / "glossary.ipynb")
