"""A session: lines of the language, one by one or as a whole, beside a process's own methods."""

import pytest

from hmmlab import ScenarioError, Session

STORY = ["open d0 0", "mmap A 4 rw private", "# a remark", "store A 0 4 100", "read d0 A 0 4"]


def test_a_story_is_its_lines_one_by_one(tmp_path):
    one = Session()
    for line in STORY:
        if not line.startswith("#"):
            one.do(line)
    file = tmp_path / "story.txt"
    file.write_text("\n".join(STORY))
    assert Session().play(STORY).answers == one.answers == Session().play(file).answers


def test_a_story_goes_on_where_the_last_ended():
    session = Session().play(STORY)
    assert session.play(["load A 3 1"]).answers[-1]["data"] == [103]


def test_of_a_wrong_story_nothing_happens():
    session = Session()
    with pytest.raises(ScenarioError, match="scenario:6: "):
        session.play([*STORY, "load B 0 1"])
    assert session.answers == [] and len(session.trace) == 0
    with pytest.raises(ScenarioError, match="an operation"):
        session.do("# nothing")
    assert session.play(STORY).answers[-1]["data"] == [100, 101, 102, 103]


def test_lines_may_name_what_the_process_made_itself():
    session = Session()
    pages = session.process.mmap(4, name="A")
    session.process.store(pages, range(4))
    device = session.process.open()
    assert session.do(f"read {device.name} A 0 4")["data"] == [0, 1, 2, 3]
    assert [told["event"] for told in session.do("munmap A 0 4")["notify"]] == ["UNMAP"]
    assert Session().play(["mmap A 1 rw private"]).process.regions["A"] == pages.start
