"""The option of `pytest benchmarks`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="every case of sdfast bench, not the quick ones alone"
    )
