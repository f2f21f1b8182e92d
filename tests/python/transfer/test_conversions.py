"""Conversions by the engine: every pair of dtypes that it knows gives what torch's ``copy_`` gives, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Entry, ShardedBuffer, assert_same_load, fill, torch_load, write_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

import dcp_fast
from dcp_fast.transfer import placing

INTS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, *FLOAT8]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_native(source: torch.dtype, target: torch.dtype) -> bool:
    # What becomes of a float that does not fit an integer is not defined; of one that does not fit float8_e4m3fn,
    # versions of torch make different things.
    if target in INTS and source not in INTS:
        return False
    return source in INTS + FLOATS and target in INTS + FLOATS and target != torch.float8_e4m3fn and source != target


NATIVE = [(source, target) for source in INTS + FLOATS for target in INTS + FLOATS if is_native(source, target)]


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """All patterns of a dtype up to 16 bits; of others random ones, and numbers of all sizes and halves between two."""
    if dtype.itemsize <= 2:
        return torch.arange(1 << 8 * dtype.itemsize).to(BITS[dtype.itemsize]).view(dtype)
    generator = torch.Generator().manual_seed(7)
    parts = [fill((20000,), dtype, 8)]
    if dtype.is_floating_point:
        for scale in (1, 1e-3, 1e-5, 1e-7, 1e-38, 1e-42, 1e-45, 1e2, 6e4, 1e5, 1e38):
            parts.append((torch.randn(3000, generator=generator, dtype=torch.float64) * scale).to(dtype))
        # The values of smaller formats, what is halfway between two of them, and the neighbours of both.
        for small in (torch.float16, torch.bfloat16, *FLOAT8):
            values = patterns(small).to(torch.float64)
            values = values[values.isfinite()].sort().values[:: 1 if small.itemsize == 1 else 7]
            values = torch.cat([values, (values[1:] + values[:-1]) / 2]).to(dtype).view(BITS[dtype.itemsize])
            parts += [(values + off).view(dtype) for off in (-1, 0, 1)]
    else:
        edges = torch.tensor([1 << i for i in range(8 * dtype.itemsize - 1)])
        parts += [(edges + off).to(dtype) for off in (-1, 0, 1)]
        parts += [(-edges + off).to(dtype) for off in (-1, 0, 1)]
        parts += [fill((5000,), dtype, 9) >> shift for shift in range(0, 8 * dtype.itemsize, 5)]
    values = torch.cat(parts)
    # Whole vectors: at the end of a tensor torch does otherwise with some NaNs.
    return values[: values.numel() // 64 * 64]


@pytest.fixture
def by_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("torch was asked to convert")

    monkeypatch.setattr(placing, "place_converted", refuse)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


@pytest.mark.usefixtures("by_the_engine")
@pytest.mark.parametrize("source", INTS + FLOATS, ids=name)
def test_every_pattern_into_every_dtype(tmp_path: Path, source: torch.dtype) -> None:
    stored = patterns(source)
    write_checkpoint(tmp_path, {"t": Entry.of(stored)})
    for target in [target for one, target in NATIVE if one == source]:
        for stride in (1, 2):
            state, expected = (torch.zeros(stride * stored.numel(), dtype=target)[::stride] for _ in range(2))
            expected.copy_(stored)
            if source == torch.float64 and target == torch.bfloat16 and stride == 1:
                # Which bits a NaN gets depends on how torch's threads share the tensor.
                vectors = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
                expected.view(torch.int16)[stored.isnan()] = -1 if vectors else 0x7FC0
            dcp_fast.load({"t": state}, checkpoint_id=tmp_path)
            different = (bits(state) != bits(expected)).nonzero().flatten()
            assert not len(different), (
                f"{target}, stride {stride}: {stored[different[0]]} is {state[different[0]]}, not "
                f"{expected[different[0]]}; {len(different)} differ"
            )
            report = dcp_fast.last_report()
            assert report is not None
            assert report.staged_items == 1
            assert report.bytes_needed == stored.nbytes


def test_rare_pairs_are_left_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    place = placing.place_converted

    def count(boxes: Any, *arguments: Any) -> Any:
        calls.append(len(boxes))
        return place(boxes, *arguments)

    monkeypatch.setattr(placing, "place_converted", count)
    stored = {"float": fill((40,), torch.int8).float(), "bool": torch.ones(40, dtype=torch.bool)}
    write_checkpoint(tmp_path, {key: Entry.of(value) for key, value in stored.items()})
    for target in (torch.int32, torch.float8_e4m3fn, torch.complex64):
        calls.clear()
        assert_same_load(tmp_path, lambda: {key: torch.zeros(40, dtype=target) for key in stored})  # noqa: B023
        assert calls == [2]


# Shapes and strides, in one block and in many

SHAPES = {
    "rows": lambda size, dtype: torch.zeros(size, dtype=dtype),
    "gaps": lambda size, dtype: torch.zeros(size[0], size[1] + 5, dtype=dtype)[:, 3:-2],
    "every_third": lambda size, dtype: torch.zeros(size[0], 3 * size[1], dtype=dtype)[:, ::3],
    "transposed": lambda size, dtype: torch.zeros(size[1], size[0], dtype=dtype).t(),
    "unaligned": lambda size, dtype: torch.zeros(size[0] * size[1] + 3, dtype=dtype)[3:].view(size),
}


@pytest.mark.usefixtures("by_the_engine")
@pytest.mark.parametrize("io", ["cached", "direct"])
@pytest.mark.parametrize("stored_as", ["whole", "transposed", "gaps"])
@pytest.mark.parametrize("shape", SHAPES)
def test_strides_on_both_sides(tmp_path: Path, shape: str, stored_as: str, io: str) -> None:
    size = (900, 1100)
    for source, target in ((torch.float32, torch.bfloat16), (torch.int8, torch.float64)):
        stored = fill(size, torch.int16).to(source)
        if stored_as == "transposed":
            stored = stored.t().contiguous().t()
        if stored_as == "gaps":
            stored = torch.cat([stored, stored], 1)[:, : size[1]]
        path = tmp_path / name(target)
        write_checkpoint(path, {"t": Entry.of(stored)})
        state = {"t": SHAPES[shape](size, target)}
        dcp_fast.load(state, storage_reader=dcp_fast.FileSystemReader(path, io=io, threads=3))  # type: ignore[arg-type]
        assert torch.equal(bits(state["t"]), bits(stored.to(target)))


@pytest.mark.usefixtures("by_the_engine")
@pytest.mark.parametrize("staging", [1, 32 << 20])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float64], ids=name)
def test_boxes(tmp_path: Path, target: torch.dtype, staging: int) -> None:
    """Rows, columns, a single column, a corner and single elements of chunks in several files."""
    stored = fill((400, 600), torch.int16).float()
    chunks = [((at, 0), stored[at : at + 100].clone()) for at in range(0, 400, 100)]
    write_checkpoint(tmp_path, {"t": Entry((400, 600), torch.float32, chunks, file="__%d_0.distcp")})
    boxes = [
        ((50, 0), (120, 600)),
        ((0, 100), (400, 75)),
        ((0, 33), (400, 1)),
        ((377, 580), (23, 20)),
        ((7, 9), (1, 1)),
    ]

    def make() -> dict[str, Any]:
        offsets = [at for at, _ in boxes]
        return {"t": ShardedBuffer.make((400, 600), offsets, [torch.zeros(size, dtype=target) for _, size in boxes])}

    assert_same_load(tmp_path, make, options={"staging_bytes": staging})


@pytest.mark.usefixtures("by_the_engine")
def test_many_small_tensors_of_several_dtypes(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.float64]
    stored = {f"t{i}": fill((i % 40,), torch.int8, i).to(dtypes[i % 5]) for i in range(300)}
    write_checkpoint(tmp_path, {key: Entry.of(value) for key, value in stored.items()})
    assert_same_load(
        tmp_path, lambda: {key: torch.zeros_like(value, dtype=torch.float32) for key, value in stored.items()}
    )
    report = dcp_fast.last_report()
    assert report is not None
    assert report.staged_items == sum(value.dtype != torch.float32 for value in stored.values())


@pytest.mark.usefixtures("by_the_engine")
def test_no_dimensions(tmp_path: Path) -> None:
    for value in (1.5, float("nan")):
        path = tmp_path / str(value)
        write_checkpoint(path, {"t": Entry.of(torch.tensor(value))})
        for target in (torch.bfloat16, torch.float16, torch.float64):
            assert_same_load(path, lambda: {"t": torch.zeros((), dtype=target)})  # noqa: B023


def test_destination_that_overlaps_itself(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": Entry.of(torch.ones(4, 3))})
    for load in (torch_load, dcp_fast.load):
        state = {"t": torch.zeros(3, dtype=torch.float64).expand(4, 3)}
        with pytest.raises(CheckpointException, match="more than one element"):
            load(state, checkpoint_id=tmp_path)
