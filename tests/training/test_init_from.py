"""What a run may start from."""

import shutil
from pathlib import Path

import pytest

from elastic3d.diffusion.options import PipelineConfig
from elastic3d.errors import UserError
from elastic3d.models.options import VAEConfig
from elastic3d.models.weights import load_config
from elastic3d.training.checkpoint import CLASSES, find_start, load_checkpoint, model_part
from elastic3d.training.latents import pipeline_config
from elastic3d.training.stages import run_stage
from elastic3d.training.vae import TrainedPart
from elastic3d.utils.files import load_json
from elastic3d.utils.options import from_dict, to_dict
from tests.training.tiny import dit_config, export_of, vae_config

pytestmark = pytest.mark.usefixtures("few_tries")


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


def test_a_vae_that_reads_sharp_edges_is_not_trained_without_them(cached: Path) -> None:
    """Nor where the architecture is that of the model it starts from; a record without them can still be read."""
    config = vae_config(cached)
    config.vae.model.sharp_latents = 3
    with pytest.raises(UserError, match="sharp_points is 0, expected some, .* reads 3 of its"):
        run_stage(config)
    assert not config.folder.exists()
    assert from_dict(type(config), to_dict(config)).vae.model.sharp_latents == 3


def test_a_run_that_goes_on_without_init_from_keeps_what_it_began_from(
    dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the autoencoder the scale of its latents, of the DiT how it is sampled: an export has both."""
    model = dense / "dense"
    decoder, dit = vae_config(dense, name="decoder"), dit_config(dense, name="dit")
    decoder.vae.trained = TrainedPart.decoder
    for config in (decoder, dit):
        config.steps, config.init_from = 1, model
        run_stage(config)
    again = [vae_config(dense, name="decoder", steps=2), dit_config(dense, name="dit", steps=2)]
    again[0].vae.trained = TrainedPart.decoder
    own: VAEConfig = load_config(model / "vae", *CLASSES["vae"])
    shutil.rmtree(model / "vae")  # what the run had from there is in its own record
    for config in again:
        capsys.readouterr()
        run_stage(config)
        assert f"step-00000001, begun from {model}" in capsys.readouterr().err
        run_stage(export_of(config))
        assert f"written: {config.folder / 'export'}\n" in capsys.readouterr().err
        record = load_checkpoint(config.folder / "checkpoints" / "step-00000002").values
        assert record["config"]["init_from"] == str(model)
        export = config.folder / "export"
        if config is again[0]:
            found: VAEConfig = load_config(export, *CLASSES["vae"])
            assert found == own and len(found.latent_mean) == 7
            assert load_json(export / "training.json")["steps"] == 2
        else:
            assert pipeline_config(export).steps == 3 != PipelineConfig().steps
