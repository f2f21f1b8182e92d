"""What the unpicklers of metadata and of bytes entries share. They call nothing but what they allow.

Python's own unpickler in C lets a pickle set attributes of classes, and call any class that it may name. So these are
the one in Python, in which each opcode that acts is replaced.
"""

from __future__ import annotations

import argparse
import collections
import fractions
import pathlib
import pickle
import pickletools
import struct
import sys
import types
from collections.abc import Callable, Collection, Iterable
from decimal import Decimal
from typing import IO, Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

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
ITEM_OF_SET = 60
# Bytes of memory that an item takes, or may take in a copy.
_COSTS: dict[type, int] = {
    **dict.fromkeys((bytes, bytearray), 1),
    str: 4,
    **dict.fromkeys((list, tuple, torch.Size, collections.deque), 8),
    **dict.fromkeys((set, frozenset), ITEM_OF_SET),
    **dict.fromkeys(_MAPPINGS, 100),
}
# A key is hashed and compared as a tree, in which what is shared stands as often as it is reached.
_MOST_KEY_PARTS = 10_000
_KEY_PART = 8
_HASH_MODULUS = sys.hash_info.modulus  # numbers that differ by a multiple of it have the same hash
_MOST_UNPAID = 1 << 20
_LEAST_PLACES = 1 << 16
_SLOW_KEYS = "keys that take long to hash or to compare"
_ATOMS = frozenset({int, float, str, bytes, bool, type(None)})
_MOST_KEY_NUMBER = 1024  # bytes of an object
_MOST_KEY_DIGITS = 2000


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
    """Bytes that copies of all values take, without what is in them; of numbers the work that a call does."""
    cost = 0
    for value in values:
        if type(value) is int:
            # What is made of two numbers may take the product of their sizes.
            cost += (value.bit_length() >> 6) ** 2
        elif type(value) in _COSTS:
            cost += _COSTS[type(value)] * len(value)
    return cost


def refused_opcode(name: str) -> Callable[[Any], None]:
    """What an unpickler does about an opcode that no pickle needs here."""

    def refuse(self: RestrictedUnpickler) -> None:
        raise RefusedError(f"{name} of pickle protocol {_PROTOCOLS[name]}")

    return refuse


class Keys:
    """The keys of dicts and items of sets of one pickle, whose hashes and comparisons must end in time.

    Nested tuples that share their items are hashed, and compared, without end. Keys that have the same hash are
    compared one by one with all others of their dict. Python seeds the hashes of texts and bytes against that, but not
    those of numbers, nor those of what is made of numbers. Here no two keys are compared: those of other dicts may not
    know each other.
    """

    def __init__(self) -> None:
        self._counts: dict[int, dict[int, int]] = {}  # by container, how many of its keys have a hash

    def check(self, keys: Iterable[Any], container: Any, pay: Callable[[int, str], None]) -> None:
        """Take what the keys cost from what may be, and refuse those of too many parts.

        Args:
            keys: before they are used.
            container: the dict or set that they are for; None for a new one.
            pay: takes a cost, and raises the reason once it is too much.
        """
        total = 0
        counts: dict[int, int] = {} if container is None else self._counts.setdefault(id(container), {})
        for key in keys:
            cls = type(key)
            if cls is str or cls is bytes:
                total += len(key) >> 3
            elif cls is not float and (cls is not int or abs(key) >= _HASH_MODULUS):
                # Smaller numbers are their own hash, and at most 34 floats have the same.
                if (
                    cls is tuple
                    and len(key) < _MOST_KEY_PARTS
                    and _ATOMS.issuperset(map(type, key))
                    and (size := sum(map(sys.getsizeof, key))) <= _MOST_KEY_NUMBER
                ):
                    cost = _KEY_PART * (1 + len(key)) + (size >> 3)  # as for other keys, but faster
                else:
                    cost = _cost_of_key(key)
                if cls is MetadataIndex:
                    known = type(key.fqn) in _ATOMS and type(key.offset) in (torch.Size, type(None))
                    expect(known, "an index of other than a name and an offset")
                    key = key.fqn, key.offset  # which is what it is hashed and compared by, in Python
                value = hash(key)
                counts[value] = before = counts.get(value, 0) + 1
                total += cost * before
                if total > _MOST_UNPAID:
                    pay(total, _SLOW_KEYS)
                    total = 0
        pay(total, _SLOW_KEYS)


def _cost_of_key(key: Any) -> int:
    """Bytes that its hash and a comparison look at, and more for each part."""
    cost, left, parts = 0, _MOST_KEY_PARTS, [key]
    while parts:
        part = parts.pop()
        size = sys.getsizeof(part)
        cost += _KEY_PART + (size >> 3)
        if isinstance(part, (int, Decimal)):
            # To compare one with the other takes the square of their digits.
            digits = abs(part.adjusted()) if isinstance(part, Decimal) else 0
            expect(size <= _MOST_KEY_NUMBER and digits <= _MOST_KEY_DIGITS, "a key that is a number of many digits")
        inner = _parts_of(part)
        left -= len(inner)
        expect(left > 0, "a key of tuples without end")
        parts += inner
    return cost


def _parts_of(value: Any) -> Collection[Any]:
    """What the hash of a value is made of, beside its own bytes."""
    cls = type(value)
    if cls in _ATOMS:
        return ()
    if isinstance(value, (tuple, frozenset)):
        return value
    if cls is slice or cls is range:
        return value.start, value.stop, value.step
    if cls is fractions.Fraction:
        return value.numerator, value.denominator
    if isinstance(value, pathlib.PurePath):
        return (str(value),)
    if hasattr(cls, "__dataclass_fields__"):
        return list(getattr(value, "__dict__", {}).values())
    return ()


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
        self._keys = Keys()
        self._most_places = max(size, _LEAST_PLACES)  # in the memo

    def position(self) -> int:
        """How many bytes have been read, without what the frame at hand has left."""
        frame = getattr(self, "_unframer", None) and self._unframer.current_frame
        return self._file.tell() - (len(frame.getbuffer()) - frame.tell() if frame else 0)

    def pay(self, cost: int, otherwise: str = "many copies of the same") -> None:
        """Take bytes that are copied, or that keys are hashed and compared by, from what may be."""
        self._may_copy -= cost
        expect(self._may_copy >= 0, otherwise)

    def may_fill(self, target: Any, kinds: tuple[type, ...]) -> bool:
        """Whether a value may be given items or keys."""
        cls = type(target)
        return any(cls is kind for kind in kinds)

    def check_keys(self, keys: Iterable[Any], container: Any = None) -> None:
        """Refuse keys of a dict or items of a set whose hash, or comparison with others, takes forever.

        Args:
            container: that they are for; None for a new one.
        """
        self._keys.check(keys, container, self.pay)

    load_ext1 = refused_opcode("EXT1")  # the registry of extensions is of the process
    load_ext2 = refused_opcode("EXT2")
    load_ext4 = refused_opcode("EXT4")
    load_inst = refused_opcode("INST")
    load_obj = refused_opcode("OBJ")
    load_next_buffer = refused_opcode("NEXT_BUFFER")
    load_readonly_buffer = refused_opcode("READONLY_BUFFER")

    def load_frame(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        at = self._file.tell()
        self._unframer.load_frame(min(size, sys.maxsize))
        # Python's takes what there is.
        if self._file.tell() - at < size:
            raise pickle.UnpicklingError("pickle data was truncated")

    def _put(self, index: int) -> None:
        # Writers count from zero, and the memo is a dict, in which numbers may be chosen to be in each other's way.
        if not 0 <= index < self._most_places:
            raise ValueError("a memo index beyond what the pickle has room for")
        self.memo[index] = self.stack[-1]

    def load_put(self) -> None:
        self._put(int(self.readline()[:-1]))

    def load_long_binput(self) -> None:
        self._put(int.from_bytes(self.read(4), "little"))

    def load_append(self) -> None:
        expect(self.may_fill(self.stack[-2], self.lists), "items for what is no list")
        super().load_append()

    def load_appends(self) -> None:
        expect(self.may_fill(self.metastack[-1][-1], self.lists), "items for what is no list")
        super().load_appends()

    def load_additems(self) -> None:
        expect(self.may_fill(self.metastack[-1][-1], (set,)), "items for what is no set")
        self.check_keys(self.stack, self.metastack[-1][-1])
        super().load_additems()

    def load_frozenset(self) -> None:
        self.check_keys(self.stack)
        super().load_frozenset()

    def load_dict(self) -> None:
        self.check_keys(self.stack[::2])
        super().load_dict()

    def load_setitem(self) -> None:
        expect(self.may_fill(self.stack[-3], self.dicts), "keys for what is no dict")
        self.check_keys(self.stack[-2:-1], self.stack[-3])
        super().load_setitem()

    def load_setitems(self) -> None:
        expect(self.may_fill(self.metastack[-1][-1], self.dicts), "keys for what is no dict")
        self.check_keys(self.stack[::2], self.metastack[-1][-1])
        super().load_setitems()
