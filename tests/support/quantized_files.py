"""Quantized tensors in safetensors files, as models have them, and what they mean, from the formats' specifications."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fuzz_cases import HOST_ONLY, Case, Part, random_destination, random_load
from helpers import Entry
from safetensors.torch import save_file
from safetensors_files import write_index
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

import dcp_fast

__all__ = [
    "FLOAT8",
    "TARGETS",
    "dequantized_blocks",
    "dequantized_elements",
    "fast_quantized_reader",
    "finite",
    "make_mxfp4",
    "make_quantized_case",
    "torch_quantized_reader",
    "write_quantized",
]

# Bound here so that an installed dcp_fast cannot become its own oracle.
torch_quantized_reader = QuantizedHuggingFaceStorageReader
fast_quantized_reader = dcp_fast.QuantizedHuggingFaceStorageReader

TARGETS = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


def write_quantized(path: Path, *files: Mapping[str, torch.Tensor]) -> Path:
    """Write files, and the index that torch's reader needs."""
    path.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files):
        name = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        save_file(
            {fqn: tensor.clone(memory_format=torch.contiguous_format) for fqn, tensor in tensors.items()}, path / name
        )
        weight_map |= dict.fromkeys(tensors, name)
    write_index(path, weight_map)
    return path


def finite(sizes: Sequence[int], dtype: torch.dtype, seed: int, most: float = 1e9) -> torch.Tensor:
    """Random elements of all bit patterns that are numbers up to a limit."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype).float()
    codes = codes[values.isfinite() & (values.abs() <= most)]
    chosen = torch.randint(0, len(codes), tuple(sizes), generator=torch.Generator().manual_seed(seed))
    return codes[chosen].view(dtype)


def dequantized_elements(stored: torch.Tensor, scales: torch.Tensor, block_size: int) -> torch.Tensor:
    """Each element times the scale of its block, as float32."""
    rows, columns = stored.shape[-2:]
    spread = scales.float().repeat_interleave(block_size, -2)[..., :rows, :]
    return stored.float() * spread.repeat_interleave(block_size, -1)[..., :columns]


# OCP Microscaling Formats (MX) Specification 1.0: table 5 has the values of E2M1, 5.4.1 is about E8M0.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCK_BYTES = 16  # 32 elements


def dequantized_blocks(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What blocks of MXFP4 mean, as float64: one element after another."""
    *leading, groups, width = blocks.shape
    values = []
    flat_blocks, flat_scales = blocks.reshape(-1, width).tolist(), scales.reshape(-1).tolist()
    for block, exponent in zip(flat_blocks, flat_scales, strict=True):
        scale = float("nan") if exponent == 255 else 2.0 ** (exponent - 127)
        for byte in block:
            for code in (byte & 15, byte >> 4):  # the lower half comes first
                values.append((-1.0 if code & 8 else 1.0) * E2M1[code & 7] * scale)
    return torch.tensor(values, dtype=torch.float64).reshape(*leading, groups * width * 2)


def make_mxfp4(
    sizes: Sequence[int], seed: int, low: int = 120, high: int = 135, width: int = BLOCK_BYTES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks and scales: of sizes that end with the number of blocks in a row."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*sizes, width), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(low, high, tuple(sizes), dtype=torch.uint8, generator=generator)


def make_quantized_case(
    path: Path, seed: int, devices: Sequence[torch.device] = HOST_ONLY, part: Part | None = None
) -> Case:
    """The case of a seed (``make_case``): tensors of FP8 with scales, and others, in one file or several."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 3, 7, 16, 32, 128])
    target = rng.choice(TARGETS)
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(rng.randint(1, 3))]
    builders: list[tuple[str, Callable[[Any], Any]]] = []
    description = [f"seed {seed} block_size={block_size} target={target}"]
    for number in range(rng.randint(1, 5)):
        fqn = f"{rng.choice(['', 'nested.', 'nested.deep.'])}k{number}.weight"
        # Integers are only defined for results that they can hold.
        convertible = rng.random() < 0.5
        sizes = tuple(rng.choice([0, 1, 2, 5, 31, 32, 33, 128, 130, 300]) for _ in range(2))
        dtype = rng.choice(FLOAT8)
        stored = finite(sizes, dtype, rng.randrange(1 << 30), 8.0 if convertible else 1e9)
        blocks = [-(-size // block_size) for size in sizes]
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        scales = torch.rand(blocks, generator=generator) * 20 - 10
        if not convertible:
            scales *= 2.0 ** rng.randint(-30, 30)
        scales = scales.to(rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64]))
        rng.choice(files)[fqn] = stored
        has_scales = rng.random() < 0.9
        if has_scales:
            rng.choice(files)[f"{fqn}_scale_inv"] = scales
        entry = Entry(sizes, target, [])
        entry.value = convertible
        builder, wanted = random_destination(rng, entry, part)
        builders.append((fqn, builder))
        description.append(f"{fqn}: {sizes} {dtype} scales {scales.dtype if has_scales else None} -> {wanted}")
        if rng.random() < 0.2:
            name = f"{fqn}_scale_inv" if has_scales else fqn
            raw = Entry(tuple(scales.shape) if has_scales else sizes, torch.float32, [])
            builder, wanted = random_destination(rng, raw, part)
            if has_scales:
                builders.append((name, builder))
                description.append(f"{name} -> {wanted}")
    make, options = random_load(rng if part is None else part.rng, builders, devices, description)
    how = {"target_dtype": target, "block_size": block_size}
    return Case(
        path,
        lambda: write_quantized(path, *(file for file in files if file)),
        make,
        options,
        description,
        lambda path: torch_quantized_reader(str(path), **how),
        lambda path, **options: fast_quantized_reader(path, **how, **options),
    )
