"""How much memory of this process is resident at most while something runs: all of it, and what it consists of.

Private memory is what the process allocated; the system must find as much. Mapped pages belong to the page cache, and
the system takes them back when it needs them. The kernel keeps the peak of both together. The peak of each is the
largest of many samples, which another process takes: a thread of this one would wait for the interpreter, as the load
does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PRIVATE, _MAPPED = ("RssAnon", "RssShmem"), "RssFile"
# Prints a line when it has begun, and the peaks of both in KiB when its standard input ends.
_SAMPLER = """
import select, sys
peaks = [0, 0]
first = True
with open(f"/proc/{sys.argv[1]}/status") as status:
    while True:
        status.seek(0)
        found = {line.split(":")[0]: line.split()[1] for line in status if line.startswith("Rss")}
        now = int(found["RssAnon"]) + int(found["RssShmem"]), int(found["RssFile"])
        peaks = list(map(max, peaks, now))
        if first:
            print("ready", flush=True)
            first = False
        if select.select([sys.stdin], [], [], 0.002)[0]:
            break
print(*peaks)
"""


@dataclass
class Peaks:
    """Above what was resident before, in bytes. All are 0 until the end."""

    all_bytes: int = 0
    private_bytes: int = 0
    mapped_bytes: int = 0
    # Where the kernel cannot reset its high-water mark, an earlier peak may show in `all_bytes`.
    is_exact: bool = True


@contextmanager
def watched() -> Iterator[Peaks]:
    """Find the peaks of what happens within."""
    peaks = Peaks()
    command = [sys.executable, "-I", "-S", "-c", _SAMPLER, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sampler:
        assert sampler.stdout is not None
        assert sampler.stdin is not None
        sampler.stdout.readline()
        peaks.is_exact = reset_high_water_mark()
        before = {field: status_bytes(field) for field in ("VmRSS", *_PRIVATE, _MAPPED)}
        yield peaks
        most = status_bytes("VmHWM")
        sampler.stdin.close()
        private, mapped = (int(kib) * 1024 for kib in sampler.stdout.read().split())
    peaks.all_bytes = most - before["VmRSS"]
    peaks.private_bytes = private - sum(before[field] for field in _PRIVATE)
    peaks.mapped_bytes = mapped - before[_MAPPED]


def reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")
