"""Runs the workloads of state dicts that are more than a flat dict of plain tensors."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from benchmarks import checkpoints, contenders, page_cache, state_dicts
from benchmarks.budget import Budget
from benchmarks.destinations import fake_mesh
from benchmarks.measure import Measurement, Options, Say, interleave
from benchmarks.verify import VerificationError, same_bits
from benchmarks.workloads import Temperature, Workload


def run(workload: Workload, options: Options, budget: Budget, say: Say) -> Measurement:
    """Compare what both loaders make of state dicts of their own, then time them in interleaved rounds."""
    say(f"{workload.name}: {workload.title}")
    checkpoint = checkpoints.ensure(workload.checkpoint, options.data)
    paths = checkpoints.files_of(checkpoint)
    page_cache.populate(paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # quantized tensors are deprecated
        theirs, ours = _wanted(workload), _wanted(workload)
    entrants = [contenders.torch_contender(checkpoint, theirs)]
    if options.with_dcp_fast:
        entrants.append(contenders.dcp_fast_contender(checkpoint, ours))
    for entrant in entrants:
        entrant.run()
    if options.with_dcp_fast:
        _compare(theirs, ours)
    samples = interleave(entrants, Temperature.WARM, paths, options.rounds or workload.rounds, None, budget)
    measurement = Measurement(workload, Temperature.WARM, samples)
    times = (f"{name} {measurement.median(name):.3f} s" for name in samples)
    say(f"  {Temperature.WARM.value}: {', '.join(times)}")
    return measurement


def _wanted(workload: Workload) -> dict[str, Any]:
    spec = workload.checkpoint
    return state_dicts.wanted(spec.kind, spec.shapes(), fake_mesh(workload.wanted))


def _compare(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    expected, loaded = dict(state_dicts.plain_leaves(theirs)), dict(state_dicts.plain_leaves(ours))
    differing = [path for path, value in expected.items() if path not in loaded or not _is_same(value, loaded[path])]
    if differing or len(expected) != len(loaded):
        raise VerificationError(f"dcp_fast loads {len(differing)} values differently, first: {differing[:1]}")


def _is_same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return same_bits(first, second)
    return type(first) is type(second) and bool(first == second)
