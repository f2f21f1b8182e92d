"""Metadata that no writer wrote: it must not run code, and it ends in an error that tells."""

from __future__ import annotations

import contextlib
import copyreg
import os
import pickle
import pickletools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Call, fast_error, limited
from helpers import fast_reader
from hostile_pickles import CHECKPOINT, error_of, metadata_with, named, new, text
from metadata_cases import make_metadata, old_metadata, parse_metadata, random_metadata, with_plans
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties

import dcp_fast
from dcp_fast import _native
from dcp_fast.errors import CorruptMetadataError, LoadError, UntrustedMetadataError
from dcp_fast.metadata.lazy import LazyDict
from dcp_fast.metadata.unpickler import MetadataUnpickler

# Pickles that run code


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


LONG = "x" * 1_000_000


@pytest.mark.parametrize(
    ("opcodes", "part"),
    [
        (text(LONG) + text("name") + b"\x93", "the global xxx"),
        (text("torch." + LONG) + text(LONG) + b"\x93", "there is no module torch.xxx"),
        (text("a\x1b[2Jb") + text("c\nERROR") + b"\x93", r"the global a\x1b[2Jb.c\nERROR,"),
        (text("torch") + text("float33") + b"\x93", "there is no float33 in torch"),
        (new("StorageMeta") + b"}" + text("__" + LONG) + b"Nsb", "the field '__xxx"),
        (named("torch.serialization", "_get_layout") + text(LONG) + b"\x85R", "KeyError: 'xxx"),
        (named("torch", "device") + text("cuda:" + "9" * 100_000) + b"\x85R", "RuntimeError: "),
    ],
    ids=["module", "both", "escape", "dtype", "field", "layout", "device"],
)
def test_messages_are_short_and_plain(opcodes: bytes, part: str) -> None:
    reason = error_of(metadata_with(opcodes)).reason
    assert part in reason
    assert len(reason) < 1000
    assert reason.isprintable()
    assert "trust_metadata" not in reason or "there is no" not in reason


def test_truncated_frame() -> None:
    with pytest.raises(pickle.UnpicklingError, match="pickle data was truncated"):
        MetadataUnpickler(b"\x80\x04\x95\x80\0\0\0\0\0\0\0N.").load()


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
    ] + [old_metadata(make_metadata(), rng.choice([0, 2, 4]), "2.0"), pickle.dumps(with_plans(random_metadata(rng)))]
    outcomes = {"native": 0, "unpickled": 0, "error": 0}
    for _ in range(1500):
        pickled = rng.choice(pristine)
        for _ in range(rng.choice([1, 1, 2, 4])):
            pickled = damage(rng, pickled, rng.choice(pristine))
        with limited(20):
            ours = metadata_or_error(pickled)
            try:
                vars(ours)  # makes all attributes
            except LoadError as error:
                ours = error
        if isinstance(ours, LoadError):
            assert ours.path == "path"
            outcomes["error"] += 1
            continue
        try:
            theirs = MetadataUnpickler(pickled).load()  # does not refuse what was read natively
        except pickle.UnpicklingError as error:
            # Where a frame ends makes no difference to the unpickler in C, which torch uses.
            if "before end of frame" not in str(error):
                raise
            theirs = pickle.loads(pickled)
        assert same(ours, theirs), pickled
        # It names allowed globals only, and calls them as they are meant to be: torch may read it too.
        if not memoizes_far_away(pickled):
            try:
                assert same(theirs, pickle.loads(pickled)), pickled
            except ValueError as error:
                # torch, from 2.15 on too, refuses states of properties that are longer than its own.
                if "too many values to unpack" not in str(error):
                    raise
        outcomes["native" if isinstance(ours.state_dict_metadata, LazyDict) else "unpickled"] += 1
    assert min(outcomes.values()) > 5, outcomes
