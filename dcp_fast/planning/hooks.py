"""Which hooks of a planner are torch's own: only with others does the order of items matter, and what comes between."""

from __future__ import annotations

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlanner

__all__ = ["STANDS_FOR_TORCHS", "has_default_hooks"]

STANDS_FOR_TORCHS = "_dcp_fast_stands_for_torchs"  # marks a hook of ours, which hands on to torch's

# As they are at import: whoever patches torch's class has hooks too.
_DEFAULT_HOOKS = {
    name: getattr(DefaultLoadPlanner, name)
    for name in ("resolve_tensor", "lookup_tensor", "transform_tensor", "commit_tensor", "load_bytes")
}


def has_default_hooks(planner: LoadPlanner) -> bool:
    """Whether a planner does with items what torch's DefaultLoadPlanner does, so that their order is free."""
    return isinstance(planner, DefaultLoadPlanner) and all(
        name not in vars(planner) and _torch_hook(type(planner), name) is hook for name, hook in _DEFAULT_HOOKS.items()
    )


def _torch_hook(cls: type[DefaultLoadPlanner], name: str) -> object:
    hook = getattr(cls, name)
    return getattr(DefaultLoadPlanner, name) if getattr(hook, STANDS_FOR_TORCHS, False) else hook
