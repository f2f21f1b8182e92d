"""Directories of safetensors files load as torch's HuggingFaceStorageReader loads them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import ShardedBuffer, fill, image, load_with, save, torch_load
from hooked_planners import Doubling, Recording
from safetensors.torch import save_file
from safetensors_files import (
    DTYPES,
    assert_same_headers,
    assert_same_hf_load,
    header_of,
    hf_reader,
    save_hf,
    torch_hf_reader,
    write_chunks,
    write_file,
    write_index,
)
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan

import dcp_fast

STATE = {
    "embedding": fill((50, 8), torch.float32, 1),
    "layers.0.weight": fill((16, 8), torch.bfloat16, 2),
    "layers.0.bias": fill((16,), torch.float16, 3),
    "scale": fill((), torch.float64, 4),
    "steps": fill((3, 2, 5), torch.int64, 5),
}
MAPPING = {"embedding": 1, "layers.0.weight": 2, "layers.0.bias": 2, "scale": 3, "steps": 3}


def zeros() -> dict[str, Any]:
    return {fqn: torch.zeros_like(value) for fqn, value in STATE.items()}


def whole(path: Path) -> Path:
    return save_hf(path, dict(STATE))


def indexed(path: Path) -> Path:
    return save_hf(path, dict(STATE), fqn_to_index_mapping=MAPPING)


def single_file(path: Path) -> Path:
    path.mkdir()
    save_file(STATE, path / "model.safetensors", metadata={"format": "pt"})
    return path


def in_chunks(path: Path) -> Path:
    chunks = {
        fqn: [([0] * value.dim(), value)]
        if value.dim() == 0
        else [([start, *[0] * (value.dim() - 1)], value[start : start + 2]) for start in range(0, len(value), 2)]
        for fqn, value in STATE.items()
    }
    return write_chunks(path, chunks)


@pytest.fixture(params=[whole, indexed, single_file, in_chunks], ids=lambda write: write.__name__)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path: Path = request.param(tmp_path / "model")
    return path


def report() -> dcp_fast.LoadReport:
    last = dcp_fast.last_report()
    assert last is not None
    return last


# What is stored


def test_metadata_equals_torchs(checkpoint: Path) -> None:
    assert_same_headers(checkpoint)


def test_metadata_is_that_of_the_reader(checkpoint: Path) -> None:
    reader = hf_reader(checkpoint)
    metadata = reader.read_metadata()
    assert metadata.storage_meta is not None
    assert metadata.storage_meta.load_id == reader.load_id
    copied = pickle.loads(pickle.dumps(metadata))
    assert copied == torch_hf_reader(str(checkpoint)).read_metadata() or copied.storage_data == metadata.storage_data


def test_every_dtype(tmp_path: Path) -> None:
    state = {str(dtype): fill((3, 4), dtype, number) for number, dtype in enumerate(DTYPES)}
    path = tmp_path / "model"
    path.mkdir()
    save_file(state, path / "model.safetensors")
    assert_same_headers(path)
    assert_same_hf_load(path, lambda: {fqn: torch.zeros(3, 4, dtype=value.dtype) for fqn, value in state.items()})


@pytest.mark.parametrize("name", ["float8_e8m0fnu", "float4_e2m1fn_x2"])
def test_dtypes_that_torchs_reader_lacks(tmp_path: Path, name: str) -> None:
    """They are what safetensors' own loader makes of them."""
    from safetensors.torch import load_file

    dtype = getattr(torch, name)
    stored = {"x": fill((6, 4), torch.uint8).view(dtype), "y": fill((2,), torch.float32)}
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(KeyError):
        torch_hf_reader(str(tmp_path)).read_metadata()
    expected = load_file(tmp_path / "model.safetensors")
    state = {"x": torch.zeros(6, 4, dtype=torch.uint8).view(dtype), "y": torch.zeros(2)}
    dcp_fast.load(state, checkpoint_id=tmp_path)
    assert state["x"].shape == expected["x"].shape
    assert torch.equal(state["x"].view(torch.uint8), expected["x"].view(torch.uint8))
    assert torch.equal(state["x"].view(torch.uint8), stored["x"].view(torch.uint8))


@pytest.mark.parametrize("name", ["F6_E2M3", "F6_E3M2"])
def test_dtype_that_torch_lacks_is_an_error_where_it_is_wanted(tmp_path: Path, name: str) -> None:
    path = write_file(tmp_path / "model.safetensors", header_of({"six": (name, (4,), 3), "x": ("U8", (4,), 4)}))
    state = {"x": torch.zeros(4, dtype=torch.uint8)}
    dcp_fast.load(state, checkpoint_id=tmp_path)
    assert state["x"].tolist() == [3, 4, 5, 6]
    outcome = load_with(dcp_fast.load, {"six": torch.zeros(4)}, checkpoint_id=tmp_path)
    assert outcome.errors is not None
    (error,) = outcome.errors.values()
    assert isinstance(error, dcp_fast.UnsupportedDTypeError)
    assert isinstance(error, KeyError)  # as torch raises for the whole file
    assert (error.path, error.fqn) == (str(path), "six")
    assert error.offset == path.stat().st_size - 7
    with pytest.raises(KeyError):
        torch_hf_reader(str(tmp_path)).read_metadata()
    with pytest.raises(dcp_fast.UnsupportedDTypeError, match="six"):
        hf_reader(tmp_path).read_metadata().state_dict_metadata["six"]


def test_empty_tensors(tmp_path: Path) -> None:
    save_file({"none": torch.zeros(0, 4), "some": torch.ones(3)}, tmp_path / "model.safetensors")
    state = {"none": torch.zeros(0, 4), "some": torch.zeros(3)}
    dcp_fast.load(state, checkpoint_id=tmp_path)
    assert state["some"].tolist() == [1, 1, 1]
    assert_same_headers(tmp_path)


def test_directory_without_tensors(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", {})
    assert_same_headers(tmp_path)
    outcome = load_with(dcp_fast.load, {"x": torch.zeros(1)}, storage_reader=hf_reader(tmp_path))
    assert outcome.errors is not None
    assert "Missing key" in str(outcome.errors[0])


# Loads


def test_loads_as_torch(checkpoint: Path) -> None:
    assert_same_hf_load(checkpoint, zeros)
    assert report().is_fast
    assert report().path == str(checkpoint)
    assert report().bytes_read == report().bytes_needed == sum(value.nbytes for value in STATE.values())


def test_only_the_overlap_is_read(checkpoint: Path) -> None:
    def make() -> dict[str, Any]:
        return {"embedding": ShardedBuffer.make((50, 8), [(7, 0)], [torch.zeros(11, 8)])}

    assert_same_hf_load(checkpoint, make, options={"io": "cached"})
    assert report().bytes_read == report().bytes_needed == 11 * 8 * 4


def test_columns_of_a_tensor(checkpoint: Path) -> None:
    assert_same_hf_load(
        checkpoint,
        lambda: {
            "embedding": ShardedBuffer.make(
                (50, 8), [(0, 3), (20, 0)], [torch.zeros(50, 2), torch.zeros(8, 30).t()[:, ::2][:30]]
            )
        },
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32], ids=str)
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {"a": torch.arange(1000).float().view(50, 20), "b": torch.arange(64).to(torch.bfloat16)}
    save_file(values, tmp_path / "model.safetensors")
    assert_same_hf_load(tmp_path, lambda: {fqn: torch.zeros(value.shape, dtype=dtype) for fqn, value in values.items()})


@pytest.mark.parametrize("options", [{"threads": 1}, {"io": "direct"}, {"io": "mapped"}, {"block_bytes": 1 << 16}])
def test_options(checkpoint: Path, options: dict[str, Any]) -> None:
    assert_same_hf_load(checkpoint, zeros, options=options)


def test_arguments_of_torchs_reader(checkpoint: Path) -> None:
    reader = dcp_fast.HuggingFaceStorageReader(str(checkpoint), 3)
    assert (reader.thread_count, reader.threads) == (3, 3)
    assert dcp_fast.HuggingFaceStorageReader(path=checkpoint, thread_count=3, threads=2).threads == 2
    assert dcp_fast.HuggingFaceStorageReader(checkpoint).threads is None
    assert isinstance(reader, torch_hf_reader)
    with pytest.raises(ValueError, match="io must be one of"):
        dcp_fast.HuggingFaceStorageReader(checkpoint, io="fast")  # type: ignore[arg-type]


class RecordingPlanner(Recording, dcp.DefaultLoadPlanner):
    pass


def test_planners_with_hooks(checkpoint: Path) -> None:
    assert_same_hf_load(checkpoint, zeros, planner=Doubling)
    assert report().is_fast == (not report().planner_fallback_reason)
    assert "its hooks change" in report().planner_fallback_reason


def test_hooks_are_called_in_torchs_order(checkpoint: Path) -> None:
    planners: list[RecordingPlanner] = []

    def make_planner() -> RecordingPlanner:
        planners.append(RecordingPlanner())
        return planners[-1]

    assert_same_hf_load(checkpoint, zeros, planner=make_planner)
    theirs, ours = (planner.calls for planner in planners)
    for name in ("resolve", "lookup", "transform", "commit"):
        assert [call for call in ours if call[0] == name] == [call for call in theirs if call[0] == name]
    assert len(ours) == len(theirs)


def test_partial_load(checkpoint: Path) -> None:
    def make() -> dict[str, Any]:
        return {"scale": torch.zeros((), dtype=torch.float64), "more": torch.full((2,), 7.0)}

    assert_same_hf_load(checkpoint, make, planner=lambda: dcp.DefaultLoadPlanner(allow_partial_load=True))


def test_missing_key(checkpoint: Path) -> None:
    outcome = load_with(dcp_fast.load, {"nothing": torch.zeros(1)}, checkpoint_id=checkpoint)
    assert outcome.errors is not None
    assert type(outcome.errors[0]) is RuntimeError
    assert "Missing key in checkpoint state_dict: nothing" in str(outcome.errors[0])


def test_wrong_size(checkpoint: Path) -> None:
    outcome = load_with(dcp_fast.load, {"embedding": torch.zeros(50, 9)}, checkpoint_id=checkpoint)
    assert outcome.errors is not None
    assert type(outcome.errors[0]) is ValueError


def test_torchs_load_with_our_reader(checkpoint: Path) -> None:
    state = zeros()
    torch_load(state, storage_reader=hf_reader(checkpoint), no_dist=True)
    assert image(state) == image(STATE)
    assert report().reader == "dcp_fast.readers.huggingface.HuggingFaceStorageReader"
    assert report().reader_fallback_reason == ""


def test_plan_of_objects_asks_the_files(checkpoint: Path) -> None:
    """A plan that went through another process has no columns."""
    planner = dcp_fast.DefaultLoadPlanner()
    reader = hf_reader(checkpoint)
    metadata = reader.read_metadata()
    state = zeros()
    planner.set_up_planner(state, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plan = pickle.loads(pickle.dumps(planner.create_local_plan()))
    assert type(plan) is LoadPlan
    reader.read_data(plan, planner).wait()
    assert torch.equal(state["steps"], STATE["steps"])
    assert torch.equal(state["embedding"].view(torch.int32), STATE["embedding"].view(torch.int32))


def test_storage_data_that_somebody_changed(tmp_path: Path) -> None:
    """torch goes by the file that the entry names, whatever the metadata was read from."""
    write_file(tmp_path / "a" / "x.safetensors", header_of({"x": ("U8", (4,), 4)}), b"abcd")
    write_file(tmp_path / "b" / "x.safetensors", header_of({"y": ("U8", (2,), 2), "x": ("U8", (4,), 4)}), b"..efgh")

    class Redirected(dcp_fast.HuggingFaceStorageReader):
        def read_metadata(self) -> Any:
            metadata = super().read_metadata()
            index = MetadataIndex("x", (0,))
            metadata.storage_data[index].relative_path = str(tmp_path / "b" / "x.safetensors")
            return metadata

    state = {"x": torch.zeros(4, dtype=torch.uint8)}
    dcp_fast.load(state, storage_reader=Redirected(tmp_path / "a"))
    assert bytes(state["x"].tolist()) == b"efgh"


def test_two_sets_of_files_in_one_directory(tmp_path: Path) -> None:
    """As Mistral's have: torch reads all of them, whatever the index says."""
    save_file({"a": torch.ones(4), "b": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"a.weight": torch.full((4,), 2.0)}, tmp_path / "consolidated.safetensors")
    write_index(tmp_path, dict.fromkeys(["a", "b"], "model-00001-of-00001.safetensors"))
    assert_same_headers(tmp_path)
    assert_same_hf_load(tmp_path, lambda: {"a": torch.zeros(4), "a.weight": torch.zeros(4)})


def test_same_tensor_in_two_files(tmp_path: Path) -> None:
    """The file that torch comes to last has the last word."""
    for number in range(5):
        save_file({"a": torch.full((4,), float(number + 1))}, tmp_path / f"{number}.safetensors")
    assert_same_headers(tmp_path)
    assert_same_hf_load(tmp_path, lambda: {"a": torch.zeros(4)})


def test_same_tensor_of_other_dtypes_in_two_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(4, dtype=torch.int8)}, tmp_path / "2.safetensors")
    assert_same_headers(tmp_path)
    assert_same_hf_load(tmp_path, lambda: {"a": torch.zeros(4)})


def test_consolidated_directory(tmp_path: Path) -> None:
    floats = {fqn: value for fqn, value in STATE.items() if value.is_floating_point()}  # torch consolidates no others
    save_hf(tmp_path, floats, save_distributed=True, enable_consolidation=True)
    assert list((tmp_path / "sharded").glob("*.safetensors"))
    for path in (tmp_path, tmp_path / "sharded"):
        assert_same_headers(path)
        assert_same_hf_load(path, lambda: {fqn: torch.zeros_like(value) for fqn, value in floats.items()})


def test_reader_turns_to_another_directory(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for number, path in enumerate((first, second)):
        path.mkdir()
        save_file({"a": torch.full((2,), float(number + 1))}, path / "model.safetensors")
    reader = hf_reader(first)
    state = {"a": torch.zeros(2)}
    dcp_fast.load(state, storage_reader=reader)
    assert state["a"].tolist() == [1, 1]
    dcp_fast.load(state, checkpoint_id=second, storage_reader=reader)
    assert state["a"].tolist() == [2, 2]


def test_trace(checkpoint: Path, tmp_path: Path) -> None:
    dcp_fast.load(zeros(), checkpoint_id=checkpoint, trace=tmp_path / "load.json")
    events = json.loads((tmp_path / "load.json").read_text())
    events = events["traceEvents"] if isinstance(events, dict) else events
    assert {"metadata", "planning", "layout", "transfer"} <= {event.get("name") for event in events}


# Found by load itself, and under install


@pytest.mark.parametrize("form", ["path", "text", "url"])
def test_load_finds_out(checkpoint: Path, form: str) -> None:
    state = zeros()
    where = {"path": checkpoint, "text": str(checkpoint), "url": f"file://{checkpoint}"}[form]
    if form == "url":
        pytest.importorskip("fsspec")
    dcp_fast.load(state, checkpoint_id=where)
    assert torch.equal(state["steps"], STATE["steps"])
    assert report().reader == "dcp_fast.readers.huggingface.HuggingFaceStorageReader"


def test_metadata_of_dcp_goes_first(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(3)})
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    state = {"a": torch.zeros(3)}
    dcp_fast.load(state, checkpoint_id=tmp_path)
    assert state["a"].tolist() == [1, 1, 1]


def test_torchs_reader_passed_to_our_load(checkpoint: Path) -> None:
    state = zeros()
    dcp_fast.load(state, storage_reader=torch_hf_reader(str(checkpoint), thread_count=2))
    assert torch.equal(state["steps"], STATE["steps"])
    assert report().reader == "torch.distributed.checkpoint.hf_storage.HuggingFaceStorageReader"
    assert report().reader_fallback_reason == ""


def test_torchs_reader_while_installed(checkpoint: Path) -> None:
    expected = torch_hf_reader(str(checkpoint)).read_metadata()
    reader = torch_hf_reader(str(checkpoint))
    with dcp_fast.install():
        metadata = reader.read_metadata()
        assert type(metadata.state_dict_metadata).__name__ == "LazyDict"
        assert metadata.state_dict_metadata == expected.state_dict_metadata
        assert metadata.storage_meta.load_id == reader.load_id
        state = zeros()
        dcp.load(state, storage_reader=reader)
        assert torch.equal(state["steps"], STATE["steps"])
        assert report().is_fast
        assert report().requests > 0
    assert type(torch_hf_reader(str(checkpoint)).read_metadata().state_dict_metadata) is dict


@pytest.mark.parametrize("installed", [False, True])
def test_reader_with_steps_of_its_own(checkpoint: Path, installed: bool) -> None:
    class Own(torch_hf_reader):  # type: ignore[misc,valid-type]
        def _process_read_request(self, file: Any, item: Any, planner: Any) -> None:
            super()._process_read_request(file, item, planner)
            planner.resolve_tensor(item).zero_()

    state = {"steps": torch.ones(3, 2, 5, dtype=torch.int64)}
    if installed:
        with dcp_fast.install():
            dcp.load(state, storage_reader=Own(str(checkpoint)))
    else:
        dcp_fast.load(state, storage_reader=Own(str(checkpoint)))
    assert not state["steps"].any()
    assert report().reader_fallback_reason == "it has a _process_read_request of its own"
