"""End-to-end proofs with FSDP1: training resumed from sharded optimizer state is the training that was not interrupted.

They also say where the result of torch's load_sharded_optimizer_state_dict cannot be used: it has ShardedTensors that
are spread over all ranks, while FSDP gathers them over the ranks that a parameter is sharded over. Where these are all
ranks, it does for FSDP on a device mesh as well, though the model's state dict has DTensors. Where they are fewer
(HYBRID_SHARD, a process group of some ranks), FSDP fills what it does not get with zeros, and nothing raises.

FSDP1 with tensor parallelism is not here: torch's FSDP.optim_state_dict and optim_state_dict_to_load lose the state of
tensor-parallel parameters between them, without any checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import fast_reader, image, save, torch_reader
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict as torch_load_optimizer
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, ShardingStrategy, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.tensor import DTensor, init_device_mesh
from training_runs import (
    BEFORE,
    DAMAGED,
    assert_like_parameters,
    assert_outcome,
    damage,
    make_net,
    make_optimizer,
    outcome,
    plain_run,
    train,
)

import dcp_fast
from dcp_fast.optimizer.load import load_sharded_optimizer_state_dict

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = ("adam", "sgd")


@dataclass(frozen=True)
class Layout:
    """How a model is wrapped.

    Attributes:
        name: of its checkpoints.
        orig: use_orig_params. Without, the frozen parameters are a unit of their own, which the optimizer lacks.
        mesh: sizes of the device mesh, the last one for all ranks if it is -1; two are (replicate, shard), for HSDP.
        groups: the ranks of the process groups, one of which each rank shards its model over.
    """

    name: str
    orig: bool = True
    mesh: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()


ORIG, FLAT = Layout("orig"), Layout("flat", orig=False)
MESH, FLAT_MESH = Layout("mesh", mesh=(-1,)), Layout("flat mesh", orig=False, mesh=(-1,))
HSDP22, HSDP41, HSDP14 = (Layout(f"hsdp{mesh}", mesh=mesh) for mesh in ((2, 2), (4, 1), (1, 4)))
PAIRS = Layout("pairs", groups=((0, 2), (1, 3)))

Model = tuple[FSDP, torch.optim.Optimizer, Any]  # and the process group


def build(layout: Layout, kind: str, seed: int, rate: float = 0.125) -> Model:
    options: dict[str, Any] = {"use_orig_params": layout.orig, "device_id": torch.device("cpu")}
    group = None
    if layout.groups:
        groups = [dist.new_group(list(members)) for members in layout.groups]
        (group,) = (group for group, members in zip(groups, layout.groups, strict=True) if dist.get_rank() in members)
        options["process_group"] = group
    if layout.mesh:
        sizes = tuple(dist.get_world_size() if size < 0 else size for size in layout.mesh)
        options["device_mesh"] = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
        if len(sizes) == 2:
            options["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
    net: nn.Module = make_net(seed)
    net.up = FSDP(net.up, **options)
    if not layout.orig:  # a flat parameter is frozen as a whole or not at all
        net.frozen = FSDP(net.frozen, **options)
    model = FSDP(net, **options)
    return model, make_optimizer(kind, model, rate, frozen=layout.orig), group


def finish(built: Model) -> dict[str, Any]:
    """Train to the end."""
    model, optimizer, group = built

    def full() -> tuple[dict[str, Any], dict[str, Any]]:
        # Offloading does nothing on a CPU, and torch then returns the same tensor for all states of a parameter.
        config = FullOptimStateDictConfig(offload_to_cpu=False)
        with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(), config):
            return model.state_dict(), FSDP.optim_state_dict(model, optimizer, group=group)

    return outcome(model, optimizer, full)


def where(path: Path, layout: Layout, kind: str) -> Path:
    return path / f"{layout.name}-{kind}"


def uninterrupted(path: Path, layout: Layout, kind: str) -> dict[str, Any]:
    """A run that saves a checkpoint on its way."""
    built = build(layout, kind, seed=1)
    model, optimizer, group = built
    train(model, optimizer, 0, BEFORE)
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        state = {"model": model.state_dict(), "optim": FSDP.optim_state_dict(model, optimizer, group=group)}
    save(where(path, layout, kind), state)
    return finish(built)


def load_default(model_state: dict[str, Any], path: Path) -> dict[str, Any]:
    return load_sharded_optimizer_state_dict(model_state, "optim", fast_reader(path))


def load_like_model(model_state: dict[str, Any], path: Path) -> dict[str, Any]:
    loaded = load_sharded_optimizer_state_dict(model_state, "optim", fast_reader(path), like="model")
    assert_like_parameters(model_state, loaded["optim"]["state"])
    return loaded


def load_damaged(model_state: dict[str, Any], path: Path) -> dict[str, Any]:
    loaded = load_like_model(model_state, path)
    damage(loaded["optim"]["state"])
    return loaded


def load_by_torch(model_state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Torch's result; checks that ours is the same, bit for bit and type for type: never a DTensor."""
    loaded = torch_load_optimizer(model_state, "optim", torch_reader(path))
    assert image(load_default(model_state, path)) == image(loaded)
    for values in loaded["optim"]["state"].values():
        assert not any(isinstance(value, DTensor) for value in values.values())
    return loaded


def load_by_torch_in_vain(model_state: dict[str, Any], path: Path) -> dict[str, Any]:
    """For parameters that are not sharded over all ranks, so that FSDP misreads the result. See above."""
    return load_by_torch(model_state, path)


Load = Callable[[dict[str, Any], Path], dict[str, Any]]


def resumed(path: Path, layout: Layout, kind: str, load: Load) -> dict[str, Any]:
    """A run that starts from a checkpoint, in a model and an optimizer that have done something else before."""
    built = build(layout, kind, seed=2, rate=0.5)
    model, optimizer, group = built
    train(model, optimizer, 99, 1)
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        model_state = model.state_dict()
        dcp_fast.load({"model": model_state}, storage_reader=fast_reader(path))
        model.load_state_dict(model_state)
        loaded = load(model_state, path)
        optimizer.load_state_dict(FSDP.optim_state_dict_to_load(model, optimizer, loaded["optim"], group=group))
    return finish(built)


Resume = tuple[Layout, Layout, str, Load]  # saved, resumed, ...


def run(path: Path, saves: list[tuple[Layout, str]], resumes: list[Resume]) -> tuple[list[Any], list[Any]]:
    """What one set of ranks does: runs that save, then runs that resume."""
    outcomes = [uninterrupted(path, *case) for case in saves]
    return outcomes, [resumed(where(path, source, kind), layout, kind, load) for source, layout, kind, load in resumes]


def check_saved(results: list[Any], saves: list[tuple[Layout, str]]) -> None:
    """The premise of the proofs: sharding does not change a run."""
    for outcomes, _ in results:
        for (layout, kind), actual in zip(saves, outcomes, strict=True):
            assert_outcome(actual, plain_run(kind, layout.orig), f"uninterrupted, {layout.name}, {kind}")


def check_resumed(results: list[Any], resumes: list[Resume]) -> None:
    for rank, (_, outcomes) in enumerate(results):
        for (source, layout, kind, load), actual in zip(resumes, outcomes, strict=True):
            case = f"rank {rank}: {source.name} to {layout.name}, {kind}, {load.__name__}"
            # On a mesh with one rank to shard over, FSDP1 averages gradients over the replicas by dividing them only.
            expected = plain_run(kind, layout.orig, scale=1 / 4 if layout == HSDP41 else 1)
            if load in (load_damaged, load_by_torch_in_vain):
                assert [part for part in actual if actual[part] != expected[part]] == DAMAGED, case
            else:
                assert_outcome(actual, expected, case)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_other_number_of_ranks(fresh_ranks: Ranks, tmp_path: Path, before: int, after: int) -> None:
    saves = [*itertools.product([ORIG, FLAT, MESH, FLAT_MESH], ["adam"]), (ORIG, "sgd"), (FLAT_MESH, "sgd")]
    loads = (load_by_torch, load_like_model)
    resumes: list[Resume] = [(layout, layout, kind, load) for layout, kind in saves for load in loads]
    resumes += [(layout, layout, "adam", load_damaged) for layout in (ORIG, MESH)]
    # A checkpoint does not depend on how the model was wrapped.
    resumes += [(ORIG, MESH, "adam", load_like_model), (FLAT_MESH, FLAT, "sgd", load_default)]
    check_saved(fresh_ranks.run(before, run, tmp_path, saves, []), saves)
    check_resumed(fresh_ranks.run(after, run, tmp_path, [], resumes), resumes)


def test_parameters_sharded_over_some_ranks(fresh_ranks: Ranks, tmp_path: Path) -> None:
    saves = list(itertools.product([ORIG, HSDP22], KINDS))
    resumes: list[Resume] = []
    resumes += [(HSDP22, layout, "adam", load_like_model) for layout in (HSDP22, HSDP41, HSDP14, ORIG, PAIRS)]
    resumes += [(ORIG, layout, "adam", load_like_model) for layout in (HSDP22, HSDP41, PAIRS)]
    resumes += [(HSDP22, HSDP14, "adam", load_by_torch)]  # all ranks after all
    resumes += [(HSDP22, layout, "adam", load_by_torch_in_vain) for layout in (HSDP22, HSDP41, PAIRS)]
    # What is in the state has no part in the layout.
    resumes += [(HSDP22, HSDP41, "sgd", load_like_model), (ORIG, PAIRS, "sgd", load_like_model)]
    resumes += [(HSDP22, HSDP14, "sgd", load_by_torch), (HSDP22, HSDP22, "sgd", load_by_torch_in_vain)]
    results = fresh_ranks.run(4, run, tmp_path, saves, resumes)
    check_saved(results, saves)
    check_resumed(results, resumes)


def part_of_the_ranks(path: Path) -> tuple[str, list[str]]:
    """Only ranks 1 and 2 have the model; what this rank gets."""
    uninterrupted(path, ORIG, "sgd")
    group = dist.new_group([1, 2])
    state: dict[str, Any] = {}
    if dist.get_rank() in (1, 2):
        model = FSDP(make_net(2), process_group=group, use_orig_params=True, device_id=torch.device("cpu"))
        with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
            state = model.state_dict()
    # The result is spread over all four ranks, also over those that do not have the model.
    momentum = load_by_torch(state, where(path, ORIG, "sgd"))["optim"]["state"]["odd"]["momentum_buffer"]
    sizes = [shard.shard_sizes for shard in momentum.metadata().shards_metadata]
    reader = dcp_fast.FileSystemReader(where(path, ORIG, "sgd"))
    loaded = dcp_fast.load_sharded_optimizer_state_dict(state, "optim", reader, like="model")["optim"]
    assert loaded["param_groups"]
    shards = []
    for momentum in (value["momentum_buffer"] for value in loaded.get("state", {}).values()):
        shards += [str(shard.metadata.shard_sizes) for shard in momentum.local_shards() if shard.tensor.dim() == 2]
    return str(sizes), sorted(shards)


def test_ranks_without_the_model(fresh_ranks: Ranks, tmp_path: Path) -> None:
    sizes = str([[2, 10], [2, 10], [2, 10], [1, 10]])
    results = fresh_ranks.run(4, part_of_the_ranks, tmp_path)
    assert [size for size, _ in results] == [sizes] * 4
    first, second = ["[2, 10]", "[4, 10]", "[5, 8]", "[5, 8]"], ["[1, 10]", "[3, 10]", "[5, 8]", "[5, 8]"]
    assert [shards for _, shards in results] == [[], first, second, []]
