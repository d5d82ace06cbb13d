"""From ink to pictures: characters as masks, and the styles they are drawn in.

A mask is the ink of one character, ``[1, 64, 64]`` in [0, 1], twice the size of a picture. It comes from a font that
matplotlib ships or from a real scan in scikit-learn's digits. ``render`` poses it, colours it and shrinks it to a
``[3, 32, 32]`` picture in [0, 1]. Randomness always comes from the generator passed in, so pictures are reproducible.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images
from torch import Generator, Tensor

PICTURE_SIZE = 32
MASK_SIZE = 64
GLYPH_SIZE = 52  # the longer side of a character inside its mask
STYLES = ("plain", "print", "sketch", "clutter", "rotated", "noisy", "blurred")


def glyph_masks(fonts: tuple[str, ...], characters: str) -> tuple[Tensor, Tensor]:
    """Every character in every font: masks ``[N, 1, 64, 64]`` and each one's index in ``characters``, ``[N]``."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    masks = []
    for name in fonts:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 2 * GLYPH_SIZE)
        masks += [_glyph(font, character) for character in characters]
    return torch.stack(masks), torch.arange(len(characters)).repeat(len(fonts))


def _glyph(font: ImageFont.FreeTypeFont, character: str) -> Tensor:
    canvas = Image.new("L", (4 * GLYPH_SIZE, 4 * GLYPH_SIZE))
    ImageDraw.Draw(canvas).text((2 * GLYPH_SIZE, 2 * GLYPH_SIZE), character, fill=255, font=font, anchor="mm")
    ink = canvas.crop(canvas.getbbox())
    shrink = GLYPH_SIZE / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * shrink)), max(1, round(ink.height * shrink))), Image.Resampling.BICUBIC)
    mask = Image.new("L", (MASK_SIZE, MASK_SIZE))
    mask.paste(ink, ((MASK_SIZE - ink.width) // 2, (MASK_SIZE - ink.height) // 2))
    return torch.from_numpy(np.array(mask)).float().unsqueeze(0) / 255


def handwriting_masks() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 scans of handwritten digits, 8 x 8: masks ``[1797, 1, 64, 64]`` and digits ``[1797]``."""
    digits = load_digits()
    ink = F.pad(torch.from_numpy(digits.images).float().unsqueeze(1) / 16, (1, 1, 1, 1))
    masks = F.interpolate(ink, size=MASK_SIZE, mode="bicubic", align_corners=False).clamp(0, 1)
    return masks, torch.from_numpy(digits.target).long()


def thicken(masks: Tensor, width: int) -> Tensor:
    """Strokes that grow by ``width // 2`` pixels on each side."""
    return F.max_pool2d(masks, width, stride=1, padding=width // 2)


def thin(masks: Tensor, width: int) -> Tensor:
    """Strokes that shrink by ``width // 2`` pixels on each side."""
    return -thicken(-masks, width)


def render(masks: Tensor, style: str, generator: Generator) -> Tensor:
    """Masks ``[N, 1, 64, 64]`` as pictures ``[N, 3, 32, 32]`` in one of ``STYLES``; poses and colours are random."""
    n = len(masks)
    if style == "sketch":
        masks = (thicken(masks, 5) - thin(masks, 5)).clamp(0, 1)  # the outline
    ink = _pose(masks, generator, rotated=style == "rotated")

    if style == "clutter":
        paper = _photo_crops(n, generator)
        tint = 0.35 * torch.rand(n, 3, 1, 1, generator=generator)
        colour = torch.where(paper.mean((1, 2, 3), keepdim=True) > 0.5, tint, 1 - tint)  # dark ink on a bright photo
    elif style in ("print", "sketch"):
        colour, paper = _uniform(n, 0.0, 0.3, generator), _uniform(n, 0.7, 1.0, generator)
    else:
        colour, paper = _uniform(n, 0.8, 1.0, generator), _uniform(n, 0.0, 0.15, generator)
    pictures = (colour * ink + paper * (1 - ink)).expand(n, 3, PICTURE_SIZE, PICTURE_SIZE)

    if style == "noisy":
        noise = torch.randn(pictures.shape, generator=generator)
        pictures = pictures + noise * _uniform(n, 0.2, 0.45, generator)
    elif style == "blurred":
        side = 8 if torch.rand((), generator=generator) < 0.5 else 12
        coarse = F.interpolate(pictures, size=side, mode="area")
        pictures = F.interpolate(coarse, size=PICTURE_SIZE, mode="bicubic", align_corners=False)
    return pictures.clamp(0, 1)


def _uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)


def _pose(masks: Tensor, generator: Generator, *, rotated: bool) -> Tensor:
    """Turns, sizes, slants and moves each mask a little (``rotated``: by 20 to 50 degrees): ``[N, 1, 32, 32]``."""
    n = len(masks)
    angle = _uniform(n, -0.15, 0.15, generator)
    if rotated:
        side = torch.where(_uniform(n, -1, 1, generator) < 0, -1.0, 1.0)
        angle = side * _uniform(n, 0.35, 0.9, generator)
    size = _uniform(n, 0.8, 1.15, generator)
    slant = _uniform(n, -0.15, 0.15, generator)
    right, down = _uniform(n, -0.12, 0.12, generator), _uniform(n, -0.12, 0.12, generator)
    matrix = torch.cat(
        [angle.cos() / size, (angle.sin() + slant) / size, right, -angle.sin() / size, angle.cos() / size, down]
    )
    matrix = matrix.view(2, 3, n).permute(2, 0, 1)
    grid = F.affine_grid(matrix, [n, 1, PICTURE_SIZE, PICTURE_SIZE], align_corners=False)
    return F.grid_sample(F.avg_pool2d(masks, 3, stride=1, padding=1), grid, align_corners=False)


@cache
def _photos() -> Tensor:
    """Scikit-learn's two sample photographs at half their size, ``[2, 3, 214, 320]``."""
    photos = [Image.fromarray(photo).resize((320, 214)) for photo in load_sample_images().images]
    return torch.stack([torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 255 for photo in photos])


def _photo_crops(n: int, generator: Generator) -> Tensor:
    photos = _photos()
    _, _, height, width = photos.shape
    which = torch.randint(0, len(photos), (n,), generator=generator).tolist()
    tops = torch.randint(0, height - PICTURE_SIZE, (n,), generator=generator).tolist()
    lefts = torch.randint(0, width - PICTURE_SIZE, (n,), generator=generator).tolist()
    crops = zip(which, tops, lefts, strict=True)
    return torch.stack([photos[w, :, y : y + PICTURE_SIZE, x : x + PICTURE_SIZE] for w, y, x in crops])
