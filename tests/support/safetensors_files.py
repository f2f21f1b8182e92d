"""Safetensors files for the tests: as torch and safetensors write them, and as nobody should."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from helpers import Outcome, image, load_with, torch_load, torch_planner
from safetensors import SafetensorError
from safetensors.torch import save_file

import dcp_fast

__all__ = [
    "DTYPES",
    "Chunks",
    "assert_refused",
    "assert_same_headers",
    "assert_same_hf_load",
    "entry",
    "error_of",
    "file_bytes",
    "header_of",
    "hf_reader",
    "load_both",
    "save_hf",
    "torch_hf_reader",
    "write_chunks",
    "write_file",
    "write_index",
    "write_shards",
]

# Bound here so that an installed dcp_fast cannot become its own oracle.
torch_hf_reader = dcp.HuggingFaceStorageReader
hf_reader = dcp_fast.HuggingFaceStorageReader

# What torch's reader takes.
DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]

# By FQN: chunks of a global tensor, each as its offsets and values.
Chunks = Mapping[str, Sequence[tuple[Sequence[int], torch.Tensor]]]


def save_hf(path: Path, state: dict[str, Any], **options: Any) -> Path:
    """Write a checkpoint with torch's writer."""
    path.mkdir(parents=True, exist_ok=True)
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(path), **options))
    return path


def write_chunks(path: Path, chunks: Chunks) -> Path:
    """Write chunks as ranks do that save by ``save_distributed``: of each tensor at most one in a file."""
    files = max((len(of_tensor) for of_tensor in chunks.values()), default=0)
    return write_shards(
        path,
        [{fqn: parts[number] for fqn, parts in chunks.items() if number < len(parts)} for number in range(files)],
    )


def write_shards(path: Path, files: Sequence[Mapping[str, tuple[Sequence[int], torch.Tensor]]]) -> Path:
    """The same, file by file: the offsets and values of each tensor's chunk."""
    path.mkdir(parents=True, exist_ok=True)
    for number, chunks in enumerate(files):
        sharding = {fqn: {"saved_offsets": list(offsets)} for fqn, (offsets, _) in chunks.items()}
        save_file(
            {fqn: part.clone(memory_format=torch.contiguous_format) for fqn, (_, part) in chunks.items()},
            path / f"shard-{number + 1:05}-model-00001-of-00001.safetensors",
            metadata={"DCP_SHARDING_INFO": json.dumps(sharding), "DCP_VERSION": "1.0", "format": "pt"},
        )
    return path


def header_of(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> dict[str, Any]:
    """A header for tensors: dtype, shape and bytes of each, one after another."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return header


def file_bytes(header: Any, payload: bytes | int | None = None, size: int | None = None) -> bytes:
    """A safetensors file.

    Args:
        header: bytes, a text, or what JSON makes of it.
        payload: what follows the header, or how many bytes do; None: as the header tells.
        size: what the file says that the size of its header is; None: the truth.
    """
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    encoded = text.encode() if isinstance(text, str) else text
    if payload is None:
        payload = max((info["data_offsets"][1] for name, info in header.items() if name != "__metadata__"), default=0)
    if isinstance(payload, int):
        payload = bytes(i % 251 for i in range(payload))
    return (len(encoded) if size is None else size).to_bytes(8, "little") + encoded + payload


def write_file(path: Path, header: Any, payload: bytes | int | None = None, size: int | None = None) -> Path:
    """Write :func:`file_bytes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_bytes(header, payload, size))
    return path


def write_index(path: Path, weight_map: Mapping[str, str], name: str = "model.safetensors.index.json") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}))
    return path / name


def assert_same_headers(path: Path) -> None:
    """Our metadata equals that of torch's reader, order of keys included."""
    expected = torch_hf_reader(str(path)).read_metadata()
    actual = hf_reader(path).read_metadata()
    assert list(actual.state_dict_metadata) == list(expected.state_dict_metadata)
    assert actual.state_dict_metadata == expected.state_dict_metadata
    assert expected.storage_data is not None
    assert list(actual.storage_data.items()) == list(expected.storage_data.items())
    assert [index.index for index in actual.storage_data] == [index.index for index in expected.storage_data]


def load_both(
    path: Path, make: Any, planner: Any = None, options: Mapping[str, Any] | None = None, no_dist: bool = True
) -> list[Outcome]:
    """What torch's load with its reader makes of a state dict, and what ours makes of an equal one."""
    theirs = {"storage_reader": torch_hf_reader(str(path)), "planner": planner() if planner else torch_planner()}
    ours = {"storage_reader": hf_reader(path, **(options or {})), "planner": planner() if planner else None}
    return [
        load_with(torch_load, make(), no_dist=no_dist, **theirs),
        load_with(dcp_fast.load, make(), no_dist=no_dist, **ours),
    ]


def assert_same_hf_load(
    path: Path, make: Any, planner: Any = None, options: Mapping[str, Any] | None = None, no_dist: bool = True
) -> Outcome:
    """Both loads do the same, and change something. Returns what dcp_fast did."""
    untouched = image(make())
    expected, actual = load_both(path, make, planner, options, no_dist)
    assert expected.errors is None, f"torch itself raises {expected.errors}"
    if actual.errors is not None:
        raise AssertionError(f"dcp_fast raises {actual.errors}") from next(iter(actual.errors.values()))
    assert actual.image() == expected.image()
    assert expected.image() != untouched, "the load changed nothing"
    report = dcp_fast.last_report()
    assert report is not None
    assert (report.reader_fallback_reason, report.fallback_records) == ("", 0)
    return actual


def entry(**fields: Any) -> dict[str, Any]:
    """A header for one tensor of 8 bytes, with other fields."""
    return {"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} | fields}


def assert_refused(error: BaseException | None, path: Path, *, fqn: str | None = None) -> None:
    """The error names the file and a byte range, and is of the types that torch raises there."""
    assert type(error) is dcp_fast.CorruptHeaderError, repr(error)
    for kind in (SafetensorError, RuntimeError, AssertionError, ValueError, KeyError):
        assert isinstance(error, kind)
    assert error.path == str(path)
    assert error.offset is not None
    assert error.length is not None
    assert error.offset >= 0
    assert fqn is None or error.fqn == fqn
    assert str(path) in str(error)
    assert error.reason in str(error)


def error_of(path: Path, state: dict[str, Any] | None = None) -> BaseException | None:
    """What a load from the directory of a file raises."""
    wanted = {"a": torch.zeros(8, dtype=torch.uint8)} if state is None else state
    outcome = load_with(dcp_fast.load, wanted, checkpoint_id=path.parent)
    return None if outcome.errors is None else outcome.errors[0]
