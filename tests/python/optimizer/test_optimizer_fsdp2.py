"""End-to-end proofs with FSDP2, alone, as HSDP and with tensor parallelism: resumed training is the uninterrupted one.

Optimizer state is resumed in two ways: by `get_state_dict`, `dcp_fast.load` and `set_state_dict`, that is into state
that is there already, and by `load_sharded_optimizer_state_dict(like="model")`, which makes it. The result of torch's
function of that name cannot be used with FSDP2: `set_optimizer_state_dict` takes its ShardedTensors as they are, and
the next `optimizer.step()` raises.

Tensor parallelism is compared with the same run as all else, as the sums of the model are exact; see training_runs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fast_reader, image, save, torch_load, torch_reader
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict as torch_load_optimizer
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
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
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class Layout:
    """How a model is sharded: over a mesh of these sizes, whose dimensions have these names."""

    sizes: tuple[int, ...]
    names: tuple[str, ...] = ("dp",)

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in zip(self.names, self.sizes, strict=True))


def hsdp(replicate: int, shard: int) -> Layout:
    return Layout((replicate, shard), ("replicate", "shard"))


def tensor_parallel(data: int, tensor: int) -> Layout:
    return Layout((data, tensor), ("dp", "tp"))


Model = tuple[nn.Module, torch.optim.Optimizer]


def build(layout: Layout, kind: str, seed: int, rate: float = 0.125) -> Model:
    net = make_net(seed)
    mesh = init_device_mesh("cpu", layout.sizes, mesh_dim_names=layout.names)
    if "tp" in layout.names:
        # Rows over tensor-parallel ranks, and columns; the rest of the model is on the data-parallel mesh only.
        plan = {
            "up": ColwiseParallel(output_layouts=Replicate()),
            "down": RowwiseParallel(input_layouts=Replicate()),
        }
        parallelize_module(net, mesh["tp"], plan)
        mesh = mesh["dp"]
    fully_shard(net.up, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, make_optimizer(kind, net, rate)


def finish(built: Model) -> dict[str, Any]:
    """Train to the end."""
    options = StateDictOptions(full_state_dict=True)
    return outcome(*built, lambda: get_state_dict(*built, options=options))


def where(path: Path, layout: Layout, kind: str) -> Path:
    return path / f"{layout}-{kind}"


def uninterrupted(path: Path, layout: Layout, kind: str) -> dict[str, Any]:
    """A run that saves a checkpoint on its way."""
    built = build(layout, kind, seed=1)
    train(*built, 0, BEFORE)
    model_state, state = get_state_dict(*built)
    flat = get_optimizer_state_dict(*built, options=FLAT)
    save(where(path, layout, kind), {"model": model_state, "optim": state, "flat": flat})
    return finish(built)


# How training is resumed: (model, optimizer, checkpoint)


def by_load(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Into the state that is there; checks that torch's own load makes the same of a copy of it."""
    model_state, state = get_state_dict(model, optimizer)
    expected = {"model": clone(model_state), "optim": clone(state)}
    torch_load(expected, storage_reader=torch_reader(path))
    loaded = {"model": model_state, "optim": state}
    dcp_fast.load(loaded, storage_reader=fast_reader(path))
    assert image(loaded, layout=False) == image(expected, layout=False)  # the copy lies elsewhere
    report = dcp_fast.last_report()
    assert report is not None
    assert report.fallback_records == 0
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state)


def clone(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value)((key, clone(item)) for key, item in value.items())
    return value.clone() if isinstance(value, torch.Tensor) else value


def by_load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    set_optimizer_state_dict(model, optimizer, load_like_model(model, path)["optim"])


def by_load_optimizer_flat(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """From a state dict with one level of keys such as `state.up.weight.exp_avg`."""
    model_state = load_model(model, path)
    loaded = load_sharded_optimizer_state_dict(model_state, "flat", fast_reader(path), like="model")
    set_optimizer_state_dict(model, optimizer, loaded["flat"], options=FLAT)


def load_like_model(model: nn.Module, path: Path) -> dict[str, Any]:
    """Also checks that torch's load into such DTensors makes the same of them."""
    model_state = load_model(model, path)
    loaded = load_sharded_optimizer_state_dict(model_state, "optim", fast_reader(path), like="model")
    state = loaded["optim"]["state"]
    assert_like_parameters(model_state, state)
    expected = {fqn: {name: torch.zeros_like(v) for name, v in values.items()} for fqn, values in state.items()}
    torch_load({"optim": {"state": expected}}, storage_reader=torch_reader(path))
    assert image(state) == image(expected)
    return loaded


def load_model(model: nn.Module, path: Path) -> dict[str, Any]:
    model_state = get_model_state_dict(model)
    dcp_fast.load({"model": model_state}, storage_reader=fast_reader(path))
    set_model_state_dict(model, model_state)
    return model_state


def by_load_optimizer_damaged(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    loaded = load_like_model(model, path)
    damage(loaded["optim"]["state"])
    set_optimizer_state_dict(model, optimizer, loaded["optim"])


def by_torch_in_vain(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Torch's own function, and ours without like="model": the same result, which the optimizer cannot use."""
    model_state = load_model(model, path)
    loaded = torch_load_optimizer(model_state, "optim", torch_reader(path))
    ours = load_sharded_optimizer_state_dict(model_state, "optim", fast_reader(path))
    assert image(ours) == image(loaded)
    set_optimizer_state_dict(model, optimizer, loaded["optim"])
    with pytest.raises(RuntimeError, match="not supported for ShardedTensor"):
        train(model, optimizer, BEFORE, 1)
    by_load_optimizer(model, optimizer, path)


Way = Callable[[nn.Module, torch.optim.Optimizer, Path], None]
Resume = tuple[Layout, Layout, str, Way]  # saved, resumed, ...


def resumed(path: Path, layout: Layout, kind: str, way: Way) -> dict[str, Any]:
    """A run that starts from a checkpoint, in a model and an optimizer that have done something else before."""
    built = build(layout, kind, seed=2, rate=0.5)
    train(*built, 99, 1)
    way(*built, path)
    return finish(built)


def run(path: Path, saves: list[tuple[Layout, str]], resumes: list[Resume]) -> tuple[list[Any], list[Any]]:
    """What one set of ranks does: runs that save, then runs that resume."""
    outcomes = [uninterrupted(path, *case) for case in saves]
    return outcomes, [resumed(where(path, source, kind), layout, kind, way) for source, layout, kind, way in resumes]


def check(results: list[Any], saves: list[tuple[Layout, str]], resumes: list[Resume]) -> None:
    expected = {kind: plain_run(kind) for kind in KINDS}
    for rank, (saved, outcomes) in enumerate(results):
        # The premise of the proofs: sharding does not change a run.
        for (layout, kind), actual in zip(saves, saved, strict=True):
            assert_outcome(actual, expected[kind], f"rank {rank}: uninterrupted, {layout}, {kind}")
        for (source, layout, kind, way), actual in zip(resumes, outcomes, strict=True):
            case = f"rank {rank}: {source} to {layout}, {kind}, {way.__name__}"
            if way is by_load_optimizer_damaged:
                wrong = [part for part in actual if actual[part] != expected[kind][part]]
                assert wrong == DAMAGED, case
            else:
                assert_outcome(actual, expected[kind], case)


def prove(ranks: Ranks, path: Path, before: int, source: Layout, after: dict[int, list[Layout]]) -> None:
    """Save on some ranks and resume on others."""
    saves = [(source, kind) for kind in KINDS]
    check(ranks.run(before, run, path, saves, []), saves, [])
    for world_size, layouts in after.items():
        ways = (by_load, by_load_optimizer)
        resumes: list[Resume] = [(source, to, "adam", way) for to in layouts for way in ways]
        resumes += [(source, layouts[0], "sgd", way) for way in ways]  # what is in the state has no part in the layout
        for way in (by_load_optimizer_flat, by_load_optimizer_damaged, by_torch_in_vain):
            resumes.append((source, layouts[0], "adam", way))
        resumes.append((source, layouts[0], "sgd", by_torch_in_vain))
        check(ranks.run(world_size, run, path, [], resumes), [], resumes)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_other_number_of_ranks(fresh_ranks: Ranks, tmp_path: Path, before: int, after: int) -> None:
    prove(fresh_ranks, tmp_path, before, Layout((before,)), {after: [Layout((after,))]})


def test_hsdp(fresh_ranks: Ranks, tmp_path: Path) -> None:
    prove(fresh_ranks, tmp_path, 4, hsdp(2, 2), {4: [hsdp(4, 1), hsdp(1, 4), Layout((4,))]})


def test_tensor_parallel(fresh_ranks: Ranks, tmp_path: Path) -> None:
    source = tensor_parallel(2, 2)
    for placements in fresh_ranks.run(4, placements_of, source):
        # Of 10 rows two tensor-parallel ranks have 5 each, and of these their data-parallel ranks 3 and 2.
        assert placements["up.weight"] == placements["up.bias"] == "(_StridedShard(dim=0, sf=2), Shard(dim=0))"
        assert placements["down.weight"] == "(Shard(dim=0), Shard(dim=1))"
        assert placements["odd"] == "(Shard(dim=0),)"
    layouts = {4: [tensor_parallel(4, 1), tensor_parallel(1, 4), Layout((4,))], 2: [tensor_parallel(2, 1)]}
    prove(fresh_ranks, tmp_path, 4, source, layouts)


def test_to_tensor_parallel(fresh_ranks: Ranks, tmp_path: Path) -> None:
    prove(fresh_ranks, tmp_path, 2, Layout((2,)), {4: [tensor_parallel(2, 2)]})


def placements_of(layout: Layout) -> dict[str, str]:
    model, _ = build(layout, "sgd", seed=1)
    return {fqn: str(value.placements) for fqn, value in get_model_state_dict(model).items()}
