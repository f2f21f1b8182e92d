"""Subclasses of tensors that are destinations or are stored."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Attributed", "Functional", "Misshapen", "Negated", "Plain", "Scaled"]


class Plain(torch.Tensor):
    pass


class Attributed(torch.Tensor):
    """A subclass whose elements are stored as they are, with something of its own."""

    extra = 3


class Misshapen(torch.Tensor):
    """Has a shape of its own, of as many elements as its owner likes; torch goes by the size."""

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size([1000])


class Functional(torch.Tensor):
    """Counts the copies that go through it."""

    calls = 0

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "copy_":
            Functional.calls += 1
        return super().__torch_function__(function, types, args, kwargs or {})


class Negated(torch.Tensor):
    """A wrapper: holds its elements with the other sign in another tensor."""

    wrapped: torch.Tensor

    @staticmethod
    def make(wrapped: torch.Tensor) -> Negated:
        facts = {"strides": wrapped.stride(), "dtype": torch.float32, "device": wrapped.device}
        self = torch.Tensor._make_wrapper_subclass(Negated, wrapped.size(), **facts)
        self.wrapped = wrapped
        return self

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "copy_":
            args[0].wrapped.copy_(-args[1].to(torch.float32))
            return args[0]
        if name in {"detach", "slice", "alias", "narrow", "view", "as_strided"}:
            return Negated.make(function(args[0].wrapped, *args[1:], **(kwargs or {})))
        raise NotImplementedError(name)


class Scaled(torch.Tensor):
    """A wrapper that is stored as such, as those of quantization libraries: integers, and a scale for each row."""

    numbers: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scales: torch.Tensor) -> Scaled:
        facts = {"strides": numbers.stride(), "dtype": torch.float32}
        self: Scaled = torch.Tensor._make_wrapper_subclass(cls, numbers.size(), **facts)
        self.numbers, self.scales = numbers, scales
        return self

    def __init__(self, numbers: torch.Tensor, scales: torch.Tensor) -> None:
        pass

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> Scaled:
        return cls(**inner)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "is_pinned":
            return False
        if name == "copy_":
            return cls.copy(*args[:2])
        if name in {"detach", "alias", "slice"}:  # of rows
            numbers = function(args[0].numbers, *args[1:], **(kwargs or {}))
            scales = function(args[0].scales, *args[1:], **(kwargs or {}))
            return cls(numbers, scales)
        raise NotImplementedError(name)

    @staticmethod
    def copy(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        assert isinstance(source, Scaled)
        if isinstance(target, Scaled):
            target.numbers.copy_(source.numbers)
            target.scales.copy_(source.scales)
            return target
        return target.copy_(source.numbers * source.scales)
