"""``dcp-fast inspect`` of safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors_files import header_of, write_chunks, write_file

import dcp_fast
from dcp_fast.tools.cli import main


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    weight = torch.arange(24, dtype=torch.bfloat16).view(8, 3)
    return write_chunks(
        tmp_path / "model", {"weight": [((0, 0), weight[:5]), ((5, 0), weight[5:])], "bias": [((0,), torch.ones(8))]}
    )


def described(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_directory(directory: Path) -> None:
    found = dcp_fast.inspect(directory)
    assert (found.path, found.version, found.storage_meta) == (str(directory), None, None)
    assert (found.tensors, found.bytes_entries, found.chunks, found.files) == (2, 0, 3, 2)
    assert (found.payload_bytes, found.record_bytes, found.missing_records) == (80, 80, 0)
    assert found.payload_bytes_by_dtype == {"bfloat16": 48, "float32": 32}
    weight = next(entry for entry in found.entries if entry.fqn == "weight")
    assert (weight.dtype, weight.shape, weight.chunk_count, weight.file_count) == ("bfloat16", [8, 3], 2, 2)


def test_places_are_those_of_the_payloads(directory: Path) -> None:
    (weight,) = dcp_fast.inspect(directory, "wei*").entries
    assert weight.chunks is not None
    stored = {}
    for chunk in weight.chunks:
        assert chunk.file is not None
        assert chunk.offset is not None
        assert chunk.length is not None
        content = (directory / chunk.file).read_bytes()[chunk.offset : chunk.offset + chunk.length]
        assert chunk.sizes is not None
        assert chunk.offsets is not None
        stored[chunk.offsets[0]] = torch.frombuffer(bytearray(content), dtype=torch.bfloat16).view(chunk.sizes)
    assert torch.equal(torch.cat([stored[0], stored[5]]), torch.arange(24, dtype=torch.bfloat16).view(8, 3))


def test_one_file(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = directory.glob("shard-00002*")
    found = described(capsys, file)
    assert (found["path"], found["tensors"], found["chunks"]) == (str(file), 1, 1)


def test_dtype_that_torch_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_file(tmp_path / "model.safetensors", header_of({"six": ("F6_E2M3", (4,), 3)}))
    found = described(capsys, tmp_path)
    assert found["payload_bytes_by_dtype"] == {"float6_e2m3fn": 3}
    assert main(["inspect", str(tmp_path)]) == 0
    assert "float6_e2m3fn" in capsys.readouterr().out


def test_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_file(tmp_path / "model.safetensors", "{", 0)
    assert main(["inspect", str(tmp_path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_metadata_of_dcp_goes_first(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"a": torch.ones(3)}, checkpoint_id=tmp_path)
    write_file(tmp_path / "model.safetensors", header_of({"b": ("U8", (4,), 4)}))
    assert [entry.fqn for entry in dcp_fast.inspect(tmp_path).entries] == ["a"]
