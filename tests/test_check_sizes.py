"""What the lint says of a repository's size."""

import runpy
import subprocess
from pathlib import Path

import pytest

CHECK = runpy.run_path(str(Path(__file__).resolve().parent.parent / ".ci" / "check_sizes.py"))


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_weights_of_all_commits_are_counted(tmp_path: Path) -> None:
    """Those that were replaced or deleted too, on any branch, the same content once."""
    committed_weights = CHECK["committed_weights"]
    assert committed_weights(tmp_path) is None  # no repository
    origin = tmp_path / "origin"
    origin.mkdir()
    git(origin, "init", "-q")
    (origin / "notes.txt").write_text("no weights")
    git(origin, "add", ".")
    git(origin, "commit", "-qm", "first")
    assert committed_weights(origin) == 0
    for name, content in (("a", b"1" * 100), ("a", b"2" * 10), ("b c", b"2" * 10)):
        (origin / f"{name}.safetensors").write_bytes(content)
        git(origin, "add", ".")
        git(origin, "commit", "-qm", "weights")
    git(origin, "switch", "-qc", "other")
    git(origin, "rm", "-q", "a.safetensors", "b c.safetensors")
    git(origin, "commit", "-qm", "none")
    assert committed_weights(origin) == 110
    git(tmp_path, "clone", "-q", "--depth", "1", origin.as_uri(), "shallow")
    assert committed_weights(tmp_path / "shallow") is None


@pytest.mark.parametrize(("committed", "said"), [(None, 0), (0, 0), (350_000_000, 0), (351_000_000, 1)])
def test_the_limit(committed: int | None, said: int) -> None:
    assert len(CHECK["too_much_history"](committed)) == said
