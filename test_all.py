"""Tests, file by file: each name is the promise that it checks.

    pytest test_all.py              everything but the next two
    pytest test_all.py -m slow      kills, restarts and many steps: 5 minutes
    pytest test_all.py -m bench -s  the benchmark

Nothing is downloaded and nothing of ours is mocked. Tests that need vLLM, or the Geometry3K sample
beside the project, are skipped with the reason where these are missing. The last lines run what
torchrun starts for the tests of 2 ranks.
"""

import base64
import contextlib
import ctypes
import dataclasses
import functools
import gc
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import pkgutil
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a test never downloads

import data
import grpo
import model
import reward
import rollout
import train
from reward import (
    Grader,
    Judge,
    Response,
    compute_rewards,
    format_reward,
    last_boxed,
    parse_weights,
)
from support import checkpoint, figures, memory, processes, report, tiny_model

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

HERE = Path(__file__).parent
GEO3K = HERE.parent / "shared" / "geo3k"


def close(got, expected, atol=1e-6):
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# grpo.py: every formula against numbers worked out by hand


def test_advantages_by_hand():
    # rewards 1,0,0,0: mean 1/4, population std sqrt(3)/4, so the winner gets sqrt(3)
    got = grpo.group_advantages(torch.tensor([[1.0, 0, 0, 0]]))
    close(got, torch.tensor([[3.0, -1, -1, -1]]) / 3**0.5, atol=1e-4)


def test_advantages_without_scale_and_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0]])
    close(grpo.group_advantages(rewards, "none"), torch.tensor([[0.75, -0.25, -0.25, -0.25]]))
    # the others' mean is 0 for the winner and 1/3 for each loser
    close(grpo.group_advantages(rewards, "loo"), torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]]))


def test_a_flat_group_has_no_advantage_at_all():
    # the float32 mean of seven times 0.1 is not 0.1, and its std is not 0
    rewards = torch.full((2, 7), 0.1)
    for scale in ("std", "none", "loo"):
        assert torch.equal(grpo.group_advantages(rewards, scale), torch.zeros(2, 7))


def test_advantages_refuse_a_group_of_one():
    with pytest.raises(ValueError, match="group of 1"):
        grpo.group_advantages(torch.ones(3, 1))


@pytest.mark.parametrize(
    "ratio, advantage, loss, clipped",
    [
        (1.5, 1.0, -1.3, True),  # above 1 + 0.3: the gain is capped
        (1.5, -1.0, 1.5, False),  # a worse token that became likelier is never spared
        (0.5, 1.0, -0.5, False),
        (0.5, -1.0, 0.8, True),  # below 1 - 0.2
        (1.1, 1.0, -1.1, False),
    ],
)
def test_clipped_loss_by_hand(ratio, advantage, loss, clipped):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    got, cut = grpo.policy_loss(
        logprobs, torch.zeros(1), torch.tensor([advantage]), torch.tensor([1]), 0.2, 0.3
    )
    close(got, torch.tensor([loss]))
    assert cut.tolist() == [clipped]
    # d(-r A)/dlogp = -r A where nothing is cut, else 0
    close(
        torch.autograd.grad(got.sum(), logprobs)[0],
        torch.tensor([0.0 if clipped else -ratio * advantage]),
    )


def test_sequence_ratio_is_the_geometric_mean_over_each_response():
    # response 1: log ratios 0.1 and 0.3, mean 0.2; response 2: -0.1
    logprobs = torch.tensor([0.1, 0.3, -0.1])
    got, _ = grpo.policy_loss(
        logprobs,
        torch.zeros(3),
        torch.tensor([1.0, 1.0, 1.0]),
        torch.tensor([2, 1]),
        1.0,
        1.0,
        ratio="sequence",
    )
    close(got, -torch.tensor([0.2, 0.2, -0.1]).exp())


def test_token_weights_by_hand():
    lengths = torch.tensor([1, 3])
    weights = functools.partial(
        grpo.token_weights, lengths, total_tokens=4, total_responses=2, max_response_tokens=10
    )
    close(weights("token"), torch.tensor([1, 1, 1, 1]) / 4)
    close(weights("sequence"), torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]))
    close(weights("constant"), torch.tensor([1, 1, 1, 1]) / 20)


def test_kl_estimators_by_hand_and_on_average():
    # d = ln 2: k1 = 0.6931, k2 = 0.2402, k3 = 1/2 - 1 + 0.6931
    d = torch.tensor([math.log(2)])
    for kind, value in (("k1", 0.6931), ("k2", 0.2402), ("k3", 0.1931)):
        close(grpo.kl_estimate(d, torch.zeros(1), kind), torch.tensor([value]), atol=1e-4)
    # sums over a whole distribution: k1 and k3 give KL exactly, and k3 is never negative
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    kl = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        close((p * grpo.kl_estimate(p.log(), q.log(), kind)).sum(), kl)
    assert (grpo.kl_estimate(p.log(), q.log(), "k3") >= 0).all()


def test_importance_weights_by_hand():
    old, sampler = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([-1.0, 1.0, 0.5])
    lengths = torch.tensor([2, 1])
    # token ratios e, 1/e, e^-0.5, capped at 2; sequence ratios e^(1 - 1) = 1 and e^-0.5
    close(
        grpo.importance_weights(old, sampler, lengths, 2.0),
        torch.tensor([2.0, math.exp(-1), math.exp(-0.5)]),
    )
    close(
        grpo.importance_weights(old, sampler, lengths, 2.0, "sequence"),
        torch.tensor([1.0, 1.0, math.exp(-0.5)]),
    )
    close(grpo.importance_weights(old, sampler, lengths, 2.0, "none"), torch.ones(3))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: grpo.group_advantages(x[None], "best"),
        lambda x: grpo.policy_loss(x, x, x, torch.tensor([2]), ratio="word"),
        lambda x: grpo.token_weights(torch.tensor([2]), "mean", 2, 1, 2),
        lambda x: grpo.kl_estimate(x, x, "k4"),
        lambda x: grpo.importance_weights(x, x, torch.tensor([2]), 2.0, "word"),
    ],
)
def test_an_unknown_variant_is_refused_by_name(call):
    with pytest.raises(ValueError, match=r"'(best|word|mean|k4)'"):
        call(torch.zeros(2))


# --------------------------------------------------------------------------------------------------
# data.py

MIN_PIXELS, MAX_PIXELS, FACTOR = 28 * 28, 28 * 28 * 64, 28
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_processor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS):
    """Qwen2.5-VL's processor around a tokenizer that knows bytes and Qwen's special tokens only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    symbols = {
        symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=symbols, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [f"<|{n}|>" for n in "im_start vision_start vision_end image_pad video_pad".split()]
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=min_pixels, max_pixels=max_pixels),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=special,
        ),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def encode(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def red(width=56, height=56):
    return encode(Image.new("RGB", (width, height), (255, 0, 0)))


def problem(question="<image>What?", images=None, answer="4", where="train.parquet row 17"):
    images = (red(),) * question.count("<image>") if images is None else images
    return data.Problem(where, question, images, answer, "", "train.parquet")


def build_reader(processor, instruction="", **options):
    return data.Reader(processor, MIN_PIXELS, MAX_PIXELS, instruction, **options)


def write(folder, name="train.parquet", **columns):
    """A parquet file of the given columns, None for a missing one; returns its path."""
    total = len(next(values for values in columns.values() if values is not None))
    columns = {"problem": ["<image>What?"] * total, "answer": ["4"] * total, **columns}
    pq.write_table(
        pa.table({key: values for key, values in columns.items() if values is not None}),
        folder / name,
    )
    return folder / name


# --- rows


def test_every_form_of_an_image_cell_gives_the_same_bytes(tmp_path):
    raw = red()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(raw)
    text = base64.b64encode(raw).decode()
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    inside = str(tmp_path / "pictures" / "a.png")
    for value in (
        raw,
        {"bytes": raw, "path": None},
        {"bytes": raw, "path": "../ignored.png"},
        {"bytes": None, "path": "pictures/a.png"},
        "pictures/a.png",
        inside,
        text,
        wrapped,
        "data:image/png;base64," + text,
    ):
        for cell in (value, [value]):
            file = write(tmp_path, images=[cell])
            assert data.load_problems(file)[0].images == (raw,), value


def test_paths_that_leave_the_folder_are_refused(tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(red())
    (tmp_path / "inside_too").mkdir()  # shares the prefix of the folder's name
    (tmp_path / "inside_too" / "b.png").write_bytes(red())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    for name in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "linked/secret.png",
        "../inside_too/b.png",
    ):
        rows = data.load_problems(write(folder, images=[["a.png"], [name]]))
        with pytest.raises(ValueError, match=r"train\.parquet row 1: .*leads out"):
            rows[1]
    # the folder itself may be reached by a link
    (folder / "own.png").write_bytes(red())
    write(folder, images=[["own.png"]])
    (tmp_path / "alias").symlink_to(folder)
    assert data.load_problems(tmp_path / "alias" / "train.parquet")[0].images == (red(),)


@pytest.mark.parametrize(
    "value",
    [
        "missing.png",
        "no base64!",
        "data:image/png,raw",
        "nul\0.png",
        "x" * 5000 + ".png",
        "/etc/passwd",
        ".",
    ],
)
def test_image_text_that_is_nothing_known_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="row 0: image"):
        data.load_problems(write(tmp_path, images=[[value]]))[0]
    with pytest.raises(ValueError, match="int"):
        data.image_bytes(3, tmp_path)
    with pytest.raises(ValueError, match="NoneType"):
        data.image_bytes({"bytes": None, "path": None}, tmp_path)


def test_a_row_keeps_its_texts_types_and_place(tmp_path):
    write(tmp_path, "train-0.parquet", problem=["a", None], answer=["1", "2"])
    kinds, images = [["Triangle", "Circle"]], [[red(), red()]]
    write(tmp_path, "train-1.parquet", problem=["c"], answer=[3], type=kinds, images=images)
    rows = data.load_problems(tmp_path)
    assert [p.where for p in rows] == [
        "train-0.parquet row 0",
        "train-0.parquet row 1",
        "train-1.parquet row 0",
    ]
    assert [(p.question, p.answer, p.type, len(p.images)) for p in rows] == [
        ("a", "1", "", 0),
        ("", "2", "", 0),
        ("<image><image>c", "3", "Triangle,Circle", 2),
    ]
    assert [p.question for p in rows[::-2]] == ["<image><image>c", "a"] and rows[
        -1
    ].source == "train-1.parquet"
    assert [p.question for p in rows.select([2, 0])] == ["<image><image>c", "a"]
    assert [p.gold for p in rows] == ["1", "2", "3"]
    with pytest.raises(IndexError):
        rows[3]


def test_columns_may_have_other_names(tmp_path):
    file = write(
        tmp_path,
        problem=None,
        answer=None,
        q=["a<image>"],
        a=["7"],
        image=[red()],
        kind=["k"],
        from_=["s"],
    )
    names = "image=image,problem=q,answer=a,type=kind,source=from_"
    row = data.load_problems(file, columns=names)[0]
    assert (row.question, row.answer, row.images, row.type, row.source) == (
        "a<image>",
        "7",
        (red(),),
        "k",
        "s",
    )


def test_an_answer_may_be_a_list_and_a_row_names_its_source(tmp_path, processor):
    rows = data.load_problems(
        write(tmp_path, answer=[["4", "four"], ["5"], None], data_source=["vqa", None, "x"])
    )
    assert [(p.answer, p.gold, p.source) for p in rows] == [
        ("4,four", ("4", "four"), "vqa"), ("5", ("5",), "train.parquet"), ("", "", "x")
    ]  # fmt: skip
    for cell in ([], [None], ["4", " "]):
        rows = data.load_problems(
            write(tmp_path, problem=["?"], answer=pa.array([cell], pa.list_(pa.string())))
        )
        with pytest.raises(
            ValueError, match=r"train\.parquet row 0: the answer or the question is empty"
        ):
            data.usable_problems(rows, build_reader(processor), 999)


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    def names(split):
        return sorted({row.source for row in data.load_problems(tmp_path, split)})

    (tmp_path / "data").mkdir()
    for name in (
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/testmini.parquet",
    ):
        write(tmp_path, name, problem=["a"])
    assert names("train") == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert names("testmini") == ["testmini.parquet"]
    for absent in ("test", "validation"):  # above all, test is not testmini
        with pytest.raises(ValueError, match=f"split '{absent}'.*train-00000"):
            names(absent)


def test_a_folder_without_split_names_is_refused_and_a_glob_gives_what_it_matches(tmp_path):
    for name in ("b.parquet", "a.parquet"):
        write(tmp_path, name, problem=[name])
    # both would be trained on and held out
    with pytest.raises(ValueError, match=r"'train' among \['a.parquet', 'b.parquet'\].*glob"):
        data.load_problems(tmp_path)
    rows = data.load_problems(f"{tmp_path}/*.parquet")
    assert [p.question for p in rows] == ["a.parquet", "b.parquet"]
    assert [p.question for p in data.load_problems(f"{tmp_path}/b*.parquet")] == ["b.parquet"]


def test_what_cannot_be_loaded_says_what_is_there(tmp_path):
    with pytest.raises(ValueError, match=r"the problem among \['answer', 'q'\].*problem=NAME"):
        data.load_problems(write(tmp_path, problem=None, answer=["1"], q=["a"]))
    with pytest.raises(ValueError, match=r"the answer among \['problem'\].*answer=NAME"):
        data.load_problems(write(tmp_path, problem=["a"], answer=None))
    for column, value in (("problem", ["4"]), ("answer", [["4"]]), ("answer", {"a": "4"})):
        with pytest.raises(
            ValueError, match=rf"train\.parquet row 0: the {column} is a? ?(list|s)"
        ):
            data.load_problems(write(tmp_path, **{column: [value]}))[0]
    with pytest.raises(ValueError, match="no rows"):
        data.load_problems(
            write(tmp_path, problem=pa.array([], pa.string()), answer=pa.array([], pa.string()))
        )
    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"broken\.parquet is not a whole parquet file"):
        data.load_problems(tmp_path / "broken.parquet")
    (tmp_path / "empty").mkdir()
    for path in (
        tmp_path / "empty",
        tmp_path / "none.parquet",
        "data/none.parquet",
        f"{tmp_path}/*.jsonl",
        "a/b/c",
    ):
        with pytest.raises(ValueError, match="no "):
            data.load_problems(path)
    with pytest.raises(ValueError, match="no such file or folder, and not to be had from the hub"):
        data.load_problems("nobody/nothing")


# --- images


def test_transparency_is_laid_on_white():
    # red at alpha 128: 255, and 0 * 128/255 + 255 * 127/255 = 127
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert data.decode_image(encode(half)).getpixel((0, 0)) == (255, 127, 127)
    assert data.decode_image(encode(Image.new("LA", (4, 4), (0, 0)))).getpixel((0, 0)) == (
        255,
        255,
        255,
    )
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    image = data.decode_image(encode(palette, transparency=0))
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((1, 0)) == (0, 0, 255)


@pytest.mark.parametrize("mode, form, value, expected", [
    ("RGB", "PNG", (1, 2, 3), (1, 2, 3)), ("L", "PNG", 77, (77, 77, 77)), ("1", "PNG", 1, (255, 255, 255)),
    ("P", "PNG", 0, (0, 0, 0)), ("RGBA", "PNG", (9, 8, 7, 255), (9, 8, 7)), ("LA", "PNG", (50, 255), (50, 50, 50)),
    ("CMYK", "TIFF", (0, 255, 255, 0), (255, 0, 0)), ("L", "JPEG", 128, (128, 128, 128)),
    ("RGB", "GIF", (255, 0, 0), (255, 0, 0)), ("I;16", "TIFF", 65535, (255, 255, 255)),
])  # fmt: skip
def test_every_mode_becomes_rgb(mode, form, value, expected):
    image = data.decode_image(encode(Image.new(mode, (6, 5), value), form))
    assert image.mode == "RGB" and image.size == (6, 5) and image.getpixel((2, 2)) == expected


def test_sixteen_bit_grey_is_scaled_not_clipped():
    # 65535 / 257 = 255; 32896 = 128 * 257; 256 is still black
    grey = np.array([[0, 256, 32896, 65535]], dtype=np.uint16)
    image = data.decode_image(encode(Image.fromarray(grey)))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 0, 128, 255]


def test_exif_turns_the_picture_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    assert data.decode_image(encode(Image.new("RGB", (40, 20)), "JPEG", exif=exif)).size == (20, 40)


def test_what_is_not_an_image_is_a_value_error():
    whole = encode(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    )
    floats = encode(Image.new("F", (4, 4)), "TIFF")
    for raw in (b"", b"hello", whole[:60], whole[: len(whole) // 2], floats):
        with pytest.raises(ValueError):
            data.decode_image(raw)


def random_cases(total):
    rng = random.Random(0)
    for _ in range(total):
        width = round(math.exp(rng.uniform(0, 8)))
        height = max(1, round(width * math.exp(rng.uniform(-5.2, 5.2))))
        if max(width, height) > 200 * min(width, height):
            continue
        factor = rng.choice([28, 32])
        low = rng.randint(1, 300)
        yield (
            width,
            height,
            low * factor**2,
            (low * rng.choice([1, 2, 4]) + rng.randint(0, 999)) * factor**2,
            factor,
        )


def test_resized_size_is_on_the_grid_within_bounds_and_left_alone_by_qwens_rule():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    same = total = 0
    for width, height, low, high, factor in random_cases(4000):
        try:
            new = data.resized_size(width, height, low, high, factor)
        except ValueError as error:  # bounds of one prime number of tiles, say 263, have no size of aspect below 200
            assert "no picture" in str(error)
            continue
        assert new[0] % factor == 0 and new[1] % factor == 0 and low <= new[0] * new[1] <= high
        assert data.resized_size(*new, low, high, factor) == new
        assert smart_resize(new[1], new[0], factor, low, high) == new[::-1]
        same += smart_resize(height, width, factor, low, high) == new[::-1]
        total += 1
    assert total > 3000 and same > 0.9 * total  # the rule itself wherever it keeps its promise


def test_resize_by_hand():
    # 100 x 60: 3.57 and 2.14 tiles of 28 round to 4 x 2
    assert data.resized_size(100, 60, 784, 784 * 64, 28) == (112, 56)
    # 560 x 280 has 200 tiles, 50 allowed: half of each side, 10 x 5
    assert data.resized_size(560, 280, 784, 784 * 50, 28) == (280, 140)
    # 28 x 28 has 1 tile, 4 wanted: twice each side
    assert data.resized_size(28, 28, 784 * 4, 784 * 64, 28) == (56, 56)
    # factor 1 within bounds: untouched
    assert data.resized_size(101, 57, 1, 10**6, 1) == (101, 57)
    # Qwen's rule gives 5992 x 28, which it refuses as longer than 200 to 1
    assert data.resized_size(6000, 30, 784, 10**6, 28) == (5600, 28)


def test_resize_returns_the_picture_itself_when_it_fits():
    image = data.decode_image(red(112, 56))
    assert data.resize_image(image, 784, 784 * 64, 28) is image
    small = data.resize_image(image, 784, 784 * 4, 28)
    assert small.size == (56, 28) and small.getpixel((5, 5)) == (255, 0, 0)


def test_resize_refuses_extreme_aspect_and_impossible_bounds():
    with pytest.raises(ValueError, match=r"201 x 1.*200 to 1"):
        data.resized_size(201, 1, 784, 784 * 64, 28)
    with pytest.raises(ValueError, match=r"multiples of 28.*further apart"):
        data.resized_size(100, 100, 1000, 1100, 28)


def test_blank_and_shuffled_images_keep_sizes_and_lose_content():
    def grey(shade, *sizes):
        return tuple(encode(Image.new("L", size, shade)) for size in sizes)

    rows = [problem("<image><image>", grey(10, (60, 40), (40, 90))), problem("What?", ()),
            problem(images=grey(50, (28, 28))), problem("<image><image><image>", grey(90, *[(56, 56)] * 3)),
            problem(images=grey(50, (28, 28)))]  # fmt: skip
    # shuffled: the first from two rows on, round the end, that has images and others: rows 2, none,
    # 0 (4 has the same), 0 (two for three), and 3 (1 has none, 2 the same)
    seen = {"own": [[10, 10], [], [50], [90] * 3, [50]], "blank": [[255, 255], [], [255], [255] * 3, [255]],
            "shuffled": [[50, 50], [], [10], [10] * 3, [90]]}  # fmt: skip
    for view in data.VIEWS:
        for i, row in enumerate(rows):
            changed = data.with_images(rows, i, view)
            images = [data.decode_image(raw) for raw in changed.images]
            assert [image.getpixel((0, 0))[0] for image in images] == seen[view][i], (view, i)
            assert [image.size for image in images] == [
                data.decode_image(raw).size for raw in row.images
            ]
            assert dataclasses.replace(changed, images=()) == dataclasses.replace(row, images=())
    with pytest.raises(ValueError, match="row 17: no other problem has an image"):
        data.with_images([rows[1], rows[2], rows[4]], 1, "shuffled")


# --- prompts


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_prompt_holds_as_many_image_tokens_as_its_images_have_tiles(processor, count):
    sizes = [(56, 56), (84, 28), (28, 112)][
        :count
    ]  # 4, 3 and 4 tiles of 28 x 28; four 14-pixel patches in each
    tiles = [4, 3, 4][:count]
    text = "".join(f"{i}<image>" for i in range(count)) + "end"
    images = tuple(red(*size) for size in sizes)
    prompt = build_reader(processor, "Answer.")(problem(text, images))
    assert prompt.ids.dtype == torch.int64 and prompt.ids.dim() == 1
    assert (prompt.ids == processor.image_token_id).sum() == sum(tiles)
    assert [image.size for image in prompt.images] == sizes
    expected = {"mm_token_type_ids"} | ({"pixel_values", "image_grid_thw"} if count else set())
    assert set(prompt.inputs) == expected
    assert prompt.inputs["mm_token_type_ids"].shape == (1, len(prompt.ids))
    assert prompt.inputs["mm_token_type_ids"].sum() == sum(tiles)
    if count:
        assert prompt.inputs["pixel_values"].shape == (4 * sum(tiles), 3 * 2 * 14 * 14)
    seen = "".join(
        f"{i}<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for i, n in enumerate(tiles)
    )
    text = f"<|im_start|>user\n{seen}end\nAnswer.<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.decode(prompt.ids) == text


def test_the_instruction_may_be_empty_and_a_question_only_an_image(processor):
    prompt = build_reader(processor)(problem("<image>"))
    assert processor.tokenizer.decode(prompt.ids).endswith(
        "<|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = data.Reader(processor, MIN_PIXELS, MAX_PIXELS)(problem("<image>"))
    assert data.INSTRUCTION in processor.tokenizer.decode(prompt.ids)


def test_a_large_image_is_resized_into_the_bounds(processor):
    prompt = build_reader(processor)(problem(images=(red(900, 600),)))
    width, height = prompt.images[0].size
    assert width * height <= MAX_PIXELS and prompt.inputs["image_grid_thw"].tolist() == [
        [1, height // 14, width // 14]
    ]


@pytest.mark.parametrize(
    "question, images", [("What?", (red(),)), ("<image>", ()), ("<image><image>", (red(),) * 3)]
)
def test_a_placeholder_mismatch_names_the_row_and_both_counts(processor, question, images):
    expected = (
        rf"train\.parquet row 17: {question.count('<image>')} <image> .* {len(images)} images"
    )
    with pytest.raises(ValueError, match=expected):
        build_reader(processor)(problem(question, images))


@pytest.mark.parametrize(
    "text", ["<|image_pad|>", "<|vision_start|>", "<|im_start|>system", "<|im_end|>"]
)
def test_control_tokens_in_a_question_are_refused(processor, text):
    with pytest.raises(ValueError, match="row 17: the question holds"):
        build_reader(processor)(problem(f"<image>say {text} now"))


def test_ordinary_text_and_empty_special_tokens_pass():
    content = data._content(problem("<image>is a < b | c > d?"), ["", "<|im_end|>", "<image>"], "")
    assert content == [{"type": "image"}, {"type": "text", "text": "is a < b | c > d?"}]


def test_a_processor_with_other_bounds_is_refused_instead_of_resizing_again():
    other = build_processor(MIN_PIXELS, 784)
    with pytest.raises(ValueError, match=r"row 17: .*\[\(56, 56\)\] once more, to \[\(28, 28\)\]"):
        build_reader(other)(problem())


def test_usable_problems_counts_overlong_and_broken_rows(tmp_path, processor):
    truncated = red(300, 300)[:200]
    file = write(
        tmp_path,
        problem=[
            "<image>ok",
            "<image>" + "long " * 200,
            "<image>two<image>",
            "<image>torn",
            "<image>empty",
            "<image>ok",
        ],
        answer=["1", "2", "3", "4", " ", "6"],
        images=[[red()], [red()], [red()], [truncated], [red()], [red(112, 112)]],
    )
    rows = data.load_problems(file)
    with pytest.raises(
        ValueError, match=r"(?s)3 of 6 rows are broken.*row 2: .*row 3: .*row 4: the answer or"
    ):
        data.usable_problems(rows, build_reader(processor), 300)
    usable, report = data.usable_problems(rows, build_reader(processor), 300, skip_bad_rows=True)
    assert [p.answer for p in usable] == ["1", "6"]
    assert (len(report.rows), report.overlong, len(report.bad)) == (2, 1, 3)
    assert [message.split(":")[0] for message in report.bad] == [
        f"train.parquet row {i}" for i in (2, 3, 4)
    ]
    longest = len(build_reader(processor)(usable[1]).ids)  # 16 image tokens against 4
    assert (
        report.longest == longest
        and "kept 2" in str(report)
        and "1 overlong and 3 broken" in str(report)
    )


def test_a_prompt_of_exactly_the_limit_is_kept_and_none_left_is_refused(tmp_path, processor):
    rows = data.load_problems(write(tmp_path, images=[[red()], [red()]]))
    length = len(build_reader(processor)(rows[0]).ids)
    assert len(data.usable_problems(rows, build_reader(processor), length)[0]) == 2
    with pytest.raises(
        ValueError, match=f"max_prompt_tokens={length - 1} .*{length} to {length} tokens"
    ):
        data.usable_problems(rows, build_reader(processor), length - 1)
    with pytest.raises(ValueError, match="2 are broken"):
        broken = data.load_problems(write(tmp_path, images=[[], []]))
        data.usable_problems(broken, build_reader(processor), 300, skip_bad_rows=True)


@pytest.mark.skipif(not GEO3K.exists(), reason="Geo3K rows are not here")
def test_real_geo3k_rows_become_prompts(processor):
    rows = data.load_problems(GEO3K / "validation.parquet")
    assert (
        len(rows),
        len(data.load_problems(GEO3K)),
        len(data.load_problems(GEO3K, "validation")),
    ) == (60, 360, 60)
    assert all(len(p.images) == 1 and p.answer and p.type for p in rows)
    usable, report = data.usable_problems(rows[:20], build_reader(processor), 10_000)
    assert len(usable) == len(report.rows) == 20 and not report.bad and report.overlong == 0


# --- batches


@pytest.mark.parametrize("batch, total", [(3, 7), (4, 4), (10, 4), (1, 5), (5, 1)])
def test_steps_end_to_end_visit_every_problem_once_per_epoch(batch, total):
    stream = [
        index for step in range(total * 2) for index in data.batch_indices(0, step, batch, total)
    ]
    epochs = [
        stream[start : start + total] for start in range(0, len(stream), total)
    ]  # 2 * batch of them
    assert len(epochs) == 2 * batch and all(sorted(epoch) == list(range(total)) for epoch in epochs)


def test_a_step_depends_on_seed_and_step_alone():
    late = data.batch_indices(5, 40, 8, 100)
    data._epoch_order.cache_clear()
    assert data.batch_indices(5, 40, 8, 100) == late  # without the steps before
    assert data.batch_indices(6, 40, 8, 100) != late
    assert data.batch_indices(5, 0, 100, 100) != data.batch_indices(
        5, 1, 100, 100
    )  # each epoch in its own order
    # a known order: a change of it would make an old run's resume replay some rows and skip others
    assert data.batch_indices(0, 0, 5, 5) == [2, 4, 3, 0, 1]
    for step, batch, total in ((-1, 1, 1), (0, 0, 1), (0, 1, 0)):
        with pytest.raises(ValueError, match=f"step={step}, batch={batch}, total={total}"):
            data.batch_indices(0, step, batch, total)


# --- figures


@pytest.fixture(scope="module")
def figures_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    figures.make_figures(folder, train=420, test=210, seed=3)
    return folder


def test_the_same_seed_draws_the_same_files_and_another_seed_others(tmp_path, figures_folder):
    figures.make_figures(tmp_path / "again", train=420, test=210, seed=3)
    figures.make_figures(tmp_path / "other", train=20, test=20, seed=4)
    for name in ("train.parquet", "test.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (figures_folder / name).read_bytes()
    first = {
        raw for p in data.load_problems(tmp_path / "other" / "train.parquet") for raw in p.images
    }
    assert not first & {raw for p in data.load_problems(figures_folder) for raw in p.images}


def test_no_picture_is_in_both_train_and_test(tmp_path, figures_folder):
    figures.make_figures(tmp_path, train=100, test=100, size=16)
    for folder in (figures_folder, tmp_path):
        train, test = (
            {raw for p in data.load_problems(folder, s) for raw in p.images}
            for s in ("train", "test")
        )
        assert train and test and not train & test
        # by construction, not by chance: a picture's own bytes say where it belongs
        assert all(zlib.crc32(raw) % 4 for raw in train) and not any(
            zlib.crc32(raw) % 4 for raw in test
        )


def test_types_and_their_answers_are_balanced(figures_folder):
    rows = list(data.load_problems(figures_folder))
    assert Counter(p.type for p in rows) == dict.fromkeys(figures.FIGURES, 84)
    for kind, (answers, _) in figures.FIGURES.items():
        # 84 rows over 3, 6, 6, 3 and 6 answers: all divide it
        assert Counter(p.answer for p in rows if p.type == kind) == dict.fromkeys(
            answers, 84 // len(answers)
        )


def test_figures_show_what_their_answers_say(figures_folder):
    names = {rgb: name for name, rgb in figures.COLOURS.items()}
    for row in data.load_problems(figures_folder):
        assert len(row.images) == row.question.count("<image>") == (2 if row.type == "sum" else 1)
        pictures = [data.decode_image(raw) for raw in row.images]
        assert all(picture.size == (56, 56) for picture in pictures)
        pixels = Counter(
            names.get(rgb) for rgb in pictures[0].get_flattened_data()
        )  # None: white and edges
        pixels.pop(None)
        if row.type in ("colour", "larger"):
            assert pixels.most_common(1)[0][0] == row.answer
        assert len(pixels) == (2 if row.type == "larger" else 1)
        if row.type in ("sides", "sum"):
            assert sum(map(count_sides, pictures)) == int(row.answer)


def count_sides(picture):
    """Sides of a filled regular polygon, from its area over its reach squared: n/2 sin(2 pi / n),
    1.30 2 2.38 2.60."""
    grey = 1 - np.asarray(picture.convert("L")) / 255
    cover = grey / grey.max()
    y, x = np.nonzero(cover > 0.5)
    y0, x0 = (
        cover.sum(1) @ np.arange(56) / cover.sum(),
        cover.sum(0) @ np.arange(56) / cover.sum(),
    )
    reach = np.hypot(y - y0, x - x0).max() + 0.4
    ratio = cover.sum() / reach**2
    return min(range(3, 7), key=lambda n: abs(n / 2 * math.sin(2 * math.pi / n) - ratio))


def test_figures_refuse_empty_files_and_unreadable_sizes(tmp_path):
    for options in ({"train": 0}, {"test": 0}, {"size": 8}, {"size": 500}):
        with pytest.raises(ValueError, match=next(iter(options))):
            figures.make_figures(tmp_path, **options)


def test_the_command_line_writes_both_files(tmp_path):
    command = [
        sys.executable,
        "-m",
        "support.figures",
        str(tmp_path / "out"),
        "--train",
        "10",
        "--test",
        "5",
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=HERE)
    assert (
        len(data.load_problems(tmp_path / "out")),
        len(data.load_problems(tmp_path / "out", "test")),
    ) == (10, 5)


def test_importing_data_needs_no_transformers():
    code = "import sys, data; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)


# --- rows as people have them: each shape by its columns, to a prompt and a verdict

USER = {"role": "user", "content": "<image>What?"}
PICTURE = {"bytes": None, "path": "pictures/red.png"}  # of a folder beside the rows
CHOICES = ["3", "4", "six"]
LETTERED = "\nA. 3\nB. 4\nC. six"
LLAVA = [
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "It is 4."},
]
SWIFT = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "no"},
]
TRL_PARTS = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]

# name: columns of one row, --columns, the question it becomes, the gold, a right response, reward
SHAPES = {
    "Geometry3K": (
        dict(images=[PICTURE], problem="<image>What?", answer="4"),
        "", "<image>What?", "4", r"\boxed{4}", "accuracy",
    ),
    "verl": (
        dict(data_source="geo3k", prompt=[USER], images=[PICTURE], ability="math",
             reward_model={"style": "rule", "ground_truth": "4"}, extra_info={"answer": "5"}),
        "", "<image>What?", "4", r"\boxed{4}", "accuracy",
    ),
    "EasyR1": (
        dict(pictures=[PICTURE, PICTURE], problem="<image>or<image>?", answer="4"),
        "image=pictures", "<image>or<image>?", "4", r"\boxed{4}", "accuracy",
    ),
    "R1-V": (
        dict(image=PICTURE, problem="What?", solution="<answer> 4 </answer>"),
        "", "<image>What?", "<answer> 4 </answer>", None, "accuracy",
    ),
    "TRL": (
        dict(prompt=[{"role": "user", "content": TRL_PARTS}], image=PICTURE, solution="4"),
        "", "<image>What?", "4", r"\boxed{4}", "accuracy",
    ),
    "ms-swift": (
        dict(messages=SWIFT, images=["pictures/red.png"], solution="4"),
        "", "<image>What?", "4", r"\boxed{4}", "accuracy",
    ),
    "LLaVA": (
        dict(id="1", image="pictures/red.png", conversations=LLAVA),
        "answer=conversations", "<image>\nWhat?", "It is 4.", r"\boxed{It is 4.}", "exact",
    ),
    "MMMU": (
        dict(question="See <image 2>, <image 1> and <image 2>.", options=str(CHOICES), answer="B",
             explanation="", image_1=PICTURE, image_2=PICTURE, image_3=None),
        "image=image_1+image_2+image_3",
        f"See <image>, <image> and image 1.{LETTERED}", "B", r"\boxed{B}", "choice",
    ),
    "MathVista": (
        dict(pid="1", question="What?", image="images/1.jpg", decoded_image=PICTURE, query="Hint",
             choices=CHOICES, answer="six", metadata={"source": "x"}),
        "image=decoded_image,problem=question,source=metadata.source",
        f"<image>What?{LETTERED}", "C", r"\boxed{(C) six}", "choice",
    ),
    "ChartQA": (
        dict(image=PICTURE, query="What?", label=["4"], human_or_machine=0),
        "", "<image>What?", ("4",), r"\boxed{4.1}", "numeric",
    ),
    "DocVQA": (
        dict(questionId="1", question="Who?", image=PICTURE, answers=["Ann", "Ann Lee"]),
        "answer=answers", "<image>Who?", ("Ann", "Ann Lee"), r"\boxed{ann lee}", "exact",
    ),
    "MathVision": (
        dict(question="In <image1>, what?", options=[], image="images/1.jpg",
             decoded_image=PICTURE, answer="4", solution="Add."),
        "image=decoded_image,answer=answer", "In <image>, what?", "4", r"\boxed{4}", "accuracy",
    ),
    "ScienceQA": (
        dict(image=PICTURE, question="What?", choices=CHOICES, answer=1, solution="Add."),
        "answer=answer", f"<image>What?{LETTERED}", "B", r"\boxed{B}", "choice",
    ),
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    """A folder of one image beside the rows; returns where the rows go."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(red())
    return tmp_path


def write_rows(file, *rows):
    """Rows as parquet, or as JSON lines, by the file's name; returns the file."""
    if file.suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_known_data_sets_become_prompts_and_are_graded(pictures, processor, name, suffix):
    row, columns, question, gold, response, graded = SHAPES[name]
    file = write_rows(pictures / f"train.{suffix}", row)
    rows = data.load_problems(file, columns=columns)
    usable, checked = data.usable_problems(rows, build_reader(processor), 999)
    assert len(usable) == 1 and not checked.bad
    loaded = usable[0]
    assert (loaded.question, loaded.gold) == (question, gold)
    assert loaded.images == (red(),) * question.count("<image>")
    text = processor.tokenizer.decode(build_reader(processor)(loaded).short_ids)
    assert text.count("<|image_pad|>") == len(loaded.images)
    system = "<|im_start|>system\nBe brief.<|im_end|>\n" if name == "ms-swift" else ""
    assert text.startswith(f"{system}<|im_start|>user\n") and text.count("system") == bool(system)
    if response is not None:
        weights = {"": {graded: 1.0}}
        answers = [Response(response), Response(r"\boxed{no}")]
        with Grader() as grader:
            scores = compute_rewards(answers, [loaded, loaded], weights, grader)
        assert scores["reward"] == [1.0, 0.0]


def test_numbered_images_are_put_in_the_order_in_which_they_are_mentioned(tmp_path):
    first, second = red(28, 28), red(56, 28)
    cells = dict(a=[first], b=[second], problem=["<image 2>, <image 1>; again <image1>"])
    file = write(tmp_path, **cells)
    row = data.load_problems(file, columns="image=a+b")[0]
    assert row.images == (second, first) and row.question == "<image>, <image>; again image 2"
    for question in ("<image 1>", "<image 1><image 3>", "<image 0><image 1>", "<image 1><image>"):
        file = write(tmp_path, **(cells | {"problem": [question]}))
        with pytest.raises(
            ValueError, match=r"row 0: the question mentions images .* has 2 images"
        ):
            data.load_problems(file, columns="image=a+b")[0]


def test_images_without_a_placeholder_stand_in_front_and_the_rows_are_counted(tmp_path, processor):
    questions = ["What?", "<image>Why?", "Who?"]
    file = write(tmp_path, problem=questions, images=[[red()] * 2, [red()], []])
    rows = data.load_problems(file)
    assert [p.question for p in rows] == ["<image><image>What?", "<image>Why?", "Who?"]
    [sentence] = data.describe(rows)
    assert sentence == "3 rows with 3 images, columns image=images,problem=problem,answer=answer"
    _, checked = data.usable_problems(rows, build_reader(processor), 999)
    assert "kept 3 problems with 3 images" in str(checked)
    assert "in front of 1 questions without a placeholder now stands <image>" in str(checked)
    assert (checked.most_images, checked.most_videos) == (2, 0)


@pytest.mark.parametrize(
    "answer, choices, letter",
    [
        (2, ["a", "b", "c"], "C"),  # an index, from 0
        (2.0, ["a", "b", "c"], "C"),  # as pandas writes it beside nulls
        ("1", ["a", "b", "c"], "B"),
        (2, ["1", "2", "3"], "C"),  # a number is an index where the choices are texts,
        (2, [1, 2, 3], "B"),  # and a value where they are numbers
        ("2", ["1", "2", "3"], "B"),
        (" b ", ["a", "b"], "B"),
        ("(B)", ["a", "b"], "B"),
        ("B.", ["B", "A"], "B"),
        ("A", ["B", "A"], "B"),  # the text of a choice comes before its letter
    ],
)
def test_an_answer_becomes_the_letter_of_its_choice(tmp_path, answer, choices, letter):
    row = dict(problem="Which?", answer=answer, choices=choices)
    loaded = data.load_problems(write_rows(tmp_path / "train.jsonl", row))[0]
    lines = loaded.question.split("\n")
    assert loaded.answer == letter
    assert lines == ["Which?", *(f"{'ABC'[i]}. {choice}" for i, choice in enumerate(choices))]


def test_choices_can_be_left_out_be_columns_and_have_several_right_ones(tmp_path):
    row = dict(problem="Which?", answer="x", options=["x", "y"], A="one", B="two", C=None, gold="B")
    file = write_rows(tmp_path / "train.jsonl", row)
    assert data.load_problems(file)[0].answer == "A"
    plain = data.load_problems(file, columns="choices=")[0]
    assert (plain.question, plain.answer) == ("Which?", "x")
    joined = data.load_problems(file, columns="choices=A+B+C,answer=gold")[0]
    assert (joined.question, joined.answer) == ("Which?\nA. one\nB. two", "B")
    several = data.load_problems(file, columns="answer=gold+answer")[0]
    assert several.gold == ("B", "A")


BAD_ROWS = {  # a row, --columns, and what the message says
    "two users": (dict(prompt=[USER, USER]), "", "turns are .'user', 'user'.; a problem is one"),
    "no user": (dict(prompt=[SWIFT[0]]), "", "turns are .'system'.; a problem is one turn"),
    "a tool": (dict(prompt=[USER, {"role": "tool", "content": "x"}]), "", "'user', 'tool'"),
    "audio": (
        dict(prompt=[{"role": "user", "content": [{"type": "audio"}]}]),
        "", "the chat holds a part of type 'audio'; text, image",
    ),
    "chat without roles": (dict(prompt=[["Hi"]]), "", "a list of list; it is text, or a chat"),
    "chat without an answer": (
        dict(messages=[USER], answer=None), "answer=messages", "ends with the user's turn, so it",
    ),
    "struct question": (dict(problem={"text": "What?"}), "", "problem=COLUMN.text"),
    "struct answer": (dict(problem="?", answer={"value": "4"}), "", "answer=COLUMN.value"),
    "answer of no choice": (
        dict(problem="?", choices=["a", "b"], answer="d"), "", "'d' is none of the 2 choices",
    ),
    "index of no choice": (
        dict(problem="?", choices=["a", "b"], answer=2), "", "'2' is none of the 2 choices",
    ),
    "choices of text": (dict(problem="?", choices="a or b"), "", "'a or b' are no list"),
    "choices of structs": (dict(problem="?", choices={"label": ["A"]}), "", "not a list of at"),
    "27 choices": (dict(problem="?", choices=["x"] * 27), "", "not a list of at most 26 texts"),
    "list of lists": (
        dict(problem="<image>?", images=[["a.png"]]), "", "the images are a list of lists",
    ),
    "struct image": (
        dict(problem="<image>?", image={"url": "x", "size": 3}),
        "", "struct of url, size, not of bytes and path; .*image=COLUMN.FIELD",
    ),
    "web image": (
        dict(problem="<image>?", image="https://x.org/a.png"),
        "", "'https://x.org/a.png' is on the web",
    ),
    "path like base64": (
        dict(problem="<image>?", image="train/0001"),
        "", "'train/0001' .*no plain file .*image_folder",
    ),
    "percent data URL": (
        dict(problem="<image>?", image="data:image/png,%89PNG"),
        "", "does not say ;base64, so it is percent-encoded",
    ),
    "NaN answer": (dict(problem="?", answer=math.nan), "", "the answer or the question is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_cannot_be_meant_say_what_is_wrong_and_what_to_do(tmp_path, processor, name):
    row, columns, message = BAD_ROWS[name]
    file = write_rows(tmp_path / "train.jsonl", dict(answer="4") | row)
    rows = data.load_problems(file, columns=columns)
    with pytest.raises(ValueError, match=rf"(?s)1 of 1 rows.*train\.jsonl row 0: .*{message}"):
        data.usable_problems(rows, build_reader(processor), 999)


def test_columns_that_are_wrong_missing_twice_or_ambiguous_are_named(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", dict(question="?", query="?", answer="4", s={"t": "5"}))
    for columns in ("", "answer=s.t"):
        message = "more than one column may be the problem .question, query.; .*problem=question$"
        with pytest.raises(ValueError, match=message):
            data.load_problems(file, columns=columns)
    assert data.load_problems(file, columns=" problem=query , answer=s.t")[0].answer == "5"
    for columns, message in (
        (
            "problem=q",
            r"no column 'q' for problem among \['answer', 'query', 'question', 's', 's.t'",
        ),
        ("problem=query,answer=s.x", "no column 's.x' for answer"),
        ("problem=query,gold=answer", "'gold=answer': write each of image, video, problem, answer"),
        ("query", "'query': write each of"),
        ("answer=s,answer=t", "'answer=t': write each of .* at most once"),
        ("problem=query,answer=", "no column for the answer among"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load_problems(file, columns=columns)
    chat = write_rows(tmp_path / "b.jsonl", dict(messages=[USER]))
    with pytest.raises(ValueError, match="last turn of a chat: answer=messages"):
        data.load_problems(chat)
    twins = pa.table([["?"], ["4"], ["5"]], names=["problem", "answer", "answer"])
    pq.write_table(twins, tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="the column 'answer' is there twice; rename one"):
        data.load_problems(tmp_path / "c.parquet")


def test_columns_of_files_that_nothing_names_are_warned_of(tmp_path):
    stored = {"bytes": red(), "path": None}
    row = dict(
        problem="?", answer="4", image_1=stored, photos=[stored], checksum=b"1", note={"a": 1}
    )
    rows = data.load_problems(write_rows(tmp_path / "train.parquet", row))
    first, warning = data.describe(rows)
    assert first == "1 rows with 0 images, columns problem=problem,answer=answer"
    assert warning.startswith("warning: image_1, photos hold files that nothing names")
    assert warning.endswith("--columns image=image_1+photos")
    named = data.load_problems(tmp_path, columns="image=image_1+photos")
    assert [s.split(",")[0] for s in data.describe(named)] == ["1 rows with 2 images"]
    assert named[0].images == (red(), red())


def test_images_may_lie_in_a_folder_of_their_own_and_be_urls_of_files(pictures):
    rows = pictures / "rows"
    rows.mkdir()
    path = str(pictures / "pictures" / "red.png")
    (pictures / "pictures" / "0001").write_bytes(red())
    (pictures / "pictures" / ("0" * 70)).write_bytes(red())  # as long as base64 of an image
    text = base64.b64encode(red()).decode()
    for value in (
        "red.png",
        path,
        f"file://{path}",
        "file://red.png",
        "0001",
        "0" * 70,
        f"DATA:image/png;base64,{text}",
        f"data:image/png;base64,{text.replace('+', '%2B').replace('=', '%3D')}",
    ):
        file = write_rows(rows / "train.jsonl", dict(problem="<image>?", answer="4", image=value))
        assert data.load_problems(file, image_folder=f"{pictures}/pictures")[0].images == (red(),)
    file = write_rows(rows / "train.jsonl", dict(problem="?", answer="4", image=f"file://{path}"))
    with pytest.raises(ValueError, match=r"train\.jsonl row 0: .*leads out .*--image_folder"):
        data.load_problems(file)[0]


def test_json_rows_may_differ_in_type_and_the_broken_ones_are_named(tmp_path):
    file = tmp_path / "train.jsonl"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    # a date stays text, a number may stand beside a text, and a chat's content beside parts
    rows = [
        dict(prompt="?", answer=4),
        dict(prompt=[dict(USER, content="!")], answer="2020-01-01"),
        dict(prompt=parts, answer=2.5),
        dict(prompt="no answer"),
    ]
    file.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    loaded = [(p.question, p.answer) for p in data.load_problems(file)]
    assert loaded == [("?", "4"), ("!", "2020-01-01"), ("Hi", "2.5"), ("no answer", "")]
    (tmp_path / "list.json").write_text(json.dumps(rows))  # as LLaVA's
    assert [(p.question, p.answer) for p in data.load_problems(tmp_path / "list.json")] == loaded
    good = '{"problem": "?", "answer": "4"}\n'
    for line in ("{", "[1]", '"text"', "[" * 10**5, "\xff"):
        file.write_bytes((good + line).encode("latin-1"))
        with pytest.raises(ValueError, match=r"train\.jsonl row 1 (is not JSON|is a )"):
            data.load_problems(file)


def test_text_that_is_not_utf8_names_its_column(tmp_path):
    raw = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    with pytest.raises(ValueError, match=r"train\.parquet row 0: column 'answer' .*not UTF-8"):
        data.load_problems(write(tmp_path, problem=["?"], answer=raw))[0]


def test_a_split_is_found_behind_any_mark_and_in_any_case(tmp_path):
    names = ["geo_train.parquet", "TRAIN/0000.parquet", "test-data/my.Val.jsonl"]
    names += ["x-test-1.parquet", "testmini.parquet", "contest.parquet"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name, dict(problem="?", answer="4"))
    for split, found in (
        ("train", {"geo_train.parquet", "0000.parquet"}),
        ("Train", {"geo_train.parquet", "0000.parquet"}),
        ("validation", {"my.Val.jsonl"}),
        ("val", {"my.Val.jsonl"}),
        ("dev", {"my.Val.jsonl"}),
        ("test", {"x-test-1.parquet"}),
        ("testmini", {"testmini.parquet"}),
    ):
        assert {p.source for p in data.load_problems(tmp_path, split)} == found


def test_files_of_the_same_name_are_called_by_their_folders_too(tmp_path):
    for name in ("art/train-0.parquet", "art/test-0.parquet", "law/train-0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, name, problem=["?"])
    rows = data.load_problems(tmp_path)
    assert [p.where for p in rows] == ["art/train-0.parquet row 0", "law/train-0.parquet row 0"]
    assert [p.source for p in rows] == ["art/train-0.parquet", "law/train-0.parquet"]
    assert data.load_problems(tmp_path, "test")[0].where == "test-0.parquet row 0"
    rows = data.load_problems(f"{tmp_path}/*/train*.parquet")
    assert [p.source for p in rows] == ["art/train-0.parquet", "law/train-0.parquet"]


def test_a_special_token_in_the_system_text_is_refused(processor):
    row = dataclasses.replace(problem(), system="Be brief.<|im_end|>")
    with pytest.raises(ValueError, match=r"row 17: the question holds \['<\|im_end\|>'\]"):
        build_reader(processor)(row)


# --- prompts ahead, and the check over several ranks


class CountingReader(data.Reader):
    """Notes what it makes and in which thread, and makes nothing before its gate is open."""

    def __init__(self, processor, **options):
        super().__init__(processor, MIN_PIXELS, MAX_PIXELS, "", **options)
        self.made = []
        self.gate = threading.Event()
        self.gate.set()

    def _make(self, problem, later):
        self.made.append((problem.answer, threading.current_thread()))
        assert self.gate.wait(20)
        return super()._make(problem, later)


def numbered(total):
    return [problem(answer=str(i)) for i in range(total)]


def test_prompts_made_ahead_are_made_once_and_in_another_thread(processor):
    reader, rows = CountingReader(processor, kept=6), numbered(6)
    reader.ahead(rows)
    reader.ahead(rows)  # what is in the making is not begun again
    ahead = [reader(row) for row in rows]
    assert [reader(row) for row in rows] == ahead and [p.problem for p in ahead] == rows
    assert sorted(answer for answer, _ in reader.made) == [row.answer for row in rows]
    expected = build_reader(processor)(rows[0])
    assert torch.equal(ahead[0].ids, expected.ids)
    # nobody waits for what the thread has not begun: it is made at once, where it is asked for
    reader.gate.clear()
    more = [problem(answer=f"more {i}") for i in range(3)]
    reader.ahead(more)
    while len(reader.made) < 7:
        time.sleep(0.01)
    thread = reader.made[6][1]
    assert thread is not threading.main_thread()
    threading.Timer(0.2, reader.gate.set).start()
    assert reader(more[2]).problem is more[2] and reader.made[7][1] is threading.main_thread()
    assert [reader(row).problem for row in more] == more and len(reader.made) == 9


def test_an_error_of_the_thread_comes_out_where_the_prompt_is_asked_for(processor):
    reader = CountingReader(processor, kept=4)
    bad = problem(images=(b"torn",))
    reader.ahead([bad, *numbered(1)])
    assert len(reader(numbered(1)[0]).ids)
    with pytest.raises(ValueError, match="row 17: 4 bytes are not a readable image"):
        reader(bad)


def test_prompts_are_kept_within_bounds(processor):
    reader, rows = CountingReader(processor, kept=2), numbered(4)
    for index in (0, 1, 0, 2, 0, 1):  # 1 was used before 0, so 2 took its place
        reader(rows[index])
    assert [answer for answer, _ in reader.made] == ["0", "1", "2", "1"]
    # what is asked for ahead comes on top until it is used, and is forgotten if it is not
    reader.ahead(rows)
    assert len(reader._used) == 2 and len(reader._coming) == 2
    reader.ahead([])
    assert not reader._coming
    reader(rows[3])
    assert len(reader._used) == 2
    forgetful = CountingReader(processor)
    forgetful(rows[0])
    assert not forgetful._used


def test_many_threads_may_ask_one_reader(processor):
    reader, rows = CountingReader(processor, kept=8), numbered(8)
    reader.ahead(rows)
    got = {}

    def ask(name):
        got[name] = [reader(row) for row in random.Random(name).sample(rows, 8)]

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reader.made) == 8 and len({id(p) for prompts in got.values() for p in prompts}) == 8


def test_a_run_that_ends_does_not_wait_for_the_prompts_ahead():
    code = (
        "import time, data\n"
        "class Slow(data.Reader):\n"
        "    def _make(self, problem, later):\n"
        "        time.sleep(0.5)\n"
        "reader = Slow(None, 1, 1)\n"
        "rows = [data.Problem(str(i), '?', (), '4', '', '') for i in range(200)]\n"
        "reader.ahead(rows)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE, timeout=60)


def check_on_two_ranks(file, out):
    """Run by torchrun: what each rank finds usable, how many prompts it made, and its error."""
    processes.start_processes()
    reader = CountingReader(build_processor(), kept=9)
    rows = data.load_problems(file)
    usable, checked = data.usable_problems(rows, reader, 40, skip_bad_rows=True)
    found = [[p.answer for p in usable], checked.longest, checked.overlong, checked.bad]
    try:
        data.usable_problems(rows, reader, 40)
    except ValueError as error:
        found.append(str(error))
    shares = processes.gather_objects((found, len(reader.made)))
    if torch.distributed.get_rank() == 0:
        torch.save(shares, out)
    torch.distributed.destroy_process_group()


def test_two_ranks_share_the_check_and_find_the_same(tmp_path, processor):
    questions = ["<image>ok", "<image>" + "long " * 20, "<image>ok", "<image><image>", "<image>ok"]
    file = write(tmp_path, problem=questions, answer=list("abcde"), images=[[red()]] * 5)
    torchrun("check_on_two_ranks", str(file), str(tmp_path / "two.pt"))
    (first, made), (second, also_made) = torch.load(tmp_path / "two.pt")
    assert first == second and first[0] == ["a", "c", "e"] and first[2] == 1
    assert "2 <image> in the question" in first[3][0] and "1 of 5 rows are broken" in first[4]
    # rows 0, 2, 4 and 1, 3; what failed is not made again either, as it is kept
    assert (made, also_made) == (3, 2)
    # and one process without torchrun finds the same
    rows = data.load_problems(file)
    usable, checked = data.usable_problems(rows, build_reader(processor), 40, skip_bad_rows=True)
    assert [p.answer for p in usable] == first[0]
    assert [checked.longest, checked.overlong, checked.bad] == first[1:4]


def test_a_run_without_videos_needs_no_pyav_and_one_without_the_hub_no_hub():
    code = (
        "import sys, data; from support import figures;"
        "sys.exit(any(name in sys.modules for name in ('av', 'huggingface_hub', 'pyarrow.json')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)


# --------------------------------------------------------------------------------------------------
# reward.py

# (gold, answers that are right, answers that are wrong), by hand
ANSWERS = [
    (r"2 \sqrt { 221 }", [r"2\sqrt{221}", r"\sqrt{884}"], [r"2\sqrt{22}", "221", "2"]),
    (r"6 \sqrt 2", [r"6\sqrt{2}", r"\sqrt{72}", r"6\sqrt2", "6√2", "6sqrt(2)"], []),
    (r"\sqrt{13}", [r"\sqrt 13"], []),
    (
        r"\frac { 25 } { 14 }",
        [r"\dfrac{25}{14}", "25/14", r"\frac{50}{28}", r"1\frac{11}{14}"],
        ["1.79"],
    ),
    ("0.5", [r"\frac12", "50%", ".5"], []),
    (
        r"4 \frac { 4 } { 11 }",
        [r"\frac{48}{11}", "48/11", "4 4/11"],
        [r"\frac{16}{11}", r"-4\frac{4}{11}"],
    ),
    ("3 : 4", ["3:4", "6:8", r"3\colon4"], ["4:3"]),
    ("3:4", [r"\frac{3}{4}", "3 to 4", r"3 \text{ to } 4"], ["3"]),
    (r"\frac { \sqrt 3 } { 4 } : 1", [r"\sqrt{3}:4"], []),
    (
        "x < 60",
        ["x < 60", "60 > x", r"x \lt 60", "x<60.", r"(-\infty, 60)"],
        ["60", "x > 60", r"x \le 60", "x <= 60", "x = 60", "x < 140"],
    ),
    ("x <= 60", [r"x \leq 60", r"x\leqslant 60"], ["x < 60"]),
    (r"x \le 60", ["x ≤ 60"], []),
    (
        "109",
        [
            "109°",
            r"109^\circ",
            r"109^{\circ}",
            "109 degrees",
            r"109 \text{ degrees}",
            r"109\degree",
            "109º",
            "109˚",
            "109^o",
            "109 deg.",
        ],
        ["108°"],
    ),
    (r"109^\circ", ["109"], []),
    (
        "10",
        [
            r"10 \text{ units}",
            "10 cm",
            r"10\,\text{cm}",
            "10cm",
            r"10 \text{ cm}^2",
            "10 cm^2",
            "10 cm²",
            r"10\text{ cm}^{2}",
            "10 m",
            r"10 \text{ square units}",
            r"10\ \mathrm{mm}",
            "10 in.",
            "10 inches",
            "10 kg",
            "10 seconds",
            "10 m/s",
            "10 dollars",
            "10 hrs",
            r"10 \text{ radians}",
        ],
        ["10 kangaroos", "10 k"],
    ),
    (r"48 \pi", [r"48\pi \text{ cm}^2", r"48\pi", r"48 \pi \text{ units}^2"], ["150.8"]),
    ("3x", [], ["3x+2m"]),
    ("2", [], ["2m"]),
    ("2m", [], ["2"]),
    ("10^2", ["100"], []),
    ("4000", ["4,000", "4{,}000", r"4\,000"], []),
    ("4,000", ["4000"], []),
    ("400", [], ["4,00"]),
    ("40000", [], ["4,0000"]),
    ("1234567", ["1,234,567"], []),
    ("3400", [], ["(3,400)"]),
    ("4000.5", ["4,000.5"], []),
    ("106", [r"\approx 106", "≈106", "approximately 106", r"x \approx 106"], []),
    ("4", ["x = 4", "x=4", r"x = \frac{8}{2} = 4"], []),
    ("45", [r"\angle ABC = 45", r"m\angle A = 45", r"m \angle ABC = 45^\circ"], []),
    ("x = 4", ["4", "y = 4"], []),
    (
        "15",
        [
            "AB = CD = 15",
            "15.",
            r"\$15",
            "$15$",
            r"\left(15\right)",
            "015",
            r"\frac{30}{2}",
            r"3 \times 5",
            "{15}",
            "15\\",
        ],
        [
            "14=15",
            "5 = 14 = 15",
            r"5 \approx 15",
            "1.5e1",
            "5, 14, 15, 35",
            "5 or 14",
            "5 or 15",
            "15 or 5",
            r"15 \text{ or } 5",
            r"15 \text{ (or 5)}",
            r"\{5,14,15,35\}",
            "5;15",
            "5 15",
            r"\pm 15",
            "[0,100]",
            "5/14/15",
            "5,15",
            "",
            None,
            "   ",
            "x",
            "15x",
            r"\frac{15}",
            "15}",
            r"\infty",
            r"\frac{1}{0}",
            r"\frac{0}{0}",
            "answer: 15",
            "final answer is $15$",
        ],
    ),
    ("24", [r"\text{Area} = 24 \text{ cm}^2"], []),
    ("5", ["x_1 = 5"], []),
    ("8", ["7.99999999", r"\sqrt{64}", "8.0"], ["2x = 8", "8.3", "7.9999", r"\sqrt{65}"]),
    ("7", [r"\overline{AB} = 7"], []),
    ("8.6", [r"\sqrt{74} \approx 8.6", r"\sqrt{74}"], [r"\sqrt{76}", "-8.6", r"-\sqrt{74}"]),
    (
        r"\sqrt{74}",
        [r"\sqrt{74} \approx 8.6", r"x = \sqrt{74} = 8.6"],
        [r"\sqrt{74} \approx 8.7", "8.6"],
    ),
    ("50", ["50%", r"50\%"], ["0.5"]),
    ("50%", ["50 percent", "50", "0.5", "50%", r"\frac{1}{2}"], ["5000%", "40%", "0.5%"]),
    ("red", ["red", "Red", r"\text{red}"], ["blue", "der"]),
    (
        "not enough information",
        [r"\text{Not enough information}", "not  enough information."],
        ["enough information", "15"],
    ),
    (
        r"\angle 3 \cong \angle Z",
        [
            r"\angle 3 \cong \angle Z",
            r"\angle3\cong\angle Z",
            r"\angle Z \cong \angle 3",
            "∠3 ≅ ∠Z",
        ],
        [r"\angle 3 \cong \angle Y"],
    ),
    (
        r"\angle 2 and \angle 6",
        [r"\angle 6 \text{ and } \angle 2", r"\angle 2, \angle 6"],
        [r"\angle 2 \cong \angle 6", r"\angle 2"],
    ),
    ("a + b = 90", ["a+b=90", "90 = a + b", "b + a = 90"], ["a + b > 90", "90"]),
    ("m + n - 180", ["n+m-180"], ["m+n+180"]),
    ("20 y^2 - 10 y", ["10y(2y-1)"], ["20y^2"]),
    ("57.1", ["57.14", "57.1428", "57.05", r"\frac{400}{7}"], ["57.15", "57.04", "57"]),
    ("57.14", [], ["57.1"]),
    ("-4", ["- 4"], ["4"]),
    ("8.0", ["8"], []),
    ("A", ["A", "(A)", r"\text{A}"], ["B"]),
    ("x^2 y^2", ["x^2y^2"], []),
    (r"\sqrt{2}", [r"2^{\frac{1}{2}}"], []),
    ("x^2", ["x^{2}"], []),
    ("(3, 4)", ["(3,4)"], []),
    ("(3,4)", [], ["(4,3)"]),
    (r"12 + 4 \sqrt { 5 }", [r"4(3+\sqrt{5})"], []),
    (r"0.5\pi", [r"\frac{\pi}{2}"], []),
    (r"4 + 3 \sqrt { 3 } + 7 \sqrt { 2 }", [r"4 + 7 \sqrt{2} + 3\sqrt{3}"], []),
]
CASES = [(answer, gold, True) for gold, right, _ in ANSWERS for answer in right]
CASES += [(answer, gold, False) for gold, _, wrong in ANSWERS for answer in wrong]
ENDLESS = r"\sin((((9^{999})^{999})^{999})^{999})"  # needs a thousand million digits; within every static limit


@pytest.fixture(scope="module")
def grader():
    with Grader() as shared:
        yield shared


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return (
        stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    )  # Z: ended, not yet collected


def gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(running(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(running(pid) for pid in pids)


def hostile(i: int, marker: str) -> str:
    """One of 14 ways to hurt a grader; different for every i."""
    n = i + 2
    return [
        f"9^{{9^{{9^{{9^{{{n}}}}}}}}}", f"10**10**{n}", f"{n}99999!", f"(x+{n})^{{5000}}",
        "{" * 10000 + str(n) + "}" * 10000, r"\sqrt{" * 500 + str(n) + "}" * 500, "9" * (1_000_000 + n), f"\x00\x1b{n}",
        f"__import__('os').system('touch {marker}')", ENDLESS if i < 14 else f"9^9^{n}", r"\frac{" * 40 + str(n),
        "\\" * 200 + str(n), r"\text{" + "\ud800🦊" * 60 + str(n) + "}", f"open('{marker}{n}','w').write('{n}')",
    ][i % 14]  # fmt: skip


# ---- reading a response


@pytest.mark.parametrize("response, answer", [
    (r"so \boxed{15}.", "15"),
    (r"<think>a</think> \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{5} no, \boxed{15}", "15"),
    (r"\boxed {15}", "15"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\boxed{15}}", "15"),
    (r"a</think> \boxed{15}", "15"),  # the prompt may have opened the thinking
    (r"<think>\boxed{15}</think> done", None),
    (r"<think>\boxed{15}", None),
    (r"<think>a</think> \boxed{15} <think>", None),
    (r"\boxed{15} \boxed{\frac{1}{2}", None),
    ("15", None),
    ("", None),
])  # fmt: skip
def test_last_boxed_is_what_the_response_commits_to_outside_the_thinking(response, answer):
    assert last_boxed(response) == answer


@pytest.mark.parametrize("response, score", [
    (r"<think>a</think> so \boxed{15}.", 1.0),
    ("\n<think>\na \\boxed{1}\n</think>\n\n\\boxed{15}\n", 1.0),  # a box in the thinking is a draft
    (r"<think>a</think>\boxed{5} \boxed{15}", 0.0),
    (r"<think>a</think> 15", 0.0),
    (r"<think>a</think> \boxed{15", 0.0),
    (r"<think> </think> \boxed{15}", 0.0),
    (r"<think>a \boxed{15}</think>", 0.0),
    (r"sure <think>a</think> \boxed{15}", 0.0),
    (r"<think>a</think> b</think> \boxed{15}", 0.0),
    (r"<think>a<think>b</think> \boxed{15}", 0.0),
    (r"<think>a</think> \boxed{15} <think>b</think>", 0.0),
    (r"\boxed{15}", 0.0),
    ("", 0.0),
])  # fmt: skip
def test_format_is_thinking_then_exactly_one_box(response, score):
    assert format_reward(None, Response(response), "15") == score


# ---- verdicts


def test_answers_are_judged_as_a_careful_teacher_would(grader):
    got = grader.grade([case[:2] for case in CASES])
    assert [case for case, verdict in zip(CASES, got, strict=True) if verdict != case[2]] == []
    assert grader.timeouts == grader.crashes == 0


def test_listing_the_choices_earns_nothing(grader):
    separators = r", ; & | ~ ' : / _ = + - . or and to OR < > $,$ \, \; {,} \% % \\ \cup \cap \vee \mid \quad \approx"
    separators += (
        r" \equiv \pm \to \neq \le \in \iff \ldots \circ \max \text{,} \text{or} \phantom{0}"
    )
    orders = list(itertools.permutations(["5", "14", "15", "35"]))
    hedges = [f" {s} ".join(order) for s in separators.split() for order in orders]
    hedges += [
        form % s
        for s in separators.split()
        for form in ("5%s15", "15%s5", r"\{5%s15\}", "{5 %s 15}")
    ]
    hedges += [r"\max(5, 14, 15)", r"15 \text{ (or 5)}", r"15 \text{ or } 5", "[0, 100]"]
    right = [
        hedge
        for hedge, ok in zip(hedges, grader.grade([(hedge, "15") for hedge in hedges]), strict=True)
        if ok
    ]
    assert right == []


def test_without_rounding_a_decimal_gold_takes_only_its_value():
    with Grader(workers=1, rounding=False) as exact:
        pairs = [
            ("57.14", "57.1"),
            (r"\sqrt{74}", "8.6"),
            ("57.10", "57.1"),
            (r"\frac{43}{5}", "8.6"),
        ]
        assert exact.grade(pairs) == [False, False, True, True]


@pytest.mark.skipif(not GEO3K.exists(), reason="needs shared/geo3k")
def test_every_geo3k_gold_is_itself_and_none_of_its_wrong_choices():
    rows = [json.loads(line) for line in (GEO3K / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 2401
    own = [(row["answer"], row["answer"]) for row in rows]
    pairs = [
        (choice, row["answer"])
        for row in rows
        for choice in row["choices"]
        if choice != row["answer"]
    ]
    assert len(pairs) == 7198  # 2401 * 3, less five choices that repeat the gold
    with Grader() as grader:
        grader.shortcut = False  # parsed and compared for real, not found equal as strings
        assert [pair for pair, ok in zip(own, grader.grade(own), strict=True) if not ok] == []
        assert [pair for pair, ok in zip(pairs, grader.grade(pairs), strict=True) if ok] == []
        assert grader.timeouts == grader.crashes == 0


# ---- nothing a model writes can hang, crash or run


def test_hostile_answers_are_wrong_in_seconds_and_change_no_other_verdict(tmp_path):
    cases = random.Random(0).choices(CASES, k=1000)
    cases += [(hostile(i, str(tmp_path / "x")), "15", False) for i in range(1000)]
    random.Random(1).shuffle(cases)
    start = time.monotonic()
    with Grader() as fresh:
        got = fresh.grade([case[:2] for case in cases])
        pids = [worker.pid for worker in fresh.pool]
    assert time.monotonic() - start < 60 and not any(map(running, pids))
    assert got == [case[2] for case in cases]
    assert list(tmp_path.iterdir()) == []  # no answer ran as code


def test_code_is_not_run_by_math_verify_itself(tmp_path, grader):
    code = f"__import__('os').system('touch {tmp_path}/x')"
    assert not reward.slow_verdict(code, "15", True)  # no static refusal in front
    assert list(tmp_path.iterdir()) == []


def test_an_answer_over_the_time_limit_is_wrong_and_only_that_one():
    with Grader(workers=1, time_limit=1) as one:
        assert one.grade([(r"\sqrt{25}", "5")]) == [True]
        pid = one.pool[0].pid
        got = one.grade([(r"\sqrt{4}", "2"), (ENDLESS, "15"), (r"\sqrt{9}", "3")])
        assert (got, one.timeouts, one.crashes) == ([True, False, True], 1, 0)
        assert 1 <= max(one.seconds.values()) < 3
        assert not running(pid)  # killed, not left to its own timer


def test_a_worker_that_dies_is_replaced():
    with Grader(workers=1) as one:
        assert one.grade([(r"\sqrt{4}", "2")]) == [True]
        os.kill(one.pool[0].pid, signal.SIGKILL)
        assert one.grade([(r"\sqrt{9}", "3")]) == [True]
        assert one.crashes == 0  # the answer did not kill it


def test_an_answer_that_breaks_its_worker_is_wrong_and_only_that_one(monkeypatch):
    # a task that is no pair of strings raises in the worker
    monkeypatch.setattr(reward, "normalise", lambda text: {"bad": ("two", "words")}.get(text, text))
    monkeypatch.setattr(reward, "quick_verdict", lambda *args: None)
    with Grader(workers=1) as one:
        assert one.grade([(r"\sqrt{4}", "2"), ("bad", "2"), (r"\sqrt{9}", "3")]) == [
            True,
            False,
            True,
        ]
        assert (one.crashes, one.timeouts) == (1, 0)


def test_a_worker_that_cannot_start_is_an_error_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Grader(workers=1) as one, pytest.raises(RuntimeError, match="died starting"):
        one.grade([(r"\sqrt{4}", "2")])


def test_equal_pairs_are_graded_once_and_verdicts_keep_their_order():
    pairs = [
        (r"\sqrt{16}", "4"),
        ("x", "4"),
        (r"\sqrt{16}", "4"),
        (None, "4"),
        (r"\sqrt {16}", "5"),
    ] * 100
    with Grader() as fresh:
        assert fresh.grade(pairs) == [True, False, True, False, False] * 100
        assert len(fresh.seconds) == 2  # sqrt(16) against 4 and against 5


def test_long_answers_are_wrong_unread():
    with Grader() as short:
        assert short.grade([("15" + " " * 298, "15"), ("15" + " " * 299, "15")]) == [True, False]
        assert short.pool == []  # plain numbers start no process


@pytest.mark.parametrize("end", ["exit", "killed idle", "killed grading"])
def test_no_worker_outlives_its_parent(end):
    # a busy worker has its kernel timer of 2 * 0.5 + 1 seconds, one still importing Math-Verify
    # ends after that
    script = f"""
import os, sys, threading
sys.path.insert(0, {str(HERE)!r})
from reward import Grader
grader = Grader(time_limit=0.5)
grader.grade([(r"\\sqrt{{4}}", "2"), (r"\\sqrt{{9}}", "3")])
print(*[worker.pid for worker in grader.pool], flush=True)
if {end!r} == "killed idle":
    os.kill(os.getpid(), 9)
if {end!r} == "killed grading":
    threading.Timer(0.2, os.kill, (os.getpid(), 9)).start()
    grader.grade([({ENDLESS!r}, "15")])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids and gone(pids, 10), done.stderr


def test_close_ends_the_workers_and_grading_goes_on_with_new_ones():
    grader = Grader()
    assert grader.grade([(r"\sqrt{4}", "2"), (r"\sqrt{9}", "3")]) == [True, True]
    pids = [worker.pid for worker in grader.pool]
    grader.close()
    assert len(pids) >= 1 and gone(pids, 0)
    assert grader.grade([(r"\sqrt{4}", "2")]) == [True]
    grader.close()


def test_workers_do_not_load_torch(grader):
    grader.grade([(r"\sqrt{4}", "2")])
    maps = Path(f"/proc/{grader.pool[0].pid}/maps").read_text()
    assert "python" in maps and "torch" not in maps


# ---- rewards by name


def rewards(text, responses, problems, grader=None):
    """compute_rewards of plain texts (or Responses) to problems, or to the golds of some."""
    responses = [Response(r) if type(r) is str else r for r in responses]
    problems = [p if isinstance(p, data.Problem) else problem(answer=p) for p in problems]
    return compute_rewards(responses, problems, parse_weights(text), grader)


def score(name, answer, gold):
    """What a boxed answer earns by one reward."""
    asked = (
        problem(answer=gold)
        if isinstance(gold, str)
        else dataclasses.replace(problem(), answers=gold)
    )
    return rewards(f"{name}=1", [rf"\boxed{{{answer}}}"], [asked])["reward"][0]


def test_reward_is_the_weighted_sum_of_its_named_parts(grader):
    responses = [r"<think>a</think> \boxed{15}", r"\boxed{15}", r"<think>a</think> \boxed{5}", "15"]
    got = rewards("accuracy=0.9,format=0.1", responses, ["15"] * 4, grader)
    assert got["accuracy"] == [1, 1, 0, 0] and got["format"] == [1, 0, 1, 0]
    assert got["reward"] == pytest.approx([1.0, 0.9, 0.1, 0.0])  # 0.9 accuracy + 0.1 format


def test_a_response_cut_at_the_limit_has_no_format(grader):
    text = r"<think>look</think>\boxed{15}"
    got = rewards(
        "accuracy=0.9,format=0.1",
        [text, Response(text + "}}}", truncated=True)],
        ["15", "15"],
        grader,
    )
    assert got == {"accuracy": [1.0, 1.0], "format": [1.0, 0.0], "reward": [1.0, 0.9]}


def test_accuracy_and_format_are_reported_without_a_weight(grader):
    for text in ("format=0", "overlong(9,1)=1"):
        got = rewards(text, [Response(r"\boxed{15}", tokens=3)], ["15"], grader)
        assert (got["accuracy"], got["format"], got["reward"]) == ([1.0], [0.0], [0.0])


def test_cheats_get_no_accuracy(grader):
    cheats = [
        r"\boxed{15} \boxed{5}", r"<think>\boxed{15}</think> \boxed{}", r"<think>\boxed{15}</think>",
        r"<think>\boxed{15}", r"\boxed{5, 14, 15, 35}", r"\boxed{5 or 15}", r"\boxed{5} or 15", "15",
    ]  # fmt: skip
    for name in ("accuracy", "exact", "numeric", "choice", "per_image"):
        gold = "C" if name == "choice" else "15"
        got = rewards(
            f"{name}=1",
            [cheat.replace("15", gold) for cheat in cheats],
            [gold] * len(cheats),
            grader,
        )
        assert got["reward"] == [0.0] * len(cheats), name


@pytest.mark.parametrize("name, gold, right, wrong", [
    ("exact", "Red car", ["red car", "a red car.", "The  RED CAR!", r"\text{red car}", r"\textbf{Red} car"],
     ["red", "car red", "red car, blue car", r"\frac{red}{car}", ""]),
    ("exact", ("gray", "grey"), ["Grey", "gray"], ["green", "gray or grey", "gray, grey"]),
    ("exact", "3.5", ["3.5", "3.5."], ["35", "3 5", "-3.5"]),
    ("exact", "-5", ["-5"], ["5", "- 5"]),
    ("exact", "1,200", ["1200", "$1,200"], ["12000"]),
    ("exact", "a", ["a", "A"], ["", "the", "an"]),  # the article is all there is
    ("exact", "a", [], ["b", r"\sqrt{a}"]),
    ("exact", "2", [], [r"\sqrt{2}", r"\frac{2}{}"]),
    ("exact", "it's a T-shirt", ["its t shirt"], []),
    ("choice", "B",
     ["B", "b", "(B)", "B.", "b)", "B. a red car", "(B) a red car", r"\text{B}", r"\textbf{(B)}", "B: 5"],
     ["A", "AB", "A, B", "B, A", "B or C", "B. or C.", "A. B. C. D.", "(A) (B)", "a red car", "C. not B", "", "?"]),
    ("choice", "(C) 12 cm", ["C", "C. 12 cm", "c"], ["12 cm", "B. 12 cm"]),
    ("choice", ("B", "D"), ["B", "d"], ["B, D", "A"]),
    ("choice", "red", [], ["red", "r"]),  # no letter to pick
    # 5% of 40 is 2, and both bounds are in
    ("numeric", "40", ["40", "38", "42", "41.99", "40 cm", "$40", "40%", "x = 41"],
     ["37.99", "42.01", "-40", "red", ""]),
    ("numeric", "-8", ["-8.4"], ["8", "-8.41"]),
    ("numeric", "0", ["0", "0.0"], ["0.01"]),
    ("numeric", "40%", ["40", "0.4", "41%"], ["0.4%", "4000%"]),
    ("numeric", "0.4", ["40%"], ["40"]),
    ("numeric", "1,000", ["1040"], ["1,100"]),
    ("numeric", "Yes", ["yes", "Yes."], ["no", "1"]),
    ("numeric", ("12", "30"), ["12.5", "30"], ["21"]),
    ("numeric(0.01)", "40", ["40.4"], ["40.5"]),
    ("numeric(0)", "40", ["40.0"], ["40.1"]),
])  # fmt: skip
def test_vqa_rewards_by_hand(name, gold, right, wrong):
    assert [answer for answer in right if score(name, answer, gold) != 1] == []
    assert [answer for answer in wrong if score(name, answer, gold) != 0] == []


def test_overlong_is_daposs_equation_13():
    # limit 20, buffer 8: 0 up to 12 tokens, -1/8 for each token more, -1 from 20 on
    cut = [Response("x", tokens=n) for n in (1, 12, 13, 16, 20, 25)]
    assert rewards("exact=0,overlong(20,8)=1", cut, ["x"] * 6)["reward"] == [
        0,
        0,
        -0.125,
        -0.5,
        -1,
        -1,
    ]
    for text, response in (
        ("overlong(20,8)=1", "x"),
        ("overlong(20,0)=1", cut[0]),
        ("overlong(8,20)=1", cut[0]),
    ):
        with pytest.raises(ValueError, match="0 < buffer <= limit, and responses of known length"):
            rewards("exact=0," + text, [response], ["x"])


def test_a_caption_earns_by_likeness_and_nothing_by_naming_everything():
    references = ("A man riding a horse along the beach.", "Someone on a brown horse")
    near, far, padded = (score("caption", text, references) for text in (
        "a man rides a horse at the beach", "two cats on a sofa",
        "man riding horse along beach, dog, cat, house, tree, car, boat, bird, city, road, sky, cloud, grass, sun",
    ))  # fmt: skip
    assert score("caption", "someone on a BROWN horse.", references) == 1
    assert 0 <= far < padded < near < 1 and score("caption", "", references) == 0


def test_several_images_earn_a_share_for_each(grader):
    golds = ("2", r"\frac{1}{2}", "not enough information")
    asked = dataclasses.replace(problem("<image><image><image>?"), answers=golds)
    earned = {
        r"2, 0.5, not enough information": 1, "2; 0.5; red": 2 / 3, "0.5, 2, red": 0, "3, 0.5, red": 1 / 3,
        "2, 0.5": 0, "2, 0.5, red, not enough information": 0, "": 0, "2": 0,
    }  # fmt: skip
    responses = [rf"\boxed{{{answer}}}" for answer in earned] + ["2, 0.5, red"]
    got = rewards("per_image=1", responses, [asked] * len(responses), grader)
    assert (
        got["reward"] == pytest.approx([*earned.values(), 0]) and got["accuracy"] == got["reward"]
    )
    large = dataclasses.replace(
        problem("<image><image>?"), answers=("4,000", "5")
    )  # semicolons keep the comma
    assert rewards("per_image=1", [r"\boxed{4,000; 5}"], [large], grader)["reward"] == [1]
    assert rewards("per_image=1", [r"\boxed{4,000}"], ["4,000"], grader)["reward"] == [1]


def test_any_of_several_golds_is_accurate(grader):
    asked = dataclasses.replace(problem(), answers=("15", r"2\sqrt{3}"))
    responses = [r"\boxed{15}", r"\boxed{\sqrt{12}}", r"\boxed{3}", r"\boxed{15, 2\sqrt{3}}"]
    assert rewards("accuracy=1", responses, [asked] * 4, grader)["accuracy"] == [1, 1, 0, 0]


def test_every_source_has_its_own_rewards_and_its_own_accuracy(grader):
    text = "accuracy=0.9,format=0.1; chartqa: format=0.2,numeric=0.8; vqa:format=0.5,exact=0.5,accuracy=2"
    sources = ("geo3k", "chartqa", "vqa", "")
    asked = [dataclasses.replace(problem(answer="40"), source=source) for source in sources]
    got = rewards(text, [r"<think>a</think>\boxed{41}"] * 4, asked, grader)
    assert got["numeric"] == [0, 1, 0, 0] and got["format"] == [1] * 4
    assert got["accuracy"] == [0, 1, 0, 0]  # of chartqa numeric is, of vqa accuracy: it is named
    assert got["reward"] == pytest.approx([0.1, 1.0, 0.5, 0.1])
    assert rewards(text, [r"\boxed{40.0}"] * 4, asked, grader)["exact"] == [0] * 4


def test_a_reward_of_the_users_gets_problem_response_and_gold(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("""
SIDE = 56
def both(problem, response, gold, most=30):
    seen = len(problem.images) == 2 and problem.images[0][:4] == b"\\x89PNG" and SIDE in (56, 57)
    return seen and gold == ("red", "blue") and response.tokens < most
def one(problem, response, gold):
    return len(gold)
def bad(problem, response, gold):
    return float("nan")
def short(response):
    return 1
""")
    asked = dataclasses.replace(problem("<image><image>?"), answers=("red", "blue"))
    weights = f"{file}:both=0.5,{file}:both(9)=3,{file}:one=-1"
    got = rewards(
        f"exact=0;x:{weights}", [Response("a", tokens=20)], [dataclasses.replace(asked, source="x")]
    )
    assert got["reward"] == [0.5 - 2] and got["accuracy"] == [1]  # named first
    assert rewards(f"{file}:one=1", ["a"], [problem(answer="abc")])["reward"] == [
        3
    ]  # a text stays one
    with pytest.raises(ValueError, match=r"bad' is nan for train.parquet row 17"):
        rewards(f"{file}:bad=1", ["a"], ["4"])
    for name in (f"{file}:none", f"{file}:short", f"{tmp_path}/none.py:one"):
        with pytest.raises(ValueError, match=r"unknown reward.*of \(problem, response, gold\)"):
            parse_weights(f"{name}=1")


def test_unknown_rewards_and_bad_weights_are_refused():
    for text, message in (
        ("acuracy=1", "acuracy.*known: accuracy.*format"), ("accuracy", "'accuracy' is not a new name=number"),
        ("accuracy=", "name=number"), ("accuracy=one", "name=number"), ("accuracy=nan", "name=number"),
        ("accuracy=1,accuracy=2", "'accuracy=2' is not a new"), ("", "name=number"), ("numeric(x)=1", "numeric"),
        ("format(3)=1", "format"), ("exact(3)=1", "exact"), ("a:exact=1", "a part without a source"),
        ("exact=1;a:exact=1;a:exact=1", "not a new"), ("accuracy=1;", "name=number"), ("overlong=1", "overlong"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse_weights(text)
    assert parse_weights("accuracy=0.9, format=.1") == {"": {"accuracy": 0.9, "format": 0.1}}
    assert parse_weights("exact=1;a/b: overlong(20,8)=-1,exact=2") == {
        "": {"exact": 1}, "a/b": {"overlong(20,8)": -1, "exact": 2}
    }  # fmt: skip


def rollout_of(ids, truncated=False):
    return rollout.Rollout([torch.tensor(ids)], torch.zeros(len(ids)), truncated)


def test_length_and_truncation_of_a_rollout_reach_its_rewards(actor, grader):
    tokenizer = actor.processor.tokenizer
    ids = tokenizer(r"<think>I look.</think>\boxed{4}").input_ids
    ended = rollout_of([*ids, tokenizer.eos_token_id])
    cut = rollout_of(ids, truncated=True)
    weights = parse_weights(
        "accuracy=1,format=1,overlong(1000,1000)=1000"
    )  # minus one for each token
    got = rollout.score([[ended, cut]], [problem()], 2, tokenizer, weights, grader)
    close(got["reward"], torch.tensor([[2.0 - len(ids) - 1, 1.0 - len(ids)]]))


def test_weights_for_a_source_that_no_problem_has_stop_the_start(tmp_path, tiny, process_group):
    file, held_out = (str(write(tmp_path, f"{split}.parquet", problem=["?"] * 2, data_source=["vqa", "chartqa"]))
                      for split in ("train", "test"))  # fmt: skip
    for rewards, unknown in (
        ("exact=1;charts:numeric=1", "charts"),
        ("exact=1;chartqa:numeric=1;x:exact=1", "x"),
    ):
        places = dict(data=file, test_data=held_out)
        settings = train.Settings(model=str(tiny[False]), instruction="", rewards=rewards, **places)
        with pytest.raises(
            ValueError, match=rf"no problem has: \['{unknown}'\]; name their column"
        ):
            train.build(settings, torch.device("cpu"))


def test_responses_and_problems_must_pair_up():
    with pytest.raises(ValueError):
        rewards("exact=1", ["a", "b"], ["15"])


# ---- a model as judge


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Chat completions as the test's `answer(number, request)` gives them: a text, or the HTTP
    status of garbage."""

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, self.headers["Authorization"], request))
            number = len(server.requests)
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        answer = server.answer(number, request)
        with server.lock:
            server.busy -= 1
        body = json.dumps(
            {"choices": [{"message": {"role": "assistant", "content": answer}}]}
        ).encode()
        with contextlib.suppress(ConnectionError):  # who asked may have given up
            self.send_response(answer if isinstance(answer, int) else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body if isinstance(answer, str) else b"<html>")

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        server.lock, server.requests, server.busy, server.busiest = threading.Lock(), [], 0, 0
        server.answer = lambda number, request: r"\boxed{1}"
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def judged(judge, responses, asked=None):
    with Grader(judge=judge) as grader:
        return rewards(
            "judge=1", responses, [asked or problem("<image>Why {so}?")] * len(responses), grader
        )["reward"]


def test_the_judge_sees_question_gold_response_and_images_once(endpoint):
    endpoint.answer = lambda number, request: r"fine: \boxed{0.25}"
    judge = Judge(endpoint.url, "wise", concurrency=1)
    asked = dataclasses.replace(
        problem("<image>Why {so}?"), images=(red(), encode(Image.new("RGB", (8, 8)), "JPEG"))
    )
    told = "<think>secret plan</think> because {it} is"
    assert judged(judge, [told, told, "<think>endless", "  "], asked) == [0.25, 0.25, 0, 0]
    assert judged(judge, [told], asked) == [0.25]
    [(path, key, request)] = endpoint.requests  # the others were known, or had nothing to judge
    assert (path, key, request["model"]) == ("/v1/chat/completions", "Bearer secret", "wise")
    text, *images = request["messages"][0]["content"]
    assert all(
        part in text["text"] for part in ("Why {so}?", "Reference answer: 4", "because {it} is")
    )
    assert "secret plan" not in text["text"]
    urls = [image["image_url"]["url"].split(",") for image in images]
    assert [url[0] for url in urls] == ["data:image/png;base64", "data:image/jpeg;base64"]
    assert tuple(base64.b64decode(url[1]) for url in urls) == asked.images
    assert judged(judge, [told], problem("Another?")) == [0.25] and len(endpoint.requests) == 2


def test_the_judge_never_has_more_requests_under_way_than_allowed(endpoint):
    def answer(number, request):
        time.sleep(0.05)
        return "0" if "number 3 " in request["messages"][0]["content"][0]["text"] else "1"

    endpoint.answer = answer
    got = judged(Judge(endpoint.url, "wise", concurrency=3), [f"number {i} " for i in range(12)])
    assert got == [1, 1, 1, 0] + [1] * 8  # in order
    assert endpoint.busiest == 3 and len(endpoint.requests) == 12


def test_a_judge_that_fails_at_first_is_asked_again(endpoint):
    endpoint.answer = lambda number, request: [500, 429, "1"][number - 1]
    assert judged(Judge(endpoint.url, "wise", retries=2), ["a"]) == [1]
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize("answer", ["no idea", r"\boxed{7}", "nan", "", 200, 500, "late"])
def test_a_judge_without_a_score_stops_the_run_or_earns_nothing(endpoint, answer):
    def reply(number, request):
        if "good" in request["messages"][0]["content"][0]["text"]:
            return "1"
        if answer == "late":
            time.sleep(0.8)
        return "1" if answer == "late" else answer

    endpoint.answer = reply
    options = dict(retries=0, timeout=0.4 if answer == "late" else 5)
    with pytest.raises(
        RuntimeError, match=r"judge wise at http://127.*gave no score.*--judge_strict"
    ):
        judged(Judge(endpoint.url, "wise", **options), ["bad", "good"])
    lenient = Judge(endpoint.url, "wise", strict=False, **options)
    assert judged(lenient, ["bad", "good", "bad"]) == [0, 1, 0] and lenient.failures == 1
    assert (
        judged(lenient, ["bad"]) == [0] and lenient.failures == 2
    )  # a failure is not remembered as a verdict


def test_a_judge_must_be_named_before_it_is_asked():
    with pytest.raises(ValueError, match="--judge_model"):
        judged(None, ["a"])
    with pytest.raises(ValueError, match="--judge_model"):
        train.parse_settings(["--preset", "tiny", "--rewards", "accuracy=1;vqa:judge=1"])


# ---- limits


def test_a_grader_of_nothing_is_refused():
    for bad in ({"workers": 0}, {"time_limit": 0}):
        with pytest.raises(ValueError, match="positive"):
            Grader(**bad)


# ---- the audit: python reward.py FILE


def audit(file, *flags, **options):
    command = [sys.executable, HERE / "reward.py", file, *flags]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_the_audit_lists_what_disagrees_and_what_cannot_be_graded(tmp_path):
    rows = [
        {"answer": "15", "response": r"\boxed{15}"},
        {"answer": "15", "response": r"\boxed{14}"},
        {"answer": ["2 \\sqrt { 221 }", "7"], "response": r"\boxed{\sqrt{884}}"},
        {"answer": r"\frac{1}{"},
        # as an evaluation writes them; the second was graded otherwise
        {"answer": "5", "response": r"\boxed{4}", "accuracy": 0.0, "source": "geo3k"},
        {"answer": "5", "response": "\ud800 \\boxed{5}", "accuracy": 0.0, "source": "geo3k"},
        {"answer": "40", "response": r"\boxed{41}", "accuracy": 1.0, "source": "chartqa"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    out = audit(file, "--rewards", "accuracy=1,format=1;chartqa:numeric=1", check=True).stdout
    assert [line for line in out.splitlines() if line.startswith("rows.jsonl")] == [
        r"rows.jsonl row 3: gold '\\frac{1}{' is not equal to itself",
        "rows.jsonl row 1: answer '14' to ('15',) earns 0.00",
        "rows.jsonl row 5: answer '5' to ('5',) earns 1.00, recorded was 0.00",
    ]
    assert "gradable golds: 7 of 8; accuracy of 6 responses: 0.667" in out and "slow: " in out


def test_the_audit_reads_parquet_and_rollouts_own_records(tmp_path, actor, process_group):
    golds = [["3", "three"], ["4"], ["red"]]
    file = write(tmp_path, problem=["?"] * 3, answer=None, gold=golds, data_source=["a", "b", "b"])
    assert "gradable golds: 4 of 4;" in audit(file, "--answer_key", "gold", check=True).stdout
    engine, weights = (
        rollout.HFEngine(actor, max_response_tokens=4),
        parse_weights("accuracy=1;b:exact=1"),
    )
    problems = data.load_problems(file, columns="answer=gold")
    with Grader() as grader:
        reader = build_reader(actor.processor)
        _, records = rollout.evaluate(engine, problems, reader, 2, 0, weights, grader)
    records = json.loads(json.dumps(records))
    assert [(r["source"], r["answer"]) for r in records[::2]] == list(
        zip("abb", golds, strict=True)
    )
    records[1]["response"] = records[5]["response"] = (
        r"\boxed{The red.}"  # what was recorded is wrong of the last
    )
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    out = audit(tmp_path / "r.jsonl", "--rewards", "accuracy=1;b:exact=1", check=True).stdout
    assert [line for line in out.splitlines() if "row" in line] == [
        "r.jsonl row 5: answer 'The red.' to ('red',) earns 1.00, recorded was 0.00"
    ]


@pytest.mark.parametrize("line, message", [
    (b'{"answer": "1"', "JSONDecodeError"), (b"[" * 100_000, "RecursionError"), (b'["answer"]', "TypeError"),
    (b"7", "TypeError"), (b'"answer"', "TypeError"), (b'{"question": "?"}', "KeyError.*text or a list"),
    (b'{"answer": null}', "None"), (b'{"answer": []}', "None"), (b'{"answer": ["a", {}]}', "{}"),
    (b'{"answer": "1", "accuracy": "high"}', "high"), (b'{"answer": "1", "response": 5}', "5"),
    (b'{"answer": "\xff"}', "UnicodeDecodeError"), (b"", "JSONDecodeError"),
])  # fmt: skip
def test_the_audit_names_file_and_row_of_what_is_broken(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_bytes(b'{"answer": "1"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl row 1 is broken .*{message}"):
        reward.read_rows(str(tmp_path / "rows.jsonl"), "answer", "data_source")


def test_the_audit_refuses_files_that_it_cannot_read(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    for name in ("broken.parquet", "none.parquet", "none.jsonl"):
        done = audit(tmp_path / name)
        assert done.returncode == 2 and name in done.stderr and "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------
# model.py: scoring


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Directories of random tiny Qwen2.5-VLs, by whether the embeddings are tied."""
    folder = tmp_path_factory.mktemp("models")
    texts = ["How many sides? Which colour? <think>I look.</think>\\boxed{4}<|im_end|>"] * 2
    return {
        tied: tiny_model.build_tiny(folder / f"tied-{tied}", texts, tie_embeddings=tied)
        for tied in (True, False)
    }


@pytest.fixture
def actor(tiny):
    return model.Actor.from_pretrained(str(tiny[False]))


def picture(seed, width=84, height=56):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels))


def ask(actor, row):
    return build_reader(actor.processor)(row)


def prompts_with(actor, *counts):
    """One prompt for each number of images, sizes mixed."""
    sizes = [(84, 56), (56, 112), (56, 56)]
    rows = [problem("<image>" * k + "What?" * (i + 1), tuple(picture(10 * i + j, *sizes[j]) for j in range(k)))
            for i, k in enumerate(counts)]  # fmt: skip
    return [ask(actor, row) for row in rows]


def random_groups(actor, counts=(0, 1, 3), lengths=((3, 5), (4, 4, 1), (2, 9)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for prompt, ns in zip(prompts_with(actor, *counts), lengths, strict=True):
        responses = [torch.randint(0, 250, (n,), generator=generator) for n in ns]
        groups.append((prompt, [[response] for response in responses]))
    return groups


def draw(engine, prompts, n, seed=0, **options):
    return engine.generate([[prompt] for prompt in prompts], n, seed, **options)


def as_groups(prompts, drawn):
    """What the engine drew for each prompt, as Actor.logprobs takes it."""
    return [(p, [r.turns for r in rs]) for p, rs in zip(prompts, drawn, strict=True)]


def sampled(drawn):
    """(N,) sampler_logprobs of all that was drawn."""
    return torch.cat([r.sampler_logprobs for rollouts in drawn for r in rollouts])


@pytest.mark.parametrize("packing", ["shared", "packed", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_plain_hugging_face_forward(actor, packing, temperature):
    # plain: a padded batch of rows with 0, 1 and 3 images, positions by Hugging Face itself, all
    # logits
    groups = random_groups(actor)
    rows = [(prompt, response) for prompt, responses in groups for [response] in responses]
    longest = max(len(p.ids) + len(r) for p, r in rows)
    ids, mask = (
        torch.zeros(len(rows), longest, dtype=torch.long),
        torch.zeros(len(rows), longest, dtype=torch.long),
    )
    for i, (p, r) in enumerate(rows):
        whole = torch.cat([p.ids, r])
        ids[i, : len(whole)], mask[i, : len(whole)] = whole, 1
    image_id = actor.model.config.image_token_id
    pixels = {
        k: torch.cat([p.inputs[k] for p, _ in rows if k in p.inputs])
        for k in ("pixel_values", "image_grid_thw")
    }
    with torch.no_grad():
        actor.use_packing("padded")
        logits = actor.model(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == image_id).int(),
            use_cache=False,
            **pixels,
        ).logits
        logits = (logits / temperature).index_fill(-1, torch.tensor(actor.banned_ids), -torch.inf)
        expected, entropy = [], []
        for i, (p, r) in enumerate(rows):
            logps = logits[i, len(p.ids) - 1 : len(p.ids) + len(r) - 1].log_softmax(-1)
            expected.append(logps.gather(-1, r[:, None])[:, 0])
            entropy.append(torch.distributions.Categorical(logits=logps).entropy())
        actor.temperature, actor.chunk = temperature, 7
        actor.use_packing(packing)
        got, got_entropy = actor.logprobs(groups)
    close(got, torch.cat(expected), atol=1e-5)
    close(got_entropy, torch.cat(entropy), atol=1e-5)


def gradients(actor, groups, packing):
    actor.use_packing(packing)
    actor.model.zero_grad()
    logprobs, _ = actor.logprobs(groups)
    weights = torch.linspace(-1, 1, len(logprobs))
    (weights * logprobs).sum().backward()
    return logprobs.detach(), {
        n: p.grad.clone() for n, p in actor.model.named_parameters() if p.grad is not None
    }


def assert_same_gradients(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    scale = max(g.norm() for g in expected.values())
    for name, g in expected.items():
        assert (got[name] - g).norm() <= tolerance * max(g.norm(), 1e-3 * scale), name


def assert_same_in_every_layout(actor, groups):
    """Log-probs and all gradients; returns the padded forward's gradients by name."""
    expected, expected_gradients = gradients(actor, groups, "padded")
    for packing in ("packed", "shared"):
        got, got_gradients = gradients(actor, groups, packing)
        close(got, expected, atol=1e-5)
        assert_same_gradients(got_gradients, expected_gradients)
    return expected_gradients


@pytest.mark.parametrize("variant", ["plain", "frozen tower", "checkpointing", "tied"])
def test_shared_packed_and_padded_give_the_same_logprobs_and_gradients(
    tiny, process_group, variant
):
    actor = model.Actor.from_pretrained(str(tiny[variant == "tied"]))
    groups = random_groups(actor, (0, 1, 3, 2), ((3, 5), (4, 4, 1), (2, 9), (6,)))
    if variant == "frozen tower":
        actor.freeze("tower", "projector")
    if variant == "checkpointing":
        actor.checkpoint_activations()
        layer, calls = actor.model.model.language_model.layers[1].mlp, []
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
        gradients(actor, groups, "shared")
        assert len(calls) == 2  # in the forward, and again in the backward
        assert (
            len(draw(rollout.HFEngine(actor, 3), [groups[1][0]], 2)[0]) == 2
            and actor.model.training
        )
    assert_same_in_every_layout(actor, groups)


def test_kept_features_of_a_frozen_tower_change_nothing(actor):
    groups = random_groups(actor, (0, 1, 3, 2), ((3, 5), (4, 4, 1), (2, 9), (6,)))
    assert (
        actor.image_features([p for p, _ in groups]) is None
    )  # a trained tower has to run every time
    actor.freeze("tower", "projector")
    features = actor.image_features([p for p, _ in groups])
    before = [f.clone() for f in features["image"].pooler_output]
    expected, _ = actor.logprobs(groups)
    for _ in range(2):
        assert torch.equal(actor.logprobs(groups, features)[0], expected)
    assert all(map(torch.equal, features["image"].pooler_output, before))
    assert actor.image_features(prompts_with(actor, 0)) is None


def test_the_check_at_start_up_passes_and_refuses_a_wrong_layout(actor, monkeypatch):
    prompts = prompts_with(actor, 2, 0)
    assert actor.check_packing(prompts) < 1e-5
    assert all(p.grad is None for p in actor.model.parameters()) and actor.packing == "shared"
    monkeypatch.setattr(
        model.Layout, "padded", lambda self, window, device: _everyone_sees_all(self)
    )
    with pytest.raises(
        RuntimeError, match=r"packing 'shared' is not exact for Qwen2_5_VLFor.*--packing padded"
    ):
        actor.check_packing(prompts)


def _everyone_sees_all(layout):
    n = layout.segments[-1][1]
    return [(torch.arange(n)[None], torch.arange(n)[None], torch.ones(1, 1, n, n).tril().bool(), torch.arange(n),
             torch.ones(1, n, dtype=torch.bool))]  # fmt: skip


def with_lora(actor, seed=1, dropout=0.0):
    """LoRA as after some training: both factors random."""
    actor.add_lora(4, 8.0, dropout, "q_proj,v_proj,down_proj")
    generator = torch.Generator().manual_seed(seed)
    for name, p in actor.model.named_parameters():
        if "lora_B" in name:
            p.data = 0.05 * torch.randn(p.shape, generator=generator)
    return actor


def test_lora_gives_the_same_logprobs_and_gradients_in_every_layout(actor):
    trained = assert_same_in_every_layout(with_lora(actor), random_groups(actor))
    assert trained and all("lora_" in name for name in trained)
    assert actor.check_packing(prompts_with(actor, 2, 0)) < 1e-5


def test_lora_adapts_the_language_model_alone_and_keeps_the_base_bit_for_bit(actor):
    before = {n: p.clone() for n, p in actor.model.named_parameters()}
    groups = random_groups(actor)
    base = actor.logprobs(groups)[0].detach()
    actor.add_lora(4, 8.0)
    adapted = {n.split(".lora_")[0] for n, p in actor.model.named_parameters() if p.requires_grad}
    layers = [f"model.language_model.layers.{i}." for i in range(4)]
    assert adapted == {layer + name for layer in layers for name in (
        *(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))}  # fmt: skip
    assert torch.equal(actor.logprobs(groups)[0], base)  # B starts at 0
    optimizer = torch.optim.AdamW([p for p in actor.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        (-actor.logprobs(groups)[0].mean()).backward()
        optimizer.step()
    assert (actor.logprobs(groups)[0] - base).abs().max() > 0.01
    with actor.without_adapters():
        assert torch.equal(actor.logprobs(groups)[0], base)
    now = {n.replace(".base_layer", ""): p for n, p in actor.model.named_parameters()}
    assert all(torch.equal(now[n], p) for n, p in before.items())


def test_weights_have_lora_merged_and_equal_a_plain_model(actor, tiny):
    with_lora(actor)
    weights = dict(actor.weights(torch.float32))
    layer = actor.model.model.language_model.layers[1].mlp.down_proj
    a, b = (getattr(layer, f"lora_{x}")["default"].weight for x in "AB")
    close(
        weights["model.language_model.layers.1.mlp.down_proj.weight"],
        layer.base_layer.weight + 8 / 4 * b @ a,
    )
    plain = model.Actor.from_pretrained(str(tiny[False]))
    plain.model.load_state_dict(weights)
    groups = random_groups(actor)
    close(plain.logprobs(groups)[0], actor.logprobs(groups)[0], atol=1e-5)


def test_an_actor_serves_a_notebook_without_processes(tiny):
    script = f"""
import model, rollout, torch, transformers
from PIL import Image
network = transformers.AutoModelForImageTextToText.from_pretrained({str(tiny[True])!r}, attn_implementation="sdpa")
actor = model.Actor(network, transformers.AutoProcessor.from_pretrained({str(tiny[True])!r}))
prompts = [actor.prompt("<image>How many sides?", [Image.new("RGB", (56, 84), "red")]), actor.prompt("Which colour?")]
drawn = rollout.HFEngine(actor, max_response_tokens=6).generate([[p] for p in prompts], n=3, seed=0)
groups = [(p, [r.turns for r in rs]) for p, rs in zip(prompts, drawn)]
gaps = []
for on in (True, False):
    actor.checkpoint_activations(on)
    logprobs, _ = actor.logprobs(groups)
    logprobs.sum().backward()
    gaps.append((logprobs - torch.cat([r.sampler_logprobs for rs in drawn for r in rs])).abs().max().item())
actor.save({str(tiny[True] / "again")!r})
print(max(gaps) < 1e-5, actor.report())
"""
    printed = run_python(["-c", script], cwd=HERE)
    assert printed == (
        "True parameters trained: language 0.63M of 0.63M, projector 0.20M of 0.20M, tower 0.30M of 0.30M\n"
    )


def test_without_lora_there_is_no_adapter_to_save(actor, tmp_path):
    with pytest.raises(ValueError, match="nothing was trained by LoRA"):
        actor.save(tmp_path / "apart", merge=False)
    assert not (tmp_path / "apart").exists()


def test_tied_weights_are_saved_once_from_a_gpu_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.Tensor, "cpu", torch.Tensor.clone
    )  # on a GPU every call makes a new tensor
    model.Actor.from_pretrained(str(tiny[True])).save(tmp_path)
    saved, base = (load_file(folder / "model.safetensors") for folder in (tmp_path, tiny[True]))
    assert saved.keys() == base.keys() and all(
        torch.equal(saved[name], w) for name, w in base.items()
    )


def test_lora_refuses_targets_that_the_language_model_does_not_have(actor):
    with pytest.raises(
        ValueError,
        match=r"--lora_targets qkv,fc1 names no linear layer.*down_proj, gate_proj, k_proj",
    ):
        actor.add_lora(4, 8.0, targets="qkv,fc1")


def test_dropout_of_the_adapters_acts_while_learning_only(actor):
    with_lora(actor, dropout=0.5)
    groups = random_groups(actor)
    with torch.no_grad():
        assert torch.equal(actor.logprobs(groups)[0], actor.logprobs(groups)[0])
    assert not torch.equal(actor.logprobs(groups)[0], actor.logprobs(groups)[0])
    assert (
        actor.check_packing(prompts_with(actor, 2, 0)) < 1e-5
    )  # which compares forwards, not draws


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_meter_counts_what_one_forward_keeps_for_its_backward(actor, checkpointing):
    actor.checkpoint_activations(checkpointing)
    saved, groups = memory.SavedTensors(), random_groups(actor, (1, 0, 1), ((30,) * 4,) * 3)
    tokens = sum(len(p.ids) + sum(len(r) for [r] in rs) for p, rs in groups)
    for _ in range(2):  # the most of any pass, not their sum
        with saved:
            actor.logprobs(groups)
    layers = 4 * tokens * 128 * 4  # bytes of the decoder layers' inputs
    if checkpointing:
        assert layers < saved.bytes < 4 * layers
    else:
        assert 12 * layers < saved.bytes < 40 * layers


def test_a_response_does_not_see_the_others_of_its_pack(actor):
    groups = random_groups(actor)
    together, _ = actor.logprobs(groups)
    alone = torch.cat(
        [actor.logprobs([(prompt, [r])])[0] for prompt, responses in groups for r in responses]
    )
    close(together, alone, atol=1e-5)


def test_a_sliding_window_hides_the_same_keys_as_in_the_padded_forward(tiny):
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    config = AutoConfig.from_pretrained(tiny[False])
    config.text_config.sliding_window, config.text_config.use_sliding_window = 6, True
    config.text_config.layer_types = ["sliding_attention", "full_attention"] * 2
    torch.manual_seed(0)
    network = Qwen2_5_VLForConditionalGeneration(config).eval()
    actor = model.Actor(network, AutoProcessor.from_pretrained(tiny[False]))
    groups = random_groups(actor)
    expected, expected_gradients = gradients(actor, groups, "padded")
    got, got_gradients = gradients(actor, groups, "shared")
    close(got, expected, atol=1e-5)
    assert_same_gradients(got_gradients, expected_gradients)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "dtype, gap", [(torch.bfloat16, 0.02), (torch.float32, 1e-4)]
)  # float32: no such kernel
def test_shared_attention_equals_the_padded_forward_on_a_gpu(tiny, dtype, gap):
    actor = model.Actor.from_pretrained(str(tiny[False]), dtype)
    actor.model.cuda()
    assert actor.check_packing(prompts_with(actor, 2, 0)) < gap


def test_packs_refuse_what_they_cannot_keep_apart(actor):
    prompt = prompts_with(actor, 0)[0]
    with pytest.raises(ValueError, match="empty response"):
        actor.logprobs([(prompt, [[torch.tensor([], dtype=torch.long)]])])
    with pytest.raises(ValueError, match="layout"):
        actor.model(input_ids=prompt.ids[None])
    with pytest.raises(ValueError, match="'tight'"):
        model.Actor(actor.model, actor.processor, packing="tight")


def test_chunked_logprobs_equal_log_softmax_with_gradients():
    torch.manual_seed(0)
    h = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets, banned = torch.randint(0, 7, (10,)), torch.tensor([7, 8])
    args = (targets, banned, 0.7, 4, True)
    logits = (h @ weight.T / 0.7).index_fill(-1, banned, -torch.inf)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    got, entropy = model.ChunkedLogprobs.apply(h, weight, *args)
    close(got, expected)
    close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert torch.autograd.gradcheck(
        lambda h, w: model.ChunkedLogprobs.apply(h, w, *args)[0], (h, weight)
    )


def test_the_head_holds_one_chunk_of_logits_however_many_tokens():
    # vocabulary 152k, float32: a chunk of 64 rows is 37 MiB, all logits of 640 rows would be 371
    # MiB
    code = (
        f"import sys, torch, resource; sys.path.insert(0, {str(HERE)!r}); import model; n = int(sys.argv[1])\n"
        "h, w = torch.randn(n, 16, requires_grad=True), torch.randn(152064, 16, requires_grad=True)\n"
        "y, none = torch.randint(0, 1000, (n,)), torch.tensor([], dtype=torch.long)\n"
        "model.ChunkedLogprobs.apply(h, w, y, none, 1.0, 64, True)[0].sum().backward()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    few, many = (float(run_python(["-c", code, str(n)]).splitlines()[-1]) for n in (64, 640))
    assert many - few < 152064 * 64 * 4 / 2**20


def test_extract_multi_modal_inputs_reads_the_forward_signature():
    from peft import LoraConfig, get_peft_model
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    batch = dict.fromkeys(
        ("input_ids", "attention_mask", "position_ids", "labels", "pixel_values", "image_grid_thw",
         "pixel_values_videos", "video_grid_thw", "image_sizes", "pixel_attention_mask", "row", "answer"),
        torch.zeros(1),
    )  # fmt: skip
    batch["second_per_grid_ts"] = None  # a field that this batch does not have
    cases = [
        (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(),
         {"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"}),
        (LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig(),
         {"pixel_values", "image_sizes", "pixel_values_videos"}),
        (Idefics3ForConditionalGeneration, Idefics3Config(pad_token_id=0), {"pixel_values", "pixel_attention_mask"}),
    ]  # fmt: skip
    for architecture, config, expected in cases:
        with torch.device("meta"):
            network = architecture(config)
            assert model.extract_multi_modal_inputs(network, batch).keys() == expected
            adapted = get_peft_model(network, LoraConfig(target_modules=["q_proj"]))
            assert model.extract_multi_modal_inputs(adapted, batch).keys() == expected
            assert (
                model.extract_multi_modal_inputs(torch.nn.DataParallel(network), batch).keys()
                == expected
            )
    assert len(batch) == 13


def test_freeze_vision_freezes_the_tower_and_says_when_there_is_none(actor):
    frozen = actor.freeze("tower", "projector")
    assert frozen == sum(p.numel() for p in actor.model.model.visual.parameters())
    before = {n: p.clone() for n, p in actor.model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in actor.model.parameters() if p.requires_grad], lr=1e-2)
    (-actor.logprobs(random_groups(actor))[0].mean()).backward()
    optimizer.step()
    for name, p in actor.model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("model.visual."), name
    with pytest.raises(RuntimeError, match="freezing the tower froze nothing"):
        actor.freeze("tower")


def test_the_tiny_model_is_the_same_for_the_same_seed(tmp_path):
    weights = [(tiny_model.build_tiny(tmp_path / name, ["a b"], seed=seed) / "model.safetensors").read_bytes()
               for name, seed in (("a", 0), ("b", 0), ("c", 1))]  # fmt: skip
    assert weights[0] == weights[1] != weights[2]


# --------------------------------------------------------------------------------------------------
# model.py: families

CHATML = "<|im_start|>{role}\n", "<|im_end|>\n", "<|im_start|>assistant\n"
QWEN = dict(image="<|vision_start|><|image_pad|><|vision_end|>", turn=CHATML, named={},
            special=["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])  # fmt: skip
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)]
CHATS = {  # how a family writes a user's turn, its image placeholder and its special tokens
    "qwen2_vl": QWEN, "qwen2_5_vl": QWEN, "qwen3_vl": QWEN, "qwen3_5": QWEN,
    "idefics3": dict(
        image="<image>", turn=("User:", "<end_of_utterance>\n", "Assistant:"), start="<|im_start|>", named={},
        special=["<image>", "<fake_token_around_image>", "<global-img>", "<video>", *TILES]),
    "internvl": dict(image="<IMG_CONTEXT>\n", turn=CHATML, special=[], named=dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>")),
    "llava_onevision": dict(  # the real template moves every image before the text
        image="<image>", images_first=True, named=dict(image_token="<image>", video_token="<video>"), special=[],
        turn=("<|im_start|>{role} ", "<|im_end|>", "<|im_start|>assistant\n")),
    "gemma3": dict(image="<start_of_image>", named=dict(
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"), special=[],
        start="{{ bos_token }}", turn=("<start_of_turn>{role}\n", "<end_of_turn>\n", "<start_of_turn>model\n")),
}  # fmt: skip


def chat_template(image, turn, images_first=False, start="", **_) -> str:
    opening, closing, answer = turn
    part = f"{{% if part.type == 'image' %}}{image}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
    parts = f"{{% for part in message.content %}}{part}{{% endfor %}}"
    if images_first:
        parts = "".join(
            f"{{% for part in message.content if part.type == '{kind}' %}}{text}{{% endfor %}}"
            for kind, text in (("image", image), ("text", "\n{{ part.text }}"))
        )
    opening = opening.replace("{role}", "{{ message.role }}")
    turns = f"{{% for message in messages %}}{opening}{parts}{closing}{{% endfor %}}"
    return f"{start}{turns}{{% if add_generation_prompt %}}{answer}{{% endif %}}"


def tiny_tokenizer(turn, special, named, **_):
    """tiny_model.tiny_processor's byte-level BPE with another family's special tokens."""
    learned = json.loads(
        tiny_model.tiny_processor(
            ["How many sides? Which colour?"]
        ).tokenizer.backend_tokenizer.to_str()
    )
    bos = dict(bos_token="<bos>", add_bos_token=True) if "<start_of_turn>" in turn[0] else {}
    tokenizer = hf.Qwen2Tokenizer(
        vocab=learned["model"]["vocab"], merges=[tuple(pair) for pair in learned["model"]["merges"]], unk_token=None,
        eos_token=turn[1].strip(), pad_token="<pad>", **bos, **named,
        extra_special_tokens=[*special, "<start_of_turn>" if bos else "<|im_start|>"],
    )  # fmt: skip
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def tiny_family(name: str, folder: Path) -> Path:
    """Write a random tiny model of a family, float32, and its processor; an image of 56 x 56 is 4
    to 34 tokens."""
    chat = CHATS[name]
    tokenizer = tiny_tokenizer(**chat)
    ids = {token.strip("<|>"): i for token, i in tokenizer.get_added_vocab().items()}
    text = dict(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, max_position_embeddings=4096,
    )  # fmt: skip
    rope = dict(
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": name == "qwen3_vl",
        }
    )
    tower = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=14,
    )
    qwen_tower = dict(depth=2, num_heads=2, patch_size=14)
    qwen_ids = {
        f"{ours}_token_id": ids.get(theirs)
        for ours, theirs in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    deep = dict(
        hidden_size=32, intermediate_size=64, out_hidden_size=128, num_position_embeddings=64
    )
    template = dict(chat_template=chat_template(**chat))
    grid, edges = [[28, 28], [28, 56], [56, 28], [56, 56]], dict(longest_edge=112)
    old_qwen = lambda: (hf.Qwen2VLImageProcessor(), tokenizer, hf.Qwen2VLVideoProcessor())  # noqa: E731
    new_qwen = lambda: (  # noqa: E731
        hf.Qwen2VLImageProcessor(patch_size=14), tokenizer, hf.Qwen3VLVideoProcessor(patch_size=14))  # fmt: skip
    processor = {
        "qwen2_vl": lambda: hf.Qwen2VLProcessor(*old_qwen(), **template),
        "qwen2_5_vl": lambda: hf.Qwen2_5_VLProcessor(*old_qwen(), **template),
        "qwen3_vl": lambda: hf.Qwen3VLProcessor(*new_qwen(), **template),
        "qwen3_5": lambda: hf.Qwen3VLProcessor(*new_qwen(), **template),
        "internvl": lambda: hf.InternVLProcessor(
            hf.GotOcr2ImageProcessor(size=dict(height=56, width=56), max_patches=2), tokenizer,
            hf.InternVLVideoProcessor(), image_seq_length=4, **template),
        "llava_onevision": lambda: hf.LlavaOnevisionProcessor(
            hf.LlavaOnevisionImageProcessor(size=dict(height=28, width=28), image_grid_pinpoints=grid), tokenizer,
            hf.LlavaOnevisionVideoProcessor(), num_image_tokens=4, vision_feature_select_strategy="full", **template),
        "idefics3": lambda: hf.Idefics3Processor(
            hf.Idefics3ImageProcessor(size=edges, max_image_size=dict(longest_edge=56)), tokenizer, image_seq_len=4,
            **template),
        "gemma3": lambda: hf.Gemma3Processor(
            hf.Gemma3ImageProcessor(size=dict(height=56, width=56)), tokenizer, image_seq_length=16, **template),
    }[name]()  # fmt: skip
    siglip = dict(**tower, model_type="siglip_vision_model", vision_use_head=False)
    config = {
        "qwen2_vl": lambda: dict(text_config=text | rope, **qwen_ids, vision_config=dict(
            **qwen_tower, embed_dim=32, hidden_size=128, mlp_ratio=2)),
        "qwen2_5_vl": lambda: dict(text_config=text | rope, **qwen_ids, vision_config=dict(
            **qwen_tower, hidden_size=32, intermediate_size=64, out_hidden_size=128, fullatt_block_indexes=[1])),
        "qwen3_vl": lambda: dict(text_config=text | rope, **qwen_ids, vision_config=dict(
            **qwen_tower, **deep, deepstack_visual_indexes=[0, 1])),
        "qwen3_5": lambda: dict(**qwen_ids, vision_config=dict(**qwen_tower, **deep), text_config=text | dict(
            head_dim=32, layer_types=["linear_attention", "full_attention", "linear_attention"],
            linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1],
                             "partial_rotary_factor": 0.25})),
        "internvl": lambda: dict(text_config=dict(model_type="qwen2", **text), image_token_id=ids["IMG_CONTEXT"],
                                 image_seq_length=4, vision_config=dict(**tower, image_size=[56, 56]) | dict(
                                     patch_size=[14, 14])),
        "llava_onevision": lambda: dict(
            text_config=dict(model_type="qwen2", **text), vision_config=dict(**siglip, image_size=28),
            image_token_index=ids["image"], video_token_index=ids["video"], image_grid_pinpoints=grid),
        "idefics3": lambda: dict(
            vision_config=dict(**tower, image_size=56), text_config=dict(model_type="llama", **text),
            image_token_id=ids.get("image"), scale_factor=2, pad_token_id=tokenizer.pad_token_id),
        "gemma3": lambda: dict(
            text_config=text | dict(query_pre_attn_scalar=32, sliding_window=8, layer_types=[
                "sliding_attention", "full_attention", "sliding_attention"]),
            vision_config=dict(**siglip, image_size=56), mm_tokens_per_image=16, boi_token_index=ids["start_of_image"],
            eoi_token_index=ids["end_of_image"], image_token_index=ids["image_soft_token"]),
    }[name]()  # fmt: skip
    config = AutoConfig.for_model(
        name, **config, tie_word_embeddings=name in ("gemma3", "qwen2_vl")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for p in network.parameters():
            if (
                p.ndim > 1
            ):  # wide enough, and never 0 (Gemma 3's projector), so that the image matters
                torch.nn.init.normal_(p, std=0.1)
    network.generation_config.eos_token_id = tokenizer.eos_token_id
    network.generation_config.pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


PIXELS = {  # what the forward takes beside text, for a prompt with images of 84 x 56 and 56 x 112 pixels
    **{name: dict(pixel_values=(56, 1176), image_grid_thw=(2, 3), mm_token_type_ids=None)
       for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")},
    "internvl": dict(pixel_values=(6, 3, 56, 56)),
    "llava_onevision": dict(pixel_values=(2, 5, 3, 28, 28), image_sizes=(2, 2), batch_num_images=(2,)),
    "idefics3": dict(pixel_values=(1, 8, 3, 56, 56), pixel_attention_mask=(1, 8, 56, 56)),
    "gemma3": dict(pixel_values=(2, 3, 56, 56), token_type_ids=None),
}  # fmt: skip


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: tiny_family(name, folder / name))


def plain_logprobs(actor, groups):
    """The Hugging Face forward of every prompt with its response alone, its own masks and
    positions, no padding."""
    rows = []
    for prompt, responses in groups:
        for [response] in responses:
            types = {k: torch.nn.functional.pad(v, (0, len(response))) for k, v in prompt.inputs.items()
                     if model.is_per_token(k)}  # fmt: skip
            ids = torch.cat([prompt.ids, response])[None]
            logits = actor.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False,
                                 **prompt.inputs | types).logits[0, len(prompt.ids) - 1 : -1]  # fmt: skip
            logits = logits.index_fill(-1, torch.tensor(actor.banned_ids), -torch.inf)
            rows.append(logits.log_softmax(-1).gather(-1, response[:, None])[:, 0])
    return torch.cat(rows)


@pytest.mark.filterwarnings("ignore:layers of type")
@pytest.mark.parametrize("name", CHATS)
def test_a_family_is_scored_as_its_plain_forward_does_and_its_frozen_tower_stays(
    name, family_folder, process_group
):
    actor = model.Actor.from_pretrained(str(family_folder(name)), packing="padded")
    groups = random_groups(actor, (0, 1, 3, 2), ((3, 5), (4, 4, 1), (2, 9), (6,)))
    banned = torch.tensor(actor.banned_ids)
    groups = [(p, [[r.masked_fill(torch.isin(r, banned), 5)] for [r] in rs]) for p, rs in groups]
    expected = plain_logprobs(actor, groups)
    white = [
        data.with_images([p.problem for p, _ in groups], i, "blank") for i in range(len(groups))
    ]
    white = [(ask(actor, row), rs) for row, (_, rs) in zip(white, groups, strict=True)]
    assert (plain_logprobs(actor, white) - expected).abs().mean() > 0.05  # the images matter
    expected.mean().backward()
    slopes = {n: p.grad.clone() for n, p in actor.model.named_parameters() if p.grad is not None}
    assert {actor.part(n) for n in slopes} == {"tower", "projector", "language"}
    for packing in ("padded", "packed", "shared"):
        actor.use_packing(packing)
        actor.model.zero_grad()
        got, _ = actor.logprobs(groups)
        close(got, expected, atol=2e-5)
        got.mean().backward()
        assert_same_gradients({n: p.grad for n, p in actor.model.named_parameters() if p.grad is not None}, slopes,
                              tolerance=1e-4)  # fmt: skip
    assert actor.packing == ("padded" if name == "qwen3_5" else "shared")
    assert actor.freeze("tower", "projector") > 0
    features = actor.image_features([p for p, _ in groups])
    assert (features is None) == (name == "qwen3_5")  # its images are needed once per response
    assert torch.equal(actor.logprobs(groups, features)[0], actor.logprobs(groups)[0])

    prompts = [p for p, _ in groups]
    drawn = draw(rollout.HFEngine(actor, 12), prompts, 2)
    actor.use_packing("padded")
    close(sampled(drawn), plain_logprobs(actor, as_groups(prompts, drawn)), atol=2e-5)

    inputs = model.extract_multi_modal_inputs(actor.model, prompts_with(actor, 2)[0].inputs)
    assert {
        k: None if model.is_per_token(k) else tuple(v.shape) for k, v in inputs.items()
    } == PIXELS[name]


@pytest.mark.filterwarnings("ignore:layers of type")
@pytest.mark.parametrize("name", CHATS)
def test_one_grpo_update_moves_a_familys_language_model_and_no_frozen_byte(
    name, family_folder, process_group
):
    run, groups = small_run(family_folder(name), prepare=lambda actor: actor.freeze("tower"), minibatch_prompts=8,
                            max_sampler_gap=100.0, max_grad_norm=1e9)  # fmt: skip
    before = {n: model.full(p).detach().clone() for n, p in run.actor.model.named_parameters()}
    [minibatch] = train.plan_minibatches(run, groups)
    train.freeze(run, [minibatch])
    assert train.update(run, minibatch, 0)["grad_norm"] > 0
    moved = {run.actor.part(n) for n, p in run.actor.model.named_parameters()
             if not torch.equal(model.full(p), before[n])}  # fmt: skip
    assert moved == {"projector", "language"}


@pytest.mark.parametrize("name", CHATS)
def test_the_usual_names_sort_the_weights_of_every_family_as_its_entry_does(name, family_folder):
    actor = model.Actor.from_pretrained(str(family_folder(name)), packing="padded")
    parts = {n: actor.part(n) for n, _ in actor.model.named_parameters()}
    assert set(parts.values()) == {"tower", "projector", "language"}
    actor.family = model.USUAL
    assert {n: actor.part(n) for n in parts} == parts


def test_an_unknown_family_works_by_the_usual_names_or_says_what_to_add(actor, monkeypatch):
    monkeypatch.delitem(model.FAMILIES, "qwen2_5_vl")
    assert model.family_of(actor.model) is model.USUAL
    monkeypatch.setattr(model, "USUAL", model.family("eyes", "nerve"))
    with pytest.raises(
        ValueError, match=r"qwen2_5_vl is not in FAMILIES.*called one of \['eyes'\].*add an entry"
    ):
        model.family_of(actor.model)


@pytest.mark.parametrize("name, most, tokens", [
    ("internvl", 56 * 56, 4), ("internvl", 4 * 56 * 56, 20), ("llava_onevision", 28 * 56, 10),
    ("idefics3", 56 * 56, 4), ("idefics3", 4 * 56 * 56, 20), ("gemma3", 56 * 56, 16), ("qwen3_vl", 4 * 28 * 28, 4),
])  # fmt: skip
def test_an_image_has_no_more_tokens_than_its_bound_allows(name, most, tokens, family_folder):
    actor = model.Actor.from_pretrained(str(family_folder(name)), pixels=(28 * 28, most))
    row = problem(images=(picture(0, 112, 112),))
    prompt = data.Reader(actor.processor, 28 * 28, most, "")(row)
    image_id = (
        getattr(actor.model.config, "image_token_id", None) or actor.model.config.image_token_index
    )
    assert (prompt.ids == image_id).sum() == tokens
    actor.logprobs([(prompt, [[torch.tensor([5, 6])]])])


# --------------------------------------------------------------------------------------------------
# rollout.py: the transformers engine


@pytest.fixture(scope="session")
def process_group():
    """A process group of one, as train.py has; one for all tests, because vLLM remembers the first
    that it saw."""
    processes.start_processes()
    yield
    torch.distributed.destroy_process_group()


def test_sampler_logprobs_equal_the_trainers(actor, process_group):
    actor.temperature = 0.7
    prompts = prompts_with(actor, 0, 1, 3, 1)
    drawn = draw(rollout.HFEngine(actor, max_response_tokens=12), prompts, n=5)
    assert [len(rollouts) for rollouts in drawn] == [5, 5, 5, 5]
    with torch.no_grad():
        logprobs, _ = actor.logprobs(as_groups(prompts, drawn))
    close(sampled(drawn), logprobs, atol=1e-5)


def test_vision_tokens_are_never_drawn_and_the_rest_is_uniform_when_the_head_is_zero(
    actor, process_group
):
    torch.nn.init.zeros_(actor.model.lm_head.weight)
    actor.model.generation_config.update(
        top_k=1, top_p=0.1, repetition_penalty=2.0
    )  # not the trained distribution
    engine = rollout.HFEngine(actor, max_response_tokens=30)
    [group] = draw(engine, prompts_with(actor, 1), n=200)
    tokens = torch.cat([r.response for r in group])
    allowed = actor.model.config.text_config.vocab_size - len(actor.banned_ids)
    assert not torch.isin(tokens, torch.tensor(actor.banned_ids)).any()
    assert len(tokens.unique()) > 0.95 * allowed
    close(
        torch.cat([r.sampler_logprobs for r in group]),
        torch.full((len(tokens),), -math.log(allowed)),
        atol=1e-5,
    )


def test_a_response_ends_with_the_end_token_or_is_marked_truncated(actor, process_group):
    torch.nn.init.zeros_(actor.model.lm_head.weight)
    engine = rollout.HFEngine(actor, max_response_tokens=200)
    [group] = draw(engine, prompts_with(actor, 0), n=100, seed=1)
    [end] = actor.eos_ids
    assert {r.truncated for r in group} == {True, False}
    for r in group:
        assert (r.response == end).sum() == (not r.truncated) and len(r.response) == len(
            r.sampler_logprobs
        )
        assert len(r.response) == 200 if r.truncated else r.response[-1] == end
        assert "<|im_end|>" not in r.text(actor.processor.tokenizer)


def test_generation_is_fixed_by_its_seed_and_greedy_by_nothing(actor, process_group):
    engine, prompts = rollout.HFEngine(actor, max_response_tokens=8), prompts_with(actor, 1, 0)

    def ids(**options):
        return [r.response.tolist() for g in draw(engine, prompts, **options) for r in g]

    state = torch.get_rng_state()
    assert ids(n=3, seed=1) == ids(n=3, seed=1) != ids(n=3, seed=2)
    assert ids(n=1, seed=1, greedy=True) == ids(n=1, seed=2, greedy=True)
    assert torch.equal(state, torch.get_rng_state())


# --------------------------------------------------------------------------------------------------
# rollout.py: vLLM

needs_vllm = pytest.mark.skipif(
    rollout.choose_engine("auto")[0] != "vllm", reason=rollout.choose_engine("auto")[1]
)


def vllm_engine(actor, folder, **changes):
    settings = dict(dtype=torch.float32, tp=1, memory_fraction=0.3, eager=True, max_prompt_tokens=400,
                    max_response_tokens=24, max_images=3)  # fmt: skip
    return rollout.VLLMEngine(actor, str(folder), **settings | changes)


def largest_gap(actor, engine, prompts, n=4, seed=0):
    """Largest |sampler_logprobs - logprobs| over n responses to each prompt."""
    drawn = draw(engine, prompts, n, seed)
    with torch.no_grad():
        logprobs, _ = actor.logprobs(as_groups(prompts, drawn))
    return (sampled(drawn) - logprobs).abs().max().item()


def perturb(actor, part="", scale=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in actor.model.named_parameters():
            if part in name:
                p.add_(torch.randn(p.shape, generator=generator), alpha=scale)


@needs_vllm
@pytest.mark.parametrize("tied", [True, False])
def test_vllm_follows_the_trainer_through_every_kind_of_update(tiny, process_group, tied):
    actor = model.Actor.from_pretrained(
        str(tiny[tied]), pixels=(28 * 28, 28 * 28 * 64), temperature=0.7
    )
    prompts = prompts_with(actor, 0, 1, 3)
    with contextlib.closing(vllm_engine(actor, tiny[tied])) as engine:
        assert largest_gap(actor, engine, prompts) < 1e-4
        # "visual" with the same images: an encoder output cached under the old weights must not
        # survive
        for part in ("", "visual", "", "embed_tokens", "norm", "bias"):
            perturb(actor, part, 0.2 if part else 0.05)
            assert largest_gap(actor, engine, prompts) > 1e-2, f"{part!r} changed nothing"
            stats = engine.sync(actor)
            assert largest_gap(actor, engine, prompts) < 1e-4, part
        assert stats["gigabytes"] == pytest.approx(
            4e-9 * sum(v.numel() for v in actor.model.state_dict().values())
        )
        assert stats["gigabytes_per_second"] > 0
        with_lora(actor)
        assert largest_gap(actor, engine, prompts) > 1e-2
        engine.sync(actor)
        assert largest_gap(actor, engine, prompts) < 1e-4


@needs_vllm
@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "idefics3"])
def test_vllm_follows_other_families(name, family_folder, process_group):
    actor = model.Actor.from_pretrained(str(family_folder(name)), pixels=(28 * 28, 28 * 28 * 64))
    prompts = prompts_with(actor, 0, 1, 2)
    with contextlib.closing(vllm_engine(actor, family_folder(name))) as engine:
        assert largest_gap(actor, engine, prompts) < 1e-4
        perturb(actor)
        assert largest_gap(actor, engine, prompts) > 1e-2
        engine.sync(actor)
        assert largest_gap(actor, engine, prompts) < 1e-4


@needs_vllm
def test_vllm_samples_the_trained_distribution(tiny, process_group):
    actor = model.Actor.from_pretrained(str(tiny[False]), pixels=(28 * 28, 28 * 28 * 64))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with contextlib.closing(vllm_engine(actor, tiny[False])) as engine:
        prompts = prompts_with(actor, 1, 0, 1)

        def ids(**options):
            return [r.response.tolist() for g in draw(engine, prompts, **options) for r in g]

        assert ids(n=3, seed=1) == ids(n=3, seed=1) != ids(n=3, seed=2)
        assert len({tuple(r) for r in ids(n=4, seed=1)}) == 12  # no two responses share their noise
        assert ids(n=1, seed=1, greedy=True) == ids(n=1, seed=2, greedy=True)
        hf = rollout.HFEngine(actor, 24)
        greedy = [g[0].response.tolist() for g in draw(hf, prompts, 1, greedy=True)]
        assert ids(n=1, seed=0, greedy=True) == greedy
        torch.nn.init.zeros_(actor.model.lm_head.weight)
        engine.sync(actor)
        [group] = draw(engine, prompts[:1], 200)
        tokens = torch.cat([r.response for r in group])
        allowed = actor.model.config.text_config.vocab_size - len(actor.banned_ids)
        assert (
            not torch.isin(tokens, torch.tensor(actor.banned_ids)).any()
            and len(tokens.unique()) > 0.95 * allowed
        )
        close(
            torch.cat([r.sampler_logprobs for r in group]),
            torch.full((len(tokens),), -math.log(allowed)),
            atol=1e-5,
        )
        assert {r.truncated for r in group} == {True, False}
        for r in group:
            assert len(r.response) == 24 if r.truncated else r.response[-1] in actor.eos_ids
    assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == threads
    assert torch.distributed.is_initialized()


@needs_vllm
def test_vllm_refuses_another_prompt_and_another_model(tiny, process_group):
    actor = model.Actor.from_pretrained(str(tiny[False]), pixels=(28 * 28, 28 * 28 * 64))
    [prompt] = prompts_with(actor, 1)
    with contextlib.closing(vllm_engine(actor, tiny[False])) as engine:
        resized = dataclasses.replace(prompt, images=[prompt.images[0].resize((56, 28))])
        with pytest.raises(RuntimeError, match="another prompt than the trainer"):
            draw(engine, [resized], 1)
        with pytest.raises(ValueError, match="greedy with n=2"):
            draw(engine, [prompt], 2, greedy=True)

    def altered(change):
        weights = dict(actor.model.state_dict())
        change(weights)
        return SimpleNamespace(weights=lambda dtype: iter(weights.items()))

    layer = "model.language_model.layers.1."
    for change, message in (
        (lambda w: w.pop(layer + "mlp.down_proj.weight"), "were not in the model"),
        (lambda w: w.pop(layer + "self_attn.k_proj.weight"), "were not in the model"),
        (lambda w: w.update({layer + "extra.weight": torch.zeros(2)}), "extra"),
    ):
        with contextlib.closing(vllm_engine(actor, tiny[False])) as engine:
            with pytest.raises((RuntimeError, ValueError), match=message):
                engine.sync(altered(change))


@needs_vllm
@pytest.mark.parametrize("tp", [1, 2])
def test_vllm_follows_sharded_weights_on_two_ranks_and_the_gate_sees_a_missed_sync(tiny, tp):
    torchrun("check_vllm_on_two_ranks", str(tiny[tp == 1]), str(tp))


def check_vllm_on_two_ranks(folder, tp):
    """Run by torchrun, with 2 ranks."""
    device = processes.start_processes()
    actor = model.Actor.from_pretrained(folder, pixels=(28 * 28, 28 * 28 * 64))
    prompts = prompts_with(actor, 0, 1, 3)[
        :: 1 if torch.distributed.get_rank() else 2
    ]  # 2 on one rank, 3 on the other
    engine = vllm_engine(actor, folder, tp=int(tp))
    actor.shard(device)
    optimizer = torch.optim.AdamW(actor.model.parameters(), lr=1e-2)
    assert largest_gap(actor, engine, prompts) < 1e-4
    for _ in range(2):
        for pack in (prompts[:1], prompts[1:]):
            (-actor.logprobs([(p, [[torch.tensor([70, 71])]]) for p in pack])[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        gap = largest_gap(actor, engine, prompts)
        assert gap > 1e-2
        with pytest.raises(RuntimeError, match="not synced"):
            train.check_gap(gap, 1e-2, 0)
        engine.sync(actor)
        assert largest_gap(actor, engine, prompts) < 1e-4
    engine.close()
    torch.distributed.destroy_process_group()


def test_an_engine_that_cannot_run_says_why():
    with pytest.raises(ValueError, match="--engine sglang"):
        rollout.choose_engine("sglang")
    if rollout.choose_engine("auto")[0] == "hf":
        with pytest.raises(ValueError, match=r"--engine vllm cannot run: .*vLLM"):
            rollout.choose_engine("vllm")


# --------------------------------------------------------------------------------------------------
# Conversations


def make(actor, question, *images, later=False):
    reader = build_reader(actor.processor)
    row = problem(question, images)
    return reader.later(row) if later else reader(row)


def two_turns(actor):
    """A hand-made trace that shows picture a three times and b once, the first two side by side."""
    a, b = picture(1, 84, 56), picture(2, 56, 56)  # 6 and 4 image tokens
    first, later = (
        make(actor, "<image>and<image>Which?", a, a),
        make(actor, "<image>or<image>Now?", b, a, later=True),
    )
    said = [
        torch.tensor(actor.processor.tokenizer.encode(text))
        for text in ("look<|im_end|>", "sides<|im_end|>")
    ]
    return [first, said[0], later, said[1]]


def cumulative(actor, trace):
    """The second turn as an agent sends it that renders the whole conversation anew; by Hugging
    Face alone."""
    asked, asked_later = (
        [
            {"type": "image"},
            {"type": "text", "text": word},
            {"type": "image"},
            {"type": "text", "text": end},
        ]
        for word, end in (("and", "Which?"), ("or", "Now?"))
    )
    messages = [dict(role="user", content=asked), dict(role="assistant", content="look"),
                dict(role="user", content=asked_later)]  # fmt: skip
    text = actor.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [*trace[0].images, *trace[2].images]
    inputs = dict(actor.processor(text=[text], images=images, return_tensors="pt"))
    del inputs["attention_mask"]
    short_ids = torch.tensor(actor.processor.tokenizer.encode(text))
    return data.Prompt(trace[0].problem, inputs.pop("input_ids")[0], short_ids, images, inputs)


def test_a_two_turn_trace_is_one_sequence_in_which_the_policys_tokens_are_trained(actor):
    trace = two_turns(actor)
    prompt, *turns = trace
    pack = model.make_pack([(prompt, [turns])], actor.positions)
    row, tokenizer = pack.input_ids[0], actor.processor.tokenizer
    pad = "<|image_pad|>"
    expected = [  # (text, trained), as the chat template writes the whole conversation
        (f"<|im_start|>user\n<|vision_start|>{pad * 6}<|vision_end|>and<|vision_start|>{pad * 6}<|vision_end|>Which?"
         "<|im_end|>\n<|im_start|>assistant\n", False),
        ("look<|im_end|>", True),
        (f"\n<|im_start|>user\n<|vision_start|>{pad * 4}<|vision_end|>or<|vision_start|>{pad * 6}<|vision_end|>Now?"
         "<|im_end|>\n<|im_start|>assistant\n", False),
        ("sides<|im_end|>", True),
    ]  # fmt: skip
    trained = [flag for text, flag in expected for _ in tokenizer.encode(text)]
    assert tokenizer.decode(row) == "".join(text for text, _ in expected)
    assert [i in (pack.keep + 1).tolist() for i in range(len(row))] == trained
    assert torch.equal(pack.targets, row[pack.keep + 1]) and torch.equal(
        pack.targets, torch.cat([turns[0], turns[2]])
    )
    # each picture once, in the order of its tokens: a, a, b, a
    inputs = actor.multi_modal_inputs(model.prompts_of(trace))
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 6], [1, 4, 4], [1, 4, 6]]
    pixels = inputs["pixel_values"]  # 24 + 24 + 16 + 24 patches
    assert len(pixels) == 88 and all(torch.equal(pixels[i : i + 24], pixels[:24]) for i in (24, 64))


def test_positions_and_logprobs_of_a_trace_are_those_of_the_plain_forward_of_the_whole_conversation(
    actor,
):
    trace = two_turns(actor)
    prompt, *turns = trace
    pack, whole = model.make_pack([(prompt, [turns])], actor.positions), cumulative(actor, trace)
    ids = torch.cat([whole.ids, turns[2]])[None]
    assert torch.equal(pack.input_ids, ids)
    types = (ids == actor.processor.image_token_id).int()
    positions, _ = actor.model.model.get_rope_index(ids, types, whole.inputs["image_grid_thw"])
    assert torch.equal(pack.position_ids, positions)
    got, entropy = actor.logprobs([(prompt, [turns])])
    actor.use_packing("padded")
    with torch.no_grad():
        inputs = whole.inputs | {
            "input_ids": ids,
            "mm_token_type_ids": types,
        }  # Hugging Face makes the positions
        logits = actor.model(**inputs, use_cache=False).logits[0, pack.keep]
    logps = logits.index_fill(-1, torch.tensor(actor.banned_ids), -torch.inf).log_softmax(-1)
    close(got, logps.gather(-1, pack.targets[:, None])[:, 0], atol=1e-5)
    close(entropy, torch.distributions.Categorical(logits=logps).entropy(), atol=1e-5)


def test_cumulative_and_delta_traces_give_the_same_sample(actor):
    trace = two_turns(actor)
    prompt, one, later, two = trace
    again = cumulative(actor, trace)
    from_deltas = model.make_trace([(prompt, one), (later, two)])
    from_wholes = model.make_trace([(prompt, one), (again, two)])
    assert from_deltas[2] is later and from_wholes[0] is prompt and len(from_wholes) == 4
    for field in ("ids", "short_ids"):
        assert torch.equal(getattr(from_wholes[2], field), getattr(later, field))
    assert (
        from_wholes[2].images == later.images
        and from_wholes[2].inputs.keys() == later.inputs.keys()
    )
    for name, value in later.inputs.items():
        assert torch.equal(from_wholes[2].inputs[name], value), name
    expected = actor.logprobs([(prompt, [from_deltas[1:]])])[0]
    assert torch.equal(actor.logprobs([(prompt, [from_wholes[1:]])])[0], expected)
    # a third turn without a picture, after both forms
    third = make(actor, "Sure?", later=True)
    join = torch.cat
    whole = dataclasses.replace(
        again, ids=join([again.ids, two, third.ids]), short_ids=join([again.short_ids, two, third.short_ids]),
        inputs=again.inputs | {"mm_token_type_ids": torch.zeros(1, len(again.ids) + len(two) + len(third.ids))},
    )  # fmt: skip
    last = model.make_trace([(prompt, one), (again, two), (whole, one)])[4]
    assert (
        torch.equal(last.ids, third.ids)
        and last.images == []
        and last.inputs.keys() == third.inputs.keys()
    )


@pytest.mark.parametrize(
    "name", ["internvl", "llava_onevision", "idefics3"]
)  # tiles, tiles filled up, [1, tiles, ...]
def test_cumulative_and_delta_traces_give_the_same_sample_in_families_of_tiles(name, family_folder):
    actor = model.Actor.from_pretrained(str(family_folder(name)))
    tokenizer = actor.processor.tokenizer
    said = torch.tensor(
        [*tokenizer.encode("look", add_special_tokens=False), tokenizer.eos_token_id]
    )
    asked = [make(actor, text, *images) for text, *images in (  # as turns: these small templates cannot be continued
        ("<image>Which?", picture(1, 28, 28)), ("<image>Now?", picture(2, 56, 28)), ("Sure?",),
        ("<image>Last?", picture(3, 112, 112)))]  # fmt: skip
    wholes, so_far = [asked[0]], asked[0].short_ids
    for i, later in enumerate(asked[1:], 2):
        so_far, images = (
            torch.cat([so_far, said, later.short_ids]),
            [image for p in asked[:i] for image in p.images],
        )
        inputs = dict(actor.processor(text=[tokenizer.decode(so_far)], images=images, add_special_tokens=False,
                                      return_tensors="pt"))  # fmt: skip
        del inputs["attention_mask"]
        wholes.append(
            data.Prompt(later.problem, inputs.pop("input_ids")[0], so_far, images, inputs)
        )
    deltas, trace = ([(p, said) for p in prompts] for prompts in (asked, wholes))
    (prompt, *turns), (first, *rest) = (
        model.make_trace(deltas),
        model.make_trace(trace, actor.family.image_axis),
    )
    assert first is prompt and all(
        torch.equal(a.ids, b.ids) for a, b in zip(turns[1::2], rest[1::2], strict=True)
    )
    assert [len(p.images) for p in model.prompts_of(rest)] == [1, 0, 1]
    close(actor.logprobs([(first, [rest])])[0], actor.logprobs([(prompt, [turns])])[0], atol=1e-5)
    wholes[3].inputs["pixel_values"] = (
        wholes[3].inputs["pixel_values"].flip(actor.family.image_axis)
    )
    with pytest.raises(ValueError, match=r"turn 4 .*its pixel_values are not"):
        model.make_trace(trace, actor.family.image_axis)


def test_a_trace_may_go_on_with_nothing_new_to_read(actor):
    prompt, one, _, two = two_turns(actor)
    again = dataclasses.replace(
        prompt, ids=torch.cat([prompt.ids, one]), short_ids=torch.cat([prompt.short_ids, one]),
        inputs=prompt.inputs | {"mm_token_type_ids": torch.zeros(1, len(prompt.ids) + len(one), dtype=torch.long)},
    )  # fmt: skip
    first, *rest = model.make_trace([(prompt, one), (again, two)])
    assert first is prompt and list(map(len, rest)) == [len(one), len(two)]
    expected = actor.logprobs([(prompt, [[torch.cat([one, two])]])])[0]
    close(actor.logprobs([(prompt, [rest])])[0], expected, atol=1e-6)


def test_a_trace_that_repeats_the_conversation_in_other_tokens_or_pictures_is_refused(actor):
    trace = two_turns(actor)
    prompt, one, _, two = trace
    again, tokenizer = cumulative(actor, trace), actor.processor.tokenizer
    spelled = torch.tensor([tokenizer.encode(letter)[0] for letter in "look"] + one[-1:].tolist())
    assert tokenizer.decode(spelled) == "look<|im_end|>" and len(spelled) > len(
        one
    )  # as a policy may write it
    with pytest.raises(ValueError, match=r"turn 2 .*its ids are not those .*never from text"):
        model.make_trace([(prompt, spelled), (again, two)])
    a, b = picture(1, 84, 56), picture(3, 84, 56)
    other = make(actor, "<image>and<image>Which?", a, b)
    with pytest.raises(ValueError, match=r"turn 2 .*its pixel_values are not"):
        model.make_trace([(other, one), (again, two)])


@pytest.mark.parametrize("variant", ["trained tower", "frozen tower", "Qwen3-VL"])
def test_conversations_give_the_same_logprobs_and_gradients_in_every_layout(
    family_folder, actor, variant
):
    actor = (
        model.Actor.from_pretrained(str(family_folder("qwen3_vl")))
        if variant == "Qwen3-VL"
        else actor
    )
    plain = random_groups(actor, (0, 1), ((3, 5), (4, 2)))
    prompt, one, later, two = two_turns(actor)
    text = make(actor, "Once more.", later=True)
    groups = [
        plain[0],
        (prompt, [[one, later, two], [two], [two, text, one, later, one]]),
        plain[1],
    ]
    if variant == "frozen tower":
        actor.freeze("tower", "projector")
        features = actor.image_features(model.prompts_of(model.turns_of(groups)))
        assert len(features["image"].pooler_output) == 2 + 2 + 2 + 1
        close(actor.logprobs(groups, features)[0], actor.logprobs(groups)[0], atol=1e-6)
    assert_same_in_every_layout(actor, groups)


def test_a_later_turn_is_what_the_template_adds_and_a_template_that_starts_anew_is_refused(actor):
    later = make(actor, "<image>Now?", picture(2, 56, 56), later=True)
    seen = "\n<|im_start|>user\n<|vision_start|>%s<|vision_end|>Now?<|im_end|>\n<|im_start|>assistant\n"
    decode = actor.processor.tokenizer.decode
    assert (
        decode(later.ids) == seen % ("<|image_pad|>" * 4)
        and decode(later.short_ids) == seen % "<|image_pad|>"
    )
    actor.processor.chat_template = (
        "{{ messages | length }} messages" + actor.processor.chat_template
    )
    with pytest.raises(
        ValueError, match=r"row 17: the chat template writes a conversation anew .*'3 messages"
    ):
        make(actor, "Now?", later=True)


class Countdown:
    """Ends after as many turns as the answer says; every turn earns 1, and the second shows a
    picture."""

    def __init__(self, row):
        self.first, self.left = row, int(row.answer)

    def step(self, text):
        self.left -= 1
        shown = (picture(self.left, 56, 56),) * (self.left == 1)
        return (
            problem("<image>" * len(shown) + f"{self.left} left", shown) if self.left else None
        ), 1.0


def countdown(actor, engine, limit=400):
    """Conversations over the engine, and prompts for 1, 3 and 2 turns. One token in six ends a
    turn."""
    actor.eos_ids = [*actor.eos_ids, *range(0, 250, 6)]
    reader = build_reader(actor.processor)
    rows = [problem("<image>Go.", (picture(i),), answer) for i, answer in enumerate("132")]
    prompts = [reader(row) for row in rows]
    return rollout.Conversations(engine, Countdown, reader, limit), prompts


def conversation_gap(actor, engine, prompts, n=6):
    """Largest |sampler_logprobs - logprobs| over n conversations from each prompt, whose parts are
    checked too."""
    drawn = draw(engine, prompts, n, seed=3)
    for prompt, rollouts in zip(prompts, drawn, strict=True):
        for r in rollouts:
            written, seen = r.turns[::2], observations(r)
            assert len(r.turns) == len(written) + len(seen)
            assert len(r.sampler_logprobs) == len(r.response) == sum(map(len, written))
            assert all(
                turn[-1] in actor.eos_ids for turn in written[:-1]
            )  # one answers an end token
            turns = r.read(engine.reader)
            assert r.tokens == sum(len(t if torch.is_tensor(t) else t.ids) for t in turns)
            if r.truncated:  # a turn that was cut is not shown to the environment
                assert r.reward == len(seen) and r.response[-1] not in actor.eos_ids
            else:
                assert r.reward == len(seen) + 1 == int(prompt.problem.answer)
    assert {len(observations(r)) for r in drawn[1]} >= {1, 2}
    assert any(r.truncated for rollouts in drawn for r in rollouts)
    groups = []
    for prompt, rollouts in zip(prompts, drawn, strict=True):
        groups.append((prompt, [r.read(engine.reader) for r in rollouts]))
    with torch.no_grad():
        logprobs, _ = actor.logprobs(groups)
    return (sampled(drawn) - logprobs).abs().max().item()


def observations(r):
    return [turn for turn in r.turns if isinstance(turn, rollout.Observation)]


def test_in_conversations_the_samplers_logprobs_equal_the_trainers(actor, process_group):
    actor.temperature = 0.7
    assert conversation_gap(actor, *countdown(actor, rollout.HFEngine(actor, 12))) < 1e-5


@needs_vllm
def test_in_conversations_vllms_logprobs_equal_the_trainers(tiny, process_group):
    actor = model.Actor.from_pretrained(str(tiny[False]), pixels=(28 * 28, 28 * 28 * 64))
    with contextlib.closing(vllm_engine(actor, tiny[False], max_response_tokens=12)) as engine:
        assert conversation_gap(actor, *countdown(actor, engine)) < 1e-4


def test_a_conversation_over_the_limit_ends_before_its_next_turn(actor, process_group):
    engine, prompts = countdown(actor, rollout.HFEngine(actor, 12), limit=70)
    rollouts = draw(engine, prompts, 8)[1]
    stopped = [r for r in rollouts if r.truncated and r.response[-1] in actor.eos_ids]
    assert stopped and all(r.reward == len(observations(r)) + 1 for r in stopped)
    assert all(len(prompts[1].ids) + r.tokens <= 70 + 12 for r in rollouts)


def test_a_rollout_travels_between_ranks_with_its_observations_compressed(actor, process_group):
    engine, prompts = countdown(actor, rollout.HFEngine(actor, 12))
    sent = max(draw(engine, prompts, 6, seed=3)[2], key=lambda r: len(r.turns))
    raw = pickle.dumps(sent)
    got = pickle.loads(raw)
    assert observations(got) == observations(sent) != []
    assert (got.reward, got.truncated) == (sent.reward, sent.truncated)
    assert list(map(type, got.turns)) == list(map(type, sent.turns))
    assert torch.equal(got.response, sent.response)
    assert torch.equal(got.sampler_logprobs, sent.sampler_logprobs)
    pixels = sent.read(engine.reader)[1].inputs["pixel_values"]
    assert len(observations(sent)[0].problem.images) == 1 and len(raw) < 4 * pixels.numel()


def test_the_codeword_environment_by_hand(tmp_path):
    figures.make_codewords(tmp_path, train=300, test=50)
    rows, held_out = data.load_problems(tmp_path), data.load_problems(tmp_path, "test")
    assert (
        not {r.answer for r in rows} & {r.answer for r in held_out}
        and len({r.answer for r in held_out}) == 25
    )
    row = rows[0]
    for letter, raw in zip(row.answer.split(), row.images, strict=True):
        [colour] = [colour for colour, code in figures.CODE.items() if code == letter]
        seen = (np.asarray(data.decode_image(raw)) == figures.COLOURS[colour]).all(-1)
        assert seen.sum() >= 28 * 28
    for said, reward_of in (
        (row.answer, 1.0),
        (row.answer[:3] + " x", 2 / 3),
        ("", 0.0),
        (row.answer + " a", 3 / 4),
    ):
        game = rollout.Codeword(row)
        assert (game.first.question, game.first.images) == ("<image><image>Next?", row.images[:2])
        second, earned = game.step("whatever")
        assert (second.question, second.images, earned) == ("<image>Spell it.", row.images[2:], 0.0)
        assert game.step(rf"<think>look</think>\boxed{{{said}}}") == (None, reward_of)


def test_two_ranks_train_on_conversations_of_which_one_has_none_to_evaluate(tmp_path):
    figures.make_codewords(tmp_path / "codewords", train=40, test=3)
    rows = data.load_problems(tmp_path / "codewords")
    tiny_model.build_warm_tiny(
        tmp_path / "codeword-model", rows, tiny_model.TINY_INSTRUCTION, updates=30
    )
    torchrun("--task", "codeword", "--engine", "hf", "--out", str(tmp_path), "--steps", "1", "--eval_rows", "1",
             "--prompts_per_step", "6", "--minibatch_prompts", "3", "--responses_per_prompt", "4",
             "--max_tokens_per_pack", "400", "--kl_coefficient", "0.1", script=HERE / "train.py")  # fmt: skip
    before, *_ = rows = metrics(tmp_path / "codeword")
    [step] = [row for row in rows if "train/reward" in row]
    assert before["eval/format"] == 1  # of the last turn: the first one is "ok"
    assert step["train/gap"] < 1e-5 and step["train/learnt_tokens"] > 0


# --------------------------------------------------------------------------------------------------
# Video and mixed rows


def film(seconds, rate=8, width=56, height=56):
    """A video file whose frame i is grey of level 8 i."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(
            "mpeg4", rate=rate, width=width, height=height, pix_fmt="yuv420p"
        )
        for i in range(round(seconds * rate)):
            frame = av.VideoFrame.from_image(Image.new("RGB", (width, height), (8 * i,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def stills(count, width=56, height=56):
    return tuple(encode(Image.new("RGB", (width, height), (8 * i,) * 3)) for i in range(count))


def levels(frames):
    return [round(np.asarray(frame).mean() / 8) for frame in frames]


def test_frames_are_spread_evenly_within_the_limits():
    limits = data.VideoLimits(fps=2, max_frames=32)
    frames, fps = data.decode_video(film(4), limits)  # 32 frames in 4 seconds: every fourth
    assert levels(frames) == [0, 4, 8, 12, 16, 20, 24, 28] and fps == pytest.approx(2)
    frames, fps = data.decode_video(film(4), dataclasses.replace(limits, max_frames=4))
    assert levels(frames) == [0, 8, 16, 24] and fps == pytest.approx(1)
    frames, fps = data.decode_video(
        film(1.5, rate=1), limits
    )  # slower than asked for: frames come twice
    assert levels(frames) == [0, 0, 1, 1] and fps == pytest.approx(2)
    assert levels(data.decode_video(stills(3), limits)[0]) == [0, 1, 2]
    frames, fps = data.decode_video(stills(10), dataclasses.replace(limits, max_frames=4))
    assert levels(frames) == [0, 2, 5, 7] and fps == pytest.approx(
        0.8
    )  # 4 of 10 frames at 2 per second
    for raw in (b"no video", film(1)[:200], red()):
        with pytest.raises(ValueError, match="repair or remove the row"):
            data.decode_video(raw, limits)


def test_videos_are_files_or_lists_of_frames(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(film(1))
    still = [{"bytes": raw, "path": None} for raw in stills(3)]
    file = [{"bytes": film(1), "path": None}]
    for cells, videos in (
        ([["clip.mp4"], []], (film(1),)), ([file, []], (film(1),)), ([[still], []], (stills(3),)),
        ([[still, still[:2]], None], (stills(3), stills(2))),
    ):  # fmt: skip
        path = write(
            tmp_path,
            problem=["<video>" * len(videos) + "What?", "Why?"],
            answer=["1", "2"],
            videos=cells,
        )
        rows = data.load_problems(path)
        assert rows[0].videos == videos and rows[1].videos == () and rows[0].images == ()
    for question, message in (
        ("What?", "0 <video> .* 2 videos"),
        ("<video><video><image>", "1 <image> .* 0 images"),
    ):
        row = dataclasses.replace(rows[0], question=question)
        with pytest.raises(ValueError, match=message):
            build_reader(build_processor())(row)


def media_problem(question, images=0, *videos):
    return dataclasses.replace(
        problem(question, tuple(picture(i) for i in range(images)), "4"), videos=videos
    )


def mixed_prompts(actor):
    """Text, one image, several, a video file, and an image between two videos."""
    rows = [media_problem("What?"), media_problem("<image>What?", 1), media_problem("<image><image>What?", 2),
            media_problem("See <video>What?", 0, film(4)),
            media_problem("<video>or<image>or<video>?", 1, stills(3, 84, 56), stills(2))]  # fmt: skip
    return [ask(actor, row) for row in rows]


def test_a_video_prompt_holds_its_frames_and_their_timing(actor):
    *_, long, mixed = mixed_prompts(actor)
    assert long.inputs["video_grid_thw"].tolist() == [
        [4, 4, 4]
    ]  # 8 frames, 2 and 2 together; 56 = 4 patches of 14
    assert long.inputs["second_per_grid_ts"].tolist() == [1.0] and long.videos[0][0].shape == (
        8,
        56,
        56,
        3,
    )
    video, image = (getattr(actor.processor, f"{kind}_token_id") for kind in ("video", "image"))
    assert (long.ids == video).sum() == 4 * 4 and (long.short_ids == video).sum() == 1
    seen = [token for token in mixed.short_ids.tolist() if token in (video, image)]
    assert seen == [video, image, video] and mixed.inputs["video_grid_thw"].tolist() == [
        [2, 4, 6],
        [1, 4, 4],
    ]
    assert (
        len(mixed.inputs["pixel_values_videos"]) == 48 + 16
        and len(mixed.inputs["pixel_values"]) == 24
    )
    # a frame of more pixels than allowed is reduced: 112 x 112 to 56 x 56
    small = data.VideoLimits(max_pixels=56 * 56)
    row = media_problem("<video>", 0, stills(2, 112, 112))
    prompt = build_reader(actor.processor, video=small)(row)
    assert prompt.videos[0][0].shape == (2, 56, 56, 3)
    blank = data.with_images([media_problem("<video>", 0, film(1), stills(3))], 0, "blank")
    assert [levels(data.decode_video(video, small)[0]) for video in blank.videos] == [
        [32, 32],
        [32, 32, 32],
    ]  # 255 / 8


def test_what_follows_a_video_begins_after_its_last_frame(actor):
    *_, long, _ = mixed_prompts(actor)
    positions, start = (
        actor.positions(long),
        long.ids.tolist().index(actor.processor.video_token_id),
    )
    # 4 pairs of frames one second apart, 4 positions to a second; 2 x 2 tokens each
    assert (positions[:, start : start + 16] - start).tolist() == [
        [0] * 4 + [4] * 4 + [8] * 4 + [12] * 4, [0, 0, 1, 1] * 4, [0, 1] * 8
    ]  # fmt: skip
    rest = len(long.ids) - start - 16
    assert (positions[:, start + 16 :] - start - 13).tolist() == [list(range(rest))] * 3


@pytest.mark.parametrize("variant", ["trained tower", "frozen tower"])
def test_mixed_rows_give_the_same_logprobs_and_gradients_in_every_layout(actor, variant):
    generator = torch.Generator().manual_seed(0)
    groups = []
    for prompt in mixed_prompts(actor):
        responses = [torch.randint(0, 250, (n,), generator=generator) for n in (3, 5)]
        groups.append((prompt, [[response] for response in responses]))
    later = dataclasses.replace(media_problem("<video>Now?", 0, stills(2, 56, 84)))
    observation = build_reader(actor.processor).later(later)
    [one], [two] = groups[0][1]
    groups[1][1].append([one, observation, two])
    if variant == "frozen tower":
        actor.freeze("tower", "projector")
        features = actor.image_features(model.prompts_of(model.turns_of(groups)))
        assert [len(features[kind].pooler_output) for kind in ("image", "video")] == [
            1 + 2 + 1,
            1 + 1 + 2,
        ]
        close(actor.logprobs(groups, features)[0], actor.logprobs(groups)[0], atol=1e-6)
    assert_same_in_every_layout(actor, groups)


def test_a_turn_with_a_video_counts_it_once_in_a_cumulative_trace(actor):
    *_, mixed = mixed_prompts(actor)
    one = torch.tensor(actor.processor.tokenizer.encode("look<|im_end|>"))
    row = media_problem("<video>or<image>?", 1, stills(2))
    later = build_reader(actor.processor).later(row)
    joined, types = (
        model.join_inputs([mixed, later]),
        [p.inputs["mm_token_type_ids"] for p in (mixed, later)],
    )
    types = torch.cat([types[0], torch.zeros(1, len(one)), types[1]], 1)
    whole = data.Prompt(
        mixed.problem, torch.cat([mixed.ids, one, later.ids]), torch.cat([mixed.short_ids, one, later.short_ids]),
        mixed.images + later.images, joined | {"mm_token_type_ids": types}, mixed.videos + later.videos,
    )  # fmt: skip
    got = model.make_trace([(mixed, one), (whole, one)])[2]
    assert torch.equal(got.ids, later.ids) and got.videos == later.videos and len(got.images) == 1
    assert all(torch.equal(got.inputs[name], value) for name, value in later.inputs.items())


@needs_vllm
def test_vllm_sees_the_same_videos(tiny, process_group):
    actor = model.Actor.from_pretrained(str(tiny[False]), pixels=(28 * 28, 28 * 28 * 64))
    prompts = mixed_prompts(actor)
    with contextlib.closing(vllm_engine(actor, tiny[False], max_videos=2)) as engine:
        assert largest_gap(actor, engine, prompts) < 1e-4
    assert largest_gap(actor, rollout.HFEngine(actor, 12), prompts) < 1e-5


def test_a_rank_with_text_alone_trains_beside_one_with_images_and_videos(
    tiny, process_group, tmp_path
):
    torchrun("save_mixed_gradients", str(tiny[False]), str(tmp_path / "two.pt"))
    actor = model.Actor.from_pretrained(str(tiny[False]))
    batches = mixed_batches(actor)
    torch.cat([actor.logprobs(batch)[0] for pair in batches for batch in pair]).sum().backward()
    expected = {n: p.grad for n, p in actor.model.named_parameters()}
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert_same_gradients(
        {n: 2 * g for n, g in two.items()}, expected
    )  # FSDP's mean over ranks, times 2, is the sum


def mixed_batches(actor):
    """Three passes of 2 ranks: text beside images and videos, a video beside an image, all these
    beside text."""
    text, image, images, video, mixed = (
        [(p, [[torch.tensor([70 + i, 71])], [torch.tensor([72])]])]
        for i, p in enumerate(mixed_prompts(actor))
    )
    return [(text, images + mixed), (video, image), (text + image + video + mixed, text)]


def save_mixed_gradients(folder, out):
    """Run by torchrun, with 2 ranks."""
    device = processes.start_processes()
    actor = model.Actor.from_pretrained(folder)
    batches = mixed_batches(actor)
    actor.shard(device, videos=True)
    for pair in batches:
        actor.logprobs(pair[torch.distributed.get_rank()])[0].sum().backward()
    gradients = {n: model.full(p.grad) for n, p in actor.model.named_parameters()}
    if torch.distributed.get_rank() == 0:
        torch.save(gradients, out)
    torch.distributed.destroy_process_group()


def test_two_ranks_train_on_a_row_of_text_and_one_of_pictures_and_videos(start, tmp_path):
    copy_start(start, tmp_path)
    frames = [{"bytes": raw, "path": None} for raw in stills(3)]
    clip = [{"bytes": film(2), "path": None}]
    image = {"bytes": red(), "path": None}
    write(
        tmp_path,
        problem=["How many sides?", "<video>and<image>?"],
        images=[[], [image]],
        videos=[[], [frames]],
    )
    write(tmp_path, "test.parquet", problem=["<video>What?"], images=[[]], videos=[clip])
    train_file, test_file = (str(tmp_path / f"{split}.parquet") for split in ("train", "test"))
    torchrun(*SHORT, "--out", str(tmp_path), "--data", train_file, "--test_data", test_file, "--prompts_per_step", "2",
             "--minibatch_prompts", "2", "--steps", "2", "--kl_coefficient", "0.1", "--max_frames", "2",
             "--max_frame_pixels", "1568", script=HERE / "train.py")  # fmt: skip
    steps = [row for row in metrics(tmp_path / "tiny") if "train/reward" in row]
    assert len(steps) == 2 and all(
        row["train/gap"] < 1e-5 and row["train/learnt_tokens"] > 0 for row in steps
    )


# --------------------------------------------------------------------------------------------------
# train.py


def test_every_setting_is_read_somewhere_and_has_help():
    source = (HERE / "train.py").read_text()
    files = (HERE / "train.py", *(HERE / "support").glob("*.py"))
    body = "".join(file.read_text() for file in files)
    for f in dataclasses.fields(train.Settings):
        assert len(f.metadata["help"]) > 5
        read = re.search(rf"\b(s|self|settings)\.{f.name}\b", body) or f"self.{f.name}" in source
        assert read or f.name == "preset", f"--{f.name} is dead"


def test_unknown_flags_are_refused():
    for unknown in ("--learning_rat", "--nothing"):
        with pytest.raises(ValueError, match=unknown):
            train.parse_settings(["--preset", "tiny", unknown, "1"])


def test_every_number_among_the_settings_has_bounds_but_the_seed():
    bounded = [*" ".join(train.LIMITS.values()).split(), "responses_per_prompt"]
    assert sorted(bounded) == sorted(
        f.name
        for f in dataclasses.fields(train.Settings)
        if f.type in (int, float, "int", "float") and f.name != "seed"
    )


@pytest.mark.parametrize("flags, message", [
    ("--responses_per_prompt 1", "--responses_per_prompt is 1; .*compared with the others"),
    ("--minibatch_prompts 48", "64 is not a multiple of --minibatch_prompts 48"),
    ("--temperature 0", "--temperature is 0.0, not from 0.01 to 100"),
    ("--temperature nan", "--temperature is nan"),
    ("--learning_rate inf", "--learning_rate is inf"),
    ("--learning_rate=-0.1", "--learning_rate is -0.1, not from 0"),
    ("--steps 0", "--steps is 0, not from 1 to .*batches of rollouts"),
    ("--keep 0", "--keep is 0, not from 1 .*newest checkpoints"),
    ("--memory_fraction 60", "--memory_fraction is 60.0, not from 0.01 to 1 "),
    ("--clip_low 1.5", "--clip_low is 1.5"),
    ("--beta2 1", "--beta2 is 1.0"),
    ("--importance_cap 0.5", "--importance_cap is 0.5"),
    ("--final_learning_rate 10", "--final_learning_rate is 10.0"),
    ("--max_grad_norm 0", "--max_grad_norm is 0.0"),
    ("--max_sampler_gap nan", "--max_sampler_gap is nan"),
    ("--timeout 0", "--timeout is 0.0, .*minutes"),
    ("--min_pixels 99999", "--min_pixels 99999 is above"),
    ("--rewards acuracy=1", "acuracy"),
    ("--rewards accuracy=0,format=0", "weighs everything 0"),
    ("--kl_estimator k4", "--kl_estimator k4 is none of k1, k2, k3"),
    ("--resume true", "--resume true is none of no, auto, must"),
    ("--rollout_tp 2 --engine hf", "--rollout_tp 2 is vLLM's"),
    ("--name ../elsewhere", "--name '../elsewhere' is not a plain folder name"),
])  # fmt: skip
def test_impossible_settings_are_refused_with_what_to_change(flags, message):
    with pytest.raises(ValueError, match=message):
        train.parse_settings(["--preset", "tiny", *flags.split()])


def test_a_flag_wins_over_the_preset():
    settings, why = train.parse_settings(["--preset", "geo3k", "--steps", "7"])
    assert (settings.steps, settings.model) == (
        7,
        "Qwen/Qwen2.5-VL-7B-Instruct",
    ) and "asked for" in why
    settings, why = train.parse_settings([])
    assert settings.preset in why and ("GPU" in why)


def group(*lengths, prompt=10, index=0):
    rollouts = [rollout_of(range(n)) for n in lengths]
    return train.Group(index, prompt, prompt // 2, rollouts, {}, torch.ones(len(lengths)))


def test_packs_hold_every_response_once_within_the_budget():
    rng = random.Random(0)
    groups = [
        group(*(rng.randint(1, 30) for _ in range(4)), prompt=rng.randint(5, 40), index=i)
        for i in range(30)
    ]
    for budget in (60, 100, 1000):
        packs = train.cut_into_packs(groups, budget)
        seen = sorted((g.index, i) for pack in packs for g, chosen in pack for i in chosen)
        assert seen == [(g, i) for g in range(30) for i in range(4)]
        for pack in packs:
            used = sum(
                g.prompt_tokens + sum(len(g.rollouts[i].response) for i in chosen)
                for g, chosen in pack
            )
            assert used <= budget or sum(len(chosen) for _, chosen in pack) == 1
    # 10 + 5 + 5 fits 20, the third response does not: the prompt comes twice
    assert [[c for _, c in pack] for pack in train.cut_into_packs([group(5, 5, 5)], 20)] == [
        [[0, 1]],
        [[2]],
    ]
    # without sharing every response weighs 10 + 5
    assert [[c for _, c in pack] for pack in train.cut_into_packs([group(5, 5, 5)], 30, False)] == [
        [[0, 1]],
        [[2]],
    ]
    assert len(train.cut_into_packs([group(5, 5, 5)], 29, False)) == 3


def test_deal_by_hand_and_evenly():
    # differencing 8,7,6,5,4: 8-7=1, 6-5=1, 4-1=3, 3-1=2: 16 against 14; taking the largest first
    # gives 17 and 13
    shares = train.deal([8, 7, 6, 5, 4], 2)
    assert sorted(sum([8, 7, 6, 5, 4][i] for i in share) for share in shares) == [14, 16]
    rng = random.Random(0)
    costs = [rng.randint(300, 4000) for _ in range(128)]
    shares = train.deal(costs, 8)
    assert sorted(i for share in shares for i in share) == list(range(128))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) * 8 / sum(loads) < 1.01
    assert train.deal([], 3) == [[], [], []]


@pytest.mark.skipif(not GEO3K.exists(), reason="the Geometry3K sample is not there")
def test_eight_ranks_get_even_shares_of_real_geometry3k_groups(tiny):
    # 128 prompts, 5 responses each of 50 to 2048 tokens: the heaviest rank has at most 5 % more
    # than the mean
    processor = AutoProcessor.from_pretrained(tiny[False])
    rows, rng = data.load_problems(GEO3K / "train.parquet"), random.Random(0)
    reader = data.Reader(processor, 262144, 1280 * 784)
    prompts = [len(reader(row).ids) for row in rows[:128]]
    costs = [group(*(rng.randint(50, 2048) for _ in range(5)), prompt=n).cost for n in prompts]
    loads = [sum(costs[i] for i in share) for share in train.deal(costs, 8)]
    assert max(loads) * 8 / sum(loads) < 1.05
    # dealt as they come, 16 to each, they would not pass
    assert max(sum(costs[16 * i : 16 * i + 16]) for i in range(8)) * 8 / sum(costs) > 1.05


def small_run(folder, groups_seed=0, prepare=lambda actor: None, **changes):
    """A Run on the tiny model in `folder` with plain SGD: its steps are the gradient, too long to
    be rounded away."""
    settings, _ = train.parse_settings(["--preset", "tiny", "--engine", "hf"])
    settings = dataclasses.replace(settings, model=str(folder), kl_coefficient=0.0, **changes)
    actor = model.Actor.from_pretrained(
        settings.model, temperature=settings.temperature, packing=settings.packing
    )
    prepare(actor)
    actor.shard(torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in actor.model.parameters() if p.requires_grad], lr=1e6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1.0)
    rows = [problem("<image>" * (i % 3) + "What?" * (1 + i % 4), tuple(picture(j + i) for j in range(i % 3)))
            for i in range(8)]  # fmt: skip
    settings = dataclasses.replace(
        settings, min_pixels=28 * 28, max_pixels=28 * 28 * 64, prompts_per_step=8
    )
    run = train.Run(settings, torch.device("cpu"), actor, None, None, optimizer, schedule, rows, rows, None,
                    build_reader(actor.processor, settings.instruction))  # fmt: skip
    generator = torch.Generator().manual_seed(groups_seed)

    def random_rollout(length):
        response = torch.randint(0, 250, (length,), generator=generator)
        sampler_logprobs = -5.0 + torch.rand(length, generator=generator)
        return rollout.Rollout([response], sampler_logprobs, False)

    groups = [
        train.Group(i, len(run.reader(rows[i]).ids), 4, [random_rollout(2 + (3 * i + j) % 7) for j in range(4)], {},
                    torch.randn(4, generator=generator) if i != 5 else torch.zeros(4))
        for i in range(8)
    ]  # fmt: skip
    return run, groups


def one_update(folder, **changes):
    """Loss and whole weights after one update on fixed rollouts; every rank returns them."""
    run, groups = small_run(
        folder, minibatch_prompts=8, max_sampler_gap=100.0, max_grad_norm=1e9, **changes
    )
    [minibatch] = train.plan_minibatches(run, groups)
    train.freeze(run, [minibatch])
    totals = train.update(run, minibatch, 0)
    weights = {n: train.full(p).detach().clone() for n, p in run.actor.model.named_parameters()}
    return totals, weights, len(minibatch.packs)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_loss_does_not_depend_on_how_the_minibatch_is_cut(tiny, process_group, aggregation):
    whole, weights, passes = one_update(tiny[False], aggregation=aggregation)
    cut, cut_weights, cut_passes = one_update(
        tiny[False], aggregation=aggregation, max_tokens_per_pack=60
    )
    assert passes == 1 and cut_passes > 5
    assert cut["loss"] == pytest.approx(
        whole["loss"], rel=1e-5, abs=1e-6
    )  # terms of 0.1 that may all but cancel
    before = dict(model.Actor.from_pretrained(str(tiny[False])).model.named_parameters())
    assert_same_gradients({n: w - before[n] for n, w in cut_weights.items()},
                          {n: w - before[n] for n, w in weights.items()})  # fmt: skip


def test_flat_groups_change_nothing_but_are_not_computed(tiny, process_group):
    run, groups = small_run(tiny[False], minibatch_prompts=8)
    [minibatch] = train.plan_minibatches(run, groups)
    assert sum(len(responses) for pack in minibatch.packs for _, responses in pack.groups) == 7 * 4
    assert minibatch.responses == 8 * 4
    for g in groups:
        g.advantages = torch.zeros(4)
    [nothing] = train.plan_minibatches(run, groups)
    assert nothing.packs == [] and train.update(run, nothing, 0) == {}


@pytest.mark.parametrize("frozen", [False, True])
def test_sharding_keeps_trained_weights_in_float32_and_changes_no_logprob(
    tiny, process_group, frozen
):
    plain = model.Actor.from_pretrained(str(tiny[True]), torch.bfloat16)
    for name, p in plain.model.named_parameters():
        p.data = p.data if frozen and plain.part(name) != "language" else p.data.float()
    groups = random_groups(plain)
    actor = model.Actor.from_pretrained(str(tiny[True]), torch.bfloat16)
    if frozen:
        actor.freeze("tower", "projector")
    actor.shard(torch.device("cpu"))
    for name, p in actor.model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    close(actor.logprobs(groups)[0], plain.logprobs(groups)[0], atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in actor.model.parameters() if p.requires_grad], lr=1e-3)
    before = actor.logprobs(groups)[0]
    (-before.mean()).backward()
    optimizer.step()
    assert actor.logprobs(groups)[0].mean() > before.mean()


def test_dynamic_sampling_replaces_flat_groups(start, tmp_path):
    copy_start(start, tmp_path)
    flags = [str(HERE / "train.py"), *SHORT, "--out", str(tmp_path), "--steps", "1", "--eval_rows", "2",
             "--freeze_vision", "true", "--gradient_checkpointing", "true"]  # fmt: skip
    tokens = []
    for extra in ("0", "3"):
        run_python([*flags, "--dynamic_sampling", extra])
        tokens += [
            row["train/learnt_tokens"]
            for row in metrics(tmp_path / "tiny")
            if "train/reward" in row
        ]
    assert tokens[0] < tokens[1]
    assert (
        tmp_path / "tiny.1" / "metrics.jsonl"
    ).exists()  # the first run was set aside, not mixed up


def test_a_sampler_that_is_not_the_policy_stops_the_run(tiny, process_group):
    run, groups = small_run(tiny[False], minibatch_prompts=8, max_sampler_gap=0.1)
    before = train.full(next(run.actor.model.parameters())).clone()
    with pytest.raises(RuntimeError, match=r"step 3: sampler and trainer disagree by .*not synced"):
        train.update(run, train.plan_minibatches(run, groups)[0], 3)
    assert torch.equal(train.full(next(run.actor.model.parameters())), before)
    with pytest.raises(RuntimeError, match="nan"):
        train.check_gap(math.nan, 0.1, 0)


@pytest.mark.parametrize("prepare", ["nothing", "with_lora"])
def test_two_processes_that_share_prompts_equal_one_that_pads(
    tiny, process_group, tmp_path, prepare
):
    torchrun("save_one_update", str(tiny[False]), str(tmp_path / "two.pt"), prepare)
    totals, weights, _ = one_update(tiny[False], packing="padded", prepare=globals()[prepare])
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert two["loss"] == pytest.approx(totals["loss"], rel=1e-5)
    before = model.Actor.from_pretrained(str(tiny[False]))
    globals()[prepare](before)
    before = dict(before.model.named_parameters())
    moved = {n: w - before[n] for n, w in weights.items() if not torch.equal(w, before[n])}
    assert_same_gradients(
        {n: w - before[n] for n, w in two["weights"].items() if n in moved}, moved
    )


def nothing(actor):
    pass


def save_one_update(folder, out, prepare):
    """Run by torchrun, with 2 ranks."""
    processes.start_processes()
    totals, weights, _ = one_update(folder, max_tokens_per_pack=100, prepare=globals()[prepare])
    if torch.distributed.get_rank() == 0:
        torch.save({"loss": totals["loss"], "weights": weights}, out)
    torch.distributed.destroy_process_group()


def run_python(arguments, **options):
    """Run a Python of this environment to its end; returns what it printed, errors included."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=180,
        **options,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def torchrun(*arguments, script=__file__, ranks=2, **options):
    return run_python(
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            str(script),
            *arguments,
        ],
        **options,
    )


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A short warm-up on few figures, shared by the runs below: they are about the machinery, not
    the accuracy."""
    folder = tmp_path_factory.mktemp("start")
    figures.make_figures(folder / "figures", train=200, test=24)
    problems = data.load_problems(folder / "figures")
    tiny_model.build_warm_tiny(
        folder / "tiny-model", problems, train.PRESETS["tiny"]["instruction"], updates=60
    )
    return folder


SHORT = ("--preset", "tiny", "--engine", "hf", "--prompts_per_step", "8", "--minibatch_prompts", "4",
         "--responses_per_prompt", "4", "--steps", "3", "--eval_every", "3", "--eval_rows", "12",
         "--kl_coefficient", "0")  # fmt: skip


def copy_start(start, folder):
    shutil.copytree(start, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def finished(start, tmp_path_factory):
    """The folder of a short run that has ended."""
    folder = copy_start(start, tmp_path_factory.mktemp("finished"))
    run_python([str(HERE / "train.py"), *SHORT, "--out", str(folder), "--kl_coefficient", "0.1", "--eval_samples", "4",
                "--minibatch_prompts", "8"])  # fmt: skip
    return folder / "tiny"


def test_a_run_writes_metrics_report_responses_checkpoint_and_export(finished):
    rows = metrics(finished)
    assert [row["step"] for row in rows] == [
        0,
        0,
        0,
        1,
        2,
        3,
        3,
        3,
        3,
    ]  # three kinds of images at both ends
    steps = [row for row in rows if "train/reward" in row]
    assert all(math.isfinite(v) for row in rows for v in row.values())
    assert (
        steps[0]["train/kl"] == 0 < steps[-1]["train/kl"]
    )  # the reference is the policy before its first update
    assert all(row["train/gap"] < 1e-5 for row in steps)
    records = [
        json.loads(line)
        for line in (finished / "responses" / "eval-000003.jsonl").read_text().splitlines()
    ]
    assert (
        len(records) == 48
        and {"question", "answer", "response", "accuracy", "truncated"} <= records[0].keys()
    )
    exported = model.Actor.from_pretrained(str(finished / "model"))
    assert exported.model.config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
    assert (finished / "checkpoints" / "step-000003").is_dir()
    report = embedded(finished)
    assert [s["step"] for s in report["steps"]] == [1, 3] and report["settings"]["steps"] == 3
    assert report["curves"].keys() == {name for row in rows for name in row} - {"step"}
    assert report["curves"]["train/kl"][2] == [3, pytest.approx(steps[2]["train/kl"], rel=1e-4)]


PLAIN = """
import sys, model, torch, transformers
folder, ids = sys.argv[1], torch.tensor([eval(sys.argv[2])])
network, processor = (getattr(transformers, f"Auto{x}").from_pretrained(folder)
                      for x in ("ModelForImageTextToText", "Processor"))
assert processor.chat_template and network.generation_config.eos_token_id == processor.tokenizer.eos_token_id
print(network(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist())
"""


@pytest.mark.parametrize(
    "flags, ranks", [((), 2), (("--lora_rank", "4", "--learning_rate", "1e-2"), 1)]
)
def test_an_exported_checkpoint_scores_as_the_trainer_in_a_fresh_process_and_in_vllm(
    start, tmp_path, process_group, flags, ranks
):
    copy_start(start, tmp_path)
    torchrun(*SHORT, "--out", str(tmp_path), *flags, script=HERE / "train.py", ranks=ranks)
    out, checkpoint = tmp_path / "exported", tmp_path / "tiny" / "checkpoints" / "step-000003"
    run_python([str(HERE / "model.py"), "export", str(checkpoint), str(out)])
    weights = load_file(out / "model.safetensors")
    assert all(
        torch.equal(w, weights[n])
        for n, w in load_file(tmp_path / "tiny/model/model.safetensors").items()
    )

    trainer = model.Actor.from_pretrained(str(tmp_path / "tiny-model"), packing="padded")
    base = load_file(tmp_path / "tiny-model" / "model.safetensors")
    if flags:
        trainer.add_lora(4, 32.0)
    state = {}  # every rank's rows of every weight, as they lie in the files
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, rows in load_file(file).items():
            state[name] = torch.cat([state[name], rows]) if name in state else rows
    missing, unknown = trainer.model.load_state_dict(state, strict=False)
    assert [n for n in unknown if " " not in n] == [
        "counts"
    ]  # beside AdamW's moments, "NAME exp_avg"
    assert bool(flags) == any("base_layer" in n for n in missing)
    ids = torch.tensor(
        trainer.processor.tokenizer.encode("How many sides?<think>look</think>\\boxed{4}")
    )
    logits = trainer.model(
        input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False
    )
    expected = logits.logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    assert weights.keys() == base.keys() and any(
        not torch.equal(w, base[n]) for n, w in weights.items()
    )
    got = run_python(["-c", PLAIN, str(out), str(ids.tolist())], cwd=HERE).splitlines()[-1]
    close(torch.tensor(json.loads(got)), expected, atol=1e-4)

    if not flags:
        return
    run_python(
        [
            str(HERE / "model.py"),
            "export",
            str(checkpoint),
            str(tmp_path / "apart"),
            "--keep_adapter",
        ]
    )
    from peft import PeftModel

    apart = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny-model"), tmp_path / "apart")  # fmt: skip
    logits = apart(input_ids=ids[None]).logits[0, :-1]
    close(logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0], expected, atol=1e-4)
    if importlib.util.find_spec("vllm"):
        exported = model.Actor.from_pretrained(str(out), pixels=(28 * 28, 28 * 28 * 64))
        with contextlib.closing(vllm_engine(exported, out)) as engine:
            assert largest_gap(exported, engine, prompts_with(exported, 0, 1)) < 1e-4


@pytest.mark.skipif(not GEO3K.exists(), reason="the Geometry3K sample is not there")
def test_two_steps_on_real_geometry3k_rows(start, tmp_path):
    copy_start(start, tmp_path)
    run_python(
        [str(HERE / "train.py"), *SHORT, "--out", str(tmp_path), "--steps", "2", "--data", str(GEO3K / "train.parquet"),
         "--test_data", str(GEO3K / "validation.parquet"), "--max_pixels", str(28 * 28 * 48), "--min_pixels", "784",
         "--max_prompt_tokens", "600", "--prompts_per_step", "4", "--eval_every", "2"]
    )  # fmt: skip
    steps = [row for row in metrics(tmp_path / "tiny") if "train/reward" in row]
    assert len(steps) == 2 and all(row["train/gap"] < 1e-4 for row in steps)


def test_grpo_learns(start, tmp_path):
    """The smallest problem there is: one colour question, learnt from a model that only knows the
    format."""
    copy_start(start, tmp_path)
    run_python([str(HERE / "train.py"), *SHORT, "--out", str(tmp_path), "--steps", "30", "--eval_every", "30",
                "--prompts_per_step", "16", "--minibatch_prompts", "16", "--responses_per_prompt", "8"])  # fmt: skip
    rewards = [row["train/reward"] for row in metrics(tmp_path / "tiny") if "train/reward" in row]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


# --------------------------------------------------------------------------------------------------
# train.py: metrics, report, loggers


def test_the_readme_defines_every_metric_that_a_run_logs_and_no_other(finished):
    table = (HERE / "README.md").read_text().split("| metric |")[1].split("\n## ")[0]
    cells = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    assert all(
        len(cell) == 7 and cell[2].strip() for cell in cells
    )  # metric, formula, unit, healthy, broken
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell[1])]
    patterns = {name: re.sub("[A-Z]+", ".+", re.escape(name)) for name in names}
    logged = {name for row in metrics(finished) for name in row} - {"step"}
    for name in logged:
        assert any(re.fullmatch(pattern, name) for pattern in patterns.values()), (
            f"{name} is not in the README"
        )
    for name, pattern in patterns.items():
        elsewhere = name.startswith(
            ("sync/", "eval/accuracy/source/")
        )  # with vLLM, and with several test files
        assert elsewhere or any(re.fullmatch(pattern, metric) for metric in logged), (
            f"no run logs {name}"
        )


HOSTILE = ["</script><img src=x onerror=\"document.title='run'\">", "<!--<script>", "NUL \0 bell \7 escape \x1b[31m",
           "lone \ud800 surrogate", "\u202eright to left", "${1}`'\"\\", "\u2028", "REPORT_DATA"]  # fmt: skip


def fabricate(folder, steps=60, texts=("fine",), groups=1, responses=2, tokens=4):
    """The files of a run whose responses hold `texts`, over and over."""
    words = [[text, -0.1, 0.05] for text in itertools.islice(itertools.cycle(texts), tokens)]
    answer = dict(
        scores=dict(advantage=1.0, reward=1.0, accuracy=1.0, brief=0.5),
        truncated=True,
        tokens=words,
    )
    png = report.thumbnail(Image.new("RGB", (40, 30), "red"))
    group = dict(
        where=texts[0],
        question=texts[0],
        answer=texts[-1],
        images=[png],
        responses=[answer] * responses,
    )
    rows = [{"step": i, "train/reward": i / steps, "train/kl": 9.0 if i == 7 else 0.1 * (i % 2), "train/loss": math.nan,
             "seconds/learn": 2.0, "seconds/sample": 1.0, "train/gap": 1e-6} for i in range(1, steps + 1)]  # fmt: skip
    rows += [
        {"step": i, "eval/accuracy": 0.5, "eval/accuracy_se": 0.1, "eval/pass@2": 0.7}
        for i in (0, steps)
    ]
    shown = [{"step": i, "drawn": 64, "groups": [group] * groups} for i in range(1, 21)]
    for name, lines in (("metrics", rows), ("rollouts", shown)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + '{"cut'
        )
    (folder / "run.json").write_text(
        json.dumps({"steps": steps, "model": texts[0], "data": "figures"})
    )
    report.write_report(folder)
    return folder


def embedded(folder):
    """The data in a report."""
    page = (folder / "report.html").read_text()
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_the_report_is_one_page_that_loads_nothing_and_holds_text_as_data(tmp_path):
    page = (fabricate(tmp_path, texts=HOSTILE, tokens=len(HOSTILE)) / "report.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page
    template = (HERE / "support" / "report.html").read_text()
    assert not re.search(
        r"https?:|@import|url\(|<link|src=|innerHTML|outerHTML|insertAdjacent|eval\(|fetch",
        template,
    )
    assert "default-src 'none'" in page
    report = embedded(tmp_path)
    texts = [token[0] for token in report["steps"][0]["groups"][0]["responses"][0]["tokens"]]
    assert texts == [text.replace("\ud800", "?") for text in HOSTILE]
    assert "train/loss" not in report["curves"]  # JSON has no nan
    assert len(list(tmp_path.iterdir())) == 4  # what it is made from, and itself


def test_the_report_of_a_long_run_stays_under_20_megabytes_with_its_first_and_last_step(tmp_path):
    fabricate(tmp_path, steps=20_000, texts=("<" * 32,), groups=4, responses=8, tokens=300)
    assert 9e6 < (tmp_path / "report.html").stat().st_size < 20e6
    report = embedded(tmp_path)
    shown = [s["step"] for s in report["steps"]]
    assert shown[0] == 1 and shown[-1] == 20 and 2 < len(shown) < 20
    # 20,000 points in 500 means of 40: the first of steps 1 to 40, 9 at step 7 and 0.1 at 19 others
    assert len(report["curves"]["train/kl"]) == 500
    assert report["curves"]["train/kl"][0] == [20.5, pytest.approx((9 + 19 * 0.1) / 40)]


def test_rollouts_show_what_the_update_did_to_each_token_of_groups_that_teach(
    tiny, process_group, tmp_path, monkeypatch
):
    monkeypatch.setattr(report, "SHOWN_TOKENS", 4)
    monkeypatch.setattr(report, "SHOWN_RESPONSES", 3)
    run, groups = small_run(tiny[False], minibatch_prompts=8, out=str(tmp_path), name="run")
    (tmp_path / "run").mkdir()
    groups[0].advantages = torch.zeros(4)
    for g in groups:
        g.scores = {"reward": [0.25, 0.5, 0.75, 1.0]}
    log = report.Log(run)
    run.step = 1  # step 2 is neither the first nor the last nor evaluated
    train.show_rollouts(run, log, groups)
    run.step = 0
    train.show_rollouts(run, log, groups)
    [line] = report.read_jsonl(tmp_path / "run" / "rollouts.jsonl")
    assert line["step"] == 1 and line["drawn"] == 8 and len(line["groups"]) == 4
    assert (
        line["groups"][0]["question"] == run.train_set[1].question
    )  # group 0 is flat, so it comes last
    assert [image[:23] for image in line["groups"][0]["images"]] == ["data:image/webp;base64,"]
    shown, prompt = line["groups"][0]["responses"], run.reader(run.train_set[1])
    logprobs, _ = run.actor.logprobs(
        [(prompt, [r.turns]) for r in groups[1].rollouts[:3]], entropy=False
    )
    expected = logprobs.split([len(r.response) for r in groups[1].rollouts[:3]])
    assert [r["scores"]["reward"] for r in shown] == [0.25, 0.5, 0.75]
    for got, rollout_, now in zip(shown, groups[1].rollouts, expected, strict=False):
        numbers = list(
            zip(
                rollout_.sampler_logprobs.tolist(),
                (now - rollout_.sampler_logprobs).tolist(),
                strict=True,
            )
        )
        cut = len(numbers) - 4
        if cut > 0:  # the first two and the last two are left
            assert got["tokens"].pop(2) == [f" [{cut} tokens left out] ", 0, 0]
            numbers = numbers[:2] + numbers[-2:]
        assert [tuple(token[1:]) for token in got["tokens"]] == [
            pytest.approx(pair, abs=1e-4) for pair in numbers
        ]


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


def browse(page):
    """The document of a page after its scripts have run."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        "--dump-dom",
    ]
    return subprocess.run(
        [BROWSER, *flags, page.as_uri()], capture_output=True, text=True, timeout=60
    ).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_the_report_renders_in_a_browser_and_hostile_text_is_inert(finished, tmp_path):
    dom = browse(finished / "report.html")
    assert (
        'class="error"' not in dom and dom.count("<polyline") >= 10 and dom.count("<polygon") >= 5
    )
    for expected in (
        "Accuracy by kind",
        "KL to the start",
        "step 3 of 3",
        "gold: ",
        "&lt;think&gt;",
        "data:image/w",
    ):
        assert expected in dom, expected
    assert (
        dom.count("<article>") == 4
        and dom.count('class="tokens"') == 16
        and "background-color: rgba(" in dom
    )
    dom = browse(fabricate(tmp_path, texts=HOSTILE, tokens=len(HOSTILE)) / "report.html")
    assert (
        f"<title>{tmp_path.name}</title>" in dom and 'class="error"' not in dom
    )  # no image of it was ever an element
    assert "&lt;/script&gt;&lt;img src=x onerror=" in dom and dom.count("<img") == 1
    assert (
        "cut off: 9 at step 7" in dom
        and "brief 0.5 · truncated" in dom
        and "lone ? surrogate" in dom
    )
    page = tmp_path / "report.html"
    page.write_text(page.read_text().replace('"steps":', '"steps"', 1))  # a page that fails says so
    assert 'class="error"' in browse(page)


def test_weights_and_biases_is_refused_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb grpo needs the package wandb; pip install"):
        train.parse_settings(["--preset", "tiny", "--wandb", "grpo"])


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_gets_every_metric_of_every_step(start, tmp_path, monkeypatch):
    copy_start(start, tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_python(
        [str(HERE / "train.py"), *SHORT, "--out", str(tmp_path), "--steps", "2", "--wandb", "grpo"]
    )
    [log] = (tmp_path / "tiny" / "wandb").glob("offline-run-*/run-*.wandb")
    seen = log.read_bytes()
    assert all(
        name.encode() in seen
        for row in metrics(tmp_path / "tiny")
        for name in row
        if name != "step"
    )


# --------------------------------------------------------------------------------------------------
# rollout.py: evaluation


def record(accuracy=0, response="", **facts):
    return dict(reward=0, format=0, truncated=0, tokens=1, type="", images=1, source="a") | dict(
        accuracy=accuracy, response=response, **facts
    )


def test_pass_at_k_and_standard_error_by_hand():
    # 4 responses to each of 2 problems, 1 and 4 right: accuracy 1/4 and 1
    got = rollout.summarize([record(a) for a in (1, 0, 0, 0, 1, 1, 1, 1)], 4)
    assert got["accuracy"] == 0.625
    assert got["accuracy_se"] == pytest.approx(
        0.375
    )  # std of (1/4, 1) with n - 1 is 0.5303, over sqrt(2)
    assert got["pass@2"] == pytest.approx(1 - (3 * 2 / (4 * 3) + 0) / 2)  # C(3,2)/C(4,2) = 1/2
    assert got["pass@4"] == 1.0


def test_the_majority_of_the_boxed_answers_decides_and_the_first_given_wins_a_tie():
    def majority(*answers):
        return rollout.majority(
            [record(right, f"so \\boxed{{{a}}}" if a else "?") for a, right in answers]
        )

    assert majority(("7", 0), ("5", 1), ("x = 5", 1)) == 1  # x = 5 and 5 are the same vote
    assert majority(("5", 1), ("7", 0), ("7", 0)) == 0
    assert majority(("5", 1), ("7", 0)) == 1 and majority(("7", 0), ("5", 1)) == 0
    assert majority(("", 0), ("", 0), ("5", 1)) == 1  # no box, no vote
    assert majority(("", 0)) == 0
    got = rollout.summarize(
        [record(1, r"\boxed{1}"), record(0, r"\boxed{2}"), *[record(0, r"\boxed{3}")] * 2], 2
    )
    assert got["maj@2"] == 0.5 and got["accuracy"] == 0.25


def test_accuracy_is_told_by_type_number_of_images_and_source_where_they_differ():
    records = [
        record(1, type="angle", images=1),
        record(0, type="angle", images=2),
        record(0, type="sides", images=2),
    ]
    got = {k: v for k, v in rollout.summarize(records, 1).items() if k.startswith("accuracy/")}
    assert got == {
        "accuracy/type/angle": 0.5,
        "accuracy/type/sides": 0,
        "accuracy/images/1": 1,
        "accuracy/images/2": 0,
    }
    assert not any("/" in k for k in rollout.summarize([record(type=str(i)) for i in range(21)], 1))


def test_token_texts_join_to_the_text_whatever_the_tokens(tiny):
    tokenizer = AutoProcessor.from_pretrained(tiny[False]).tokenizer
    text = "∠ABC ≅ 🙂\n<think>"
    ids = torch.tensor(tokenizer.encode(text))
    texts = report.token_texts(tokenizer, ids)
    assert "".join(texts) == text and len(texts) == len(ids) > len(text) and "∠" in texts
    half = torch.tensor(
        tokenizer.encode("🙂")[:2] * 3
    )  # bytes that are no text come as the replacement character
    assert set("".join(report.token_texts(tokenizer, half))) == {"\ufffd"}


# --------------------------------------------------------------------------------------------------
# Runs that survive


def strike(faults):
    """Send this process a signal when a function is entered or left for the nth time: "9 call
    train.update 3; ..."."""
    for fault in faults.split(";"):
        number, event, name, count = fault.split()
        owner, _, function = name.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        setattr(owner, function, struck(getattr(owner, function), int(number), event, int(count)))


def struck(function, number, event, count):
    calls = itertools.count(1)

    def wrapper(*args, **kwargs):
        due = next(calls) == count
        if due and event == "call":
            os.kill(os.getpid(), number)
        result = function(*args, **kwargs)
        if due and event == "return":
            os.kill(os.getpid(), number)
        return result

    return wrapper


def faulty_run(job):
    """train.py with a reward that is never flat, and with a fault. Run by the nursery and by
    torchrun."""
    job = json.loads(job)
    reward.REWARDS["varied"] = lambda problem, response, gold: (
        random.random()
    )  # from a global random state
    if job["watch"]:
        watch(Path(job["watch"]))
    if job["fault"].isdigit():  # no file can become longer, as if the disk were full
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(job["fault"]), resource.RLIM_INFINITY))
    elif job["fault"] == "memory":
        reward.REWARDS["varied"] = out_of_memory
    elif job["fault"] and os.environ.get("RANK", "0") == job["rank"]:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            strike(job["fault"])
    train.main(job["argv"])


def out_of_memory(problem, response, gold):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def watch(file):
    """Write megabytes in use, open files, threads and children of this process at every
    checkpoint."""

    def look(problem, response, gold):
        if random.random() < 0.01:
            with file.open("a") as out:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                seen = (
                    pages * 4096 / 2**20,
                    len(os.listdir("/proc/self/fd")),
                    threading.active_count(),
                    len(children),
                )
                print(*seen, file=out)
        return random.random()

    reward.REWARDS["varied"] = look


def nursery():
    """Import everything once; then, for every job on stdin, fork a child that runs it, and print
    how it ended."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                log = os.open(json.loads(line)["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                faulty_run(line)
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


STEPS = ("--preset", "tiny", "--engine", "hf", "--prompts_per_step", "2", "--minibatch_prompts", "1", "--steps", "6",
         "--responses_per_prompt", "2", "--max_response_tokens", "4", "--eval_every", "3", "--eval_rows", "2",
         "--kl_coefficient", "0", "--rewards", "accuracy=0.5,varied=1", "--save_every", "2")  # fmt: skip


def job(folder, *flags, fault="", rank="0", watch=""):
    argv = [*STEPS, "--out", str(folder), "--resume", "auto", *flags]
    return json.dumps(
        dict(argv=argv, fault=fault, rank=rank, watch=str(watch), log=str(folder / "log.txt"))
    )


@pytest.fixture(scope="session")
def launch():
    """A function that runs train.py in a folder, on one process, and returns its exit code and what
    it printed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    server = subprocess.Popen([sys.executable, __file__, "nursery"], env=env, text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)  # fmt: skip

    def run(folder, *flags, **options):
        print(job(folder, *flags, **options), file=server.stdin, flush=True)
        return int(server.stdout.readline()), (folder / "log.txt").read_text()

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def seedling(tmp_path_factory):
    """Figures and a random model of one layer: a run on them takes 3 seconds."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("seedling")
    figures.make_figures(folder / "figures", train=20, test=5)
    tiny_model.build_tiny(
        folder / "tiny-model", ["How many sides? <think>I look.</think>\\boxed{4}<|im_end|>"] * 2
    )
    config = Qwen2_5_VLConfig.from_pretrained(folder / "tiny-model")
    config.text_config.num_hidden_layers, config.text_config.layer_types = 1, ["full_attention"]
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 1, [0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "tiny-model")
    return folder


def outcome(folder):
    """What two equal runs have in common: all metrics but the times, the exported weights, the last
    checkpoint."""
    assert not list((folder / "tiny" / "checkpoints").glob("*.partial"))
    times = ("seconds/", "sync/")
    rows = [
        {k: v for k, v in row.items() if not k.startswith(times)}
        for row in metrics(folder / "tiny")
    ]
    rows += report.read_jsonl(folder / "tiny" / "rollouts.jsonl")
    shards = sorted((folder / "tiny" / "checkpoints" / "step-000006").glob("*.safetensors"))
    state = [{k: v.numpy().tobytes() for k, v in load_file(shard).items()} for shard in shards]
    return rows, (folder / "tiny" / "model" / "model.safetensors").read_bytes(), state


def assert_same(got, expected):
    assert got[0] == expected[0]
    assert [
        part
        for part, a, b in zip(("rows", "weights", "state"), got, expected, strict=True)
        if a != b
    ] == []


@pytest.fixture(scope="session")
def unbroken(launch, seedling, tmp_path_factory):
    """The outcome of a run that nothing happened to."""
    folder = copy_start(seedling, tmp_path_factory.mktemp("unbroken"))
    code, log = launch(folder)
    assert code == 0, log
    rows, weights, state = outcome(folder)
    assert weights != (folder / "tiny-model" / "model.safetensors").read_bytes()
    assert [row["step"] for row in rows] == [0, 0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 6, 6, 1, 3, 6]
    assert all(row["train/learnt_tokens"] for row in rows if "train/reward" in row)
    return rows, weights, state


KILLS = (  # wherever a run can be; the first ones are met one after another by a run that goes on after each
    "call train.evaluate 1", "return train.update 3", "call safetensors.torch.save 1",
    "call support.checkpoint.CheckpointWriter.finish 1", "return support.checkpoint.CheckpointWriter.finish 1", "call support.report.write_report 1",
    "call support.report.Log.write 4", "return support.report.Log.write 2", "call shutil.rmtree 1", "call model.Actor.save 1",
    "call train.build 1", "return train.build 1", "call train.evaluation 1", "call rollout.HFEngine.generate 3",
    "return rollout.HFEngine.generate 4", "call train.score 3", "call train.plan_minibatches 3", "call train.freeze 2",
    "call train.update 6", "return train.update 8", "call support.report.Log.step 3", "call train.save_checkpoint 2",
    "return train.save_checkpoint 2", "return safetensors.torch.save 2", "call support.checkpoint.fingerprints 2",
    "call support.checkpoint.finish_checkpoint 3", "return shutil.rmtree 1", "return support.report.write_report 3",
    "call train.evaluation 3", "return model.Actor.save 1",
)  # fmt: skip
CHAIN = KILLS[:10]


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(
    launch, seedling, unbroken, tmp_path
):
    copy_start(seedling, tmp_path)
    for i, kill in enumerate(CHAIN):
        code, log = launch(tmp_path, "--save_in_background", str(i % 2 == 0), fault=f"9 {kill}")
        assert code == -9, f"{kill}\n{log}"
        if "Log.write" in kill:  # a kill in the middle of a line
            with (tmp_path / "tiny" / "metrics.jsonl").open("a") as file:
                file.write('{"step": 5, "train/rew')
    code, log = launch(tmp_path)
    assert code == 0 and "resumed from" in log, log
    assert_same(outcome(tmp_path), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_a_run_killed_anywhere_ends_as_if_nothing_had_happened(
    launch, seedling, unbroken, tmp_path, kill
):
    copy_start(seedling, tmp_path)
    code, log = launch(
        tmp_path, "--save_in_background", str(KILLS.index(kill) % 2 == 1), fault=f"9 {kill}"
    )
    assert code == -9, log
    code, log = launch(tmp_path)
    assert code == 0, log
    assert_same(outcome(tmp_path), unbroken)


@pytest.mark.slow
def test_a_killed_run_with_vllm_ends_as_if_nothing_had_happened(launch, seedling, tmp_path):
    pytest.importorskip("vllm")
    whole, killed = (copy_start(seedling, tmp_path / name) for name in ("whole", "killed"))
    code, log = launch(whole, "--engine", "vllm")
    assert code == 0, log
    code, log = launch(killed, "--engine", "vllm", fault="9 call train.update 7")
    assert code == -9, log
    code, log = launch(killed, "--engine", "vllm")
    assert code == 0 and "resumed from" in log, log
    assert_same(outcome(killed), outcome(whole))


def test_a_signal_ends_the_run_after_the_step_and_a_second_one_at_once(
    launch, seedling, unbroken, tmp_path
):
    copy_start(seedling, tmp_path)
    code, log = launch(tmp_path, fault="15 call train.update 5")
    assert (
        code == 143
        and "step 3: SIGTERM; the checkpoint is written, go on with --resume auto" in log
    ), log
    assert (
        tmp_path / "tiny" / "checkpoints" / "step-000003"
    ).is_dir() and "model exported" not in log
    code, log = launch(tmp_path, fault="2 call train.score 1")
    assert code == 130 and "step 4: SIGINT" in log, log
    code, log = launch(tmp_path, fault="2 call train.update 1; 2 call train.update 2")
    assert code == -2 and "SIGINT" not in log, log
    code, log = launch(tmp_path)
    assert code == 0, log
    assert_same(outcome(tmp_path), unbroken)


def test_a_full_disk_stops_the_run_and_loses_no_earlier_checkpoint(
    launch, seedling, unbroken, tmp_path
):
    copy_start(seedling, tmp_path)
    code, log = launch(
        tmp_path, fault="15 call train.update 4"
    )  # leaves with a checkpoint of step 2
    assert code == 143, log
    code, log = launch(tmp_path, fault="1000000")  # bytes, and a checkpoint has 7 million
    assert code == 1 and re.search(
        r"step 4: a checkpoint could not be written \(rank 0: .*File too large", log
    ), log
    assert "go on with --resume auto" in log
    code, log = launch(tmp_path)
    assert code == 0 and "step-000002" in log, log
    assert_same(outcome(tmp_path), unbroken)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    launch, seedling, unbroken, tmp_path
):
    copy_start(seedling, tmp_path)
    launch(tmp_path, fault="15 call train.update 7")
    [shard] = (tmp_path / "tiny" / "checkpoints" / "step-000004").glob("*.safetensors")
    raw = bytearray(shard.read_bytes())
    raw[-1000] ^= 1  # one bit of one number
    shard.write_bytes(raw)
    code, log = launch(tmp_path, "--learning_rate", "6.5e-4", "--steps", "5")
    assert code == 0 and re.search(
        "step-000004 is damaged.*step-000004.1; trying the one before", log
    ), log
    assert (
        "step-000002" in log
        and "learning_rate was 0.0006 when this run was started, and is 0.00065" in log
    )


def test_resume_must_have_a_checkpoint(launch, seedling, tmp_path):
    code, log = launch(copy_start(seedling, tmp_path), "--resume", "must")
    assert code == 1 and "--resume must: no whole checkpoint in" in log


def test_the_folder_of_a_run_says_what_it_is_made_of(launch, seedling, tmp_path):
    launch(copy_start(seedling, tmp_path), fault="15 call train.build 1")
    made = json.loads((tmp_path / "tiny" / "run.json").read_text())
    assert {
        "command",
        "commit",
        "processes",
        "python",
        "torch",
        "transformers",
        "seed",
        "model",
    } <= made.keys()
    assert (
        made["torch"] == torch.__version__
        and made["steps"] == 6
        and made["data"] == str(tmp_path / "figures")
    )


# --- checkpoints


def adam_run(folder, out, **changes):
    """small_run with the optimizer that a real run has; writes under `out`."""
    changes = dict(minibatch_prompts=8, max_sampler_gap=100.0, keep=2) | changes
    run, groups = small_run(folder, out=str(out), **changes)
    run.optimizer = torch.optim.AdamW(
        [p for p in run.actor.model.parameters() if p.requires_grad], lr=1e-3
    )
    run.schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, run.settings.rate)
    return run, groups


def learn(run, groups):
    [minibatch] = train.plan_minibatches(run, groups)
    totals = train.update(run, minibatch, run.step)
    run.step += 1
    return totals


def whole_state(run):
    return {
        name: model.full(value).clone() for name, value in checkpoint.checkpoint_state(run).items()
    }


def go_on_with_two_ranks(folder, out):
    """Run by torchrun: go on from the checkpoint of one rank, and leave one of two."""
    processes.start_processes()
    run, groups = adam_run(folder, out)
    checkpoint.load_checkpoint(
        run, checkpoint.newest_checkpoint(Path(out) / "tiny" / "checkpoints")
    )
    states = [whole_state(run)]
    loss = learn(run, groups)["loss"]
    checkpoint.save_checkpoint(run)
    states.append(whole_state(run))
    if torch.distributed.get_rank() == 0:
        torch.save({"loss": loss, "states": states}, Path(out) / "two.pt")
    torch.distributed.destroy_process_group()


def test_a_checkpoint_of_one_rank_goes_on_with_two_and_the_reverse(tiny, process_group, tmp_path):
    run, groups = adam_run(tiny[False], tmp_path)
    learn(run, groups)
    checkpoint.save_checkpoint(run)
    saved = whole_state(run)
    torchrun("go_on_with_two_ranks", str(tiny[False]), str(tmp_path))
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert two["states"][0].keys() == saved.keys()
    assert all(torch.equal(two["states"][0][name], value) for name, value in saved.items())
    assert learn(run, groups)["loss"] == pytest.approx(
        two["loss"], rel=1e-5
    )  # one rank goes on as two did
    again, _ = adam_run(tiny[False], tmp_path)
    checkpoint.load_checkpoint(
        again, checkpoint.newest_checkpoint(tmp_path / "tiny" / "checkpoints")
    )
    assert again.step == 2 and again.schedule.get_last_lr() == run.schedule.get_last_lr()
    assert all(
        torch.equal(whole_state(again)[name], value) for name, value in two["states"][1].items()
    )
    learn(again, groups)
    learn(run, groups)
    for name, p in run.actor.model.named_parameters():
        close(
            model.full(p), model.full(dict(again.actor.model.named_parameters())[name]), atol=2e-4
        )


def test_the_newest_checkpoints_are_kept_and_the_best(tiny, process_group, tmp_path):
    run, _ = adam_run(tiny[False], tmp_path)
    for run.step, accuracy in enumerate((0.5, 0.9, -1.0, 0.9, 0.1, -1.0, 0.2), 1):
        checkpoint.save_checkpoint(run, accuracy)
    # the two newest, and the newer one of the two best
    names = sorted(path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000006", "step-000007"]


def test_only_what_is_trained_is_saved_and_other_tensors_are_refused(tiny, process_group, tmp_path):
    run, _ = adam_run(tiny[False], tmp_path)
    checkpoint.save_checkpoint(run)
    path = checkpoint.newest_checkpoint(tmp_path / "tiny" / "checkpoints")
    for p in list(run.actor.model.parameters())[2:]:
        p.requires_grad_(False)
    with pytest.raises(
        ValueError,
        match=r"step-000000 holds other tensors than this run trains, such as .*run\.json",
    ):
        checkpoint.load_checkpoint(run, path)
    checkpoint.save_checkpoint(dataclasses.replace(run, step=1))
    [shard] = (tmp_path / "tiny" / "checkpoints" / "step-000001").glob("*.safetensors")
    assert len(load_file(shard)) == 1 + 2 * 4  # counts; weight, AdamW's step and two moments


@pytest.mark.parametrize(
    "damage", "cut, bit, missing, another, no manifest, empty manifest, null, bytes".split(", ")
)
def test_every_damage_to_a_checkpoint_is_seen(tmp_path, process_group, capsys, damage):
    for step in (4, 8):
        folder = tmp_path / f"step-00000{step}"
        folder.mkdir()
        for rank in range(2):
            save_file({"a": torch.randn(100)}, folder / f"shard-0000{rank}.safetensors")
        (folder / "manifest.json").write_text(json.dumps(checkpoint.fingerprints(folder)))
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-000008"
    shard, manifest = folder / "shard-00001.safetensors", folder / "manifest.json"
    raw = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(raw[:-1])
    elif damage == "bit":
        shard.write_bytes(raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:])
    elif damage == "missing":
        shard.unlink()
    elif damage == "another":  # left there by a run of more ranks
        (folder / "shard-00002.safetensors").write_bytes(raw)
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_bytes({"empty manifest": b"", "null": b"null", "bytes": b"\xff\xfe"}[damage])
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-000004"
    assert "step-000008 is damaged" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000008.1"]


def test_loading_a_checkpoint_runs_no_code_of_whoever_wrote_it(tiny, process_group, tmp_path):
    run, _ = adam_run(tiny[False], tmp_path)
    checkpoint.save_checkpoint(run)
    path = checkpoint.newest_checkpoint(tmp_path / "tiny" / "checkpoints")
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "boom").encode() + b"'\ntR."
    assert pickle.loads(bomb) == 0 and (tmp_path / "boom").exists()  # it would work
    (tmp_path / "boom").unlink()
    for name in (".metadata", "__0_0.distcp", "shard-00009.pt", "optimizer.bin"):
        (path / name).write_bytes(bomb)
    checkpoint.load_checkpoint(run, checkpoint.newest_checkpoint(tmp_path / "tiny" / "checkpoints"))
    assert not (tmp_path / "boom").exists()


# --- what is not finite, what does not fit


def test_an_update_that_is_not_finite_is_kept_for_study_and_stops_the_run(
    tiny, process_group, tmp_path
):
    run, groups = adam_run(tiny[False], tmp_path, max_not_finite=1)
    groups[3].advantages[2] = math.inf
    before = whole_state(run)
    assert learn(run, groups) == {}  # the first is left out
    with pytest.raises(
        RuntimeError, match=r"step 1: loss .*-000001-2-rank-0\.pt.*number 2, --max_not_finite is 1"
    ):
        learn(run, groups)
    after = whole_state(run)
    assert all(
        torch.equal(after[name], value) for name, value in before.items() if name != "counts"
    )
    assert after["counts"].tolist() == [1, 0, 2, -1, 0]
    kept = torch.load(
        tmp_path / "tiny" / "not-finite" / "step-000001-2-rank-0.pt", weights_only=True
    )
    assert "lm_head.weight" in kept["broken_gradients"] and "gradient norm nan" in kept["why"]
    [pack] = kept["packs"]
    assert (
        pack["advantages"].isinf().sum() == 1
        and len(pack["sampler_logprobs"]) == pack["lengths"].sum()
    )
    where, prompt, responses = pack["groups"][3]
    assert where == "train.parquet row 17" and prompt.dtype == torch.long and len(responses) == 4


def test_a_full_gpu_names_the_setting_and_how_far_to_lower_it(launch, seedling, tmp_path):
    code, log = launch(copy_start(seedling, tmp_path), fault="memory")
    assert (
        code == 1 and "set --max_tokens_per_pack to 4096 or --gradient_checkpointing true" in log
    ), log
    assert "allocate 2.00 GiB" in log


# --- input from elsewhere


def png_of(width, height):
    """A PNG of a hundred bytes whose header promises any size."""

    def chunk(name, body):
        return (
            len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")
        )

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
PHOTO = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
BAD_IMAGES = {  # what the cell holds, and what the message says of it
    "empty": (b"", "0 bytes are not a readable image"),
    "text": (b"hello", "5 bytes are not a readable image"),
    "bomb": (png_of(60_000, 60_000), "could be decompression bomb"),
    "large": (png_of(10_000, 5_001), "10000 x 5001 pixels, 50000000 is the most"),
    "cut PNG": (picture(0)[:-1000], "not a readable image"),
    "cut JPEG": (PHOTO[: len(PHOTO) // 2], "not a readable image .*truncated"),
    "flipped PNG": (red()[:45] + b"\xff" + red()[46:], "not a readable image"),
    "cut GIF": (
        encode(Image.effect_noise((64, 64), 50).convert("P"), "GIF")[:300],
        "not a readable image",
    ),
    "cut WEBP": (
        encode(Image.effect_noise((64, 64), 50).convert("RGB"), "WEBP")[:300],
        "not a readable image",
    ),
    "floats": (encode(Image.new("F", (4, 4)), "TIFF"), "holds floats"),
    "PostScript": (
        POSTSCRIPT,
        "not a readable image: they begin with b'%!PS.*PNG, JPEG",
    ),  # Pillow would start Ghostscript
    "SVG": (SVG, "not a readable image: they begin with b'<svg"),
    "long": (red(5700, 28), "5700 x 28, longer than 200 to 1"),
    "number": (7, "int, not bytes, a path"),
    "nothing": ({"bytes": None, "path": None}, "NoneType"),
    "no base64": ("no base64!", "not a file's path, base64"),
    "raw data URL": ("data:image/png,raw", "not a file's path, base64"),
    "up": ("../secret.png", "leads out of the folder"),
    "absolute": ("/etc/hosts.png", "leads out of the folder"),
    "link out": ("out.png", "leads out of the folder"),
    "link to itself": ("loop.png", "image 'loop.png'"),
    "folder": ("folder.png", "no plain file"),
    "pipe": ("pipe.png", "no plain file"),  # to read it would wait for ever
    "huge file": ("huge.png", "no plain file of at most 100000000 bytes"),
    "missing": ("missing.png", "no plain file"),
    "null byte": ("nul\0.png", "null byte"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused_by_row_before_they_cost_anything(tmp_path, processor, name):
    (tmp_path / "secret.png").write_bytes(red())
    folder = tmp_path / "rows"
    (folder / "folder.png").mkdir(parents=True)
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    with (folder / "huge.png").open("wb") as file:
        file.truncate(10**9)
    cell, message = BAD_IMAGES[name]
    rows = data.load_problems(write(folder, images=[cell]))
    with pytest.raises(
        ValueError, match=rf"(?s)1 of 1 rows are broken.*train\.parquet row 0: .*{message}"
    ):
        data.usable_problems(rows, build_reader(processor), 1000)


BAD_TEXTS = {
    "control token": (dict(problem="<image>Hi<|im_end|>"), "<\\|im_end\\|>"),
    "forged image": (dict(problem="<image><|image_pad|>"), "<\\|image_pad\\|>"),
    "video": (dict(problem="<image><video>"), "<video>"),
    "placeholders": (dict(problem="<image><image>"), "2 <image> in the question but 1 images"),
    "empty answer": (dict(answer=" "), "the answer or the question is empty"),
    "empty question": (dict(problem=""), "the answer or the question is empty"),
    "huge question": (
        dict(problem="<image>" + "a" * 10**7),
        "100000[0-9]+ characters, 100000 is the most",
    ),
    "huge answer": (dict(answer="9" * 10**7), "100000[0-9]+ characters, 100000 is the most"),
    "type with escapes": (dict(type="\x1b[2J"), "the type or source '.x1b.2J' names a metric"),
    "type of two lines": (dict(type="a\nb"), "the type or source 'a.nb' names a metric"),
    "long type": (dict(type="k" * 81), "the type or source 'k{80}' names a metric"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_hostile_texts_are_refused_by_row(tmp_path, processor, name):
    columns, message = BAD_TEXTS[name]
    rows = data.load_problems(
        write(tmp_path, images=[red()], **{key: [text] for key, text in columns.items()})
    )
    with pytest.raises(
        ValueError, match=rf"(?s)1 of 1 rows are broken.*train\.parquet row 0: .*{message}"
    ):
        data.usable_problems(rows, build_reader(processor), 1000)


def test_text_that_is_not_utf8_is_refused_by_row(tmp_path, processor):
    raw = pa.array([b"<image>\xff\xfe"], pa.binary()).view(pa.string())
    with pytest.raises(ValueError, match=r"train\.parquet row 0: .*utf-8"):
        data.load_problems(write(tmp_path, problem=raw, images=[red()]))[0]


@pytest.mark.parametrize("how", ["cut", "middle", "page", "empty", "folder", "binary column"])
def test_a_parquet_file_that_is_not_whole_is_refused_by_name(tmp_path, how):
    file = write(
        tmp_path, problem=[f"question {i}" for i in range(500)], answer=[str(i) for i in range(500)]
    )
    raw = bytearray(file.read_bytes())
    if how == "cut":
        del raw[-100:]
    elif how == "middle":
        del raw[1000:2000]
    elif how == "page":
        raw[4:40] = bytes(36)
    elif how == "empty":
        raw.clear()
    file.write_bytes(raw)
    if how == "folder":
        file.unlink()
        file.mkdir()
        file = tmp_path
    elif how == "binary column":
        write(tmp_path, answer=[b"4"])
    with pytest.raises(
        ValueError,
        match=r"train\.parquet( is not a whole parquet file|.*the answer is bytes)|no parquet",
    ):
        data.load_problems(file)[0]


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it finds in the headers
def test_broken_bytes_of_every_format_are_readable_or_a_value_error():
    rng, noise = random.Random(0), Image.effect_noise((24, 31), 50).convert("RGB")
    exif = Image.Exif()
    exif[0x112] = 6
    options = [dict(form="JPEG", exif=exif), dict(form="WEBP", lossless=True)]
    options += [dict(form=form) for form in data.FORMATS]
    files, refused = [encode(noise, **option) for option in options], 0
    for i in range(4000):
        raw = bytearray(files[i % len(files)])
        for _ in range(rng.choice((1, 2, 5, 20))):
            place = rng.randrange(rng.choice((len(raw), min(len(raw), 120))))
            raw[place] = rng.randrange(256)
        try:
            data.decode_image(bytes(raw[: rng.choice((None, len(raw) // 2))]))
        except ValueError:
            refused += 1
    assert 1000 < refused < 4000


def test_the_same_file_is_not_trained_on_and_held_out(launch, seedling, tmp_path):
    copy_start(seedling, tmp_path)
    code, log = launch(tmp_path, "--data", str(tmp_path / "figures" / "train.parquet"))
    assert code == 1 and re.search(
        r"train\.parquet would be trained on and held out; set --test_data", log
    ), log


def test_code_and_pickles_that_come_with_a_model_are_not_run(seedling, tmp_path):
    hostile = tmp_path / "model"
    shutil.copytree(seedling / "tiny-model", hostile)
    (hostile / "evil.py").write_text(f"open({str(tmp_path / 'boom')!r}, 'w')")
    config = json.loads((hostile / "config.json").read_text())
    classes = dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText"), "evil.Evil")
    config |= {"model_type": "evil", "auto_map": classes}
    (hostile / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.Actor.from_pretrained(str(hostile))
    shutil.copy(seedling / "tiny-model" / "config.json", hostile / "config.json")
    (hostile / "model.safetensors").unlink()
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "boom").encode() + b"'\ntR."
    (hostile / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(Exception, match=r"(?i)weights.only|corrupt|safetensors|unpickl"):
        model.Actor.from_pretrained(str(hostile))
    assert not (tmp_path / "boom").exists()


# --- several processes, and many steps


def torchrun_faulty(folder, *flags, fault="", restarts=0):
    """Two ranks, of which rank 1 meets the fault. Returns the exit code and what was printed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RUN_MARK": str(folder)}
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        f"--max-restarts={restarts}",
    ]
    command = [
        sys.executable,
        *launcher,
        __file__,
        "faulty_run",
        job(folder, *flags, fault=fault, rank="1"),
    ]
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=170
    )
    return done.returncode, done.stdout


def marked_processes(folder):
    """Processes alive anywhere on this machine that this run started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"RUN_MARK={folder}".encode() in (path / "environ").read_bytes():
                found.append((path.name, (path / "cmdline").read_text()))
    return found


@pytest.mark.slow
def test_two_ranks_go_on_by_themselves_and_after_a_signal_to_one_of_them(seedling, tmp_path):
    quiet, killed, asked = (
        copy_start(seedling, tmp_path / name) for name in ("quiet", "killed", "asked")
    )
    code, log = torchrun_faulty(quiet)
    assert code == 0, log
    code, log = torchrun_faulty(killed, fault="9 call train.update 7", restarts=1)
    assert code == 0 and "resumed from" in log, log
    assert_same(outcome(killed), outcome(quiet))
    code, log = torchrun_faulty(asked, fault="15 call train.score 3")
    assert code == 1 and log.count("step 3: SIGTERM; the checkpoint is written") == 1, log
    assert re.search(r"exitcode\s*: 143", log), log
    code, log = torchrun_faulty(asked)
    assert code == 0 and "step-000003" in log, log
    assert_same(outcome(asked), outcome(quiet))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_nothing_is_left_of_a_run_that_loses_a_rank(seedling, tmp_path, engine):
    if engine == "vllm":
        pytest.importorskip("vllm")
    copy_start(seedling, tmp_path)
    env = dict(tp="2" if engine == "vllm" else "1")
    code, log = torchrun_faulty(
        tmp_path, "--engine", engine, "--rollout_tp", env["tp"], fault="9 call train.update 3"
    )
    ended = time.monotonic()
    assert code == 1 and "-9" in log, log
    while marked_processes(tmp_path) and time.monotonic() < ended + 10:
        time.sleep(0.1)
    assert marked_processes(tmp_path) == []


@pytest.mark.slow
def test_two_thousand_steps_need_no_more_memory_files_threads_or_processes_than_a_few(
    launch, seedling, tmp_path
):
    copy_start(seedling, tmp_path)
    code, log = launch(
        tmp_path, "--steps", "2000", "--prompts_per_step", "1", "--eval_every", "250", "--save_every", "50",
        "--max_response_tokens", "2", watch=tmp_path / "seen",
    )  # fmt: skip
    assert code == 0, log[-3000:]
    seen = np.loadtxt(tmp_path / "seen")  # megabytes, files, threads, children
    half = len(seen) // 2
    print(len(seen), seen[half // 2], seen[-1], seen.max(0))
    growth = np.median(seen[-10:, 0]) - np.median(seen[half - 5 : half + 5, 0])
    assert growth < 10 and np.ptp(seen[half:, 1:], axis=0).max() <= 2, seen[::5]


# --------------------------------------------------------------------------------------------------
# The benchmark: seconds and peak memory of one update, by layout


def bench_actor(folder):
    """A random Qwen2.5-VL of 49M parameters: text 8 x 512, vocabulary 32k, vision 6 x 320."""
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    config = AutoConfig.from_pretrained(folder)
    config.text_config.update(
        dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
             num_key_value_heads=2, vocab_size=32000, layer_types=["full_attention"] * 8)
    )  # fmt: skip
    config.text_config.rope_parameters["mrope_section"] = [8, 12, 12]
    config.vision_config.update(
        dict(hidden_size=320, intermediate_size=960, depth=6, num_heads=8, out_hidden_size=512,
             fullatt_block_indexes=[2, 5])
    )  # fmt: skip
    torch.manual_seed(0)
    actor = model.Actor(
        Qwen2_5_VLForConditionalGeneration(config), AutoProcessor.from_pretrained(folder)
    )
    actor.banned_ids = []  # the plainest way has no bans
    return actor


def bench_group(actor, prompt_tokens, response_lengths):
    """One group whose prompt is three quarters image, as in Geometry3K, of random pixels, and then
    random text."""
    ids, side = actor.model.config, round((prompt_tokens * 0.75) ** 0.5)
    image = torch.full((side * side,), ids.image_token_id)
    text = torch.randint(0, 250, (prompt_tokens - len(image) - 2,))
    whole = torch.cat(
        [
            torch.tensor([ids.vision_start_token_id]),
            image,
            torch.tensor([ids.vision_end_token_id]),
            text,
        ]
    )
    inputs = dict(pixel_values=torch.randn(4 * len(image), 1176), mm_token_type_ids=(whole == image[0]).int()[None],
                  image_grid_thw=torch.tensor([[1, 2 * side, 2 * side]]))  # fmt: skip
    prompt = data.Prompt(problem(), whole, whole, [object()], inputs)
    return [(prompt, [[torch.randint(0, 250, (n,))] for n in response_lengths])]


def padded_with_all_logits(actor, groups):
    """What a trainer does that calls the model and then log_softmax: logits of every position,
    prompt included."""
    [(prompt, turns)] = groups
    responses = [response for [response] in turns]
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.cat([prompt.ids, r]) for r in responses], batch_first=True
    )
    inputs = {k: v.repeat(len(responses), 1) for k, v in prompt.inputs.items()}
    inputs["mm_token_type_ids"] = (ids == actor.model.config.image_token_id).int()
    logits = actor.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs
    ).logits
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.cat(
        [row[len(prompt.ids) - 1 :][: len(r)] for row, r in zip(logps, responses, strict=True)]
    )


def measured_update(actor, groups, variant):
    """Seconds, and MiB of memory above what was there before, of one forward and backward."""
    actor.use_packing(variant.split(",")[0])
    features = actor.image_features([p for p, _ in groups]) if variant.endswith("kept") else None
    actor.model.zero_grad()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    status = lambda name: (
        int(re.search(name + r":\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    )  # noqa: E731
    before, start = status("VmRSS"), time.perf_counter()
    if variant == "padded, all":
        logprobs = padded_with_all_logits(actor, groups)
    else:
        logprobs, _ = actor.logprobs(groups, features, entropy=False)
    (-logprobs.mean()).backward()
    return time.perf_counter() - start, status("VmHWM") - before, logprobs.detach()


@pytest.mark.bench
def test_bench_of_the_update(tiny):
    torch.set_num_threads(2)
    lines, bars = [], {}
    for tower in ("trained", "frozen"):
        actor = bench_actor(tiny[False])
        if tower == "frozen":
            actor.freeze("tower", "projector")
        trained = tower == "trained"
        for prompt, length, n in (
            (400, 128, 5),
            (800, 200, 5),
            *([(400, "64..256", 8)] if trained else []),
        ):
            lengths = (
                [round(64 + 192 * i / (n - 1)) for i in range(n)]
                if length == "64..256"
                else [length] * n
            )
            groups = bench_group(actor, prompt, lengths)
            variants = ("padded", "shared", *(["packed"] if trained else ["shared, kept"]))
            if trained and length == 128:
                variants += ("padded, all",)
            runs = {variant: [] for variant in variants}
            for _ in range(3):  # interleaved, so that a slow minute of the machine hits all alike
                for variant in variants:
                    runs[variant].append(measured_update(actor, groups, variant))
            seconds = {v: sorted(r[0] for r in rs)[1] for v, rs in runs.items()}
            memory = {v: sorted(r[1] for r in rs)[1] for v, rs in runs.items()}
            for variant in variants:
                close(runs[variant][0][2], runs["shared"][0][2], atol=1e-4)
            gain, saved = (x["padded"] / x["shared"] for x in (seconds, memory))
            bars[tower, prompt, length] = gain, saved
            cells = [f"{seconds[v]:.2f} s, {memory[v]:.0f} MiB" if v in seconds else ""
                     for v in ("padded, all", "padded", "packed", "shared", "shared, kept")]  # fmt: skip
            shape = f"{prompt}, {length}, {n}"
            lines.append(
                f"| {tower} | {shape} | {' | '.join(cells)} | {gain:.1f}x | {saved:.1f}x |"
            )
    heads = ("tower", "prompt, response, n", "padded, all logits", "padded", "packed", "shared",
             "shared, features kept", "time", "memory")  # fmt: skip
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|", *lines, sep="\n")
    assert bars["trained", 400, 128][0] > 2.5 and bars["trained", 800, 200][0] > 2.8
    assert bars["frozen", 400, 128][0] > 2.2 and bars["frozen", 800, 200][0] > 2.6
    assert all(
        bars[tower, *shape][1] > 2
        for tower in ("trained", "frozen")
        for shape in ((400, 128), (800, 200))
    )


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
