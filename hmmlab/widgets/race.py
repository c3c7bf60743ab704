"""A race, turn by turn: who goes next is the learner's choice, or every choice is tried."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

import ipywidgets
from traitlets import Bunch, Unicode, validate

from hmmlab.invariants.promise import broken_promise
from hmmlab.model.machine import KernelError
from hmmlab.model.race import PATIENCE, Build, Judge, Orders, Race, Run, Turn
from hmmlab.widgets.page_table_grid import PageTableGrid
from hmmlab.widgets.palette import CPU_STATES, DEVICE_STATES
from hmmlab.widgets.parts import TEXT, push_button, said
from hmmlab.widgets.playhead import Playhead
from hmmlab.widgets.state_line import StateLine
from hmmlab.widgets.view import counts_in_words

__all__ = ["RaceView"]


class RaceView(StateLine, ipywidgets.VBox):
    """Operations that race: a lane each, a button each, and both page tables beneath.

    Parameters
    ----------
    build
        Makes a machine and the operations on it, by name, as :class:`~hmmlab.model.race.Race` says.
    judge
        Says what is wrong with the machine at a moment, "" when nothing is.

    Attributes
    ----------
    order
        The turns so far, one letter each. Set it to go there: the race is built and run again, for
        machines never run backwards.
    """

    order = Unicode("")

    def __init__(self, build: Build, judge: Judge = broken_promise) -> None:
        self.race, self.judge = Race(build), judge
        self.run: Run = self.race.run()
        assert self.run.trace is not None
        self.playhead = Playhead(self.run.trace)
        self.grid = PageTableGrid(self.playhead)
        self.lanes, self.status, self.verdict = (ipywidgets.HTML() for _ in range(3))
        self.buttons = {
            name: push_button(
                f"{name} ▶{TEXT}", f"Let {name} take its next step", self._press(name)
            )
            for name in self.race.names
        }
        self.back = push_button(f"◀{TEXT} Back", "One turn back", self.go_back)
        self.restart = push_button("Restart", "Before the first turn", self.go_to_start)
        self.every = push_button(
            "Every order", "Try every order of turns, and go to the first that goes wrong",
            self.try_every_order,
        )  # fmt: skip
        self.summary = ipywidgets.Label()
        self.lanes.add_class("hmm-lanes")
        self.grid.add_class("hmm-tables-box")
        self.summary.add_class("hmm-summary")
        buttons = [*self.buttons.values(), self.back, self.restart, self.every]
        row = ipywidgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="2px")
        super().__init__(
            [
                ipywidgets.HBox(buttons, layout=row),
                self.verdict,
                self.lanes,
                self.status,
                self.grid,
                self.summary,
            ]
        )
        self.add_class("hmm-view")
        self.add_class("hmm-race")
        self._show()
        self.observe(self._ordered, "order")

    @property
    def wrong(self) -> str:
        """What is wrong now; "" when nothing is."""
        return self.judge(self.run.machine)

    def tell(self, orders: Iterable[str]) -> None:
        """Print the state line after each of some orders; the race stays where it is."""
        self._tell(self, "order", orders)

    # --- what the buttons do ----------------------------------------------------------------------
    def take(self, name: str) -> None:
        """Let one operation take its next turn."""
        happened = self.run.take(name)
        self.playhead.refresh()
        if happened:
            self.order = self.run.order
        elif not self.run.operations[name].ended:
            self._show(f"{name} still waits for {self.run.waiting[name]}.")

    def go_back(self) -> None:
        """Build and run again with one turn less."""
        self.order = self.order[:-1]

    def go_to_start(self) -> None:
        """Build again."""
        self.order = ""

    def every_order(self) -> Orders:
        """Try every order of turns, and show nothing of it."""
        return self.race.every_order(self.judge)

    def try_every_order(self) -> Orders:
        """Try every order of turns, say what came of it, and go to the first that goes wrong."""
        self.every.disabled = True
        self.verdict.value = said("Trying every order of turns …")
        try:
            found = self.every_order()
        finally:
            self.every.disabled = False
        self.verdict.value = said(sum_up(found), bad=found.first is not None)
        if found.first is not None:
            self.order = found.first
        return found

    def _press(self, name: str) -> Any:
        return lambda: self.take(name)

    # --- following --------------------------------------------------------------------------------
    @validate("order")
    def _run_anew(self, proposal: Bunch) -> str:
        """Run an order that is not the present one; what is none is refused, and changes nothing.

        The turns in which nothing happened are left out.
        """
        if proposal["value"] != self.run.order:
            run = self.race.run(proposal["value"])
            self.run = self.run if run.order == self.run.order else run
        return self.run.order

    def _ordered(self, change: Any) -> None:
        assert self.run.trace is not None
        if self.run.trace is not self.playhead.trace:
            self.playhead.turn_to(self.run.trace)
        self._show()

    def _show(self, aside: str = "") -> None:
        run = self.run
        for name, button in self.buttons.items():
            button.disabled = run.operations[name].ended or len(run.turns) >= PATIENCE
        self.back.disabled = self.restart.disabled = not run.turns
        self.lanes.value = self._lanes()
        wrong = self.wrong
        self.status.value = said(wrong or aside or self._how_it_stands(), bool(wrong))
        self.summary.value = self._line()

    def _how_it_stands(self) -> str:
        run = self.run
        if not run.turns:
            return "Nobody has begun. Whose turn is it?"
        if not run.going:
            return "All have returned, and every entry of the device is true."
        if run.machine["mm.active_invalidations"].any():
            return "A change is under way: until it is over, the device has promised nothing."
        return "Nothing is wrong so far."

    def _line(self) -> str:
        codes, pages = self.grid.codes, self.grid.codes.size // 2
        cpu = counts_in_words(codes[:pages], CPU_STATES)
        device = counts_in_words(codes[pages:], DEVICE_STATES)
        what = "wrong" if self.wrong else "nothing wrong"
        return f"{self.run.order or 'no turn yet'}: CPU {cpu}, device {device}, {what}"

    def _lanes(self) -> str:
        """A table: a column a lane, a row a turn."""
        heads = "".join(
            f'<th scope="col"><b>{html.escape(name)}</b> '
            f"<code>{html.escape(steps.text)}</code></th>"
            for name, steps in self.run.operations.items()
        )
        rows = "".join(self._row(number, turn) for number, turn in enumerate(self.run.turns, 1))
        return (
            '<div class="hmm-lane-box" tabindex="0" role="region" aria-label="Turns so far">'
            '<table><thead><tr><th scope="col" aria-label="turn"></th>'
            f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        )

    def _row(self, number: int, turn: Turn) -> str:
        cell = f"<td>{self._cell(turn)}</td>"
        cells = "".join(cell if name == turn.who else "<td></td>" for name in self.race.names)
        now = ' aria-current="step"' if number == len(self.run.turns) else ""
        waits = ' class="hmm-waits"' if turn.step and turn.step.lock else ""
        return f'<tr{now}{waits}><th scope="row">{number}</th>{cells}</tr>'

    def _cell(self, turn: Turn) -> str:
        if turn.step is None:
            result = self.run.operations[turn.who].result
            if isinstance(result, KernelError):
                return f"is refused: {html.escape(str(result))}"
            return "returns" if result is None else f"returns {html.escape(str(result))}"
        text = html.escape(self.run.machine.names.sentence(turn.step))
        return f"<code>{html.escape(turn.step.function)}</code> {text}"


def sum_up(found: Orders) -> str:
    """What came of every order, in words."""
    orders = "1 order" if found.total == 1 else f"{found.total:,} orders"
    if found.first is None:
        return f"Tried {orders}: nothing goes wrong in any of them."
    parts = ["Some orders never end." if found.endless else f"Tried {orders}:"]
    if found.wrong:
        parts.append(
            "Some break the promise." if found.endless else f"{found.wrong:,} break the promise."
        )
    if found.stuck and not found.endless:
        parts.append(f"in {found.stuck:,} all that are left wait for ever.")
    return " ".join([*parts, f"The first is shown: {found.why}"])
