"""The exercises of notebook 03: mistakes are told where they show."""

import pytest

from hmmlab import Driver
from hmmlab.exercises.rules import Kind
from hmmlab.exercises.turns import CheckThenLock, discard_and_read
from hmmlab.invariants.promise import broken_promise
from hmmlab.model.race import Race
from judging import but, judged, told_wrong


def ranges(body: str) -> str:
    return f"import numpy as np\n\n\ndef ranges(there, wanted):\n    return {body}"


RUNS = """import numpy as np


def ranges(there, wanted):
    edges = np.flatnonzero(np.diff({what}, prepend=False, append=False)).reshape(-1, 2)
    return edges.tolist()
"""


ANY_ERROR = ("                if error.errno != 16:\n                    raise\n", "")
NO_FINALLY = (
    """                continue
            finally:
                machine.up_read(mmap_lock)""",
    """                machine.up_read(mmap_lock)
                continue
            machine.up_read(mmap_lock)""",
)
LET_GO = (
    "                return",
    """                machine.up_write(self.lock)
                yield machine.step("The answer holds.")
                yield from machine.down_write(self.lock)
                return""",
)
SPIN = (
    "                continue",
    '                yield machine.step("Again.")\n' + 16 * " " + "continue",
)

WRONG = [
    ("fault_loop", but("fault_loop", ANY_ERROR), "no reason to ask again. It never ends"),
    ("fault_loop", but("fault_loop", ANY_ERROR, SPIN), "no reason to ask again. It never ends"),
    ("fault_loop", but("fault_loop", NO_FINALLY), "still held after an error"),
    (
        "fault_loop",
        but("fault_loop", LET_GO),
        "In the order of turns 'd+c+d': The device keeps|overtaken",
    ),
    ("snapshot_bytes", 'prediction = "02 02 00 11 02 02 11 00"', r"Page 0 is 01, a frame that may"),
    (
        "snapshot_bytes",
        'prediction = "01 02 ff 11 ff 02 11 00"',
        r"Page 1 is 22, a page on the dev",
    ),
    ("snapshot_bytes", 'prediction = "01 22 ff 00 ff 02 11 00"', r"Page 3 is 11, the zero page"),
    ("snapshot_bytes", 'prediction = "01 22 ff 11 ff 02 11 11"', r"Page 7 is 00, nothing is there"),
    ("snapshot_bytes", 'prediction = "01 22"', "2 bytes for 8 pages"),
    ("snapshot_bytes", 'prediction = "wwwwwwww"', "two hex digits"),
    ("fewest_faults", ranges("[(0, len(wanted))]"), "wanted by nobody|there already"),
    ("fewest_faults", RUNS.format(what="wanted"), "was faulted, and it is there already"),
    ("fewest_faults", RUNS.format(what="wanted & ~there"), "is wanted, and nobody asked"),
    ("fewest_faults", ranges("[(0, 1)]"), "was faulted|nobody asked for it"),
    ("fewest_faults", ranges("[(3, 99)]"), "no range of these"),
    ("lost_update", 'order = "cdcdcdcdcdcd"', "The device reads 500"),
    ("lost_update", f'order = "{"d" * 20}"', "The device reads 500"),
    ("lost_update", f'order = "{"c" * 20}"', "The device reads 500"),
]


@pytest.mark.parametrize(("name", "code", "reason"), WRONG)
def test_a_wrong_answer_is_told_why_and_where(name, code, reason):
    assert told_wrong(name, code, reason).trace is not None


def test_a_wrong_byte_is_shown_at_the_step_that_made_the_page_so():
    verdict = judged("snapshot_bytes", 'prediction = "01 22 00 11 ff 02 11 00"')
    step = verdict.trace.events[verdict.position - 1].step
    assert verdict.reason.startswith("Page 2 is ff") and step.function == "__x64_sys_munmap"


def test_an_order_may_be_written_with_blanks_and_its_rest_goes_on_by_itself():
    assert judged("lost_update", 'order = "ddddd c"').kind is Kind.RIGHT
    assert "turn 'x'" in judged("lost_update", 'order = "dxc"').reason


def test_ranges_may_be_longer_than_a_page():
    body = "[(int(p), int(p) + 1) for p in np.flatnonzero(wanted)][::-1]"
    assert judged("fewest_faults", ranges(body)).kind is Kind.RIGHT


def test_what_loses_an_update_keeps_a_stale_entry():
    for order in ("ddddd", "dddddc", "cdcd", "dcdcdc", "cccccc"):
        run = Race(discard_and_read(CheckThenLock)).run(order)
        run.finish()
        wrong = judged("lost_update", f'order = "{order}"').kind is Kind.WRONG
        assert bool(broken_promise(run.machine)) != wrong, order
        run = Race(discard_and_read(Driver)).run(order)
        assert run.finish() and not broken_promise(run.machine)
