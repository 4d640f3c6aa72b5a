"""A pipeline with routers: options, metadata, files, images."""

import json
from dataclasses import fields

import pytest
import torch
from PIL import Image
from tiny_pipeline import image, save_image, tiny_pipeline

from elastic3d.elastic import attach, detach
from elastic3d.elastic.config import BlockCacheConfig, CacheRule, ElasticConfig, ElasticOptions, RouterConfig
from elastic3d.errors import UserError
from elastic3d.geometry.mesh_io import read_extras
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.options import GenerateConfig, GenerateImageConfig
from elastic3d.pipelines.preview import draw_routes

CACHE = BlockCacheConfig(rule=CacheRule.age, longest=1, skipped_reuse=True)


@pytest.fixture(scope="module")
def elastic() -> ImageTo3DPipeline:
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    attach(pipeline.dit, RouterConfig(initial_keep=0.5, initial_width_bias=0, head_std=3.0))
    return pipeline


def test_a_dense_run_of_an_elastic_model_is_the_dense_model(elastic, pipeline):
    plain = pipeline(image(), seed=1)
    dense = elastic(image(), seed=1, elastic=False)
    assert torch.equal(dense.latents, plain.latents) and "routes" not in dense.metadata
    assert not torch.equal(elastic(image(), seed=1).latents, plain.latents)


def test_the_metadata_tells_every_block_of_every_step(elastic):
    one, two = elastic([image(), image("white", x=5)], [0, 1], budget=0.5, cache=CACHE, resolution=12)
    for result in (one, two):
        metadata = json.loads(json.dumps(result.metadata))
        assert metadata["budget"] == 0.5 and metadata["elastic"]["cache"]["rule"] == "age"
        actions = metadata["routes"]["actions"]
        assert len(actions) == 3 and all(len(step) == 2 and len(step[0]) == 4 for step in actions)
        assert set("".join(sum(actions, []))) <= set(".c1234")
        assert 0 < metadata["flops_executed"] < metadata["flops_dense"]
        assert metadata["flops_routers"] > 0
    alone = elastic(image(), 0, budget=0.5, cache=CACHE, resolution=12).metadata
    assert alone["routes"] == one.metadata["routes"]


def test_routers_travel_with_the_pipeline(elastic, tmp_path):
    elastic.save_pretrained(tmp_path)
    again = ImageTo3DPipeline.from_pretrained(tmp_path, "cpu", "float32")
    assert torch.equal(again(image(), budget=0.6).latents, elastic(image(), budget=0.6).latents)
    dense = tiny_pipeline()
    assert set(again.dit.state_dict()) == set(dense.dit.state_dict())
    detach(again.dit)
    assert again.session is None


def test_options_that_fit_no_model_are_refused(pipeline, elastic):
    for options, message in (
        ({"budget": 0.1}, "budget is 0.1, expected a value from 0.3 to 1"),
        ({"budget": 0.3}, "budget is 0.3, expected at least 0.50 in 3 steps"),
        ({"budget": 0.5, "width": False}, "width can't be set: this model has no routers"),
        ({"elastic": True}, "elastic is true, but this model has no routers"),
        ({"cache": CACHE, "width": False}, "cache, width can't be set: this model has no routers"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline(image(), **options)
    with pytest.raises(UserError, match="budget can't be set: elastic is false"):
        elastic(image(), elastic=False, budget=0.5)
    with pytest.raises(UserError, match="budget is 0.1, expected a value from 0.3 to 1"):
        elastic(image(), budget=0.1)
    assert pipeline(image(), budget=1.0, resolution=12).metadata["budget"] == 1.0


def test_none_keeps_the_models_default():
    default = ElasticConfig(budget=0.6, cache=CACHE)
    assert ElasticOptions().over(default, True) == default
    changed = ElasticOptions(budget=0.4, width=False).over(default, True)
    assert (changed.budget, changed.width, changed.cache) == (0.4, False, CACHE)
    assert not ElasticOptions().over(default, False).elastic


def test_routes_are_drawn(tmp_path):
    routes = {"blocks": ["a", "b"], "widths": [0.25, 0.5, 0.75, 1.0], "actions": [["4.", "1c"], ["22", ".."]]}
    draw_routes([("one", routes), ("two", routes)], tmp_path / "routes.png")
    with Image.open(tmp_path / "routes.png") as sheet:
        colours = {colour for _, colour in sheet.getcolors()}
    assert {(20, 60, 140), (235, 235, 235), (245, 160, 60)} < colours
    with pytest.raises(UserError, match="no routes to draw"):
        draw_routes([], tmp_path / "none.png")
    with pytest.raises(UserError, match="elastic is false: the dense model has no routes to draw"):
        GenerateConfig(image="a.png", output="a.glb", elastic=False, trace="t.png")


def test_the_command_line(elastic, tmp_path, capsys):
    import gen_mesh
    from _cli import execute

    elastic.save_pretrained(tmp_path / "model")
    image = save_image(tmp_path / "a.png")
    arguments = [
        f"image={image}",
        f"output={tmp_path / 'a.glb'}",
        f"model={tmp_path / 'model'}",
        "device=cpu",
    ]
    arguments += ["resolution=12", "dtype=float32"]
    trace = tmp_path / "routes.png"
    more = ["budget=0.5", "cache=paper", "width=off", f"trace={trace}"]
    assert execute(gen_mesh.main, GenerateConfig, "gen_mesh", arguments + more) == 0
    metadata = read_extras(tmp_path / "a.glb")
    assert metadata["elastic"]["cache"]["rule"] == "band" and metadata["elastic"]["width"] is False
    assert trace.is_file() and set("".join(sum(metadata["routes"]["actions"], []))) <= set(".c4")
    for choice in ("off", "forecast"):
        assert execute(gen_mesh.main, GenerateConfig, "gen_mesh", [*arguments, f"cache={choice}"]) == 0
        assert read_extras(tmp_path / "a.glb")["elastic"]["cache"]["skipped_reuse"] == (choice == "forecast")
    assert execute(gen_mesh.main, GenerateConfig, "gen_mesh", [*arguments, "elastic=false"]) == 0
    assert "routes" not in read_extras(tmp_path / "a.glb")
    for wrong in ("budget=0.1", "cache=none", "cache.longest=0", "trace=routes.jpg"):
        assert execute(gen_mesh.main, GenerateConfig, "gen_mesh", [*arguments, wrong]) == 2
    assert "error: budget is 0.1, expected a value from 0.3 to 1" in capsys.readouterr().err


def test_every_elastic_option_of_the_commands_reaches_the_gate():
    """One object from the command line to the routers: its fields are the commands' and the session's."""
    names = {item.name for item in fields(ElasticOptions)}
    assert names == {item.name for item in fields(ElasticConfig)}
    for command in (GenerateConfig, GenerateImageConfig):
        assert issubclass(command, ElasticOptions) and not names & set(vars(command)["__annotations__"]) - {
            "budget"
        }
    config = GenerateConfig(image="a.png", output="b.glb", budget=0.5, shared=True)
    assert ElasticOptions(**ElasticOptions.of(config)) == ElasticOptions(budget=0.5, shared=True)
    with pytest.raises(TypeError, match="bugdet"):
        ElasticOptions(bugdet=0.5)
