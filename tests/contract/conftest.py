"""Lets the test files import the checks as `tests.contract.checks`, whatever folder pytest is started from."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
pytest.register_assert_rewrite("tests.contract.checks")
