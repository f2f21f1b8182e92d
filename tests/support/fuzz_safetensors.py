"""Random directories of safetensors files, and state dicts to load them into, each made from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fuzz_cases import (
    CONVERSIONS,
    HOST_ONLY,
    Case,
    Part,
    random_boxes,
    random_destination,
    random_load,
    random_size,
    values,
)
from helpers import Entry
from safetensors.torch import save_file
from safetensors_files import DTYPES, hf_reader, torch_hf_reader, write_shards

__all__ = ["make_safetensors_case"]

FILES = 40  # more than a tensor has chunks


def make_safetensors_case(
    path: Path, seed: int, devices: Sequence[torch.device] = HOST_ONLY, part: Part | None = None
) -> Case:
    """The case of a seed (``make_case``): whole tensors, or chunks of each in several files."""
    rng = random.Random(seed)
    is_sharded = rng.random() < 0.6
    files: list[dict[str, tuple[tuple[int, ...], torch.Tensor]]] = [{} for _ in range(FILES)]
    builders: list[tuple[str, Callable[[Any], Any]]] = []
    description = [f"seed {seed} sharded={is_sharded}"]
    for number in range(rng.randint(1, 7)):
        fqn = rng.choice([f"k{number}", f"nested.k{number}", f"nested.deep.k{number}"])
        convertible = rng.random() < 0.5
        dtype = rng.choice(CONVERSIONS if convertible else DTYPES)
        size = random_size(rng)
        boxes = list(dict(random_boxes(rng, size)).items()) if is_sharded else [((0,) * len(size), size)]
        parts = [(offsets, values(rng, sizes, dtype, convertible)) for offsets, sizes in boxes]
        for file, chunk in zip(rng.sample(files, len(parts)), parts, strict=True):
            file[fqn] = chunk
        ends = [[start + length for start, length in zip(*box, strict=True)] for box in boxes]
        entry = Entry(tuple(map(max, zip(*ends, strict=True))), dtype, parts)
        entry.value = convertible
        builder, wanted = random_destination(rng, entry, part)
        builders.append((fqn, builder))
        description.append(f"{fqn}: {entry.size} {dtype} {boxes} -> {wanted}")
    make, options = random_load(rng if part is None else part.rng, builders, devices, description)

    def write() -> None:
        if is_sharded:
            write_shards(path, files)
            return
        path.mkdir()
        for number, tensors in enumerate(file for file in files if file):
            save_file({fqn: chunk for fqn, (_, chunk) in tensors.items()}, path / f"{number}.safetensors")

    return Case(path, write, make, options, description, lambda path: torch_hf_reader(str(path)), hf_reader)
