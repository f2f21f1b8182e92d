"""Metadata that would take memory or time out of proportion to its size."""

from __future__ import annotations

import itertools
import pickle
import struct
import sys
import time
from typing import Any

import pytest
from damage import limited, peak_memory, reset_peak_memory
from hostile_pickles import CHECKPOINT, error_of, metadata_with, named, new, text
from metadata_cases import make_metadata, parse_metadata
from torch.distributed.checkpoint.metadata import MetadataIndex

from dcp_fast import _native
from dcp_fast.errors import CorruptMetadataError, UntrustedMetadataError

MIB = 1 << 20

DOUBLED = b"\x94" + b"".join(b"0" + 2 * (b"h" + bytes([i])) + b"\x86\x94" for i in range(200))
BOMBS: dict[str, bytes] = {
    "nested tuples": b")" + b"\x85" * 500_000,
    "nested tuples of text": text("a") + b"\x85" * 500_000,
    "nested lists": b"]" * 500_000 + b"a" * 499_999,
    "nested dicts": b"}" + (text("a") + b"}") * 100_000 + b"s" * 100_000,
    "marks": b"(" * 500_000,
    "text beyond the end": b"X\xff\xff\xff\x7fabc",
    "text far beyond the end": b"\x8d" + b"\xff" * 7 + b"\x7f",
    "bytes beyond the end": b"\x8e" + b"\xff" * 7 + b"\x0f",
    "bytearray beyond the end": b"\x96" + b"\xff" * 4 + b"\0" * 4,
    "number beyond the end": b"\x8b\xff\xff\xff\x7f",
    "negative length": b"\x8b\xff\xff\xff\xff",
    "frame beyond the end": b"\x95" + b"\xff" * 8 + b"N",
    "memo index beyond the file": b"Nr\xff\xff\xff\x7f",
    "negative memo index": b"Np-1\n",
    "memo index of nothing": b"h\xf0",
    "an unknown opcode": b"\xff",
    "no list": b"Na",
    "no mark": b"t",
    "key without a value": b"}(Nu",
    "empty stack": b"0000000R",
    "text that is not UTF-8": b"X\x02\0\0\0\xc3\x28",
    "protocol": b"\x80\x63N",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb(name: str) -> None:
    pickled = metadata_with(BOMBS[name])
    resident = reset_peak_memory()
    error = error_of(pickled)
    assert isinstance(error, (CorruptMetadataError, UntrustedMetadataError))
    assert peak_memory() - resident < 200 * MIB


def test_values_that_share_their_items() -> None:
    """A tuple of 2**200 leaves is read as the 200 tuples that it is."""
    for kind in (b"N", text("a")):
        opcodes = kind + DOUBLED
        with limited(10):
            value = parse_metadata(b"\x80\x04" + metadata_with(opcodes)[2:], "path").planner_data
        depth = 0
        while isinstance(value, tuple):
            assert value[0] is value[1]
            value, depth = value[0], depth + 1
        assert depth == 200


def test_key_that_takes_forever_to_hash() -> None:
    assert isinstance(error_of(metadata_with(b"}" + b"N" + DOUBLED + b"Ns")), UntrustedMetadataError)


NUMBERS = b"".join(b"J" + struct.pack("<i", n) for n in range(50_000))
FIELDS = b"}(" + b"".join(text(f"k{n}") + b"K\x01" for n in range(50_000)) + b"u"
LETTERS = b"X" + struct.pack("<I", MIB) + b"a" * MIB
COPIES: dict[str, tuple[bytes, bytes, bytes]] = {  # a global, a value, and what is done with both of the memo
    "a torch.Size": (named("torch", "Size"), b"](" + NUMBERS + b"e", b"h\x01h\x00\x85R"),
    "a torch.Size by another way": (named("torch", "Size"), b"](" + NUMBERS + b"e", b"h\x01h\x00\x85\x81"),
    "a set": (named("builtins", "set"), b"](" + NUMBERS + b"e", b"h\x01h\x00\x85R"),
    "a frozenset": (named("builtins", "frozenset"), b"](" + NUMBERS + b"e", b"h\x01h\x00\x85R"),
    "bytes": (named("_codecs", "encode"), LETTERS, b"h\x01h\x00" + text("latin1") + b"\x86R"),
    "fields": (named(CHECKPOINT, "StorageMeta"), FIELDS, b"h\x01)\x81h\x00b"),
}


@pytest.mark.parametrize("name", COPIES)
def test_many_copies(name: str) -> None:
    """A few bytes for each copy."""
    called, value, copy = COPIES[name]
    pickled = metadata_with(value + b"q\x000" + called + b"q\x010](" + copy * 1000 + b"eI1\n\x86")
    resident = reset_peak_memory()
    error = error_of(pickled)
    assert isinstance(error, UntrustedMetadataError)
    assert "many copies of the same" in error.reason
    assert peak_memory() - resident < 200 * MIB


def shape(*numbers: int) -> bytes:
    return named("torch", "Size") + b"(" + b"".join(b"J" + struct.pack("<i", n) for n in numbers) + b"t\x85R"


def entry(size: bytes, chunks: bytes) -> bytes:
    properties = (
        new("TensorProperties")
        + b"("
        + named("torch", "float32")
        + named("torch.serialization", "_get_layout")
        + text("torch.strided")
        + b"\x85R\x89"
        + named(CHECKPOINT, "_MEM_FORMAT_ENCODING")
        + b"K\0\x85R\x89tb"
    )
    fields = text("properties") + properties + text("size") + size + text("chunks") + chunks
    return new("TensorStorageMetadata") + b"}(" + fields + b"ub"


def metadata_of_entry(opcodes: bytes) -> bytes:
    entries = b"}" + text("a") + opcodes + b"s"
    return b"\x80\x04" + new("Metadata") + b"}(" + text("state_dict_metadata") + entries + b"ub."


def one_chunk(offsets: bytes, sizes: bytes) -> bytes:
    return new("ChunkStorageMetadata") + b"}(" + text("offsets") + offsets + text("sizes") + sizes + b"ub"


def test_shapes_that_are_shared_too_often_are_not_repeated() -> None:
    """One chunk of many dimensions in a list a million times: two bytes for each, which would be kilobytes."""
    dims = 64
    memoized = one_chunk(shape(*range(dims)), shape(*range(dims))) + b"q\x010"
    chunks = memoized + b"](" + b"h\x01" * 1_000_000 + b"e"
    pickled = metadata_of_entry(entry(shape(*range(dims)), chunks))
    resident = reset_peak_memory()
    with limited(60):
        metadata = parse_metadata(pickled, "path")
    assert len(metadata.state_dict_metadata["a"].chunks) == 1_000_000  # type: ignore[union-attr]
    assert peak_memory() - resident < 300 * MIB


@pytest.mark.parametrize(
    ("offsets", "sizes"), [((-1,), (1,)), ((0,), (-1,)), ((-(1 << 31),), (1,))], ids=["offset", "size", "least"]
)
def test_negative_shapes(offsets: tuple[int], sizes: tuple[int]) -> None:
    chunks = b"]" + one_chunk(shape(*offsets), shape(*sizes)) + b"a"
    error = error_of(metadata_of_entry(entry(shape(5), chunks)))
    assert isinstance(error, CorruptMetadataError)
    assert isinstance(error_of(metadata_of_entry(entry(shape(-5), b"]"))), CorruptMetadataError)


def test_names_that_collide_take_no_longer() -> None:
    """Tables are seeded, so no file can make all its names fall into one place: reading stays linear."""
    seconds = []
    for count in (20_000, 80_000):
        names = [text(f"{i:08d}") + b"0" for i in range(count)]
        entries = b"".join(name[:-1] + new("BytesStorageMetadata") for name in names)
        pickled = b"\x80\x04" + new("Metadata") + b"}(" + text("state_dict_metadata") + b"}(" + entries + b"uub."
        started = time.perf_counter()
        assert len(parse_metadata(pickled, "path").state_dict_metadata) == count
        seconds.append(time.perf_counter() - started)
    assert seconds[1] < 40 * max(seconds[0], 0.05)


def nested(levels: int) -> bytes:
    """Opcodes of tuples of which each holds the one before twice: whose hash, or text, takes 2 ** levels steps."""
    return b"K\x01" + b"".join(b"\x94h" + bytes([level]) + b"\x86" for level in range(levels))


@pytest.mark.parametrize(
    "opcodes",
    [
        nested(60) + b")R",
        nested(60) + b")\x81",
        b"ccopyreg\n_reconstructor\n" + nested(60) + b"cbuiltins\nobject\nN\x87R",
        b"ccopyreg\n_reconstructor\ncbuiltins\ndict\n" + nested(60) + b"N\x87R",
        b"cbuiltins\ngetattr\n" + nested(60) + text("a") + b"\x86R",
        b"ctorch\nSize\n" + nested(60) + b"\x85R",
        b"c_codecs\nencode\n" + nested(60) + text("latin1") + b"\x86R",
        b"cpathlib\nPosixPath\n" + nested(60) + b"\x85R",
        new("Metadata") + nested(60) + b"b",
        nested(60) + b"}b",
        b"}" + nested(60) + b"Ns",
        b"(" + nested(60) + b"\x91",
    ],
    ids=repr,
)
def test_values_whose_hash_or_text_takes_forever(opcodes: bytes) -> None:
    error = error_of(b"\x80\x04" + opcodes + b".")
    assert isinstance(error, UntrustedMetadataError | CorruptMetadataError)
    assert len(str(error)) < 1000


def test_transforms_that_are_recalled_for_each_row_take_their_place_once() -> None:
    """A list of long texts, which costs a row of the file a few bytes."""
    info = "torch.distributed.checkpoint.filesystem"
    long = b"X" + struct.pack("<I", 1 << 20) + b"z" * (1 << 20) + b"q\x00"
    for names, is_native in ((long, False), (text("zstd") + b"q\x00", True)):
        rows = b""
        for row in range(2000):
            descriptors = b"](" + names + 63 * b"h\x00" + b"eq\x01" if row == 0 else b"h\x01"
            rows += new("MetadataIndex") + b"}(" + text("fqn") + text(str(row)) + b"ub"
            rows += f"c{info}\n_StorageInfo\n".encode() + b")\x81}(" + text("relative_path") + text("f")
            rows += (
                text("offset")
                + b"K\x00"
                + text("length")
                + b"K\x01"
                + text("transform_descriptors")
                + descriptors
                + b"ub"
            )
        state = text("state_dict_metadata") + b"}" + text("storage_data") + b"}(" + rows + b"u"
        pickled = b"\x80\x04" + new("Metadata") + b"}(" + state + b"ub."
        assert isinstance(_native.parse_metadata(pickled), str) != is_native
        metadata = parse_metadata(pickled, "path")
        assert len(metadata.storage_data[MetadataIndex("1999")].transform_descriptors) == 64


# Keys of one hash, which are compared with all others of their dict


def number(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def tuples_of_one_hash(count: int) -> list[bytes]:
    numbers = [b"\x8a\x08" + (i * sys.hash_info.modulus).to_bytes(8, "little", signed=True) for i in range(-4, 4)]
    return [b"(" + b"".join(items) + b"t" for items in itertools.islice(itertools.product(numbers, repeat=6), count)]


def indices_of_one_hash(count: int) -> list[bytes]:
    make = new("MetadataIndex") + b"}(" + text("fqn") + text("a") + text("offset") + named("torch", "Size")
    return [make + key + b"\x85Rub" for key in tuples_of_one_hash(count)]


ALIKE = [number((i + 10) * sys.hash_info.modulus) for i in range(20_000)]
KEYS: dict[str, bytes] = {
    "numbers": b"}(" + b"".join(key + b"N" for key in ALIKE) + b"u",
    "tuples": b"}(" + b"".join(key + b"N" for key in tuples_of_one_hash(60_000)) + b"u",
    "indices": b"}(" + b"".join(key + b"N" for key in indices_of_one_hash(10_000)) + b"u",
    "a set": b"\x8f(" + b"".join(ALIKE) + b"\x90",
    "a called set": named("builtins", "set") + b"](" + b"".join(ALIKE) + b"e\x85R",
    "many small dicts": b"](" + (b"}(" + b"".join(key + b"N" for key in ALIKE[:500]) + b"u") * 500 + b"e",
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_one_hash(name: str) -> None:
    """In planner data, and in an attribute, that is made once somebody asks for it."""
    with limited(10):
        error = error_of(metadata_with(KEYS[name]))
        assert isinstance(error, UntrustedMetadataError)
        assert "keys that take long to hash or to compare" in error.reason
        fields = text("state_dict_metadata") + b"}" + text("more") + KEYS[name]
        metadata: Any = parse_metadata(b"\x80\x04" + new("Metadata") + b"}(" + fields + b"ub.", "path")
        with pytest.raises(UntrustedMetadataError, match="keys that take long to hash or to compare"):
            assert metadata.more


def test_towers_of_frozensets() -> None:
    step = b"q\0(h\0K\0\x86h\0K\1\x86\x91q\x0100h\1"
    tower = b"(" + number(10**18) + b"\x91" + step * 60
    with limited(10):
        error = error_of(metadata_with(b"}(" + tower + b"N" + tower + b"Nu"))
    assert isinstance(error, UntrustedMetadataError)
    assert "a key of tuples without end" in error.reason


@pytest.mark.parametrize("key", [int, lambda i: (i, i + 1), lambda i: i << 62, lambda i: (i, (i, "a"))])
def test_many_intact_keys(key: Any) -> None:
    metadata: Any = make_metadata()
    metadata.planner_data = metadata.more = {key(i): i for i in range(20_000)}
    with limited(20):
        ours: Any = parse_metadata(pickle.dumps(metadata), "path")
        assert ours.more == metadata.more
        assert dict(ours.planner_data) == metadata.planner_data
