"""Lets the tests of this folder share its laboratory and its laws."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
