"""The fast classes in the place of torch's, for frameworks that call torch.distributed.checkpoint themselves."""

from __future__ import annotations

import importlib
import sys
import threading
from types import TracebackType

from torch.distributed.checkpoint import default_planner, filesystem, optimizer, planner_helpers, state_dict_loader

from dcp_fast import load as fast_load
from dcp_fast.drop_in import torch_class_of
from dcp_fast.optimizer import load as fast_optimizer
from dcp_fast.planning import planner as fast_planner
from dcp_fast.planning import search as fast_search
from dcp_fast.readers.filesystem import FileSystemReader

__all__ = ["Installation", "install", "uninstall"]

# What is replaced, by identity, wherever a loaded module has it by name.
_REPLACEMENTS: dict[int, tuple[object, object]] = {
    id(original): (original, replacement)
    for original, replacement in (
        (filesystem.FileSystemReader, FileSystemReader),
        (default_planner.DefaultLoadPlanner, fast_planner.DefaultLoadPlanner),
        (state_dict_loader.load, fast_load.load),
        (state_dict_loader.load_state_dict, fast_load.load_state_dict),
        (optimizer.load_sharded_optimizer_state_dict, fast_optimizer.load_sharded_optimizer_state_dict),
        (planner_helpers.create_read_items_for_chunk_list, fast_search.create_read_items_for_chunk_list),
        (default_planner.create_default_local_load_plan, fast_search.create_default_local_load_plan),
    )
}

_lock = threading.Lock()
_replaced: list[tuple[str, str, object]] | None = None  # module, name, original; None: not installed


class Installation:
    """What :func:`install` returns. As a context manager it undoes, at the end, what that call did."""

    def __init__(self, changed: bool) -> None:
        self._changed = changed

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._changed:
            uninstall()
            self._changed = False


def install(trust_metadata: bool = False, trust_bytes: bool = False) -> Installation:
    """Make ``torch.distributed.checkpoint`` itself use dcp_fast.

    Replaces ``FileSystemReader``, ``DefaultLoadPlanner``, ``load``, ``load_state_dict``,
    ``load_sharded_optimizer_state_dict`` and two planning functions in every loaded module that has torch's under some
    name, so that code which imported them before is served too. Readers and planners that exist already stay what they
    are, and type checks that name torch's classes still hold for them and for what was derived from those. A second
    call changes nothing.

    Args:
        trust_metadata: whether readers unpickle ``.metadata`` as torch does, which runs whatever code the file names.
        trust_bytes: whether planners unpickle bytes entries (values that are no tensors) as torch does, which runs
            whatever code the checkpoint names. Planners of classes that were derived from torch's before do, whatever
            this says.

    Returns:
        A context manager that uninstalls at its end, unless dcp_fast had been installed before.
    """
    global _replaced
    # These bind torch's classes when they are first imported; later, their bases would be ours for good.
    for name in ("_fsspec_filesystem", "format_utils", "hf_storage"):
        try:
            importlib.import_module(f"torch.distributed.checkpoint.{name}")
        except ImportError:
            continue
    with _lock:
        if _replaced is not None:
            return Installation(changed=False)
        _replaced = []
        FileSystemReader.trust_metadata_by_default = trust_metadata
        fast_planner.DefaultLoadPlanner.trust_bytes_by_default = trust_bytes
        torch_class_of.update(
            (replacement, original)
            for original, replacement in _REPLACEMENTS.values()
            if isinstance(original, type) and isinstance(replacement, type)
        )
        for module_name, module in list(sys.modules.items()):
            if module is None or module_name.partition(".")[0] == "dcp_fast":
                continue
            for name, value in list(getattr(module, "__dict__", {}).items()):
                original, replacement = _REPLACEMENTS.get(id(value), (None, None))
                if original is value and original is not None:
                    setattr(module, name, replacement)
                    _replaced.append((module_name, name, original))
    return Installation(changed=True)


def uninstall() -> None:
    """Undo :func:`install` completely. Does nothing if dcp_fast is not installed.

    Only a module outside torch that was first imported in between, and took names from torch then, keeps ours.
    """
    global _replaced
    with _lock:
        if _replaced is None:
            return
        ours = {id(replacement): original for original, replacement in _REPLACEMENTS.values()}
        for module_name, name, original in _replaced:
            module = sys.modules.get(module_name)
            if module is not None and id(getattr(module, name, None)) in ours:
                setattr(module, name, original)
        for module_name, module in list(sys.modules.items()):
            if module is not None and module_name.partition(".")[0] == "torch":
                for name, value in list(vars(module).items()):
                    if id(value) in ours:
                        setattr(module, name, ours[id(value)])
        torch_class_of.clear()
        FileSystemReader.trust_metadata_by_default = False
        fast_planner.DefaultLoadPlanner.trust_bytes_by_default = False
        _replaced = None
