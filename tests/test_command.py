"""The command `elastic3d`: equal to the scripts, from a checkout and from an installed wheel."""

from __future__ import annotations

import runpy
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

from elastic3d import cli

ROOT = Path(__file__).resolve().parents[1]
NOT_THERE = ("error: there is no file gone", "error: there is no folder gone")


def run(
    *arguments: str, folder: Path = ROOT, command: tuple[str, ...] = ("-m", "elastic3d.cli")
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_there_is_a_command_for_every_script() -> None:
    scripts = {path for path in (ROOT / "scripts").glob("*.py") if not path.name.startswith("_")}
    assert set(cli.find_commands().values()) == scripts
    assert {"gen-mesh", "evaluate", "train", "serve", "app"} <= set(cli.find_commands())


@pytest.mark.parametrize(
    "command",
    [
        "gen_mesh image=gone.png output=x.glb",
        "gen_image prompt=chair output=x.png lora=gone.safetensors",
        "calibrate image=gone/*.png",
        "compare_decoding images=gone output=x",
        "benchmark images=gone output=x",
        "gen_mesh prompt=chair output=x.glb dinov2=gone",
        "held_out split=gone output=x",
        "held_out data.path=gone output=x",
        "import_weights dinov2=gone output=x",
        "import_weights weights=gone output=x",
        "import_weights weights=gone/of/here output=x",
        "gen_mesh model=triposg weights=gone/a.safetensors prompt=chair output=x.glb",
        "calibrate model=triposg weights=gone image={data}/samples",
        "make_dial results=gone",
        "measure_colour data.splits=gone",
        "measure_familiarity prepared=gone",
        "time_stages image=gone",
    ],
)
def test_what_is_not_there_is_told_before_anything_slow_is_imported(command: str, tmp_path: Path) -> None:
    script, *options = command.format(data=ROOT / "data").split()
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; sys.path[:0] = [sys.argv[0]]"
    code += "; sys.argv[0] += f'/{sys.argv.pop(1)}.py'; runpy.run_path(sys.argv[0], run_name='__main__')"
    given = [sys.executable, "-c", code, str(ROOT / "scripts"), script, *options]
    done = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith(NOT_THERE), done.stderr
    assert not any(tmp_path.iterdir())


def test_overview_version_and_typing_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.find_commands())
    assert "Make a mesh from an image" in shown or "Make a mesh from an image" in shown
    assert cli.main(["--version"]) == 0 and "elastic3d 0." in capsys.readouterr().out
    assert cli.main(["gen-msh"]) == 2
    assert "'gen-msh': did you mean gen-mesh?" in capsys.readouterr().err
    assert cli.main(["xyzzy"]) == 2
    assert "'xyzzy' (elastic3d --help" in capsys.readouterr().err


def test_a_command_answers_as_its_script_does() -> None:
    for arguments in (["--help"], ["image=a.png", "output=x.glb", "steps=few"]):
        ours = run("gen-mesh", *arguments)
        script = run(*arguments, command=(str(ROOT / "scripts/gen_mesh.py"),))
        assert (ours.returncode, ours.stderr) == (script.returncode, script.stderr)
        assert ours.stdout.splitlines()[1:] == script.stdout.splitlines()[1:]
    assert run("gen_mesh", "--help").returncode == 0


def test_what_a_command_runs_into_is_told_as_by_its_script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported all that a generation needs."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # the command has its own
    monkeypatch.setattr("_cli.signal.signal", lambda *arguments: None)
    script, given = ROOT / "scripts/gen_mesh.py", ["image=gone.png", "output=x.glb"]
    monkeypatch.setattr(sys, "argv", [str(script), *given])
    said = []
    for start in (
        lambda: cli.main(["gen-mesh", *given]),
        lambda: runpy.run_path(str(script), run_name="__main__"),
    ):
        with pytest.raises(SystemExit) as stopped:
            start()
        assert stopped.value.code == 2
        said.append(capsys.readouterr())
    assert said[0] == said[1] and "gone.png" in said[0].err


@pytest.mark.slow
def test_an_installed_wheel_finds_its_configurations_and_models(tmp_path: Path) -> None:
    """Unpacked in another folder, with nothing of the checkout in sight."""
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
        entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "elastic3d = elastic3d.cli:main" in wheel.read(entry).decode()
    (tmp_path / "work").mkdir()
    start = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
    start += "from elastic3d import cli; print(cli.__file__); cli.main(sys.argv[1:])"
    sample = str(ROOT / "data/samples/chair.png")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            start,
            "gen-mesh",
            f"image={sample}",
            "output=chair.glb",
            "steps=4",
            "resolution=64",
        ],
        cwd=tmp_path / "work",
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout and (tmp_path / "work/chair.glb").is_file()
