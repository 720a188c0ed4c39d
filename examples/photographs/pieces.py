"""Photographs in square pieces, half of them for training and half held out:

    python3 pieces.py OUT PHOTOGRAPH...

A photograph is reduced to ROWS rows of pieces and cut like a chessboard: what would be black goes
to OUT/train, what would be white to OUT/heldout. Pieces with little in them, such as sky, are left
out. Names are hashes, so that the first pieces of a folder are of all photographs.
"""

import sys
from hashlib import blake2b
from pathlib import Path

from PIL import Image, ImageOps, ImageStat

SIDE, ROWS = 128, 8
FLAT = 12
"""Standard deviation of the brightness, of 255, below which a piece is left out."""

out = Path(sys.argv[1])
for name in sys.argv[2:]:
    photograph = ImageOps.exif_transpose(Image.open(name)).convert("RGB")
    scale = SIDE * ROWS / min(photograph.size)
    wide, high = (round(scale * side) for side in photograph.size)
    photograph = photograph.resize((wide, high), Image.Resampling.BICUBIC)
    for row in range(high // SIDE):
        for column in range(wide // SIDE):
            left, top = SIDE * column, SIDE * row
            piece = photograph.crop((left, top, left + SIDE, top + SIDE))
            if ImageStat.Stat(piece.convert("L")).stddev[0] < FLAT:
                continue
            key = f"{Path(name).name} {row} {column}".encode()
            half = "heldout" if (row + column) % 2 else "train"
            file = out / half / f"{blake2b(key, digest_size=4).hexdigest()}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            piece.save(file, quality=95)
