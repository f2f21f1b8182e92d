"""State dicts that are more than a flat dict of plain tensors: what is saved of them, and what they are loaded into."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

Shapes = dict[str, tuple[int, ...]]

VALUES = 18_000
# What an optimizer keeps for each of its groups.
HYPERPARAMETERS: dict[str, Any] = {
    "lr": 0.001,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "amsgrad": False,
    "name": "decoder.layers",
}


def _shapes(count: int, shape: tuple[int, ...]) -> Callable[[float], Shapes]:
    return lambda scale: {f"layers.{i}.weight": shape for i in range(max(1, round(count * scale)))}


# Of the tensors that each kind consists of, or of which there is a value each, by scale.
SHAPES: dict[str, Callable[[float], Shapes]] = {
    "quantized": _shapes(20_000, (64, 16)),
    "quantized_large": _shapes(64, (4096, 4096)),
    "nested": _shapes(4_000, (64, 16)),
    "values": _shapes(VALUES // len(HYPERPARAMETERS), ()),
}


def payload_bytes(kind: str, shapes: Shapes) -> int:
    elements = sum(map(math.prod, shapes.values()))
    # Weights and two moments; bytes; a number or two for each value.
    return elements * {"nested": 3 * 4, "values": 8 * len(HYPERPARAMETERS)}.get(kind, 1)


def saved(kind: str, shapes: Shapes, ranks: int, generator: torch.Generator) -> dict[str, Any]:
    """What one rank saves."""
    if kind == "values":
        return _values(shapes, lambda value: value)
    if kind == "nested":
        mesh = init_device_mesh("cpu", (ranks,))
        return _nested(shapes, mesh, lambda sizes: torch.randn(sizes, generator=generator), 3)
    return {name: _quantize(torch.randn(shape, generator=generator), 0.05) for name, shape in shapes.items()}


def wanted(kind: str, shapes: Shapes, mesh: DeviceMesh) -> dict[str, Any]:
    """What is loaded into: the same with other values, on another mesh."""
    if kind == "values":
        return _values(shapes, lambda value: None)
    if kind == "nested":
        return _nested(shapes, mesh, torch.zeros, 0)
    return {name: _quantize(torch.zeros(shape), 1.0) for name, shape in shapes.items()}


def plain_leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All values of a state dict, and tensors as plain ones, by path."""
    if isinstance(state, (dict, list)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from plain_leaves(value, f"{path}/{key}")
    elif isinstance(state, DTensor):
        yield path, state.to_local()
    elif isinstance(state, torch.Tensor) and state.is_quantized:
        yield path, state.int_repr()
        yield f"{path}/scale", state.q_scale()
    else:
        yield path, state


def _quantize(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, scale, 0, torch.qint8)


def _values(shapes: Shapes, change: Callable[[Any], Any]) -> dict[str, Any]:
    values = {f"{name}.{key}": change(value) for name in shapes for key, value in HYPERPARAMETERS.items()}
    return {"optimizer": values}


def _nested(shapes: Shapes, mesh: DeviceMesh, make: Callable[[list[int]], torch.Tensor], step: int) -> dict[str, Any]:
    def sharded(name: str) -> DTensor:
        rows, *rest = shapes[name]
        return DTensor.from_local(make([rows // mesh.size(), *rest]), mesh, [Shard(0)], run_check=False)

    def moments(name: str) -> dict[str, torch.Tensor]:
        return {"exp_avg": sharded(name), "exp_avg_sq": sharded(name), "step": torch.tensor(float(step))}

    optimizer = {
        "state": {name: moments(name) for name in shapes},
        "param_groups": [{"lr": 0.1 * step, "params": list(shapes)}],
    }
    return {"model": {name: sharded(name) for name in shapes}, "optimizer": optimizer, "progress": {"step": step}}
