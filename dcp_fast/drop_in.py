"""While dcp_fast is installed, type checks that name torch's classes mean what they meant before."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

from typing_extensions import Protocol

__all__ = ["DropIn", "torch_class_of"]

# By class of dcp_fast: the class of torch whose place it has taken. Empty while dcp_fast is not installed.
torch_class_of: dict[type, type] = {}


# A class may derive from ours and from a protocol, as it may from torch's. So this must be a metaclass of protocols.
# That of typing_extensions, which torch uses, is derived from that of typing, and so serves for both.
class DropIn(type(Protocol)):  # type: ignore[misc]
    """Metaclass of the classes that :func:`dcp_fast.install` puts in the place of torch's.

    After that, ``isinstance(reader, torch.distributed.checkpoint.FileSystemReader)`` asks about our class, but the code
    means torch's. So the answer is also yes for objects of torch's class that were made before, and for objects of
    subclasses that torch or a framework derived from it before.
    """

    # Torch's class is looked for among the bases. `issubclass` with torch's class would recurse without end: that class
    # is abstract, and asks its subclasses, of which ours is one.

    def __instancecheck__(cls, instance: Any) -> bool:
        return ABCMeta.__instancecheck__(cls, instance) or torch_class_of.get(cls) in type(instance).__mro__

    def __subclasscheck__(cls, subclass: type) -> bool:
        return ABCMeta.__subclasscheck__(cls, subclass) or torch_class_of.get(cls) in subclass.__mro__
