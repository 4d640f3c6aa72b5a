"""What a run may start from."""

from pathlib import Path

import pytest

from elastic3d.errors import UserError
from elastic3d.training.checkpoint import find_start, model_part
from elastic3d.training.stages import run_stage
from tests.training.tiny import dit_config, vae_config


def test_the_bundled_model_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_start(Path("shape-small"))
    assert model_part(found, "vae") == found / "vae" and model_part(found, "dit") == found / "dit"
    (tmp_path / "shape-small").mkdir()  # one's own folder of that name comes first
    assert find_start(Path("shape-small")) == Path("shape-small")
    with pytest.raises(UserError, match="init_from=nowhere does not exist, expected a checkpoint"):
        find_start(Path("nowhere"))


def test_what_a_dit_can_not_start_from(cached: Path) -> None:
    """A model without a DiT, and a run that has saved nothing: what is expected is said in a sentence."""
    empty, stopped = cached / "runs" / "empty", cached / "runs" / "stopped"
    (empty / "checkpoints" / "step-00000003").mkdir(parents=True)
    stopped.mkdir()
    (stopped / "metrics.jsonl").touch()
    nothing = "is neither a checkpoint nor a model to start a dit from, expected .*, such as shape-small"
    for start, message in (
        (Path("image-small"), nothing),
        (cached / "vae", nothing),
        (stopped, nothing),
        (cached / "val.txt", nothing),
        (empty, r"is a run without a whole checkpoint \(.*no manifest.json\): train it first"),
    ):
        with pytest.raises(UserError, match=message):
            run_stage(dit_config(cached, init_from=start))


def test_checkpoints_that_do_not_fit(cached: Path) -> None:
    """Of another stage, or of another architecture: what helps is another `init_from`, not another `name`."""
    run_stage(vae_config(cached, steps=1, save_every=1))
    start = cached / "runs" / "tiny"
    with pytest.raises(UserError, match="it is of stage=vae, expected stage=dit: give another init_from="):
        run_stage(dit_config(cached, init_from=start))
    wider = vae_config(cached, name="wider", init_from=start)
    wider.vae.model.width = 48
    with pytest.raises(UserError, match=r"of another architecture: .*, another init_from=, or leave it out"):
        run_stage(wider)
    wider = vae_config(cached)
    wider.vae.model.width = 48
    with pytest.raises(UserError, match="trained with, or another name= for a new run"):
        run_stage(wider)
