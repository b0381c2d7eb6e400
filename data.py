"""Problems with images and videos: rows of parquet files or JSON lines -> token ids and pixels.

    files --load_problems--> Problem (compressed bytes) --Reader--> Prompt (ids (P,) and pixels)
    (seed, step) --batch_indices--> which problems

An image is resized in one place, `resize_image`, so that the sampler and the trainer see the same
pixels; frames of a video are sampled in one place too, `decode_video`. A prompt is never truncated:
`usable_problems` makes every prompt before training starts and leaves the long ones out.
Deliberately not here: streaming from the hub, augmentation.

The path of this file ends at the line "from here on": load_problems, Problem, resize_image, Prompt
and Reader.

Legend  P tokens of one prompt, image tokens included
Source  resize rule: `smart_resize` of transformers' Qwen2VLImageProcessor
"""

from __future__ import annotations

import ast
import base64
import contextlib
import functools
import io
import itertools
import math
import random
import re
import string
import struct
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from support import tables
from support.processes import gather_objects, this_rank, world_size

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

INSTRUCTION = (
    "Reason step by step inside <think> </think>, then give only the final answer in \\boxed{}."
)
IMAGE, VIDEO = "<image>", "<video>"  # placeholders
LETTERS = string.ascii_uppercase  # of choices


# --------------------------------------------------------------------------------------------------
# Rows


def load_problems(
    path: str | Path, split: str = "train", columns: str = "", image_folder: str = ""
) -> Problems:
    """Open a data set; its images stay compressed until a prompt is made.

    Args:
        path: a file (.parquet, or .jsonl, one object a line), a folder or a glob of them, or a data
            set of the hub such as "hiyouga/geometry3k".
        split: of a folder or a hub data set, see `tables.find_files`.
        columns: what is called unusually, "image=pictures,answer=reward_model.ground_truth"; a dot
            reaches into a struct, a + joins columns. Usual names are found, see `tables.USUAL`.
        image_folder: where paths of images begin; "": in the folder of their file.

    Raises ValueError for no such file or split, a missing or ambiguous column, or no rows.
    """
    named = tables.parse_columns(columns)
    files = tables.find_files(str(path), split)
    opened = [tables.open_table(file, name, named) for file, name in files.items()]
    rows = []
    for table in opened:
        rows += [(table, row) for row in range(len(table))]
    if not rows:
        raise ValueError(f"{path}: no rows; choose another file")
    folder = Path(image_folder).expanduser() if image_folder else None
    return Problems(rows, folder)


@dataclass(frozen=True)
class Problem:
    """One row: a question about images, and the answer that earns the reward.

    The images are the bytes of their files; `decode_image(problem.images[0])` is the picture.
    """

    where: str  # "train.parquet row 17", for errors; rows count from 0
    question: str  # one <image> for each image, one <video> for each video
    images: tuple[bytes, ...] = field(repr=False)  # compressed, as stored
    answer: str
    type: str  # kind of question, "" if the column is absent
    source: str  # data source, the file name if the column is absent
    answers: tuple[str, ...] = ()  # of an answer that is a list: all are right, or one per image
    # each a file or its frames, as stored
    videos: tuple[bytes | tuple[bytes, ...], ...] = field(default=(), repr=False)
    system: str = ""  # what a chat says before the question
    unplaced: bool = False  # the row had images and no placeholder, so they stand in front

    @property
    def gold(self) -> str | tuple[str, ...]:
        """What a response is graded by, as the row holds it: a text, or the texts of a list."""
        return self.answers or self.answer


# --------------------------------------------------------------------------------------------------
# Prompts


def resize_image(image: Image.Image, min_pixels: int, max_pixels: int, factor: int) -> Image.Image:
    """The one resize, bicubic: sides become multiples of `factor`, width * height falls in
    [min_pixels, max_pixels].

    `factor` is the side of an image token in pixels (28 for Qwen2.5-VL). A picture that fits comes
    back itself: a second call changes nothing, and neither does Qwen's processor.
    """
    size = resized_size(*image.size, min_pixels, max_pixels, factor)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


@dataclass(eq=False)
class Prompt:
    """What the policy is asked: the same ids and pixels for the sampler and for the trainer."""

    problem: Problem
    ids: Tensor  # (P,) int64, image tokens expanded
    short_ids: Tensor  # one token for each image; vLLM's own processor expands them
    images: list[Image.Image]  # RGB, resized
    # all else the processor returned: pixel_values, image_grid_thw, mm_token_type_ids (1, P)
    inputs: dict[str, Tensor]
    # frames (F, height, width, 3) and their timing
    videos: list[tuple[np.ndarray, dict]] = field(default_factory=list)
    text: str = ""  # what the chat template made of it, one token for each image


@dataclass(frozen=True)
class VideoLimits:
    """How much of a video is seen: frames per second, most frames, most pixels of a frame."""

    fps: float = 2.0
    max_frames: int = 32
    max_pixels: int = 128 * 28 * 28


class Reader:
    """Makes every prompt of a run, and keeps the latest, so that none is made twice in a step.

        reader = Reader(processor, min_pixels, max_pixels)
        reader(problem)         the Prompt that a conversation begins with
        reader.later(problem)   a Prompt that follows a response
        reader.ahead(problems)  start making their Prompts in a thread, while the GPU works

    Args:
        processor: of the model, loaded with the same bounds on pixels.
        min_pixels, max_pixels: of an image.
        instruction: appended to the question of the first turn.
        video: how much of a video is seen.
        first: Problem of a row -> Problem that the policy reads first; an environment's `first`.
        kept: prompts that are remembered, the ones used last; those made ahead come on top.
    """

    def __init__(
        self,
        processor: Any,
        min_pixels: int,
        max_pixels: int,
        instruction: str = INSTRUCTION,
        video: VideoLimits = VideoLimits(),
        first: Callable[[Problem], Problem] | None = None,
        kept: int = 0,
    ):
        self.processor = processor
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.instruction = instruction
        self.video = video
        self.first = first
        self._make_once = functools.lru_cache(kept)(self._make)
        self._coming: dict[Problem, Future] = {}  # asked for by `ahead`
        self._thread = ThreadPoolExecutor(1)

    def __call__(self, problem: Problem) -> Prompt:
        """The problem as one user turn, images where their placeholders stand, as ids and pixels.

        Raises ValueError, naming the row, for an unreadable image or video, more or fewer
        placeholders than images, a special token in the question, and a processor that resizes the
        images once more.
        """
        future = self._coming.pop(problem, None)
        if future is None or future.cancel():  # it is in time if the thread has not begun it
            return self._make_once(problem, False)
        return future.result()

    def later(self, problem: Problem) -> Prompt:
        """As a turn that follows a response: only what the chat template puts after the response's
        end token. Raises as above, and for a template that cannot be continued."""
        return self._make_once(problem, True)

    def ahead(self, problems: Iterable[Problem]) -> None:
        """Start making these prompts in a thread; `reader(problem)` takes them, or raises what
        making them raised. What an earlier call asked for and nobody took is forgotten."""
        earlier = self._coming
        self._coming = {}
        for problem in problems:
            future = earlier.pop(problem, None)
            future = future or self._thread.submit(self._make_once, problem, False)
            self._coming[problem] = future
        for future in earlier.values():
            future.cancel()

    def _make(self, problem: Problem, later: bool) -> Prompt:
        shown = self.first(problem) if self.first and not later else problem
        try:
            images, videos = self._pixels(shown)
            text = self._text(shown, later)
        except ValueError as error:
            raise ValueError(f"{problem.where}: {error}") from error
        return self.assemble(problem, images, videos, text)

    def _pixels(self, problem: Problem) -> tuple[list[Image.Image], list[tuple]]:
        """Images, and videos with their timing, as large as the processor will leave them."""
        vision = self.processor.image_processor
        # others than Qwen's kind cut an image into tiles of a fixed size, and are bounded in that
        factor = vision.patch_size * vision.merge_size if hasattr(vision, "merge_size") else 1
        images = [decode_image(raw) for raw in problem.images]
        if factor > 1:
            bounds = (self.min_pixels, self.max_pixels)
            images = [resize_image(image, *bounds, factor) for image in images]
        return images, [_timed_frames(stored, self.video, factor) for stored in problem.videos]

    def _text(self, problem: Problem, later: bool) -> str:
        """What the chat template makes of the question, and of the system text if there is one."""
        special = special_tokens(self.processor.tokenizer)
        content = _content(problem, special, "" if later else self.instruction)
        messages = [{"role": "user", "content": content}]
        if later:
            return _later_turn(messages, self.processor)
        if problem.system:
            messages.insert(0, {"role": "system", "content": [_part(problem.system)]})
        return _render(messages, self.processor)

    def assemble(self, problem: Problem, images: list, videos: list, text: str) -> Prompt:
        """Let the processor make ids and pixels."""
        media = {"images": images} if images else {}
        if videos:
            frames, timing = zip(*videos, strict=True)
            media["videos"] = list(frames)
            media["videos_kwargs"] = {"video_metadata": list(timing), **AS_THEY_ARE}
        # the template writes every special token itself; Gemma's tokenizer would add a second <bos>
        plain = dict(add_special_tokens=False, return_tensors="pt")
        inputs = dict(self.processor(text=[text], **plain, **media))
        if "image_grid_thw" in inputs:
            _refuse_another_resize(problem, images, inputs["image_grid_thw"], self)
        del inputs["attention_mask"]  # one prompt, no padding
        ids = inputs.pop("input_ids")[0]
        short_ids = self.processor.tokenizer(text, **plain).input_ids[0]
        return Prompt(problem, ids, short_ids, images, inputs, videos, text)


# --- from here on: the rows of files, what a row may hold, images, video, the text of a prompt,
# checking a data set, the order of problems, other images for evaluation


# --------------------------------------------------------------------------------------------------
# What a row may hold


class Problems(Sequence):
    """Rows of files, kept compressed: `problems[i]` makes a Problem, `problems[a:b]` a smaller
    Problems.

    Args:
        rows: (table, number of the row in it) of each.
        image_folder: where paths of images begin; None: at the file that holds the row.
    """

    def __init__(self, rows: Sequence[tuple[tables.Table, int]], image_folder: Path | None = None):
        self.rows = rows
        self.image_folder = image_folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        """One row, or a slice. ValueError, naming the row: an image not where it says, text that
        cannot be meant."""
        if isinstance(index, slice):
            return Problems(self.rows[index], self.image_folder)
        table, row = self.rows[index]
        where = f"{table.name} row {row}"
        folder = self.image_folder or table.file.parent
        try:
            return make_problem(table.values(row), where, folder, table.name)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def select(self, indices: Sequence[int]) -> Problems:
        """The rows at `indices`, in that order; no bytes are copied."""
        return Problems([self.rows[index] for index in indices], self.image_folder)

    @property
    def files(self) -> set[Path]:
        """The files that the rows are of, by their real paths."""
        files = {table.file for table, _ in self.rows}
        return {file.resolve() for file in files}


def make_problem(cells: dict[str, list], where: str, folder: Path, file_name: str) -> Problem:
    """What a row's cells mean: chats, choices and numbered placeholders become one question.

    Args:
        cells: our name for a column -> its values in this row, see `support.tables`.
        where: the row, for errors.
        folder: paths of images begin in it.
        file_name: the source of rows that name none.

    Raises ValueError for an image that is not where it says, and text that cannot be meant.
    """
    images = tuple(image_bytes(value, folder) for value in tables.flat(cells["image"]))
    videos = tuple(_video_bytes(value, folder) for value in tables.flat(cells["video"]))
    system, question = _read_question(cells["problem"])
    listed, answers = _read_answers(cells["answer"])
    choices = _read_choices(cells["choices"])
    if choices:
        for letter, choice in zip(LETTERS, choices, strict=False):
            question += f"\n{letter}. {choice}"
        answers = [_letter_of(answer, choices) for answer in answers]
    texts = tuple("" if tables.is_empty(answer) else str(answer) for answer in answers)
    question, images = _place_by_number(question, images)
    placed = not question.strip() or IMAGE in question or VIDEO in question
    unplaced = bool(images or videos) and not placed
    if unplaced:
        question = IMAGE * len(images) + VIDEO * len(videos) + question
    kind = ",".join(map(str, tables.flat(cells["type"])))
    source = ",".join(map(str, tables.flat(cells["source"]))) or file_name
    _check_texts(system + question, texts, kind, source)
    return Problem(
        where=where,
        question=question,
        images=images,
        answer=",".join(texts),
        type=kind,
        source=source,
        answers=texts if listed else (),
        videos=videos,
        system=system,
        unplaced=unplaced,
    )


def describe(problems: Problems) -> list[str]:
    """Sentences to print on a data set: what it holds, what was taken for what, and which columns
    of images nothing names."""
    opened = {table.file: table for table, _ in problems.rows}.values()
    images = sum(table.count("image") for table in opened)
    videos = sum(table.count("video") for table in opened)
    held = f"{images} images and {videos} videos" if videos else f"{images} images"
    taken = " and ".join({str(table): None for table in opened})
    sentences = [f"{len(problems)} rows with {held}, columns {taken}"]
    unnamed = {}  # without repetition, in order
    for table in opened:
        unnamed |= dict.fromkeys(table.unnamed)
    if unnamed:
        sentences.append(
            f"warning: {', '.join(unnamed)} hold files that nothing names, so they will not be "
            f"seen; if they are the images, say --columns image={'+'.join(unnamed)}"
        )
    return sentences


def _read_question(cells: list) -> tuple[str, str]:
    """The system text, "" for none, and the question: of texts, or of a chat.

    An answer at a chat's end, as in a set for fine-tuning, is left out; the answer's column says
    what is right.
    """
    if len(cells) != 1 or not isinstance(cells[0], list):
        return "", "\n".join(_text(cell, "problem") for cell in cells)
    said = [_read_turn(turn) for turn in cells[0]]
    if said[-1][0] == "assistant":
        said.pop()
    roles = [role for role, _ in said]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(
            f"the chat's turns are {roles}; a problem is one turn of the user, after a system turn "
            "or none, with an assistant's turn at the end or none; cut the chat there"
        )
    *system, (_, question) = said
    return "".join(text for _, text in system), question


def _read_turn(turn: Any) -> tuple[str, str]:
    """Role and text of a chat's turn, of the form role/content or from/value."""
    if not isinstance(turn, dict):
        raise ValueError(
            f"the problem is a list of {type(turn).__name__}; it is text, or a chat of turns with "
            "role and content"
        )
    role = turn.get("role") or turn.get("from")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    parts = content if isinstance(content, list) else [content]
    names = {"human": "user", "gpt": "assistant"}
    return names.get(role, role), "".join(map(_read_part, parts))


def _read_part(part: Any) -> str:
    """A part of a turn as text, images and videos as their placeholders."""
    if not isinstance(part, dict):
        return _text(part, "chat")
    kind = str(part.get("type"))
    if kind.startswith("image"):
        return IMAGE
    if kind.startswith("video"):
        return VIDEO
    if isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"the chat holds a part of type {kind!r}; text, image and video are read")


def _text(value: Any, what: str) -> str:
    """Text, or a number as text."""
    if isinstance(value, dict):
        field = next(iter(value), "NAME")
        raise ValueError(
            f"the {what} is a struct of {', '.join(value)}; name the field with a dot, as in "
            f"--columns {what}=COLUMN.{field}"
        )
    if isinstance(value, list | bytes):
        kind = type(value).__name__
        raise ValueError(f"the {what} is {kind}, not text; name another with --columns {what}=")
    return str(value)


def _read_answers(cells: list) -> tuple[bool, list]:
    """Whether the answer is a list, and its values; of a chat the one that its last turn gives."""
    listed = len(cells) > 1 or any(isinstance(cell, list) for cell in cells)
    values = tables.flat(cells)
    is_chat = values and isinstance(values[0], dict) and {"role", "from"} & set(values[0])
    if is_chat:
        role, text = _read_turn(values[-1])
        if role != "assistant":
            raise ValueError(f"the chat ends with the {role}'s turn, so it holds no answer")
        return False, [text]
    for value in values:
        _text(value, "answer")
    return listed, values


def _read_choices(cells: list) -> list:
    """The choices of a row: a list of them, such a list written as text, or a column for each."""
    choices = cells[0] if len(cells) == 1 else cells
    if isinstance(choices, str):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            choices = ast.literal_eval(choices)  # values alone, nothing is run
    if not isinstance(choices, list) or len(choices) > len(LETTERS):
        raise ValueError(
            f"the choices {str(choices)[:80]!r} are no list of at most {len(LETTERS)} texts; name "
            "another column, or none, with --columns choices="
        )
    for choice in choices:
        _text(choice, "choices")
    return choices


def _letter_of(answer: Any, choices: list) -> str:
    """The letter of the right choice, for an answer that is its value, index (from 0) or letter."""
    text = str(answer).strip()
    letter = re.fullmatch(r"\(?([A-Z])[).:]?", text)
    index = re.fullmatch(r"(\d{1,2})(\.0)?", text)  # pandas makes 2.0 of 2 where others are null
    values = [str(choice).strip() for choice in choices]
    value = text
    if type(answer) in (int, float):  # 2 is a value among 1, 2 and 3, but an index among texts
        values = choices
        value = answer
    if value in values:
        place = values.index(value)
    elif letter:
        place = LETTERS.index(letter[1])
    else:
        place = int(index[1]) if index else len(choices)
    if place >= len(choices):
        raise ValueError(
            f"the answer {text[:80]!r} is none of the {len(choices)} choices, nor the index or "
            "letter of one; correct it, or leave the choices out with --columns choices="
        )
    return LETTERS[place]


def _place_by_number(question: str, images: tuple) -> tuple[str, tuple]:
    """`<image 2>`, `<image2>` -> <image>, and the images in the order in which they are mentioned.

    An image mentioned again is named in words there, by its place in the question.
    """
    numbers = map(int, re.findall(r"<image ?(\d{1,4})>", question))
    order = list(dict.fromkeys(numbers))
    if not order:
        return question, images
    if sorted(order) != list(range(1, len(images) + 1)) or IMAGE in question:
        raise ValueError(
            f"the question mentions images {order} by number, but the row has {len(images)} "
            "images; mention each, from 1, and none without a number"
        )
    for place, number in enumerate(order, 1):
        mention = f"<image ?0*{number}>"
        question = re.sub(mention, IMAGE, question, count=1)
        question = re.sub(mention, f"image {place}", question)
    return question, tuple(images[number - 1] for number in order)


def _check_texts(question: str, answers: Iterable[str], kind: str, source: str) -> None:
    """Refuse what no real row holds: huge texts, and names that would break a line of a log."""
    characters = len(question) + sum(map(len, answers))
    if characters > MAX_CHARACTERS:
        raise ValueError(f"{characters} characters, {MAX_CHARACTERS} is the most; shorten it")
    for name in (kind, source):
        if len(name) > 80 or not name.isprintable():
            raise ValueError(
                f"the type or source {name[:80]!r} names a metric; shorten it, make it printable"
            )


# --------------------------------------------------------------------------------------------------
# Images

# what a data set from elsewhere may bring; a real one stays far below
MAX_IMAGE_PIXELS = 50_000_000
MAX_FILE_BYTES = 100_000_000
MAX_CHARACTERS = 100_000
MAX_ASPECT = 200  # Qwen's processor refuses a longer side of more than 200 times the shorter one
# Pillow reads more, and some with the help of other programs
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# what Pillow raises for broken files
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


def image_bytes(value: Any, folder: Path) -> bytes:
    """The compressed bytes of one image: of bytes, {bytes, path}, a path inside `folder`, base64 or
    a data URL.

    A path that leads out of the folder, by a link too, is refused: a data set from elsewhere must
    not read this machine's other files. Raises ValueError for that, for a missing file and for
    anything else.
    """
    if isinstance(value, dict):
        if not {"bytes", "path"} & set(value):
            raise ValueError(
                f"the image is a struct of {', '.join(value)}, not of bytes and path; name the "
                "field that is the image with a dot, as in --columns image=COLUMN.FIELD"
            )
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        raise ValueError("the images are a list of lists; store one list of images in a row")
    if not isinstance(value, str):
        raise ValueError(
            f"the image is a {type(value).__name__}, not bytes, a path, base64 or a data URL; "
            "convert it"
        )
    shown = repr(value[:80])
    if re.match("https?://", value, re.IGNORECASE):
        raise ValueError(
            f"image {shown} is on the web, and a run loads nothing from there; download it, and "
            "store its path or bytes"
        )
    try:
        if value[:5].lower() == "data:":
            return _of_data_url(value)
        if _is_path(value, folder):
            return _read_inside(folder, value.removeprefix("file://"))
        return base64.b64decode("".join(value.split()), validate=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links to each other
        raise ValueError(
            f"image {shown} is not a file's path, base64 or a data URL: {error}"
        ) from error


def _of_data_url(url: str) -> bytes:
    head, comma, content = url.partition(",")
    if not comma:
        raise ValueError("the data URL has no comma")
    raw = urllib.parse.unquote_to_bytes(content)
    return base64.b64decode(raw, validate=True) if head.lower().endswith(";base64") else raw


def _is_path(value: str, folder: Path) -> bool:
    """Base64 has no dot, and no image is so small; a longer name without a dot may be a file's."""
    return "." in value or len(value) < 64 or (len(value) < 255 and (folder / value).is_file())


def _read_inside(folder: Path, path: str) -> bytes:
    file = (folder / path).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(
            f"the path leads out of the folder {folder}; move the image into it, or name another "
            "with --image_folder"
        )
    # to open a pipe would wait for ever
    if not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(
            f"there is no plain file of at most {MAX_FILE_BYTES} bytes in {folder}; put it there, "
            "or name its folder with --image_folder"
        )
    return file.read_bytes()


def _video_bytes(value: Any, folder: Path) -> bytes | tuple[bytes, ...]:
    """Of a video file the bytes, of a list of frames those of each."""
    if isinstance(value, list):
        return tuple(image_bytes(frame, folder) for frame in value)
    return image_bytes(value, folder)


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decode_image(raw: bytes) -> Image.Image:
    """Bytes -> RGB picture: upright (EXIF), white where transparent, 16-bit grey scaled to 8.
    ValueError if broken."""
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        # known from the header; a few bytes can unfold to any size
        if math.prod(image.size) > MAX_IMAGE_PIXELS:
            raise ValueError(
                f"{image.width} x {image.height} pixels, {MAX_IMAGE_PIXELS} is the most"
            )
        image = ImageOps.exif_transpose(image)
        image.load()  # the whole of it, so that a truncated file shows here
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{len(raw)} bytes are not a readable image: they begin with {raw[:16]!r}, and "
            f"{', '.join(FORMATS)} are read; repair or remove the row"
        ) from error
    except BROKEN as error:
        raise ValueError(
            f"{len(raw)} bytes are not a readable image ({error}); repair or remove the row"
        ) from error
    if image.mode == "F":
        raise ValueError(
            "the image holds floats, and which one is white is unknown; store it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):  # Pillow's own conversion cuts 16 bits off at 255: nearly white
        grey = np.asarray(image).clip(0, 65535) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resized_size(
    width: int, height: int, min_pixels: int, max_pixels: int, factor: int
) -> tuple[int, int]:
    """(width, height) that `resize_image` gives, pixels: Qwen's smart_resize, or the nearest valid
    size.

    The rule alone does not always leave its own result alone: with bounds close together its floor
    or ceil lands outside them, and 6000 x 30 (aspect 200) becomes 5992 x 28 (aspect 214), which it
    then refuses. Raises ValueError for an aspect ratio over 200, and if no size on the grid lies
    within the bounds.
    """
    # here, and not above: most of what reads rows makes no prompts, and needs no transformers
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    if not _is_narrow_enough(width, height):
        raise ValueError(
            f"the image is {width} x {height}, longer than {MAX_ASPECT} to 1; crop it or remove "
            "the row"
        )
    new_height, new_width = smart_resize(height, width, factor, min_pixels, max_pixels)
    fits = min_pixels <= new_width * new_height <= max_pixels
    if fits and _is_narrow_enough(new_width, new_height):
        return new_width, new_height
    return nearest_valid_size(width, height, min_pixels, max_pixels, factor)


def _is_narrow_enough(width: int, height: int) -> bool:
    return max(width, height) <= MAX_ASPECT * min(width, height)


def _refuse_another_resize(
    problem: Problem, images: list[Image.Image], grid: Tensor, reader: Reader
) -> None:
    """Raises ValueError if the processor's grid (images, 3) is not that of the images."""
    patch = reader.processor.image_processor.patch_size
    sizes = [image.size for image in images]
    seen = [(columns * patch, rows * patch) for _, rows, columns in grid.tolist()]
    if seen != sizes:
        raise ValueError(
            f"{problem.where}: the processor resized {sizes} once more, to {seen}, so the sampler "
            f"could see other pixels; load it with min_pixels={reader.min_pixels}, "
            f"max_pixels={reader.max_pixels}"
        )


def nearest_valid_size(
    width: int, height: int, min_pixels: int, max_pixels: int, factor: int
) -> tuple[int, int]:
    """Of all sizes on the grid within the bounds, the one nearest in the logs of its sides.

    Arguments and result as of `resized_size`. Raises ValueError if there is none.
    """
    fewest = max(1, math.ceil(min_pixels / factor**2))  # image tokens
    most = max_pixels // factor**2
    sizes = []
    for rows in range(1, most + 1):
        for columns in range(math.ceil(fewest / rows), most // rows + 1):
            if _is_narrow_enough(columns, rows):
                wider = math.log(columns * factor / width)
                higher = math.log(rows * factor / height)
                sizes.append((math.hypot(wider, higher), columns * factor, rows * factor))
    if not sizes:
        raise ValueError(
            f"no picture whose sides are multiples of {factor} has min_pixels={min_pixels} to "
            f"max_pixels={max_pixels}; set them further apart"
        )
    _, new_width, new_height = min(sizes)
    return new_width, new_height


# --------------------------------------------------------------------------------------------------
# Video

# what a processor is told about frames of a video
AS_THEY_ARE = {"do_resize": False, "do_sample_frames": False}


def decode_video(
    video: bytes | tuple[bytes, ...], limits: VideoLimits
) -> tuple[list[Image.Image], float]:
    """The frames that are seen, RGB, evenly spread over the video, and how many of them make a
    second.

    `video` is a file (mp4, webm and whatever else FFmpeg reads) or its frames, compressed, which
    follow one another at limits.fps; more than limits.max_frames are thinned out. Raises ValueError
    for what is no video.
    """
    if isinstance(video, tuple):
        kept = min(len(video), limits.max_frames)
        frames = [decode_image(video[i * len(video) // kept]) for i in range(kept)]
        return frames, limits.fps * kept / len(video)
    import av  # a run without videos does not need it

    try:
        with av.open(io.BytesIO(video)) as container:
            seconds = (container.duration or 0) / av.time_base
            if not seconds or not container.streams.video:
                raise ValueError("no pictures of known duration")
            wanted = min(max(1, round(seconds * limits.fps)), limits.max_frames)
            frames = _spread_frames(container.decode(video=0), seconds / wanted, wanted)
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(
            f"{len(video)} bytes are not a readable video ({error}); repair or remove the row"
        ) from error
    upright = [frame.to_image().rotate(frame.rotation, expand=True) for frame in frames]
    return upright, wanted / seconds


def _spread_frames(decoded: Iterable, interval: float, wanted: int) -> list:
    """What is on the screen at 0, 1, ... `wanted` - 1 intervals, in seconds, after the start."""
    frames = []
    shown = None
    start = 0.0
    for frame in decoded:
        if shown is None:
            start = frame.time
        passed = frame.time - start - 1e-6
        while shown and len(frames) < wanted and len(frames) * interval < passed:
            frames.append(shown)
        shown = frame
    if shown is None:
        raise ValueError("no pictures")
    return frames + [shown] * (wanted - len(frames))


def _timed_frames(
    video: bytes | tuple[bytes, ...], limits: VideoLimits, factor: int
) -> tuple[np.ndarray, dict]:
    """Frames (F, height, width, 3), reduced to the limits, with their timing as transformers and
    vLLM want it."""
    decoded, fps = decode_video(video, limits)
    reduced = [resize_image(frame, 1, limits.max_pixels, factor) for frame in decoded]
    frames = np.stack([np.asarray(frame) for frame in reduced])
    total = len(frames)
    timing = dict(
        fps=fps,
        total_num_frames=total,
        duration=total / fps,
        frames_indices=list(range(total)),
    )
    return frames, timing


# --------------------------------------------------------------------------------------------------
# The text of a prompt


def _content(
    problem: Problem, special_tokens: Sequence[str], instruction: str
) -> list[dict[str, str]]:
    """The user's turn: the question cut at its placeholders, and the instruction after it."""
    pieces = re.split(f"({IMAGE}|{VIDEO})", problem.question)
    for placeholder, held in ((IMAGE, problem.images), (VIDEO, problem.videos)):
        written = pieces.count(placeholder)
        if written != len(held):
            kind = placeholder[1:-1]
            raise ValueError(
                f"{written} {placeholder} in the question but {len(held)} {kind}s in the row; "
                f"write one for each {kind}, or none at all, and check --columns {kind}="
            )
    texts = [problem.system, *(piece for piece in pieces if piece not in (IMAGE, VIDEO))]
    # A question with such a token could forge an image or end the user's turn; without, the text is
    # only text.
    control = [token for token in special_tokens if token and token in "\n".join(texts)]
    if control:
        raise ValueError(
            f"the question holds {control}, which the model takes for control; remove it from the "
            "row"
        )
    if instruction:
        pieces[-1] += f"\n{instruction}"
    return [_part(piece) for piece in pieces if piece]


def _part(piece: str) -> dict[str, str]:
    return {"type": piece[1:-1]} if piece in (IMAGE, VIDEO) else {"type": "text", "text": piece}


def special_tokens(tokenizer) -> list[str]:
    """Every token that a tokenizer takes for control; its own `all_special_tokens` misses some of
    Idefics3's."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _render(messages: list[dict], processor: Any) -> str:
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _later_turn(messages: list[dict], processor: Any) -> str:
    """What the template puts between the end of a response and the next one."""
    first = [{"role": "user", "content": [_part("?")]}]
    response = "!"
    answer = {"role": "assistant", "content": [_part(response)]}
    start = _render(first, processor) + response + processor.tokenizer.eos_token
    whole = _render([*first, answer, *messages], processor)
    if not whole.startswith(start):
        raise ValueError(
            "the chat template writes a conversation anew with every turn "
            f"({whole[: len(start)]!r} instead of {start!r}), so it cannot go on from its tokens; "
            "choose another template for conversations"
        )
    return whole[len(start) :]


def split_turns(problem: Problem) -> list[Problem]:
    """The turns of a scripted conversation: one for each line of the question, with the images that
    stand in it."""
    images = iter(problem.images)
    videos = iter(problem.videos)
    turns = []
    for line in problem.question.split("\n"):
        its_images = tuple(itertools.islice(images, line.count(IMAGE)))
        its_videos = tuple(itertools.islice(videos, line.count(VIDEO)))
        turns.append(replace(problem, question=line, images=its_images, videos=its_videos))
    return turns


# --------------------------------------------------------------------------------------------------
# Checking a data set


@dataclass(frozen=True)
class CheckedRow:
    """What making a row's prompt showed."""

    index: int
    error: str = ""  # for a broken row, which has nothing of what follows
    tokens: int = 0  # of its prompt
    images: int = 0
    videos: int = 0
    source: str = ""
    unplaced: bool = False


@dataclass(frozen=True)
class Checked:
    """What `usable_problems` kept, and what it left out."""

    rows: list[CheckedRow]  # kept
    overlong: int
    bad: list[str]  # one message for each broken row

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(row.tokens for row in self.rows)

    def __str__(self) -> str:
        images = sum(row.images for row in self.rows)
        unplaced = sum(row.unplaced for row in self.rows)
        first = f"; the first: {self.bad[0]}" if self.bad else ""
        in_front = f"; in front of {unplaced} questions without a placeholder now stands <image>"
        return (
            f"kept {len(self.rows)} problems with {images} images (longest prompt {self.longest} "
            f"tokens), left out {self.overlong} overlong and {len(self.bad)} broken ones{first}"
            f"{in_front if unplaced else ''}"
        )


def usable_problems(
    problems: Problems, reader: Reader, max_prompt_tokens: int, skip_bad_rows: bool = False
) -> tuple[Problems, Checked]:
    """Make every prompt once before training, so that no row can stop a run on its second day.

    The ranks share the rows out, and all learn what each found. Prompts over max_prompt_tokens are
    left out and counted, never truncated. Raises ValueError, on every rank, for broken rows (see
    Reader; empty ones too), unless skip_bad_rows leaves them out and reports them, and if no row is
    left.
    """
    mine = range(this_rank(), len(problems), world_size())
    shown = None if this_rank() == 0 else True  # one progress bar, and none in a file
    found = [
        check_row(problems, index, reader)
        for index in tqdm(mine, "checking problems", disable=shown)
    ]
    gathered = itertools.chain.from_iterable(gather_objects(found))
    rows = sorted(gathered, key=lambda row: row.index)
    bad = [row.error for row in rows if row.error]
    if bad and not skip_bad_rows:
        first = "\n".join(bad[:5])
        raise ValueError(
            f"{len(bad)} of {len(problems)} rows are broken; repair them or set skip_bad_rows. "
            f"First:\n{first}"
        )
    good = [row for row in rows if not row.error]
    kept = [row for row in good if row.tokens <= max_prompt_tokens]
    if not kept:
        lengths = [row.tokens for row in good]
        seen = f"{min(lengths)} to {max(lengths)} tokens" if good else f"none; first {bad[0]}"
        raise ValueError(
            f"no problem is left: {len(bad)} are broken, and max_prompt_tokens={max_prompt_tokens} "
            f"is below the other prompts ({seen}); raise it, or lower max_pixels"
        )
    checked = Checked(kept, overlong=len(good) - len(kept), bad=bad)
    return problems.select([row.index for row in kept]), checked


def check_row(problems: Problems, index: int, reader: Reader) -> CheckedRow:
    """Read a row and make its prompt; what is wrong with it comes back as its `error`."""
    try:
        problem = problems[index]
        texts = (problem.question, *(problem.answers or [problem.answer]))
        if not all(text.strip() for text in texts):
            raise ValueError(
                f"{problem.where}: the answer or the question is empty; fill it in or remove the "
                "row"
            )
        tokens = len(reader(problem).ids)
    except ValueError as error:
        return CheckedRow(index, str(error))
    return CheckedRow(
        index=index,
        tokens=tokens,
        images=len(problem.images),
        videos=len(problem.videos),
        source=problem.source,
        unplaced=problem.unplaced,
    )


# --------------------------------------------------------------------------------------------------
# The order of problems


def batch_indices(seed: int, step: int, batch: int, total: int) -> list[int]:
    """The problems of one step, from (seed, step) alone: a run that resumes neither replays nor
    skips any.

    The steps, counted from 0 and laid end to end, visit each of `total` problems once per epoch,
    each epoch in its own order; a batch may straddle two epochs. Raises ValueError for step < 0,
    batch < 1 or total < 1.
    """
    if step < 0 or batch < 1 or total < 1:
        raise ValueError(
            f"step={step}, batch={batch}, total={total}: steps count from 0, and no batch can be "
            "empty"
        )
    indices = []
    for visit in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(visit, total)
        indices.append(_epoch_order(seed, epoch, total)[place])
    return indices


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, total: int) -> Sequence[int]:
    return random.Random(f"{seed} {epoch}").sample(range(total), total)


# --------------------------------------------------------------------------------------------------
# Other images, to see how much a model looks


VIEWS = ("own", "blank", "shuffled")


def with_images(problems: Sequence[Problem], index: int, view: str) -> Problem:
    """problems[index] with its "own" images, "blank" (white) ones, or "shuffled": those of another
    problem.

    What a model still answers with these, it answers without looking. Images keep their sizes, so
    prompts their lengths; other problems' images are stretched to them, and repeated where there
    are fewer. Raises ValueError, naming the row, for "shuffled" where no other problem has another
    image.
    """
    problem = problems[index]
    if view == "own" or not (problem.images or problem.videos):
        return problem
    pictures = [decode_image(raw) for raw in problem.images]
    if view == "blank":
        images = _white(pictures)
        clips = [_white(decode_video(video, VideoLimits())[0]) for video in problem.videos]
        videos = [tuple(map(png, clip)) for clip in clips]
    else:
        donor = donor_of(problems, index)
        others = itertools.cycle(donor.images)
        images = [decode_image(next(others)).resize(own.size) for own in pictures]
        videos = itertools.islice(itertools.cycle(donor.videos), len(problem.videos))
    return replace(problem, images=tuple(map(png, images)), videos=tuple(videos))


def whitened(prompt: Prompt, reader: Reader) -> Prompt:
    """The same prompt with white pictures of the same sizes, so of the same ids; itself where it
    has no picture. What is likelier with its own pictures was seen in them."""
    if not prompt.images and not prompt.videos:
        return prompt
    videos = [(np.full_like(frames, 255), timing) for frames, timing in prompt.videos]
    return reader.assemble(prompt.problem, _white(prompt.images), videos, prompt.text)


def _white(pictures: list[Image.Image]) -> list[Image.Image]:
    return [Image.new("RGB", picture.size, "white") for picture in pictures]


def donor_of(problems: Sequence[Problem], index: int) -> Problem:
    """Another problem with other images, and with some of each kind that problems[index] has.

    It is the first from half the set away on: neighbours in a data set often share a figure. Raises
    ValueError, naming the row, if there is none.
    """
    problem = problems[index]
    start = index + len(problems) // 2
    for place in range(start, start + len(problems)):
        other = problems[place % len(problems)]
        differs = (other.images, other.videos) != (problem.images, problem.videos)
        has_images = other.images or not problem.images
        has_videos = other.videos or not problem.videos
        if differs and has_images and has_videos:
            return other
    raise ValueError(
        f"{problem.where}: no other problem has an image to swap with; evaluate more problems"
    )
