"""dcp_fast in the place of torch's loading, for frameworks that call torch.distributed.checkpoint themselves.

Methods of torch's classes are replaced in the classes themselves: whoever holds a class, an object or a subclass is
served. torch's ``load`` looks up in its module what it calls. That is replaced there, so that a ``load`` which somebody
kept is served too, and what a method that somebody kept would run of a checkpoint (``lookups.py``). Functions that call
nothing of that kind are replaced by name in all loaded modules. What stands in
their places are switches (``switches.py``), so that what somebody keeps of them is torch's again after ``uninstall``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType, TracebackType
from typing import Any

from torch.distributed.checkpoint import (
    default_planner,
    filesystem,
    hf_storage,
    optimizer,
    planner_helpers,
    quantized_hf_storage,
    state_dict_loader,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader

from dcp_fast import _torch
from dcp_fast import load as fast_load
from dcp_fast.lookups import pickle_of_readers, torch_of_planners
from dcp_fast.optimizer import load as fast_optimizer
from dcp_fast.planning import planner as fast_planner
from dcp_fast.planning import search as fast_search
from dcp_fast.ranks.exchange import Exchange
from dcp_fast.readers import filesystem as fast_filesystem
from dcp_fast.readers.huggingface import read_headers_of, read_quantized_headers_of
from dcp_fast.readers.others import accelerated_read_data, read_data_like_torch
from dcp_fast.switches import method_switch, original_of, set_switches, switch

# Each gets torch's method, bound, as its first argument.
_METHODS: list[tuple[type, str, Callable[..., Any]]] = [
    (filesystem.FileSystemReader, "read_metadata", fast_filesystem.read_metadata_of),
    (filesystem.FileSystemReader, "read_data", read_data_like_torch),
    (hf_storage.HuggingFaceStorageReader, "read_metadata", read_headers_of),
    (hf_storage.HuggingFaceStorageReader, "read_data", read_data_like_torch),
    (quantized_hf_storage.QuantizedHuggingFaceStorageReader, "read_metadata", read_quantized_headers_of),
    (default_planner.DefaultLoadPlanner, "set_up_planner", fast_planner.set_up_planner),
    (default_planner.DefaultLoadPlanner, "create_local_plan", fast_planner.create_local_plan),
    (default_planner.DefaultLoadPlanner, "load_bytes", fast_planner.load_bytes),
]
# By name, in every loaded module that has torch's.
_FUNCTIONS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (state_dict_loader.load, fast_load.load),
    (state_dict_loader.load_state_dict, fast_load.load_state_dict),
    (_torch.load_state_dict, fast_load.load_state_dict_on_all_ranks),
    (optimizer.load_sharded_optimizer_state_dict, fast_optimizer.load_sharded_optimizer_state_dict),
    (planner_helpers.create_read_items_for_chunk_list, fast_search.create_read_items_for_chunk_list),
    (default_planner.create_default_local_load_plan, fast_search.create_default_local_load_plan),
]
# To look up a switch by the function whose place it takes, wherever a module has that by name; and back.
_SWITCHES = {id(original): switch(original, fast) for original, fast in _FUNCTIONS}
_ABSENT = object()
_AT_IMPORT = {(cls, name): original_of(getattr(cls, name)) for cls, name, _ in _METHODS}

_lock = threading.Lock()
_replaced: list[tuple[object, str, Any, Any]] | None = None  # owner, name, ours, torch's; None: not installed


class _CheckOfStateful(type):
    def __instancecheck__(cls, value: object) -> bool:
        return fast_load.is_stateful(value)


class _Stateful(metaclass=_CheckOfStateful):
    """What torch's ``load`` asks of each value while dcp_fast is installed: the same, in less time."""


class Installation:
    """What :func:`install` returns. As a context manager it undoes, at the end, what that call did."""

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self is _current:  # not if another call has installed since
            uninstall()


_current: Installation | None = None  # the last one, while it holds


def install(
    trust_metadata: bool = False,
    trust_bytes: bool | None = None,
    accelerate: Iterable[type[StorageReader]] = (),
    share_reads: bool = False,
) -> Installation:
    """Make ``torch.distributed.checkpoint`` itself use dcp_fast.

    All readers of the class ``FileSystemReader`` and planners of the class ``DefaultLoadPlanner`` are served, and those
    of classes derived from them, whenever and wherever these classes and objects were made. What they override stays
    theirs. ``load``, ``load_state_dict``, ``load_sharded_optimizer_state_dict`` and two planning functions are replaced
    in every loaded module that has torch's under some name. A second call changes nothing.

    Args:
        trust_metadata: whether torch's readers, and ours by default, unpickle ``.metadata`` as torch does, which runs
            whatever code the file names.
        trust_bytes: whether torch's planners, and ours by default, unpickle bytes entries (values that are no tensors)
            as torch does, which runs whatever code the checkpoint names. None: no, unless the environment has
            ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1``.
        accelerate: classes of readers that have a ``read_data`` of their own, to be treated as
            :func:`dcp_fast.accelerate` treats one reader. By naming a class you say what is said there.
        share_reads: whether ranks share what they read, as of :func:`dcp_fast.load`. The same on all ranks.

    Returns:
        A context manager that uninstalls at its end, unless dcp_fast had been installed before.

    Raises:
        TypeError: ``accelerate`` names something else than classes with a ``read_data``, or ``share_reads`` is no bool.
    """
    global _replaced, _current
    if not isinstance(share_reads, bool):
        raise TypeError(f"share_reads must be True or False, got {share_reads!r}")
    classes = list(accelerate)
    for cls in classes:
        if not isinstance(cls, type) or not callable(getattr(cls, "read_data", None)):
            raise TypeError(f"accelerate takes classes of readers, got {cls!r}")
    with _lock:
        if _replaced is not None:
            return Installation()
        _replaced = []
        fast_filesystem.FileSystemReader.trust_metadata_by_default = trust_metadata
        fast_planner.DefaultLoadPlanner.trust_bytes_by_default = trust_bytes
        Exchange.by_default = share_reads
        for cls, name, fast in [*_METHODS, *((cls, "read_data", accelerated_read_data) for cls in classes)]:
            original = original_of(getattr(cls, name))
            # What somebody has patched into torch's classes is left to do its work, but for what decides what is run.
            if name == "load_bytes" or original is _AT_IMPORT.get((cls, name), original):
                _replace(cls, name, method_switch(original, fast))
        _replace(state_dict_loader, "Stateful", _Stateful)
        _replace(default_planner, "torch", torch_of_planners)
        _replace(filesystem, "pickle", pickle_of_readers)
        for module, name, value in _names():
            ours = _SWITCHES.get(id(value))
            if ours is not None and original_of(ours) is value and not module.__name__.startswith("dcp_fast."):
                _replace(module, name, ours)
        set_switches(True)
        _current = Installation()
        return _current


def uninstall() -> None:
    """Undo :func:`install` completely. Does nothing if dcp_fast is not installed.

    What somebody else has replaced in between stays theirs.
    """
    global _replaced, _current
    with _lock:
        if _replaced is None:
            return
        set_switches(False)
        for owner, name, ours, original in reversed(_replaced):
            if vars(owner).get(name) is not ours:
                continue
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        torchs = {id(ours): original_of(ours) for ours in _SWITCHES.values()}
        torchs[id(_Stateful)] = Stateful
        for module, name, value in _names():  # of modules that were imported in between
            if id(value) in torchs and not module.__name__.startswith("dcp_fast."):
                setattr(module, name, torchs[id(value)])
        fast_filesystem.FileSystemReader.trust_metadata_by_default = False
        fast_planner.DefaultLoadPlanner.trust_bytes_by_default = None
        Exchange.by_default = False
        _replaced = _current = None


def _replace(owner: Any, name: str, ours: Any) -> None:
    assert _replaced is not None
    _replaced.append((owner, name, ours, vars(owner).get(name, _ABSENT)))
    setattr(owner, name, ours)


def _names() -> Iterator[tuple[ModuleType, str, Any]]:
    """What every loaded module has by name."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            for name, value in list(vars(module).items()):
                yield module, name, value
