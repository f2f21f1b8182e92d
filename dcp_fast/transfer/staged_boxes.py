"""Boxes that ranks share, of planners that tell only item by item where they go.

What a rank needs is known before, but not where it goes: a planner with a ``resolve_tensor`` of its own must be asked
for that when all items before are committed. So boxes arrive in memory, batch by batch, and wait there until they have
their turn. The planner is called as without sharing, and cannot notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch.distributed.checkpoint.planner import ReadItem

from dcp_fast._torch import narrow_tensor_by_index
from dcp_fast.transfer.bounce import check_internal_overlap


class _Box(Protocol):
    @property
    def lengths(self) -> Sequence[int]: ...


class _Part(Protocol):
    @property
    def box(self) -> _Box: ...


# A box, offsets and lengths in it, and these elements.
Piece = tuple[_Box, Sequence[int], Sequence[int], torch.Tensor]


class StagedBoxes:
    """Boxes that wait on the host until a planner tells where they go, one after another.

    Args:
        boxes: by the identity of their items, in the order in which these are wanted.
        parts: of each batch.
        batches: has one batch after another arrive in the same memory. Of each its pieces, and how many bytes are
            stored of it.
    """

    def __init__(
        self,
        boxes: Mapping[int, _Box],
        parts: Sequence[Sequence[_Part]],
        batches: Iterator[tuple[Sequence[Piece], int]],
    ) -> None:
        self._boxes = boxes
        self._batches = batches
        self._spans: dict[int, tuple[int, int]] = {}  # first and last batch, by the identity of a box
        for number, of_batch in enumerate(parts):
            for part in of_batch:
                first, _ = self._spans.get(id(part.box), (number, number))
                self._spans[id(part.box)] = (first, number)
        self._here = -1  # number of the batch that is in memory
        self._pieces: dict[int, list[Piece]] = {}  # of it, by the identity of a box
        self._error: BaseException | None = None

    def __contains__(self, item: ReadItem) -> bool:
        """Whether an item has a box here, be it in memory, yet to come, or gone."""
        return id(item) in self._boxes

    def can_place(self, item: ReadItem, target: torch.Tensor) -> bool:
        """Whether the box of an item is in memory or yet to come, and fits a target."""
        box = self._boxes.get(id(item))
        if box is None or list(box.lengths) != list(target.size()):
            return False
        first, _ = self._spans.get(id(box), (self._here, self._here))  # a box of no elements is in no batch
        return first >= self._here

    def place(self, item: ReadItem, target: torch.Tensor) -> int:
        """Bring the box of an item to its target. Returns how many stored bytes have arrived for that.

        Raises:
            RuntimeError: several elements of the target share memory, as ``copy_`` raises.
            Exception: an exchange failed. It is raised again in further calls, as there is nothing to try again.
        """
        check_internal_overlap(target)
        box = self._boxes[id(item)]
        arrived = 0
        first, last = self._spans.get(id(box), (0, -1))
        for number in range(first, last + 1):
            arrived += self._go_to(number)
            for _, offsets, lengths, source in self._pieces[id(box)]:
                narrow_tensor_by_index(target, offsets, lengths).copy_(source)
        return arrived

    def _go_to(self, number: int) -> int:
        if self._error is not None:
            raise self._error
        arrived = 0
        while self._here < number:
            try:
                pieces, size = next(self._batches)
            except BaseException as error:
                self._error = error
                raise
            self._here += 1
            arrived += size
            self._pieces = {}
            for piece in pieces:
                self._pieces.setdefault(id(piece[0]), []).append(piece)
        return arrived
