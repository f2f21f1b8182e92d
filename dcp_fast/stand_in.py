"""Type checks against torch's classes keep their meaning while dcp_fast's stand in their place."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

__all__ = ["StandIn", "standing_for"]

# By class of dcp_fast: the class of torch whose place it has taken. Empty while dcp_fast is not installed.
standing_for: dict[type, type] = {}


class StandIn(ABCMeta):
    """Metaclass of the classes that :func:`dcp_fast.install` puts in the place of torch's.

    Code that then asks ``isinstance(reader, torch.distributed.checkpoint.FileSystemReader)`` asks about ours, but means
    torch's: objects that were made before, and subclasses that torch or a framework derived before, are still meant.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        original = standing_for.get(cls)
        return super().__instancecheck__(instance) or (original is not None and isinstance(instance, original))

    def __subclasscheck__(cls, subclass: type) -> bool:
        original = standing_for.get(cls)
        return super().__subclasscheck__(subclass) or (original is not None and issubclass(subclass, original))
