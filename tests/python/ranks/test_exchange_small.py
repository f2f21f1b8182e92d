"""Exchanges of many small records, of ranks that were told different things, and what a report tells of waiting."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import save
from ranks import Ranks
from shared_reads import failure_of, load_shared
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

import dcp_fast
from dcp_fast.ranks.exchange import MAX_EXCHANGE_BYTES, MIN_EXCHANGE_BYTES
from dcp_fast.tools.plan import plan_reads

WORLD = 4
FAILING = 2


# Small records, whose headers are a part of them that cannot be left out of account


def load_columns(path: Path, size: int, count: int, options: dict[str, Any]) -> tuple[int, str, bool]:
    mesh = init_device_mesh("cpu", (WORLD,))
    state = {
        f"t{number}": DTensor.from_local(torch.zeros(size, size // WORLD), mesh, [Shard(1)], run_check=False)
        for number in range(count)
    }
    reader = dcp_fast.FileSystemReader(path, **options)
    report = load_shared(state, path, storage_reader=reader, exchange_bytes=32 << 20)
    columns = slice(dist.get_rank() * (size // WORLD), (dist.get_rank() + 1) * (size // WORLD))
    same = all(
        torch.equal(state[f"t{number}"].to_local(), stored_tensor(number, size)[:, columns]) for number in range(count)
    )
    return report.bytes_read, report.sharing_fallback_reason, same


def stored_tensor(number: int, size: int) -> torch.Tensor:
    return torch.arange(size * size, dtype=torch.float32).view(size, size) + number


@pytest.mark.parametrize(
    ("io", "size", "count", "most"),
    [
        ("cached", 64, 100, 1.15),
        ("cached", 128, 60, 1.05),
        ("cached", 256, 20, 1.02),
        # Past the page cache whole pages are read, which of headers are several times what is needed.
        ("direct", 64, 100, 1.5),
        ("direct", 128, 60, 1.15),
        ("direct", 256, 20, 1.05),
    ],
)
def test_small_records_are_read_once(ranks: Ranks, tmp_path: Path, io: str, size: int, count: int, most: float) -> None:
    """Records of 16 to 256 KiB. Of all ranks together what they asked storage for, whatever a request costs."""
    path = save(tmp_path / "small", {f"t{number}": stored_tensor(number, size) for number in range(count)})
    stored = sum(file.stat().st_size for file in path.glob("*.distcp"))
    results = ranks.run(WORLD, load_columns, path, size, count, {"io": io})
    assert all(same and reason == "" for _, reason, same in results)
    assert sum(read for read, *_ in results) <= most * stored


# Arguments


def load_with_other_memory(path: Path) -> tuple[int, str]:
    state = {"t": torch.zeros(700, 700), **{f"n{number}": None for number in range(30)}}
    memory = MIN_EXCHANGE_BYTES if dist.get_rank() == 0 else 64 << 20
    report = load_shared(state, path, exchange_bytes=memory)
    assert all(state[f"n{number}"] == f"{number}" * 100_000 for number in range(30))
    return report.bytes_read, report.sharing_fallback_reason


def test_the_smallest_memory_holds_for_all(ranks: Ranks, tmp_path: Path) -> None:
    stored = {"t": torch.ones(700, 700), **{f"n{number}": f"{number}" * 100_000 for number in range(30)}}
    path = save(tmp_path / "stored", stored)
    size = sum(file.stat().st_size for file in path.glob("*.distcp"))
    results = ranks.run(3, load_with_other_memory, path)
    assert [reason for _, reason in results] == [""] * 3
    assert sum(read for read, _ in results) <= 1.02 * size


WRONG = {
    "too small": ({"exchange_bytes": 1000}, "ValueError"),
    "too large": ({"exchange_bytes": MAX_EXCHANGE_BYTES + 1}, "ValueError"),
    "beyond 64 bits": ({"exchange_bytes": 1 << 70}, "ValueError"),
    "text": ({"exchange_bytes": "128M"}, "TypeError"),
    "real": ({"exchange_bytes": 2e6}, "TypeError"),
    "no bool": ({"share_reads": "auto"}, "TypeError"),
}


def load_with_wrong(path: Path, arguments: dict[str, Any], on: list[int]) -> Any:
    wrong = arguments if dist.get_rank() in on else {}
    begin = time.monotonic()
    failure = failure_of(
        lambda: dcp_fast.load({"t": torch.zeros(5)}, checkpoint_id=path, **{"share_reads": True, **wrong})
    )
    state = {"t": torch.zeros(5)}
    load_shared(state, path)  # the group can be used
    assert torch.equal(state["t"], torch.ones(5))
    return failure, time.monotonic() - begin


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("on", [[FAILING], list(range(WORLD))], ids=["one", "all"])
def test_wrong_arguments(ranks: Ranks, tmp_path: Path, name: str, on: list[int]) -> None:
    """All ranks hear of it at once, also if others were told something else."""
    arguments, error = WRONG[name]
    path = save(tmp_path / "ones", {"t": torch.ones(5)})
    for failure, seconds in ranks.run(WORLD, load_with_wrong, path, arguments, on):
        assert failure == dict.fromkeys(on, error)
        assert seconds < 10


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_of_one_process(tmp_path: Path, name: str) -> None:
    arguments, error = WRONG[name]
    with pytest.raises((TypeError, ValueError)) as raised:
        dcp_fast.load({}, checkpoint_id=tmp_path, **arguments)
    assert type(raised.value).__name__ == error


def test_install_takes_yes_or_no() -> None:
    with pytest.raises(TypeError, match="share_reads"):
        dcp_fast.install(share_reads="auto")  # type: ignore[arg-type]


# Waiting


class Late(dcp_fast.DefaultLoadPlanner):
    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        time.sleep(1.0 if dist.get_rank() == FAILING else 0.0)
        return super().finish_plan(new_plan)


def wait_for_the_late(path: Path) -> float:
    report = load_shared({"t": torch.zeros(5)}, path, planner=Late())
    return report.wait_seconds["ranks"]


def test_waiting_for_what_others_need_is_told(ranks: Ranks, tmp_path: Path) -> None:
    path = save(tmp_path / "ones", {"t": torch.ones(5)})
    waits = ranks.run(WORLD, wait_for_the_late, path)
    assert all((seconds > 0.6) == (rank != FAILING) for rank, seconds in enumerate(waits)), waits


# What ranks need takes more memory than there is


def load_too_many(path: Path, count: int) -> str:
    mesh = init_device_mesh("cpu", (WORLD,))
    state = {
        f"t{number}": DTensor.from_local(torch.zeros(2, 8), mesh, [Shard(0)], run_check=False)
        for number in range(count)
    }
    report = load_shared(state, path, exchange_bytes=MIN_EXCHANGE_BYTES)
    assert all(bool((state[f"t{number}"].to_local() == number).all()) for number in range(count))
    return report.sharing_fallback_reason


def test_plan_foretells_needs_that_are_too_many(ranks: Ranks, tmp_path: Path) -> None:
    count = 6000
    path = save(tmp_path / "many", {f"t{number}": torch.full((8, 8), float(number)) for number in range(count)})
    plan = plan_reads(path, "rows", WORLD, ranks_per_node=WORLD, exchange_bytes=MIN_EXCHANGE_BYTES)
    assert plan.obstacle.startswith("what ranks need takes")
    assert plan.rounds == plan.sent_bytes == 0
    assert plan.shared_bytes == plan.alone_bytes
    for reason in ranks.run(WORLD, load_too_many, path, count):
        assert reason.startswith("what ranks need takes")  # and some more, as ranks tell files by the save
