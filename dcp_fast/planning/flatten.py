"""Flattening of nested state dicts in one walk, where torch's planner takes four."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from dcp_fast.planning.values import is_whole, plain_local_tensor

_INERT = frozenset((int, float, bool, str, bytes, type(None)))
_DICTS = frozenset((dict, OrderedDict))

_Path = tuple[str | int, ...]


def flatten_at_once(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, _Path]] | None:
    """What torch's ``DefaultLoadPlanner.set_up_planner`` makes of a state dict: its leaves by FQN, and their paths.

    As torch does, this puts a copy of every list in the list's place.

    Returns:
        None if a state dict has anything for which torch does more than to walk through it: tensors on the meta device,
        parts of tensors but DTensors, keys and containers of other types, FQNs that clash. Then torch has to do it.
    """
    walk = _Walk()
    if type(state_dict) is not dict or not walk.through_dict(state_dict, "", ()):
        return None
    return walk.flat, walk.paths


class _Walk:
    def __init__(self) -> None:
        self.flat: dict[str, Any] = {}
        self.paths: dict[str, _Path] = {}

    def through_dict(self, values: dict[str, Any], prefix: str, path: _Path) -> bool:
        """Whether nothing in it needs torch."""
        flat, paths = self.flat, self.paths
        for key, value in values.items():
            if type(key) is not str:
                return False
            if _is_leaf(value):
                fqn = prefix + key
                if fqn in flat:
                    return False
                flat[fqn] = value
                paths[fqn] = (*path, key)
            elif type(value) in _DICTS:
                if not self.through_dict(value, f"{prefix}{key}.", (*path, key)):
                    return False
            elif type(value) is list:
                values[key] = copied = _copied(value)
                if not self._through_list(copied, prefix + key, (*path, key)):
                    return False
            else:
                return False
        return True

    def _through_list(self, values: list[Any], fqn: str, path: _Path) -> bool:
        if all(map(_is_inert, values)):  # no container and no tensor: the list itself is a leaf
            return self._add(fqn, values, path)
        for index, value in enumerate(values):
            count = len(self.flat)
            name, way = f"{fqn}.{index}", (*path, index)
            if _is_leaf(value):
                done = self._add(name, value, way)
            else:
                # A list in a list is a leaf or not by what torch finds in it, and in those around it.
                done = type(value) in _DICTS and self.through_dict(value, name + ".", way)
            # torch puts None in the place of an element that has no leaves, if others follow.
            if not done or len(self.flat) == count:
                return False
        return True

    def _add(self, fqn: str, value: Any, path: _Path) -> bool:
        if fqn in self.flat:
            return False
        self.flat[fqn] = value
        self.paths[fqn] = path
        return True


def _is_inert(value: object) -> bool:
    return type(value) in _INERT or (type(value) is tuple and all(type(entry) in _INERT for entry in value))


def _is_leaf(value: object) -> bool:
    # Most values are tensors.
    tensor = value if is_whole(value) else plain_local_tensor(value)
    return _is_inert(value) if tensor is None else not tensor.is_meta


def _copied(value: Any) -> Any:
    """A list with copies of the lists in it."""
    return [_copied(entry) if type(entry) is list else entry for entry in value]
