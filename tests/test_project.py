"""The repository itself: what it ships composes, what it says runs, what it lists twice agrees."""

import ast
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import train
import yaml
from _cli import parse
from hydra import compose
from packaging.requirements import Requirement

from elastic3d.training.stages import stage_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if not path.name.startswith("_"))
REQUIRED = {
    "prepare_data": ["path=somewhere"],
    "evaluate": ["pred=a", "gt=b", "output=c.json"],
    "gen_mesh": ["image=a.png", "output=b.glb"],
    "import_weights": ["output=a"],
    "make_tiny_weights": ["output=a"],
    "benchmark": ["images=a", "output=b"],
    "make_dial": ["results=a"],
    "benchmark_images": ["output=b"],
    "summarize": ["folders=a"],
    "calibrate": ["image=a"],
    "gen_image": ["prompt=a chair", "output=b.png"],
}
CONDA_NAMES = {"torch": "pytorch", "open3d-cpu": "open3d"}
CONDA_ONLY = {"python", "pip", "pytorch3d"}
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "docs",
    "data/README.md",
    "data/pretrained",
    "reports",
    "CONTRIBUTING.md",
    "SECURITY.md",
]


def entry_points(script: Path) -> list[tuple[type, str]]:
    """(configuration class, configuration name) of a script, from each of its lines `run(main, Class, "name")`.

    Where there are several, the last one is for arguments that none before it is for.
    """
    tree = ast.parse(script.read_text())
    modules = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    found = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        if call.func.id == "run" and len(call.args) == 3:
            _, config_class, name = call.args
            assert isinstance(config_class, ast.Name)
            assert isinstance(name, ast.Constant)
            found.append(
                (getattr(importlib.import_module(modules[config_class.id]), config_class.id), name.value)
            )
    return sorted(found, key=lambda entry: entry[1] == script.stem)


def entry_point(script: Path, arguments: list[str]) -> tuple[type, str]:
    """The one that a command takes: `stage=` chooses it for train.py; `task=images` or `backbone=` the other of two."""
    if script.stem == "train":
        return stage_config(train.chosen_stage(train.with_own_stage(arguments))), "train"
    first, *rest = entry_points(script)
    return (
        first if not rest or any(a.startswith(("backbone=", "task=images")) for a in arguments) else rest[-1]
    )


def shipped_choices() -> list[tuple[type, str, list[str]]]:
    """Each script's entry points with their defaults, and with every file of each group their configuration has."""
    found = []
    for config_class, name in [entry for script in SCRIPTS for entry in entry_points(script)]:
        found.append((config_class, name, list[str]()))
        for folder in sorted(path for path in (ROOT / "configs").iterdir() if path.is_dir()):
            path = ROOT / "configs" / f"{name}.yaml"
            text = path.read_text() if path.is_file() else ""
            if folder.name in config_class.__dataclass_fields__ or f"- {folder.name}:" in text:
                files = sorted(folder.glob("*.yaml"))
                found += [(config_class, name, [f"{folder.name}={file.stem}"]) for file in files]
    return found


@pytest.mark.parametrize(
    ("config_class", "name", "arguments"), shipped_choices(), ids=lambda value: str(value).split("/")[-1]
)
def test_shipped_configurations_become_dataclasses(config_class, name, arguments):
    arguments = [*REQUIRED.get(name, []), *arguments]
    assert isinstance(parse(config_class, name, arguments), config_class)


def readme_commands() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def documented_commands() -> list[str]:
    """Every command of a script that a page names in a block of code, however it is started."""
    pages = [page for name in PAGES for page in sorted((ROOT / name).rglob("*.md")) or [ROOT / name]]
    found = []
    for page in pages:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [
                line[line.index("scripts/") :]
                for line in lines
                if re.search(r"(python|launch) .*scripts/", line)
            ]
    return list(dict.fromkeys(found))


def documented_imports() -> list[str]:
    """Every import of an example in Python on a page."""
    pages = [page for name in PAGES for page in sorted((ROOT / name).rglob("*.md")) or [ROOT / name]]
    blocks = [
        block for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block))]
    return sorted({ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))})


def test_what_examples_on_pages_import_is_there():
    found = [line for line in documented_imports() if "elastic3d" in line]
    assert len(found) > 5
    for line in found:
        exec(line, {})


@pytest.fixture(scope="module")
def composing_once():
    """Hydra composes the same files for most commands, which takes a sixth of a second each time."""

    @cache
    def composed(name: str | None, overrides: tuple[str, ...]):
        return compose(name, overrides=list(overrides))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hydra.compose", lambda name, overrides: composed(name, tuple(overrides)))
        yield


@pytest.mark.usefixtures("composing_once")
@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_understood(command):
    script, *arguments = shlex.split(command.split(" #")[0].split(";")[0])
    if "--help" in arguments:
        return
    config_class, name = entry_point(ROOT / script, arguments)
    if name == "train":
        arguments = train.with_own_stage(arguments)
    assert isinstance(parse(config_class, name, arguments), config_class)


def test_samples_that_commands_name_exist():
    named = {
        path for command in documented_commands() for path in re.findall(r"\bdata/samples[\w./-]*", command)
    }
    assert {"data/samples", "data/samples/ground_truth"} <= named
    for path in named:
        assert (ROOT / path).exists(), path


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"make ([a-z]+)", " ".join(readme_commands()))
    assert {"demo", "test"} <= set(named) <= set(targets)


def anchors(page: str) -> set[str]:
    """What a link can name in a page after `#`: its headings outside of code, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, committed: set[str]) -> list[str]:
    """Relative links of a page, wrapped over lines or not, to a file that is not committed or to no heading."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        inside = str(target.relative_to(ROOT))
        known = inside in committed or any(path.startswith(f"{inside}/") for path in committed)
        if not known or (anchor and anchor not in anchors(target.read_text())):
            found.append(f"{page.relative_to(ROOT)}: {link}")
    return found


def test_links_of_the_pages_resolve():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    committed = set(
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    )
    pages = [ROOT / name for name in committed if name.endswith(".md") and (ROOT / name).is_file()]
    assert len(pages) > 15
    assert [link for page in pages for link in broken_links(page, committed)] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_has_help(script, monkeypatch, capsys):
    """In this process; `tests/test_library.py` and `tests/test_command.py` start some of them in their own."""
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setattr("_cli.signal.signal", lambda *arguments: None)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python scripts/{script.name} key=value")


def requirements() -> dict[str, str]:
    """Ranges of pyproject.toml by conda's name of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parsed = [Requirement(text) for text in project["dependencies"]]
    return {CONDA_NAMES.get(r.name, r.name): str(r.specifier) for r in parsed} | {
        "python": project["requires-python"]
    }


def test_conda_environment_is_in_step_with_pyproject():
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    listed = [Requirement(text) for text in [*conda, *pip["pip"]]]
    names = [r.name for r in listed]
    assert len(names) == len(set(names))
    expected = requirements()
    assert {r.name for r in listed} - CONDA_ONLY == set(expected) - {"python"}
    for requirement in listed:
        if requirement.name in expected:
            wanted = sorted(expected[requirement.name].split(","))
            assert sorted(str(requirement.specifier).split(",")) == wanted, requirement.name


def test_packages_that_every_environment_must_have():
    text = (ROOT / "environment.yml").read_text()
    for name in ("torch", "trimesh", "pytorch3d", "open3d", "diffusers", "einops", "hydra-core"):
        assert re.search(rf"\b{name}\b", text), name


def test_importing_the_package_is_quick():
    heavy = "torch", "trimesh", "open3d", "diffusers", "transformers", "accelerate", "hydra", "scipy"
    code = f"import sys, elastic3d; sys.exit(', '.join(m for m in {heavy!r} if m in sys.modules) or None)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
