"""What a load to a CUDA device costs: bytes, copies, launches and memory, as the report and the driver count them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Entry, ShardedBuffer, fast_reader, save, write_checkpoint
from simulated_cuda.control import Simulator

import dcp_fast
from dcp_fast.transfer.staging_limits import StagingLimits

MIB = 1 << 20


def load(path: Path, state: dict[str, Any], **options: Any) -> dcp_fast.LoadReport:
    dcp_fast.load(state, storage_reader=fast_reader(path, **options))
    report = dcp_fast.last_report()
    assert report is not None
    limits = StagingLimits.of(None, 4 * MIB, options.get("pinned_bytes"), options.get("device_staging_bytes"))
    assert report.pinned_bytes <= limits.pinned_bytes
    assert report.device_staging_bytes <= limits.device_staging_bytes
    assert 0 <= report.overlap_efficiency <= 1.05
    assert report.copying_seconds >= 0
    assert all(seconds >= 0 for seconds in report.wait_seconds.values())
    return report


def test_host_loads_use_no_device(cuda: torch.device, tmp_path: Path) -> None:
    save(tmp_path, {"t": torch.ones(100)})
    report = load(tmp_path, {"t": torch.zeros(100)})
    figures = ("bytes_to_device", "device_copies", "launches", "pinned_bytes", "device_staging_bytes")
    assert [getattr(report, figure) for figure in figures] == [0] * 5
    assert report.overlap_efficiency == 0


@pytest.mark.parametrize("synchronize", [True, False])
def test_the_report_agrees_with_the_driver(
    cuda: torch.device, tmp_path: Path, simulator: Simulator, synchronize: bool
) -> None:
    save(tmp_path, {"large": torch.ones(900, 1000), "small": torch.ones(10, 10), "columns": torch.ones(300, 400)})
    state = {
        "large": torch.zeros(900, 1000, device=cuda),
        "small": torch.zeros(10, 12, device=cuda)[:, :10],
        "columns": ShardedBuffer.make((300, 400), [(0, 100)], [torch.zeros(300, 50, device=cuda)]),
    }
    torch.cuda.synchronize()
    simulator.reset()
    report = load(tmp_path, state, synchronize=synchronize, pinned_bytes=2 * MIB)
    for figure in ("bytes_to_device", "launches"):
        assert simulator.statistic(figure, 0) == getattr(report, figure) > 0
    assert simulator.statistic("copies", 0) == report.device_copies > 0


@pytest.mark.parametrize("io", ["cached", "direct"])
@pytest.mark.parametrize("rows", [(0, 1024), (256, 512)])
def test_whole_tensors_and_rows_are_copied_straight(
    cuda: torch.device, tmp_path: Path, io: str, rows: tuple[int, int]
) -> None:
    save(tmp_path, {"t": torch.ones(1024, 2048)})
    first, count = rows
    state = {"t": ShardedBuffer.make((1024, 2048), [(first, 0)], [torch.zeros(count, 2048, device=cuda)])}
    report = load(tmp_path, state, io=io)
    assert report.bytes_needed == count * 2048 * 4
    assert report.bytes_to_device == report.bytes_needed
    assert report.launches == 0
    assert (state["t"].shards[0] == 1).all()


def test_columns_are_sliced_before_they_are_copied(cuda: torch.device, tmp_path: Path) -> None:
    save(tmp_path, {"t": torch.ones(1024, 2048)})
    state = {"t": ShardedBuffer.make((1024, 2048), [(0, 512)], [torch.zeros(1024, 256, device=cuda)])}
    report = load(tmp_path, state)
    assert report.bytes_needed == 1024 * 256 * 4
    assert report.bytes_needed <= report.bytes_to_device <= 1.05 * report.bytes_needed


def test_small_tensors_share_copies_and_launches(cuda: torch.device, tmp_path: Path) -> None:
    """20,000 tensors of 4 KB, each stored in two chunks."""
    count, half = 20_000, torch.ones(512)
    chunks = [((0,), half), ((512,), half * 2)]
    write_checkpoint(tmp_path, {f"t{i}": Entry((1024,), torch.float32, chunks) for i in range(count)})
    memory = torch.zeros(count, 1024, device=cuda)
    state = {f"t{i}": memory[i] for i in range(count)}
    torch.cuda.synchronize()
    report = load(tmp_path, state)
    assert (memory[:, :512] == 1).all()
    assert (memory[:, 512:] == 2).all()
    assert report.bytes_needed == count * 4096
    # The default ring has slots of 4 MiB at least.
    assert report.device_copies <= 1.1 * report.bytes_needed / (4 * MIB) + 1
    assert report.launches == report.device_copies
    assert report.bytes_to_device <= 1.05 * report.bytes_needed
    assert report.requests <= report.device_copies + 1000


@pytest.mark.parametrize("pinned", [MIB, 8 * MIB])
def test_memory_does_not_grow_with_the_load(
    cuda: torch.device, tmp_path: Path, simulator: Simulator, slow_copies: None, pinned: int
) -> None:
    """Disk and host are faster than the copies here: readers wait for slots, and the device is never idle."""
    save(tmp_path, {f"t{i}": torch.ones(512, 1024) for i in range(4)})
    state = {f"t{i}": torch.zeros(512, 1024, device=cuda) for i in range(4)}
    torch.cuda.synchronize()
    simulator.reset()
    report = load(tmp_path, state, pinned_bytes=pinned)
    assert report.bytes_to_device == 4 * 2 * MIB
    busy = simulator.busy_seconds(0, "copy")
    assert busy == pytest.approx(4 * 2 * MIB / 0.02e9, rel=0.1)
    assert 0.9 * busy <= report.copying_seconds <= report.seconds["transfer"]  # a busy machine notices late
    assert report.wait_seconds["slot" if pinned == MIB else "device"] > 0.05
    assert report.seconds["transfer"] >= busy
