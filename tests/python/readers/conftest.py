"""What tests of readers of others share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from foreign_readers import STORED
from helpers import save

import dcp_fast


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return save(tmp_path / "ckpt", STORED)


@pytest.fixture(params=["passed", "installed"])
def load(request: pytest.FixtureRequest) -> Any:
    """The two ways that lead to readers of others."""
    if request.param == "passed":
        yield dcp_fast.load
        return
    with dcp_fast.install():
        yield dcp.load
