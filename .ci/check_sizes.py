"""Fail if a file or a function has grown past what a reader takes in at once, a committed file is huge, or all weights
that were ever committed are: every clone has them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_FILE_MEGABYTES = 60
MAX_HISTORY_MEGABYTES = 350
WEIGHTS = ".safetensors"


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


def committed_weights(root: Path = ROOT) -> int | None:
    """Bytes of all weights in the history of every branch, each content once; None where that is not known here: no
    git, no repository, or a shallow clone."""
    try:
        if _git(root, "rev-parse", "--is-shallow-repository").strip() != "false":
            return None
        objects = [line.partition(" ") for line in _git(root, "rev-list", "--objects", "--all").splitlines()]
        weights = "\n".join(id for id, _, path in objects if path.endswith(WEIGHTS))
        sizes = _git(root, "cat-file", "--batch-check=%(objectsize)", given=weights)
    except (OSError, subprocess.CalledProcessError):
        return None
    return sum(map(int, sizes.split()))


def too_much_history(committed: int | None) -> list[str]:
    """What is too large about `committed_weights`."""
    megabytes = (committed or 0) / 1e6
    if megabytes <= MAX_HISTORY_MEGABYTES:
        return []
    return [f"*{WEIGHTS} of all commits: {megabytes:.0f} MB, at most {MAX_HISTORY_MEGABYTES}"]


def _git(root: Path, *arguments: str, given: str = "") -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, check=True, capture_output=True, text=True, input=given
    )
    return done.stdout


def main() -> int:
    """Print every problem; 1 if there is one."""
    files = [
        ROOT / name for name in _git(ROOT, "ls-files", "-z").split("\0") if name and (ROOT / name).is_file()
    ]
    found = [problem for path in files for problem in problems(path)]
    found += too_much_history(committed_weights())
    print("\n".join(found) or f"{len(files)} files: none is too large")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
