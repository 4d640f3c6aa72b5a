"""Make an image from a prompt.

    python scripts/gen_image.py prompt="a wooden bar chair" output=chair.png
    python scripts/gen_image.py backbone=flux weights=/models/FLUX.1-dev prompt="a red fox" output=fox.png budget=0.5
    python scripts/gen_image.py backbone=qwen_image weights=/models/Qwen-Image prompt="a red fox" output=fox.png

The folder of the weights is the one that is published, unchanged; routers are a folder of their own. With
num_samples= there are several images, fox_0.png and so on. Each holds the metadata of how it was made.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

from _cli import run

from elastic3d.elastic.config import ElasticOptions
from elastic3d.pipelines.options import DEFAULT_IMAGE_MODEL, GenerateImageConfig, parse_size
from elastic3d.utils.files import check_paths, check_there


def main(config: GenerateImageConfig) -> int:
    """Load the pipeline, generate in batches, save each image as soon as its batch is through."""
    start, output = time.perf_counter(), Path(config.output)
    targets = [output]
    if config.num_samples > 1:
        targets = [output.with_stem(f"{output.stem}_{n}") for n in range(config.num_samples)]
    inputs = {name: getattr(config, name) for name in ("weights", "routers", "lora", "calibration")}
    check_there({name: inputs[name] for name in ("lora", "calibration")})  # before imports that take seconds
    check_paths(inputs, {"output": targets, "trace": config.trace})
    from tqdm import tqdm

    from elastic3d.models.images import save_image
    from elastic3d.pipelines.preview import check_routes, draw_routes, route_title
    from elastic3d.pipelines.text_to_3d import known_nouns, prompt_warning
    from elastic3d.pipelines.text_to_image import TextToImagePipeline

    weights = config.weights or DEFAULT_IMAGE_MODEL
    pipeline = TextToImagePipeline.from_pretrained(
        config.backbone,
        weights,
        config.routers or None,
        config.lora or None,
        config.device,
        config.dtype,
        config.offload,
        config.calibration or None,
    )
    if text := prompt_warning(config.prompt, known_nouns(weights)):
        warnings.warn(text, stacklevel=1)  # named by its sentence alone
    asked: dict[str, Any] = {
        "quality": config.quality,
        "guidance": config.guidance,
        "size": parse_size(config.size),
    }
    if config.trace:
        requested = ElasticOptions(**ElasticOptions.of(config))
        check_routes(config.trace, pipeline.configured(requested, steps=config.steps, **asked).elastic)
    panels = []
    bar = tqdm(total=config.num_samples, unit="image", leave=False, disable=None)
    for first in range(0, config.num_samples, config.batch_size):
        numbers = range(first, min(first + config.batch_size, config.num_samples))
        results = pipeline(
            [config.prompt] * len(numbers),
            [config.seed + n for n in numbers],
            steps=config.steps,
            **asked,
            on_step=lambda done, steps: bar.set_postfix_str(f"step {done}/{steps}"),
            **ElasticOptions.of(config),
        )
        for target, result in zip([targets[n] for n in numbers], results, strict=True):
            save_image(result.image, target, result.metadata)
            bar.update()
            seconds = time.perf_counter() - start
            bar.write(f"{target}: {result.image.width} x {result.image.height}, {seconds:.1f} s")
            if "routes" in result.metadata:
                panels.append((route_title(target.name, result.metadata), result.metadata["routes"]))
    bar.close()
    if config.trace:
        draw_routes(panels, Path(config.trace))
    return 0


if __name__ == "__main__":
    run(main, GenerateImageConfig, "gen_image")
