"""The planner: torch's DefaultLoadPlanner with the native search, and without running what bytes entries name."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch.distributed.checkpoint import default_planner as torch_planner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from dcp_fast._torch import derived_version, flatten_state_dict
from dcp_fast.collector import paused_collection
from dcp_fast.metadata.lazy import LazyDict
from dcp_fast.planning.flatten import containers_of, flatten_at_once
from dcp_fast.planning.hooks import STAND_FOR_TORCHS
from dcp_fast.planning.search import create_default_local_load_plan
from dcp_fast.planning.values import put_value
from dcp_fast.switches import original_of
from dcp_fast.this_load import option, trusted
from dcp_fast.values.load import load_untrusted

# torch's variables, and what it takes for a yes.
_FORCED = ("WEIGHTS_ONLY", "NO_WEIGHTS_ONLY")
_TRUE = ("1", "y", "yes", "true")


# What keeps a planner from planning fast.
PLANS_ITSELF = "it plans without the search of dcp_fast"


class DefaultLoadPlanner(torch_planner.DefaultLoadPlanner):
    """Drop-in for ``torch.distributed.checkpoint.DefaultLoadPlanner`` that works with any ``StorageReader``.

    Takes the same arguments. Subclasses may override what torch's may: a reader calls ``resolve_tensor``,
    ``lookup_tensor``, ``transform_tensor``, ``commit_tensor`` and ``load_bytes`` as torch's reader does.

    Args:
        flatten_state_dict, flatten_sharded_tensors, allow_partial_load: as torch's.
        trust_bytes: unpickle bytes entries (values that are no tensors) as torch does, which runs whatever code the
            checkpoint names. By default values of inert types are made (see docs/security.md); other types are an
            UntrustedBytesError unless they were registered with ``torch.serialization.add_safe_globals``. None:
            False, or as :func:`dcp_fast.install` was told, or True if the environment has
            ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1``. If somebody has replaced ``load_bytes`` of torch's class,
            theirs is only called if this is True.
    """

    trust_bytes_by_default: ClassVar[bool | None] = None
    trust_bytes: bool = False  # of subclasses whose __init__ does not call ours

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
        *,
        trust_bytes: bool | None = None,
    ) -> None:
        super().__init__(flatten_state_dict, flatten_sharded_tensors, allow_partial_load)
        self.trust_bytes = trusts_bytes_by_default() if trust_bytes is None else trust_bytes

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keep the state dict, flattened if ``flatten_state_dict`` is set, and the metadata."""
        set_up_planner(super().set_up_planner, self, state_dict, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        """Plan the reads of this rank. Raises as :func:`create_default_local_load_plan`."""
        return create_local_plan(super().create_local_plan, self)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a bytes entry into the state dict.

        Raises:
            UntrustedBytesError: it asks for what could run code, and ``trust_bytes`` is False.
            LoadError: it is damaged. If ``trust_bytes`` is True, whatever torch raises.
        """
        load_bytes(super().load_bytes, self, read_item, value)


STAND_FOR_TORCHS.append(DefaultLoadPlanner.load_bytes)

# Each method of torch's planner that we replace is a function here: our class calls it, and while dcp_fast is installed
# so does torch's class. Its first argument is the method of torch, bound to the planner.


def set_up_planner(
    torchs: Callable[..., None],
    planner: torch_planner.DefaultLoadPlanner,
    state_dict: dict[str, Any],
    metadata: Metadata | None = None,
    is_coordinator: bool = False,
) -> None:
    with paused_collection():
        flat = flatten_at_once(state_dict) if planner.flatten_state_dict else None
    if flat is None:
        torchs(state_dict, metadata, is_coordinator)
        return
    planner.original_state_dict = state_dict
    planner.state_dict, planner.mappings = flat
    planner.metadata = metadata
    planner.is_coordinator = is_coordinator


def create_local_plan(_torchs: Callable[..., LoadPlan], planner: torch_planner.DefaultLoadPlanner) -> LoadPlan:
    if planner.metadata is None:
        raise AssertionError("set_up_planner was not called with metadata")
    if planner.flatten_state_dict:
        _use_old_keys_if_stored(planner)
    with paused_collection():
        return create_default_local_load_plan(planner.state_dict, planner.metadata, not planner.allow_partial_load)


# torch's methods as they are at import: what somebody patches into its class later is left to do its work.
_FASTER: dict[object, Callable[..., Any]] = {
    torch_planner.DefaultLoadPlanner.set_up_planner: set_up_planner,
    torch_planner.DefaultLoadPlanner.create_local_plan: create_local_plan,
}


def faster_method(planner: LoadPlanner, name: str) -> Callable[..., Any]:
    """A method of a planner, or ours, which does the same in less time, where the method is torch's own."""
    method: Any = getattr(planner, name)
    ours = _FASTER.get(original_of(getattr(method, "__func__", None)))
    return partial(ours, method, planner) if ours is not None and method.__self__ is planner else method


def load_bytes(
    torchs: Callable[..., None], planner: torch_planner.DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO
) -> None:
    trusts = option(planner, "trust_bytes")
    if trusts_bytes_by_default() if trusts is None else trusts:
        with trusted():
            torchs(read_item, value)
        return
    fqn = read_item.dest_index.fqn
    put_value(planner, fqn, load_untrusted(value, fqn))


def _use_old_keys_if_stored(planner: torch_planner.DefaultLoadPlanner) -> None:
    # torch before 2.4 flattened fewer containers, so that its checkpoints have other keys. If the state dict lacks a
    # stored key, but has it when it is flattened in the old way, then the checkpoint is such a one. torch's own
    # DefaultLoadPlanner.create_local_plan makes the same test.
    assert planner.metadata is not None
    entries = planner.metadata.state_dict_metadata
    columns = entries.columns if isinstance(entries, LazyDict) else None
    if columns is not None and type(planner.state_dict) is dict and columns.are_keys_of(planner.state_dict):
        return
    missing = set(entries).difference(planner.state_dict)
    if not missing:
        return
    # A key of the old way that is none of the new way is that of a container.
    containers = containers_of(planner.original_state_dict)
    if containers is not None and containers.isdisjoint(missing):
        return
    derived_version._derived_version = "2_3"
    try:
        old_state_dict, old_mappings = flatten_state_dict(planner.original_state_dict)
    finally:
        derived_version._derived_version = None
    if old_state_dict.keys() & missing:
        planner.state_dict, planner.mappings = old_state_dict, old_mappings


def trusts_bytes_by_default() -> bool:
    """What install() was told, or whether the environment tells torch.load to be content with weights_only=False."""
    told = DefaultLoadPlanner.trust_bytes_by_default
    if told is not None:
        return told
    forced = {name: os.environ.get(f"TORCH_FORCE_{name}_LOAD", "0").lower() in _TRUE for name in _FORCED}
    return forced["NO_WEIGHTS_ONLY"] and not forced["WEIGHTS_ONLY"]
