"""Random checkpoints, loaded by torch and by dcp_fast into random destinations on CUDA devices and on the host.

A failure names its seed: `pytest tests/cuda/test_fuzz_cuda.py --fuzz-seed SEED` runs that case alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz_cases import Case, compare_cases, compare_for_long, make_case

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

CASES = 300


def make_cuda_case(path: Path, seed: int) -> Case:
    rng = random.Random(~seed)
    there = [torch.device("cuda", ordinal) for ordinal in range(min(2, torch.cuda.device_count()))]
    devices = rng.sample(there, rng.randint(1, len(there)))
    if rng.random() < 0.4:
        devices.append(torch.device("cpu"))
    case = make_case(path, seed, devices)
    case.options["pinned_bytes"] = rng.choice([1 << 20, 3_000_000, 64 << 20])
    case.options["device_staging_bytes"] = rng.choice([1 << 20, 5_000_000, 128 << 20])
    case.options["synchronize"] = rng.random() < 0.5
    case.description.append(f"options={case.options}")
    return case


@pytest.fixture
def make(tmp_path: Path) -> Callable[[int], Case]:
    return lambda seed: make_cuda_case(tmp_path / str(seed), seed)


def test_random_checkpoints(make: Callable[[int], Case], request: pytest.FixtureRequest) -> None:
    compare_cases(make, CASES, request.config.getoption("--fuzz-seed"))


@pytest.mark.long
def test_random_checkpoints_for_long(make: Callable[[int], Case]) -> None:
    compare_for_long(make, CASES)
