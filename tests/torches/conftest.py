"""The option of the cross test."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--written", type=Path, help="the folder with a folder of checkpoints for each torch")
