"""Which hooks of a planner are torch's own.

A planner with hooks of its own is called for each item in torch's order. If all hooks are torch's own, the engine may
place items in any order.
"""

from __future__ import annotations

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlanner

__all__ = ["STANDS_FOR_TORCHS", "has_default_commit", "has_default_hooks"]

STANDS_FOR_TORCHS = "_dcp_fast_stands_for_torchs"  # marks a hook of ours, which hands on to torch's

# As they are at import: a hook that somebody patches into torch's class later counts as the planner's own.
_DEFAULT_HOOKS = {
    name: getattr(DefaultLoadPlanner, name)
    for name in ("resolve_tensor", "lookup_tensor", "transform_tensor", "commit_tensor", "load_bytes")
}


def has_default_hooks(planner: LoadPlanner) -> bool:
    """Whether a planner does with items what torch's DefaultLoadPlanner does, so that their order is free."""
    return isinstance(planner, DefaultLoadPlanner) and all(_is_default(planner, name) for name in _DEFAULT_HOOKS)


def has_default_commit(planner: LoadPlanner) -> bool:
    """Whether ``commit_tensor`` is that of torch's DefaultLoadPlanner, which does nothing."""
    return isinstance(planner, DefaultLoadPlanner) and _is_default(planner, "commit_tensor")


def _is_default(planner: DefaultLoadPlanner, name: str) -> bool:
    return name not in vars(planner) and _torch_hook(type(planner), name) is _DEFAULT_HOOKS[name]


def _torch_hook(cls: type[DefaultLoadPlanner], name: str) -> object:
    hook = getattr(cls, name)
    return getattr(DefaultLoadPlanner, name) if getattr(hook, STANDS_FOR_TORCHS, False) else hook
