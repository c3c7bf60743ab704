"""Widgets that show a trace in a notebook: ``show(session)`` is the side-by-side view."""

from hmmlab.widgets.course import Course
from hmmlab.widgets.event_tape import EventTape
from hmmlab.widgets.frames import PhysicalMemory
from hmmlab.widgets.migrate_arrays import MigrateArrays
from hmmlab.widgets.playhead import Playhead
from hmmlab.widgets.race import RaceView
from hmmlab.widgets.view import AddressSpaceView, show

__all__ = [
    "AddressSpaceView",
    "Course",
    "EventTape",
    "MigrateArrays",
    "PhysicalMemory",
    "Playhead",
    "RaceView",
    "show",
]
