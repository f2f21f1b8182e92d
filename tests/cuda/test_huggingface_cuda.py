"""Safetensors files load to CUDA devices as torch loads them, through the pinned ring."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_cases import Case, compare_cases
from fuzz_safetensors import make_safetensors_case
from helpers import ShardedBuffer, fill
from hooked_planners import Doubling
from safetensors_files import assert_same_hf_load, save_hf, write_chunks

import dcp_fast

CASES = 150

STATE = {
    "weight": fill((200, 300), torch.float32, 1),
    "half": fill((64, 64), torch.bfloat16, 2),
    "numbers": torch.arange(5000, dtype=torch.float32).view(50, 100),
    "scale": fill((), torch.float64, 3),
}


def report() -> dcp_fast.LoadReport:
    last = dcp_fast.last_report()
    assert last is not None
    return last


@pytest.fixture(params=["whole", "chunks"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "whole":
        return save_hf(tmp_path / "model", dict(STATE))
    rows = {
        fqn: [([at, 0], value[at : at + 30]) for at in range(0, len(value), 30)] if value.dim() else [([], value)]
        for fqn, value in STATE.items()
    }
    return write_chunks(tmp_path / "model", rows)


def test_loads_as_torch(checkpoint: Path, cuda: torch.device) -> None:
    def make() -> dict[str, Any]:
        return {fqn: torch.zeros_like(value, device=cuda) for fqn, value in STATE.items()}

    assert_same_hf_load(checkpoint, make)
    assert report().bytes_to_device >= sum(value.nbytes for value in STATE.values())
    assert report().device_copies > 0
    assert report().pinned_bytes > 0
    assert (report().staged_items, report().device_fallback_items) == (0, 0)


def test_boxes_and_strides(checkpoint: Path, cuda: torch.device) -> None:
    def make() -> dict[str, Any]:
        parts = [torch.zeros(100, 40, device=cuda).t(), torch.zeros(13, 600, device=cuda)[:, ::2]]
        return {"weight": ShardedBuffer.make((200, 300), [(3, 100), (170, 0)], [parts[0], parts[1]])}

    assert_same_hf_load(checkpoint, make)
    assert report().launches > 0


def test_other_dtypes(checkpoint: Path, cuda: torch.device) -> None:
    assert_same_hf_load(checkpoint, lambda: {"numbers": torch.zeros(50, 100, dtype=torch.bfloat16, device=cuda)})
    assert report().staged_items > 0


def test_hooks(checkpoint: Path, cuda: torch.device) -> None:
    assert_same_hf_load(checkpoint, lambda: {"numbers": torch.zeros(50, 100, device=cuda)}, planner=Doubling)
    assert report().device_copies > 0


def make_cuda_case(path: Path, seed: int) -> Case:
    rng = random.Random(~seed)
    there = [torch.device("cuda", ordinal) for ordinal in range(min(2, torch.cuda.device_count()))]
    devices = rng.sample(there, rng.randint(1, len(there)))
    if rng.random() < 0.4:
        devices.append(torch.device("cpu"))
    case = make_safetensors_case(path, seed, devices)
    case.options["pinned_bytes"] = rng.choice([1 << 20, 3_000_000, 64 << 20])
    case.options["device_staging_bytes"] = rng.choice([1 << 20, 5_000_000, 128 << 20])
    case.options["synchronize"] = rng.random() < 0.5
    return case


def test_random_directories(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def make(seed: int) -> Case:
        return make_cuda_case(tmp_path / str(seed), seed)

    compare_cases(make, CASES, request.config.getoption("--fuzz-seed"), are_payloads=True)
