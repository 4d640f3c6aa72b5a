"""The earlier name of `import_weights.py`, with the same options.

python scripts/import_hunyuan3d.py model=hunyuan3d2 weights=FOLDER output=models/hunyuan3d2
"""

from __future__ import annotations

import import_weights
from _cli import run

from elastic3d.checkpoints.options import ImportConfig


def main(config: ImportConfig) -> None:
    """As there."""
    import_weights.main(config)


if __name__ == "__main__":
    run(main, ImportConfig, "import_hunyuan3d")
