"""Differential tests: what writers of any version and option leave on disk."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    Entry,
    ShardedBuffer,
    assert_same_load,
    fast_reader,
    fill,
    load_with,
    save,
    torch_load,
    torch_planner,
    torch_reader,
    write_checkpoint,
)
from torch.distributed.checkpoint import _version, filesystem
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.utils.serialization import config

import dcp_fast

MIXED: dict[str, Any] = {
    **{f"w{i}": fill((7, 5 + i), dtype, i) for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.int64])},
    "large": fill((300, 301), torch.float32, 9),
    "empty": torch.zeros(0, 3),
    "scalar": fill((), torch.float64, 10),
    "step": 17,
    "name": "run",
}


def zeros() -> dict[str, Any]:
    return {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else type(v)() for k, v in MIXED.items()}


WRITERS: dict[str, dict[str, Any]] = {
    "default": {},
    "threads": {"thread_count": 3},
    "file_per_item": {"single_file_per_rank": False},
    "threads_and_files": {"thread_count": 2, "single_file_per_rank": False},
    "no_copy_ahead": {"per_thread_copy_ahead": 0},
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("mode", ["auto", "cached", "direct"])
def test_writer_options(tmp_path: Path, writer: str, mode: str) -> None:
    save(tmp_path, MIXED, **WRITERS[writer])
    assert_same_load(tmp_path, zeros, options={"io": mode})


def test_zstd(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    save(tmp_path, MIXED, _extensions=[ZStandard()])
    assert_same_load(
        tmp_path, zeros, fallback=sum(isinstance(v, torch.Tensor) and v.numel() > 0 for v in MIXED.values())
    )
    assert_same_load(tmp_path, lambda: {"large": torch.zeros(300, 301).t().contiguous().t()}, fallback=1)


def test_crc32_off(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save(tmp_path, MIXED)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same_load(tmp_path, zeros)


@pytest.mark.parametrize("alignment", [1, 64, 4096, 1 << 16])
@pytest.mark.parametrize("mode", ["cached", "direct"])
def test_storage_alignment(tmp_path: Path, alignment: int, mode: str) -> None:
    with mock.patch.object(config.save, "storage_alignment", alignment):
        save(tmp_path, MIXED)
    # A header of 64 KiB is more than the native parser reads ahead.
    assert_same_load(tmp_path, zeros, options={"io": mode}, fallback=0 if alignment <= 4096 else None)


def test_skipped_data(tmp_path: Path) -> None:
    # Records whose payload was never written: holes in the file, which read as zeros.
    with torch.serialization.skip_data():
        record = io.BytesIO()
        torch.save(torch.ones(50), record)
    write_checkpoint(tmp_path, {"t": Entry.of(torch.ones(50))})
    with (tmp_path / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    ((_, info),) = metadata.storage_data.items()
    assert info.length == len(record.getvalue())
    (tmp_path / info.relative_path).write_bytes(record.getvalue())
    assert_same_load(tmp_path, lambda: {"t": torch.full((50,), 3.0)})


@pytest.mark.parametrize("what", ["all", "some"])
def test_legacy_records(tmp_path: Path, what: str) -> None:
    """Records of `_use_new_zipfile_serialization=False`, as torch before 1.6 wrote them."""
    original = torch.save
    legacy = 0

    def save_legacy(value: Any, stream: Any) -> None:
        nonlocal legacy
        old = isinstance(value, torch.Tensor) and (what == "all" or value.numel() > 100)
        legacy += old and value.numel() > 0
        original(value, stream, _use_new_zipfile_serialization=not old)

    with mock.patch.object(filesystem.torch, "save", save_legacy):
        save(tmp_path, MIXED)
    assert legacy == (5 if what == "all" else 1)
    assert_same_load(tmp_path, zeros, fallback=legacy)
    assert_same_load(tmp_path, lambda: {"large": torch.zeros(300, 301, dtype=torch.float64)}, fallback=1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.complex32])
def test_legacy_records_that_torch_cannot_read(tmp_path: Path, dtype: torch.dtype) -> None:
    """torch stumbles over an attribute; no code can rely on that, so ours says instead which record is at fault."""
    write_checkpoint(tmp_path, {"t": Entry.of(fill((5,), dtype), legacy=True)})
    state = {"t": torch.zeros(5, dtype=dtype)}
    theirs = load_with(torch_load, state, storage_reader=torch_reader(tmp_path), planner=torch_planner())
    ours = load_with(dcp_fast.load, state, storage_reader=fast_reader(tmp_path), planner=None)
    assert theirs.errors is not None
    assert isinstance(theirs.errors[0], AttributeError)
    assert ours.errors is not None
    assert type(ours.errors[0]) is dcp_fast.CorruptCheckpointError
    assert isinstance(ours.errors[0].__cause__, AttributeError)
    assert ours.errors[0].fqn == "t"


def test_big_endian_records(tmp_path: Path) -> None:
    with mock.patch.object(sys, "byteorder", "big"):
        save(tmp_path, {"t": fill((20,), torch.int32), "b": fill((5,), torch.uint8)})
    make = lambda: {"t": torch.zeros(20, dtype=torch.int32), "b": torch.zeros(5, dtype=torch.uint8)}  # noqa: E731
    assert_same_load(tmp_path, make, fallback=2)


def rewrite_record(path: Path, method: int, leave_out: str) -> None:
    """Write the only record of a checkpoint anew, compressed by some method, without entries of some name."""
    with (path / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    ((_, info),) = metadata.storage_data.items()
    record = io.BytesIO()
    with zipfile.ZipFile(path / info.relative_path) as old, zipfile.ZipFile(record, "w", method) as new:
        for entry in old.namelist():
            if leave_out not in entry:
                new.writestr(entry, old.read(entry))
    info.length = len(record.getvalue())
    (path / info.relative_path).write_bytes(record.getvalue())
    with (path / ".metadata").open("wb") as stream:
        pickle.dump(metadata, stream)


def test_records_without_byte_order(tmp_path: Path) -> None:
    """As torch before 2.1 wrote them; set_default_load_endianness says how such records are to be read."""
    write_checkpoint(tmp_path, {"t": Entry.of(fill((20,), torch.int32))})
    rewrite_record(tmp_path, zipfile.ZIP_STORED, leave_out="byteorder")
    make = lambda: {"t": torch.zeros(20, dtype=torch.int32)}  # noqa: E731
    assert_same_load(tmp_path, make, fallback=None)
    before = torch.serialization.get_default_load_endianness()
    torch.serialization.set_default_load_endianness(torch.serialization.LoadEndianness.BIG)
    try:
        assert_same_load(tmp_path, make, fallback=None)
    finally:
        torch.serialization.set_default_load_endianness(before)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_records_of_another_zip_writer(tmp_path: Path, method: int) -> None:
    write_checkpoint(tmp_path, {"t": Entry.of(torch.arange(2000, dtype=torch.int32))})
    rewrite_record(tmp_path, method, leave_out="serialization_id")
    assert_same_load(tmp_path, lambda: {"t": torch.zeros(2000, dtype=torch.int32)}, fallback=None)
    assert_same_load(tmp_path, lambda: {"t": torch.zeros(2000, dtype=torch.int64)}, fallback=None)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    original = torch.save
    with mock.patch.object(torch, "save", lambda *a, **k: original(*a, **k, pickle_protocol=protocol)):
        save(tmp_path, {key: value for key, value in MIXED.items() if isinstance(value, torch.Tensor)})
    # torch.load(weights_only=True) knows the opcodes of protocols 2 and 3 only.
    raises = None if protocol < 4 else pickle.UnpicklingError
    make = lambda: {k: v for k, v in zeros().items() if isinstance(v, torch.Tensor)}  # noqa: E731
    assert_same_load(tmp_path, make, raises=raises)


def test_storage_infos_of_torch_2_4(tmp_path: Path) -> None:
    """Before extensions existed, _StorageInfo had no field for them."""
    save(tmp_path, MIXED)
    with (tmp_path / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    for info in metadata.storage_data.values():
        vars(info).pop("transform_descriptors", None)
    metadata.version = None
    del metadata.storage_meta
    with (tmp_path / ".metadata").open("wb") as stream:
        pickle.dump(metadata, stream)
    assert_same_load(tmp_path, zeros)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("wanted", "error"),
    [([((0,), 8)], AssertionError), ([((3,), 4)], RuntimeError), ([((7,), 1)], IndexError), ([((0,), 4)], None)],
)
def test_record_smaller_than_its_chunk(
    tmp_path: Path, wanted: list[tuple[tuple[int], int]], error: Any, legacy: bool, dtype: torch.dtype
) -> None:
    """The metadata promise 8 elements, the record holds 5; torch notices only what it needs."""
    write_checkpoint(tmp_path, {"t": Entry((8,), torch.int32, [((0,), fill((5,), torch.int32))], legacy=legacy)})
    with (tmp_path / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    metadata.state_dict_metadata["t"].chunks[0] = ChunkStorageMetadata(torch.Size([0]), torch.Size([8]))
    with (tmp_path / ".metadata").open("wb") as stream:
        pickle.dump(metadata, stream)
    shards = [torch.zeros(length, dtype=dtype) for _, length in wanted]
    make = lambda: {"t": ShardedBuffer.make((8,), [at for at, _ in wanted], [s.clone() for s in shards])}  # noqa: E731
    assert_same_load(tmp_path, make, raises=error, fallback=None)


# Keys of torch 2.3 and before, which flattened fewer containers.

OLD_STATE: Callable[[], dict[str, Any]] = lambda: {  # noqa: E731
    "model": {"weight": fill((4, 3), torch.float32), "nested": {"bias": fill((3,), torch.float32, 1)}},
    "options": {"lr": 0.5, "betas": [0.9, 0.99], "groups": [{"a": 1}, {"b": 2}]},
    "list": [fill((2,), torch.float32, 2), fill((3,), torch.float32, 3)],
    "step": 3,
}


def empty_old_state() -> dict[str, Any]:
    return {
        "model": {"weight": torch.zeros(4, 3), "nested": {"bias": torch.zeros(3)}},
        "options": {"lr": 0.0, "betas": [0.0, 0.0], "groups": [{"a": 0}, {"b": 0}]},
        "list": [torch.zeros(2), torch.zeros(3)],
        "step": 0,
    }


def save_old(path: Path, state_dict: dict[str, Any]) -> Path:
    with mock.patch.object(_version, "_derived_version", "2_3"):
        return save(path, state_dict)


def test_old_keys(tmp_path: Path) -> None:
    save_old(tmp_path, OLD_STATE())
    keys = filesystem.FileSystemReader(tmp_path).read_metadata().state_dict_metadata.keys()
    assert "options" in keys
    assert "options.lr" not in keys
    assert_same_load(tmp_path, empty_old_state)
    assert _version._derived_version is None


@pytest.mark.parametrize("partial", [True, False])
def test_old_keys_that_are_missing(tmp_path: Path, partial: bool) -> None:
    old = OLD_STATE()
    del old["model"]["nested"], old["step"]
    save_old(tmp_path, old)
    for planner in (dcp.DefaultLoadPlanner, dcp_fast.DefaultLoadPlanner):
        assert_same_load(
            tmp_path,
            empty_old_state,
            planner=lambda planner=planner: planner(allow_partial_load=partial),
            raises=None if partial else RuntimeError,
        )


def test_old_keys_with_new_ones_in_the_checkpoint_only(tmp_path: Path) -> None:
    save(tmp_path, OLD_STATE())
    make = lambda: {"model": empty_old_state()["model"], "step": 0}  # noqa: E731
    assert_same_load(tmp_path, make)


# Metadata of each rank on its own


def save_without_collectives(path: Path, state_dict: dict[str, Any]) -> None:
    dcp.save(
        state_dict,
        storage_writer=dcp.FileSystemWriter(path, sync_files=False),
        use_collectives=False,
    )


def test_rank_local_metadata(tmp_path: Path, gloo: None) -> None:
    path = tmp_path / "ckpt"
    save_without_collectives(path, MIXED)
    assert (path / "__0.metadata").exists()
    assert not (path / ".metadata").exists()
    assert_same_load(path, zeros)
    assert_same_load(path, lambda: {"large": torch.zeros(300, 301, dtype=torch.float16)})


def test_global_metadata_goes_first(tmp_path: Path, gloo: None) -> None:
    path = tmp_path / "ckpt"
    save_without_collectives(path, {"t": torch.full((5,), 1.0)})
    save(path, {"t": torch.full((5,), 2.0)}, single_file_per_rank=False)
    assert (path / "__0.metadata").exists()
    assert_same_load(path, lambda: {"t": torch.zeros(5)})


def test_no_metadata_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_same_load(tmp_path / "empty", lambda: {"t": torch.zeros(2)}, raises=AssertionError)
