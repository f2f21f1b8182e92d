"""Headers of safetensors files that are damaged or hostile: each is refused with an error that names the file.

The corpus documents what is refused. What the safetensors project's own reader takes is marked ``stricter``.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import limited, peak_memory, reset_peak_memory
from helpers import fill, image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from safetensors_files import (
    assert_refused,
    entry,
    error_of,
    file_bytes,
    header_of,
    hf_reader,
    load_both,
    write_chunks,
)

import dcp_fast
from dcp_fast.errors import LoadError

DAMAGED = 3000

FIELDS = '"dtype":"U8","shape":[8],"data_offsets":[0,8]'
EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
GOOD = header_of({"a": ("F32", (2, 3), 24), "b": ("U8", (5,), 5)})


def pair(first: list[int], second: list[int], sizes: tuple[int, int] = (4, 4)) -> dict[str, Any]:
    """A header for two tensors of bytes, at some places."""
    return {
        name: {"dtype": "U8", "shape": [size], "data_offsets": place}
        for name, size, place in zip("ab", sizes, (first, second), strict=True)
    }


def beside(shape: list[int], place: list[int], name: str = "b", dtype: str = "U8") -> dict[str, Any]:
    """A header for the same tensor and another one."""
    return entry() | {name: {"dtype": dtype, "shape": shape, "data_offsets": place}}


def raw(text: str | bytes, payload: int = 8) -> bytes:
    return file_bytes(text, payload)


def of(fields: str, payload: int = 8) -> bytes:
    """A header for one tensor, written as JSON."""
    return raw('{"a":{' + fields + "}}", payload)


# By name: the file, and whether we are stricter than the safetensors project.
CORPUS: dict[str, tuple[bytes, bool]] = {
    # The size of the header
    "empty file": (b"", False),
    "seven bytes": (b"\x02\0\0\0\0\0\0", False),
    "header of no bytes": (raw("", 0), False),
    "header beyond the end": (file_bytes(GOOD, 29, 10_000), False),
    "header one byte too long": (file_bytes({}, 0, 3), False),
    "header of 100 MB and a byte": (file_bytes(GOOD, 29, 100_000_001), False),
    "header of 2^63 bytes": (file_bytes(GOOD, 29, 1 << 63), False),
    "header of 2^64 - 1 bytes": (file_bytes(GOOD, 29, (1 << 64) - 1), False),
    "header of 2^64 - 8 bytes": (file_bytes(GOOD, 29, (1 << 64) - 8), False),
    # JSON
    "no JSON": (raw("hello"), False),
    "JSON that ends early": (raw('{"a":'), False),
    "an array": (raw("[]"), False),
    "a string": (raw('"a"'), False),
    "null": (raw("null"), False),
    "two objects": (raw("{}{}", 0), False),
    "a comma at the end": (raw(json.dumps(entry())[:-1] + ",}"), False),
    "a comma at the beginning": (raw("{," + json.dumps(entry())[1:]), False),
    "a comment": (raw(json.dumps(entry()) + "/* */"), False),
    "single quotes": (raw(json.dumps(entry()).replace('"', "'")), False),
    "a name without quotes": (raw('{a:{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'), False),
    "zeros behind the JSON": (raw(json.dumps(entry()).encode() + b"\0\0\0"), False),
    "a mark of the byte order": (raw(b"\xef\xbb\xbf" + json.dumps(entry()).encode()), False),
    "UTF-16": (raw(json.dumps(entry()).encode("utf-16")), False),
    "broken UTF-8 in a name": (raw(json.dumps(entry()).encode().replace(b"a", b"\xff", 1)), False),
    "overlong UTF-8 in a name": (raw(json.dumps(entry()).encode().replace(b'"a"', b'"\xc0\xaf"', 1)), False),
    "a surrogate in UTF-8": (raw(json.dumps(entry()).encode().replace(b'"a"', b'"\xed\xa0\x80"', 1)), False),
    "a lone high surrogate": (raw(json.dumps(entry()).replace('"a"', '"\\ud800"')), False),
    "a lone low surrogate": (raw(json.dumps(entry()).replace('"a"', '"\\udc00"')), False),
    "two high surrogates": (raw(json.dumps(entry()).replace('"a"', '"\\ud800\\ud800"')), False),
    "a high surrogate and a letter": (raw(json.dumps(entry()).replace('"a"', '"\\ud800\\u0041"')), False),
    "an unknown escape": (raw(json.dumps(entry()).replace('"a"', '"\\x41"')), False),
    "an escape that ends early": (raw(json.dumps(entry()).replace('"a"', '"\\u00"')), False),
    "a newline in a name": (raw(json.dumps(entry()).replace('"a"', '"a\n"')), False),
    "a zero in a name": (raw(json.dumps(entry()).encode().replace(b'"a"', b'"a\0"')), False),
    "an escape character in a name": (raw(json.dumps(entry()).encode().replace(b'"a"', b'"\x1b[31m"')), False),
    "nested a thousand times": (of(FIELDS + ',"x":' + "[" * 1000 + "]" * 1000), False),
    "nested a million times": (of(FIELDS + ',"x":' + "[" * 1_000_000), False),
    "a number that no float holds": (of('"dtype":"U8","shape":[8],"data_offsets":[0,8],"x":1e999'), False),
    "a number that ends early": (of('"dtype":"U8","shape":[8],"data_offsets":[0,8],"x":1.'), False),
    "a number with a leading zero": (of('"dtype":"U8","shape":[8],"data_offsets":[0,8],"x":01'), False),
    "NaN": (of('"dtype":"U8","shape":[8],"data_offsets":[0,8],"x":NaN'), False),
    # Fields
    "no dtype": (of('"shape":[8],"data_offsets":[0,8]'), False),
    "no shape": (of('"dtype":"U8","data_offsets":[0,8]'), False),
    "no place": (of('"dtype":"U8","shape":[8]'), False),
    "a tensor that is null": (raw('{"a":null}'), False),
    "a tensor that is a number": (raw('{"a":3}'), False),
    "a tensor that is an array": (raw('{"a":["U8",[8],[0,8]]}'), True),
    "two dtypes": (of('"dtype":"U8","dtype":"U8","shape":[8],"data_offsets":[0,8]'), False),
    "two shapes": (of('"dtype":"U8","shape":[8],"shape":[8],"data_offsets":[0,8]'), False),
    "two places": (of('"dtype":"U8","shape":[8],"data_offsets":[0,8],"data_offsets":[0,8]'), False),
    "an unknown dtype": (file_bytes(entry(dtype="Q4_0"), 8), False),
    "a dtype of torch": (file_bytes(entry(dtype="uint8"), 8), False),
    "a dtype that is a number": (file_bytes(entry(dtype=8), 8), False),
    "an empty dtype": (file_bytes(entry(dtype=""), 8), False),
    "a shape that is a number": (file_bytes(entry(shape=8), 8), False),
    "a shape that is null": (file_bytes(entry(shape=None), 8), False),
    "a negative size": (file_bytes(entry(shape=[-8]), 8), False),
    "two negative sizes": (file_bytes(entry(shape=[-2, -4]), 8), False),
    "a size of minus zero": (of('"dtype":"U8","shape":[8,-0],"data_offsets":[0,0]', 0), False),
    "a size with a fraction": (of('"dtype":"U8","shape":[8.0],"data_offsets":[0,8]'), False),
    "a size with an exponent": (of('"dtype":"U8","shape":[8e0],"data_offsets":[0,8]'), False),
    "a size in quotes": (file_bytes(entry(shape=["8"]), 8), False),
    "a size that is true": (file_bytes(entry(shape=[True, 8]), 8), False),
    "a size of 2^64": (file_bytes(entry(shape=[1 << 64]), 8), False),
    "sizes whose product overflows": (file_bytes(entry(shape=[1 << 32, 1 << 32]), 8), False),
    "sizes whose product overflows to the right one": (file_bytes(entry(shape=[1 << 63, 2, 8]), 8), False),
    "sizes whose bytes overflow": (file_bytes(entry(dtype="F64", shape=[1 << 61]), 8), False),
    "sizes whose bits overflow": (file_bytes(entry(dtype="F64", shape=[(1 << 58) + 1]), 8), False),
    "sizes whose product overflows before a zero": (file_bytes(beside([1 << 40, 1 << 40, 0], [8, 8]), 8), False),
    "65 dimensions": (file_bytes(entry(shape=[8] + [1] * 64), 8), True),
    "one place": (file_bytes(entry(data_offsets=[8]), 8), False),
    "three places": (file_bytes(entry(data_offsets=[0, 8, 8]), 8), False),
    "a negative place": (file_bytes(entry(data_offsets=[-8, 0]), 8), False),
    "a place with a fraction": (of('"dtype":"U8","shape":[8],"data_offsets":[0,8.0]'), False),
    "a place of 2^64": (file_bytes(entry(data_offsets=[0, (1 << 64) + 8]), 8), False),
    "a place that is an object": (file_bytes(entry(data_offsets={"0": 0, "1": 8}), 8), False),
    # Places
    "too few bytes for the shape": (file_bytes(entry(shape=[9]), 8), False),
    "too many bytes for the shape": (file_bytes(entry(shape=[7]), 8), False),
    "bytes of another dtype": (file_bytes(entry(dtype="F64", shape=[8]), 8), False),
    "a place that ends before it begins": (file_bytes(entry(data_offsets=[8, 0]), 8), False),
    "a place that does not begin at zero": (file_bytes(entry(data_offsets=[1, 9]), 9), False),
    "a hole": (file_bytes(pair([0, 4], [5, 9]), 9), False),
    "an overlap": (file_bytes(pair([0, 4], [3, 7]), 7), False),
    "two tensors in one place": (file_bytes(pair([0, 4], [0, 4]), 4), False),
    "one tensor within another": (file_bytes(pair([0, 8], [2, 4], (8, 2)), 8), False),
    "bytes behind the last tensor": (file_bytes(entry(), 9), False),
    "bytes of no tensor": (file_bytes({}, 1), False),
    "a payload that is cut": (file_bytes(entry(), 7), False),
    "no payload": (file_bytes(entry(), 0), False),
    "elements that do not fill a byte": (file_bytes(entry(dtype="F4", shape=[3], data_offsets=[0, 1]), 1), False),
    "rows that do not fill a byte": (file_bytes(entry(dtype="F4", shape=[2, 3], data_offsets=[0, 3]), 3), True),
    "six bits that do not fill a byte": (file_bytes(entry(dtype="F6_E2M3", shape=[3], data_offsets=[0, 3]), 3), False),
    # Names
    "a name that comes twice": (
        raw(
            '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}'
        ),
        False,
    ),
    "a name that comes twice in the same place": (
        raw(
            '{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'
        ),
        True,
    ),
    "a name that comes twice without bytes": (raw(f'{{"a":{EMPTY},"a":{EMPTY}}}', 0), True),
    "a name that comes twice in another form": (
        raw(
            '{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"\\u0061":{"dtype":"U8","shape":[0],"data_offsets":[8,8]}}'
        ),
        False,
    ),
    # __metadata__
    "metadata of a number": (file_bytes({"__metadata__": {"x": 1}} | entry(), 8), False),
    "metadata of null": (file_bytes({"__metadata__": {"x": None}} | entry(), 8), False),
    "metadata of metadata": (file_bytes({"__metadata__": {"x": {}}} | entry(), 8), False),
    "metadata that is a text": (file_bytes({"__metadata__": "x"} | entry(), 8), False),
    "metadata that is a list": (file_bytes({"__metadata__": []} | entry(), 8), False),
    "metadata twice": (raw('{"__metadata__":{},"__metadata__":{}}', 0), False),
    "a key of metadata twice": (raw('{"__metadata__":{"x":"1","x":"2"}}', 0), True),
    "a tensor that is called metadata": (file_bytes({"__metadata__": entry()["a"]}, 8), False),
}


@pytest.mark.parametrize("name", CORPUS)
def test_refused(tmp_path: Path, name: str) -> None:
    content, stricter = CORPUS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with limited(20):
        assert_refused(error_of(path), path)
        with pytest.raises(dcp_fast.CorruptHeaderError):
            hf_reader(tmp_path).read_metadata()
    if stricter:
        with safe_open(path, framework="pt") as file:
            assert list(file.keys()) in (["a"], [])
    else:
        with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
            pass


# What is odd, but sound
ACCEPTED: dict[str, bytes] = {
    "white space around": raw(" \n\t\r" + json.dumps(entry(), indent=3) + "   "),
    "an escaped name": raw(json.dumps(entry()).replace('"a"', '"\\u0061"')),
    "escaped fields": raw(json.dumps(entry()).replace('"dtype"', '"dtyp\\u0065"')),
    "another field": file_bytes(entry(x=[1, {"y": [None, True, -1.5e3, "z"]}]), 8),
    "nested a hundred times": of(FIELDS + ',"x":' + "[" * 100 + "]" * 100),
    "fields in another order": of('"data_offsets":[0,8],"shape":[8],"dtype":"U8"'),
    "metadata of nothing": file_bytes({"__metadata__": {}} | entry(), 8),
    "metadata that is null": raw('{"__metadata__":null,"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'),
    "metadata at the end": file_bytes(entry() | {"__metadata__": {"format": "pt", "\u0000": "\u0001"}}, 8),
    "an empty name": file_bytes(beside([0], [8, 8], "", "F32"), 8),
    "names in all scripts": file_bytes(beside([0, 7], [8, 8], "\u00fc\U0001f600\n"), 8),
    "sizes with a zero before they overflow": file_bytes(beside([0, 1 << 62, 1 << 62], [8, 8]), 8),
    "64 dimensions": file_bytes(beside([1] * 64, [8, 9]), 9),
    "empty tensors among others": file_bytes(beside([0], [0, 0]) | beside([0], [8, 8], "c", "F32"), 8),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(ACCEPTED[name])
    expected, actual = load_both(tmp_path, lambda: {"a": torch.zeros(8, dtype=torch.uint8)})
    assert expected.errors is None
    assert actual.errors is None
    assert actual.state["a"].tolist() == expected.state["a"].tolist() == list(range(8))
    ours = hf_reader(tmp_path).read_metadata()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert list(ours.state_dict_metadata) == list(file.keys())


def test_header_of_zeros_is_not_trusted_for_its_size(tmp_path: Path) -> None:
    """A file may be large and yet have nothing: what is allocated is bounded."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_000))
        file.truncate(8 + 100_000_000)
    before = reset_peak_memory()
    with limited(20):
        assert_refused(error_of(path), path)
    assert peak_memory() - before < 150 << 20


# Damage at random


def damages() -> list[Callable[[random.Random, bytearray], None]]:
    def flip(rng: random.Random, data: bytearray) -> None:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)

    def flip_in_header(rng: random.Random, data: bytearray) -> None:
        size = min(len(data), 8 + int.from_bytes(data[:8], "little"))
        data[rng.randrange(size)] ^= 1 << rng.randrange(8)

    def digit(rng: random.Random, data: bytearray) -> None:
        places = [i for i, byte in enumerate(data[8:600], 8) if 48 <= byte < 58]
        if places:
            data[rng.choice(places)] = rng.choice(b"0123456789-.e ")

    def cut(rng: random.Random, data: bytearray) -> None:
        del data[rng.randrange(len(data)) :]

    def append(rng: random.Random, data: bytearray) -> None:
        data += rng.randbytes(rng.randint(1, 20))

    def insert(rng: random.Random, data: bytearray) -> None:
        at = rng.randrange(len(data))
        data[at:at] = rng.choice([b'"', b"{", b"}", b",", b"[", b"\\", b"null", b" ", b"0", rng.randbytes(3)])

    def remove(rng: random.Random, data: bytearray) -> None:
        at = rng.randrange(len(data))
        del data[at : at + rng.randint(1, 4)]

    def resize(rng: random.Random, data: bytearray) -> None:
        size = rng.choice([0, 1, 2, 7, len(data), len(data) + 8, 1 << 31, 1 << 63, (1 << 64) - 1])
        data[:8] = size.to_bytes(8, "little")

    return [flip, flip_in_header, flip_in_header, digit, digit, cut, append, insert, remove, resize]


def compare_damaged(tmp_path: Path, count: int, seed: int) -> None:
    """Every outcome is an error that names the file, or what torch makes of it."""
    values = {"a": fill((2, 3), torch.float32, 1), "b.c": fill((4,), torch.int64, 2)}
    values["d"] = fill((40, 2), torch.bfloat16, 3)
    sharded = {"a": [((2, 0), values["a"])], "b.c": [((0,), values["b.c"])], "d": [((9, 0), values["d"])]}
    chunks = write_chunks(tmp_path / "chunks", sharded)
    plain = tmp_path / "plain" / "model.safetensors"
    plain.parent.mkdir()
    save_file(values, plain)
    originals = [plain.read_bytes(), next(chunks.iterdir()).read_bytes()]
    directory = tmp_path / "damaged"
    path = directory / "model.safetensors"
    directory.mkdir()

    def plain_state() -> dict[str, Any]:
        return {"a": torch.zeros(2, 3), "b.c": torch.zeros(4, dtype=torch.int64)}

    def sharded_state() -> dict[str, Any]:
        return {"a": torch.zeros(4, 3), "b.c": torch.zeros(4, dtype=torch.int64)}

    rng = random.Random(seed)
    kinds = damages()
    refused = loaded = stricter = 0
    for number in range(count):
        data = bytearray(originals[number % 2])
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            if data:
                rng.choice(kinds)(rng, data)
        path.write_bytes(data)
        expected, actual = load_both(directory, (plain_state, sharded_state)[number % 2])
        case = f"{seed}, {number}: {bytes(data)!r}, torch: {expected.errors}, dcp_fast: {actual.errors}"
        if actual.errors is None:
            assert expected.errors is None, case
            assert image(actual.state) == image(expected.state), case
            loaded += 1
            continue
        (error,) = actual.errors.values()
        refused += 1
        stricter += expected.errors is None
        if isinstance(error, LoadError):
            assert error.path == str(path), case
        else:  # what the planner says about a name or size that has changed, as torch's does
            assert expected.errors is not None, case
            assert type(error) is type(expected.errors[0]), case
    assert refused > count / 2
    assert loaded > count / 30
    assert stricter < count / 50


def test_damaged_files(tmp_path: Path) -> None:
    with limited(400):
        compare_damaged(tmp_path, DAMAGED, seed=14)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_more_damaged_files(tmp_path: Path, seed: int) -> None:
    compare_damaged(tmp_path, DAMAGED, seed)
