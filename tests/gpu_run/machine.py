"""Says what machine this is: its GPUs, driver, cores, memory, torch and tools. Exits with 2 where a GPU is missing.

python machine.py [--simulated]
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile

NO_GPU = 2
TOOLS = ("nvidia-smi", "cmake", "ninja", "c++", "nvcc", "ptxas", "compute-sanitizer")


def devices_of_driver() -> int:
    """How many devices the driver finds; raises OSError where there is no driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    result = driver.cuInit(0)
    if result != 0:
        raise OSError(f"cuInit failed with {result}")
    count, version = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    print(f"driver of CUDA {version.value // 1000}.{version.value % 1000 // 10} with {count.value} devices", flush=True)
    return count.value


def run(*command: str) -> None:
    try:
        subprocess.run(command, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(error, flush=True)


def main() -> int:
    """Everything that may fail comes after what is always known."""
    cores = len(os.sched_getaffinity(0))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    free = shutil.disk_usage(tempfile.gettempdir()).free >> 30
    print(f"Python {platform.python_version()}, {platform.platform()}")
    print(f"{cores} cores, {pages} GiB of memory, {free} GiB free in {tempfile.gettempdir()}")
    for tool in TOOLS:
        print(f"{tool}: {shutil.which(tool)}", flush=True)
    run("nvidia-smi")
    if shutil.which("nvcc"):
        run("nvcc", "--version")
    import torch

    about_torch = f"torch {torch.__version__}"
    if "--simulated" in sys.argv:
        print(f"FACTS: {about_torch}, {cores} cores, simulated devices")
        return 0
    try:
        count = devices_of_driver()
    except OSError as error:
        print(f"FACTS: no GPU: {error}")
        return NO_GPU
    if count == 0 or not torch.cuda.is_available():
        what = "the driver finds no device" if count == 0 else f"{about_torch} finds no GPU that it can use"
        print(f"FACTS: no GPU: {what}")
        return NO_GPU
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"FACTS: {', '.join(names)}, {about_torch}, {cores} cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
