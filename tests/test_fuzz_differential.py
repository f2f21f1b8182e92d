"""Random checkpoints, loaded by torch and by dcp_fast into random destinations.

A failure names its seed: `pytest tests/test_fuzz_differential.py --fuzz-seed SEED` runs that case alone.
"""

from __future__ import annotations

import itertools
import shutil
import time
from pathlib import Path

import pytest
from fuzz_cases import make_case
from helpers import Outcome, fast_reader, image, load_with, torch_load, torch_planner, torch_reader

import dcp_fast

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

CASES = 200
LONG_SECONDS = 600.0


def run_case(path: Path, seed: int) -> tuple[bool, bool]:
    """Whether the load changed anything, and whether torch.load had to help."""
    case = make_case(path, seed)
    try:
        before = case.make()
        untouched = image(before)
        expected = load_with(torch_load, before, storage_reader=torch_reader(path), planner=torch_planner())
        reader = fast_reader(path, **case.options)
        actual = load_with(dcp_fast.load, case.make(), storage_reader=reader)
        assert same(actual, expected), "\n".join([f"seed {seed}", *case.description, difference(actual, expected)])
        report = dcp_fast.last_report()
        assert report is not None
        return image(expected.state) != untouched, report.fallback_records > 0
    finally:
        shutil.rmtree(path)


def same(actual: Outcome, expected: Outcome) -> bool:
    if expected.errors is None or actual.errors is None:
        return actual.errors is expected.errors and actual.image() == expected.image()
    return all(isinstance(actual.errors.get(rank), type(error)) for rank, error in expected.errors.items())


def difference(actual: Outcome, expected: Outcome) -> str:
    if expected.errors is not None or actual.errors is not None:
        return f"torch: {expected.errors}, dcp_fast: {actual.errors}"

    def flat(state: object, path: str = "") -> list[tuple[str, object]]:
        if isinstance(state, dict):
            return [entry for key, value in state.items() for entry in flat(value, f"{path}.{key}")]
        return [(path, image(state))]

    names = [name for (name, a), (_, b) in zip(flat(actual.state), flat(expected.state), strict=True) if a != b]
    return f"differs in {names}"


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
