"""Type checks against torch's classes keep their meaning while dcp_fast's stand in their place."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

from typing_extensions import Protocol

__all__ = ["DropIn", "torch_class_of"]

# By class of dcp_fast: the class of torch whose place it has taken. Empty while dcp_fast is not installed.
torch_class_of: dict[type, type] = {}


# The metaclass of protocols is a kind of ABCMeta: subclasses of ours may implement protocols as those of torch's may.
# That of typing_extensions, which torch uses, is the more special one.
class DropIn(type(Protocol)):  # type: ignore[misc]
    """Metaclass of the classes that :func:`dcp_fast.install` puts in the place of torch's.

    Code that then asks ``isinstance(reader, torch.distributed.checkpoint.FileSystemReader)`` asks about ours, but means
    torch's: objects that were made before, and subclasses that torch or a framework derived before, are still meant.
    """

    # Torch's class is looked for in the list of bases. To ask it would not end: it is abstract, and asks its
    # subclasses, ours among them.

    def __instancecheck__(cls, instance: Any) -> bool:
        return ABCMeta.__instancecheck__(cls, instance) or torch_class_of.get(cls) in type(instance).__mro__

    def __subclasscheck__(cls, subclass: type) -> bool:
        return ABCMeta.__subclasscheck__(cls, subclass) or torch_class_of.get(cls) in subclass.__mro__
