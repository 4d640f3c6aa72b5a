"""What a benchmark of pictures made so far: one file a run and seed, whole or not there: a kill loses little."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic3d.benchmark.methods import Run
from elastic3d.utils.files import atomic_path

Pictures = NDArray[np.uint8]  # (H,W,3), or (P,H,W,3)
OPEN = 6  # files kept in memory


@dataclass(frozen=True)
class PromptJob:
    """One picture to make by each run."""

    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """The prompt."""
        return self.prompt

    @property
    def label(self) -> str:
        """The prompt."""
        return self.prompt


@dataclass
class Made:
    """A picture (H,W,3) and its record: `status`, `error`, `receipt`."""

    picture: Pictures
    record: dict[str, Any]


class PictureStore:
    """`folder`/runs/<run>/seed-<s>.npz: `pictures` (P,H,W,3) uint8 and `records`, JSON, by prompt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[Path, dict[str, Made]] = OrderedDict()

    def path(self, run: Run, seed: int) -> Path:
        """Where the pictures of a run and seed are, or would be."""
        return self.folder / "runs" / run.name / f"seed-{seed}.npz"

    def record(self, run: Run, job: PromptJob) -> dict[str, Any] | None:
        """What was noted of a picture; None where it is still to be made."""
        made = self._read(self.path(run, job.seed)).get(job.prompt)
        return made.record if made else None

    def pictures(self, run: Run, seed: int, prompts: Sequence[str]) -> Pictures:
        """Pictures (P,H,W,3) of prompts that are all made."""
        made = self._read(self.path(run, seed))
        return np.stack([made[prompt].picture for prompt in prompts])

    def has(self, run: Run, seed: int, prompts: Sequence[str]) -> bool:
        """Whether all of them are made."""
        return self._read(self.path(run, seed)).keys() >= set(prompts)

    def save(self, run: Run, seed: int, made: dict[str, Made]) -> None:
        """Add pictures to those that are there."""
        path = self.path(run, seed)
        entries = self._read(path)
        entries.update(made)
        records = json.dumps({prompt: entry.record for prompt, entry in entries.items()})
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            pictures = np.stack([entry.picture for entry in entries.values()])
            np.savez_compressed(file, pictures=pictures, records=np.frombuffer(records.encode(), np.uint8))

    def _read(self, path: Path) -> dict[str, Made]:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        entries: dict[str, Made] = {}
        if path.is_file():
            with np.load(path) as file:
                records = json.loads(file["records"].tobytes())
                pictures = file["pictures"]
            pairs = zip(records.items(), pictures, strict=True)
            entries = {prompt: Made(picture, record) for (prompt, record), picture in pairs}
        self._open[path] = entries
        if len(self._open) > OPEN:
            self._open.popitem(last=False)
        return entries
