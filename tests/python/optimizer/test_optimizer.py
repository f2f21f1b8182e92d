"""Optimizer state as torch's own load_sharded_optimizer_state_dict returns it, and sharded like the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import DTYPES, fill, image, save, torch_reader
from optimizer_cases import (
    BASES,
    KEY,
    PLANNERS,
    Allocations,
    assert_same_result,
    by_rows,
    check,
    fast_reader,
    load_fast,
    recording,
    result_image,
    torch_load_optimizer,
)
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dcp_fast

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SIZES: dict[str, tuple[int, ...]] = {
    "uneven": (10, 3),
    "even": (12, 2),
    "short": (5, 2),  # in four chunks of rows the last one is missing
    "few": (2, 5),  # fewer rows than ranks
    "nothing": (0, 3),
    "hollow": (6, 0),
    "vector": (7,),
    "cube": (5, 2, 3),
    "element": (1,),
    "elements": (1, 1, 1),
    "scalar": (),
}
TYPES = {f"type.{dtype}": dtype for dtype in DTYPES}
SMALL = KEY + "2"  # of another optimizer in the same checkpoints


def stored(fqn: str, name: str) -> torch.Tensor:
    seed = sum(map(ord, fqn + name))
    return fill(SIZES.get(fqn, (5, 2)), TYPES.get(fqn, torch.float32), seed)


def save_state(path: Path) -> None:
    """The same optimizer state in several forms, the ranks' own parts of it as they come."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    forms: dict[str, Any] = {
        "sharded": by_rows,
        "dtensor": lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None),
        "columns": lambda tensor: distribute_tensor(tensor, mesh, [Shard(tensor.dim() - 1)], src_data_rank=None),
        "plain": lambda tensor: tensor,
    }
    for name, form in forms.items():
        state: dict[str, Any] = {}
        for fqn in (*SIZES, *TYPES):
            state[fqn] = {"step": torch.tensor(3.0)}
            for buffer in ("exp_avg", "exp_avg_sq") if fqn in SIZES else ("exp_avg",):
                tensor = stored(fqn, buffer)
                state[fqn][buffer] = form(tensor) if tensor.dim() > 0 else tensor
        groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": [*SIZES]}, {"lr": torch.tensor(0.5), "params": []}]
        optimizer = {
            "state": state,
            "param_groups": groups,
            "list": [fill((3, 2), torch.int32), {"deep": fill((6,), torch.int16), "n": 4}],
            "tuple": (1, "two", torch.ones(2)),
            "none": None,
            "empty": {},
        }
        other = {"state": {fqn: {"exp_avg": form(stored(fqn, "other"))} for fqn in ("even", "short", "few", "element")}}
        other["param_groups"] = [{"lr": 0.1, "params": ["even"]}]
        saved = {"model": {"even": stored("even", "")}, SMALL: other, KEY: optimizer, "epoch": 3}
        flat = {f"state.even.{name}": form(stored("even", name)) for name in ("exp_avg", "momentum_buffer")}
        saved["flat"] = flat | {"state.even.step": torch.tensor(2.0), "param_groups.even.lr": 0.1}
        save(path / name, saved)


FORMS = ["sharded", "dtensor", "columns", "plain"]


@pytest.fixture(scope="module")
def shared(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that four ranks wrote."""
    path = tmp_path_factory.mktemp("optimizer")
    check(ranks, 4, [save_state], path)
    return path


# The same as torch


def same_for_every_form(path: Path) -> None:
    for form in FORMS:
        loaded = assert_same_result(path / form, lambda: {"even": by_rows(torch.zeros(12, 2))})
        assert loaded.keys() == {KEY}
        state = loaded[KEY]["state"]
        for fqn in ("uneven", "few", "nothing", "cube"):
            shards = state[fqn]["exp_avg"].local_shards()
            rows = math.ceil(SIZES[fqn][0] / dist.get_world_size())
            mine = stored(fqn, "exp_avg")[dist.get_rank() * rows :][:rows]
            assert len(shards) == (len(mine) > 0 or fqn == "nothing")
            assert not shards or image(shards[0].tensor) == image(mine.clone())
        assert type(state["elements"]["exp_avg"]) is torch.Tensor
        assert loaded[KEY]["tuple"][:2] == (1, "two")
        assert loaded[KEY]["param_groups"][0]["betas"] == (0.9, 0.99)


def same_for_other_keys(path: Path) -> None:
    for key in ("model", SMALL, "flat", "epoch"):
        assert assert_same_result(path / "sharded", dict, key=key).keys() == {key}


def same_if_reads_are_shared(path: Path) -> None:
    for form in FORMS:
        model = {"even": by_rows(torch.zeros(12, 2))}
        expected = load_fast(dict(model), KEY, fast_reader(path / form))
        shared = load_fast(dict(model), KEY, fast_reader(path / form), share_reads=True)
        report = dcp_fast.last_report()
        assert report is not None
        assert report.exchange_rounds > 0
        assert result_image(shared) == result_image(expected)


def same_for_any_model(path: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = torch.zeros(12, 2)
    dtensor = distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)
    for value in (full, dtensor, by_rows(torch.zeros(1, 2)), by_rows(torch.zeros(3, 3)), nn.Parameter(full)):
        assert_same_result(path / "dtensor", lambda value=value: {"even": value, "uneven": value})
    assert_same_result(path / "dtensor", dict)


def same_for_any_planner_and_reader(path: Path) -> None:
    for change in PLANNERS:
        planner = (change(BASES[0]), change(BASES[1]))
        for reader in (fast_reader, torch_reader):
            loaded = assert_same_result(path / "dtensor", dict, key=SMALL, planner=planner, reader=reader)
            assert_same_result(path / "dtensor", dict, key=SMALL, planner=(planner[0], planner[0]), reader=reader)
        plain = load_fast({}, SMALL, fast_reader(path / "dtensor"))
        assert (result_image(loaded) != result_image(plain)) == (change is not PLANNERS[1]), "the hook had no effect"


def hooks_are_called_as_by_torch(path: Path) -> None:
    for reader in (fast_reader, torch_reader):
        calls: list[list[Any]] = [[], []]
        planners = recording(BASES[0], calls[0]), recording(BASES[1], calls[1])
        assert_same_result(path / "columns", dict, key=SMALL, planner=planners, reader=reader)
        names = [[call[0] for call in list_] for list_ in calls]
        for name in ("set_up_planner", "create_local_plan", "finish_plan"):
            assert names[1].count(name) == 1
        assert {"lookup_tensor", "transform_tensor", "commit_tensor", "load_bytes"} <= {*names[1]}
        assert sorted(map(repr, calls[1])) == sorted(map(repr, calls[0]))


@pytest.mark.parametrize("world_size", [4, 3, 1])
def test_same_result_as_torch(ranks: Ranks, shared: Path, world_size: int) -> None:
    scenarios = [same_for_every_form, same_for_other_keys, same_for_any_model]
    if world_size > 1:
        scenarios += [same_for_any_planner_and_reader, hooks_are_called_as_by_torch, same_if_reads_are_shared]
    check(ranks, world_size, scenarios, shared)


def stored_tensors_that_require_gradients(path: Path) -> None:
    """torch refuses those that it would have to shard."""
    full = fill((6, 2), torch.float32)
    save(path / "gradients", {KEY: {"of_one": nn.Parameter(torch.ones(1)), "t": torch.ones(3, 5).t()}})
    assert assert_same_result(path / "gradients", dict)[KEY]["of_one"].requires_grad
    save(path / "gradients", {KEY: {"state": {"even": {"exp_avg": nn.Parameter(full)}}}})
    with pytest.raises(ValueError, match="requires_grad"):
        torch_load_optimizer({}, KEY, torch_reader(path / "gradients"))
    loaded = load_fast({}, KEY, fast_reader(path / "gradients"))[KEY]["state"]["even"]["exp_avg"]
    shard = loaded.local_shards()[0].tensor
    assert loaded.requires_grad
    assert shard.requires_grad
    assert shard.is_leaf
    assert image(shard.detach()) == image(full.chunk(3)[dist.get_rank()].clone())


def model_on_part_of_the_ranks(path: Path) -> None:
    group = dist.new_group([1, 3])
    here = dist.get_rank() in (1, 3)
    model = {"even": by_rows(torch.zeros(12, 2), group)} if here else {}
    loaded = assert_same_result(path / "sharded", lambda: dict(model))
    assert dist.get_process_group_ranks(loaded[KEY]["state"]["even"]["exp_avg"]._process_group) == [0, 1, 2, 3]


def test_gradients_and_groups(ranks: Ranks, shared: Path, tmp_path: Path) -> None:
    check(ranks, 4, [model_on_part_of_the_ranks], shared)
    check(ranks, 3, [stored_tensors_that_require_gradients], tmp_path)


def metadata_is_read_once(path: Path) -> None:
    for base in (fast_reader, torch_reader):
        reads = []

        class Reader(base):  # type: ignore[misc,valid-type]
            def read_metadata(self, *args: Any, reads: Any = reads, **kwargs: Any) -> Metadata:
                reads.append(1)
                return super().read_metadata(*args, **kwargs)

        reader = Reader(path / "sharded")
        assert result_image(load_fast({}, KEY, reader)) == result_image(load_fast({}, KEY, reader))
        assert len(reads) == 2


def only_the_shard_is_allocated(path: Path) -> None:
    rows = 1 << 17
    mesh = init_device_mesh("cpu", (4,))
    shard = rows * 8 * 4 // 4
    with Allocations() as ours:
        load_fast({}, KEY, fast_reader(path / "large"))
    assert ours.largest == shard
    model = {"w": distribute_tensor(torch.empty(rows, 8), mesh, [Shard(1)], src_data_rank=None)}
    with Allocations() as ours:
        load_fast(model, KEY, fast_reader(path / "large"), like="model")
    assert ours.largest == shard
    with Allocations() as theirs:
        torch_load_optimizer({}, KEY, torch_reader(path / "large"))
    assert theirs.largest == 4 * shard, "this test would not see it"


def test_no_more_memory_and_metadata_than_needed(ranks: Ranks, shared: Path) -> None:
    save(shared / "large", {KEY: {"state": {"w": {"exp_avg": torch.zeros(1 << 17, 8)}}}})
    check(ranks, 4, [metadata_is_read_once, only_the_shard_is_allocated], shared)


def test_installed_in_the_place_of_torchs(shared: Path, gloo: None) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import optimizer

    torchs = torch_load_optimizer
    assert dcp.load_sharded_optimizer_state_dict is optimizer.load_sharded_optimizer_state_dict is torchs
    with dcp_fast.install():
        assert dcp.load_sharded_optimizer_state_dict is not torchs
        assert optimizer.load_sharded_optimizer_state_dict is dcp.load_sharded_optimizer_state_dict
        with pytest.raises(ValueError, match="like must be"):
            dcp.load_sharded_optimizer_state_dict({}, KEY, dcp.FileSystemReader(shared / "sharded"), like="nothing")  # type: ignore[call-arg]
        loaded = dcp.load_sharded_optimizer_state_dict({}, KEY, dcp.FileSystemReader(shared / "sharded"))
    report = dcp_fast.last_report()
    assert report is not None
    assert report.is_fast
    assert dcp.load_sharded_optimizer_state_dict is optimizer.load_sharded_optimizer_state_dict is torch_load_optimizer
    assert result_image(loaded) == result_image(torch_load_optimizer({}, KEY, torch_reader(shared / "sharded")))


def test_metadata_of_torchs_reader_is_read_natively(shared: Path, gloo: None) -> None:
    loaded = load_fast({}, KEY, torch_reader(shared / "sharded"))
    report = dcp_fast.last_report()
    assert report is not None
    assert report.is_fast
    assert report.metadata_fallback_reason == ""

    class OwnMetadata(type(torch_reader(shared))):  # type: ignore[misc]
        def read_metadata(self) -> Metadata:
            return super().read_metadata()

    again = load_fast({}, KEY, OwnMetadata(shared / "sharded"))
    report = dcp_fast.last_report()
    assert report is not None
    assert "read_metadata of its own" in report.metadata_fallback_reason
    assert result_image(loaded) == result_image(again)
    assert result_image(loaded) == result_image(torch_load_optimizer({}, KEY, torch_reader(shared / "sharded")))


# Like the model


def like_model(path: Path, model: dict[str, Any], key: str = KEY) -> dict[str, Any]:
    return load_fast(model, key, fast_reader(path / "sharded"), like="model")[key]


def parameters(make: Any) -> dict[str, Any]:
    """A parameter for each state of the checkpoint, of a type that no state has."""
    model = {fqn: make(torch.zeros(size, dtype=torch.float16)) for fqn, size in SIZES.items()}
    return model | {fqn: torch.zeros(5, 2) for fqn in TYPES}


def dtensors_like_their_parameters(path: Path) -> None:
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    layouts: list[Any] = [(line, [p]) for p in (Shard(0), Shard(1), Replicate())]
    layouts += [(square, p) for p in ([Shard(0), Shard(1)], [Shard(1), Replicate()], [Shard(0), Shard(0)])]
    for mesh, placements in layouts:

        def distribute(tensor: torch.Tensor, mesh: Any = mesh, placements: Any = placements) -> DTensor:
            valid = [p if p.is_replicate() or p.dim < tensor.dim() else Replicate() for p in placements]
            return distribute_tensor(tensor, mesh, valid, src_data_rank=None)

        loaded = like_model(path, parameters(distribute))
        for fqn in SIZES:
            state = loaded["state"][fqn]
            assert result_image(state["exp_avg"]) == result_image(distribute(stored(fqn, "exp_avg")))
            assert image(state["step"]) == image(torch.tensor(3.0))
        # Of no parameter: whole on every rank.
        assert image(loaded["list"][0]) == image(fill((3, 2), torch.int32))
        flat = like_model(path, {"even": distribute(torch.zeros(12, 2))}, "flat")
        assert result_image(flat["state.even.exp_avg"]) == result_image(distribute(stored("even", "exp_avg")))
        assert image(flat["state.even.step"]) == image(torch.tensor(2.0))
        assert flat["param_groups.even.lr"] == 0.1


def sharded_tensors_like_their_parameters(path: Path) -> None:
    """Of a model in two replicas, each of which is sharded over its own half of the ranks."""
    group = [dist.new_group([0, 2]), dist.new_group([1, 3])][dist.get_rank() % 2]
    model = parameters(lambda tensor: by_rows(tensor, group) if tensor.dim() else tensor)
    loaded = like_model(path, model)
    for fqn in SIZES:
        full = stored(fqn, "exp_avg")
        expected = by_rows(full, group) if full.dim() else full
        assert result_image(loaded["state"][fqn]["exp_avg"]) == result_image(expected)


def plain_and_meta_tensors_like_their_parameters(path: Path) -> None:
    mesh = init_device_mesh("cpu", (4,))
    column = torch.zeros(3, 10).t()  # strides of a parameter are kept
    model = parameters(lambda tensor: tensor) | {"uneven": column}
    with torch.device("meta"):
        local = torch.empty(3, 2)
    dtensor = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(12, 2), stride=(2, 1))
    loaded = like_model(path, model | {"even": dtensor, "cube": torch.empty(5, 2, 3, device="meta")})["state"]
    assert image(loaded["few"]["exp_avg"]) == image(stored("few", "exp_avg"))
    assert image(loaded["cube"]["exp_avg"]) == image(stored("cube", "exp_avg"))
    expected = distribute_tensor(stored("even", "exp_avg"), mesh, [Shard(0)], src_data_rank=None)
    assert result_image(loaded["even"]["exp_avg"]) == result_image(expected)
    assert image(loaded["uneven"]["exp_avg"]) == image(torch.zeros(3, 10).t().copy_(stored("uneven", "exp_avg")))


def dtensors_on_part_of_the_ranks(path: Path) -> None:
    mesh = dist.device_mesh.DeviceMesh("cpu", [0, 2])
    here = mesh.get_coordinate() is not None
    local = stored("even", "exp_avg").chunk(2)[mesh.get_local_rank()].clone() if here else torch.empty(0)
    make = lambda tensor: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False, shape=(12, 2), stride=(2, 1))  # noqa: E731
    model = parameters(lambda tensor: tensor) | {"even": make(torch.zeros_like(local))}
    assert result_image(like_model(path, model)["state"]["even"]["exp_avg"]) == result_image(make(local))


def tensor_parallel_model(path: Path) -> None:
    """FSDP2 over tensor parallelism: strided shards, some of which are uneven."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    full = {fqn: fill(p.shape, torch.float32, i) for i, (fqn, p) in enumerate(model.named_parameters())}
    save(path / "tensor_parallel", {KEY: {"state": {fqn: {"exp_avg": t} for fqn, t in full.items()}}})
    loaded = load_fast(model.state_dict(), KEY, fast_reader(path / "tensor_parallel"), like="model")
    for fqn, parameter in model.named_parameters():
        state = loaded[KEY]["state"][fqn]["exp_avg"]
        assert state.placements == parameter.placements
        assert state.to_local().shape == parameter.to_local().shape
        assert image(state.full_tensor()) == image(full[fqn])


def test_sharded_like_the_model(ranks: Ranks, shared: Path, tmp_path: Path) -> None:
    scenarios = [dtensors_like_their_parameters, sharded_tensors_like_their_parameters]
    scenarios += [plain_and_meta_tensors_like_their_parameters, dtensors_on_part_of_the_ranks]
    check(ranks, 4, scenarios, shared)
    check(ranks, 4, [tensor_parallel_model], tmp_path)
