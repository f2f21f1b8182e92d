"""Ranks of one node that load cold files together read each byte once, and load what torch loads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

import dcp_fast
from dcp_fast.ranks import exchange

WORLD = 4
ROWS, COLUMNS = 2048, 1024
TENSORS = 4
PAYLOAD = TENSORS * ROWS * COLUMNS * 4
CASES: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "whole": ((WORLD,), (Replicate(),)),
    "hsdp": ((2, 2), (Replicate(), Shard(0))),
    "columns": ((WORLD,), (Shard(1),)),
    "rows": ((WORLD,), (Shard(0),)),
}


@pytest.fixture
def checkpoint(tmp_path: Path, ranks: Ranks) -> Path:
    """Saved by rows; the test is skipped where its files cannot be made cold."""
    directory = tmp_path / "checkpoint"
    ranks.run(WORLD, _save, str(directory))
    _evict(directory)
    if _cached(directory) or not Path("/proc/self/io").exists():
        pytest.skip("the file system keeps what should be dropped from the page cache")
    return directory


@pytest.mark.parametrize("case", ["whole", "hsdp", "columns"])
def test_ranks_that_know_of_each_other_read_each_byte_once(case: str, checkpoint: Path, ranks: Ranks) -> None:
    results = ranks.run(WORLD, _load_cold, str(checkpoint), case, WORLD)
    assert all(same for same, _, _ in results)
    # A rank that comes late may find all in the page cache.
    assert any(shared > 0 for _, shared, _ in results)
    from_disk = sum(read for _, _, read in results)
    assert PAYLOAD <= from_disk <= 1.1 * PAYLOAD


def test_ranks_that_cannot_share_reads_share_the_page_cache(checkpoint: Path, ranks: Ranks) -> None:
    """They find out when they tell each other what they need, and have chosen how to read by then."""
    results = ranks.run(WORLD, _load_cold_declined, str(checkpoint))
    assert all(same for same, _, _ in results)
    assert sum(read for _, _, read in results) <= 1.2 * PAYLOAD


def test_ranks_that_need_different_records_read_past_the_page_cache(checkpoint: Path, ranks: Ranks) -> None:
    results = ranks.run(WORLD, _load_cold, str(checkpoint), "rows", WORLD)
    assert all(same for same, _, _ in results)
    assert [shared for _, shared, _ in results] == [0] * WORLD
    assert sum(read for _, _, read in results) <= 1.1 * PAYLOAD
    assert not _cached(checkpoint)


@pytest.mark.parametrize("of_node", [None, 1])
def test_a_rank_without_others_reads_past_the_page_cache(of_node: int | None, checkpoint: Path, ranks: Ranks) -> None:
    results = ranks.run(1, _load_cold, str(checkpoint), "alone", of_node)
    assert results[0][:2] == (True, 0)
    assert not _cached(checkpoint)


def test_ranks_that_load_without_each_other_load_what_is_theirs(tmp_path: Path, ranks: Ranks) -> None:
    assert all(ranks.run(2, _load_another, str(tmp_path)))


# On the ranks


def _state(case: str, fill: Callable[[torch.Tensor], object]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    mesh_sizes, placements = CASES.get(case, ((1,), (Replicate(),)))
    mesh = init_device_mesh("cpu", mesh_sizes)
    for i in range(TENSORS):
        sizes = [ROWS, COLUMNS]
        for placement, parts in zip(placements, mesh_sizes, strict=True):
            if isinstance(placement, Shard):
                sizes[placement.dim] //= parts
        local = torch.empty(sizes)
        fill(local)
        state[f"layer.{i}.weight"] = DTensor.from_local(local, mesh, placements, run_check=False)
    return state


def _save(directory: str) -> None:
    torch.manual_seed(dist.get_rank())
    dcp.save(_state("rows", lambda tensor: tensor.normal_()), checkpoint_id=directory)


def _load_cold_declined(directory: str) -> tuple[bool, int, int]:
    why = "what ranks need takes too much"
    with mock.patch.object(exchange, "why_too_many", return_value=why):
        result = _load_cold(directory, "whole", WORLD, share_reads=True)
    report = dcp_fast.last_report()
    assert report is not None
    assert report.sharing_fallback_reason == why
    return result


def _load_cold(directory: str, case: str, of_node: int | None, **options: Any) -> tuple[bool, int, int]:
    """Whether all is as torch loads it, how many files were shared, and what the disk gave this rank."""
    expected = _state(case, torch.Tensor.zero_)
    dcp.load(expected, checkpoint_id=directory)
    dist.barrier()
    if dist.get_rank() == 0:
        _evict(Path(directory))
    dist.barrier()
    state = _state(case, torch.Tensor.zero_)
    if of_node is not None:
        os.environ.update(LOCAL_WORLD_SIZE=str(of_node), LOCAL_RANK=str(dist.get_rank()))
    try:
        before = _bytes_from_disk()
        dcp_fast.load(state, checkpoint_id=directory, **options)
        read = _bytes_from_disk() - before
    finally:
        for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
    report = dcp_fast.last_report()
    assert report is not None
    same = all(torch.equal(expected[name].to_local(), value.to_local()) for name, value in state.items())
    return same, report.files_shared_on_node, read


def _load_another(directory: str) -> bool:
    rank = dist.get_rank()
    path = Path(directory, f"of_rank_{rank}")
    saved = {"a": torch.full((1 << 20,), float(rank)), "b": torch.arange(300_000) + rank}
    dcp.save(saved, checkpoint_id=path, no_dist=True)
    _evict(path)
    state = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    os.environ.update(LOCAL_WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(rank))
    try:
        dcp_fast.load(state, checkpoint_id=path, no_dist=True)
    finally:
        for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
    return all(torch.equal(state[name], saved[name]) for name in saved)


# Files and what the kernel tells of them


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.distcp"))


def _evict(directory: Path) -> None:
    for path in _files(directory):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)  # dirty pages cannot be dropped
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _cached(directory: Path) -> bool:
    """Whether any of some pages far behind the headers is in the page cache."""
    page = bytearray(4096)
    for path in _files(directory):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead for what is not there
        size = os.fstat(fd).st_size
        try:
            for part in range(1, 8):
                try:
                    if os.preadv(fd, [page], size * part // 8 // 4096 * 4096, os.RWF_NOWAIT) > 0:
                        return True
                except BlockingIOError:
                    continue
                except OSError:
                    return True  # nobody can tell
        finally:
            os.close(fd)
    return False


def _bytes_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split(":")[1]) for line in lines if line.startswith("read_bytes"))
