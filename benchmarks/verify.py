"""Holds what a loader loads against what torch loads, bit for bit, where the tensors lie: on the host, or on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.contenders import Contender, Sample
from benchmarks.destinations import Destinations

# Integers as wide as an element. As numbers a NaN would differ from itself, and -0.0 would equal 0.0.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class VerificationError(Exception):
    """A contender loaded something else than torch did."""


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors on one device are alike in dtype, shape and every bit."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    integers = _INTEGERS[first.itemsize]
    return torch.equal(first.view(integers), second.view(integers))


class Expected:
    """What torch loaded, in copies beside the tensors that it loaded into, so that no byte travels to be compared."""

    def __init__(self, oracle: Contender, wanted: Destinations) -> None:
        """Let torch load, and keep that."""
        self._wanted = wanted
        wanted.poison()
        oracle.run()
        self._tensors = {name: tensor.clone() for name, tensor in wanted.local.items()}

    def compare(self, who: str, loaded: Mapping[str, torch.Tensor]) -> None:
        """Raise VerificationError unless these tensors are what torch loaded."""
        differing = [
            name
            for name, tensor in self._tensors.items()
            if name not in loaded or not same_bits(tensor, loaded[name].to(tensor.device))
        ]
        if differing:
            raise VerificationError(f"{who} loads {len(differing)} tensors differently, first: {differing[0]}")

    def run(self, contender: Contender) -> Sample:
        """Run a contender on overwritten tensors, and compare what it loads into them."""
        self._wanted.poison()
        sample = contender.run()
        self.compare(contender.name, self._wanted.local)
        return sample
