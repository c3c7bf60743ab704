import numpy as np

from hmmlab.widgets.charts import MAX_CELLS, Overview, Residency, _shape, binned, count_states
from hmmlab.widgets.page_table_grid import PageTableGrid
from hmmlab.widgets.palette import CPU_STATES


def test_counts_are_those_of_the_grid(playhead):
    counts = count_states(playhead.trace.replay(), list(range(playhead.length + 1)))
    grid = PageTableGrid(playhead)
    for position, count in counts.items():
        playhead.position = position
        codes = grid.codes[: grid.codes.size // 2]
        assert count.tolist() == np.bincount(codes, minlength=len(CPU_STATES)).tolist()


def test_bins_cover_every_page():
    codes = np.array([1, 4, 4, 9, 1, 1, 3], np.uint8)
    assert binned(codes, 1).tolist() == codes.tolist()
    assert binned(codes, 2).tolist() == [4, 9, 1, 3]


def test_an_overview_has_few_enough_cells():
    for pages in (0, 1, 16, 512, 65_536, 65_537, 1 << 20):
        width, share = _shape(pages)
        assert -(-pages // share) <= MAX_CELLS
        assert width >= 2


def test_the_overview_follows_the_playhead(playhead):
    grid = PageTableGrid(playhead)
    overview = Overview(grid)
    for position in (0, 5, playhead.length):
        playhead.position = position
        for table, mark in enumerate(overview._marks):
            pages = grid.codes.size // 2
            drawn = mark.color.ravel()[:pages]
            assert mark.color.dtype == np.uint8 and mark.color.ndim == 2
            assert np.array_equal(drawn, grid.codes[table * pages : (table + 1) * pages])


def test_the_stack_adds_up_and_the_marker_is_at_the_playhead(session, playhead):
    chart = Residency(playhead)
    for _ in range(2):
        total = np.atleast_2d(chart._areas.y)[0]
        last = count_states(session.trace.replay(), [len(session.trace)])[len(session.trace)]
        assert total[-1] == last[1:].sum()
        assert set(chart._here.x) == {playhead.position}
        session.do("mmap C 100 rw private")
    playhead.position = 2
    assert set(chart._here.x) == {2}


def test_a_trace_without_steps_can_be_drawn():
    from hmmlab import Session
    from hmmlab.widgets.playhead import Playhead

    playhead = Playhead(Session().trace)
    Residency(playhead)
    Overview(PageTableGrid(playhead))
