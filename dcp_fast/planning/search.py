"""The search: which boxes of which stored chunks does a state dict want?

State-dict semantics are torch's own, called rather than copied; only the search for overlaps is native.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import (
    create_read_items_for_chunk_list as torch_read_items_for_chunk_list,
)
from torch.distributed.tensor import DTensor

from dcp_fast import _native
from dcp_fast._torch import ShardedTensor, create_chunk_list, is_checkpointable_tensor
from dcp_fast.metadata.lazy import LazyDict, columns_of
from dcp_fast.observe.report import current_report
from dcp_fast.planning.column_plan import ColumnPlan, PlannedTensors, bytes_item
from dcp_fast.planning.values import is_whole, plain_local_tensor

logger = logging.getLogger("dcp_fast")


def create_read_items_for_chunk_list(
    fqn: str,
    checkpoint_md: TensorStorageMetadata,
    local_chunks: list[ChunkStorageMetadata],
) -> list[ReadItem]:
    """Drop-in for ``torch.distributed.checkpoint.planner_helpers.create_read_items_for_chunk_list``.

    Args:
        fqn: the FQN that the items name.
        checkpoint_md: the stored tensor and its chunks.
        local_chunks: chunks of the same global tensor that are wanted.

    Returns:
        One TENSOR item for each overlap of a wanted and a stored chunk, in torch's order.
    """
    stored = checkpoint_md.chunks
    if not local_chunks or not stored:
        return []
    dims = len(local_chunks[0].offsets)
    wanted_values, stored_values = _flatten(local_chunks, dims), _flatten(stored, dims)
    if wanted_values is None or stored_values is None:
        # Chunks of different dimensions: torch has its own way with them.
        return torch_read_items_for_chunk_list(fqn, checkpoint_md, local_chunks)
    rows = _native.find_overlaps(dims, wanted_values, len(local_chunks), stored_values, len(stored))
    items = []
    width = 2 + 3 * dims
    for at in range(0, len(rows), width):
        wanted_index, stored_index = rows[at], rows[at + 1]
        box = rows[at + 2 : at + width]
        items.append(
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(fqn, local_chunks[wanted_index].offsets, wanted_index),
                dest_offsets=torch.Size(box[dims : 2 * dims]),
                storage_index=MetadataIndex(fqn, stored[stored_index].offsets, stored_index),
                storage_offsets=torch.Size(box[:dims]),
                lengths=torch.Size(box[2 * dims :]),
            )
        )
    return items


def _flatten(chunks: Sequence[ChunkStorageMetadata], dims: int) -> list[int] | None:
    """Offsets and sizes of all chunks in a row; None if any has other than ``dims`` dimensions."""
    values: list[int] = []
    for chunk in chunks:
        offsets, sizes = chunk.offsets, chunk.sizes
        if len(offsets) != dims or len(sizes) != dims:
            return None
        values += offsets
        values += sizes
    return values


def create_default_local_load_plan(state_dict: dict[str, Any], metadata: Metadata, strict: bool = True) -> LoadPlan:
    """Drop-in for ``torch.distributed.checkpoint.default_planner.create_default_local_load_plan``.

    Where no stored chunk covers a part of a wanted tensor, the plan leaves that part out, as torch's does. Unlike
    torch, this function then logs a warning that names the tensors.

    Args:
        state_dict: what is wanted, flat: tensors or values by FQN.
        metadata: of the checkpoint.
        strict: whether a key that the checkpoint lacks is an error. If not, it is skipped.

    Raises:
        RuntimeError: the checkpoint lacks a key, and ``strict`` is set.
        ValueError: a tensor has another size in the checkpoint, or an entry is of another kind there.
    """
    if (report := current_report()) is not None:
        report.planned_natively = True
    search = _Search(metadata)
    find, add_whole, add_like_before = search.finder(), search.add_whole, search.add_like_before
    for fqn, value in state_dict.items():
        entry = find(fqn)
        if entry is None:
            if strict:
                raise RuntimeError(f"Missing key in checkpoint state_dict: {fqn}.")
            continue
        number, stored_size = entry
        if number is not None and stored_size is not None:
            if type(value) is DTensor:
                if add_like_before(fqn, number, stored_size, value):
                    continue
            elif is_whole(value) and value.shape == stored_size:
                add_whole(fqn, number)
                continue
        if stored_size is not None and getattr(value, "size", None) is not None:
            size = global_size(value)
            if stored_size != size:
                raise ValueError(f"Size mismatch between saved {torch.Size(stored_size)} and current: {size} for {fqn}")
        # A rank outside the mesh of a DTensor on a sub-mesh holds nothing of it.
        if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None:
            continue
        if stored_size is None:
            search.add_bytes(fqn)
            continue
        try:
            wanted = search.wanted_chunks(value)
        except ValueError as error:
            raise ValueError(
                f"Invalid checkpoint metadata for {fqn}, expected BytesStorageMetadata but found "
                f"{TensorStorageMetadata}",
            ) from error
        search.add_chunks(fqn, number, len(stored_size), wanted)
    plan, incomplete = search.run()
    if incomplete:
        uncovered = [fqn for fqn in state_dict if fqn in incomplete]
        logger.warning(
            "the checkpoint has no data for parts of %d tensors, which keep what they hold: %s%s",
            len(uncovered),
            ", ".join(uncovered[:10]),
            ", ..." if len(uncovered) > 10 else "",
        )
    return plan


def _geometry(value: DTensor) -> tuple[int, Any, torch.Size]:
    spec = value._spec  # its attributes are plain, those of the tensor are not
    return id(spec.mesh), spec.placements, value.shape


def _volume(sizes: Any) -> int:
    return sum(map(math.prod, sizes))


class _Search:
    """Collects what is wanted of all tensors, then finds all overlaps in one native call.

    That call compares with the columns of the metadata. If there are none, or if an entry exists as an object, which
    somebody may have changed, the chunks of that entry are compared at once, tensor by tensor.

    Attributes:
        columns: of the metadata, or None.
        requests: for the native call: of each tensor the number of its entry, and the chunks that are wanted of it.
        fqns, wanted: of each request: its FQN and chunks, as in :class:`PlannedTensors`.
        made: items that need no native call, each with the number of requests before it.
        incomplete: FQNs of tensors of which the checkpoint lacks something.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata.state_dict_metadata
        self.columns = columns_of(metadata)
        self.requests: list[int] = []
        self.fqns: list[str] = []
        self.wanted: list[Sequence[ChunkStorageMetadata] | None] = []
        self.made: list[tuple[int, ReadItem | str]] = []  # of bytes entries: the FQN
        self.incomplete: set[str] = set()
        self.dtensor_chunks: dict[Any, tuple[list[ChunkStorageMetadata], tuple[int, ...], torch.Size]] = {}

    def finder(self) -> Callable[[str], tuple[int | None, Sequence[int] | None] | None]:
        """A function of a key. It returns None if the checkpoint lacks the key, else two facts about its entry.

        The first is the entry's number in the columns, None if the entry must be looked at as an object. The second is
        the size of the tensor, None for a bytes entry.
        """
        if self.columns is not None and cast(LazyDict[str, Any], self.metadata).untouched_columns is not None:
            return self.columns.find_size
        return self._find

    def _find(self, fqn: str) -> tuple[int | None, Sequence[int] | None] | None:
        if self.columns is not None and not cast(LazyDict[str, Any], self.metadata).made(fqn):
            return self.columns.find_size(fqn)
        entry = self.metadata.get(fqn)
        if entry is None:
            return None
        return None, entry.size if isinstance(entry, TensorStorageMetadata) else None

    def wanted_chunks(self, value: Any) -> list[ChunkStorageMetadata]:
        """torch's ``_create_chunk_list``; the geometry of DTensors that are alike is computed once."""
        chunks = create_chunk_list(value)
        if plain_local_tensor(value) is not None:
            geometry = _geometry(value)
            values = _flatten(chunks, len(geometry[2]))
            if values is not None:
                self.dtensor_chunks[geometry] = chunks, (len(chunks), *values), geometry[2]
        return chunks

    def add_like_before(self, fqn: str, number: int, stored_size: Sequence[int], value: DTensor) -> bool:
        """Add a DTensor like one before, on a mesh that this rank belongs to. False if there was none."""
        # plain_local_tensor, without a call: a load may have 100,000 of them.
        local = value._local_tensor
        if type(local) is not torch.Tensor or local.__dict__:
            return False
        known = self.dtensor_chunks.get(_geometry(value))
        if known is None or known[2] != stored_size:
            return False
        chunks, request, _ = known
        if chunks:
            self.requests += (number, *request)
            self.fqns.append(fqn)
            self.wanted.append(chunks)
        return True

    def add_bytes(self, fqn: str) -> None:
        self.made.append((len(self.fqns), fqn))

    def add_whole(self, fqn: str, number: int) -> None:
        self.requests += (number, _native.WHOLE)
        self.fqns.append(fqn)
        self.wanted.append(None)

    def add_chunks(self, fqn: str, number: int | None, dims: int, wanted: list[ChunkStorageMetadata]) -> None:
        if not wanted:
            return
        values = None if number is None else _flatten(wanted, dims)
        if values is not None:
            assert number is not None
            self.requests += (number, len(wanted), *values)
            self.fqns.append(fqn)
            self.wanted.append(wanted)
            return
        stored = cast(TensorStorageMetadata, self.metadata[fqn])
        items = create_read_items_for_chunk_list(fqn, stored, wanted)
        if _volume(item.lengths for item in items) < _volume(chunk.sizes for chunk in wanted):
            self.incomplete.add(fqn)
        self.made += ((len(self.fqns), item) for item in items)

    def run(self) -> tuple[LoadPlan, set[str]]:
        """The plan, in the order of the state dict, and ``incomplete``."""
        if self.columns is None:
            items = [bytes_item(item) if isinstance(item, str) else item for _, item in self.made]
            return LoadPlan(items), self.incomplete
        boxes = _native.find_boxes(self.columns, self.requests)
        self.incomplete.update(self.fqns[request] for request in boxes.uncovered)
        plan = ColumnPlan.of(PlannedTensors(self.columns, boxes, self.fqns, self.wanted), self.made)
        if all(isinstance(item, str) for _, item in self.made):
            return plan, self.incomplete
        return LoadPlan(plan.items), self.incomplete


def global_size(value: Any) -> torch.Size:
    """The size of the global tensor that a value of a state dict is, or is a part of, in elements."""
    if isinstance(value, ShardedTensor):
        return value.metadata().size  # as size() returns, which takes longer and warns
    size: torch.Size = torch.Size(value.global_shape) if is_checkpointable_tensor(value) else value.size()
    return size
