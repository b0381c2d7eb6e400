"""Sets the line numbers of the README's links into code: python assets/links.py

[`grpo.spread`](grpo.py#L1) points at the definition of that name. A link whose text is code and no
name, [`r = a / b`](grpo.py#L1), points at the only line that begins so.
"""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
LINK = re.compile(r"\[`([^`]+)`\]\(([\w/]+\.py)#L\d+\)")


def mended(text: str) -> str:
    """`text` with every link at the line that it means. ValueError for one that means no line."""

    def point(link: re.Match) -> str:
        label, path = link.groups()
        return f"[`{label}`]({path}#L{line_of(label, path)})"

    return LINK.sub(point, text)


def line_of(label: str, path: str) -> int:
    """The line of a file that a link's text means."""
    if re.fullmatch(r"[\w.]+", label):
        lines = definitions(tree_of(path), label.removeprefix(f"{Path(path).stem}."))
    else:
        starts = enumerate((ROOT / path).read_text().splitlines(), 1)
        lines = [number for number, line in starts if line.strip().startswith(label)]
    if len(lines) != 1:
        raise ValueError(f"the README links to {label!r}, which {path} has {len(lines)} times")
    return lines[0]


@functools.cache  # many links point into one file
def tree_of(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def definitions(tree: ast.AST, name: str) -> list[int]:
    """Lines where a class, function or variable `name` is defined, or `Class.name`."""
    head, _, rest = name.partition(".")
    found = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        names = [getattr(target, "name", getattr(target, "id", "")) for target in targets]
        if head in names and rest:
            found += definitions(node, rest)
        elif head in names:
            found.append(node.lineno)
    return found


if __name__ == "__main__":
    README.write_text(mended(README.read_text()))
