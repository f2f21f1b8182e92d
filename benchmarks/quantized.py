"""The workloads of quantized safetensors files: dequantized while they are read, and the same bytes without that."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from benchmarks import checkpoints, page_cache
from benchmarks.budget import Budget
from benchmarks.ceilings import Setting, TunedCeiling
from benchmarks.contenders import Contender, Sample, dcp_fast_report
from benchmarks.measure import Measurement, Options, Say, interleave
from benchmarks.quantized_files import FILE, FP8, dequantized_blocks, dequantized_shapes
from benchmarks.verify import VerificationError
from benchmarks.workloads import MIB, Temperature, Workload

LIMIT = "pread and memset"
BLOCK_BYTES = 4 * MIB
THREADS = 2

State = dict[str, torch.Tensor]


def run(workload: Workload, options: Options, budget: Budget, say: Say) -> Measurement:
    """Verify what dcp_fast makes of the files, then time loads and the limit in turns."""
    say(f"{workload.name}: {workload.title}")
    checkpoint = checkpoints.ensure(workload.checkpoint, options.data)
    paths = checkpoints.files_of(checkpoint)
    kind, dtype = workload.checkpoint.kind, workload.wanted.dtype or torch.float32
    shapes = dequantized_shapes(kind, workload.checkpoint.shapes())
    # Their memory is touched now.
    state = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    page_cache.populate(paths)
    entrants: list[Contender] = []
    if kind == FP8:  # torch's reader fills 1/32 of MXFP4
        entrants.append(Contender("torch", partial(_load_with_torch, checkpoint, state, dtype)))
    if options.with_dcp_fast:
        entrants.append(Contender("dcp_fast", partial(_load_with_dcp_fast, checkpoint, state, dtype)))
        _verify(workload, checkpoint, state, dtype)
    limit = Contender(LIMIT, partial(_read_and_set, checkpoint / FILE, state), fills_destinations=False)
    entrants.append(limit)
    samples = interleave(entrants, Temperature.WARM, paths, options.rounds or workload.rounds, None, budget)
    ceiling = TunedCeiling(LIMIT, Setting(THREADS, BLOCK_BYTES), {}, contender=limit)
    measurement = Measurement(workload, Temperature.WARM, samples, [ceiling])
    times = (f"{name} {measurement.median(name):.3f} s" for name in samples)
    say(f"  {', '.join(times)}")
    return measurement


def _load_with_torch(checkpoint: Path, state: State, dtype: torch.dtype) -> Sample:
    return _load(load, lambda: QuantizedHuggingFaceStorageReader(str(checkpoint), target_dtype=dtype), state)


def _load_with_dcp_fast(checkpoint: Path, state: State, dtype: torch.dtype) -> Sample:
    import dcp_fast

    sample = _load(
        dcp_fast.load, lambda: dcp_fast.QuantizedHuggingFaceStorageReader(checkpoint, target_dtype=dtype), state
    )
    return Sample(sample.seconds, report=dcp_fast_report())


def _load(function: Callable[..., None], make_reader: Callable[[], Any], state: State) -> Sample:
    start = time.perf_counter()
    function(dict(state), storage_reader=make_reader(), no_dist=True)
    return Sample(time.perf_counter() - start)


def _verify(workload: Workload, checkpoint: Path, state: State, dtype: torch.dtype) -> None:
    """Compare some tensors with what they should be."""
    from safetensors import safe_open  # type: ignore[import-not-found,unused-ignore]

    _load_with_dcp_fast(checkpoint, state, dtype)
    some = dict(islice(state.items(), 2))
    expected = {name: torch.zeros_like(tensor) for name, tensor in some.items()}
    if workload.checkpoint.kind == FP8:
        _load_with_torch(checkpoint, expected, dtype)
    else:
        with safe_open(checkpoint / FILE, framework="pt") as file:
            for name, tensor in expected.items():
                blocks = file.get_tensor(name)
                tensor.copy_(dequantized_blocks(blocks, file.get_tensor(name.replace("_blocks", "_scales")), dtype))
    for name, tensor in some.items():
        if not torch.equal(tensor, expected[name]):
            raise VerificationError(f"{name} differs")


def _read_and_set(path: Path, state: State) -> Sample:
    """Read the stored bytes into small buffers, and set those of the result."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None)
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

    def read(part: int) -> None:
        buffer = memoryview(bytearray(BLOCK_BYTES))
        for offset in range(part * BLOCK_BYTES, size, THREADS * BLOCK_BYTES):
            os.preadv(descriptor, [buffer], offset)

    def fill(tensor: torch.Tensor) -> None:
        libc.memset(tensor.data_ptr(), 1, tensor.nbytes)

    descriptor = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(THREADS) as threads:
            start = time.perf_counter()
            list(threads.map(read, range(THREADS)))
            list(threads.map(fill, state.values()))
            return Sample(time.perf_counter() - start)
    finally:
        os.close(descriptor)
