"""Readers with a read_data of their own, which the engine serves if it is told to and nothing is in doubt."""

from __future__ import annotations

import builtins
import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from foreign_readers import STORED, Foreign, Info, report_of, zeros
from helpers import Entry, image, load_with, torch_load, write_checkpoint
from torch.distributed.checkpoint.metadata import Metadata

import dcp_fast


def test_reader_of_others_says_why_it_is_slow(stored: Path, load: Any) -> None:
    state = zeros()
    report = report_of(load, state, storage_reader=Foreign(stored))
    assert image(state) == image(STORED)
    assert report.reader.endswith("Foreign")
    assert "read_data of its own" in report.reader_fallback_reason
    assert report.seconds["transfer"] > 0


@pytest.mark.parametrize("as_text", [False, True])
def test_accelerated_reader(stored: Path, load: Any, as_text: bool) -> None:
    reader = Foreign(str(stored) if as_text else stored)
    assert dcp_fast.accelerate(reader) is reader
    state = zeros()
    report = report_of(load, state, storage_reader=reader)
    assert image(state) == image(STORED)
    assert reader.reads == 0
    assert report.records == 3
    assert report.reader.endswith("Foreign")
    assert report.reader_fallback_reason == ""


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda reader: pickle.loads(pickle.dumps(reader))])
def test_copies_of_an_accelerated_reader(stored: Path, tmp_path: Path, copied: Callable[[Any], Any]) -> None:
    """They read what they are for, by themselves."""
    others = {name: torch.full_like(value, 7) if name != "n" else 5 for name, value in STORED.items()}
    dcp.save(dict(others), checkpoint_id=tmp_path, no_dist=True)
    own = Foreign(stored)
    del own.infos  # a function of no name
    reader = dcp_fast.accelerate(own)
    other = copied(reader)
    assert type(other) is Foreign
    for each in (reader, other):
        each.infos = Foreign(stored).infos
    state = zeros()
    other.reset(tmp_path)
    assert report_of(dcp_fast.load, state, storage_reader=other).reader_fallback_reason != ""
    assert image(state) == image(others)
    assert dcp_fast.accelerate(dcp_fast.accelerate(other)) is other
    for each, expected in ((other, others), (reader, STORED)):
        state = zeros()
        assert report_of(dcp_fast.load, state, storage_reader=each).reader_fallback_reason == ""
        assert image(state) == image(expected)
    assert other.reads == 1
    assert reader.reads == 0


class OwnReduce(Foreign):
    def __reduce__(self) -> Any:
        return type(self), (self.path,)


class Forwarding(Foreign):
    """Hands on what it is given to another reader."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "inner":
            object.__setattr__(self, name, value)
        else:
            setattr(self.inner, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "inner"), name)

    def __init__(self, path: Any) -> None:
        self.inner = Foreign(path)


def test_readers_with_ways_of_their_own(stored: Path) -> None:
    reader = dcp_fast.accelerate(OwnReduce(stored))
    for other in (copy.copy(reader), copy.deepcopy(reader), pickle.loads(pickle.dumps(reader))):
        assert type(other) is OwnReduce
    forwarding = Forwarding(stored)
    inner = forwarding.inner
    assert dcp_fast.accelerate(forwarding) is forwarding
    assert type(inner) is Foreign
    for each in (reader, forwarding):
        state = zeros()
        assert report_of(dcp_fast.load, state, storage_reader=each).reader_fallback_reason == ""
        assert image(state) == image(STORED)


def test_reader_with_a_read_data_beside_that_of_its_class(stored: Path) -> None:
    reader = Foreign(stored)
    reader.read_data = reader.read_data  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="beside that of its class"):
        dcp_fast.accelerate(reader)


@dataclass(slots=True)
class SlotsInfo:
    relative_path: str
    offset: int
    length: int


class TupleInfo(NamedTuple):
    relative_path: str
    offset: int
    length: int


class MoreInfo(NamedTuple):
    relative_path: str
    offset: int
    length: int
    key: str = ""


@pytest.mark.parametrize(("kind", "is_known"), [(SlotsInfo, True), (TupleInfo, True), (MoreInfo, False)])
def test_storage_infos_without_attributes(stored: Path, kind: Any, is_known: bool) -> None:
    reader = dcp_fast.accelerate(Foreign(stored))
    reader.infos = lambda info: kind(info.relative_path, info.offset, info.length)
    state = zeros()
    report = report_of(dcp_fast.load, state, storage_reader=reader)
    assert image(state) == image(STORED)
    assert report.reader_fallback_reason == (
        "" if is_known else f"a {__name__}.MoreInfo in its storage_data says more than where a record lies"
    )


def test_accelerated_class(stored: Path) -> None:
    own = Foreign.read_data

    class Derived(Foreign):
        pass

    kept = Derived(stored)
    for cls in (Foreign, Derived):
        with dcp_fast.install(accelerate=[cls]):
            for reader in (kept, Derived(stored)):
                state = zeros()
                report = report_of(dcp.load, state, storage_reader=reader)
                assert image(state) == image(STORED)
                assert reader.reads == 0
                assert report.reader_fallback_reason == ""
                assert "read_metadata of its own" in report.metadata_fallback_reason
        assert Foreign.read_data is own
        assert "read_data" not in vars(Derived)
    dcp.load(zeros(), storage_reader=kept)
    assert kept.reads == 1


@pytest.mark.parametrize("wrong", [[Foreign("x")], [int], ["Foreign"]])
def test_only_classes_of_readers_can_be_accelerated(wrong: Any) -> None:
    with pytest.raises(TypeError, match="accelerate takes classes"):
        dcp_fast.install(accelerate=wrong)
    assert not hasattr(dcp.load, "__globals__") or "dcp_fast" not in dcp.load.__globals__["__name__"]


def test_accelerated_reader_with_hooks(stored: Path) -> None:
    class Planner(dcp.DefaultLoadPlanner):
        committed: list[str]

        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            self.committed.append(read_item.dest_index.fqn)

    planner = Planner()
    planner.committed = []
    reader = dcp_fast.accelerate(Foreign(stored))
    state = zeros()
    report = report_of(dcp_fast.load, state, storage_reader=reader, planner=planner)
    assert image(state) == image(STORED)
    assert sorted(planner.committed) == ["t", "u"]
    assert reader.reads == 0
    assert "its hooks change what it keeps" in report.planner_fallback_reason


@dataclass
class CompressedInfo(Info):
    compression: str = ""


@dataclass
class TransformedInfo(Info):
    transform_descriptors: Any = ("zstd",)


def renamed(reader: Foreign) -> None:
    for file in Path(reader.path).glob("*.distcp"):
        file.rename(file.with_suffix(".bin"))
    reader.infos = lambda info: Info(info.relative_path.replace("distcp", "bin"), info.offset, info.length)


def elsewhere(reader: Foreign) -> None:
    reader.infos = lambda info: Info(f"../ckpt/{info.relative_path}", info.offset, info.length)


def absolute(reader: Foreign) -> None:
    path = str(reader.path)
    reader.infos = lambda info: Info(f"{path}/{info.relative_path}", info.offset, info.length)
    reader.record = lambda info: Path(info.relative_path).read_bytes()[info.offset : info.offset + info.length]  # type: ignore[method-assign]


def encrypted(reader: Foreign) -> None:
    for file in Path(reader.path).glob("*.distcp"):
        file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    record = reader.record
    reader.record = lambda info: bytes(byte ^ 1 for byte in record(info))  # type: ignore[method-assign]


def with_url(reader: Foreign) -> None:
    path = reader.path
    read_metadata = reader.read_metadata

    def read() -> Metadata:
        reader.path = path
        metadata = read_metadata()
        reader.path = f"file://{path}"
        return metadata

    reader.read_metadata = read  # type: ignore[method-assign]
    reader.record = (
        lambda info: Path(f"{path}/{info.relative_path}").read_bytes()[  # type: ignore[method-assign]
            info.offset : info.offset + info.length
        ]
    )


def compressed(reader: Foreign) -> None:
    reader.infos = lambda info: CompressedInfo(info.relative_path, info.offset, info.length)


def transformed(reader: Foreign) -> None:
    reader.infos = lambda info: TransformedInfo(info.relative_path, info.offset, info.length)


@pytest.mark.parametrize(
    "change", [renamed, elsewhere, absolute, encrypted, with_url, compressed, transformed], ids=lambda c: c.__name__
)
def test_reader_in_doubt_reads_itself(stored: Path, load: Any, change: Callable[[Foreign], None]) -> None:
    reader = Foreign(stored)
    change(reader)
    reader = dcp_fast.accelerate(reader)
    state = zeros()
    report = report_of(load, state, storage_reader=reader)
    assert image(state) == image(STORED)
    assert reader.reads == 1
    assert report.reader_fallback_reason


@pytest.mark.parametrize("kind", ["legacy", "other dtype"])
def test_records_that_the_engine_does_not_know(tmp_path: Path, kind: str) -> None:
    values = {
        "legacy": Entry.of(torch.ones(3), legacy=True),
        "other dtype": Entry((3,), torch.float32, [((0,), torch.ones(3, dtype=torch.int8))]),
    }
    path = write_checkpoint(tmp_path, {"t": values[kind], "u": Entry.of(torch.ones(2))})
    reader = dcp_fast.accelerate(Foreign(path))
    expected, state = ({"t": torch.zeros(3), "u": torch.zeros(2)} for _ in range(2))
    torch_load(expected, storage_reader=Foreign(path))
    report = report_of(dcp_fast.load, state, storage_reader=reader)
    assert image(state) == image(expected)
    assert reader.reads == 1
    assert report.reader_fallback_reason


def test_errors_of_an_accelerated_reader_are_its_own(stored: Path) -> None:
    next(stored.glob("*.distcp")).unlink()
    outcomes = [load_with(dcp_fast.load, zeros(), storage_reader=make(Foreign(stored))) for make in (id_, fast)]
    types = [type((outcome.errors or {})[0]) for outcome in outcomes]
    assert types == [FileNotFoundError, FileNotFoundError]


def id_(reader: Foreign) -> Foreign:
    return reader


def fast(reader: Foreign) -> Foreign:
    return dcp_fast.accelerate(reader)


def test_files_are_opened_once(tmp_path: Path) -> None:
    """Not once for each bytes entry."""
    entries = {f"n{i}": Entry(value=i, file=f"__{i % 3}_0.distcp") for i in range(90)}
    write_checkpoint(tmp_path, {**entries, "t": Entry.of(torch.ones(5))})
    reader = dcp_fast.accelerate(Foreign(tmp_path))
    opened: list[str] = []
    original = builtins.open

    def counting(path: Any, *args: Any, **options: Any) -> Any:
        opened.append(str(path))
        return original(path, *args, **options)

    state = {"t": torch.zeros(5), **dict.fromkeys(entries, -1)}
    with mock.patch("builtins.open", counting):
        dcp_fast.load(state, storage_reader=reader)
    assert state == {"t": state["t"], **{fqn: entry.value for fqn, entry in entries.items()}}
    assert reader.reads == 0
    assert sorted(Path(path).name for path in opened if path.endswith(".distcp")) == [
        "__0_0.distcp",
        "__1_0.distcp",
        "__2_0.distcp",
    ]
