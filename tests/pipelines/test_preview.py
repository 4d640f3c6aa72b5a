import numpy as np
import trimesh
from PIL import Image

from elastic3d.pipelines.preview import turntable


def test_the_strip_begins_with_the_image_the_model_saw():
    image = Image.new("RGB", (224, 224), "red")
    strip = turntable(trimesh.creation.icosphere(2), views=3, size=32, image=image)
    assert strip.size == (4 * 32, 32) and strip.mode == "RGB"
    assert np.array_equal(np.asarray(strip)[:, :32], np.full((32, 32, 3), [255, 0, 0]))
    assert turntable(trimesh.creation.icosphere(2), views=3, size=32).size == (3 * 32, 32)


def test_every_side_is_as_bright():
    strip = np.asarray(turntable(trimesh.creation.icosphere(3), views=8, size=48)).astype(float)
    means = [strip[:, i * 48 : (i + 1) * 48].mean() for i in range(8)]
    assert max(means) - min(means) < 1, "the light goes round with the camera"
