"""Synthetic images for verification, calibration and benchmarks, the same on every machine."""

from __future__ import annotations

from PIL import Image, ImageDraw


def picture(width: int, height: int, seed: int) -> Image.Image:
    """An RGB image with edges, gradients and text. Equal arguments give equal images.

    Args:
        width: width in pixels.
        height: height in pixels.
        seed: number that varies shapes, colors and text.
    """
    shades = Image.linear_gradient("L").resize((width, height))
    image = Image.merge("RGB", (shades, shades.rotate(180), shades.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    draw = ImageDraw.Draw(image)
    for index in range(6):
        x, y = (37 * (seed + index) * (index + 3)) % width, (53 * (seed + 2 * index) + 11) % height
        box = (x, y, x + width // (3 + index), y + height // (2 + index))
        color = tuple((seed * 97 + index * 71 + channel * 113) % 256 for channel in range(3))
        (draw.ellipse if index % 2 else draw.rectangle)(box, fill=color)
    draw.text((width // 8, height // 3), f"Invoice {1000 + seed}", fill=(0, 0, 0))
    draw.text((width // 8, height // 2), "Total 42.50 EUR", fill=(255, 255, 255))
    return image
