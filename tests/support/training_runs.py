"""What the end-to-end proofs share: a training run that comes out the same, bit for bit, on any number of ranks.

A run is interrupted by a checkpoint that other ranks resume from, and is compared with one that was not. That needs
training that does not depend on how it is spread: every rank gets the same batches and the numbers of ranks are powers
of two, so that averaged gradients are exact; the sums of `Net` are exact in any order, so that tensor parallelism may
add up as it likes; and Adam and SGD compute each element on its own. Then even a single process without any sharding
comes to the same result, and is the reference for all layouts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from helpers import image
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

__all__ = [
    "BEFORE",
    "DAMAGED",
    "PARTS",
    "Net",
    "assert_like_parameters",
    "assert_outcome",
    "damage",
    "make_net",
    "make_optimizer",
    "outcome",
    "plain_run",
    "train",
]

FullState = Callable[[], tuple[Mapping[str, Any], Mapping[str, Any]]]

# Training steps before the checkpoint and after it. The second one's loss shows what the first one made of the state.
BEFORE, AFTER = 2, 2
INPUTS, OUTPUTS = 8, 10
PARTS = ("start", "losses", "model", "state", "groups")  # of an outcome
DAMAGED = ["start", "losses", "model", "state"]  # the parts that wrong optimizer state shows in


class ExactLinear(nn.Linear):
    """Multiplies float32 weights by small integers, in float64.

    Weights have 24 bits and are around 1, so that outputs need some 40 of the 53 bits of a float64, and the sums of
    their products with small integers in the backward pass a few more. Nothing is rounded before the gradients are,
    whole, to float32.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight.double(), None if self.bias is None else self.bias.double())


class Net(nn.Module):
    """Parameters of many kinds, all beside each other: `ExactLinear` is exact only for the inputs themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.up = ExactLinear(INPUTS, OUTPUTS)
        self.down = ExactLinear(INPUTS, OUTPUTS, bias=False)
        self.frozen = ExactLinear(INPUTS, OUTPUTS).requires_grad_(False)
        self.odd = nn.Parameter(torch.randn(7, OUTPUTS))  # rows that neither 2 nor 4 divides
        self.few = nn.Parameter(torch.randn(3, OUTPUTS))  # fewer rows than ranks
        self.one = nn.Parameter(torch.randn(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rest = self.odd.double().sum(0) + self.few.double().sum(0) + self.one.double()
        return self.up(x) + self.down(x) + self.frozen(x) + rest


def make_net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


def make_optimizer(kind: str, model: nn.Module, rate: float = 0.125, frozen: bool = True) -> torch.optim.Optimizer:
    """Two parameter groups that differ in all they can.

    Args:
        kind: "adam" or "sgd".
        model: a `Net`, sharded in any way.
        rate: another one than the default is what a resumed run must replace.
        frozen: whether the optimizer has the frozen parameters too.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if frozen or parameter.requires_grad:
            groups["up." in name].append(parameter)
    first: dict[str, Any] = {"params": groups[True]}
    second: dict[str, Any] = {"params": groups[False], "weight_decay": rate}
    if kind == "adam":
        return torch.optim.Adam([first, second | {"lr": rate / 4, "betas": (0.5, 0.9)}], lr=rate, amsgrad=True)
    return torch.optim.SGD([first, second | {"lr": rate / 4096, "momentum": 0.5}], lr=rate / 1024, momentum=0.9)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int, scale: float = 1
) -> list[torch.Tensor]:
    """Train steps number `first` and on, with scaled gradients; their losses."""
    losses = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(-2, 3, (4, INPUTS), generator=generator).double()
        target = torch.randint(-4, 5, (4, OUTPUTS), generator=generator).double()
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum()
        (scale * loss).backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def outcome(model: nn.Module, optimizer: torch.optim.Optimizer, full: FullState, scale: float = 1) -> dict[str, Any]:
    """Train from the checkpoint to the end; all that comes of it, for a comparison bit for bit.

    Args:
        model: a `Net`, sharded in any way.
        optimizer: its optimizer.
        full: collects the full state dicts of the model and of the optimizer, the latter keyed by FQN.
        scale: of the gradients.
    """
    # Later steps may replace what was loaded, such as maxima.
    start = image(_in_order(*full()), layout=False)
    losses = train(model, optimizer, BEFORE, AFTER, scale)
    values = (losses, *_in_order(*full()))
    return {"start": start} | {part: image(v, layout=False) for part, v in zip(PARTS[1:], values, strict=True)}


def _in_order(model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """A model, state and parameter groups without the order of their keys, which depends on the sharding."""
    state = {fqn: dict(sorted(values.items())) for fqn, values in sorted(optimizer["state"].items())}
    groups = [dict(sorted({**group, "params": sorted(group["params"])}.items())) for group in optimizer["param_groups"]]
    return dict(sorted(model.items())), state, groups


def assert_outcome(actual: Mapping[str, Any], expected: Mapping[str, Any], run: object) -> None:
    wrong = [part for part in PARTS if actual[part] != expected[part]]
    assert not wrong, f"{run}: not the uninterrupted run's {', '.join(wrong)}"


@functools.cache
def plain_run(kind: str, frozen: bool = True, scale: float = 1) -> dict[str, Any]:
    """The outcome of the whole run in this process, without sharding or interruption; scaled after the checkpoint."""
    model = make_net(1)
    optimizer = make_optimizer(kind, model, frozen=frozen)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    keys = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]

    def full() -> tuple[dict[str, Any], dict[str, Any]]:
        state = optimizer.state_dict()
        groups = [group | {"params": [keys[number] for number in group["params"]]} for group in state["param_groups"]]
        by_name = {keys[number]: values for number, values in state["state"].items()}
        return model.state_dict(), {"state": by_name, "param_groups": groups}

    train(model, optimizer, 0, BEFORE)
    return outcome(model, optimizer, full, scale)


def assert_like_parameters(model: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Each state tensor must be sharded as its parameter is; model and state are sharded state dicts."""
    assert state
    for fqn, values in state.items():
        parameter = model[fqn]
        for name, value in values.items():
            if name == "step":
                assert type(value) is torch.Tensor
                continue
            assert type(value) is type(parameter), (fqn, name)
            assert value.size() == parameter.size()
            if isinstance(value, DTensor):
                assert value.device_mesh == parameter.device_mesh
                assert value.placements == parameter.placements
                assert value.stride() == parameter.stride()
                assert value.to_local().size() == parameter.to_local().size()
            elif isinstance(value, ShardedTensor):
                assert value._process_group is parameter._process_group
                assert value.metadata().shards_metadata == parameter.metadata().shards_metadata


def damage(state: Mapping[str, Any]) -> None:
    """Change one element of this rank's part of the state, if it has one, as a faulty load might."""
    for name, value in state["odd"].items():
        if name in ("exp_avg", "momentum_buffer"):
            if isinstance(value, DTensor):
                local = [value.to_local()]
            else:
                local = [shard.tensor for shard in value.local_shards()]
            for tensor in local:
                tensor[-1, -1] += 1
