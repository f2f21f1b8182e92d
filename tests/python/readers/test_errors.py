"""Damage ends in a typed error that names file, FQN and bytes; code that expects torch's error catches it too."""

from __future__ import annotations

import copy
import errno
import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from damage import (
    ACCIDENTS,
    STATE,
    archive,
    assert_facts,
    by_offset,
    check,
    fast_error,
    legacy_record,
    patch,
    record_parts,
    replace_record,
    resize_entry,
    save_state,
    set_storage,
    span,
    torch_error,
    wanted,
)
from helpers import ShardedBuffer
from torch.distributed.checkpoint._extension import ZStandard

import dcp_fast
from dcp_fast import _native, errors
from dcp_fast.errors import LoadError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_state(tmp_path / "checkpoint")


# Truncation


@pytest.mark.parametrize("entry", range(4))
@pytest.mark.parametrize("where", ["start", "first byte", "header", "payload", "middle", "directory", "last byte"])
def test_truncated_file(checkpoint: Path, entry: int, where: str) -> None:
    fqn, record = by_offset(checkpoint)[entry]
    parts = record_parts(record.read())
    cut = {
        "start": 0,
        "first byte": 1,
        "header": parts["data.pkl"] + 5,
        "payload": parts.get("data/0", parts["data.pkl"]),
        "middle": record.length // 2,
        "directory": parts["directory"],
        "last byte": record.length - 1,
    }[where]
    os.truncate(record.path, record.offset + cut)
    # torch takes the first byte of an archive for a pickle of its own old format.
    accident = pickle.UnpicklingError if where == "first byte" else ()
    check(checkpoint, dcp_fast.TruncatedFileError, fqn, within=record, accident=accident)


def test_only_what_is_needed_must_be_there(checkpoint: Path) -> None:
    (fqn, _), (_, cut), *_ = by_offset(checkpoint)
    os.truncate(cut.path, cut.offset)
    assert fqn == "value.step"
    assert fast_error(checkpoint, {"value": {"step": 0}}) is None


def test_empty_record(checkpoint: Path) -> None:
    set_storage(checkpoint, "large", length=0)
    check(checkpoint, dcp_fast.TruncatedFileError, "large")


@pytest.mark.parametrize("missing", [1, 22, 98, 1000, 100_000])
def test_metadata_that_cuts_a_record_short(checkpoint: Path, missing: int) -> None:
    record = span(checkpoint, "large")
    set_storage(checkpoint, "large", length=record.length - missing)
    check(checkpoint, dcp_fast.CorruptCheckpointError, "large", within=record)


def test_metadata_that_starts_a_record_elsewhere(checkpoint: Path) -> None:
    record = span(checkpoint, "large")
    set_storage(checkpoint, "large", offset=record.offset - 1)
    check(checkpoint, dcp_fast.CorruptPickleError, "large", within=span(checkpoint, "large"))


# Damage within a record: position, what stands there instead


STRUCTURE = {
    "end record": ("end", 0, b"\0\0\0\0"),
    "zip64 end record": ("end64", 24, b"\xff" * 8),
    "zip64 directory size": ("end64", 40, b"\xff" * 8),
    "zip64 directory offset": ("end64", 48, b"\xff" * 8),
    "directory signature": ("directory", 0, b"\0\0\0\0"),
    "directory encryption": ("directory", 8, b"\x01"),
    "directory name": ("directory", 46, b"\0"),
    "directory header offset": ("directory", 42, b"\xff\xff\xff\x7f"),
    "byteorder signature": ("byteorder header", 0, b"\0\0\0\0"),
    "payload signature": ("data/0 header", 0, b"\0\0\0\0"),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_corrupt_archive(checkpoint: Path, name: str) -> None:
    part, shift, data = STRUCTURE[name]
    record = span(checkpoint, "large")
    patch(record.path, record.offset + record_parts(record.read())[part] + shift, data)
    check(checkpoint, dcp_fast.CorruptCheckpointError, "large", within=record)


def test_compressed_entry(checkpoint: Path) -> None:
    """torch inflates what is not deflated; what it finds then differs from run to run."""
    record = span(checkpoint, "large")
    patch(record.path, record.offset + record_parts(record.read())["directory"] + 10, b"\x08")
    error = fast_error(checkpoint, wanted())
    assert isinstance(error, dcp_fast.CorruptCheckpointError)
    assert_facts(error, type(error), record.path, "large", record)


@pytest.mark.parametrize("shift", [1, -1, 2, 4, 8, -8, 16, 64, 100])
def test_payload_that_its_header_shifts(checkpoint: Path, shift: int) -> None:
    """The length of the header's padding decides where the payload starts; torch believes any."""
    record = span(checkpoint, "large")
    at = record_parts(record.read())["data/0 header"] + 28
    padding = int.from_bytes(record.read()[at : at + 2], "little")
    patch(record.path, record.offset + at, (padding + shift).to_bytes(2, "little"))
    check(checkpoint, dcp_fast.CorruptCheckpointError, "large", within=record, torch_loads=True)


@pytest.mark.parametrize("shift", [0, 3, 20, 60, 100, 140])
def test_corrupt_pickle(checkpoint: Path, shift: int) -> None:
    record = span(checkpoint, "large")
    at = record_parts(record.read())["data.pkl"] + shift
    patch(record.path, record.offset + at, bytes([record.read()[at] ^ 0x55]))
    theirs = torch_error(checkpoint, wanted())
    assert isinstance(theirs, (pickle.UnpicklingError, *ACCIDENTS)), theirs
    check(checkpoint, dcp_fast.CorruptPickleError, "large", within=record)


def test_corrupt_pickle_that_torch_believes(checkpoint: Path) -> None:
    """Only the checksum tells that another offset into the storage was stored."""
    record = span(checkpoint, "large")
    data = record.read()
    parts = record_parts(data)
    pickled = data[parts["data.pkl"] : parts[".format_version header"]]
    at = pickled.index(b"K\x00M\x2c\x01")  # storage offset 0, then the size 300
    patch(record.path, record.offset + parts["data.pkl"] + at + 3, b"\x2b")
    resize_entry(checkpoint, "large", (299, 100))
    state = {"large": torch.zeros(299, 100)}
    check(checkpoint, dcp_fast.CorruptPickleError, "large", within=record, torch_loads=True, state=state)


@pytest.mark.parametrize("missing", [4, 1, 119_996, 120_000])
def test_storage_shorter_than_its_pickle_says(checkpoint: Path, missing: int) -> None:
    data = span(checkpoint, "large").read()
    parts = record_parts(data)
    pickled = data[parts["data.pkl"] : parts["data.pkl"] + len(pickled_of(STATE["large"]))]
    storage = data[parts["data/0"] : parts["data/0"] + 120_000]
    assert storage == STATE["large"].numpy().tobytes()
    replace_record(checkpoint, "large", archive(pickled, storage))
    assert fast_error(checkpoint, wanted()) is None
    replace_record(checkpoint, "large", archive(pickled, storage[:-missing]))
    check(checkpoint, dcp_fast.CorruptCheckpointError, "large", within=span(checkpoint, "large"))


def pickled_of(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    with zipfile.ZipFile(stream) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


# Sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(301, 100), (300, 101), (400, 200), (30_000,), (1, 1, 1), (300, 100, 1)])
def test_stored_tensor_of_another_size(checkpoint: Path, size: tuple[int, ...], dtype: torch.dtype) -> None:
    resize_entry(checkpoint, "large", size)
    state = {"large": torch.zeros(size, dtype=dtype)}
    check(checkpoint, dcp_fast.SizeMismatchError, "large", within=span(checkpoint, "large"), state=state)


@pytest.mark.parametrize("size", [(299, 100), (1, 99), (30,)])
def test_smaller_chunk_takes_the_first_elements_as_in_torch(checkpoint: Path, size: tuple[int, ...]) -> None:
    resize_entry(checkpoint, "large", size)
    ours, theirs = {"large": torch.zeros(size)}, {"large": torch.zeros(size)}
    errors_ = fast_error(checkpoint, ours), torch_error(checkpoint, theirs)
    if errors_[1] is None:
        assert errors_[0] is None
        assert torch.equal(ours["large"].view(torch.uint8), theirs["large"].view(torch.uint8))
    else:
        assert isinstance(errors_[0], (dcp_fast.SizeMismatchError, type(errors_[1])))


@pytest.mark.parametrize("start", [290, 350])
@pytest.mark.parametrize("fallback", [False, True])
def test_box_beyond_the_stored_tensor(checkpoint: Path, start: int, fallback: bool) -> None:
    """Rows past the end of a chunk that has, the metadata says, 400 rows."""
    if fallback:
        replace_record(checkpoint, "large", legacy_record(STATE["large"]))
    resize_entry(checkpoint, "large", (400, 100))
    state = {"large": ShardedBuffer.make((400, 100), [(start, 0)], [torch.zeros(50, 100)])}
    check(checkpoint, dcp_fast.SizeMismatchError, "large", within=span(checkpoint, "large"), state=state)


def test_fallback_tensor_of_another_size(checkpoint: Path) -> None:
    replace_record(checkpoint, "large", legacy_record(STATE["large"]))
    assert fast_error(checkpoint, wanted()) is None
    resize_entry(checkpoint, "large", (400, 100))
    state = {"large": torch.zeros(400, 100)}
    check(checkpoint, dcp_fast.SizeMismatchError, "large", within=span(checkpoint, "large"), state=state)


# Transforms


@pytest.fixture
def zstd_checkpoint(tmp_path: Path) -> Path:
    pytest.importorskip("zstandard")
    return save_state(tmp_path / "zstd", _extensions=[ZStandard()])


@pytest.mark.parametrize("descriptor", ["stream.unknown/1", "stream.zstd/2", "", "stream.zstd"])
@pytest.mark.parametrize("fqn", ["large", "value.step"])
def test_unknown_transform(checkpoint: Path, descriptor: str, fqn: str) -> None:
    set_storage(checkpoint, fqn, transform_descriptors=[descriptor])
    theirs = torch_error(checkpoint, wanted())
    ours = fast_error(checkpoint, wanted())
    assert isinstance(theirs, ValueError)
    assert isinstance(ours, ValueError)
    assert isinstance(ours, dcp_fast.CorruptCheckpointError)
    assert_facts(ours, type(ours), span(checkpoint, fqn).path, fqn, span(checkpoint, fqn))


@pytest.mark.parametrize("fqn", ["large", "value.step"])
@pytest.mark.parametrize("at", [0, 4])
def test_undecodable_zstd(zstd_checkpoint: Path, fqn: str, at: int) -> None:
    record = span(zstd_checkpoint, fqn)
    assert fast_error(zstd_checkpoint, wanted()) is None
    patch(record.path, record.offset + at, b"\xff\xff\xff\xff")
    theirs = torch_error(zstd_checkpoint, wanted())
    assert type(theirs).__name__ in ("ZstdError", "UnpicklingError", "RuntimeError"), repr(theirs)
    ours = fast_error(zstd_checkpoint, wanted())
    assert isinstance(ours, dcp_fast.CorruptCheckpointError)
    assert_facts(ours, type(ours), record.path, fqn, record)


@pytest.mark.parametrize("kept", [0, 1, 8, 100])
def test_zstd_cut_short(zstd_checkpoint: Path, kept: int) -> None:
    record = span(zstd_checkpoint, "large")
    set_storage(zstd_checkpoint, "large", length=kept)
    theirs = torch_error(zstd_checkpoint, wanted())
    assert theirs is not None
    ours = fast_error(zstd_checkpoint, wanted())
    assert isinstance(ours, dcp_fast.CorruptCheckpointError)
    assert isinstance(theirs, ACCIDENTS) or isinstance(ours, type(theirs)), f"{ours!r} instead of {theirs!r}"
    assert_facts(ours, type(ours), record.path, "large", record)


# The classes


CLASSES = [getattr(errors, name) for name in errors.__all__]
BASES = {
    "LoadError": (Exception,),
    "CorruptCheckpointError": (RuntimeError,),
    "CorruptPickleError": (RuntimeError, pickle.UnpicklingError),
    "TruncatedFileError": (RuntimeError, EOFError),
    "SizeMismatchError": (AssertionError,),
    "OutOfMemoryError": (MemoryError,),
    "FileAccessError": (OSError,),
    "FileMissingError": (FileNotFoundError,),
    "NotAFileError": (IsADirectoryError,),
    "FilePermissionError": (PermissionError,),
}


def test_every_class_is_public_and_has_the_bases_of_what_torch_raises() -> None:
    for cls in CLASSES:
        assert getattr(dcp_fast, cls.__name__) is cls
        assert issubclass(cls, LoadError)
    for name, bases in BASES.items():
        assert issubclass(getattr(dcp_fast, name), bases[0])
        assert issubclass(getattr(dcp_fast, name), bases[-1])


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_classes_survive_pickling_and_copying(cls: type[LoadError], protocol: int) -> None:
    for arguments in [("why",), ("why", "/a/file", "an.fqn", 7, 5, errno.EIO), ("why", "/a\udcff", "\u00e9", 0, 0, 0)]:
        error = cls(*arguments)
        for twin in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
            assert type(twin) is cls
            assert vars(twin) == vars(error)
            assert (str(twin), twin.args) == (str(error), error.args)
            if isinstance(error, OSError):
                facts = error.errno, error.strerror, error.filename
                assert (twin.errno, twin.strerror, twin.filename) == facts  # type: ignore[attr-defined]


def test_message_has_all_facts() -> None:
    error = dcp_fast.FileAccessError("cannot read", "/a/file", "an.fqn", 7, 5, errno.EIO)
    assert str(error) == "cannot read; FQN 'an.fqn'; file '/a/file'; bytes 7 to 12; EIO (5)"
    assert str(LoadError("why")) == "why"


def test_error_of_one_load_is_not_in_the_next(checkpoint: Path) -> None:
    state = wanted()
    with _native.FaultInjection("pread", nth=1, error_number=errno.EIO):
        assert isinstance(fast_error(checkpoint, state), dcp_fast.FileAccessError)
    assert fast_error(checkpoint, state) is None
    for fqn in ("small", "half", "large"):
        assert torch.equal(state[fqn].view(torch.uint8), STATE[fqn].view(torch.uint8))
