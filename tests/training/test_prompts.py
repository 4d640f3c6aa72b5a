"""Prompts: the committed list, and how it was made."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from elastic3d.benchmark.config import DEFAULT_PROMPTS
from elastic3d.benchmark.images import read_prompts
from elastic3d.errors import UserError
from elastic3d.models.text_encoder import MiniLM
from elastic3d.training.image_data import COLOURS, Captioned, noun_in, with_article
from elastic3d.training.prompts import held_out_prompts, write_prompts

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_prompts_are_many_different_and_short_enough():
    prompts = read_prompts(ROOT / DEFAULT_PROMPTS)
    encoder = MiniLM(16)
    assert len(prompts) >= 256 and max(map(encoder.count, prompts)) <= 16
    nouns = {noun_in(prompt) for prompt in prompts}
    assert len(nouns) > 25 and not nouns & set(COLOURS)
    assert sum(any(f" {colour} " in prompt for colour in COLOURS) for prompt in prompts) > 100


class Views:
    """Groups of three views of one thing."""

    missing = 0

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, size: int) -> list[Captioned]:
        image, plain = Image.new("RGB", (size, size)), f"a thing {index}"
        return [Captioned(image, [f"a red thing {index} seen from view {v}", plain]) for v in range(3)]


def test_prompts_come_from_all_groups_in_a_fixed_order():
    prompts = held_out_prompts(Views(40), 20)
    assert len(set(prompts)) == 20 and prompts == held_out_prompts(Views(40), 20)
    assert {int(p.split()[3]) > 20 for p in prompts} == {True, False} and {p[-1] for p in prompts} == set(
        "012"
    )
    short = held_out_prompts(Views(5), 5, fits=lambda prompt: "seen" not in prompt)
    assert sorted(short) == [f"a thing {i}" for i in range(5)]
    with pytest.raises(UserError, match="there are only 3 different captions, expected 4"):
        held_out_prompts(Views(3), 4)


def test_files_of_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    write_prompts(["a bed", "a cup"], path)
    assert read_prompts(path) == ["a bed", "a cup"]
    for text, message in (("\n# a\n", "holds no prompt"), ("a bed\na bed\n", "the prompt 'a bed' twice")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no text file"):
        read_prompts(path)


@pytest.mark.parametrize("colour", [None, *COLOURS])
@pytest.mark.parametrize("place", ["", " seen from the front and above", " seen at an angle"])
@pytest.mark.parametrize("ground", ["", ", on a blue background"])
def test_nouns_are_found_in_captions(colour, place, ground):
    coloured = f"{colour} office chair" if colour else "office chair"
    assert noun_in(f"{with_article(coloured)}{place}{ground}") == "office chair"
