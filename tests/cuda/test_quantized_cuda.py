"""Quantized tensors load to CUDA devices as to the host. A kernel dequantizes what came through the pinned ring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_cases import Case, compare_cases
from helpers import ShardedBuffer, load_with, torch_load
from quantized_files import (
    FLOAT8,
    TARGETS,
    dequantized_blocks,
    dequantized_elements,
    fast_quantized_reader,
    finite,
    make_mxfp4,
    make_quantized_case,
    torch_quantized_reader,
    write_quantized,
)
from simulated_cuda.control import Simulator
from torch.distributed.checkpoint.metadata import MetadataIndex

import dcp_fast

CASES = 50
MIB = 1 << 20
LAUNCH_FAILED, NO_BINARY = 719, 209  # CUresult

WEIGHT = finite((300, 200), torch.float8_e4m3fn, 1)
SCALES = torch.rand(3, 2, generator=torch.Generator().manual_seed(2)) - 0.5
BLOCKS, EXPONENTS = make_mxfp4((2, 40, 6), 2)


def report() -> dcp_fast.LoadReport:
    last = dcp_fast.last_report()
    assert last is not None
    return last


def load_ours(path: Path, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    dcp_fast.load(state, storage_reader=fast_quantized_reader(path, **options), no_dist=True)
    assert report().dequantized_items > 0
    assert (report().device_fallback_items, report().fallback_records) == (0, 0)
    assert report().launches > 0
    assert report().pinned_bytes > 0
    return state


def assert_same_numbers(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """All bits, but for those of NaNs: which one it is depends on where it is made."""
    actual = actual.cpu()
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    as_bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.dtype.itemsize]
    assert torch.equal(actual.view(as_bits)[numbers], expected.view(as_bits)[numbers])


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("stored", FLOAT8, ids=str)
def test_all_codes_with_scales_of_all_kinds(
    tmp_path: Path, cuda: torch.device, stored: torch.dtype, target: torch.dtype
) -> None:
    numbers = [0.0, -0.0, 1.0, -1.5, 0.1, 1e-6, 6e-8, 1e-20, 1e-38, 1e-45, 117.3, 1e30, 3e38, torch.inf, torch.nan]
    numbers += torch.randn(9, generator=torch.Generator().manual_seed(3)).tolist()
    weight = torch.arange(256, dtype=torch.uint8).repeat(len(numbers), 1).view(stored)
    scales = torch.tensor(numbers)[:, None].expand(len(numbers), 256)
    write_quantized(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scales})
    how: dict[str, Any] = {"target_dtype": target, "block_size": 1}
    for dtype in (*TARGETS, torch.float64):
        expected = {"x.weight": torch.zeros(len(numbers), 256, dtype=dtype)}
        torch_load(expected, storage_reader=torch_quantized_reader(str(tmp_path), **how), no_dist=True)
        actual = load_ours(tmp_path, {"x.weight": torch.zeros(len(numbers), 256, dtype=dtype, device=cuda)}, **how)
        assert_same_numbers(actual["x.weight"], expected["x.weight"])


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_all_numbers_of_mxfp4(tmp_path: Path, cuda: torch.device, target: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    path = write_quantized(tmp_path, {"x_blocks": blocks, "x_scales": scales})
    state = load_ours(path, {"x_blocks": torch.zeros(256, 512, dtype=target, device=cuda)}, target_dtype=target)
    assert_same_numbers(state["x_blocks"], dequantized_blocks(blocks, scales).to(target))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32], ids=str)
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.float32], ids=str)
def test_other_dtypes(tmp_path: Path, cuda: torch.device, stored: torch.dtype, scale_dtype: torch.dtype) -> None:
    """The kernel does not know them: torch makes float32 of them first, on the device."""
    weight = (torch.arange(300 * 200).reshape(300, 200) % 251 - 125).to(stored)
    path = write_quantized(tmp_path, {"l.weight": weight, "l.weight_scale_inv": (SCALES * 100).to(scale_dtype)})
    for dtype in (torch.float32, torch.int32):
        expected = {"l.weight": torch.zeros(300, 200, dtype=dtype)}
        torch_load(expected, storage_reader=torch_quantized_reader(str(path)), no_dist=True)
        state = load_ours(path, {"l.weight": torch.zeros(300, 200, dtype=dtype, device=cuda)})
        assert torch.equal(state["l.weight"].cpu(), expected["l.weight"])


def test_scales_that_are_exponents(tmp_path: Path, cuda: torch.device) -> None:
    exponents = torch.tensor([[0, 1], [127, 128], [254, 255]], dtype=torch.uint8)
    scales = exponents.view(torch.float8_e8m0fnu)
    path = write_quantized(tmp_path, {"l.weight": WEIGHT, "l.weight_scale_inv": scales})
    state = load_ours(path, {"l.weight": torch.zeros(300, 200, device=cuda)})
    powers = torch.tensor([[2.0**-127, 2.0**-126], [1, 2], [2.0**127, torch.nan]], dtype=torch.float64)
    assert_same_numbers(state["l.weight"], dequantized_elements(WEIGHT, powers.float(), 128))


@pytest.mark.parametrize("staging", [MIB, 3 * MIB, None])
@pytest.mark.parametrize("block_size", [7, 128, 1000, 10**12])
def test_any_sharding(tmp_path: Path, cuda: torch.device, block_size: int, staging: int | None) -> None:
    """Blocks that are cut and last ones that are smaller, in two dimensions and three; strides; small memory."""
    sizes = (3, 500, 700)
    weight = finite(sizes, torch.float8_e4m3fn, 5)
    scales = torch.rand(3, *(-(-size // block_size) for size in sizes[1:]))
    path = write_quantized(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scales})
    wide = min(block_size, 1000)  # of what the reference repeats
    expected = dequantized_elements(weight, scales, wide).bfloat16()
    parts = [((0, 0, 0), (3, 100, 700)), ((0, 100, 0), (3, 400, 129)), ((0, 100, 129), (3, 400, 571))]
    shards = [torch.zeros(lengths, dtype=torch.bfloat16, device=cuda) for _, lengths in parts]
    shards[1] = torch.zeros(129, 400, 6, dtype=torch.bfloat16, device=cuda).permute(2, 1, 0)[::2]
    state = {"x.weight": ShardedBuffer.make(sizes, [at for at, _ in parts], shards)}
    limits = {} if staging is None else {"device_staging_bytes": staging, "pinned_bytes": MIB}
    load_ours(path, state, block_size=block_size, target_dtype=torch.bfloat16, **limits)
    for (offsets, lengths), shard in zip(parts, shards, strict=True):
        box = tuple(slice(at, at + length) for at, length in zip(offsets, lengths, strict=True))
        assert_same_numbers(shard, expected[box])
    if staging is not None:
        assert report().device_staging_bytes <= staging


@pytest.mark.parametrize("staging", [MIB, None])
def test_any_sharding_of_mxfp4(tmp_path: Path, cuda: torch.device, staging: int | None) -> None:
    blocks, scales = make_mxfp4((3, 40, 60), 7)
    path = write_quantized(tmp_path, {"mlp1_weight_blocks": blocks}, {"mlp1_weight_scales": scales})
    expected = dequantized_blocks(blocks, scales).float()
    parts = [
        ((0, 0, 0), (1, 40, 1920)),
        ((1, 0, 0), (2, 13, 1920)),
        ((1, 13, 0), (2, 27, 31)),  # within blocks
        ((1, 13, 31), (2, 27, 64)),
        ((1, 13, 95), (2, 27, 1825)),
    ]
    limits = {} if staging is None else {"device_staging_bytes": staging, "pinned_bytes": MIB}
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        shards = [torch.zeros(sizes, dtype=dtype, device=cuda) for _, sizes in parts]
        shards[3] = torch.zeros(64, 27, 2, dtype=dtype, device=cuda).permute(2, 1, 0)
        state = {"mlp1_weight_blocks": ShardedBuffer.make((3, 40, 1920), [at for at, _ in parts], shards)}
        load_ours(path, state, **limits)
        for (at, sizes), shard in zip(parts, shards, strict=True):
            box = tuple(slice(start, start + length) for start, length in zip(at, sizes, strict=True))
            assert torch.equal(shard.cpu(), expected[box].to(dtype)), (at, sizes, dtype)


def test_only_the_overlap_and_its_scales_cross_once(tmp_path: Path, cuda: torch.device) -> None:
    size, block = 1024, 16
    weight = finite((size, size), torch.float8_e4m3fn, 4)
    scales = torch.rand(size // block, size // block)
    path = write_quantized(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scales})
    for offsets, lengths in (((256, 0), (512, size)), ((0, 512), (size, 256)), ((40, 24), (500, 500))):
        shard = torch.zeros(lengths, device=cuda)
        state = {"x.weight": ShardedBuffer.make((size, size), [offsets], [shard])}
        load_ours(path, state, block_size=block, device_staging_bytes=MIB, pinned_bytes=MIB)
        rows, columns = (slice(at, at + length) for at, length in zip(offsets, lengths, strict=True))
        expected = dequantized_elements(weight, scales, block)[rows, columns]
        assert torch.equal(
            state["x.weight"].__get_tensor_shard__(MetadataIndex("x.weight", offsets, 0)).cpu(), expected
        )
        blocks = [-(-(at + length) // block) - at // block for at, length in zip(offsets, lengths, strict=True)]
        needed = lengths[0] * lengths[1] + 4 * blocks[0] * blocks[1]
        assert report().bytes_needed == needed
        assert needed <= report().bytes_to_device < 1.1 * needed  # what the slots hold beside boxes comes on top
        assert report().device_staging_bytes <= MIB


def mixed(path: Path) -> Path:
    tensors = {"l.weight": WEIGHT, "l.weight_scale_inv": SCALES, "x_blocks": BLOCKS, "x_scales": EXPONENTS}
    return write_quantized(path, {**tensors, "plain": torch.arange(12.0)})


def state_on(cuda: torch.device) -> dict[str, torch.Tensor]:
    return {
        "l.weight": torch.zeros(200, 300, dtype=torch.bfloat16, device=cuda).t(),
        "x_blocks": torch.zeros(2, 40, 192, device=cuda),
        "plain": torch.zeros(12, device=cuda),
    }


def assert_right(state: dict[str, torch.Tensor]) -> None:
    assert torch.equal(state["l.weight"].cpu(), dequantized_elements(WEIGHT, SCALES, 128).bfloat16())
    assert torch.equal(state["x_blocks"].cpu(), dequantized_blocks(BLOCKS, EXPONENTS).float())
    assert torch.equal(state["plain"].cpu(), torch.arange(12.0))


@pytest.mark.parametrize("synchronize", [True, False])
def test_beside_what_is_not_quantized(tmp_path: Path, cuda: torch.device, slow_copies: None, synchronize: bool) -> None:
    path = mixed(tmp_path)
    for _ in range(2):
        state = load_ours(path, state_on(cuda), synchronize=synchronize)
        later = {fqn: tensor.clone() for fqn, tensor in state.items()}  # after the load on torch's stream
        assert_right(later)
    assert (report().dequantized_items, report().staged_items) == (2, 0)


def test_two_devices(tmp_path: Path, two_devices: tuple[torch.device, torch.device]) -> None:
    path = mixed(tmp_path)
    first, second = (state_on(device) for device in two_devices)
    assert_right(
        load_ours(path, {"l.weight": first["l.weight"], "x_blocks": second["x_blocks"], "plain": first["plain"]})
    )


def test_a_driver_that_refuses_the_kernel(tmp_path: Path, cuda: torch.device, simulator: Simulator) -> None:
    """Only the one that dequantizes: what is copied straight needs none."""
    path = mixed(tmp_path)
    dcp_fast.release_staging()
    for nth in range(1, 50):
        simulator.fault("cuModuleLoadData", nth, NO_BINARY)
    state = state_on(cuda)
    dcp_fast.load(state, storage_reader=fast_quantized_reader(path), no_dist=True)
    simulator.reset()
    assert_right(state)
    assert report().device_fallback_items == 3
    assert "cuModuleLoadData failed" in report().device_fallback_reason
    dcp_fast.release_staging()
    assert_right(load_ours(path, state_on(cuda)))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_launch_that_fails(tmp_path: Path, cuda: torch.device, simulator: Simulator, asynchronous: bool) -> None:
    path = mixed(tmp_path)
    state = {"l.weight": state_on(cuda)["l.weight"]}
    load_ours(path, state)
    torch.cuda.synchronize()
    simulator.fault("cuLaunchKernel", 1, LAUNCH_FAILED, asynchronous=asynchronous)
    outcome = load_with(dcp_fast.load, state, storage_reader=fast_quantized_reader(path))
    assert outcome.errors is not None
    assert isinstance(outcome.errors[0], dcp_fast.CudaError)
    assert "cuda:0" in str(outcome.errors[0])
    assert "CUDA_ERROR_LAUNCH_FAILED" in str(outcome.errors[0])
    simulator.reports(clear=True)
    simulator.reset()


@pytest.fixture
def make(tmp_path: Path, cuda: torch.device) -> Callable[[int], Case]:
    return lambda seed: make_quantized_case(tmp_path / str(seed), seed, [cuda, torch.device("cpu")])


def test_random_directories(make: Callable[[int], Case]) -> None:
    compare_cases(make, CASES, None, are_payloads=True)
