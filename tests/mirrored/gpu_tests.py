"""The tests of a GPU, on a mirrored one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import mirror  # before torch
import pytest

with mirror.mirrored():
    tests = Path(__file__).parent.parent / "gpu"
    sys.exit(pytest.main([str(tests), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]))
