"""The pixels of Pillow's images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_picture(value: object) -> bool:
    """Say whether something is an image of Pillow, which is not imported for it."""
    return any((base.__module__, base.__name__) == ("PIL.Image", "Image") for base in type(value).__mro__)


class PixelReader:
    """Reads images alike: the first one says whether all are gray, and of how many bits."""

    def __init__(self) -> None:
        self.count = 0
        self._gray = False
        self._depth = 8

    def read(self, image: Any) -> NDArray:
        """Return the pixels, shape (channels, height, width), uint8 or uint16; ValueError where they have no range."""
        if image.mode == "F":
            raise ValueError("its pixels are floats, of no known range; give arrays in an .npz")
        depth = 16 if image.mode.startswith("I") else 8
        if not self.count:
            self._depth, self._gray = depth, depth == 16 or image.mode in ("1", "L")
        if depth != self._depth:
            raise ValueError(f"it has {depth} bits a pixel, the ones before it have {self._depth}")
        # What Pillow converts from 16 bits to 8 it cuts off at 255.
        pixels = _deep_pixels(image) if depth == 16 else np.asarray(image.convert("L" if self._gray else "RGB"))
        self.count += 1
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _deep_pixels(image: Any) -> NDArray:
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels are not of 8 or 16 bits")
    return pixels.astype(np.uint16)
