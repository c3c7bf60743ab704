"""Long random stories in the scenario language, told to machines of several grains at once.

After every operation all of them gave the same answer, read the same, and keep the invariants, in
the middle of operations too; the trace of one goes back to its beginning and forth again; and one
is saved and loaded now and then and goes on as if nothing had been.

HMMLAB_PROOFS=20 tells twenty times as many stories, and different ones every time.
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from hmmlab import Process, load, save
from hmmlab.answers import Known
from hmmlab.invariants import violations
from hmmlab.model.machine import BULK, Machine
from hmmlab.model.page import PG_KSM
from hmmlab.model.schedule import interleave
from hmmlab.session import Session
from readings import difference, reading

#: How many times the usual number of stories.
PROOFS = int(os.environ.get("HMMLAB_PROOFS", "1"))
GRAINS = (BULK, 64, 7, 1)
RAM = 1 << 14

ACCESS = ("load", "store", "store", "mprotect", "dontneed", "munmap", "pagemap")
DEVICE = ("read", "write", "to_dev", "to_dev", "to_sys", "snapshot")
#: Operations of each tier beside those of the one before.
VERBS = {
    "A": (*ACCESS, *DEVICE, *DEVICE),
    "B": (),
    "C": ("exclusive", "exclusive", "check_exclusive", "clear_refs", "pageout", "free", "mremap"),
    "D": (
        *("collapse", "populate_read", "populate_write", "hugepage", "nohugepage", "move_pages"),
        *("ksm", "mlock", "pin", "unpin", "hold", "unhold", "cold", "remove"),
        *("wipeonfork", "dontfork"),
    ),
}
ADVICE = (
    *("dontneed", "pageout", "free", "collapse", "populate_read", "populate_write", "hugepage"),
    *("nohugepage", "cold", "remove", "wipeonfork", "dontfork"),
)
UNITS = {
    "A": {"d0": 0},
    "B": {"d0": 0, "d1": 1},
    "C": {"d0": 0, "d1": 1},
    "D": {"d0": 0, "d1": 1, "k0": 2},
}
KINDS = {
    "A": ("private",),
    "B": ("private", "private", "shared"),
    "C": ("private", "private", "shared", "file_private", "file_shared"),
    "D": ("private", "private", "private", "shared", "file_private", "hugetlb"),
}
SIZES = {"A": (4, 16, 70, 130), "B": (4, 8, 70), "C": (4, 16, 70), "D": (8, 70, 512)}

NUMBER = st.integers(0, 1 << 10)
PROT = st.sampled_from(["rw", "rw", "r", "none"])
#: Where in a region: anywhere, all of it, or a little past its end.
PLACE = st.tuples(NUMBER, st.sampled_from([1, 1, 2, 4, 8, 64, 100, 600]), st.integers(0, 20))


#: What is wrong where Linux 6.1 leaves a migration entry behind.
LEFT_FROZEN = "a migration entry is left, and no operation runs"


class Watch:
    """An observer that looks at a machine in the middle of its operations."""

    def __init__(self, machine, every, hole=None):
        self.machine, self.every, self.steps, self.hole = machine, every, 0, hole

    def look(self, quiet):
        """What is violated, but for a hole that Linux has too."""
        said = violations(self.machine, quiet=quiet)
        return [sentence for sentence in said if self.hole is None or self.hole not in sentence]

    def stepped(self, number, step):
        self.steps += 1
        if self.steps % self.every == 0:
            assert self.look(quiet=False) == [], step

    def began(self, number, text, actor):
        pass

    def ended(self, number, result):
        pass

    def wrote(self, column, rows, old, new):
        pass


class Story(RuleBasedStateMachine):
    """One story; subclasses say of which tier."""

    tier = "A"

    def __init__(self):
        super().__init__()
        self.sessions = {
            grain: Session(Machine(RAM, grain=grain), record=grain == 1) for grain in GRAINS
        }
        self.sessions[7].machine.attach(Watch(self.sessions[7].machine, 5))
        tiers = "ABCD"[: "ABCD".index(self.tier) + 1]
        self.verbs = [verb for tier in tiers for verb in VERBS[tier]]
        self.sizes, self.children, self.lines = {}, {}, []
        self.made, self.over = 0, False
        for device, unit in UNITS[self.tier].items():
            self.tell(f"open {device} {unit}")

    def tell(self, line):
        """One line to every machine: they answer and read alike, and keep the invariants.

        The reverse mapping of a merged page does not find relatives whom KSM does not know; what it
        froze of theirs stays so. Linux 6.1 leaves it too (probes/ksm_left_frozen), and stops with a
        BUG when it looks there: the story is over.
        """
        if self.over:
            return
        self.lines.append(line)
        bulk, *others = (session.do(line) for session in self.sessions.values())
        assert all(other == bulk for other in others), line
        told, *finer = (reading(session.machine) for session in self.sessions.values())
        for other in finer:
            assert difference(told, other) == [], line
        for grain in (BULK, 1):
            said = violations(self.sessions[grain].machine)
            self.over = said == [LEFT_FROZEN] and any("ksm" in past for past in self.lines)
            assert said == [] or self.over, line

    def new(self, letter):
        self.made += 1
        return f"{letter}{self.made}"

    def who(self, number):
        """A process, the first or a child, and its devices."""
        names = [None, *self.children]
        child = names[number % len(names)]
        devices = list(UNITS[self.tier]) if child is None else self.children[child]
        return ("" if child is None else f"on {child} "), devices

    @initialize(size=NUMBER, kind=NUMBER)
    def begin(self, size, kind):
        self.map(size, kind, "rw", True)

    @precondition(lambda self: len(self.sizes) < 4)
    @rule(size=NUMBER, kind=NUMBER, prot=PROT, huge=st.booleans())
    def map(self, size, kind, prot, huge):
        name, pages = self.new("R"), SIZES[self.tier][size % len(SIZES[self.tier])]
        kind = KINDS[self.tier][kind % len(KINDS[self.tier])]
        if kind == "hugetlb":
            pages = 512
        self.sizes[name] = pages
        self.tell(f"mmap {name} {pages} {prot} {kind}")
        if pages == 512 and huge and kind == "private":
            self.tell(f"madvise {name} 0 512 hugepage")

    @precondition(lambda self: self.tier != "A" and len(self.children) < 2)
    @rule(unit=st.integers(0, 2))
    def fork(self, unit):
        child = self.new("c")
        self.tell(f"fork {child}")
        self.children[child] = []
        if unit < 2:
            device = self.new("e")
            self.tell(f"on {child} open {device} {unit}")
            self.children[child].append(device)

    @precondition(lambda self: self.children)
    @rule(number=NUMBER)
    def exit(self, number):
        child = list(self.children)[number % len(self.children)]
        del self.children[child]
        self.tell(f"exit {child}")

    @rule(
        verb=NUMBER, who=NUMBER, device=NUMBER, region=NUMBER, place=PLACE, prot=PROT, value=NUMBER
    )
    def operate(self, verb, who, device, region, place, prot, value):
        verb = self.verbs[verb % len(self.verbs)]
        on, devices = self.who(who)
        name = list(self.sizes)[region % len(self.sizes)]
        size = self.sizes[name]
        first, pages, past = place
        first = 0 if past > 12 else first % size
        pages = size if past > 12 else min(pages, size - first + (3 if past == 0 else 0))
        span = f"{name} {first} {pages}"
        if verb == "ksm" and self.has_merged_page_on_a_device():
            return
        if verb in ADVICE:
            line = f"madvise {span} {verb}"
        elif verb in (*DEVICE, "exclusive", "check_exclusive"):
            if not devices:
                return
            line = f"{verb} {devices[device % len(devices)]} {span}"
            line += f" {7000 + value}" if verb == "write" else ""
        elif verb in ("unpin", "unhold"):
            line = verb
        elif verb == "mremap":
            if len(self.sizes) > 5:
                return
            new = self.new("R")
            self.sizes[new] = pages
            line = f"mremap {span} {new}"
        else:
            rest = {
                "store": f"{span} {value // 8}",
                "mprotect": f"{span} {prot}",
                "clear_refs": "4",
                "move_pages": f"{span} {value % 2}",
            }
            line = f"{verb} {rest.get(verb, span)}"
        self.tell(on + line)

    def has_merged_page_on_a_device(self):
        """KSM's next scan would pass over that page and forget who shares it.

        Linux 6.1 stops with a BUG when the page is touched then, and so there is nothing to hold.
        """
        machine = self.sessions[BULK].machine
        return (machine["page.flags"][machine.ram_pages :] & PG_KSM).any()

    @rule()
    def save_and_load(self):
        """What was saved is what is loaded, and it goes on as if nothing had been."""
        session = self.sessions[64]
        save(self.path, session.machine)
        saved = load(self.path)
        assert saved.machine.copy() == session.machine.copy()
        session.machine.detach(session._heard)
        session.machine = saved.machine
        session.machine.attach(session._heard)
        session._family = {
            who: Known(process := saved.processes[known.process.name], process.files, known.mms)
            for who, known in session._family.items()
        }

    @rule(somewhere=NUMBER)
    def look_back(self, somewhere):
        """Forwards and backwards change nothing."""
        session = self.sessions[1]
        trace = session.trace
        replay = trace.replay()
        end = replay.seek(len(trace)).state.copy()
        assert end == session.machine.copy()
        middle = somewhere * 7919 % (len(trace) + 1)
        there = replay.seek(middle).state.copy()
        assert replay.seek(0).state == trace.base
        assert replay.seek(middle).state == there
        assert replay.seek(len(trace)).state == end

    def teardown(self):
        if self.lines:
            self.look_back(0)


SETTINGS = settings(
    max_examples=6 * PROOFS,
    stateful_step_count=40,
    derandomize=PROOFS == 1,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@pytest.mark.timeout(300 * PROOFS)
@pytest.mark.parametrize("tier", "ABCD")
def test_stories(tier, tmp_path):
    from hypothesis.stateful import run_state_machine_as_test

    path = tmp_path / "saved"
    run_state_machine_as_test(
        type(f"Story{tier}", (Story,), {"tier": tier, "path": path}), settings=SETTINGS
    )


def test_a_device_does_not_hear_of_its_own_migration_and_is_not_stale_after_it():
    session = Session(Machine(RAM, grain=7), record=False)
    session.machine.attach(Watch(session.machine, 1))
    for line in (
        *("open d0 0", "mmap A 40 rw private", "load A 0 40", "read d0 A 0 40", "to_dev d0 A 3 30"),
        *("load A 0 40", "read d0 A 0 40", "to_dev d0 A 0 40", "store A 0 40 2"),
    ):
        session.do(line)


#: Operations that may run by turns: name, first page, pages.
RACERS = st.lists(
    st.tuples(
        st.sampled_from(["load", "store", "drop", "read", "write", "to_dev", "to_sys", "protect"]),
        st.integers(0, 7),
        st.integers(1, 8),
    ),
    min_size=2,
    max_size=3,
)


@settings(max_examples=40 * PROOFS, derandomize=PROOFS == 1)
@given(before=RACERS, racers=RACERS, order=st.lists(st.integers(0, 2), max_size=60))
def test_operations_by_turns_keep_the_invariants(before, racers, order):
    machine = Machine(1 << 12, grain=1)
    process = Process(machine)
    device, a = process.open(0), process.mmap(8)
    # The test driver maps what it migrated, and does not ask whether it was told meanwhile.
    moves = any(verb == "to_dev" for verb, *_ in racers)
    watch = Watch(machine, 1, hole="keeps a stale entry" if moves else None)
    machine.attach(watch)

    def steps(verb, first, pages):
        where = a[first : first + pages]
        return {
            "load": lambda: process.steps.load(where),
            "store": lambda: process.steps.store(where, 5),
            "drop": lambda: process.steps.madvise(where, "dontneed"),
            "protect": lambda: process.steps.mprotect(where, "r"),
            "read": lambda: device.steps.read(where),
            "write": lambda: device.steps.write(where, 6),
            "to_dev": lambda: device.steps.to_dev(where),
            "to_sys": lambda: device.steps.to_sys(where),
        }[verb]()

    for racer in before:
        interleave([steps(*racer)])
    running = [steps(*racer) for racer in racers]
    interleave(running, [turn for turn in order if turn < len(running)])
    assert watch.look(quiet=True) == []
