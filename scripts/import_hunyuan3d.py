"""The earlier name of `import_weights.py`, with the same options.

python scripts/import_hunyuan3d.py model=hunyuan3d2 weights=FOLDER output=models/hunyuan3d2
"""

from __future__ import annotations

from _cli import run
from import_weights import main

from elastic3d.config.checkpoints import ImportConfig

if __name__ == "__main__":
    run(main, ImportConfig, "import_hunyuan3d")
