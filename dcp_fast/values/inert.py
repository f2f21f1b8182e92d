"""Types of Python's own library whose values are inert, and how each is made.

A pickle makes an object by a call, and may then set its state. The arguments are those that Python's own pickling of
the type writes, and nothing else: they can neither run code nor take more memory than a small multiple of the entry.
Whatever iterates over an argument wants a list or the like, since a ``range`` of a few bytes has any number of items.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import datetime
import decimal
import fractions
import io
import pathlib
import re
import types
import uuid
from collections.abc import Callable
from typing import Any

from dcp_fast.unpickling import NAMESPACES, RefusedError, check_attributes, expect

_NONE = type(None)
# What a defaultdict may make when a key is missing: without arguments each of these makes something empty.
_FACTORIES: tuple[type, ...] = (
    *(bool, bytearray, bytes, complex, dict, float, frozenset, int, list, set, str, tuple),
    *(collections.Counter, collections.OrderedDict, collections.defaultdict, collections.deque),
)
# Beyond these a number of a few bytes is one of any size, once somebody makes an integer of it.
_MOST_DECIMAL_EXPONENT = 2_000_000  # Python's default context rounds to a million
_MOST_FRACTION_BITS = 1 << 17
_FRACTION = re.compile(r"-?[0-9]{1,4000}(/[0-9]{1,4000})?")


def expect_kinds(name: str, arguments: tuple[Any, ...], *allowed: tuple[type, ...]) -> None:
    """Refuse arguments of a call unless their exact types are one of the rows.

    Subclasses are refused: they may have methods of their own.
    """
    if tuple(map(type, arguments)) not in allowed:
        raise RefusedError(f"a call of {name} with arguments that no writer gives it")


# Calls


def _encode(*arguments: Any) -> bytes:
    """``_codecs.encode``, as bytes are written below protocol 3. Other codecs may be anything."""
    expect_kinds("_codecs.encode", arguments, (str, str))
    expect(arguments[1] == "latin1", "_codecs.encode with another codec than latin1")
    return arguments[0].encode("latin1")  # type: ignore[no-any-return]


def _bytearray(*arguments: Any) -> bytearray:
    expect_kinds("bytearray", arguments, (), (bytes,), (str, str))
    if len(arguments) < 2:
        return bytearray(*arguments)
    expect(arguments[1] == "latin-1", "bytearray with another codec than latin-1")
    return bytearray(arguments[0], "latin-1")


def _items(name: str, arguments: tuple[Any, ...]) -> Any:
    expect_kinds(name, arguments, (), (list,), (tuple,), (set,), (frozenset,))
    return arguments[0] if arguments else ()


def _set(*arguments: Any) -> set[Any]:
    return set(_items("set", arguments))


def _frozenset(*arguments: Any) -> frozenset[Any]:
    return frozenset(_items("frozenset", arguments))


def _complex(*arguments: Any) -> complex:
    expect_kinds("complex", arguments, (float, float))
    return complex(*arguments)


def _range(*arguments: Any) -> range:
    expect_kinds("range", arguments, (int,), (int, int), (int, int, int))
    return range(*arguments)


def _slice(*arguments: Any) -> slice:
    expect(len(arguments) == 3, "a slice of other than three parts")
    return slice(*arguments)


def _ordered_dict(*arguments: Any) -> Any:
    expect_kinds("collections.OrderedDict", arguments, (), (list,))
    made: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    for pair in arguments[0] if arguments else ():  # as Python 2 wrote it
        expect(type(pair) in (list, tuple) and len(pair) == 2, "an OrderedDict of other than pairs")
        made[pair[0]] = pair[1]
    return made


def _counter(*arguments: Any) -> Any:
    expect_kinds("collections.Counter", arguments, (), (dict,))
    return collections.Counter(*arguments)


def _deque(*arguments: Any) -> Any:
    name = "collections.deque"
    expect_kinds(name, arguments, (), *((items, *most) for items in (tuple, list) for most in ((), (int,), (_NONE,))))
    return collections.deque(*arguments)


def _default_dict(*arguments: Any) -> Any:
    expect(len(arguments) <= 1, "a defaultdict with more than a factory")
    factory = arguments[0] if arguments else None
    expect(
        factory is None or any(factory is known for known in _FACTORIES), "a defaultdict with a factory that is code"
    )
    return collections.defaultdict(factory)


def _with_zone(cls: Any, length: int) -> Callable[..., Any]:
    name = f"datetime.{cls.__name__}"

    def make(*arguments: Any) -> Any:
        zone = arguments[-1] if arguments else None
        if isinstance(zone, datetime.tzinfo) and type(zone) is not datetime.timezone:
            raise RefusedError("a zone of a class of its own", name)
        expect_kinds(name, arguments, (bytes,), (bytes, datetime.timezone))
        expect(len(arguments[0]) == length, f"a {name} of other than {length} bytes")
        return cls(*arguments)

    return make


def _date(*arguments: Any) -> datetime.date:
    expect_kinds("datetime.date", arguments, (bytes,))
    expect(len(arguments[0]) == 4, "a datetime.date of other than 4 bytes")
    return datetime.date(*arguments)


def _timedelta(*arguments: Any) -> datetime.timedelta:
    expect_kinds("datetime.timedelta", arguments, (int, int, int))
    return datetime.timedelta(*arguments)


def _timezone(*arguments: Any) -> datetime.timezone:
    expect_kinds("datetime.timezone", arguments, (datetime.timedelta,), (datetime.timedelta, str))
    return datetime.timezone(*arguments)


def _path(cls: Callable[..., Any], name: str) -> Callable[..., Any]:
    def make(*arguments: Any) -> Any:
        expect(all(type(part) is str for part in arguments), f"a call of pathlib.{name} with other than texts")
        return cls(*arguments)

    return make


def _decimal(*arguments: Any) -> decimal.Decimal:
    expect_kinds("decimal.Decimal", arguments, (str,))
    made = decimal.Decimal(*arguments)
    bounded = not made.is_finite() or not made or abs(made.adjusted()) <= _MOST_DECIMAL_EXPONENT
    expect(bounded, "a decimal.Decimal without bounds")
    return made


def _fraction(*arguments: Any) -> fractions.Fraction:
    expect_kinds("fractions.Fraction", arguments, (str,), (int, int))
    if type(arguments[0]) is str:
        # In other forms, such as "1e9", few characters make a number of any size.
        expect(_FRACTION.fullmatch(arguments[0]) is not None, "a fractions.Fraction in another form")
    else:
        bounded = all(number.bit_length() <= _MOST_FRACTION_BITS for number in arguments)
        expect(bounded, "a fractions.Fraction without bounds")
    return fractions.Fraction(*arguments)


def _empty(cls: Any, name: str) -> Callable[..., Any]:
    def make(*arguments: Any) -> Any:
        expect(not arguments, f"a call of {name} with arguments")
        return cls.__new__(cls)

    return make


# pathlib has other names in Python 3.13. A path of Windows, which only Windows can make, is one without a system.
_PURE_WINDOWS = _path(pathlib.PureWindowsPath, "PureWindowsPath")
_PATHS = {
    f"{module}.{name}": (cls, make)
    for module in ("pathlib", "pathlib._local")
    for name, cls, make in (
        ("PosixPath", pathlib.PosixPath, _path(pathlib.PosixPath, "PosixPath")),
        ("PurePosixPath", pathlib.PurePosixPath, _path(pathlib.PurePosixPath, "PurePosixPath")),
        ("PureWindowsPath", pathlib.PureWindowsPath, _PURE_WINDOWS),
        ("WindowsPath", pathlib.WindowsPath, _PURE_WINDOWS),
    )
}

# By the name in a pickle: what it stands for, and what makes one of the arguments of a call.
CALLS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "_codecs.encode": (codecs.encode, _encode),
    "_io.BytesIO": (io.BytesIO, _empty(io.BytesIO, "io.BytesIO")),
    "argparse.Namespace": (argparse.Namespace, _empty(argparse.Namespace, "argparse.Namespace")),
    "builtins.bytearray": (bytearray, _bytearray),
    "builtins.bytes": (bytes, _empty(bytes, "bytes")),  # as nothing is written below protocol 3
    "builtins.complex": (complex, _complex),
    "builtins.frozenset": (frozenset, _frozenset),
    "builtins.range": (range, _range),
    "builtins.set": (set, _set),
    "builtins.slice": (slice, _slice),
    "collections.Counter": (collections.Counter, _counter),
    "collections.OrderedDict": (collections.OrderedDict, _ordered_dict),
    "collections.defaultdict": (collections.defaultdict, _default_dict),
    "collections.deque": (collections.deque, _deque),
    "datetime.date": (datetime.date, _date),
    "datetime.datetime": (datetime.datetime, _with_zone(datetime.datetime, 10)),
    "datetime.time": (datetime.time, _with_zone(datetime.time, 6)),
    "datetime.timedelta": (datetime.timedelta, _timedelta),
    "datetime.timezone": (datetime.timezone, _timezone),
    "decimal.Decimal": (decimal.Decimal, _decimal),
    "fractions.Fraction": (fractions.Fraction, _fraction),
    "types.SimpleNamespace": (types.SimpleNamespace, _empty(types.SimpleNamespace, "types.SimpleNamespace")),
    "uuid.UUID": (uuid.UUID, _empty(uuid.UUID, "uuid.UUID")),
    **_PATHS,
}
_SETS = (list, tuple, set, frozenset)  # what one is made of


def keys_of(function: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """What a call takes for keys of a dict or items of a set. The call itself refuses what is none."""
    given = arguments[0] if arguments else ()
    if function is set or function is frozenset:
        return list(given) if type(given) in _SETS else []
    if function is collections.OrderedDict and type(given) is list:
        return [pair[0] for pair in given if type(pair) in (list, tuple) and pair]
    return list(given) if function is collections.Counter and type(given) is dict else []


# What is only named, never called.
CONSTANTS: dict[str, Any] = {
    "builtins.Ellipsis": Ellipsis,
    **{f"{cls.__module__}.{cls.__qualname__}": cls for cls in _FACTORIES},
}


# States


def _bytes_io(made: io.BytesIO, state: Any) -> None:
    expect(type(state) is tuple and len(state) == 3, "an io.BytesIO with another state")
    content, position, attributes = state
    expect(type(content) is bytes and type(position) is int, "an io.BytesIO with another state")
    # What is written far behind the end fills all the room before it.
    expect(0 <= position <= len(content), "an io.BytesIO that is past its end")
    expect(attributes is None or (type(attributes) is dict and not attributes), "an io.BytesIO with attributes")
    made.__setstate__(state)  # type: ignore[attr-defined]


def _uuid(made: uuid.UUID, state: Any) -> None:
    known = type(state) is dict and "int" in state and len(state) == 1 + ("is_safe" in state)
    expect(known, "a uuid.UUID with other fields")
    expect(type(state["int"]) is int and 0 <= state["int"] < 1 << 128, "a uuid.UUID of other than 128 bits")
    if "is_safe" in state:
        safe = state["is_safe"]
        expect(type(safe) in (int, _NONE) and safe in (0, -1, None), "a uuid.UUID of unknown safety")
    made.__setstate__(state)  # type: ignore[attr-defined]


def _attributes(made: Any, state: Any) -> None:
    check_attributes(type(made), state)
    vars(made).update(state)


STATES: dict[type, Callable[[Any, Any], None]] = {
    **dict.fromkeys((collections.OrderedDict, *NAMESPACES), _attributes),
    io.BytesIO: _bytes_io,
    uuid.UUID: _uuid,
}
