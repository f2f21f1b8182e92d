"""Which hooks of a planner are torch's own.

A planner with hooks of its own is called for each item in torch's order. If all hooks are torch's own, the engine may
place items in any order.
"""

from __future__ import annotations

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlanner

from dcp_fast.switches import original_of

# As they are at import: a hook that somebody patches into torch's class later counts as the planner's own.
_DEFAULT_HOOKS = {
    name: getattr(DefaultLoadPlanner, name)
    for name in ("resolve_tensor", "lookup_tensor", "transform_tensor", "commit_tensor", "load_bytes")
}
# Hooks of ours, which hand on to torch's where they trust the checkpoint.
STAND_FOR_TORCHS: list[object] = []


def has_default_hooks(planner: LoadPlanner) -> bool:
    """Whether a planner does with items what torch's DefaultLoadPlanner does, so that their order is free."""
    return isinstance(planner, DefaultLoadPlanner) and not _own_hooks(planner)


def has_default_commit(planner: LoadPlanner) -> bool:
    """Whether ``commit_tensor`` is that of torch's DefaultLoadPlanner, which does nothing."""
    return isinstance(planner, DefaultLoadPlanner) and _is_default(planner, "commit_tensor")


def has_default_bytes(planner: LoadPlanner) -> bool:
    """Whether ``load_bytes`` is that of torch's DefaultLoadPlanner, which puts a value into the state dict."""
    return isinstance(planner, DefaultLoadPlanner) and _is_default(planner, "load_bytes")


def has_default_resolve(planner: LoadPlanner) -> bool:
    """Whether items are resolved as by torch's DefaultLoadPlanner: to memory of the state dict."""
    hooks = ("resolve_tensor", "lookup_tensor", "transform_tensor")
    return isinstance(planner, DefaultLoadPlanner) and all(_is_default(planner, name) for name in hooks)


def has_only_commit(planner: LoadPlanner) -> bool:
    """Whether a planner has no hook of its own but ``commit_tensor``, so that its destinations are known beforehand."""
    return isinstance(planner, DefaultLoadPlanner) and _own_hooks(planner) == ["commit_tensor"]


def _own_hooks(planner: LoadPlanner) -> list[str]:
    return [name for name in _DEFAULT_HOOKS if not _is_default(planner, name)]


def _is_default(planner: LoadPlanner, name: str) -> bool:
    return name not in getattr(planner, "__dict__", ()) and _torch_hook(type(planner), name) is _DEFAULT_HOOKS[name]


def _torch_hook(cls: type, name: str) -> object:
    hook = getattr(cls, name, None)
    stands_for_torchs = any(hook is ours for ours in STAND_FOR_TORCHS)
    return original_of(getattr(DefaultLoadPlanner, name) if stands_for_torchs else hook)
