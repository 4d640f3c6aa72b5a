"""The command line helper: values arrive as typed, mistakes are told in one sentence."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
from _cli import execute, help_text, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic3d.errors import UserError
from elastic3d.utils.options import Options, check_range, option


class Colour(Enum):
    red = "red"
    dark_blue = "dark-blue"


@dataclass(kw_only=True)
class CacheConfig(Options):
    reuse: int = option(0, "How often a result is reused.")
    delta: float = option(0.1, "Width of the band.")


@dataclass(kw_only=True)
class CleanupConfig(Options):
    max_faces: int = option(100, "Most faces.")
    steps: int = option(1, "Passes of cleaning.")


@dataclass(kw_only=True)
class Config(Options):
    prompt: str = option("", "What to make.")
    output: Path = option(Path("out.glb"), "Where it goes.")
    steps: int = option(25, "Number of steps: 1, 2, ...")
    guidance: float = option(3.0, "Guidance scale.")
    fast: bool = option(False, "Be quick.")
    seed: int | None = option(None, "Random seed.")
    caption: str | None = option("x", "Text or nothing.")
    colour: Colour = option(Colour.red, "The colour.")
    files: list[str] = option([], "Several files.")
    sizes: list[int] = option([64], "Several sizes.")
    named: dict[str, list[Path]] = option({}, "Files by name.")
    cache: CacheConfig = option(CacheConfig, "The cache.")
    extra: CacheConfig | None = option(None, "Another cache, or none.")
    cleanup: CleanupConfig = option(CleanupConfig, "The cleaning.")

    def check(self) -> None:
        check_range("steps", self.steps, 1, 100)


@dataclass(kw_only=True)
class RequiredConfig(Options):
    image: str


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "cache").mkdir()
    (folder / "stage").mkdir()
    (folder / "demo.yaml").write_text("defaults: [_self_, {cache: default}, {stage: quick}]\nguidance: 4.0\n")
    (folder / "plain.yaml").write_text("{}\n")
    (folder / "cache/default.yaml").write_text("reuse: 1\n")
    (folder / "cache/paper.yaml").write_text("reuse: 5\n")
    (folder / "stage/quick.yaml").write_text("# @package _global_\nfast: true\n")
    (folder / "stage/slow.yaml").write_text("# @package _global_\nsteps: 99\nfast: false\n")
    return folder


def test_defaults_come_from_the_dataclass_then_the_file_then_its_groups(configs: Path) -> None:
    config = parse(Config, "demo", [], configs)
    assert (config.steps, config.guidance, config.cache.reuse, config.fast) == (25, 4.0, 1, True)
    assert isinstance(config.cache, CacheConfig) and isinstance(config.output, Path)


def test_groups_are_chosen_and_single_fields_win_over_them(configs: Path) -> None:
    config = parse(Config, "demo", ["cache.delta=0.5", "cache=paper", "stage=slow", "steps=7"], configs)
    assert (config.cache.reuse, config.cache.delta, config.steps, config.fast) == (5, 0.5, 7, False)


def test_a_group_that_the_file_does_not_choose_can_be_chosen(configs: Path) -> None:
    assert parse(Config, "plain", ["cache=paper"], configs).cache.reuse == 5


def test_a_command_without_a_file_of_its_own(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has groups all the same, and does not wait for Hydra where none is chosen."""
    assert parse(Config, "none", ["cache=paper"], configs).cache.reuse == 5
    monkeypatch.setitem(sys.modules, "hydra", None)
    assert parse(Config, "none", ["steps=7"], configs).steps == 7


def test_a_group_that_a_chosen_group_brings_along_can_be_exchanged(configs: Path) -> None:
    (configs / "stage/cached.yaml").write_text("# @package _global_\ndefaults: [{/cache: paper}]\nsteps: 3\n")
    (configs / "staged.yaml").write_text("defaults: [_self_, {stage: quick}]\n")
    assert parse(Config, "staged", ["stage=cached"], configs).cache.reuse == 5
    assert parse(Config, "staged", ["cache=default", "stage=cached"], configs).cache.reuse == 1


LITERALS = [
    "a chair (1).png", "a,b;c", "k=v=w", "it's \"quoted\"", "$HOME", "${x}", "\\${x}\\", "a\\b", "-leading",
    "--help=", "a~/x", "[a]", "{b: c}", "null ", "true", "1e3", "#tag", "Stuhl ä 椅子 🪑", " padded ", "",
    "a\nb", "@file", "!tag", "*?[x]", "???",
]  # fmt: skip


def test_a_tilde_is_the_home_folder_in_paths_alone(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["prompt=~/x", "output=~/x/", "files=[~/a, b]", "named={n: [~/c, '${x}']}"]
    config = parse(Config, "plain", arguments, configs)
    assert config.prompt == "~/x" and config.output == tmp_path / "x"
    assert config.files == [str(tmp_path / "a"), "b"]
    assert config.named == {"n": [tmp_path / "c", Path("${x}")]}


BROKEN_YAML = [
    "{a: [", "{a: b: c}", "{? [x] : y}", "{a: !!python/object:os.system x}", "{a: 2020-99-99}", "[" * 5000, "{a: *b}",
    "{a: &x [q], b: *x}", "text", "[1]", "{a: 1}", "{a: {b: c}}", "\t- x", "{<<: 3}", "{a: \x00}",
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN_YAML)
def test_a_mapping_that_is_none_is_told_in_a_sentence(
    configs: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(lambda config: 0, Config, "plain", [f"named={text}"], configs) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: named=") and "expected a mapping such as {name: value}" in said, said
    assert "Traceback" not in said and len(said) < 400


def test_defaults_that_the_repository_ships_hold_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastic3d.training.options import HeldOutConfig
    from elastic3d.training.vae import VAETrainConfig

    monkeypatch.chdir(tmp_path)
    held_out = parse(HeldOutConfig, "held_out", [])
    assert held_out.split.is_file() and Path(held_out.data.splits).is_dir() and Path(held_out.model).is_dir()
    assert all(path.is_file() for path in parse(VAETrainConfig, "train", ["stage=vae"]).data.train)
    assert held_out.output == Path("outputs/held_out"), "outputs stay in the current folder"
    (tmp_path / "data/splits").mkdir(parents=True)
    assert parse(HeldOutConfig, "held_out", []).data.splits == "data/splits", "one's own comes first"


@pytest.mark.parametrize("text", LITERALS)
def test_text_and_paths_arrive_as_typed(configs: Path, text: str) -> None:
    config = parse(Config, "plain", [f"prompt={text}", f"output={text}", f"files=x{text}"], configs)
    assert config.prompt == text
    assert config.output == Path(text)
    assert config.files == [f"x{text}"]


@settings(max_examples=20, deadline=None)
@given(st.text(alphabet="\\${}a'\" :.\n", max_size=9))
def test_no_text_is_taken_for_an_interpolation(configs: Path, text: str) -> None:
    assert parse(Config, "plain", [f"prompt={text}"], configs).prompt == text


def test_typed_values(configs: Path) -> None:
    arguments = "guidance=1e-1 fast=True seed=3 caption=null colour=dark-blue sizes=1,2 extra.reuse=2"
    config = parse(Config, "plain", arguments.split(), configs)
    assert (config.guidance, config.fast, config.seed, config.caption) == (0.1, True, 3, None)
    assert config.colour is Colour.dark_blue and config.sizes == [1, 2]
    assert config.extra == CacheConfig(reuse=2)


def test_a_unique_nested_name_needs_no_parents(configs: Path) -> None:
    config = parse(Config, "plain", ["max_faces=7", "steps=3"], configs)
    assert config.cleanup == CleanupConfig(max_faces=7) and config.steps == 3


def test_lists(configs: Path) -> None:
    arguments = ["files=[a b.png, 'c, d.png', true, 1]", "sizes=[]"]
    config = parse(Config, "plain", arguments, configs)
    assert config.files == ["a b.png", "c, d.png", "true", "1"] and config.sizes == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("step=3", r"unknown option 'step': did you mean steps"),
        ("reuse=3", r"did you mean cache.reuse or extra.reuse"),
        ("xyzzy=3", r"unknown option 'xyzzy' \(--help"),
        ("chair.png", r"'chair.png' is not an option: write options as key=value"),
        ("--steps=3", r"unknown option '--steps': did you mean steps"),
        ("steps=many", r"steps=many: expected an integer"),
        ("steps=null", r"steps=null: expected an integer"),
        ("seed=x", r"seed=x: expected an integer or null"),
        ("guidance=high", r"guidance=high: expected a number"),
        ("fast=maybe", r"fast=maybe: expected true or false"),
        ("colour=green", r"colour=green: expected one of red, dark_blue"),
        ("sizes=[1,x]", r"sizes=\[1,x\]: expected a list .* an integer"),
        ("files=[a: b]", r"expected a list"),
        ("cache=fast", r"cache=fast: expected one of default, paper"),
        ("debug=perhaps", r"debug=perhaps: expected true or false"),
    ],
)
def test_mistakes_are_one_sentence(configs: Path, argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(Config, "demo", [argument], configs)
    assert "\n" not in str(caught.value)


def test_required_option(configs: Path) -> None:
    with pytest.raises(UserError, match="image is required"):
        parse(RequiredConfig, "plain", [], configs)


def test_exit_codes_and_streams(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(config: Config) -> int:
        raise {"int": KeyboardInterrupt(), "os": PermissionError(13, "Permission denied", "/x")}.get(
            config.prompt, ValueError("two\nlines")
        )

    assert execute(lambda config: None, Config, "demo", [], configs) == 0
    assert execute(lambda config: 1, Config, "demo", [], configs) == 1
    assert execute(broken, Config, "demo", ["steps=101"], configs) == 2
    assert "steps is 101, expected a value from 1 to 100" in capsys.readouterr().err
    assert execute(broken, Config, "demo", ["prompt=int"], configs) == 130
    assert execute(broken, Config, "demo", ["prompt=os"], configs) == 2
    assert "error: /x: permission denied" in capsys.readouterr().err
    assert execute(broken, Config, "demo", [], configs) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: two lines\n") and captured.out == ""
    assert "Traceback" not in captured.err
    for setting, shown in (
        ("debug=true", True),
        ("debug=Yes", True),
        ("debug=1", True),
        ("debug=off", False),
    ):
        assert execute(broken, Config, "demo", [setting], configs) == 2
        assert ("Traceback" in capsys.readouterr().err) == shown


def test_an_unexpected_error_is_not_hidden(configs: Path) -> None:
    def broken(config: Config) -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        execute(broken, Config, "demo", [], configs)


def test_help_lists_every_option_with_its_default_meaning_and_choices(configs: Path) -> None:
    def main(config: Config) -> None:
        pass

    text = help_text(main, Config, "demo", configs)
    assert "usage: python scripts/test_cli.py key=value" in text
    expected_texts = (
        "steps=25|Number of steps: 1, 2, ...|guidance=4.0|fast=true|seed=null|colour=red|One of: red, dark_blue."
        "|cache.reuse=1|default, paper|debug=false"
    )
    for expected in expected_texts.split("|"):
        assert expected in text, expected
    assert execute(main, Config, "demo", ["--help"], configs) == 0


def test_run_ends_the_process_with_the_exit_code(tmp_path: Path, configs: Path) -> None:
    script = tmp_path / "script.py"
    scripts = Path(sys.modules["_cli"].__file__ or "").parent
    script.write_text(
        f"import sys; sys.path.insert(0, {str(scripts)!r})\n"
        "import _cli; from pathlib import Path; from dataclasses import dataclass\n"
        f"_cli.execute.__defaults__ = (Path({str(configs)!r}), dict)\n"
        "@dataclass\nclass C:\n    x: int = 0\n"
        "_cli.run(lambda config: config.x, C, 'plain')\n"
    )
    assert subprocess.run([sys.executable, script, "x=7"]).returncode == 7
