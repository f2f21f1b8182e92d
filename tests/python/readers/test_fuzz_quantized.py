"""Random directories with quantized tensors, loaded by torch and by dcp_fast into random destinations.

A failure names its seed: `tests/run -k test_fuzz_quantized --fuzz-seed SEED` runs that case alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz_cases import Case, compare_cases, compare_for_long
from quantized_files import make_quantized_case

CASES = 150


@pytest.fixture
def make(tmp_path: Path) -> Callable[[int], Case]:
    return lambda seed: make_quantized_case(tmp_path / str(seed), seed)


def test_random_quantized_directories(make: Callable[[int], Case], request: pytest.FixtureRequest) -> None:
    compare_cases(make, CASES, request.config.getoption("--fuzz-seed"), are_payloads=True)


@pytest.mark.long
def test_random_quantized_directories_for_long(make: Callable[[int], Case]) -> None:
    compare_for_long(make, CASES)
