"""A dict whose values are made when they are first asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any, TypeVar

from torch.distributed.checkpoint.metadata import Metadata

from dcp_fast import _native
from dcp_fast.collector import paused_collection
from dcp_fast.metadata.entries import Source

Key = TypeVar("Key")
Item = TypeVar("Item")


class LazyDict(dict[Key, Item]):
    """A dict, except to C code that reads a dict's memory without asking the class.

    A value that was made is kept, so that it is the same object each time, and may be changed. What goes through all
    values, or changes which keys there are, makes them all; from then on it is a dict like any other. Pickled or
    copied, it becomes a plain dict, which needs no dcp_fast to be read.
    """

    # The underlying dict holds the values that were made so far, in any order, until it holds all of them.
    __slots__ = ("_lock", "_source")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._source: Source | None = None
        self._lock = threading.RLock()

    @classmethod
    def of(cls, source: Source) -> LazyDict[Any, Any]:
        """A dict of what a source makes."""
        self: LazyDict[Any, Any] = cls()
        self._source = source
        return self

    @property
    def source(self) -> Source | None:
        """Where values come from; None if all are made, or if the dict was changed."""
        return self._source

    def made(self, key: Key) -> bool:
        """Whether the value of a key exists as an object, which its owner may have changed."""
        return dict.__contains__(self, key)

    @property
    def columns(self) -> _native.MetadataColumns | None:
        """The columns that tell all keys, though values that were made may have changed; None if there are none."""
        return None if self._source is None else self._source.columns

    @property
    def untouched_columns(self) -> _native.MetadataColumns | None:
        """The columns that tell all, as no value was made yet; None if there are none."""
        return None if dict.__len__(self) else self.columns

    def fill(self) -> None:
        """Make all values, and put them in order."""
        with self._lock, paused_collection():
            if self._source is None:
                return
            made = dict(dict.items(self))
            content = {key: made[key] if key in made else make() for key, make in self._source.items()}
            dict.clear(self)
            dict.update(self, content)
            self._source = None

    # Without making values

    def __missing__(self, key: Key) -> Item:
        with self._lock:
            if self._source is None:
                # Another thread may have filled the dict since the key was looked for.
                if dict.__contains__(self, key):
                    return dict.__getitem__(self, key)
                raise KeyError(key)
            if dict.__contains__(self, key):
                return dict.__getitem__(self, key)
            value: Item = self._source.make(key)
            dict.__setitem__(self, key, value)
            return value

    def peek(self) -> Iterator[tuple[Key, Item]]:
        """All keys and values, to be looked at and not changed. Values that were not made before are not kept."""
        source = self._source
        if source is None or not source.keys_are_cheap:
            yield from self.items()
            return
        for key, make in source.items():
            yield key, dict.__getitem__(self, key) if dict.__contains__(self, key) else make()

    def get(self, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __contains__(self, key: object) -> bool:
        if dict.__contains__(self, key):
            return True
        with self._lock:
            return dict.__contains__(self, key) if self._source is None else key in self._source

    def __len__(self) -> int:
        source = self._source
        return dict.__len__(self) if source is None else len(source)

    def __iter__(self) -> Iterator[Key]:
        source = self._source
        if source is not None and source.keys_are_cheap:
            return iter(source)
        self.fill()
        return dict.__iter__(self)

    def keys(self) -> Any:
        return KeysView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def items(self) -> Any:
        return ItemsView(self)

    def __setitem__(self, key: Key, value: Item) -> None:
        self.fill()
        dict.__setitem__(self, key, value)

    def __reduce_ex__(self, protocol: object) -> Any:
        self.fill()
        return dict, (), None, None, iter(dict.items(self))


def _after_filling(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    def filled(self: LazyDict[Any, Any], *args: Any, **kwargs: Any) -> Any:
        self.fill()
        # An operand whose insides are read must be complete too.
        for operand in args:
            if isinstance(operand, LazyDict):
                operand.fill()
        return method(self, *args, **kwargs)

    filled.__name__ = name
    filled.__doc__ = method.__doc__
    return filled


for _name in (
    *("__delitem__", "__eq__", "__ne__", "__ior__", "__or__", "__repr__", "__reversed__", "__ror__"),
    *("clear", "copy", "pop", "popitem", "setdefault", "update"),
):
    setattr(LazyDict, _name, _after_filling(_name))


def columns_of(metadata: Metadata) -> _native.MetadataColumns | None:
    """The columns that metadata was read into; None if there are none, or if its dicts have been changed since.

    Entries that were made as objects may have been changed by whoever got them: ask ``LazyDict.made``.
    """
    entries, storage = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(entries, LazyDict) or not isinstance(storage, LazyDict):
        return None
    if entries.source is None or storage.source is None or entries.source.columns is not storage.source.columns:
        return None
    return entries.source.columns
