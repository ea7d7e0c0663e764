"""Lets the tests of this folder share its laboratory and its laws."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("sched_lab", "sched_laws")
