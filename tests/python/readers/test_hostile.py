"""Records and metadata that no writer wrote: they must not run code, take memory or stop the process."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import (
    ACCIDENTS,
    STATE,
    Span,
    archive,
    assert_facts,
    check,
    edit_metadata,
    fast_error,
    limit_address_space,
    limited,
    patch,
    peak_memory,
    replace_record,
    reset_peak_memory,
    run_child,
    save_state,
    set_storage,
    span,
    torch_error,
    wanted,
)
from torch.distributed.checkpoint._extension import ZStandard

import dcp_fast
from dcp_fast.errors import LoadError

MIB = 1 << 20


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_state(tmp_path / "checkpoint")


@pytest.fixture
def zstd_checkpoint(tmp_path: Path) -> Path:
    pytest.importorskip("zstandard")
    return save_state(tmp_path / "zstd", _extensions=[ZStandard()])


def record_of(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


# Records that are whole, but not what belongs there


@pytest.mark.parametrize("value", [{"a": 1}, [], None, 5, "text", torch.float32, [torch.zeros(300, 100)]])
def test_record_without_a_tensor(checkpoint: Path, value: Any) -> None:
    replace_record(checkpoint, "large", record_of(value))
    check(checkpoint, dcp_fast.CorruptCheckpointError, "large", within=span(checkpoint, "large"))


@pytest.mark.parametrize("record", [b"\0", b"text", b"\x80\x02N.", b"PK\x03\x04" + b"\0" * 100, bytes(5000)])
def test_record_that_is_no_archive(checkpoint: Path, record: bytes) -> None:
    replace_record(checkpoint, "large", record)
    ours = fast_error(checkpoint, wanted())
    theirs = torch_error(checkpoint, wanted())
    assert theirs is not None
    assert isinstance(ours, dcp_fast.CorruptCheckpointError)
    assert isinstance(theirs, ACCIDENTS) or isinstance(ours, type(theirs)), f"{ours!r} instead of {theirs!r}"
    assert_facts(ours, type(ours), span(checkpoint, "large").path, "large", span(checkpoint, "large"))


def test_record_that_weights_only_refuses(checkpoint: Path) -> None:
    replace_record(checkpoint, "large", record_of(Span(Path(), 0, 0)))
    check(checkpoint, dcp_fast.CorruptPickleError, "large", within=span(checkpoint, "large"))


# Pickles


class Call:
    """Pickles into a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def tensor_pickle(
    *, storage: str = "(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ", size: str = "(I4\nt"
) -> bytes:
    """A tensor's pickle in the text opcodes, with parts replaced."""
    text = f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I0\n{size}(I1\ntI00\nccollections\nOrderedDict\n(tRtR."
    return b"\x80\x02" + text.encode()


def executing_pickles(marker: Path) -> dict[str, bytes]:
    command = f"touch {marker}"
    calls = {
        "os.system": Call(os.system, command),
        "eval": Call(eval, f"__import__('os').system({command!r})"),
        "open": Call(open, str(marker), "w"),
        "nested": [1, {"a": (Call(os.system, command),)}],
    }
    pickles = {name: pickle.dumps(call, 2) for name, call in calls.items()}
    pickles["stack global"] = (
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command.encode() + b"\x85R."
    )
    pickles["instance"] = f"(S'{command}'\nios\nsystem\n.".encode()
    pickles["object"] = f"(cos\nsystem\nS'{command}'\no.".encode()
    in_tensor = f"(cos\nsystem\nS'{command}'\no"
    pickles["storage of a tensor"] = tensor_pickle(storage=in_tensor)
    pickles["size of a tensor"] = tensor_pickle(size=in_tensor)
    return pickles


class TrustingUnpickler(pickle.Unpickler):
    """Does what a pickle says. The method is of the class, since Python 3.13.0 refuses one of an instance."""

    def persistent_load(self, pid: Any) -> None:
        """There are no storages."""


@pytest.mark.parametrize("name", executing_pickles(Path("unused")))
@pytest.mark.parametrize("form", ["archive", "bare"])
def test_pickle_that_runs_code(checkpoint: Path, tmp_path: Path, name: str, form: str) -> None:
    marker = tmp_path / "executed"
    pickled = executing_pickles(marker)[name]
    replace_record(checkpoint, "large", archive(pickled, bytes(16)) if form == "archive" else pickled)
    error = fast_error(checkpoint, wanted())
    assert not marker.exists()
    assert isinstance(error, dcp_fast.CorruptCheckpointError)
    assert_facts(error, type(error), span(checkpoint, "large").path, "large", span(checkpoint, "large"))
    with contextlib.suppress(Exception):  # the proof that the pickle would
        TrustingUnpickler(io.BytesIO(pickled)).load()
    assert marker.exists()


NESTED = {
    "tuples": b"\x80\x02" + b")" + b"\x85" * 200_000 + b".",
    "lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "marks": b"\x80\x02" + b"(" * 200_000 + b".",
    "tuples of the same": b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 4000 + b".",
    "long text": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "long number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "long bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f.",
    "frame": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f0.",
    "empty": b"",
    "no end": b"\x80\x02N",
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("form", ["archive", "bare"])
def test_pickle_bomb(checkpoint: Path, name: str, form: str) -> None:
    pickled = NESTED[name]
    replace_record(checkpoint, "large", archive(pickled, bytes(16)) if form == "archive" else pickled)
    resident = reset_peak_memory()
    with limited(20):
        error = fast_error(checkpoint, wanted())
    assert isinstance(error, (dcp_fast.CorruptCheckpointError, dcp_fast.OutOfMemoryError))
    assert_facts(error, type(error), span(checkpoint, "large").path, "large", span(checkpoint, "large"))
    assert peak_memory() - resident < 100 * MIB


# Sizes that are claimed


def giant(checkpoint: Path, fqn: str, kind: str) -> type[LoadError]:
    """Claim a terabyte for a record; what the load must raise."""
    record = span(checkpoint, fqn)
    if kind == "past the end":
        set_storage(checkpoint, fqn, length=1 << 40)
        return dcp_fast.TruncatedFileError
    os.truncate(record.path, 1 << 40)  # takes no space: a hole
    set_storage(checkpoint, fqn, length=(1 << 40) - record.offset)
    return dcp_fast.OutOfMemoryError


def _load_with_little_memory(report: Callable[[Any], None], path: Path, extra: int) -> tuple[BaseException | None, int]:
    """The error of a load, and how much memory it took."""
    assert fast_error(path.parent / "pristine", wanted()) is None
    limit_address_space(extra)
    resident = reset_peak_memory()
    error = fast_error(path, wanted())
    return error, peak_memory() - resident


@pytest.mark.parametrize("kind", ["past the end", "hole"])
@pytest.mark.parametrize("fqn", ["large", "value.step"])
def test_giant_record(checkpoint: Path, fqn: str, kind: str) -> None:
    record = span(checkpoint, fqn)
    expected = giant(checkpoint, fqn, kind)
    save_state(checkpoint.parent / "pristine")
    error, memory = run_child(_load_with_little_memory, checkpoint, 2 << 30)
    assert_facts(error, expected, record.path, fqn, None)
    assert memory < 100 * MIB


def test_giant_zstd_record(zstd_checkpoint: Path) -> None:
    import zstandard

    compressor = zstandard.ZstdCompressor().compressobj()
    bomb = b"".join(compressor.compress(bytes(64 * MIB)) for _ in range(24)) + compressor.flush()
    assert len(bomb) < MIB
    replace_record(zstd_checkpoint, "large", bomb)
    save_state(zstd_checkpoint.parent / "pristine")
    error, _ = run_child(_load_with_little_memory, zstd_checkpoint, 1 << 30)
    record = span(zstd_checkpoint, "large")
    assert_facts(error, dcp_fast.OutOfMemoryError, record.path, "large", record)


def deflated(value: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, data in (("data.pkl", value), ("byteorder", b"little"), ("data/0", bytes(16)), ("version", b"3\n")):
            file.writestr(f"archive/{name}", data)
    return stream.getvalue()


def test_zip_bomb(checkpoint: Path) -> None:
    """A pickle of half a gigabyte, deflated to half a megabyte."""
    save_state(checkpoint.parent / "pristine")
    record = deflated(b"\x80\x02X" + struct.pack("<I", 1 << 29) + bytes(1 << 29) + b".")
    assert len(record) < 4 * MIB
    replace_record(checkpoint, "large", record)
    error, _ = run_child(_load_with_little_memory, checkpoint, 1 << 29)
    assert isinstance(error, LoadError)
    assert_facts(error, type(error), span(checkpoint, "large").path, "large", span(checkpoint, "large"))


@pytest.mark.parametrize("at", ["size", "stored size"])
def test_directory_that_claims_a_giant_entry(checkpoint: Path, at: str) -> None:
    record = span(checkpoint, "large")
    data = record.read()
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        position = file.start_dir
    name = b"archive/data/0"
    position = data.index(name, position) - 46
    patch(record.path, record.offset + position + (24 if at == "size" else 20), b"\xfe\xff\xff\xff")
    resident = reset_peak_memory()
    check(checkpoint, dcp_fast.CorruptCheckpointError, "large", within=record)
    assert peak_memory() - resident < 100 * MIB


@pytest.mark.parametrize("size", [(1 << 40,), (1 << 62, 4), (1 << 31, 1 << 31), (0, 1 << 62)])
def test_pickle_that_claims_a_giant_tensor(checkpoint: Path, size: tuple[int, ...]) -> None:
    text = "(" + "".join(f"L{n}L\n" for n in size) + "t"
    record = archive(tensor_pickle(size=text), bytes(16))
    replace_record(checkpoint, "large", record)
    error = fast_error(checkpoint, wanted())
    assert isinstance(error, LoadError)
    assert_facts(error, type(error), span(checkpoint, "large").path, "large", span(checkpoint, "large"))


# Storage data


NUMBERS = [-1, -(1 << 62), -(1 << 63), (1 << 62), (1 << 63) - 1]


@pytest.mark.parametrize("fqn", ["large", "small", "value.step"])
@pytest.mark.parametrize("offset", NUMBERS)
@pytest.mark.parametrize("length", [None, -1, (1 << 63) - 1])
def test_offset_outside_of_the_file(checkpoint: Path, fqn: str, offset: int, length: int | None) -> None:
    values = {"offset": offset} if length is None else {"offset": offset, "length": length}
    set_storage(checkpoint, fqn, **values)
    assert torch_error(checkpoint, wanted()) is not None
    with limited(20):
        error = fast_error(checkpoint, wanted())
    assert isinstance(error, dcp_fast.CorruptCheckpointError)
    assert (error.path, error.fqn) == (str(span(checkpoint, fqn).path), fqn)
    assert error.offset == (offset if offset >= 0 else None)


@pytest.mark.parametrize("fqn", ["large", "small", "value.step"])
@pytest.mark.parametrize("length", [*NUMBERS, 1 << 40])
def test_length_outside_of_the_file(checkpoint: Path, fqn: str, length: int) -> None:
    """torch reads on to the end of the file, and through the other records if need be."""
    set_storage(checkpoint, fqn, length=length)
    with limited(20):
        error = fast_error(checkpoint, wanted())
    assert isinstance(error, dcp_fast.CorruptCheckpointError)
    assert (error.path, error.fqn) == (str(span(checkpoint, fqn).path), fqn)
    assert error.length == (length if length >= 0 else None)


@pytest.mark.parametrize("field", ["offset", "length"])
@pytest.mark.parametrize("value", [1 << 63, -(1 << 70), 1.5, "1"])
def test_storage_data_of_other_types(checkpoint: Path, field: str, value: Any) -> None:
    set_storage(checkpoint, "large", **{field: value})
    with limited(20):
        error = fast_error(checkpoint, wanted())
    assert isinstance(error, (LoadError, OverflowError, TypeError))


def test_entries_that_overlap(checkpoint: Path) -> None:
    """Two tensors in one record are read as they are: it is what metadata of tied tensors may say."""
    record = span(checkpoint, "large")
    set_storage(checkpoint, "small", offset=record.offset, length=record.length)
    ours, theirs = wanted(), wanted()
    assert (fast_error(checkpoint, ours), torch_error(checkpoint, theirs)) == (None, None)
    for fqn in ("small", "large", "half"):
        assert torch.equal(ours[fqn].view(torch.uint8), theirs[fqn].view(torch.uint8))
    assert torch.equal(ours["small"].view(torch.uint8), STATE["large"][:4, :4].view(torch.uint8))


def test_record_that_starts_within_another(checkpoint: Path) -> None:
    """A whole record stored as the payload of another one."""
    inner = record_of(STATE["large"])
    outer = record_of(torch.frombuffer(bytearray(inner), dtype=torch.uint8))
    replace_record(checkpoint, "half", outer)
    at = span(checkpoint, "half").offset + outer.index(inner)
    set_storage(checkpoint, "large", offset=at, length=len(inner))
    state = {"large": torch.zeros(300, 100)}
    assert fast_error(checkpoint, state) is None
    assert torch.equal(state["large"].view(torch.uint8), STATE["large"].view(torch.uint8))


def test_missing_storage_data(checkpoint: Path) -> None:
    with edit_metadata(checkpoint) as metadata:
        index = next(index for index in metadata.storage_data if index.fqn == "large")
        del metadata.storage_data[index]
    theirs, ours = torch_error(checkpoint, wanted()), fast_error(checkpoint, wanted())
    assert isinstance(theirs, KeyError)
    assert isinstance(ours, KeyError)
    assert "large" in str(ours)


def test_file_name_with_a_nul(checkpoint: Path) -> None:
    """What follows the NUL must not be dropped: another file would be read than the metadata names."""
    name = span(checkpoint, "large").path.name
    set_storage(checkpoint, "large", relative_path=f"{name}\0.other")
    assert isinstance(torch_error(checkpoint, wanted()), ValueError)
    assert fast_error(checkpoint, wanted()) is not None


def test_directory_whose_name_is_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    save_state(path)
    state = wanted()
    assert fast_error(path, state) is None
    assert torch.equal(state["large"].view(torch.uint8), STATE["large"].view(torch.uint8))
    os.truncate(span(path, "large").path, 100)
    error = fast_error(path, {"large": torch.zeros(300, 100)})
    assert isinstance(error, dcp_fast.TruncatedFileError)
    assert error.path == str(span(path, "large").path)
