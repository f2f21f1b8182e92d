"""The kernel's text that ships: it is what its source compiles to, and all devices that nvcc knows can run it.

Needs the CUDA toolkit, but neither a GPU nor the simulator.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

CUDA = Path(__file__).resolve().parents[3] / "csrc" / "cuda"


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_ptx", CUDA / "generate_ptx.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate_ptx = load_generator()
NVCC = generate_ptx.find_nvcc()


def tool(name: str) -> Path:
    """A program of the toolkit that nvcc belongs to."""
    if NVCC is None:
        pytest.skip("no CUDA toolkit: nvcc is neither in PATH nor under CUDA_HOME")
    path = NVCC.resolve().parent / name
    if not path.exists():
        pytest.skip(f"no {name} beside {NVCC}")
    return path


def architectures() -> list[str]:
    if NVCC is None:
        return []
    command = [NVCC, "--list-gpu-code"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_shipped_text_is_what_the_source_compiles_to() -> None:
    nvcc = tool("nvcc")
    made_here = generate_ptx.normalize(generate_ptx.compile_kernel(nvcc), generate_ptx.nvcc_version(nvcc))
    shipped = generate_ptx.SHIPPED.read_text()
    header = shipped.partition("\n")[0]
    if made_here.partition("\n")[0] != header:
        pytest.skip(f"this nvcc is {generate_ptx.nvcc_version(nvcc)}, and the shipped text says: {header}")
    assert made_here == shipped


@pytest.mark.parametrize("architecture", generate_ptx.BINARY_ARCHITECTURES)
def test_shipped_binaries_are_what_the_text_assembles_to(architecture: str) -> None:
    version = generate_ptx.nvcc_version(tool("nvcc"))
    if f"nvcc {version}." not in generate_ptx.SHIPPED.read_text().partition("\n")[0]:
        pytest.skip(f"the toolkit here is {version}, and another one made what ships")
    assert generate_ptx.assemble(tool("ptxas"), architecture) == generate_ptx.binary(architecture).read_bytes()


def test_a_binary_ships_for_each_architecture_and_no_other() -> None:
    shipped = {path.name for path in CUDA.glob("*.cubin")}
    assert shipped == {generate_ptx.binary(name).name for name in generate_ptx.BINARY_ARCHITECTURES}


def test_header_suits_every_driver_since_cuda_11() -> None:
    lines = generate_ptx.SHIPPED.read_text().splitlines()
    assert lines[1:4] == [".version 6.0", ".target sm_50", ".address_size 64"]


def test_nothing_that_tells_of_a_machine_or_a_build() -> None:
    text = generate_ptx.normalize('// Build ID: 1\n.version 9.0\n\n.target sm_75\n\tret; // "/tmp/x.cu"\n', "13.0.88")
    assert text.splitlines()[1:] == [".version 6.0", ".target sm_50", "\tret;"]
    assert "/" not in generate_ptx.SHIPPED.read_text().partition("\n")[2]


def test_a_difference_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_ptx.check("// header\nadd\n", "// header\nadd\n") == 0
    assert generate_ptx.check("// header\nadd\n", "// header\nsub\n") == 1
    assert "-add\n+sub" in capsys.readouterr().out
    assert generate_ptx.check("// header\nadd\n", "// another\nadd\n") == generate_ptx.OTHER_COMPILER


@pytest.mark.parametrize("architecture", architectures() or ["any"])
def test_assembles_without_spills(architecture: str, tmp_path: Path) -> None:
    ptxas = tool("ptxas")
    command = [ptxas, "-v", f"-arch={architecture}", generate_ptx.SHIPPED, "-o", tmp_path / "kernel.cubin"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert frame is not None, result.stderr
    assert frame.groups() == ("0", "0", "0")
    # Local, shared and barrier use would show up here: the interpreter knows none of them.
    assert not re.search(r"\d+ bytes [ls]mem|used [1-9]\d* barriers", result.stderr), result.stderr
    registers = re.search(r"Used (\d+) registers", result.stderr)
    assert registers is not None, result.stderr
    # 65536 registers are enough for four blocks of 256 threads.
    assert int(registers[1]) <= 64
