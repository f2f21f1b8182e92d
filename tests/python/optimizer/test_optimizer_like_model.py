"""Optimizer state sharded like the model: which parameter a state belongs to, and parameters of unusual kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fill, image, save
from optimizer_cases import KEY, check, fast_reader, load_fast
from ranks import Ranks
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import dcp_fast

try:
    from torch.distributed.checkpoint.protocol import CheckpointableTensor
except ImportError:
    CheckpointableTensor = None  # type: ignore[assignment,misc]


def parameters_anywhere_in_the_path(path: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    full = fill((6, 3), torch.float32)
    model = {"net.w": distribute_tensor(torch.zeros(6, 3), mesh, [Shard(0)], src_data_rank=None)}
    state = {"net.w": {"momentum": full, "step": torch.tensor(1.0)}}
    parts = {"first": {"state": state}, "master": {"net.w": full}, "whole": {"buffer": full}}
    save(path / "parts", {"app": parts})
    loaded = load_fast(model, "app", fast_reader(path / "parts"), like="model")["app"]
    for value in (loaded["first"]["state"]["net.w"]["momentum"], loaded["master"]["net.w"]):
        assert isinstance(value, DTensor)
        assert value.placements == (Shard(0),)
        assert image(value.full_tensor()) == image(full)
    assert image(loaded["whole"]["buffer"]) == image(full)
    assert image(loaded["first"]["state"]["net.w"]["step"]) == image(torch.tensor(1.0))
    stranger = {"net.v": model["net.w"]}
    with pytest.raises(dcp_fast.OptimizerStateError, match=r"lacks.* 'net.w'"):
        load_fast(stranger, "app", fast_reader(path / "parts"), like="model")


def test_parameters_anywhere_in_the_path(ranks: Ranks, tmp_path: Path) -> None:
    check(ranks, 2, [parameters_anywhere_in_the_path], tmp_path)


def counters_of_a_parameter_without_dimensions(path: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = {"scale": distribute_tensor(torch.tensor(2.0), mesh, [Replicate()], src_data_rank=None)}
    one = torch.tensor(1.0)
    save(path / "scalars", {KEY: {"state": {"scale": {"step": one, "mu_product": one, "exp_avg": one}}}})
    loaded = load_fast(model, KEY, fast_reader(path / "scalars"), like="model")[KEY]["state"]["scale"]
    assert {name: type(value) for name, value in loaded.items()} == {
        "step": torch.Tensor,
        "mu_product": torch.Tensor,
        "exp_avg": DTensor,
    }


def test_counters_of_a_parameter_without_dimensions(ranks: Ranks, tmp_path: Path) -> None:
    check(ranks, 2, [counters_of_a_parameter_without_dimensions], tmp_path)


@pytest.mark.skipif(CheckpointableTensor is None, reason="came with torch 2.14")
def test_checkpointable_parameters(tmp_path: Path, gloo: None) -> None:
    full = fill((6, 2), torch.float32)
    save(tmp_path, {KEY: {"state": {"w": {"momentum": full}}}})
    parameter: Any = torch.zeros(2, 2)
    parameter.global_shape, parameter.global_offsets = (6, 2), ((3, 0),)
    parameter.local_offsets, parameter.local_sizes = ((0, 0),), ((2, 2),)
    assert isinstance(parameter, CheckpointableTensor)
    loaded = load_fast({"w": parameter}, KEY, fast_reader(tmp_path), like="model")[KEY]["state"]["w"]["momentum"]
    assert isinstance(loaded, CheckpointableTensor)
    assert image(loaded.detach().clone()) == image(full[3:5].clone())
