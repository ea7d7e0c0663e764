"""Lets the tests of this folder share their oracle and their rows, and run CUDA kernels on the CPU."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "ops")]
