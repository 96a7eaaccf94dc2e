"""Writes image files of every kind for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """An image with smooth areas, edges and noise, in which errors of resizing are visible."""
    rng = np.random.default_rng(seed + width * 7919 + height)
    bands = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    levels = np.stack([128 + 100 * np.sin(x / (5 + b) + y / (9 - b)) for b in range(bands)], axis=-1)
    levels += rng.normal(0, 25, levels.shape)
    levels[height // 3 : height // 2, width // 4 : width // 2] = 255
    pixels = levels.clip(0, 255).astype(np.uint8)
    if mode == "CMYK":
        return Image.frombytes("CMYK", (width, height), pixels.tobytes())
    return Image.fromarray(pixels.squeeze(-1) if bands == 1 else pixels)


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def write_all(folder: Path) -> dict[str, Path]:
    """Writes the files and returns the path of each by its name."""
    files: dict[str, Path] = {}

    def save(name: str, image: Image.Image, **options: Any) -> None:
        files[name] = folder / name
        image.save(files[name], **options)

    for quality, subsampling in ((10, 2), (50, 1), (75, 2), (95, 0), (100, 0)):
        save(f"q{quality}.jpg", noise(333, 217), quality=quality, subsampling=subsampling)
    save("progressive.jpg", noise(301, 200), progressive=True)
    save("gray.jpg", noise(120, 90, "L"))
    save("cmyk.jpg", noise(150, 130, "CMYK"))
    for orientation in range(1, 9):
        save(f"exif{orientation}.jpg", noise(180, 75), exif=exif(orientation))
    save("exif6.png", noise(90, 61), exif=exif(6))
    save("rgb.png", noise(200, 133))
    save("rgba.png", noise(140, 111, "RGBA"))
    save("l.png", noise(140, 111, "L"))
    save("la.png", noise(140, 111, "LA"))
    save("1bit.png", noise(140, 111, "L").convert("1"))
    save("palette.png", noise(140, 111).convert("P", palette=Image.Palette.ADAPTIVE, colors=64))
    palette = noise(140, 111).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    save("palette-transparent.png", palette, transparency=5)
    save("palette-alpha.png", palette, transparency=bytes(range(0, 256, 4)))
    save("rgb-transparent.png", Image.new("RGB", (50, 40), (1, 2, 3)), transparency=(1, 2, 3))
    ramp = (np.arange(100 * 80, dtype=np.uint32) * 8).astype(np.uint16).reshape(80, 100)
    save("16bit.png", Image.fromarray(ramp))
    save("16bit.tiff", Image.fromarray(ramp))
    save("cmyk.tiff", noise(90, 80, "CMYK"))
    save("frames.gif", noise(100, 80).convert("P"), save_all=True, append_images=[noise(100, 80, seed=9).convert("P")])
    save("transparent.gif", palette, transparency=5)
    save("lossy.webp", noise(140, 111), quality=60)
    save("alpha.webp", noise(140, 111, "RGBA"), lossless=True)
    save("frames.webp", noise(100, 80), save_all=True, append_images=[noise(100, 80, seed=9)])
    save("frames.png", noise(100, 80), save_all=True, append_images=[noise(100, 80, seed=9)])
    save("rgb.bmp", noise(77, 51))
    save("rgb.ppm", noise(77, 51))
    return files
