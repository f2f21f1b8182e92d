"""Quantized tensors of safetensors files: FP8 as torch's reader has it, MXFP4 as its specification has it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from damage import peak_memory, reset_peak_memory
from helpers import Outcome, ShardedBuffer, image, load_with, torch_load, torch_planner
from hooked_planners import Doubling, Recording
from quantized_files import (
    FLOAT8,
    TARGETS,
    dequantized_blocks,
    dequantized_elements,
    fast_quantized_reader,
    finite,
    make_mxfp4,
    torch_quantized_reader,
    write_quantized,
)
from torch.distributed.checkpoint.metadata import MetadataIndex

import dcp_fast

WEIGHT = finite((300, 200), torch.float8_e4m3fn, 1)
SCALES = torch.rand(3, 2, generator=torch.Generator().manual_seed(2)) - 0.5
PLAIN = torch.arange(12.0)


def report() -> dcp_fast.LoadReport:
    last = dcp_fast.last_report()
    assert last is not None
    return last


def write_weight(path: Path) -> Path:
    return write_quantized(path, {"l.weight": WEIGHT, "l.weight_scale_inv": SCALES, "plain": PLAIN})


def load_ours(path: Path, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    dcp_fast.load(state, storage_reader=fast_quantized_reader(path, **options), no_dist=True)
    assert report().reader_fallback_reason == ""
    return state


def assert_same_load(path: Path, make: Any, planner: Any = None, threads: int | None = None, **how: Any) -> Outcome:
    """torch's reader and ours do the same, and change something."""
    theirs = {"storage_reader": torch_quantized_reader(str(path), **how), "planner": (planner or torch_planner)()}
    ours = {"storage_reader": fast_quantized_reader(path, **how, threads=threads), "planner": planner and planner()}
    expected = load_with(torch_load, make(), **theirs)
    actual = load_with(dcp_fast.load, make(), **ours)
    assert expected.errors is None, f"torch itself raises {expected.errors}"
    assert actual.errors is None, actual.errors
    assert actual.image() == expected.image()
    assert expected.image() != image(make()), "the load changed nothing"
    assert (report().reader_fallback_reason, report().fallback_records) == ("", 0)
    return actual


# FP8


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("stored", FLOAT8, ids=str)
def test_all_codes_with_scales_of_all_kinds(tmp_path: Path, stored: torch.dtype, target: torch.dtype) -> None:
    numbers = [0.0, -0.0, 1.0, -1.5, 0.1, 3.0, 1e-6, 6e-8, 1e-20, 1e-38, 1e-45, 117.3, 1e30, 3e38, torch.inf]
    numbers += torch.randn(49, generator=torch.Generator().manual_seed(3)).tolist()
    weight = torch.arange(256, dtype=torch.uint8).repeat(len(numbers), 1).view(stored)
    # Whole blocks of one row: block rows are what differs, so each code meets each scale.
    scales = torch.tensor(numbers)[:, None].expand(len(numbers), 256)
    write_quantized(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scales})
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        theirs, ours = ({"x.weight": torch.zeros(len(numbers), 256, dtype=dtype)} for _ in range(2))
        reader = torch_quantized_reader(str(tmp_path), target_dtype=target, block_size=1)
        torch_load(theirs, storage_reader=reader, no_dist=True)
        load_ours(tmp_path, ours, target_dtype=target, block_size=1)
        expected, actual = theirs["x.weight"], ours["x.weight"]
        # Which NaN it is, is up to the place where torch's own loop meets it (csrc/copy/convert.h).
        assert torch.equal(actual.isnan(), expected.isnan())
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        numbers_of = ~expected.isnan()
        assert torch.equal(actual.view(bits)[numbers_of], expected.view(bits)[numbers_of])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_dtypes_of_scales(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    scales = (SCALES * 100).to(scale_dtype)
    path = write_quantized(tmp_path, {"l.weight": WEIGHT, "l.weight_scale_inv": scales})
    assert_same_load(path, lambda: {"l.weight": torch.zeros(300, 200)})


def test_scales_that_are_exponents(tmp_path: Path) -> None:
    exponents = torch.tensor([[0, 1], [127, 128], [254, 255]], dtype=torch.uint8)
    scales = exponents.view(torch.float8_e8m0fnu)
    path = write_quantized(tmp_path, {"l.weight": WEIGHT, "l.weight_scale_inv": scales})
    state = load_ours(path, {"l.weight": torch.zeros(300, 200)})
    powers = torch.tensor([[2.0**-127, 2.0**-126], [1, 2], [2.0**127, torch.nan]], dtype=torch.float64)
    expected = dequantized_elements(WEIGHT, powers.float(), 128)
    assert torch.equal(state["l.weight"].nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8, torch.float32], ids=str)
def test_other_elements_with_scales(tmp_path: Path, stored: torch.dtype) -> None:
    weight = (torch.arange(300 * 200).reshape(300, 200) % 251 - 125).to(stored)
    path = write_quantized(tmp_path, {"l.weight": weight, "l.weight_scale_inv": SCALES})
    assert_same_load(path, lambda: {"l.weight": torch.zeros(300, 200)}, target_dtype=torch.bfloat16)


def test_scales_in_another_file(tmp_path: Path) -> None:
    path = write_quantized(tmp_path, {"l.weight": WEIGHT}, {"l.weight_scale_inv": SCALES, "plain": PLAIN})
    assert_same_load(path, lambda: {"l.weight": torch.zeros(300, 200), "plain": torch.zeros(12)})


def test_scales_and_what_is_not_quantized_load_as_they_are(tmp_path: Path) -> None:
    path = write_quantized(tmp_path, {"l.weight": WEIGHT, "l.weight_scale_inv": SCALES, "m.weight": WEIGHT})

    def make() -> dict[str, Any]:
        return {"m.weight": torch.zeros(300, 200), "l.weight_scale_inv": torch.zeros(3, 2)}

    assert_same_load(path, make)
    assert report().dequantized_items == 0


def test_destinations_that_torch_converts_to(tmp_path: Path) -> None:
    """Such as no instruction of ours does: float8_e4m3fn, and an integer."""
    path = write_quantized(tmp_path, {"l.weight": finite((300, 200), FLOAT8[0], 1, 8), "l.weight_scale_inv": SCALES})
    for dtype in (torch.float8_e4m3fn, torch.int16, torch.complex64):
        for layout in ("rows", "columns"):

            def make(dtype: torch.dtype = dtype, layout: str = layout) -> dict[str, Any]:
                if layout == "rows":
                    return {"l.weight": torch.zeros(300, 200, dtype=dtype)}
                return {"l.weight": torch.zeros(200, 300, dtype=dtype).t()}

            assert_same_load(path, make)


def test_a_destination_that_overlaps_itself(tmp_path: Path) -> None:
    # So small that torch copies it in one thread: with several it is up to them what is written last.
    path = write_quantized(tmp_path, {"l.weight": WEIGHT[:100], "l.weight_scale_inv": SCALES[:1]})

    def make() -> dict[str, Any]:
        return {"l.weight": torch.zeros(100 * 100 + 200).as_strided((100, 200), (100, 1))}

    assert_same_load(path, make)
    expanded = {"l.weight": torch.zeros(200).expand(100, 200)}
    outcome = load_with(dcp_fast.load, expanded, storage_reader=fast_quantized_reader(path))
    assert outcome.errors is not None
    assert isinstance(outcome.errors[0], RuntimeError)


def test_only_the_overlap_and_its_scales_are_read_once(tmp_path: Path) -> None:
    size, block = 2048, 16
    weight = finite((size, size), torch.float8_e4m3fn, 4)
    scales = torch.rand(size // block, size // block)
    path = write_quantized(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scales})
    for offsets, lengths in (((256, 0), (512, size)), ((0, 512), (size, 256)), ((40, 24), (1000, 1000))):
        state = {"x.weight": ShardedBuffer.make((size, size), [offsets], [torch.zeros(lengths)])}
        load_ours(path, state, block_size=block, io="cached", staging_bytes=1 << 20)
        rows, columns = (slice(a, a + n) for a, n in zip(offsets, lengths, strict=True))
        expected = dequantized_elements(weight, scales, block)[rows, columns]
        assert torch.equal(state["x.weight"].__get_tensor_shard__(MetadataIndex("x.weight", offsets, 0)), expected)
        blocks = [-(-(a + n) // block) - a // block for a, n in zip(offsets, lengths, strict=True)]
        needed = lengths[0] * lengths[1] + 4 * blocks[0] * blocks[1]
        assert report().bytes_needed == needed


def test_stacked_experts(tmp_path: Path) -> None:
    """Of which torch's reader knows nothing."""
    weight = finite((3, 70, 90), torch.float8_e4m3fn, 5)
    scales = torch.rand(3, 3, 3)
    path = write_quantized(tmp_path, {"experts.gate_up_proj": weight, "experts.gate_up_proj_scale_inv": scales})
    whole = {"experts.gate_up_proj": torch.zeros(3, 70, 90)}
    expected = dequantized_elements(weight, scales, 32)
    assert torch.equal(load_ours(path, whole, block_size=32)["experts.gate_up_proj"], expected)
    shard = torch.zeros(2, 40, 50)
    parts = {"experts.gate_up_proj": ShardedBuffer.make((3, 70, 90), [(1, 20, 35)], [shard])}
    load_ours(path, parts, block_size=32)
    assert torch.equal(shard, expected[1:, 20:60, 35:85])


class RecordingPlanner(Recording, dcp.DefaultLoadPlanner):
    pass


def test_hooks(tmp_path: Path) -> None:
    path = write_quantized(
        tmp_path,
        {"a.weight": WEIGHT, "a.weight_scale_inv": SCALES, "plain": PLAIN},
        {"b.weight": WEIGHT, "b.weight_scale_inv": -SCALES},
    )

    def make() -> dict[str, Any]:
        parts = [((0, 0), (130, 200)), ((130, 0), (170, 200))]
        shards = [torch.zeros(sizes) for _, sizes in parts]
        sharded = ShardedBuffer.make((300, 200), [at for at, _ in parts], shards)
        return {"b.weight": torch.zeros(300, 200), "plain": torch.zeros(12), "a.weight": sharded}

    assert_same_load(path, make, planner=Doubling)
    planners: list[RecordingPlanner] = []

    def make_planner() -> RecordingPlanner:
        planners.append(RecordingPlanner())
        return planners[-1]

    assert_same_load(path, make, planner=make_planner)
    theirs, ours = (planner.calls for planner in planners)
    for name in ("resolve", "lookup", "transform", "commit"):
        assert [call for call in ours if call[0] == name] == [call for call in theirs if call[0] == name]


def test_partial_load(tmp_path: Path) -> None:
    def make() -> dict[str, Any]:
        return {"l.weight": torch.zeros(300, 200), "more": torch.full((2,), 7.0)}

    assert_same_load(write_weight(tmp_path), make, planner=lambda: dcp.DefaultLoadPlanner(allow_partial_load=True))


def test_memory_stays_within_its_limit(tmp_path: Path) -> None:
    """Also where scales take more than elements."""
    size, staging = 4096, 4 << 20
    weight = finite((size, size), torch.float8_e4m3fn, 6)
    scales = torch.rand(size // 2, size // 2)
    path = write_quantized(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scales})
    state = {"x.weight": torch.ones(size, size, dtype=torch.bfloat16)}
    del weight, scales
    load_ours(path, state, target_dtype=torch.bfloat16, block_size=2, staging_bytes=staging)
    resident = reset_peak_memory()
    load_ours(path, state, target_dtype=torch.bfloat16, block_size=2, staging_bytes=staging)
    assert peak_memory() - resident <= staging + (32 << 20)


# MXFP4


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_all_numbers_of_mxfp4(tmp_path: Path, target: torch.dtype) -> None:
    """Each of the 16 codes, in both halves of a byte, with each of the 256 scales."""
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    path = write_quantized(tmp_path, {"x_blocks": blocks, "x_scales": scales})
    state = load_ours(path, {"x_blocks": torch.zeros(256, 512, dtype=target)}, target_dtype=target)
    expected = dequantized_blocks(blocks, scales).to(target)
    bits = torch.int32 if target == torch.float32 else torch.int16
    assert torch.equal(state["x_blocks"].isnan(), expected.isnan())
    assert torch.equal(state["x_blocks"].nan_to_num(7.0).view(bits), expected.nan_to_num(7.0).view(bits))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("staging", [1, 300_000, 32 << 20])
def test_any_sharding_of_mxfp4(tmp_path: Path, threads: int, staging: int) -> None:
    """The shapes of gpt-oss: experts, rows, blocks of a row, bytes of a block."""
    blocks, scales = make_mxfp4((3, 40, 6), 7)
    path = write_quantized(tmp_path, {"mlp1_weight_blocks": blocks}, {"mlp1_weight_scales": scales, "plain": PLAIN})
    expected = dequantized_blocks(blocks, scales).float()
    parts = [
        ((0, 0, 0), (1, 40, 192)),
        ((1, 0, 0), (2, 13, 192)),
        ((1, 13, 0), (2, 27, 31)),  # within blocks
        ((1, 13, 31), (2, 27, 64)),
        ((1, 13, 95), (2, 27, 97)),
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        shards = [torch.zeros(sizes, dtype=dtype) for _, sizes in parts]
        shards[3] = torch.zeros(64, 27, 2, dtype=dtype).permute(2, 1, 0)
        state = {"mlp1_weight_blocks": ShardedBuffer.make((3, 40, 192), [at for at, _ in parts], shards)}
        load_ours(path, state, threads=threads, staging_bytes=staging)
        for (at, sizes), shard in zip(parts, shards, strict=True):
            box = tuple(slice(start, start + length) for start, length in zip(at, sizes, strict=True))
            assert torch.equal(shard, expected[box].to(dtype)), (at, sizes, dtype)


@pytest.mark.parametrize("sizes", [(5,), (4, 5), (2, 1, 3, 2), (3, 0, 2)])
def test_mxfp4_of_other_dimensions(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    blocks, scales = make_mxfp4(sizes, 8)
    path = write_quantized(tmp_path, {"x_blocks": blocks, "x_scales": scales.view(torch.float8_e8m0fnu)})
    expected = dequantized_blocks(blocks, scales).float()
    state = load_ours(path, {"x_blocks": torch.full(expected.shape, 7.0)})
    assert torch.equal(state["x_blocks"], expected)


def test_metadata_is_torchs_with_chunks_that_match(tmp_path: Path) -> None:
    blocks, scales = make_mxfp4((2, 4, 3), 9)
    path = write_quantized(tmp_path, {"x_blocks": blocks, "x_scales": scales, "l.weight": WEIGHT, "y_blocks": PLAIN})
    (path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    actual = fast_quantized_reader(path).read_metadata()
    assert actual.state_dict_metadata["x_blocks"].chunks[0].sizes == (2, 4, 96)  # type: ignore[union-attr]
    assert actual.state_dict_metadata["y_blocks"].size == (12,)  # type: ignore[union-attr]
    write_quantized(tmp_path / "b", {"x_blocks": blocks, "x_scales": scales, "l.weight": WEIGHT})
    actual = fast_quantized_reader(tmp_path / "b").read_metadata()
    expected = torch_quantized_reader(str(tmp_path / "b")).read_metadata()
    for fqn, entry in expected.state_dict_metadata.items():
        corrected: Any = copy.deepcopy(entry)
        corrected.chunks = [type(corrected.chunks[0])(torch.Size([0] * len(corrected.size)), corrected.size)]
        assert actual.state_dict_metadata[fqn] == corrected
    assert {index.fqn for index in actual.storage_data} == {index.fqn for index in expected.storage_data}
    assert MetadataIndex("x_blocks", (0, 0, 0)) in actual.storage_data


def test_mxfp4_with_hooks_and_memory(tmp_path: Path) -> None:
    blocks, scales = make_mxfp4((8, 1440, 90), 10)
    path = write_quantized(tmp_path, {"x_blocks": blocks, "x_scales": scales})
    state = {"x_blocks": torch.ones(8, 1440, 2880, dtype=torch.bfloat16)}
    staging = 4 << 20
    load_ours(path, state, target_dtype=torch.bfloat16, staging_bytes=staging)
    first = state["x_blocks"].clone()
    assert torch.equal(first[5, 700:702], dequantized_blocks(blocks[5, 700:702], scales[5, 700:702]).bfloat16())
    resident = reset_peak_memory()
    load_ours(path, state, target_dtype=torch.bfloat16, staging_bytes=staging)
    assert peak_memory() - resident <= staging + (32 << 20)
    reader = fast_quantized_reader(path, target_dtype=torch.bfloat16)
    dcp_fast.load(state, storage_reader=reader, planner=Doubling())
    assert torch.equal(state["x_blocks"], first * 2)


# In the place of torch's reader


def test_torchs_reader_is_served(tmp_path: Path) -> None:
    blocks, scales = make_mxfp4((2, 4, 3), 11)
    tensors = {"l.weight": WEIGHT, "l.weight_scale_inv": SCALES, "x_blocks": blocks, "x_scales": scales}
    path = write_quantized(tmp_path, tensors)

    def make() -> dict[str, Any]:
        return {"l.weight": torch.zeros(300, 200), "x_blocks": torch.zeros(2, 4, 96)}

    def reader() -> Any:
        return dcp.QuantizedHuggingFaceStorageReader(str(path))

    alone, installed = make(), make()
    dcp_fast.load(alone, storage_reader=reader(), no_dist=True)
    assert report().reader_fallback_reason == ""
    with dcp_fast.install():
        dcp.load(installed, storage_reader=reader(), no_dist=True)
        assert report().reader_fallback_reason == ""
    expected = {"l.weight": torch.zeros(300, 200)}
    torch_load(expected, storage_reader=reader(), no_dist=True)
    for state in (alone, installed):
        assert torch.equal(state["l.weight"], expected["l.weight"])
        assert torch.equal(state["x_blocks"], dequantized_blocks(blocks, scales).float())


def test_readers_with_a_way_of_their_own_keep_it(tmp_path: Path) -> None:
    path = write_weight(tmp_path)

    class Halving(dcp.QuantizedHuggingFaceStorageReader):
        def _dequantize_tensor(self, weight: Any, scale_inv: Any, *others: Any, **named: Any) -> torch.Tensor:
            return super()._dequantize_tensor(weight, scale_inv / 2, *others, **named)

    state = {"l.weight": torch.zeros(300, 200)}
    dcp_fast.load(state, storage_reader=Halving(str(path)), no_dist=True)
    assert report().reader_fallback_reason == "it has a _dequantize_tensor of its own"
    assert torch.equal(state["l.weight"], dequantized_elements(WEIGHT, SCALES / 2, 128))
    wide = {"l.weight": torch.zeros(300, 200)}
    reader = dcp.QuantizedHuggingFaceStorageReader(str(path), target_dtype=torch.float64)
    dcp_fast.load(wide, storage_reader=reader, no_dist=True)
    assert report().reader_fallback_reason == "it dequantizes to torch.float64"
