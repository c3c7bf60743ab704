"""What steps say: whole sentences, in the reader's names, for one page and for many."""

from pathlib import Path

import pytest

from hmmlab import Machine, Session

TRACES = Path(__file__).parents[1] / "kernel_traces"
#: Scenarios that between them go through most rooms.
STORIES = sorted(TRACES.glob("lessons/*.txt"))


@pytest.mark.parametrize("grain", [1, 1 << 20], ids=["page", "bulk"])
def test_every_step_says_a_sentence(grain):
    said = set()
    for story in STORIES:
        session = Session(Machine(grain=grain)).play(story)
        names = session.trace.names
        said |= {names.sentence(event.step) for event in session.trace.events}
    assert len(said) > 100
    for sentence in said:
        assert sentence[0].isupper() or sentence[0] in "/_" or " " in sentence, sentence
        assert sentence.endswith((".", "?")), sentence
        assert not set("{}") & set(sentence), sentence


def test_one_page_is_and_many_are():
    session = Session().play(["mmap A 4 rw private", "store A 0 4 1", "madvise A 0 1 pageout"])
    one = session.trace.names.sentence(session.trace.events[-1].step)
    session.do("madvise A 1 2 pageout")
    many = session.trace.names.sentence(session.trace.events[-1].step)
    assert one.startswith("A page 0 ") and many.startswith("A pages 1 to 2 ")
    assert " looks " in one and " look " in many
