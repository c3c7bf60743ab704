"""Operations by turns: each step is told of its own operation."""

from hmmlab import Machine, Process
from hmmlab.model.schedule import interleave


def test_a_step_belongs_to_its_operation_however_they_take_turns():
    machine = Machine()
    trace, process = machine.record(), Process(machine)
    a = process.mmap(8)
    operations = [process.steps.store(a[:4], 1), process.steps.store(a[4:], 2)]
    taken = interleave(operations, [0, 1, 1, 0])
    assert {turn for turn, _ in taken[:4]} == {0, 1}
    mine = [event for event in trace.events if event.operation > 0]
    assert [event.operation - 1 for event in mine[: len(taken)]] == [turn for turn, _ in taken]
    assert [op.text for op in trace.operations[1:]] == ["store A 0 4", "store A 4 4"]
    assert not trace.replay().seek(len(trace)).state.difference(machine)
