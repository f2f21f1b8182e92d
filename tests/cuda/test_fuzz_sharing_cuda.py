"""Random loads of ranks that share what they read, into CUDA devices and the host, compared with torch's.

A failure names its seed: `pytest tests/cuda/test_fuzz_sharing_cuda.py --fuzz-seed SEED` runs that case alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fuzz_cases import LONG_SECONDS
from fuzz_sharing import Said, load_cases
from processes import SIMULATED, use_devices
from ranks import Ranks
from simulated_cuda.control import Simulator

import dcp_fast
from dcp_fast.ranks import exchange

WORLD = 3
CASES = 12
BATCH = 20  # of a long run


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    """Ranks of this module alone: what makes simulated devices of torch's stays in a process."""
    ranks = Ranks()
    yield ranks
    ranks.close()


def load_into_devices(path: Path, seeds: list[int], on_devices: bool) -> list[Said]:
    """Load cases.

    Args:
        path, seeds: as of ``load_cases``.
        on_devices: whether ranks exchange in the memory of their devices, as by NCCL.
    """
    use_devices()
    mine = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    torch.cuda.set_device(mine)
    with ExitStack() as stack:
        if on_devices:
            stack.enter_context(mock.patch.object(exchange, "collective_device", return_value=mine))
        said = load_cases(path, seeds, [mine, torch.device("cpu")] if dist.get_rank() else [mine])
    dcp_fast.release_staging()
    torch.cuda.synchronize()
    if SIMULATED:
        assert not Simulator().reports(clear=True)
    return said


def load(pool: Ranks, path: Path, seeds: list[int], on_devices: bool) -> list[Said]:
    said = [
        said for of_rank in pool.run(WORLD, load_into_devices, path, seeds, on_devices, timeout=500) for said in of_rank
    ]
    wrong = ["\n".join([f"seed {of_case.seed}:", *of_case.problems]) for of_case in said if of_case.problems]
    assert not wrong, "\n\n".join(wrong)
    return said


@pytest.mark.parametrize(
    "on_devices",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(not SIMULATED, reason="gloo cannot exchange in a real GPU's memory")
        ),
    ],
)
def test_random_loads(pool: Ranks, tmp_path: Path, on_devices: bool, request: pytest.FixtureRequest) -> None:
    only = request.config.getoption("--fuzz-seed")
    said = load(pool, tmp_path, [*range(CASES)] if only is None else [only], on_devices)
    assert only is not None or sum(of_case.is_shared for of_case in said) > 0.3 * len(said)


@pytest.mark.long
def test_random_loads_for_long(pool: Ranks, tmp_path: Path) -> None:
    start = time.monotonic()
    first = time.time_ns() % (1 << 40)
    for batch in itertools.count():
        if time.monotonic() - start > LONG_SECONDS:
            break
        seeds = [*range(first + batch * BATCH, first + (batch + 1) * BATCH)]
        load(pool, tmp_path, seeds, SIMULATED and batch % 2 == 1)
    assert batch > 2
