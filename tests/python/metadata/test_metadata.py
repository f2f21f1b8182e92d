"""Metadata equals what torch unpickles, whoever wrote it, and is a Metadata to all code that uses one."""

from __future__ import annotations

import dataclasses
import io
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import assert_same_load, fast_reader, save, torch_planner, torch_reader
from metadata_cases import (
    assert_same_metadata,
    make_metadata,
    old_metadata,
    parse_metadata,
    random_metadata,
    write_metadata,
)
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

import dcp_fast
from dcp_fast import _native
from dcp_fast.metadata.lazy import columns_of
from dcp_fast.metadata.unpickler import MetadataUnpickler

PROTOCOLS = range(6)
NATIVE = range(2, 6)  # nobody writes metadata with older protocols, which the Python unpickler reads
VERSIONS = ["2.0", "2.3", "2.6", "Python 3.11", "2.0, Python 3.11"]


def read(pickled: bytes) -> Metadata:
    return parse_metadata(pickled, "path")


def is_native(metadata: Metadata) -> bool:
    return columns_of(metadata) is not None


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_everything_that_dcp_writes(protocol: int) -> None:
    pickled = pickle.dumps(make_metadata(), protocol)
    assert is_native(read(pickled)) == (protocol in NATIVE)
    assert_same_metadata(read(pickled), pickle.loads(pickled))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_older_formats(protocol: int, version: str) -> None:
    pickled = old_metadata(make_metadata(), protocol, version)
    ours, theirs = read(pickled), pickle.loads(pickled)
    assert is_native(ours) == (protocol in NATIVE)
    for metadata in (ours, theirs):
        if metadata.storage_meta is not None and not hasattr(metadata.storage_meta, "modules"):
            metadata.storage_meta.modules = []  # torch leaves the object without the field, and so does our unpickler
    assert_same_metadata(ours, theirs)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_restricted_unpickler_reads_the_same(protocol: int) -> None:
    for pickled in [pickle.dumps(make_metadata(), protocol)] + [
        old_metadata(make_metadata(), protocol, version) for version in VERSIONS
    ]:
        theirs, ours = pickle.loads(pickled), MetadataUnpickler(pickled).load()
        for metadata in (theirs, ours):
            if metadata.storage_meta is not None and not hasattr(metadata.storage_meta, "modules"):
                metadata.storage_meta.modules = []
        assert_same_metadata(ours, theirs)


@pytest.mark.parametrize("seed", range(60))
def test_random_metadata(seed: int) -> None:
    rng = random.Random(seed)
    metadata = random_metadata(rng)
    pickled = pickle.dumps(metadata, rng.choice(NATIVE))
    assert is_native(read(pickled))
    assert_same_metadata(read(pickled), metadata)


# Only Python's unpickler knows these.
UNUSUAL: dict[str, Any] = {
    "a set": {"planner_data": {"k": {1, 2}}},
    "a frozenset": {"planner_data": {"k": frozenset([1])}},
    "a complex number": {"planner_data": {"k": 1j}},
    "a tuple as key": {"planner_data": {("a", 1): 1}},
    "a giant offset": {"storage_data": {MetadataIndex("a"): dcp.filesystem._StorageInfo("f", 1 << 70, 1)}},
    "an offset of text": {"storage_data": {MetadataIndex("a"): dcp.filesystem._StorageInfo("f", "1", 1)}},  # type: ignore[arg-type]
    "storage data of text": {"storage_data": {"a": "b"}},
    "storage data in a list": {"storage_data": [1]},
    "a chunk of other dimensions": {
        "state_dict_metadata": {
            "a": TensorStorageMetadata(
                dcp.metadata.TensorProperties(),
                torch.Size([1]),
                [dcp.metadata.ChunkStorageMetadata(torch.Size([1, 2]), torch.Size([]))],
            )
        }
    },
}


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unusual_metadata(protocol: int, name: str) -> None:
    metadata = dataclasses.replace(make_metadata(), **UNUSUAL[name])
    pickled = pickle.dumps(metadata, protocol)
    assert isinstance(_native.parse_metadata(pickled), str)
    assert_same_metadata(read(pickled), metadata)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [torch.Size([2, 3]), 2.5, float("inf"), 1 << 70, -(1 << 2000), b"bytes", b"b" * 300, "t" * 300, bytearray(1)],
)
def test_planner_data_with_other_values(protocol: int, value: Any) -> None:
    metadata = Metadata({}, {"k": [value, value, (value, 1)]}, {})
    pickled = pickle.dumps(metadata, protocol)
    assert is_native(read(pickled)) == (not isinstance(value, bytearray)) or protocol < 3
    assert_same_metadata(read(pickled), metadata)


@pytest.mark.parametrize("planner_data", [None, {}, [], ("a", 1), "text", 5])
def test_planner_data_of_any_kind(planner_data: Any) -> None:
    metadata = Metadata({}, planner_data, {})
    ours = read(pickle.dumps(metadata))
    assert is_native(ours)
    assert_same_metadata(ours, metadata)


def test_lists_and_chunks_that_are_shared() -> None:
    metadata = make_metadata()
    entry = metadata.state_dict_metadata["sharded"]
    metadata.state_dict_metadata["again"] = entry
    metadata.state_dict_metadata["same chunks"] = dataclasses.replace(entry)
    assert_same_metadata(read(pickle.dumps(metadata)), metadata)


def test_recursive_planner_data() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    ours = read(pickle.dumps(Metadata({}, {"loop": loop}, {})))
    assert ours.planner_data["loop"][1] is ours.planner_data["loop"]
    pair: tuple[Any, ...] = ([],)
    pair[0].append(pair)
    ours = read(pickle.dumps(Metadata({}, {"loop": pair}, {})))
    assert ours.planner_data["loop"][0][0] is ours.planner_data["loop"]


# A checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = {
        "model": {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor(1, dtype=torch.int8)},
        "list": [torch.zeros(2), {"deep": torch.ones(0)}],
        "step": 5,
    }
    return save(tmp_path_factory.mktemp("metadata") / "checkpoint", state)


def test_read_metadata_sets_what_torchs_does(checkpoint: Path) -> None:
    readers = torch_reader(checkpoint), fast_reader(checkpoint)
    theirs, ours = (reader.read_metadata() for reader in readers)
    assert is_native(ours)
    assert ours.storage_meta is not None
    assert ours.storage_meta.load_id == readers[1].load_id
    ours.storage_meta.load_id = readers[0].load_id
    assert_same_metadata(ours, theirs)


def test_storage_meta_is_made(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, None, {})))
    reader = fast_reader(tmp_path)
    assert reader.read_metadata().storage_meta == StorageMeta(load_id=reader.load_id)


def test_rank_local_metadata(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "__3.metadata").write_bytes((checkpoint / ".metadata").read_bytes())
    ours = fast_reader(tmp_path).read_metadata(rank=3)
    assert is_native(ours)
    assert list(ours.state_dict_metadata) == ["model.a", "model.b", "list.0", "list.1.deep", "step"]
    with pytest.raises(FileNotFoundError):
        fast_reader(tmp_path).read_metadata(rank=4)


def test_compressed_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    path = save(tmp_path / "zstd", {"a": torch.ones(4)}, _extensions=[ZStandard()])
    ours = fast_reader(path).read_metadata()
    assert is_native(ours)
    (info,) = ours.storage_data.values()
    assert info.transform_descriptors == [ZStandard().get_descriptor()]


def test_torchs_planner_makes_only_what_it_needs(checkpoint: Path) -> None:
    metadata = fast_reader(checkpoint).read_metadata()
    planner = torch_planner()
    planner.set_up_planner({"model": {"a": torch.zeros(3, 4)}}, metadata, True)
    assert len(planner.create_local_plan().items) == 1
    made = [fqn for fqn in metadata.state_dict_metadata if metadata.state_dict_metadata.made(fqn)]  # type: ignore[attr-defined]
    assert made == ["model.a"]
    assert is_native(metadata)


class ThoroughPlanner(dcp.DefaultLoadPlanner):
    """Looks at all metadata in every way, as planners of frameworks do."""

    def create_local_plan(self) -> dcp.LoadPlan:
        assert self.metadata is not None
        for fqn, entry in self.metadata.state_dict_metadata.items():
            assert self.metadata.state_dict_metadata[fqn] is entry
            for index, part in enumerate(getattr(entry, "chunks", ())):
                assert MetadataIndex(fqn, part.offsets, index) in self.metadata.storage_data
        for index, info in self.metadata.storage_data.items():
            assert self.metadata.storage_data[index] is info
        assert dict(self.metadata.planner_data).keys() == self.metadata.state_dict_metadata.keys()
        return super().create_local_plan()


def test_planner_that_looks_at_everything(checkpoint: Path) -> None:
    def make() -> dict[str, Any]:
        return {"model": {"a": torch.zeros(3, 4)}, "step": 0}

    assert_same_load(checkpoint, make, planner=ThoroughPlanner)
    assert_same_load(checkpoint, make)


@dataclasses.dataclass
class OfUsers:
    number: int


class KeepsMetadata(dcp_fast.DefaultLoadPlanner):
    metadata: Any


def test_trusted_metadata(checkpoint: Path, tmp_path: Path) -> None:
    metadata: Any = torch_reader(checkpoint).read_metadata()
    metadata.planner_data = OfUsers(5)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    reader = fast_reader(tmp_path, trust_metadata=True)
    metadata.storage_meta.load_id = reader.load_id
    assert reader.read_metadata() == metadata
    with dcp_fast.install(trust_metadata=True):
        assert fast_reader(checkpoint).trust_metadata
    assert not fast_reader(checkpoint).trust_metadata


@pytest.mark.parametrize("passed", [True, False])
def test_trusted_metadata_is_read_natively(tmp_path: Path, passed: bool) -> None:
    save(tmp_path, {"step": 5})
    metadata: Any = torch_reader(tmp_path).read_metadata()
    metadata.own = OfUsers(6)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    reader = torch_reader(tmp_path) if passed else fast_reader(tmp_path, trust_metadata=True)
    planner = KeepsMetadata()
    state = {"step": 0}
    dcp_fast.load(state, storage_reader=reader, planner=planner)
    assert state == {"step": 5}
    assert columns_of(planner.metadata) is not None
    assert planner.metadata.own == OfUsers(6)
    assert planner.metadata.storage_meta.load_id == reader.load_id


# Columns


def test_columns() -> None:
    metadata = make_metadata()
    ours = read(pickle.dumps(metadata))
    columns = columns_of(ours)
    assert columns is not None
    assert columns.fqns() == list(metadata.state_dict_metadata)
    for number, (fqn, entry) in enumerate(metadata.state_dict_metadata.items()):
        assert columns.find_entry(fqn) == number
        if not isinstance(entry, TensorStorageMetadata):
            assert columns.entry_fields(number) is None
            continue
        expected = [[list(part.offsets), list(part.sizes)] for part in entry.chunks]
        assert columns.chunks(number).tolist() == expected
        for index, part in enumerate(entry.chunks):
            row = columns.row_of_chunk(number, index)
            info = metadata.storage_data[MetadataIndex(fqn, part.offsets)]
            assert columns.files()[columns.row_files[row]] == info.relative_path
            assert (columns.row_offsets[row], columns.row_lengths[row]) == (info.offset, info.length)
    assert columns.find_entry("only in storage") == columns.find_entry("absent") == -1
    assert columns.row_count == len(metadata.storage_data)
    with pytest.raises(TypeError):
        columns.row_offsets[0] = 1  # type: ignore[index]


def test_columns_outlive_what_they_came_from() -> None:
    chunks = _native.parse_metadata(pickle.dumps(make_metadata())).chunks(len(make_metadata().state_dict_metadata) - 8)  # type: ignore[union-attr]
    assert chunks.tolist() == [[[0, 0], [2, 1 << 40]], [[2, 0], [2, 300]], [[2, 300], [2, (1 << 40) - 300]]]


def test_columns_are_given_up_when_a_dict_changes() -> None:
    ours = read(pickle.dumps(make_metadata()))
    del ours.state_dict_metadata["zero"]
    assert columns_of(ours) is None
    assert columns_of(make_metadata()) is None


def test_metadata_of_many_ranks() -> None:
    stream = io.BytesIO()
    write_metadata(stream, 1010, 20)
    ours = read(stream.getvalue())
    assert is_native(ours)
    assert_same_metadata(ours, pickle.loads(stream.getvalue()))
