"""A reader of another project whose records are DCP's, and what tests of such readers share."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from helpers import fill, torch_reader
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

import dcp_fast

FLOAT = torch.float32
STORED = {"t": fill((300, 5), FLOAT), "u": fill((7,), torch.int8), "n": [1, 2]}


def zeros() -> dict[str, Any]:
    return {"t": torch.zeros(300, 5), "u": torch.zeros(7, dtype=torch.int8), "n": [0, 0]}


def report_of(load: Callable[..., None], state: dict[str, Any], **arguments: Any) -> dcp_fast.LoadReport:
    before = dcp_fast.last_report()
    load(state, **arguments)
    report = dcp_fast.last_report()
    assert report is not None
    assert report is not before
    return report


def torch_load_unswitched(state: dict[str, Any], reader: Any) -> None:
    """What torch's own functions make of a reader, also while dcp_fast is installed."""
    metadata = torch_metadata(reader)
    planner = dcp.DefaultLoadPlanner()
    planner.set_up_planner(state, metadata)
    reader.set_up_storage_reader(metadata, True)
    read = type(reader).read_data
    getattr(read, "__wrapped__", read)(reader, planner.create_local_plan(), planner)


def torch_metadata(reader: Any) -> Metadata:
    read = type(reader).read_metadata
    metadata: Metadata = getattr(read, "__wrapped__", read)(reader)
    return metadata


@dataclass
class Info:
    """Where a record lies, in words of another project."""

    relative_path: str
    offset: int
    length: int


class Foreign(dcp.StorageReader):
    """A reader that was written anew, and whose records are DCP's."""

    def __init__(self, path: Any) -> None:
        self.path = path
        self.reads = 0
        self.infos: Callable[[Any], Any] = lambda info: Info(info.relative_path, info.offset, info.length)

    @property
    def checkpoint_id(self) -> Any:
        return self.path

    def reset(self, checkpoint_id: Any = None) -> None:
        self.path = checkpoint_id or self.path

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        metadata = torch_metadata(torch_reader(self.path))
        metadata.storage_data = {index: self.infos(info) for index, info in metadata.storage_data.items()}
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:  # type: ignore[override]
        self.storage_data = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        self.reads += 1
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            record = io.BytesIO(self.record(info))
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, record)
            else:
                value = torch.load(record, weights_only=False)
                target = planner.resolve_tensor(item).detach()
                target.copy_(narrow_tensor_by_index(value, item.storage_offsets, item.lengths))
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def record(self, info: Any) -> bytes:
        return Path(f"{self.path}/{info.relative_path}").read_bytes()[info.offset : info.offset + info.length]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
