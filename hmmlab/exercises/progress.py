"""Which exercises the learner has solved: one small file in the learner's own data folder.

It lies at ``hmmlab/progress.json`` in Jupyter's data folder, or where the environment variable
``HMMLAB_PROGRESS`` says. It is written whole or not at all, and nothing else is ever written.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from hmmlab.exercises.rules import Kind

__all__ = ["VARIABLE", "Progress"]

#: The environment variable that names another file.
VARIABLE = "HMMLAB_PROGRESS"

_STATES = {Kind.RIGHT.value: Kind.RIGHT, Kind.WRONG.value: Kind.WRONG}


class Progress:
    """What the learner's file says, as it was when this was made.

    Parameters
    ----------
    path
        The file; by default the learner's.

    Attributes
    ----------
    states
        By the name of each exercise that was tried: ``RIGHT`` when it was ever right, else
        ``WRONG``.
    complaint
        One line about a file that could not be read or written; empty when all is well.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or _learners_file()
        self.complaint = ""
        self.states = self._read()

    def __repr__(self) -> str:
        solved = sum(kind is Kind.RIGHT for kind in self.states.values())
        return f"Progress({solved} solved, {len(self.states) - solved} tried)"

    def record(self, name: str, kind: Kind) -> None:
        """Keep what came of an answer. What was right once stays so; no attempt changes nothing."""
        known = self.states.get(name)
        if kind is Kind.NOT_ATTEMPTED or known in (kind, Kind.RIGHT):
            return
        self.states[name] = kind
        self._write()

    def start_again(self) -> None:
        """Forget everything."""
        self.states.clear()
        self._write()

    # --- the file ---------------------------------------------------------------------------------
    def _read(self) -> dict[str, Kind]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except OSError as error:
            self.complaint = f"Your progress cannot be read: {self.path}: {error.strerror}."
            return {}
        except UnicodeDecodeError:
            return self._set_aside()
        try:
            return {str(name): _STATES[state] for name, state in json.loads(text).items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return self._set_aside()

    def _set_aside(self) -> dict[str, Kind]:
        aside = self.path.with_name(self.path.name + ".damaged")
        try:
            os.replace(self.path, aside)
        except OSError as error:
            self.complaint = f"{self.path} is damaged, and cannot be set aside: {error.strerror}."
        else:
            self.complaint = f"{self.path} was damaged; it is {aside.name} now, and you start anew."
        return {}

    def _write(self) -> None:
        text = json.dumps({name: kind.value for name, kind in sorted(self.states.items())})
        new = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A whole file takes the place of the old one, however many kernels write.
            handle, new = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.replace(new, self.path)
        except OSError as error:
            self.complaint = f"Your progress cannot be kept: {self.path}: {error.strerror}."
            if new is not None:
                with suppress(OSError):
                    os.unlink(new)


def _learners_file() -> Path:
    if named := os.environ.get(VARIABLE):
        return Path(named)
    from jupyter_core.paths import jupyter_data_dir

    return Path(jupyter_data_dir()) / "hmmlab" / "progress.json"
