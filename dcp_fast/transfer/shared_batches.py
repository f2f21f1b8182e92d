"""Batches of boxes that torch places, or that are dequantized, and that ranks share.

They arrive one after another in memory of limited size, each in an exchange of its own, and are brought to their
targets from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

PartT = TypeVar("PartT")
BatchT = TypeVar("BatchT")


class SharedBatches(Generic[PartT, BatchT]):
    """Batches that arrive one after another, in buffers that they have in turn.

    Args:
        parts: of each batch.
        allocate: makes the buffers, each of which has room for any batch.
        device: that the buffers lie on, as an ordinal; None: the host.
        fill: has the parts of a batch arrive in a buffer.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[PartT]],
        allocate: Callable[[], Sequence[torch.Tensor]],
        device: int | None,
        fill: Callable[[Sequence[PartT], torch.Tensor], BatchT],
    ) -> None:
        self.parts = parts
        self.device = device
        self._allocate = allocate
        self._fill = fill

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[BatchT]:
        """Have all batches arrive. Each must be emptied before the next one is asked for.

        Raises:
            MemoryError: there is no memory for a buffer.
            CudaOutOfMemoryError: the same on a device.
        """
        buffers = self._allocate() if self.parts else ()
        for number, parts in enumerate(self.parts):
            yield self._fill(parts, buffers[number % len(buffers)])
