"""A widget that says its state in one line of text: what a notebook's file keeps of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ipywidgets
from traitlets import HasTraits

from hmmlab.widgets.playhead import Playhead

__all__ = ["PlayheadLine", "StateLine"]


class StateLine(ipywidgets.DOMWidget):
    """A base that stands before the widget's own: its text is ``ClassName(...)``, on any machine.

    The widget says in ``_line`` what stands between the brackets.
    """

    def _line(self) -> str:
        """Say the state in a line short enough to stand whole in a notebook's file."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._line()})"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Show the widget, and as text the whole state line, which ipywidgets would cut."""
        shown = super()._repr_mimebundle_(**kwargs)
        bundle, metadata = shown if isinstance(shown, tuple) else (shown, {})
        return {**bundle, "text/plain": repr(self)}, metadata

    def _tell(self, moved: HasTraits, trait: str, places: Iterable[Any]) -> None:
        """Print the state line at each of some places, and move back to where it was."""
        here = getattr(moved, trait)
        for place in places:
            setattr(moved, trait, place)
            print(self)
        setattr(moved, trait, here)


class PlayheadLine(StateLine):
    """A state line that the widget's playhead decides."""

    playhead: Playhead

    def tell(self, positions: Iterable[int]) -> None:
        """Print the state line at each of some positions; the playhead stays where it is."""
        self._tell(self.playhead, "position", positions)

    def _step(self) -> str:
        return f"step {self.playhead.position} of {self.playhead.length}"
