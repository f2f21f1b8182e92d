#!/usr/bin/env python3
"""Compiles each kernel to what ships: box_copy.cu to box_copy.ptx, and that to box_copy.sm_*.cubin. --check compares.

Drivers refuse PTX of a version that is newer than they are, and nvcc always writes its own version: text from nvcc 13
would not load under a driver for CUDA 12. The kernels need nothing beyond PTX 6.0 and compute capability 5.0, so
their text is declared to be that. Every driver since CUDA 9 takes it, and ptxas holds it to this declaration, as
tests/python/transfer/test_kernel_ptx.py makes sure. What differs between two runs or machines is left out.

The cubins spare common devices the compiling: the driver takes one for every device of the same major version that is
as new or newer, as long as it is as new as the compiler that made it. All others, devices and drivers, take the text.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = ("box_copy", "dequantize")

# The lowest that nvcc 13 compiles for. From compute_100 on it writes text of another shape.
ARCHITECTURE = "compute_75"
PTX_VERSION = "6.0"
PTX_TARGET = "sm_50"
# Ampere and Ada, Hopper, and both kinds of Blackwell.
BINARY_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")

OTHER_COMPILER = 2  # exit status: another nvcc made the shipped text, and there is nothing to compare


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    return Path(found) if found else None


def nvcc_version(nvcc: Path) -> str:
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    if match is None:
        raise RuntimeError(f"{nvcc} --version does not name its version")
    return match[1]


def source(kernel: str) -> Path:
    return HERE / f"{kernel}.cu"


def shipped(kernel: str) -> Path:
    """Where the text of a kernel lies."""
    return HERE / f"{kernel}.ptx"


def compile_kernel(nvcc: Path, kernel: str) -> str:
    # Products are rounded before anything is added to them, as on the host.
    options = ["-ptx", f"-arch={ARCHITECTURE}", "-std=c++17", "-O3", "-fmad=false", f"-I{HERE.parent}"]
    command = [str(nvcc), *options, str(source(kernel)), "-o", "/dev/stdout"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def normalize(ptx: str, kernel: str, version: str) -> str:
    """Declares the oldest version and target that do, and leaves out comments: they name the compiler's build."""
    ptx = re.sub(r"//.*", "", ptx)
    ptx = re.sub(r"^\.version .*", f".version {PTX_VERSION}", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"^\.target .*", f".target {PTX_TARGET}", ptx, flags=re.MULTILINE)
    lines = [line.rstrip() for line in ptx.splitlines()]
    header = (
        f"// {source(kernel).name} as compiled by nvcc {version}. Made by {Path(__file__).name}; not to be edited.\n"
    )
    return header + "\n".join(line for line in lines if line) + "\n"


def binary(kernel: str, architecture: str) -> Path:
    """Where the cubin for an architecture lies."""
    return shipped(kernel).with_suffix(f".{architecture}.cubin")


def assemble(ptxas: Path, kernel: str, architecture: str) -> bytes:
    """The cubin that the shipped text assembles to. It names its own command, which is the same wherever it runs."""
    text, name = shipped(kernel), binary(kernel, architecture).name
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(text, folder)
        subprocess.run([ptxas, "-O3", f"-arch={architecture}", text.name, "-o", name], check=True, cwd=folder)
        return (Path(folder) / name).read_bytes()


def check_text(kernel: str, text: str, generated: str) -> int:
    header, made_anew = text.partition("\n")[0], generated.partition("\n")[0]
    if header != made_anew:
        print(f"another compiler made the shipped text\n  shipped: {header}\n  here:    {made_anew}")
        return OTHER_COMPILER
    diff = list(difflib.unified_diff(text.splitlines(), generated.splitlines(), "shipped", "generated", lineterm=""))
    print("\n".join(diff) if diff else f"{shipped(kernel).name} is what {source(kernel).name} compiles to")
    return 1 if diff else 0


def check(kernel: str, generated: str, ptxas: Path) -> int:
    status = check_text(kernel, shipped(kernel).read_text(), generated)
    for architecture in BINARY_ARCHITECTURES if status == 0 else ():
        if binary(kernel, architecture).read_bytes() != assemble(ptxas, kernel, architecture):
            print(f"{binary(kernel, architecture).name} is not what {shipped(kernel).name} assembles to")
            status = 1
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the shipped text instead of writing it")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        parser.error("no nvcc in PATH or under CUDA_HOME")
    ptxas = nvcc.resolve().with_name("ptxas")
    worst = 0
    for kernel in KERNELS:
        generated = normalize(compile_kernel(nvcc, kernel), kernel, nvcc_version(nvcc))
        if arguments.check:
            worst = max(worst, check(kernel, generated, ptxas))
            continue
        shipped(kernel).write_text(generated)
        for architecture in BINARY_ARCHITECTURES:
            binary(kernel, architecture).write_bytes(assemble(ptxas, kernel, architecture))
    return worst


if __name__ == "__main__":
    sys.exit(main())
