"""Random directories of safetensors files, loaded by torch and by dcp_fast into random destinations.

A failure names its seed: `tests/run -k test_fuzz_huggingface --fuzz-seed SEED` runs that case alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz_cases import Case, compare_cases, compare_for_long
from fuzz_safetensors import make_safetensors_case

CASES = 200


@pytest.fixture
def make(tmp_path: Path) -> Callable[[int], Case]:
    return lambda seed: make_safetensors_case(tmp_path / str(seed), seed)


def test_random_directories(make: Callable[[int], Case], request: pytest.FixtureRequest) -> None:
    compare_cases(make, CASES, request.config.getoption("--fuzz-seed"), are_payloads=True)


@pytest.mark.long
def test_random_directories_for_long(make: Callable[[int], Case]) -> None:
    compare_for_long(make, CASES)
