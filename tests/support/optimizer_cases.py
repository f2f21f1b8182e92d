"""What the tests of optimizer state share: scenarios on real ranks, results compared in full, checkpoints, planners."""

from __future__ import annotations

import pickle
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import image, torch_planner, torch_reader
from ranks import Ranks
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import ShardingSpec
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata
from torch.distributed.fsdp._shard_utils import _create_chunk_sharded_tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dcp_fast

__all__ = [
    "BASES",
    "KEY",
    "PLANNERS",
    "Allocations",
    "Scenario",
    "assert_same_result",
    "by_rows",
    "check",
    "fast_reader",
    "flipping",
    "load_fast",
    "lookup_elsewhere",
    "recording",
    "result_image",
    "torch_load_optimizer",
    "write_metadata",
]

# Bound here so that an installed dcp_fast cannot become its own oracle.
torch_load_optimizer = dcp.load_sharded_optimizer_state_dict
load_fast = dcp_fast.load_sharded_optimizer_state_dict
fast_reader = dcp_fast.FileSystemReader

KEY = "optimizer"

Scenario = Callable[[Path], None]


def run_all(scenarios: list[Scenario], path: Path) -> list[str]:
    """What failed on this rank. A failure after the collective calls stops nobody else."""
    failures = []
    for scenario in scenarios:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scenario(path)
        except (Exception, CheckpointException):
            traceback.print_exc()  # at once: the others may be stuck now
            failures.append(f"{scenario}:\n{traceback.format_exc()}")
        dist.barrier()
    return failures


def check(ranks: Ranks, world_size: int, scenarios: list[Scenario], path: Path) -> None:
    results = ranks.run(world_size, run_all, scenarios, path)
    failures = [f"rank {rank}: {text}" for rank, texts in enumerate(results) for text in texts]
    assert not failures, "\n".join(failures)


# Comparison


def result_image(value: Any) -> Any:
    """As helpers.image, with all that a ShardedTensor and a DTensor say of themselves."""
    if isinstance(value, ShardedTensor):
        shards = [(repr(shard.metadata), image(shard.tensor)) for shard in value.local_shards()]
        ranks = dist.get_process_group_ranks(value._process_group)
        spec = value.sharding_spec()
        assert isinstance(spec, ShardingSpec)
        facts = (type(value), value.dtype, value.requires_grad, tuple(value.size()), ranks)
        return (*facts, repr(value.metadata()), repr(spec), shards)
    if isinstance(value, DTensor):
        facts = (type(value), value.dtype, value.requires_grad, tuple(value.size()), value.stride())
        return (*facts, value.device_mesh, value.placements, image(value.to_local()))
    if isinstance(value, Mapping):
        return (type(value), [(key, result_image(item)) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value), [result_image(item) for item in value])
    return image(value)


def assert_same_result(
    path: Path,
    model: Callable[[], dict[str, Any]],
    *,
    key: str = KEY,
    planner: tuple[Callable[[], Any], Callable[[], Any]] | None = None,
    reader: Callable[[Path], Any] = fast_reader,
) -> dict[str, Any]:
    """Load with torch and with dcp_fast, and compare all that came of it.

    Args:
        path: the checkpoint.
        model: makes the model's state dict; called twice.
        key: of the optimizer.
        planner: makes the planner for torch, and for dcp_fast.
        reader: makes the reader for dcp_fast.

    Returns:
        What dcp_fast returned.
    """
    theirs, ours = (None, None) if planner is None else (planner[0](), planner[1]())
    expected = torch_load_optimizer(model(), key, torch_reader(path), theirs)
    actual = load_fast(model(), key, reader(path), ours)
    assert result_image(actual) == result_image(expected)
    return actual


class Allocations(TorchDispatchMode):
    """Records the largest memory, in bytes, that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if type(leaf) is torch.Tensor and leaf.device.type == "cpu":
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


# Planners


def recording(base: type, calls: list[Any]) -> Any:
    """A planner that notes which hooks are called with what."""

    class Recording(base):  # type: ignore[misc]
        def set_up_planner(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
            calls.append(("set_up_planner", list(state_dict)))
            super().set_up_planner(state_dict, *args, **kwargs)

        def create_local_plan(self) -> Any:
            plan = super().create_local_plan()
            calls.append(("create_local_plan", plan.items))
            return plan

        def finish_plan(self, plan: Any) -> Any:
            calls.append(("finish_plan", plan.items))
            return super().finish_plan(plan)

        def lookup_tensor(self, index: Any) -> torch.Tensor:
            calls.append(("lookup_tensor", index))
            return super().lookup_tensor(index)

        def transform_tensor(self, read_item: Any, tensor: torch.Tensor) -> torch.Tensor:
            calls.append(("transform_tensor", read_item, tuple(tensor.shape)))
            return super().transform_tensor(read_item, tensor)

        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            calls.append(("commit_tensor", read_item, image(tensor)))
            super().commit_tensor(read_item, tensor)

        def load_bytes(self, read_item: Any, value: Any) -> None:
            calls.append(("load_bytes", read_item))
            super().load_bytes(read_item, value)

    return Recording


def flipping(base: type) -> Any:
    """A planner that has every tensor read into memory of its own, and commits the opposite of each bit."""

    class Flipping(base):  # type: ignore[misc]
        def transform_tensor(self, read_item: Any, tensor: torch.Tensor) -> torch.Tensor:
            self.places = {**getattr(self, "places", {}), read_item: super().transform_tensor(read_item, tensor)}
            return torch.empty_like(self.places[read_item])

        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            bits = tensor.detach().contiguous().view(torch.uint8 if tensor.dim() else torch.int32)
            self.places[read_item].detach().copy_((~bits).view(tensor.dtype).view(tensor.shape))

    return Flipping


def lookup_elsewhere(base: type) -> Any:
    """A planner whose tensors lie elsewhere than in the state dict, which gets them at the end."""

    class Elsewhere(base):  # type: ignore[misc]
        def lookup_tensor(self, index: Any) -> torch.Tensor:
            self.found = getattr(self, "found", {})
            place = super().lookup_tensor(index)
            return self.found.setdefault(index, (place, torch.zeros_like(place.detach())))[1]

        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            place, elsewhere = self.found[read_item.dest_index]
            place.detach().copy_(elsewhere)

    return Elsewhere


def bytes_replaced(base: type) -> Any:
    """A planner that puts something else in the place of what is not a tensor."""

    class Replaced(base):  # type: ignore[misc]
        def load_bytes(self, read_item: Any, value: Any) -> None:
            self.state_dict[read_item.dest_index.fqn] = ("replaced", len(value.getvalue()))

    return Replaced


PLANNERS = [flipping, lookup_elsewhere, bytes_replaced]
BASES = (torch_planner, dcp_fast.DefaultLoadPlanner)


# Checkpoints and models


def by_rows(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> ShardedTensor:
    """As FSDP shards a parameter and its state."""
    group = group or dist.group.WORLD
    assert group is not None
    return _create_chunk_sharded_tensor(tensor, dist.get_rank(group), dist.get_world_size(group), 1, group)


def write_metadata(path: Path, sizes: Mapping[str, Sequence[int]], planner_data: Any = ...) -> Path:
    """A checkpoint of float32 tensors of these sizes by dotted key, that has no data."""
    path.mkdir(parents=True, exist_ok=True)
    entries: Any = {
        key: TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(size), [])
        for key, size in sizes.items()
    }
    paths = {key: tuple(key.split(".")) for key in sizes} if planner_data is ... else planner_data
    with (path / ".metadata").open("wb") as file_object:
        pickle.dump(Metadata(entries, planner_data=paths, storage_data={}), file_object)
    return path
