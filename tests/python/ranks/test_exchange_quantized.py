"""Ranks share quantized tensors: elements are dequantized as they arrive, and each stored byte is read once."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import image, torch_load, torch_planner
from quantized_files import FLOAT8, fast_quantized_reader, finite, make_mxfp4, torch_quantized_reader, write_quantized
from ranks import Ranks
from shared_reads import be_on_nodes, failing_step, failure_of, load_shared
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor import zeros as zeros_on

import dcp_fast
from dcp_fast import _native

WORLD = 4
FAILING = 2
BLOCK = 32
# Odd sizes, so that shards begin and end within blocks, and units within rows.
SIZES = {"a.weight": (1501, 707), "b.weight": (64, 3001), "c.weight": (3, 5), "d.weight": (257, 33)}
EXPERTS = (3, 65, 8)  # blocks of MXFP4 in rows of several matrices, of 32 elements each
LAYOUTS: dict[str, tuple[int, list[Any]]] = {
    "rows": (1, [Shard(0)]),
    "columns": (1, [Shard(1)]),
    "replicas": (1, [Replicate()]),
    "HSDP": (2, [Replicate(), Shard(0)]),
    "FSDP+TP": (2, [Shard(0), Shard(1)]),
}


def write(path: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    files: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, (name, sizes) in enumerate(SIZES.items()):
        blocks = [-(-size // BLOCK) for size in sizes]
        scales = torch.rand(blocks, generator=generator) * 4
        files[number % 2][name] = finite(sizes, FLOAT8[number % len(FLOAT8)], number, 100.0)
        # In another file than the elements, for some of them.
        files[number // 2][name + "_scale_inv"] = scales.to([torch.float32, torch.bfloat16][number % 2])
    files[0]["experts_blocks"], files[1]["experts_scales"] = make_mxfp4(EXPERTS, 9)
    files[0]["plain"] = torch.rand(300, 7, generator=generator)
    return write_quantized(path, *files)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("quantized") / "model")


def sizes_of_all() -> dict[str, tuple[int, ...]]:
    return {**SIZES, "experts_blocks": (*EXPERTS[:-1], EXPERTS[-1] * BLOCK), "plain": (300, 7)}


def state_dict(layout: str, dtype: torch.dtype = torch.float32, strided: bool = False) -> dict[str, Any]:
    dims, placements = LAYOUTS[layout]
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,) if dims == 1 else (2, world // 2))
    state: dict[str, Any] = {}
    for name, sizes in sizes_of_all().items():
        tensor = zeros_on(sizes, dtype=dtype, device_mesh=mesh, placements=placements)
        if strided:
            local = tensor.to_local()
            columns_first = torch.zeros(*local.shape[:-2], *local.shape[:-3:-1], dtype=dtype).transpose(-1, -2)
            stride = torch.empty(sizes, device="meta").stride()
            tensor = DTensor.from_local(columns_first, mesh, placements, shape=torch.Size(sizes), stride=stride)
        state[name] = tensor
    return state


def readers(path: Path, target: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    arguments = {"target_dtype": target, "block_size": BLOCK}
    return torch_quantized_reader(str(path), **arguments), fast_quantized_reader(str(path), **arguments, **options)


def expected_of(path: Path, make: Any, target: torch.dtype = torch.float32) -> Any:
    """What a load without sharing gives, which other tests compare with torch's and with the formats."""
    state = make()
    dcp_fast.load(state, storage_reader=readers(path, target)[1])
    return image(state)


def compare(path: Path, layouts: list[str]) -> list[tuple[int, int, str]]:
    said = []
    for layout in layouts:
        for dtype, target, strided in [
            (torch.float32, torch.float32, False),
            (torch.bfloat16, torch.float32, True),
            (torch.float64, torch.bfloat16, False),
        ]:
            make = partial(state_dict, layout, dtype, strided)
            state = make()
            report = load_shared(state, path, storage_reader=readers(path, target)[1])
            assert image(state) == expected_of(path, make, target), (layout, dtype, target, strided)
            assert report.dequantized_items > 0
            said.append((report.bytes_read, report.bytes_needed, report.sharing_fallback_reason))
    return said


def stored_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_layout(ranks: Ranks, checkpoint: Path, world_size: int) -> None:
    layouts = [name for name, (dims, _) in LAYOUTS.items() if dims == 1 or world_size > 2]
    results = ranks.run(world_size, compare, checkpoint, layouts, timeout=240)
    for of_ranks in zip(*results, strict=True):
        assert all(reason == "" for *_, reason in of_ranks)
        assert sum(read for read, *_ in of_ranks) <= 1.02 * stored_bytes(checkpoint)


def as_under_torch(path: Path) -> None:
    """torch's reader knows FP8 of two dimensions."""
    whole = {name: torch.zeros(sizes) for name, sizes in SIZES.items()}
    expected, state = ({name: tensor.clone() for name, tensor in whole.items()} for _ in range(2))
    theirs, ours = readers(path)
    torch_load(expected, storage_reader=theirs)
    report = load_shared(state, path, storage_reader=ours)
    assert image(state) == image(expected)
    assert report.bytes_needed > 0


def test_as_under_torch(ranks: Ranks, tmp_path: Path) -> None:
    path = write_quantized(
        tmp_path / "model",
        {
            name: tensor
            for number, (name, sizes) in enumerate(SIZES.items())
            for name, tensor in [
                (name, finite(sizes, torch.float8_e4m3fn, number, 100.0)),
                (name + "_scale_inv", torch.rand([-(-size // BLOCK) for size in sizes]) + 0.5),
            ]
        },
    )
    ranks.run(2, as_under_torch, path)


def on_nodes(path: Path) -> None:
    with be_on_nodes(2):
        state = state_dict("replicas")
        load_shared(state, path, storage_reader=readers(path)[1])
    assert image(state) == expected_of(path, partial(state_dict, "replicas"))


def test_relays(ranks: Ranks, checkpoint: Path) -> None:
    ranks.run(WORLD, on_nodes, checkpoint)


class Resolving(dcp.DefaultLoadPlanner):
    def resolve_tensor(self, item: Any) -> torch.Tensor:
        return super().resolve_tensor(item)


class Committing(dcp.DefaultLoadPlanner):
    def commit_tensor(self, item: Any, tensor: torch.Tensor) -> None:
        tensor.add_(1)


def of_other_kinds(path: Path) -> tuple[str, int]:
    """Ranks whose planners have hooks, one that needs nothing quantized, and one whose targets torch must write to."""
    rank = dist.get_rank()
    planner: Any = [Committing, Resolving, torch_planner, dcp_fast.DefaultLoadPlanner][rank]

    def make() -> dict[str, Any]:
        if rank == 2:
            return {"plain": torch.zeros(300, 7)}
        dtype = torch.int16 if rank == 3 else torch.float32
        return {name: torch.zeros(sizes, dtype=dtype) for name, sizes in sizes_of_all().items()}

    expected, state = make(), make()
    dcp_fast.load(expected, storage_reader=readers(path)[1], planner=planner())
    report = load_shared(state, path, storage_reader=readers(path)[1], planner=planner())
    assert image(state) == image(expected)
    return report.sharing_fallback_reason, report.bytes_read


def test_ranks_of_other_kinds(ranks: Ranks, checkpoint: Path) -> None:
    commits, resolves, nothing, by_torch = ranks.run(WORLD, of_other_kinds, checkpoint)
    assert commits[0] == resolves[0] == nothing[0] == by_torch[0] == ""


class Doubling(dcp.DefaultLoadPlanner):
    """Tells only when it is asked where a box goes: into temporary memory of another dtype."""

    def resolve_tensor(self, item: Any) -> torch.Tensor:
        self.target = super().resolve_tensor(item)
        return torch.empty(self.target.shape, dtype=torch.float64)

    def commit_tensor(self, item: Any, tensor: torch.Tensor) -> None:
        self.target.copy_(tensor * 2)


def resolved(path: Path, planner: Any, most_bytes: int) -> list[tuple[int, str]]:
    said = []
    for layout in LAYOUTS:
        for dtype, target in [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)]:
            expected, state = state_dict(layout, dtype), state_dict(layout, dtype)
            dcp_fast.load(expected, storage_reader=readers(path, target)[1], planner=planner())
            with mock.patch("dcp_fast.transfer.shared_reads.SharedReads.most_bytes", most_bytes):
                report = load_shared(state, path, storage_reader=readers(path, target)[1], planner=planner())
            assert image(state) == image(expected), (layout, dtype, target)
            assert report.dequantized_items > 0
            said.append((report.bytes_read, report.sharing_fallback_reason))
    return said


@pytest.mark.parametrize("planner", [Resolving, Doubling])
@pytest.mark.parametrize("most_bytes", [128 << 20, 300_000])
def test_planners_that_resolve(ranks: Ranks, checkpoint: Path, planner: Any, most_bytes: int) -> None:
    for of_ranks in zip(*ranks.run(WORLD, resolved, checkpoint, planner, most_bytes, timeout=180), strict=True):
        assert all(reason == "" for _, reason in of_ranks)
        if most_bytes > 300_000:  # else parts are of rows, between which what is not needed is read, too
            assert sum(read for read, _ in of_ranks) <= 1.05 * stored_bytes(checkpoint)


def with_little_memory(path: Path) -> list[str]:
    """There is room for the scales of some boxes. The others come with theirs, in batches."""
    reasons = []
    for most_bytes in (5_000, 20_000 if dist.get_rank() else 9_000):
        state = state_dict("replicas")
        with mock.patch("dcp_fast.transfer.shared_reads.SharedReads.most_bytes", most_bytes):
            report = load_shared(state, path, storage_reader=readers(path)[1])
        assert image(state) == expected_of(path, partial(state_dict, "replicas"))
        reasons.append(report.sharing_fallback_reason)
    return reasons


def test_scales_that_do_not_fit(ranks: Ranks, checkpoint: Path) -> None:
    assert ranks.run(2, with_little_memory, checkpoint) == [["", ""]] * 2


def with_batches_before(path: Path) -> int:
    """Some ranks have boxes that torch converts, in batches of other numbers, before all have quantized tensors."""

    def make() -> dict[str, Any]:
        plain = torch.zeros(300, 7, dtype=[torch.float32, torch.bool, torch.complex64][dist.get_rank() % 3])
        return {**state_dict("replicas"), "plain": plain}

    state = make()
    with mock.patch("dcp_fast.transfer.shared_reads.SharedReads.most_bytes", 8_000 if dist.get_rank() else 9_000):
        report = load_shared(state, path, storage_reader=readers(path)[1])
    assert image(state) == expected_of(path, make)
    return report.bytes_read


def test_batches_before_quantized_tensors(ranks: Ranks, checkpoint: Path) -> None:
    """All ranks have the same bytes in the same exchange."""
    assert sum(ranks.run(WORLD, with_batches_before, checkpoint)) <= 1.05 * stored_bytes(checkpoint)


def that_torch_writes_to(path: Path) -> list[tuple[int, str]]:
    said = []
    for layout in LAYOUTS:
        make = partial(state_dict, layout, torch.int16)
        state = make()
        report = load_shared(state, path, storage_reader=readers(path)[1])
        assert image(state) == expected_of(path, make), layout
        said.append((report.bytes_read, report.sharing_fallback_reason))
    return said


def test_targets_that_torch_writes_to(ranks: Ranks, checkpoint: Path) -> None:
    for of_ranks in zip(*ranks.run(WORLD, that_torch_writes_to, checkpoint), strict=True):
        assert all(reason == "" for _, reason in of_ranks)
        assert sum(read for read, _ in of_ranks) <= 1.05 * stored_bytes(checkpoint)


def fail_in_rounds(path: Path) -> list[dict[int, str] | str]:
    """Fail in every step of the rounds of all exchanges, one load after another."""
    found: list[dict[int, str] | str] = []
    for nth in range(1000):
        with failing_step(nth, FAILING, ArithmeticError):
            load = partial(load_shared, state_dict("replicas"), path, storage_reader=readers(path)[1])
            found.append(failure_of(load))
        if found[-1] == "nothing":
            break
    state = state_dict("replicas")
    load_shared(state, path, storage_reader=readers(path)[1])
    assert image(state) == expected_of(path, partial(state_dict, "replicas"))
    return found


def test_every_round(ranks: Ranks, checkpoint: Path) -> None:
    for found in ranks.run(WORLD, fail_in_rounds, checkpoint, timeout=240):
        *failures, last = found
        assert last == "nothing"
        assert len(failures) > 8
        assert all(failure == {FAILING: "ArithmeticError"} for failure in failures)


def no_memory(*_: Any) -> Any:
    raise MemoryError


def lack(path: Path, name: str) -> dict[int, str] | str:
    """A rank fails between the exchanges, and others learn of it in the next one."""
    with ExitStack() as faults:
        if dist.get_rank() == FAILING:
            owner = "dcp_fast.transfer.shared_quantized.allocate"
            if name == "reads":
                faults.enter_context(_native.FaultInjection("pread", 6, 5, repeat=1 << 30))
            else:
                faults.enter_context(mock.patch(owner, no_memory))
        reader = readers(path, io="cached")[1]
        failure = failure_of(partial(load_shared, state_dict("replicas"), path, storage_reader=reader))
    state = state_dict("replicas")
    load_shared(state, path, storage_reader=readers(path)[1])
    assert image(state) == expected_of(path, partial(state_dict, "replicas"))
    return failure


@pytest.mark.parametrize(("name", "error"), [("memory", "OutOfMemoryError"), ("reads", "FileAccessError")])
def test_a_rank_that_fails(ranks: Ranks, checkpoint: Path, name: str, error: str) -> None:
    assert ranks.run(WORLD, lack, checkpoint, name) == [{FAILING: error}] * WORLD
