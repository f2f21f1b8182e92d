"""Random checkpoints, loaded by torch and by dcp_fast into random destinations.

A failure names its seed: `pytest tests/test_fuzz_differential.py --fuzz-seed SEED` runs that case alone.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from fuzz_cases import compare, make_case

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

CASES = 200
LONG_SECONDS = 600.0


def run_case(path: Path, seed: int) -> tuple[bool, bool]:
    """Whether the load changed anything, and whether torch.load had to help."""
    return compare(make_case(path, seed))


def test_random_checkpoints(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    only = request.config.getoption("--fuzz-seed")
    results = [run_case(tmp_path / str(seed), seed) for seed in (range(CASES) if only is None else [only])]
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
        run_case(tmp_path / str(seed), seed)
        count += 1
    assert count > CASES
