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

from benchmarks import checkpoints, gpu_ceilings, gpus, page_cache
from benchmarks.budget import Budget
from benchmarks.ceilings import Setting, TunedCeiling
from benchmarks.contenders import Contender, Sample, dcp_fast_report
from benchmarks.destinations import Destinations
from benchmarks.measure import TUNING, Measurement, Options, Say, interleave
from benchmarks.payloads import Segment
from benchmarks.quantized_files import FILE, FP8, dequantized_blocks, dequantized_shapes
from benchmarks.verify import Expected, VerificationError
from benchmarks.workloads import MIB, Temperature, Workload

LIMIT = "pread and memset"
BLOCK_BYTES = 4 * MIB
THREADS = 2

State = dict[str, torch.Tensor]


def run(workload: Workload, options: Options, budget: Budget, say: Say) -> Measurement:
    """Verify what dcp_fast makes of the files, then time loads and the limits in turns."""
    say(f"{workload.name}: {workload.title}")
    checkpoint = checkpoints.ensure(workload.checkpoint, options.data)
    paths = checkpoints.files_of(checkpoint)
    kind, dtype = workload.checkpoint.kind, workload.wanted.dtype or torch.float32
    shapes = dequantized_shapes(kind, workload.checkpoint.shapes())
    (device,) = workload.wanted.devices
    # Their memory is touched now.
    state = {name: torch.ones(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    wanted = Destinations(state, state)
    page_cache.populate(paths)
    entrants: list[Contender] = []
    if kind == FP8:  # torch's reader fills 1/32 of MXFP4
        entrants.append(Contender("torch", partial(_load_with_torch, checkpoint, state, dtype)))
    expected: Expected | None = None
    if wanted.gpus:  # every single load is verified, as in measure.py
        oracle = entrants[0] if entrants else Contender("reference", partial(_fill_with_reference, checkpoint, state))
        expected = Expected(oracle, wanted)
    if options.with_dcp_fast:
        ours = Contender("dcp_fast", partial(_load_with_dcp_fast, checkpoint, state, dtype))
        entrants.append(ours)
        if expected is not None:
            expected.run(ours)
        else:
            _verify(workload, checkpoint, state, dtype)
    limits = _limits(workload, checkpoint / FILE, wanted, budget.share(budget.left() * TUNING))
    entrants += [limit.contender for limit in limits]
    samples = interleave(entrants, Temperature.WARM, paths, options.rounds or workload.rounds, expected, budget)
    measurement = Measurement(workload, Temperature.WARM, samples, [*limits])
    times = (f"{name} {measurement.median(name):.3f} s" for name in samples)
    say(f"  {', '.join(times)}")
    return measurement


def _limits(workload: Workload, path: Path, wanted: Destinations, budget: Budget) -> list[TunedCeiling]:
    if not wanted.gpus:
        limit = Contender(LIMIT, partial(_read_and_set, path, wanted.state), fills_destinations=False)
        return [TunedCeiling(LIMIT, Setting(THREADS, BLOCK_BYTES), {}, contender=limit)]
    whole = [Segment(path, 0, path.stat().st_size, "", 0)]
    return [
        gpu_ceilings.read_ceiling(whole, budget),
        gpu_ceilings.copy_ceiling(workload.bytes_needed(), wanted.gpus, budget),
    ]


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
    gpus.wait_for(gpus.of(state.values()))
    return Sample(time.perf_counter() - start)


def _verify(workload: Workload, checkpoint: Path, state: State, dtype: torch.dtype) -> None:
    """Compare some tensors with what they should be."""
    _load_with_dcp_fast(checkpoint, state, dtype)
    some = dict(islice(state.items(), 2))
    expected = {name: torch.zeros_like(tensor) for name, tensor in some.items()}
    if workload.checkpoint.kind == FP8:
        _load_with_torch(checkpoint, expected, dtype)
    else:
        _fill_with_reference(checkpoint, expected)
    for name, tensor in some.items():
        if not torch.equal(tensor, expected[name]):
            raise VerificationError(f"{name} differs")


def _fill_with_reference(checkpoint: Path, state: State) -> Sample:
    """What MXFP4 means."""
    from safetensors import safe_open  # type: ignore[import-not-found,unused-ignore]

    start = time.perf_counter()
    with safe_open(checkpoint / FILE, framework="pt") as file:
        for name, tensor in state.items():
            blocks, scales = file.get_tensor(name), file.get_tensor(name.replace("_blocks", "_scales"))
            tensor.copy_(dequantized_blocks(blocks.to(tensor.device), scales, tensor.dtype))
    return Sample(time.perf_counter() - start)


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
