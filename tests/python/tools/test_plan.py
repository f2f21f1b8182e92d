"""``dcp-fast plan``: what it foretells is what the ranks of a load then read, send and receive."""

from __future__ import annotations

import io
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import Entry, fill, save, write_checkpoint
from metadata_cases import parse_metadata
from ranks import Ranks
from safetensors_files import write_shards
from shared_reads import counted
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.tensor import Replicate, Shard, init_device_mesh
from torch.distributed.tensor import zeros as zeros_on
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import dcp_fast
from dcp_fast.errors import CorruptMetadataError, FileMissingError, SizeMismatchError, TruncatedFileError
from dcp_fast.metadata.lazy import columns_of
from dcp_fast.tools.cli import main
from dcp_fast.tools.plan import ReadPlan, Sharding, plan_reads

EXCHANGE_BYTES = 1 << 20  # the least: many rounds
HEADERS = 2 * 64  # bytes of a round for each other rank beyond what it needs: the header, and what fills it up

SHARDINGS: dict[str, list[Any]] = {
    "replicate": [Replicate()],
    "rows": [Shard(0)],
    "columns": [Shard(1)],
    "hsdp:2x4": [Replicate(), Shard(0)],
    "hsdp:4x2": [Replicate(), Shard(0)],
    "fsdp+tp:2x4": [Shard(0), Shard(1)],
    "fsdp+tp:4x2": [Shard(0), Shard(1)],
}
# Uneven shards and empty ones, columns whose gaps are read through and others whose gaps are not.
SIZES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "wide": ((37, 150_001), torch.float32),
    "tall": ((5003, 70), torch.bfloat16),
    "long": ((300_011,), torch.float64),
    "cube": ((13, 17, 19), torch.int16),
    "small": ((3, 2), torch.float32),
    "scalar": ((), torch.int64),
    "empty": ((0, 5), torch.float32),
}


def tensors() -> dict[str, torch.Tensor]:
    return {name: fill(size, dtype, 3) for name, (size, dtype) in SIZES.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("plan") / "checkpoint", {**tensors(), "step": 7, "names": ["a", "b"]})


@pytest.fixture(scope="module")
def safetensors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    whole = [(name, (([0] * tensor.dim()), tensor)) for name, tensor in tensors().items()]
    return write_shards(tmp_path_factory.mktemp("plan_hf"), [dict(whole[:2]), dict(whole[2:])])


def mesh_of(sharding: str) -> tuple[int, ...]:
    _, colon, sizes = sharding.partition(":")
    return tuple(map(int, sizes.split("x"))) if colon else (dist.get_world_size(),)


def placements_of(sharding: str, dims: int) -> list[Any]:
    placements = SHARDINGS[sharding]
    if sharding == "columns" and dims == 1:
        return [Shard(0)]
    return [p if not isinstance(p, Shard) or p.dim < dims else Replicate() for p in placements]


def load_all(path: Path, shardings: list[str], is_torchs: bool, ranks_per_node: int) -> list[Any]:
    """What this rank holds by torch, what the reports say of loads without and with sharing, and what left its node."""
    said = []
    for sharding in shardings:
        mesh = init_device_mesh("cpu", mesh_of(sharding))
        holds = {}
        state: dict[str, Any] = {"step": 0, "names": []} if is_torchs else {}
        for name, (size, dtype) in SIZES.items():
            placements = placements_of(sharding, len(size))
            holds[name] = compute_local_shape_and_global_offset(size, mesh, placements)
            state[name] = zeros_on(size, dtype=dtype, device_mesh=mesh, placements=placements)
        reader = (dcp_fast.FileSystemReader if is_torchs else dcp_fast.HuggingFaceStorageReader)(path, io="direct")
        reports = []
        with counted(ranks_per_node) as left_node:
            for share_reads in (False, True):
                dcp_fast.load(state, storage_reader=reader, share_reads=share_reads, exchange_bytes=EXCHANGE_BYTES)
                reports.append(dcp_fast.last_report())
        said.append((holds, *reports, left_node[0]))
    return said


def compare_with_loads(
    ranks: Ranks, path: Path, shardings: list[str], is_torchs: bool, ranks_per_node: int = 8
) -> None:
    world_size = 8
    results = ranks.run(world_size, load_all, path, shardings, is_torchs, ranks_per_node, timeout=240)
    for number, sharding in enumerate(shardings):
        plan = plan_reads(path, sharding, world_size, ranks_per_node=ranks_per_node, exchange_bytes=EXCHANGE_BYTES)
        placed = Sharding.parse(sharding, world_size)
        for rank, result in enumerate(results):
            holds, alone, shared, _ = result[number]
            foretold = plan.of_ranks[rank]
            for name, (sizes, offsets) in holds.items():
                wanted = placed.chunk(SIZES[name][0], placed.place_of(rank))
                assert tuple(wanted[1]) == tuple(sizes), (sharding, rank, name)
                assert tuple(wanted[0]) == tuple(offsets) or 0 in sizes, (sharding, rank, name)
            others = foretold.other_bytes
            assert foretold.needed_bytes == alone.bytes_needed - others == shared.bytes_needed - others
            # What was not foretold, because of bytes entries and headers of records.
            headers = 8192 * alone.records if is_torchs else 0
            most_others = others + headers
            assert 0 <= alone.bytes_read - foretold.alone_bytes - others <= headers, (sharding, rank)
            assert 0 <= shared.bytes_read_by_job - plan.shared_bytes <= 2 * most_others, (sharding, rank)
            rounds = shared.exchange_rounds
            assert is_torchs <= rounds - plan.rounds <= 2 * is_torchs
            for real, expected in (
                (shared.bytes_received, foretold.received_bytes),
                (shared.bytes_sent, foretold.sent_bytes),
            ):
                most = rounds * (world_size - 1) * HEADERS + world_size * most_others
                assert 0 <= real - expected <= most, (sharding, rank)
        assert plan.sent_bytes == sum(reads.received_bytes for reads in plan.of_ranks)
        left_nodes = sum(result[number][3] for result in results) - plan.between_nodes_bytes
        assert 0 <= left_nodes <= world_size * most
        assert plan.needed_once_bytes == sum(tensor.nbytes for tensor in tensors().values())


def test_loads_read_what_was_foretold(ranks: Ranks, checkpoint: Path) -> None:
    compare_with_loads(ranks, checkpoint, list(SHARDINGS), is_torchs=True)


def test_loads_of_safetensors_read_what_was_foretold(ranks: Ranks, safetensors: Path) -> None:
    compare_with_loads(ranks, safetensors, list(SHARDINGS), is_torchs=False)


@pytest.mark.parametrize("ranks_per_node", [4, 3])
def test_loads_on_nodes_send_what_was_foretold(ranks: Ranks, checkpoint: Path, ranks_per_node: int) -> None:
    shardings = ["replicate", "columns", "hsdp:4x2", "fsdp+tp:2x4"]
    compare_with_loads(ranks, checkpoint, shardings, is_torchs=True, ranks_per_node=ranks_per_node)


def planned(path: Path, sharding: str = "replicate", ranks: int = 4, **options: Any) -> ReadPlan:
    return plan_reads(path, sharding, ranks, **{"ranks_per_node": 8, **options})


def test_replicas_on_nodes(checkpoint: Path) -> None:
    plan = planned(checkpoint, ranks=4, ranks_per_node=2)
    assert [reads.node for reads in plan.of_ranks] == [0, 0, 1, 1]
    assert plan.needed_bytes == 4 * plan.needed_once_bytes
    assert plan.alone_bytes >= plan.needed_bytes
    assert plan.needed_once_bytes <= plan.shared_bytes < 1.05 * plan.needed_once_bytes
    # Each byte goes to three others, of which two are on the other node: one passes it on.
    assert plan.sent_bytes == 3 * plan.needed_once_bytes
    assert plan.between_nodes_bytes == plan.needed_once_bytes
    assert planned(checkpoint, ranks=4).between_nodes_bytes == 0


def test_one_rank_has_nobody_to_share_with(checkpoint: Path) -> None:
    plan = planned(checkpoint, "rows", 1)
    assert plan.sent_bytes == 0
    assert plan.needed_bytes == plan.needed_once_bytes


def test_what_is_not_shared_is_told_apart(tmp_path: Path) -> None:
    sparse = torch.eye(300).to_sparse()
    write_checkpoint(tmp_path, {"sparse": Entry.of(sparse), "dense": Entry.of(torch.ones(100)), "step": 3})
    plan = planned(tmp_path, ranks=3)
    (entry,) = dcp_fast.inspect(tmp_path, "sparse").entries
    (step,) = dcp_fast.inspect(tmp_path, "step").entries
    assert plan.needed_once_bytes == 400
    assert [reads.other_bytes for reads in plan.of_ranks] == [entry.record_bytes + step.record_bytes] * 3


def test_metadata_that_only_the_unpickler_reads(checkpoint: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = {"set": {1}}
    pickled = pickle.dumps(metadata)
    assert columns_of(parse_metadata(pickled, "")) is None
    (tmp_path / ".metadata").write_bytes(pickled)
    for file in checkpoint.glob("*.distcp"):
        os.link(file, tmp_path / file.name)
    expected = planned(checkpoint, "columns", 8)
    assert planned(tmp_path, "columns", 8) == replace(expected, path=str(tmp_path / ".metadata"))
    assert planned(tmp_path / ".metadata", "columns", 8, trust_metadata=True).alone_bytes == expected.alone_bytes


def test_a_checkpoint_of_nothing(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))
    plan = planned(tmp_path, "rows", 5)
    assert (plan.needed_once_bytes, plan.alone_bytes, plan.shared_bytes, plan.rounds) == (0, 0, 0, 0)
    assert len(plan.of_ranks) == 5


def changed(checkpoint: Path, path: Path, change: Any) -> Path:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(metadata)
    path.mkdir()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    for file in checkpoint.glob("*.distcp"):
        os.link(file, path / file.name)
    return path


def test_what_is_wrong_is_an_error_that_says_where(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "ckpt", {"weight": torch.ones(40, 30), "step": 7})
    with pytest.raises(FileNotFoundError):
        planned(tmp_path / "nowhere")

    def forget(metadata: Metadata, fqn: str) -> None:
        metadata.storage_data = {key: value for key, value in metadata.storage_data.items() if key.fqn != fqn}

    for fqn in ("weight", "step"):
        with pytest.raises(CorruptMetadataError, match="tells no file") as info:
            planned(changed(checkpoint, tmp_path / f"without {fqn}", lambda metadata, fqn=fqn: forget(metadata, fqn)))
        assert info.value.fqn == fqn

    def grow(metadata: Metadata, size: tuple[int, ...]) -> None:
        entry = metadata.state_dict_metadata["weight"]
        entry.size = torch.Size(size)
        entry.chunks = [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size(size))]

    with pytest.raises(SizeMismatchError) as mismatch:
        planned(changed(checkpoint, tmp_path / "larger", lambda metadata: grow(metadata, (41, 30))), "columns")
    assert mismatch.value.fqn == "weight"
    with pytest.raises(CorruptMetadataError, match="impossible"):
        planned(changed(checkpoint, tmp_path / "absurd", lambda metadata: grow(metadata, (1 << 40, 1 << 40))), "rows")
    (file,) = checkpoint.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(TruncatedFileError) as cut:
        planned(checkpoint)
    assert (cut.value.path, cut.value.fqn) == (str(file), "weight")
    file.unlink()
    with pytest.raises(FileMissingError):
        planned(checkpoint)


def test_records_that_overlap_cannot_be_shared(tmp_path: Path) -> None:
    """One record holds the bytes of another one, whose elements begin within elements of the first."""
    inner = io.BytesIO()
    torch.save(torch.ones(1000, dtype=torch.float64), inner)
    content = b"!" + inner.getvalue()
    outer = torch.frombuffer(bytearray(content + bytes(-len(content) % 8)), dtype=torch.float64)
    write_checkpoint(tmp_path, {"outer": Entry.of(outer), "inner": Entry.of(torch.ones(1000, dtype=torch.float64))})
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    (file,) = tmp_path.glob("*.distcp")
    for index, info in metadata.storage_data.items():
        if index.fqn == "inner":
            info.offset, info.length = file.read_bytes().index(content) + 1, len(content) - 1
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    plan = planned(tmp_path, ranks=2)
    assert plan.obstacle == "records of the checkpoint overlap"
    assert plan.needed_once_bytes == outer.nbytes + 8000
    assert plan.shared_bytes == plan.alone_bytes >= 2 * plan.needed_once_bytes
    assert (plan.sent_bytes, plan.rounds) == (0, 0)


# The command line


def test_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(checkpoint), "--ranks", "8", "--sharding", "hsdp:2x4"]
    assert main([*arguments, "--ranks-per-node", "4", "--bandwidth", "0.5"]) == 0
    text = capsys.readouterr().out
    plan = planned(checkpoint, "hsdp:2x4", 8, ranks_per_node=4)
    facts, table = text.split("\n\n")
    lines = {line[:18].strip(): line[18:] for line in facts.splitlines()}
    assert lines["checkpoint"] == str(checkpoint / ".metadata")
    assert lines["ranks"] == "8 on 2 nodes, hsdp:2x4"
    assert f"({plan.needed_once_bytes:,} bytes), each byte once" in lines["needed"]
    assert f"({plan.alone_bytes:,} bytes), 2" in lines["read alone"]
    assert f"({plan.shared_bytes:,} bytes), 1" in lines["read shared"]
    assert lines["sent"].endswith(f" in {plan.rounds} rounds")
    assert f"({plan.between_nodes_bytes:,} bytes)" in lines["between nodes"]
    assert lines["time shared"].startswith(f"{plan.shared_bytes / 5e8:.3g} s")
    heading, *rows = table.splitlines()
    assert heading.split() == ["rank", "node", "needed", "alone", "shared", "sent", "received"]
    assert [int(number.replace(",", "")) for number in rows[5].split()] == list(vars(plan.of_ranks[5]).values())[:7]
    assert main(arguments) == 0
    assert "time shared" not in capsys.readouterr().out


def test_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(checkpoint), "--ranks", "4", "--sharding", "columns", "--json"]
    plan = planned(checkpoint, "columns", 4, exchange_bytes=EXCHANGE_BYTES)
    assert main([*arguments, "--exchange-bytes", str(EXCHANGE_BYTES), "--bandwidth", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.pop("alone_seconds") == plan.alone_bytes / 2e9
    assert document.pop("shared_seconds") == plan.shared_bytes / 2e9
    assert document == {**vars(plan), "of_ranks": list(map(vars, plan.of_ranks))}
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["alone_seconds"] is None


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    with pytest.raises(SystemExit) as info:
        main(["plan", "--help"])
    assert info.value.code == 0
    text = capsys.readouterr().out
    plan = planned(checkpoint)
    for key in (*vars(plan), *vars(plan.of_ranks[0]), "alone_seconds", "shared_seconds"):
        assert key in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "8", "--sharding", "diagonal"], "no such sharding: 'diagonal'; there are replicate, rows"),
        (["--ranks", "8", "--sharding", "hsdp"], "hsdp needs the sizes of its mesh"),
        (["--ranks", "8", "--sharding", "hsdp:8"], "hsdp needs the sizes of its mesh"),
        (["--ranks", "8", "--sharding", "hsdp:2x3"], "a mesh of 2x3 has 6 ranks, not 8"),
        (["--ranks", "8", "--sharding", "rows:8"], "takes no sizes"),
        (["--ranks", "0", "--sharding", "rows"], "a whole number from 1 to 4096"),
        (["--ranks", "9999999", "--sharding", "rows"], "a whole number from 1 to 4096"),
        (["--ranks", "8"], "--sharding"),
        (["--ranks", "8", "--sharding", "rows", "--exchange-bytes", "1000"], "--exchange-bytes"),
        (["--ranks", "8", "--sharding", "rows", "--bandwidth", "0"], "a number above 0"),
        (["--ranks", "8", "--sharding", "rows", "--bandwidth", "fast"], "a number above 0"),
    ],
)
def test_wrong_usage(checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as info:
        main(["plan", str(checkpoint), *arguments])
    assert info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "nowhere"), "--ranks", "2", "--sharding", "rows"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dcp-fast: ")
    assert "nowhere" in error
