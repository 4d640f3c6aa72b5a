"""Every kind of image file becomes RGBA or one clear sentence."""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from elastic3d.errors import UserError
from elastic3d.models.images import IMAGE_SUFFIXES, load_image
from elastic3d.serve.uploads import decode_image


def _gradient(side: int = 64) -> Image.Image:
    ramp = np.linspace(0, 255, side).astype(np.uint8)
    return Image.fromarray(
        np.stack(
            [np.tile(ramp, (side, 1)), np.tile(ramp, (side, 1)).T, np.full((side, side), 90)], -1
        ).astype(np.uint8)
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgba(mode: str) -> None:
    image = _gradient().convert("L").convert(mode) if mode in ("1", "PA") else _gradient().convert(mode)
    result = load_image(image)
    assert result.mode == "RGBA" and result.size == (64, 64)
    if mode in ("RGB", "CMYK", "YCbCr", "HSV"):
        difference = np.asarray(result.convert("RGB")).astype(int) - np.asarray(_gradient())
        assert np.abs(difference).max() <= 6


@pytest.mark.parametrize(
    "suffix",
    ["png", "jpg", "jfif", "jpe", "webp", "bmp", "dib", "gif", "tif", "ppm", "pgm", "jp2", "jpx", "avif"],
)
def test_every_format(tmp_path: Path, suffix: str) -> None:
    """Of a file, and of an upload."""
    path = tmp_path / f"an image (1), x=y.{suffix}"
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")
    _gradient().save(path, {"jfif": "JPEG", "jpe": "JPEG"}.get(suffix))
    assert suffix in {name[1:] for name in IMAGE_SUFFIXES} and load_image(path).size == (64, 64)
    assert decode_image(path.read_bytes(), 64 * 64).tobytes() == load_image(path).tobytes()


def test_sixteen_bits_and_floats_keep_their_range(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 1, 64), (64, 1))
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "sixteen.png")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    for name in ("sixteen.png", "float.tif"):
        grey = np.asarray(load_image(tmp_path / name))[..., 0].astype(int)
        assert np.abs(grey - ramp * 255).max() <= 1, name


def test_palette_transparency_is_kept(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "p.png", transparency=0)
    alpha = np.asarray(load_image(tmp_path / "p.png"))[..., 3]
    assert alpha[0, 0] == 255 and alpha[1, 1] == 0


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((4, 4)) == (255, 0, 0, 255)


def _png_bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def _png(cut: int | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()[:cut]


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: None, "there is no file"),
    "folder": (lambda p: p.mkdir(), "is a folder, expected an image file"),
    "empty": (lambda p: p.write_bytes(b""), "is empty, expected an image"),
    "text": (lambda p: p.write_text("hello"), "is no image, expected PNG"),
    "truncated": (lambda p: p.write_bytes(_png(2000)), "is broken: "),
    "header only": (lambda p: p.write_bytes(_png(40)), "is broken|is no image"),
    "flipped bytes": (lambda p: p.write_bytes(_png()[:500] + b"\0" * 400 + _png()[900:]), "is broken: "),
    "bomb": (lambda p: p.write_bytes(_png_bomb(60_000)), "would unpack to more than"),
    "small bomb": (lambda p: p.write_bytes(_png_bomb(10_000)), "would unpack to more than"),
    "script": (lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "is no image"),
    "name too long": (lambda p: None, "can't read .*: file name too long|File name too long"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_sentence(tmp_path: Path, name: str) -> None:
    make, message = BROKEN[name]
    path = tmp_path / ("x" * 300 if name == "name too long" else "broken.png")
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        load_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def _png16(colour: int, pixels: np.ndarray, transparent: bytes) -> bytes:
    """A 16-bit PNG with a tRNS chunk, which Pillow can't write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [(b"IHDR", head), (b"tRNS", transparent), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*entry) for entry in chunks)


@pytest.mark.parametrize("colour", [0, 2], ids=["grey", "rgb"])
@pytest.mark.parametrize(
    "read",
    [load_image, lambda path: load_image(Image.open(path)), lambda path: decode_image(path.read_bytes(), 36)],
    ids=["file", "opened", "upload"],
)
def test_sixteen_bits_keep_their_transparent_value(
    tmp_path: Path, colour: int, read: Callable[[Path], Image.Image]
) -> None:
    pixels = np.full((6, 6) if colour == 0 else (6, 6, 3), 1000)
    pixels[2:4, 1:5] = 40_000
    (tmp_path / "a.png").write_bytes(
        _png16(colour, pixels, struct.pack(">H", 1000) * (1 if colour == 0 else 3))
    )
    alpha = np.asarray(read(tmp_path / "a.png"))[..., 3]
    assert (alpha == 255).sum() == 8 and (alpha[2:4, 1:5] == 255).all() and alpha[0, 0] == 0


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_heic_names_the_package_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brand: bytes
) -> None:
    (tmp_path / "a.jpg").write_bytes(struct.pack(">I", 24) + b"ftyp" + brand + bytes(64))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match=r"a.jpg is a HEIC image.*pip install pillow-heif"):
        load_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"the upload is a HEIC image.*pip install pillow-heif"):
        decode_image((tmp_path / "a.jpg").read_bytes(), 64)


def test_a_pipe_or_device_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", Path("/dev/zero")):
        with pytest.raises(UserError, match="is a pipe or a device, expected an image file"):
            load_image(path)
