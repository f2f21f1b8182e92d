"""Unpickles what of metadata is made into objects at once, and calls nothing but what is on the allow-list.

It is slower than torch's. Of all that known writers write, it makes only the plans that Megatron-Core keeps, when
somebody asks for them; else what may be damaged or hostile.
"""

from __future__ import annotations

import collections
import copyreg
import importlib.util
import io
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch

from dcp_fast._native import METADATA_DTYPES
from dcp_fast._torch import PROPERTIES_HAVE_STRIDES, get_layout
from dcp_fast.metadata.allowed import DATA_CLASSES, ENUMS, PROPERTIES, find_allowed
from dcp_fast.names import cut
from dcp_fast.unpickling import RefusedError, cost_of, expect, refused_opcode
from dcp_fast.values.unpickler import InertUnpickler


class MissingError(RefusedError):
    """torch's own unpickler could not do it here either."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what)
        self.why = why


class MetadataUnpickler(InertUnpickler):
    """Unpickles metadata."""

    load_newobj_ex = refused_opcode("NEWOBJ_EX")

    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled), len(pickled))

    def find_class(self, module: str, name: str) -> Any:
        found = find_allowed(module, name, self.proto)
        if found is None:
            raise _refused_global(module, name, self.proto)
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise MissingError("a persistent id", "which no writer of metadata uses and no reader of it knows")

    def load_reduce(self) -> None:
        self._call(_call)

    def load_newobj(self) -> None:
        self._call(_new)

    def _call(self, of_metadata: Callable[[Any, Any], Any]) -> None:
        arguments = self.stack.pop()
        expect(type(arguments) is tuple, "arguments that are no tuple")
        function = self.stack[-1]
        if self.makes(function):
            expect(function is not collections.OrderedDict or not arguments, "a dict with arguments")
            self.stack[-1] = self.make(function, arguments)
            return
        made = self.stack[-1] = of_metadata(function, arguments)
        self.pay(max(cost_of(arguments), cost_of((made,))))

    def load_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        self.pay(cost_of(state if type(state) is tuple else (state,)))
        if self.is_stateless(made):
            self.set_state(made, state)
        else:
            _set_fields(made, state)


def _refused_global(module: str, name: str, protocol: int) -> RefusedError:
    what = cut(f"{module}.{name}")
    if module == "torch" and name in METADATA_DTYPES:
        return MissingError(f"the dtype {what}", f"which torch {torch.__version__} does not have")
    # Below protocol 3 modules have names of Python 2.
    if (protocol >= 3 or module == "torch") and (missing := _what_is_missing(module, name)):
        return MissingError(
            f"the global {what}",
            f"which is not on the list of what is made of metadata. torch could not unpickle it here either: "
            f"there is no {cut(missing)}",
        )
    return RefusedError(f"the global {what}")


def _what_is_missing(module: str, name: str) -> str:
    """What keeps a global from being found here; empty if it is there, or if only an import could tell."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return ""
    for end in range(1, len(parts) + 1):
        part = ".".join(parts[:end])
        if part in sys.modules:
            continue
        parent = sys.modules.get(part.rpartition(".")[0])
        if end > 1 and not hasattr(parent, "__path__"):
            return f"module {part}"
        # All that it is in is imported, so that nothing is to find out about it.
        return "" if importlib.util.find_spec(part) is not None else f"module {part}"
    found = sys.modules[module]
    names = getattr(found, "__dict__", None)
    first = name.partition(".")[0]
    if found is torch and isinstance(names, dict):
        # What else it has is a module that it imports later, or has an old name, such as has_cuda and set_vital.
        is_old = first.startswith(("has_", "set_"))
        is_there = first in names or is_old or (first.isidentifier() and importlib.util.find_spec(f"torch.{first}"))
        return "" if is_there else f"{name} in torch {torch.__version__}"
    if not isinstance(names, dict) or "__getattr__" in names or hasattr(type(found), "__getattr__"):
        return ""
    return "" if first in names else f"{name} in module {module}"


# What is not on the allow-list may be built so that its hash, its text or a comparison takes time and memory without
# bounds: a hundred bytes of nested tuples will do. So nothing but types and functions is hashed, compared or shown.


def _is_one_of(value: Any, allowed: Collection[Any]) -> bool:
    return any(value is each for each in allowed)


def _name(value: Any) -> str:
    return value.__qualname__ if isinstance(value, type) else f"a {type(value).__name__}"


def _call(function: Any, arguments: Any) -> Any:
    """What metadata may call, with the arguments that it may pass."""
    kinds = [type(argument) for argument in arguments]
    if function is torch.Size:
        return _new(function, arguments)
    if function is torch.device:  # in a field of a later torch
        expect(kinds in ([str], [str, int]), "a device that is no text")
        return function(*arguments)
    if function is get_layout:
        expect(kinds == [str], "a layout that is no text")
    elif _is_one_of(function, ENUMS):
        expect(kinds == [int], "an enum of no number")
    elif function is getattr:  # how Python 3.11 pickles the members of enums
        expect(len(arguments) == 2 and kinds[1] is str, "getattr of other than an enum")
        expect(_is_one_of(arguments[0], ENUMS), "getattr of other than an enum")
        return arguments[0][arguments[1]]
    elif function is copyreg._reconstructor:  # type: ignore[attr-defined]
        expect(len(arguments) == 3, "_reconstructor of other than an object")
        expect(arguments[1] is object and arguments[2] is None, "_reconstructor of other than an object")
        return _new(arguments[0], ())
    elif function is dict:
        expect(not arguments, "a dict with arguments")
    else:
        raise RefusedError(f"a call of {_name(function)}")
    return function(*arguments)


def _new(cls: Any, arguments: Any) -> Any:
    if cls is torch.Size:
        expect(len(arguments) == 1, "a torch.Size of other than numbers")
        (numbers,) = arguments
        expect(type(numbers) in (tuple, list, torch.Size), "a torch.Size of other than numbers")
        expect(all(type(number) is int for number in numbers), "a torch.Size of other than numbers")
        return torch.Size(numbers)
    if not _is_one_of(cls, (*DATA_CLASSES, *PROPERTIES)) or arguments:
        raise RefusedError(f"an object of {_name(cls)}")
    return object.__new__(cls)


def _set_fields(instance: Any, state: Any) -> None:
    cls = type(instance)
    if cls in PROPERTIES:
        kinds = [type(part) for part in state] if type(state) is tuple else []
        expect(kinds[:5] == [torch.dtype, torch.layout, bool, PROPERTIES[cls], bool], "properties of other types")
        strides = state[5] if len(state) > 5 else None
        expect(
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
            what = cut(name) if type(name) is str else f"a {type(name).__name__}"
            raise RefusedError(f"the field {what!r} of a {cls.__name__}")
    vars(instance).update(state)
