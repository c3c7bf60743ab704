"""A session that has every state of tier A in it, and the widgets that a test makes."""

import pytest

from hmmlab import Machine, Session
from hmmlab.widgets.playhead import Playhead

LINES = """
open d0 0
mmap A 16 rw private
store A 0 8 100
load A 8 2
read d0 A 0 12
mprotect A 2 4 r
mmap B 40 rw private
store B 0 20 7
to_dev d0 B 4 8
load B 6 1
munmap A 14 2
madvise A 0 2 dontneed
""".strip().splitlines()


@pytest.fixture
def session() -> Session:
    session = Session(Machine(ram_pages=1 << 16))
    for line in LINES:
        session.do(line)
    return session


@pytest.fixture
def playhead(session: Session) -> Playhead:
    return Playhead(session.trace)
