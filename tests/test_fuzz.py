"""A hundred thousand files that are not what they should be: refused in one line, or read right.

Never a traceback, never a hang, never a file that is read as something that it does not say. Each
test draws from a generator of its own with a seed of its own, so an example is found again.
"""

import hashlib
import io
import json
import os
import random
import tempfile
import zipfile
from pathlib import Path

import pytest

from hmmlab import Machine, SaveError, ScenarioError, Session, load, save
from hmmlab.cli import main
from hmmlab.kernel_traces import RecordingError, read_recording
from hmmlab.model.trace import Trace
from hmmlab.scenario import parse

HERE = Path(__file__).parent / "kernel_traces"
SCENARIOS = [
    path.read_bytes()
    for path in sorted([*HERE.glob("lessons/*.txt"), *HERE.glob("random/*/*.txt")])
    if path.stat().st_size < 1500
]
RECORDINGS = [
    path.read_bytes()
    for path in sorted([*HERE.glob("lessons/*.jsonl"), *HERE.glob("asked/*.jsonl")])
    if path.stat().st_size < 8000
]
SHORT = [
    b"open d0 0\nmmap A 16 rw private\nstore A 0 16 100\nread d0 A 3 1\nto_dev d0 A 2 9\n"
    b"load A 4 2\nsnapshot d0 A 0 16\nmprotect A 0 8 r\nmadvise A 3 9 dontneed\nclose d0\n",
    b"mmap A 8 rw private\nmmap B 9 r private at A 4\nopen d0 1\nstore A 0 3 5\nmremap A 0 4 C\n"
    b"write d0 C 0 4 7\nto_sys d0 C 0 4\npagemap C 0 4\nmunmap A 0 8\nstore A 0 1 1\n",
    b"open d0 0\nmmap A 7 rw private\nstore A 0 7 1\nfork c\non c store A 0 3 9\nload A 0 7\n"
    b"on c to_dev d0 A 0 2\nexit c\nload A 0 7\n",
]

#: Where a file costs no disk.
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

WORDS = (
    b"open close mmap munmap mprotect mremap madvise load store read write to_dev to_sys snapshot "
    b"exclusive fork exit on pagemap A B d0 d1 c r rw none private shared mixed at dontneed 0 1 2 "
    b"3 17 200 65536 65537 0x10 0x -1 +1 1_0 1e3 00 18446744073709551615 18446744073709551616 # "
    b'\x00 \xff \xc3\xa9 \xd9\xa3 \xe2\x80\xa8 \x0c { } [ ] : , "'
).split(b" ")
VALUES = [None, True, -1, 0, 1 << 70, 1e999, 0.5, "", "p0", "load A 0 1", "é\n", [], [[]], [1], {}]


@pytest.fixture
def tmp_path():
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as path:
        yield Path(path)


def mangled(rng, data, corpus):
    """``data`` with one kind of damage."""
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 60))
    kind = rng.randrange(8)
    if kind == 0:
        return rng.randbytes(rng.choice((0, 1, 7, 100, 400)))
    if kind == 1:
        return data[:at]
    if kind == 2:
        other = rng.choice(corpus)
        return data[:at] + other[rng.randrange(len(other) + 1) :]
    if kind == 3:
        return data[:at] + data[at + size :]
    if kind == 4:
        return data[:at] + data[max(at - size, 0) : at] + data[at:]
    if kind == 5:
        return data[:at] + rng.randbytes(size) + data[at:]
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def edited_lines(rng, data, corpus):
    """``data`` with other words, or other lines, in a few places."""
    lines = data.split(b"\n")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        kind = rng.randrange(5)
        if kind == 0:
            lines.insert(at, rng.choice(rng.choice(corpus).split(b"\n")))
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        else:
            words = lines[at].split(b" ")
            words[rng.randrange(len(words))] = rng.choice(WORDS)
            lines[at] = b" ".join(words)
    return b"\n".join(lines)


def edited_values(rng, data, corpus):
    """JSON lines with another value somewhere, or another key, or one key twice."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    answer = json.loads(lines[at])
    place = answer
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7:
            place = place[key]
        else:
            break
    kind = rng.randrange(4)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[rng.choice(["op", "proc", "calls", "ret", "data", "x"])] = rng.choice(VALUES)
    else:
        place[key] = rng.choice(VALUES)
    line = json.dumps(answer).encode()
    if kind == 3:
        line = line[:-1] + b', "ret": 0, "op": "load A 0 1", "ret": 1}'
    lines[at] = line
    return b"\n".join(lines)


def examples(seed, count, corpus, *ways):
    """``count`` damaged files."""
    rng = random.Random(seed)
    for number in range(count):
        yield ways[number % len(ways)](rng, rng.choice(corpus), corpus)


def one_line(message, start):
    """Whether a complaint is one line that begins with where."""
    return message.startswith(start) and len(message.splitlines()) == 1


# --- scenarios ------------------------------------------------------------------------------------


def says(word):
    """A word of a scenario as the value that it stands for."""
    return str(int(word, 16 if word.startswith("0x") else 10)) if word[0].isdigit() else word


def test_scenarios():
    refused = 0
    for data in examples(1, 45_000, SCENARIOS, mangled, edited_lines, edited_lines):
        text = data.decode("utf-8", "replace")
        try:
            operations = parse(text, "s")
        except ScenarioError as error:
            assert one_line(str(error), "s:"), (str(error), text)
            refused += 1
            continue
        lines = [line.split() for line in text.split("\n")]
        lines = [words for words in lines if words and not words[0].startswith("#")]
        assert len(operations) == len(lines), text
        for operation, words in zip(operations, lines, strict=True):
            for child in operation.who:
                assert words[:2] == ["on", child]
                words = words[2:]
            assert operation.text.split() == words and operation.verb == words[0]
            given = [says(word) for word in words[1:] if word not in ("at", "mixed")]
            told = [str(value) for value in operation.args.values() if value != "mixed"]
            assert sorted(given) == sorted(told), operation
    assert 20_000 < refused < 44_000


# --- recordings -----------------------------------------------------------------------------------


def strictly(text):
    """A line of JSON by the letter: no key twice, no number that JSON does not have."""

    def once(pairs):
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once, parse_constant=pytest.fail)


def test_recordings(tmp_path):
    path, refused = tmp_path / "r", 0
    for data in examples(2, 22_000, RECORDINGS, mangled, edited_values, edited_values):
        path.write_bytes(data)
        try:
            answers = read_recording(path)
        except RecordingError as error:
            assert one_line(str(error), f"{path}:"), (str(error), data)
            refused += 1
            continue
        lines = data.decode().split("\n")
        assert answers == [strictly(line) for line in lines if line.strip()], data
    assert 8_000 < refused < 21_000


# --- saved machines -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Bytes of some saved machines."""
    path, files = tmp_path_factory.mktemp("saved") / "one", []
    for scenario in SHORT[:2]:
        session = Session(Machine(4096))
        for operation in scenario.decode().splitlines():
            session.do(operation)
            if operation.startswith(("read", "munmap")):
                save(path, session.machine, session.trace)
                files.append(path.read_bytes())
    save(path, Machine(4096))
    return [*files, path.read_bytes()]


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_saved_machines(saved, tmp_path):
    path, refused = tmp_path / "m", 0
    for data in examples(3, 29_000, saved, mangled):
        path.write_bytes(data)
        try:
            load(path)
        except SaveError as error:
            assert one_line(str(error), f"{path}: "), (str(error), data)
            refused += 1
            continue
        # The damage is in what a zip says twice, or in bytes behind it.
        assert members(data) in [members(file) for file in saved], data
    assert refused > 27_000


def test_saved_machines_that_were_forged(saved, tmp_path):
    """Edits whose sums fit: refused, or at least a machine and a trace."""
    path, refused, rng = tmp_path / "m", 0, random.Random(4)
    for _ in range(1_000):
        parts = members(rng.choice(saved))
        graph = parts["graph.json"].replace(b",", b" , ").replace(b"]", b" ]")
        words = graph.split(b" ")
        for _ in range(rng.randint(1, 3)):
            words[rng.randrange(len(words))] = rng.choice(
                [b"0", b"-1", b"null", b'"x"', b"[]", b"7"]
            )
        manifest = json.loads(parts["manifest.json"])
        parts["graph.json"] = b" ".join(words)
        manifest["sha256"]["graph.json"] = hashlib.sha256(parts["graph.json"]).hexdigest()
        parts["manifest.json"] = json.dumps(manifest).encode()
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, data)
        try:
            machine, trace = load(path)
        except SaveError as error:
            assert one_line(str(error), f"{path}: "), str(error)
            refused += 1
            continue
        assert isinstance(machine, Machine) and isinstance(trace, Trace | None)
    assert refused > 300


def recorded(scenario):
    """The recording of a scenario, had it been made here."""
    session = Session(Machine(4096))
    for operation in parse(scenario.decode()):
        session.perform(operation)
    return "\n".join(map(json.dumps, session.answers)).encode()


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "count", "command", "codes"),
    [(5, 1_400, "run", {0, 2, 3}), (6, 800, "replay", {0, 1, 2}), (7, 800, "show", {0, 2})],
)
def test_command_line(tmp_path, capsys, saved, seed, count, command, codes):
    corpus, ways = {
        "run": (SHORT, (mangled, edited_lines, edited_lines)),
        "replay": (
            [recorded(scenario) for scenario in SHORT],
            (mangled, edited_values, edited_values),
        ),
        "show": (saved, (mangled,)),
    }[command]
    path, seen = tmp_path / "f", set()
    for data in examples(seed, count, corpus, *ways):
        path.write_bytes(data)
        code = main([command, str(path)])
        out, err = capsys.readouterr()
        assert code in codes
        if code >= 2:
            assert one_line(err, f"{path}:"), (err, data)
            assert out == "" or code == 3
        else:
            assert (out and err == "") or not data.strip(), (err, data)
        seen.add(code)
    assert seen >= codes - {3}
