"""The Infinigen source without Infinigen: a stand-in for the Blender process, and raw files made by hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from elastic3d.errors import UserError
from elastic3d.preparation import infinigen
from elastic3d.preparation.infinigen import (
    FACTORIES,
    InfinigenSource,
    assets,
    check_spikes,
    generate,
    read_failures,
)

STAND_IN = """
import json, os, sys, time
with os.fdopen(int(sys.argv[1]), "w") as answers:
    answers.write("ready\\n"); answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        seed = request["seed"]
        if seed == 1:
            os._exit(3)
        if seed == 2:
            time.sleep(60)
        answer = {"error": "ValueError: no faces"} if seed == 3 else {"faces": 1, "seconds": 0}
        if seed != 3:
            os.makedirs(os.path.dirname(request["output"]), exist_ok=True)
            open(request["output"], "w").write(request["factory"])
        answers.write(json.dumps(answer) + "\\n"); answers.flush()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(infinigen, "WORKER", script)


def test_at_least_16_categories_and_balanced_prefixes() -> None:
    assert len(FACTORIES) >= 16
    wanted = assets([], 3)
    assert len(wanted) == 3 * len(FACTORIES)
    assert len({asset.category for asset in wanted[: len(FACTORIES)]}) == len(FACTORIES)
    assert [asset.name for asset in assets(["cup", "sofa"], 2)] == [
        "cup-00000",
        "sofa-00000",
        "cup-00001",
        "sofa-00001",
    ]


def test_unknown_category() -> None:
    with pytest.raises(UserError, match="no Infinigen category 'car', expected one of chair"):
        assets(["car"], 1)


@pytest.mark.usefixtures("stand_in")
def test_crashes_hangs_and_errors_are_listed_and_not_tried_again(tmp_path: Path) -> None:
    wanted, raw = assets(["cup"], 5), tmp_path / "raw"
    done = dict(generate(wanted, raw, Path(sys.executable), timeout_s=3))
    assert [done[asset] for asset in wanted] == [
        "",
        "Blender crashed",
        "took more than 3 s",
        "ValueError: no faces",
        "",
    ]
    assert sorted(path.name for path in (raw / "cup").iterdir()) == ["0.npz", "4.npz"]
    assert set(read_failures(raw)) == {"cup-00001", "cup-00002", "cup-00003"}
    assert list(generate(wanted, raw, Path(sys.executable))) == []


@pytest.mark.usefixtures("stand_in")
def test_failures_are_forgotten_on_request(tmp_path: Path) -> None:
    wanted = assets(["cup"], 4)[3:]
    assert dict(generate(wanted, tmp_path, Path(sys.executable))) == {wanted[0]: "ValueError: no faces"}
    assert list(generate(wanted, tmp_path, Path(sys.executable))) == []
    source = InfinigenSource(tmp_path, tmp_path, ["cup"], 4)
    source.forget_failures()
    assert not source.ready(source.items()[3])
    assert read_failures(tmp_path) == {} and len(list(generate(wanted, tmp_path, Path(sys.executable)))) == 1
    InfinigenSource(tmp_path / "nowhere", tmp_path, [], 1).forget_failures()


def test_what_the_machine_lacks_is_no_failure_of_an_asset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.py"
    answer = '{"error": "ModuleNotFoundError: shapely", "fatal": True}'
    script.write_text(
        STAND_IN.replace("answers.write(json.dumps(answer)", f"answers.write(json.dumps({answer})")
    )
    monkeypatch.setattr(infinigen, "WORKER", script)
    with pytest.raises(UserError, match="can't make cup-00000: ModuleNotFoundError: shapely; mend that"):
        list(generate(assets(["cup"], 1), tmp_path / "raw", Path(sys.executable)))
    assert read_failures(tmp_path / "raw") == {}


SLOW = """
import os, sys, time
with os.fdopen(int(sys.argv[1]), "w") as answers:
    answers.write("ready\\n"); answers.flush()
    sys.stdin.readline()
    with open({started!r} + ".draft", "w") as file:
        file.write(f"{{os.getpid()}} {{os.getsid(0)}}")
    os.rename({started!r} + ".draft", {started!r})
    time.sleep(600)
"""
COMMAND = """
import sys
from pathlib import Path
import _cli
from box_source import RECIPE
from elastic3d.preparation import infinigen
from elastic3d.preparation.options import PrepareConfig
from elastic3d.preparation.prepare import prepare
from elastic3d.preparation.shards import plan_shards

infinigen.WORKER = Path({worker!r})  # for the processes that this one starts too

def main(config):
    source = infinigen.InfinigenSource(Path(config.cache_dir), Path(config.infinigen_env), ["cup"], 2)
    prepare(plan_shards(source.items(), Path(config.output), 2), source, RECIPE)

if __name__ == "__main__":
    _cli.run(main, PrepareConfig, "prepare_data")
"""


@pytest.mark.parametrize("group", [False, True])
def test_a_signal_ends_generators_quietly_and_blames_no_asset(tmp_path: Path, group: bool) -> None:
    tests, started = Path(__file__).parents[1], tmp_path / "started"
    (tmp_path / "worker.py").write_text(SLOW.format(started=str(started)))
    (tmp_path / "go.py").write_text(COMMAND.format(worker=str(tmp_path / "worker.py")))
    python = tmp_path / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / "environment" / ".complete").touch()
    given = [
        f"cache_dir={tmp_path / 'raw'}",
        f"infinigen_env={python.parents[1]}",
        f"output={tmp_path / 'out'}",
    ]
    paths = os.pathsep.join(map(str, (tests, tests.parent / "scripts", tests.parent)))
    with (tmp_path / "err").open("w") as err:
        running = subprocess.Popen(
            [sys.executable, str(tmp_path / "go.py"), *given],
            env={**os.environ, "PYTHONPATH": paths},
            stderr=err,
            start_new_session=True,
        )
        while not started.exists():
            assert running.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.05)
        if group:
            os.killpg(running.pid, signal.SIGTERM)
        else:
            running.send_signal(signal.SIGTERM)
        assert running.wait() == 143
    assert (tmp_path / "err").read_text() == "terminated\n"
    assert not (tmp_path / "raw" / "failures.jsonl").exists()
    blender, session = map(int, started.read_text().split())
    assert blender == session, "a signal to our group does not reach it and look like a crash"
    with pytest.raises(ProcessLookupError):
        os.kill(blender, 0)


def test_environment_without_infinigen_says_so(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("import no_such_module")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infinigen, "WORKER", tmp_path / "worker.py")
        with pytest.raises(UserError, match="Infinigen does not start in"):
            list(generate(assets(["cup"], 1), tmp_path / "raw", Path(sys.executable)))
    assert read_failures(tmp_path / "raw") == {}


def test_blender_axes_become_ours(tmp_path: Path) -> None:
    """Blender: up +Z, front +X. Here: up +Y, front +Z. So Blender's +Y, the left of the object, becomes +X."""
    asset = assets(["chair"], 1)[0]
    asset.path(tmp_path).parent.mkdir()
    vertices = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)  # front, left, top
    np.savez(asset.path(tmp_path), vertices=vertices, faces=[[0, 1, 2]], material=np.zeros(1, np.uint8))
    source = InfinigenSource(tmp_path, tmp_path, ["chair"], 1)
    item = source.items()[0]
    assert source.ready(item)
    np.testing.assert_array_equal(source.load(item).mesh.vertices, [[0, 0, 1], [1, 0, 0], [0, 1, 0]])
    assert (item.id, item.caption, item.licence) == ("chair-00000", "a chair", "BSD-3-Clause")


def test_a_failed_asset_is_ready_and_loads_as_its_reason(tmp_path: Path) -> None:
    (tmp_path / "failures.jsonl").write_text(
        '{"id": "cup-00000", "reason": "Blender crashed"}\n{"id": "cup-0'
    )
    source = InfinigenSource(tmp_path, tmp_path, ["cup"], 2)
    first, second = source.items()
    assert source.ready(first) and not source.ready(second)
    with pytest.raises(UserError, match="Blender crashed"):
        source.load(first)


def test_a_mesh_with_spikes_is_refused() -> None:
    vertices = np.random.default_rng(0).uniform(-1, 1, (1000, 3))
    check_spikes(vertices)
    vertices[7, 2] = 3351.0
    with pytest.raises(UserError, match="single vertices reach 17.. times as far"):
        check_spikes(vertices)


def test_captions_have_the_right_article() -> None:
    captions = {item.category: item.caption for item in InfinigenSource(Path(), Path(), [], 1, 1).items()}
    assert captions["armchair"] == "an armchair" and captions["bed"] == "a bed"
