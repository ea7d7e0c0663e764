"""Lets the tests of this folder and of tests/engine share the simulated engine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("engine_lab")
