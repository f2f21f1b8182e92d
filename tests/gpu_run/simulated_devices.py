"""Run by each process of a rehearsed benchmark, before torch is asked for devices: torch has the simulated ones."""

from simulated_cuda import torch_backend

torch_backend.install()
