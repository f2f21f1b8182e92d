"""Differential tests: layouts of stored tensors and destinations, chunks, aliasing, order of writes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Entry, ShardedBuffer, assert_same_load, fill, write_checkpoint

import dcp_fast

FLOAT = torch.float32
SIZE = (4, 6, 5, 3)

# Each makes a tensor of SIZE whose elements lie in memory in another way.
LAYOUTS: dict[str, Callable[[torch.dtype, int], torch.Tensor]] = {
    "contiguous": lambda dtype, seed: fill(SIZE, dtype, seed),
    "channels_last": lambda dtype, seed: fill(SIZE, dtype, seed).contiguous(memory_format=torch.channels_last),
    "transposed": lambda dtype, seed: fill((3, 5, 6, 4), dtype, seed).permute(3, 2, 1, 0),
    "inner_slice": lambda dtype, seed: fill((4, 6, 5, 8), dtype, seed)[..., 2:5],
    "inner_steps": lambda dtype, seed: fill((4, 6, 5, 9), dtype, seed)[..., 1::3],
    "outer_steps": lambda dtype, seed: fill((8, 6, 10, 3), dtype, seed)[::2, :, 1::2],
    "offset": lambda dtype, seed: fill((7, *SIZE[1:]), dtype, seed)[3:],
    "slice_of_transposed": lambda dtype, seed: fill((3, 7, 6, 9), dtype, seed).permute(3, 2, 1, 0)[1::2, :, 2:],
    "flat": lambda dtype, seed: fill((500,), dtype, seed)[11:371].view(SIZE),
}


@pytest.mark.parametrize("stored", LAYOUTS)
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_layouts(tmp_path: Path, stored: str, itemsize: int) -> None:
    dtype = {1: torch.uint8, 2: torch.bfloat16, 4: FLOAT, 8: torch.int64, 16: torch.complex128}[itemsize]
    write_checkpoint(tmp_path, {key: Entry.of(LAYOUTS[stored](dtype, 1)) for key in LAYOUTS})
    for mode in ("cached", "direct"):
        make = {key: layout(dtype, 2) for key, layout in LAYOUTS.items()}
        assert_same_load(tmp_path, lambda make=make: {k: _copy(v) for k, v in make.items()}, options={"io": mode})


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole storage, which a load must not touch around the tensor."""
    storage = tensor.untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def test_bytes_around_a_strided_destination_stay(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": Entry.of(fill((5, 4), FLOAT))})
    whole = torch.full((11, 13), 7.0)
    expected = whole.clone()
    dcp_fast.load({"t": whole[1::2, 2:10:2]}, checkpoint_id=tmp_path)
    torch.distributed.checkpoint.load({"t": expected[1::2, 2:10:2]}, checkpoint_id=tmp_path)
    assert torch.equal(whole.view(torch.int32), expected.view(torch.int32))
    assert not torch.equal(whole, torch.full((11, 13), 7.0))


EXPANDED = {
    "row": lambda: torch.arange(6.0).expand(4, 6),
    "column": lambda: torch.arange(4.0).view(4, 1).expand(4, 6),
    "scalar": lambda: torch.tensor(3.0).expand(4, 6),
    "windows": lambda: torch.arange(20.0).as_strided((4, 6), (2, 1)),
    "diagonals": lambda: torch.arange(20.0).as_strided((4, 6), (1, 1)),
}


@pytest.mark.parametrize("kind", EXPANDED)
def test_stored_tensor_that_overlaps_itself(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path, {"t": Entry.of(EXPANDED[kind]())})
    assert_same_load(tmp_path, lambda: {"t": torch.zeros(4, 6)}, fallback=None)
    assert_same_load(tmp_path, lambda: {"t": torch.zeros(4, 6, dtype=torch.float64)}, fallback=None)


@pytest.mark.parametrize("dtype", [FLOAT, torch.float64])
@pytest.mark.parametrize("staging", [1, 32 << 20])
@pytest.mark.parametrize("kind", ["row", "column", "scalar"])
def test_expanded_destination(tmp_path: Path, kind: str, dtype: torch.dtype, staging: int) -> None:
    write_checkpoint(tmp_path, {"t": Entry.of(fill((4, 6), FLOAT))})
    assert_same_load(
        tmp_path,
        lambda: {"t": EXPANDED[kind]().to(dtype)[:1, :1].expand(4, 6)},
        raises=RuntimeError,
        options={"staging_bytes": staging},
    )


@pytest.mark.parametrize("staging", [4096, 32 << 20])
def test_expanded_destination_of_long_rows(tmp_path: Path, staging: int) -> None:
    write_checkpoint(tmp_path, {"t": Entry.of(fill((2, 3000), FLOAT))})
    make = lambda: {"t": torch.zeros(1, 3000).expand(2, 3000)}  # noqa: E731
    assert_same_load(tmp_path, make, raises=RuntimeError, options={"staging_bytes": staging})


def test_expanded_destination_of_one_stored_element(tmp_path: Path) -> None:
    # Of size 1, or empty: nothing is written twice.
    write_checkpoint(tmp_path, {"a": Entry.of(fill((1, 6), FLOAT)), "b": Entry.of(fill((0, 6), FLOAT))})
    assert_same_load(tmp_path, lambda: {"a": torch.zeros(6).expand(1, 6), "b": torch.zeros(6).expand(0, 6)})


@pytest.mark.parametrize("kind", ["windows", "diagonals"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("staging", [1, 32 << 20])
def test_destination_that_overlaps_itself(tmp_path: Path, kind: str, layout: str, staging: int) -> None:
    stored = fill((4, 6), torch.int32) if layout == "contiguous" else fill((6, 4), torch.int32).t()
    write_checkpoint(tmp_path, {"t": Entry.of(stored)})
    stride = EXPANDED[kind]().stride()
    make = lambda: {"t": torch.zeros(20, dtype=torch.int32).as_strided((4, 6), stride)}  # noqa: E731
    assert_same_load(tmp_path, make, options={"staging_bytes": staging})


COMPLEX = torch.complex64
LAZY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda tensor: tensor,
    "conj": lambda tensor: tensor.conj(),
    "neg": lambda tensor: torch._neg_view(tensor),
    "conj_neg": lambda tensor: torch._neg_view(tensor.conj()),
    "transposed_conj": lambda tensor: tensor.mH,
}


@pytest.mark.parametrize("wanted", LAZY)
@pytest.mark.parametrize("stored", LAZY)
def test_conj_and_neg_bits(tmp_path: Path, stored: str, wanted: str) -> None:
    values = torch.complex(torch.arange(25.0), torch.arange(25.0) - 7).view(5, 5)
    write_checkpoint(tmp_path, {"t": Entry.of(LAZY[stored](values))})
    make = lambda: {"t": LAZY[wanted](torch.zeros(5, 5, dtype=COMPLEX))}  # noqa: E731
    assert_same_load(tmp_path, make, fallback=0 if stored == "plain" else 1)


def test_imaginary_part_as_destination(tmp_path: Path) -> None:
    # x.conj().imag is a float tensor with the negative bit.
    write_checkpoint(tmp_path, {"a": Entry.of(fill((5,), FLOAT)), "b": Entry.of(torch.arange(5.0))})

    def make() -> dict[str, Any]:
        numbers = torch.zeros(2, 5, dtype=COMPLEX)
        return {"a": numbers[0].imag, "b": numbers[1].conj().imag}

    assert_same_load(tmp_path, make)


# Chunks


def grid(size: tuple[int, ...], cuts: list[list[int]]) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """The chunks of a grid: offsets and slices."""
    chunks: list[tuple[tuple[int, ...], tuple[slice, ...]]] = [((), ())]
    for length, inner in zip(size, cuts, strict=True):
        edges = [0, *inner, length]
        pairs = list(itertools.pairwise(edges))
        chunks = [((*at, a), (*where, slice(a, b))) for at, where in chunks for a, b in pairs]
    return chunks


@pytest.mark.parametrize("layout", ["rows", "columns", "blocks"])
@pytest.mark.parametrize("mode", ["cached", "direct"])
def test_resharding(tmp_path: Path, layout: str, mode: str) -> None:
    whole = fill((40, 30, 3), torch.int32)
    stored = [(at, whole[where].clone()) for at, where in grid((40, 30, 3), [[7, 8, 21], [10, 20], []])]
    write_checkpoint(tmp_path, {"t": Entry((40, 30, 3), torch.int32, stored, file="__%d_0.distcp")})
    cuts = {"rows": [[5, 20, 20], [], []], "columns": [[], [1, 15], []], "blocks": [[13], [11, 29], [1, 2]]}[layout]
    wanted = grid((40, 30, 3), cuts)

    def make() -> dict[str, Any]:
        shards = [torch.zeros_like(whole[where]) for _, where in wanted]
        return {"t": ShardedBuffer.make((40, 30, 3), [at for at, _ in wanted], shards)}

    outcome = assert_same_load(tmp_path, make, options={"io": mode})
    for (_, where), shard in zip(wanted, outcome.state["t"].shards, strict=True):
        assert torch.equal(shard, whole[where])


def test_parts_that_no_chunk_covers_stay(tmp_path: Path) -> None:
    whole = fill((10, 10), torch.int32)
    chunks = [((0, 0), whole[:4, :5].clone()), ((6, 2), whole[6:, 2:].clone())]
    write_checkpoint(tmp_path, {"t": Entry((10, 10), torch.int32, chunks)})
    outcome = assert_same_load(tmp_path, lambda: {"t": torch.full((10, 10), -5, dtype=torch.int32)})
    assert (outcome.state["t"] == -5).sum() == 100 - 20 - 32


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_overlapping_stored_chunks(tmp_path: Path, order: tuple[int, ...], dtype: torch.dtype) -> None:
    boxes = [((0, 0), (6, 8)), ((3, 2), (5, 8)), ((1, 1), (7, 3))]
    chunks = [(boxes[i][0], torch.full(boxes[i][1], i + 1, dtype=torch.int32)) for i in order]
    for file in ("__0_0.distcp", "__%d_0.distcp"):
        write_checkpoint(tmp_path, {"t": Entry((8, 10), torch.int32, chunks, file=file)})
        assert_same_load(tmp_path, lambda: {"t": torch.zeros(8, 10, dtype=dtype)})


# Destinations that share memory. The last writer is the same as torch's.

ALIASES: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
    "tied": lambda base: {"a": base, "b": base},
    "views": lambda base: {"a": base[:6], "b": base[3:9], "c": base[5:11]},
    "whole_and_part": lambda base: {"a": base[2:5], "b": base, "c": base[4:8]},
    "transposed": lambda base: {"a": base, "b": base.t()},
    "interleaved": lambda base: {"a": base[::2], "b": base[1::2], "c": base[:6]},
    "other_dtype": lambda base: {"a": base, "b": base.view(torch.float32)},
    "narrower_dtype": lambda base: {"a": base, "b": base.view(torch.int16)[:, 3:9]},
    "columns": lambda base: {"a": base[:, :7], "b": base[:, 5:], "c": base[:, 6:8]},
    "neg": lambda base: {"a": base, "b": torch._neg_view(base)},
}


THREE = ("views", "whole_and_part", "interleaved", "columns")


@pytest.mark.parametrize("files", ["one", "each", "shuffled"])
@pytest.mark.parametrize(
    ("kind", "converted"),
    [(kind, key) for kind in ALIASES for key in ["", "a", "b", "c"] if key != "c" or kind in THREE],
)
def test_aliased_destinations(tmp_path: Path, kind: str, files: str, converted: str) -> None:
    shapes = ALIASES[kind](torch.zeros(12, 12, dtype=torch.int32))
    assert not converted or converted in shapes
    entries = {}
    for number, (key, view) in enumerate(shapes.items()):
        # The engine converts the one, torch the other.
        dtype = (torch.uint16 if files == "each" else torch.int8) if key == converted else view.dtype
        stored = torch.full(view.shape, number + 1).to(dtype)
        # "shuffled": the first and the last entry share a file, so that torch reads the last one second.
        file = {"one": "x", "each": f"x{number}", "shuffled": f"x{number % 2}"}[files]
        entries[key] = Entry.of(stored, file=f"__{file}_0.distcp")
    write_checkpoint(tmp_path, entries)
    assert_same_load(tmp_path, lambda: dict(ALIASES[kind](torch.zeros(12, 12, dtype=torch.int32))))


def test_aliased_destinations_of_unknown_records(tmp_path: Path) -> None:
    # What the engine places and converts, what torch converts, and torch.load, in turn, each over the one before.
    kinds = [
        Entry.of(torch.full((50,), 1.0)),
        Entry.of(torch.full((50,), 2, dtype=torch.int8)),
        Entry.of(torch.full((50,), 5, dtype=torch.uint16)),
        Entry.of(torch.full((50,), 3.0), legacy=True),
        Entry.of(torch.tensor(4.0).expand(50)),
    ]
    for first in range(len(kinds)):
        for second in range(len(kinds)):
            path = tmp_path / f"{first}{second}"
            write_checkpoint(path, {"a": kinds[first], "b": kinds[second]})

            def make() -> dict[str, Any]:
                base = torch.zeros(60)
                return {"a": base[:50], "b": base[10:]}

            assert_same_load(path, make, fallback=None)


def test_chunk_list_that_names_a_chunk_twice(tmp_path: Path) -> None:
    # Two local copies of the same global chunk: only the index of a chunk tells them apart.
    write_checkpoint(tmp_path, {"t": Entry.of(fill((4, 3), torch.int32))})

    def make() -> dict[str, Any]:
        return {"t": ShardedBuffer.make((4, 3), [(1, 0), (1, 0)], [torch.zeros(2, 3, dtype=torch.int32) for _ in "ab"])}

    assert_same_load(tmp_path, make)
