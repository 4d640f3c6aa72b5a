import csv

import pytest
import torch
from _cli import options_of

from elastic3d.diffusion.options import PipelineConfig, Solver
from elastic3d.errors import UserError
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.training.checkpoint import load_checkpoint
from elastic3d.training.export import SamplingExportConfig, StoredFormat, export_run
from elastic3d.training.latents import LatentInfo, build_cache
from elastic3d.training.options import StageName
from elastic3d.training.stages import run_stage
from elastic3d.utils.files import file_sha256, load_json, save_json
from tests.training.tiny import add_views, export_of, vae_config
from tests.training.tiny import dit_config as config_for

pytestmark = pytest.mark.usefixtures("few_tries")


def test_from_prepared_shapes_to_a_pipeline(prepared):
    """Train the VAE, export it, cache latents, train the DiT, export the pipeline: by the commands alone."""
    add_views(prepared)
    folder = prepared / "vae"
    assert run_stage(vae_config(prepared, validate_every=6)) == 0
    assert run_stage(export_of(vae_config(prepared), folder)) == 0
    average = load_checkpoint(prepared / "runs" / "tiny" / "checkpoints" / "step-00000006").tensors["average"]
    vae = ShapeVAE.from_pretrained(folder)
    for name, value in vae.named_parameters():
        assert torch.equal(value, average[f"vae.{name}"].bfloat16().float())
    record = load_json(folder / "training.json")
    assert (record["steps"], record["data"]["train_shapes"], record["config"]["seed"]) == (6, 5, 3)
    with (folder / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    assert float(rows[-1]["val/volume_iou"]) >= 0

    assert run_stage(config_for(prepared, stage=StageName.cache)) == 0
    assert run_stage(config_for(prepared, steps=2)) == 0
    output = prepared / "pipeline"
    options = {"pipeline": SamplingExportConfig(model="tiny", steps=3, solver="ab2")}
    assert export_run(export_of(config_for(prepared), output, export=options)) == output
    pipeline = ImageTo3DPipeline.from_pretrained(output, device="cpu", dtype="float32")
    assert (pipeline.config.model, pipeline.config.steps) == ("tiny", 3)
    info = LatentInfo.load(prepared / "latents")
    assert pipeline.vae.config.latent_mean == pytest.approx(info.mean)
    assert pipeline.vae.config.latent_std == pytest.approx(info.std)
    for part, steps in (("vae", 6), ("dit", 2)):
        assert load_json(output / part / "training.json")["steps"] == steps
        assert (output / part / "training.csv").is_file()

    # in 8 bits: half the size, and weights within half a step of their rows
    smaller = options | {"weights": StoredFormat.int8}
    packed = export_run(export_of(config_for(prepared), prepared / "packed", export=smaller))
    size, smaller_size = ((each / "dit/model.safetensors").stat().st_size for each in (output, packed))
    assert smaller_size < 0.75 * size
    found = ImageTo3DPipeline.from_pretrained(packed, device="cpu", dtype="float32")
    average = load_checkpoint(prepared / "runs" / "dit" / "checkpoints" / "step-00000002").tensors["average"]
    for name, value in found.dit.named_parameters():
        exact = average[f"dit.{name}"]
        step = exact.abs().amax(-1, keepdim=True) / (127 if exact.ndim == 2 else 256)
        assert ((value - exact).abs() <= 0.51 * step + 1e-30).all(), name
    vaes = [folder / "vae/model.safetensors" for folder in (output, packed)]
    assert file_sha256(vaes[0]) == file_sha256(vaes[1])
    with pytest.raises(UserError, match="export.weights=int8 is for a shape DiT"):
        export_run(export_of(vae_config(prepared), folder, export={"weights": StoredFormat.int8}))

    _check_tuned(prepared, output)


def _check_tuned(prepared, output):
    """What goes on from a model is sampled as that, but for what is asked for."""
    assert run_stage(config_for(prepared, name="tuned", init_from=output, steps=1)) == 0
    for given, expected in (
        ({"guidance": 4.0}, {"steps": 3, "guidance": 4.0, "solver": Solver.ab2}),
        (
            {"steps": 25, "solver": "euler"},
            {"steps": 25, "guidance": 3.0, "solver": Solver.euler},
        ),  # of no model
    ):
        options = {"pipeline": SamplingExportConfig(**given)}
        tuned = export_run(export_of(config_for(prepared, name="tuned"), prepared / "tuned", export=options))
        found = ImageTo3DPipeline.from_pretrained(tuned, device="cpu", dtype="float32").config
        assert {name: getattr(found, name) for name in expected} == expected and found.model == "unnamed"


def test_options_of_an_export_are_those_of_a_pipeline():
    """Null where they are not asked for, so that a value that is asked for is told from a default."""
    wanted, found = options_of(PipelineConfig), options_of(SamplingExportConfig)
    assert wanted.keys() == found.keys()
    for name, leaf in found.items():
        assert leaf.bounds == wanted[name].bounds
        if name != "model" and not name.startswith("elastic."):
            assert leaf.default is None and leaf.help.startswith(wanted[name].help)
    assert "; null: of the model that it started from, else euler" in found["solver"].help


def test_a_run_whose_latents_have_another_scale_now_is_refused(cached):
    """Its DiT knows the scale that the cache had: the same samples would decode otherwise."""
    config = config_for(cached, steps=2, save_every=2)
    assert run_stage(config) == 0
    (cached / "train.txt").write_text("balls/ball0\nballs/ball1\n")
    cache = config_for(cached, stage=StageName.cache)
    before = LatentInfo.load(cached / "latents").record
    assert build_cache(cache).record["scale"] != before["scale"]
    message = "step-00000002 learned from latents of another scale than those in the cache now"
    with pytest.raises(UserError, match=message):
        run_stage(config_for(cached, steps=4))
    with pytest.raises(UserError, match=message):
        export_run(export_of(config))
    path = config.folder / "checkpoints" / "step-00000002"
    state = load_json(path / "state.json")
    del state["data"]["scale"]
    save_json(state, path / "state.json")
    hashes = load_json(path / "manifest.json")
    save_json(hashes | {"state.json": file_sha256(path / "state.json")}, path / "manifest.json")
    export_run(export_of(config))  # an older checkpoint did not note it
    assert run_stage(config_for(cached, steps=4)) == 0


def test_a_run_without_a_checkpoint(prepared):
    with pytest.raises(UserError, match="has no whole checkpoint"):
        export_run(export_of(vae_config(prepared)))
