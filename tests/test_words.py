"""The project speaks in its field's words: no name, docstring, comment, help text or document has one of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (
    ".ci", "configs", "data/pretrained", "docs", "elastic3d", "examples", "integrations", "reports", "scripts", "tests",
)  # fmt: skip
SUFFIXES = {".py", ".pyi", ".md", ".yaml", ".yml", ".toml", ".html", ".js", ".ipynb", ".svg"}
OLD_NAMES = ("elastic3d/utils/old_names.py", "tests/utils/test_old_names.py", "tests/test_words.py")
# What a change log says of a name that is gone: `old` is `new`, or: it was `old`.
RENAMED = re.compile(
    r"`[^`]+`(?:,? and\s+`[^`]+`)*\s+(?:is|are)\s+(?=`)|it\s+was\s+`[^`]+`|`[^`]+`\s+is\s+gone"
)

ROUTING = ("elastic3d/elastic", "elastic3d/diffusion", "elastic3d/training", "docs/routers.md", "configs")
METHOD = (
    *ROUTING,
    "tests/elastic",
    "tests/contracts",
    "tests/training",
    "tests/diffusion",
    "reports/experiments",
)


class Word(NamedTuple):
    """A word of the project's own, as a pattern that also matches inside of names; the field's; in which folders, all
    of them by default; and the plain English in which it is another word."""

    own: str
    fields: str
    where: tuple[str, ...] = ("",)
    plain: str = r"(?!)"


WORDS = (
    Word(r"recall(?:ed|s)", "simulated cache"),
    Word(r"recall", "simulated cache", METHOD),
    Word(r"receipts?", "metadata"),
    Word(r"pictures?", "image"),
    Word(r"foreign", "third-party"),
    Word(r"urgen(?:t|cy)", "gate bias over time"),
    Word(r"leaders?", "conditional rows"),
    Word(r"so many", "N"),
    Word(r"trends?", "damping of the forecast", plain=r"damped trend"),
    Word(r"damag(?:e[ds]?|ing)", "predicted error", METHOD),
    Word(r"prices?", "threshold", METHOD),
    Word(r"told|asked", "calibrated or requested budget", ROUTING, plain=r"asked for|told apart|told in one"),
    Word(r"routers? (?:is|are|was|were) (?:told|asked)", "calibrated budget"),
    Word(r"hold=|held(?!.out)|holding back", "deferred samples", METHOD),
    Word(r"closed|closing|opened", "skipped or executed", METHOD, plain=r"closed forms?"),
    Word(r"open (?:blocks?|gates?|half)|(?:block|gate)s? (?:(?:is|are|stays?) )?(?:open|shut)", "executed"),
    Word(r"together|apart", "shared or separate", ("elastic3d/elastic", "elastic3d/diffusion")),
    Word(r"branches=(?:together|apart)", "shared or separate"),
    Word(r"place", "task", ("elastic3d/benchmark", "tests/benchmark"), plain=r"(?:the|their) place"),
    Word(r"updates=|updates_[a-z]+|\.updates|(?:low.rank|rank.\d+|the) updates", "few-step LoRA"),
    Word(r"updated (?:weights?|blocks?|twins?|models?|ones)|few_step\.updated|val/updated", "adapted"),
    Word(r"(?:few|fewer|fewest|many|dense|model's|steps and|steps as|min|max|[\d.]+) calls", "NFE"),
)


def pattern(word: str) -> re.Pattern[str]:
    """Of a word by itself or as a part of a name, over the end of a line too."""
    spaced = word.replace(" ", r"[\s_#]+")
    return re.compile(rf"(?<![a-z])(?:{spaced})(?![a-z])", re.IGNORECASE)


COMPILED = [(word, pattern(word.own), re.compile(word.plain.replace(" ", r"\s+"))) for word in WORDS]


def found(path: str, text: str) -> Iterator[str]:
    """`file:line: ...` for every word of the project's own in the text of a file."""
    if path == "CHANGELOG.md":
        text = RENAMED.sub(lambda match: re.sub(r"\S", "-", match.group()), text)
    for word, own, plain in COMPILED:
        if not path.startswith(word.where):
            continue
        for match in own.finditer(text):
            spans = (other.span() for other in plain.finditer(text))
            if not any(first <= match.start() and match.end() <= last for first, last in spans):
                line = text.count("\n", 0, match.start()) + 1
                yield f"{path}:{line}: {match.group()!r}, expected {word.fields}"


def sources() -> list[Path]:
    """What people read of the project: code, configurations and documents, not data."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted([*files, *ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "Makefile"])


def test_the_project_speaks_in_the_words_of_its_field() -> None:
    paths = {path.relative_to(ROOT).as_posix(): path for path in sources()}
    assert set(OLD_NAMES) < paths.keys() and len(paths) > 300
    wrong = [
        line
        for name, path in paths.items()
        if name not in OLD_NAMES
        for line in found(name, path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        ("elastic3d/training/a.py", "x = 1\nrecalled: int = 3\n", 2),
        ("elastic3d/training/a.py", "_TOLD = (0.4, 0.8)\n", 1),
        ("elastic3d/elastic/a.py", '"""What the\nrouters are told."""\n', 2),
        ("tests/a.py", "def test_a_foreign_file():\n    pass\n", 1),
        ("scripts/a.py", "write(sheet, picture)  # beside it\n", 1),
        ("docs/a.md", "It is trained with\n`updates=true` for few\ncalls.\n", 2),
        ("CHANGELOG.md", "- `router.trend` is measured.\n", 1),
    ],
)
def test_a_word_of_the_projects_own_is_found_with_its_line(path: str, text: str, line: int) -> None:
    assert next(found(path, text)).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("elastic3d/elastic/a.py", "# a damped trend, as is asked for; folders are reopened"),
        (
            "elastic3d/training/a.py",
            "optimizer.step()  # after 200 updates, as often as the sampler calls it",
        ),
        ("elastic3d/evaluation/a.py", "def recall(pairs): ...  # the two can't be told apart"),
        (
            "CHANGELOG.md",
            "- `trend` is `damping`, `min_calls` and\n  `max_calls` are `min_nfe` and `max_nfe`.",
        ),
    ],
)
def test_plain_english_stays(path: str, text: str) -> None:
    assert not list(found(path, text))
