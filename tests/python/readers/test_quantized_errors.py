"""Quantized tensors that cannot be read: what is wrong is named, and nothing is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import load_with, torch_load
from quantized_files import fast_quantized_reader, finite, make_mxfp4, torch_quantized_reader, write_quantized
from safetensors.torch import save_file
from safetensors_files import write_chunks, write_index
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

import dcp_fast

WEIGHT = finite((300, 200), torch.float8_e4m3fn, 1)
SCALES = torch.rand(3, 2)
BLOCKS, EXPONENTS = make_mxfp4((2, 4, 3), 2)


def error_of(path: Path, fqn: str, sizes: tuple[int, ...], **options: Any) -> dcp_fast.LoadError:
    """The error of a load, which leaves its destination as it was."""
    state = {fqn: torch.full(sizes, 7.0)}
    outcome = load_with(dcp_fast.load, state, storage_reader=fast_quantized_reader(path, **options))
    assert outcome.errors is not None, "the load succeeds"
    error = outcome.errors[0]
    assert isinstance(error, dcp_fast.LoadError), error
    assert state[fqn].eq(7).all()
    return error


def assert_names(error: dcp_fast.LoadError, path: Path, fqn: str, length: int) -> None:
    """The error names the file, the FQN and the byte range of a tensor."""
    assert (error.path, error.fqn, error.length) == (str(path), fqn, length)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        begin, _ = json.loads(file.read(size))[fqn]["data_offsets"]
    assert error.offset == 8 + size + begin


FIRST = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1), (4, 2), (3, 3), (3,), (3, 2, 1), ()])
def test_scales_of_other_sizes(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    scales = torch.rand(sizes)
    path = write_quantized(tmp_path, {"l.weight": WEIGHT, "l.weight_scale_inv": scales})
    error = error_of(path, "l.weight", (300, 200))
    assert isinstance(error, dcp_fast.SizeMismatchError)
    assert_names(error, path / FIRST, "l.weight_scale_inv", scales.nbytes)
    assert "in blocks of 128 x 128, which needs [3, 2]" in str(error)
    # Where torch finds too few, it raises a type that ours is one of; it does not notice others.
    reader = torch_quantized_reader(str(path))
    theirs = load_with(torch_load, {"l.weight": torch.zeros(300, 200)}, storage_reader=reader)
    if theirs.errors is not None:
        assert isinstance(error, type(theirs.errors[0]))


def test_another_block_size(tmp_path: Path) -> None:
    path = write_quantized(tmp_path, {"l.weight": WEIGHT, "l.weight_scale_inv": SCALES})
    error = error_of(path, "l.weight", (300, 200), block_size=64)
    assert "in blocks of 64 x 64, which needs [5, 4]" in str(error)


@pytest.mark.parametrize(("sizes", "wanted"), [((2, 4, 2), "[2, 4, 3]"), ((2, 4), "[2, 4, 3]"), ((2, 4, 3, 1), "[2,")])
def test_scales_of_mxfp4_of_other_sizes(tmp_path: Path, sizes: tuple[int, ...], wanted: str) -> None:
    scales = torch.zeros(sizes, dtype=torch.uint8)
    path = write_quantized(tmp_path, {"x_blocks": BLOCKS, "x_scales": scales})
    error = error_of(path, "x_blocks", (2, 4, 96))
    assert isinstance(error, dcp_fast.SizeMismatchError)
    assert wanted in str(error)
    assert_names(error, path / FIRST, "x_scales", scales.nbytes)


def test_missing_scales_of_mxfp4(tmp_path: Path) -> None:
    path = write_quantized(tmp_path, {"x_blocks": BLOCKS})
    error = error_of(path, "x_blocks", (2, 4, 96))
    assert isinstance(error, dcp_fast.CorruptCheckpointError)
    assert "lacks the scales 'x_scales'" in str(error)
    assert_names(error, path / FIRST, "x_blocks", BLOCKS.nbytes)


def test_scales_that_only_the_index_has(tmp_path: Path) -> None:
    save_file({"l.weight": WEIGHT}, tmp_path / FIRST)
    write_index(tmp_path, dict.fromkeys(["l.weight", "l.weight_scale_inv"], FIRST))
    with pytest.raises(dcp_fast.CorruptHeaderError, match=r"l\.weight_scale_inv"):
        fast_quantized_reader(tmp_path).read_metadata()


@pytest.mark.parametrize(
    ("tensors", "fqn", "sizes", "wrong"),
    [
        ({"l.weight": WEIGHT, "l.weight_scale_inv": SCALES.to(torch.complex64)}, "l.weight", (300, 200), "_scale_inv"),
        ({"l.weight": WEIGHT.to(torch.complex64), "l.weight_scale_inv": SCALES}, "l.weight", (300, 200), ""),
        ({"x_blocks": BLOCKS, "x_scales": EXPONENTS.float()}, "x_blocks", (2, 4, 96), ""),
    ],
)
def test_unknown_dtypes(
    tmp_path: Path, tensors: dict[str, torch.Tensor], fqn: str, sizes: tuple[int, ...], wrong: str
) -> None:
    path = write_quantized(tmp_path, tensors)
    error = error_of(path, fqn, sizes)
    assert isinstance(error, dcp_fast.UnsupportedDTypeError)
    name = "x_scales" if fqn == "x_blocks" else fqn + wrong
    assert_names(error, path / FIRST, name, tensors[name].nbytes)


def test_one_dimension(tmp_path: Path) -> None:
    path = write_quantized(tmp_path, {"l.weight": WEIGHT[0], "l.weight_scale_inv": SCALES[0]})
    error = error_of(path, "l.weight", (200,))
    assert isinstance(error, dcp_fast.SizeMismatchError)
    assert_names(error, path / FIRST, "l.weight", 200)


def test_chunks_of_a_quantized_tensor(tmp_path: Path) -> None:
    chunks = {"l.weight": [((0, 0), WEIGHT[:128]), ((128, 0), WEIGHT[128:])], "l.weight_scale_inv": [((0, 0), SCALES)]}
    error = error_of(write_chunks(tmp_path / "model", chunks), "l.weight", (300, 200))
    assert isinstance(error, dcp_fast.SizeMismatchError)
    assert error.fqn == "l.weight"
    assert "in one piece" in str(error)


@pytest.mark.parametrize("of", ["weight", "scales"])
def test_files_that_were_cut(tmp_path: Path, of: str) -> None:
    path = write_quantized(tmp_path, {"l.weight": WEIGHT}, {"l.weight_scale_inv": SCALES})
    number, fqn = (1, "l.weight") if of == "weight" else (2, "l.weight_scale_inv")
    file = path / f"model-0000{number}-of-00002.safetensors"

    class Cut(dcp_fast.QuantizedHuggingFaceStorageReader):
        def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
            with file.open("r+b") as stream:
                stream.truncate(file.stat().st_size - 1)
            return super().prepare_local_plan(plan)

    state = {"l.weight": torch.full((300, 200), 7.0)}
    outcome = load_with(dcp_fast.load, state, storage_reader=Cut(path))
    assert outcome.errors is not None
    error = outcome.errors[0]
    assert isinstance(error, dcp_fast.TruncatedFileError)
    assert (error.path, error.fqn) == (str(file), fqn)
    assert error.offset is not None
    assert state["l.weight"].eq(7).all()


@pytest.mark.parametrize("options", [{"target_dtype": torch.float64}, {"target_dtype": torch.int8}, {"block_size": 0}])
def test_arguments(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        fast_quantized_reader(tmp_path, **options)


class Cutting(dcp.DefaultLoadPlanner):
    """Resolves what has fewer elements than the item, or other dimensions."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self._sizes = sizes

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(item).flatten()[: math.prod(self._sizes)].view(self._sizes)


@pytest.mark.parametrize("sizes", [(300, 0), (0, 200), (100, 200), (299, 200), (60000,), (600, 100)])
def test_targets_of_other_sizes(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Nothing is loaded in part, as under torch."""
    path = write_quantized(tmp_path, {"l.weight": WEIGHT, "l.weight_scale_inv": SCALES})
    states = [{"l.weight": torch.full((300, 200), 7.0)} for _ in range(2)]
    expected = load_with(
        torch_load, states[0], storage_reader=torch_quantized_reader(str(path)), planner=Cutting(sizes)
    )
    actual = load_with(dcp_fast.load, states[1], storage_reader=fast_quantized_reader(path), planner=Cutting(sizes))
    assert expected.errors is not None
    assert actual.errors is not None
    assert isinstance(actual.errors[0], type(expected.errors[0]))
    assert isinstance(actual.errors[0], dcp_fast.SizeMismatchError)
    assert actual.errors[0].fqn == "l.weight"
    assert all(state["l.weight"].eq(7).all() for state in states)
