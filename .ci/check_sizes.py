"""Fail if a file or a function has grown past what a reader takes in at once, or a committed file is huge."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_FILE_MEGABYTES = 60


def problems(path: Path) -> list[str]:
    """What is too large in one committed file."""
    megabytes = path.stat().st_size / 1e6
    if megabytes > MAX_FILE_MEGABYTES:
        return [f"{path}: {megabytes:.0f} MB, at most {MAX_FILE_MEGABYTES}"]
    if path.suffix != ".py":
        return []
    text = path.read_text()
    found = []
    if (lines := text.count("\n")) > MAX_FILE_LINES:
        found.append(f"{path}: {lines} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(
                    f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
                )
    return found


def main() -> int:
    """Print every problem; 1 if there is one."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    found = [problem for path in files for problem in problems(path)]
    print("\n".join(found) or f"{len(files)} files: none is too large")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
