"""Keys of dicts and items of sets that take forever to hash or to compare, and intact ones that look like them."""

from __future__ import annotations

import collections
import datetime
import io
import itertools
import pathlib
import pickle
import struct
import sys
import uuid
from decimal import Decimal
from typing import Any

import numpy
import pytest
import torch
from damage import archive, legacy_record, limited
from hostile_pickles import named, refused, text
from inert_values import record

from dcp_fast import _native
from dcp_fast.errors import CorruptCheckpointError
from dcp_fast.values.load import load_untrusted

MODULUS = sys.hash_info.modulus
LONG = "keys that take long to hash or to compare"


def number(value: int) -> bytes:
    digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return (b"\x8a" + bytes([len(digits)]) if len(digits) < 256 else b"\x8b" + struct.pack("<i", len(digits))) + digits


def tower(levels: int) -> bytes:
    """A frozenset of two tuples that hold the one before: as a tree it has 2 ** levels leaves."""
    step = b"q\0(h\0K\0\x86h\0K\1\x86\x91q\x0100h\1"
    return b"(" + number(10**30) + b"\x91" + step * levels


def dict_of(keys: bytes) -> bytes:
    return b"}(" + keys + b"u"


def list_of(items: bytes) -> bytes:
    return b"](" + items + b"e"


def alike(count: int) -> list[bytes]:
    return [number((i + 10) * MODULUS) for i in range(count)]


def alike_tuples(count: int) -> list[bytes]:
    numbers = [number(i * MODULUS) for i in range(-4, 4)]
    return [b"(" + b"".join(items) + b"t" for items in itertools.islice(itertools.product(numbers, repeat=6), count)]


def alike_complex(count: int) -> list[bytes]:
    made = named("builtins", "complex")
    pairs = [(-1000003.0 * i, float(i)) for i in range(1, count)]
    return [made + b"".join(b"G" + struct.pack(">d", part) for part in pair) + b"\x86R" for pair in pairs]


def alike_uuids(count: int) -> list[bytes]:
    made = named("uuid", "UUID") + b")\x81}" + text("int")
    return [made + number((i + 1) * MODULUS) + b"sb" for i in range(count)]


def called(module: str, name: str, argument: bytes, times: int = 1) -> bytes:
    return named(module, name) + b"q\0(" + argument + b"q\1" + b"0h\0h\1\x85R" * times + b"t"


BIG_TUPLE = b"(" + b"K\1" * 9999 + b"tq\0"
SOME = alike(1500)
ALIKE = b"".join(alike(20_000))
VALUED = b"".join(key + b"N" for key in alike(20_000))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "towers of frozensets in a set": (b"\x8f(" + tower(60) * 2 + b"\x90", "a key of tuples without end"),
    "towers of frozensets in a dict": (dict_of(tower(60) + b"N" + tower(60) + b"N"), "a key of tuples without end"),
    "numbers of one hash in a dict": (dict_of(VALUED), LONG),
    "numbers of one hash in a dict, one by one": (b"}" + b"".join(key + b"Ns" for key in alike(20_000)), LONG),
    "numbers of one hash in a dict by another opcode": (b"(" + VALUED + b"d", LONG),
    "numbers of one hash in a set": (b"\x8f(" + ALIKE + b"\x90", LONG),
    "numbers of one hash in a frozenset": (b"(" + ALIKE + b"\x91", LONG),
    "numbers of one hash in a called set": (called("builtins", "set", list_of(ALIKE)), LONG),
    "numbers of one hash in a called frozenset": (called("builtins", "frozenset", b"(" + ALIKE + b"t"), LONG),
    "numbers of one hash in an OrderedDict": (
        called("collections", "OrderedDict", list_of(b"".join(key + b"N\x86" for key in alike(20_000)))),
        LONG,
    ),
    "numbers of one hash in a defaultdict": (named("collections", "defaultdict") + b")R(" + VALUED + b"u", LONG),
    "numbers of one hash in many Counters": (
        called("collections", "Counter", dict_of(b"".join(key + b"N" for key in SOME)), 3000),
        LONG,
    ),
    "numbers of one hash that are used again": (
        b"(" + b"".join(key + b"q" + bytes([i]) for i, key in enumerate(alike(250))) + b"t}("
        + b"".join(b"h" + bytes([i]) + b"N" for i in range(250)) * 1200 + b"u\x86",
        LONG,
    ),
    "the first number of one hash, behind all others": (
        dict_of(b"".join(key + b"q" + bytes([i % 2]) + b"N" for i, key in enumerate(SOME[:1000])))
        + dict_of(b"".join(key + b"N" for key in SOME[1:1000]) + number(10 * MODULUS) + b"q\2Nh\2N" + b"h\2N" * 200_000)
        + b"\x86",
        LONG,
    ),
    "tuples of one hash": (dict_of(b"".join(key + b"N" for key in alike_tuples(60_000))), LONG),
    "complex numbers of one hash": (dict_of(b"".join(key + b"N" for key in alike_complex(20_000))), LONG),
    "UUIDs of one hash": (dict_of(b"".join(key + b"N" for key in alike_uuids(20_000))), LONG),
    "a large tuple again and again": (BIG_TUPLE + dict_of(b"h\0N" * 60_000) + b"\x86", LONG),
    "a large number again and again": (
        number(1 << 800_000) + b"q\0" + dict_of(b"h\0N" * 100_000) + b"\x86",
        "a key that is a number of many digits",
    ),
    "equal long texts": (
        (b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)) + b"q\0}("
        + (b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)) + b"q\1N" + b"h\0Nh\1N" * 100_000 + b"u\x86",
        LONG,
    ),
    "pairs of an OrderedDict again and again": (
        called("collections", "OrderedDict", list_of(b"K\1K\2\x86" * 100_000), 60),
        "many copies of the same",
    ),
}  # fmt: skip


def test_many_small_dicts_of_keys_of_one_hash() -> None:
    """It is the sum that counts."""
    small = dict_of(b"".join(key + b"N" for key in alike(500)))
    with limited(8):
        assert LONG in refused(archive(b"\x80\x04" + list_of(small * 500) + b".")).reason


def decimal(text_: str) -> bytes:
    return named("decimal", "Decimal") + b"X" + struct.pack("<I", len(text_)) + text_.encode() + b"\x85R"


WORK: dict[str, tuple[bytes, str]] = {
    "a Decimal and a number that are equal": (
        number(10**200_000) + b"q\0" + decimal("1E200000") + b"q\1" + dict_of(b"h\1Nh\0N" * 20) + b"\x87",
        "a key that is a number of many digits",
    ),
    "a Decimal in a tuple": (dict_of(decimal("1E2000") + b"\x85N" + decimal("1E200000") + b"\x85N"), "many digits"),
    "Fractions of long numbers": (
        number((1 << 131_000) - 1) + b"q\0" + number((1 << 131_000) - 3) + b"q\1"
        + list_of((named("fractions", "Fraction") + b"h\0h\1\x86R") * 1000) + b"\x87",
        "many copies of the same",
    ),
    "ranges of long numbers": (
        number(1 << 400_000) + b"q\0" + number(1 << 800_000) + b"q\1"
        + list_of((named("builtins", "range") + b"h\0h\1h\0\x87R") * 1000) + b"\x87",
        "many copies of the same",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE | WORK)
def test_what_takes_forever(name: str) -> None:
    opcodes, reason = (HOSTILE | WORK)[name]
    with limited(8):
        assert reason in refused(archive(b"\x80\x04" + opcodes + b".")).reason


class A:
    def __init__(self, a: int) -> None:
        self.a = a

    def __eq__(self, other: Any) -> bool:
        return bool(self.a == other.a)

    def __hash__(self) -> int:
        return self.a


class B(A):
    def __init__(self, b: int) -> None:
        self.b = self.a = b
        del self.a

    def __eq__(self, other: Any) -> bool:
        return bool(self.b == other.b)

    def __hash__(self) -> int:
        return self.b


def test_keys_of_other_dicts_are_not_compared() -> None:
    """They may have the same hash, and not know each other."""
    value = [{Decimal(5): 1}, {numpy.int64(5): 2}, {5: 3}, {5.0: 4}, {(Decimal(5),): 5}, {(numpy.int64(5),): 6}]
    assert repr(load_untrusted(io.BytesIO(record(value)), "fqn")) == repr(value)
    with torch.serialization.safe_globals([A, B]):
        of_users = load_untrusted(io.BytesIO(record([{A(1): 1}, {B(1): 2}, {1: 3}])), "fqn")
    assert [list(each.values()) for each in of_users] == [[1], [2], [3]]


@pytest.mark.parametrize("name", ["memo", "frame"])
def test_opcodes_that_pickle_refuses(name: str) -> None:
    """A memo whose numbers have one hash; a frame beyond the end."""
    memo = b"N" + b"".join(b"r" + struct.pack("<I", i << 16) for i in range(1 << 16))
    opcodes = {"memo": memo, "frame": b"\x95" + struct.pack("<Q", 1 << 20) + b"\x8f"}[name]
    with limited(8):
        error = refused(archive(b"\x80\x04" + opcodes + b"."))
    assert isinstance(error, CorruptCheckpointError)
    assert {"memo": "a memo index beyond", "frame": "pickle data was truncated"}[name] in error.reason


COUNT = 40_000
INTACT: dict[str, Any] = {
    "tuples": {(i, i + 1, "a"): i for i in range(COUNT)},
    "nested tuples": {((i, "a"), (i, None)): i for i in range(COUNT)},
    "hashes of 64 bits": {i * 0x9E3779B97F4A7C15 % 2**64: i for i in range(COUNT)},
    "floats": {i * 0.37: i for i in range(COUNT)},
    "frozensets": {frozenset((i, i + 1)): i for i in range(COUNT)},
    "dates": {datetime.date(2000, 1, 1) + datetime.timedelta(i): i for i in range(COUNT)},
    "paths": {pathlib.PurePosixPath(f"/data/{i}"): i for i in range(COUNT // 4)},
    "UUIDs": {uuid.UUID(int=i * 0x9E3779B97F4A7C15F39CC060): i for i in range(COUNT // 4)},
    "a large set": set(range(COUNT)) | {-(1 << 70), 1.5, None},
    # -1 and -2 have the same hash.
    "the same keys again and again": [{(-1,): 1, (-2,): 2, 0.5: i, -1.0: 3, -2.0: 4} for i in range(COUNT)],
    "a Counter": collections.Counter({(i % 1000, "a"): i for i in range(COUNT)}),
}


@pytest.mark.parametrize("name", INTACT)
def test_intact_keys(name: str) -> None:
    for entry in (archive(pickle.dumps(INTACT[name], 4)), legacy_record(INTACT[name])):
        with limited(20):
            assert load_untrusted(io.BytesIO(entry), "fqn") == INTACT[name]


def test_what_is_left_to_the_slow_unpickler() -> None:
    """Few long numbers, or floats, of which few have one hash, are read natively."""
    powers = {2.0 ** (61 * power): power for power in range(-16, 16)}
    for value, is_native in (
        ({(i - 2) * MODULUS: i for i in range(5)}, True),
        ({i * 1.5: i for i in range(3000)} | powers, True),
        ({i + MODULUS: i for i in range(300)}, False),
    ):
        plain = _native.parse_plain_value(record(value))
        assert plain == value if is_native else plain is ...
        assert load_untrusted(io.BytesIO(record(value)), "fqn") == value


@pytest.mark.parametrize("which", ["protocol", "keys"])
def test_parts_of_old_records(which: str) -> None:
    """What torch quotes in its errors: the text of a tower of tuples never ends."""
    whole = legacy_record([1, {2}])
    if which == "keys":
        at = whole.rindex(b"\x80\x02]")
        intact = b"\x80\x02]"
    else:  # behind the magic number, another pickle
        at = whole.index(b".\x80\x02M") + 1
        intact = b"\x80\x02M"
    assert whole[at:].startswith(intact)
    steps = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    evil = whole[:at] + b"\x80\x02]K\1" + steps + b"a."
    with limited(20):
        assert isinstance(refused(evil), CorruptCheckpointError)


def test_places_in_a_memo_that_have_one_hash() -> None:
    puts = b"".join(b"Np" + str((i + 10) * MODULUS).encode() + b"\n0" for i in range(100_000))
    with limited(20):
        refused(archive(b"\x80\x04" + named("os", "getcwd") + b"0" + puts + b"N."))
