"""Options and fixtures of the Python tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: its threads wait in loops for each other, which takes a processor from whoever runs beside,
# and the tensors of tests are small. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch.distributed as dist
from ranks import Ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run tests marked `long`, which take minutes each")
    parser.addoption("--quick", action="store_true", help="leave out tests that take long: processes, faults, damage")
    parser.addoption("--fuzz-seed", type=int, help="run only this case of test_fuzz_differential.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        left_out = [item for item in items if _takes_long(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not _takes_long(item)]
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="runs only with --long"))


def _takes_long(item: pytest.Item) -> bool:
    fixtures = getattr(item, "fixturenames", ())
    if "ranks" in fixtures or "fresh_ranks" in fixtures:
        return True
    return any(
        word in item.path.name
        for word in ("fault", "fuzz", "hostile", "inspect", "interrupt", "lazy", "megatron", "run_gpu")
    )


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that run a function as the ranks of a process group; they live as long as the session."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def fresh_ranks() -> Iterator[Ranks]:
    """The same for one test alone.

    torch caches how to redistribute DTensors, and for a mesh that equals an earlier one it goes by that one's process
    groups, although they are gone ("Could not resolve the process group").
    """
    pool = Ranks()
    yield pool
    pool.close()
