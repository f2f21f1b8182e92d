"""Random checkpoints, loaded by torch and by dcp_fast into random destinations on CUDA devices and on the host.

A failure names its seed: `pytest tests/cuda/test_fuzz_cuda.py --fuzz-seed SEED` runs that case alone.
"""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
import torch
from fuzz_cases import Case, compare, make_case

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

CASES = 300
LONG_SECONDS = 600.0


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


def test_random_checkpoints(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    only = request.config.getoption("--fuzz-seed")
    seeds = range(CASES) if only is None else [only]
    results = [compare(make_cuda_case(tmp_path / str(seed), seed)) for seed in seeds]
    if only is None:
        assert sum(changed for changed, _ in results) > CASES * 0.9
        assert CASES * 0.05 < sum(fallback for _, fallback in results) < CASES * 0.7


@pytest.mark.long
def test_random_checkpoints_for_long(tmp_path: Path) -> None:
    start = time.monotonic()
    first = time.time_ns() % (1 << 40) + CASES
    count = 0
    for seed in itertools.count(first):
        if time.monotonic() - start > LONG_SECONDS:
            break
        compare(make_cuda_case(tmp_path / str(seed), seed))
        count += 1
    assert count > CASES
