"""How much memory loads to GPUs may use."""

from __future__ import annotations

from dataclasses import dataclass

from dcp_fast import _native

MIN_STAGING_BYTES = 1 << 20  # slots of the smallest size that still overlap reading and copying
_BLOCK_BYTES = 4 << 20  # by default
_MIN_PINNED_BYTES = 64 << 20  # by default
_MOST_BLOCK_BYTES = 8 << 20  # that the default ring has room for
_SLOTS_PER_THREAD = 2  # one is filled while the other is copied


@dataclass(frozen=True)
class StagingLimits:
    """How much memory loads to GPUs may use.

    Attributes:
        pinned_bytes: host memory that copies come from.
        device_staging_bytes: memory on each device for boxes that are placed there by the kernel, or converted.
        block_bytes: the most that one slot of the pinned ring carries.
    """

    pinned_bytes: int
    device_staging_bytes: int
    block_bytes: int

    @classmethod
    def of(
        cls, threads: int | None, block_bytes: int | None, pinned_bytes: int | None, device_staging_bytes: int | None
    ) -> StagingLimits:
        """Limits where None stands for the default: two slots for each thread, and twice as much on a device."""
        block_bytes = block_bytes or _BLOCK_BYTES
        if pinned_bytes is None:
            block_bytes = min(block_bytes, _MOST_BLOCK_BYTES)
            slot = block_bytes * 33 // 32  # with descriptors
            slots = _SLOTS_PER_THREAD * _native.most_reader_threads(threads or 0)
            pinned_bytes = max(_MIN_PINNED_BYTES, slots * slot)
        if device_staging_bytes is None:
            device_staging_bytes = 2 * pinned_bytes
        cls.check(pinned_bytes, device_staging_bytes)
        return cls(pinned_bytes, device_staging_bytes, block_bytes)

    @staticmethod
    def check(pinned_bytes: int | None, device_staging_bytes: int | None) -> None:
        """Raise ValueError for what is too little."""
        for name, value in (("pinned_bytes", pinned_bytes), ("device_staging_bytes", device_staging_bytes)):
            if value is not None and value < MIN_STAGING_BYTES:
                raise ValueError(f"{name} must be at least {MIN_STAGING_BYTES}, got {value}")
