"""A machine and its trace in one file, and back.

    hmmlab.save("lesson.hmmlab", machine, trace)
    machine, trace = hmmlab.load("lesson.hmmlab")

The file is a zip. ``manifest.json`` says what it is and holds the SHA-256 of every other member;
``graph.json`` holds objects as plain values that point to each other by number; all arrays of one
dtype lie end to end in one ``.npy`` member. Nothing in it is code: an object is made of a class of
:mod:`hmmlab.model` and of its attributes, and no constructor runs. So a learner's own driver, whose
class the file cannot hold, is refused when it is saved.
"""

from __future__ import annotations

import enum
import hashlib
import importlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import hmmlab.model
from hmmlab.model.machine import Machine
from hmmlab.model.process import Process
from hmmlab.model.state import State
from hmmlab.model.trace import Trace

__all__ = ["SaveError", "Saved", "load", "save"]

_FORMAT = "hmmlab saved machine"
#: Raise it whenever an object of the model holds something else than before.
_VERSION = 1

_MANIFEST, _GRAPH = "manifest.json", "graph.json"
_MODEL = f"{hmmlab.model.__name__}."
_CONTAINERS: dict[str, type[Any]] = {"list": list, "tuple": tuple, "set": set}

#: What JSON makes of a value.
_Json = Any


class SaveError(ValueError):
    """A machine that cannot be saved, or a file that is no saved machine: which, and why."""


class Saved(NamedTuple):
    """What a file held.

    Attributes
    ----------
    machine
        The machine, which goes on as the one that was saved.
    trace
        Its trace, or None. It goes on recording if it did so when it was saved.
    """

    machine: Machine
    trace: Trace | None

    @property
    def processes(self) -> dict[str, Process]:
        """The machine's processes by name; each has its ``files`` and ``regions``."""
        found = self.machine.objects.get("process", {})
        return {process.name: process for process in found.values()}


def save(path: str | os.PathLike[str], machine: Machine, trace: Trace | None = None) -> None:
    """Write a machine, and a trace of it, to ``path``: whole, or not at all.

    Parameters
    ----------
    trace
        A trace of this machine. Other observers, and who listens to the trace, are left out.

    Raises
    ------
    SaveError
        In the middle of an operation; or when something belongs to a class that is not hmmlab's,
        such as a driver of your own.
    OSError
        When the file cannot be written; what was there before is still there.
    """
    if _is_busy(machine) or (trace is not None and trace.unfinished):
        raise SaveError("an operation is still going on; let it end, and save then")
    path = Path(path)
    content = _packed(machine, trace)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Saved:
    """Read what :func:`save` wrote.

    Raises
    ------
    SaveError
        One line that names the file, when it is damaged, or is no saved machine of this version.
    OSError
        When it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        return _unpacked(content)
    except SaveError as error:
        raise SaveError(f"{path}: {error}") from None


def _is_busy(machine: Machine) -> bool:
    columns = ("lock.writer", "lock.readers", "mm.active_invalidations")
    return any(machine[column].any() for column in columns)


# --- the file -------------------------------------------------------------------------------------


def _packed(machine: Machine, trace: Trace | None) -> bytes:
    """The bytes of the file."""
    writer = _Writer(machine, trace)
    root = [writer.value(machine), writer.value(trace)]
    graph = {"objects": writer.objects, "classes": writer.classes, "root": root}
    members = {_GRAPH: json.dumps(graph).encode()}
    for dtype, arrays in writer.pools.items():
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.concatenate(arrays), allow_pickle=False)
        members[f"{dtype}.npy"] = buffer.getvalue()
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in members.items()},
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in {_MANIFEST: json.dumps(manifest).encode(), **members}.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _unpacked(content: bytes) -> Saved:
    members = _members(content)
    try:
        graph = json.loads(members.pop(_GRAPH))
        pools = {
            name.removesuffix(".npy"): np.lib.format.read_array(
                io.BytesIO(data), allow_pickle=False
            )
            for name, data in members.items()
        }
        machine, trace = _Reader(graph, pools).root()
        _check_columns(machine)
        if trace is not None:
            _check_columns(trace.base)
    except SaveError:
        raise
    except Exception as error:  # whatever well-formed nonsense may lead to
        raise SaveError(f"expected a saved machine, and this makes no sense: {error}") from None
    return Saved(machine, trace)


def _members(content: bytes) -> dict[str, bytes]:
    """The members of a file, each as it was written.

    Raises
    ------
    SaveError
        When one is not, or the file is another.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        manifest = json.loads(members.pop(_MANIFEST))
        known = (manifest["format"], manifest["version"])
        sums = manifest["sha256"]
    except Exception:  # zipfile, zlib and json have a dozen ways to say so
        raise SaveError("expected a saved machine; this is none, or it is damaged") from None
    if known != (_FORMAT, _VERSION):
        raise SaveError(f"expected {_FORMAT} {_VERSION}, not {known[0]} {known[1]}")
    if sums != {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}:
        raise SaveError("the file is damaged: what it holds is not what was written")
    return members


def _check_columns(state: State) -> None:
    fresh = Machine(16)
    for name in state:
        if name not in fresh or fresh[name].dtype != state[name].dtype:
            raise SaveError(f"the column {name} is not this version's")


# --- objects as plain values ----------------------------------------------------------------------


class _Writer:
    """Turns objects into plain values, and collects arrays.

    Attributes
    ----------
    objects
        For each object the index of its class and its attributes.
    classes
        Names of classes, with their modules.
    pools
        Flat arrays by dtype.
    """

    def __init__(self, machine: Machine, trace: Trace | None) -> None:
        self.objects: list[_Json] = []
        self.classes: list[str] = []
        self.pools: dict[str, list[NDArray[Any]]] = {}
        self._sizes: dict[str, int] = {}
        self._numbers: dict[int, int] = {}
        self._machine, self._trace = machine, trace

    def value(self, value: Any) -> _Json:
        """A value as JSON: itself, or a list that begins with what it is."""
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return ["float", value.hex()]
        if type(value) in _CONTAINERS.values():
            return [type(value).__name__, *map(self.value, value)]
        if type(value) is dict:
            return ["dict", *([self.value(k), self.value(v)] for k, v in value.items())]
        if type(value) is slice:
            return ["slice", value.start, value.stop, value.step]
        if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
            kind = "array" if isinstance(value, np.ndarray) else "scalar"
            return [kind, *self._pooled(np.asarray(value))]
        if isinstance(value, enum.Enum):
            return ["enum", self._class(value), value.value]
        if isinstance(value, tuple):
            return ["named", self._class(value), *map(self.value, value)]
        if isinstance(value, BaseException):
            return ["error", self._class(value), self.value(value.args), self.value(vars(value))]
        return ["object", self._object(value)]

    def _pooled(self, array: NDArray[Any]) -> list[_Json]:
        dtype = array.dtype.str.lstrip("<|=")
        offset = self._sizes.get(dtype, 0)
        self.pools.setdefault(dtype, []).append(array.ravel())
        self._sizes[dtype] = offset + array.size
        return [dtype, offset, list(array.shape)]

    def _class(self, value: Any) -> int:
        kind = type(value)
        if not kind.__module__.startswith(_MODEL):
            raise SaveError(
                f"{kind.__qualname__} is no class of hmmlab's own model, and a file cannot bring "
                "back what belongs to another"
            )
        name = f"{kind.__module__}:{kind.__qualname__}"
        if name not in self.classes:
            self.classes.append(name)
        return self.classes.index(name)

    def _object(self, value: Any) -> int:
        if id(value) in self._numbers:
            return self._numbers[id(value)]
        number = self._numbers[id(value)] = len(self.objects)
        self.objects.append([self._class(value), None])
        state = value.__getstate__()
        if value is self._machine:
            observers = [seen for seen in state["_observers"] if seen is self._trace]
            state = {**state, "_observers": observers}
        self.objects[number][1] = self.value(state)
        return number


class _Reader:
    """Turns plain values back into objects; first all of them empty, for they point to each other.

    Any exception means that the values are not what :class:`_Writer` makes.
    """

    def __init__(self, graph: _Json, pools: dict[str, NDArray[Any]]) -> None:
        self._pools = pools
        self._classes: list[Any] = [_class_named(name) for name in graph["classes"]]
        self._objects = [self._made(kind) for kind, _ in graph["objects"]]
        self._root = graph["root"]
        for thing, (_, state) in zip(self._objects, graph["objects"], strict=True):
            _fill(thing, self.value(state))

    def root(self) -> tuple[Machine, Trace | None]:
        """The machine and the trace."""
        machine, trace = map(self.value, self._root)
        if not isinstance(machine, Machine) or not isinstance(trace, (Trace, type(None))):
            raise SaveError("expected a machine and a trace")
        return machine, trace

    def _made(self, kind: int) -> Any:
        cls = self._classes[kind]
        return cls.__new__(cls)

    def value(self, value: _Json) -> Any:
        """The value of some JSON."""
        if not isinstance(value, list):
            return value
        kind, *rest = value
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](map(self.value, rest))
        return getattr(self, f"_{kind}_of")(*rest)

    def _float_of(self, text: str) -> float:
        return float.fromhex(text)

    def _dict_of(self, *items: list[_Json]) -> dict[Any, Any]:
        return {self.value(key): self.value(value) for key, value in items}

    def _slice_of(self, start: int, stop: int, step: int | None) -> slice:
        return slice(start, stop, step)

    def _array_of(self, dtype: str, offset: int, shape: list[int]) -> NDArray[Any]:
        size = int(np.prod(shape, dtype=np.int64))
        return self._pools[dtype][offset : offset + size].reshape(shape).copy()

    def _scalar_of(self, dtype: str, offset: int, shape: list[int]) -> Any:
        return self._array_of(dtype, offset, shape)[()]

    def _enum_of(self, kind: int, value: Any) -> Any:
        return self._classes[kind](value)

    def _named_of(self, kind: int, *values: _Json) -> Any:
        cls = self._classes[kind]
        return cls.__new__(cls, *map(self.value, values))

    def _error_of(self, kind: int, args: _Json, attributes: _Json) -> Any:
        cls = self._classes[kind]
        error = cls.__new__(cls, *self.value(args))
        error.__dict__.update(self.value(attributes))
        return error

    def _object_of(self, number: int) -> Any:
        return self._objects[number]


def _class_named(name: str) -> type[Any]:
    module, _, path = name.partition(":")
    cls = getattr(importlib.import_module(module), path) if module.startswith(_MODEL) else None
    if not isinstance(cls, type) or cls.__module__ != module:
        raise SaveError(f"no class is called {name}")
    return cls


def _fill(thing: Any, state: Any) -> None:
    """Give an empty object its attributes, as :mod:`copy` does."""
    if hasattr(thing, "__setstate__"):
        thing.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    for name, value in {**(attributes or {}), **(slots or {})}.items():
        setattr(thing, name, value)
