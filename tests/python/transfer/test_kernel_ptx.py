"""The kernels' text that ships: it is what their source compiles to, and all devices that nvcc knows can run it.

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


@pytest.fixture(params=generate_ptx.KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def header_of(kernel: str) -> str:
    text: str = generate_ptx.shipped(kernel).read_text()
    return text.partition("\n")[0]


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


def test_shipped_text_is_what_the_source_compiles_to(kernel: str) -> None:
    nvcc = tool("nvcc")
    version = generate_ptx.nvcc_version(nvcc)
    made_here = generate_ptx.normalize(generate_ptx.compile_kernel(nvcc, kernel), kernel, version)
    if made_here.partition("\n")[0] != header_of(kernel):
        pytest.skip(f"this nvcc is {version}, and the shipped text says: {header_of(kernel)}")
    assert made_here == generate_ptx.shipped(kernel).read_text()


@pytest.mark.parametrize("architecture", generate_ptx.BINARY_ARCHITECTURES)
def test_shipped_binaries_are_what_the_text_assembles_to(kernel: str, architecture: str) -> None:
    version = generate_ptx.nvcc_version(tool("nvcc"))
    if f"nvcc {version}." not in header_of(kernel):
        pytest.skip(f"the toolkit here is {version}, and another one made what ships")
    made_here = generate_ptx.assemble(tool("ptxas"), kernel, architecture)
    assert made_here == generate_ptx.binary(kernel, architecture).read_bytes()


def test_a_binary_ships_for_each_architecture_and_no_other() -> None:
    shipped = {path.name for path in CUDA.glob("*.cubin")}
    kernels, architectures = generate_ptx.KERNELS, generate_ptx.BINARY_ARCHITECTURES
    assert shipped == {generate_ptx.binary(kernel, name).name for kernel in kernels for name in architectures}


def test_header_suits_every_driver_since_cuda_11(kernel: str) -> None:
    lines = generate_ptx.shipped(kernel).read_text().splitlines()
    assert lines[1:4] == [".version 6.0", ".target sm_50", ".address_size 64"]


def test_nothing_that_tells_of_a_machine_or_a_build(kernel: str) -> None:
    text = '// Build ID: 1\n.version 9.0\n\n.target sm_75\n\tret; // "/tmp/x.cu"\n'
    text = generate_ptx.normalize(text, kernel, "13.0.88")
    assert text.splitlines()[1:] == [".version 6.0", ".target sm_50", "\tret;"]
    assert "/" not in generate_ptx.shipped(kernel).read_text().partition("\n")[2]


def test_a_difference_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_ptx.check_text("box_copy", "// header\nadd\n", "// header\nadd\n") == 0
    assert generate_ptx.check_text("box_copy", "// header\nadd\n", "// header\nsub\n") == 1
    assert "-add\n+sub" in capsys.readouterr().out
    assert generate_ptx.check_text("box_copy", "// header\nadd\n", "// another\nadd\n") == generate_ptx.OTHER_COMPILER


@pytest.mark.parametrize("architecture", architectures() or ["any"])
def test_assembles_without_spills(kernel: str, architecture: str, tmp_path: Path) -> None:
    ptxas = tool("ptxas")
    command = [ptxas, "-v", f"-arch={architecture}", generate_ptx.shipped(kernel), "-o", tmp_path / "kernel.cubin"]
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
