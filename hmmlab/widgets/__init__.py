"""Widgets that show a trace in a notebook: ``show(session)`` is the side-by-side view."""

from hmmlab.widgets.playhead import Playhead
from hmmlab.widgets.view import AddressSpaceView, show

__all__ = ["AddressSpaceView", "Playhead", "show"]
