"""Lets the tests of this folder use the simulated engine of tests/serving."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
