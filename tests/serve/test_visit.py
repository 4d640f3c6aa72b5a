"""What the web app's buttons do, without a browser: meshes, viewer, gallery, routes, downloads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trimesh

pytest.importorskip("gradio")
from tiny_pipeline import image, tiny_pipeline  # noqa: E402

from elastic3d.elastic import attach  # noqa: E402
from elastic3d.elastic.config import ElasticConfig, RouterConfig  # noqa: E402
from elastic3d.geometry.mesh_io import read_extras  # noqa: E402
from elastic3d.serve.queue import MeshQueue  # noqa: E402
from elastic3d.serve.visit import Choices, Visits, download, route_image, table, tiles  # noqa: E402

CHOICES = Choices(image(), "", "budget", 0.6, True, True, 3, 1, 2, 16, 500, 20, 0.15)


def test_both_meshes_with_colours_and_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    pipeline = tiny_pipeline()
    attach(pipeline.dit, RouterConfig())
    pipeline.config.elastic = ElasticConfig(budget=0.5)
    with MeshQueue(pipeline) as queue:
        visits = Visits(queue)
        made = visits.generate(CHOICES, "somebody", lambda *_, **__: None)
        assert [m.name for m in (*made.elastic, *made.dense)] == ["elastic, seed 3", "dense, seed 3"]
        assert made.elastic[0].metadata["budget"] == 0.6 and made.dense[0].share == "100%"
        assert made.elastic[0].mesh.visual.kind == "vertex"
        page = made.view(0)
        assert page.count("<iframe") == 1 and "dense, seed 3" in page and "colours" in page
        assert page.index("dense, seed 3") < page.index("elastic, seed 3")
        assert [name for _, name in tiles(made)] == ["seed 3"] and Path(str(route_image(made, 0))).is_file()
        assert "<td>elastic, seed 3</td>" in table([m.row() for m in made.elastic])
        for kind, longest in (("glb", 0.05), ("stl", 50), ("obj", 50), ("ply", 50)):
            button = download(made, 0, kind, "z", 50)
            path = Path(button.value["path"] if isinstance(button.value, dict) else button.value)
            assert trimesh.load_mesh(path).extents.max() == pytest.approx(longest, rel=1e-4)
        glb = next(path for path in made.elastic[0].path.parent.glob("*.glb"))
        assert read_extras(glb)["seed"] == 3
        folder = made.folder
        other = visits.generate(
            replace(CHOICES, compare=False, colours=False), "somebody", lambda *_, **__: None
        )
        assert not other.dense and folder is not None and not folder.exists(), "the newest alone is kept"
        visits.leave("somebody")
        assert not list(tmp_path.glob("elastic3d-*"))
