"""Ranks of several nodes that share reads: what goes to a node goes there once, and ranks of it pass it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import fill, torch_load, torch_reader
from ranks import Ranks
from shared_reads import LAYOUTS, be_on_nodes, counted, load_shared, save_by_rows, state_dict, values_of

import dcp_fast

HEADER_BYTES = 64
# Bytes of a round for each other rank beyond what it needs: the header, and what fills it up.
HEADERS = 2 * HEADER_BYTES
SIZE = (1024, 1024)
PAYLOAD = 4 * SIZE[0] * SIZE[1]


@pytest.fixture(scope="module")
def checkpoint(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nodes") / "checkpoint"
    ranks.run(4, save_by_rows, path)
    return path


def compare(path: Path, layouts: list[str], nodes: list[int]) -> list[list[tuple[int, int]]]:
    """For each number of ranks per node, what was sent to other nodes and what the job read of each layout."""
    found: list[list[tuple[int, int]]] = [[] for _ in nodes]
    for layout in layouts:
        expected, alone = (state_dict(layout) for _ in range(2))
        torch_load(expected, storage_reader=torch_reader(path))
        dcp_fast.load(alone, checkpoint_id=path)
        assert values_of(alone) == values_of(expected), layout
        for number, ranks_per_node in enumerate(nodes):
            state = state_dict(layout)
            with counted(ranks_per_node, HEADER_BYTES) as sent:
                report = load_shared(state, path)
            assert values_of(state) == values_of(expected), (layout, ranks_per_node)
            assert report.exchange_rounds > 0
            found[number].append((sent[0], report.bytes_read_by_job))
    return found


@pytest.mark.parametrize(("world_size", "nodes"), [(3, [2]), (4, [2]), (8, [4, 3, 1])])
def test_every_layout(ranks: Ranks, checkpoint: Path, world_size: int, nodes: list[int]) -> None:
    layouts = [name for name, (dims, _) in LAYOUTS.items() if dims == 1 or world_size % 2 == 0]
    results = ranks.run(world_size, compare, checkpoint, layouts, [world_size, *nodes], timeout=180)
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    for number, layout in enumerate(layouts):
        assert sum(together[number][0] for together, *_ in results) == 0
        for place, ranks_per_node in enumerate(nodes, 1):
            between = sum(result[place][number][0] for result in results)
            assert between > 0
            assert all(result[place][number][1] <= 1.1 * stored for result in results)
            if layout == "replicas" and world_size == 8 and ranks_per_node == 4:
                assert between < 1.3 * stored  # once, with headers of records, and not four times


def weights(number: int) -> dict[str, Any]:
    return {"weight": fill(SIZE, torch.float32, number), f"state of {dist.get_rank()}": fill((300, 7), torch.int16, 3)}


def load_replicas(path: Path) -> tuple[int, int, int]:
    """Ranks that are replicas but for one tensor."""
    mine = weights(1)
    dcp.save(mine, checkpoint_id=path)
    expected, state = ({name: torch.zeros_like(value) for name, value in mine.items()} for _ in range(2))
    torch_load(expected, storage_reader=torch_reader(path))
    with counted(2, HEADER_BYTES) as sent:
        report = load_shared(state, path)
    assert values_of(state) == values_of(expected) == values_of(mine)
    return sent[0], report.exchange_rounds, report.bytes_received


def test_needs_that_differ_in_part(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(6, load_replicas, tmp_path / "checkpoint")
    between = sum(sent for sent, _, _ in results)
    most = results[0][1] * 6 * 4 * HEADERS + 6 * 6 * 8192  # what else there is: headers, of rounds and of records
    assert 2 * PAYLOAD <= between <= 2 * PAYLOAD + most
    for _, _, received in results:
        assert received <= 1.02 * PAYLOAD + most


def load_in_group(path: Path) -> None:
    """Three ranks of two nodes, which are others than the first of the job."""
    group = dist.new_group([1, 2, 3])
    if dist.get_rank() == 0:
        return
    expected, state = {"weight": torch.zeros(SIZE)}, {"weight": torch.zeros(SIZE)}
    torch_load(expected, storage_reader=torch_reader(path), process_group=group)
    with counted(2, HEADER_BYTES) as sent:
        load_shared(state, path, process_group=group)
    assert values_of(state) == values_of(expected)
    assert sent[0] > 0 or dist.get_rank() != 1
    dist.destroy_process_group(group)


def save_weights(path: Path) -> None:
    dcp.save({"weight": fill(SIZE, torch.float32, 4)}, checkpoint_id=path)


def test_groups(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(1, save_weights, tmp_path / "checkpoint")
    ranks.run(4, load_in_group, tmp_path / "checkpoint")


def load_converted(path: Path) -> None:
    expected, state = (state_dict("replicas", dtype=torch.float16) for _ in range(2))
    torch_load(expected, storage_reader=torch_reader(path))
    with be_on_nodes(2):
        load_shared(state, path)
    assert values_of(state) == values_of(expected)


def test_what_is_passed_on_is_what_is_stored(ranks: Ranks, checkpoint: Path) -> None:
    ranks.run(4, load_converted, checkpoint)
