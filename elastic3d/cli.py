"""The command `elastic3d`: every script by its name.

    elastic3d gen-mesh image=chair.png output=chair.glb

equals `python scripts/gen_mesh.py image=chair.png output=chair.glb`. An installed package brings `scripts/`,
`configs/` and the bundled data inside; a checkout has them beside the package.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from elastic3d import __version__

PACKAGE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a script with the rest of the arguments; its exit code, 2 for a command that is not there."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = find_commands()
    if not given or given[0] in ("--help", "-h", "help"):
        sys.stdout.write(_overview(commands))
        return 0
    if given[0] in ("--version", "version"):
        sys.stdout.write(f"elastic3d {__version__}\n")
        return 0
    name = given[0].replace("_", "-")
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        sys.stderr.write(
            f"error: unknown command {given[0]!r}{':' if hint else ''} {hint}(elastic3d --help lists every command)\n"
        )
        return 2
    script = commands[name]
    before = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [f"elastic3d {name}", *given[1:]], [str(script.parent)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
    return 0


def find_commands() -> dict[str, Path]:
    """Scripts by the names of their commands: `gen-mesh` is `gen_mesh.py`."""
    folder = next(place for place in (PACKAGE / "scripts", PACKAGE.parent / "scripts") if place.is_dir())
    files = sorted(file for file in folder.glob("*.py") if not file.stem.startswith("_"))
    return {file.stem.replace("_", "-"): file for file in files}


def _overview(commands: dict[str, Path]) -> str:
    lines = ["elastic3d COMMAND [option=value ...]; elastic3d COMMAND --help lists its options", ""]
    width = max(map(len, commands)) + 2
    for name, script in commands.items():
        lines.append(f"  {name:{width}}{_first_sentence(script)}")
    return "\n".join(lines) + "\n"


def _first_sentence(script: Path) -> str:
    """The first line of a script's docstring."""
    with script.open(encoding="utf-8") as file:
        return file.readline().strip().strip('"')


if __name__ == "__main__":
    sys.exit(main())
