"""Bounce buffers: what a load takes of memory beyond its destinations, through the page cache and past it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from damage import peak_memory, reset_peak_memory
from helpers import fast_reader, save

import dcp_fast

MIB = 1 << 20
STAGING = 8 * MIB
# For the plan, threads, and what the interpreter allocates on the way.
BESIDES = 6 * MIB

STATE = {f"w{i}": torch.arange((2300 + i) * 1500, dtype=torch.float32).view(2300 + i, 1500) + i for i in range(6)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("staging"), STATE)


def wanted(dtype: torch.dtype) -> dict[str, Any]:
    """Some with gaps between the rows. Their memory is touched."""
    state: dict[str, Any] = {name: torch.ones(tensor.shape, dtype=dtype) for name, tensor in STATE.items()}
    state["w1"] = torch.ones(2301, 1600, dtype=dtype)[:, :1500]
    return state


@pytest.mark.parametrize("threads", [None, 1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("io_mode", ["cached", "direct"])
def test_bounce_buffers_stay_within_staging(
    stored: Path, io_mode: str, dtype: torch.dtype, threads: int | None
) -> None:
    state = wanted(dtype)
    options: dict[str, Any] = {"io": io_mode, "threads": threads, "staging_bytes": STAGING}
    resident = reset_peak_memory()
    dcp_fast.load(state, storage_reader=fast_reader(stored, **options))
    assert peak_memory() - resident <= STAGING + BESIDES
    for name, tensor in STATE.items():
        assert torch.equal(state[name], tensor.to(dtype))
