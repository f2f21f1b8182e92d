"""Metadata with attributes that are made when they are first asked for."""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable, Collection
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

_instance_dict = vars(Metadata)["__dict__"]


class _MetadataWithAttributes(Metadata):
    """Metadata to all code that does not ask for its ``type``. Pickled or copied, it becomes just that."""

    __slots__ = ("_lock", "_make", "_unmade")

    _lock: threading.RLock
    _make: Callable[[], dict[str, Any]]
    _unmade: set[str]

    # What isinstance, comparisons and repr go by.
    __class__ = property(lambda self: Metadata)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        self._make_all()
        values: dict[str, Any] = _instance_dict.__get__(self)
        return values

    def __getattr__(self, name: str) -> Any:
        if name in self._unmade:
            self._make_all()
        try:
            return _instance_dict.__get__(self)[name]
        except KeyError:
            raise AttributeError(f"'Metadata' object has no attribute {name!r}") from None

    def __delattr__(self, name: str) -> None:
        if name in self._unmade:
            self._make_all()
        Metadata.__delattr__(self, name)

    def __reduce_ex__(self, protocol: object) -> Any:
        return copyreg.__newobj__, (Metadata,), self.__dict__  # type: ignore[attr-defined]

    def _make_all(self) -> None:
        with self._lock:
            if self._unmade:
                made = self._make()
                values = _instance_dict.__get__(self)
                for name in self._unmade:
                    values.setdefault(name, made[name])
                self._unmade = set()


def with_attributes(metadata: Metadata, names: Collection[str], make: Callable[[], dict[str, Any]]) -> Metadata:
    """The metadata with more attributes.

    Args:
        make: returns all of them by name, and is called once, when the first of them is asked for, unless it raises.
    """
    result = object.__new__(_MetadataWithAttributes)
    result._lock = threading.RLock()
    result._make = make
    result._unmade = set(names)
    _instance_dict.__get__(result).update(vars(metadata))
    return result
