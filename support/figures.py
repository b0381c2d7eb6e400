"""Problems drawn for the demonstration: polygons, colours and angles; and codewords over several
turns.

    python -m support.figures OUT --> OUT/train.parquet, OUT/test.parquet

Path: make_figures, make_codewords; below them how a picture is drawn.
"""

import argparse
import functools
import itertools
import math
import zlib
from pathlib import Path
from random import Random

from data import png
from support.processes import run_command

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from PIL.ImageDraw import Draw, ImageDraw

CANVAS = 224  # pixels; figures are drawn on it and averaged down

# degrees from upright, at most: with every orientation, counting sides takes a tiny model hours
TILT = 8

POLYGONS = (3, 4, 6)  # sides
SHAPES = (0, 3, 4, 6)  # 0: a disc

COLOURS = {
    "red": (225, 0, 0),
    "green": (0, 165, 0),
    "blue": (0, 60, 255),
    "yellow": (255, 215, 0),
    "purple": (150, 0, 190),
    "black": (0, 0, 0),
}
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

# a square's colour -> its letter
CODE = {"red": "a", "green": "b", "blue": "c", "yellow": "d", "black": "e"}
CODEWORD_TURNS = "<image><image>Next?\n<image>Spell it."


def make_figures(
    out: str | Path,
    train: int = 2000,
    test: int = 300,
    seed: int = 0,
    size: int = 56,
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
            f"train={train}, test={test}, size={size}: a file needs a row, a side 16 to {CANVAS} "
            "pixels"
        )
    for split, total in (("train", train), ("test", test)):
        rng = Random(f"{seed} {split}")
        rows = [_figure(rng, number, size, split) for number in range(total)]
        rng.shuffle(rows)
        _write_rows(rows, out, split)


def _figure(rng: Random, number: int, size: int, split: str) -> dict:
    """Row `number` of a split; types take turns, and so do the answers of a type."""
    kind = list(FIGURES)[number % len(FIGURES)]
    answers, wordings = FIGURES[kind]
    answer = answers[number // len(FIGURES) % len(answers)]
    pictures = _draw(rng, kind, answer, size)
    while any(_split_of(picture) != split for picture in pictures):
        pictures = _draw(rng, kind, answer, size)
    return {
        "images": pictures,
        "problem": rng.choice(wordings),
        "answer": answer,
        "type": kind,
    }


def _split_of(picture: bytes) -> str:
    return "test" if zlib.crc32(picture) % 4 == 0 else "train"


def make_codewords(out: str | Path, train: int = 500, test: int = 100) -> None:
    """Write out/train.parquet and out/test.parquet for rollout.Codeword: squares over two turns
    that spell a word.

    The code is never told. A fifth of the words of three letters is for `test` alone.
    """
    words = list(itertools.product(CODE, repeat=3))  # as colours
    Random(0).shuffle(words)
    for split, total, its_words in (("train", train, words[25:]), ("test", test, words[:25])):
        rng = Random(f"0 {split}")
        rows = []
        for word in itertools.islice(itertools.cycle(its_words), total):
            squares = [_square(rng, colour) for colour in word]
            answer = " ".join(CODE[colour] for colour in word)
            row = {
                "images": squares,
                "problem": CODEWORD_TURNS,
                "answer": answer,
            }
            rows.append(row)
        rng.shuffle(rows)
        _write_rows(rows, out, split)


def _write_rows(rows: list[dict], out: str | Path, split: str) -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")


# --------------------------------------------------------------------------------------------------
# Pictures


def _draw(rng: Random, kind: str, answer: str, size: int) -> list[bytes]:
    """PNG pictures, size x size, for which `answer` is right."""
    canvases = [Image.new("RGB", (CANVAS, CANVAS), "white")]
    if kind == "sum":
        canvases.append(canvases[0].copy())
    pens = [Draw(canvas) for canvas in canvases]
    colour, other = rng.sample(list(COLOURS), 2)
    if kind == "sides":
        _polygon(rng, pens[0], int(answer), colour)
    elif kind == "colour":
        _polygon(rng, pens[0], rng.choice(SHAPES), answer)
    elif kind == "larger":
        _two_polygons(rng, pens[0], answer)
    elif kind == "angle":
        _angle(rng, pens[0], answer, colour)
    else:
        total = int(answer)
        first = rng.choice([sides for sides in POLYGONS if total - sides in POLYGONS])
        _polygon(rng, pens[0], first, colour)
        _polygon(rng, pens[1], total - first, other)
    small = [canvas.resize((size, size), Image.Resampling.BOX) for canvas in canvases]
    return [png(picture) for picture in small]


def _two_polygons(rng: Random, pen: ImageDraw, larger: str) -> None:
    """A large one of the colour `larger`, and a small one of another in the opposite corner."""
    smaller = rng.choice([name for name in COLOURS if name != larger])
    sides = rng.choice(SHAPES)
    right = rng.choice([-1, 1])
    down = rng.choice([-1, 1])
    _polygon(rng, pen, sides, larger, 50 - 16 * right, 50 - 16 * down, 29)
    _polygon(rng, pen, sides, smaller, 50 + 29 * right, 50 + 29 * down, 13)


def _polygon(
    rng: Random,
    pen: ImageDraw,
    sides: int,
    colour: str,
    x: int = 50,
    y: int = 50,
    radius: int = 42,
) -> None:
    """A regular polygon, a disc for 0 sides, about (x, y); lengths in % of the canvas."""
    left = _pixels(rng, x)
    top = _pixels(rng, y)
    reach = _pixels(rng, radius)
    if sides:
        tilt = rng.uniform(-TILT, TILT)
        pen.regular_polygon((left, top, reach), sides, tilt, COLOURS[colour])
    else:
        pen.circle((left, top), reach, COLOURS[colour])


def _pixels(rng: Random, length: int) -> float:
    """A length in % of the canvas, give or take 4, in pixels."""
    return (length + rng.uniform(-4, 4)) * CANVAS / 100


def _angle(rng: Random, pen: ImageDraw, kind: str, colour: str) -> None:
    """Two rays, 45% of the canvas long; the kinds are 35 degrees apart."""
    degrees = {"acute": rng.uniform(25, 55), "right": 90, "obtuse": rng.uniform(125, 155)}
    half = math.radians(degrees[kind]) / 2
    turn = math.radians(rng.uniform(-TILT, TILT)) - half
    length = 0.45 * CANVAS
    back = length * math.cos(half) / 2  # from the middle of the canvas to the vertex
    x = CANVAS * (0.5 + rng.uniform(-0.03, 0.03)) - back * math.cos(turn)
    y = CANVAS * (0.5 + rng.uniform(-0.03, 0.03)) - back * math.sin(turn)
    first, last = (
        (x + length * math.cos(ray), y + length * math.sin(ray))
        for ray in (turn - half, turn + half)
    )
    width = round(0.12 * CANVAS)
    pen.line([first, (x, y), last], COLOURS[colour], width, joint="curve")


def _square(rng: Random, colour: str) -> bytes:
    """PNG of a square somewhere on white."""
    size = 56
    canvas = Image.new("RGB", (size, size), "white")
    side = rng.randint(size // 2, size * 7 // 8)
    left = rng.randint(0, size - side)
    top = rng.randint(0, size - side)
    box = (left, top, left + side, top + side)
    Draw(canvas).rectangle(box, COLOURS[colour])
    return png(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a small data set of figures to learn from.")
    parser.add_argument("out", type=Path, help="folder for train.parquet and test.parquet")
    number = functools.partial(parser.add_argument, type=int)
    number("--train", default=2000, help="rows of train.parquet; default 2000")
    number("--test", default=300, help="rows of test.parquet; default 300")
    make_figures(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_command(main)
