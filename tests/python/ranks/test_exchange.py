"""Ranks that share what they read get what torch gives them, and the job reads each byte once."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import fill, torch_load, torch_planner, torch_reader
from hooked_planners import Doubling
from ranks import CollectiveCounter, Ranks
from safetensors.torch import save_file
from shared_reads import LAYOUTS, failing_step, failure_of, load_shared, save_by_rows, state_dict, values_of
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import dcp_fast
from dcp_fast.readers.filesystem import FileSystemReader
from dcp_fast.transfer.shared_reads import SharedReads

HEADERS = 4096  # bytes that a rank may read of a record beyond its payload


@pytest.fixture(scope="module")
def checkpoint(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared") / "checkpoint"
    ranks.run(4, save_by_rows, path)
    return path


def compare(path: Path, layouts: list[str], **options: Any) -> list[tuple[int, int, int, int, str]]:
    """Load in each layout with torch and with sharing; what the reports say."""
    said = []
    for layout in layouts:
        expected, state = state_dict(layout), state_dict(layout)
        torch_load(expected, storage_reader=torch_reader(path))
        report = load_shared(state, path, **options)
        assert values_of(state) == values_of(expected), layout
        alone = state_dict(layout)
        dcp_fast.load(alone, checkpoint_id=path)
        assert values_of(alone) == values_of(expected), layout
        assert report.exchange_rounds > 0
        said.append((report.bytes_read_by_job, report.bytes_sent, report.bytes_received, report.records, layout))
    return said


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_layout(ranks: Ranks, checkpoint: Path, world_size: int) -> None:
    layouts = [name for name, (dims, _) in LAYOUTS.items() if dims == 1 or world_size > 2]
    results = ranks.run(world_size, compare, checkpoint, layouts, timeout=180)
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    for number in range(len(layouts)):
        of_ranks = [result[number] for result in results]
        by_job, *_ = of_ranks[0]
        assert all(said[0] == by_job for said in of_ranks)
        assert by_job <= 1.1 * stored  # small records are read whole with the headers, and their boxes again
        assert sum(said[1] for said in of_ranks) == sum(said[2] for said in of_ranks)


def compare_options(path: Path) -> None:
    for layout, options in [
        ("columns", {"exchange_bytes": 128 << 20}),
        ("HSDP", {"storage_reader": dcp_fast.FileSystemReader(path, threads=1, io="direct")}),
        ("rows", {"storage_reader": dcp_fast.FileSystemReader(path, block_bytes=1 << 16, io="mapped")}),
        ("replicas", {"storage_reader": dcp_fast.FileSystemReader(path, staging_bytes=1 << 17, threads=5)}),
    ]:
        expected, state = state_dict(layout), state_dict(layout)
        torch_load(expected, storage_reader=torch_reader(path))
        report = load_shared(state, path, **options)
        assert report.exchange_rounds > 0
        assert values_of(state) == values_of(expected), options


def test_options_of_readers(ranks: Ranks, checkpoint: Path) -> None:
    ranks.run(4, compare_options, checkpoint)


def convert(path: Path) -> int:
    expected, state = (state_dict("columns", dtype=torch.float16) for _ in range(2))
    torch_load(expected, storage_reader=torch_reader(path))
    report = load_shared(state, path)
    assert values_of(state) == values_of(expected)
    assert report.exchange_rounds > 0
    return report.staged_items


def test_boxes_are_converted_as_they_arrive(ranks: Ranks, checkpoint: Path) -> None:
    assert all(items >= 3 for items in ranks.run(4, convert, checkpoint))


def convert_by_torch(path: Path) -> list[tuple[int, str]]:
    """To dtypes that the engine does not convert to: boxes pass through memory, in batches."""
    found = []
    for layout, dtype, most_bytes in [
        ("replicas", torch.bool, None),
        ("columns", torch.complex64, 50_001),
        ("HSDP", torch.complex128, 70_000),
        # One rank converts less than others.
        ("rows", torch.bool if dist.get_rank() else torch.float64, 100_000),
    ]:
        expected, state = (state_dict(layout, dtype=dtype) for _ in range(2))
        torch_load(expected, storage_reader=torch_reader(path))
        with ExitStack() as stack:
            if most_bytes is not None:
                stack.enter_context(mock.patch.object(SharedReads, "most_bytes", most_bytes))
            report = load_shared(state, path)
        assert values_of(state) == values_of(expected), layout
        found.append((report.bytes_read, report.sharing_fallback_reason))
    return found


def test_boxes_that_torch_converts(ranks: Ranks, checkpoint: Path) -> None:
    results = ranks.run(4, convert_by_torch, checkpoint)
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    for of_ranks in zip(*results, strict=True):
        assert all(reason == "" for _, reason in of_ranks)
        assert sum(read for read, _ in of_ranks) <= 1.1 * stored


def convert_with_faults(path: Path) -> list[dict[int, str] | str]:
    found: list[dict[int, str] | str] = []
    for nth in range(1000):
        with failing_step(nth, 2, RuntimeError), mock.patch.object(SharedReads, "most_bytes", 400_000):
            found.append(failure_of(partial(load_shared, state_dict("replicas", dtype=torch.bool), path)))
        if found[-1] == "nothing":
            return found
    return found


def test_faults_while_torch_converts(ranks: Ranks, checkpoint: Path) -> None:
    for *failures, last in ranks.run(4, convert_with_faults, checkpoint):
        assert last == "nothing"
        assert len(failures) > 8
        assert all(failure == {2: "RuntimeError"} for failure in failures)


def load_tied(path: Path) -> list[tuple[int, str]]:
    """Tensors that have the same memory, on all ranks or on all but one: what comes last stays there."""
    names = [f"t{i}" for i in range(5)]
    if dist.get_rank() == 0:
        stored = {name: fill((300, 201), torch.float32, number) for number, name in enumerate(names)}
        dcp.save({**stored, "t5": torch.rand(300, 201)}, checkpoint_id=path, no_dist=True)
    dist.barrier()

    def tied(dtype: torch.dtype, are_tied: bool) -> dict[str, torch.Tensor]:
        memory = torch.zeros(900, 201)
        state = {
            name: memory[300 * i :][:300] if are_tied else torch.zeros(300, 201) for i, name in enumerate(names[:3])
        }
        state |= {"t3": memory[150:450], "t4": memory[:300]}
        return {**state, "t5": memory.view(dtype)[:300, :201] if are_tied else torch.zeros(300, 201)}

    found = []
    for dtype, are_tied in [(torch.float32, True), (torch.int32, True), (torch.float32, dist.get_rank() != 1)]:
        expected, state = (tied(dtype, are_tied) for _ in range(2))
        torch_load(expected, storage_reader=torch_reader(path))
        report = load_shared(state, path)
        assert values_of(state) == values_of(expected), (dtype, are_tied)
        found.append((report.bytes_read, report.sharing_fallback_reason))
    return found


def test_boxes_that_are_written_over_others(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(4, load_tied, tmp_path / "tied")
    stored = sum(file.stat().st_size for file in (tmp_path / "tied").glob("*.distcp"))
    for number, of_ranks in enumerate(zip(*results, strict=True)):
        assert all(reason == "" for _, reason in of_ranks)
        # Of two ranks that need the same in different exchanges, each reads it.
        assert sum(read for read, _ in of_ranks) <= (2.1 if number == 2 else 1.1) * stored


def load_different(path: Path) -> tuple[int, int]:
    """Each rank wants something else, and one wants nothing."""
    rank = dist.get_rank()
    whole = torch.zeros(701, 301)
    state: dict[str, Any] = [{}, {"model": {"wide": whole}}, {"plain": torch.zeros(51, 9)}, {"step": 0}][rank]
    expected: dict[str, Any] = [{}, {"model": {"wide": whole.clone()}}, {"plain": torch.zeros(51, 9)}, {"step": 0}][
        rank
    ]
    torch_load(expected, storage_reader=torch_reader(path))
    report = load_shared(state, path)
    assert values_of(state) == values_of(expected)
    return report.bytes_received, report.bytes_read


def test_ranks_that_need_nothing_take_part(ranks: Ranks, checkpoint: Path) -> None:
    results = ranks.run(4, load_different, checkpoint)
    assert results[0][1] == 0
    assert results[3][0] <= 4096  # headers of rounds


def load_with_hooks(path: Path) -> None:
    for hooked in (range(4), [1]):  # the ranks whose planner has hooks
        planner = [torch_planner, dcp_fast.DefaultLoadPlanner]
        expected, state = state_dict("HSDP"), state_dict("HSDP")
        if dist.get_rank() in hooked:
            torch_load(expected, storage_reader=torch_reader(path), planner=Doubling())
            report = load_shared(state, path, planner=Doubling())
        else:
            torch_load(expected, storage_reader=torch_reader(path), planner=planner[0]())
            report = load_shared(state, path, planner=planner[1]())
        assert report.sharing_fallback_reason == ""
        assert values_of(state) == values_of(expected)


def test_planners_with_hooks(ranks: Ranks, checkpoint: Path) -> None:
    ranks.run(4, load_with_hooks, checkpoint)


def load_in_groups(path: Path) -> None:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = halves[dist.get_rank() // 2]
    for _ in range(2):
        expected, state = {"plain": torch.zeros(51, 9)}, {"plain": torch.zeros(51, 9)}
        torch_load(expected, storage_reader=torch_reader(path), process_group=group)
        report = load_shared(state, path, process_group=group)
        assert values_of(state) == values_of(expected)
        assert report.exchange_rounds == 2  # of headers and of boxes
    for part in halves:
        dist.destroy_process_group(part) if part is group else None


def test_two_loads_in_two_groups(ranks: Ranks, checkpoint: Path) -> None:
    ranks.run(4, load_in_groups, checkpoint)


class NotTheEngines(FileSystemReader):
    def read_data(self, *args: Any) -> Any:
        return super().read_data(*args)


def reasons(path: Path) -> list[str]:
    found = []
    for reader in (FileSystemReader(path), NotTheEngines(path) if dist.get_rank() == 1 else FileSystemReader(path)):
        state = state_dict("rows")
        report = load_shared(state, path, storage_reader=reader)
        found.append(report.sharing_fallback_reason)
    state = {"plain": torch.zeros(51, 9)}
    found.append(load_shared(state, path, no_dist=True).sharing_fallback_reason)
    one = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    found.append(load_shared(state, path, process_group=one).sharing_fallback_reason)
    return found


def test_a_load_that_cannot_share_says_why(ranks: Ranks, checkpoint: Path) -> None:
    for rank, found in enumerate(ranks.run(2, reasons, checkpoint)):
        own = ["another rank cannot share reads", "its read_data is not the engine's"][rank]
        assert found == ["", own, "the load is one of a single process", "the process group has one rank"]


def load_not_alike(path: Path) -> dict[int, str] | str:
    state = {"plain": torch.zeros(51, 9)}
    return failure_of(partial(load_shared, state, path, share_reads=dist.get_rank() != 1))


def test_ranks_that_are_told_differently_fail_at_once(ranks: Ranks, checkpoint: Path) -> None:
    assert ranks.run(3, load_not_alike, checkpoint) == ["ValueError"] * 3


def load_two_copies(path: Path) -> tuple[str, int]:
    """One rank sees a file that is longer than those of the others."""
    mine = path.parent / f"of rank {dist.get_rank()}"
    mine.mkdir(exist_ok=True)
    for file in path.iterdir():
        content = file.read_bytes()
        longer = dist.get_rank() == 1 and file.name == "__0_0.distcp"
        (mine / file.name).write_bytes(content + b"more" if longer else content)
    expected, state = state_dict("replicas"), state_dict("replicas")
    torch_load(expected, storage_reader=torch_reader(mine))
    report = load_shared(state, mine)
    assert values_of(state) == values_of(expected)
    return report.sharing_fallback_reason, report.exchange_rounds


def test_copies_are_shared_only_if_they_are_alike(ranks: Ranks, checkpoint: Path) -> None:
    for reason, rounds in ranks.run(2, load_two_copies, checkpoint):
        assert reason.startswith("ranks see different files: __0_0.distcp (")
        assert rounds == 0


def load_other_step(path: Path) -> int:
    """Ranks have checkpoints of the same sizes and names, and other values."""
    mine = path / f"of rank {dist.get_rank()}"
    dcp.save({"weight": torch.full((300, 5), float(dist.get_rank()))}, checkpoint_id=mine, no_dist=True)
    dist.barrier()
    state = {"weight": torch.full((300, 5), -1.0)}
    report = load_shared(state, mine)
    assert state["weight"].eq(dist.get_rank()).all()
    tensors = path / f"tensors of rank {dist.get_rank()}"
    tensors.mkdir()
    save_file({"weight": torch.full((300, 5), float(dist.get_rank()))}, tensors / "model.safetensors")
    dist.barrier()
    state = {"weight": torch.full((300, 5), -1.0)}
    load_shared(state, tensors)
    assert state["weight"].eq(dist.get_rank()).all()
    return report.bytes_sent


def test_other_files_of_the_same_size_are_not_shared(ranks: Ranks, tmp_path: Path) -> None:
    assert all(sent < 1000 for sent in ranks.run(2, load_other_step, tmp_path))  # headers of rounds


def load_safetensors(path: Path) -> int:
    if dist.get_rank() == 0:
        tensors = {f"w{i}": torch.rand(200, 31).to([torch.float32, torch.bfloat16][i % 2]) for i in range(6)}
        save_file(dict(list(tensors.items())[:4]), path / "a.safetensors")
        save_file(dict(list(tensors.items())[4:]), path / "b.safetensors")
    dist.barrier()
    names = [f"w{i}" for i in range(6 if dist.get_rank() else 4)]  # one rank does not need the second file
    expected, state = ({name: torch.zeros(200, 31) for name in names} for _ in range(2))
    torch_load(expected, storage_reader=HuggingFaceStorageReader(str(path)))
    report = load_shared(state, path)
    assert values_of(state) == values_of(expected)
    return report.bytes_read


def test_safetensors(ranks: Ranks, tmp_path: Path) -> None:
    read = ranks.run(3, load_safetensors, tmp_path)
    assert sum(read) == 3 * 200 * 31 * (4 + 2)


def load_installed(path: Path) -> int:
    expected, state = state_dict("HSDP"), state_dict("HSDP")
    torch_load(expected, storage_reader=torch_reader(path))
    with dcp_fast.install(share_reads=True):
        dcp.load(state, storage_reader=dcp.FileSystemReader(path))
    report = dcp_fast.last_report()
    assert report is not None
    assert values_of(state) == values_of(expected)
    return report.exchange_rounds


def test_install_shares(ranks: Ranks, checkpoint: Path) -> None:
    assert all(rounds > 0 for rounds in ranks.run(4, load_installed, checkpoint))


def load_entries(path: Path) -> tuple[int, int]:
    """Load what is mostly bytes entries, of plain values and of others."""
    values = {f"plain {i}": list(range(100)) for i in range(300)}
    values |= {f"other {i}": torch.full((3000,), i) for i in range(20)}
    if dist.get_rank() == 0:
        dcp.save({"values": {**values, "in a list": [(torch.ones(2000), 1)]}}, checkpoint_id=path, no_dist=True)
    dist.barrier()
    expected, state = ({"values": {**dict.fromkeys(values, 0), "in a list": [(torch.ones(2000), 1)]}} for _ in range(2))
    for name, value in values.items():
        for wanted in (expected, state):
            wanted["values"][name] = torch.zeros_like(value) if isinstance(value, torch.Tensor) else None
    torch_load(expected, storage_reader=torch_reader(path))
    report = load_shared(state, path, exchange_bytes=16 << 20)
    assert values_of(state) == values_of(expected)
    return report.bytes_read, sum(file.stat().st_size for file in path.glob("*.distcp"))


def test_bytes_entries_and_headers_are_read_once(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(4, load_entries, tmp_path / "entries")
    stored = results[0][1]
    assert sum(read for read, _ in results) < 1.5 * stored  # records of tensors are small here, and read twice


def load_fallback(path: Path) -> tuple[int, int, int]:
    """Load what only torch can read."""
    stored = {f"q{i}": torch.quantize_per_tensor(torch.rand(300, 100), 0.1, 0, torch.qint8) for i in range(8)}
    if dist.get_rank() == 0:
        dcp.save(stored, checkpoint_id=path, no_dist=True)
    dist.barrier()
    zero = torch.quantize_per_tensor(torch.zeros(300, 100), 0.1, 0, torch.qint8)
    expected, state = ({name: zero.clone() for name in stored} for _ in range(2))
    torch_load(expected, storage_reader=torch_reader(path))
    report = load_shared(state, path, exchange_bytes=16 << 20)
    assert all(torch.equal(state[name].int_repr(), expected[name].int_repr()) for name in stored)
    return report.bytes_read, report.fallback_records, sum(file.stat().st_size for file in path.glob("*.distcp"))


def test_records_that_torch_reads_are_read_once(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(4, load_fallback, tmp_path / "fallback")
    assert all(records == 8 for _, records, _ in results)
    assert sum(read for read, *_ in results) < 1.3 * results[0][2]


def count_calls(path: Path) -> tuple[list[str], int]:
    with CollectiveCounter() as counter:
        dcp_fast.load({"plain": torch.zeros(51, 9)}, checkpoint_id=path)
    return counter.calls, counter.bytes


def test_without_sharing_a_load_takes_two_small_calls(ranks: Ranks, checkpoint: Path) -> None:
    assert ranks.run(2, count_calls, checkpoint) == [(["all_reduce"] * 2, 32)] * 2


def trace(path: Path) -> tuple[list[dict[str, Any]], dcp_fast.LoadReport]:
    report = load_shared(state_dict("replicas"), path, trace=path.parent / "trace {rank}.json")
    content = json.loads((path.parent / f"trace {dist.get_rank()}.json").read_text())
    return content["traceEvents"], report


def test_report_and_trace_tell_of_the_exchange(ranks: Ranks, checkpoint: Path) -> None:
    """Reads, rounds and placement have tracks of their own, and go on at the same time."""
    for events, report in ranks.run(2, trace, checkpoint):
        tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        spans: dict[str, list[tuple[float, float]]] = {"placement": [], "read": []}
        placed = 0
        for event in events:
            if event["ph"] == "X":
                kind = event["name"] if event["name"] == "read" else tracks[event["tid"]]
                spans.setdefault(kind, []).append((event["ts"], event["ts"] + event["dur"]))
                placed += event["args"]["bytes"] if kind == "placement" else 0
        rounds = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "exchange"]
        assert any(event["name"] == "agree" for event in events)
        assert len(rounds) == len(spans["placement"]) == report.exchange_rounds
        assert placed >= report.bytes_needed - 1000  # of bytes entries
        for kind in ("placement", "read"):
            within = [any(b <= begin and end <= e for b, e in rounds) for begin, end in spans[kind]]
            assert sum(within) >= len(rounds) - 4, (
                kind
            )  # beside a round; the first reads and the last placement are not
        assert "bytes read by all ranks" in str(report)


def test_too_little_memory_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="exchange_bytes"):
        dcp_fast.load({}, checkpoint_id=checkpoint, exchange_bytes=4096)
