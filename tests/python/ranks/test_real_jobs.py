"""What training jobs do with torch's own wrappers: FSDP2, HSDP, tensor parallelism and DDP, with shared reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from helpers import image, torch_load, torch_reader
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

import dcp_fast

WIDTH = 512


class Net(nn.Module):
    """Weights of a MiB and more, beside which headers are nothing; the rows of one do not divide by the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, WIDTH + 9)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.down(torch.relu(self.up(x)))))
        return out


class Job:
    """A model in one of torch's wrappers, and its optimizer."""

    def __init__(self, layout: str, seed: int, rate: float = 0.01) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = Net()
        if layout == "DDP":
            self.model = DistributedDataParallel(self.model)
        else:
            shape, names = {
                "FSDP": ((4,), ("shard",)),
                "HSDP": ((2, 2), ("replicate", "shard")),
                "FSDP+TP": ((2, 2), ("shard", "tensor")),
            }[layout]
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            if layout == "FSDP+TP":
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(self.model, mesh["tensor"], plan)
                mesh = mesh["shard"]
            for part in self.model.children():
                fully_shard(part, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate)

    def step(self) -> None:
        """Train with the same batch on all ranks, so that gradients are the same in all layouts."""
        self.optimizer.zero_grad()
        self.model(batch(1)).square().mean().backward()
        self.optimizer.step()

    def output(self) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = self.model(batch(2))
        return out

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def resume(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def batch(seed: int) -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))


def overwrite(state: dict[str, Any]) -> None:
    """Overwrite what was loaded."""
    for value in tree_leaves(state):
        if isinstance(value, torch.Tensor):
            (value.to_local() if isinstance(value, DTensor) else value).detach().fill_(7)
    for group in state["optimizer"]["param_groups"]:
        group["lr"] = 7.0


# In which layout a job saves, and in which ones others go on from there.
CASES = [("FSDP", "FSDP"), ("FSDP", "HSDP"), ("FSDP", "DDP"), ("HSDP", "HSDP"), ("FSDP+TP", "FSDP+TP"), ("DDP", "DDP")]
# How often the ranks of a layout need most weights.
REPLICAS = {"FSDP": 1, "HSDP": 2, "FSDP+TP": 1, "DDP": 4}

Case = tuple[str, str]


def train_and_save(folder: Path) -> dict[str, list[torch.Tensor]]:
    """The outputs of the job of each layout when it was saved, and a step later."""
    outputs = {}
    for layout in REPLICAS:
        job = Job(layout, 1)
        job.step()
        dcp.save(job.state(), checkpoint_id=folder / layout)
        outputs[layout] = [job.output()]
        job.step()
        outputs[layout].append(job.output())
        assert not torch.equal(*outputs[layout])
    return outputs


def go_on(folder: Path) -> dict[Case, tuple[dcp_fast.LoadReport, dcp_fast.LoadReport]]:
    """Load each case with torch, with dcp_fast, and with it installed to share reads, and train on.

    Returns:
        The reports of the loads without sharing and with it.
    """
    outputs = train_and_save(folder)
    jobs, states, expected, reports = {}, {}, {}, {}
    for case in CASES:
        stored, layout = case
        jobs[case] = Job(layout, 2, rate=0.5)
        state = states[case] = jobs[case].state()
        torch_load(state, storage_reader=torch_reader(folder / stored))
        expected[case] = image(state)
        overwrite(state)
        assert image(state) != expected[case], case
        dcp_fast.load(state, checkpoint_id=folder / stored)
        assert image(state) == expected[case], case
        reports[case] = last_report()
        overwrite(state)
    both = {}
    with dcp_fast.install(share_reads=True):
        for case, state in states.items():
            dcp.load(state, checkpoint_id=folder / case[0])
            both[case] = reports[case], last_report()
    for case, job in jobs.items():
        assert image(states[case]) == expected[case], case
        job.resume(states[case])
        assert torch.equal(job.output(), outputs[case[0]][0]), case
        job.step()
        assert torch.equal(job.output(), outputs[case[0]][1]), case
    return both


def last_report() -> dcp_fast.LoadReport:
    report = dcp_fast.last_report()
    assert report is not None
    return report


def test_jobs_go_on_as_if_they_had_not_stopped(fresh_ranks: Ranks, tmp_path: Path) -> None:
    results = fresh_ranks.run(4, go_on, tmp_path)
    for case in CASES:
        stored, layout = case
        in_files = sum(file.stat().st_size for file in (tmp_path / stored).glob("*.distcp"))
        alone, shared = zip(*(of_rank[case] for of_rank in results), strict=True)
        for report in (*alone, *shared):
            assert report.is_fast, (case, str(report))
            assert report.fallback_records == 0, case
        assert [report.sharing_fallback_reason for report in shared] == [""] * 4, case
        assert sum(report.bytes_read for report in shared) <= 1.05 * in_files, case
        # What sharing saves: else the bound above would say nothing.
        assert sum(report.bytes_read for report in alone) >= 0.95 * REPLICAS[layout] * in_files, case
