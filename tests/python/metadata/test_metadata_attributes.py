"""Metadata with attributes that torch's class does not have, such as Megatron-Core's."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from damage import Call, peak_memory, reset_peak_memory
from helpers import fast_reader, save
from hostile_pickles import CHECKPOINT, named, new, text
from metadata_cases import (
    make_metadata,
    parse_metadata,
    with_plans,
)
from torch.distributed.checkpoint.metadata import (
    Metadata,
)
from torch.distributed.checkpoint.planner import SavePlan

import dcp_fast
from dcp_fast.metadata.lazy import columns_of

MIB = 1 << 20
PROTOCOLS = range(2, 6)


def read(pickled: bytes) -> Metadata:
    return parse_metadata(pickled, "path")


def unmade(metadata: Metadata) -> set[str]:
    """Attributes that are in the file only, so far."""
    names: set[str] = getattr(metadata, "_unmade", set())
    return names


# Megatron-Core


def same_attributes(ours: Metadata, theirs: Metadata) -> None:
    assert ours.mcore_data == theirs.mcore_data  # type: ignore[attr-defined]
    assert ours.all_local_plans == theirs.all_local_plans  # type: ignore[attr-defined]
    assert repr(ours.all_local_plans) == repr(theirs.all_local_plans)  # type: ignore[attr-defined]
    assert vars(ours) == vars(theirs)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_metadata_of_megatron_core(protocol: int) -> None:
    """Why there is an unpickler in Python: of all that known writers write, only the plans are left to it."""
    metadata = with_plans(make_metadata())
    pickled = pickle.dumps(metadata, protocol)
    ours = read(pickled)
    assert columns_of(ours) is not None
    assert unmade(ours) == {"all_local_plans"}
    assert type(ours.mcore_data) is dict  # type: ignore[attr-defined]  # C code reads it
    assert ours == metadata
    assert metadata == ours
    assert unmade(ours)
    same_attributes(ours, pickle.loads(pickled))
    assert not unmade(ours)
    assert isinstance(ours, Metadata)
    assert ours.__class__ is Metadata


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The classes of version 0.15, where torch's unpickler finds them."""
    name = "megatron.core.dist_checkpointing.strategies.torch"
    module = types.ModuleType(name)

    @dataclasses.dataclass
    class MCoreMetadata(Metadata):
        mcore_data: Any = None

    @dataclasses.dataclass(frozen=True)
    class MCoreSavePlan(SavePlan):
        mcore_data: Any = None

    for cls in (MCoreMetadata, MCoreSavePlan):
        cls.__module__, cls.__qualname__ = name, cls.__name__
        setattr(module, cls.__name__, cls)
    parts = name.split(".")
    for count in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_subclasses_of_megatron_core(
    protocol: int, megatron: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = with_plans(make_metadata())
    plans = plain.all_local_plans  # type: ignore[attr-defined]
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(Metadata)}
    metadata = megatron.MCoreMetadata(**fields, mcore_data=plain.mcore_data)  # type: ignore[attr-defined]
    data = {"a": {"nd_reformulated_orig_global_shape": (1, 2)}}
    metadata.all_local_plans = [megatron.MCoreSavePlan(**vars(plan), mcore_data=data) for plan in plans]
    pickled = pickle.dumps(metadata, protocol)
    for name in list(sys.modules):
        if name.partition(".")[0] == "megatron":
            monkeypatch.delitem(sys.modules, name)
    ours = read(pickled)  # without Megatron-Core
    assert columns_of(ours) is not None
    assert ours == plain
    assert ours.mcore_data == plain.mcore_data  # type: ignore[attr-defined]
    found = ours.all_local_plans  # type: ignore[attr-defined]
    assert found == plans
    assert [plan.mcore_data for plan in found] == [data] * len(plans)


def test_attributes_in_any_order_and_place() -> None:
    plans = with_plans(make_metadata()).all_local_plans  # type: ignore[attr-defined]
    for attributes in (
        {"plans": plans, "plain": {"a": 1}},
        {"plain": 5, "plan": plans[0], "more": "text", "items": plans[1].items},
        {"one": {"only": plans[0]}, "plain": {"only": 1}},
        {"nested": [[[plans[0]]]], "plain": [[[1]]]},
        {"tuple": ("a", plans[0]), "pair": (plans[0], 5)},
        {"plan": plans[0], "again": plans[0]},
        {"size": plans, "fqn": 5, "index": plans[0].items[0].index},  # names that the file has before
        {"enum": plans[0].items[0].type, "path": Path("a"), "none": None},
        {"plain": {"a": [1, (2, "b")]}},
    ):
        metadata = make_metadata()
        vars(metadata).update(attributes)
        ours = read(pickle.dumps(metadata))
        assert {name: getattr(ours, name) for name in attributes} == attributes
        assert vars(ours) == vars(metadata)
        # In front of the fields that torch's class has.
        pickled = pickle.dumps(metadata)
        first = copy.copy(metadata)
        vars(first).clear()
        vars(first).update({**attributes, **vars(metadata)})
        assert vars(read(pickle.dumps(first))) == vars(pickle.loads(pickled))


def test_attributes_that_are_not_there() -> None:
    ours = read(pickle.dumps(with_plans(make_metadata())))
    with pytest.raises(AttributeError, match="'Metadata' object has no attribute 'other'"):
        ours.other  # type: ignore[attr-defined]  # noqa: B018
    assert getattr(ours, "other", 5) == 5
    assert not hasattr(ours, "__deepcopy__")
    assert unmade(ours)  # nothing was read for that
    ours.all_local_plans = "mine"  # type: ignore[attr-defined]
    assert ours.all_local_plans == "mine"  # type: ignore[attr-defined]
    assert vars(ours)["all_local_plans"] == "mine"
    del ours.all_local_plans  # type: ignore[attr-defined]
    assert not hasattr(ours, "all_local_plans")
    ours = read(pickle.dumps(with_plans(make_metadata())))
    del ours.all_local_plans  # type: ignore[attr-defined]
    assert not hasattr(ours, "all_local_plans")


def test_pickled_and_copied() -> None:
    metadata = with_plans(make_metadata())
    pickled = pickle.dumps(metadata)
    for copied in (
        pickle.loads(pickle.dumps(read(pickled))),
        copy.copy(read(pickled)),
        copy.deepcopy(read(pickled)),
    ):
        assert type(copied) is Metadata
        assert copied == metadata
        same_attributes(copied, metadata)
    assert dataclasses.replace(read(pickled), version="2") == dataclasses.replace(metadata, version="2")
    assert repr(read(pickled)) == repr(metadata)


# The file is read again


def add_plans(path: Path) -> Metadata:
    metadata: Metadata = with_plans(pickle.loads((path / ".metadata").read_bytes()))
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return metadata


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoint", {"a": torch.arange(6.0), "step": 5})


def test_load(checkpoint: Path) -> None:
    written = add_plans(checkpoint)
    loaded = {"a": torch.zeros(6), "step": 0}
    dcp_fast.load(loaded, checkpoint_id=checkpoint)
    assert loaded["a"].tolist() == [0, 1, 2, 3, 4, 5]  # type: ignore[attr-defined]
    assert loaded["step"] == 5
    ours = fast_reader(checkpoint).read_metadata()
    assert unmade(ours)
    assert ours.storage_meta is not None
    assert ours.storage_meta.load_id is not None
    assert ours.all_local_plans == written.all_local_plans  # type: ignore[attr-defined]
    assert ours.storage_meta.load_id is not None


def test_file_that_has_changed(checkpoint: Path) -> None:
    add_plans(checkpoint)
    ours = fast_reader(checkpoint).read_metadata()
    unchanged = (checkpoint / ".metadata").read_bytes()
    save(checkpoint, {"a": torch.arange(6.0), "step": 6})
    add_plans(checkpoint)
    with pytest.raises(dcp_fast.MetadataAccessError, match="has changed since it was read") as caught:
        ours.all_local_plans  # type: ignore[attr-defined]  # noqa: B018
    assert "all_local_plans" in str(caught.value)
    assert caught.value.path == str(checkpoint / ".metadata")
    (checkpoint / ".metadata").unlink()
    with pytest.raises(dcp_fast.MetadataAccessError, match="cannot be read again") as caught:
        ours.all_local_plans  # type: ignore[attr-defined]  # noqa: B018
    assert isinstance(caught.value, OSError)
    (checkpoint / ".metadata").write_bytes(unchanged[:-9])
    with pytest.raises(dcp_fast.CorruptMetadataError):
        ours.all_local_plans  # type: ignore[attr-defined]  # noqa: B018
    (checkpoint / ".metadata").write_bytes(unchanged)
    assert len(ours.all_local_plans) == 3  # type: ignore[attr-defined]


# Hostile


def with_attribute(opcodes: bytes) -> bytes:
    """Whole metadata with any opcodes for an attribute."""
    fields = text("state_dict_metadata") + b"}" + text("storage_data") + b"}"
    return b"\x80\x04" + new("Metadata") + b"}(" + fields + text("more") + opcodes + b"ub."


def test_attributes_that_name_code(tmp_path: Path) -> None:
    import os

    marker = tmp_path / "executed"
    for value in (Call(os.system, f"touch {marker}"), [Call(os.system, f"touch {marker}")]):
        metadata = make_metadata()
        vars(metadata)["more"] = value
        pickled = pickle.dumps(metadata)
        ours = read(pickled)
        assert ours == make_metadata()  # what a load needs is there
        for _ in range(2):
            with pytest.raises(dcp_fast.UntrustedMetadataError, match="system"):
                ours.more  # type: ignore[attr-defined]  # noqa: B018
        with pytest.raises(dcp_fast.UntrustedMetadataError):
            vars(ours)
    assert not marker.exists()


def test_special_attributes_are_refused() -> None:
    plan = new("SavePlan", "torch.distributed.checkpoint.planner")
    for name in ("__class__", "__dict__", "__setstate__", "__reduce_ex__"):
        for value in (b"N", plan):
            with pytest.raises(dcp_fast.UntrustedMetadataError):
                read(with_attribute(value + text(name) + b"N"))


PLAN = new("SavePlan", "torch.distributed.checkpoint.planner")
DAMAGED = {
    "no end": PLAN[:-1],
    "no fields": PLAN + b"u",
    "underflow": PLAN + b"R" * 9,
    "underflow in a mark": PLAN + b"(" + b"\x86",
    "underflow below a list": PLAN + b"]((e",
    "no mark": PLAN + b"t" * 3,
    "a key without a value": PLAN + text("b"),
    "an unknown opcode": PLAN + b"\xff",
    "text beyond the end": PLAN + b"X\xff\xff\xff\x7fabc",
    "text far beyond the end": PLAN + b"\x8d" + b"\xff" * 7 + b"\x7f",
    "bytes beyond the end": PLAN + b"\x8e" + b"\xff" * 7 + b"\x0f",
    "a name that is not UTF-8": PLAN + b"X\x02\0\0\0\xc3\x28N",
    "many marks": PLAN + b"(" * 200_000,
    "nested objects": PLAN + b")\x81\x94}\x94(" * 100_000,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_attributes(name: str) -> None:
    """Found when the metadata is read, although nobody asks for the attribute."""
    pickled = with_attribute(DAMAGED[name])
    resident = reset_peak_memory()
    with pytest.raises(dcp_fast.LoadError) as caught:
        read(pickled)
    assert isinstance(caught.value, dcp_fast.CorruptMetadataError | dcp_fast.UntrustedMetadataError)
    assert peak_memory() - resident < 200 * MIB


def test_cut_plans() -> None:
    pickled = pickle.dumps(with_plans(make_metadata()))
    begin = pickled.rindex(b"all_local_plans")
    for length in range(begin, len(pickled), 7):
        with pytest.raises(dcp_fast.CorruptMetadataError):
            read(pickled[:length])


def test_huge_plans_take_no_memory() -> None:
    item = PLAN + b"}(" + text("items") + b"]" + text("usable") + b"\x88ub"
    pickled = with_attribute(b"](" + item * 400_000 + b"e")
    resident = reset_peak_memory()
    ours = read(pickled)
    assert peak_memory() - resident < 100 * MIB
    assert unmade(ours) == {"more"}


def test_attributes_that_share_what_they_hold() -> None:
    """A few bytes for each attribute, which must not become a copy of a large value for each."""
    large = b"](" + b"".join(text(str(number)) for number in range(100_000)) + b"e\x94"
    index = b"\x00"
    attributes = b"".join(text(f"more{number}") + b"h" + index for number in range(2000))
    pickled = with_attribute(large + attributes)
    resident = reset_peak_memory()
    ours = read(pickled)
    assert peak_memory() - resident < 300 * MIB
    assert ours.more1999[99_999] == "99999"  # type: ignore[attr-defined]


def test_names_that_are_recalled() -> None:
    """Only the memo of what was skipped tells them, so nothing is skipped."""
    named_later = PLAN + b"0(" + text("later") + b"\x94" + b"1"
    pickled = with_attribute(named_later + b"N" + b"h\x00" + b"K\x05")
    assert vars(pickle.loads(pickled))["later"] == 5
    ours = read(pickled)
    assert ours.later == 5  # type: ignore[attr-defined]
    assert columns_of(ours) is None


class Holding:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __reduce__(self) -> Any:
        return Holding, (self.inner,)

    def __eq__(self, other: object) -> bool:
        return type(other) is Holding and type(self.inner) is type(other.inner)

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("value", [datetime.timezone.utc, Holding(Holding(None))], ids=["known", "of users"])
def test_objects_behind_what_is_skipped(value: Any) -> None:
    """Their pickle recalls texts where names of fields stand, but for a moment."""
    metadata: Any = with_plans(make_metadata())
    metadata.more = value
    ours: Any = read(pickle.dumps(metadata))
    assert columns_of(ours) is not None
    assert ours.state_dict_metadata == metadata.state_dict_metadata
    if isinstance(value, Holding):
        with pytest.raises(dcp_fast.UntrustedMetadataError, match="Holding"):
            assert ours.more
    else:
        assert ours.more == value


def test_fields_of_torch_behind_what_is_skipped() -> None:
    planner_data = text("planner_data") + b"}" + text("a") + text("b") + b"\x85s"
    pickled = with_attribute(PLAN + planner_data)
    assert read(pickled).planner_data == pickle.loads(pickled).planner_data == {"a": ("b",)}
    assert CHECKPOINT.encode() in named(CHECKPOINT, "Metadata")


def test_paths_of_windows() -> None:
    """torch cannot make them elsewhere, whether the file is trusted or not."""
    import pathlib

    for module, name in (("pathlib", "WindowsPath"), ("pathlib._local", "WindowsPath"), ("pathlib", "PureWindowsPath")):
        path = named(module, name) + text("C:\\") + text("ckpt") + b"\x86R"
        state = b"}(" + text("checkpoint_id") + path + text("save_id") + text("s") + b"ub"
        fields = text("state_dict_metadata") + b"}" + text("storage_meta") + new("StorageMeta") + state
        ours = read(b"\x80\x04" + new("Metadata") + b"}(" + fields + b"ub.")
        assert columns_of(ours) is None  # no storage data
        assert ours.storage_meta is not None
        assert ours.storage_meta.checkpoint_id == pathlib.PureWindowsPath("C:\\ckpt")


def test_advice_helps() -> None:
    """Trust is advised only where torch could unpickle the file."""
    cases = {
        named("no_such_package.module", "Thing"): "there is no module no_such_package",
        named("torch.distributed.checkpoint.metadata", "OfLater"): "there is no OfLater in module torch.dist",
        named("torch.distributed.checkpoint.of_later", "Thing"): "there is no module torch.distributed.checkpoint.of_",
        named("safetensors.of_later", "Thing"): "there is no module safetensors.of_later",
        named("json.decoder.deeper", "Thing"): "there is no module json.decoder.deeper",
        named("argparse", "Thing"): "there is no Thing in module argparse",
        b"Pid\n": "no reader of it knows",
        named("os", "system"): "trust_metadata=True of load, FileSystemReader or install",
    }
    for opcodes, advice in cases.items():
        fields = text("state_dict_metadata") + b"}" + text("planner_data") + opcodes
        pickled = b"\x80\x04" + new("Metadata") + b"}(" + fields + b"ub."
        with pytest.raises(dcp_fast.UntrustedMetadataError) as caught:
            read(pickled)
        assert advice in str(caught.value)
        assert "never writes" not in str(caught.value)
        assert ("If you trust" in str(caught.value)) == (b"os" in opcodes)


def test_dtype_that_this_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = pickle.dumps(make_metadata())
    monkeypatch.delattr(torch, "bfloat16")
    with pytest.raises(
        dcp_fast.UntrustedMetadataError, match=r"torch\.bfloat16, which torch .* does not have"
    ) as caught:
        read(pickled)
    assert "If you trust" not in str(caught.value)


def test_planner_sees_no_difference(checkpoint: Path) -> None:
    add_plans(checkpoint)
    metadata = fast_reader(checkpoint).read_metadata()
    planner = dcp.DefaultLoadPlanner()
    planner.set_up_planner({"a": torch.zeros(6)}, metadata, True)
    assert len(planner.create_local_plan().items) == 1
    assert unmade(metadata)


def test_refusal_is_not_announced_as_missing_metadata(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = text("state_dict_metadata") + b"}" + text("planner_data") + named("os", "system")
    (checkpoint / ".metadata").write_bytes(b"\x80\x04" + new("Metadata") + b"}(" + fields + b"ub.")
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp_fast.load({"a": torch.zeros(6)}, checkpoint_id=checkpoint)
    assert isinstance(caught.value.failures[0][0], dcp_fast.UntrustedMetadataError)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_intact_records_where_torch_is_told_to_map_files(tmp_path: Path) -> None:
    """A record is no file, so torch's own load fails there. A quantized tensor and a value are read by torch.load."""
    quantized = torch.quantize_per_tensor(torch.eye(3), 0.5, 0, torch.qint8)
    path = save(tmp_path / "checkpoint", {"quantized": quantized, "step": 5})
    loaded = {"quantized": torch.quantize_per_tensor(torch.zeros(3, 3), 0.5, 0, torch.qint8), "step": 0}
    with torch.utils.serialization.config.patch("load.mmap", True):
        dcp_fast.load(loaded, checkpoint_id=path)
    assert loaded["step"] == 5
    assert torch.equal(loaded["quantized"].dequantize(), torch.eye(3))  # type: ignore[attr-defined]
