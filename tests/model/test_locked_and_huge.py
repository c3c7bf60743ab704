"""mlock, mappings of a device file, huge pages of the pool, and a device without memory."""

from pathlib import Path

import numpy as np
import pytest

from hmmlab import KernelError, Machine, Process
from hmmlab.invariants import violations
from hmmlab.scenario import parse
from hmmlab.session import Session, UnsupportedError

PMD_PAGES = 512


@pytest.fixture
def machine():
    return Machine(1 << 15)  # a pool of eight pages on each node


def snapshot(device, where):
    return device.snapshot(where).tolist()


def refused(name):
    return pytest.raises(KernelError, match=name)


# --- mlock ----------------------------------------------------------------------------------------


def test_locked_pages_are_there_and_stay(machine, process, device):
    a = process.mmap(8)
    device.to_dev(a[:2])
    process.mlock(a[:4])
    assert snapshot(device, a) == [0x02] * 4 + [0] * 4
    for advice in ("dontneed", "free", "pageout", "cold"):
        with refused("EINVAL"):
            process.madvise(a[:4], advice)
    process.madvise(a[4:], "dontneed")
    device.to_dev(a[:4])
    assert snapshot(device, a[:4]) == [0x22] * 4
    assert violations(machine) == []


def test_a_hole_and_a_wall_cannot_be_locked(process):
    a = process.mmap(8)
    process.munmap(a[4])
    with refused("ENOMEM"):
        process.mlock(a)
    with refused("EINVAL"):  # what lies before the hole is locked all the same
        process.madvise(a[:4], "dontneed")
    wall = process.mmap(2, "none")
    with refused("ENOMEM"):
        process.mlock(wall)


def test_a_child_has_no_locked_pages(process):
    a = process.mmap(2)
    process.mlock(a)
    child = process.fork()
    child.madvise(child.here(a), "dontneed")
    assert child.load(child.here(a)).tolist() == [0, 0]


# --- a device file mapped -------------------------------------------------------------------------


def test_a_device_file_has_its_pages_at_once_and_never_again(machine, process, device):
    a = process.mmap(4, kind="mixed", device=device)
    assert snapshot(device, a) == [0x01] * 4
    process.madvise(a[2], "dontneed")
    with pytest.raises(KernelError, match="SIGBUS"):
        process.store(a, [1, 2, 3, 4])
    assert process.load(a[:2]).tolist() == [1, 2]
    with refused("EFAULT"):
        device.read(a)
    assert violations(machine) == []


def test_a_mapped_device_file_stays_open(machine, process, device):
    a, b = process.mmap(2, kind="mixed", device=device), process.mmap(2)
    device.to_dev(b)
    file = device.file
    device.close()
    assert machine["device_file.mm"][file]
    process.munmap(a)
    assert not machine["device_file.mm"][file]
    assert process.load(b).tolist() == [0, 0]
    assert violations(machine) == []


def test_a_device_belongs_to_mixed_alone(process, device):
    with pytest.raises(ValueError, match="mixed"):
        process.mmap(1, kind="mixed")
    with pytest.raises(ValueError, match="mixed"):
        process.mmap(1, device=device)


# --- hugetlb --------------------------------------------------------------------------------------


def test_a_huge_page_is_one_answer_for_512_pages(machine, process, device):
    a = process.mmap(1024, kind="hugetlb")
    assert snapshot(device, a[:2]) == [0, 0]
    process.load(a[3])
    assert snapshot(device, a[:2]) == [0x05] * 2
    device.write(a[510:514], range(4))
    assert snapshot(device, a[508:516]) == [0x06] * 8
    assert process.load(a[510:514]).tolist() == [0, 1, 2, 3]
    with refused("EINVAL"):
        device.to_dev(a[:4])
    assert violations(machine) == []


def test_a_huge_page_cannot_be_cut(process):
    a = process.mmap(1024, kind="hugetlb")
    for refusal in (
        lambda: process.munmap(a[3:5]),
        lambda: process.mprotect(a[:3], "r"),
        lambda: process.madvise(a[3:600], "dontneed"),
    ):
        with refused("EINVAL"):
            refusal()
    process.store(a, 1)
    process.madvise(a[:600], "dontneed")  # as many as lie wholly in the range
    assert process.load(a[511:513]).tolist() == [0, 1]


def test_the_pool_promises_what_it_has(machine, process):
    a = process.mmap(14 * PMD_PAGES, kind="hugetlb")
    with refused("ENOMEM"):
        process.mmap(3 * PMD_PAGES, kind="hugetlb")
    process.munmap(a[PMD_PAGES:])
    b = process.mmap(15 * PMD_PAGES, kind="hugetlb")
    process.store(b, 1)
    process.exit()
    assert machine["hugetlb.reserved"][0] == 0
    other = Process(machine)
    other.store(other.mmap(16 * PMD_PAGES, kind="hugetlb"), 2)
    assert violations(machine) == []


def test_who_made_the_mapping_goes_before_its_child(machine, process):
    a = process.mmap(16 * PMD_PAGES, kind="hugetlb")
    process.store(a, 1)
    child = process.fork()
    mine = child.here(a)
    with pytest.raises(KernelError, match="SIGBUS"):
        child.store(mine[0], 2)
    process.store(a[0], 3)  # the pool is empty: the page is taken from the child
    assert process.load(a[:2]).tolist() == [3, 1]
    with pytest.raises(KernelError, match="SIGBUS"):
        child.load(mine[0])
    assert child.load(mine[PMD_PAGES]).tolist() == [1]
    assert violations(machine) == []


# --- release --------------------------------------------------------------------------------------


def test_release_brings_all_memory_home(machine, process, device):
    a = process.mmap(100)
    process.store(a, range(100))
    device.to_dev(a)
    child = process.fork()
    device.release()
    assert not (machine["pagemap.owner"] == device.device).any()
    assert snapshot(device, a) == [0x01] * 100
    assert (child.load(child.here(a)) == np.arange(100)).all()
    device.to_dev(a[:10])
    assert process.load(a[:10]).tolist() == list(range(10))
    assert violations(machine) == []


def test_release_waits_for_whoever_holds_device_memory(process):
    device = process.open(2)
    a = process.mmap(2)
    process.store(a, 1)
    device.to_dev(a)
    from hmmlab.model.pins import vmsplice, vmsplice_end

    process.run("hold", vmsplice(process.machine, process.mm, a.start, a.stop))
    with pytest.raises(RuntimeError, match="page of the device"):
        device.release()
    process.run("unhold", vmsplice_end(process.machine, process.mm))


def test_a_fork_without_a_page_for_the_child_is_undone(machine):
    """The copy of a pinned huge page needs a page of the pool: without one there is no child."""
    session = Session(machine)
    session.play(["mmap A 4 rw private", "store A 0 4 7", "mmap G 512 rw hugetlb", "open d0 0"])
    session.play(["store G 0 1 1", "pin G 0 1", "mmap H 7680 rw hugetlb"])  # all are promised now
    before = int(machine["zone.free"][:2].sum())
    assert session.do("fork c")["ret"] == -12
    events = session.answers[-1]["notify"]
    assert [(event["event"], event["region"]) for event in events] == [
        ("PROTECTION_PAGE", "A"),
        ("CLEAR", "G"),
    ]
    assert violations(machine) == [] and not machine["mm.active_invalidations"].any()
    assert int(machine["zone.free"][:2].sum()) == before
    assert session.do("load A 0 4")["data"] == [7, 8, 9, 10]
    assert session.do("snapshot d0 A 0 4")["snapshot"] == "01" * 4  # nobody undoes that
    assert session.do("store A 0 4 9")["ret"] == 0  # and nobody shares a page: no copy is made
    assert not session.answers[-1]["notify"]
    with pytest.raises(UnsupportedError, match="c was never born"):
        session.do("on c load A 0 4")


# --- what several hold ----------------------------------------------------------------------------


def test_the_recordings_of_pools_pipes_and_rings_leave_nothing_behind():
    """After every operation of a recorded story, in the child's and in the parent's name."""
    probes = Path(__file__).parents[1] / "kernel_traces" / "probes"
    for name in ("hugetlb_moved", "pipe_fork", "ring_fork", "ring_own", "exclusive_evicted"):
        session = Session(record=False)
        for operation in parse((probes / f"{name}.txt").read_text()):
            session.perform(operation)
            assert violations(session.machine) == [], f"{name}: {operation.text}"


def test_what_a_child_holds_is_let_go_when_it_ends():
    session = Session(record=False)
    session.play(["mmap A 8 rw private", "store A 0 8 1", "fork c", "on c store A 0 8 2"])
    before = session.machine["page.refcount"].copy()
    session.play(["on c pin A 0 4", "on c hold A 4 4"])
    assert (session.machine["page.refcount"] - before).sum() == 4 * 1024 + 4
    session.play(["exit c"])
    assert not session.machine["held.pfn"].any() and not session.machine["holder.users"].any()
    assert violations(session.machine) == []
