"""The scripts are run as files; their tests import them the way Python does then, from their own folder."""

import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(root / "scripts"), str(root / "tests")]
