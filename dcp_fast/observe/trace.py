"""The timeline of a load: what each thread did when, as a file of Chrome trace events that Perfetto opens."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from dcp_fast import _native

logger = logging.getLogger("dcp_fast")

_STAGES_TRACK = "load"


class Timeline:
    """What happened during one load on this rank.

    Args:
        path: the file to write. ``{rank}`` in it stands for the rank in the default process group. If there is none in
            it, rank 0 writes the path itself, and each other rank appends ``.rankN``.
        earlier: stages of the load before the timeline was made, with their seconds, one after the other.
    """

    def __init__(self, path: str, earlier: Mapping[str, float]) -> None:
        self._earlier = earlier
        self._zero = sum(round(seconds * 1e9) for seconds in earlier.values())  # of the recorder, in the file
        self.recorder = _native.TraceRecorder()
        self._clock_offset = self.recorder.now() - time.perf_counter_ns()
        distributed = dist.is_available() and dist.is_initialized()
        self._rank = dist.get_rank() if distributed else 0
        self._path = _path_of_rank(path, self._rank)
        self._process = f"rank {self._rank}" if distributed else "dcp_fast"

    def add_stage(self, name: str, begin: int, end: int) -> None:
        """Record a stage of the load, or a part of it. Times are of ``time.perf_counter_ns``."""
        begin, end = (max(0, at + self._clock_offset) for at in (begin, end))
        self.recorder.add(_STAGES_TRACK, name, begin, end)

    def write(self) -> None:
        """Write the events so far. The file is complete at any time: a new one takes its place.

        Raises:
            OSError, ValueError: the file cannot be written; its name cannot be one.
        """
        path = os.path.realpath(self._path)
        if os.path.exists(path) and not os.path.isfile(path):  # a device, such as /dev/null, would be replaced
            code = errno.EISDIR if os.path.isdir(path) else errno.EINVAL
            raise OSError(code, os.strerror(code), path)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump({"traceEvents": self._events(), "displayTimeUnit": "ms"}, file, separators=(",", ":"))
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def save(self) -> None:
        """The same at the end of a load, which does not fail for its trace: what is wrong is a warning in the log."""
        try:
            self.write()
        except (OSError, ValueError) as error:
            logger.warning("cannot write the trace of a load: %s", error)

    def _events(self) -> list[dict[str, Any]]:
        tracks: dict[str, int] = {_STAGES_TRACK: 1}
        spans = []
        began = 0
        earlier = []
        for name, seconds in self._earlier.items():
            ended = began + round(seconds * 1e9)
            earlier.append((_STAGES_TRACK, name, began - self._zero, ended - self._zero, None, None, None))
            began = ended
        for track, name, begin, end, size, path, offset in [*earlier, *self.recorder.events()]:
            known = {"bytes": size, "path": path, "offset": offset}
            spans.append(
                {
                    "ph": "X",
                    "pid": self._rank,
                    "tid": tracks.setdefault(track, len(tracks) + 1),
                    "name": name,
                    "ts": (self._zero + begin) / 1e3,
                    "dur": (end - begin) / 1e3,
                    "args": {key: value for key, value in known.items() if value is not None},
                }
            )
        names = [self._metadata("process_name", 0, name=self._process)]
        for track, thread in tracks.items():
            names.append(self._metadata("thread_name", thread, name=track))
            names.append(self._metadata("thread_sort_index", thread, sort_index=thread))
        return names + spans

    def _metadata(self, kind: str, thread: int, **arguments: str | int) -> dict[str, Any]:
        return {"ph": "M", "pid": self._rank, "tid": thread, "name": kind, "args": arguments}


@contextmanager
def span(recorder: _native.TraceRecorder | None, name: str, size: int | None = None) -> Iterator[None]:
    """Record the time within on the calling thread's track. Does nothing without a recorder."""
    if recorder is None:
        yield
        return
    begin = recorder.now()
    try:
        yield
    finally:
        recorder.add(None, name, begin, recorder.now(), size)


def _path_of_rank(path: str, rank: int) -> str:
    if "{rank}" in path:
        return path.replace("{rank}", str(rank))
    return path if rank == 0 else f"{path}.rank{rank}"
