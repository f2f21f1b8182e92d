"""The seam between a transfer and the exchange with other ranks (``ranks/exchange.py``)."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from enum import IntEnum
from typing import NamedTuple, Protocol

from dcp_fast import _native


class Sending(NamedTuple):
    """A round that is to be sent, and where memory for it is on the host: its address and its size."""

    round: int
    address: int
    size: int


class Received(NamedTuple):
    """A round that was received.

    Attributes:
        address, size: of its memory on the host; 0 if it is not there, as nobody needs it there.
        on_device: ordinal, address and size of where it is on a GPU.
    """

    round: int
    address: int
    size: int
    on_device: tuple[int, int, int] | None


class ExchangeStep(Protocol):
    """Reads what this rank sends in one round, while it places what it received in another one. None: neither."""

    def __call__(
        self, exchange: _native.Exchange, send: Sending | None, receive: Received | None
    ) -> _native.RoundStats: ...


class Phase(IntEnum):
    """What exchanges are for, in the order in which all ranks take part in them.

    There is one of headers and one of boxes. Of each other phase there are as many as the rank that expects most of
    them. A rank that needs less takes part without needing anything, so that what several ranks need comes to all of
    them in the same exchange.
    """

    HEADERS = 0  # bytes entries, and records that torch reads as they have a transform, as far as memory goes
    BOXES = 1  # that the engine places
    BATCHES = 2  # boxes that torch places or that are written over others, and records that torch reads
    QUANTIZED = 3  # scales, then elements that are dequantized as they arrive: shared_quantized.py
    QUANTIZED_BATCHES = 4  # scales and elements that are dequantized batch by batch: dequantization.py
    BYTES = 5  # entries for which there was no memory in the first exchange


class Sharing(Protocol):
    """What a load gives a transfer if its ranks share reads.

    Each exchange is collective: on every rank the transfer calls :meth:`share` for it, or for one of a later phase, or
    :meth:`decline` for all that are left.

    Attributes:
        most_bytes: memory for what is received in the first exchange, and for rounds.
        save_id: tells the checkpoint from others of the same names and sizes; empty where it has none.
        left: how many exchanges this rank has yet to take part in, as far as ranks have told each other.
    """

    @property
    def most_bytes(self) -> int: ...

    @property
    def save_id(self) -> str: ...

    @property
    def left(self) -> int: ...

    def share(self, phase: Phase, find: Callable[[], tuple[_native.Need, ExchangeStep]]) -> bool:
        """Read what this rank needs together with all other ranks, and place it.

        Args:
            phase: of the exchange. In those of earlier phases this rank takes part without needing anything.
            find: what this rank needs, and the step of a round.

        Returns:
            Whether that was done. If not, this rank reads what it needs alone, as all others do.

        Raises:
            OtherRankError: another rank failed. Some destinations are written, and others are not.
            Exception: what ``find`` or a step raised, or the process group.
        """

    def expect(self, phase: Phase, exchanges: int) -> None:
        """Say in the next exchange that this rank needs so many of a phase, which is not over by then."""

    def decline(self, reason: str) -> None:
        """Take part in what exchanges of all other ranks are left, but read what this rank needs alone."""


sharing: ContextVar[Sharing | None] = ContextVar("dcp_fast_sharing", default=None)
