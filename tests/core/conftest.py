"""Lets the tests of this folder share the shape of a model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
