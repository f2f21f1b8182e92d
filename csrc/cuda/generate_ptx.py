#!/usr/bin/env python3
"""Compiles box_copy.cu to what ships: box_copy.ptx, and from that box_copy.sm_*.cubin. With --check compares instead.

Drivers refuse PTX of a version that is newer than they are, and nvcc always writes its own version: text from nvcc 13
would not load under a driver for CUDA 12. The kernel needs nothing beyond PTX 6.0 and compute capability 5.0, so
this is what the text is declared to be. Every driver since CUDA 9 takes it, and ptxas holds it to this declaration, as
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
SOURCE = HERE / "box_copy.cu"
SHIPPED = HERE / "box_copy.ptx"

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


def compile_kernel(nvcc: Path) -> str:
    options = ["-ptx", f"-arch={ARCHITECTURE}", "-std=c++17", "-O3", f"-I{HERE.parent}"]
    command = [str(nvcc), *options, str(SOURCE), "-o", "/dev/stdout"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def normalize(ptx: str, version: str) -> str:
    """Declares the oldest version and target that do, and leaves out comments: they name the compiler's build."""
    ptx = re.sub(r"//.*", "", ptx)
    ptx = re.sub(r"^\.version .*", f".version {PTX_VERSION}", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"^\.target .*", f".target {PTX_TARGET}", ptx, flags=re.MULTILINE)
    lines = [line.rstrip() for line in ptx.splitlines()]
    header = f"// {SOURCE.name} as compiled by nvcc {version}. Made by {Path(__file__).name}; not to be edited.\n"
    return header + "\n".join(line for line in lines if line) + "\n"


def binary(architecture: str) -> Path:
    """Where the cubin for an architecture lies."""
    return SHIPPED.with_suffix(f".{architecture}.cubin")


def assemble(ptxas: Path, architecture: str) -> bytes:
    """The cubin that the shipped text assembles to. It names its own command, which is the same wherever it runs."""
    name = binary(architecture).name
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(SHIPPED, folder)
        subprocess.run([ptxas, "-O3", f"-arch={architecture}", SHIPPED.name, "-o", name], check=True, cwd=folder)
        return (Path(folder) / name).read_bytes()


def check(shipped: str, generated: str) -> int:
    header, made_anew = shipped.partition("\n")[0], generated.partition("\n")[0]
    if header != made_anew:
        print(f"another compiler made the shipped text\n  shipped: {header}\n  here:    {made_anew}")
        return OTHER_COMPILER
    diff = list(difflib.unified_diff(shipped.splitlines(), generated.splitlines(), "shipped", "generated", lineterm=""))
    print("\n".join(diff) if diff else f"{SHIPPED.name} is what {SOURCE.name} compiles to")
    return 1 if diff else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the shipped text instead of writing it")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        parser.error("no nvcc in PATH or under CUDA_HOME")
    generated = normalize(compile_kernel(nvcc), nvcc_version(nvcc))
    ptxas = nvcc.resolve().with_name("ptxas")
    if arguments.check:
        status = check(SHIPPED.read_text(), generated)
        for architecture in BINARY_ARCHITECTURES if status == 0 else ():
            if binary(architecture).read_bytes() != assemble(ptxas, architecture):
                print(f"{binary(architecture).name} is not what {SHIPPED.name} assembles to")
                status = 1
        return status
    SHIPPED.write_text(generated)
    for architecture in BINARY_ARCHITECTURES:
        binary(architecture).write_bytes(assemble(ptxas, architecture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
