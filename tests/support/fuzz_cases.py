"""Random checkpoints and random state dicts to load them into, each made from a seed; and loads of them, compared."""

from __future__ import annotations

import itertools
import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers import (
    DTYPES,
    Entry,
    Outcome,
    ShardedBuffer,
    fast_reader,
    fill,
    image,
    load_with,
    torch_load,
    torch_planner,
    torch_reader,
    write_checkpoint,
)

import dcp_fast

__all__ = [
    "CONVERSIONS",
    "HOST_ONLY",
    "Case",
    "Part",
    "compare_cases",
    "compare_for_long",
    "make_case",
    "random_boxes",
    "random_destination",
    "random_load",
    "random_size",
    "values",
]

# No conversion between these is undefined for the values that `values` makes, NaN aside (see `convertible`).
CONVERSIONS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int8]
SHARED_BYTES = 1 << 22  # of destinations that overlap
LONG_SECONDS = 600.0
HOST_ONLY = (torch.device("cpu"),)


@dataclass
class Part:
    """One rank of a job whose ranks load one checkpoint.

    Attributes:
        rng: tells what this rank wants of the checkpoint, and how it reads. That of the checkpoint is the same on all.
        rank, ranks: which part it wants of tensors that all ranks want a part of.
    """

    rng: random.Random
    rank: int
    ranks: int


@dataclass
class Case:
    """A checkpoint, and how to load it."""

    path: Path
    write: Callable[[], Any]
    make: Callable[[], dict[str, Any]]
    options: dict[str, Any]
    description: list[str] = field(default_factory=list)
    torch_reader: Callable[[Path], Any] = torch_reader
    fast_reader: Callable[..., Any] = fast_reader


def make_case(path: Path, seed: int, devices: Sequence[torch.device] = HOST_ONLY, part: Part | None = None) -> Case:
    """The case of a seed, which is the same wherever and whenever it is made.

    Args:
        path: where the checkpoint goes.
        seed: of the case.
        devices: where destinations lie, each on one of them.
        part: which rank this is; None: the job has one.
    """
    rng = random.Random(seed)
    entries: dict[str, Entry] = {}
    builders: list[tuple[str, Callable[[Arena], Any]]] = []
    description = [f"seed {seed}"]
    files = rng.choice([1, 1, 2, 5])
    for number in range(rng.randint(1, 7)):
        fqn = rng.choice([f"k{number}", f"nested.k{number}", f"nested.deep.k{number}"])
        if rng.random() < 0.12:
            value = rng.choice([1, "text", None, (1, 2), {"set"}, list(range(50)), 2.5])
            entries[fqn] = Entry(value=value, file=f"__{rng.randrange(files)}_0.distcp")
            builders.append((fqn, lambda arena: 0))
            description.append(f"{fqn}: bytes")
            continue
        entry, stored = random_entry(rng, files)
        entries[fqn] = entry
        builder, wanted = random_destination(rng, entry, part)
        builders.append((fqn, builder))
        description.append(f"{fqn}: {tuple(entry.size)} {entry.dtype} {stored} -> {wanted}")
    if rng.random() < 0.15:
        entries["extra"] = Entry.of(torch.ones(3))
    make, options = random_load(rng if part is None else part.rng, builders, devices, description)
    return Case(path, partial(write_checkpoint, path, entries), make, options, description)


def random_load(
    rng: random.Random,
    builders: list[tuple[str, Callable[[Arena], Any]]],
    devices: Sequence[torch.device],
    description: list[str],
) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    """What makes a state dict of builders by FQN, and options of the reader."""
    rng.shuffle(builders)
    make = random_state(rng, builders, devices, description)
    options = random_options(rng)
    description.append(f"options={options} devices={[str(device) for device in devices]}")
    return make, options


def random_state(
    rng: random.Random,
    builders: Sequence[tuple[str, Callable[[Arena], Any]]],
    devices: Sequence[torch.device],
    description: list[str],
) -> Callable[[], dict[str, Any]]:
    """What makes a state dict, nested by its FQNs, of what builders make. Some share their memory."""
    arena_seed = rng.random()
    aliased = rng.random() < 0.3
    description.append(f"aliased={aliased}")

    def make() -> dict[str, Any]:
        arena = Arena(random.Random(arena_seed), aliased, devices)
        state: dict[str, Any] = {}
        for fqn, builder in builders:
            *parents, name = fqn.split(".")
            inner = state
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[name] = builder(arena)
        return state

    return make


def compare(case: Case) -> tuple[bool, bool, bool]:
    """Load a case with torch and with dcp_fast, and delete its checkpoint.

    Returns:
        Whether the load changed anything, whether torch.load had to help dcp_fast, and whether anything was mapped.
    """
    case.write()
    try:
        before = case.make()
        untouched = image(before)
        expected = load_with(torch_load, before, storage_reader=case.torch_reader(case.path), planner=torch_planner())
        reader = case.fast_reader(case.path, **case.options)
        actual = load_with(dcp_fast.load, case.make(), storage_reader=reader)
        assert same(actual, expected), "\n".join([*case.description, difference(actual, expected)])
        report = dcp_fast.last_report()
        assert report is not None
        return image(expected.state) != untouched, report.fallback_records > 0, report.bytes_mapped > 0
    finally:
        shutil.rmtree(case.path)


def compare_cases(make: Callable[[int], Case], count: int, only: int | None, are_payloads: bool = False) -> None:
    """Compare the cases of the first ``count`` seeds, or ``only`` that of one; they are no easy ones on the whole."""
    results = [compare(make(seed)) for seed in (range(count) if only is None else [only])]
    if only is None:
        assert sum(changed for changed, _, _ in results) > count * 0.9
        assert are_payloads or count * 0.05 < sum(fallback for _, fallback, _ in results) < count * 0.7


def compare_for_long(make: Callable[[int], Case], first: int) -> None:
    """Compare cases of other seeds than the ``first`` ones, which differ from run to run."""
    start = time.monotonic()
    done = 0
    for seed in itertools.count(time.time_ns() % (1 << 40) + first):
        if time.monotonic() - start > LONG_SECONDS:
            break
        compare(make(seed))
        done += 1
    assert done > first


def same(actual: Outcome, expected: Outcome) -> bool:
    if expected.errors is None or actual.errors is None:
        return actual.errors is expected.errors and actual.image() == expected.image()
    return all(isinstance(actual.errors.get(rank), type(error)) for rank, error in expected.errors.items())


def difference(actual: Outcome, expected: Outcome) -> str:
    if expected.errors is not None or actual.errors is not None:
        return f"torch: {expected.errors}, dcp_fast: {actual.errors}"

    def flat(state: object, path: str = "") -> list[tuple[str, object]]:
        if isinstance(state, dict):
            return [entry for key, value in state.items() for entry in flat(value, f"{path}.{key}")]
        return [(path, image(state))]

    names = [name for (name, a), (_, b) in zip(flat(actual.state), flat(expected.state), strict=True) if a != b]
    return f"differs in {names}"


def random_options(rng: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {"io": rng.choice(["auto", "cached", "direct", "mapped"])}
    if rng.random() < 0.5:
        options["threads"] = rng.choice([1, 2, 3, 64])
    if rng.random() < 0.5:
        options["block_bytes"] = rng.choice([1, 64 << 10, 100_001, 1 << 30])
    if rng.random() < 0.5:
        options["staging_bytes"] = rng.choice([1, 300, 4096, 300_000, 1 << 26])
    return options


def random_size(rng: random.Random) -> tuple[int, ...]:
    dims = rng.choice([0, 1, 1, 2, 2, 2, 3, 3, 4, 5])
    if dims <= 2 and rng.random() < 0.15:
        return tuple(rng.choice([200, 333, 512]) for _ in range(dims))
    return tuple(rng.choice([0, 1, 2, 3, 5, 8, 13]) if rng.random() < 0.95 else 40 for _ in range(dims))


# The stored side


def values(rng: random.Random, sizes: Sequence[int], dtype: torch.dtype, convertible: bool) -> torch.Tensor:
    if not convertible:
        return fill(sizes, dtype, rng.randrange(1 << 30))
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return torch.randint(-100, 100, torch.Size(sizes), generator=generator).to(dtype)


def random_entry(rng: random.Random, files: int) -> tuple[Entry, str]:
    convertible = rng.random() < 0.5
    dtype = rng.choice(CONVERSIONS if convertible else DTYPES)
    size = random_size(rng)
    # A stored chunk is known by its offsets: of two at the same place torch's metadata keeps the last.
    chunks = list(dict(random_boxes(rng, size)).items())
    parts = []
    layouts = []
    for offsets, sizes in chunks:
        layout, part = random_layout(rng, values(rng, sizes, dtype, convertible))
        parts.append((offsets, part))
        layouts.append(layout)
    file = "__%d_0.distcp" if rng.random() < 0.3 else f"__{rng.randrange(files)}_0.distcp"
    # torch.load cannot read legacy records of the types that came after that format.
    legacy = rng.random() < 0.05 and dtype in CONVERSIONS
    entry = Entry(size, dtype, parts, file=file, legacy=legacy)
    entry.value = convertible
    return entry, f"{len(chunks)} chunks {sorted(set(layouts))}{' legacy' if legacy else ''}"


def random_boxes(rng: random.Random, size: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes: a grid, perhaps with gaps, empty chunks, and chunks that overlap it."""
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for length in size:
        edges = [0, *sorted(rng.randint(0, length) for _ in range(rng.choice([0, 0, 1, 2, 3]))), length]
        pieces = list(itertools.pairwise(edges))
        boxes = [((*at, a), (*sizes, b - a)) for at, sizes in boxes for a, b in pieces]
    if len(boxes) > 24:
        boxes = rng.sample(boxes, 24)
    if rng.random() < 0.2:
        boxes = rng.sample(boxes, rng.randint(1, len(boxes)))
    while rng.random() < 0.2:
        at = tuple(rng.randint(0, length) for length in size)
        boxes.append((at, tuple(rng.randint(0, length - a) for a, length in zip(at, size, strict=True))))
    if rng.random() < 0.5:
        rng.shuffle(boxes)
    return boxes


def random_layout(rng: random.Random, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The same values, lying in memory in another way."""
    kind = rng.choice(["contiguous", "contiguous", "permuted", "padded", "strided", "expanded", "conj", "neg"])
    if kind == "contiguous" or tensor.dim() == 0:
        return "contiguous", tensor
    if kind == "expanded":
        dim = rng.randrange(tensor.dim())
        return kind, tensor.narrow(dim, 0, min(1, tensor.shape[dim])).expand(tensor.shape)
    if kind == "conj":
        return (kind, tensor.conj()) if tensor.is_complex() else ("contiguous", tensor)
    if kind == "neg":
        negatable = tensor.dtype in {torch.float32, torch.float64, torch.int32, torch.complex64}
        return (kind, torch._neg_view(tensor)) if negatable else ("contiguous", tensor)
    order = rng.sample(range(tensor.dim()), tensor.dim())
    target = empty(rng, tensor.shape, tensor.dtype, kind, order)
    # Not copy_, which some types lack: a view of bytes would need contiguous memory.
    return kind, target.copy_(tensor)


def empty(
    rng: random.Random,
    sizes: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    order: list[int],
    arena: Arena | None = None,
) -> torch.Tensor:
    """A tensor of zeros whose elements lie in memory in some way."""
    inner = [sizes[dim] for dim in order]
    steps = [rng.choice([1, 1, 2, 3]) if kind == "strided" else 1 for _ in inner]
    before = [rng.randint(0, 2) if kind != "permuted" else 0 for _ in inner]
    after = [rng.randint(0, 2) if kind != "permuted" else 0 for _ in inner]
    whole = [b + n * s + a for b, n, s, a in zip(before, inner, steps, after, strict=True)]
    base = arena.take(whole, dtype) if arena else torch.zeros(whole, dtype=dtype)
    for dim, (start, length, step) in enumerate(zip(before, inner, steps, strict=True)):
        base = base[(slice(None),) * dim + (slice(start, start + length * step, step),)]
    return base.permute([order.index(dim) for dim in range(len(order))])


# The destination


class Arena:
    """Where destinations get their memory: each its own, or all the same of a device so that they overlap."""

    def __init__(self, rng: random.Random, aliased: bool, devices: Sequence[torch.device]) -> None:
        self.rng = rng
        self.aliased = aliased
        self.devices = devices
        self.shared: dict[torch.device, torch.Tensor] = {}

    def device(self) -> torch.device:
        return self.devices[0] if len(self.devices) == 1 else self.rng.choice(self.devices)

    def take(self, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(sizes) * dtype.itemsize
        device = self.device()
        if not self.aliased or self.rng.random() < 0.3 or size + 4096 > SHARED_BYTES or dtype == torch.bool:
            return torch.zeros(torch.Size(sizes), dtype=dtype, device=device)
        if device not in self.shared:
            self.shared[device] = torch.zeros(SHARED_BYTES, dtype=torch.uint8, device=device)
        start = self.rng.randint(0, 40) * 16
        return self.shared[device][start : start + size].view(dtype).view(torch.Size(sizes))


def random_destination(
    rng: random.Random, entry: Entry, part: Part | None = None
) -> tuple[Callable[[Arena], Any], str]:
    boxes = None
    if part is not None:
        # Ranks shard it, or each wants something of its own.
        if entry.size and rng.random() < 0.5:
            boxes = [shard_of(tuple(entry.size), rng.randrange(len(entry.size)), part)]
        rng = part.rng
    dtype = rng.choice(CONVERSIONS) if entry.value and rng.random() < 0.4 else entry.dtype
    seed = rng.random()
    if boxes is None and (rng.random() < 0.5 or not entry.size):
        kind = rng.choice(["contiguous", "permuted", "padded", "strided", "parameter"])
        return lambda arena: destination(random.Random(seed), entry.size, dtype, kind, arena), f"{dtype} {kind}"
    if boxes is None:
        boxes = random_boxes(rng, tuple(entry.size))
    kinds = [rng.choice(["contiguous", "permuted", "padded", "strided"]) for _ in boxes]

    def build(arena: Arena) -> ShardedBuffer:
        inner = random.Random(seed)
        shards = [destination(inner, sizes, dtype, kind, arena) for (_, sizes), kind in zip(boxes, kinds, strict=True)]
        return ShardedBuffer.make(entry.size, [at for at, _ in boxes], shards)

    return build, f"{dtype} {boxes}"


def shard_of(size: tuple[int, ...], dim: int, part: Part) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of what a rank has of a tensor that all ranks shard by one dimension."""
    length = -(-size[dim] // part.ranks)
    begin, end = (min(size[dim], length * rank) for rank in (part.rank, part.rank + 1))
    offsets, sizes = [0] * len(size), list(size)
    offsets[dim], sizes[dim] = begin, end - begin
    return tuple(offsets), tuple(sizes)


def destination(rng: random.Random, sizes: Sequence[int], dtype: torch.dtype, kind: str, arena: Arena) -> torch.Tensor:
    if kind == "parameter" and dtype.is_floating_point:
        return torch.nn.Parameter(torch.zeros(torch.Size(sizes), dtype=dtype, device=arena.device()))
    order = rng.sample(range(len(sizes)), len(sizes)) if kind in {"permuted", "strided"} else list(range(len(sizes)))
    return empty(rng, sizes, dtype, "permuted" if kind in {"contiguous", "parameter"} else kind, order, arena)
