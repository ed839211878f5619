"""PNG without delay: one byte a pixel, in the colours that our drawings are made of."""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache
from itertools import combinations

import numpy as np
from scipy.spatial import cKDTree

from .. import style as s

_ROWS = 64  # looked up at once: what lies between stays in the cache


def quick_png(pixels: np.ndarray, level: int = 1) -> bytes:
    """Opaque pixels (row, column, RGBA) uint8 as PNG, each in the nearest colour of :func:`palette`.

    Parameters
    ----------
    level
        Of zlib: 1 packs fast, 6 takes twice as long and saves a sixth of the bytes.

    References
    ----------
    ISO/IEC 15948:2004, Portable Network Graphics, clauses 5 (chunks), 9 (filter type 0) and 11.2 (IHDR, PLTE).
    """
    height, width, _ = pixels.shape
    whole = np.ascontiguousarray(pixels).view("<u4")[..., 0]  # 0xAABBGGRR
    rows = np.zeros((height, 1 + width), dtype=np.uint8)  # each row begins with its filter: none
    for first in range(0, height, _ROWS):
        part = whole[first : first + _ROWS]
        five_bits_each = (part & 0xF8) << 7 | (part >> 6) & 0x3E0 | (part >> 19) & 0x1F
        rows[first : first + _ROWS, 1:] = _nearest()[five_bits_each]
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits a pixel, palette, not interlaced
    data = zlib.compress(rows, level)
    parts = ((b"IHDR", header), (b"PLTE", palette().tobytes()), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _rgb(codes) -> np.ndarray:
    return np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in codes], dtype=float)


@lru_cache(maxsize=1)
def palette() -> np.ndarray:
    """(colour, 3) uint8, at most 256: ours, their tints as edges have them, and mixtures where dots overlap."""
    ours, dots = _rgb((*s.CATEGORIES, s.INK, s.QUIET)), _rgb(s.CATEGORIES[:-1])
    mixed = [share * a + (1 - share) * b for a, b in combinations(dots, 2) for share in (0.25, 0.5, 0.75)]
    tints = [255 + (ours - 255) * share for share in np.linspace(0, 1, 12)]
    tints += [255 + (np.array(mixed) - 255) * share for share in (0.55, 0.85)]
    return np.unique(np.round(np.concatenate(tints)).astype(np.uint8), axis=0)


@lru_cache(maxsize=1)
def _nearest() -> np.ndarray:
    """Place in the palette of every colour of three times five bits; black and white are exactly these."""
    steps = np.linspace(0, 255, 32)
    every = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    return cKDTree(palette()).query(every)[1].astype(np.uint8)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
