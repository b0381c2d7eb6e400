"""Problems with images and videos: parquet rows -> token ids and pixels; and generated problems to
learn from.

    parquet --load_problems--> Problem (compressed bytes) --make_prompt--> Prompt (ids (P,), images,
    pixel_values) (seed, step) --batch_indices--> which problems python data.py OUT
    --make_figures--> OUT/train.parquet, OUT/test.parquet

An image is resized in one place, `resize_image`, so that the sampler and the trainer see the same
pixels; frames of a video are sampled in one place too, `decode_video`. A prompt is never truncated:
`usable_problems` makes every prompt before training starts and leaves the long ones out.
Deliberately not here: streaming from the hub, augmentation.

Legend  P tokens of one prompt, image tokens included
Source  resize rule: `smart_resize` of transformers' Qwen2VLImageProcessor
"""

import base64
import functools
import glob
import io
import itertools
import math
import random
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

INSTRUCTION = (
    "Reason step by step inside <think> </think>, then give only the final answer in \\boxed{}."
)


IMAGE, VIDEO = "<image>", "<video>"  # placeholders


COLUMNS = ("image", "video", "problem", "answer", "type", "source")  # our names for a data set's


MAX_ASPECT = 200  # Qwen's processor refuses a longer side of more than 200 times the shorter one


# what a data set from elsewhere may bring; a real one stays far below
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
)  # Pillow reads more, and some with the help of other programs


MAX_IMAGE_PIXELS, MAX_FILE_BYTES, MAX_CHARACTERS = 50_000_000, 100_000_000, 100_000


# --------------------------------------------------------------------------------------------------
# Rows of parquet files


@dataclass(frozen=True)
class Problem:
    """One row: a question about images, and the answer that earns the reward."""

    where: str  # "train.parquet row 17", for errors; rows count from 0
    question: str  # one <image> for each image, one <video> for each video
    images: tuple[bytes, ...] = field(repr=False)  # compressed, as stored
    answer: str
    type: str  # kind of question, "" if the column is absent
    source: str  # data source, the file name if the column is absent
    answers: tuple[
        str, ...
    ] = ()  # the texts of an answer that is a list: all are right, or there is one per image
    videos: tuple["bytes | tuple[bytes, ...]", ...] = field(
        default=(), repr=False
    )  # a file, or its frames, as stored

    @property
    def gold(self) -> str | tuple[str, ...]:
        """The answer as the row holds it, a text or the texts of a list."""
        return self.answers or self.answer


class Problems(Sequence):
    """Rows of parquet files, kept compressed: `problems[i]` makes a Problem, `problems[a:b]` a
    smaller Problems."""

    def __init__(self, rows: Sequence[tuple[Path, pa.Table, int]]):
        self.rows = rows  # (file, its table, number of the row in it)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        """One row, or a slice. ValueError, naming the row: an image not where it says, text that
        cannot be meant."""
        if isinstance(index, slice):
            return Problems(self.rows[index])
        file, table, row = self.rows[index]
        where = f"{file.name} row {row}"
        try:
            values = table.slice(row, 1).to_pylist()[0]
            listed = isinstance(values["answer"], list)
            # a cell holds one value, a list of them, or nothing
            cells = [values.get(name) for name in COLUMNS]
            cells = [
                cell if isinstance(cell, list) else [] if cell is None else [cell] for cell in cells
            ]
            images, videos = (
                tuple(_stored_bytes(value, file.parent) for value in cell) for cell in cells[:2]
            )
            question, answer, kind, source = (",".join(map(str, texts)) for texts in cells[2:])
            if len(question) + len(answer) > MAX_CHARACTERS:
                raise ValueError(
                    f"{len(question) + len(answer)} characters, {MAX_CHARACTERS} is the most; shorten it"
                )
            for name in (kind, source):
                if len(name) > 80 or not name.isprintable():
                    raise ValueError(
                        f"the type or source {name[:80]!r} names a metric; shorten it, make it printable"
                    )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        answers = tuple("" if text is None else str(text) for text in cells[3]) if listed else ()
        return Problem(where, question, images, answer, kind, source or file.name, answers, videos)

    def select(self, indices: Sequence[int]) -> "Problems":
        """The rows at `indices`, in that order; no bytes are copied."""
        return Problems([self.rows[index] for index in indices])


def load_problems(
    path: str | Path,
    split: str = "train",
    image_key: str = "images",
    problem_key: str = "problem",
    answer_key: str = "answer",
    type_key: str = "type",
    source_key: str = "data_source",
    video_key: str = "videos",
) -> Problems:
    """Open a data set; its images stay compressed until a prompt is made.

    `path` is a parquet file, a folder or a glob of them, or a data set of the hub such as
    "hiyouga/geometry3k". Of a folder or a hub data set the files named after the split are taken
    ("train-00000-of-00001.parquet"); all, if none is named after any. The keys name the columns;
    images (one or a list, see image_bytes), videos (a list; each a file in the same forms, or the
    list of its frames), type and source may be absent. Raises ValueError for no such file or split,
    a missing column, or no rows.
    """
    keys = dict(
        zip(
            COLUMNS,
            (image_key, video_key, problem_key, answer_key, type_key, source_key),
            strict=True,
        )
    )
    tables = [(file, _read_table(file, keys)) for file in _find_files(str(path), split)]
    if not any(table.num_rows for _, table in tables):
        raise ValueError(f"{path}: no rows; choose another file")
    return Problems([(file, table, row) for file, table in tables for row in range(table.num_rows)])


def _find_files(path: str, split: str) -> list[Path]:
    folder = Path(path).expanduser()
    if folder.is_file():
        return [folder]
    if files := sorted(map(Path, glob.glob(str(folder)))) if "*" in path else []:
        return files
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(path, repo_type="dataset", allow_patterns="*.parquet"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}: no such file or folder, and not to be had from the hub: {error}"
            ) from error
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.parquet"))

    def named(words: str) -> list[str]:  # "test" must not take testmini-00000.parquet
        return [name for name in names if re.search(rf"(^|/)({words})(?![A-Za-z])", name)]

    chosen = named(re.escape(split))
    if not names or (not chosen and named("train|validation|val|dev|test")):
        raise ValueError(
            f"{path}: no parquet file of split {split!r} among {names}; choose another split or file"
        )
    return [folder / name for name in chosen or names]


def _read_table(file: Path, keys: dict[str, str]) -> pa.Table:
    """The columns that a Problem is made of, under our names for them."""
    try:
        schema = pq.read_schema(file)
        present = {ours: theirs for ours, theirs in keys.items() if theirs in schema.names}
        table = pq.read_table(file, columns=list(present.values()))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{file} is not a whole parquet file ({error}); convert it, or download it again"
        ) from error
    # text-only rows have no image column; where one has the usual name, another image_key is a slip
    needed = ["problem", "answer", *(["image"] if {"image", "images"} & set(schema.names) else [])]
    for ours in needed:
        if ours not in present:
            raise ValueError(
                f"{file}: no column {keys[ours]!r} among {schema.names}; name it with {ours}_key"
            )
        kind = schema.field(keys[ours]).type
        inner = getattr(kind, "value_type", kind) if ours == "answer" else kind
        if ours not in ("image", "video") and (pa.types.is_nested(inner) or "binary" in str(inner)):
            wanted = "text, or a list of texts for an answer" if ours == "answer" else "text"
            raise ValueError(
                f"{file}: column {keys[ours]!r} is {kind}, but a {ours} is {wanted}; store it so"
            )
    return pa.table({ours: table[theirs] for ours, theirs in present.items()})


# --------------------------------------------------------------------------------------------------
# Images


def image_bytes(value: Any, folder: Path) -> bytes:
    """The compressed bytes of one image: of bytes, {bytes, path}, a path inside `folder`, base64 or
    a data URL.

    A path that leads out of the parquet file's folder, by a link too, is refused: a data set from
    elsewhere must not read this machine's other files. Raises ValueError for that, for a missing
    file and for anything else.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(
            f"the image is a {type(value).__name__}, not bytes, a path, base64 or a data URL; convert it"
        )
    try:
        if value.startswith("data:"):
            value = value[value.index(";base64,") + len(";base64,") :]
        elif "." in value:  # base64 has no dot, the file name of an image has one
            file = (folder / value).resolve()
            if not file.is_relative_to(folder.resolve()):
                raise ValueError(
                    "the path leads out of the parquet file's folder; move the image into it"
                )
            if (
                not file.is_file() or file.stat().st_size > MAX_FILE_BYTES
            ):  # to open a pipe would wait for ever
                raise ValueError(
                    f"there is no plain file of at most {MAX_FILE_BYTES} bytes; put one there"
                )
            return file.read_bytes()
        return base64.b64decode("".join(value.split()), validate=True)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # RuntimeError: links that lead to each other
        raise ValueError(
            f"image {value[:80]!r} is not a file's path, base64 or a base64 data URL: {error}"
        ) from error


def _stored_bytes(value: Any, folder: Path) -> bytes | tuple[bytes, ...]:
    """Of an image or a video file the bytes, of a list of frames those of each."""
    return (
        tuple(image_bytes(v, folder) for v in value)
        if isinstance(value, list)
        else image_bytes(value, folder)
    )


def decode_image(raw: bytes) -> Image.Image:
    """Bytes -> RGB picture: upright (EXIF), white where transparent, 16-bit grey scaled to 8.
    ValueError if broken."""
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        if (
            math.prod(image.size) > MAX_IMAGE_PIXELS
        ):  # known from the header; a few bytes can unfold to any size
            raise ValueError(
                f"{image.width} x {image.height} pixels, {MAX_IMAGE_PIXELS} is the most"
            )
        image = ImageOps.exif_transpose(image)
        image.load()  # the whole of it, so that a truncated file shows here
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(
            f"{len(raw)} bytes are not a readable image ({error}); repair or remove the row"
        ) from error
    if image.mode == "F":
        raise ValueError(
            "the image holds floats, and which one is white is unknown; store it with 8 or 16 bits"
        )
    if image.mode.startswith(
        "I"
    ):  # Pillow's own conversion cuts 16 bits off at 255: nearly all white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_image(image: Image.Image, min_pixels: int, max_pixels: int, factor: int) -> Image.Image:
    """The one resize, bicubic: sides become multiples of `factor`, width * height falls in
    [min_pixels, max_pixels].

    `factor` is the side of an image token in pixels (28 for Qwen2.5-VL), 1 where there is no such
    grid. A picture that
    fits comes back itself: a second call changes nothing, and neither does Qwen's processor. Raises
        as resized_size.
    """
    size = resized_size(*image.size, min_pixels, max_pixels, factor)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


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
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"the image is {width} x {height}, longer than {MAX_ASPECT} to 1; crop it or remove the row"
        )
    columns, rows = round(width / factor), round(height / factor)
    if columns * rows * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        columns, rows = (max(1, math.floor(side / shrink / factor)) for side in (width, height))
    elif columns * rows * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        columns, rows = (math.ceil(side * grow / factor) for side in (width, height))
    fewest, most = (
        max(1, math.ceil(min_pixels / factor**2)),
        max_pixels // factor**2,
    )  # image tokens
    if fewest <= columns * rows <= most and max(columns, rows) <= MAX_ASPECT * min(columns, rows):
        return columns * factor, rows * factor
    sizes = []
    for rows in range(1, most + 1):
        least, last = (
            max(math.ceil(fewest / rows), math.ceil(rows / MAX_ASPECT)),
            min(most // rows, rows * MAX_ASPECT),
        )
        if least <= last:
            columns = min(max(round(width / factor), least), last)
            misfit = math.hypot(
                math.log(columns * factor / width), math.log(rows * factor / height)
            )
            sizes.append((misfit, columns * factor, rows * factor))
    if not sizes:
        bounds = f"min_pixels={min_pixels} to max_pixels={max_pixels}; set them further apart"
        raise ValueError(f"no picture whose sides are multiples of {factor} has {bounds}")
    return min(sizes)[1:]


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------
# Video


@dataclass(frozen=True)
class VideoLimits:
    """How much of a video is seen: frames per second, most frames, most pixels of a frame."""

    fps: float = 2.0
    max_frames: int = 32
    max_pixels: int = 128 * 28 * 28


AS_THEY_ARE = {
    "do_resize": False,
    "do_sample_frames": False,
}  # what a processor is told about frames of a video


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
    frames, shown, start = [], None, 0.0
    try:
        with av.open(io.BytesIO(video)) as container:
            seconds = (container.duration or 0) / av.time_base
            wanted = min(max(1, round(seconds * limits.fps)), limits.max_frames)
            for frame in container.decode(video=0) if seconds and container.streams.video else ():
                start = start if shown else frame.time
                while (
                    shown
                    and len(frames) < wanted
                    and len(frames) * seconds / wanted < frame.time - start - 1e-6
                ):
                    frames.append(shown)  # what is on the screen at this fraction of the video
                shown = frame
    except av.FFmpegError as error:
        raise ValueError(
            f"{len(video)} bytes are not a readable video ({error}); repair or remove the row"
        ) from error
    if shown is None:
        raise ValueError(
            f"{len(video)} bytes hold no video of known duration; repair or remove the row"
        )
    frames += [shown] * (wanted - len(frames))
    return [
        f.to_image().rotate(f.rotation, expand=True) for f in frames
    ], wanted / seconds  # upright, as filmed


def _timed_frames(
    video: bytes | tuple[bytes, ...], limits: VideoLimits, factor: int
) -> tuple[np.ndarray, dict]:
    """Frames (F, height, width, 3), reduced to the limits, with their timing as transformers and
    vLLM want it."""
    frames, fps = decode_video(video, limits)
    frames = np.stack(
        [np.asarray(resize_image(frame, 1, limits.max_pixels, factor)) for frame in frames]
    )
    total = len(frames)
    return frames, dict(
        fps=fps, total_num_frames=total, duration=total / fps, frames_indices=list(range(total))
    )


# --------------------------------------------------------------------------------------------------
# Prompts


@dataclass(eq=False)
class Prompt:
    """What the policy is asked: the same ids and pixels for the sampler and for the trainer."""

    problem: Problem
    ids: Tensor  # (P,) int64, image tokens expanded
    short_ids: (
        Tensor  # one token for each image, as vLLM wants it, whose own processor expands them
    )
    images: list[Image.Image]  # RGB, resized
    inputs: dict[
        str, Tensor
    ]  # all else the processor returned: pixel_values, image_grid_thw, mm_token_type_ids (1, P)
    videos: list[tuple[np.ndarray, dict]] = field(
        default_factory=list
    )  # frames (F, height, width, 3) and their timing


class Reader:
    """Makes every prompt of a run, and keeps the latest, so that none is made twice in a step.

        reader = Reader(processor, min_pixels, max_pixels)
        reader(problem)         the Prompt that a conversation begins with
        reader.later(problem)   a Prompt that follows a response

    Args:
        processor: of the model, loaded with the same bounds on pixels.
        min_pixels, max_pixels: of an image.
        instruction: appended to the question of the first turn.
        video: how much of a video is seen.
        first: Problem of a row -> Problem that the policy reads first; an environment's `first`.
        kept: prompts that are remembered, the ones used last.
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
        self.processor, self.instruction, self.video, self.first = (
            processor,
            instruction,
            video,
            first,
        )
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.make = functools.lru_cache(kept)(self._make)

    def __call__(self, problem: Problem) -> Prompt:
        """Write the problem as one user turn, images where their placeholders stand, and turn it
        into ids and pixels.

        Raises ValueError, naming the row, for an unreadable image or video, more or fewer
        placeholders than images, a special token in the question, and a processor that resizes the
        images once more.
        """
        return self.make(problem, later=False)

    def later(self, problem: Problem) -> Prompt:
        """As a turn that follows a response: only what the chat template puts after the response's
        end token. Raises as above, and for a template that cannot be continued."""
        return self.make(problem, later=True)

    def _make(self, problem: Problem, later: bool) -> Prompt:
        shown = self.first(problem) if self.first and not later else problem
        try:
            images, videos, text = self._parts(shown, later)
        except ValueError as error:
            raise ValueError(f"{problem.where}: {error}") from error
        media = {"images": images} if images else {}
        if videos:
            frames, timing = zip(*videos, strict=True)
            media["videos"] = list(frames)
            media["videos_kwargs"] = {"video_metadata": list(timing), **AS_THEY_ARE}
        # the template writes every special token itself; Gemma's tokenizer would add a second <bos>
        plain = dict(add_special_tokens=False, return_tensors="pt")
        inputs = dict(self.processor(text=[text], **plain, **media))
        if "image_grid_thw" in inputs:
            self._check_sizes(problem, images, inputs["image_grid_thw"])
        del inputs["attention_mask"]  # one prompt, no padding
        ids = inputs.pop("input_ids")[0]
        short_ids = self.processor.tokenizer(text, **plain).input_ids[0]
        return Prompt(problem, ids, short_ids, images, inputs, videos)

    def _parts(self, problem: Problem, later: bool) -> tuple[list, list, str]:
        """Images, videos with their timing, and the text, as the processor takes them."""
        vision, tokenizer = self.processor.image_processor, self.processor.tokenizer
        instruction = "" if later else self.instruction
        content = _content(problem, special_tokens(tokenizer), instruction)
        messages = [{"role": "user", "content": content}]
        images = [decode_image(raw) for raw in problem.images]
        factor = vision.patch_size * vision.merge_size if hasattr(vision, "merge_size") else 1
        if factor > 1:  # others cut an image into tiles of a fixed size, and are bounded in that
            bounds = (self.min_pixels, self.max_pixels)
            images = [resize_image(image, *bounds, factor) for image in images]
        videos = [_timed_frames(stored, self.video, factor) for stored in problem.videos]
        write = _later_turn if later else _render
        return images, videos, write(messages, self.processor)

    def _check_sizes(self, problem: Problem, images: list[Image.Image], grid: Tensor) -> None:
        patch = self.processor.image_processor.patch_size
        sizes = [image.size for image in images]
        seen = [(columns * patch, rows * patch) for _, rows, columns in grid.tolist()]
        if seen != sizes:
            raise ValueError(
                f"{problem.where}: the processor resized {sizes} once more, to {seen}, so the sampler "
                f"could see other pixels; load it with min_pixels={self.min_pixels}, "
                f"max_pixels={self.max_pixels}"
            )


def _content(
    problem: Problem, special_tokens: Sequence[str], instruction: str
) -> list[dict[str, str]]:
    """The chat message's content: the question cut at its placeholders, and the instruction after
    it."""
    pieces = re.split(f"({IMAGE}|{VIDEO})", problem.question)
    for placeholder, held in ((IMAGE, problem.images), (VIDEO, problem.videos)):
        if (written := pieces.count(placeholder)) != len(held):
            kind = placeholder[1:-1]
            raise ValueError(
                f"{written} {placeholder} in the question but {len(held)} {kind}s in the row; write one for each "
                f"{kind}, and check {kind}_key"
            )
    texts = "\n".join(piece for piece in pieces if piece not in (IMAGE, VIDEO))
    # A question with such a token could forge an image or end the user's turn; without, the text is
    # only text.
    if control := [token for token in special_tokens if token and token in texts]:
        raise ValueError(
            f"the question holds {control}, which the model takes for control; remove it from the row"
        )
    pieces[-1] += f"\n{instruction}" if instruction else ""
    return [
        {"type": piece[1:-1]} if piece in (IMAGE, VIDEO) else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]


def special_tokens(tokenizer) -> list[str]:
    """Every token that a tokenizer takes for control; its own `all_special_tokens` misses some of
    Idefics3's."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _render(messages: list[dict], processor: Any) -> str:
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _later_turn(messages: list[dict], processor: Any) -> str:
    """What the template puts between the end of a response and the next one."""
    first, response = [{"role": "user", "content": [{"type": "text", "text": "?"}]}], "!"
    answer = {"role": "assistant", "content": [{"type": "text", "text": response}]}
    start = _render(first, processor) + response + processor.tokenizer.eos_token
    whole = _render([*first, answer, *messages], processor)
    if not whole.startswith(start):
        raise ValueError(
            f"the chat template writes a conversation anew with every turn ({whole[: len(start)]!r} instead of "
            f"{start!r}), so it cannot go on from its tokens; choose another template for conversations"
        )
    return whole[len(start) :]


def split_turns(problem: Problem) -> list[Problem]:
    """The turns of a scripted conversation: one for each line of the question, with the images that
    stand in it."""
    images, videos = iter(problem.images), iter(problem.videos)
    return [
        replace(
            problem,
            question=line,
            images=tuple(itertools.islice(images, line.count(IMAGE))),
            videos=tuple(itertools.islice(videos, line.count(VIDEO))),
        )
        for line in problem.question.split("\n")
    ]


# --------------------------------------------------------------------------------------------------
# Checking a data set


@dataclass(frozen=True)
class Report:
    """What `usable_problems` kept, and what it left out."""

    kept: int
    longest: int  # tokens of the longest prompt kept
    overlong: int
    bad: list[str]  # one message for each broken row

    def __str__(self) -> str:
        first = f"; the first: {self.bad[0]}" if self.bad else ""
        left_out = f"{self.overlong} overlong and {len(self.bad)} broken ones{first}"
        return (
            f"kept {self.kept} problems (longest prompt {self.longest} tokens), left out {left_out}"
        )


def usable_problems(
    problems: Problems, reader: Reader, max_prompt_tokens: int, skip_bad_rows: bool = False
) -> tuple[Problems, Report]:
    """Make every prompt once before training, so that no row can stop a run on its second day.

    Prompts over max_prompt_tokens are left out and counted, never truncated. Raises ValueError for
    broken rows (see Reader; empty ones too), unless skip_bad_rows leaves them out and reports them,
    and if no row is left.
    """
    lengths, bad = {}, []
    for index in tqdm(range(len(problems)), "checking problems", disable=None):
        try:
            problem = problems[index]
            texts = (problem.question, *(problem.answers or [problem.answer]))
            if not all(text.strip() for text in texts):
                raise ValueError(
                    f"{problem.where}: the answer or the question is empty; fill it in or remove "
                    "the row"
                )
            lengths[index] = len(reader(problem).ids)
        except ValueError as error:
            bad.append(str(error))
    if bad and not skip_bad_rows:
        first = "\n".join(bad[:5])
        raise ValueError(
            f"{len(bad)} of {len(problems)} rows are broken; repair them or set skip_bad_rows. "
            f"First:\n{first}"
        )
    kept = [index for index, length in lengths.items() if length <= max_prompt_tokens]
    if not kept:
        seen = f"{min(lengths.values())} to {max(lengths.values())} tokens" if lengths else "none"
        raise ValueError(
            f"no problem is left: {len(bad)} are broken, and max_prompt_tokens={max_prompt_tokens} "
            f"is below the other prompts ({seen}); raise it, or lower max_pixels"
        )
    longest = max(lengths[index] for index in kept)
    return problems.select(kept), Report(len(kept), longest, len(lengths) - len(kept), bad)


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
            f"step={step}, batch={batch}, total={total}: steps count from 0, and no batch can be empty"
        )
    places = (divmod(place, total) for place in range(step * batch, (step + 1) * batch))
    return [_epoch_order(seed, epoch, total)[place] for epoch, place in places]


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
    problem, total = problems[index], len(problems)
    if view == "own" or not (problem.images or problem.videos):
        return problem
    images = [decode_image(raw) for raw in problem.images]
    if view == "blank":
        clips = (decode_video(video, VideoLimits())[0] for video in problem.videos)
        white = [
            tuple(png(Image.new("RGB", x.size, "white")) for x in pictures)
            for pictures in (images, *clips)
        ]
        return replace(problem, images=white[0], videos=tuple(white[1:]))
    # from half the set away on, as neighbours in a data set often share a figure
    others = (problems[(index + total // 2 + i) % total] for i in range(total))
    own = problem.images, problem.videos
    held = ((p, (p.images, p.videos)) for p in others)
    donor = next(
        (
            p
            for p, its in held
            if its != own and all(b or not a for a, b in zip(own, its, strict=True))
        ),
        None,
    )
    if donor is None:
        raise ValueError(
            f"{problem.where}: no other problem has an image to swap with; evaluate more problems"
        )
    theirs = zip(itertools.cycle(donor.images), images)
    swapped = (
        tuple(png(decode_image(raw).resize(image.size)) for raw, image in theirs) if images else ()
    )
    videos = tuple(donor.videos[i % len(donor.videos)] for i in range(len(problem.videos)))
    return replace(problem, images=swapped, videos=videos)
