"""Loads of one checkpoint in many layouts, on ranks that share what they read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import fill, image, torch_load, torch_reader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor import zeros as zeros_on

import dcp_fast
from dcp_fast.ranks import exchange
from dcp_fast.transfer.sharing import Phase

__all__ = [
    "LAYOUTS",
    "ROUNDS_BYTES",
    "at_step",
    "be_on_nodes",
    "counted",
    "failing_step",
    "failure_of",
    "load_shared",
    "save_by_rows",
    "state_dict",
    "values_of",
]

ROUNDS_BYTES = 1 << 20  # the least memory of an exchange: many rounds

# Odd sizes, so that shards are uneven and some are empty; a tensor that is larger than a unit; dtypes of all sizes.
_TENSORS: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "wide": ((701, 301), torch.float32),
    "tall": ((5003, 7), torch.bfloat16),
    "long": ((30011,), torch.float64),
    "cube": ((13, 17, 19), torch.int16),
    "small": ((3, 2), torch.float32),
    "scalar": ((), torch.int64),
    "bytes": ((1001,), torch.uint8),
}

# Of a mesh of so many dimensions, how a tensor of two dimensions or more is placed.
LAYOUTS: dict[str, tuple[int, list[Any]]] = {
    "rows": (1, [Shard(0)]),
    "columns": (1, [Shard(1)]),
    "replicas": (1, [Replicate()]),
    "HSDP": (2, [Replicate(), Shard(0)]),
    "FSDP+TP": (2, [Shard(0), Shard(1)]),
    "TP rows": (2, [Shard(1), Shard(0)]),
}


@contextmanager
def be_on_nodes(ranks_per_node: int) -> Iterator[None]:
    """Take this rank for one of several nodes. The first ranks are on the first node."""
    with mock.patch.object(exchange, "_node", return_value=dist.get_rank() // ranks_per_node):
        yield


@contextmanager
def counted(ranks_per_node: int, header_bytes: int = 0) -> Iterator[list[int]]:
    """Be on one of several nodes, and count what this rank sends to ranks of other nodes.

    Args:
        ranks_per_node: as of :func:`be_on_nodes`.
        header_bytes: of what goes to a rank in a round, so many are left out.
    """
    sent = [0]
    original = exchange.Exchange._begin_round
    node = dist.get_rank() // ranks_per_node

    def begin(self: exchange.Exchange, round: int, sizes: tuple[list[int], list[int]], *args: Any) -> Any:
        sent[0] += sum(size - header_bytes for rank, size in enumerate(sizes[0]) if rank // ranks_per_node != node)
        return original(self, round, sizes, *args)

    with be_on_nodes(ranks_per_node), mock.patch.object(exchange.Exchange, "_begin_round", begin):
        yield sent


def save_by_rows(path: Path) -> None:
    """Save the checkpoint, by rows of all ranks."""
    dcp.save(state_dict("rows", filled=True), checkpoint_id=path)


def state_dict(layout: str, filled: bool = False, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The state dict of this rank, of zeros.

    Args:
        layout: of LAYOUTS.
        filled: whether it has the values of the checkpoint instead.
        dtype: of floating point tensors; None: as stored.
    """
    world = dist.get_world_size()
    dims, placements = LAYOUTS[layout]
    shape = (world,) if dims == 1 else (world // 2, 2) if layout == "TP rows" else (2, world // 2)
    mesh = init_device_mesh("cpu", shape)
    model: dict[str, Any] = {}
    for number, (name, (size, stored)) in enumerate(_TENSORS.items()):
        on_mesh = [p if not isinstance(p, Shard) or p.dim < len(size) else Replicate() for p in placements]
        wanted = dtype if dtype is not None and stored.is_floating_point else stored
        tensor = zeros_on(size, dtype=wanted, device_mesh=mesh, placements=on_mesh)
        if filled:
            whole = fill(size, stored, number)
            if stored == torch.float64:
                whole = torch.linspace(-3, 3, size[0], dtype=stored)
            tensor = DTensor.from_local(whole, mesh, [Replicate()] * dims).redistribute(mesh, on_mesh)
        model[name] = tensor
    plain = fill((51, 9), torch.float32, 77) if filled else torch.zeros(51, 9)
    return {
        "model": model,
        "plain": plain,
        "strided": plain.t().contiguous().t() if filled else torch.zeros(9, 51).t(),
        "step": 7 if filled else 0,
        "names": ["a", {"b": 2.5}] if filled else ["", {"b": 0.0}],
        "rng": (torch.arange(5.0), [1, 2]) if filled else (torch.zeros(5), [0, 0]),
    }


def values_of(state: dict[str, Any]) -> Any:
    return image(state)


def load_shared(state: dict[str, Any], path: Path, **options: Any) -> dcp_fast.LoadReport:
    """Load with sharing, and return the report."""
    arguments: dict[str, Any] = {"checkpoint_id": path, "share_reads": True, "exchange_bytes": ROUNDS_BYTES, **options}
    dcp_fast.load(state, **arguments)
    report = dcp_fast.last_report()
    assert report is not None
    return report


def load_by_torch(state: dict[str, Any], path: Path, planner: Any = None) -> None:
    torch_load(state, storage_reader=torch_reader(path), planner=planner)


@contextmanager
def at_step(nth: int, action: Callable[[], None]) -> Iterator[None]:
    """Do something before the nth step of the rounds of all exchanges of a load."""
    original = exchange.Exchange.share
    calls = itertools.count(-nth)

    def share(self: exchange.Exchange, phase: Phase, find: Callable[[], tuple[Any, Any]]) -> bool:
        def found() -> tuple[Any, Any]:
            need, step = find()

            def acting(*args: Any) -> Any:
                if next(calls) == 0:
                    action()
                return step(*args)

            return need, acting

        return original(self, phase, found)

    with mock.patch.object(exchange.Exchange, "share", share):
        yield


@contextmanager
def failing_step(nth: int, rank: int, error: type[BaseException]) -> Iterator[None]:
    """Fail in such a step, on one rank."""

    def fail() -> None:
        if dist.get_rank() == rank:
            raise error("in a round")

    with at_step(nth, fail):
        yield


def failure_of(load: Callable[[], Any]) -> dict[int, str] | str:
    """Names of the errors that a load fails with, by rank; or of the one that it raises alone."""
    try:
        load()
    except CheckpointException as error:
        return {rank: type(failure[0]).__name__ for rank, failure in error.failures.items()}
    except Exception as error:
        return type(error).__name__
    return "nothing"
