"""Real gloo ranks in processes of their own, with a time limit so that nothing hangs."""

from __future__ import annotations

import datetime
import faulthandler
import os
import signal
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import FORKS

__all__ = ["CollectiveCounter", "RankError", "Ranks"]

_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all",
    "all_to_all_single",
    "batch_isend_irecv",
    "broadcast",
    "gather",
    "reduce_scatter_tensor",
    "scatter",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "broadcast_object_list",
    "barrier",
)


class RankError(Exception):
    """A rank raised, died or did not answer in time; the message has its traceback."""


class Ranks:
    """A pool of rank processes that are started when they are first needed and then reused."""

    def __init__(self) -> None:
        self._workers: list[tuple[ForkServerProcess, Connection]] = []
        self._crashes = tempfile.TemporaryDirectory()  # what a process that dies was doing

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 90.0) -> list[Any]:
        """What ``function(*args)`` returns on each rank of a new process group of ``world_size`` ranks."""
        while len(self._workers) < world_size:
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(theirs, self._crashes.name), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        store = os.path.join(tempfile.gettempdir(), f"dcp_fast_{uuid.uuid4().hex}")
        for rank in range(world_size):
            self._workers[rank][1].send((function, args, rank, world_size, store))
        deadline = time.monotonic() + timeout
        results: list[Any] = []
        errors: list[str] = []
        for rank in range(world_size):
            connection = self._workers[rank][1]
            try:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    raise EOFError(f"no answer in {timeout} s")
                done, result = connection.recv()
            except (EOFError, OSError) as error:
                errors.append(f"rank {rank}: {type(error).__name__}: {error}\n{self._death(rank)}")
                continue
            if done:
                results.append(result)
            else:
                errors.append(f"rank {rank}: {result}")
        if os.path.exists(store):
            os.unlink(store)
        if errors:
            self.close()  # the others may be stuck in a collective call
            raise RankError("\n".join(errors))
        return results

    def _death(self, rank: int) -> str:
        """What is known of a process that does not answer."""
        process, _ = self._workers[rank]
        process.join(1)
        crash = Path(self._crashes.name, str(process.pid))
        return f"exit code {process.exitcode}\n{crash.read_text() if crash.exists() else ''}"

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []


def _serve(connection: Connection, crashes: str) -> None:
    crash = Path(crashes, str(os.getpid())).open("w")  # noqa: SIM115 - it is open as long as the process lives
    faulthandler.enable(crash, all_threads=False)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    while True:
        try:
            function, args, rank, world_size, store = connection.recv()
        except EOFError:
            return
        try:
            limit = datetime.timedelta(seconds=60)
            address = f"file://{store}"
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size, timeout=limit)
            try:
                dist.barrier()  # a rank that is through while another still connects would break that connection
                reply = (True, function(*args))
            finally:
                dist.destroy_process_group()
            connection.send(reply)
        except BaseException:
            connection.send((False, traceback.format_exc()))


class CollectiveCounter:
    """Counts collective calls of this rank, and the bytes of those that take tensors."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.bytes = 0
        self._originals = {name: getattr(dist, name) for name in _COLLECTIVES}

    def __enter__(self) -> CollectiveCounter:
        for name, original in self._originals.items():
            setattr(dist, name, self._counting(name, original))
        return self

    def __exit__(self, *args: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counting(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if args and isinstance(args[0], torch.Tensor):
                self.bytes += args[0].nbytes
            return original(*args, **kwargs)

        return call
