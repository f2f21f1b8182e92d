"""The planner: torch's DefaultLoadPlanner with the native search, and without running what bytes entries name."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, ClassVar

from torch.distributed.checkpoint import default_planner as torch_planner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from dcp_fast._torch import derived_version, flatten_state_dict, set_element
from dcp_fast.collector import paused_collection
from dcp_fast.planning.bytes_entries import load_untrusted
from dcp_fast.planning.column_plan import is_whole
from dcp_fast.planning.search import create_default_local_load_plan

__all__ = ["DefaultLoadPlanner", "create_local_plan", "load_bytes", "set_up_planner"]


class DefaultLoadPlanner(torch_planner.DefaultLoadPlanner):
    """Drop-in for ``torch.distributed.checkpoint.DefaultLoadPlanner`` that works with any ``StorageReader``.

    Takes the same arguments. Subclasses may override what torch's may: a reader calls ``resolve_tensor``,
    ``lookup_tensor``, ``transform_tensor``, ``commit_tensor`` and ``load_bytes`` as torch's reader does.

    Args:
        flatten_state_dict, flatten_sharded_tensors, allow_partial_load: as torch's.
        trust_bytes: unpickle bytes entries (values that are no tensors) as torch does, which runs whatever code the
            checkpoint names. By default ``torch.load(weights_only=True)`` reads them; types that it does not know are
            an UntrustedBytesError unless they were registered with ``torch.serialization.add_safe_globals``. None:
            False, or as :func:`dcp_fast.install` was told. If somebody has replaced ``load_bytes`` of torch's class,
            theirs is only called if this is True.
    """

    trust_bytes_by_default: ClassVar[bool] = False
    trust_bytes: bool = False  # for subclasses that do without our __init__

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
        *,
        trust_bytes: bool | None = None,
    ) -> None:
        super().__init__(flatten_state_dict, flatten_sharded_tensors, allow_partial_load)
        self.trust_bytes = self.trust_bytes_by_default if trust_bytes is None else trust_bytes

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take and flatten the state dict."""
        set_up_planner(super().set_up_planner, self, state_dict, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        """Plan the reads of this rank; see :func:`create_default_local_load_plan` for the errors."""
        return create_local_plan(super().create_local_plan, self)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a bytes entry into the state dict.

        Raises:
            UntrustedBytesError: it asks for what could run code, and ``trust_bytes`` is False.
            LoadError: it is damaged. If ``trust_bytes`` is True, whatever torch raises.
        """
        load_bytes(super().load_bytes, self, read_item, value)


# Each method of torch's planner that we replace is a function here: our class calls it, and while dcp_fast is installed
# so does torch's class. Its first argument is the method of torch, bound to the planner.


def set_up_planner(
    torchs: Callable[..., None],
    planner: torch_planner.DefaultLoadPlanner,
    state_dict: dict[str, Any],
    metadata: Metadata | None = None,
    is_coordinator: bool = False,
) -> None:
    is_flat = type(state_dict) is dict and all(
        type(key) is str and is_whole(value) and not value.is_meta for key, value in state_dict.items()
    )
    if not (planner.flatten_state_dict and is_flat):
        torchs(state_dict, metadata, is_coordinator)
        return
    # What torch comes to after it has walked through a flat state dict four times.
    planner.original_state_dict = state_dict
    planner.mappings = {fqn: (fqn,) for fqn in state_dict}
    planner.state_dict = dict(state_dict)
    planner.metadata = metadata
    planner.is_coordinator = is_coordinator


def create_local_plan(_torchs: Callable[..., LoadPlan], planner: torch_planner.DefaultLoadPlanner) -> LoadPlan:
    if planner.metadata is None:
        raise AssertionError("set_up_planner was not called with metadata")
    if planner.flatten_state_dict:
        _use_old_keys_if_stored(planner)
    with paused_collection():
        return create_default_local_load_plan(planner.state_dict, planner.metadata, not planner.allow_partial_load)


def load_bytes(
    torchs: Callable[..., None], planner: torch_planner.DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO
) -> None:
    # A planner of torch's class trusts what install() was told to trust.
    if getattr(planner, "trust_bytes", DefaultLoadPlanner.trust_bytes_by_default):
        torchs(read_item, value)
        return
    fqn = read_item.dest_index.fqn
    loaded = load_untrusted(value, fqn)
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[fqn], loaded)
    else:
        planner.state_dict[fqn] = loaded


def _use_old_keys_if_stored(planner: torch_planner.DefaultLoadPlanner) -> None:
    # Before torch 2.4 fewer containers were flattened. Stored keys that the state dict lacks, but has when it is
    # flattened the old way, tell such a checkpoint. Same test as torch's DefaultLoadPlanner.create_local_plan.
    assert planner.metadata is not None
    missing = set(planner.metadata.state_dict_metadata).difference(planner.state_dict)
    if not missing:
        return
    derived_version._derived_version = "2_3"
    try:
        old_state_dict, old_mappings = flatten_state_dict(planner.original_state_dict)
    finally:
        derived_version._derived_version = None
    if old_state_dict.keys() & missing:
        planner.state_dict, planner.mappings = old_state_dict, old_mappings
