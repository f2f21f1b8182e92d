"""Safetensors files with quantized tensors: FP8 with a scale for each block, and MXFP4, of random bits."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import torch

FP8, MXFP4 = "huggingface_fp8", "huggingface_mxfp4"
KINDS = (FP8, MXFP4)

BLOCK = 128
ROWS, COLUMNS = 2048, 7168  # of one projection of an expert
EXPERTS, OUTER, GROUPS, BYTES = 4, 2880, 90, 16  # of some experts of gpt-oss
TENSORS = {FP8: 68, MXFP4: 60}  # about 1 GB
FEW = 4
FILE = "model.safetensors"
# Of the scales of MXFP4, as E8M0 has them.
LEAST_EXPONENT, MOST_EXPONENT = 110, 130


def shapes(kind: str, scale: float) -> dict[str, tuple[int, ...]]:
    """Of what is stored. At scale 1 it is 1 GB. Where only a few tensors would be left, these have fewer rows."""
    found: dict[str, tuple[int, ...]] = {}
    tensors = TENSORS[kind] * scale
    part = min(1.0, tensors / FEW)
    rows, outer = max(1, round(ROWS // BLOCK * part)) * BLOCK, max(1, round(OUTER * part))
    for number in range(max(FEW, round(tensors))):
        if kind == FP8:
            name = f"model.layers.{number}.mlp.gate_proj.weight"
            found[name] = (rows, COLUMNS)
            found[f"{name}_scale_inv"] = (rows // BLOCK, COLUMNS // BLOCK)
        else:
            found[f"block.{number}.mlp.mlp1_weight_blocks"] = (EXPERTS, outer, GROUPS, BYTES)
            found[f"block.{number}.mlp.mlp1_weight_scales"] = (EXPERTS, outer, GROUPS)
    return found


def dequantized_shapes(kind: str, stored: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    if kind == FP8:
        return {name: shape for name, shape in stored.items() if not name.endswith("_scale_inv")}
    return {
        name: (*shape[:-2], 2 * shape[-2] * shape[-1]) for name, shape in stored.items() if name.endswith("_blocks")
    }


def payload_bytes(stored: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) * (4 if name.endswith("_scale_inv") else 1) for name, shape in stored.items())


def write(directory: Path, stored: dict[str, tuple[int, ...]], generator: torch.Generator) -> None:
    directory.mkdir()
    header: dict[str, object] = {}
    end = 0
    for name, shape in stored.items():
        is_scale = name.endswith("_scale_inv")
        place = [end, end := end + math.prod(shape) * (4 if is_scale else 1)]
        dtype = "F32" if is_scale else "F8_E4M3" if name.endswith(".weight") else "U8"
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": place}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (directory / FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in stored.items():
            file.write(_values(name, shape, generator).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    index = {"metadata": {}, "weight_map": dict.fromkeys(stored, FILE)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    def bits(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    if name.endswith("_scale_inv"):
        return torch.rand(shape, generator=generator)
    if name.endswith(".weight"):
        return bits(0, 127) | (bits(0, 2) << 7)  # all numbers of E4M3, and no NaN
    return bits(LEAST_EXPONENT, MOST_EXPONENT) if name.endswith("_scales") else bits(0, 256)


def dequantized_blocks(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What MXFP4 means, by torch, on the device of the blocks. The scales are on the host, whose powers are exact."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    numbers = torch.tensor(magnitudes + [-magnitude for magnitude in magnitudes])
    nibbles = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    factors = torch.exp2(scales.float() - 127)[..., None].to(blocks.device)
    return (numbers.to(blocks.device)[nibbles] * factors).flatten(-2).to(dtype)
