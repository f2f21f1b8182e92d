"""Random damage to the bytes of a checkpoint: dcp_fast loads what torch loads from the same files, or raises.

Each case damages one file and loads it with both, in a process with a memory limit. What is right:

- both load: the same data, bit for bit;
- only torch loads: dcp_fast raises a LoadError, since it checks more;
- both raise: a LoadError, or torch's own type;
- only dcp_fast loads: what torch loads when all but the payloads is repaired. The damage is then to parts of an archive
  that say nothing about the tensor (a serialization id), or to fields that a second copy in the archive outvotes.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Child, fast_error, limit_address_space, limited, record_parts, torch_error
from helpers import Entry, ShardedBuffer, fill, save, write_checkpoint
from torch.distributed.checkpoint._extension import ZStandard

from dcp_fast.errors import CorruptMetadataError, LoadError, UntrustedMetadataError

CASES = 1000
MEMORY = 4 << 30

# Checkpoints


def _dtypes() -> dict[str, torch.Tensor]:
    names = ["float32", "bfloat16", "bool", "complex64", "int64", "uint8", "float8_e4m3fn", "float16", "float64"]
    return {name: fill((4, 3), getattr(torch, name), seed) for seed, name in enumerate(names)}


def _small() -> dict[str, Any]:
    return _dtypes() | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "extra": {"step": 5, "name": "text"}}


def _small_wanted(rng: random.Random) -> dict[str, Any]:
    state: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in _dtypes().items()}
    state |= {"scalar": torch.tensor(0.0), "empty": torch.zeros(0, 4), "extra": {"step": 0, "name": ""}}
    if rng.random() < 0.2:
        state["float32"] = torch.zeros(4, 3, dtype=torch.float64)
    return state


LARGE = fill((96, 100), torch.float32, 50)


def _large() -> dict[str, Any]:
    halves = [((0, 0), LARGE[:40].clone()), ((40, 0), LARGE[40:].clone())]
    return {
        "large": Entry((96, 100), torch.float32, halves, file="__%d_0.distcp"),
        "strided": Entry.of(LARGE.t(), file="__1_0.distcp"),
        "legacy": Entry.of(LARGE[:5].clone(), file="__1_0.distcp", legacy=True),
        "value": Entry(value=[1, "two", 3.0], file="__1_0.distcp"),
    }


def _large_wanted(rng: random.Random) -> dict[str, Any]:
    state: dict[str, Any] = {"large": torch.zeros(96, 100), "strided": torch.zeros(100, 96), "value": None}
    if rng.random() < 0.5:
        state["large"] = ShardedBuffer.make((96, 100), [(30, 10), (0, 90)], [torch.zeros(20, 5), torch.zeros(96, 3)])
    if rng.random() < 0.5:
        state["legacy"] = torch.zeros(5, 100)
    return state


Result = tuple[BaseException | None, dict[str, Any]]


@dataclass
class Pristine:
    """A checkpoint, and where the payloads of its plain tensors are: file, begin, end."""

    path: Path
    wanted: Callable[[random.Random], dict[str, Any]]
    files: dict[str, bytes]
    payloads: list[tuple[str, int, int]]

    @staticmethod
    def of(path: Path, wanted: Callable[[random.Random], dict[str, Any]]) -> Pristine:
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        payloads = []
        for info in pickle.loads(files[".metadata"]).storage_data.values():
            record = files[info.relative_path][info.offset : info.offset + info.length]
            if record.startswith(b"PK"):
                parts = record_parts(record)
                begin = info.offset + parts.get("data/0", 0)
                if "data/0" in parts:
                    payloads.append((info.relative_path, begin, begin + parts["data/0 size"]))
        return Pristine(path, wanted, files, payloads)

    def load_repaired(self, name: str, data: bytes, state: dict[str, Any]) -> Result:
        """What torch loads when all but the payloads of a damaged file is as it was."""
        repaired = bytearray(self.files[name])
        for file, begin, end in self.payloads:
            if file == name:
                repaired[begin:end] = data[begin:end].ljust(end - begin, b"\0")
        (self.path / name).write_bytes(repaired)
        return torch_error(self.path, state), state


def make_pristine(path: Path) -> list[Pristine]:
    return [
        Pristine.of(save(path / "small", _small(), thread_count=2), _small_wanted),
        Pristine.of(write_checkpoint(path / "large", _large()), _large_wanted),
        Pristine.of(save(path / "zstd", _small(), _extensions=[ZStandard()]), _small_wanted),
    ]


# Damage


def _place(rng: random.Random, data: bytes) -> int:
    """A position, often within one of the headers of an archive."""
    if rng.random() < 0.5:
        headers = [at for at in range(len(data)) if data.startswith(b"PK", at)]
        if headers:
            return min(rng.choice(headers) + rng.randrange(64), len(data) - 1)
    return rng.randrange(len(data))


def damage(rng: random.Random, data: bytes, others: list[bytes]) -> tuple[str, bytes]:
    """What was done, and the damaged bytes."""
    at = _place(rng, data)
    length = min(rng.choice([1, 1, 2, 4, 8, 100, 1000]), len(data) - at)
    end = at + length
    other = rng.choice(others)
    start = rng.randrange(len(other))
    kind = rng.choice(
        ["flip"] * 6 + ["byte"] * 4 + ["zero", "ones", "cut", "delete", "double", "splice", "insert", "swap", "append"]
    )
    if kind == "flip":
        new = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    elif kind == "byte":
        new = data[:at] + rng.randbytes(length) + data[end:]
    elif kind == "zero":
        new = data[:at] + bytes(length) + data[end:]
    elif kind == "ones":
        new = data[:at] + b"\xff" * length + data[end:]
    elif kind == "cut":
        new = data[:at]
    elif kind == "delete":
        new = data[:at] + data[end:]
    elif kind == "double":
        new = data[:end] + data[at:end] + data[end:]
    elif kind == "splice":
        new = data[:at] + other[start : start + length] + data[end:]
    elif kind == "insert":
        new = data[:at] + other[start : start + length] + data[at:]
    elif kind == "swap":
        new = data[end : end + length] + data[at:end]
        new = data[:at] + new + data[at + len(new) :]
    else:
        new = data + other[start : start + length]
    return f"{kind} at {at} length {length}", new


# Judgement


def bits(value: Any) -> Any:
    if isinstance(value, ShardedBuffer):
        return [bits(shard) for shard in value.shards]
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return repr(value)


def judge(ours: Result, theirs: Result, repaired: Callable[[], Result]) -> tuple[str, bool]:
    """Which of the cases above this is, and whether it is as it should be."""
    error, their_error = ours[0], theirs[0]
    if error is None:
        if their_error is None:
            return "both load", bits(ours[1]) == bits(theirs[1])
        again = repaired()
        return "only dcp_fast loads", again[0] is None and bits(ours[1]) == bits(again[1])
    of_metadata = isinstance(error, (CorruptMetadataError, UntrustedMetadataError))
    told = not isinstance(error, LoadError) or bool(error.path and (error.fqn or of_metadata))
    if their_error is None:
        return "only torch loads", told and isinstance(error, LoadError)
    return "both raise", told and isinstance(error, (LoadError, type(their_error)))


def _fuzz(report: Callable[[Any], None], path: Path, seed: str, first: int, last: int, seconds: float) -> int:
    """Run the cases from ``first`` on; reports (what, case, details) for each; returns where it stopped."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    checkpoints = make_pristine(path / f"from_{first}")
    limit_address_space(MEMORY)
    started = time.monotonic()
    for case in range(first, last):
        if time.monotonic() - started > seconds:
            return case
        rng = random.Random(f"{seed}/{case}")
        pristine = rng.choice(checkpoints)
        name = rng.choice(sorted(pristine.files))
        data, done = pristine.files[name], []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            what, data = damage(rng, data or b"\0", list(pristine.files.values()))
            done.append(what)
        options = {"threads": rng.choice([1, 3]), "io": rng.choice(["cached", "direct", "auto"])}
        shape = rng.randrange(1 << 30)
        ours, theirs, again = (pristine.wanted(random.Random(shape)) for _ in range(3))
        file = pristine.path / name
        repaired = partial(pristine.load_repaired, name, data, again)

        with limited(60):
            file.write_bytes(data)
            report(("ours", case, None))
            error = fast_error(pristine.path, ours, **options)
            report(("torch", case, None))
            their_error = torch_error(pristine.path, theirs)
            outcome, right = judge((error, ours), (their_error, theirs), repaired)
        about = (
            f"{pristine.path.name}/{name}: {'; '.join(done)}; {options}: {error!r:.300} / torch: {their_error!r:.300}"
        )
        report((outcome if right else f"WRONG: {outcome}", case, about))
        file.write_bytes(pristine.files[name])
    return last


def run(path: Path, seed: str, cases: int, seconds: float) -> Counter[str]:
    """Run cases until their number or the time is up; fails if one is wrong or ends the process within dcp_fast."""
    counts: Counter[str] = Counter()
    wrong = []
    first, deadline = 0, time.monotonic() + seconds
    while first < cases and time.monotonic() < deadline:
        stage: tuple[str, int, Any] = ("start", first, None)
        with Child(_fuzz, path, seed, first, cases, deadline - time.monotonic()) as child:
            try:
                while not isinstance(message := child.next(90), int):
                    stage = message
                    if stage[0] not in ("ours", "torch"):
                        counts[stage[0]] += 1
                        if stage[0].startswith("WRONG"):
                            wrong.append(stage)
                first = message
            except (EOFError, TimeoutError):
                assert stage[0] == "torch", f"seed {seed}, case {stage[1]}: the process died, {child.close()}"
                counts["torch ends the process"] += 1
                first = stage[1] + 1
    assert not wrong, f"seed {seed}:\n" + "\n".join(f"{case}: {what}: {about}" for what, case, about in wrong[:20])
    return counts


def test_damaged_bytes(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    counts = run(tmp_path, "fixed", CASES, 600)
    assert sum(counts.values()) == CASES
    assert min(counts[outcome] for outcome in ("both load", "both raise")) > CASES // 10
    assert min(counts[outcome] for outcome in ("only torch loads", "only dcp_fast loads")) > 5


@pytest.mark.long
def test_damaged_bytes_for_ten_minutes(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    seed = os.urandom(8).hex()
    print(f"seed {seed}")
    counts = run(tmp_path, seed, 1 << 40, 600)
    print(dict(counts))
    assert sum(counts.values()) > 5 * CASES
