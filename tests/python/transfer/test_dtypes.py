"""Differential tests: every dtype, shapes up to five dimensions, and conversion on load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DTYPES, Entry, ShardedBuffer, assert_same_load, fill, save, write_checkpoint

import dcp_fast

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (17,), (3, 0, 2), (5, 7), (2, 3, 4), (2, 1, 3, 2), (2, 3, 1, 2, 2)]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_dtype_in_all_shapes(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {f"t{i}": fill(shape, dtype, i) for i, shape in enumerate(SHAPES)}
    save(tmp_path, stored)
    assert_same_load(tmp_path, lambda: {key: torch.zeros_like(value) for key, value in stored.items()})
    report = dcp_fast.last_report()
    assert report is not None
    assert report.staged_items == 0
    assert report.records == sum(value.numel() > 0 for value in stored.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_dtype_of_strided_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    base = fill((6, 10), dtype, 1)
    stored = {"transposed": base.t(), "sliced": base[1::2, 2:9:3], "whole": base}
    write_checkpoint(tmp_path, {key: Entry.of(value) for key, value in stored.items()})

    def make() -> dict[str, Any]:
        wide = {key: torch.zeros(2 * value.shape[0], 3 * value.shape[1], dtype=dtype) for key, value in stored.items()}
        return {key: value[::2, 1::3] for key, value in wide.items()}

    assert_same_load(tmp_path, make)


# Types that exist for compilers: some can be stored, few can be copied.
SHELLS = [
    getattr(torch, key)
    for key in ("float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2")
    if hasattr(torch, key)
]


@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed", "empty"])
@pytest.mark.parametrize("dtype", SHELLS, ids=name)
def test_shell_dtypes(tmp_path: Path, dtype: torch.dtype, layout: str) -> None:
    # dcp.save refuses some of them, torch.save and dcp.load do not.
    bits = torch.uint8 if dtype.itemsize == 1 else torch.int16
    stored = fill((4, 6), bits).view(dtype)
    write_checkpoint(tmp_path, {"t": Entry.of(stored[:0] if layout == "empty" else stored)})
    shape = {"strided": (8, 6), "transposed": (6, 4), "empty": (0, 6)}.get(layout, (4, 6))

    def make() -> dict[str, Any]:
        zeros = torch.zeros(shape, dtype=bits).view(dtype)
        return {"t": {"strided": zeros[::2], "transposed": zeros.t()}.get(layout, zeros)}

    assert_same_load(tmp_path, make, fallback=None, changes=layout != "empty")


def finite(dtype: torch.dtype, count: int) -> torch.Tensor:
    """Values that every dtype can represent in some way, so that no conversion is undefined behaviour."""
    values = torch.arange(count, dtype=torch.int64).remainder(2 if dtype == torch.bool else 3)
    if dtype == torch.float8_e8m0fnu:
        return torch.pow(2.0, values.to(torch.float32)).to(dtype)
    return values.to(torch.float32).to(dtype)


@pytest.mark.parametrize("target", DTYPES, ids=name)
def test_conversion_from_every_dtype(tmp_path: Path, target: torch.dtype) -> None:
    stored = {f"t{i}": finite(dtype, 35).view(5, 7) for i, dtype in enumerate(DTYPES)}
    save(tmp_path, stored)
    start = torch.full((5, 7), 2.0).to(target)
    if target == torch.bool:
        start.zero_()
    assert_same_load(tmp_path, lambda: {key: start.clone() for key in stored})
    assert_same_load(
        tmp_path, lambda: {key: start.t().contiguous().t() for key in stored}, options={"staging_bytes": 1}
    )
    report = dcp_fast.last_report()
    assert report is not None
    assert report.staged_items == len(DTYPES) - 1


FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]


@pytest.mark.parametrize("source", FLOATS, ids=name)
@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=name)
def test_conversion_of_random_floats(tmp_path: Path, source: torch.dtype, target: torch.dtype) -> None:
    stored = fill((33, 31), source, 3)
    stored.view(torch.uint8).view(33, 31, -1)[stored.double().isnan()] = 0  # see below
    save(tmp_path, {"t": stored})
    assert_same_load(tmp_path, lambda: {"t": torch.zeros(33, 31, dtype=target)})
    assert_same_load(tmp_path, lambda: {"t": torch.zeros(31, 33, dtype=target).t()}, options={"staging_bytes": 1000})


@pytest.mark.parametrize("staging", [4096, 32 << 20])
@pytest.mark.parametrize("boxes", ["whole", "rows", "columns", "transposed", "stored_transposed"])
def test_conversion_of_nan_to_bfloat16(tmp_path: Path, boxes: str, staging: int) -> None:
    """torch makes 0xffff of a NaN where both sides are contiguous, 0x7fc0 where one is not."""
    stored = torch.full((50, 60), float("nan")).t()
    save(tmp_path, {"t": stored if boxes == "stored_transposed" else stored.contiguous()})

    def make() -> dict[str, Any]:
        if boxes in {"whole", "stored_transposed"}:
            return {"t": torch.zeros(60, 50, dtype=torch.bfloat16)}
        if boxes == "transposed":
            return {"t": torch.zeros(50, 60, dtype=torch.bfloat16).t()}
        at, size = ((7, 0), (31, 50)) if boxes == "rows" else ((0, 7), (60, 31))
        return {"t": ShardedBuffer.make((60, 50), [at], [torch.zeros(size, dtype=torch.bfloat16)])}

    assert_same_load(tmp_path, make, options={"staging_bytes": staging})


def _odd_bools(shape: tuple[int, ...]) -> torch.Tensor:
    """Bools of all bytes, as a view of other numbers has them."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.int64).to(torch.uint8).view(torch.bool).view(shape)


@pytest.mark.parametrize("io", ["cached", "direct", "mapped"])
@pytest.mark.parametrize("wanted", ["whole", "rows", "columns", "strided"])
def test_bools_are_zeros_and_ones(tmp_path: Path, io: Any, wanted: str) -> None:
    """torch copies them so, whatever bytes are stored, but for a transposed tensor of 60 x 60 and more."""
    whole = _odd_bools((64, 512))
    small = _odd_bools((30, 40))
    entry = Entry((64, 512), torch.bool, [((0, 0), whole[:40]), ((40, 0), whole[40:].clone())])
    write_checkpoint(tmp_path, {"b": entry, "t": Entry.of(small.t()), "l": Entry.of(whole.t())})
    memory: list[torch.Tensor] = []

    def make() -> dict[str, Any]:
        memory.clear()
        memory.extend(torch.zeros(2 * 64 * 512, dtype=torch.bool) for _ in range(2))
        if wanted == "whole":
            return {"b": memory[0][: 64 * 512].view(64, 512), "t": memory[1][: 30 * 40].view(40, 30)}
        if wanted == "strided":
            return {"b": memory[0].view(64, 1024)[:, ::2], "t": memory[1][: 80 * 30].view(80, 30)[::2]}
        part = (slice(16, 56), slice(None)) if wanted == "rows" else (slice(None), slice(100, 300))
        shard = memory[0][: whole[part].numel()].view(whole[part].shape)
        offsets = (16, 0) if wanted == "rows" else (0, 100)
        return {"b": ShardedBuffer.make((64, 512), [offsets], [shard])}

    assert_same_load(tmp_path, make, options={"io": io})
    loaded = make() | {"l": torch.zeros(512, 64, dtype=torch.bool)}
    memory.append(loaded["l"])
    dcp_fast.load(loaded, storage_reader=dcp_fast.FileSystemReader(tmp_path, io=io))
    values = {value for tensor in memory for value in tensor.view(torch.uint8).flatten().tolist()}
    assert values == {0, 1}
    report = dcp_fast.last_report()
    assert report is not None
    assert report.staged_items == 0
