"""Makes torch believe that the simulated devices are CUDA devices, be it a CPU build or one for CUDA.

torch/cuda/*.py stays torch's own: it only finds what it expects in torch._C, and classes for streams and events below
its own ones. So `torch.cuda` behaves as the real one does, as far as the functions that it calls are there.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from .build import load_extension

# Of CUdevice_attribute.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSOR_COUNT = 75, 76, 16
_CUDA = 1  # c10::DeviceType::CUDA

_extension: ModuleType | None = None


def why_not() -> str | None:
    """What keeps the backend from being installed here; None: nothing."""
    path = os.environ.get("DCP_FAST_LIBCUDA")
    if not path:
        return "DCP_FAST_LIBCUDA does not name the simulated driver"
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for ROCm; the simulated devices take the place of CUDA's"
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        return f"DCP_FAST_LIBCUDA cannot be loaded: {error}"
    if not hasattr(library, "simcuda_set"):
        return f"DCP_FAST_LIBCUDA={path} is not the simulated driver: it has no simcuda_set"
    return None


def install() -> ModuleType:
    """Install the backend in this process, building it if need be, and return its extension module.

    Only the first call does anything. The driver is initialised by the first use of a device.
    """
    global _extension
    if _extension is None:
        reason = why_not()
        if reason is not None:
            raise RuntimeError(f"torch cannot use simulated CUDA devices: {reason}")
        _extension = load_extension()
        for name, function in vars(_extension).items():
            if name.startswith("_cuda_"):
                setattr(torch._C, name, function)
        _replace_streams(_extension)
        _patch_torch_cuda(_extension)
        _patch_storages(_extension)
    return _extension


def _replace_streams(extension: ModuleType) -> None:
    class StreamBase(torch.Stream):
        def __new__(
            cls, priority: int = 0, stream_id: int = 0, device_index: int = 0, device_type: int = 0, stream_ptr: int = 0
        ) -> StreamBase:
            origin = None
            if stream_ptr:  # a stream's id is its handle
                stream_id, device_index, device_type = stream_ptr, torch.cuda.current_device(), _CUDA
                origin = "external"
            elif not (stream_id or device_index or device_type):
                stream_id, device_index, device_type = extension._cuda_getPoolStream()
                origin = "pool"
            self = super().__new__(cls, stream_id=stream_id, device_index=device_index, device_type=device_type)
            self.origin = origin
            return self

        def __eq__(self, other: object) -> bool:
            # Of real devices torch's ids tell the streams of its pool from external ones with the same handle.
            if {self.origin, getattr(other, "origin", None)} == {"external", "pool"}:
                return False
            return super().__eq__(other)

        __hash__ = torch.Stream.__hash__

        @property
        def cuda_stream(self) -> int:
            return self.stream_id

    class EventBase(torch.Event):
        def __new__(
            cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
        ) -> EventBase:
            return super().__new__(cls, "cuda", enable_timing=enable_timing, blocking=blocking)

        @property
        def cuda_event(self) -> int:
            return self.event_id

        def elapsed_time(self, end_event: EventBase) -> float:
            # torch.Event's own method refuses instances of derived classes.
            return extension.elapsed_time(self.event_id, end_event.event_id)

    native: Any = torch._C
    native._CudaStreamBase, native._CudaEventBase = StreamBase, EventBase
    cuda: Any = torch.cuda
    streams = importlib.reload(cuda.streams)
    cuda.Stream, cuda.ExternalStream, cuda.Event = streams.Stream, streams.ExternalStream, streams.Event


def _patch_torch_cuda(extension: ModuleType) -> None:
    native: Any = torch._C
    native._has_cuda = True
    cuda: Any = torch.cuda
    # These were bound to dummies when torch.cuda was imported.
    cuda._exchange_device = extension._cuda_exchangeDevice
    cuda._maybe_exchange_device = extension._cuda_exchangeDevice
    cuda._is_in_bad_fork = extension._cuda_isInBadFork
    cuda.graphs._cuda_isCurrentStreamCapturing = lambda: False
    # What torch._C._cuda_init would set up. There is nothing to be done on first use: the extension sees to that.
    cuda._initialized = True
    cuda._get_device_properties = lambda device: _properties(extension, device)
    cuda._device_count_nvml = lambda: -1  # devices of a driver that is really there do not count
    cuda.default_generators = _Generators()


def _patch_storages(extension: ModuleType) -> None:
    """Let untyped storages be made and resized on a device, which torch compiles for real devices only."""
    storages: Any = torch.UntypedStorage
    make, resize = storages.__new__, storages.resize_

    def new(cls: type, *arguments: Any, device: Any = None, **options: Any) -> torch.UntypedStorage:
        if device is not None and torch.device(device).type == "cuda":
            size = arguments[0] if arguments else 0
            return torch.empty(size, dtype=torch.uint8, device=device).untyped_storage()
        return make(cls, *arguments, device=device, **options)

    def resize_(self: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if self.device.type != "cuda":
            return resize(self, size)
        extension.resize_storage(torch.empty(0, dtype=torch.uint8, device=self.device).set_(self), size)
        return self

    storages.__new__, storages.resize_ = new, resize_


class _Generators:
    """Random numbers are made on the CPU, by its generator, whichever the device."""

    def __getitem__(self, device: int) -> torch.Generator:
        return torch.default_generator


def _properties(extension: ModuleType, device: int) -> SimpleNamespace:
    return SimpleNamespace(
        name="simulated CUDA device",
        major=extension.device_attribute(_CAPABILITY_MAJOR, device),
        minor=extension.device_attribute(_CAPABILITY_MINOR, device),
        multi_processor_count=extension.device_attribute(_MULTIPROCESSOR_COUNT, device),
    )
