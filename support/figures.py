"""Problems drawn for the demonstration: polygons, colours and angles; and codewords over several turns.

python -m support.figures OUT --> OUT/train.parquet, OUT/test.parquet
"""

import argparse
import itertools
import math
import random
import zlib
from pathlib import Path

from data import png

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

CANVAS = 224  # pixels; figures are drawn on it and averaged down


TILT = 8  # degrees from upright, at most: with every orientation, counting sides takes a tiny model hours to learn


COLOURS = {
    "red": (225, 0, 0), "green": (0, 165, 0), "blue": (0, 60, 255),
    "yellow": (255, 215, 0), "purple": (150, 0, 190), "black": (0, 0, 0),
}  # fmt: skip


FIGURES = {  # type -> (answers, wordings)
    "sides": (["3", "4", "6"], ["<image>How many sides?", "<image>Number of sides?"]),
    "colour": (list(COLOURS), ["<image>Which colour?", "<image>Name the colour."]),
    "larger": (list(COLOURS), ["<image>Which is larger?", "<image>Colour of the larger?"]),
    "angle": (
        ["acute", "right", "obtuse"],
        ["<image>Acute, right or obtuse?", "<image>What angle?"],
    ),
    "sum": (
        ["6", "7", "8", "9", "10", "12"],
        ["<image><image>Sum of sides?", "<image>and<image>Sides in all?"],
    ),
}


def make_figures(
    out: str | Path, train: int = 2000, test: int = 300, seed: int = 0, size: int = 56
) -> None:
    """Write out/train.parquet and out/test.parquet: a visual task that a tiny model learns, with
    nothing to download.

    `train` and `test` rows of five types of question in equal parts, and the answers of a type
    equally often; pictures are `size` pixels square. A picture's checksum says whether it belongs
    to train or to test, so none is in both. The same arguments give the same bytes. Raises
    ValueError for a file without rows or a size outside 16 to 224.
    """
    if min(train, test) < 1 or not 16 <= size <= CANVAS:
        raise ValueError(
            f"train={train}, test={test}, size={size}: a file needs a row, a side 16 to {CANVAS} pixels"
        )
    for split, total in (("train", train), ("test", test)):
        rng, rows = random.Random(f"{seed} {split}"), []
        for number in range(total):
            kind = list(FIGURES)[number % len(FIGURES)]
            answers, wordings = FIGURES[kind]
            answer, pictures = answers[number // len(FIGURES) % len(answers)], []
            while not pictures or any(
                (zlib.crc32(picture) % 4 == 0) != (split == "test") for picture in pictures
            ):
                pictures = _draw(rng, kind, answer, size)
            rows.append((pictures, rng.choice(wordings), answer, kind))
        rng.shuffle(rows)
        _write_rows(rows, Path(out) / f"{split}.parquet")


def _write_rows(rows: list[tuple[list[bytes], str, str, str]], file: Path) -> None:
    """Rows of (images, problem, answer, type) as Geometry3K stores them."""
    names, image = (
        ("images", "problem", "answer", "type"),
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    images, *texts = zip(*rows, strict=True)
    cells = [[{"bytes": picture, "path": None} for picture in pictures] for pictures in images]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(dict(zip(names, [pa.array(cells, pa.list_(image)), *texts], strict=True))), file
    )


def _draw(rng: random.Random, kind: str, answer: str, size: int) -> list[bytes]:
    """PNG pictures, size x size, for which `answer` is right."""
    canvases = [
        Image.new("RGB", (CANVAS, CANVAS), "white") for _ in range(2 if kind == "sum" else 1)
    ]
    pen, last_pen = ImageDraw.Draw(canvases[0]), ImageDraw.Draw(canvases[-1])
    colour, other = rng.sample(list(COLOURS), 2)
    if kind == "sides":
        _polygon(rng, pen, int(answer), colour)
    elif kind == "colour":
        _polygon(rng, pen, rng.choice([0, 3, 4, 6]), answer)
    elif kind == "larger":
        other = rng.choice([name for name in COLOURS if name != answer])
        sides, right, down = rng.choice([0, 3, 4, 6]), rng.choice([-1, 1]), rng.choice([-1, 1])
        _polygon(rng, pen, sides, answer, 50 - 16 * right, 50 - 16 * down, 29)
        _polygon(rng, pen, sides, other, 50 + 29 * right, 50 + 29 * down, 13)
    elif kind == "angle":
        _angle(rng, pen, answer, colour)
    else:
        first = rng.choice([sides for sides in (3, 4, 6) if int(answer) - sides in (3, 4, 6)])
        _polygon(rng, pen, first, colour)
        _polygon(rng, last_pen, int(answer) - first, other)
    return [png(canvas.resize((size, size), Image.Resampling.BOX)) for canvas in canvases]


def _polygon(
    rng: random.Random, pen, sides: int, colour: str, x: int = 50, y: int = 50, radius: int = 42
) -> None:
    """A regular polygon, a disc for 0 sides, about (x, y); lengths in % of the canvas."""
    left, top, reach = ((length + rng.uniform(-4, 4)) * CANVAS / 100 for length in (x, y, radius))
    if sides:
        pen.regular_polygon((left, top, reach), sides, rng.uniform(-TILT, TILT), COLOURS[colour])
    else:
        pen.circle((left, top), reach, COLOURS[colour])


def _angle(rng: random.Random, pen, kind: str, colour: str) -> None:
    """Two rays, 45% of the canvas long; the kinds are 35 degrees apart."""
    half = (
        math.radians(
            {"acute": rng.uniform(25, 55), "right": 90, "obtuse": rng.uniform(125, 155)}[kind]
        )
        / 2
    )
    turn, length = math.radians(rng.uniform(-TILT, TILT)) - half, 0.45 * CANVAS
    back = length * math.cos(half) / 2  # from the middle of the canvas to the vertex
    x, y = (
        CANVAS * (0.5 + rng.uniform(-0.03, 0.03)) - back * along
        for along in (math.cos(turn), math.sin(turn))
    )
    ends = [
        (x + length * math.cos(turn + side), y + length * math.sin(turn + side))
        for side in (-half, half)
    ]
    pen.line([ends[0], (x, y), ends[1]], COLOURS[colour], width=round(0.12 * CANVAS), joint="curve")


# --------------------------------------------------------------------------------------------------
# A conversation to learn from


CODE = {
    "red": "a",
    "green": "b",
    "blue": "c",
    "yellow": "d",
    "black": "e",
}  # a square's colour -> its letter


CODEWORD_TURNS = "<image><image>Next?\n<image>Spell it."


def make_codewords(
    out: str | Path, train: int = 500, test: int = 100, seed: int = 0, size: int = 56
) -> None:
    """Write out/train.parquet and out/test.parquet for rollout.Codeword: squares over two turns
    that spell a word.

    The code is never told. A fifth of the words of three letters is for `test` alone. Images are
    `size` pixels square.
    """
    words, colours = (
        list(itertools.product(CODE.values(), repeat=3)),
        {code: colour for colour, code in CODE.items()},
    )
    random.Random(seed).shuffle(words)
    for split, total, chosen in (("train", train, words[25:]), ("test", test, words[:25])):
        rng, rows = random.Random(f"{seed} {split}"), []
        for word in (chosen[i % len(chosen)] for i in range(total)):
            squares = [_square(rng, colours[letter], size) for letter in word]
            rows.append((squares, CODEWORD_TURNS, " ".join(word), ""))
        rng.shuffle(rows)
        _write_rows(rows, Path(out) / f"{split}.parquet")


def _square(rng: random.Random, colour: str, size: int) -> bytes:
    """PNG of a square somewhere on white."""
    canvas, side = Image.new("RGB", (size, size), "white"), rng.randint(size // 2, size * 7 // 8)
    left, top = rng.randint(0, size - side), rng.randint(0, size - side)
    ImageDraw.Draw(canvas).rectangle((left, top, left + side, top + side), COLOURS[colour])
    return png(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a small data set of figures to learn from.")
    parser.add_argument("out", type=Path, help="folder for train.parquet and test.parquet")
    for name, default, meaning in (
        ("train", 2000, "rows of train.parquet"),
        ("test", 300, "rows of test.parquet"),
        ("seed", 0, "another seed draws other figures"),
        ("size", 56, "side of a picture, pixels"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{meaning}; default {default}"
        )
    make_figures(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
