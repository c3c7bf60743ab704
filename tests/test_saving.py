"""Save and load: nothing changes, all goes on, and a file that is not right is refused whole."""

import json
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmmlab import Driver, KernelError, Machine, Process, SaveError, load, save
from hmmlab.cli import main
from hmmlab.invariants import violations
from hmmlab.model.history import HmmMirror, hmm_mirror_register
from hmmlab.model.mmu_notifier import Event, MmuNotifierRange, invalidate_range_start

PAGES = 70

VERBS = ["store", "load", "protect", "unprotect", "drop", "read", "write", "to_dev", "to_sys"]
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(VERBS), st.integers(0, PAGES - 1), st.integers(1, PAGES)),
    min_size=1,
    max_size=8,
)


def act(process, verb, first, pages):
    """One operation and what it answered, as plain values."""
    where = process.region("A", PAGES)[first : first + pages]
    device = process.files["d0"]
    try:
        answer = {
            "store": lambda: process.store(where, 7),
            "load": lambda: process.load(where),
            "protect": lambda: process.mprotect(where, "r"),
            "unprotect": lambda: process.mprotect(where, "rw"),
            "drop": lambda: process.madvise(where, "dontneed"),
            "read": lambda: device.read(where),
            "write": lambda: device.write(where, 9),
            "to_dev": lambda: device.to_dev(where),
            "to_sys": lambda: device.to_sys(where),
        }[verb]()
    except KernelError as error:
        return str(error)
    return answer.tolist() if isinstance(answer, np.ndarray) else answer


def begun(*, record=True):
    machine = Machine(4096)
    trace = machine.record() if record else None
    process = Process(machine)
    process.open(0)
    process.mmap(PAGES)
    return machine, trace


def same_trace(one, other):
    assert one.base == other.base
    assert [event.step.text for event in one.events] == [event.step.text for event in other.events]
    for mine, theirs in zip(one.events, other.events, strict=True):
        assert mine.step.calls == theirs.step.calls and mine.operation == theirs.operation
        assert str(mine.step.detail) == str(theirs.step.detail)
        for a, b in zip(mine.writes, theirs.writes, strict=True):
            assert a.column == b.column and np.array_equal(a.rows, b.rows)
            assert np.array_equal(a.old, b.old) and np.array_equal(a.new, b.new)
    assert [(o.text, o.actor, o.first, o.last, str(o.result)) for o in one.operations] == [
        (o.text, o.actor, o.first, o.last, str(o.result)) for o in other.operations
    ]


@settings(
    max_examples=30,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(before=OPERATIONS, after=OPERATIONS)
def test_save_then_load_changes_nothing_and_goes_on_alike(tmp_path, before, after):
    machine, trace = begun()
    original = machine.objects["process"][1]
    for operation in before:
        act(original, *operation)
    save(tmp_path / "one", machine, trace)
    saved = load(tmp_path / "one")
    assert saved.machine.copy() == machine.copy()
    assert vars(saved.machine.names) == vars(machine.names)
    same_trace(saved.trace, trace)
    save(tmp_path / "two", *saved)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

    again = saved.processes["p0"]
    for operation in after:
        assert act(again, *operation) == act(original, *operation)
    assert saved.machine.copy() == machine.copy()
    same_trace(saved.trace, trace)
    assert saved.trace.replay().seek(len(trace)).state == machine.copy()
    assert violations(saved.machine) == []


def test_a_machine_alone_with_a_child_and_two_devices(tmp_path):
    machine, _ = begun(record=False)
    parent = machine.objects["process"][1]
    parent.open(1)
    a = parent.region("A", PAGES)
    parent.store(a, range(PAGES))
    parent.files["d1"].to_dev(a[:5])
    child = parent.fork()
    child.store(child.here(a[3:9]), 1)
    save(tmp_path / "saved", machine)
    saved = load(tmp_path / "saved")
    assert saved.trace is None and saved.machine.copy() == machine.copy()
    for space in (parent, child):
        twin = saved.processes[space.name]
        assert twin.load(twin.here(a)).tolist() == space.load(space.here(a)).tolist()
    saved.processes[child.name].exit()
    child.exit()
    assert saved.machine.copy() == machine.copy()


def test_a_struct_hmm_of_2017_comes_back(tmp_path):
    machine, _ = begun(record=False)
    process = machine.objects["process"][1]
    process.run("register", hmm_mirror_register(machine, HmmMirror(process.files["d0"]), 1))
    save(tmp_path / "saved", machine)
    twin = load(tmp_path / "saved").machine
    assert twin.objects["hmm_mirror"][1].ops is twin.objects["device_file"][1]
    assert twin.objects["hmm"][1].machine is twin


class OwnDriver(Driver):
    """What a learner writes."""


def test_what_cannot_come_back_is_refused_in_one_line(tmp_path):
    machine, _ = begun(record=False)
    machine.objects["process"][1].attach(OwnDriver)
    with pytest.raises(SaveError, match="OwnDriver is no class of hmmlab") as refused:
        save(tmp_path / "saved", machine)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_in_the_middle_of_an_operation_nothing_is_saved(tmp_path):
    machine, trace = begun()
    process = machine.objects["process"][1]
    steps = process.steps.store(process.region("A", PAGES), 1)
    next(steps)
    for also in (trace, None):
        with pytest.raises(SaveError, match="still going on"):
            save(tmp_path / "saved", machine, also)
    steps.run()
    range = MmuNotifierRange.one(1, Event.CLEAR, 0, 1)
    process.run("half", invalidate_range_start(machine, range))
    with pytest.raises(SaveError, match="still going on"):
        save(tmp_path / "saved", machine, trace)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch):
    machine, trace = begun()
    path = tmp_path / "saved"
    save(path, machine, trace)
    before = path.read_bytes()
    machine.objects["process"][1].store(machine.objects["process"][1].region("A", PAGES), 1)

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        save(path, machine, trace)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def altered(path, change):
    """The members of a saved file, changed, with sums that fit again."""
    import hashlib

    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members.pop("manifest.json"))
    change(manifest, members)
    if "sha256" in manifest:
        manifest["sha256"] = {n: hashlib.sha256(data).hexdigest() for n, data in members.items()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", json.dumps(manifest))
        for name, data in members.items():
            archive.writestr(name, data)


def replace(old, new):
    def change(manifest, members):
        assert old in members["graph.json"]
        members["graph.json"] = members["graph.json"].replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda manifest, members: manifest.update(version=99), "expected hmmlab saved machine 1"),
        (lambda manifest, members: manifest.update(format="cake"), "not cake 1"),
        (lambda manifest, members: manifest.pop("sha256"), "it is damaged"),
        (lambda manifest, members: members.pop("graph.json"), "makes no sense"),
        (lambda manifest, members: members.popitem(), "makes no sense"),
        (replace(b"hmmlab.model.process:Process", b"os:system"), "no class is called os:system"),
        (replace(b"machine:Machine", b"machine:kernel"), "no class is called"),
        (replace(b'"page.refcount"', b'"page.recount"'), "column page.recount is not this"),
        (replace(b'"root": [', b'"root": [[], '), "makes no sense"),
    ],
)
def test_well_formed_nonsense_is_refused(tmp_path, capsys, change, expected):
    path = tmp_path / "saved"
    machine, trace = begun()
    save(path, machine, trace)
    altered(path, change)
    with pytest.raises(SaveError, match=expected):
        load(path)
    assert main(["show", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"{path}: ") and err.count("\n") == 1


def test_run_saves_and_show_tells(tmp_path, capsys):
    scenario, path = tmp_path / "s.txt", tmp_path / "saved"
    scenario.write_text("open d0 0\nmmap A 4 rw private\nstore A 0 4 100\n")
    assert main(["run", str(scenario), "--save", str(path)]) == 0
    capsys.readouterr()
    assert main(["show", str(path)]) == 0
    out, _ = capsys.readouterr()
    assert [line.split(" (")[0].strip() for line in out.splitlines()[1:]] == [
        "d0: open d0 0",
        "p0: mmap A 4 rw private",
        "p0: store A 0 4 100",
    ]
    saved = load(path)
    process = saved.processes["p0"]
    assert process.load(process.region("A", 4)).tolist() == [100, 101, 102, 103]
    assert main(["run", str(scenario), "--save", str(tmp_path / "no" / "saved")]) == 2
    assert main(["show", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
