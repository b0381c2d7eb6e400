"""Draws assets/pack.svg, a pack as model.make_pack lays it out: python -m assets.draw_pack

Prompt p has the responses a and b, prompt q has c.
"""

from pathlib import Path

import data
import model

import torch

FILE = Path(__file__).parent / "pack.svg"
NAMES = "p1 p2 p3 a1 a2 b1 b2 b3 q1 q2 c1".split()
COLOURS = {"p": "#4f81c7", "a": "#d9822b", "b": "#5a9e4b", "q": "#7f8ea3", "c": "#a566a8"}
INK = "#24292f"
UNSEEN = "#e6e9ed"
CELL = 30  # pixels from one token to the next
SIDE = 27  # of a token's square
LEFT = 150  # of the mask
TOP = 96
NOTES = (
    "In each line of the square: what a token attends to.",
    "a and b attend to their prompt p and to themselves, never to each other.",
    "Both begin at position 3, right behind p, as if each followed p alone.",
    "p3 predicts a1 and b1. The prompt p and its images are computed once.",
)


def example() -> model.Pack:
    """The pack in the picture: a prompt of 3 tokens with responses of 2 and 3, one of 2 with 1."""
    bundles = []
    for prompt_length, lengths in ((3, (2, 3)), (2, (1,))):
        ids = torch.zeros(prompt_length, dtype=torch.int64)
        responses = [[torch.zeros(length, dtype=torch.int64)] for length in lengths]
        bundles.append((data.Prompt(None, ids, ids, [], {}), responses))
    return model.make_pack(bundles, lambda prompt: model.count_up(prompt.ids))


def attends(segments: list[model.Segment], query: int, key: int) -> bool:
    """Whether the token at `query` sees the one at `key`."""
    for start, end, prompt_start, prompt_end in segments:
        if start <= query < end:
            return prompt_start <= key < prompt_end or start <= key <= query
    return False


def square(x: int, y: int, colour: str, kind: str) -> str:
    size = f'width="{SIDE}" height="{SIDE}" rx="4"'
    return f'<rect class="{kind}" x="{x}" y="{y}" {size} fill="{colour}"/>'


def words(x: float, y: int, text: str, anchor: str = "start", colour: str = INK) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def token(x: int, y: int, name: str) -> str:
    label = words(x + SIDE / 2, y + 18, name, "middle", "#ffffff")
    return square(x, y, COLOURS[name[0]], "token") + label


def draw() -> str:
    """The picture as SVG."""
    pack = example()
    positions = pack.positions[0, 0].tolist()
    parts = [
        words(LEFT - 12, 32, "the row", "end"),
        words(LEFT - 12, 62, "position", "end"),
        words(LEFT - CELL - 20, TOP + 18, "who attends", "end"),
    ]
    for i, name in enumerate(NAMES):
        x = LEFT + i * CELL
        y = TOP + i * CELL
        parts.append(token(x, 14, name))
        middle = x + SIDE / 2
        parts.append(words(middle, 62, str(positions[i]), "middle"))
        parts.append(token(LEFT - CELL - 8, y, name))
        for k, seen in enumerate(NAMES):
            column = LEFT + k * CELL
            if attends(pack.layout.segments, i, k):
                parts.append(square(column, y, COLOURS[seen[0]], "seen"))
            else:
                parts.append(square(column, y, UNSEEN, "unseen"))
    below = TOP + len(NAMES) * CELL + 26
    for i, note in enumerate(NOTES):
        parts.append(words(24, below + 22 * i, note))
    height = below + 22 * len(NOTES)
    style = "font-family:system-ui,sans-serif;font-size:14px"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 580 {height}" style="{style}">'
    paper = f'<rect width="580" height="{height}" rx="8" fill="#ffffff"/>'
    return "\n".join([head, paper, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    FILE.write_text(draw())
