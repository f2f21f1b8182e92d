"""The simulated devices are what torch's users expect of CUDA devices; on a real GPU this checks the expectation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_tensors import bits, counting
from helpers import DTYPES, fill

# Creation


@pytest.mark.parametrize(
    "make",
    [
        lambda device: torch.zeros(3, 4, device=device),
        lambda device: torch.ones(3, 4, dtype=torch.int16, device=device),
        lambda device: torch.full((5,), 2.5, device=device),
        lambda device: torch.full((5,), -1, dtype=torch.int64, device=device),
        lambda device: torch.arange(7, device=device),
        lambda device: torch.eye(3, device=device),
        lambda device: torch.tensor([[1, 2], [3, 4]], device=device),
        lambda device: torch.tril_indices(3, 3, device=device),
        lambda device: torch.zeros((), dtype=torch.bool, device=device),
        lambda device: torch.zeros(0, 3, device=device),
        lambda device: torch.zeros(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last),
        lambda device: torch.empty_strided((2, 3), (1, 2), device=device).zero_(),
        lambda device: torch.zeros_like(torch.zeros(3, 2, device=device).t()),
        lambda device: torch.zeros(3, device=device).new_ones(4),
    ],
)
def test_factory(cuda: torch.device, make: Callable[[Any], torch.Tensor]) -> None:
    expected, actual = make("cpu"), make(cuda)
    assert actual.device == cuda
    assert actual.is_cuda
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    assert bits(actual) == bits(expected)


def test_device_without_index_is_the_current_one(two_devices: tuple[torch.device, torch.device]) -> None:
    assert torch.empty(1, device="cuda").device == two_devices[0]
    with torch.cuda.device(1):
        assert torch.cuda.current_device() == 1
        assert torch.empty(1, device="cuda").device == two_devices[1]
    with torch.device("cuda:1"):
        assert torch.empty(1).device == two_devices[1]
    torch.cuda.set_device(1)
    assert torch.empty_strided((2, 2), (2, 1), device="cuda").device == two_devices[1]
    torch.cuda.set_device(0)
    assert torch.cuda.current_device() == 0


def test_device_that_is_not_there(cuda: torch.device) -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(1, device=f"cuda:{torch.cuda.device_count()}")
    assert torch.empty(1, device="cuda").device == cuda


# Copies


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_there_and_back(cuda: torch.device, dtype: torch.dtype) -> None:
    source = fill((5, 7), dtype)
    on_device = source.to(cuda)
    assert on_device.dtype == dtype
    assert bits(on_device) == bits(source)
    assert bits(on_device.t()) == bits(source.t())
    assert bits(on_device.clone()) == bits(source)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda x: x[2:5],
    "columns": lambda x: x[:, 3:7],
    "steps": lambda x: x[::2, 1::3],
    "transposed": lambda x: x.t(),
    "select": lambda x: x[:, 4],
    "element": lambda x: x[1, 2],
    "expanded": lambda x: x[:1].expand(6, 10),
    "unfold": lambda x: x.unfold(0, 3, 2),
    "as_strided": lambda x: x.as_strided((2, 3), (20, 2), 5),
    "empty": lambda x: x[3:3],
    "view": lambda x: x.view(3, 4, 5)[:, 1],
    "int view": lambda x: x.view(torch.int16)[1:],
    "diagonal": lambda x: x.diagonal(),
    "unsqueezed": lambda x: x[None, :, None, 2:],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(cuda: torch.device, name: str) -> None:
    """A view shares its storage, and is read and written through, alone."""
    view = VIEWS[name]
    on_host = counting(6, 10)
    on_device = on_host.to(cuda)
    here, there = view(on_host), view(on_device)
    assert there.untyped_storage().data_ptr() == on_device.untyped_storage().data_ptr()
    assert there.storage_offset() == here.storage_offset()
    assert there.stride() == here.stride()
    assert bits(there) == bits(here)
    if name != "expanded" and name != "unfold":  # their elements overlap
        values = fill(here.shape, here.dtype)
        here.copy_(values)
        there.copy_(values)
        assert bits(on_device) == bits(on_host)
        here.zero_()
        there.zero_()
        assert bits(on_device) == bits(on_host)
        here.fill_(3)
        there.fill_(3)
        assert bits(on_device) == bits(on_host)


def test_many_runs(cuda: torch.device) -> None:
    """A column of many rows, which takes more copies than are worth it."""
    on_host = counting(1000, 3)
    on_device = on_host.to(cuda)
    values = torch.randn(1000)
    on_host[:, 1] = values
    on_device[:, 1] = values
    assert bits(on_device) == bits(on_host)
    assert bits(on_device[:, 1]) == bits(values)


@pytest.mark.parametrize("target", [torch.float64, torch.bfloat16, torch.int32, torch.complex64, torch.bool])
def test_copy_converts(cuda: torch.device, target: torch.dtype) -> None:
    source = counting(4, 5)
    expected = torch.zeros(5, 4, dtype=target).t().copy_(source)
    for given in (source, source.to(cuda)):
        actual = torch.zeros(5, 4, dtype=target, device=cuda).t()
        actual.copy_(given)
        assert bits(actual) == bits(expected)
        assert actual.stride() == expected.stride()
    assert bits(source.to(cuda, dtype=target)) == bits(source.to(target))
    assert bits(source.to(cuda).to("cpu", target)) == bits(source.to(target))


def test_copy_broadcasts(cuda: torch.device) -> None:
    row = counting(1, 4)
    expected = torch.zeros(3, 4).copy_(row)
    assert bits(torch.zeros(3, 4, device=cuda).copy_(row)) == bits(expected)
    assert bits(torch.zeros(3, 4, device=cuda).copy_(row.to(cuda))) == bits(expected)


def test_conjugate_and_negative(cuda: torch.device) -> None:
    on_host = torch.randn(3, 4, dtype=torch.complex64)
    on_device = on_host.to(cuda)
    assert on_device.conj().is_conj()
    for view in (torch.conj, lambda x: x.conj().imag, lambda x: x.conj().t()):
        assert torch.equal(view(on_device).cpu().resolve_conj().resolve_neg(), view(on_host))
        assert torch.equal(view(on_device).clone().cpu().resolve_conj().resolve_neg(), view(on_host))
    here, there = torch.zeros(3, 4, dtype=torch.complex64), torch.zeros(3, 4, dtype=torch.complex64, device=cuda)
    here.conj().copy_(on_host)
    there.conj().copy_(on_device)
    assert bits(there) == bits(here)
    there.conj().imag.copy_(on_host.real)
    here.conj().imag.copy_(on_host.real)
    assert bits(there) == bits(here)
    there.conj().fill_(2j)
    here.conj().fill_(2j)
    assert bits(there) == bits(here)
    assert bits(torch.view_as_real(on_device)) == bits(torch.view_as_real(on_host))
    assert bits(torch.view_as_complex(torch.view_as_real(on_device))) == bits(on_host)


def test_pinned_memory(cuda: torch.device) -> None:
    pinned = torch.empty(1000, pin_memory=True)
    torch.zeros(1, device=cuda)
    assert pinned.is_pinned()
    assert not torch.empty(1000).is_pinned()
    pinned.copy_(counting(1000))
    on_device = pinned.to(cuda, non_blocking=True)
    back = on_device.to("cpu", non_blocking=True)
    assert back.is_pinned()
    torch.cuda.synchronize()
    assert bits(back) == bits(counting(1000))
    assert counting(3).pin_memory().is_pinned()


def test_pinned_memory_outlives_the_copy_from_it(cuda: torch.device) -> None:
    on_device = [fill((1 << 16,), torch.float32, seed).pin_memory().to(cuda, non_blocking=True) for seed in range(8)]
    for seed, tensor in enumerate(on_device):
        assert bits(tensor) == bits(fill((1 << 16,), torch.float32, seed))


# Arithmetic


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, y: x + y * 2,
        lambda x, y: x @ y.t(),
        lambda x, y: (x > y).sum(1),
        lambda x, y: torch.cat([x, y], 1)[:, ::2],
        lambda x, y: x[y[0].argsort()[:3] % 4],
        lambda x, y: torch.where(x > 5, x, y),
        lambda x, y: torch.add(x, y, out=torch.empty(0, device=x.device)),
        lambda x, y: torch.add(x, y, out=torch.empty(5, 4, device=x.device).t()),
        lambda x, y: x.t().add_(y.t()).t(),
        lambda x, y: x[:, 1:3].mul_(y[:, 2:4]),
        lambda x, y: torch._foreach_add([x, y], 1)[1],
        lambda x, y: torch.stack(torch._foreach_mul([x, y], [2.0, 3.0])),
        lambda x, y: x.sort(1, descending=True).values,
        lambda x, y: torch.topk(x, 2, out=(y.new_empty(0), torch.empty(0, dtype=torch.int64, device=y.device)))[0],
        lambda x, y: x.index_add_(0, torch.tensor([0, 2], device=x.device), y[:2]),
        lambda x, y: x.masked_fill_(x > y, 0),
        lambda x, y: x.double().sum() + 1,
        lambda x, y: x.to(torch.complex64).conj() * 1j,
        lambda x, y: torch.linalg.svdvals(x[:3, :3]).round(),
    ],
)
def test_arithmetic(cuda: torch.device, compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Results and what was written in place equal the CPU's, strides included."""
    x, y = counting(4, 5), counting(4, 5).flip(0).contiguous()
    on_device = x.to(cuda), y.to(cuda)
    expected, actual = compute(x, y), compute(*on_device)
    assert actual.device == cuda
    assert actual.stride() == expected.stride()
    assert torch.equal(actual.cpu(), expected)
    assert torch.equal(on_device[0].cpu(), x)
    assert torch.equal(on_device[1].cpu(), y)


def test_devices_do_not_mix(cuda: torch.device) -> None:
    x = torch.ones(3, device=cuda)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="device"):
        torch.mm(torch.ones(2, 2, device=cuda), torch.ones(2, 2))
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a 0-d tensor is a number
    assert x[torch.tensor([0, 2])].device == cuda  # and indices may stay behind


def test_resize_and_set(cuda: torch.device) -> None:
    x = counting(6).to(cuda)
    x.resize_(2, 2)
    assert x.tolist() == [[0, 1], [2, 3]]
    x.resize_(3, 4)
    assert x.view(-1)[:6].tolist() == [0, 1, 2, 3, 4, 5]
    y = torch.empty(0, device=cuda)
    y.set_(x.untyped_storage(), 1, (2,), (3,))
    assert y.tolist() == [1, 4]
    assert y.is_set_to(x.as_strided((2,), (3,), 1))
    y.untyped_storage().resize_(0)
    assert x.untyped_storage().nbytes() == 0
    x.set_()
    assert x.numel() == 0


def test_training_step(cuda: torch.device) -> None:
    def train(device: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(5, 4, device=device)).square().sum().backward()
            optimizer.step()
        return [*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())]

    for actual, expected in zip(train(cuda), train("cpu"), strict=True):
        assert actual.device == cuda
        torch.testing.assert_close(actual.cpu(), expected)
