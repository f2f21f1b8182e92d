"""Exchanges over a backend that has no all_to_all_single."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from helpers import torch_load, torch_reader
from ranks import Ranks
from shared_reads import LAYOUTS, ROUNDS_BYTES, load_shared, save_by_rows, state_dict, values_of
from torch.distributed.checkpoint.api import CheckpointException

import dcp_fast
from dcp_fast import _native

WORLD = 4
LACKING = RuntimeError("Backend small does not support alltoall_base")  # torch's words


def lacking(error: Exception = LACKING) -> Any:
    return mock.patch.object(dist, "all_to_all_single", side_effect=error)


def load_in_every_layout(path: Path) -> None:
    for layout in LAYOUTS:
        expected, state = state_dict(layout), state_dict(layout)
        torch_load(expected, storage_reader=torch_reader(path))
        with lacking() as collective:
            report = load_shared(state, path, exchange_bytes=ROUNDS_BYTES)
        assert values_of(state) == values_of(expected), layout
        assert collective.call_count > report.exchange_rounds > 2  # what ranks need is told so as well


def load_in_a_part_of_the_ranks(path: Path) -> None:
    groups = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    group = groups[dist.get_rank() % 2]
    state, expected = ({"plain": torch.zeros(51, 9)} for _ in range(2))
    torch_load(expected, storage_reader=torch_reader(path), process_group=group)
    with lacking():
        report = load_shared(state, path, process_group=group)
    assert values_of(state) == values_of(expected)
    assert report.exchange_rounds > 0


def failure(path: Path) -> str:
    try:
        load_shared(state_dict("columns"), path, storage_reader=dcp_fast.FileSystemReader(path, io="cached"))
    except CheckpointException as error:
        return str(error)
    return "nothing"


def fail(path: Path) -> tuple[str, str]:
    """A read that fails on one rank, and a collective call that fails for another reason."""
    nth = 3 if dist.get_rank() == 1 else -1
    with lacking(), _native.FaultInjection("pread", nth=nth, error_number=5, repeat=1_000_000):
        of_reads = failure(path)
    with lacking(RuntimeError("a cable")):
        of_calls = failure(path)
    load_in_every_layout(path)
    return of_reads, of_calls


def test_messages_do_the_same(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(WORLD, save_by_rows, tmp_path / "checkpoint")
    ranks.run(WORLD, load_in_every_layout, tmp_path / "checkpoint", timeout=120)
    ranks.run(WORLD, load_in_a_part_of_the_ranks, tmp_path / "checkpoint")


def test_failures(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(WORLD, save_by_rows, tmp_path / "checkpoint")
    for reads, calls in ranks.run(WORLD, fail, tmp_path / "checkpoint", timeout=120):
        assert "Input/output error" in str(reads)
        assert "a cable" in str(calls)
