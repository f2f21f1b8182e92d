"""Unpickles what of metadata is made into objects at once, and calls nothing but what is on the allow-list.

Python's own unpickler in C lets a pickle set attributes of classes, and call any class that it may name. So this is
the one in Python, in which each opcode that acts is replaced. It is slower than torch's. Of all that known writers
write, it makes only the plans that Megatron-Core keeps, when somebody asks for them; else what may be damaged or
hostile.
"""

from __future__ import annotations

import codecs
import collections
import copyreg
import importlib.util
import io
import pickle
import sys
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from dcp_fast._native import METADATA_DTYPES
from dcp_fast._torch import PROPERTIES_HAVE_STRIDES, get_layout
from dcp_fast.copies import CopyBudget, cost_of
from dcp_fast.metadata.allowed import DATA_CLASSES, ENUMS, PATHS, PROPERTIES, find_allowed

__all__ = ["RefusedError", "RestrictedUnpickler"]

_ATOMS = (str, int, float, complex, bool, bytes, type(None), *PATHS)
_Unpickler: Any = pickle._Unpickler


class RefusedError(Exception):
    """The pickle asks for what is not allowed. The argument says what."""

    advice = (
        ", which is not on the list of what is made of metadata, and may run code. If you trust the file, "
        "trust_metadata=True of load, FileSystemReader or install unpickles it as torch does"
    )


class _MissingError(RefusedError):
    """torch's own unpickler could not do it here either."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what)
        self.advice = f", {why}"


class RestrictedUnpickler(_Unpickler):  # type: ignore[misc]
    """Unpickles once, by ``load()``. Raises RefusedError, or whatever Python's unpickler raises for damage."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_Unpickler.dispatch)

    def __init__(self, pickled: bytes) -> None:
        self._file = io.BytesIO(pickled)
        self._budget = CopyBudget(len(pickled))
        super().__init__(self._file)

    def position(self) -> int:
        """How many bytes have been read, give or take what the frame at hand has left."""
        frame = getattr(self, "_unframer", None) and self._unframer.current_frame
        return self._file.tell() - (len(frame.getbuffer()) - frame.tell() if frame else 0)

    def find_class(self, module: str, name: str) -> Any:
        found = find_allowed(module, name, self.proto)
        if found is None:
            raise _refused_global(module, name)
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise _MissingError("a persistent id", "which no writer of metadata uses and no reader of it knows")

    def _refuse(self) -> None:
        raise RefusedError("an opcode that metadata never needs")

    for _opcode in (
        *(pickle.EXT1, pickle.EXT2, pickle.EXT4),  # the registry of extensions is of the process
        *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX),
        *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    ):
        dispatch[_opcode[0]] = _refuse

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        made = self.stack[-1] = _call(self.stack[-1], arguments)
        self._pay(max(cost_of(arguments), cost_of((made,))))

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        made = self.stack[-1] = _new(self.stack[-1], arguments)
        self._pay(cost_of((made,)))

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_build(self) -> None:
        state = self.stack.pop()
        _set_state(self.stack[-1], state)
        self._pay(cost_of((state,)))

    dispatch[pickle.BUILD[0]] = load_build

    def _pay(self, cost: int) -> None:
        _expect(self._budget.pays(cost), "many copies of the same")

    def load_append(self) -> None:
        _expect(type(self.stack[-2]) is list, "items for what is no list")
        super().load_append()

    dispatch[pickle.APPEND[0]] = load_append

    def load_appends(self) -> None:
        _expect(type(self.metastack[-1][-1]) is list, "items for what is no list")
        super().load_appends()

    dispatch[pickle.APPENDS[0]] = load_appends

    def load_additems(self) -> None:
        _expect(type(self.metastack[-1][-1]) is set, "items for what is no set")
        _check_keys(self.stack)
        super().load_additems()

    dispatch[pickle.ADDITEMS[0]] = load_additems

    def load_frozenset(self) -> None:
        _check_keys(self.stack)
        super().load_frozenset()

    dispatch[pickle.FROZENSET[0]] = load_frozenset

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])
        super().load_dict()

    dispatch[pickle.DICT[0]] = load_dict

    def load_setitem(self) -> None:
        _expect(type(self.stack[-3]) in (dict, collections.OrderedDict), "keys for what is no dict")
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        _expect(type(self.metastack[-1][-1]) in (dict, collections.OrderedDict), "keys for what is no dict")
        _check_keys(self.stack[::2])
        super().load_setitems()

    dispatch[pickle.SETITEMS[0]] = load_setitems


def _refused_global(module: str, name: str) -> RefusedError:
    if module == "torch" and name in METADATA_DTYPES:
        return _MissingError(f"the dtype torch.{name}", f"which torch {torch.__version__} does not have")
    package = module.partition(".")[0]
    # Nothing is imported to find out about a name without dots.
    if package.isidentifier() and package not in sys.modules and importlib.util.find_spec(package) is None:
        return _MissingError(
            f"the global {module}.{name}",
            f"which is not on the list of what is made of metadata. torch could not unpickle it here either: "
            f"there is no module {package}",
        )
    return RefusedError(f"the global {module}.{name}")


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise RefusedError(otherwise)


def _check_keys(keys: list[Any]) -> None:
    """Refuse keys whose hash runs code or, as that of nested tuples with shared items, takes forever."""
    for key in keys:
        if type(key) is MetadataIndex:
            parts: tuple[Any, ...] = (key.fqn, *(key.offset or ()))
            _expect(type(key.offset) in (torch.Size, type(None)), "an index whose offset is no torch.Size")
        else:
            parts = tuple(key) if type(key) in (tuple, torch.Size) else (key,)
        if not all(type(part) in _ATOMS for part in parts):
            raise RefusedError(f"a key that is a {type(key).__name__}")


# What is not on the allow-list may be built so that its hash, its text or a comparison takes time and memory without
# bounds: a hundred bytes of nested tuples will do. So nothing but types and functions is hashed, compared or shown.


def _is_one_of(value: Any, allowed: Collection[Any]) -> bool:
    return any(value is each for each in allowed)


def _name(value: Any) -> str:
    return value.__qualname__ if isinstance(value, type) else f"a {type(value).__name__}"


def _call(function: Any, arguments: Any) -> Any:
    """What metadata may call, with the arguments that it may pass."""
    _expect(type(arguments) is tuple, "arguments that are no tuple")
    kinds = [type(argument) for argument in arguments]
    if function is torch.Size:
        return _new(function, arguments)
    if function is get_layout:
        _expect(kinds == [str], "a layout that is no text")
    elif _is_one_of(function, ENUMS):
        _expect(kinds == [int], "an enum of no number")
    elif function is getattr:  # how Python 3.11 pickles the members of enums
        _expect(len(arguments) == 2 and kinds[1] is str, "getattr of other than an enum")
        _expect(_is_one_of(arguments[0], ENUMS), "getattr of other than an enum")
        return arguments[0][arguments[1]]
    elif function is copyreg._reconstructor:  # type: ignore[attr-defined]
        _expect(len(arguments) == 3, "_reconstructor of other than an object")
        _expect(arguments[1] is object and arguments[2] is None, "_reconstructor of other than an object")
        return _new(arguments[0], ())
    elif function is codecs.encode:
        _expect(kinds == [str, str] and arguments[1] == "latin1", "encode of other than bytes")
    elif _is_one_of(function, (dict, collections.OrderedDict)):
        _expect(not arguments, "a dict with arguments")
    elif _is_one_of(function, (set, frozenset)):
        _expect(kinds in ([], [list]), "a set of other than a list")
        _check_keys(arguments[0] if arguments else [])
    elif function is complex:
        _expect(kinds == [float, float], "a complex number of other than floats")
    elif not _is_one_of(function, PATHS) or not set(kinds) <= {str}:
        raise RefusedError(f"a call of {_name(function)}")
    return function(*arguments)


def _new(cls: Any, arguments: Any) -> Any:
    if cls is torch.Size:
        _expect(type(arguments) is tuple and len(arguments) == 1, "a torch.Size of other than numbers")
        (numbers,) = arguments
        _expect(type(numbers) in (tuple, list, torch.Size), "a torch.Size of other than numbers")
        _expect(all(type(number) is int for number in numbers), "a torch.Size of other than numbers")
        return torch.Size(numbers)
    if not _is_one_of(cls, (*DATA_CLASSES, *PROPERTIES)) or type(arguments) is not tuple or arguments:
        raise RefusedError(f"an object of {_name(cls)}")
    return object.__new__(cls)


def _set_state(instance: Any, state: Any) -> None:
    cls = type(instance)
    if cls in PROPERTIES:
        kinds = [type(part) for part in state] if type(state) is tuple else []
        _expect(kinds[:5] == [torch.dtype, torch.layout, bool, PROPERTIES[cls], bool], "properties of other types")
        strides = state[5] if len(state) > 5 else None
        _expect(
            strides is None or (type(strides) is tuple and all(type(number) is int for number in strides)),
            "strides of other than numbers",
        )
        # What this torch has no field for is left out, and what only a later one writes.
        instance.__setstate__((*state[:5], strides) if PROPERTIES_HAVE_STRIDES else state[:5])
        return
    if cls not in DATA_CLASSES or type(state) is not dict:
        raise RefusedError(f"state of a {cls.__name__}")
    for name in state:
        # Fields that this torch does not have are those of a later one. Special methods would be as good as code.
        if type(name) is not str or name.startswith("__"):
            raise RefusedError(f"the field {name!r} of a {cls.__name__}")
    vars(instance).update(state)
