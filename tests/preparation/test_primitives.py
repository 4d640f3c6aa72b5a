"""Composed shapes: closed, in one piece, the same every time, thick enough for the grid."""

from __future__ import annotations

import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from manifold3d import Manifold, OpType

from elastic3d.errors import UserError
from elastic3d.geometry.normalize import normalize_mesh
from elastic3d.geometry.solid import solidify
from elastic3d.preparation.options import PrepareConfig, SourceName
from elastic3d.preparation.prepare import prepare_data
from elastic3d.preparation.primitives.catalogue import (
    CATEGORIES,
    PER_ROUND,
    Composed,
    PrimitivesSource,
    shapes,
)
from elastic3d.preparation.primitives.solids import (
    Dice,
    bend,
    box,
    lathe,
    rod,
    round_box,
    taper,
    to_arrays,
    torus,
    tube,
    twist,
    vessel,
)
from elastic3d.preparation.primitives.symbols import FONTS, GLYPHS, count_of, glyph_of

pytest.importorskip("matplotlib")  # the letters' fonts


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_is_one_closed_piece(category: str) -> None:
    shape = Composed(category, 31)
    parts = shape._parts(Dice(zlib.crc32(category.encode()), 31))
    assert not [name for name, solid in parts.items() if solid.is_empty()]
    whole = Manifold.batch_boolean(list(parts.values()), OpType.Add)
    pieces = [piece.volume() for piece in whole.decompose()]
    assert sum(volume > 1e-6 for volume in pieces) == 1
    raw = shape.build()
    assert raw.colours is not None and len(raw.colours) == raw.part.max() + 1 <= len(parts)
    assert len(raw.part) == len(raw.mesh.faces)
    low, middle, high = np.moveaxis(raw.mesh.triangles, 1, 0)
    outwards = np.cross(middle - low, high - low).sum(axis=0)  # zero where a surface is closed
    assert np.abs(outwards).max() < 1e-9 and raw.mesh.volume > 0


def test_the_seed_alone_decides() -> None:
    first, second = Composed("composition", 3).build(), Composed("composition", 3).build()
    assert np.array_equal(first.mesh.vertices, second.mesh.vertices)
    assert np.array_equal(first.mesh.faces, second.mesh.faces)
    assert np.array_equal(first.part, second.part)
    assert first.colours is not None and np.array_equal(first.colours, second.colours)
    assert not np.array_equal(Composed("mug", 0).build().mesh.bounds, Composed("mug", 1).build().mesh.bounds)


def test_any_prefix_is_balanced_and_longer_lists_only_append() -> None:
    few, many = shapes([], 300), shapes([], 1000)
    assert many[:300] == few and len(set(many)) == 1000
    for count in (300, 1000):
        of = Counter(shape.category for shape in many[:count])
        shares = [of[name] / PER_ROUND.get(name, 1) for name in CATEGORIES]
        assert max(shares) - min(shares) <= 1
    with pytest.raises(UserError, match="no category of primitives 'spaceship'"):
        shapes(["spaceship"], 3)


def test_items_say_what_they_show_without_building_it() -> None:
    items = {item.id: item for item in PrimitivesSource([], 1000).items()}
    assert items["mug-00000"].caption == "a mug"
    assert items["letter-00000"].caption == "the letter A"
    assert items["composition-00001"].caption == "a composition of 5 primitives"
    assert items["glasses-00002"].caption == "a pair of glasses"
    assert {glyph_of(seed) for seed in range(36)} == set(GLYPHS)
    assert {count_of(seed) for seed in range(9)} == set(range(1, 10))


@pytest.mark.parametrize("category", ["glasses", "umbrella", "key", "spring"])
def test_the_thinnest_survive_the_grid(category: str) -> None:
    mesh, _ = normalize_mesh(Composed(category, 0).build().mesh)
    assert len(solidify(mesh, 96).split(only_watertight=False)) == 1


def test_solids_have_the_volumes_that_geometry_gives() -> None:
    assert rod((0, 0, 0), (0, 0, 2), 0.5, 0).volume() == pytest.approx(np.pi * 0.25 * 2 / 3, rel=0.02)
    assert torus(1, 0.2).volume() == pytest.approx(2 * np.pi**2 * 0.04, rel=0.02)
    assert lathe([(0.5, 0), (0.5, 1)], smooth=False).volume() == pytest.approx(np.pi * 0.25, rel=0.01)
    assert tube([(0, 0, 0), (1, 0, 0), (2, 0, 0)], 0.1).volume() == pytest.approx(
        np.pi * (0.02 + 4e-3 / 3), rel=0.06
    )
    assert round_box(1, 2, 3, 1e-3).volume() == pytest.approx(6, rel=0.01)
    cup = vessel([(0.5, 0), (0.5, 1)], wall=0.1)
    assert cup.volume() == pytest.approx(np.pi * (0.25 - 0.16 * 0.9), rel=0.02)


def test_warps_keep_what_they_should() -> None:
    bar = box(0.2, 1, 0.2)
    assert twist(bar, 90).volume() == pytest.approx(bar.volume(), rel=0.02)
    assert bend(bar, 60).volume() == pytest.approx(bar.volume(), rel=0.02)
    assert taper(bar, 0.5).volume() == pytest.approx(0.04 * (1 + 0.5 + 0.25) / 3, rel=0.02)


def test_faces_know_their_part() -> None:
    vertices, faces, part, names = to_arrays({"low": box(1, 1, 1), "high": box(1, 1, 1, (0, 2, 0))})
    assert names == ["low", "high"]
    assert np.array_equal(part, (vertices[faces].mean(axis=1)[:, 1] > 1).astype(int))
    assert len(vertices) == 2 * 24  # a box has no smooth edge: four vertices of their own for each side


def test_letters_without_their_fonts_end_before_any_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PrepareConfig(
        source=SourceName.primitives, categories=["mug", "letter"], shapes=7, output=str(tmp_path / "out")
    )
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
        with pytest.raises(UserError, match=f"letters need {FONTS[0]} in .* reinstall matplotlib"):
            prepare_data(config)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"letters need matplotlib's fonts: pip install 'elastic3d\[data\]'"):
        prepare_data(config)
    assert not (tmp_path / "out").exists()
    assert len(PrimitivesSource(["mug"], 7).items()) == 7
