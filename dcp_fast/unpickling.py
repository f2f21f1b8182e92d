"""What the unpicklers of metadata and of bytes entries share. They call nothing but what they allow.

Python's own unpickler in C lets a pickle set attributes of classes, and call any class that it may name. So these are
the one in Python, in which each opcode that acts is replaced.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import pickletools
import types
from collections.abc import Callable, Iterable
from typing import IO, Any, ClassVar

import torch

# Their values have whatever attributes a pickle gives them.
NAMESPACES: tuple[type, ...] = (argparse.Namespace, types.SimpleNamespace)
_Unpickler: Any = pickle._Unpickler
_METHODS = frozenset(method.__name__ for method in _Unpickler.dispatch.values())
_PROTOCOLS = {opcode.name: opcode.proto for opcode in pickletools.opcodes}
# A call may be passed the same megabyte any number of times, by a few bytes each. What a writer passes to a call is in
# the file once, with at least 2 bytes for an item of a set and 4 for a key and its value. So these many times the file
# are enough for all that is intact, at the costs below.
_LEAST_COPIED = 64 << 20
_MOST_COPIES = 32
_MAPPINGS = (dict, collections.OrderedDict, collections.Counter, collections.defaultdict)
# Bytes of memory that an item takes, or may take in a copy.
_COSTS: dict[type, int] = {
    **dict.fromkeys((bytes, bytearray), 1),
    str: 4,
    **dict.fromkeys((list, tuple, torch.Size, collections.deque), 8),
    **dict.fromkeys((set, frozenset), 60),
    **dict.fromkeys(_MAPPINGS, 100),
}


class RefusedError(Exception):
    """A pickle asks for what is not allowed. The argument says what.

    Attributes:
        globals: of a bytes entry, what ``torch.serialization.add_safe_globals`` would have to allow, as
            ``module.name``; empty if that does not help.
    """

    def __init__(self, what: str, *globals: str) -> None:
        super().__init__(what)
        self.globals = globals


def expect(condition: bool, otherwise: str) -> None:
    """Raise RefusedError unless a condition holds."""
    if not condition:
        raise RefusedError(otherwise)


def check_attributes(cls: type, state: Any) -> None:
    """Refuse attributes that would stand in front of what the class has, such as ``__setstate__``."""
    expect(type(state) is dict and all(type(key) is str for key in state), f"a {cls.__name__} with another state")
    hidden = [key for key in state if key.startswith("__") or hasattr(cls, key)]
    expect(not hidden, f"a {cls.__name__} with attributes that hide its methods")


def cost_of(values: Iterable[Any]) -> int:
    """Bytes that copies of all values take, without what is in them."""
    return sum(_COSTS[type(value)] * len(value) for value in values if type(value) in _COSTS)


def refused_opcode(name: str) -> Callable[[Any], None]:
    """What an unpickler does about an opcode that no pickle needs here."""

    def refuse(self: RestrictedUnpickler) -> None:
        raise RefusedError(f"{name} of pickle protocol {_PROTOCOLS[name]}")

    return refuse


class RestrictedUnpickler(_Unpickler):  # type: ignore[misc]
    """Unpickles once, by ``load()``. Raises RefusedError, or whatever Python's unpickler raises for damage.

    Subclasses say what is called, and what gets a state.

    Args:
        file: holds the pickle.
        size: bytes of what the pickle is a part of.
        encoding: of texts that Python 2 wrote.
    """

    lists: ClassVar[tuple[type, ...]] = (list,)  # what may be given items
    dicts: ClassVar[tuple[type, ...]] = (dict, collections.OrderedDict)
    dispatch: ClassVar[dict[int, Callable[[Any], None]]]

    def __init_subclass__(cls) -> None:
        # Python's unpickler has its methods in a table, by opcode. Those of the subclass take their places.
        # torch derives a class for each entry that it reads, which has none of them.
        (base, *others) = cls.__bases__
        if others or base is RestrictedUnpickler or not _METHODS.isdisjoint(vars(cls)):
            cls.dispatch = {code: getattr(cls, method.__name__) for code, method in _Unpickler.dispatch.items()}

    def __init__(self, file: IO[bytes], size: int, *, encoding: str = "ASCII") -> None:
        super().__init__(file, encoding=encoding)
        self._file = file
        self._may_copy = _LEAST_COPIED + _MOST_COPIES * size

    def position(self) -> int:
        """How many bytes have been read, without what the frame at hand has left."""
        frame = getattr(self, "_unframer", None) and self._unframer.current_frame
        return self._file.tell() - (len(frame.getbuffer()) - frame.tell() if frame else 0)

    def pay(self, cost: int) -> None:
        """Take bytes that are copied from what may be."""
        self._may_copy -= cost
        expect(self._may_copy >= 0, "many copies of the same")

    def may_fill(self, target: Any, kinds: tuple[type, ...]) -> bool:
        """Whether a value may be given items or keys."""
        cls = type(target)
        return any(cls is kind for kind in kinds)

    @staticmethod
    def check_key(key: Any) -> None:
        """Refuse keys whose hash runs code or takes forever."""
        raise NotImplementedError

    def _check_keys(self, keys: list[Any]) -> None:
        check = self.check_key
        for key in keys:
            check(key)

    load_ext1 = refused_opcode("EXT1")  # the registry of extensions is of the process
    load_ext2 = refused_opcode("EXT2")
    load_ext4 = refused_opcode("EXT4")
    load_inst = refused_opcode("INST")
    load_obj = refused_opcode("OBJ")
    load_next_buffer = refused_opcode("NEXT_BUFFER")
    load_readonly_buffer = refused_opcode("READONLY_BUFFER")

    def load_append(self) -> None:
        expect(self.may_fill(self.stack[-2], self.lists), "items for what is no list")
        super().load_append()

    def load_appends(self) -> None:
        expect(self.may_fill(self.metastack[-1][-1], self.lists), "items for what is no list")
        super().load_appends()

    def load_additems(self) -> None:
        expect(self.may_fill(self.metastack[-1][-1], (set,)), "items for what is no set")
        self._check_keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        self._check_keys(self.stack)
        super().load_frozenset()

    def load_dict(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_dict()

    def load_setitem(self) -> None:
        expect(self.may_fill(self.stack[-3], self.dicts), "keys for what is no dict")
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        expect(self.may_fill(self.metastack[-1][-1], self.dicts), "keys for what is no dict")
        self._check_keys(self.stack[::2])
        super().load_setitems()
