"""The judge: hold the model's answers, and the order of its calls, against a real kernel's.

A recording is a ``.jsonl`` file with one object an operation. Either it has the events of the
operation (``notify`` and ``faults_handled``) or the kernel's own nested function calls (``calls``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmmlab.model.machine import BULK, StuckError
from hmmlab.scenario import ScenarioError, parse
from hmmlab.session import Session, UnsupportedError

__all__ = [
    "KERNEL",
    "KNOWN_CALLS",
    "RecordingError",
    "Verdict",
    "compare",
    "judge",
    "read_recording",
    "reduce_calls",
    "scenario_of",
]

#: The kernel that the recordings come from.
KERNEL = "Linux 6.1.192"

#: Functions that both the recordings and the model's steps tell of. The recorder listens to some
#: sixty that matter here; these are all that it hears. The compiler has made others part of their
#: callers, and what is in the kernel's lib/, the test driver among it, is not traced at all.
KNOWN_CALLS = frozenset(
    [
        "__x64_sys_mmap",
        "__x64_sys_munmap",
        "__x64_sys_mprotect",
        "__x64_sys_madvise",
        "__x64_sys_mremap",
        "mprotect_fixup",
        "change_protection",
        "zap_page_range_single",
        "unmap_vmas",
        "unmap_page_range",
        "free_pgtables",
        "move_page_tables",
        "vma_to_resize",
        "copy_page_range",
        "handle_mm_fault",
        "do_wp_page",
        "wp_page_copy",
        "do_swap_page",
        "__split_huge_pmd",
        "split_huge_page_to_list",
        "page_add_new_anon_rmap",
        "page_remove_rmap",
        "try_to_unmap",
        "lru_add_drain",
        "lru_add_drain_all",
        "flush_tlb_mm_range",
        "tlb_finish_mmu",
        "__mmu_notifier_invalidate_range",
        "mmu_interval_notifier_insert",
        "mmu_interval_notifier_remove",
        "mmu_interval_read_begin",
        "__mmu_notifier_invalidate_range_start",
        "__mmu_notifier_invalidate_range_end",
        "hmm_range_fault",
        "walk_page_range",
        "hmm_vma_walk_test",
        "hmm_vma_walk_pmd",
        "hmm_vma_walk_hole",
        "migrate_vma_setup",
        "migrate_vma_collect_pmd",
        "migrate_vma_collect_hole",
        "migrate_device_unmap",
        "try_to_migrate",
        "remove_migration_ptes",
        "migrate_vma_pages",
        "migrate_vma_finalize",
        "make_device_exclusive_range",
        "zone_device_page_init",
        "free_zone_device_page",
    ]
)

#: Calls that the recorded kernel does not show, because its compiler made them part of their
#: caller: function, and the function around it in which that is so.
INLINED = {("remove_migration_ptes", "migrate_pages")}

#: The recorder's own process is listened to from just before its system call until just after it.
#: Its stack and heap, which are no regions, fault meanwhile, and a fork copies its own mappings
#: along with the regions. These are the functions that it so calls, outside all others.
RECORDERS_OWN = frozenset(["handle_mm_fault", "copy_page_range"])

Answers = Sequence[Mapping[str, Any]]
Calls = list[tuple[int, str]]


class RecordingError(ValueError):
    """A file that is no recording: where, and what was expected."""


@dataclass(frozen=True)
class Verdict:
    """How some answers compare with a recording.

    Attributes
    ----------
    kind
        "same", "differs" or "unrecorded": the first so many agree and the rest was not recorded.
    matched, total
        Operations that agree, from the first on, and operations recorded.
    text
        The verdict in one line.
    detail
        Both values where they differ first.
    """

    kind: str
    matched: int
    total: int
    text: str
    detail: str = ""


def read_recording(path: Path) -> list[dict[str, Any]]:
    """The objects of a recording.

    Raises
    ------
    RecordingError
        ``file:line: what was expected`` for the first line that is no answer.
    OSError
        When it cannot be read.
    """
    answers = []
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise RecordingError(f"{path}:1: expected JSON lines in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            answer = json.loads(line, object_pairs_hook=_once, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            answer = None
        if not (
            isinstance(answer, dict)
            and all(isinstance(answer.get(key), str) for key in ("proc", "op"))
            and "\n" not in answer["proc"] + answer["op"]
            and "ret" in answer
        ):
            raise RecordingError(
                f"{path}:{number}: expected a JSON object with 'proc', 'op' and 'ret'"
            )
        if not _are_calls(answer.get("calls", [])):
            raise RecordingError(f"{path}:{number}: expected calls as [depth, name], ...")
        answers.append(answer)
    if not answers:
        raise RecordingError(f"{path}:1: expected an answer a line, the file has none")
    return answers


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand once each: of two, JSON would keep the last in silence."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _are_calls(calls: Any) -> bool:
    return isinstance(calls, list) and all(
        isinstance(call, list) and list(map(type, call)) == [int, str] for call in calls
    )


def compare(answers: Answers, recording: Answers) -> Verdict:
    """How answers compare with a recording, operation by operation and key by key."""
    total = len(recording)
    for number, (mine, theirs) in enumerate(zip(answers, recording, strict=False)):
        key = _first_difference(mine, theirs)
        if key:
            op = str(theirs["op"])
            return Verdict(
                "differs",
                number,
                total,
                f"first difference: operation {number + 1} ({op}), key {key}",
                f"{key}\n  {KERNEL}: {_shown(theirs, key)}\n  model: {_shown(mine, key)}",
            )
    matched = min(len(answers), total)
    text = f"{matched}/{total} operations as {KERNEL}"
    if not total:
        return Verdict("unrecorded", 0, 0, f"not recorded on {KERNEL}")
    if len(answers) > total:
        return Verdict(
            "unrecorded", matched, total, f"{text}; not recorded: your own since {total + 1}"
        )
    return Verdict("same", matched, total, text)


def _first_difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    keys = [*theirs, *(key for key in mine if key not in theirs)]
    return next((key for key in keys if mine.get(key, ...) != theirs.get(key, ...)), "")


def _shown(answer: Mapping[str, Any], key: str) -> str:
    return json.dumps(answer[key]) if key in answer else "no such key"


def reduce_calls(calls: Iterable[Sequence[Any]]) -> Calls:
    """Nested calls without the functions that only one side knows, depths counted anew."""
    reduced: Calls = []
    around: list[tuple[int, str]] = []
    for depth, name in calls:
        while around and around[-1][0] >= depth:
            around.pop()
        if name in KNOWN_CALLS and not any((name, outer) in INLINED for _, outer in around):
            reduced.append((sum(outer in KNOWN_CALLS for _, outer in around), name))
        around.append((depth, name))
    return reduced


def without_recorders_own(recorded: Calls, mine: Calls) -> Calls:
    """Recorded calls without those that the recorder's process made on memory of its own.

    A recording has no addresses, so a call of :data:`RECORDERS_OWN` is taken for the recorder's
    where it, and all within it, is not the next that ``mine`` has outside all others. What is
    missing from ``mine`` may so stay unseen; the events and faults of the same scenario, which are
    compared with their addresses, count those.
    """
    expected = _trees(mine)
    kept: Calls = []
    for tree in _trees(recorded):
        if expected and tree == expected[0]:
            expected.pop(0)
        elif tree[0][1] in RECORDERS_OWN:
            continue
        kept += tree
    return kept


def _trees(calls: Calls) -> list[Calls]:
    """The calls outside all others, each with all within it."""
    trees: list[Calls] = []
    for depth, name in calls:
        if not depth:
            trees.append([])
        trees[-1].append((depth, name))
    return trees


def judge(recording: Answers, name: str = "recording", *, grain: int = BULK) -> Verdict:
    """Run the operations of a recording on a new machine and compare.

    A recording with ``calls`` is run page by page, as the kernel goes, and its calls are compared
    as far as :data:`KNOWN_CALLS` goes. One process was listened to, the one that reads the
    scenario: of what its children call, and kernel threads, the recording is silent.

    Raises
    ------
    RecordingError
        When an operation of the recording is none.
    """
    try:
        operations = parse(scenario_of(recording), name)
    except ScenarioError as error:
        raise RecordingError(str(error)) from None
    if len(operations) != len(recording):
        raise RecordingError(f"{name}: expected one operation an answer")
    with_calls = any("calls" in answer for answer in recording)
    session = Session(grain=1 if with_calls else grain, record=False)
    answers: list[dict[str, Any]] = []
    wanted: list[dict[str, Any]] = []
    for operation, theirs in zip(operations, recording, strict=True):
        try:
            mine = session.perform(operation)
        except (UnsupportedError, StuckError) as error:
            total, done = len(recording), len(answers)
            verdict = compare(answers, wanted)
            if verdict.kind == "differs":
                return verdict
            return Verdict("differs", done, total, f"{done}/{total} operations; {error}")
        if "calls" in theirs:
            mine = {k: v for k, v in mine.items() if k not in ("notify", "faults_handled")}
            heard = theirs["proc"] == recording[0]["proc"]
            called = reduce_calls(session.calls) if heard else []
            recorded = without_recorders_own(reduce_calls(theirs["calls"]), called)
            mine["calls"] = [list(call) for call in called]
            theirs = {**theirs, "calls": [list(call) for call in recorded]}
        answers.append(mine)
        wanted.append(dict(theirs))
    return compare(answers, wanted)


def scenario_of(recording: Answers) -> str:
    """The scenario that a recording is of, a line an answer."""
    ancestors: dict[str, str] = {"p0": ""}
    lines = []
    for answer in recording:
        op, proc = str(answer["op"]), str(answer["proc"])
        lines.append(ancestors.get(proc, f"on {proc} ") + op)
        words = op.split()
        if len(words) == 2 and words[0] == "fork":
            ancestors[words[1]] = f"{ancestors.get(proc, '')}on {words[1]} "
    return "\n".join(lines)
