"""Lets the tests of this folder use their laboratory, and the simulated engine of tests/serving."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "serving")]
