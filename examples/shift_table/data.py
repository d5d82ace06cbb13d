"""The data sets: captioned "web" characters to pre-train on, real digits to fine-tune on, five shifts to be tested on.

The task is to name the digit. In distribution (ID) are real scans, drawn light on dark; out of distribution (OOD) are
the same test digits, and digits in three fonts used nowhere else, in five styles that fine-tuning never shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import open_clip
import torch
from torch import Generator, Tensor

from shift_table.drawing import STYLES, glyph_masks, handwriting_masks, render, thicken, thin

FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmss10", "cmb10"),
)
HELD_OUT_FONTS = ("cmr10", "cmtt10", "cmti10")  # in the OOD sets alone
DIGITS = "0123456789"
CHARACTERS = DIGITS + "ABEFGHKMNPRTWXY"  # no letter that looks like a digit
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASSES = tuple(f"digit {word}" for word in DIGIT_WORDS)
NAMES = CLASSES + tuple(f"letter {letter}" for letter in CHARACTERS[len(DIGITS) :])
TEMPLATES = ("a photo of the {}.", "a picture of the {}.", "an image of the {}.", "the {}.")
STYLE_WORDS = {
    "plain": ("photo", "bright photo"),
    "print": ("print", "black on white print"),
    "sketch": ("sketch", "outline"),
    "clutter": ("cluttered photo", "photo on a busy background"),
    "rotated": ("rotated photo", "tilted photo"),
    "noisy": ("noisy photo", "grainy photo"),
    "blurred": ("blurry photo", "pixelated photo"),
}
OOD_STYLES = ("sketch", "clutter", "rotated", "noisy", "print")
ID_DOMAIN = "digits"

CONTEXT_LENGTH = 16  # tokens in a caption
DATA_SEED = 123  # the data are the same in every run: --seeds varies the training alone
HANDWRITING_SHARE = 0.03  # of the pre-training pictures: web data have seen some handwriting


class Split(NamedTuple):
    """Pictures ``[N, 3, 32, 32]`` and the digit on each, ``[N]``."""

    images: Tensor
    target: Tensor

    def batches(self, size: int = 600) -> Iterator[tuple[Tensor, Tensor]]:
        """The split in order, ``size`` pictures at a time."""
        return zip(torch.split(self.images, size), torch.split(self.target, size), strict=True)

    def to(self, device: torch.device) -> Split:
        """The split on ``device``."""
        return Split(self.images.to(device), self.target.to(device))


class Data(NamedTuple):
    """What fine-tuning needs: the temperature is fitted on ``validation``, the table is made from ``test``."""

    train: Split
    validation: Split
    test: dict[str, Split]  # the ID set first, then the five OOD sets


class HandwritingIndices(NamedTuple):
    """Which of the 1,797 scans serve what; no scan serves twice."""

    pretrain: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


def handwriting_indices() -> HandwritingIndices:
    """A fixed random division of the scans: 200 to pre-train, 300 to fine-tune, 400 to validate and 897 to test on."""
    order = torch.randperm(1797, generator=Generator().manual_seed(DATA_SEED))
    return HandwritingIndices(*torch.split(order, [200, 300, 400, 897]))


def make_data() -> Data:
    """Draws the ID splits and the five OOD sets; each OOD set is half test digits and half held-out fonts."""
    scans, digits = handwriting_masks()
    indices = handwriting_indices()
    glyphs, glyph_digits = glyph_masks(HELD_OUT_FONTS, DIGITS)
    glyphs, glyph_digits = torch.cat([glyphs, thicken(glyphs, 3), thicken(glyphs, 5)]), glyph_digits.repeat(3)
    generator = Generator().manual_seed(DATA_SEED)

    def scanned(which: Tensor, style: str) -> Split:
        return Split(render(scans[which], style, generator), digits[which])

    train, validation = scanned(indices.train, "plain"), scanned(indices.validation, "plain")
    test = {ID_DOMAIN: scanned(indices.test, "plain")}
    for style in OOD_STYLES:
        real = scanned(indices.test, style)
        chosen = torch.randint(0, len(glyphs), (len(indices.test),), generator=generator)
        drawn = Split(render(glyphs[chosen], style, generator), glyph_digits[chosen])
        test[style] = Split(torch.cat([real.images, drawn.images]), torch.cat([real.target, drawn.target]))
    return Data(train, validation, test)


class WebData:
    """An endless supply of captioned characters in every style, made on the fly; what pre-training sees."""

    def __init__(self, generator: Generator) -> None:
        glyphs, self.names = glyph_masks(FONTS, CHARACTERS)
        self.strokes = torch.stack([glyphs, thicken(glyphs, 3), thicken(glyphs, 5), thin(glyphs, 3)])
        scans, digits = handwriting_masks()
        own = handwriting_indices().pretrain
        self.scans, self.digits = scans[own], digits[own]
        self.generator = generator

    def batch(self, per_style: int) -> tuple[Tensor, Tensor]:
        """``per_style`` pictures in each style and their tokenised captions."""
        images, captions = [], []
        for style in STYLES:
            masks, names = self._characters(per_style)
            images.append(render(masks, style, self.generator))
            captions += [self._caption(style, NAMES[name]) for name in names.tolist()]
        return torch.cat(images), tokenize(captions)

    def _characters(self, n: int) -> tuple[Tensor, Tensor]:
        glyph, stroke, scan = (self._integers(len(of), n) for of in (self.names, self.strokes, self.digits))
        by_hand = torch.rand(n, generator=self.generator) < HANDWRITING_SHARE
        masks = torch.where(by_hand.view(n, 1, 1, 1), self.scans[scan], self.strokes[stroke, glyph])
        return masks, torch.where(by_hand, self.digits[scan], self.names[glyph])

    def _caption(self, style: str, name: str) -> str:
        """Half of the captions tell the style, as some captions on the web do."""
        tells_style, which = self._integers(2, 1).item(), int(self._integers(4, 1).item())
        return f"a {STYLE_WORDS[style][which % 2]} of the {name}." if tells_style else TEMPLATES[which].format(name)

    def _integers(self, below: int, n: int) -> Tensor:
        return torch.randint(0, below, (n,), generator=self.generator)


def tokenize(captions: list[str]) -> Tensor:
    """Captions as open_clip's tokens, ``[N, 16]``."""
    return torch.stack([_tokens(caption) for caption in captions])


@cache
def _tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)


@cache
def _tokens(caption: str) -> Tensor:
    tokens: Tensor = _tokenizer()(caption)
    return tokens[0]


def class_captions() -> Tensor:
    """The ten digits in the four templates, as tokens ``[10, 4, 16]``."""
    return torch.stack([tokenize([template.format(name) for template in TEMPLATES]) for name in CLASSES])


def context_captions() -> Tensor:
    """Prompts that name a style and no character, as tokens ``[M, 16]``."""
    return tokenize([f"a {word} of the" for words in STYLE_WORDS.values() for word in words])


def random_texts(generator: Generator, n: int = 80, length: int = 8) -> Tensor:
    """Random words of the vocabulary between its marks of start and end, as tokens ``[n, 16]``."""
    first, last = _tokenizer().sot_token_id, _tokenizer().eot_token_id
    words = torch.randint(0, first, (n, length), generator=generator)
    marked = torch.cat([torch.full((n, 1), first), words, torch.full((n, 1), last)], 1)
    return torch.nn.functional.pad(marked, (0, CONTEXT_LENGTH - marked.shape[1]))
