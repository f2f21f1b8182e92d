"""Planning: which boxes of which stored chunks does this rank need?

State-dict semantics are torch's own, called rather than copied; only the search for overlaps is native.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint import _version
from torch.distributed.checkpoint import default_planner as torch_planner
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import (
    _create_chunk_list,
    _create_read_items,
)
from torch.distributed.checkpoint.planner_helpers import (
    create_read_items_for_chunk_list as _torch_create_read_items,
)
from torch.distributed.tensor import DTensor

from dcp_fast import _native
from dcp_fast.garbage import paused_collection
from dcp_fast.stand_in import StandIn

__all__ = ["DefaultLoadPlanner", "create_default_local_load_plan", "create_read_items_for_chunk_list"]

logger = logging.getLogger("dcp_fast")

try:  # torch 2.14 lets a local shard carry the shape of its global tensor
    from torch.distributed.checkpoint.protocol import _is_checkpointable_tensor
except ImportError:

    def _is_checkpointable_tensor(value: object) -> bool:
        return False


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
        return _torch_create_read_items(fqn, checkpoint_md, local_chunks)
    rows = _native.find_overlaps(dims, wanted_values, len(local_chunks), stored_values, len(stored))
    items = []
    width = 2 + 3 * dims
    for at in range(0, len(rows), width):
        wanted_index, stored_index = rows[at], rows[at + 1]
        boxes = rows[at + 2 : at + width]
        items.append(
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(fqn, local_chunks[wanted_index].offsets, wanted_index),
                dest_offsets=torch.Size(boxes[dims : 2 * dims]),
                storage_index=MetadataIndex(fqn, stored[stored_index].offsets, stored_index),
                storage_offsets=torch.Size(boxes[:dims]),
                lengths=torch.Size(boxes[2 * dims :]),
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

    Raises as torch does: RuntimeError for a key that is not in the checkpoint (if ``strict``), ValueError for a size or
    a kind of entry that differs. Where no stored chunk covers a part of a wanted tensor, torch leaves that part as it
    was without a word; so does this function, but it logs a warning that names the tensors.
    """
    items: list[ReadItem] = []
    uncovered: list[str] = []
    for fqn, value in state_dict.items():
        entry = metadata.state_dict_metadata.get(fqn)
        if entry is None:
            if strict:
                raise RuntimeError(f"Missing key in checkpoint state_dict: {fqn}.")
            continue
        _check_size(fqn, entry, value)
        # A rank outside the mesh of a DTensor on a sub-mesh holds nothing of it.
        if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None:
            continue
        if isinstance(entry, BytesStorageMetadata):
            items += _create_read_items(fqn, entry, value)
            continue
        try:
            wanted = _create_chunk_list(value)
        except ValueError as error:
            raise ValueError(
                f"Invalid checkpoint metadata for {fqn}, expected BytesStorageMetadata but found {type(entry)}",
            ) from error
        new_items = create_read_items_for_chunk_list(fqn, entry, wanted)
        if _volume(item.lengths for item in new_items) < _volume(chunk.sizes for chunk in wanted):
            uncovered.append(fqn)
        items += new_items
    if uncovered:
        logger.warning(
            "the checkpoint has no data for parts of %d tensors, which keep what they hold: %s%s",
            len(uncovered),
            ", ".join(uncovered[:10]),
            ", ..." if len(uncovered) > 10 else "",
        )
    return LoadPlan(items)


def _volume(sizes: Any) -> int:
    return sum(map(math.prod, sizes))


def _check_size(fqn: str, entry: STORAGE_TYPES, value: Any) -> None:
    if not isinstance(entry, TensorStorageMetadata) or getattr(value, "size", None) is None:
        return
    size = global_size(value)
    if entry.size != size:
        raise ValueError(f"Size mismatch between saved {entry.size} and current: {size} for {fqn}")


def global_size(value: Any) -> torch.Size:
    """The size of the global tensor that a value of a state dict is, or is a part of."""
    if isinstance(value, ShardedTensor):
        return value.metadata().size  # what size() returns too, after a detour and with a warning
    size: torch.Size = torch.Size(value.global_shape) if _is_checkpointable_tensor(value) else value.size()
    return size


class DefaultLoadPlanner(torch_planner.DefaultLoadPlanner, metaclass=StandIn):
    """Drop-in for ``torch.distributed.checkpoint.DefaultLoadPlanner`` that works with any ``StorageReader``.

    Takes the same arguments. Subclasses may override what torch's may: a reader calls ``resolve_tensor``,
    ``lookup_tensor``, ``transform_tensor``, ``commit_tensor`` and ``load_bytes`` as torch's reader does.
    """

    def create_local_plan(self) -> LoadPlan:
        """Plan the reads of this rank; see :func:`create_default_local_load_plan` for the errors."""
        if self.metadata is None:
            raise AssertionError("set_up_planner was not called with metadata")
        if self.flatten_state_dict:
            self._use_old_keys_if_stored()
        with paused_collection():
            return create_default_local_load_plan(self.state_dict, self.metadata, not self.allow_partial_load)

    def _use_old_keys_if_stored(self) -> None:
        # Before torch 2.4 fewer containers were flattened. Stored keys that the state dict lacks, but has when it is
        # flattened the old way, tell such a checkpoint. Same test as torch's DefaultLoadPlanner.create_local_plan.
        assert self.metadata is not None
        missing = self.metadata.state_dict_metadata.keys() - self.state_dict.keys()
        if not missing:
            return
        _version._derived_version = "2_3"
        try:
            old_state_dict, old_mappings = flatten_state_dict(self.original_state_dict)
        finally:
            _version._derived_version = None
        if old_state_dict.keys() & missing:
            self.state_dict, self.mappings = old_state_dict, old_mappings
