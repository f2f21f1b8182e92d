"""A torch backend for tests: torch holds `device="cuda"` tensors in the memory of the simulated driver."""

from .install import install, why_not

__all__ = ["install", "why_not"]
