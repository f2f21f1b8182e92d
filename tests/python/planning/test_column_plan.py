"""Plans in columns: LoadPlans to all code, whose ReadItems are made only if somebody looks at them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import Entry, ShardedBuffer, assert_same_load, fast_reader, fill, image, torch_planner, write_checkpoint
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import dcp_fast
from dcp_fast.planning.column_plan import ColumnPlan, PlannedTensors

FLOAT = torch.float32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    halves = [((0, 0), fill((2, 3), FLOAT, 1)), ((2, 0), fill((2, 3), FLOAT, 2))]
    return write_checkpoint(
        tmp_path,
        {
            "first": 1,
            "a": Entry((4, 3), FLOAT, halves, file="__%d_0.distcp"),
            "middle": [1, 2],
            "scalar": Entry.of(torch.tensor(5.0)),
            "empty": Entry.of(torch.zeros(0, 4)),
            "z": Entry.of(fill((6,), FLOAT, 3), file="__9_0.distcp"),
            "last": "text",
        },
    )


def wanted() -> dict[str, Any]:
    return {
        "first": 0,
        "a": torch.zeros(4, 3),
        "middle": [],
        "scalar": torch.zeros(()),
        "empty": torch.zeros(0, 4),
        "z": torch.zeros(6),
        "last": "",
    }


def plan_with(planner: dcp.LoadPlanner, path: Path, state: dict[str, Any] | None = None) -> LoadPlan:
    planner.set_up_planner(wanted() if state is None else state, fast_reader(path).read_metadata(), True)
    return planner.create_local_plan()


def column_plan(path: Path) -> ColumnPlan:
    plan = plan_with(dcp_fast.DefaultLoadPlanner(), path)
    assert isinstance(plan, ColumnPlan)
    assert plan.tensors is not None
    return plan


@pytest.fixture
def torchs(path: Path) -> LoadPlan:
    return plan_with(torch_planner(), path)


def no_items(*arguments: Any) -> ReadItem:
    raise AssertionError("a ReadItem was made")


def test_items_in_the_order_of_the_state_dict(path: Path, torchs: LoadPlan) -> None:
    plan = column_plan(path)
    assert plan.items == torchs.items
    assert plan.tensors is None  # whoever has the list may change it
    assert plan.items is plan.items


def with_types(value: Any) -> Any:
    """A value, and what classes it and its fields are of: equal tuples may be of several."""
    if isinstance(value, (ReadItem, MetadataIndex)):
        return type(value), [(name, with_types(field)) for name, field in vars(value).items()]
    return type(value), value, list(map(type, value)) if isinstance(value, tuple) else None


def test_items_are_as_torch_makes_them(path: Path, torchs: LoadPlan) -> None:
    """They are made without calling the classes."""
    items = column_plan(path).items
    assert list(map(with_types, items)) == list(map(with_types, torchs.items))
    assert list(map(hash, items)) == list(map(hash, torchs.items))
    assert list(map(repr, items)) == list(map(repr, torchs.items))
    with pytest.raises(dataclasses.FrozenInstanceError):
        items[1].lengths = torch.Size()  # type: ignore[misc]


@pytest.mark.parametrize("at", [slice(None), slice(1, 3), slice(None, None, -1), slice(-2, None), slice(9, 9)])
def test_single_items_and_slices(path: Path, torchs: LoadPlan, at: slice) -> None:
    tensors = column_plan(path).tensors
    assert tensors is not None
    of_tensors = [item for item in torchs.items if item.type is LoadItemType.TENSOR]
    assert list(tensors) == of_tensors
    assert tensors[at] == of_tensors[at]
    with pytest.raises(IndexError):
        tensors[len(tensors)]


def test_copies_and_pickles_are_torchs(path: Path, torchs: LoadPlan) -> None:
    for plan in (
        pickle.loads(pickle.dumps(column_plan(path))),
        copy.deepcopy(column_plan(path)),
        copy.copy(column_plan(path)),
    ):
        assert type(plan) is LoadPlan
        assert plan == torchs


def test_equality(path: Path, torchs: LoadPlan) -> None:
    assert column_plan(path) == torchs
    assert torchs == column_plan(path)
    assert column_plan(path) == column_plan(path)
    assert column_plan(path) != LoadPlan(torchs.items[:-1])
    assert column_plan(path) != dataclasses.replace(torchs, planner_data=1)
    assert column_plan(path) != 1
    with pytest.raises(TypeError):
        hash(column_plan(path))


def test_dataclass_functions(path: Path, torchs: LoadPlan) -> None:
    replaced = dataclasses.replace(column_plan(path), planner_data=3)
    assert replaced.items == torchs.items
    assert replaced.planner_data == 3
    assert repr(column_plan(path)).endswith(repr(torchs).removeprefix("LoadPlan"))
    plan = column_plan(path)
    plan.items = torchs.items[:1]
    assert plan.items == torchs.items[:1]
    assert plan.tensors is None


def test_no_items_are_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = wanted()
    dcp.load(expected, checkpoint_id=path)
    monkeypatch.setattr(PlannedTensors, "take", no_items)
    state = wanted()
    dcp_fast.load(state, checkpoint_id=path)
    assert state["a"].equal(expected["a"])
    assert state["z"].equal(expected["z"])
    state = wanted()
    dcp.load(state, storage_reader=fast_reader(path), planner=dcp_fast.DefaultLoadPlanner())
    assert state["a"].equal(expected["a"])
    with pytest.raises(AssertionError, match="was made"):
        column_plan(path).items  # noqa: B018


class Shorten:
    """Changes the list of items in place."""

    def create_local_plan(self) -> LoadPlan:
        plan: LoadPlan = super().create_local_plan()  # type: ignore[misc]
        del plan.items[1]
        return plan


class Replace:
    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        return dataclasses.replace(new_plan, items=[item for item in new_plan.items if item.dest_index.fqn != "z"])


@pytest.mark.parametrize("change", [Shorten, Replace])
def test_changed_items_count(path: Path, change: type) -> None:
    expected, state, unchanged = wanted(), wanted(), wanted()
    dcp.load(expected, checkpoint_id=path, planner=type("Theirs", (change, torch_planner), {})())
    dcp_fast.load(state, checkpoint_id=path, planner=type("Ours", (change, dcp_fast.DefaultLoadPlanner), {})())
    dcp_fast.load(unchanged, checkpoint_id=path)
    assert image(state) == image(expected) != image(unchanged)


class Changed(dcp_fast.FileSystemReader):
    """A reader whose storage data says something else after planning than before."""

    change: Callable[[dict[MetadataIndex, Any]], Any]

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        self.change(self.storage_data)
        return super().prepare_local_plan(plan)


def _swap_chunks(storage_data: dict[MetadataIndex, Any]) -> None:
    first, second = storage_data[MetadataIndex("a", (0, 0))], storage_data[MetadataIndex("a", (2, 0))]
    for name in ("relative_path", "offset", "length"):
        mine, other = getattr(first, name), getattr(second, name)
        setattr(first, name, other)
        setattr(second, name, mine)


def test_storage_data_that_was_changed_in_place_counts(path: Path) -> None:
    reader = Changed(path)
    reader.change = _swap_chunks
    expected, state = wanted(), wanted()
    dcp.load(expected, checkpoint_id=path)
    dcp_fast.load(state, storage_reader=reader)
    assert state["a"].equal(expected["a"].roll(2, 0))


def test_storage_data_without_a_chunk(path: Path) -> None:
    reader = Changed(path)
    reader.change = lambda storage_data: storage_data.pop(MetadataIndex("a", (2, 0)))
    with pytest.raises(dcp.api.CheckpointException) as info:
        dcp_fast.load(wanted(), storage_reader=reader)
    assert isinstance(info.value.failures[0][0], KeyError)


def test_metadata_without_a_chunk_in_storage_data(path: Path) -> None:
    metadata: Metadata = pickle.loads((path / ".metadata").read_bytes())
    del metadata.storage_data[MetadataIndex("a", (2, 0))]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    errors = []
    for load in (dcp.load, dcp_fast.load):
        with pytest.raises(dcp.api.CheckpointException) as info:
            load(wanted(), checkpoint_id=path)
        errors.append(info.value.failures[0][0])
    assert [type(error) for error in errors] == [KeyError, KeyError]
    assert errors[0].args == errors[1].args


def test_metadata_of_another_reading(path: Path) -> None:
    """Equal metadata that was read twice: the plan's columns are not the reader's."""
    planner, reader = dcp_fast.DefaultLoadPlanner(), fast_reader(path)
    state = wanted()
    expected = wanted()
    dcp.load(expected, checkpoint_id=path)
    planner.set_up_planner(state, fast_reader(path).read_metadata(), True)
    reader.set_up_storage_reader(reader.read_metadata(), True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    assert state["a"].equal(expected["a"])
    assert state["z"].equal(expected["z"])


@pytest.mark.parametrize("value", ["smaller", "of one dimension", "gone", "no tensor", "shards"])
def test_state_dict_that_changes_after_planning(path: Path, value: str) -> None:
    """Torch looks destinations up when it reads."""

    class Late(dcp.DefaultLoadPlanner):
        def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
            if value == "gone":
                del self.state_dict["a"]
            elif value == "smaller":
                self.state_dict["a"] = torch.zeros(3, 3)
            elif value == "of one dimension":
                self.state_dict["a"] = torch.zeros(12)
            elif value == "shards":
                self.state_dict["a"] = ShardedBuffer.make((4, 3), [(0, 0)], [torch.zeros(4, 3)])
            else:
                self.state_dict["a"] = 7
            return new_plan

    class FastLate(dcp_fast.DefaultLoadPlanner):
        finish_plan = Late.finish_plan

    errors = []
    for planner, reader in ((Late(), dcp.FileSystemReader(path)), (FastLate(), fast_reader(path))):
        try:
            dcp.load(wanted(), storage_reader=reader, planner=planner)
            errors.append(None)
        except dcp.api.CheckpointException as error:
            errors.append(type(error.failures[0][0]))
    assert errors[0] is None if value == "shards" else issubclass(errors[1], errors[0])
    assert (errors[0] is None) == (errors[1] is None)


def test_flat_state_dicts_are_set_up_as_torch_does(path: Path) -> None:
    flat = {"a": torch.zeros(4, 3), "x.y": torch.nn.Parameter(torch.zeros(2))}
    for state in (flat, {**flat, "n": {"a": 1}}, {**flat, 3: torch.zeros(1)}, {**flat, "l": [torch.zeros(1)]}, {}):
        for options in ({}, {"flatten_state_dict": False}, {"flatten_sharded_tensors": False}):
            ours, theirs = dcp_fast.DefaultLoadPlanner(**options), torch_planner(**options)
            for planner in (ours, theirs):
                planner.set_up_planner(state, None, True)
            assert image(ours.state_dict) == image(theirs.state_dict)
            assert all(value is state.get(key, value) for key, value in ours.state_dict.items() if key in flat)
            assert (ours.state_dict is state) == (theirs.state_dict is state)
            assert ours.original_state_dict is theirs.original_state_dict is state
            assert ours.mappings == theirs.mappings
            assert ours.is_coordinator is theirs.is_coordinator is True


def test_columns_and_items_load_the_same(path: Path) -> None:
    assert_same_load(path, wanted)


@pytest.mark.parametrize("seed", range(30))
def test_destinations_that_share_memory(tmp_path: Path, seed: int) -> None:
    """Files are read in the order in which the plan names them, bytes entries included; the last writer wins."""
    rng = random.Random(seed)
    entries: dict[str, Any] = {}
    for number in range(6):
        file = f"__{rng.randrange(3)}_0.distcp"
        is_bytes = rng.random() < 0.4
        entries[f"k{number}"] = (
            Entry(value=number, file=file) if is_bytes else Entry.of(fill((4,), FLOAT, number), file=file)
        )
    write_checkpoint(tmp_path, entries)
    starts = [rng.randrange(5) for _ in entries]

    def state() -> dict[str, Any]:
        memory = torch.zeros(8)
        return {
            fqn: None if entry.value is not None else memory[start : start + 4]
            for (fqn, entry), start in zip(entries.items(), starts, strict=True)
        }

    assert_same_load(tmp_path, state, changes=False)


class Forwarding:
    """Hands everything on to another object."""

    def __init__(self, to: Any) -> None:
        self._to = to

    def __getattr__(self, name: str) -> Any:
        return getattr(self._to, name)


def test_readers_and_planners_that_hand_everything_on(path: Path) -> None:
    expected = wanted()
    dcp.load(expected, checkpoint_id=path)
    for reader, planner in (
        (Forwarding(fast_reader(path)), dcp_fast.DefaultLoadPlanner()),
        (fast_reader(path), Forwarding(dcp_fast.DefaultLoadPlanner())),
    ):
        state = wanted()
        dcp_fast.load(state, storage_reader=reader, planner=planner)
        assert image(state) == image(expected)


class WithoutInit(dcp_fast.DefaultLoadPlanner):
    def __init__(self) -> None:
        self.flatten_state_dict = self.flatten_sharded_tensors = True
        self.allow_partial_load = False


def test_planner_that_does_without_our_init(path: Path) -> None:
    expected, state = wanted(), wanted()
    dcp.load(expected, checkpoint_id=path)
    dcp_fast.load(state, checkpoint_id=path, planner=WithoutInit())
    dcp_fast.load(state, checkpoint_id=path, planner=WithoutInit(), trust_bytes=True)
    assert image(state) == image(expected)


def test_dtensors_whose_local_tensors_tell_their_chunks(gloo: None, tmp_path: Path) -> None:
    """As Megatron-FSDP has them: alike to all appearances, each of other rows."""
    whole = {"w1": fill((4, 4), FLOAT, 1), "w2": fill((4, 4), FLOAT, 2), "w3": fill((4, 4), FLOAT, 3)}
    path = write_checkpoint(tmp_path / "c", {fqn: Entry.of(tensor) for fqn, tensor in whole.items()})
    mesh = DeviceMesh("cpu", [0])

    def rows(first: int | None) -> DTensor:
        local = torch.zeros(4 if first is None else 2, 4)
        value = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 4)), stride=(4, 1))
        if first is not None:
            local = value._local_tensor
            chunk = ChunkStorageMetadata(torch.Size((first, 0)), torch.Size((2, 4)))
            local.__create_chunk_list__ = lambda: [chunk]  # type: ignore[attr-defined]
            local.__get_tensor_shard__ = lambda index: local  # type: ignore[attr-defined]
        return value

    state = {"w1": rows(0), "w2": rows(2), "w3": rows(None)}
    dcp_fast.load(state, checkpoint_id=path)
    assert state["w1"].to_local().equal(whole["w1"][:2])
    assert state["w2"].to_local().equal(whole["w2"][2:])
    assert state["w3"].to_local().equal(whole["w3"])
