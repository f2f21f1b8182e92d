"""Storage that benchmarks make slow: loads from it are right, and take as long as it says."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dcp_fast
from dcp_fast import _native


def test_loads_from_slow_storage_are_right_and_slow(tmp_path: Path) -> None:
    saved = {"a": torch.arange(250_000), "b": torch.randn(300, 700), "step": 5}
    dcp.save(saved, checkpoint_id=tmp_path / "checkpoint")
    state = {"a": torch.zeros(250_000, dtype=torch.int64), "b": torch.zeros(300, 700), "step": 0}
    storage = _native.SlowStorage(str(tmp_path / "storage"), bytes_per_second=2e7, latency_seconds=0.001)
    start = time.perf_counter()
    with storage:
        dcp_fast.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    seconds = time.perf_counter() - start
    assert torch.equal(state["a"], saved["a"])
    assert torch.equal(state["b"], saved["b"])
    assert state["step"] == 5
    report = dcp_fast.last_report()
    assert report is not None
    assert report.bytes_mapped == 0
    assert storage.bytes >= report.bytes_read > 2_840_000
    assert seconds >= storage.bytes / 2e7

    before = storage.bytes
    dcp_fast.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)  # outside of the block
    assert storage.bytes == before


def test_loaders_that_read_in_another_way_wait_too(tmp_path: Path) -> None:
    storage = _native.SlowStorage(str(tmp_path / "storage"), bytes_per_second=1e6)
    start = time.perf_counter()
    storage.take(50_000)
    assert time.perf_counter() - start >= 0.05
    assert (storage.bytes, storage.requests) == (50_000, 1)
    with pytest.raises(ValueError, match="negative"):
        storage.take(-1)


def test_impossible_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bandwidth"):
        _native.SlowStorage(str(tmp_path / "storage"), bytes_per_second=0)
    with pytest.raises(RuntimeError, match="missing"):
        _native.SlowStorage(str(tmp_path / "missing" / "storage"), bytes_per_second=1)
