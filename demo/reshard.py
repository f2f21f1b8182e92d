"""Saves a training state with torch DCP on one set of ranks, and loads it resharded on another, twice.

Four ranks save a small transformer with its optimizer state, sharded by rows. Two new ranks load it sharded by
columns, with torch and with dcp_fast, and compare every entry bit for bit; then one process loads it whole. The model
alone is also written as Hugging Face has it, in safetensors files with an index, and loaded in the same ways. The exit
status says whether all was equal.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import training
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save as torch_save
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

import dcp_fast

ROWS, COLUMNS = 0, 1
Build = Callable[[training.Make, bool], training.State]


@dataclass(frozen=True)
class Outcome:
    """What one rank found."""

    rank: str
    torch_seconds: float
    dcp_fast_seconds: float
    megabytes: float
    tensors: int
    others: int
    differing: list[str]
    report: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo/run", description=__doc__.partition("\n")[0])
    parser.add_argument("--mb", type=float, default=400, help="size of the state in megabytes")
    parser.add_argument("--save-ranks", type=int, default=4)
    parser.add_argument("--load-ranks", type=int, default=2)
    options = parser.parse_args()

    print(f"torch {torch.__version__}, dcp_fast from {Path(dcp_fast.__file__).parent}")
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        run_ranks(save_as_rank, options.save_ranks, scratch, options.mb)
        files = list(Path(scratch, "checkpoint").iterdir())
        size = sum(file.stat().st_size for file in files) / 1e6
        print(f"saved by {options.save_ranks} ranks by rows: {len(files)} files, {size:.0f} MB", end="")
        print(f", in {time.perf_counter() - start:.1f} s with starting the ranks")
        write_model(scratch, options.mb)
        run_ranks(load_as_rank, options.load_ranks, scratch, options.mb)
        by_rank = [read_outcomes(scratch, rank) for rank in range(options.load_ranks)]
        by_rank.append(load_whole(scratch, options.mb))
        outcomes = [outcome for kind in zip(*by_rank, strict=True) for outcome in kind]
    print(f"loaded by {options.load_ranks} other ranks by columns, then whole by one process:\n")
    print_table(outcomes)
    print(f"\ndcp_fast's report, rank 0:\n{outcomes[0].report}\n")

    wrong = [f"{outcome.rank}: {name}" for outcome in outcomes for name in outcome.differing]
    for line in wrong:
        print(f"DIFFERS: {line}")
    compared = f"{sum(o.tensors for o in outcomes)} tensors and {sum(o.others for o in outcomes)} other entries"
    if wrong:
        print(f"FAILED: of {compared}, {len(wrong)} are not what they should be")
        return 1
    print(f"OK: {compared} are equal to torch's and to what was saved, bit for bit")
    return 0


def run_ranks(main_of_rank: Callable[[int, int, str, float], None], ranks: int, scratch: str, megabytes: float) -> None:
    spawn(main_of_rank, args=(ranks, scratch, megabytes), nprocs=ranks)  # type: ignore[no-untyped-call]


def save_as_rank(rank: int, ranks: int, scratch: str, megabytes: float) -> None:
    join(rank, ranks, Path(scratch, "save-rendezvous"))
    mesh = init_device_mesh("cpu", (ranks,))
    values = training.on_mesh(mesh, ROWS, training.full_values)
    state = training.build(megabytes, values, training.full_values, trained=True)
    torch_save(state, checkpoint_id=Path(scratch, "checkpoint"))
    dist.destroy_process_group()


def write_model(scratch: str, megabytes: float) -> None:
    """The model as others get it: whole tensors, in two safetensors files."""
    model = training.build(megabytes, training.full_values, training.full_values, trained=True)["model"]
    files = {name: 1 + number * 2 // len(model) for number, name in enumerate(model)}
    path = Path(scratch, "model")
    path.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch_save(model, storage_writer=HuggingFaceStorageWriter(str(path), fqn_to_index_mapping=files))
    print(f"the model in {len(list(path.glob('*.safetensors')))} safetensors files with an index")


def load_as_rank(rank: int, ranks: int, scratch: str, megabytes: float) -> None:
    join(rank, ranks, Path(scratch, "load-rendezvous"))
    mesh = init_device_mesh("cpu", (ranks,))

    def build(make: training.Make, trained: bool) -> training.State:
        return training.build(megabytes, training.on_mesh(mesh, COLUMNS, make), make, trained=trained)

    outcomes = load_both_kinds(f"rank {rank} of {ranks}", build, scratch)
    outcome_path(scratch, rank).write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    dist.destroy_process_group()


def load_whole(scratch: str, megabytes: float) -> list[Outcome]:
    def build(make: training.Make, trained: bool) -> training.State:
        return training.build(megabytes, make, make, trained=trained)

    with warnings.catch_warnings():
        # torch warns of a load without a process group, which is what is wanted here.
        warnings.simplefilter("ignore", UserWarning)
        return load_both_kinds("whole", build, scratch)


def load_both_kinds(rank: str, build: Build, scratch: str) -> list[Outcome]:
    """The checkpoint, and the model in safetensors files."""

    def build_model(make: training.Make, trained: bool) -> training.State:
        model: training.State = build(make, trained)["model"]
        return model

    checkpoint, model = Path(scratch, "checkpoint"), Path(scratch, "model")
    return [
        load_both_ways(rank, build, checkpoint, None),
        load_both_ways(f"{rank}, HF", build_model, model, HuggingFaceStorageReader(str(model))),
    ]


def load_both_ways(rank: str, build: Build, checkpoint: Path, torchs_reader: StorageReader | None) -> Outcome:
    by_torch, by_dcp_fast = build(training.zeros, False), build(training.zeros, False)
    where = {"checkpoint_id": checkpoint} if torchs_reader is None else {"storage_reader": torchs_reader}
    torch_seconds = timed(lambda: torch_load(by_torch, **where))
    dcp_fast_seconds = timed(lambda: dcp_fast.load(by_dcp_fast, checkpoint_id=checkpoint))
    report = str(dcp_fast.last_report())

    differing, tensors, others = training.differences(by_dcp_fast, by_torch)
    # Two loaders could be wrong alike: what was saved has the last word.
    differing += [
        f"{name} (as saved)" for name in training.differences(by_dcp_fast, build(training.full_values, True))[0]
    ]
    megabytes = training.local_bytes(by_torch) / 1e6
    return Outcome(rank, torch_seconds, dcp_fast_seconds, megabytes, tensors, others, differing, report)


def timed(load: Callable[[], None]) -> float:
    # A full collection takes longer than a load, and would hit whichever load comes when one is due.
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    load()
    return time.perf_counter() - start


def join(rank: int, ranks: int, rendezvous: Path) -> None:
    # The ranks share this machine's cores.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)


def outcome_path(scratch: str, rank: int) -> Path:
    return Path(scratch, f"outcome-{rank}.json")


def read_outcomes(scratch: str, rank: int) -> list[Outcome]:
    return [Outcome(**fields) for fields in json.loads(outcome_path(scratch, rank).read_text())]


def print_table(outcomes: list[Outcome]) -> None:
    print(f"{'':18}{'MB':>8}{'torch s':>10}{'dcp_fast s':>12}{'ratio':>8}{'differing':>11}")
    for outcome in outcomes:
        ratio = outcome.torch_seconds / outcome.dcp_fast_seconds
        print(
            f"{outcome.rank:18}{outcome.megabytes:8.0f}{outcome.torch_seconds:10.3f}"
            f"{outcome.dcp_fast_seconds:12.3f}{ratio:7.1f}x{len(outcome.differing):11}"
        )


if __name__ == "__main__":
    sys.exit(main())
