"""Planners with hooks: each is called for every item, in torch's order, and may do what it likes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    Entry,
    ShardedBuffer,
    assert_same_load,
    fast_reader,
    fill,
    image,
    torch_load,
    torch_reader,
    write_checkpoint,
)
from hooked_planners import (
    WHOLE,
    Doubling,
    Elsewhere,
    OtherDtype,
    Recording,
    Scratch,
    assert_one_at_a_time,
    mixed_state,
    write_mixed,
)
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import _create_read_items
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

import dcp_fast

BASES = [dcp.DefaultLoadPlanner, dcp_fast.DefaultLoadPlanner]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return write_mixed(tmp_path / "ckpt", fill((6, 2), torch.float16))


@pytest.mark.parametrize("base", BASES)
def test_calls_come_in_torchs_order(stored: Path, base: type) -> None:
    cls = type("Planner", (Recording, base), {})
    planners = [cls(), cls()]
    states = [mixed_state(), mixed_state()]
    torch_load(states[0], storage_reader=torch_reader(stored), planner=planners[0])
    dcp_fast.load(states[1], storage_reader=fast_reader(stored), planner=planners[1])
    assert planners[1].calls == planners[0].calls
    assert image(states[1]) == image(states[0])
    assert_one_at_a_time(planners[0].calls)


HOOKS = ["resolve_tensor", "lookup_tensor", "transform_tensor", "commit_tensor", "load_bytes"]


@pytest.mark.parametrize("where", ["class", "instance", "method_of_base"])
@pytest.mark.parametrize("hook", HOOKS)
def test_one_hook(stored: Path, hook: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Any]] = {"torch": [], "fast": []}

    def planner(name: str) -> dcp.DefaultLoadPlanner:
        original = getattr(dcp.DefaultLoadPlanner, hook)

        def override(self: Any, *args: Any) -> Any:
            seen[name].append(args[0])
            return original(self, *args)

        if where == "class":
            return type("Planner", (dcp_fast.DefaultLoadPlanner,), {hook: override})()
        planner = dcp_fast.DefaultLoadPlanner(trust_bytes=where == "method_of_base")
        if where == "instance":
            setattr(planner, hook, override.__get__(planner))
        else:
            # Some frameworks patch torch's class itself.
            monkeypatch.setattr(dcp.DefaultLoadPlanner, hook, override)
        return planner

    states = [mixed_state(), mixed_state()]
    torch_load(states[0], storage_reader=torch_reader(stored), planner=planner("torch"))
    monkeypatch.undo()
    dcp_fast.load(states[1], storage_reader=fast_reader(stored), planner=planner("fast"))
    assert seen["fast"] == seen["torch"]
    assert seen["torch"]
    assert image(states[1]) == image(states[0])


class SkipSome(dcp_fast.DefaultLoadPlanner):
    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        return LoadPlan([item for i, item in enumerate(new_plan.items) if i % 2], planner_data="kept")


@pytest.mark.parametrize("planner", [Doubling, Scratch, OtherDtype, Elsewhere, SkipSome])
@pytest.mark.parametrize("options", [{}, {"staging_bytes": 1, "threads": 1}])
def test_planners_with_ideas(stored: Path, planner: Callable[[], LoadPlanner], options: dict[str, Any]) -> None:
    assert_same_load(stored, mixed_state, planner=planner, options=options, fallback=None)


@pytest.mark.parametrize("size", [(3,), (4, 1), (5,), ()])
def test_resolve_tensor_returns_another_size(stored: Path, size: tuple[int, ...]) -> None:
    class Wrong(dcp.DefaultLoadPlanner):
        def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
            return torch.zeros(size)

    assert_same_load(stored, lambda: {"a": torch.zeros(4)}, planner=Wrong, raises=AssertionError)


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_that_raises(stored: Path, hook: str) -> None:
    def fail(self: Any, *args: Any) -> Any:
        raise KeyError("of the planner")

    planner = type("Failing", (dcp_fast.DefaultLoadPlanner,), {hook: fail})
    assert_same_load(stored, mixed_state, planner=planner, raises=KeyError)


class FromScratch(LoadPlanner):
    """Not derived from torch's planner at all."""

    def set_up_planner(self, state_dict: STATE_DICT_TYPE, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict = state_dict
        self.metadata: Metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for fqn, value in self.state_dict.items():
            items += _create_read_items(fqn, self.metadata.state_dict_metadata[fqn], value)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = ("loaded", torch.load(value, weights_only=False))

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self.state_dict[read_item.dest_index.fqn]
        if isinstance(tensor, ShardedBuffer):
            tensor = tensor.__get_tensor_shard__(read_item.dest_index)
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, offset, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def test_planner_from_scratch(stored: Path) -> None:
    assert_same_load(stored, mixed_state, planner=FromScratch, fallback=None)


class WholeChunks(FromScratch):
    """Asks for more than a stored chunk holds: torch narrows only where a length is smaller than the tensor."""

    def create_local_plan(self) -> LoadPlan:
        items = super().create_local_plan().items
        big = torch.Size([100])
        return LoadPlan(
            [ReadItem(i.type, i.dest_index, i.dest_offsets, i.storage_index, i.storage_offsets, big) for i in items]
        )

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.state_dict[read_item.dest_index.fqn]


def test_lengths_that_exceed_the_stored_tensor(stored: Path) -> None:
    assert_same_load(stored, lambda: {"a": torch.zeros(4, dtype=torch.float64)}, planner=WholeChunks)
    assert_same_load(stored, lambda: {"a": torch.zeros(4)}, planner=WholeChunks)


class Renaming(dcp.DefaultLoadPlanner):
    """The example of torch's documentation: keys of the state dict have a prefix that the checkpoint lacks."""

    def set_up_planner(self, state_dict: STATE_DICT_TYPE, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.original_state_dict = state_dict
        stripped = {key.removeprefix("foo_"): value for key, value in state_dict.items()}
        super().set_up_planner(stripped, metadata, is_coordinator)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.original_state_dict["foo_" + read_item.dest_index.fqn] = torch.load(value, weights_only=False)


def test_renaming_planner(stored: Path) -> None:
    assert_same_load(
        stored, lambda: {f"foo_{key}": value for key, value in mixed_state().items()}, planner=Renaming, fallback=1
    )


class Swapping(dcp_fast.DefaultLoadPlanner):
    """Reads two tensors from each other's entries."""

    def create_local_plan(self) -> LoadPlan:
        names = {"p": "q", "q": "p"}
        items = []
        for item in super().create_local_plan().items:
            index = MetadataIndex(names[item.storage_index.fqn], item.storage_index.offset)
            items.append(
                ReadItem(
                    LoadItemType.TENSOR, item.dest_index, item.dest_offsets, index, item.storage_offsets, item.lengths
                )
            )
        return LoadPlan(items)


def test_storage_index_of_another_fqn(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"p": Entry.of(torch.arange(5.0)), "q": Entry.of(torch.arange(5.0) + 10)})
    outcome = assert_same_load(tmp_path, lambda: {"p": torch.zeros(5), "q": torch.zeros(5)}, planner=Swapping)
    assert outcome.state["p"][0] == 10


def test_empty_state_dict_planner(stored: Path) -> None:
    states: list[dict[str, Any]] = [{}, {}]
    for reader, state in zip((torch_reader, fast_reader), states, strict=True):
        # dcp.load would drop keys that the state dict did not have before.
        _load_state_dict(state, reader(stored), no_dist=True, planner=_EmptyStateDictLoadPlanner())
    assert image(states[1]) == image(states[0])
    assert torch.equal(states[1]["z"], WHOLE)
    assert_same_load(stored, lambda: {"a": 1}, planner=_EmptyStateDictLoadPlanner, raises=AssertionError)


@pytest.mark.parametrize("base", BASES)
def test_planner_that_does_not_flatten(stored: Path, base: Any) -> None:
    assert_same_load(stored, mixed_state, planner=lambda: base(flatten_state_dict=False), fallback=1)
