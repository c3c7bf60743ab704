"""The scenario language: one operation a line, checked as a whole before anything runs.

:func:`parse` gives the operations of a text; :class:`Scope` knows which names a line may use. The
language itself is described in docs/scenarios.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hmmlab.model.mm_types import flags_of_prot
from hmmlab.model.region import REGION_PAGES

__all__ = ["Operation", "ScenarioError", "Scope", "parse", "parse_line"]

ADVICE = [
    "dontneed",
    "free",
    "hugepage",
    "nohugepage",
    "pageout",
    "cold",
    "remove",
    "populate_read",
    "populate_write",
    "collapse",
    "wipeonfork",
    "dontfork",
]
KINDS = ("private", "shared", "file_private", "file_shared", "hugetlb", "mixed")

_RANGE = ("region", "off", "pages")
_DEVICE_RANGE = ("device", *_RANGE)

#: What each operation takes. A trailing mark of ``mmap`` is parsed by hand.
_GRAMMAR: dict[str, tuple[str, ...]] = {
    "open": ("new device", "unit"),
    "close": ("device",),
    "mmap": ("new region", "pages", "prot", "kind"),
    "munmap": _RANGE,
    "mprotect": (*_RANGE, "prot"),
    "mremap": (*_RANGE, "new region"),
    "madvise": (*_RANGE, "advice"),
    "mlock": _RANGE,
    "load": _RANGE,
    "store": (*_RANGE, "value"),
    "read": _DEVICE_RANGE,
    "write": (*_DEVICE_RANGE, "value"),
    "to_dev": _DEVICE_RANGE,
    "to_sys": _DEVICE_RANGE,
    "snapshot": _DEVICE_RANGE,
    "exclusive": _DEVICE_RANGE,
    "check_exclusive": _DEVICE_RANGE,
    "release": ("device",),
    "fork": ("new child",),
    "exit": ("child",),
    "pin": _RANGE,
    "unpin": (),
    "hold": _RANGE,
    "unhold": (),
    "clear_refs": ("clear",),
    "ksm": _RANGE,
    "move_pages": (*_RANGE, "node"),
    "pagemap": _RANGE,
}


class ScenarioError(ValueError):
    """A line that is no operation: what was expected there."""


class Operation(NamedTuple):
    """One parsed line.

    ``text`` is the operation as written, without ``on CHILD``; ``who`` is the chain of children it
    is for, empty for the process that reads the scenario; ``args`` has a value for each word.
    """

    line: int
    text: str
    who: tuple[str, ...]
    verb: str
    args: dict[str, Any]


# --- parsing --------------------------------------------------------------------------------------


@dataclass
class Scope:
    """The names that one process knows: open devices, and children with their own.

    Regions are known to all: a child may speak of one that only another process has mapped, and has
    nothing there.
    ``mapped`` are the regions that any process of the scenario has mapped so far.
    """

    devices: list[str] = field(default_factory=list)
    children: dict[str, Scope] = field(default_factory=dict)
    mapped: list[str] = field(default_factory=list)


def _number(word: str, what: str, last: int) -> int:
    try:
        value = int(word, 16 if word.startswith("0x") else 10)
    except ValueError:
        value = -1
    if not 0 <= value <= last or not word[0].isdigit() or "_" in word or not word.isascii():
        raise ScenarioError(f"expected {what}, a number from 0 to {last}, not {word!r}")
    return value


def _word(kind: str, word: str, scope: Scope) -> Any:
    """The value of one word where ``kind`` is expected."""
    if kind == "value":
        return _number(word, "a value", (1 << 64) - 1)
    if kind in ("off", "pages"):
        return _number(word, "a number of pages", REGION_PAGES)
    choices: tuple[str, ...] = ()
    if kind == "region":
        choices = tuple(scope.mapped)
    elif kind == "device":
        choices = tuple(scope.devices)
    elif kind == "child":
        choices = tuple(scope.children)
    elif kind == "kind":
        choices = KINDS
    elif kind == "advice":
        choices = tuple(ADVICE)
    elif kind in ("unit", "node", "clear"):
        choices = {"unit": ("0", "1", "2", "3"), "node": ("0", "1"), "clear": ("4",)}[kind]
    elif kind == "prot":
        try:
            flags_of_prot(word)
        except ValueError:
            raise ScenarioError(f"expected letters of 'rwx' or 'none', not {word!r}") from None
        return word
    elif not (word.isascii() and word.isidentifier() and len(word) < 16):
        raise ScenarioError(f"expected a name for a {kind.split()[1]}, not {word!r}")
    else:
        return word
    if word not in choices:
        known = f"one of {', '.join(choices)}" if choices else "and none is known here yet"
        raise ScenarioError(f"expected {_A[kind]}, {known}; not {word!r}")
    return int(word) if kind in ("unit", "node", "clear") else word


_A = {
    "region": "a region",
    "device": "an open device",
    "child": "a child",
    "kind": "a kind of mapping",
    "advice": "an advice",
    "unit": "a unit",
    "node": "a node",
    "clear": "what to clear",
}


def _parse_words(words: list[str], scope: Scope) -> tuple[tuple[str, ...], str, dict[str, Any]]:
    """Who, verb and arguments of a line; tells ``scope`` the names it makes."""
    verb = words[0]
    if verb == "on":
        if len(words) < 3:
            raise ScenarioError("expected 'on CHILD OPERATION'")
        child = _word("child", words[1], scope)
        who, verb, inner = _parse_words(words[2:], scope.children[child])
        return (child, *who), verb, inner
    if verb not in _GRAMMAR:
        raise ScenarioError(f"expected an operation, not {verb!r}")
    kinds, rest = _GRAMMAR[verb], words[1:]
    args: dict[str, Any] = {}
    if verb == "mmap" and len(rest) > len(kinds):
        args, rest = _mmap_tail(rest, scope)
    if len(rest) != len(kinds):
        wanted = " ".join(kind.split()[-1].upper() for kind in kinds)
        raise ScenarioError(f"expected '{(verb + ' ' + wanted).strip()}', not {' '.join(words)!r}")
    for kind, word in zip(kinds, rest, strict=True):
        args[kind.split()[-1] if kind != "new region" or verb == "mmap" else "new"] = _word(
            kind, word, scope
        )
    if args.get("kind") == "mixed" and "device" not in args:
        raise ScenarioError("expected 'mmap REGION PAGES PROT mixed DEVICE'")
    if args.get("off", 0) + args.get("pages", 0) > REGION_PAGES:
        raise ScenarioError(f"expected at most {REGION_PAGES} pages of a region")
    _tell(scope, verb, args)
    return (), verb, args


def _mmap_tail(rest: list[str], scope: Scope) -> tuple[dict[str, Any], list[str]]:
    """``mixed DEVICE`` or ``at REGION OFF`` behind the four words of an mmap."""
    head, tail = rest[:4], rest[4:]
    if head[3] == "mixed" and len(tail) == 1:
        return {"device": _word("device", tail[0], scope)}, head
    if len(tail) == 3 and tail[0] == "at":
        at = {"at_region": _word("region", tail[1], scope), "at_off": _word("off", tail[2], scope)}
        return at, head
    raise ScenarioError("expected 'at REGION OFF' or 'mixed DEVICE' behind an mmap")


def _tell(scope: Scope, verb: str, args: dict[str, Any]) -> None:
    new = args.get("new") or (args.get("region") if verb == "mmap" else None)
    if new and new not in scope.mapped:
        scope.mapped.append(new)
    if verb == "open":
        if args["device"] in scope.devices:
            raise ScenarioError(f"expected a new name, {args['device']!r} is open already")
        scope.devices.append(args["device"])
    elif verb == "close":
        scope.devices.remove(args["device"])
    elif verb == "fork":
        if args["child"] in scope.children:
            raise ScenarioError(f"expected a new name, {args['child']!r} is alive")
        child = Scope(list(scope.devices), mapped=scope.mapped)
        scope.children[args["child"]] = child
    elif verb == "exit":
        del scope.children[args["child"]]


def parse_line(line: int, text: str, scope: Scope) -> Operation | None:
    """The operation of one line, None for an empty line or a remark.

    Tells ``scope`` the names that the operation makes.

    Raises
    ------
    ScenarioError
        What was expected; ``scope`` may know half of it then.
    """
    words = text.split()
    if not words or words[0].startswith("#"):
        return None
    who, verb, args = _parse_words(words, scope)
    for _ in who:
        text = text.strip().split(None, 2)[2]
    return Operation(line, text.strip(), who, verb, args)


def parse(text: str, name: str = "scenario", scope: Scope | None = None) -> list[Operation]:
    """The operations of a scenario; ``scope`` knows the names of what it goes on from.

    Raises
    ------
    ScenarioError
        ``name:line: what was expected`` for the first line that is none.
    """
    scope, operations = scope if scope is not None else Scope(), []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            operation = parse_line(number, line, scope)
        except ScenarioError as error:
            raise ScenarioError(f"{name}:{number}: {error}") from None
        if operation:
            operations.append(operation)
    return operations
