"""Records that only torch can read: read ahead, unpickled in order, and placed as torch places them."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from damage import fast_error, peak_memory, reset_peak_memory, span, threads, threads_vanish
from helpers import Entry, ShardedBuffer, assert_same_load, fast_reader, fill, image, load_with, save, write_checkpoint
from tensor_subclasses import Attributed, Scaled
from torch.distributed.checkpoint._extension import ZStandard
from torch.utils.serialization import config

import dcp_fast
from dcp_fast import _native
from dcp_fast.transfer import archives

MIB = 1 << 20
FLOAT = torch.float32

OPTIONS: list[dict[str, Any]] = [
    {},
    {"threads": 1},
    {"threads": 4, "staging_bytes": 1},
    {"threads": 3, "staging_bytes": 5000, "block_bytes": 1 << 16},
    {"io": "direct"},
]


@pytest.fixture(autouse=True)
def allowed() -> Iterator[None]:
    with torch.serialization.safe_globals([Scaled]):
        yield


def quantized(i: int, sizes: tuple[int, ...] = (6, 40)) -> torch.Tensor:
    values = torch.randn(sizes, generator=torch.Generator().manual_seed(i))
    return torch.quantize_per_tensor(values, 0.1 + i % 7, i % 5, torch.qint8)


def by_channel(i: int, sizes: tuple[int, ...] = (6, 40)) -> torch.Tensor:
    values = torch.randn(sizes, generator=torch.Generator().manual_seed(i))
    return torch.quantize_per_channel(values, torch.rand(sizes[0]) + 0.1, torch.zeros(sizes[0]), 0, torch.quint8)


def scaled(i: int, sizes: tuple[int, ...] = (6, 40)) -> torch.Tensor:
    return Scaled(fill(sizes, torch.int8, i), torch.rand(sizes[0], 1, generator=torch.Generator().manual_seed(i)))


def attributed(i: int) -> torch.Tensor:
    parameter = torch.nn.Parameter(fill((6, 40), FLOAT, i))
    parameter.note = {"number": i}  # type: ignore[attr-defined]
    return parameter


def zero(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Scaled):
        return Scaled(torch.zeros_like(tensor.numbers), torch.zeros_like(tensor.scales))
    if not tensor.is_quantized:
        return torch.zeros(tensor.size(), dtype=tensor.dtype)
    values = torch.zeros(tensor.size())
    if tensor.qscheme() == torch.per_tensor_affine:
        return torch.quantize_per_tensor(values, 1.0, 0, tensor.dtype)
    return torch.quantize_per_channel(values, torch.ones(len(values)), torch.zeros(len(values)), 0, tensor.dtype)


KINDS: dict[str, Callable[[int], torch.Tensor]] = {
    "quantized": quantized,
    "by channel": by_channel,
    "scaled": scaled,
    "attributed": attributed,
    "expanded": lambda i: fill((1, 40), FLOAT, i).expand(6, 40),
    "conjugate": lambda i: fill((40, 6), torch.complex64, i).t().conj(),
}


@pytest.mark.filterwarnings("ignore:.*quantiz.*", "ignore:.*deprecat.*")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    tensors = {f"t{i}": KINDS[kind](i) for i in range(12)}
    entries: dict[str, Entry] = {}
    for i, (fqn, tensor) in enumerate(tensors.items()):
        entries |= {fqn: Entry.of(tensor), f"plain{i}": Entry.of(fill((7,), FLOAT, i)), f"step{i}": Entry(value=i)}
    write_checkpoint(tmp_path, entries)

    def make() -> dict[str, Any]:
        plain = {f"plain{i}": torch.zeros(7) for i in range(12)}
        return {fqn: zero(tensor) for fqn, tensor in tensors.items()} | plain | {f"step{i}": -1 for i in range(12)}

    assert_same_load(tmp_path, make, options=options, fallback=12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_wrapper_into_plain_tensors(tmp_path: Path, options: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, {f"t{i}": Entry.of(scaled(i)) for i in range(5)})
    assert_same_load(tmp_path, lambda: {f"t{i}": torch.zeros(6, 40) for i in range(5)}, options=options, fallback=5)


def test_rows_of_wrappers(tmp_path: Path) -> None:
    """Boxes of a record that share one load of it."""
    whole = scaled(1, (12, 4))
    write_checkpoint(tmp_path, {"t": Entry.of(whole)})
    at = [(0, 0), (3, 0), (7, 0)]
    rows = [3, 4, 5]

    def make() -> dict[str, Any]:
        return {"t": ShardedBuffer.make((12, 4), at, [torch.zeros(count, 4) for count in rows])}

    outcome = assert_same_load(tmp_path, make, fallback=1)
    assert isinstance(whole, Scaled)
    expected = (whole.numbers * whole.scales).split(rows)
    assert all(map(torch.equal, outcome.state["t"].shards, expected))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compressed(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("zstandard")
    state = {f"t{i}": fill((30, 5 * i), FLOAT, i) for i in range(1, 9)} | {"step": 3, "odd": fill((8, 6), FLOAT).t()}
    save(tmp_path, state, _extensions=[ZStandard()])

    def make() -> dict[str, Any]:
        return {fqn: torch.zeros(value.size()) if fqn != "step" else 0 for fqn, value in state.items()}  # type: ignore[attr-defined]

    assert_same_load(tmp_path, make, options=options, fallback=9)


@pytest.mark.parametrize("alignment", [1, 16, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    """Elements are aligned in memory whatever they are in the file."""
    tensors = [fill((9,), torch.complex128, i).conj() for i in range(5)]
    with mock.patch.object(config.save, "storage_alignment", alignment):
        write_checkpoint(tmp_path, {f"t{i}": Entry.of(tensor) for i, tensor in enumerate(tensors)})
    seen: list[int] = []
    original = archives.load_record

    def load_record(record: Any) -> Any:
        tensor = original(record)
        seen.append(tensor.data_ptr() % 16)
        return tensor

    with mock.patch("dcp_fast.transfer.records.load_record", load_record):
        make = lambda: {f"t{i}": torch.zeros(9, dtype=torch.complex128) for i in range(5)}  # noqa: E731
        assert_same_load(tmp_path, make, fallback=5)
    assert seen == [0] * 5


def test_planner_with_hooks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {f"t{i}": Entry.of(quantized(i) if i % 3 else fill((6, 40), FLOAT)) for i in range(40)})

    class Planner(dcp_fast.DefaultLoadPlanner):
        events: list[Any]

        def resolve_tensor(self, item: Any) -> torch.Tensor:
            self.events.append(("resolve", item.dest_index.fqn))
            return super().resolve_tensor(item)

        def commit_tensor(self, item: Any, tensor: torch.Tensor) -> None:
            self.events.append((item.dest_index.fqn, image(tensor)))

    planners: list[Planner] = []

    def planner() -> Planner:
        planners.append(Planner())
        planners[-1].events = []
        return planners[-1]

    def make() -> dict[str, Any]:
        return {f"t{i}": zero(quantized(i)) if i % 3 else torch.zeros(6, 40) for i in range(40)}

    assert_same_load(tmp_path, make, planner=planner, fallback=26)
    commits = [[event for event in planner.events if event[0] != "resolve"] for planner in planners]
    assert commits[0] == commits[1]
    assert len(commits[0]) == 40


class Kept(torch.Tensor):
    """Takes the very tensor that is copied to it."""

    sources: list[torch.Tensor]

    @staticmethod
    def make(sources: list[torch.Tensor]) -> Kept:
        self = torch.Tensor._make_wrapper_subclass(Kept, torch.Size([6, 40]), dtype=FLOAT)
        self.sources = sources
        return self

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "copy_":
            args[0].sources.append(args[1])
            return args[0]
        if name in {"detach", "alias"}:
            return Kept.make(args[0].sources)
        raise NotImplementedError(name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_memory_that_somebody_keeps(tmp_path: Path, options: dict[str, Any]) -> None:
    """What was read stays as long as a tensor needs it, and does not serve another record meanwhile."""
    tensors = [quantized(i) for i in range(50)]
    write_checkpoint(tmp_path, {f"t{i}": Entry.of(tensor) for i, tensor in enumerate(tensors)})
    kept: list[list[torch.Tensor]] = [[] for _ in tensors]
    state = {f"t{i}": Kept.make(kept[i]) for i in range(50)}
    assert load_with(dcp_fast.load, state, storage_reader=fast_reader(tmp_path, **options)).errors is None
    assert [image(only) for (only,) in kept] == [image(tensor) for tensor in tensors]


def test_many(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {f"t{i}": Entry.of(quantized(i)) for i in range(500)})
    assert_same_load(tmp_path, lambda: {f"t{i}": zero(quantized(i)) for i in range(500)}, fallback=500)
    report = dcp_fast.last_report()
    assert report is not None
    assert report.requests < 20
    dcp_fast.load({"t7": zero(quantized(7))}, storage_reader=fast_reader(tmp_path))


@pytest.mark.parametrize(("staging_bytes", "most"), [(1, 1), (3 * MIB, 1), (32 * MIB, 16)])
def test_memory(tmp_path: Path, staging_bytes: int, most: int) -> None:
    """The record that is unpickled takes its own size, and those ahead of it what they may."""
    size = (2048, 1024)
    write_checkpoint(tmp_path, {f"t{i}": Entry.of(quantized(0, size)) for i in range(24)})
    state = {f"t{i}": zero(quantized(0, size)) for i in range(24)}
    reader = fast_reader(tmp_path, staging_bytes=staging_bytes)
    dcp_fast.load({"t0": state["t0"]}, storage_reader=reader)
    before = reset_peak_memory()
    dcp_fast.load(state, storage_reader=reader)
    assert peak_memory() - before < (2 + 2 * most) * MIB + 4 * MIB
    assert image(state["t23"]) == image(quantized(0, size))


# Errors


def test_refused_by_the_restricted_unpickler(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": Entry.of(fill((5,), FLOAT).as_subclass(Attributed))})
    torchs = assert_same_load(tmp_path, lambda: {"t": torch.zeros(5)}, fallback=None, raises=Exception)
    assert torchs.errors is not None
    (error,) = torchs.errors.values()
    assert type(error) is dcp_fast.CorruptPickleError
    assert "add_safe_globals([tensor_subclasses.Attributed])" in error.reason
    place = span(tmp_path, "t")
    assert (error.fqn, error.path, error.offset, error.length) == ("t", str(place.path), place.offset, place.length)


def test_storage_that_the_archive_does_not_have(tmp_path: Path) -> None:
    """torch reads past the end of what it allocated for it."""
    torch.serialization.set_crc32_options(False)
    try:
        write_checkpoint(tmp_path, {"t": Entry.of(quantized(0, (6, 40)))})
    finally:
        torch.serialization.set_crc32_options(True)
    place = span(tmp_path, "t")
    record = place.path.read_bytes()
    assert record.count(b"cpuq\x04K\xf0t") == 1  # 240 elements
    place.path.write_bytes(record.replace(b"cpuq\x04K\xf0t", b"cpuq\x04K\xfft"))
    error = fast_error(tmp_path, {"t": zero(quantized(0))})
    assert type(error) is dcp_fast.CorruptCheckpointError
    assert error.reason == "data.pkl says 255 bytes of storage, the archive holds 240"
    assert (error.fqn, error.path, error.offset, error.length) == ("t", str(place.path), place.offset, place.length)


class Slow(torch.Tensor):
    """Takes its time to be copied to."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "copy_":
            time.sleep(0.1)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("left", [1, 6, 13])
def test_reading_fails_meanwhile(tmp_path: Path, left: int) -> None:
    """A thread fails while this one unpickles: the error names the record that was to be read."""
    write_checkpoint(tmp_path, {f"t{i}": Entry.of(fill((MIB,), FLOAT).expand(2, MIB)) for i in range(8)})
    options: dict[str, Any] = {"threads": 2, "staging_bytes": 64 * MIB, "io": "cached"}

    def make() -> dict[str, Any]:
        return {f"t{i}": torch.zeros(2, MIB).as_subclass(Slow) for i in range(8)}

    with _native.FaultInjection("pread", nth=-1) as counter:
        assert fast_error(tmp_path, make(), **options) is None
    before = threads()
    with _native.FaultInjection("pread", nth=counter.calls - left, error_number=errno.EIO):
        error = fast_error(tmp_path, make(), **options)
    assert type(error) is dcp_fast.FileAccessError
    assert error.errno == errno.EIO
    place = span(tmp_path, error.fqn)
    assert error.path == str(place.path)
    assert error.offset is not None
    assert place.offset <= error.offset < place.offset + place.length
    assert threads_vanish(before)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError])
def test_what_a_copy_raises(tmp_path: Path, kind: type[BaseException]) -> None:
    class Failing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(function, "__name__", "") == "copy_":
                raise kind("of mine")
            return super().__torch_function__(function, types, args, kwargs or {})

    write_checkpoint(tmp_path, {f"t{i}": Entry.of(fill((1, 500), FLOAT, i).expand(6, 500)) for i in range(200)})
    state = {f"t{i}": torch.zeros(6, 500) for i in range(200)}
    state["t3"] = state["t3"].as_subclass(Failing)
    before = threads()
    try:
        error = fast_error(tmp_path, state)
    except KeyboardInterrupt as interrupt:
        error = interrupt
    assert type(error) is kind
    assert threads_vanish(before)
    assert image(state["t2"]) == image(fill((1, 500), FLOAT, 2).expand(6, 500).contiguous())
