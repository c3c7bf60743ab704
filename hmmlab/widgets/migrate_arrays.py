"""The two arrays of a migration, src and dst, at any step: a column a page.

``MigrateArrays(session.trace)`` stands alone; ``MigrateArrays(view.playhead)`` moves with a view.
"""

from __future__ import annotations

from html import escape
from typing import Any

import anywidget
import ipywidgets
import numpy as np
from traitlets import Dict, Int, List, Tuple, Unicode, link

from hmmlab.migrations import PHASES, Fate, Migration, letters, migrations
from hmmlab.model.entry import Pfns, Words, migrate_pfn_to_pfn
from hmmlab.model.trace import Trace
from hmmlab.widgets import reading
from hmmlab.widgets.page_table_grid import front
from hmmlab.widgets.palette import CPU_STATES
from hmmlab.widgets.parts import push_button
from hmmlab.widgets.playhead import Playhead
from hmmlab.widgets.state_line import PlayheadLine
from hmmlab.widgets.timeline import Timeline

__all__ = ["ArrayTable", "MigrateArrays"]

#: Columns in a row of the table, and pages that are shown at once.
BAND, MOST = 8, 32

#: Each phase: the function or the party whose turn it is, its button, and what happens in it.
_PHASES = {
    "collect": (
        "migrate_vma_setup",
        "collect",
        "The kernel walks the CPU's table. A page that may move is locked and frozen: a migration "
        "entry takes the place of its word. An empty one is noted.",
    ),
    "unmap": (
        "migrate_vma_setup",
        "unmap",
        "Other mappings of the pages are frozen too. A page that somebody holds besides is given "
        "back.",
    ),
    "copy": (
        "the driver",
        "allocate, copy",
        "For a page with M the driver takes a new frame, copies where src has a page, and puts the "
        "frame into dst.",
    ),
    "pages": (
        "migrate_vma_pages",
        "hand over",
        "The kernel hands each page's identity to its frame in dst, and puts new frames where "
        "nothing was. Whoever keeps M has moved.",
    ),
    "map": (
        "the driver",
        "map",
        "The driver maps in its own table what kept M.",
    ),
    "finalize": (
        "migrate_vma_finalize",
        "put in place",
        "The migration entries give way: to the new frames where M stands, to the old ones "
        "elsewhere.",
    ),
}

#: What each fate means.
_FATES = {
    Fate.LEFT_OUT: "left out: collect could not take it",
    Fate.FROZEN: "frozen: behind a migration entry",
    Fate.EMPTY: "empty: there is nothing to copy, but a new frame may be put there",
    Fate.GIVEN_BACK: "given back: somebody holds it, so its word is as before",
    Fate.COPIED: "copied: its data is in the frame of dst",
    Fate.NEW: "new frame: nothing was copied",
    Fate.NO_DST: "no dst: the driver gave no frame",
    Fate.REFUSED: "refused: it was copied, and may not move all the same",
    Fate.TAKEN: "taken: meanwhile somebody else filled it",
    Fate.MOVED: "moved: it lives in the frame of dst",
    Fate.FILLED: "filled: a new frame where nothing was",
}
_ARRIVED = (Fate.MOVED, Fate.FILLED)

_LETTERS = (
    "V: the word names a frame. M: the page may move, and in the end it has. W: it may be written; "
    "in dst, a note from the driver to itself."
)


class ArrayTable(anywidget.AnyWidget):
    """The arrays as a table: each page's name, the CPU's word, src, dst, what has become of it.

    Attributes
    ----------
    pages
        One record a page.
    notes, legend
        What is said below.
    selected
        The selected page; a click on a page's name changes it.
    """

    _esm = front("make.js", "paint.js", "arrays.js")
    _css = front("style.css")

    band = Int(BAND).tag(sync=True)
    pages = List(Dict()).tag(sync=True)
    notes = List(Unicode()).tag(sync=True)
    legend = List(Unicode()).tag(sync=True)
    selected = Tuple(Int(), Int(), default_value=None, allow_none=True).tag(sync=True)

    def __repr__(self) -> str:
        return f"ArrayTable({len(self.pages)} pages)"


class MigrateArrays(PlayheadLine, ipywidgets.VBox):
    """src and dst of the migration that the playhead is in or has come after, page by page.

    Parameters
    ----------
    source
        A trace, which gets a timeline of its own; or the playhead of another view, to move
        together with it (``MigrateArrays(view.playhead)``).
    position
        The step to begin at, for a trace; the end when it is not given.

    Attributes
    ----------
    phases
        The buttons, by phase: each moves to the end of its phase.
    """

    def __init__(self, source: Trace | Playhead, position: int | None = None) -> None:
        alone = isinstance(source, Trace)
        self.playhead = Playhead(source, position) if isinstance(source, Trace) else source
        self._read: tuple[tuple[int, int], list[Migration]] = ((-1, 0), [])
        self.phases = {phase: _button(phase, self._go) for phase in PHASES}
        stepper = ipywidgets.HBox([_turn(who, self._of(who)) for who in _whose_turns()])
        stepper.add_class("hmm-stepper")
        self.sentence = ipywidgets.HTML()
        self.table = ArrayTable(selected=self.playhead.selected)
        link((self.playhead, "selected"), (self.table, "selected"))
        timeline = [Timeline(self.playhead)] if alone else []
        super().__init__([*timeline, stepper, self.sentence, self.table])
        self.add_class("hmm-view")
        self.playhead.observe(self._follow, ["position", "length", "selected"])
        self._follow()

    # --- reading ----------------------------------------------------------------------------------
    @property
    def migration(self) -> Migration | None:
        """The migration that is shown: the last of the operation that has begun by now."""
        begun = [one for one in self._all() if one.first <= self.playhead.position]
        return begun[-1] if begun else None

    def _all(self) -> list[Migration]:
        """Every migration of the current operation; read again when there is more to read."""
        playhead = self.playhead
        operation = playhead.operation
        if operation < 0:
            return []
        key = operation, len(playhead.trace)
        if self._read[0] != key:
            self._read = key, migrations(playhead.trace, operation)
        return self._read[1]

    def _line(self) -> str:
        position, migration = self.playhead.position, self.migration
        line = f"{self._step()}: "
        if migration is None:
            return line + "no migration"
        line += f"{migration.phase(position)} {self._place(migration)}"
        now = migration.at(position)
        if now is None:
            return line
        return f"{line}, src {_in_short(letters(now.src))}, dst {_in_short(letters(now.dst))}"

    def _place(self, migration: Migration) -> str:
        vpns = migration.told[0][2].vpns
        names = self.playhead.trace.names
        place: str = names.place(migration.mm, int(vpns[0]), int(vpns[-1]) + 1)
        several = len(reading.address_spaces(self.playhead.replay.state)) > 1
        owner = f"{names.processes.get(migration.mm, migration.mm)} " if several else ""
        return f"{owner}{place}"

    # --- moving and following ---------------------------------------------------------------------
    def _of(self, who: tuple[str, ...]) -> list[ipywidgets.Button]:
        return [self.phases[phase] for phase in who]

    def _go(self, phase: str) -> None:
        migration = self.migration or next(iter(self._all()), None)
        if migration is not None and phase in migration.phases:
            self.playhead.position = migration.phases[phase][1]

    def _follow(self, change: Any = None) -> None:
        position, migration = self.playhead.position, self.migration
        here = migration.phase(position) if migration else ""
        known = migration or next(iter(self._all()), None)
        for phase, button in self.phases.items():
            button.disabled = known is None or phase not in known.phases
            button.remove_class("hmm-now")
            if phase == here:
                button.add_class("hmm-now")
        self.sentence.value = _status(self._sentence(migration, here))
        self._fill(migration)

    def _sentence(self, migration: Migration | None, phase: str) -> str:
        many = self._all()
        if migration is None:
            if not many:
                return "No migration in this operation."
            return f"The migration of {self._place(many[0])} has not begun."
        number = f", {many.index(migration) + 1} of {len(many)}" if len(many) > 1 else ""
        who, button, what = _PHASES[phase]
        over = self.playhead.position > migration.phases[phase][1]
        when = "It is over. " if over and phase == "finalize" else ""
        return f"{self._place(migration)}{number}: {who}, {button}. {when}{what}"

    # --- the table --------------------------------------------------------------------------------
    def _fill(self, migration: Migration | None) -> None:
        """Give the table what it shows."""
        with self.table.hold_sync():
            self.table.pages, self.table.notes, self.table.legend = [], [], []
            if migration is None:
                return
            position = self.playhead.position
            fates = migration.fates(position)
            whole = migration.told[0][2].vpns
            shown = slice(*self._window(whole))
            self.table.pages = self._pages(migration, fates, shown)
            self.table.notes = [_LETTERS]
            if whole[shown].size < whole.size:
                self.table.notes = [f"{whole[shown].size} of {whole.size} pages.", _LETTERS]
            self.table.legend = [_FATES[fate] for fate in Fate if fate in fates[shown]]

    def _pages(self, migration: Migration, fates: list[Fate], shown: slice) -> list[dict[str, Any]]:
        position, state = self.playhead.position, self.playhead.replay.state
        names = self.playhead.trace.names
        vpns = migration.told[0][2].vpns[shown]
        begun = migration.phases[migration.phase(position)][0]
        now, before = migration.at(position), migration.at(begun - 1)
        arrays = {
            name: [
                getattr(told, name)[shown] if told is not None else np.zeros(vpns.size, np.uint64)
                for told in (now, before)
            ]
            for name in ("src", "dst")
        }
        pages = []
        for at, vpn in enumerate(vpns.tolist()):
            look = CPU_STATES[int(reading.cpu_states(state, migration.mm, vpn, vpn + 1)[0])]
            fate = fates[shown][at] if fates else None
            pages.append(
                {
                    "page": [migration.mm, vpn],
                    "name": names.place(migration.mm, vpn, vpn + 1).replace(" page ", " "),
                    "state": {
                        "glyph": look.glyph,
                        "short": look.short,
                        "sentence": look.sentence,
                        "light": look.colour_light,
                        "dark": look.colour_dark,
                    },
                    **{
                        name: _word(new[at], state.ram_pages, bool(new[at] != old[at]))
                        for name, (new, old) in arrays.items()
                    },
                    "fate": fate.value if fate is not None else "",
                    "arrived": fate in _ARRIVED,
                }
            )
        return pages

    def _window(self, vpns: Pfns) -> tuple[int, int]:
        """Choose the columns: all, or as many as there is room for around the selected page."""
        chosen = self.playhead.selected
        at = int(np.searchsorted(vpns, chosen[1])) if chosen else 0
        first = min(at, vpns.size - 1) // MOST * MOST
        return first, min(first + MOST, vpns.size)


# --- pieces of the page ---------------------------------------------------------------------------


def _whose_turns() -> list[tuple[str, ...]]:
    """The phases in order, those that belong to one call together."""
    turns: list[tuple[str, ...]] = []
    for phase in PHASES:
        if turns and _PHASES[turns[-1][0]][0] == _PHASES[phase][0]:
            turns[-1] = (*turns[-1], phase)
        else:
            turns.append((phase,))
    return turns


def _turn(phases: tuple[str, ...], buttons: list[ipywidgets.Button]) -> ipywidgets.VBox:
    who = _PHASES[phases[0]][0]
    caption = f"<code>{escape(who)}</code>" if "_" in who else escape(who)
    turn = ipywidgets.VBox([ipywidgets.HTML(caption), ipywidgets.HBox(buttons)])
    turn.add_class("hmm-turn")
    return turn


def _button(phase: str, go: Any) -> ipywidgets.Button:
    who, text, _ = _PHASES[phase]
    return push_button(text, f"To the end of this phase ({who})", lambda: go(phase))


def _word(word: np.uint64, ram_pages: int, changed: bool) -> dict[str, Any]:
    """Flags and frame of a src or dst word, as text."""
    words: Words = np.array([word], np.uint64)
    flags = letters(words)[0]
    frame = ""
    if "V" in flags:
        pfn = int(migrate_pfn_to_pfn(words)[0])
        frame = f"{'RAM' if pfn < ram_pages else 'device'} {pfn:#x}"
    return {"flags": " ".join(flags), "frame": frame, "changed": changed}


def _status(text: str) -> str:
    return f'<p role="status">{escape(text)}</p>'


def _in_short(words: list[str]) -> str:
    """Every word where there is room, or else how many there are of each."""
    if len(words) <= 2 * BAND:
        return " ".join(words)
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
