"""The reader: its options, its life across several loads, and the other ways of torch to call it."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    Entry,
    ShardedBuffer,
    assert_same_load,
    fast_reader,
    fill,
    image,
    load_with,
    save,
    torch_load,
    torch_reader,
    write_checkpoint,
)
from torch.distributed.checkpoint import filesystem, format_utils
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo, _StorageReaderTransforms
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, _load_state_dict_from_keys
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

import dcp_fast

STATE: dict[str, Any] = {
    "large": fill((700, 257), torch.float32),
    "slices": fill((64, 300), torch.int16, 1),
    "small": fill((3,), torch.int8, 2),
    "n": 5,
}


def zeros() -> dict[str, Any]:
    return {
        "large": torch.zeros(257, 700).t(),
        "slices": ShardedBuffer.make((64, 300), [(3, 7)], [torch.zeros(50, 100, dtype=torch.int32)]),
        "small": torch.zeros(3, dtype=torch.int8),
        "n": 0,
    }


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader")
    return save(path, STATE, thread_count=2)


# Options

OPTIONS: list[dict[str, Any]] = [
    {"threads": 1},
    {"threads": 64},
    {"threads": 100_000},
    {"block_bytes": 1},
    {"block_bytes": 64 << 10},
    {"block_bytes": 1 << 40},
    {"staging_bytes": 1},
    {"staging_bytes": 2},
    {"staging_bytes": 4097},
    {"staging_bytes": 1 << 28},
    {"threads": 64, "block_bytes": 1, "staging_bytes": 1},
    {"threads": 1, "block_bytes": 1 << 40, "staging_bytes": 1},
    {"threads": None},
]


@pytest.mark.parametrize("io_mode", ["auto", "cached", "direct"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_do_not_change_the_result(stored: Path, options: dict[str, Any], io_mode: str) -> None:
    assert_same_load(stored, zeros, options={**options, "io": io_mode})


@pytest.mark.parametrize(
    "options",
    [{"io": "mmap"}, {"io": ""}, {"threads": 0}, {"threads": -1}, {"block_bytes": 0}, {"staging_bytes": 0}],
    ids=str,
)
def test_invalid_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        dcp_fast.FileSystemReader("x", **options)


def test_reader_is_torchs_to_isinstance_and_attributes(stored: Path) -> None:
    ours, theirs = dcp_fast.FileSystemReader(stored), dcp.FileSystemReader(stored)
    assert isinstance(ours, dcp.FileSystemReader)
    assert ours.path == theirs.path
    assert ours.checkpoint_id == theirs.checkpoint_id
    assert vars(ours).keys() >= vars(theirs).keys()
    assert dcp_fast.FileSystemReader.validate_checkpoint_id(stored)
    assert not dcp_fast.FileSystemReader.validate_checkpoint_id("memory://x")


# Life of a reader


def test_one_reader_for_several_checkpoints(stored: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", {"small": fill((3,), torch.int8, 9)})
    reader = dcp_fast.FileSystemReader(other)
    for path in (stored, other, stored):
        state = {"small": torch.zeros(3, dtype=torch.int8)}
        dcp_fast.load(state, checkpoint_id=path, storage_reader=reader)
        expected = {"small": torch.zeros(3, dtype=torch.int8)}
        torch_load(expected, checkpoint_id=path)
        assert torch.equal(state["small"], expected["small"])
        assert reader.path == path
        report = dcp_fast.last_report()
        assert report is not None
        assert report.path == str(path)


def test_one_reader_twice_without_reset(stored: Path) -> None:
    reader = dcp_fast.FileSystemReader(stored)
    reports = []
    for _ in range(2):
        state = zeros()
        dcp_fast.load(state, storage_reader=reader)
        reports.append(dcp_fast.last_report())
    assert reports[0] is not reports[1]
    assert reports[0].bytes_needed == reports[1].bytes_needed


def test_reset_forgets_the_checkpoint(stored: Path) -> None:
    ours, theirs = dcp_fast.FileSystemReader(stored), dcp.FileSystemReader(stored)
    for reader in (ours, theirs):
        load_id = reader.load_id
        reader.storage_data = {"x": 1}
        reader.reset("elsewhere")
        assert reader.storage_data == {}
        assert reader.path == Path("elsewhere")
        assert reader.load_id != load_id
        reader.reset()
        assert reader.path == Path("elsewhere")


def test_reader_can_be_copied_and_pickled(stored: Path) -> None:
    reader = dcp_fast.FileSystemReader(stored, threads=3)
    for other in (copy.deepcopy(reader), pickle.loads(pickle.dumps(reader))):
        state = {"small": torch.zeros(3, dtype=torch.int8)}
        dcp_fast.load(state, storage_reader=other)
        assert torch.equal(state["small"], STATE["small"])
        assert other.threads == 3


def test_a_failed_load_does_not_spoil_the_reader(stored: Path) -> None:
    reader = dcp_fast.FileSystemReader(stored)
    assert load_with(dcp_fast.load, {"missing": torch.zeros(1)}, storage_reader=reader).errors
    state = zeros()
    assert load_with(dcp_fast.load, state, storage_reader=reader).errors is None
    expected = zeros()
    torch_load(expected, storage_reader=torch_reader(stored))
    assert image(state) == image(expected)


def test_loads_in_threads_at_once(stored: Path) -> None:
    expected = zeros()
    torch_load(expected, storage_reader=torch_reader(stored))
    states = [zeros() for _ in range(6)]
    errors: list[BaseException] = []

    def work(state: dict[str, Any]) -> None:
        try:
            dcp_fast.load(state, checkpoint_id=stored, no_dist=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert all(image(state) == image(expected) for state in states)


# Other ways to call it


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_load_state_dict_functions(stored: Path) -> None:
    expected = zeros()
    torch_load(expected, storage_reader=torch_reader(stored))
    state = zeros()
    dcp.load_state_dict(state, dcp_fast.FileSystemReader(stored), no_dist=True)
    assert image(state) == image(expected)
    state = zeros()
    dcp_fast.load_state_dict(state, dcp.FileSystemReader(stored), no_dist=True)
    assert image(state) == image(expected)
    state = zeros()
    _load_state_dict(state, dcp_fast.FileSystemReader(stored), no_dist=True)
    assert image(state) == image(expected)


@pytest.mark.parametrize("keys", [None, "a.t", {"a.t", "u"}, {"a"}])
@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")
def test_load_from_keys(tmp_path: Path, keys: Any) -> None:
    save(tmp_path, {"a": {"t": fill((3,), torch.float32), "s": "x"}, "u": fill((2, 2), torch.int8, 1)})
    expected = _load_state_dict_from_keys(keys, storage_reader=torch_reader(tmp_path))
    actual = _load_state_dict_from_keys(keys, storage_reader=dcp_fast.FileSystemReader(tmp_path))
    assert image(actual) == image(expected)
    assert expected


@pytest.mark.filterwarnings("ignore")
def test_conversion_to_torch_save(stored: Path, tmp_path: Path) -> None:
    format_utils.dcp_to_torch_save(stored, tmp_path / "torch.pt")
    with dcp_fast.install():
        before = dcp_fast.last_report()
        format_utils.dcp_to_torch_save(stored, tmp_path / "fast.pt")
        assert dcp_fast.last_report() is not before
    files = [torch.load(tmp_path / name, weights_only=False) for name in ("torch.pt", "fast.pt")]
    assert image(files[1]) == image(files[0])
    assert torch.equal(files[1]["slices"], STATE["slices"])


# Other readers, and readers derived from ours


class Slow(FileSystem):
    """A file system that only knows Python streams; what it serves is not what lies on disk."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        yield io.BytesIO(bytes(byte ^ 1 for byte in Path(path).read_bytes()))


def test_subclass_with_another_file_system(stored: Path, tmp_path: Path) -> None:
    for file in stored.iterdir():
        (tmp_path / file.name).write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))

    class Reader(dcp_fast.FileSystemReader):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.fs = Slow()

    expected = zeros()
    torch_load(expected, storage_reader=torch_reader(stored))
    state = zeros()
    dcp_fast.load(state, storage_reader=Reader(tmp_path))
    assert image(state) == image(expected)


class AddingOne(_StorageReaderTransforms):
    """Transforms of one's own, applied to every entry whatever its descriptors say."""

    def transform_load_stream(self, read_item: Any, transform_descriptors: Any, raw_stream: IO[bytes]) -> IO[bytes]:
        value = torch.load(io.BytesIO(raw_stream.read(-1)), weights_only=False)
        changed = io.BytesIO()
        torch.save(value + 1, changed)
        changed.seek(0)
        return changed


def test_subclass_with_transforms_of_its_own(tmp_path: Path) -> None:
    save(tmp_path, {"t": torch.arange(4.0), "n": 3})
    states = []
    for base in (dcp.FileSystemReader, dcp_fast.FileSystemReader):
        reader = base(tmp_path)
        reader.transforms = AddingOne()
        state: dict[str, Any] = {"t": torch.zeros(4), "n": 0}
        dcp_fast.load(state, storage_reader=reader)
        states.append(image(state))
    assert states[1] == states[0]


def test_subclass_that_slices_files_itself(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": Entry.of(torch.arange(4.0)), "n": 3})
    for file in tmp_path.glob("*.distcp"):
        file.write_bytes(b"header" + file.read_bytes())

    class Sliced:
        def _slice_file(self, file: Any, info: _StorageInfo) -> IO[bytes]:
            file.seek(info.offset + len(b"header"))
            return io.BytesIO(file.read(info.length))

    states = []
    for base in (dcp.FileSystemReader, dcp_fast.FileSystemReader):
        state: dict[str, Any] = {"t": torch.zeros(4), "n": 0}
        dcp_fast.load(state, storage_reader=type("Reader", (Sliced, base), {})(tmp_path))
        states.append(image(state))
    assert states[1] == states[0]


def test_subclass_that_changes_plans_and_metadata(stored: Path) -> None:
    class Reader(dcp_fast.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            metadata = super().read_metadata(*args, **kwargs)
            metadata.state_dict_metadata["renamed"] = metadata.state_dict_metadata["small"]
            return metadata

        def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
            plan = super().prepare_local_plan(plan)
            return LoadPlan([item for item in plan.items if item.dest_index.fqn != "large"])

    state = {"large": torch.zeros(700, 257), "small": torch.zeros(3, dtype=torch.int8)}
    dcp_fast.load(state, storage_reader=Reader(stored))
    assert state["large"].count_nonzero() == 0
    assert torch.equal(state["small"], STATE["small"])


class InMemory(StorageReader):
    """A third party's reader that delegates to torch's by hand."""

    def __init__(self, path: Path) -> None:
        self.inner = filesystem.FileSystemReader(path)

    def reset(self, checkpoint_id: Any = None) -> None:
        self.inner.reset(checkpoint_id)

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        return self.inner.read_metadata()

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:  # type: ignore[override]
        self.inner.set_up_storage_reader(metadata, is_coordinator)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        return self.inner.read_data(LoadPlan(list(reversed(plan.items))), planner)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def test_our_planner_with_somebody_elses_reader(stored: Path) -> None:
    expected = zeros()
    torch_load(expected, storage_reader=torch_reader(stored))
    for reader in (InMemory(stored), dcp.FileSystemReader(stored)):
        state = zeros()
        dcp_fast.load(state, storage_reader=reader, planner=dcp_fast.DefaultLoadPlanner())
        assert image(state) == image(expected)


def test_torchs_load_with_our_reader(stored: Path) -> None:
    expected = zeros()
    torch_load(expected, storage_reader=torch_reader(stored))
    state = zeros()
    torch_load(state, storage_reader=fast_reader(stored))
    assert image(state) == image(expected)
