"""Streams, events and memory of torch on the simulated devices, and what the simulator sees of them."""

from __future__ import annotations

import threading

import pytest
import torch
from device_tensors import bits, counting
from simulated_cuda.control import Simulator

# Streams and events


def test_default_stream(cuda: torch.device) -> None:
    stream = torch.cuda.current_stream()
    assert stream == torch.cuda.default_stream()
    assert stream.cuda_stream == 0
    assert stream.device == cuda
    assert torch.cuda.current_stream(cuda) == stream


def test_streams(cuda: torch.device) -> None:
    stream = torch.cuda.Stream()
    assert stream.cuda_stream != 0
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        x = torch.zeros(1 << 16, device=cuda)
        recorded = stream.record_event()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.current_stream().wait_event(recorded)
    y = x + 1
    x.record_stream(torch.cuda.current_stream())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y.mul_(2)
    y.record_stream(stream)
    stream.synchronize()
    assert stream.query()
    assert bits(y) == bits(torch.full((1 << 16,), 2.0))
    assert isinstance(stream, torch.Stream)
    # Not the streams themselves: to torch they differ in more than the handle.
    assert torch.cuda.ExternalStream(stream.cuda_stream).cuda_stream == stream.cuda_stream


def test_current_stream_belongs_to_the_thread(cuda: torch.device) -> None:
    seen: list[torch.cuda.Stream] = []
    with torch.cuda.stream(torch.cuda.Stream()):
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_stream(cuda)))
        thread.start()
        thread.join()
        assert seen[0] != torch.cuda.current_stream()
    assert seen[0] == torch.cuda.default_stream()


def test_events(cuda: torch.device) -> None:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    assert begin.query()  # nothing was recorded, so nothing is pending
    begin.record()
    x = torch.zeros(1000, device=cuda)
    end.record(torch.cuda.current_stream())
    end.synchronize()
    assert end.query()
    assert begin.elapsed_time(end) >= 0
    other = torch.cuda.Stream()
    end.wait(other)
    with torch.cuda.stream(other):
        assert x.sum().item() == 0


def test_streams_of_two_devices(two_devices: tuple[torch.device, torch.device]) -> None:
    stream = torch.cuda.Stream(device=1)
    assert stream.device == two_devices[1]
    with torch.cuda.stream(stream):
        assert torch.cuda.current_device() == 1
        x = torch.ones(1000, device="cuda")
        assert torch.cuda.current_stream(0) == torch.cuda.default_stream(0)
    assert torch.cuda.current_device() == 0
    assert torch.cuda.current_stream(1) == torch.cuda.default_stream(1)
    torch.cuda.current_stream(0).wait_stream(stream)
    event = torch.cuda.Event()
    event.record(stream)
    event.wait(torch.cuda.current_stream(0))
    torch.cuda.synchronize(1)
    assert x.sum().item() == 1000


def test_two_devices(two_devices: tuple[torch.device, torch.device]) -> None:
    source = counting(6, 10)
    first, second = source.to(two_devices[0]), torch.zeros(10, 6, device=two_devices[1]).t()
    second.copy_(first)
    assert bits(second) == bits(source)
    assert bits(second.to(two_devices[0])) == bits(source)
    assert bits(second[:, 2:5].to(two_devices[0])) == bits(source[:, 2:5])
    with pytest.raises(RuntimeError, match="same device"):
        first + second
    assert (second + 1).device == two_devices[1]


# Memory


def test_out_of_memory(cuda: torch.device) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError, match="out of memory"):
        torch.empty(1 << 46, dtype=torch.uint8, device=cuda)
    assert torch.OutOfMemoryError is torch.cuda.OutOfMemoryError
    assert torch.zeros(3, device=cuda).tolist() == [0, 0, 0]


def test_memory_statistics(cuda: torch.device) -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.empty(1 << 20, dtype=torch.uint8, device=cuda)
    assert torch.cuda.memory_allocated() - before == 1 << 20
    del x
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before == 1 << 20


def test_freed_while_in_use(cuda: torch.device) -> None:
    """Memory is not given back before the work of the stream that it was allocated on is done."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(10):
            torch.zeros(1 << 16, device=cuda)


# What the simulator sees of torch


def test_a_missing_wait_is_reported(cuda: torch.device, simulator: Simulator) -> None:
    x = torch.zeros(1 << 16, device=cuda)
    with torch.cuda.stream(torch.cuda.Stream()):
        x.fill_(1.5)
    assert simulator.reports("RACE", clear=True)


def test_memory_used_by_another_stream_must_be_recorded(cuda: torch.device, simulator: Simulator) -> None:
    stream = torch.cuda.Stream()
    x = torch.zeros(1 << 16, device=cuda)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x.zero_()
    del x
    torch.cuda.current_stream().synchronize()
    torch.empty(1, device=cuda)  # gives back what was freed
    assert simulator.reports("USE-AFTER-FREE", clear=True)


def test_a_failed_call_is_an_error(cuda: torch.device, simulator: Simulator) -> None:
    x = torch.zeros(3, device=cuda)
    simulator.fault("cuMemcpyDtoHAsync_v2", 1, 700)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS in cuMemcpyDtoHAsync"):
        x.cpu()
    simulator.reset()
    assert x.tolist() == [0, 0, 0]


def test_failing_work_is_sticky(cuda: torch.device, simulator: Simulator) -> None:
    x = torch.zeros(3, device=cuda)
    simulator.fault("cuMemsetD8Async", 1, 719, asynchronous=True)
    x.zero_()
    with pytest.raises(torch.AcceleratorError, match="CUDA_ERROR_LAUNCH_FAILED"):
        torch.cuda.synchronize()
    with pytest.raises(torch.AcceleratorError, match="CUDA_ERROR_LAUNCH_FAILED"):
        torch.zeros(3, device=cuda)
    simulator.reset()
