"""The operations of the language: each verb has one, and each keeps its family in order."""

import pytest

from hmmlab import Session
from hmmlab.operations import Execution
from hmmlab.scenario import _GRAMMAR

STORY = ["open d0 0", "mmap A 4 rw private", "store A 0 4 100"]


def test_every_verb_of_the_language_is_an_operation():
    assert [verb for verb in _GRAMMAR if not hasattr(Execution, f"_{verb}")] == []


@pytest.mark.parametrize(
    ("line", "ret"),
    [
        ("load A 3 2", -11),  # SIGSEGV behind the end
        ("read d0 A 0 0", -22),  # EINVAL: no pages
        ("read d0 A 3 2", -14),  # EFAULT
        ("munmap A 0 0", -22),
    ],
)
def test_what_is_refused_is_a_negative_number_and_the_session_goes_on(line, ret):
    session = Session().play(STORY)
    assert session.do(line)["ret"] == ret
    assert session.do("load A 0 1")["data"] == [100]


def test_system_calls_run_as_the_process_and_commands_as_the_file():
    session = Session().play([*STORY, "read d0 A 0 1", "close d0"])
    actors = [session.trace.events[one.first].step.actor for one in session.trace.operations]
    assert actors == ["d0", "p0", "p0", "d0", "d0"]


def test_who_exits_takes_its_children_along():
    session = Session().play([*STORY, "fork c", "on c fork g", "on c on g store A 0 1 7"])
    assert [*session._family] == [(), ("c",), ("c", "g")]
    session.do("exit c")
    assert [*session._family] == [()]
    assert session.do("load A 0 1")["data"] == [100]


def test_a_child_that_closes_a_file_leaves_it_to_its_parent():
    session = Session().play([*STORY, "fork c", "on c close d0"])
    assert "d0" in session.devices and "d0" not in session._family["c",].devices
    assert session.do("read d0 A 0 1")["data"] == [100]
