"""Safetensors files that are sound alone, and contradict each other, their sharding or their index: all is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import load_with
from safetensors_files import assert_refused, entry, error_of, hf_reader, write_file, write_index

import dcp_fast
from dcp_fast.errors import LoadError

# Which chunk of a tensor a file has

SHARDING: dict[str, tuple[Any, str]] = {
    "no JSON": ("hello", ""),
    "no object": ([], ""),
    "null": (None, ""),
    "lacks the tensor": ({}, "a"),
    "lacks the offsets": ({"a": {}}, "a"),
    "offsets that are null": ({"a": {"saved_offsets": None}}, ""),
    "a negative offset": ({"a": {"saved_offsets": [-1]}}, ""),
    "an offset with a fraction": ({"a": {"saved_offsets": [1.0]}}, ""),
    "an offset in quotes": ({"a": {"saved_offsets": ["1"]}}, ""),
    "too few offsets": ({"a": {"saved_offsets": []}}, "a"),
    "too many offsets": ({"a": {"saved_offsets": [0, 0]}}, "a"),
    "an offset beyond all bounds": ({"a": {"saved_offsets": [(1 << 63) - 4]}}, "a"),
    "an offset of 2^63": ({"a": {"saved_offsets": [1 << 63]}}, ""),
    "a tensor that is a number": ({"a": 3}, ""),
}


@pytest.mark.parametrize("name", SHARDING)
def test_sharding_is_refused(tmp_path: Path, name: str) -> None:
    sharding, fqn = SHARDING[name]
    text = sharding if isinstance(sharding, str) else json.dumps(sharding)
    path = write_file(tmp_path / "model.safetensors", {"__metadata__": {"DCP_SHARDING_INFO": text}} | entry(), 8)
    assert_refused(error_of(path), path, fqn=fqn)


def test_sharding_of_other_tensors_is_passed_over(tmp_path: Path) -> None:
    sharding = {"b": {"saved_offsets": "?"}, "a": {"saved_offsets": [2], "more": []}}
    write_file(
        tmp_path / "model.safetensors", {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(sharding)}} | entry(), 8
    )
    entry_of_a = hf_reader(tmp_path).read_metadata().state_dict_metadata["a"]
    assert entry_of_a.size == torch.Size([10])
    assert [chunk.offsets for chunk in entry_of_a.chunks] == [torch.Size([2])]


# Files that contradict each other


@pytest.mark.parametrize("shape", [[2, 4], [], [4]], ids=str)
def test_same_tensor_of_another_shape(tmp_path: Path, shape: list[int]) -> None:
    names = ["1.safetensors", "2.safetensors"]
    size = 1 if not shape else 8 if shape == [2, 4] else 4
    write_file(tmp_path / names[0], entry(), 8)
    write_file(tmp_path / names[1], entry(shape=shape, data_offsets=[0, size]), size)
    error = error_of(tmp_path / names[0])
    assert type(error) is dcp_fast.CorruptHeaderError
    assert {Path(error.path).name, error.reason.rpartition("/")[2]} == set(names)
    assert error.fqn == "a"


# The index


def index_error(path: Path) -> Any:
    with pytest.raises(LoadError) as caught:
        hf_reader(path).read_metadata()
    return caught.value


def test_index_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    write_file(tmp_path / "1.safetensors", entry(), 8)
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    error = index_error(tmp_path)
    assert type(error) is dcp_fast.FileMissingError
    assert (error.path, error.fqn) == (str(tmp_path / "2.safetensors"), "b")
    assert "model.safetensors.index.json" in str(error)
    outcome = load_with(dcp_fast.load, {"a": torch.zeros(8, dtype=torch.uint8)}, checkpoint_id=tmp_path)
    assert outcome.errors is not None
    assert type(outcome.errors[0]) is dcp_fast.MetadataAccessError
    for fact in ("2.safetensors", "'b'", "model.safetensors.index.json"):
        assert fact in str(outcome.errors[0])


def test_index_names_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    path = write_file(tmp_path / "1.safetensors", entry(), 8)
    write_index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors"})
    error = index_error(tmp_path)
    assert type(error) is dcp_fast.CorruptHeaderError
    assert (error.path, error.fqn) == (str(path), "b")
    assert "model.safetensors.index.json" in str(error)


def test_index_names_the_wrong_file(tmp_path: Path) -> None:
    write_file(tmp_path / "1.safetensors", entry(), 8)
    path = write_file(tmp_path / "2.safetensors", {}, 0)
    write_index(tmp_path, {"a": "2.safetensors"})
    assert (index_error(tmp_path).path, index_error(tmp_path).fqn) == (str(path), "a")


@pytest.mark.parametrize("name", ["../1.safetensors", "/etc/passwd", "sub/1.safetensors", "", "1.safetensors\0"])
def test_index_names_a_path(tmp_path: Path, name: str) -> None:
    write_file(tmp_path / "1.safetensors", entry(), 8)
    write_index(tmp_path, {"a": name})
    assert type(index_error(tmp_path)) is dcp_fast.FileMissingError


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"[]", b"{}", b'{"weight_map":[]}', b'{"weight_map":{"a":1}}', b"\xff", b'{"weight_map":{}}x'],
)
def test_index_that_is_none(tmp_path: Path, content: bytes) -> None:
    write_file(tmp_path / "1.safetensors", entry(), 8)
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    assert_refused(index_error(tmp_path), path)


def test_index_of_other_models_is_checked_too(tmp_path: Path) -> None:
    write_file(tmp_path / "1.safetensors", entry(), 8)
    write_index(tmp_path, {"x": "0.safetensors"}, name="diffusion_pytorch_model.safetensors.index.json")
    assert type(index_error(tmp_path)) is dcp_fast.FileMissingError


def test_index_of_less_than_there_is(tmp_path: Path) -> None:
    write_file(tmp_path / "1.safetensors", entry(), 8)
    write_file(tmp_path / "2.safetensors", {"b": entry()["a"]}, 8)
    write_index(tmp_path, {"a": "1.safetensors"})
    assert sorted(hf_reader(tmp_path).read_metadata().state_dict_metadata) == ["a", "b"]
