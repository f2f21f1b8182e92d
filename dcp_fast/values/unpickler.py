"""Unpickles the value of a bytes entry, and calls nothing but what makes inert values, with arguments that are meant.

Fields of metadata that a later torch may have are made by the same base, and hold nothing but values of inert types.

torch's restricted unpickler knows the opcodes of protocol 2 alone, and calls what is on its list with any arguments.
What this one makes is what ``pickle`` makes.
What somebody allowed by ``torch.serialization.add_safe_globals`` is called as ``pickle`` calls it, where it is asked
for more than inert values.
"""

from __future__ import annotations

import collections
import datetime
import enum
import functools
import io
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import IO, Any

import torch

from dcp_fast._torch import weights_only_unpickler
from dcp_fast.names import shown
from dcp_fast.unpickling import ITEM_OF_SET, RefusedError, RestrictedUnpickler, cost_of, expect, refused_opcode
from dcp_fast.values import arrays
from dcp_fast.values.inert import CALLS, CONSTANTS, STATES, keys_of
from dcp_fast.values.tensors import call_of_torch, known_to_torch, set_tensor


def find_inert(name: str) -> tuple[Any] | None:
    """What a global stands for that makes inert values; None for any other."""
    for calls in (CALLS, arrays.calls() if name.startswith("numpy.") else {}):
        if name in calls:
            return (calls[name][0],)
    return (CONSTANTS[name],) if name in CONSTANTS else None


@functools.lru_cache(maxsize=1)
def _makers() -> dict[int, Callable[..., Any]]:
    """What makes one, by the id of what a pickle calls."""
    return {id(called): make for calls in (CALLS, arrays.calls()) for called, make in calls.values()}


class InertUnpickler(RestrictedUnpickler):
    """Base of what unpickles values of inert types, among others."""

    lists = (list, collections.deque)
    dicts = (dict, collections.OrderedDict, collections.Counter, collections.defaultdict)

    def __init__(self, file: IO[bytes], size: int, *, encoding: str = "ASCII") -> None:
        super().__init__(file, size, encoding=encoding)
        self._stateless: dict[int, Any] = {}  # by id, what may be given a state: once, and only what this pickle made

    @staticmethod
    def makes(function: Any) -> bool:
        """Whether a function or class is called by :meth:`make`."""
        return id(function) in _makers()

    def make(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """What a function makes of the arguments that Python's own pickling writes."""
        self._expect_states(arguments)
        keys = keys_of(function, arguments)
        self.check_keys(keys)
        cost = max(cost_of(arguments), ITEM_OF_SET * len(keys))
        self.pay(cost)
        made = _makers()[id(function)](*arguments)
        # What is made of one argument is bounded. It is the copies after it that must end, and those of equal keys.
        self.pay(max(0, cost_of((made,)) - cost))
        if type(made) in STATES or arrays.state_setter(made) is not None:
            self._stateless[id(made)] = made
        return made

    def is_stateless(self, value: Any) -> bool:
        """Whether a value was made, and was given no state yet."""
        return id(value) in self._stateless

    def _expect_states(self, values: Iterable[Any]) -> None:
        """Refuse dtypes and arrays that are to get a state later, when nobody asks whether that fits what has them."""
        for value in values:
            fresh = self.is_stateless(value) and arrays.state_setter(value) is not None
            expect(not fresh, "what is made of a dtype or an array that has no state yet")

    def set_state(self, made: Any, state: Any) -> None:
        """Give a value that is stateless its state."""
        self._expect_states(arrays.parts_of(state))
        del self._stateless[id(made)]
        setter = STATES.get(type(made)) or arrays.state_setter(made)
        assert setter is not None  # or it would not wait for a state
        setter(made, state)

    # It takes memory before it is there.
    def load_bytearray8(self) -> None:
        length = int.from_bytes(self.read(8), "little")
        at = self._file.tell()
        end = self._file.seek(0, io.SEEK_END)
        self._file.seek(at)
        content = bytearray(self.read(length)) if length <= end - self.position() else bytearray()
        if len(content) != length:
            raise EOFError("a bytearray beyond the end of the pickle")
        self.append(content)


# They have an object do their work: a defaultdict what it makes values of, the others a zone.
_TAKE_OBJECTS: tuple[type, ...] = (collections.defaultdict, datetime.datetime, datetime.time)


def users_globals() -> dict[str, Any]:
    """What ``torch.serialization.add_safe_globals`` allows, by the names in a pickle."""
    users: dict[str, Any] = weights_only_unpickler._get_user_allowed_globals()  # type: ignore[no-untyped-call]
    return users


def python3_name(module: str, name: str) -> tuple[str, str]:
    """A global of a pickle below protocol 3, which has the names of Python 2."""
    return NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))


@functools.lru_cache(maxsize=1)
def _known_by_id() -> dict[int, Any]:
    return {id(known): known for known in known_to_torch().values()}


def find_allowed(name: str) -> tuple[Any] | None:
    """What a name of the allow-lists stands for; None if it is on none."""
    if found := find_inert(name):
        return found
    if name in (known := known_to_torch()):
        return (known[name],)
    return (getattr,) if name == "builtins.getattr" else None  # of enums: see _call


class Unpickler(InertUnpickler):
    """Unpickles bytes entries.

    Attributes:
        entry_size: bytes of the entry that the pickle is a part of.
        storage_sizes: bytes of each storage of an archive, by its key; empty if the entry is no archive.
    """

    entry_size: int = 0
    storage_sizes: Mapping[str, int] = MappingProxyType({})
    load_persid = refused_opcode("PERSID")

    def __init__(
        self, file: IO[bytes], *, encoding: str = "ASCII", bounds: tuple[int, Mapping[str, int]] | None = None
    ) -> None:
        if bounds is not None:  # else a class derived from this one has them
            self.entry_size, self.storage_sizes = bounds
        super().__init__(file, self.entry_size, encoding=encoding)
        self._users = users_globals()
        self._users_by_id = {id(allowed): allowed for allowed in self._users.values()}
        self._storages: dict[str, int] = {}  # bytes, by key
        self._unclaimed = self.entry_size

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:
            module, name = python3_name(module, name)
        full_name = f"{module}.{name}"
        if module not in weights_only_unpickler._blocklisted_modules:
            if full_name in self._users:
                return self._users[full_name]
            if found := find_allowed(full_name):
                return found[0]
        raise RefusedError(f"the global {shown(full_name)}", full_name)

    def may_fill(self, target: Any, kinds: tuple[type, ...]) -> bool:
        return super().may_fill(target, kinds) or self._is_users(type(target))

    def _is_users(self, value: Any) -> bool:
        return id(value) in self._users_by_id

    def _trusts(self, arguments: tuple[Any, ...]) -> bool:
        """Whether the last argument is a class that somebody allowed, or an object of one."""
        last = arguments[-1] if arguments else None
        return self._is_users(last) or self._is_users(type(last))

    # What acts. What somebody allows only adds to what is made anyway: it is asked for once that is refused.

    def _call(self, function: Any, arguments: Any) -> Any:
        takes_objects = any(function is each for each in _TAKE_OBJECTS)
        try:
            return self._call_inert(function, arguments)
        except RefusedError:
            expect(type(arguments) is tuple, "a call with arguments that are no tuple")
            if not self._is_users(function) and not (takes_objects and self._trusts(arguments)):
                raise
        return function(*arguments)

    def _call_inert(self, function: Any, arguments: Any) -> Any:
        """What a call makes that nobody has to allow."""
        expect(type(arguments) is tuple, "a call with arguments that are no tuple")
        if self.makes(function):
            return self.make(function, arguments)
        if function is getattr and not self._is_users(getattr):
            return self._enum_member(arguments)
        self._expect_states(arguments)
        if id(function) not in _known_by_id():
            raise RefusedError(f"a call of {_name(function)}")
        return call_of_torch(function, arguments, self._users_by_id, self.pay)

    def _enum_member(self, arguments: tuple[Any, ...]) -> Any:
        """As Python 3.11 first pickled the members of enums."""
        expect(len(arguments) == 2 and type(arguments[1]) is str, "getattr of other than an enum")
        cls, name = arguments
        expect(self._is_users(cls) and isinstance(cls, enum.EnumMeta), "getattr of other than an enum")
        return cls[name]

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        self._new(self.stack.pop(), {})

    def load_newobj_ex(self) -> None:
        keywords = self.stack.pop()
        self._new(self.stack.pop(), keywords)

    def _new(self, arguments: Any, keywords: Any) -> None:
        cls = self.stack[-1]
        try:
            expect(type(keywords) is dict and not keywords, "an object with arguments by name")
            self.stack[-1] = self._call_inert(cls, arguments)
        except RefusedError:
            if not self._is_users(cls):
                raise
            self.stack[-1] = cls.__new__(cls, *arguments, **keywords)

    def load_build(self) -> None:
        made, state = self.stack[-2:]
        try:
            self._set_inert(made, state)
        except RefusedError:
            if not self._is_users(type(made)):
                raise
        else:
            self.stack.pop()
            return
        # pickle takes a method of the object's own for one of its class, and so calls what nobody has checked.
        expect("__setstate__" not in getattr(made, "__dict__", ()), "an object that sets its state by a function")
        self._stateless.pop(id(made), None)
        super().load_build()

    def _set_inert(self, made: Any, state: Any) -> None:
        """Set a state that nobody has to allow."""
        cls = type(made)
        is_tensor = cls is torch.Tensor or cls is torch.nn.Parameter
        if not is_tensor and not self.is_stateless(made):
            name = f"{cls.__module__}.{cls.__qualname__}"
            raise RefusedError(f"a state of a {name}", *([] if find_allowed(name) else [name]))
        self.pay(cost_of(state if type(state) is tuple else (state,)))
        if is_tensor:
            set_tensor(made, state)
        else:
            self.set_state(made, state)

    def load_binpersid(self) -> None:
        pid = self.stack[-1]
        is_storage = type(pid) is tuple and len(pid) in (5, 6) and type(pid[0]) in (str, bytes)
        expect(is_storage and pid[0] in ("storage", b"storage"), "a persistent id that is no storage")
        _, kind, key, location, count = pid[:5]
        typed = isinstance(kind, torch.serialization.StorageType)
        known = (typed or kind is torch.UntypedStorage) and type(key) is str and type(location) in (str, bytes)
        if not known or type(count) is not int or count < 0:
            raise ValueError("a storage without a type, a key or a size")
        length = count * (kind.dtype.itemsize if typed else 1)
        if length > self.storage_sizes.get(key, -1 if self.storage_sizes else self.entry_size):
            raise ValueError(f"storage {key!r} of {length} bytes, which the entry does not have")
        # The records of an archive may lie upon each other, and nothing tells where those of the earlier format lie.
        if length > self._storages.get(key, 0):
            self._unclaimed -= length - self._storages.get(key, 0)
            self._storages[key] = length
        if self._unclaimed < 0:
            raise ValueError(f"storages of more bytes than the {self.entry_size} of the entry")
        super().load_binpersid()


def _name(value: Any) -> str:
    # Nothing but a class is shown: the text of anything else may take forever.
    return (
        f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else f"a value ({type(value).__name__})"
    )
