"""Ranks share quantized tensors that go to CUDA devices: bytes arrive there in batches, for a kernel to dequantize."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cuda_ranks import begin, end, exchange_on_devices, little_device_memory, only_simulated
from quantized_files import FLOAT8, fast_quantized_reader, finite, make_mxfp4, write_quantized
from ranks import Ranks
from shared_reads import failing_step, failure_of, load_shared
from simulated_cuda.control import Simulator
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor import zeros as zeros_on

import dcp_fast

WORLD = 2
FAILING = 1
BLOCK = 32
SIZES = {"a.weight": (301, 207), "b.weight": (64, 1001), "c.weight": (3, 5), "d.weight": (157, 33)}
EXPERTS = (3, 20, 4)  # blocks of MXFP4
NO_BINARY = 209  # CUresult


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    """Ranks of this module alone: what makes simulated devices of torch's stays in a process."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(5)
    files: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, (name, sizes) in enumerate(SIZES.items()):
        scales = torch.rand([-(-size // BLOCK) for size in sizes], generator=generator) * 4
        files[number % 2][name] = finite(sizes, FLOAT8[number % len(FLOAT8)], number, 100.0)
        files[number // 2][name + "_scale_inv"] = scales.to([torch.float32, torch.bfloat16][number % 2])
    files[0]["experts_blocks"], files[1]["experts_scales"] = make_mxfp4(EXPERTS, 9)
    files[1]["plain"] = torch.rand(300, 7, generator=generator)
    return write_quantized(tmp_path_factory.mktemp("quantized") / "model", *files)


def reader(path: Path) -> Any:
    return fast_quantized_reader(str(path), block_size=BLOCK)


Devices = Callable[[str], str]


def on_device(_: str) -> str:
    return "cuda"


def on_both(name: str) -> str:
    """One rank has tensors on its device that the other one has on the host."""
    return "cuda" if name[0] in ["ab", "bce"][dist.get_rank()] else "cpu"


def on_host_of_one_rank(_: str) -> str:
    return "cuda" if dist.get_rank() == FAILING else "cpu"


def state_dict(device: Devices, placements: list[Any], dtype: torch.dtype) -> dict[str, Any]:
    sizes = {**SIZES, "experts_blocks": (*EXPERTS[:-1], EXPERTS[-1] * BLOCK), "plain": (300, 7)}
    meshes = {kind: init_device_mesh(kind, (dist.get_world_size(),)) for kind in ("cpu", "cuda")}
    return {
        name: zeros_on(size, dtype=dtype, device_mesh=meshes[device(name)], placements=placements)
        for name, size in sizes.items()
    }


def values(state: dict[str, Any]) -> dict[str, list[int]]:
    return {name: value.to_local().cpu().contiguous().view(torch.uint8).tolist() for name, value in state.items()}


def expected_of(path: Path, placements: list[Any], dtype: torch.dtype) -> Any:
    """What a load without sharing gives on the host, which other tests compare with torch's and with the formats."""
    state = state_dict(lambda _: "cpu", placements, dtype)
    dcp_fast.load(state, storage_reader=reader(path))
    return values(state)


def compare(path: Path, device: Devices, dtypes: list[torch.dtype]) -> list[int]:
    begin()
    read = []
    for placements in ([Replicate()], [Shard(1)]):
        for dtype in dtypes:
            state = state_dict(device, placements, dtype)
            report = load_shared(state, path, storage_reader=reader(path))
            assert values(state) == expected_of(path, placements, dtype), (placements, dtype)
            assert report.sharing_fallback_reason == ""
            assert report.dequantized_items > 0
            assert isinstance(state["plain"], DTensor)
            read.append(report.bytes_read)
    end()
    return read


def compare_on_devices(*args: Any) -> list[int]:
    with exchange_on_devices():
        return compare(*args)


def compare_with_little_memory(*args: Any) -> list[int]:
    with little_device_memory(20_000):
        return compare(*args)


DTYPES = [torch.float64, torch.bfloat16]


@pytest.mark.parametrize("device", [on_device, on_both, on_host_of_one_rank])
@pytest.mark.parametrize(
    "compare", [compare, compare_with_little_memory, pytest.param(compare_on_devices, marks=only_simulated)]
)
def test_as_without_sharing(pool: Ranks, checkpoint: Path, compare: Any, device: Devices) -> None:
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    read = pool.run(WORLD, compare, checkpoint, device, DTYPES, timeout=180)
    # Where ranks dequantize in different places, they get the bytes in different exchanges. Small buffers have parts of
    # rows, between which what is not needed is read too.
    if device is on_device and compare is not compare_with_little_memory:
        assert all(sum(of_ranks) <= 1.02 * stored for of_ranks in zip(*read, strict=True))


def fail_in_rounds(path: Path) -> list[dict[int, str] | str]:
    begin()
    found: list[dict[int, str] | str] = []
    for nth in range(1000):
        state = state_dict(on_both, [Replicate()], torch.float32)
        with failing_step(nth, FAILING, ArithmeticError), little_device_memory(20_000):
            found.append(failure_of(partial(load_shared, state, path, storage_reader=reader(path))))
        if found[-1] == "nothing":
            break
    end()
    return found


def test_every_round(pool: Ranks, checkpoint: Path) -> None:
    for *failures, last in pool.run(WORLD, fail_in_rounds, checkpoint, timeout=180):
        assert last == "nothing"
        assert len(failures) > 12
        assert all(failure == {FAILING: "ArithmeticError"} for failure in failures)


def load_where_a_driver_refuses(path: Path, first: int) -> tuple[str, int]:
    begin()
    expected = expected_of(path, [Replicate()], torch.float32)
    dcp_fast.release_staging()
    state = state_dict(on_device, [Replicate()], torch.float32)
    if dist.get_rank() == FAILING:
        for nth in range(first, first + 50):
            Simulator().fault("cuModuleLoadData", nth, NO_BINARY)
    report = load_shared(state, path, storage_reader=reader(path))
    if dist.get_rank() == FAILING:
        Simulator().reset()
    assert values(state) == expected
    end()
    return report.device_fallback_reason, report.device_fallback_items


@only_simulated
@pytest.mark.parametrize("first", [1, 2])
def test_drivers_that_refuse(pool: Ranks, checkpoint: Path, first: int) -> None:
    """There is no kernel at all, or none to dequantize with: what the other rank needs comes to it all the same."""
    (reason, items), (refused, without) = pool.run(WORLD, load_where_a_driver_refuses, checkpoint, first)
    assert (reason, items) == ("", 0)
    assert refused
    assert without > 0
