"""Metadata that no writer wrote: it must not run code, take memory or time, and it ends in an error that tells."""

from __future__ import annotations

import contextlib
import copyreg
import os
import pickle
import pickletools
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Call, fast_error, limited, peak_memory, reset_peak_memory
from helpers import fast_reader
from metadata_cases import make_metadata, old_metadata, parse_metadata, random_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties

import dcp_fast
from dcp_fast import _native
from dcp_fast.errors import CorruptMetadataError, LoadError, UntrustedMetadataError
from dcp_fast.metadata.unpickler import RestrictedUnpickler

MIB = 1 << 20
CHECKPOINT = "torch.distributed.checkpoint.metadata"


def error_of(pickled: bytes) -> LoadError:
    with pytest.raises(LoadError) as caught, limited(20):
        parse_metadata(pickled, "the/path")
    error = caught.value
    assert error.path == "the/path"
    assert error.offset is not None
    assert 0 <= error.offset <= len(pickled)
    for fact in (error.reason, "'the/path'", f"bytes {error.offset} to"):
        assert fact in str(error)
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)
    return error


# Pickles that run code


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def new(name: str, module: str = CHECKPOINT) -> bytes:
    return named(module, name) + b")\x81"


def metadata_with(planner_data: bytes) -> bytes:
    """Whole metadata with any opcodes for its planner data."""
    fields = text("state_dict_metadata") + b"}" + text("planner_data") + planner_data + text("storage_data") + b"}"
    return b"\x80\x04" + new("Metadata") + b"}(" + fields + b"ub."


def executing_opcodes(marker: Path) -> dict[str, bytes]:
    """Opcodes that make a file when they are run by Python's own unpickler."""
    command = f"touch {marker}"
    calls = {
        "os.system": Call(os.system, command),
        "eval": Call(eval, f"__import__('os').system({command!r})"),
        "open": Call(open, str(marker), "w"),
        "getattr": Call(getattr(os, "system"), command),  # noqa: B009
        "inside": {"a": [(1, Call(os.system, command))]},
    }
    opcodes = {name: pickle.dumps(call, 3)[2:-1] for name, call in calls.items()}
    opcodes["stack global"] = text("os") + text("system") + b"\x93" + text(command) + b"\x85R"
    opcodes["instance"] = f"(S'{command}'\nios\nsystem\n".encode()
    opcodes["object"] = f"(cos\nsystem\nS'{command}'\no".encode()
    # The functions of an allowed module, through an allowed class.
    opcodes["a path of attributes"] = (
        text("torch.serialization") + text("os.system") + b"\x93" + text(command) + b"\x85R"
    )
    # What the unpickler calls to set a state.
    setstate = text("__setstate__") + named("os", "system")
    opcodes["__setstate__ of an instance"] = new("Metadata") + b"}" + setstate + b"sb" + text(command) + b"b"
    opcodes["__setstate__ of a class"] = (
        named(CHECKPOINT, "StorageMeta") + b"N}" + setstate + b"s\x86b0" + new("StorageMeta") + text(command) + b"b"
    )
    return opcodes


@pytest.fixture
def intact_classes() -> Iterator[None]:
    """Undoes what the proof does to torch's classes, and that only it did it."""
    from torch.distributed.checkpoint.metadata import StorageMeta

    yield
    if "__setstate__" in vars(StorageMeta):
        del StorageMeta.__setstate__


@pytest.mark.parametrize("name", executing_opcodes(Path("unused")))
@pytest.mark.parametrize("place", ["metadata", "planner data"])
@pytest.mark.usefixtures("intact_classes")
def test_pickle_that_runs_code(tmp_path: Path, name: str, place: str) -> None:
    marker = tmp_path / "executed"
    opcodes = executing_opcodes(marker)[name]
    pickled = metadata_with(opcodes) if place == "planner data" else b"\x80\x04" + opcodes + b"."
    assert isinstance(_native.parse_metadata(pickled), str)
    error = error_of(pickled)
    assert isinstance(error, UntrustedMetadataError)
    assert isinstance(error, pickle.UnpicklingError)
    assert "trust_metadata=True" in str(error)
    if name in ("os.system", "stack global"):
        assert "system" in str(error)
    (tmp_path / ".metadata").write_bytes(pickled)
    assert "trust_metadata=True" in str(fast_error(tmp_path, {"a": torch.zeros(1)}))
    assert not marker.exists()
    with contextlib.suppress(Exception):  # the proof that the pickle would
        fast_reader(tmp_path, trust_metadata=True).read_metadata()
    assert marker.exists()


def test_global_is_named(tmp_path: Path) -> None:
    error = error_of(metadata_with(named("some.module", "Thing")))
    assert isinstance(error, UntrustedMetadataError)
    assert "some.module.Thing" in str(error)


def test_persistent_ids() -> None:
    for opcodes in (b"Pid\n", text("id") + b"Q"):
        assert isinstance(error_of(metadata_with(opcodes)), UntrustedMetadataError)


@pytest.mark.parametrize("code", [0x7F, 0x7FFF, 0x7FFFFF])
def test_extension_registry(code: int) -> None:
    """A code of the registry may stand for anything, and the C unpickler looks it up in a cache of its own."""
    copyreg.add_extension("os", "getcwd", code)
    try:
        opcode = {0x7F: b"\x82\x7f", 0x7FFF: b"\x83\xff\x7f", 0x7FFFFF: b"\x84\xff\xff\x7f\0"}[code]
        pickled = metadata_with(opcode + b")R")
        assert pickle.loads(pickled).planner_data == os.getcwd()
        assert isinstance(error_of(pickled), UntrustedMetadataError)
    finally:
        copyreg.remove_extension("os", "getcwd", code)


HARMFUL: dict[str, bytes] = {
    # Calls of what may be named, with what it is not meant for.
    "call of a data class": named(CHECKPOINT, "Metadata") + b"}\x85R",
    "call of an index": named(CHECKPOINT, "MetadataIndex") + text("a") + text("b") + b"\x86R",
    "getattr of a class": named("builtins", "getattr") + named(CHECKPOINT, "Metadata") + text("__init__") + b"\x86R",
    "getattr of an enum": named("builtins", "getattr")
    + named(CHECKPOINT, "_MEM_FORMAT_ENCODING")
    + text("__class__")
    + b"\x86R",
    "a giant dict": named("builtins", "dict") + b"]\x85R",
    "a giant torch.Size": named("torch", "Size") + text("abc") + b"\x85R",
    "an object of a function": named("torch.serialization", "_get_layout") + b")\x81",
    "an object of getattr": named("builtins", "getattr") + b")\x81",
    "reconstructed from another base": named("copyreg", "_reconstructor")
    + named("builtins", "dict")
    + named("builtins", "dict")
    + b"}\x87R",
    "encoded by a codec": named("_codecs", "encode") + b"B\x03\0\0\0abc" + text("zip") + b"\x86R",
    "call of object": named("builtins", "object") + b")R",
    # State of what keeps none.
    "state of a class": named(CHECKPOINT, "Metadata") + b"}" + text("version") + text("x") + b"sb",
    "slots of a class": named(CHECKPOINT, "Metadata") + b"N}" + text("version") + text("x") + b"s\x86b",
    "slots of an instance": new("Metadata") + b"N}" + text("version") + text("x") + b"s\x86b",
    "state of a function": named("torch.serialization", "_get_layout") + b"}" + text("cache") + b"}sb",
    "a class for a class": new("Metadata") + b"}" + text("__class__") + named("builtins", "dict") + b"sb",
    "state of a dict": b"}}" + text("a") + b"Nsb",
    "properties of text": new("TensorProperties") + b"(" + text("a") * 5 + b"tb",
    # Items of what has none.
    "items of a class": named(CHECKPOINT, "Metadata") + b"Na",
    "keys of an instance": new("Metadata") + text("a") + b"Ns",
    "keys of an enum": named(CHECKPOINT, "_MEM_FORMAT_ENCODING") + text("a") + b"Ns",
    # Keys whose hash is of the file's making.
    "an instance as key": b"}" + new("StorageMeta") + b"Ns",
    "a function as key": b"}" + named("torch.serialization", "_get_layout") + b"Ns",
    "an index by a tuple": b"}" + new("MetadataIndex") + b"}" + text("fqn") + b"))\x86sbNs",
}


@pytest.mark.parametrize("name", HARMFUL)
@pytest.mark.parametrize("protocol", [2, 4])
def test_harmful_use_of_allowed_globals(name: str, protocol: int) -> None:
    pickled = metadata_with(HARMFUL[name]).replace(b"\x80\x04", bytes([0x80, protocol]), 1)
    before = {cls: dict(vars(cls)) for cls in (Metadata, MetadataIndex, TensorProperties, _StorageInfo)}
    cache = torch.serialization._get_layout.cache  # type: ignore[attr-defined]
    assert isinstance(error_of(pickled), LoadError)
    assert {cls: dict(vars(cls)) for cls in before} == before
    assert torch.serialization._get_layout.cache is cache  # type: ignore[attr-defined]
    assert Metadata({}).version is None


# Bombs

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
    "text memo index": b"Np99999999999\n",
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


# Damage


def test_empty_and_cut_metadata() -> None:
    pickled = pickle.dumps(make_metadata())
    for length in range(len(pickled)):
        if length > 200 and length % 37:
            continue
        error = error_of(pickled[:length])
        assert isinstance(error, CorruptMetadataError)
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError)):  # torch's type is a base of ours
            pickle.loads(pickled[:length])


@pytest.mark.parametrize("value", [None, {}, [], 5, "text", MetadataIndex("a")])
def test_file_with_something_else(value: Any) -> None:
    assert isinstance(error_of(pickle.dumps(value)), CorruptMetadataError)


def test_bytes_behind_the_pickle_are_ignored_as_by_torch() -> None:
    assert parse_metadata(pickle.dumps(make_metadata()) + b"more", "path") == make_metadata()


def test_error_of_a_load(tmp_path: Path) -> None:
    """torch's loader raises an AssertionError for whatever is wrong with metadata; ours is one, and tells more."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x04\xff")
    error = fast_error(tmp_path, {"a": torch.zeros(1)})
    assert isinstance(error, AssertionError)
    assert isinstance(error, CorruptMetadataError)
    assert str(tmp_path / ".metadata") in str(error)
    with pytest.raises(dcp_fast.CorruptMetadataError):
        fast_reader(tmp_path).read_metadata()
    with pytest.raises(FileNotFoundError):
        fast_reader(tmp_path / "absent").read_metadata()


def damage(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice([1, 1, 2, 4, 50]))
    start = rng.randrange(len(other))
    piece = other[start : start + rng.choice([1, 5, 60])]
    return rng.choice(
        [
            data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if at < len(data) else data,
            data[:at] + rng.randbytes(end - at) + data[end:],
            data[:at] + data[end:],
            data[:end] + data[at:end] + data[end:],
            data[:at] + piece + data[at:],
            data[:at] + piece + data[at + len(piece) :],
            data[:at] + b"\xff" * (end - at) + data[end:],
            data[:at],
        ]
    )


def text_of(value: Any) -> str:
    try:
        return repr(value)
    except ValueError as error:  # a torch.Size with a number that is too large for it
        return f"no text: {error}"


def same(ours: Any, theirs: Any) -> bool:
    """As reprs, since NaN and cycles are equal to nothing."""
    try:
        return all(text_of(getattr(ours, name)) == text_of(getattr(theirs, name)) for name in vars(theirs))
    except AttributeError:  # objects that lack fields have no repr
        return True


def metadata_or_error(pickled: bytes) -> Metadata | LoadError:
    try:
        return parse_metadata(pickled, "path")
    except LoadError as error:
        return error


def memoizes_far_away(pickled: bytes) -> bool:
    """Whether CPython would allocate gigabytes for its memo, which is an array."""
    opcodes = pickletools.genops(pickled)
    return any(opcode.name == "LONG_BINPUT" and argument > 1 << 20 for opcode, argument, _ in opcodes)


@pytest.mark.parametrize("seed", range(8))
def test_damage_gives_an_error_or_what_torch_reads(seed: int) -> None:
    """What torch would read of damaged metadata is asked of the restricted unpickler first: it must not run."""
    rng = random.Random(seed)
    pristine = [
        pickle.dumps(rng.choice([random_metadata(rng), make_metadata()]), rng.randrange(6)) for _ in range(4)
    ] + [old_metadata(make_metadata(), rng.choice([0, 2, 4]), "2.0")]
    outcomes = {"native": 0, "unpickled": 0, "error": 0}
    for _ in range(1500):
        pickled = rng.choice(pristine)
        for _ in range(rng.choice([1, 1, 2, 4])):
            pickled = damage(rng, pickled, rng.choice(pristine))
        with limited(20):
            ours = metadata_or_error(pickled)
        if isinstance(ours, LoadError):
            assert ours.path == "path"
            outcomes["error"] += 1
            continue
        theirs = RestrictedUnpickler(pickled).load()  # does not refuse what was read natively
        assert same(ours, theirs), pickled
        # It names allowed globals only, and calls them as they are meant to be: torch may read it too.
        if not memoizes_far_away(pickled):
            assert same(theirs, pickle.loads(pickled)), pickled
        outcomes["native" if isinstance(ours.state_dict_metadata, dcp_fast.metadata.LazyDict) else "unpickled"] += 1
    assert min(outcomes.values()) > 5, outcomes


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
