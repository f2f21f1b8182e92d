"""Memory of a rank for two rounds of what it sends to others, and for two of what it receives."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate

import torch

from dcp_fast import _native
from dcp_fast.transfer.sharing import Received, Sending

_WORD = 8  # bytes; each part of a round begins with two words, its header


class RoundMemory:
    """Holds rounds on the host, and on a GPU if the process group needs them there.

    The exchanges of a load have it one after another.

    Args:
        device: where the process group wants tensors to be.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_on_host = device.type == "cpu"
        self._stays: list[bool] = []  # by round
        self.free()

    def free(self) -> None:
        """Let go of all memory, whoever may still know this object: an exception knows all that it went through."""
        self._sent: list[torch.Tensor] = []
        self._received: list[torch.Tensor] = []
        # What collective calls take: where the process group wants it.
        self._to_send: list[torch.Tensor] = []
        self._to_receive: list[torch.Tensor] = []

    def make_room(self, exchange: _native.Exchange, need: _native.Need | None) -> None:
        """Have memory for the rounds of an exchange."""
        rounds = exchange.rounds
        # What is received on the GPU that it is for stays there, unless this rank passes it on.
        stays = not self._is_on_host and (need is None or need.is_on(self._device.index))
        self._stays = [stays and not exchange.passes_on(round) for round in range(rounds)]
        to_send, to_receive = (
            max((sum(bytes_of(round)) for round in range(rounds)), default=0)
            for bytes_of in (exchange.bytes_to_send, exchange.bytes_to_receive)
        )
        wanted = [to_send, 0 if all(self._stays) else to_receive, to_send, to_receive]
        count = min(2, rounds)
        room = [
            memory[0].numel() if memory else 0
            for memory in (self._sent, self._received, self._to_send, self._to_receive)
        ]
        if count <= len(self._sent) and all(there >= size for there, size in zip(room, wanted, strict=True)):
            return
        count = max(count, len(self._sent))
        sizes = list(map(max, room, wanted))
        self.free()  # before there is more, as all of it together has a limit
        self._sent, self._received = ([_on_host(size, self._device) for _ in range(count)] for size in sizes[:2])
        if self._is_on_host:
            self._to_send, self._to_receive = self._sent, self._received
        else:
            self._to_send, self._to_receive = (
                [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(count)] for size in sizes[2:]
            )

    def sending(self, round: int) -> Sending:
        """Where a round is packed."""
        return Sending(round, *_place_of(self._sent[round % 2]))

    def received(self, round: int) -> Received:
        """Where a round is that has arrived."""
        on_device = None
        if not self._is_on_host:
            on_device = (self._device.index, *_place_of(self._to_receive[round % 2]))
        here = (0, 0) if self._stays[round] else _place_of(self._received[round % 2])
        return Received(round, *here, on_device)

    def for_group(self, round: int, to_send: int, to_receive: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the process group sends in a round, and where it receives: so many bytes."""
        return self._to_send[round % 2][:to_send], self._to_receive[round % 2][:to_receive]

    def pack_headers(self, round: int, sizes: Sequence[int], header: tuple[int, int]) -> int:
        """Put a header before each part of a round, and all of it where the process group wants it.

        Args:
            round: its number.
            sizes: of the parts that are sent to each rank.
            header: its two numbers.

        Returns:
            How many bytes went to a GPU.
        """
        sent = self._sent[round % 2]
        words = _words_of(sent)
        for begin in _begins(sizes):
            words[begin], words[begin + 1] = header
        if self._is_on_host:
            return 0
        to_send, _ = self.for_group(round, sum(sizes), 0)
        to_send.copy_(sent[: sum(sizes)])
        return to_send.nbytes

    def bring_to_host(self, round: int, size: int) -> bool:
        """Have what was received in a round on the host, if it is needed there. Returns whether it is there."""
        if self._stays[round]:
            return False
        if not self._is_on_host:
            self._received[round % 2][:size].copy_(self._to_receive[round % 2][:size])
        return True

    def headers(self, round: int, sizes: Sequence[int], on_host: bool) -> list[tuple[int, int]]:
        """The headers that came from each rank. On the host nothing can fail here.

        Args:
            round: its number.
            sizes: of the parts that came from each rank.
            on_host: whether they are there.
        """
        if on_host:
            words = _words_of(self._received[round % 2])
            return [(words[begin], words[begin + 1]) for begin in _begins(sizes)]
        there = self._to_receive[round % 2][: sum(sizes)].view(torch.int64)
        places = torch.tensor([[begin, begin + 1] for begin in _begins(sizes)], device="cpu")
        return [(first, second) for first, second in there[places.to(there.device)].tolist()]


def _on_host(size: int, device: torch.device) -> torch.Tensor:
    """Memory on the host: pinned if it is copied from and to a GPU, unless the driver refuses that."""
    if device.type != "cpu" and size > 0:
        with suppress(_native.NativeError):
            # torch's own pinned memory may take twice as much.
            return torch.frombuffer(_native.PinnedBuffer(size, device.index), dtype=torch.uint8)
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _place_of(memory: torch.Tensor) -> tuple[int, int]:
    """Its address and its size."""
    return memory.data_ptr(), memory.numel()


def _words_of(memory: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    """The words of memory on the host. Not by torch, which may be told to work elsewhere or in another way."""
    return (ctypes.c_int64 * (memory.numel() // _WORD)).from_address(memory.data_ptr())


def _begins(sizes: Sequence[int]) -> list[int]:
    """Where parts begin that lie one behind another, in words."""
    return [begin // _WORD for begin in accumulate(sizes, initial=0)][:-1]
