"""Metadata of torch 2.15 and later: its classes have fields that the running torch may lack."""

from __future__ import annotations

import dataclasses
import decimal
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Call
from helpers import fast_reader, save
from inert_values import INERT, facts
from metadata_cases import (
    assert_same_metadata,
    make_metadata,
    parse_metadata,
    pickled_by_later_torch,
)
from torch.distributed._shard.sharded_tensor import metadata as shard_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

import dcp_fast
from dcp_fast import _native
from dcp_fast.metadata.lazy import columns_of
from dcp_fast.metadata.unpickler import MetadataUnpickler
from dcp_fast.values import arrays, inert

PROTOCOLS = range(2, 6)
HAS_STRIDES = "strides" in {field.name for field in dataclasses.fields(TensorProperties)}


def read(pickled: bytes) -> Metadata:
    return parse_metadata(pickled, "path")


# torch 2.15: a sixth part of the state of properties


def with_properties_of(cls: type, metadata: Metadata) -> Metadata:
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            fields = {name: getattr(entry.properties, name) for name in list(vars(TensorProperties()))[:5]}
            entry.properties = cls(**fields)
    return metadata


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("cls", [TensorProperties, shard_metadata.TensorProperties], ids=["checkpoint", "shard"])
@pytest.mark.parametrize("strides", [None, (), (1,), (1 << 40, 3, 1)], ids=repr)
def test_strides(protocol: int, cls: type, strides: tuple[int, ...] | None) -> None:
    metadata = with_properties_of(cls, make_metadata())
    pickled = pickled_by_later_torch(metadata, protocol, strides=lambda _: (strides,))
    # The bytes of torch 2.15 but for its sixth part, which stands where pickle puts it.
    without = pickled_by_later_torch(metadata, protocol, strides=lambda _: ())
    assert len(pickled) > len(without)
    ours = read(pickled)
    assert columns_of(ours) is not None
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata) and HAS_STRIDES:
            entry.properties.strides = strides  # type: ignore[attr-defined]
    assert_same_metadata(ours, metadata)
    properties = [entry.properties for entry in ours.state_dict_metadata.values() if hasattr(entry, "properties")]
    assert {type(each) for each in properties} == {cls}
    assert {getattr(each, "strides", "none") for each in properties} == {strides if HAS_STRIDES else "none"}


def test_strides_are_those_of_each_tensor() -> None:
    """Read natively, whatever this torch does with them."""
    numbers = itertools.count(5)
    written: list[tuple[int, ...]] = []

    def strides(_: Any) -> tuple[tuple[int, ...]]:
        written.append((next(numbers), 1))
        return (written[-1],)

    metadata = make_metadata()
    columns = _native.parse_metadata(pickled_by_later_torch(metadata, strides=strides))
    assert not isinstance(columns, str)
    fields = [columns.entry_fields(number) for number in range(columns.entry_count)]
    assert [each[7] for each in fields if each is not None] == written


@pytest.mark.parametrize("strides", ["1", (1.5,), [1], ((1,),)], ids=repr)
def test_strides_of_other_types(strides: Any) -> None:
    with pytest.raises(dcp_fast.UntrustedMetadataError, match="strides of other than numbers"):
        read(pickled_by_later_torch(make_metadata(), strides=lambda _: (strides,)))


def test_checkpoint_of_torch_215(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (TensorProperties, shard_metadata.TensorProperties):
        state = cls.__getstate__
        monkeypatch.setattr(cls, "__getstate__", lambda self, state=state: (*state(self)[:5], (3, 1)))
    path = save(tmp_path / "checkpoint", {"a": torch.arange(6.0).view(2, 3), "step": 5})
    monkeypatch.undo()
    loaded = {"a": torch.zeros(2, 3), "step": 0}
    dcp_fast.load(loaded, checkpoint_id=path)
    assert loaded["a"].tolist() == [[0, 1, 2], [3, 4, 5]]  # type: ignore[attr-defined]
    assert loaded["step"] == 5
    assert columns_of(fast_reader(path).read_metadata()) is not None


# Fields of still later versions


CLASSES = (
    *(BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex, StorageMeta, TensorStorageMetadata, _StorageInfo),
)
VALUES: dict[str, Any] = {
    "none": None,
    "flag": True,
    "number": 5,
    "long": 1 << 40,
    "real": 0.5,
    "text": "t",
    "bytes": b"b",
    "tuple": (1, "a"),
    "list": [1, [2]],
    "dict": {"a": 1},
    "shape": torch.Size([1]),
    "dtype": torch.float32,
    "object": BytesStorageMetadata(),
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("protocol", [2, 4])
def test_fields_of_later_versions_are_left_out(cls: type, protocol: int) -> None:
    metadata = make_metadata()
    values = {name: value for name, value in VALUES.items() if protocol > 2 or name != "bytes"}
    ours = read(pickled_by_later_torch(metadata, protocol, more={cls: values}))
    assert columns_of(ours) is not None  # below protocol 3, bytes are left to the unpickler in Python
    assert_same_metadata(ours, metadata)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", [name for name in INERT if "tensor" not in name])
def test_inert_values_in_later_fields(name: str, protocol: int) -> None:
    """They are left out natively, and made where the running torch has the field, or as an attribute."""
    metadata = make_metadata()
    if name == "numpy values without bytes" and protocol == 5:
        pytest.skip("the pickler of CPython that is written in Python fails for two empty buffers")
    pickled = pickled_by_later_torch(metadata, protocol, more={cls: {"more": INERT[name]} for cls in CLASSES})
    ours = read(pickled)
    assert columns_of(ours) is not None
    assert_same_metadata(ours, metadata)

    entry = MetadataUnpickler(pickled).load().state_dict_metadata["sharded"]
    theirs = pickle.loads(pickled).state_dict_metadata["sharded"]
    assert facts(entry.more) == facts(theirs.more)

    attributes: Any = read(pickled_by_later_torch(metadata, protocol, more={Metadata: {"more": INERT[name]}}))
    assert columns_of(attributes) is not None
    assert facts(attributes.more) == facts(theirs.more)
    assert attributes == metadata


class Marker:
    """Stands for another class."""


def test_all_that_makes_inert_values_is_known_natively() -> None:
    planner = "torch.distributed.checkpoint.planner"
    enums = (f"{planner}.LoadItemType", f"{planner}.WriteItemType")
    for name in {*inert.CALLS, *inert.CONSTANTS, *arrays.calls(), *enums}:
        module, _, own = name.rpartition(".")
        more = {TensorStorageMetadata: {"more": Marker}}
        pickled = pickled_by_later_torch(make_metadata(), more=more, names={Marker: (module, own)})
        assert columns_of(read(pickled)) is not None, name


def keys_of_any_kind() -> list[Any]:
    index = MetadataIndex("a", torch.Size([1]))
    plain = [1.5, b"x", None, True, (1, "a"), ((1, 2), 3), frozenset({(1,), 2}), decimal.Decimal(1), 1 << 70]
    return [*plain, torch.float32, torch.Size([1, 2]), index, ("a", index), WriteItem(index, WriteItemType.TENSOR), int]


@pytest.mark.parametrize("key", keys_of_any_kind(), ids=repr)
def test_keys_and_items_of_sets(key: Any) -> None:
    metadata: Any = make_metadata()
    for value in ({key: 1}, {key}, frozenset({key}), {"nested": {key: 1}}):
        metadata.more = value
        for protocol in PROTOCOLS:
            ours: Any = read(pickle.dumps(metadata, protocol))
            assert ours.more == value


def test_devices_in_later_fields(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoint", {"a": torch.arange(6.0)})
    for device in (torch.device("cpu"), torch.device("cuda", 1)):
        metadata = pickle.loads((path / ".metadata").read_bytes())
        metadata.state_dict_metadata["a"].device = device
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        loaded = {"a": torch.zeros(6)}
        dcp_fast.load(loaded, checkpoint_id=path)
        assert torch.equal(loaded["a"], torch.arange(6.0))
    for arguments in ((), (5,), ("cpu", "cpu"), ("no device",), ("cpu", 1 << 70)):
        metadata.planner_data = Call(torch.device, *arguments)  # it is kept, and so must be made
        with pytest.raises(dcp_fast.LoadError):
            read(pickle.dumps(metadata))


def test_more_parts_of_the_state_of_properties_are_left_out() -> None:
    metadata = make_metadata()
    ours = read(pickled_by_later_torch(metadata, strides=lambda _: (None, 7, "eighth")))
    assert columns_of(ours) is not None
    assert_same_metadata(ours, metadata)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_fields_that_the_running_torch_has_are_kept(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {**cls.__dataclass_fields__, "more": dataclasses.field(default=None)}  # type: ignore[attr-defined]
    fields["more"].name = "more"
    fields["more"]._field_type = dataclasses._FIELD  # type: ignore[attr-defined]
    monkeypatch.setattr(cls, "__dataclass_fields__", fields)
    pickled = pickled_by_later_torch(make_metadata(), more={cls: {"more": (5, "a")}})
    ours, theirs = read(pickled), pickle.loads(pickled)

    def objects(metadata: Metadata) -> list[Any]:
        entries = list(metadata.state_dict_metadata.values())
        chunks = [chunk for entry in entries for chunk in getattr(entry, "chunks", ())]
        return [*entries, *chunks, *metadata.storage_data, *metadata.storage_data.values(), metadata.storage_meta]

    found = [each for each in objects(ours) if type(each) is cls]
    assert found
    assert all(each.more == (5, "a") for each in found)
    assert len(found) == len([each for each in objects(theirs) if type(each) is cls])


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_later_fields_that_name_code_are_refused(cls: type, tmp_path: Path) -> None:
    import os

    marker = tmp_path / "executed"
    for fields in ({"more": Call(os.system, f"touch {marker}")}, {"__setstate__": 5}, {"__class__": None}):
        with pytest.raises(dcp_fast.UntrustedMetadataError):
            read(pickled_by_later_torch(make_metadata(), more={cls: fields}))
    assert not marker.exists()


def test_too_many_later_fields() -> None:
    fields = {f"field{number}": number for number in range(10_000)}
    ours = read(pickled_by_later_torch(make_metadata(), more={StorageMeta: fields}))
    assert ours.storage_meta is not None
    assert ours.storage_meta.save_id == "save"
