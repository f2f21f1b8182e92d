"""Which hooks of a planner are torch's own: only with others does the order of items matter, and what comes between."""

from __future__ import annotations

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlanner

from dcp_fast.planning.planner import DefaultLoadPlanner as FastDefaultLoadPlanner
from dcp_fast.switches import original_of

__all__ = ["has_default_hooks", "why_planner_is_slow"]

# As they are at import: whoever patches torch's class has hooks too.
_DEFAULT_HOOKS = {
    name: getattr(DefaultLoadPlanner, name)
    for name in ("resolve_tensor", "lookup_tensor", "transform_tensor", "commit_tensor", "load_bytes")
}
_FAST_LOAD_BYTES = FastDefaultLoadPlanner.load_bytes


def has_default_hooks(planner: LoadPlanner) -> bool:
    """Whether a planner does with items what torch's DefaultLoadPlanner does, so that their order is free."""
    return isinstance(planner, DefaultLoadPlanner) and not _own_hooks(planner)


def why_planner_is_slow(planner: LoadPlanner, planned_natively: bool) -> str:
    """What keeps a planner from the fast way; empty if nothing does."""
    reasons = [] if planned_natively else ["it plans without the search of dcp_fast"]
    if hooks := _own_hooks(planner):
        reasons.append(f"its {', '.join(hooks)} must be called for each item before the next is read")
    elif not isinstance(planner, DefaultLoadPlanner):
        reasons.append("each item must be read before the next, as it is not derived from DefaultLoadPlanner")
    return "; ".join(reasons)


def _own_hooks(planner: LoadPlanner) -> list[str]:
    return [
        name
        for name, hook in _DEFAULT_HOOKS.items()
        if name in getattr(planner, "__dict__", ()) or _torch_hook(type(planner), name) is not hook
    ]


def _torch_hook(cls: type, name: str) -> object:
    hook = getattr(cls, name, None)
    # Ours hands on to torch's where it trusts the checkpoint.
    return original_of(getattr(DefaultLoadPlanner, name) if hook is _FAST_LOAD_BYTES else hook)
