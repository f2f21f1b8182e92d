"""Readers of others: served where it is proved that theirs comes to the same, and left alone where it is not."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from foreign_readers import STORED, report_of, torch_load_unswitched, zeros
from helpers import image, load_with
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageReaderTransforms
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

import dcp_fast
from dcp_fast._torch import fsspec_filesystem

# Local files by other names


@pytest.mark.parametrize("protocol", ["file", "local"])
def test_local_url(stored: Path, load: Any, protocol: str) -> None:
    state = zeros()
    report = report_of(load, state, checkpoint_id=f"{protocol}://{stored}")
    assert image(state) == image(STORED)
    assert report.records == 3
    assert report.is_fast


def test_our_own_arguments_hold_for_local_urls(stored: Path, tmp_path: Path) -> None:
    report = report_of(dcp_fast.load, zeros(), checkpoint_id=f"file://{stored}", trace=tmp_path / "load.json")
    assert (tmp_path / "load.json").exists()
    assert report.path == str(stored)


@pytest.mark.parametrize("path", ["ckpt", "./ckpt", "{}"])
def test_path_below_what_this_user_may_not_write(
    stored: Path, load: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stored.parent)
    path = path.format(stored)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert not dcp.FileSystemReader.validate_checkpoint_id(path), "torch hands it to fsspec"
    state = zeros()
    report = report_of(load, state, checkpoint_id=path)
    assert image(state) == image(STORED)
    assert report.records == 3
    assert report.is_fast


def test_fsspec_reader_of_local_files(stored: Path, load: Any) -> None:
    for path in (str(stored), f"file://{stored}", f"{stored}/"):
        state = zeros()
        report = report_of(load, state, storage_reader=fsspec_filesystem.FsspecReader(path))
        assert image(state) == image(STORED)
        assert report.records == 3
        assert report.reader.endswith("FsspecReader")
        assert report.is_fast


def test_fsspec_reader_of_other_files(stored: Path, load: Any) -> None:
    report = report_of(load, zeros(), storage_reader=fsspec_filesystem.FsspecReader(f"simplecache::file://{stored}"))
    assert "SimpleCacheFileSystem" in report.reader_fallback_reason
    assert report.bytes_read == 0


def test_fsspec_file_system_of_ones_own(stored: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    original = LocalFileSystem._open
    monkeypatch.setattr(LocalFileSystem, "_open", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    state = zeros()
    report = report_of(load, state, storage_reader=fsspec_filesystem.FsspecReader(str(stored)))
    assert image(state) == image(STORED)
    assert report.reader_fallback_reason


@pytest.mark.parametrize("damage", ["missing", "no data", "directory", "truncated", "no metadata"])
def test_errors_are_of_torchs_types(stored: Path, damage: str) -> None:
    data = next(stored.glob("*.distcp"))
    if damage == "missing":
        stored = stored / "missing"
    elif damage == "no metadata":
        (stored / ".metadata").unlink()
    elif damage == "truncated":
        data.write_bytes(data.read_bytes()[:-2000])
    else:
        data.unlink()
        if damage == "directory":
            data.mkdir()
    arguments: list[Callable[[], dict[str, Any]]] = [
        lambda: {"checkpoint_id": f"file://{stored}"},
        lambda: {"storage_reader": fsspec_filesystem.FsspecReader(str(stored))},
        lambda: {"storage_reader": dcp.FileSystemReader(stored)},
    ]
    for make in arguments:
        theirs = load_with(dcp.load, zeros(), **make()).errors
        assert theirs is not None
        for ours in (load_with(dcp_fast.load, zeros(), **make()), _installed(make)):
            assert ours.errors is not None
            assert isinstance(ours.errors[0], type(theirs[0])), f"{ours.errors[0]!r} instead of {theirs[0]!r}"


def _installed(make: Callable[[], dict[str, Any]]) -> Any:
    with dcp_fast.install():
        return load_with(dcp.load, zeros(), **make())


# Readers of torch's class


class Overrides(dcp.FileSystemReader):
    """Overrides what does not change which bytes are read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return LoadPlan([item for item in super().prepare_local_plan(plan).items if item.dest_index.fqn != "u"])

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        return super().read_data(LoadPlan(list(reversed(plan.items))), planner)


def test_reader_of_torch(stored: Path, load: Any) -> None:
    state = zeros()
    report = report_of(load, state, storage_reader=dcp.FileSystemReader(stored))
    assert image(state) == image(STORED)
    assert report.records == 3
    assert report.reader_fallback_reason == ""


def test_what_is_overridden_is_called(stored: Path) -> None:
    states = [zeros(), zeros()]
    dcp.load(states[0], storage_reader=Overrides(stored))
    with dcp_fast.install():
        report = report_of(dcp.load, states[1], storage_reader=Overrides(stored))
    assert image(states[1]) == image(states[0])
    assert not states[1]["u"].any()
    assert report.records == 2
    assert report.reader_fallback_reason == ""


class Adding(_StorageReaderTransforms):
    def transform_load_stream(self, read_item: Any, transform_descriptors: Any, raw_stream: IO[bytes]) -> IO[bytes]:
        changed = io.BytesIO()
        value = torch.load(io.BytesIO(raw_stream.read(-1)))
        torch.save([*value, 3] if isinstance(value, list) else value + 1, changed)
        changed.seek(0)
        return changed


class Inverting(FileSystem):
    def create_stream(self, path: Any, mode: str) -> Any:
        path = Path(path)
        return super().create_stream(path.with_name("other" + path.name) if "distcp" in path.name else path, mode)


def sliced(reader: Any) -> None:
    reader._slice_file = lambda file, info: type(reader)._slice_file(reader, file, replace(info, offset=info.offset))


def with_another_file_system(reader: Any) -> None:
    for file in reader.path.glob("*.distcp"):
        file.rename(file.with_name("other" + file.name))
    reader.fs = Inverting()


def with_patched_file_system(reader: Any) -> None:
    files = Inverting()
    with_another_file_system(reader)
    reader.fs = FileSystem()
    reader.fs.create_stream = files.create_stream


def with_transforms(reader: Any) -> None:
    reader.transforms = Adding()


def with_patched_transforms(reader: Any) -> None:
    reader.transforms.transform_load_stream = Adding().transform_load_stream


@pytest.mark.parametrize(
    "change", [sliced, with_another_file_system, with_patched_file_system, with_transforms, with_patched_transforms]
)
def test_what_reads_in_a_way_of_its_own_is_left_alone(stored: Path, load: Any, change: Callable[[Any], None]) -> None:
    reader = dcp.FileSystemReader(stored)
    change(reader)
    expected, state = zeros(), zeros()
    torch_load_unswitched(expected, reader)
    report = report_of(load, state, storage_reader=reader)
    assert image(state) == image(expected)
    assert report.reader_fallback_reason
    assert report.bytes_read == 0


def test_patched_class_of_torch(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = FileSystem.create_stream
    opened = []
    monkeypatch.setattr(
        FileSystem, "create_stream", lambda self, path, mode: opened.append(path) or original(self, path, mode)
    )
    report = report_of(dcp_fast.load, zeros(), storage_reader=dcp.FileSystemReader(stored))
    assert report.reader_fallback_reason
    assert opened
    # Who only names a checkpoint gets our reader all the same, which runs nothing.
    report = report_of(dcp_fast.load, zeros(), checkpoint_id=stored)
    assert report.reader == "dcp_fast.readers.filesystem.FileSystemReader"
    assert "reads through" in report.reader_fallback_reason
