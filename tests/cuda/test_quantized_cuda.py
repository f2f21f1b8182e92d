"""Quantized tensors load to CUDA devices as to the host: they are dequantized there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz_cases import Case, compare_cases
from quantized_files import (
    dequantized_blocks,
    dequantized_elements,
    fast_quantized_reader,
    finite,
    make_mxfp4,
    make_quantized_case,
    write_quantized,
)

import dcp_fast

CASES = 50


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_loads_as_on_the_host(tmp_path: Path, cuda: torch.device, target: torch.dtype) -> None:
    weight, scales = finite((300, 200), torch.float8_e4m3fn, 1), torch.rand(3, 2)
    blocks, exponents = make_mxfp4((2, 40, 6), 2)
    tensors = {"l.weight": weight, "l.weight_scale_inv": scales, "x_blocks": blocks, "x_scales": exponents}
    path = write_quantized(tmp_path, {**tensors, "plain": torch.arange(12.0)})
    state = {
        "l.weight": torch.zeros(200, 300, dtype=target, device=cuda).t(),
        "x_blocks": torch.zeros(2, 40, 192, dtype=target, device=cuda),
        "plain": torch.zeros(12, device=cuda),
    }
    dcp_fast.load(state, storage_reader=fast_quantized_reader(path, target_dtype=target), no_dist=True)
    assert torch.equal(state["l.weight"].cpu(), dequantized_elements(weight, scales, 128).to(target))
    assert torch.equal(state["x_blocks"].cpu(), dequantized_blocks(blocks, exponents).to(target))
    assert torch.equal(state["plain"].cpu(), torch.arange(12.0))


@pytest.fixture
def make(tmp_path: Path, cuda: torch.device) -> Callable[[int], Case]:
    return lambda seed: make_quantized_case(tmp_path / str(seed), seed, [cuda, torch.device("cpu")])


def test_random_directories(make: Callable[[int], Case]) -> None:
    compare_cases(make, CASES, None, are_payloads=True)
