"""Tests: each name is the promise that it checks, in sections by file.

    pytest -n 2 --dist loadgroup test_all.py      all but the next two; without -n on one core
    pytest test_all.py -m slow                    kills, restarts, many steps, whole fuzz tests
    pytest test_all.py -m gpu                     what only a GPU can show, as one table
    pytest test_all.py -m bench -s                the benchmark
    FLAGS="--optimizer muon" pytest test_all.py -k killed_again
                                                  what runs are tested on, with your own settings

Nothing is downloaded and nothing of ours is mocked. Tests that need vLLM, or the Geometry3K sample
beside the project, are skipped with the reason where these are missing. A run is train.py in a fork
of a process that has imported everything (`nursery`).

Contents

    Builders                           rows, prompts, groups, tiny models of several sections
    Builders: tiny families            a random model and a processor of every family
    Builders: runs                     functions and train.py in other processes, with faults
    grpo.py                            every formula equals numbers worked out by hand
    model.py: scoring                  every layout gives what the plain forward gives
    model.py: kernels of a GPU         what they are asked for, and what only a GPU can show
    model.py: what is trained          freezing, LoRA, sharding and saving keep what they must
    model.py: recorded conversations   a conversation is one sequence, however it was recorded
    model.py: families                 every family is scored and trained as its forward says
    rollout.py: engines                both sample what is trained; vLLM follows the weights
    rollout.py: conversations          environments, and tokens that stay what was sampled
    rollout.py: evaluation             accuracy, pass@k, majority and errors by hand
    train.py: settings                 every flag is read, bounded and refused with what to change
    train.py: the algorithm            packs and ranks change no loss; a run learns
    data.py: rows and images           every form is read; the broken and hostile are named
    data.py: rows as people have them  columns, chats, choices, numbered images, JSON lines
    data.py: prompts                   what the model sees, and every problem once an epoch
    data.py: video                     frames, their timing, rows with text, images and videos
    reward.py: verdicts                what a response commits to, and whether it is right
    reward.py: hostile answers         nothing a model writes can hang, crash or run
    reward.py: rewards by name         what a response earns, by hand
    reward.py: a model as judge        whom it asks, how often, and what a failure costs
    reward.py: the audit               what a data set's golds are worth
    support/checkpoint.py: survival    a killed run ends as if nothing had happened
    support/checkpoint.py: checkpoints whole, exact, and of any number of ranks
    support/report.py                  metrics, loggers and one page that loads nothing
    support/figures.py, tiny_model.py  the problems and the model of the demonstration
    On a GPU: pytest -m gpu            what only it shows; here the same bodies run at tiny shapes
    The benchmark                      seconds and memory of one update, by layout
"""

import ast
import base64
import contextlib
import copy
import ctypes
import dataclasses
import functools
import gc
import http.server
import importlib.util
import inspect
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
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the models are tiny, and two workers share the cores
os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a test never downloads
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # leaves CUDA untouched, so that one can fork

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

import numpy as np
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

# --------------------------------------------------------------------------------------------------
# Builders


HERE = Path(__file__).parent


GEO3K = HERE.parent / "shared" / "geo3k"


def close(got, expected, atol=1e-6):
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-5)


MIN_PIXELS, MAX_PIXELS, FACTOR = 28 * 28, 28 * 28 * 64, 28


def build_processor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS):
    """The tiny model's processor, with a tokenizer that has learnt nothing and so writes bytes."""
    processor = tiny_model.tiny_processor(["?"])
    bounds = dict(shortest_edge=min_pixels, longest_edge=max_pixels)
    processor.image_processor.size = bounds
    return processor


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def few_or_all(few, all_of_them):
    """Sizes for parametrize: a sample, and with -m slow the whole."""
    return [few, pytest.param(all_of_them, marks=pytest.mark.slow)]


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
        "", "<image>What?", "<answer> 4 </answer>", r"\boxed{4}", "accuracy",
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


# By cause: "gold == answers that are right" or "gold != answers that are wrong", between ;;
ANSWERS = r"""
# roots
2 \sqrt { 221 } == 2\sqrt{221} ;; \sqrt{884} ;; 2√221 ;; 2\sqrt{ 221 }
2 \sqrt { 221 } != 2\sqrt{22} ;; 221 ;; 2 ;; \sqrt{221} ;; 2+\sqrt{221} ;; \sqrt{442}
6 \sqrt 2 == 6\sqrt{2} ;; \sqrt{72} ;; 6\sqrt2 ;; 6√2 ;; 6sqrt(2) ;; \sqrt{2} \cdot 6
6 \sqrt 2 == \frac{12}{\sqrt{2}}
\sqrt{13} == \sqrt 13 ;; \sqrt13 ;; 13^{\frac{1}{2}} ;; 13^{0.5}
\sqrt{13} != \sqrt{1}3 ;; 3.6 ;; -\sqrt{13}
\sqrt{2} == 2^{\frac{1}{2}} ;; 2^{0.5} ;; 2^{1/2}
\sqrt{\frac{5}{2}} == \sqrt{2.5} ;; \frac{\sqrt{10}}{2}
12 + 4 \sqrt { 5 } == 4(3+\sqrt{5}) ;; 4\sqrt{5}+12
4 + 3 \sqrt { 3 } + 7 \sqrt { 2 } == 4 + 7 \sqrt{2} + 3\sqrt{3}
8.6 == \sqrt{74} ;; \sqrt{73.96} ;; \sqrt{74} \approx 8.6
8.6 != \sqrt{76} ;; -8.6 ;; -\sqrt{74} ;; \sqrt{86}

# fractions, mixed numbers
\frac { 25 } { 14 } == \dfrac{25}{14} ;; 25/14 ;; \frac{50}{28} ;; 1\frac{11}{14}
\frac { 25 } { 14 } == \frac{2.5}{1.4} ;; 1 11/14
\frac { 25 } { 14 } != 1.79 ;; 25 ;; 14/25 ;; \frac{25}{41}
0.5 == \frac12 ;; 50% ;; .5 ;; ½ ;; 1/2 ;; \frac{0.5}{1} ;; \frac 1 2
4 \frac { 4 } { 11 } == \frac{48}{11} ;; 48/11 ;; 4 4/11
4 \frac { 4 } { 11 } != \frac{16}{11} ;; -4\frac{4}{11} ;; 4 ;; 44/11
4.5 == 4½ ;; 4 1/2 ;; 4\tfrac12 ;; \frac{9}{2} ;; 9/2
4.5 != 4 \cdot \frac{1}{2} ;; 41/2
\frac{\pi}{4} == \frac\pi4 ;; \frac{\pi}4 ;; \pi/4 ;; \frac{1}{4}\pi ;; 1/4 \pi ;; 0.25\pi
\frac{\pi}{4} != \frac4\pi ;; 1/(4\pi)
\frac { 15 } { 14 } \sqrt { 19 } == 15/14 \sqrt{19} ;; \frac{15\sqrt{19}}{14} ;; 15/14\sqrt{19}
\frac { 15 } { 14 } \sqrt { 19 } == (15/14)\sqrt{19}
\frac { 15 } { 14 } \sqrt { 19 } != 15/(14\sqrt{19}) ;; 14/15 \sqrt{19}
\frac { 22 } { 5 } \pi == 22/5 \pi ;; 4.4\pi ;; 4 \frac{2}{5} \pi
40 / 3 == \frac{40}{3} ;; 13\frac{1}{3} ;; 13 1/3
40 / 3 != 13.3 ;; 40 ;; 3/40
\sqrt { 26 } / 26 == \frac{\sqrt{26}}{26} ;; \frac{1}{\sqrt{26}}
2\sqrt{2} == 2^{1.5} ;; 8^{1/2}
\frac{x}{2} == 1/2 x ;; 0.5x ;; x/2
\frac{x}{2} != \frac{1}{2x} ;; 2x

# decimals, and what rounds to them
57.1 == 57.14 ;; 57.1428 ;; 57.05 ;; \frac{400}{7} ;; 57.149999
57.1 != 57.15 ;; 57.04 ;; 57 ;; 571
57.14 != 57.1
8.0 == 8 ;; 8.04
8 == 7.99999999 ;; \sqrt{64} ;; 8.0 ;; \frac{7.5}{0.9375} ;; 4^{1.5}
8 != 2x = 8 ;; 8.3 ;; 7.9999 ;; \sqrt{65} ;; 8.004 ;; -8
\frac{1}{3} == 0.333333 ;; 1/3
\frac{1}{3} != 0.3333 ;; 0.33
3.1 == \frac{31}{10} ;; 3.0999999046325684
- 8 == -8 ;; - 8 ;; −8 ;; x = - 8
- 8 != 8 ;; --8
-4 == - 4
-4 != 4
0.00001 == 1e-05 ;; 10^{-5} ;; 1 \times 10^{-5}
2500 == 2.5 \times 10^3 ;; 2.5 \cdot 10^{3}

# thousands
4000 == 4,000 ;; 4{,}000 ;; 4\,000 ;; 4 000 ;; 4,\!000 ;; 4~000
4,000 == 4000 ;; 4 000
4000 != 4,00 ;; 40 00 ;; 4 ;; 4.000 ;; (4,000)
400 != 4,00 ;; 4 00 ;; 4,0,0
40000 != 4,0000 ;; 4 0000
1234567 == 1,234,567 ;; 1 234 567 ;; 1\,234\,567
4000.5 == 4,000.5 ;; 4 000.5
3400 != (3,400)

# two numbers side by side are no sum, and no product
109 != 71 38 ;; 71 \quad 38 ;; 71~38 ;; 71{38} ;; 71\text{ }38 ;; 71 \, 38 ;; 100 9 ;; 71, 38
109 != 71 + 39
2.5 != 1.5 \quad 1.0 ;; 1.5 1.0 ;; 2 .5
15 != 5 10 ;; 3 5 ;; 15 15 ;; 5 15 ;; 7 8.0
15 == 3 \times 5 ;; 5 + 10
3.5 != 3 0.5

# ratios
3 : 4 == 3:4 ;; 6:8 ;; 3\colon4 ;; 3 to 4 ;; \frac{3}{4}
3 : 4 != 4:3 ;; 3:4:1 ;; 3 ;; 3, 4
3:4 == \frac{3}{4} ;; 3 \text{ to } 4
\frac { \sqrt 3 } { 4 } : 1 == \sqrt{3}:4
5:9 == 10:18 ;; 5/9
5:9 != 5:9:1 ;; 5:9:9 ;; 1:5:9 ;; 5 9 ;; 9:5 ;; 5
1:2:3 == 1 : 2 : 3
1:2:3 != 1:2 ;; 1:3:2 ;; 6

# percent
50 == 50% ;; 50\% ;; 50 percent
50 != 0.5 ;; 50%% ;; 50\%\% ;; 50% %
50% == 50 percent ;; 50 ;; 0.5 ;; 50% ;; \frac{1}{2} ;; 50.0\%
50% != 5000% ;; 40% ;; 0.5% ;; 50%%

# inequalities, intervals, points
x < 60 == 60 > x ;; (60 > x) ;; x \lt 60 ;; x<60. ;; (-\infty, 60) ;; x \in (-\infty, 60)
x < 60 != 60 ;; x > 60 ;; x \le 60 ;; x <= 60 ;; x = 60 ;; x < 140 ;; 60 < x ;; -\infty, 60
x < 60 != (-\infty, 60]
x <= 60 == x \leq 60 ;; x\leqslant 60 ;; 60 \ge x ;; (-\infty, 60]
x <= 60 != x < 60
x \le 60 == x ≤ 60
4 < x < 10 == 10 > x > 4 ;; x > 4 and x < 10 ;; x < 10 and x > 4 ;; x > 4, x < 10
4 < x < 10 == x > 4 \text{ and } x < 10
4 < x < 10 == (4, 10) ;; 4 < x \text{ and } x < 10 ;; 4<x<10 ;; 10 > x \text{ and } x > 4
4 < x < 10 != 4, 10 ;; \{4, 10\} ;; 4 \le x < 10 ;; 10 < x < 4 ;; x > 4 ;; x < 4 and x > 10
4 < x < 10 != [4, 10] ;; 4 > x > 10
4 \le x < 10 == [4, 10) ;; 10 > x \ge 4 ;; x \ge 4 and x < 10
4 \le x < 10 != 10 \ge x > 4 ;; (4, 10)
(3, 4) == (3,4) ;; (x, y) = (3, 4) ;; P(3, 4) ;; P = (3, 4) ;; A(3,4) ;; \left(3, 4\right)
(3, 4) != (4,3) ;; 3, 4 ;; \{3, 4\} ;; 3 4 ;; [3, 4] ;; 34 ;; (3, 4, 5) ;; (3,4), (5,6)
[0, 100] == [0,100]
[0, 100] != 0, 100 ;; \{0, 100\} ;; (0, 100) ;; 50
\{2, 3\} == 2, 3 ;; 3, 2 ;; \{3,2\}
\{2, 3\} != 2 ;; 2, 4 ;; 2 3 ;; 23 ;; 2, 3, 4
3, -3 == \pm 3 ;; -3, 3

# degrees, minutes of arc
109 == 109° ;; 109^\circ ;; 109^{\circ} ;; 109{}^{\circ} ;; 109 degrees ;; 109 \text{ degrees}
109 == 109\degree ;; 109º ;; 109˚ ;; 109^o ;; 109 deg. ;; 109 ^ { \circ }
109 != 108° ;; 109 108
109^\circ == 109 ;; 109 \text{ degrees}.
24.5 == 24^\circ 30' ;; 24° 30' ;; 24°30′ ;; 24^{\circ}30^{\prime}
24.5 != 24^\circ 50' ;; 24' ;; 24° 5'
36.9 == 36^\circ 52' ;; 36° 52' 12''
36.9 != 36^\circ 9'

# units
10 == 10 \text{ units} ;; 10 cm ;; 10\,\text{cm} ;; 10cm ;; 10 \text{ cm}^2 ;; 10 cm^2 ;; 10 cm²
10 == 10\text{ cm}^{2} ;; 10 m
10 == 10 \text{ square units} ;; 10\ \mathrm{mm} ;; 10 in. ;; 10 inches ;; 10 kg ;; 10 seconds
10 == 10 m/s ;; 10 dollars
10 == 10 hrs ;; 10 \text{ radians} ;; 10 cm. ;; 10 cm^2. ;; 10 m/s^2 ;; 10 m/s². ;; 10 cm squared
10 == 10 units squared
10 == 10 meters per second ;; 10 ft/s ;; 10 \text{ m/s}^2 ;; 10 sq. units ;; 10 cubic meters
10 == 10 \mathbf{cm} ;; 10 units.
10 == 10 square centimeters ;; 10 feet per second squared ;; 10 km/h ;; 10\text{ in}^3 ;; 10.0 cm
10 != 10 kangaroos ;; 10 k ;; 10x ;; 10 cm 5 ;; 5 cm 10 ;; 11 cm ;; 10 cm or 5 cm ;; 100 cm^2
10 != 10 x cm
48 \pi == 48\pi \text{ cm}^2 ;; 48\pi ;; 48 \pi \text{ units}^2 ;; 48π cm² ;; 48 \pi \text{ m/s}
48 \pi != 150.8 ;; 48 ;; 4 8\pi
10^2 == 100
3x != 3x+2m
2 != 2m
2m != 2
5 m == 5 ;; 5 meters

# names beside the =
4 == x = 4 ;; x=4 ;; x = \frac{8}{2} = 4 ;; 4 = x ;; x = 4 = y ;; x equals 4 ;; x is 4
4 == x is equal to 4
x = 4 == 4 ;; y = 4 ;; 4 = x
45 == \angle ABC = 45 ;; m\angle A = 45 ;; m \angle ABC = 45^\circ ;; m \angle A B C = 45
45 == m \angle 3 = 45 ;; \angle{ABC} = 45
45 == \text{measure of } \angle A = 45 ;; The measure of angle A is 45 degrees.
45 == m\angle ABC = 45° = x ;; ∠ABC = 45
24 == \text{Area} = 24 \text{ cm}^2 ;; \theta = 24 ;; \overline { A B } = 24
24 == m \angle A B C = 24 ;; \overline{AB} = 24 ;; θ = 24°
24 == \text{Thus } x = 24 ;; therefore AB = 24
24 == Area of \triangle ABC = 24 ;; \text{Area of } \triangle ABC = 24 ;; area = 24
24 == The area is 24 ;; AB = 24 ;; A B = 24
24 == The length of AB is 24 cm. ;; \text{arc } BC = 24 ;; A' B' = 24 ;; m \widehat{AB} = 24
24 == x_{1} = 24 ;; x_1 = 24 ;; P = 24
0.96 == \sin A = 0.96 ;; \sin \angle A = 0.96 ;; \cos(B) = 0.96 ;; \sin{A} = 0.96
0.96 == \tan \theta = \frac{24}{25} ;; sin A = 0.96
109 == 109 = x ;; 109^\circ = \angle ABC ;; 109 = m\angle 1 ;; \alpha = 109
m + n - 180 == n+m-180 ;; x = m + n - 180 ;; m + n - 180 = x
m + n - 180 != m+n+180 ;; x = m + n ;; m = n - 180
y = 2x + 1 == y=2x+1 ;; 2x - y + 1 = 0 ;; 2x + 1
y = 2x + 1 != y = 2x ;; 1
a + b = 90 == a+b=90 ;; 90 = a + b ;; b + a = 90
a + b = 90 != a + b > 90 ;; 90 ;; a - b = 90
15 == AB = CD = 15 ;; AB=15 ;; The answer is 15 ;; answer: 15 ;; final answer is $15$
15 == Answer = 15 ;; the final answer is: 15.
8 != -x = 8 ;; x^2 = 8 ;; 2x = 8 ;; \frac{x}{2} = 8 ;; \sqrt{x} = 8 ;; x + 1 = 8 ;; xy = 8
8 != 1/x = 8

# a phrase beside the = that changes the value
15 != the 14 = 15 ;; \theta 14 = 15 ;; \sin 14 = 15 ;; a 14 = 15 ;; x 14 = 15 ;; 2 x = 15
15 != not x = 15 ;; half of x = 15 ;; \text{half of } x = 15 ;; twice x = 15 ;; x squared = 15
15 != \text{x squared} = 15
15 != supplement = 15 ;; \text{the supplement of } \angle A = 15 ;; complement of x = 15
15 != x is not 15 ;; 15 is wrong
15 != 15 = not x ;; double x = 15 ;; NOT x = 15 ;; HALF x = 15 ;; opposite of x = 15
15 != the answer is not 15 ;; negative x = 15 ;; no = 15 ;; x \neq 15
15 != square of x = 15 ;; x minus 1 = 15 ;; sum of x and y = 15 ;; 15 = twice AB
15 != a third of x = 15 ;; 15 more than x = 15
15 != one of x = 15 ;; \text{maybe } x = 15 ;; \pi = 15 ;; x / 2 = 15 ;; if x = 15
15 != x \approx 15 \text{ or } 5

# chains
106 == \approx 106 ;; ≈106 ;; approximately 106 ;; x \approx 106 ;; about 106 ;; \sim 106
106 == x is about 106
\sqrt{74} == \sqrt{74} \approx 8.6 ;; x = \sqrt{74} = 8.6
\sqrt{74} != \sqrt{74} \approx 8.7 ;; 8.6 ;; 8.6 = 8.60
15 != 14=15 ;; 5 = 14 = 15 ;; 5 \approx 15 ;; 15 = 5 ;; x = 15 = 5 ;; 14 = x = 15

# hedges
15 != 5, 14, 15, 35 ;; 5 or 14 ;; 5 or 15 ;; 15 or 5 ;; 15 \text{ or } 5 ;; 15 \text{ (or 5)}
15 != \{5,14,15,35\} ;; 5;15 ;; \pm 15
15 != [0,100] ;; 5/14/15 ;; 5,15 ;; 15; 5 ;; 15 and 5 ;; x = 5, x = 15 ;; x = 15 or x = 5
15 != AB = 15, CD = 5 ;; 14 - 15
15 != \max(5, 15) ;; 15 \mid 5 ;; 15 \cup 5 ;; (15, 5) ;; 10 < x < 20 ;; x > 14 ;; \{15, 5\}
15 != A: 15 B: 5 ;; 15:5

\overline{AB} == AB ;; \overline { A B } ;; A B
AB == \overline{AB} ;; \overline{ AB }.
AB != BC ;; ABC
# decoration
15 == 15. ;; \$15 ;; $15$ ;; \left(15\right) ;; 015 ;; \frac{30}{2} ;; {15} ;; \(15\) ;; \[15\]
15 == $$15$$ ;; 15\ ;; 15,
15 == \mathbf{15} ;; \boldsymbol{15} ;; \textbf{15} ;; \bm{15} ;; \mathrm{15}
15 == \mathbf{\frac{30}{2}} ;; {\bf 15} ;; \underline{15} ;; \displaystyle 15
15 == \textbf{15 \text{ cm}} ;; \mathbf{x} = \mathbf{15}
15 != 1.5e1 ;; x ;; 15x ;; \frac{15} ;; 15} ;; \infty ;; \frac{1}{0} ;; \frac{0}{0} ;; answer: 14
15 != \mathbf{51} ;; 1\mathbf{5} ;; \boxed{} ;; 15!

# words
red == red ;; Red ;; \text{red} ;; The answer is red.
red != blue ;; der ;; red or blue ;; not red
not enough information == \text{Not enough information} ;; not  enough information.
not enough information != enough information ;; 15
Yes == yes ;; \text{YES} ;; yes.
Yes != no ;; yes no
A == A ;; (A) ;; \text{A}
A != B ;; A, B ;; A or B

# figures
\angle 3 \cong \angle Z == \angle3\cong\angle Z ;; \angle Z \cong \angle 3 ;; ∠3 ≅ ∠Z
\angle 3 \cong \angle Z != \angle 3 \cong \angle Y ;; \angle 3 ;; 3 \cong Z
\angle 2 and \angle 6 == \angle 6 \text{ and } \angle 2 ;; \angle 2, \angle 6
\angle 2 and \angle 6 == \angle 2, and \angle 6
\angle 2 and \angle 6 != \angle 2 \cong \angle 6 ;; \angle 2 ;; \angle 2, \angle 6, \angle 1
\overline { A B } and \overline { C D } == \overline{AB} and \overline{CD} ;; AB and CD
\overline { A B } and \overline { C D } == \overline{CD}, \overline{AB} ;; AB, CD
\overline { A B } and \overline { C D } == \text{AB and CD}
\overline { A B } and \overline { C D } != AB ;; AC and BD ;; AB \cong CD ;; AB and CD and EF
AB, CD, and EF == AB, CD and EF ;; \overline{AB}, \overline{CD}, \overline{EF} ;; EF, AB, CD
AB, CD, and EF != AB, CD ;; AB and EF

# algebra
20 y^2 - 10 y == 10y(2y-1) ;; -10y + 20y^{2}
20 y^2 - 10 y != 20y^2 ;; 10y
x^2 y^2 == x^2y^2 ;; (xy)^2
x^2 == x^{2} ;; x \cdot x ;; x²
x^2 != 2x ;; x
0.5\pi == \frac{\pi}{2} ;; \pi/2
64 - 16 \pi == 16(4-\pi) ;; -16\pi + 64

# golds are read as generously as answers
<answer> 3 </answer> == 3 ;; 3.0 ;; x = 3 ;; \frac{6}{2}
<answer> 3 </answer> != 4 ;; answer ;; 33
<think> 5 apples </think> <answer>3 cm</answer> == 3 ;; 3 cm
<think> 5 apples </think> <answer>3 cm</answer> != 5
She has 2 + 5 = 7 apples. #### 7 == 7 ;; 7.0
She has 2 + 5 = 7 apples. #### 7 != 2 ;; 5
#### 1,234 == 1234
Answer: 3 == 3 ;; x = 3
Answer: 3 != 2
The answer is $\frac{1}{2}$. == 0.5
\[3\] == 3
\(\sqrt{2}\) == \sqrt{2}
$3$ == 3
so we get \boxed{3} == 3
1e-05 == 0.00001 ;; 10^{-5} ;; 1e-05 ;; \frac{1}{100000}
1e-05 != 0 ;; 0.0001 ;; 1
1e+16 == 10000000000000000 ;; 10^{16}
3.0999999046325684 == 3.1 ;; \frac{31}{10}
3.0999999046325684 != 3 ;; 3.2
0.30000000000000004 == 0.3
1000.0999755859375 == 1000.1
½ == 0.5
\frac12 == 0.5
109° == 109
10 cm. == 10 ;; 10 cm
\textbf{(B)} == B ;; (B)
"""  # noqa: RUF001


def read_cases(table: str) -> list[tuple[str, str, bool]]:
    cases = []
    for line in table.splitlines():
        if line and not line.startswith("# "):
            gold, relation, answers = re.split(" (==|!=) ", line, maxsplit=1)
            cases += [(answer, gold, relation == "==") for answer in answers.split(" ;; ")]
    return cases


CASES = read_cases(ANSWERS)


CASES += [("15\\", "15", True), (None, "15", False), ("", "15", False), ("   ", "15", False)]


CASES += [("", "", False), ("nan", "", False)]  # a row without an answer is no gift


@pytest.fixture(scope="module")
def grader():
    with Grader(time_limit=20) as shared:
        yield shared


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


def rollout_of(ids, truncated=False):
    return rollout.Rollout([torch.tensor(ids)], torch.zeros(len(ids)), truncated)


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
    rows = [
        problem(
            "<image>" * k + "What?" * (i + 1),
            tuple(picture(10 * i + j, *sizes[j]) for j in range(k)),
        )
        for i, k in enumerate(counts)
    ]
    return [ask(actor, row) for row in rows]


def random_groups(actor, counts=(0, 1, 3), lengths=((3, 5), (4, 4, 1), (2, 9)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for prompt, ns in zip(prompts_with(actor, *counts), lengths, strict=True):
        responses = [torch.randint(0, 250, (n,), generator=generator) for n in ns]
        groups.append((prompt, [[response] for response in responses]))
    return groups


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


def with_lora(actor, seed=1, dropout=0.0):
    """LoRA as after some training: both factors random."""
    actor.add_lora(4, 8.0, dropout, "q_proj,v_proj,down_proj")
    generator = torch.Generator().manual_seed(seed)
    for name, p in actor.model.named_parameters():
        if "lora_B" in name:
            p.data = 0.05 * torch.randn(p.shape, generator=generator)
    return actor


def mebibytes(name):
    """VmRSS or VmHWM, the most that it has been, of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(name + r":\s*(\d+)", status)[1]) / 1024


def reset_peak():
    """Let VmHWM begin anew; returns what is in use, in MiB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return mebibytes("VmRSS")


def gemma4_with_everything(processor):
    """A random model with everything that Gemma 4 brings: images that see forwards in sliding
    layers alone, softcapped logits, inputs for every layer, larger heads in full layers."""
    text = dict(
        vocab_size=300,
        vocab_size_per_layer_input=300,
        hidden_size_per_layer_input=8,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=6,
        final_logit_softcapping=3.0,
        use_bidirectional_attention="vision",
        pad_token_id=0,
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        patch_size=4,
        pooling_kernel_size=2,
        position_embedding_size=64,
    )
    ids = dict(image_token_id=290, video_token_id=291, audio_token_id=292, boi_token_id=293)
    config = AutoConfig.for_model(
        "gemma4", text_config=text, vision_config=vision, audio_config=None, eoi_token_id=294, **ids
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        for p in network.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.2)
    return model.Actor(network, processor)


def gemma4_prompt(images):
    """Text, then images of 8 x 8 patches, which the pooler makes 16 tokens of."""
    generator = torch.Generator().manual_seed(images)
    text = torch.randint(1, 250, (5,), generator=generator)
    image = torch.tensor([293, *[290] * 16, 294])
    ids = torch.cat([text, *[torch.cat([image, text[:2]])] * images])
    inputs = {"mm_token_type_ids": (ids == 290).long()[None]}
    if images:
        places = torch.cartesian_prod(torch.arange(8), torch.arange(8)).flip(-1)
        inputs["pixel_values"] = torch.rand(images, 64, 48, generator=generator)
        inputs["image_position_ids"] = places.repeat(images, 1, 1)
    return data.Prompt(None, ids, ids, [None] * images, inputs)


def plain_varlen(q, k, v, queries, keys, longest_query, longest_key, *, scale=None,
window_size=(-1, -1), **_):  # fmt: skip
    """What torch says that varlen_attn computes, sequence by sequence."""
    check_varlen_arguments(q, k, v, queries, keys, longest_query, longest_key)
    assert queries[-1] == len(q) and keys[-1] == len(k)
    assert queries.diff().max() == longest_query and keys.diff().max() == longest_key
    left, right = (len(k) if reach < 0 else reach for reach in window_size)
    ends, out = list(zip(queries.tolist(), keys.tolist(), strict=True)), []
    for (q_start, k_start), (q_end, k_end) in itertools.pairwise(ends):
        heads = q.shape[1] // k.shape[1]
        some_k = k[k_start:k_end].repeat_interleave(heads, 1)
        some_v = v[k_start:k_end].repeat_interleave(heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_end], some_k) * scale
        own = torch.arange(q_end - q_start)[:, None] + (k_end - k_start) - (q_end - q_start)
        key = torch.arange(k_end - k_start)
        scores = scores.masked_fill((key < own - left) | (key > own + right), -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), some_v))
    return torch.cat(out)


def check_varlen_arguments(q, k, v, queries, keys, longest_query, longest_key, *_, **__):
    """What the kernel demands, beside values."""
    assert q.ndim == 3 and k.shape == v.shape and q.shape[1] % k.shape[1] == 0
    assert q.shape[2] == k.shape[2] <= 256 and q.shape[2] % 8 == 0
    assert q.dtype == k.dtype == v.dtype and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert queries.shape == keys.shape and queries.dtype == keys.dtype == torch.int32
    assert queries.is_contiguous() and keys.is_contiguous()
    assert len({x.device for x in (q, k, v, queries, keys)}) == 1
    assert isinstance(longest_query, int) and isinstance(longest_key, int)


def force_kernels(monkeypatch, kernel):
    """As on a GPU in 16 bits, with `kernel` in the place of varlen_attn."""
    monkeypatch.setattr(model, "flash_attn_varlen_func", None)
    monkeypatch.setattr(model, "varlen_attn", kernel)
    monkeypatch.setattr(model, "kernel_runs", lambda q: True)
    monkeypatch.setattr(model, "tower_in_one_call", lambda *_: True)


def sized_config(folder, size, layers=2, depth=3):
    """Config of Qwen2.5-VL-3B or 7B with the token ids of a tiny one, and fewer layers."""
    tiny = AutoConfig.from_pretrained(folder)
    text = tiny.text_config.to_dict() | {
        "3B": dict(hidden_size=2048, intermediate_size=11008, num_attention_heads=16,
                   num_key_value_heads=2, vocab_size=151936),
        "7B": dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
                   num_key_value_heads=4, vocab_size=152064),
    }[size]  # fmt: skip
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    text |= dict(num_hidden_layers=layers, rope_parameters=rope, max_position_embeddings=32768)
    for name in ("head_dim", "layer_types", "max_window_layers"):
        text.pop(name, None)
    vision = tiny.vision_config.to_dict() | dict(
        depth=depth, hidden_size=1280, intermediate_size=3420, num_heads=16, window_size=112,
        out_hidden_size=text["hidden_size"], fullatt_block_indexes=[depth // 2],
    )  # fmt: skip
    ids = {name: getattr(tiny, name) for name in vars(tiny) if name.endswith("_token_id")}
    return AutoConfig.for_model(
        "qwen2_5_vl",
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=size == "3B",
        **ids,
    )


@pytest.fixture(scope="session")
def table(request):
    """table(device, what, number=...) adds a row; those of a GPU are printed when all tests have
    ended."""
    rows = []

    def add(device, what, **numbers):
        if device == "cuda":
            rows.append(f"{what:44}" + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))

    yield add
    if rows:
        terminal = request.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
        for row in rows:
            terminal.write_line(row)


@pytest.fixture(scope="session")
def process_group():
    """A process group of one, as train.py has; one for all tests, because vLLM remembers the first
    that it saw."""
    processes.start_processes()
    yield
    torch.distributed.destroy_process_group()


def draw(engine, prompts, n, seed=0, **options):
    return engine.generate([[prompt] for prompt in prompts], n, seed, **options)


def as_groups(prompts, drawn):
    """What the engine drew for each prompt, as Actor.logprobs takes it."""
    return [(p, [r.turns for r in rs]) for p, rs in zip(prompts, drawn, strict=True)]


def sampled(drawn):
    """(N,) sampler_logprobs of all that was drawn."""
    return torch.cat([r.sampler_logprobs for rollouts in drawn for r in rollouts])


def largest_gap(actor, engine, prompts, n=4, seed=0):
    """Largest |sampler_logprobs - logprobs| over n responses to each prompt."""
    drawn = draw(engine, prompts, n, seed)
    with torch.no_grad():
        logprobs, _ = actor.logprobs(as_groups(prompts, drawn))
    return (sampled(drawn) - logprobs).abs().max().item()


needs_vllm = pytest.mark.skipif(
    rollout.choose_engine("auto")[0] != "vllm", reason=rollout.choose_engine("auto")[1]
)


in_vllms_process = [needs_vllm, pytest.mark.xdist_group("vllm")]


def with_bounds(folder):
    """The actor of a model whose processor leaves the tests' images alone, as vLLM needs."""
    return model.Actor.from_pretrained(str(folder), pixels=(MIN_PIXELS, MAX_PIXELS))


def start_vllm(actor, folder, **changes):
    limits = dict(max_prompt_tokens=400, max_response_tokens=24, max_images=3, max_videos=2)
    settings = dict(dtype=torch.float32, tp=1, memory_fraction=0.3, eager=True)
    return rollout.VLLMEngine(actor, str(folder), **settings | limits | changes)


class KeptVLLM:
    """At most one vLLM engine: a start takes seconds, so the tests of one model share it."""

    engine = folder = None

    def engine_for(self, actor, folder, **changes):
        """An engine with the actor's weights; one that has just started has those of the folder."""
        if self.folder == folder:
            self.engine.actor = actor
            self.engine.sync(actor)
        else:
            self.close()
            self.engine = start_vllm(actor, folder, **changes)
            self.folder = folder
        self.engine.max_response_tokens = 24
        return self.engine

    def close(self):
        if self.engine:
            self.engine.close()
        self.engine = self.folder = None


@pytest.fixture(scope="session")
def vllm(process_group):
    kept = KeptVLLM()
    yield kept
    kept.close()


@pytest.fixture(params=["hf", pytest.param("vllm", marks=in_vllms_process)])
def engine(request, tiny, process_group):
    """Either engine, for what both promise, over an actor of its own: engine.actor."""
    actor = with_bounds(tiny[False])
    if request.param == "vllm":
        return request.getfixturevalue("vllm").engine_for(actor, tiny[False])
    return rollout.HFEngine(actor, max_response_tokens=24)


def perturb(actor, part="", scale=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in actor.model.named_parameters():
            if part in name:
                p.add_(torch.randn(p.shape, generator=generator), alpha=scale)


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


def film(seconds, rate=8, width=56, height=56):
    """A video file whose frame i is grey of level 8 i."""
    import av  # a machine without it can run all other tests

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


def media_problem(question, images=0, *videos):
    return dataclasses.replace(
        problem(question, tuple(picture(i) for i in range(images)), "4"), videos=videos
    )


def mixed_prompts(actor):
    """Text, one image, several, a video file, and an image between two videos."""
    rows = [
        media_problem("What?"),
        media_problem("<image>What?", 1),
        media_problem("<image><image>What?", 2),
        media_problem("See <video>What?", 0, film(4)),
        media_problem("<video>or<image>or<video>?", 1, stills(3, 84, 56), stills(2)),
    ]
    return [ask(actor, row) for row in rows]


def small_run(folder, groups_seed=0, prepare=lambda actor: None, **changes):
    """A Run on the tiny model in `folder` with plain SGD: its steps are the gradient, too long to
    be rounded away."""
    flags = "--preset tiny --engine hf --freeze_vision false"
    settings, _ = train.parse_settings([*flags.split(), *own_flags()])
    settings = dataclasses.replace(settings, model=str(folder), kl_coefficient=0.0, **changes)
    actor = model.Actor.from_pretrained(
        settings.model, temperature=settings.temperature, packing=settings.packing
    )
    prepare(actor)
    actor.shard(torch.device("cpu"), shard_ranks=settings.shard_ranks)
    optimizer = torch.optim.SGD([p for p in actor.model.parameters() if p.requires_grad], lr=1e6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1.0)
    rows = [
        problem(
            "<image>" * (i % 3) + "What?" * (1 + i % 4), tuple(picture(j + i) for j in range(i % 3))
        )
        for i in range(8)
    ]
    settings = dataclasses.replace(
        settings, min_pixels=28 * 28, max_pixels=28 * 28 * 64, prompts_per_step=8
    )
    run = train.Run(
        settings,
        torch.device("cpu"),
        actor,
        None,
        None,
        optimizer,
        schedule,
        rows,
        rows,
        None,
        build_reader(actor.processor, settings.instruction),
    )
    generator = torch.Generator().manual_seed(groups_seed)

    def random_rollout(length):
        response = torch.randint(0, 250, (length,), generator=generator)
        sampler_logprobs = -5.0 + torch.rand(length, generator=generator)
        return rollout.Rollout([response], sampler_logprobs, False)

    groups = [
        train.Group(
            i,
            len(run.reader(rows[i]).ids),
            4,
            [random_rollout(2 + (3 * i + j) % 7) for j in range(4)],
            {},
            torch.randn(4, generator=generator) if i != 5 else torch.zeros(4),
        )
        for i in range(8)
    ]
    return run, groups


def minibatches_of(run, groups):
    ranks = torch.distributed.get_world_size()
    plans = train.plan_minibatches(groups, run.settings, ranks, run.actor.packing)
    return [train.scored_minibatch(run, plan, i == 0) for i, plan in enumerate(plans)]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


QWEN25 = {  # counts of Qwen2.5-VL's configurations
    "3B": memory.ModelSize(3_754_622_976, 668_712_960, 151936 * 2048, 36, 2048),
    "7B": memory.ModelSize(8_292_166_656, 676_550_144, 2 * 152064 * 3584, 28, 3584),
    "32B": memory.ModelSize(33_452_718_336, 690_000_000, 2 * 152064 * 5120, 64, 5120),
    "72B": memory.ModelSize(73_410_777_344, 700_000_000, 2 * 152064 * 8192, 80, 8192),
}


def embedded(folder):
    """The data in a report."""
    page = (folder / "report.html").read_text()
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def adam_run(folder, out, **changes):
    """small_run with the optimizer that a real run has; writes under `out`."""
    changes = dict(minibatch_prompts=8, max_sampler_gap=100.0, keep=2, learning_rate=1e-3) | changes
    run, groups = small_run(folder, out=str(out), **changes)
    run.optimizer, run.schedule = train.build_optimizer(run.settings, run.actor)
    return run, groups


def learn(run, groups):
    [minibatch] = minibatches_of(run, groups)
    totals = train.update(run, minibatch, run.step, None)
    run.step += 1
    return totals


def whole_state(run):
    return {
        name: model.full(value).clone() for name, value in checkpoint.checkpoint_state(run).items()
    }


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
    inputs = dict(
        pixel_values=torch.randn(4 * len(image), 1176),
        mm_token_type_ids=(whole == image[0]).int()[None],
        image_grid_thw=torch.tensor([[1, 2 * side, 2 * side]]),
    )
    prompt = data.Prompt(problem(), whole, whole, [object()], inputs)
    return [(prompt, [[torch.randint(0, 250, (n,))] for n in response_lengths])]


# --------------------------------------------------------------------------------------------------
# Builders: tiny families


CHATML = "<|im_start|>{role}\n", "<|im_end|>\n", "<|im_start|>assistant\n"


QWEN = dict(image="<|vision_start|><|image_pad|><|vision_end|>", turn=CHATML, named={},
            special=["<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>"])  # fmt: skip


TILES = [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)]


CHATS = {  # how a family writes a user's turn, its image placeholder and its special tokens
    "qwen2_vl": QWEN, "qwen2_5_vl": QWEN, "qwen3_vl": QWEN, "qwen3_5": QWEN,
    "idefics3": dict(
        image="<image>", turn=("User:", "<end_of_utterance>\n", "Assistant:"), start="<|im_start|>",
        named={},
        special=["<image>", "<fake_token_around_image>", "<global-img>", "<video>", *TILES]),
    "internvl": dict(image="<IMG_CONTEXT>\n", turn=CHATML, special=[], named=dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>")),
    "llava_onevision": dict(  # the real template moves every image before the text
        image="<image>", images_first=True, named=dict(image_token="<image>",
        video_token="<video>"), special=[],
        turn=("<|im_start|>{role} ", "<|im_end|>", "<|im_start|>assistant\n")),
    "gemma3": dict(image="<start_of_image>", named=dict(
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"),
        special=[],
        start="{{ bos_token }}", turn=("<start_of_turn>{role}\n", "<end_of_turn>\n",
        "<start_of_turn>model\n")),
    "llava": dict(
        image="<image>\n", turn=("{role}: ", "</s>\n", "assistant: "),
        named=dict(image_token="<image>"), special=[]),
    "qwen3_vl_moe": QWEN,
    "glm4v": dict(
        image="<|begin_of_image|><|image|><|end_of_image|>",
        turn=("<|{role}|>\n", "<|endoftext|>\n", "<|assistant|>\n"),
        named=dict(image_token="<|image|>", video_token="<|video|>"), special=[
            "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]),
    "mistral3": dict(
        image="[IMG]", turn=("[INST]", "</s>", "[/INST]"),
        special=["[IMG]", "[IMG_BREAK]", "[IMG_END]"], named={}),
    "gemma4": dict(
        image="<|image|>", turn=("<|turn>{role}\n", "<turn|>\n", "<|turn>model\n"),
        special=["<|video|>"], named=dict(
            image_token="<|image|>", boi_token="<|image>", eoi_token="<image|>",
            audio_token="<|audio|>",
            boa_token="<|audio>", eoa_token="<audio|>")),
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
        vocab=learned["model"]["vocab"],
        merges=[tuple(pair) for pair in learned["model"]["merges"]],
        unk_token=None,
        eos_token=turn[1].strip(),
        pad_token="<pad>",
        **bos,
        **named,
        extra_special_tokens=[*special, "<start_of_turn>" if bos else "<|im_start|>"],
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    if bos:
        tokenizer.add_tokens(["\n" * n for n in range(1, 5)])  # vLLM's Gemma 3 looks them up
    return tokenizer


class Kit:
    """Parts of every tiny family: a tokenizer, its chat template, the language model's shape."""

    def __init__(self, name):
        chat = CHATS[name]
        self.tokenizer = tiny_tokenizer(**chat)
        self.template = dict(chat_template=chat_template(**chat))
        self.text = dict(
            vocab_size=len(self.tokenizer),
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            max_position_embeddings=4096,
        )

    def id_of(self, token):
        return self.tokenizer.convert_tokens_to_ids(token)

    def qwen_ids(self):
        names = dict(image="image_pad", video="video_pad", vision_start="vision_start")
        names["vision_end"] = "vision_end"
        return {f"{ours}_token_id": self.id_of(f"<|{theirs}|>") for ours, theirs in names.items()}


TOWER = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=14
)


SIGLIP = dict(**TOWER, model_type="siglip_vision_model", vision_use_head=False)


QWEN_TOWER = dict(depth=2, num_heads=2, patch_size=14)


QWEN3_TOWER = dict(
    **QWEN_TOWER,
    hidden_size=32,
    intermediate_size=64,
    out_hidden_size=128,
    num_position_embeddings=64,
)


def rotary(*sections, **more):
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=list(sections), **more)
    return dict(rope_parameters=rope)


def tiny_qwen2_vl(kit):
    images, videos = hf.Qwen2VLImageProcessor(), hf.Qwen2VLVideoProcessor()
    processor = hf.Qwen2VLProcessor(images, kit.tokenizer, videos, **kit.template)
    vision = dict(**QWEN_TOWER, embed_dim=32, hidden_size=128, mlp_ratio=2)
    text = kit.text | rotary(8, 4, 4, mrope_interleaved=False)
    return processor, dict(text_config=text, vision_config=vision, **kit.qwen_ids())


def tiny_qwen2_5_vl(kit):
    images, videos = hf.Qwen2VLImageProcessor(), hf.Qwen2VLVideoProcessor()
    processor = hf.Qwen2_5_VLProcessor(images, kit.tokenizer, videos, **kit.template)
    sizes = dict(hidden_size=32, intermediate_size=64, out_hidden_size=128)
    vision = dict(**QWEN_TOWER, **sizes, fullatt_block_indexes=[1])
    text = kit.text | rotary(8, 4, 4, mrope_interleaved=False)
    return processor, dict(text_config=text, vision_config=vision, **kit.qwen_ids())


def qwen3_processor(kit):
    images, videos = (
        hf.Qwen2VLImageProcessor(patch_size=14),
        hf.Qwen3VLVideoProcessor(patch_size=14),
    )
    return hf.Qwen3VLProcessor(images, kit.tokenizer, videos, **kit.template)


def tiny_qwen3_vl(kit):
    vision = dict(**QWEN3_TOWER, deepstack_visual_indexes=[0, 1])
    text = kit.text | rotary(8, 4, 4, mrope_interleaved=True)
    return qwen3_processor(kit), dict(text_config=text, vision_config=vision, **kit.qwen_ids())


def tiny_qwen3_vl_moe(kit):
    vision = dict(**QWEN3_TOWER, deepstack_visual_indexes=[0, 1])
    experts = dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    )
    text = kit.text | rotary(8, 4, 4, mrope_interleaved=True) | experts
    return qwen3_processor(kit), dict(text_config=text, vision_config=vision, **kit.qwen_ids())


def tiny_qwen3_5(kit):
    layers = ["linear_attention", "full_attention", "linear_attention"]
    keys = dict(linear_key_head_dim=8, linear_num_key_heads=2)
    values = dict(linear_value_head_dim=8, linear_num_value_heads=4)
    text = kit.text | rotary(2, 1, 1, partial_rotary_factor=0.25) | keys | values
    text["layer_types"] = layers
    return qwen3_processor(kit), dict(text_config=text, vision_config=QWEN3_TOWER, **kit.qwen_ids())


def tiny_internvl(kit):
    images = hf.GotOcr2ImageProcessor(size=dict(height=56, width=56), max_patches=2)
    videos = hf.InternVLVideoProcessor()
    processor = hf.InternVLProcessor(
        images, kit.tokenizer, videos, image_seq_length=4, **kit.template
    )
    vision = TOWER | dict(image_size=[56, 56], patch_size=[14, 14])
    ids = dict(image_token_id=kit.id_of("<IMG_CONTEXT>"), image_seq_length=4)
    text = dict(model_type="qwen2", **kit.text)
    return processor, dict(text_config=text, vision_config=vision, **ids)


def tiny_llava_onevision(kit):
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    images = hf.LlavaOnevisionImageProcessor(
        size=dict(height=28, width=28), image_grid_pinpoints=grid
    )
    options = dict(num_image_tokens=4, vision_feature_select_strategy="full", **kit.template)
    videos = hf.LlavaOnevisionVideoProcessor()
    processor = hf.LlavaOnevisionProcessor(images, kit.tokenizer, videos, **options)
    text, vision = dict(model_type="qwen2", **kit.text), dict(**SIGLIP, image_size=28)
    ids = dict(image_token_index=kit.id_of("<image>"), video_token_index=kit.id_of("<video>"))
    return processor, dict(text_config=text, vision_config=vision, image_grid_pinpoints=grid, **ids)


def tiny_idefics3(kit):
    edges = dict(size=dict(longest_edge=112), max_image_size=dict(longest_edge=56))
    images = hf.Idefics3ImageProcessor(**edges)
    processor = hf.Idefics3Processor(images, kit.tokenizer, image_seq_len=4, **kit.template)
    text, vision = dict(model_type="llama", **kit.text), dict(**TOWER, image_size=56)
    ids = dict(image_token_id=kit.id_of("<image>"), pad_token_id=kit.tokenizer.pad_token_id)
    return processor, dict(text_config=text, vision_config=vision, scale_factor=2, **ids)


def tiny_gemma3(kit):
    images = hf.Gemma3ImageProcessor(size=dict(height=56, width=56))
    processor = hf.Gemma3Processor(images, kit.tokenizer, image_seq_length=16, **kit.template)
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    text = kit.text | dict(query_pre_attn_scalar=32, sliding_window=8, layer_types=layers)
    tokens = dict(boi="<start_of_image>", eoi="<end_of_image>", image="<image_soft_token>")
    ids = {f"{name}_token_index": kit.id_of(token) for name, token in tokens.items()}
    vision = dict(**SIGLIP, image_size=56)
    return processor, dict(text_config=text, vision_config=vision, mm_tokens_per_image=16, **ids)


def tiny_llava(kit):
    sizes = dict(size=dict(shortest_edge=56), crop_size=dict(height=56, width=56))
    options = dict(
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    images = hf.CLIPImageProcessor(**sizes)
    processor = hf.LlavaProcessor(images, kit.tokenizer, **options, **kit.template)
    vision = dict(**TOWER, model_type="clip_vision_model", image_size=56, projection_dim=32)
    ids = dict(image_token_index=kit.id_of("<image>"), image_seq_length=16)
    text = dict(model_type="llama", **kit.text)
    return processor, dict(text_config=text, vision_config=vision, **ids)


def tiny_glm4v(kit):
    bounds = dict(shortest_edge=2 * 28 * 28, longest_edge=2 * 64 * 28 * 28)
    images, videos = hf.Glm4vImageProcessor(size=bounds), hf.Glm4vVideoProcessor()
    processor = hf.Glm4vProcessor(images, kit.tokenizer, videos, **kit.template)
    sizes = dict(hidden_size=32, intermediate_size=64, out_hidden_size=128, image_size=56)
    ids = {}
    for kind in ("image", "video"):
        ids[f"{kind}_token_id"] = kit.id_of(f"<|{kind}|>")
        ids[f"{kind}_start_token_id"] = kit.id_of(f"<|begin_of_{kind}|>")
        ids[f"{kind}_end_token_id"] = kit.id_of(f"<|end_of_{kind}|>")
    text = kit.text | rotary(4, 2, 2, partial_rotary_factor=0.5) | dict(attention_bias=True)
    return processor, dict(text_config=text, vision_config=QWEN_TOWER | sizes, **ids)


def tiny_mistral3(kit):
    side = dict(patch_size=dict(height=28, width=28), size=dict(longest_edge=112))
    images, merging = hf.PixtralImageProcessor(**side), dict(spatial_merge_size=2)
    processor = hf.PixtralProcessor(images, kit.tokenizer, patch_size=14, **merging, **kit.template)
    text = dict(model_type="mistral", **kit.text, sliding_window=None)
    vision = dict(**TOWER, model_type="pixtral", image_size=112)
    ids = dict(image_token_index=kit.id_of("[IMG]"))
    return processor, dict(text_config=text, vision_config=vision, **merging, **ids)


def tiny_gemma4(kit):
    merging = dict(patch_size=4, pooling_kernel_size=2)
    images = hf.Gemma4ImageProcessor(**merging, max_soft_tokens=70)
    parts = hf.Gemma4AudioFeatureExtractor(), images, kit.tokenizer, hf.Gemma4VideoProcessor()
    layers = ["sliding_attention", "full_attention", "full_attention"]
    text = kit.text | dict(head_dim=32, global_head_dim=64, sliding_window=8, layer_types=layers)
    text |= dict(hidden_size_per_layer_input=16, vocab_size_per_layer_input=len(kit.tokenizer))
    text |= dict(num_kv_shared_layers=1, pad_token_id=0)  # vLLM takes 0 for an image's tokens
    vision = TOWER | dict(num_key_value_heads=2, head_dim=16, **merging)
    vision |= dict(position_embedding_size=128, default_output_length=70)
    ids = dict(boi_token_id=kit.id_of("<|image>"), eoi_token_id=kit.id_of("<image|>"))
    ids["video_token_id"] = kit.id_of("<|video|>")
    for kind in ("image", "audio"):
        ids[f"{kind}_token_id"] = getattr(kit.tokenizer, f"{kind}_token_id")
    config = dict(text_config=text, vision_config=vision, audio_config=None, **ids)
    return hf.Gemma4Processor(*parts, **kit.template), config


def tiny_family(name: str, folder: Path) -> Path:
    """Write a random tiny model of a family, float32, and its processor; an image of 56 x 56 is 4
    to 34 tokens."""
    kit = Kit(name)
    processor, settings = globals()[f"tiny_{name}"](kit)
    tied = name in ("gemma3", "qwen2_vl", "gemma4")
    config = AutoConfig.for_model(name, **settings, tie_word_embeddings=tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for p in network.parameters():
            # wide enough, and never 0 (Gemma 3's projector), so that the image matters
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.1)
    network.generation_config.eos_token_id = kit.tokenizer.eos_token_id
    network.generation_config.pad_token_id = kit.tokenizer.pad_token_id
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    if name in ("llava", "llava_onevision", "gemma3"):  # on the hub a module is around the tower
        weights = {k.replace("tower.", "tower.vision_model."): v for k, v in weights.items()}
    if name == "qwen3_vl_moe":  # and the experts are transposed
        for key in [key for key in weights if ".experts." in key]:
            weights[key] = weights[key].transpose(1, 2).contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    return Path(folder)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: tiny_family(name, folder / name))


# --------------------------------------------------------------------------------------------------
# Builders: runs


def nursery(jobs):
    """For every job, fork its ranks and answer how they ended.

    A job names a function of this file, which a rank calls. Any rank that fails ends the others.

    Args:
        jobs: a file to read a line of JSON from, and to write the exit code of the first rank that
            failed to, else 0.
    """
    for number, line in enumerate(jobs):
        if number == 0:
            import_all()
        job = json.loads(line)
        Path(job["log"]).write_text("")
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        ranks = set()
        for rank in range(job["ranks"]):
            child = os.fork()
            if child == 0:
                be_rank(job, rank, port)
            ranks.add(child)
        first_failure = 0
        while ranks:
            child, status = os.wait()
            ranks.remove(child)
            code = os.waitstatus_to_exitcode(status)
            if code and not first_failure:
                first_failure = code
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
        print(first_failure, file=jobs, flush=True)


def import_all():
    """Import what transformers imports only when it is used; its pages stay shared with forks."""
    with tempfile.TemporaryDirectory() as folder:
        model.Actor.from_pretrained(str(tiny_model.build_tiny(Path(folder), ["a b"])))
    gc.collect()
    gc.freeze()


def be_rank(job, rank, port):
    """Run a job in this process as torchrun would, and end it without what Python does at exit."""
    code = 1
    signal.alarm(job["seconds"])
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
        for place in (1, 2, sys.stdout.fileno(), sys.stderr.fileno()):  # also where pytest captures
            os.dup2(log, place)
        if job["ranks"] > 1:
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(job["ranks"]))
        sys.argv = [job["function"], *map(str, job["arguments"])]
        globals()[job["function"]](*job["arguments"])
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


@functools.cache
def start_nursery():
    """A fork of this process that runs nursery(); it ends with this one. Returns its jobs."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        try:
            ours.close()
            os.environ |= ENVIRONMENT
            nursery(theirs.makefile("rw"))
        finally:
            os._exit(0)
    theirs.close()
    return ours.makefile("rw")


@pytest.fixture(scope="session", autouse=True)
def early_nursery():
    """Forked before this process has threads, of engines and process groups."""
    start_nursery()


def launch(function, *arguments, ranks=1, seconds=170):
    """Call a function of this file in `ranks` fresh processes.

    Returns the exit code of the first rank that failed, else 0, and what all ranks printed.
    """
    jobs = start_nursery()
    with tempfile.NamedTemporaryFile("r") as log:
        job = dict(
            function=function, arguments=arguments, ranks=ranks, seconds=seconds, log=log.name
        )
        print(json.dumps(job), file=jobs, flush=True)
        code = int(jobs.readline())
        return code, log.read()


def run_apart(function, *arguments, **options):
    """launch for what has to succeed; returns what was printed."""
    code, log = launch(function, *arguments, **options)
    assert code == 0, log[-6000:]
    return log


def torchrun(*command, ranks=2, restarts=0, **env):
    """The real torchrun. Returns the exit code and what was printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
    done = subprocess.run(
        [sys.executable, *launcher, f"--nproc_per_node={ranks}", *map(str, command)],
        env=os.environ | ENVIRONMENT | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=170,
    )
    return done.returncode, done.stdout


SHORT = (
    "--prompts_per_step 8 --minibatch_prompts 4 --responses_per_prompt 4 --max_response_tokens 24"
    " --steps 3 --eval_every 3 --eval_rows 10 --save_every 3"
).split()


def learning_steps(folder):
    return [row for row in metrics(folder) if "train/reward" in row]


def copy_start(start, folder):
    shutil.copytree(start, folder, dirs_exist_ok=True)
    return folder


def train_whole(start, folder, *flags, **options):
    """A run that has to end well, from a copy of `start`; returns the run's folder."""
    code, log = train_apart(copy_start(start, folder), *flags, **options)
    assert code == 0, log[-6000:]
    return folder / "tiny"


@pytest.fixture(scope="session")
def finished(seedling, tmp_path_factory):
    """The folder of a short run that has ended."""
    return train_whole(
        seedling,
        tmp_path_factory.mktemp("finished"),
        *SHORT,
        "--kl_coefficient",
        "0.1",
        "--eval_samples",
        "4",
        "--minibatch_prompts",
        "8",
    )


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


def faulty_run(argv, faults):
    """train.py with a reward that is never flat, and with faults.

    Faults: `kill`, see strike, on rank `rank`; `file_bytes`, which no file can exceed, as if the
    disk were full; `memory`, the GPU's is full; `watch`, a file to note this process's needs in.
    """
    reward.REWARDS |= dict(varied=varied, rare=rare)
    if "watch" in faults:
        watch(Path(faults["watch"]))
    if "memory" in faults:
        train.scored_minibatch = out_of_memory
    if "file_bytes" in faults:
        resource.setrlimit(resource.RLIMIT_FSIZE, (faults["file_bytes"], resource.RLIM_INFINITY))
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if "kill" in faults and first_life and int(os.environ.get("RANK", 0)) == faults.get("rank", 0):
        strike(faults["kill"])
    sys.argv = [faults.get("script", "train.py"), *argv]
    if "script" in faults:
        runpy.run_path(faults["script"], run_name="__main__")
    else:
        train.main(argv)


def varied(problem, response, gold):
    return random.random()  # from a global random state


def rare(problem, response, gold):
    return float(random.random() < 0.2)


def out_of_memory(*_):
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


STEPS = (
    "--preset tiny --engine hf --freeze_vision false --kl_coefficient 0 --steps 6 --save_every 2"
    " --prompts_per_step 2 --minibatch_prompts 1 --responses_per_prompt 2 --max_response_tokens 4"
    " --eval_every 3 --eval_rows 2 --rewards accuracy=0.5,varied=1"
).split()


def own_flags():
    """The user's own settings: FLAGS="--optimizer mine" pytest test_all.py -k killed_again."""
    return shlex.split(os.environ.get("FLAGS", ""))


def argv_of(folder, *flags):
    """A run of a few small steps in a folder."""
    return [*STEPS, "--out", str(folder), "--resume", "auto", *own_flags(), *flags]


def train_apart(folder, *flags, ranks=1, seconds=170, **faults):
    """train.py in a folder; returns its exit code and what it printed. Faults: see faulty_run."""
    return launch("faulty_run", argv_of(folder, *flags), faults, ranks=ranks, seconds=seconds)


@pytest.fixture(scope="session")
def seedling(tmp_path_factory):
    """Figures and a random model of one layer: a run on them takes 3 seconds."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("seedling")
    figures.make_figures(folder / "figures", train=20, test=10)
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


# --------------------------------------------------------------------------------------------------
# grpo.py


def test_advantages_by_hand():
    # rewards 1,0,0,0: mean 1/4, squares 9/16 and 3 times 1/16, over n - 1 = 3: std 1/2
    got = grpo.group_advantages(torch.tensor([[1.0, 0, 0, 0]]))
    close(got, torch.tensor([[1.5, -0.5, -0.5, -0.5]]), atol=1e-4)


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


def test_dual_clip_by_hand():
    # A = -2: r A = -8 at r = 4, so the loss 8 is held at 3 * 2; at r = 2 it is 4 and free
    logprobs = torch.tensor([math.log(4), math.log(2), math.log(4)], requires_grad=True)
    advantages = torch.tensor([-2.0, -2.0, 2.0])  # a gain is held by the clip, never by this one
    inputs = (logprobs, torch.zeros(3), advantages, torch.tensor([3]), 0.2, 0.3)
    got, cut = grpo.policy_loss(*inputs, clip_dual=3.0)
    close(got, torch.tensor([6.0, 4.0, -2.6]))
    assert cut.tolist() == [True, False, True]
    close(torch.autograd.grad(got.sum(), logprobs)[0], torch.tensor([0.0, 4.0, 0.0]))
    close(grpo.policy_loss(*inputs)[0], torch.tensor([8.0, 4.0, -2.6]))


def test_a_ratio_beyond_float32_stays_finite():
    # e^200 is inf, and inf * 0 or inf - inf nan, even where the clip holds
    logprobs = torch.tensor([200.0, -200.0, 200.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.0])
    losses, _ = grpo.policy_loss(
        logprobs, torch.zeros(3), advantages, torch.tensor([3]), 0.2, 0.3, clip_dual=3.0
    )
    kl = grpo.kl_estimate(-logprobs, torch.zeros(3), "k3")
    close(losses, torch.tensor([-1.3, 0.8, 0.0]))
    close(kl, torch.tensor([10.0, grpo.MAX_K3, 10.0]))
    gradient = torch.autograd.grad((losses + kl).sum(), logprobs)[0]
    close(gradient, torch.zeros(3))


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


def test_look_weights_by_hand():
    # response 1 looks 3 and -1 nats, mean 2: shares 1.5 and 0.5; response 2 never looks
    looks, lengths = torch.tensor([3.0, -1.0, 0.0]), torch.tensor([2, 1])
    close(grpo.look_weights(looks, lengths, 1.0), torch.tensor([1.5, 0.5, 1.0]))
    close(grpo.look_weights(looks, lengths, 0.5), torch.tensor([1.25, 0.75, 1.0]))
    close(grpo.look_weights(looks, lengths, 0.0), torch.ones(3))


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
# model.py: scoring


def nothing(actor):
    return actor


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


def image_groups(actor):
    return random_groups(actor, (0, 1, 3, 2), ((3, 5), (4, 4, 1), (2, 9), (6,)))


def conversation_groups(actor):
    """Conversations of one to three turns between plain responses."""
    text, image = random_groups(actor, (0, 1), ((3, 5), (4, 2)))
    prompt, one, later, two = two_turns(actor)
    more = make(actor, "Once more.", later=True)
    conversations = [[one, later, two], [two], [two, more, one, later, one]]
    return [text, (prompt, conversations), image]


def mixed_groups(actor):
    """Text, images and videos, and a conversation in which a video arrives."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for prompt in mixed_prompts(actor):
        responses = [torch.randint(0, 250, (n,), generator=generator) for n in (3, 5)]
        groups.append((prompt, [[response] for response in responses]))
    clip = media_problem("<video>Now?", 0, stills(2, 56, 84))
    [one], [two] = groups[0][1]
    groups[1][1].append([one, build_reader(actor.processor).later(clip), two])
    return groups


def freeze_vision(actor):
    actor.freeze("tower", "projector")
    return actor


def slide_windows(actor):
    """Every second layer sees six tokens back."""
    config = copy.deepcopy(actor.model.config)
    config.text_config.sliding_window, config.text_config.use_sliding_window = 6, True
    config.text_config.layer_types = ["sliding_attention", "full_attention"] * 2
    network = hf.Qwen2_5_VLForConditionalGeneration(config).eval()
    network.load_state_dict(actor.model.state_dict())
    return model.Actor(network, actor.processor)


def checkpoint_layers(actor):
    actor.model.gradient_checkpointing_enable()
    return actor


# the model, what is done to it, what it scores, and images and videos of which features are kept
LAYOUT_CASES = {
    "plain": ("untied", nothing, image_groups, None),
    "tied": ("tied", nothing, image_groups, None),
    "frozen tower": ("untied", freeze_vision, image_groups, (0 + 1 + 3 + 2, 0)),
    "checkpointing": ("untied", checkpoint_layers, image_groups, None),
    "LoRA": ("untied", with_lora, image_groups, (0 + 1 + 3 + 2, 0)),
    "sliding window": ("untied", slide_windows, image_groups, None),
    "conversations": ("untied", nothing, conversation_groups, None),
    "conversations, frozen tower": ("untied", freeze_vision, conversation_groups,
    (2 + 2 + 2 + 1, 0)),
    "conversations, Qwen3-VL": ("qwen3_vl", nothing, conversation_groups, None),
    "video": ("untied", nothing, mixed_groups, None),
    "video, frozen tower": ("untied", freeze_vision, mixed_groups, (1 + 2 + 1, 1 + 1 + 2)),
}  # fmt: skip


def assert_same_in_every_layout(actor, groups):
    """Log-probs and all gradients; returns the padded forward's log-probs."""
    expected, expected_gradients = gradients(actor, groups, "padded")
    for packing in ("packed", "shared"):
        got, got_gradients = gradients(actor, groups, packing)
        close(got, expected, atol=1e-5)
        assert_same_gradients(got_gradients, expected_gradients)
    return expected


@pytest.mark.parametrize("case", LAYOUT_CASES)
def test_every_layout_gives_the_same_logprobs_and_gradients(tiny, family_folder, case):
    name, prepare, groups_of, kept = LAYOUT_CASES[case]
    folder = {"untied": tiny[False], "tied": tiny[True]}.get(name) or family_folder(name)
    actor = prepare(model.Actor.from_pretrained(str(folder)))
    groups = groups_of(actor)
    expected = assert_same_in_every_layout(actor, groups)
    features = actor.image_features(model.prompts_of(model.turns_of(groups)))
    if kept:
        counts = Counter({kind: len(held.pooler_output) for kind, held in features.items()})
        assert (counts["image"], counts["video"]) == kept
        close(actor.logprobs(groups, features)[0], expected, atol=1e-5)
    else:
        assert features is None


def test_checkpointed_layers_run_again_in_the_backward_and_generation_goes_on(actor, process_group):
    actor.model.gradient_checkpointing_enable()
    groups = image_groups(actor)
    layer, calls = actor.model.model.language_model.layers[1].mlp, []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(actor, groups, "shared")
    assert len(calls) == 2
    prompt, _ = groups[1]
    [rollouts] = draw(rollout.HFEngine(actor, 3), [prompt], 2)
    assert len(rollouts) == 2 and actor.model.training


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
    monkeypatch.setattr(model, "padded_batches", lambda layout, *_: _everyone_sees_all(layout))
    with pytest.raises(
        RuntimeError, match=r"packing 'shared' is not exact for Qwen2_5_VLFor.*--packing padded"
    ):
        actor.check_packing(prompts)


def _everyone_sees_all(layout):
    n = layout.segments[-1][1]
    return [
        (
            torch.arange(n)[None],
            torch.ones(1, n, dtype=torch.bool),
            torch.arange(n)[None],
            torch.ones(1, 1, n, n).tril().bool(),
        )
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_meter_counts_what_one_forward_keeps_for_its_backward(actor, checkpointing):
    if checkpointing:
        actor.model.gradient_checkpointing_enable()
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


def test_packs_refuse_what_they_cannot_keep_apart(actor):
    prompt = prompts_with(actor, 0)[0]
    with pytest.raises(ValueError, match="empty response"):
        actor.logprobs([(prompt, [[torch.tensor([], dtype=torch.long)]])])
    with pytest.raises(ValueError, match="layout"):
        actor.model(input_ids=prompt.ids[None])
    with pytest.raises(ValueError, match="'tight'"):
        model.Actor(actor.model, actor.processor, packing="tight")


def make_request(targets, banned=(), temperature=1.0, softcap=None, entropy="value", chunk=4):
    banned = torch.tensor(banned, dtype=torch.long)
    return model.Request(targets, banned, temperature, softcap, entropy, chunk)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_chunked_logprobs_equal_log_softmax_with_gradients(softcap):
    torch.manual_seed(0)
    h = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    request = make_request(torch.randint(0, 7, (10,)), [7, 8], 0.7, softcap, "gradient")
    logits = h @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits / 0.7).index_fill(-1, request.banned, -torch.inf)
    expected = logits.log_softmax(-1).gather(-1, request.targets[:, None])[:, 0]
    got, entropy = model.ChunkedLogprobs.apply(h, weight, request)
    close(got, expected)
    close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert torch.autograd.gradcheck(
        lambda h, w: model.ChunkedLogprobs.apply(h, w, request), (h, weight)
    )
    got, entropy = model.ChunkedLogprobs.apply(
        h, weight, dataclasses.replace(request, entropy="value")
    )
    assert got.requires_grad and not entropy.requires_grad


def test_the_head_holds_one_chunk_of_logits_however_many_tokens():
    # 64 rows of 50,000 float32 are 12.2 MiB; all 640 rows would be 122
    few, many = (float(run_apart("print_peak_of_the_head", rows)) for rows in (64, 640))
    assert few < 3 * 12.2  # logits and log-probs, side by side for a moment
    assert many - few < 12.2


def print_peak_of_the_head(rows):
    """MiB that one forward and backward of the head takes at most."""
    give_back_blocks_of(2**20)
    h, weight = (torch.randn(n, 16, requires_grad=True) for n in (rows, 50_000))
    targets, banned = torch.randint(0, 1000, (rows,)), torch.tensor([], dtype=torch.long)
    request = model.Request(targets, banned, 1.0, None, "value", 64)
    before = reset_peak()
    model.ChunkedLogprobs.apply(h, weight, request)[0].sum().backward()
    print(mebibytes("VmHWM") - before)


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
        (
            "input_ids",
            "attention_mask",
            "position_ids",
            "labels",
            "pixel_values",
            "image_grid_thw",
            "pixel_values_videos",
            "video_grid_thw",
            "image_sizes",
            "pixel_attention_mask",
            "row",
            "answer",
        ),
        torch.zeros(1),
    )
    batch["second_per_grid_ts"] = None  # a field that this batch does not have
    cases = [
        (
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLConfig(),
            {"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"},
        ),
        (
            LlavaOnevisionForConditionalGeneration,
            LlavaOnevisionConfig(),
            {"pixel_values", "image_sizes", "pixel_values_videos"},
        ),
        (
            Idefics3ForConditionalGeneration,
            Idefics3Config(pad_token_id=0),
            {"pixel_values", "pixel_attention_mask"},
        ),
    ]
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


def test_the_entropys_gradient_by_hand():
    # logits log 3 and 0: p = 3/4, 1/4; H = 3/4 log 4/3 + 1/4 log 4 = 0.5623;
    # dH/dz = -p (log p + H) = -3/4 (-0.2877 + 0.5623), -1/4 (-1.3863 + 0.5623)
    h = torch.tensor([[math.log(3.0), 0.0]], requires_grad=True)
    request = make_request(torch.tensor([0]), entropy="gradient")
    _, entropy = model.ChunkedLogprobs.apply(h, torch.eye(2), request)
    close(entropy, torch.tensor([0.562335]))
    entropy.sum().backward()
    close(h.grad, torch.tensor([[-0.205990, 0.205990]]), atol=1e-5)


def test_entropy_has_a_gradient_where_it_is_asked_for_and_costs_nothing_where_not(
    actor, monkeypatch
):
    groups, results = random_groups(actor), {}
    for packing in ("padded", "packed", "shared"):
        actor.use_packing(packing)
        actor.model.zero_grad()
        _, entropy = actor.logprobs(groups, entropy="gradient")
        (torch.linspace(-1, 1, len(entropy)) * entropy).sum().backward()
        found = {n: p.grad.clone() for n, p in actor.model.named_parameters() if p.grad is not None}
        results[packing] = entropy.detach(), found
    for entropy, found in results.values():
        close(entropy, results["padded"][0], atol=1e-5)
        assert_same_gradients(found, results["padded"][1])
    assert not actor.logprobs(groups)[1].requires_grad
    monkeypatch.setattr(torch.special, "entr", None)
    logprobs, entropy = actor.logprobs(groups, entropy="none")
    logprobs.sum().backward()
    assert not entropy.any()


def test_the_softcap_bends_logits_by_hand():
    # cap 2: logits 2 atanh(1/2) = 1.0986 and 0 become 1 and 0, then temperature 1/2: 2 and 0
    h = torch.tensor([[2 * math.atanh(0.5), 0.0]])
    request = make_request(torch.tensor([0]), temperature=0.5, softcap=2.0)
    logprobs, _ = model.ChunkedLogprobs.apply(h, torch.eye(2), request)
    close(logprobs, torch.tensor([-math.log(1 + math.exp(-2))]))


def test_softcaps_and_images_that_see_forwards_in_windows_alone_follow_the_config(
    actor, monkeypatch
):
    gemma = gemma4_with_everything(actor.processor)
    assert gemma.softcap == 3 and gemma.whole_images == "windows"
    generator = torch.Generator().manual_seed(0)
    groups = []
    for images, lengths in ((2, (3, 5)), (0, (4, 4, 1)), (1, (2, 9))):
        responses = [[torch.randint(1, 250, (n,), generator=generator)] for n in lengths]
        groups.append((gemma4_prompt(images), responses))
    assert_same_in_every_layout(gemma, groups)
    prompts = [gemma4_prompt(2), gemma4_prompt(0)]
    assert gemma.check_packing(prompts) < 1e-5
    assert gemma.model.config.text_config.final_logit_softcapping == 3  # as it was
    for wrong in ("everywhere", "nowhere"):
        monkeypatch.setattr(model.Actor, "whole_images", wrong)
        with pytest.raises(RuntimeError, match="not exact for Gemma4For"):
            gemma.check_packing(prompts)


def test_a_wrong_mask_is_refused_in_bfloat16_too(tiny, monkeypatch):
    actor = model.Actor.from_pretrained(str(tiny[False]), torch.bfloat16)
    prompts = prompts_with(actor, 2, 0)
    assert 1e-4 < actor.check_packing(prompts) < 0.01  # above the floor of float32
    monkeypatch.setattr(model, "padded_batches", lambda layout, *_: _everyone_sees_all(layout))
    with pytest.raises(RuntimeError, match="packing 'shared' is not exact"):
        actor.check_packing(prompts)


# --------------------------------------------------------------------------------------------------
# model.py: kernels of a GPU


@pytest.mark.parametrize("window", [None, 4])
def test_what_the_kernels_are_asked_for_is_what_the_dense_attention_computes(
    tiny, monkeypatch, window
):
    config = AutoConfig.from_pretrained(tiny[False])
    if window:
        config.text_config.sliding_window, config.text_config.use_sliding_window = window, True
        config.text_config.layer_types = ["sliding_attention", "full_attention"] * 2
    config.vision_config.window_size = 56  # 4 windows in an image of 84 x 56, of two sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    actor = model.Actor(network, AutoProcessor.from_pretrained(tiny[False]))
    groups = random_groups(actor)
    expected, expected_gradients = gradients(actor, groups, "shared")
    calls = []
    force_kernels(
        monkeypatch, lambda *args, **options: calls.append(args) or plain_varlen(*args, **options)
    )
    got, got_gradients = gradients(actor, groups, "shared")
    assert len(calls) == config.vision_config.depth + config.text_config.num_hidden_layers
    assert len({len(args[3]) for args in calls}) == 3  # images, their windows, segments of the pack
    close(got, expected, atol=1e-5)
    assert_same_gradients(got_gradients, expected_gradients)


def test_layers_whose_images_see_forwards_do_not_take_the_kernel(actor, monkeypatch):
    gemma = gemma4_with_everything(actor.processor)
    groups = [(gemma4_prompt(2), [[torch.tensor([5, 6, 7])], [torch.tensor([8, 9])]])]
    expected, calls = gemma.logprobs(groups)[0], []
    force_kernels(
        monkeypatch, lambda *args, **options: calls.append(args) or plain_varlen(*args, **options)
    )
    close(gemma.logprobs(groups)[0], expected, atol=1e-5)
    assert [args[0].shape[-1] for args in calls] == [32, 32]  # the full layers' larger heads


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_towers_of_all_qwens_take_the_kernel(name, family_folder, monkeypatch):
    actor = model.Actor.from_pretrained(str(family_folder(name)))
    groups = random_groups(actor)
    expected = actor.logprobs(groups)[0]
    force_kernels(monkeypatch, plain_varlen)
    actor.use_packing("padded")  # text by sdpa, so the tower alone differs
    close(actor.logprobs(groups)[0], expected, atol=2e-5)
    assert actor.model.config.vision_config._attn_implementation == "flash_tower"


class CountsAreReal(FakeTensorMode):
    """Fake tensors, which have shapes and no values, but for integers on the CPU: grids, windows
    and layouts are computed."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(self, func, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.arg_tree_leaves(*args, **(kwargs or {}))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        if any(isinstance(x, torch.device) and x.type != "cpu" for x in leaves):
            return super().dispatch(func, types, args, kwargs)
        if tensors and all(is_count(x) for x in tensors):
            return func(*args, **(kwargs or {}))
        out = super().dispatch(func, types, args, kwargs)
        makes_counts = isinstance(out, torch.Tensor) and not out.is_floating_point()
        return func(*args, **(kwargs or {})) if makes_counts and not tensors else out


def is_count(tensor):
    return not isinstance(tensor, FakeTensor) and not tensor.is_floating_point()


def watched_varlen(calls):
    """The kernel's own wrapper, which knows shapes and gradients of fake tensors, and its calls."""

    def watched(*args, **options):
        check_varlen_arguments(*args)
        calls.append(args)
        return varlen_attn(*args, **options)

    return watched


def test_the_kernel_path_runs_forward_and_backward_at_full_width_under_fsdp(tiny):
    assert "all checked" in run_apart("check_kernels_under_fsdp", str(tiny[False]))


def check_kernels_under_fsdp(folder):
    """Rank 0 of 8 that are not there, tensors without values: shapes, dtypes and gradients."""
    processor = model.Actor.from_pretrained(folder).processor
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = []
        force_kernels(monkeypatch, watched_varlen(calls))
        for size, frozen in (("3B", False), ("7B", True)):
            calls.clear()
            with CountsAreReal():
                config = sized_config(folder, size)
                network = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
                actor = model.Actor(network, processor)
                if frozen:
                    actor.freeze("tower", "projector")
                actor.model.gradient_checkpointing_enable()
                actor.shard(torch.device("cpu"))
                groups = random_groups(actor, (2, 0, 1), ((300, 500), (40,), (7, 1)))
                features = actor.image_features([prompt for prompt, _ in groups])
                assert (features is None) != frozen
                logprobs, entropy = actor.logprobs(groups, features, entropy="gradient")
                assert logprobs.shape == entropy.shape == (848,) and logprobs.dtype == torch.float32
                assert len(calls) == 5  # 2 layers, and 3 of the tower
                assert {args[0].dtype for args in calls} == {torch.bfloat16}
                (logprobs.sum() + entropy.sum()).backward()
                assert len(calls) == 5 + (2 if frozen else 5)  # recomputed
                for name, p in actor.model.named_parameters():
                    assert p.requires_grad == (not frozen or actor.part(name) == "language")
                    if p.requires_grad:
                        assert isinstance(p.grad, DTensor) and p.grad.dtype == torch.float32
                        assert p.grad.shape == p.shape, name
    print("all checked")


def test_the_kernel_path_brings_everything_to_the_models_device(tiny, monkeypatch):
    # the device "meta" has no values, and refuses to meet the CPU as a GPU does
    processor, calls = model.Actor.from_pretrained(str(tiny[False])).processor, []
    force_kernels(monkeypatch, watched_varlen(calls))
    with CountsAreReal():
        with torch.device("meta"):
            config = sized_config(tiny[False], "7B")
            network = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        actor = model.Actor(network, processor)
        groups = random_groups(actor, (0, 0), ((300, 500), (7, 1)))
        logprobs, _ = actor.logprobs(groups)
        logprobs.sum().backward()
        assert {p.grad.device.type for p in network.parameters() if p.grad is not None} == {"meta"}
    q, k = calls[0][:2]
    tokens = sum(len(prompt.ids) for prompt, _ in groups) + 808
    again = 2 * len(groups[0][0].ids) + 2 * len(groups[1][0].ids)  # a prompt for each response
    assert q.shape == (tokens, 28, 128) and k.shape == (tokens + again, 4, 128)


# --------------------------------------------------------------------------------------------------
# model.py: what is trained


def test_lora_adapts_the_language_model_alone_and_keeps_the_base_bit_for_bit(actor):
    before = {n: p.clone() for n, p in actor.model.named_parameters()}
    groups = random_groups(actor)
    base = actor.logprobs(groups)[0].detach()
    actor.add_lora(4, 8.0)
    adapted = {n.split(".lora_")[0] for n, p in actor.model.named_parameters() if p.requires_grad}
    layers = [f"model.language_model.layers.{i}." for i in range(4)]
    assert adapted == {
        layer + name
        for layer in layers
        for name in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        )
    }
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


def test_weights_have_lora_merged_and_equal_a_plain_model(actor, tmp_path):
    with_lora(actor)
    weights = dict(actor.weights(torch.float32))
    layer = actor.model.model.language_model.layers[1].mlp.down_proj
    a, b = (getattr(layer, f"lora_{x}")["default"].weight for x in "AB")
    merged = layer.base_layer.weight + 8 / 4 * b @ a
    close(weights["model.layers.1.mlp.down_proj.weight"], merged)  # the hub's name
    actor.save(tmp_path)
    plain = model.Actor.from_pretrained(str(tmp_path))
    groups = random_groups(actor)
    close(plain.logprobs(groups)[0], actor.logprobs(groups)[0], atol=1e-5)


def test_an_actor_serves_a_notebook_without_processes(tiny):
    printed = run_apart("use_in_a_notebook", str(tiny[True])).splitlines()[-1]
    parts = "language 0.63M of 0.63M, projector 0.20M of 0.20M, tower 0.30M of 0.30M"
    assert printed == f"True parameters trained: {parts}"


def use_in_a_notebook(folder):
    network = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
    actor = model.Actor(network, AutoProcessor.from_pretrained(folder))
    image = Image.new("RGB", (56, 84), "red")
    prompts = [actor.prompt("<image>How many sides?", [image]), actor.prompt("Which colour?")]
    drawn = draw(rollout.HFEngine(actor, max_response_tokens=6), prompts, 3)
    gaps = []
    for switch in ("enable", "disable"):
        getattr(actor.model, f"gradient_checkpointing_{switch}")()
        logprobs, _ = actor.logprobs(as_groups(prompts, drawn))
        logprobs.sum().backward()
        gaps.append((logprobs - sampled(drawn)).abs().max().item())
    actor.save(Path(folder) / "again")
    print(max(gaps) < 1e-5, actor.summarize_trained())


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
        match=r"--lora_targets q_proj,qkv,experts: .* no layer experts, qkv; it has all, down_proj",
    ):
        actor.add_lora(4, 8.0, targets="q_proj,qkv,experts")


def test_dropout_of_the_adapters_acts_while_learning_only(actor):
    with_lora(actor, dropout=0.5)
    groups = random_groups(actor)
    with torch.no_grad():
        assert torch.equal(actor.logprobs(groups)[0], actor.logprobs(groups)[0])
    assert not torch.equal(actor.logprobs(groups)[0], actor.logprobs(groups)[0])
    assert (
        actor.check_packing(prompts_with(actor, 2, 0)) < 1e-5
    )  # which compares forwards, not draws


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
    actor.shard(torch.device("cpu"), torch.float32)
    for name, p in actor.model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    close(actor.logprobs(groups)[0], plain.logprobs(groups)[0], atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in actor.model.parameters() if p.requires_grad], lr=1e-3)
    before = actor.logprobs(groups)[0]
    (-before.mean()).backward()
    optimizer.step()
    assert actor.logprobs(groups)[0].mean() > before.mean()


@pytest.mark.parametrize(
    "flags, ranks", [((), 2), (("--lora_rank", "4", "--learning_rate", "1e-2"), 1)]
)
def test_an_exported_checkpoint_scores_as_the_trainer_in_a_fresh_process(
    seedling, tmp_path, process_group, flags, ranks
):
    checkpoint = (
        train_whole(seedling, tmp_path, *SHORT, *flags, ranks=ranks) / "checkpoints" / "step-000003"
    )
    out = tmp_path / "exported"
    run_apart("run_model", "export", str(checkpoint), str(out))
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
    # beside AdamW's moments, "NAME exp_avg", and the run's counts
    assert [n for n in unknown if " " not in n and not n.startswith("run.")] == []
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
    got = run_apart("print_plain_scores", str(out), ids.tolist()).splitlines()[-1]
    close(torch.tensor(json.loads(got)), expected, atol=1e-4)

    if not flags:
        return
    run_apart("run_model", "export", str(checkpoint), str(tmp_path / "apart"), "--keep_adapter")
    from peft import PeftModel

    apart = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny-model"), tmp_path / "apart"
    )
    logits = apart(input_ids=ids[None]).logits[0, :-1]
    close(logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0], expected, atol=1e-4)


def run_model(*arguments):
    """python model.py ..."""
    sys.argv = ["model.py", *arguments]
    model.main()


def print_plain_scores(folder, ids):
    """Log-probs of a text under an exported model, by transformers alone."""
    ids = torch.tensor([ids])
    network = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    end = processor.tokenizer.eos_token_id
    assert processor.chat_template and network.generation_config.eos_token_id == end
    logprobs = network(input_ids=ids).logits[0, :-1].log_softmax(-1)
    print(logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist())


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


# --------------------------------------------------------------------------------------------------
# model.py: recorded conversations


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
        (
            f"<|im_start|>user\n<|vision_start|>{pad * 6}<|vision_end|>and<|vision_start|>"
            f"{pad * 6}<|vision_end|>Which?"
            "<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("look<|im_end|>", True),
        (
            f"\n<|im_start|>user\n<|vision_start|>{pad * 4}<|vision_end|>or<|vision_start|>"
            f"{pad * 6}<|vision_end|>Now?"
            "<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("sides<|im_end|>", True),
    ]
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
    assert torch.equal(pack.positions, positions)
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
        again,
        ids=join([again.ids, two, third.ids]),
        short_ids=join([again.short_ids, two, third.short_ids]),
        inputs=again.inputs
        | {"mm_token_type_ids": torch.zeros(1, len(again.ids) + len(two) + len(third.ids))},
    )
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
    asked = [
        make(actor, text, *images)
        for text, *images in (  # as turns: these small templates cannot be continued
            ("<image>Which?", picture(1, 28, 28)),
            ("<image>Now?", picture(2, 56, 28)),
            ("Sure?",),
            ("<image>Last?", picture(3, 112, 112)),
        )
    ]
    wholes, so_far = [asked[0]], asked[0].short_ids
    for i, later in enumerate(asked[1:], 2):
        so_far, images = (
            torch.cat([so_far, said, later.short_ids]),
            [image for p in asked[:i] for image in p.images],
        )
        inputs = dict(
            actor.processor(
                text=[tokenizer.decode(so_far)],
                images=images,
                add_special_tokens=False,
                return_tensors="pt",
            )
        )
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
    with pytest.raises(ValueError, match="its pixel_values are not those of earlier turns"):
        model.make_trace(trace, actor.family.image_axis)


def test_a_trace_may_go_on_with_nothing_new_to_read(actor):
    prompt, one, _, two = two_turns(actor)
    again = dataclasses.replace(
        prompt,
        ids=torch.cat([prompt.ids, one]),
        short_ids=torch.cat([prompt.short_ids, one]),
        inputs=prompt.inputs
        | {"mm_token_type_ids": torch.zeros(1, len(prompt.ids) + len(one), dtype=torch.long)},
    )
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
    with pytest.raises(ValueError, match=r"its ids are not those .*never from text"):
        model.make_trace([(prompt, spelled), (again, two)])
    a, b = picture(1, 84, 56), picture(3, 84, 56)
    other = make(actor, "<image>and<image>Which?", a, b)
    with pytest.raises(ValueError, match="its pixel_values are not those of earlier turns"):
        model.make_trace([(other, one), (again, two)])


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
        mixed.problem,
        torch.cat([mixed.ids, one, later.ids]),
        torch.cat([mixed.short_ids, one, later.short_ids]),
        mixed.images + later.images,
        joined | {"mm_token_type_ids": types},
        mixed.videos + later.videos,
    )
    got = model.make_trace([(mixed, one), (whole, one)])[2]
    assert torch.equal(got.ids, later.ids) and got.videos == later.videos and len(got.images) == 1
    assert all(torch.equal(got.inputs[name], value) for name, value in later.inputs.items())


def test_only_what_a_raise_of_ours_explains_loses_its_traceback():
    def caught(call):
        with pytest.raises((ValueError, RuntimeError)) as raised:
            call()
        return raised.value

    assert processes.is_explained(caught(lambda: reward.parse_weights("nothing=1")))
    for bug in (lambda: int("x"), lambda: torch.ones(2) @ torch.ones(3), lambda: json.loads("{")):
        assert not processes.is_explained(caught(bug))


PLANTED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from support import processes
processes.start_processes()
try:
    if processes.this_rank() == 1:
        raise KeyError("planted")
    time.sleep(100)  # as a collective on a GPU, which waits and cannot be interrupted
except Exception as error:
    processes.explain_failure(error)
    processes.end_failed()
"""


@pytest.mark.parametrize("file, argv, sentence", [
    ("model.py", "export nowhere out", "nowhere is no checkpoint of a run"),
    ("support/figures.py", "out --train 0", "a file needs a row"),
    ("support/tiny_model.py", "out --data train.csv", "train.csv"),
])  # fmt: skip
def test_every_command_ends_an_error_of_the_user_in_its_sentence(
    file, argv, sentence, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # a command is alone
    monkeypatch.setattr(sys, "argv", [file, *argv.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(HERE / file), run_name="__main__")
    told = capsys.readouterr().err
    assert ended.value.code == 1 and sentence in told
    assert told.startswith("error: ") and told.count("\n") == 1


def test_a_rank_that_fails_leaves_its_traceback_and_takes_the_others_down_within_seconds():
    with socket.create_server(("localhost", 0)) as free:
        place = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
    ranks = []
    for rank in range(2):
        env = os.environ | ENVIRONMENT | place | dict(RANK=str(rank), WORLD_SIZE="2")
        command = [sys.executable, "-c", PLANTED, str(HERE)]
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    _, first = ranks[1].communicate(timeout=90)
    start = time.monotonic()
    _, other = ranks[0].communicate(timeout=90)
    assert time.monotonic() - start < 10
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert first.count("KeyError: 'planted'") == 1 and "Traceback" in first
    assert other == ""


# --------------------------------------------------------------------------------------------------
# model.py: families


# what the forward takes beside text, for a prompt with images of 84 x 56 and 56 x 112 pixels
PIXELS = {
    **{name: dict(pixel_values=(56, 1176), image_grid_thw=(2, 3), mm_token_type_ids=None)
       for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v")},
    "internvl": dict(pixel_values=(6, 3, 56, 56)),
    "llava_onevision": dict(pixel_values=(2, 5, 3, 28, 28), image_sizes=(2, 2),
    batch_num_images=(2,)),
    "idefics3": dict(pixel_values=(1, 8, 3, 56, 56), pixel_attention_mask=(1, 8, 56, 56)),
    "gemma3": dict(pixel_values=(2, 3, 56, 56), token_type_ids=None),
    "llava": dict(pixel_values=(2, 3, 56, 56)),
    "mistral3": dict(pixel_values=(2, 3, 112, 84), image_sizes=(2, 2)),
    "gemma4": dict(pixel_values=(2, 280, 48), image_position_ids=(2, 280, 2),
    mm_token_type_ids=None),
}  # fmt: skip


def plain_logprobs(actor, groups):
    """The Hugging Face forward of every prompt with its response alone, its own masks and
    positions, no padding."""
    rows = []
    for prompt, responses in groups:
        for [response] in responses:
            types = {
                k: torch.nn.functional.pad(v, (0, len(response)))
                for k, v in prompt.inputs.items()
                if k in model.PER_TOKEN
            }
            ids = torch.cat([prompt.ids, response])[None]
            inputs = model.extract_multi_modal_inputs(actor.model, prompt.inputs | types)
            logits = actor.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs
            ).logits[0, len(prompt.ids) - 1 : -1]
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
        assert_same_gradients(
            {n: p.grad for n, p in actor.model.named_parameters() if p.grad is not None},
            slopes,
            tolerance=1e-4,
        )
    assert actor.packing == "shared"
    assert actor.freeze("tower", "projector") > 0
    features = actor.image_features([p for p, _ in groups])
    assert features is not None
    assert torch.equal(actor.logprobs(groups, features)[0], actor.logprobs(groups)[0])

    prompts = [p for p, _ in groups]
    drawn = draw(rollout.HFEngine(actor, 12), prompts, 2)
    actor.use_packing("padded")
    close(sampled(drawn), plain_logprobs(actor, as_groups(prompts, drawn)), atol=2e-5)

    inputs = model.extract_multi_modal_inputs(actor.model, prompts_with(actor, 2)[0].inputs)
    assert {
        k: None if k in model.PER_TOKEN else tuple(v.shape) for k, v in inputs.items()
    } == PIXELS[name]


@pytest.mark.filterwarnings("ignore:layers of type")
@pytest.mark.parametrize("name", CHATS)
def test_one_grpo_update_moves_a_familys_language_model_and_no_frozen_byte(
    name, family_folder, process_group
):
    run, groups = small_run(
        family_folder(name),
        prepare=lambda actor: actor.freeze("tower"),
        minibatch_prompts=8,
        max_sampler_gap=100.0,
        max_grad_norm=1e9,
    )
    before = {n: model.full(p).detach().clone() for n, p in run.actor.model.named_parameters()}
    [minibatch] = minibatches_of(run, groups)
    assert train.update(run, minibatch, 0, None)["grad_norm"] > 0
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
    monkeypatch.setattr(model, "USUAL", model.Family("eyes", "nerve"))
    with pytest.raises(
        ValueError, match=r"qwen2_5_vl is not in FAMILIES.*called one of \['eyes'\].*add an entry"
    ):
        model.family_of(actor.model)


@pytest.mark.parametrize("name, most, tokens", [
    ("internvl", 56 * 56, 4), ("internvl", 4 * 56 * 56, 20), ("llava_onevision", 28 * 56, 10),
    ("idefics3", 56 * 56, 4), ("idefics3", 4 * 56 * 56, 20), ("gemma3", 56 * 56, 16),
    ("qwen3_vl", 4 * 28 * 28, 4),
    ("glm4v", 4 * 28 * 28, 4), ("llava", 56 * 56, 16), ("mistral3", 56 * 60, 4),
    ("gemma4", 70 * 64, 64),
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


@pytest.mark.parametrize("name, message", [
    ("gemma3", "3135 cannot be obeyed by gemma3: its image processor makes 3136 pixels"),
    ("llava", "--max_pixels 3135 cannot be obeyed by llava"),
    ("gemma4", "3135 cannot be obeyed by gemma4: its images have at least 4480 pixels"),
])  # fmt: skip
def test_a_bound_on_pixels_that_a_family_cannot_obey_is_refused(name, message, family_folder):
    with pytest.raises(ValueError, match=message):
        model.Actor.from_pretrained(str(family_folder(name)), pixels=(28 * 28, 56 * 56 - 1))


MEDIA_INPUTS = {  # of the forwards of all image-text-to-text classes, those that a processor makes
    "actions",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "audio_feature_lengths",
    "audio_input_ids",
    "audio_input_ids_mask",
    "batch_num_images",
    "bbox",
    "feature_attention_mask",
    "flattened_patches",
    "height",
    "high_res_pixel_values",
    "image_embeds",
    "image_grid_hw",
    "image_grid_thw",
    "image_merge_sizes",
    "image_patches",
    "image_position_ids",
    "image_sizes",
    "image_sizes_videos",
    "input_features",
    "input_features_mask",
    "noise",
    "num_frames_per_video",
    "num_local_patches",
    "pixel_attention_mask",
    "pixel_mask",
    "pixel_values",
    "pixel_values_images",
    "pixel_values_local",
    "pixel_values_videos",
    "protein_attention_mask",
    "protein_input_ids",
    "qformer_attention_mask",
    "qformer_input_ids",
    "second_per_grid_ts",
    "spatial_shapes",
    "state",
    "target_sizes",
    "target_sizes_videos",
    "timestep",
    "video_compression_mask",
    "video_grid_thw",
    "video_merge_sizes",
    "video_position_ids",
    "video_second_per_grid",
    "visual_bbox",
    "width",
}


def test_every_input_of_every_class_of_transformers_is_known():
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    known = MEDIA_INPUTS | model.PER_TOKEN | model.TEXT_INPUTS | model.SETTINGS | {"self"}
    classes = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    new = {}
    for name in sorted(classes):
        forward = inspect.signature(getattr(hf, name).forward)
        unknown = forward.parameters.keys() - known
        if unknown:
            new[name] = sorted(unknown)
    assert len(classes) > 80 and new == {}, "media, per token, text or a setting?"
    cross = {"cross_attention_mask", "image_attention_mask", "image_embeds_position_mask"}
    assert cross < model.PER_TOKEN and "image_position_ids" not in model.PER_TOKEN


@pytest.mark.parametrize("name", CHATS)
def test_weights_have_the_hubs_names_and_layouts_from_a_loaded_model_and_its_export(
    name, family_folder, tmp_path
):
    hub = load_file(family_folder(name) / "model.safetensors")
    actor = model.Actor.from_pretrained(str(family_folder(name)))
    weights = dict(actor.weights(torch.float32))
    assert hub.keys() <= weights.keys()
    assert weights.keys() - hub.keys() <= {"lm_head.weight"}  # tied: once in a file
    assert all(torch.equal(weights[key], value) for key, value in hub.items())
    actor.save(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == hub.keys()
    assert all(torch.equal(saved[key], value) for key, value in hub.items())


def test_a_weight_of_the_hubs_that_transformers_has_cut_up_comes_when_its_last_part_is_there(actor):
    from transformers.core_model_loading import Chunk, WeightConverter

    parts = [f"self_attn.{x}_proj.weight" for x in "qkv"]
    cut = WeightConverter("self_attn.qkv_proj.weight", parts, [Chunk(dim=0)])
    actor.model._weight_conversions = [cut]
    weights = dict(actor.weights(torch.float32))
    for i, layer in enumerate(actor.model.model.language_model.layers):
        whole = weights[f"model.language_model.layers.{i}.self_attn.qkv_proj.weight"]
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        assert torch.equal(whole, torch.cat([x.weight for x in projections]))
    assert not any("q_proj.weight" in name for name in weights)


def test_recurrent_layers_keep_the_sequences_of_a_pack_apart():
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

    # two prompts, one shorter than the convolution looks back, with three responses and one
    segments = [
        (0, 70, 0, 0),
        (70, 75, 0, 70),
        (75, 76, 0, 70),
        (76, 150, 0, 70),
        (150, 152, 150, 150),
        (152, 156, 150, 152),
    ]
    layout, generator = model.Layout(segments), torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    x, weight = random(1, 6, 156), random(6, 4)
    q, k, v = random(1, 156, 2, 4), random(1, 156, 2, 4), random(1, 156, 2, 5)
    decay, writes = random(1, 156, 2), random(1, 156, 2)
    plain_conv = getattr(qwen, "conv_without_packs", qwen.causal_conv1d_fn)
    plain_rule = getattr(qwen, "rule_without_packs", qwen.torch_chunk_gated_delta_rule)

    def rule(function, rows, **more):
        g, beta = -decay[:, rows].exp(), writes[:, rows].sigmoid()
        out, _ = function(q[:, rows], k[:, rows], v[:, rows], g=g, beta=beta, **more)
        return out

    def conv(function, rows, **more):
        return function(x[:, :, rows], weight, None, activation="silu", **more).transpose(1, 2)

    everything = torch.arange(156)
    for run, plain, ours in (
        (conv, plain_conv, model.packed_conv),
        (rule, plain_rule, model.packed_delta_rule),
    ):
        got = run(functools.partial(ours, plain), everything, layout=layout)
        expected = []
        for start, end, prompt_start, prompt_end in segments:
            rows = torch.cat([torch.arange(prompt_start, prompt_end), torch.arange(start, end)])
            expected.append(run(plain, rows)[:, prompt_end - prompt_start :])
        expected = torch.cat(expected, 1)
        close(got, expected, atol=1e-5)
        inputs = (x, weight) if run is conv else (q, k, v, decay, writes)
        scores = torch.linspace(-1, 1, got.numel()).view_as(got)
        slopes = [torch.autograd.grad((scores * out).sum(), inputs) for out in (got, expected)]
        for slope, wanted in zip(*slopes, strict=True):
            close(slope, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_moe", "mistral3"])
def test_a_sharded_model_computes_in_bfloat16_what_the_whole_one_does_to_the_bit(
    name, family_folder, process_group
):
    whole, sharded = (
        model.Actor.from_pretrained(str(family_folder(name)), torch.bfloat16) for _ in range(2)
    )
    sharded.shard(torch.device("cpu"))
    groups = random_groups(whole)
    assert torch.equal(sharded.logprobs(groups)[0], whole.logprobs(groups)[0])
    text = random_groups(whole, (0,), ((3, 5),))  # gets a white image, which nothing looks at
    close(sharded.logprobs(text)[0], whole.logprobs(text)[0], atol=0.1)


def test_ranks_that_do_not_divide_the_processes_are_refused(process_group):
    with pytest.raises(ValueError, match="--shard_ranks 2 does not divide the 1 processes"):
        model.shard_mesh(torch.device("cpu"), 2)


def adapt_experts(actor, targets="q_proj,experts"):
    """LoRA on experts as after some training: both factors random."""
    actor.add_lora(4, 8.0, targets=targets)
    perturb(actor, "lora_B")


def test_every_expert_has_an_adapter_of_its_own_which_its_hub_weight_has_merged(
    family_folder, tmp_path
):
    actor = model.Actor.from_pretrained(str(family_folder("qwen3_vl_moe")))
    groups = random_groups(actor)
    base = dict(actor.weights(torch.float32))
    plain = actor.logprobs(groups)[0].detach()
    adapt_experts(actor)
    layer = "model.language_model.layers.2."
    trained = {name: p for name, p in actor.model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0] for name in trained if layer in name} == {
        layer + "self_attn.q_proj",
        layer + "mlp.experts",  # of down_proj
        layer + "mlp.experts.base_layer",  # of gate_up_proj
    }
    adapted = actor.logprobs(groups)[0]
    with actor.without_adapters():
        assert torch.equal(actor.logprobs(groups)[0], plain)
    assert (adapted - plain).abs().max() > 0.01
    adapted.mean().backward()
    slopes = {name: p.grad for name, p in actor.model.named_parameters() if p.grad is not None}
    assert slopes.keys() == trained.keys() and all(slope.any() for slope in slopes.values())

    weights = dict(actor.weights(torch.float32))
    a, b = (trained[f"{layer}mlp.experts.lora_{x}.default.weight"] for x in "AB")
    for e in range(4):  # rank 4, alpha 8; the hub has (in, out)
        product = 8 / 4 * b[:, e::4] @ a[4 * e : 4 * e + 4]
        name = layer + "mlp.experts.down_proj"
        close(weights[name][e], base[name][e] + product.T)
    changed = {name for name in base if not torch.equal(base[name], weights[name])}
    last_names = {name.removesuffix(".weight").split(".")[-1] for name in changed}
    assert last_names == {"q_proj", "gate_up_proj", "down_proj"} and len(changed) == 3 * 3
    actor.save(tmp_path)
    merged = model.Actor.from_pretrained(str(tmp_path))
    close(merged.logprobs(groups)[0], adapted, atol=1e-5)


def test_experts_are_adapted_by_name_alone_and_without_dropout(family_folder):
    for targets, last_names in (
        ("all", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("down_proj", {"experts"}),
        ("all,experts", {"q_proj", "k_proj", "v_proj", "o_proj", "experts", "base_layer"}),
    ):
        actor = model.Actor.from_pretrained(str(family_folder("qwen3_vl_moe")))
        actor.add_lora(4, 8.0, targets=targets)
        trained = [name for name, p in actor.model.named_parameters() if p.requires_grad]
        assert {name.split(".lora_")[0].split(".")[-1] for name in trained} == last_names
    actor = model.Actor.from_pretrained(str(family_folder("qwen3_vl_moe")))
    with pytest.raises(
        ValueError, match=r"--lora_dropout 0.1 .* an expert's has none.*set it to 0"
    ):
        actor.add_lora(4, 8.0, 0.1, "q_proj,experts")
    actor.add_lora(4, 8.0, 0.1, "q_proj")


@pytest.mark.parametrize("is_transposed", [False, True])
def test_an_adapters_product_has_the_layout_of_its_experts(is_transposed):
    layer = torch.nn.Module()
    layer.experts = torch.nn.Module()
    layer.experts.up = torch.nn.Parameter(torch.zeros(3, 5, 5))
    layer.experts.is_transposed = is_transposed
    settings = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=[], target_parameters=["experts.up"],
        init_lora_weights=False,
    )  # fmt: skip
    peft.inject_adapter_in_model(settings, layer)
    product = model.adapter_product(layer.experts)
    close(product, layer.experts.get_delta_weight("default"))  # what peft's forward adds
    assert product.norm() > 0.1


def test_adapters_of_experts_go_on_from_a_checkpoint_and_are_exported_merged_and_apart(
    family_folder, process_group, tmp_path
):
    folder = family_folder("qwen3_vl_moe")
    lora = dict(lora_rank=4, lora_alpha=8.0, lora_targets="q_proj,experts")
    run, groups = adam_run(folder, tmp_path, prepare=adapt_experts, **lora)
    learn(run, groups)
    checkpoint.save_checkpoint(run)
    again, _ = adam_run(folder, tmp_path, prepare=adapt_experts, **lora)
    assert not same(whole_state(again), whole_state(run))
    saved = checkpoint.newest_checkpoint(tmp_path / "tiny" / "checkpoints")
    checkpoint.load_checkpoint(again, saved)
    assert same(whole_state(again), whole_state(run))

    checkpoint.record_launch(run.settings)
    scored = random_groups(run.actor)
    expected = run.actor.logprobs(scored)[0]
    model.export(saved, tmp_path / "merged")
    merged = model.Actor.from_pretrained(str(tmp_path / "merged"))
    close(merged.logprobs(scored)[0], expected, atol=1e-5)
    model.export(saved, tmp_path / "apart", merge=False)
    network = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
    network = peft.PeftModel.from_pretrained(network, tmp_path / "apart").base_model.model
    apart = model.Actor(network, run.actor.processor)
    close(apart.logprobs(scored)[0], expected, atol=1e-5)


@pytest.mark.parametrize("name, prepare, packing", [
    ("qwen3_vl_moe", "adapt_experts", "shared"),
    ("qwen3_5", "nothing", "shared"),
    ("qwen3_5", "freeze_vision", "packed"),
])  # fmt: skip
def test_two_ranks_update_experts_and_recurrent_layers_as_one_that_pads(
    name, prepare, packing, family_folder, process_group, tmp_path
):
    folder, out = str(family_folder(name)), tmp_path / "two.pt"
    run_apart("save_one_update", folder, str(out), prepare, packing, ranks=2)
    two = torch.load(out, weights_only=True)
    totals, weights, _ = one_update(folder, packing="padded", prepare=globals()[prepare])
    assert two["loss"] == pytest.approx(totals["loss"], rel=1e-5)
    before = model.Actor.from_pretrained(folder)
    globals()[prepare](before)
    before = dict(before.model.named_parameters())
    moved = {n: w - before[n] for n, w in weights.items() if not torch.equal(w, before[n])}
    got = {n: w - before[n] for n, w in two["weights"].items() if not torch.equal(w, before[n])}
    assert_same_gradients(got, moved, tolerance=1e-4)


# --------------------------------------------------------------------------------------------------
# rollout.py: engines


def drawn_ids(engine, prompts, n, seed, **options):
    return [r.response.tolist() for rs in draw(engine, prompts, n, seed, **options) for r in rs]


def test_an_engine_closes_after_success_or_an_exit_but_not_after_a_failure():
    # closing after a failure could wait for ranks that never come, or free what sleeps twice
    class Counter(rollout.Engine):
        actor, closed = None, 0

        def close(self):
            self.closed += 1

    for error, closed in ((None, 1), (SystemExit, 1), (RuntimeError, 0), (KeyboardInterrupt, 0)):
        plain, inner = Counter(), Counter()
        for engine in (plain, rollout.Conversations(inner, rollout.Codeword, None, 0)):
            with contextlib.suppress(*[error] if error else []), engine:
                if error:
                    raise error
        assert (plain.closed, inner.closed) == (closed, closed)


def test_greedy_responses_to_one_prompt_are_all_the_same_so_several_are_refused(actor):
    engine = rollout.HFEngine(actor, max_response_tokens=8)
    with pytest.raises(ValueError, match=r"greedy with n=2: .* use n=1"):
        draw(engine, prompts_with(actor, 0), n=2, greedy=True)


def test_greedy_generation_prints_no_warning(actor, process_group, caplog):
    hf.utils.logging.enable_propagation()  # to pytest
    draw(rollout.HFEngine(actor, max_response_tokens=2), prompts_with(actor, 0), 1, greedy=True)
    hf.utils.logging.disable_propagation()
    assert "not valid" not in caplog.text


def test_sampler_logprobs_equal_the_trainers(engine):
    engine.actor.temperature = 0.7
    prompts = prompts_with(engine.actor, 0, 1, 3, 1)
    assert [len(rollouts) for rollouts in draw(engine, prompts, 5)] == [5, 5, 5, 5]
    assert largest_gap(engine.actor, engine, prompts, n=5) < 1e-4


def test_without_a_head_all_tokens_but_the_banned_ones_are_drawn_equally_often(engine):
    actor = engine.actor
    torch.nn.init.zeros_(actor.model.lm_head.weight)
    # none of this belongs to the trained distribution
    actor.model.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=2.0)
    engine.sync(actor)
    [rollouts] = drawn = draw(engine, prompts_with(actor, 1), 200)
    tokens = torch.cat([r.response for r in rollouts])
    allowed = actor.model.config.text_config.vocab_size - len(actor.banned_ids)
    assert not torch.isin(tokens, torch.tensor(actor.banned_ids)).any()
    assert len(tokens.unique()) > 0.95 * allowed
    close(sampled(drawn), torch.full((len(tokens),), -math.log(allowed)), atol=1e-5)


def test_a_response_ends_with_the_end_token_or_is_marked_truncated(engine):
    actor = engine.actor
    torch.nn.init.zeros_(actor.model.lm_head.weight)
    engine.sync(actor)
    [rollouts] = draw(engine, prompts_with(actor, 0), 100, seed=1)
    [end] = actor.eos_ids
    assert {r.truncated for r in rollouts} == {True, False}
    for r in rollouts:
        assert (r.response == end).sum() == (not r.truncated)
        assert len(r.response) == len(r.sampler_logprobs)
        assert len(r.response) == 24 if r.truncated else r.response[-1] == end
        assert "<|im_end|>" not in r.text(actor.processor.tokenizer)


def test_generation_is_fixed_by_its_seed_and_greedy_by_nothing(engine):
    prompts = prompts_with(engine.actor, 1, 0, 1)
    ids = functools.partial(drawn_ids, engine, prompts)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert ids(3, seed=1) == ids(3, seed=1) != ids(3, seed=2)
    assert len({tuple(r) for r in ids(4, seed=1)}) == 12  # no two responses share their noise
    likeliest = ids(1, seed=1, greedy=True)
    assert likeliest == ids(1, seed=2, greedy=True)
    assert likeliest == drawn_ids(rollout.HFEngine(engine.actor, 24), prompts, 1, 0, greedy=True)
    assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == threads


@needs_vllm
@pytest.mark.xdist_group("vllm")
@pytest.mark.parametrize("tied", [False, True])
def test_vllm_follows_the_trainer_through_every_kind_of_update(tiny, vllm, tied):
    actor = with_bounds(tiny[tied])
    actor.temperature = 0.7
    prompts = prompts_with(actor, 0, 1, 3)
    # longer than a block of vLLM's cache (128 tokens on a CPU), so that keys and values are reused
    prompts.append(ask(actor, problem("What?" * 60)))
    assert len(prompts[-1].ids) > 2 * 128
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    engine = vllm.engine_for(actor, tiny[tied])
    assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == threads
    assert largest_gap(actor, engine, prompts) < 1e-4
    # "visual" with the same images: an encoder output cached under the old weights must not survive
    for part in ("", "visual", "", "embed_tokens", "norm", "bias"):
        perturb(actor, part, 0.2 if part else 0.05)
        assert largest_gap(actor, engine, prompts) > 1e-2, f"{part!r} changed nothing"
        stats = engine.sync(actor)
        assert largest_gap(actor, engine, prompts) < 1e-4, part
    numbers = sum(v.numel() for v in actor.model.state_dict().values())
    assert stats["gigabytes"] == pytest.approx(4e-9 * numbers)
    assert stats["gigabytes_per_second"] > 0
    with_lora(actor)
    assert largest_gap(actor, engine, prompts) > 1e-2
    engine.sync(actor)
    assert largest_gap(actor, engine, prompts) < 1e-4


@needs_vllm
@pytest.mark.xdist_group("vllm")
@pytest.mark.parametrize("name", [
    "qwen3_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "internvl", "idefics3", "llava", "llava_onevision", "qwen3_vl_moe", "glm4v", "mistral3",
        "gemma4", "gemma3"))
])  # fmt: skip
def test_vllm_follows_other_families(name, family_folder, vllm):
    most = 70 * 64 if name == "gemma4" else MAX_PIXELS  # which enlarges images to its bound
    actor = model.Actor.from_pretrained(str(family_folder(name)), pixels=(MIN_PIXELS, most))
    # on a CPU vLLM lets no token of an image look forwards, as Gemma 3's do
    images = (0, 0, 0) if name == "gemma3" and not torch.cuda.is_available() else (0, 1, 2)
    prompts = prompts_with(actor, *images)
    engine = vllm.engine_for(actor, family_folder(name), max_videos=0)
    assert largest_gap(actor, engine, prompts) < 1e-4
    perturb(actor)
    assert largest_gap(actor, engine, prompts) > 1e-2
    engine.sync(actor)
    assert largest_gap(actor, engine, prompts) < 1e-4


@needs_vllm
@pytest.mark.xdist_group("vllm")
def test_vllm_serves_an_exported_model_with_its_adapters_merged(actor, vllm, tmp_path):
    with_lora(actor).save(tmp_path)
    exported = with_bounds(tmp_path)
    prompts = prompts_with(exported, 0, 1)
    engine = vllm.engine_for(exported, tmp_path)
    assert largest_gap(exported, engine, prompts) < 1e-4
    assert largest_gap(actor, engine, prompts) < 1e-4


@needs_vllm
@pytest.mark.xdist_group("vllm")
def test_vllm_refuses_another_prompt(tiny, vllm):
    actor = with_bounds(tiny[False])
    [prompt] = prompts_with(actor, 1)
    engine = vllm.engine_for(actor, tiny[False])
    resized = dataclasses.replace(prompt, images=[prompt.images[0].resize((56, 28))])
    with pytest.raises(RuntimeError, match="another prompt than the trainer"):
        draw(engine, [resized], 1)


LAYER = "model.language_model.layers.1."


@needs_vllm
@pytest.mark.xdist_group("vllm")
@pytest.mark.parametrize("name, message", [
    (LAYER + "self_attn.k_proj.weight", "were not in the model"),
    pytest.param(LAYER + "mlp.down_proj.weight", "were not in the model", marks=pytest.mark.slow),
    pytest.param(LAYER + "extra.weight", "extra", marks=pytest.mark.slow),
])  # fmt: skip
def test_vllm_refuses_another_model_and_ends_without_the_trainers_processes(
    tiny, vllm, name, message
):
    actor = with_bounds(tiny[False])
    weights = dict(actor.model.state_dict())
    if name in weights:
        del weights[name]
    else:
        weights[name] = torch.zeros(2)
    engine = vllm.engine_for(actor, tiny[False])
    with pytest.raises((RuntimeError, ValueError), match=message):
        engine.sync(SimpleNamespace(weights=lambda dtype: iter(weights.items())))
    vllm.close()  # it is not usable after that
    assert torch.distributed.is_initialized()


@needs_vllm
@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_vllm_follows_sharded_weights_on_two_ranks_and_the_gate_sees_a_missed_sync(tiny, tp):
    run_apart("check_vllm_on_two_ranks", str(tiny[tp == 1]), tp, ranks=2)


def check_vllm_on_two_ranks(folder, tp):
    """Run with 2 ranks."""
    device = processes.start_processes()
    actor = with_bounds(folder)
    prompts = prompts_with(actor, 0, 1, 3)[
        :: 1 if torch.distributed.get_rank() else 2
    ]  # 2 on one rank, 3 on the other
    engine = start_vllm(actor, folder, tp=tp)
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
    if rollout.choose_engine("auto")[0] == "hf":
        with pytest.raises(ValueError, match=r"--engine vllm cannot run: .*vLLM"):
            rollout.choose_engine("vllm")


def test_positions_that_deep_sleep_dropped_are_zeroed_before_a_cuda_graph_reads_them():
    rope = SimpleNamespace(positions=torch.full((3, 5), 2**60))
    rollout.clear_positions(SimpleNamespace(model_state=SimpleNamespace(rope_state=rope)))
    assert not rope.positions.any()
    # a model without M-RoPE, and the runner of a CPU
    rollout.clear_positions(SimpleNamespace(model_state=SimpleNamespace(rope_state=None)))
    rollout.clear_positions(SimpleNamespace())


def test_an_engine_of_one_rank_pickles_no_image(process_group):
    requests = [rollout.VLLMRequest(0, [1], {"multi_modal_data": lambda: "cannot be pickled"})]
    assert rollout.gather_requests(requests, torch.distributed.group.WORLD) == requests


@needs_vllm
def test_what_vllm_cannot_sample_is_refused_before_any_weight_is_loaded(tiny, family_folder):
    assert rollout.choose_engine("auto", str(tiny[True]), 2.0)[0] == "vllm"
    for folder, temperature, why in (
        (tiny[True], 2.5, "--temperature 2.5 is above 2"),
        (family_folder("qwen3_5"), 1.0, "linear_attention.* without a GPU"),
    ):
        with pytest.raises(ValueError, match=f"--engine vllm cannot run: .*{why}.*--engine hf"):
            rollout.choose_engine("vllm", str(folder), temperature)
        kind, reason = rollout.choose_engine("auto", str(folder), temperature)
        assert kind == "hf" and re.search(why, reason)
    settings = train.Settings(engine="vllm", model=str(family_folder("qwen3_5")), data="nowhere")
    with pytest.raises(ValueError, match=r"--engine vllm cannot run: .*linear_attention"):
        train.build(settings, torch.device("cpu"))


def run_on_gpu(*flags):
    """A training in a process of its own; returns its metrics of the steps."""
    out = Path(flags[flags.index("--out") + 1])
    command = [sys.executable, str(HERE / "train.py"), "--preset", "tiny", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [row for row in metrics(out / "tiny") if "train/reward" in row], done.stdout


def mean_of(rows, name):
    return sum(row[name] for row in rows) / len(rows)


@pytest.mark.gpu
def test_the_tiny_preset_learns_and_resumes_on_a_gpu(tmp_path, table):
    flags = ("--engine", "hf", "--out", str(tmp_path), "--save_in_background", "true")
    rows, _ = run_on_gpu(*flags, "--steps", "40", "--eval_every", "40")
    first, last = mean_of(rows[:5], "train/reward"), mean_of(rows[-5:], "train/reward")
    gap = max(row["train/gap"] for row in rows)
    table("cuda", "tiny, hf: reward of steps 1-5", value=first)
    table("cuda", "tiny, hf: reward of steps 36-40", value=last)
    table("cuda", "tiny, hf: largest train/gap", nats=gap)
    table("cuda", "tiny, hf: step", seconds=mean_of(rows[5:], "seconds/step"))
    assert len(rows) == 40 and last > first + 0.05 and gap < 0.02
    rows, log = run_on_gpu(*flags, "--steps", "42", "--eval_every", "42", "--resume", "must")
    assert "resumed from" in log and [row["step"] for row in rows][-2:] == [41, 42]
    assert max(row["train/gap"] for row in rows[-2:]) < 0.02


@pytest.mark.gpu
def test_fused_adamw_steps_in_no_more_memory_than_it_keeps(process_group, table):
    # 2 B elements as FSDP2 holds them: masters, gradients and two moments in float32 are 30 GiB
    mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (1,))
    peaks = {}
    for variant in ("foreach", "fused"):
        shards = []
        for _ in range(20):
            whole = torch.zeros(10_000, 10_000, device="cuda")
            shards.append(torch.distributed.tensor.distribute_tensor(whole, mesh).requires_grad_())
        for shard in shards:
            shard.grad = torch.ones_like(shard)
        optimizer = torch.optim.AdamW(shards, lr=1e-3, **{variant: True})
        optimizer.step()  # makes the moments
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        kept, start = torch.cuda.memory_allocated(), time.perf_counter()
        for _ in range(5):
            optimizer.step()
        torch.cuda.synchronize()
        peaks[variant] = (torch.cuda.max_memory_allocated() - kept) / 2**30
        milliseconds = 200 * (time.perf_counter() - start)
        table("cuda", f"AdamW {variant}, 2 B elements: step", ms=milliseconds)
        table("cuda", f"AdamW {variant}, 2 B elements: temporary", GiB=peaks[variant])
        # moments that were loaded from a CPU go on
        state = optimizer.state_dict()
        for moments in state["state"].values():
            moments["step"] = moments["step"].cpu()
        fresh = torch.optim.AdamW(shards, lr=1e-3, **{variant: True})
        fresh.load_state_dict(state)
        fresh.step()
        del shards, shard, whole, optimizer, state, fresh
        gc.collect()
        torch.cuda.empty_cache()
    assert peaks["fused"] < 0.5 < peaks["foreach"]


@pytest.mark.gpu
def test_whether_a_gpu_hands_out_zeroed_pages(table):
    # a measurement, no promise: clear_positions is right in both cases
    driver = pytest.importorskip("cuda.bindings.driver")

    def call(function, *arguments):
        error, *results = function(*arguments)
        assert error == driver.CUresult.CUDA_SUCCESS, (function, error)
        return results[0] if results else None

    torch.zeros(1, device="cuda")  # makes the context
    size = 2**30  # bytes
    kind = driver.CUmemAllocationProp()
    kind.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    kind.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    kind.location.id = torch.cuda.current_device()
    access = driver.CUmemAccessDesc()
    access.location = kind.location
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    address = call(driver.cuMemAddressReserve, size, 0, driver.CUdeviceptr(0), 0)
    seen, dirty = np.empty(size, np.uint8), 0
    for _ in range(10):
        handle = call(driver.cuMemCreate, size, kind, 0)
        call(driver.cuMemMap, address, size, 0, handle, 0)
        call(driver.cuMemSetAccess, address, size, [access], 1)
        call(driver.cuMemcpyDtoH, seen.ctypes.data, address, size)
        dirty += bool(seen.any())
        call(driver.cuMemsetD8, address, 0xFF, size)
        call(driver.cuCtxSynchronize)
        call(driver.cuMemUnmap, address, size)
        call(driver.cuMemRelease, handle)
    call(driver.cuMemAddressFree, address, size)
    table("cuda", "pages of 1 GiB that came back dirty, of 10", value=dirty)


@pytest.mark.gpu
@needs_vllm
def test_vllm_sleeps_and_wakes_on_a_gpu(tiny, process_group, table):
    def used():
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30

    pixels = (28 * 28, 28 * 28 * 64)
    actor = model.Actor.from_pretrained(str(tiny[False]), torch.bfloat16, pixels=pixels)
    prompts = prompts_with(actor, 0, 1, 3)
    before = used()
    changes = dict(dtype=torch.bfloat16, eager=False, memory_fraction=0.3)
    with contextlib.closing(start_vllm(actor, tiny[False], **changes)) as engine:
        actor.model.to("cuda")
        table("cuda", "vLLM awake", GiB=used() - before)
        for _ in range(3):
            engine.sleep()
            table("cuda", "vLLM asleep, level 2", GiB=used() - before)
            with pytest.raises(RuntimeError, match="while vLLM sleeps"):
                draw(engine, prompts, 1)
            actor.model.to("cpu")
            perturb(actor, scale=0.01)
            actor.model.to("cuda")
            synced = engine.sync(actor)
            drawn = draw(engine, prompts, 4)
            with torch.no_grad():
                logprobs, _ = actor.logprobs(as_groups(prompts, drawn))
            gap = (sampled(drawn) - logprobs.cpu()).abs().mean().item()
            table("cuda", "vLLM, bf16: gap after a sleep", nats=gap)
            assert gap < 0.05
        table("cuda", "vLLM: waking up", seconds=synced["wake_seconds"])


@pytest.mark.gpu
@needs_vllm
def test_the_tiny_preset_trains_with_vllm_on_a_gpu(tmp_path, table):
    # sleep mode, level 2, CUDA graphs, TP 1
    flags = ("--engine", "vllm", "--out", str(tmp_path), "--memory_fraction", "0.3")
    rows, _ = run_on_gpu(*flags, "--steps", "20", "--eval_every", "20")
    gaps = [row["train/gap"] for row in rows]
    table("cuda", "tiny, vLLM: largest train/gap", nats=max(gaps))
    table("cuda", "tiny, vLLM: step", seconds=mean_of(rows[5:], "seconds/step"))
    assert len(gaps) == 20 and max(gaps) < 0.02


def test_engine_and_trainer_see_the_same_videos(engine):
    assert largest_gap(engine.actor, engine, mixed_prompts(engine.actor)) < 1e-4


# --------------------------------------------------------------------------------------------------
# rollout.py: conversations


def test_a_later_turn_is_what_the_template_adds_and_a_template_that_starts_anew_is_refused(actor):
    later = make(actor, "<image>Now?", picture(2, 56, 56), later=True)
    seen = "\n<|im_start|>user\n<|vision_start|>%s<|vision_end|>Now?<|im_end|>\n"
    seen += "<|im_start|>assistant\n"
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
            turns = r.completion(engine.reader)
            assert r.tokens == sum(len(t if torch.is_tensor(t) else t.ids) for t in turns)
            if r.truncated:  # a turn that was cut is not shown to the environment
                assert r.reward == len(seen) and r.response[-1] not in actor.eos_ids
            else:
                assert r.reward == len(seen) + 1 == int(prompt.problem.answer)
    assert {len(observations(r)) for r in drawn[1]} >= {1, 2}
    assert any(r.truncated for rollouts in drawn for r in rollouts)
    groups = []
    for prompt, rollouts in zip(prompts, drawn, strict=True):
        groups.append((prompt, [r.completion(engine.reader) for r in rollouts]))
    with torch.no_grad():
        logprobs, _ = actor.logprobs(groups)
    return (sampled(drawn) - logprobs).abs().max().item()


def observations(r):
    return [turn for turn in r.turns if isinstance(turn, rollout.Observation)]


def test_in_conversations_the_samplers_logprobs_equal_the_trainers(engine):
    engine.actor.temperature, engine.max_response_tokens = 0.7, 12
    assert conversation_gap(engine.actor, *countdown(engine.actor, engine)) < 1e-4


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
    pixels = sent.completion(engine.reader)[1].inputs["pixel_values"]
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


def test_two_ranks_train_on_conversations_of_which_one_has_none_to_evaluate(seedling, tmp_path):
    figures.make_codewords(tmp_path / "codewords", train=40, test=3)
    flags = (
        "--task codeword --engine hf --steps 1 --eval_rows 1 --prompts_per_step 6"
        " --minibatch_prompts 3 --responses_per_prompt 4 --max_tokens_per_pack 400"
        " --kl_coefficient 0.1"
    )
    places = ["--out", str(tmp_path), "--model", str(seedling / "tiny-model")]
    code, log = launch("faulty_run", [*flags.split(), *places], {}, ranks=2)
    assert code == 0, log
    [step] = learning_steps(tmp_path / "codeword")
    assert step["train/gap"] < 1e-5 and step["train/learnt_tokens"] > 0


@pytest.mark.slow
def test_torchrun_starts_the_run_as_the_readme_says(seedling, tmp_path):
    flags = [*SHORT, "--preset", "tiny", "--engine", "hf", "--out", tmp_path]
    copy_start(seedling, tmp_path)
    code, log = torchrun(HERE / "train.py", *flags)
    assert code == 0 and "2 process(es) on cpu" in log, log
    assert len(learning_steps(tmp_path / "tiny")) == 3


def test_a_conversation_is_judged_by_its_last_turn(actor, grader):
    encode_text = actor.processor.tokenizer.encode
    said = [
        torch.tensor(encode_text(text + "<|im_end|>"))
        for text in ("ok", "<think>I look.</think>\\boxed{4}")
    ]
    turns = [said[0], rollout.Observation(problem("Now?", ()), 3), said[1]]
    logprobs = torch.zeros(len(said[0]) + len(said[1]))
    conversation = rollout.Rollout(turns, logprobs, False, reward=0.25)
    weights = parse_weights("accuracy=1")
    got = rollout.score(
        [[conversation]], [problem()], 1, actor.processor.tokenizer, weights, grader
    )
    assert (got["format"].item(), got["accuracy"].item(), got["reward"].item()) == (1, 1, 0.25)


def readme_block(name):
    """The Python of the README that defines `name`."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    [block] = [block for block in blocks if re.search(rf"^(class|def) {name}\b", block, re.M)]
    return block


def test_the_readmes_environment_runs_as_printed(actor, process_group, tmp_path):
    file = tmp_path / "doubt.py"
    file.write_text(readme_block("Doubt"))
    doubt = rollout.find_environment(f"{file}:Doubt")
    assert rollout.find_environment(f"{file}:Doubt") is doubt  # read once
    row = problem("<image>How many?", (picture(0),), "4")
    for first, second, earned in ((r"\boxed{3}", r"\boxed{4}", 1.0), (r"\boxed{4}", "no", 0.0)):
        game = doubt(row)
        assert game.first is row
        asked, nothing = game.step(first)
        assert (asked.question, asked.images, nothing) == ("Are you sure?", (), 0.0)
        assert game.step(second) == (None, earned)
    actor.eos_ids = [*actor.eos_ids, *range(0, 250, 6)]
    reader = build_reader(actor.processor, first=lambda row: doubt(row).first)
    engine = rollout.Conversations(rollout.HFEngine(actor, 12), doubt, reader, 400)
    [rollouts] = draw(engine, [reader(row)], 8)
    whole = [r for r in rollouts if not r.truncated]
    assert whole
    for r in whole:
        assert len(r.written_turns) == 2 and r.reward == 0.0
        first, asked, second = rollout.shown_turns(r, actor.processor.tokenizer)
        assert [turn["role"] for turn in (first, asked, second)] == [
            "policy",
            "environment",
            "policy",
        ]
        assert asked == {"role": "environment", "text": "Are you sure?", "images": []}
        assert actor.processor.tokenizer.decode(r.turns[0][:-1]) == first["text"]


def test_an_environment_is_found_by_name_or_in_a_file_or_told_what_is_known(tmp_path):
    assert rollout.find_environment("") is None
    assert rollout.find_environment("codeword") is rollout.Codeword
    (tmp_path / "mine.py").write_text("class Mute: pass\nhelper = 3\n")
    for task in ("chess", f"{tmp_path}/mine.py:Zoom", f"{tmp_path}/none.py:Zoom",
                 f"{tmp_path}/mine.py:Mute", f"{tmp_path}/mine.py:helper",
                 f"{tmp_path}/mine.py"):  # fmt: skip
        with pytest.raises(ValueError, match=r"unknown --task .*known: codeword, path.py:Class"):
            rollout.find_environment(task)


def test_an_evaluation_keeps_every_turn_with_what_was_said_and_shown(actor, process_group, grader):
    engine, prompts = countdown(actor, rollout.HFEngine(actor, 12))
    rows = [prompt.problem for prompt in prompts]  # of 1, 3 and 2 turns
    weights = parse_weights("accuracy=1")
    _, records, _ = rollout.evaluate(engine, rows, engine.reader, 6, 3, weights, grader)
    assert [record["row"] for record in records] == [0] * 6 + [1] * 6 + [2] * 6
    for record in records:
        turns = record["turns"]
        policy, environment = turns[::2], turns[1::2]
        assert {turn["role"] for turn in policy} == {"policy"}
        assert policy[-1]["text"] == record["response"]
        for left, turn in zip(range(int(record["answer"]) - 1, 0, -1), environment, strict=False):
            assert turn["role"] == "environment" and turn["text"].endswith(f"{left} left")
            assert len(turn["images"]) == (left == 1) == turn["text"].count("<image>")
            assert all(image.startswith("data:image/") for image in turn["images"])
        if not record["truncated"]:
            assert len(policy) == int(record["answer"]) == record["reward"]
    assert json.loads(json.dumps(records)) == records
    assert any(len(record["turns"]) == 5 for record in records)


# --------------------------------------------------------------------------------------------------
# rollout.py: evaluation


def test_an_evaluation_is_one_short_line():
    metrics = rollout.summarize([record(1, type="a"), record(0, type="b")], 1)
    # one right of two: 0.5, with an error of 0.7071 / sqrt(2)
    assert rollout.one_line(metrics) == "accuracy 0.500 +- 0.500, reward 0.000, format 0.000"


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


def test_an_evaluation_is_told_in_few_words():
    got = rollout.summarize([record(1, type="a"), record(0, type="b")], 1)
    assert rollout.one_line(got) == "accuracy 0.500 +- 0.500, reward 0.000, format 0.000"


# --------------------------------------------------------------------------------------------------
# train.py: settings


def test_weights_for_a_source_that_no_problem_has_stop_the_start(tmp_path, tiny, process_group):
    file, held_out = (
        str(write(tmp_path, f"{split}.parquet", problem=["?"] * 2, data_source=["vqa", "chartqa"]))
        for split in ("train", "test")
    )
    for rewards, unknown in (
        ("exact=1;charts:numeric=1", "charts"),
        ("exact=1;chartqa:numeric=1;x:exact=1", "x"),
    ):
        places = dict(data=file, test_data=held_out)
        settings = train.Settings(model=str(tiny[False]), instruction="", rewards=rewards, **places)
        with pytest.raises(ValueError, match=rf"no problem has: \['{unknown}'\].*--columns source"):
            train.build(settings, torch.device("cpu"))


def test_every_setting_is_read_somewhere_and_has_help():
    source = (HERE / "train.py").read_text()
    files = (HERE / "train.py", *(HERE / "support").glob("*.py"))
    body = "".join(file.read_text() for file in files)
    for f in dataclasses.fields(train.Settings):
        assert len(f.metadata["help"]) > 5
        read = re.search(rf"\b(s|self|settings)\.{f.name}\b", body) or f"self.{f.name}" in source
        assert read or f.name == "preset", f"--{f.name} is dead"


def test_unknown_flags_are_named_with_the_nearest_known_one():
    for unknown, message in (
        ("--learning_rat", "no flag --learning_rat; did you mean --learning_rate"),
        ("--learning-rate", "no flag --learning-rate; did you mean --learning_rate"),
        ("--qqq", "no flag --qqq; python train.py --help lists all"),
    ):
        with pytest.raises(ValueError, match=message):
            train.parse_settings(["--preset", "tiny", unknown, "1"])


def test_every_number_among_the_settings_has_bounds_but_the_seed():
    bare = [name for name, allowed in train.setting_types().items() if allowed in (int, float)]
    assert bare == ["seed"]


@pytest.mark.parametrize("flags, message", [
    ("--responses_per_prompt 1",
    "--responses_per_prompt is 1, not at least 2 .*compared with the others"),
    ("--minibatch_prompts 48", "64 is not a multiple of --minibatch_prompts 48"),
    ("--temperature 0", "--temperature is 0.0, not from 0.01 to 100"),
    ("--temperature nan", "--temperature is nan"),
    ("--learning_rate inf", "--learning_rate is inf"),
    ("--learning_rate=-0.1", "--learning_rate is -0.1, not at least 0"),
    ("--steps=-1", "--steps is -1, not at least 0 .*batches of rollouts"),
    ("--steps 1e3", "--steps is '1e3', not a whole number .*batches of rollouts"),
    ("--clip_low little", "--clip_low is 'little', not a number .*may fall below 1"),
    ("--eager maybe", "--eager is 'maybe', not true or false .*CUDA graphs"),
    ("--steps", "--steps: expected one argument"),
    ("--keep 0", "--keep is 0, not at least 1 .*newest checkpoints"),
    ("--memory_fraction 60", "--memory_fraction is 60.0, not from 0 to 1 "),
    ("--clip_dual 0.5", "--clip_dual 0.5 is below 1"),
    ("--temperature 2.5 --engine vllm", "--temperature 2.5 is above 2, the most that vLLM takes"),
    ("--preset large", "--preset large is none of auto, tiny, geo3k, codeword"),
    ("--dtype float16", "--dtype float16 is none of auto, bfloat16, float32"),
    ("--task nothing", "unknown --task 'nothing'"),
    ("--columns picture=images", "--columns 'picture=images'"),
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


def test_weights_and_biases_is_refused_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb grpo needs the package wandb; pip install"):
        train.parse_settings(["--preset", "tiny", "--wandb", "grpo"])


def test_muon_takes_the_language_models_matrices_and_a_learning_rate_serves_both(
    tiny, process_group
):
    frozen_tower = dict(prepare=lambda actor: actor.freeze("tower"))
    run, _ = small_run(tiny[False], optimizer="muon", minibatch_prompts=8, **frozen_tower)
    optimizer, schedule = train.build_optimizer(run.settings, run.actor)
    matrices, rest = (set(group["param_names"]) for group in optimizer.param_groups)
    layer = "model.language_model.layers.0."
    assert {layer + "self_attn.q_proj.weight", layer + "mlp.up_proj.weight"} <= matrices
    assert {layer + "input_layernorm.weight", layer + "self_attn.q_proj.bias"} <= rest
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= rest
    assert not any("visual" in name for name in matrices)
    assert not any("visual.blocks" in name for name in rest)  # frozen
    optimizer.step()
    schedule.step()
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


def test_cosine_and_linear_fall_to_the_final_share_by_hand():
    # 4 steps of one update each, no warm-up, down to 0.2: after 0, 1, 2 and 3 of 4 updates
    shape = dict(steps=4, prompts_per_step=2, minibatch_prompts=2, final_learning_rate=0.2)
    linear = train.Settings(warmup_updates=0, schedule="linear", **shape)
    assert [linear.rate(done) for done in range(4)] == pytest.approx([1, 0.8, 0.6, 0.4])
    cosine = train.Settings(warmup_updates=0, schedule="cosine", **shape)
    # 0.2 + 0.8 (1 + cos(pi done / 4)) / 2
    assert [cosine.rate(done) for done in range(4)] == pytest.approx([1, 0.882843, 0.6, 0.317157])
    rising = train.Settings(warmup_updates=1, schedule="cosine", **shape)
    assert rising.rate(0) == 0.5


def test_the_same_file_is_not_trained_on_and_held_out(seedling, tmp_path):
    copy_start(seedling, tmp_path)
    code, log = train_apart(tmp_path, "--data", str(tmp_path / "figures" / "train.parquet"))
    assert code == 1 and re.search(
        r"train\.parquet would be trained on and held out; set --test_data", log
    ), log


# --------------------------------------------------------------------------------------------------
# train.py: the algorithm


def test_a_sampler_that_computes_another_model_is_refused_before_training(actor, process_group):
    prompts = prompts_with(actor, 2, 0)
    engine = rollout.HFEngine(actor, 24)
    for packing in ("shared", "padded"):
        actor.use_packing(packing)
        train.check_against_sampler(engine, actor, prompts)
    assert engine.max_response_tokens == 24
    other = copy.copy(actor)
    other.temperature = 1.05
    with pytest.raises(
        RuntimeError, match=r"(?s)before training.*packing 'padded'.*softcap.*per-t"
    ):
        train.check_against_sampler(rollout.HFEngine(other, 24), actor, prompts)
    actor.compute = torch.bfloat16  # there that little is rounding
    train.check_against_sampler(rollout.HFEngine(other, 24), actor, prompts)


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
    # 4 5 6 7 8, the largest first: 8 | 7, 6 to the 7 (13), 5 to the 8 (13), 4 to the first: 17 | 13
    assert train.deal([4, 5, 6, 7, 8], 2) == [[0, 1, 4], [2, 3]]
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
    groups = [group(*(rng.randint(50, 2048) for _ in range(5)), prompt=n) for n in prompts]
    costs = [train.learning_cost(drawn) for drawn in groups]
    loads = [sum(costs[i] for i in share) for share in train.deal(costs, 8)]
    assert max(loads) * 8 / sum(loads) < 1.05
    # dealt as they come, 16 to each, they would not pass
    assert max(sum(costs[16 * i : 16 * i + 16]) for i in range(8)) * 8 / sum(costs) > 1.05


def one_update(folder, **changes):
    """Loss and whole weights after one update on fixed rollouts; every rank returns them."""
    run, groups = small_run(
        folder, minibatch_prompts=8, max_sampler_gap=100.0, max_grad_norm=1e9, **changes
    )
    [minibatch] = minibatches_of(run, groups)
    totals = train.update(run, minibatch, 0, None)
    weights = {n: train.full(p).detach().clone() for n, p in run.actor.model.named_parameters()}
    return totals, weights, len(minibatch.packs)


def test_the_loss_of_a_pack_by_hand():
    # ratios 2 and 1/4, sampler 1/2 of the policy for the first token, reference as the old policy
    settings, _ = train.parse_settings([
        "--preset", "tiny", "--clip_low", "0.1", "--clip_high", "0.5", "--kl_coefficient", "1",
    ])  # fmt: skip
    old = torch.tensor([-2.0, -1.0])
    now = old + torch.tensor([2.0, 0.25]).log()
    pack = train.TrainPack(
        bundles=[], lengths=torch.tensor([2]), advantages=torch.tensor([1.0, -1.0]),
        sampler_logprobs=old + torch.tensor([0.5, 1.0]).log(), old_logprobs=old, ref_logprobs=old,
    )  # fmt: skip
    plan = train.Plan(packs=[], filler=[], tokens=4, responses=2, imbalance=0.0)
    minibatch = train.Minibatch([pack], plan)
    loss, measured = train.pack_loss(settings, minibatch, pack, now, torch.zeros(2))
    kl = torch.tensor([1 / 2 - 1 + math.log(2), 4 - 1 - math.log(4)])
    close(measured["kl"], kl)
    assert loss.item() == pytest.approx((-1.5 * 2 + 0.9 + kl.sum().item()) / 4)


def test_a_term_of_the_entropy_teaches_flat_groups_and_moves_weights(tiny, process_group):
    run, groups = small_run(tiny[False], minibatch_prompts=8, entropy_coefficient=0.5)
    flat = [dataclasses.replace(group, advantages=torch.zeros(4)) for group in groups]
    [minibatch] = minibatches_of(run, flat)
    assert sum(len(responses) for pack in minibatch.packs for _, responses in pack.bundles) == 8 * 4
    run.settings = dataclasses.replace(run.settings, max_sampler_gap=100.0)
    before = model.full(next(iter(run.actor.model.parameters()))).clone()
    assert train.update(run, minibatch, 0, None)["grad_norm"] > 0
    assert not torch.equal(model.full(next(iter(run.actor.model.parameters()))), before)


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
    [minibatch] = minibatches_of(run, groups)
    assert sum(len(responses) for pack in minibatch.packs for _, responses in pack.bundles) == 7 * 4
    assert minibatch.plan.responses == 8 * 4
    tokens = sum(group.response_tokens for group in groups)
    assert minibatch.plan.tokens == tokens  # flat ones too
    groups = [dataclasses.replace(g, advantages=torch.zeros(4)) for g in groups]
    [nothing] = minibatches_of(run, groups)
    assert nothing.packs == [] and train.update(run, nothing, 0, None) == {}


def test_the_tokens_inside_the_last_box_are_found_whatever_the_tokens():
    texts = ["<think>", r"\boxed{1}", "</think>", r"\box", "ed{", "1", "2}", "<|im_end|>"]
    assert reward.inside_box(texts) == [False] * 5 + [True, True, False]
    assert reward.inside_box([r"\boxed{", "x"]) == [False, False]
    assert reward.inside_box([r"\boxed{1", "}", r", in \boxed"]) == [True, False, False]


def test_a_white_prompt_has_the_same_ids_and_other_pixels(actor):
    [pictured, plain] = prompts_with(actor, 2, 0)
    reader = data.Reader(actor.processor, 28 * 28, 28 * 28 * 64, "")
    white = data.whitened(pictured, reader)
    assert torch.equal(white.ids, pictured.ids)
    assert [image.size for image in white.images] == [image.size for image in pictured.images]
    assert {image.getextrema() for image in white.images} == {((255, 255),) * 3}
    pixels = white.inputs["pixel_values"]
    assert pixels.shape == pictured.inputs["pixel_values"].shape
    assert not torch.equal(pixels, pictured.inputs["pixel_values"])
    assert data.whitened(plain, reader) is plain


def test_looks_are_what_the_picture_gave_and_zero_on_white_pictures(tiny, process_group):
    run, groups = small_run(tiny[False], minibatch_prompts=8)
    rollouts = {i: group.rollouts[0] for i, group in enumerate(groups)}
    looks = train.measure_looks(run, rollouts)["looks"]
    pictured = [(i, rollouts[i]) for i in rollouts if run.test_set[i].images]
    nats = []
    for i, drawn in pictured:
        own, white = run.test_set[i], data.with_images(run.test_set, i, "blank")
        pairs = [[(run.reader(shown), [drawn.turns])] for shown in (own, white)]
        with_picture, without = (run.actor.logprobs(pair)[0] for pair in pairs)
        nats.append((with_picture - without).detach())
    assert looks == pytest.approx(torch.cat(nats).mean().item(), abs=1e-5) and abs(looks) > 1e-3
    run.test_set = [data.with_images(run.test_set, i, "blank") for i in range(8)]
    assert train.measure_looks(run, rollouts)["looks"] == 0
    run.test_set = [dataclasses.replace(row, images=(), question="What?") for row in run.test_set]
    assert train.measure_looks(run, rollouts) == {}


def test_tokens_that_look_weigh_more_and_responses_the_same(tiny, process_group):
    run, groups = small_run(tiny[False], minibatch_prompts=8, look_weight=1.0)
    [minibatch] = minibatches_of(run, groups)
    [pack] = minibatch.packs
    logprobs, entropy = run.actor.logprobs(pack.bundles)
    pack.remember(logprobs.detach())
    weighted, _ = train.pack_loss(run.settings, minibatch, pack, logprobs, entropy)
    s = dataclasses.replace(run.settings, look_weight=0.0)
    plain = dataclasses.replace(pack, white_logprobs=None)
    # on-policy the loss is -sum w A: the weights average 1 in every response
    expected, _ = train.pack_loss(s, minibatch, plain, logprobs, entropy)
    close(grpo.policy_loss(logprobs, logprobs, pack.advantages, pack.lengths)[0], -pack.advantages)
    gradients = [
        torch.autograd.grad(loss, logprobs, retain_graph=True)[0] for loss in (weighted, expected)
    ]
    assert not torch.allclose(*gradients)
    looks = logprobs.detach() - pack.white_logprobs
    close(gradients[0], gradients[1] * grpo.look_weights(looks, pack.lengths, 1.0))


@pytest.mark.slow
def test_a_model_looks_where_the_picture_has_the_answer_and_not_where_the_question_has(tmp_path):
    looks = {}
    for told in (False, True):
        folder = tmp_path / f"told-{told}"
        figures.make_figures(folder / "figures", train=1000, test=200)
        for split in ("train", "test"):
            file = folder / "figures" / f"{split}.parquet"
            rows = [row for row in pq.read_table(file).to_pylist() if row["type"] == "colour"]
            pictures = [row["images"] for row in rows]
            if told:  # the question has the answer, and the picture is another row's
                pictures = pictures[7:] + pictures[:7]
            for row, images in zip(rows, pictures, strict=True):
                row["images"] = images
                row["problem"] = f"<image>Say {row['answer']}." if told else row["problem"]
            pq.write_table(pa.Table.from_pylist(rows), file)
        problems = data.load_problems(folder / "figures")
        instruction = train.PRESETS["tiny"]["instruction"]
        tiny_model.build_warm_tiny(folder / "tiny-model", problems, instruction, updates=60)
        code, log = train_apart(
            folder,
            *("--prompts_per_step", "16", "--minibatch_prompts", "16", "--steps", "20"),
            *("--responses_per_prompt", "8", "--max_response_tokens", "24", "--eval_rows", "0"),
            *("--eval_every", "20", "--rewards", "accuracy=0.9,format=0.1"),
        )
        assert code == 0, log
        *_, looks[told] = [row for row in metrics(folder / "tiny") if "eval/looks" in row]
    for told, row in looks.items():
        assert row["eval/accuracy"] > 0.9, told
    # the tokens in the box look, those of the format do not
    assert looks[False]["eval/looks_answer"] > 1
    assert looks[False]["eval/looks_answer"] > 4 * looks[False]["eval/looks"]
    assert abs(looks[True]["eval/looks_answer"]) < 0.1


def test_an_alarm_is_given_where_accuracy_rises_and_looks_fall():
    def rows(accuracies, looks):
        told = [
            {"step": i, "eval/accuracy": a, "eval/looks_answer": x}
            for i, (a, x) in enumerate(zip(accuracies, looks, strict=True))
        ]
        return [*told, {"step": 0, "blank/accuracy": 0.25}]

    warning = report.looks_away(rows([0.4, 0.5, 0.6], [2.0, 1.5, 0.9]))
    assert "without looking" in warning and "0.250 at step 0" in warning
    assert report.looks_away(rows([0.4, 0.5, 0.6], [2.0, 1.5, 1.1])) == ""
    assert report.looks_away(rows([0.4, 0.6, 0.5], [2.0, 1.5, 0.9])) == ""
    assert report.looks_away(rows([0.4, 0.6], [2.0, 0.5])) == ""


def test_dynamic_sampling_replaces_flat_groups(seedling, tmp_path):
    flags = (
        *SHORT,
        "--steps",
        "1",
        "--rewards",
        "rare=1",
        "--resume",
        "no",
        "--freeze_vision",
        "true",
        "--gradient_checkpointing",
        "true",
    )
    tokens = []
    for extra in ("0", "3"):
        folder = train_whole(seedling, tmp_path, *flags, "--dynamic_sampling", extra)
        [step] = learning_steps(folder)
        tokens.append(step["train/learnt_tokens"])
    assert 0 < tokens[0] < tokens[1]
    # the first run was set aside, not mixed up
    assert (tmp_path / "tiny.1" / "metrics.jsonl").exists()


def test_a_sampler_that_is_not_the_policy_stops_the_run(tiny, process_group):
    run, groups = small_run(tiny[False], minibatch_prompts=8, max_sampler_gap=0.1)
    before = train.full(next(run.actor.model.parameters())).clone()
    with pytest.raises(RuntimeError, match=r"step 3: sampler and trainer disagree by .*not synced"):
        train.update(run, minibatches_of(run, groups)[0], 3, None)
    assert torch.equal(train.full(next(run.actor.model.parameters())), before)
    with pytest.raises(RuntimeError, match="nan"):
        train.check_gap(math.nan, 0.1, 0)


@pytest.mark.parametrize("prepare", ["nothing", "with_lora"])
def test_two_processes_that_share_prompts_equal_one_that_pads(
    tiny, process_group, tmp_path, prepare
):
    run_apart("save_one_update", str(tiny[False]), str(tmp_path / "two.pt"), prepare, ranks=2)
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


def save_one_update(folder, out, prepare, packing="shared"):
    """Run with 2 ranks."""
    processes.start_processes()
    totals, weights, _ = one_update(
        folder, max_tokens_per_pack=100, prepare=globals()[prepare], packing=packing
    )
    if torch.distributed.get_rank() == 0:
        torch.save({"loss": totals["loss"], "weights": weights}, out)
    torch.distributed.destroy_process_group()


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
        len(records) == 10 * 4
        and {"question", "answer", "response", "accuracy", "truncated"} <= records[0].keys()
    )
    exported = model.Actor.from_pretrained(str(finished / "model"))
    assert exported.model.config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
    assert (finished / "checkpoints" / "step-000003").is_dir()
    report = embedded(finished)
    assert [s["step"] for s in report["steps"]] == [1, 3] and report["settings"]["steps"] == 3
    assert report["curves"].keys() == {name for row in rows for name in row} - {"step"}
    assert report["curves"]["train/kl"][2] == [3, pytest.approx(steps[2]["train/kl"], rel=1e-4)]


@pytest.mark.skipif(not GEO3K.exists(), reason="the Geometry3K sample is not there")
def test_two_steps_on_real_geometry3k_rows(seedling, tmp_path):
    folder = train_whole(
        seedling,
        tmp_path,
        *SHORT,
        "--steps",
        "2",
        "--data",
        str(GEO3K / "train.parquet"),
        "--test_data",
        str(GEO3K / "validation.parquet"),
        "--max_pixels",
        str(28 * 28 * 48),
        "--min_pixels",
        "784",
        "--max_prompt_tokens",
        "600",
        "--prompts_per_step",
        "4",
        "--eval_every",
        "2",
    )
    steps = learning_steps(folder)
    assert len(steps) == 2 and all(row["train/gap"] < 1e-4 for row in steps)


def test_grpo_learns(tmp_path):
    """The smallest problem there is: the colour of a figure, learnt from a model that knows the
    format and half of the colours."""
    start = tmp_path / "start"
    figures.make_figures(start / "figures", train=500, test=50)
    for file in (start / "figures").iterdir():
        rows = [row for row in pq.read_table(file).to_pylist() if row["type"] == "colour"]
        pq.write_table(pa.Table.from_pylist(rows), file)
    problems = data.load_problems(start / "figures")
    instruction = train.PRESETS["tiny"]["instruction"]
    tiny_model.build_warm_tiny(start / "tiny-model", problems, instruction, updates=30)
    flags = (
        "--freeze_vision true --steps 12 --eval_every 12 --prompts_per_step 16"
        " --minibatch_prompts 16 --responses_per_prompt 8 --rewards accuracy=0.9,format=0.1"
    )
    folder = train_whole(start, tmp_path / "run", *SHORT, *flags.split())
    rewards = [row["train/reward"] for row in learning_steps(folder)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15


def test_help_shows_every_flag_once_in_its_group_with_choices_bounds_and_default():
    text = train.make_parser().format_help()
    for f in dataclasses.fields(train.Settings):
        assert len(re.findall(rf"^  (--{f.name})\b", text, re.M)) == 1, f.name
    titles = re.findall(r"^(?:the run|data|model|[A-Z]+)\b.*:$", text, re.M)
    words = [title.split()[0].strip(":") for title in titles]
    assert words == ["the", "data", "model", "SAMPLE", "SCORE", "SCORE", "LEARN", "REPORT"]
    flat = " ".join(text.split())
    assert (
        "--steps N batches of rollouts; 0: evaluate --model and end [at least 0; default 60]"
        in flat
    )
    assert "--kl_estimator k1|k2|k3" in flat and "--eager [true|false]" in flat
    assert flat.index("presets, by what they change") < flat.index("tiny: --instruction")
    assert flat.index("tiny: --instruction") < flat.index("the run: --preset auto|tiny|")
    assert "--gradient_checkpointing true --save_in_background true" in flat  # as one types them


def test_a_switch_is_on_where_it_is_named():
    settings, _ = train.parse_settings(["--preset", "tiny", "--eager", "--rounding", "false"])
    assert settings.eager and not settings.rounding


def test_the_compute_dtype_follows_the_device_unless_it_is_given():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    auto, half = train.Settings(), train.Settings(dtype="bfloat16")
    assert (auto.compute_dtype(cpu), auto.compute_dtype(gpu)) == (torch.float32, torch.bfloat16)
    assert (half.compute_dtype(cpu), half.compute_dtype(gpu)) == (torch.bfloat16, torch.bfloat16)
    assert train.Settings(dtype="float32").compute_dtype(gpu) == torch.float32


def test_an_error_of_the_user_is_one_sentence_before_anything_is_loaded(tmp_path):
    code, log = train_apart(tmp_path, "--clip_low", "2")
    expected = (
        "error: --clip_low is 2.0, not from 0 to 1 (how far the probability ratio may fall below 1)"
    )
    assert (code, log.strip().splitlines()) == (1, [expected])
    code, log = train_apart(tmp_path, "--model", str(tmp_path / "none"), "--data", str(tmp_path))
    assert code == 1 and "Traceback" not in log
    assert f"error: --model {tmp_path / 'none'} cannot be loaded: " in log


def test_an_error_of_the_user_is_said_once_by_two_ranks(seedling, tmp_path):
    copy_start(seedling, tmp_path)
    code, log = train_apart(tmp_path, "--test_split", "train", ranks=2)
    assert code == 1 and "Traceback" not in log, log
    assert log.count("would be trained on and held out") == 1


def test_a_name_never_moves_what_is_no_run(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for name, places, message in (
        ("data", {}, "data holds something that is no run"),
        ("run", dict(data=str(tmp_path / "run" / "rows.parquet")), "--data .* lies in .*run's own"),
        ("run", dict(model=str(tmp_path / "run" / "model")), "--model .* choose another --name"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.open_folder(train.Settings(out=str(tmp_path), name=name, **places))
    assert sorted(tmp_path.rglob("*")) == before
    checkpoint.open_folder(train.Settings(out=str(tmp_path), name="run"))
    assert (tmp_path / "run.1" / "run.json").exists()


def responses_in(folder, name="eval-000000"):
    return [json.loads(line) for line in (folder / "responses" / f"{name}.jsonl").open()]


def test_no_steps_evaluate_a_model_and_write_its_responses(finished, tmp_path):
    flags = [*SHORT, "--eval_samples", "4", "--minibatch_prompts", "8", "--steps", "0"]
    figures_of = str(finished.parent / "figures")
    places = ["--model", str(finished / "model"), "--data", figures_of, "--test_data", figures_of]
    folders = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        code, log = train_apart(out, *flags, *places, ranks=ranks)
        assert code == 0, log
        assert "Loading weights" not in log and "Warning" not in log and "not valid" not in log
        folder = out / "tiny-evaluation"
        assert not (folder / "checkpoints").exists() and not (folder / "model").exists()
        assert [row["step"] for row in metrics(folder)] == [0, 0, 0]
        assert {"eval/accuracy", "blank/accuracy", "shuffled/accuracy"} <= {
            name for row in metrics(folder) for name in row
        }
        folders.append(folder)
    texts = [[row["response"] for row in responses_in(folder)] for folder in folders]
    rows = responses_in(finished, "eval-000003")  # by the run that has exported this model
    assert texts[0] == [row["response"] for row in rows] and len(rows) == 40
    assert len(texts[1]) == 40


BOUNCE = """
import dataclasses, data
class Bounce:
    images = 1
    def __init__(self, problem):
        self.first = self.problem = problem
    def step(self, text):
        shown, self.problem = self.problem, None
        if not shown:
            return None, 1.0
        question = "<image>" * len(shown.images) + "And again?"
        return dataclasses.replace(shown, question=question), 0.0
"""


def test_the_tiny_model_learns_to_say_what_an_environment_tells_it_before_its_last_turn(actor):
    class Again:
        warm_up = ("more",)

        def __init__(self, asked):
            self.first, self.turns = asked, 0

        def step(self, text):
            self.turns += 1
            again = dataclasses.replace(self.first, question="Again?", images=())
            return (again, 0.0) if self.turns == 1 else (None, 1.0)

    reader = build_reader(actor.processor)
    row = problem("<image>What?", (red(),))
    prompt, [[said, asked, answer]] = tiny_model.imitation(row, "4", reader, Again)
    tokenizer = actor.processor.tokenizer
    assert prompt.problem is row and tokenizer.decode(said) == "more<|im_end|>"
    assert asked.problem.question == "Again?"
    assert tokenizer.decode(answer) == r"<think>look</think>\boxed{4}<|im_end|>"
    _, [[single]] = tiny_model.imitation(row, "4", reader, None)
    assert torch.equal(single, answer)


def test_an_evaluation_takes_an_environment_from_a_file(seedling, tmp_path):
    copy_start(seedling, tmp_path)
    (tmp_path / "bounce.py").write_text(BOUNCE)
    flags = ["--steps", "0", "--task", f"{tmp_path / 'bounce.py'}:Bounce"]
    code, log = train_apart(tmp_path, *flags)
    assert code == 1 and "give --data, and --model" in log and "Traceback" not in log, log
    places = ["--model", str(tmp_path / "tiny-model"), "--data", str(tmp_path / "figures")]
    code, log = train_apart(tmp_path, *flags, *places)
    assert code == 0, log
    [row, *_] = metrics(tmp_path / "tiny-evaluation")
    assert row["eval/reward"] == 0  # cut at 4 tokens, and not what --rewards would give


BF16 = (
    "--dtype",
    "bfloat16",
    "--steps",
    "3",
    "--kl_coefficient",
    "0.1",
    "--save_in_background",
    "true",
    "--save_every",
    "1",
    "--learning_rate",
    "1e-3",
)


@pytest.mark.parametrize("ranks, flags", [
    (1, "--freeze_vision true"),
    (2, "--lora_rank 4"),
    pytest.param(1, "--engine vllm", marks=[needs_vllm, pytest.mark.slow]),
    pytest.param(2, "--engine vllm", marks=[needs_vllm, pytest.mark.slow]),
])  # fmt: skip
def test_bfloat16_trains_as_on_a_gpu(seedling, tmp_path, ranks, flags):
    folder = train_whole(seedling, tmp_path, *BF16, *flags.split(), ranks=ranks)
    steps = learning_steps(folder)
    assert len(steps) == 3 and all(row["train/learnt_tokens"] > 0 for row in steps)
    gaps = [row["train/gap"] for row in steps]
    assert 1e-4 < max(gaps) < 0.02  # rounding, which float32 has not
    assert all(row["train/kl"] < 0.5 for row in steps)
    stored = load_file(folder / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    [shard, *_] = sorted((folder / "checkpoints" / "step-000003").glob("*.safetensors"))
    kept = [tensor for name, tensor in load_file(shard).items() if not name.startswith("run.")]
    assert {tensor.dtype for tensor in kept} == {torch.float32}  # masters and moments


def unsynced_run(argv):
    """train.py with vLLM, which gets no weights from the fourth sync on, that after step 3."""
    sync = rollout.VLLMEngine.sync
    synced = []

    def sync_thrice(engine, actor):
        synced.append(engine)
        return sync(engine, actor) if len(synced) <= 3 else {}

    rollout.VLLMEngine.sync = sync_thrice
    reward.REWARDS["varied"] = varied
    train.main(argv)


@needs_vllm
def test_in_bfloat16_vllm_follows_the_trainer_and_the_gate_catches_a_missed_sync(
    seedling, tmp_path
):
    flags = ["--engine", "vllm", "--steps", "6", "--learning_rate", "0.02"]
    argv = argv_of(copy_start(seedling, tmp_path), *BF16, *flags)
    code, log = launch("unsynced_run", argv)
    assert code == 1 and re.search(r"error: step [34]: sampler and trainer disagree by", log), log
    synced = learning_steps(tmp_path / "tiny")[:3]
    assert len(synced) == 3 and all(row["train/learnt_tokens"] > 0 for row in synced)
    assert 1e-4 < max(row["train/gap"] for row in synced) < 0.02


def test_the_memory_of_a_run_is_near_what_was_measured():
    # GiB by torch's MemTracker under FSDP2: forward and backward, masters and gradients included,
    # without AdamW, reference and runtime
    for name, shards, tokens, checkpointing, measured in (
        ("7B", 8, 16001, True, 17.4),
        ("7B", 8, 31889, True, 24.8),
        ("7B", 8, 16001, False, 122.0),
        ("7B", 4, 16001, True, 24.1),
        ("3B", 1, 16001, True, 29.3),
        ("3B", 4, 16001, True, 11.4),
    ):
        size = QWEN25[name]
        settings = train.Settings(
            kl_coefficient=0.0, max_tokens_per_pack=tokens, gradient_checkpointing=checkpointing
        )
        learning, _ = memory.gpu_bytes(size, settings, shards)
        moments = 2 * 4 * size.parameters / shards
        got = (learning - moments - memory.RUNTIME) / memory.GIB
        assert 0.97 * measured < got < 1.15 * measured, (name, shards, got)


def test_what_fits_gets_its_memory_fraction_and_the_rest_is_refused_with_the_flags_that_help():
    gpu = 79.1 * memory.GIB
    for name, gpus, expected in (
        ("3B", 1, 0.28),  # 49 + 4 resting beside it
        ("3B", 2, 0.58),
        ("3B", 4, 0.6),
        ("7B", 4, 0.55),
        ("7B", 8, 0.6),
        ("7B", 1, "it fits with --lora_rank 16"),
        ("7B", 2, "it fits with --lora_rank 16"),
        ("32B", 8, "it fits with --rollout_tp 4 --lora_rank 16"),
        ("32B", 16, "it fits with --rollout_tp 4"),
        ("72B", 16, "it fits with --rollout_tp 4 --lora_rank 16"),
        ("72B", 32, "it fits with --max_tokens_per_pack 8192 --rollout_tp 4"),
    ):
        settings = train.Settings(model=name, gradient_checkpointing=True)
        if isinstance(expected, float):
            got = memory.fit(QWEN25[name], settings, gpus, gpu)
            assert abs(got - expected) < 0.01, (name, gpus, got)
        else:
            with pytest.raises(ValueError, match=rf"{name} does not fit on {gpus} GPU.*{expected}"):
                memory.fit(QWEN25[name], settings, gpus, gpu)
    given = train.Settings(model="7B", gradient_checkpointing=True, memory_fraction=0.6)
    with pytest.raises(ValueError, match="it fits with --memory_fraction 0"):
        memory.fit(QWEN25["7B"], given, 4, gpu)
    with pytest.raises(ValueError, match="it fits with --gradient_checkpointing true"):
        memory.fit(QWEN25["7B"], train.Settings(model="7B"), 8, gpu)


def test_a_model_is_measured_by_its_configuration_alone(tiny):
    size = train.measure_model(str(tiny[False]))
    whole = model.Actor.from_pretrained(str(tiny[False])).model
    assert size.parameters == sum(p.numel() for p in whole.parameters())
    assert size.vision == sum(p.numel() for p in whole.model.visual.parameters())
    assert size.embeddings == 2 * whole.lm_head.weight.numel()
    assert (size.layers, size.hidden) == (4, 128)
    tied = train.measure_model(str(tiny[True]))
    assert size.parameters - tied.parameters == tied.embeddings == size.embeddings / 2


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
        torch.equal(after[name], value)
        for name, value in before.items()
        if not name.startswith("run.")
    )
    assert (after["run.step"], after["run.updates"], after["run.not_finite"]) == (1, 0, 2)
    kept = torch.load(
        tmp_path / "tiny" / "not-finite" / "step-000001-2-rank-0.pt", weights_only=True
    )
    assert "lm_head.weight" in kept["broken_gradients"] and "gradient norm nan" in kept["why"]
    [pack] = kept["packs"]
    assert pack["advantages"].isinf().sum() == len(groups[3].rollouts[2].response)
    assert len(pack["sampler_logprobs"]) == pack["lengths"].sum()
    where, prompt, responses = pack["groups"][3]
    assert where == "train.parquet row 17" and prompt.dtype == torch.long and len(responses) == 4


def test_a_full_gpu_names_the_setting_and_how_far_to_lower_it(seedling, tmp_path):
    code, log = train_apart(copy_start(seedling, tmp_path), memory=True)
    assert (
        code == 1 and "set --max_tokens_per_pack to 4096 or --gradient_checkpointing true" in log
    ), log
    assert "allocate 2.00 GiB" in log


# --------------------------------------------------------------------------------------------------
# data.py: rows and images


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


def test_the_folder_of_the_rows_may_be_reached_by_a_link(tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "own.png").write_bytes(red())
    write(folder, images=[["own.png"]])
    (tmp_path / "alias").symlink_to(folder)
    assert data.load_problems(tmp_path / "alias" / "train.parquet")[0].images == (red(),)


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
    ("RGB", "PNG", (1, 2, 3), (1, 2, 3)), ("L", "PNG", 77, (77, 77, 77)),
    ("1", "PNG", 1, (255, 255, 255)),
    ("P", "PNG", 0, (0, 0, 0)), ("RGBA", "PNG", (9, 8, 7, 255), (9, 8, 7)),
    ("LA", "PNG", (50, 255), (50, 50, 50)),
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
    for width, height, low, high, factor in random_cases(1000):
        try:
            new = data.resized_size(width, height, low, high, factor)
        except ValueError as error:
            # bounds of one prime number of tiles, say 263, have no size of aspect below 200
            assert "no picture" in str(error)
            continue
        assert new[0] % factor == 0 and new[1] % factor == 0 and low <= new[0] * new[1] <= high
        assert data.resized_size(*new, low, high, factor) == new
        assert smart_resize(new[1], new[0], factor, low, high) == new[::-1]
        same += smart_resize(height, width, factor, low, high) == new[::-1]
        total += 1
    assert total > 750 and same > 0.9 * total  # the rule itself wherever it keeps its promise


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

    rows = [
        problem("<image><image>", grey(10, (60, 40), (40, 90))),
        problem("What?", ()),
        problem(images=grey(50, (28, 28))),
        problem("<image><image><image>", grey(90, *[(56, 56)] * 3)),
        problem(images=grey(50, (28, 28))),
    ]
    # shuffled: the first from two rows on, round the end, that has images and others: rows 2, none,
    # 0 (4 has the same), 0 (two for three), and 3 (1 has none, 2 the same)
    seen = {
        "own": [[10, 10], [], [50], [90] * 3, [50]],
        "blank": [[255, 255], [], [255], [255] * 3, [255]],
        "shuffled": [[50, 50], [], [10], [10] * 3, [90]],
    }
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
    "raw data URL": ("data:image/png,raw", "3 bytes are not a readable image"),
    "no data URL": ("data:image/png", "not a file's path, base64"),
    "junk in a data URL": ("data:image/png;base64,AA*A", "not a file's path, base64"),
    "up": ("../secret.png", "leads out of the folder"),
    "absolute": ("/etc/hosts.png", "leads out of the folder"),
    "link out": ("out.png", "leads out of the folder"),
    "folder link out": ("linked/secret.png", "leads out of the folder"),
    "beside": ("../rows_too/b.png", "leads out of the folder"),  # shares the prefix of the name
    "folder itself": (".", "no plain file"),
    "long name": ("x" * 5000 + ".png", "image "),
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
    (folder / "linked").symlink_to(tmp_path)
    (tmp_path / "rows_too").mkdir()
    (tmp_path / "rows_too" / "b.png").write_bytes(red())
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
    "opened image": (dict(problem="<image><|vision_start|>"), "<\\|vision_start\\|>"),
    "forged turn": (dict(problem="<image><|im_start|>system"), "<\\|im_start\\|>"),
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
@pytest.mark.parametrize("count", few_or_all(500, 4000))
def test_broken_bytes_of_every_format_are_readable_or_a_value_error(count):
    rng, noise = random.Random(0), Image.effect_noise((24, 31), 50).convert("RGB")
    exif = Image.Exif()
    exif[0x112] = 6
    options = [dict(form="JPEG", exif=exif), dict(form="WEBP", lossless=True)]
    options += [dict(form=form) for form in data.FORMATS]
    files, refused = [encode(noise, **option) for option in options], 0
    for i in range(count):
        raw = bytearray(files[i % len(files)])
        for _ in range(rng.choice((1, 2, 5, 20))):
            place = rng.randrange(rng.choice((len(raw), min(len(raw), 120))))
            raw[place] = rng.randrange(256)
        try:
            data.decode_image(bytes(raw[: rng.choice((None, len(raw) // 2))]))
        except ValueError:
            refused += 1
    assert count / 4 < refused < count


# --------------------------------------------------------------------------------------------------
# data.py: rows as people have them


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_known_data_sets_become_prompts_and_are_graded(
    pictures, processor, grader, name, suffix
):
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
    answers = [Response(response), Response(r"\boxed{no}")]
    scores = compute_rewards(answers, [loaded, loaded], {"": {graded: 1.0}}, grader)
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
    assert max(row.images for row in checked.rows) == 2
    assert max(row.videos for row in checked.rows) == 0


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
    "choices of structs": (dict(problem="?", choices={"label": ["A"]}), "", "no list of at most"),
    "27 choices": (dict(problem="?", choices=["x"] * 27), "", "no list of at most 26 texts"),
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
        "", "4 bytes are not a readable image",
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
        f"data:image/png,{urllib.parse.quote(red())}",
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


def test_a_split_whose_name_begins_as_another_is_found_alone(tmp_path):
    for name in ("train-clean.parquet", "train-other.parquet"):
        write_rows(tmp_path / name, dict(problem="?", answer="4"))
    for split, found in (
        ("train-clean", "train-clean.parquet"),
        ("train-other", "train-other.parquet"),
    ):
        assert {p.source for p in data.load_problems(tmp_path, split)} == {found}


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


# --------------------------------------------------------------------------------------------------
# data.py: prompts


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


def test_importing_data_needs_no_transformers():
    code = "import sys, data; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)


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
    reader.ahead(rows[2:])
    assert [reader(row).problem for row in rows[2:]] == rows[2:]
    assert sorted(answer for answer, _ in reader.made[4:]) == ["2", "3"]
    reader.ahead(rows)
    reader.ahead([])
    assert not reader._coming
    forgetful = CountingReader(processor)
    for _ in range(2):
        forgetful(rows[0])
    assert len(forgetful.made) == 2


def check_on_two_ranks(file, out):
    """Run with 2 ranks: what each rank finds usable, how many prompts it made, and its error."""
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
    run_apart("check_on_two_ranks", str(file), str(tmp_path / "two.pt"), ranks=2)
    (first, made), (second, also_made) = torch.load(tmp_path / "two.pt")
    assert first == second and first[0] == ["a", "c", "e"] and first[2] == 1
    assert "2 <image> in the question" in first[3][0] and "1 of 5 rows are broken" in first[4]
    # rows 0, 2, 4 and 1, 3, of which the one that failed is made again
    assert (made, also_made) == (3, 3)
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
# data.py: video


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


def other_video_statistics(folder, to):
    """The model in `folder`, but its processor normalises videos otherwise than images."""
    shutil.copytree(folder, to)
    processor = AutoProcessor.from_pretrained(to)
    processor.video_processor.image_mean = [0.2, 0.5, 0.7]
    processor.video_processor.image_std = [0.5, 0.2, 0.3]
    processor.save_pretrained(to)
    return to


@needs_vllm
@pytest.mark.xdist_group("vllm")
def test_vllm_sees_the_same_videos_normalised_by_their_own_mean_and_std(tiny, vllm, tmp_path):
    folder = other_video_statistics(tiny[False], tmp_path / "other")
    actor = with_bounds(folder)
    assert actor.processor.video_processor.image_mean != actor.processor.image_processor.image_mean
    prompts = mixed_prompts(actor)
    assert largest_gap(actor, vllm.engine_for(actor, folder), prompts) < 1e-4
    assert largest_gap(actor, rollout.HFEngine(actor, 12), prompts) < 1e-5


def test_a_rank_with_text_alone_trains_beside_one_with_images_and_videos(
    tiny, process_group, tmp_path
):
    run_apart("save_mixed_gradients", str(tiny[False]), str(tmp_path / "two.pt"), ranks=2)
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
    """Run with 2 ranks."""
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


def test_two_ranks_train_on_a_row_of_text_and_one_of_pictures_and_videos(seedling, tmp_path):
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
    folder = train_whole(
        seedling,
        tmp_path,
        "--data",
        train_file,
        "--test_data",
        test_file,
        "--prompts_per_step",
        "2",
        "--minibatch_prompts",
        "2",
        "--responses_per_prompt",
        "4",
        "--steps",
        "2",
        "--kl_coefficient",
        "0.1",
        "--max_frames",
        "2",
        "--max_frame_pixels",
        "1568",
        ranks=2,
    )
    steps = learning_steps(folder)
    assert len(steps) == 2
    assert all(row["train/gap"] < 1e-5 and row["train/learnt_tokens"] > 0 for row in steps)


# --------------------------------------------------------------------------------------------------
# reward.py: verdicts


@pytest.mark.parametrize("response, answer", [
    (r"so \boxed{15}.", "15"),
    (r"<think>a</think> \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{5} no, \boxed{15}", "15"),
    (r"\boxed {15}", "15"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\boxed{15}}", "15"),
    (r"a</think> \boxed{15}", "15"),  # the prompt may have opened the thinking
    (r"<think>\boxed{15}</think> done", "15"),  # where a box has to stand is what format is for
    (r"<think>\boxed{15}", "15"),
    (r"<think>\boxed{5}</think> \boxed{15} <think>", "15"),
    (r"\boxed{15}, in \boxed", "15"),
    (r"\boxed{15} \boxed{\frac{1}{2}", None),
    ("15", None),
    ("", None),
])  # fmt: skip
def test_last_boxed_is_what_the_response_commits_to_wherever_it_stands(response, answer):
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
    (r"<think>I end with </think> and \boxed{}. So</think> \boxed{15}", 1.0),
    # prose about the tags
    (r"<think>They want <think> </think> tags. So</think> \boxed{15}", 1.0),
    (r"<think>a</think> \boxed{15}, thought out between <think></think>", 1.0),
    (r"<think>a</think> as said in <think>: \boxed{15}", 1.0),
    (r"<think> <think> </think> \boxed{15}", 0.0),
    (r"<think>a</think> \boxed{15} <think>b</think>", 0.0),
    (r"\boxed{15}", 0.0),
    ("", 0.0),
])  # fmt: skip
def test_format_is_thinking_then_exactly_one_box(response, score):
    assert format_reward(None, Response(response), "15") == score


def test_answers_are_judged_as_a_careful_teacher_would(grader):
    got = grader.grade([case[:2] for case in CASES])
    assert [case for case, verdict in zip(CASES, got, strict=True) if verdict != case[2]] == []
    assert grader.timeouts == grader.crashes == 0


def test_listing_the_choices_earns_nothing(grader):
    separators = r", ; & | ~ ' : / _ = + - . or and to OR < > $,$ \, \; {,} \% % \\ \cup \cap \vee"
    separators += r" \mid \quad \approx"
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
@pytest.mark.parametrize("every", few_or_all(16, 1))
def test_every_geo3k_gold_is_itself_and_none_of_its_wrong_choices(every):
    rows = [json.loads(line) for line in (GEO3K / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 2401
    own, pairs = [], []
    for row in rows:
        own.append((row["answer"], row["answer"]))
        pairs += [(choice, row["answer"]) for choice in row["choices"] if choice != row["answer"]]
    assert len(pairs) == 7198  # 2401 * 3, less five choices that repeat the gold
    own, pairs = own[::every], pairs[::every]
    with Grader() as grader:
        grader.shortcut = False  # parsed and compared for real, not found equal as strings
        assert [pair for pair, ok in zip(own, grader.grade(own), strict=True) if not ok] == []
        assert [pair for pair, ok in zip(pairs, grader.grade(pairs), strict=True) if ok] == []
        assert grader.timeouts == grader.crashes == 0


def test_hundreds_of_answers_are_judged_each_way():
    assert sum(right for _, _, right in CASES) >= 200 <= sum(not right for _, _, right in CASES)


# --------------------------------------------------------------------------------------------------
# reward.py: hostile answers


# needs a thousand million digits, and is within every static limit
ENDLESS = r"\sin((((9^{999})^{999})^{999})^{999})"


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
        f"9^{{9^{{9^{{9^{{{n}}}}}}}}}",
        f"10**10**{n}",
        f"{n}99999!",
        f"(x+{n})^{{5000}}",
        "{" * 10000 + str(n) + "}" * 10000,
        r"\sqrt{" * 500 + str(n) + "}" * 500,
        "9" * (1_000_000 + n),
        f"\x00\x1b{n}",
        f"__import__('os').system('touch {marker}')",
        ENDLESS if i < 14 else f"9^9^{n}",
        r"\frac{" * 40 + str(n),
        "\\" * 200 + str(n),
        r"\text{" + "\ud800🦊" * 60 + str(n) + "}",
        f"open('{marker}{n}','w').write('{n}')",
    ][i % 14]


@pytest.mark.parametrize(
    "count, time_limit", [(280, 1.0), pytest.param(1000, 2.0, marks=pytest.mark.slow)]
)
def test_hostile_answers_are_wrong_in_seconds_and_change_no_other_verdict(
    tmp_path, count, time_limit
):
    numbers = re.compile(r"[-0-9.]+")  # a busy machine may take a second for a sane root
    easy = [case for case in CASES if time_limit == 2 or numbers.fullmatch(case[0] or "")]
    cases = random.Random(0).choices(easy, k=count)
    cases += [(hostile(i, str(tmp_path / "x")), "15", False) for i in range(count)]
    random.Random(1).shuffle(cases)
    start = time.monotonic()
    with Grader(time_limit=time_limit) as fresh:
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
        start = time.monotonic()
        got = one.grade([(r"\sqrt{4}", "2"), (ENDLESS, "15"), (r"\sqrt{9}", "3")])
        assert 1 <= time.monotonic() - start < 20  # a new worker imports Math-Verify
        assert (got, one.timeouts, one.crashes) == ([True, False, True], 1, 0)
        assert not running(pid)


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
    with Grader(time_limit=1) as fresh:
        assert fresh.grade([(ENDLESS, "15")] * 100) == [False] * 100
        assert fresh.timeouts == 1


def test_long_answers_are_wrong_unread():
    with Grader() as short:
        assert short.grade([("15" + " " * 298, "15"), ("15" + " " * 299, "15")]) == [True, False]
        assert short.pool == []  # plain numbers start no process


@pytest.mark.parametrize("end", ["exit", "killed idle", "killed grading"])
def test_no_worker_outlives_its_parent(end):
    # a busy worker has its kernel timer of 0.5 seconds, one still importing Math-Verify ends after
    # that
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


@pytest.mark.parametrize("gold", [
    "9" * 100_000, "{" * 100_000, "1 " * 50_000, "°" * 100_000, r"\boxed{" * 15_000, "a=" * 50_000,
])  # fmt: skip
def test_a_gold_of_100_000_characters_is_as_cheap_as_an_answer(gold):
    start = time.monotonic()
    with Grader() as short:
        assert short.grade([("15", gold), (gold, "15"), (gold, gold)] * 10) == [False] * 30
        assert short.pool == [] and time.monotonic() - start < 2
    assert score("numeric", "15", gold) == score("exact", "15", gold) == 0


def test_normalising_takes_time_in_proportion_to_the_text(monkeypatch):
    monkeypatch.setattr(reward, "MAX_CHARS", 10**6)
    for unit in (
        "1",
        "1.1",
        "1/",
        "1 000",
        "°",
        "{",
        "x=",
        "AB ",
        r"\frac",
        r"\text{",
        "½",
        " is ",
        "x < ",
    ):
        seconds = {}
        for count in (2_000, 20_000):
            start = time.process_time()
            reward.normalise(unit * (count // len(unit)))
            seconds[count] = time.process_time() - start
        assert seconds[20_000] < 40 * seconds[2_000] + 0.1, unit  # quadratic would be 100 times


def test_workers_do_not_load_torch(grader):
    grader.grade([(r"\sqrt{4}", "2")])
    maps = Path(f"/proc/{grader.pool[0].pid}/maps").read_text()
    assert "python" in maps and "torch" not in maps


def test_a_grader_of_nothing_is_refused():
    for bad in ({"workers": 0}, {"time_limit": 0}):
        with pytest.raises(ValueError, match="positive"):
            Grader(**bad)


# --------------------------------------------------------------------------------------------------
# reward.py: rewards by name


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
        r"\boxed{15} \boxed{5}", r"<think>\boxed{15}</think> \boxed{}", r"\boxed{5, 14, 15, 35}",
        r"\boxed{5 or 15}", r"\boxed{5} or 15", "15", r"<think>\boxed{15} or \boxed{5}</think>",
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
    ("exact", "Red car", ["red car", "a red car.", "The  RED CAR!", r"\text{red car}",
    r"\textbf{Red} car"],
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
     ["B", "b", "(B)", "B.", "b)", "B. a red car", "(B) a red car", r"\text{B}", r"\textbf{(B)}",
     "B: 5"],
     ["A", "AB", "A, B", "B, A", "B or C", "B. or C.", "A. B. C. D.", "(A) (B)", "a red car",
     "C. not B", "", "?"]),
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
    near, far, padded = (
        score("caption", text, references)
        for text in (
            "a man rides a horse at the beach",
            "two cats on a sofa",
            "man riding horse along beach, dog, cat, house, tree, car, boat, bird, city, road, "
            "sky, cloud, grass, sun",
        )
    )
    assert score("caption", "someone on a BROWN horse.", references) == 1
    assert 0 <= far < padded < near < 1 and score("caption", "", references) == 0


def test_several_images_earn_a_share_for_each(grader):
    golds = ("2", r"\frac{1}{2}", "not enough information")
    asked = dataclasses.replace(problem("<image><image><image>?"), answers=golds)
    earned = {
        r"2, 0.5, not enough information": 1,
        "2; 0.5; red": 2 / 3,
        "0.5, 2, red": 0,
        "3, 0.5, red": 1 / 3,
        "2, 0.5": 0,
        "2, 0.5, red, not enough information": 0,
        "": 0,
        "2": 0,
    }
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
    text = "accuracy=0.9,format=0.1; chartqa: format=0.2,numeric=0.8; "
    text += "vqa:format=0.5,exact=0.5,accuracy=2"
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
def cut(problem, response, gold):
    return 1 / 0
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
    with pytest.raises(
        ValueError, match=r"mine.py:cut' failed for train.parquet row 17: ZeroDiv.*mine.py, line 13"
    ) as failure:
        rewards(f"{file}:cut=1", ["a"], ["4"])
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
    for name in (f"{file}:none", f"{file}:short", f"{tmp_path}/none.py:one"):
        with pytest.raises(ValueError, match=r"unknown reward.*of \(problem, response, gold\)"):
            parse_weights(f"{name}=1")


def test_unknown_rewards_and_bad_weights_are_refused():
    for text, message in (
        ("acuracy=1", "acuracy.*known: accuracy.*format"),
        ("accuracy", "'accuracy' is not a new name=number"),
        ("accuracy=", "name=number"), ("accuracy=one", "name=number"),
        ("accuracy=nan", "name=number"),
        ("accuracy=1,accuracy=2", "'accuracy=2' is not a new"), ("", "name=number"),
        ("numeric(x)=1", "numeric"),
        ("format(3)=1", "format"), ("exact(3)=1", "exact"),
        ("a:exact=1", "a part without a source"),
        ("exact=1;a:exact=1;a:exact=1", "not a new"), ("accuracy=1;", "name=number"),
        ("overlong=1", "overlong"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse_weights(text)
    assert parse_weights("accuracy=0.9, format=.1") == {"": {"accuracy": 0.9, "format": 0.1}}
    assert parse_weights("exact=1;a/b: overlong(20,8)=-1,exact=2") == {
        "": {"exact": 1},
        "a/b": {"overlong(20,8)": -1, "exact": 2},
    }


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


def test_golds_that_hold_a_whole_solution_are_read_by_every_reward(grader):
    for name, gold, answer in (
        ("accuracy", "<answer> 3 </answer>", "3.0"), ("accuracy", "so 1 + 2 #### 3", "3"),
        ("choice", "<think>A?</think><answer> B </answer>", "b"), ("numeric", "#### 40", "41"),
        ("exact", "<answer>Red car</answer>", "red car"), ("exact", r"It is \boxed{red}", "red"),
    ):  # fmt: skip
        got = rewards(f"{name}=1", [rf"\boxed{{{answer}}}", r"\boxed{A}"], [gold] * 2, grader)
        assert got["reward"] == [1, 0], gold


def test_responses_and_problems_must_pair_up():
    with pytest.raises(ValueError):
        rewards("exact=1", ["a", "b"], ["15"])


# --------------------------------------------------------------------------------------------------
# reward.py: a model as judge


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


# --------------------------------------------------------------------------------------------------
# reward.py: the audit


def run_reward(*arguments):
    """python reward.py ..."""
    sys.argv = ["reward.py", *arguments]
    reward.main()


def audit(file, *flags):
    return run_apart("run_reward", str(file), *flags)


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
    flags = ["--rewards", "accuracy=1,format=1;chartqa:numeric=1"]
    out = subprocess.check_output([sys.executable, HERE / "reward.py", file, *flags], text=True)
    assert [line for line in out.splitlines() if line.startswith("rows.jsonl")] == [
        r"rows.jsonl row 3: gold '\\frac{1}{' is not equal to itself",
        "rows.jsonl row 1: answer '14' to ('15',) earns 0.00",
        "rows.jsonl row 5: answer '5' to ('5',) earns 1.00, recorded was 0.00",
    ]
    assert "gradable golds: 7 of 8; accuracy of 6 responses: 0.667" in out


def test_the_audit_reads_parquet_and_rollouts_own_records(tmp_path, actor, process_group):
    golds = [["3", "three"], ["4"], ["red"]]
    file = write(tmp_path, problem=["?"] * 3, answer=None, gold=golds, data_source=["a", "b", "b"])
    assert "gradable golds: 4 of 4;" in audit(file, "--columns", "answer=gold")
    engine, weights = (
        rollout.HFEngine(actor, max_response_tokens=4),
        parse_weights("accuracy=1;b:exact=1"),
    )
    problems = data.load_problems(file, columns="answer=gold")
    with Grader() as grader:
        reader = build_reader(actor.processor)
        _, records, _ = rollout.evaluate(engine, problems, reader, 2, 0, weights, grader)
    records = json.loads(json.dumps(records))
    assert [(r["source"], r["answer"]) for r in records[::2]] == list(
        zip("abb", golds, strict=True)
    )
    records[1]["response"] = records[5]["response"] = (
        r"\boxed{The red.}"  # what was recorded is wrong of the last
    )
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    out = audit(tmp_path / "r.jsonl", "--rewards", "accuracy=1;b:exact=1")
    assert [line for line in out.splitlines() if "row" in line] == [
        "r.jsonl row 5: answer 'The red.' to ('red',) earns 1.00, recorded was 0.00"
    ]


def test_the_audit_lists_golds_that_no_normal_answer_can_match(tmp_path):
    golds = ["15", r"2 \sqrt { 221 }", "Answer: 3", "<answer> 3 </answer>", "1e-05", "red", "- 8",
             "10 cm", r"\angle 2 and \angle 6", "P(3, 4)", "3 : 4", r"20 y^2 - 10 y", "x < 60",
             "3 big apples", "between 3 and 5 apples", "5 wugs", "1 2"]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    rows = [{"answer": gold, "response": ""} for gold in golds]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = audit(file)
    assert [line for line in out.splitlines() if "itself" in line] == [
        "rows.jsonl row 13: gold '3 big apples' equals only itself, not a plain '3'",
        "rows.jsonl row 14: gold 'between 3 and 5 apples' equals only itself, not a plain '5'",
        "rows.jsonl row 15: gold '5 wugs' equals only itself, not a plain '5'",
        "rows.jsonl row 16: gold '1 2' is not equal to itself",
    ]
    assert "gradable golds: 13 of 17;" in out
    # of other rewards than accuracy a plain spelling says nothing
    assert "gradable golds: 17 of 17" in audit(file, "--rewards", "exact=1")


@pytest.mark.parametrize("line, message", [
    (b'{"answer": "1"', "is not JSON"),
    pytest.param(b"[" * 100_000, "is not JSON", id="deep"),  # else the input is the name
    (b'{"answer": "\xff"}', "is not JSON"),
    (b'["answer"]', "is a list; a row is an object"),
    (b"7", "is a int"), (b'"answer"', "is a str"),
    (b'{"question": "?"}', "is broken .*text or a list"),
    (b'{"answer": null}', "is broken .*None"), (b'{"answer": []}', "is broken"),
    (b'{"answer": ["a", {}]}', "is broken .*{}"),
    (b'{"answer": "1", "accuracy": "high"}', "is broken .*high"),
    (b'{"answer": "1", "response": 5}', "is broken .*5"),
])  # fmt: skip
def test_the_audit_names_file_and_row_of_what_is_broken(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_bytes(b'{"answer": "1", "response": ""}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl row 1 {message}"):
        reward.read_rows(str(tmp_path / "rows.jsonl"))


def test_the_audit_refuses_files_that_it_cannot_read(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    for name in ("broken.parquet", "none.parquet", "none.jsonl"):
        code, log = launch("run_reward", str(tmp_path / name))
        assert code == 2 and name in log and "Traceback" not in log


# --------------------------------------------------------------------------------------------------
# support/checkpoint.py: survival


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
def unbroken(seedling, tmp_path_factory):
    """The outcome of a run that nothing happened to."""
    folder = copy_start(seedling, tmp_path_factory.mktemp("unbroken"))
    code, log = train_apart(folder)
    assert code == 0, log
    rows, weights, state = outcome(folder)
    assert weights != (folder / "tiny-model" / "model.safetensors").read_bytes()
    assert [row["step"] for row in rows] == [0, 0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 6, 6, 1, 3, 6]
    assert all(row["train/learnt_tokens"] for row in rows if "train/reward" in row)
    return rows, weights, state


# wherever a run can be; the first ones are met one after another by a run that goes on after each
KILLS = (
    "call train.evaluate 1", "return train.update 3", "call safetensors.torch.save 1",
    "call support.checkpoint.CheckpointWriter.finish 1",
    "return support.checkpoint.CheckpointWriter.finish 1", "call support.report.write_report 1",
    "call support.report.Log.write 4", "return support.report.Log.write 2", "call shutil.rmtree 1",
    "call model.Actor.save 1",
    "call train.build 1", "return train.build 1", "call train.evaluation 1",
    "call rollout.HFEngine.generate 3",
    "return rollout.HFEngine.generate 4", "call train.score 3", "call train.plan_minibatches 3",
    "call train.score_tokens 2",
    "call train.update 6", "return train.update 8", "call support.report.Log.step 3",
    "call train.save_checkpoint 2",
    "return train.save_checkpoint 2", "return safetensors.torch.save 2",
    "call support.checkpoint.file_sizes 2",
    "call support.checkpoint.finish_checkpoint 3", "return shutil.rmtree 1",
    "return support.report.write_report 3",
    "call train.evaluation 3", "return model.Actor.save 1",
)  # fmt: skip


CHAIN = KILLS[:10]


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(seedling, unbroken, tmp_path):
    copy_start(seedling, tmp_path)
    for i, kill in enumerate(CHAIN):
        code, log = train_apart(tmp_path, "--save_in_background", str(i % 2 == 0), kill=f"9 {kill}")
        assert code == -9, f"{kill}\n{log}"
        if "Log.write" in kill:  # a kill in the middle of a line
            with (tmp_path / "tiny" / "metrics.jsonl").open("a") as file:
                file.write('{"step": 5, "train/rew')
    code, log = train_apart(tmp_path)
    assert code == 0 and "resumed from" in log, log
    assert_same(outcome(tmp_path), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_a_run_killed_anywhere_ends_as_if_nothing_had_happened(seedling, unbroken, tmp_path, kill):
    copy_start(seedling, tmp_path)
    code, log = train_apart(
        tmp_path, "--save_in_background", str(KILLS.index(kill) % 2 == 1), kill=f"9 {kill}"
    )
    assert code == -9, log
    code, log = train_apart(tmp_path)
    assert code == 0, log
    assert_same(outcome(tmp_path), unbroken)


@pytest.mark.slow
def test_a_killed_run_with_vllm_ends_as_if_nothing_had_happened(seedling, tmp_path):
    pytest.importorskip("vllm")
    whole, killed = (copy_start(seedling, tmp_path / name) for name in ("whole", "killed"))
    code, log = train_apart(whole, "--engine", "vllm")
    assert code == 0, log
    code, log = train_apart(killed, "--engine", "vllm", kill="9 call train.update 7")
    assert code == -9, log
    code, log = train_apart(killed, "--engine", "vllm")
    assert code == 0 and "resumed from" in log, log
    assert_same(outcome(killed), outcome(whole))


def test_a_signal_ends_the_run_after_the_step_and_a_second_one_at_once(
    seedling, unbroken, tmp_path
):
    copy_start(seedling, tmp_path)
    code, log = train_apart(tmp_path, kill="15 call train.update 5")
    assert (
        code == 143
        and "step 3: SIGTERM; the checkpoint is written, go on with --resume auto" in log
    ), log
    assert (
        tmp_path / "tiny" / "checkpoints" / "step-000003"
    ).is_dir() and "model exported" not in log
    code, log = train_apart(tmp_path, kill="2 call train.score 1")
    assert code == 130 and "step 4: SIGINT" in log, log
    code, log = train_apart(tmp_path, kill="2 call train.update 1; 2 call train.update 2")
    assert code == -2 and "SIGINT" not in log, log
    code, log = train_apart(tmp_path)
    assert code == 0, log
    assert_same(outcome(tmp_path), unbroken)


def test_a_full_disk_stops_the_run_and_loses_no_earlier_checkpoint(seedling, unbroken, tmp_path):
    copy_start(seedling, tmp_path)
    code, log = train_apart(
        tmp_path, kill="15 call train.update 4"
    )  # leaves with a checkpoint of step 2
    assert code == 143, log
    code, log = train_apart(tmp_path, file_bytes=1_000_000)  # bytes, and a checkpoint has 7 million
    assert code == 1 and re.search(
        r"step 4: a checkpoint could not be written \(rank 0: .*File too large", log
    ), log
    assert "go on with --resume auto" in log
    code, log = train_apart(tmp_path)
    assert code == 0 and "step-000002" in log, log
    assert_same(outcome(tmp_path), unbroken)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(seedling, unbroken, tmp_path):
    copy_start(seedling, tmp_path)
    train_apart(tmp_path, kill="15 call train.update 7")
    [shard] = (tmp_path / "tiny" / "checkpoints" / "step-000004").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1000])
    code, log = train_apart(tmp_path, "--learning_rate", "6.5e-4", "--steps", "5")
    assert code == 0 and re.search(
        "step-000004 is damaged.*step-000004.1; trying the one before", log
    ), log
    assert (
        "step-000002" in log
        and "learning_rate was 0.0006 when this run was started, and is 0.00065" in log
    )


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_stops_in_its_first_step_or_saves_every_step_ends_as_if_it_had_not(
    seedling, unbroken, tmp_path, ranks
):
    whole = unbroken
    if ranks == 2:
        code, log = train_apart(copy_start(seedling, tmp_path / "whole"), ranks=2)
        assert code == 0, log
        whole = outcome(tmp_path / "whole")
    first = copy_start(seedling, tmp_path / "first")
    code, log = train_apart(first, kill="15 call train.update 1", ranks=ranks)
    assert code == 143 and "step 1: SIGTERM; the checkpoint is written" in log, log
    # step 1 is shown, by a forward without gradient, and saved without an evaluation
    every = copy_start(seedling, tmp_path / "every")
    killed = dict(kill="9 return train.save_checkpoint 2", ranks=ranks)
    code, log = train_apart(every, "--save_every", "1", **killed)
    assert code == -9, log
    for folder in (first, every):
        code, log = train_apart(folder, ranks=ranks)
        assert code == 0 and "resumed from" in log, log
        assert_same(outcome(folder), whole)


def test_the_curriculum_of_the_pages_goes_on_as_if_nothing_had_happened(seedling, tmp_path):
    page = (HERE / "assets" / "survival.md").read_text()
    block = re.search(r"```python\n(import data, torch, train\n.*?)```", page, re.DOTALL)
    script = tmp_path / "curriculum.py"
    script.write_text(block[1])
    whole, killed = (copy_start(seedling, tmp_path / name) for name in ("whole", "killed"))
    code, log = train_apart(whole, script=str(script))
    assert code == 0, log
    code, log = train_apart(killed, script=str(script), kill="9 call train.update 10")
    assert code == -9, log
    code, log = train_apart(killed, script=str(script))
    assert code == 0 and "resumed from" in log, log
    assert_same(outcome(killed), outcome(whole))
    [shard] = (whole / "tiny" / "checkpoints" / "step-000006").glob("*.safetensors")
    solved = load_file(shard)["run.state solved"]
    assert len(solved) == 20 and (solved != 0.5).any()


@pytest.mark.slow
def test_a_killed_run_with_muon_on_two_ranks_ends_as_if_nothing_had_happened(seedling, tmp_path):
    flags = ("--optimizer", "muon", "--schedule", "cosine")
    whole, killed = (copy_start(seedling, tmp_path / name) for name in ("whole", "killed"))
    code, log = train_apart(whole, *flags, ranks=2)
    assert code == 0, log
    code, log = train_apart(killed, *flags, ranks=2, kill="9 call train.update 7")
    assert code == -9, log
    code, log = train_apart(killed, *flags, ranks=2)
    assert code == 0 and "resumed from" in log, log
    assert_same(outcome(killed), outcome(whole))


def test_resume_must_have_a_checkpoint(seedling, tmp_path):
    code, log = train_apart(copy_start(seedling, tmp_path), "--resume", "must")
    assert code == 1 and "--resume must: no whole checkpoint in" in log


def test_the_folder_of_a_run_says_what_it_is_made_of(seedling, tmp_path):
    train_apart(copy_start(seedling, tmp_path), kill="15 call train.build 1")
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


def torchrun_faulty(folder, *flags, restarts=0, **faults):
    """Two ranks, of which rank 1 meets the faults."""
    argv, faults = argv_of(folder, *flags), dict(rank=1, **faults)
    arguments = json.dumps(argv), json.dumps(faults)
    mark = dict(RUN_MARK=str(folder))
    return torchrun(__file__, "faulty_run", *arguments, restarts=restarts, **mark)


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
    code, log = torchrun_faulty(killed, kill="9 call train.update 7", restarts=1)
    assert code == 0 and "resumed from" in log, log
    assert_same(outcome(killed), outcome(quiet))
    code, log = torchrun_faulty(asked, kill="15 call train.score 3")
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
        tmp_path, "--engine", engine, "--rollout_tp", env["tp"], kill="9 call train.update 3"
    )
    ended = time.monotonic()
    assert code == 1 and "-9" in log, log
    while marked_processes(tmp_path) and time.monotonic() < ended + 10:
        time.sleep(0.1)
    assert marked_processes(tmp_path) == []


@pytest.mark.slow
def test_two_thousand_steps_need_no_more_memory_files_threads_or_processes_than_a_few(
    seedling, tmp_path
):
    copy_start(seedling, tmp_path)
    flags = (
        "--steps 2000 --prompts_per_step 1 --max_response_tokens 2 --eval_every 250 --save_every 50"
    )
    argv = argv_of(tmp_path, *flags.split())
    # an interpreter of its own, as a user's: a fork of pytest grows by itself
    done = subprocess.run(
        [
            sys.executable,
            __file__,
            "faulty_run",
            json.dumps(argv),
            json.dumps({"watch": str(tmp_path / "seen")}),
        ],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = np.loadtxt(tmp_path / "seen")  # megabytes, files, threads, children
    half = len(seen) // 2
    print(len(seen), seen[half // 2], seen[-1], seen.max(0))
    growth = np.median(seen[-10:, 0]) - np.median(seen[half - 5 : half + 5, 0])
    assert growth < 10 and np.ptp(seen[half:, 1:], axis=0).max() <= 2, seen[::5]


# --------------------------------------------------------------------------------------------------
# support/checkpoint.py: checkpoints


def test_a_forward_without_gradient_leaves_the_weights_sharded(actor, process_group):
    groups = random_groups(actor)
    actor.shard(torch.device("cpu"))
    before = [id(p) for p in actor.model.parameters()]
    with torch.no_grad():
        actor.logprobs(groups)
    assert [id(p) for p in actor.model.parameters()] == before  # those that the optimizer holds
    assert all(isinstance(p, model.DTensor) for p in actor.model.parameters())
    draw(rollout.HFEngine(actor, 3), [groups[1][0]], 2)
    assert [id(p) for p in actor.model.parameters()] == before
    actor.logprobs(groups)[0].sum().backward()
    assert [id(p) for p in actor.model.parameters()] == before


def go_on_with_more_ranks(folder, out, shard_ranks):
    """Run with several ranks: go on from the checkpoint of one rank, and leave one of theirs."""
    processes.start_processes()
    run, groups = adam_run(folder, out, shard_ranks=shard_ranks)
    checkpoint.load_checkpoint(
        run, checkpoint.newest_checkpoint(Path(out) / "tiny" / "checkpoints")
    )
    states = [whole_state(run)]
    loss = learn(run, groups)["loss"]
    checkpoint.save_checkpoint(run)
    states.append(whole_state(run))
    for name, tensor in run.actor.weights(torch.float32):  # what the engine and an export get
        assert torch.equal(tensor, states[-1].get(name, tensor)), name
    if torch.distributed.get_rank() == 0:
        torch.save({"loss": loss, "states": states}, Path(out) / "two.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks, shard_ranks", [(2, 0), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_a_checkpoint_of_one_rank_goes_on_with_more_and_the_reverse(
    tiny, process_group, tmp_path, ranks, shard_ranks
):
    run, groups = adam_run(tiny[False], tmp_path)
    learn(run, groups)
    checkpoint.save_checkpoint(run)
    saved = whole_state(run)
    run_apart("go_on_with_more_ranks", str(tiny[False]), str(tmp_path), shard_ranks, ranks=ranks)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert same(two["states"][0], saved)
    # one rank goes on as two did
    assert learn(run, groups)["loss"] == pytest.approx(two["loss"], rel=1e-5)
    again, _ = adam_run(tiny[False], tmp_path)
    checkpoint.load_checkpoint(
        again, checkpoint.newest_checkpoint(tmp_path / "tiny" / "checkpoints")
    )
    assert again.step == 2 and again.schedule.get_last_lr() == run.schedule.get_last_lr()
    assert same(whole_state(again), two["states"][1])
    learn(again, groups)
    learn(run, groups)
    weights = zip(run.actor.model.parameters(), again.actor.model.parameters(), strict=True)
    for one, other in weights:
        close(model.full(one), model.full(other), atol=2e-4)


def test_the_newest_checkpoints_are_kept_and_the_best(tiny, process_group, tmp_path):
    run, _ = adam_run(tiny[False], tmp_path)
    for run.step, accuracy in enumerate((0.5, 0.9, -1.0, 0.9, 0.1, -1.0, 0.2), 1):
        checkpoint.save_checkpoint(run, accuracy)
    # the two newest, and the newer one of the two best
    names = sorted(path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000006", "step-000007"]


def test_only_what_is_trained_is_saved_and_other_tensors_are_refused(tiny, process_group, tmp_path):
    run, groups = adam_run(tiny[False], tmp_path)
    learn(run, groups)
    checkpoint.save_checkpoint(run)
    path = checkpoint.newest_checkpoint(tmp_path / "tiny" / "checkpoints")

    def two_weights(actor):
        for p in list(actor.model.parameters())[2:]:
            p.requires_grad_(False)

    run, groups = adam_run(tiny[False], tmp_path, prepare=two_weights)
    with pytest.raises(
        ValueError,
        match=r"step-000001 holds other tensors than this run, such as .* none here; .*run\.json",
    ):
        checkpoint.load_checkpoint(run, path)
    run.step = 1
    learn(run, groups)
    checkpoint.save_checkpoint(run)
    [shard] = (tmp_path / "tiny" / "checkpoints" / "step-000002").glob("*.safetensors")
    assert len(load_file(shard)) == 5 + 2 * 4  # counts; weight, AdamW's step and two moments


@pytest.mark.parametrize(
    "damage", "cut, missing, another, no manifest, empty manifest, null, bytes".split(", ")
)
def test_every_damage_to_a_checkpoint_is_seen(tmp_path, process_group, capsys, damage):
    for step in (4, 8):
        folder = tmp_path / f"step-00000{step}"
        folder.mkdir()
        for rank in range(2):
            save_file({"a": torch.randn(100)}, folder / f"shard-0000{rank}.safetensors")
        (folder / "manifest.json").write_text(json.dumps(checkpoint.file_sizes(folder)))
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-000008"
    shard, manifest = folder / "shard-00001.safetensors", folder / "manifest.json"
    raw = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(raw[:-1])
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


class Momentum(torch.optim.SGD):
    """An optimizer of one's own."""

    def __init__(self, weights, lr):
        super().__init__(weights, lr=lr, momentum=0.9)


class Hiding(torch.optim.Optimizer):
    """A wrapper whose inner optimizer keeps its state for itself."""

    def __init__(self, weights):
        super().__init__(weights, {"lr": 1e-3})
        self.inner = torch.optim.AdamW(self.param_groups[0]["params"], lr=1e-3)

    def step(self):
        self.inner.step()


def run_with(kind, folder, out, **changes):
    """adam_run with another optimizer."""
    if kind in ("adamw", "muon"):
        return adam_run(folder, out, optimizer=kind, schedule="cosine", **changes)
    run, groups = adam_run(folder, out, **changes)
    weights = [(n, p) for n, p in run.actor.model.named_parameters() if p.requires_grad]
    run.optimizer = Momentum(weights, 1e-3) if kind == "momentum" else Hiding(weights)
    run.schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, run.settings.rate)
    return run, groups


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def checkpoints(out):
    return Path(out) / "tiny" / "checkpoints"


@pytest.mark.parametrize("kind", ["adamw", "muon", "momentum"])
def test_a_run_goes_on_exactly_with_any_optimizer(tiny, process_group, tmp_path, kind):
    run, groups = run_with(kind, tiny[False], tmp_path)
    learn(run, groups)
    checkpoint.save_checkpoint(run)
    again, _ = run_with(kind, tiny[False], tmp_path)
    checkpoint.load_checkpoint(again, checkpoint.newest_checkpoint(checkpoints(tmp_path)))
    assert same(whole_state(again), whole_state(run))
    assert again.schedule.get_last_lr() == run.schedule.get_last_lr()
    for each in (run, again):
        learn(each, groups)
    assert same(whole_state(again), whole_state(run))
    names = {name.split(" ")[-1] for name in whole_state(run) if " " in name}
    adam = {"step", "exp_avg", "exp_avg_sq"}
    assert names == {"adamw": adam, "muon": adam | {"momentum_buffer"}}.get(
        kind, {"momentum_buffer"}
    )


def muon_update(folder, out):
    """Trained weights after one update by Muon; every rank returns them, rank 0 writes them."""
    run, groups = adam_run(folder, out, optimizer="muon", learning_rate=0.01, warmup_updates=0)
    learn(run, groups)
    weights = {name: model.full(p).detach() for name, p in run.actor.model.named_parameters()}
    if torch.distributed.get_rank() == 0:
        torch.save(weights, Path(out) / "muon.pt")
    return weights


def muon_update_of_two(folder, out):
    processes.start_processes()
    muon_update(folder, out)
    torch.distributed.destroy_process_group()


def test_muon_moves_sharded_matrices_as_whole_ones(tiny, process_group, tmp_path):
    before = model.Actor.from_pretrained(str(tiny[False])).model.state_dict()
    whole = muon_update(tiny[False], tmp_path)
    run_apart("muon_update_of_two", str(tiny[False]), str(tmp_path), ranks=2)
    sharded = torch.load(tmp_path / "muon.pt", weights_only=True)
    for name in whole:
        moved = whole[name] - before[name]
        other = sharded[name] - before[name]
        if "q_proj.weight" in name and "language" in name:
            # orthogonal, at the root mean square of an AdamW step: 0.2 of the learning rate
            assert moved.square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.3)
        # bf16 inside: a relative noise of 1e-3 moves the step for a gradient of low rank by 0.16 of
        # its norm; shards orthogonalised each by itself are 0.53 away
        assert (other - moved).norm() <= 0.3 * moved.norm() + 1e-6, name


def test_state_that_a_checkpoint_would_miss_is_an_error_when_it_is_saved(
    tiny, process_group, tmp_path
):
    run, groups = run_with("hiding", tiny[False], tmp_path)
    learn(run, groups)
    with pytest.raises(RuntimeError, match=r"is updated, and optimizer.state holds nothing for it"):
        checkpoint.save_checkpoint(run)
    run, groups = adam_run(tiny[False], tmp_path)
    run.optimizer.state[run.optimizer.param_groups[0]["params"][1]]["age"] = 3
    with pytest.raises(RuntimeError, match=r"holds age = 3 for .* tensors alone"):
        checkpoint.save_checkpoint(run)
    first = [next(run.actor.model.named_parameters())]
    run.optimizer = torch.optim.AdamW(first)
    with pytest.raises(RuntimeError, match=r"is trained, and not among optimizer.param_groups"):
        checkpoint.save_checkpoint(run)
    run.optimizer = torch.optim.AdamW([first[0][1]])
    with pytest.raises(ValueError, match="make it from named_parameters"):
        checkpoint.save_checkpoint(run)
    assert not checkpoints(tmp_path).exists()


@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_a_weight_that_was_never_updated_has_no_state_before_and_after(
    tiny, process_group, tmp_path, kind
):
    run, _ = run_with(kind, tiny[False], tmp_path)
    (idle, _), *others = checkpoint.trained_weights(run.optimizer).items()
    for _, p in others:
        p.grad = torch.ones_like(p)
    run.optimizer.step()
    run.optimizer.zero_grad()
    before = whole_state(run)
    checkpoint.save_checkpoint(run)
    assert same(whole_state(run), before)
    again, _ = run_with(kind, tiny[False], tmp_path)
    checkpoint.load_checkpoint(again, checkpoint.newest_checkpoint(checkpoints(tmp_path)))
    assert same(whole_state(again), before)
    assert not any(name.startswith(idle + " ") for name in before)


def test_a_forward_without_gradient_changes_nothing_of_a_checkpoint(tiny, process_group, tmp_path):
    run, groups = adam_run(tiny[False], tmp_path)
    learn(run, groups)
    before = whole_state(run)
    [minibatch] = minibatches_of(run, groups)
    with torch.no_grad():
        run.actor.logprobs(minibatch.packs[0].bundles)
    assert same(whole_state(run), before)
    assert all(isinstance(p, DTensor) for p in run.actor.model.parameters())


def test_state_of_ones_own_is_saved_restored_and_named(tiny, process_group, tmp_path):
    run, _ = adam_run(tiny[False], tmp_path)
    run.state["solved"] = torch.tensor([0.25, 0.5])
    run.state["seen"] = torch.tensor([3, 4])
    checkpoint.save_checkpoint(run)
    path = checkpoint.newest_checkpoint(checkpoints(tmp_path))
    again, _ = adam_run(tiny[False], tmp_path)
    checkpoint.load_checkpoint(again, path)
    assert same(again.state, run.state) and again.state["seen"].dtype == torch.int64
    for state in ({"solved": torch.zeros(3)}, {"unsolved": torch.zeros(2)}):
        other, _ = adam_run(tiny[False], tmp_path)
        other.state = state
        with pytest.raises(ValueError, match=r"such as run\.state (un)?solved: .* there, .* here"):
            checkpoint.load_checkpoint(other, path)


# --------------------------------------------------------------------------------------------------
# support/report.py


def test_the_page_of_metrics_defines_every_metric_that_a_run_logs_and_no_other(finished):
    table = (HERE / "assets" / "metrics.md").read_text().split("| metric |")[1].split("\n## ")[0]
    cells = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    assert all(
        len(cell) == 7 and cell[2].strip() for cell in cells
    )  # metric, formula, unit, healthy, broken
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell[1])]
    patterns = {name: re.sub("[A-Z]+", ".+", re.escape(name)) for name in names}
    logged = {name for row in metrics(finished) for name in row} - {"step"}
    logged = {name for name in logged if "varied" not in name}  # this run's own reward
    for name in logged:
        assert any(re.fullmatch(pattern, name) for pattern in patterns.values()), (
            f"{name} is not in assets/metrics.md"
        )
    for name, pattern in patterns.items():
        elsewhere = name.startswith(
            ("sync/", "eval/accuracy/source/", "eval/looks_answer")
        )  # with vLLM, with several test files, and where something is boxed
        assert elsewhere or any(re.fullmatch(pattern, metric) for metric in logged), (
            f"no run logs {name}"
        )


HOSTILE = ["</script><img src=x onerror=\"document.title='run'\">", "<!--<script>",
"NUL \0 bell \7 escape \x1b[31m",
           "lone \ud800 surrogate", "\u202eright to left", "${1}`'\"\\", "\u2028",
           "REPORT_DATA"]  # fmt: skip


def fabricate(folder, steps=60, texts=("fine",), groups=1, responses=2, tokens=4):
    """The files of a run whose responses hold `texts`, over and over."""
    words = [[text, -0.1, 0.05] for text in itertools.islice(itertools.cycle(texts), tokens)]
    answer = dict(
        scores=dict(advantage=1.0, reward=1.0, accuracy=1.0, brief=0.5),
        truncated=True,
        turns=[dict(tokens=words)],
    )
    png = report.thumbnail(Image.new("RGB", (40, 30), "red"))
    group = dict(
        where=texts[0],
        question=texts[0],
        answer=texts[-1],
        images=[png],
        responses=[answer] * responses,
    )
    rows = [
        {
            "step": i,
            "train/reward": i / steps,
            "train/kl": 9.0 if i == 7 else 0.1 * (i % 2),
            "train/loss": math.nan,
            "seconds/learn": 2.0,
            "seconds/sample": 1.0,
            "train/gap": 1e-6,
        }
        for i in range(1, steps + 1)
    ]
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
    texts = [
        token[0] for token in report["steps"][0]["groups"][0]["responses"][0]["turns"][0]["tokens"]
    ]
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
    rewards = [0.25, 0.5, 0.75, 1.0]
    groups = [dataclasses.replace(g, scores={"reward": rewards}) for g in groups]
    groups[0] = dataclasses.replace(groups[0], scores={"reward": [0.5] * 4})
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
        [(prompt, [r.turns]) for r in groups[1].rollouts[:3]], entropy="none"
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
        [turn] = got["turns"]
        if cut > 0:  # the first two and the last two are left
            assert turn["tokens"].pop(2) == [f" [{cut} tokens left out] ", 0, 0]
            numbers = numbers[:2] + numbers[-2:]
        assert [tuple(token[1:3]) for token in turn["tokens"]] == [
            pytest.approx(pair, abs=1e-4) for pair in numbers
        ]


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


def browse(page, address=""):
    """The document of a page after its scripts have run."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        "--dump-dom",
    ]
    return subprocess.run(
        [BROWSER, *flags, page.as_uri() + address], capture_output=True, text=True, timeout=60
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
        and re.search('class="(up|down)', dom)
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


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_gets_every_metric_of_every_step(seedling, tmp_path):
    folder = train_whole(seedling, tmp_path, "--steps", "2", "--wandb", "grpo")
    [log] = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    seen = log.read_bytes()
    assert all(name.encode() in seen for row in metrics(folder) for name in row if name != "step")


def test_a_conversation_is_shown_with_what_was_read_and_what_the_picture_gave(actor):
    ids = torch.tensor(actor.processor.tokenizer.encode("yes"))
    said = make(actor, "<image>Look again.", picture(1), later=True)
    count = 2 * len(ids)
    numbers = torch.stack([torch.arange(count) / 4, -torch.arange(count) / 4, torch.ones(count)])
    first, read, last = report.shown_turns([ids, said, ids], numbers, actor.processor.tokenizer)
    assert read["question"] == "<image>Look again."
    assert [image[:23] for image in read["images"]] == ["data:image/webp;base64,"]
    tokens = first["tokens"] + last["tokens"]
    assert "".join(token[0] for token in tokens) == "yesyes"
    assert [token[1:] for token in tokens] == [[i / 4, -i / 4, 1.0] for i in range(count)]
    without = report.shown_turns([ids], numbers[:2, : len(ids)], actor.processor.tokenizer)
    assert all(len(token) == 3 for token in without[0]["tokens"])


def fabricate_looks(folder):
    """A run of three steps: step 2 is well coloured, and its first problem has a picture."""
    fabricate(folder, steps=4)
    png = report.thumbnail(Image.new("RGB", (40, 30), "red"))
    looked = [["three", -0.1, 0.2, 1.5], [" sides", -0.1, -0.2, -1.0]]
    read = dict(question="Look again.", images=[png])
    steps = []
    for step, moved in ((1, 0.001), (2, 0.2), (3, 0.0)):
        plain = [[text, logprob, moved] for text, logprob, _, _ in looked]
        groups = []
        for turns in ([dict(tokens=looked), read, dict(tokens=looked)], [dict(tokens=plain)]):
            if step != 2:
                turns = [dict(tokens=plain)]
            response = dict(scores=dict(advantage=1.0, reward=1.0), truncated=False, turns=turns)
            facts = dict(where="row 1", question="Sides?", answer="3", images=[])
            groups.append(facts | dict(responses=[response] * 8))
        steps.append(json.dumps(dict(step=step, drawn=2, groups=groups)) + "\n")
    (folder / "rollouts.jsonl").write_text("".join(steps))
    zeros = [json.dumps({"step": i, "train/clipped": 0.0}) + "\n" for i in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(zeros))
    report.write_report(folder)
    return folder / "report.html"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_the_page_opens_on_a_coloured_step_and_has_a_second_view_where_there_is_a_picture(tmp_path):
    page = fabricate_looks(tmp_path)
    opened = browse(page)
    assert 'class="error"' not in opened
    assert re.search(r'class="chosen"[^>]*>step 2<', opened)
    assert opened.count("<button") == 2 and 'id="groups" class="updates"' in opened
    # in each of 8 responses the first group has 2 tokens up and 2 down, the second 2 up; the legend
    assert opened.count('class="up clear"') == 8 * 2 + 8 * 2 + 1
    assert opened.count('class="read"') == 8 and opened.count("8 responses, scroll sideways") == 2
    picture_view = browse(page, "#2/picture")
    assert 'id="groups" class="picture"' in picture_view
    assert (
        picture_view.count('class="down clear"') == 8 * 2 + 1
    )  # in the group with a picture alone
    assert picture_view.count(">row 1 · no picture, so nothing to compare") == 1
    assert "the picture gave 0.25 nats a token" in picture_view  # (1.5 - 1.0) / 2
    without = browse(page, "#1/picture")  # no token of step 1 has a fourth number
    assert without.count("<button") == 0 and 'id="groups" class="updates"' in without
    assert "this page reloads itself every minute" in opened  # step 0 of 4
    assert ">0.8</text>" in opened and ">-0.2</text>" not in opened  # all zeros: drawn from 0 to 1


def test_every_curve_has_a_title_and_says_what_is_healthy_and_broken():
    template = (HERE / "support" / "report.html").read_text()
    panels = template.split("const PANELS = [")[1].split("\n];")[0].split("\n  {title: ")[1:]
    for panel in panels:
        assert re.search(r'healthy:\s+"[^"]+"', panel) and re.search(r'broken:\s+"[^"]+"', panel), (
            panel
        )
    named = {name for panel in panels for name in re.findall(r'"(train/\w+)"', panel)}
    table = (HERE / "assets" / "metrics.md").read_text().split("| metric |")[1].split("\n## ")[0]
    assert set(re.findall(r"`(train/\w+)`", table)) <= named


def test_without_a_terminal_progress_is_a_plain_line_every_ten_steps(
    tiny, process_group, tmp_path, capsys
):
    run, groups = small_run(
        tiny[False], out=str(tmp_path), name="run", steps=25, minibatch_prompts=8
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    scores = {"reward": [0.5, 0.5, 0.0, 1.0], "accuracy": [0.0, 0.0, 0.0, 1.0]}
    groups = [dataclasses.replace(group, scores=scores) for group in groups]
    log = report.Log(run)
    minibatch = SimpleNamespace(plan=SimpleNamespace(imbalance=0.0))
    capsys.readouterr()
    for step in log.progress(range(25)):
        log.step(step + 1, groups, [minibatch], [{}], {"learn": 2.0}, {})
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"step {step} of 25" for step in (1, 10, 20, 25)
    ]
    assert lines[0].startswith("step 1 of 25: reward 0.50 acc 0.25 entropy 0.00 len ") and err == ""
    [row, *_] = report.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["train/turns"] == 1 and row["train/reward"] == 0.5 and row["train/imbalance"] == 0


PAGES = [
    "README.md",
    *(f"assets/{page}.md" for page in "data families metrics rewards survival".split()),
]


def readme_code(language, beginning="", page="README.md"):
    """The blocks of code of a page in a language, those with a line that begins so."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (HERE / page).read_text(), re.DOTALL)
    return [block for block in blocks if re.search(rf"^{re.escape(beginning)}", block, re.M)]


def page_rows(page, head):
    """The cells of the first table of a page that has such a column."""
    table = (HERE / page).read_text().split(f"| {head} |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def page_commands(page):
    """The arguments of every command for train.py on a page."""
    lines = re.findall(r"^ {4}.*train\.py(.*)$", (HERE / page).read_text(), re.M)
    lines += re.findall(r"`python train\.py([^`]*)`", (HERE / page).read_text())
    return [line.split(" && ")[0].split("#")[0] for line in lines]


def test_every_link_of_the_readme_and_its_pages_points_at_what_its_text_names():
    links = runpy.run_path(str(HERE / "assets" / "links.py"))
    text = (HERE / "README.md").read_text()
    assert len(links["LINK"].findall(text)) > 40
    assert text == links["mended"](text), "some lines have moved: run python assets/links.py"
    for moved in ("[`grpo.spread`](grpo.py#L1)", "[`return x`](grpo.py#L1)"):
        if "spread" in moved:
            assert links["mended"](moved) != moved
        else:
            with pytest.raises(ValueError, match="return x"):
                links["mended"](moved)
    for page in PAGES:
        text = (HERE / page).read_text()
        for target in re.findall(r"\]\(([^)]+)\)", text):
            path, _, place = target.partition("#")
            file = (HERE / page).parent / path
            assert file.exists(), f"{page} links to {target}"
            if path.endswith(".md") and place:
                titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
                assert place in [title.lower().replace(" ", "-") for title in titles], target
        for named in re.findall(r"\b(?:support|assets)/[\w.]+\w", text):
            assert (HERE / named).exists(), f"{page} names {named}"


def test_the_path_of_the_readme_is_less_than_2000_lines():
    links = runpy.run_path(str(HERE / "assets" / "links.py"))
    [path] = re.findall(r"\n## 4.*?\n## 5", (HERE / "README.md").read_text(), re.DOTALL)
    found = set(links["LINK"].findall(path))
    total = 0
    for label, file in found:
        first = links["line_of"](label, file)
        for node in ast.walk(links["tree_of"](file)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.lineno == first:
                total += node.end_lineno - first + 1
    assert len(found) > 25 and 1000 < total < 2000, total


def test_the_tests_that_the_readme_and_its_pages_name_exist():
    names = re.findall(r"^def (test_\w+)", (HERE / "test_all.py").read_text(), re.M)
    texts = [(HERE / page).read_text() for page in PAGES]
    chosen = re.findall(r"-k (\w+)`", "\n".join(texts))
    for head in ("question", "to change"):
        chosen += [row[-1].strip("`") for row in page_rows("README.md", head)]
    assert len(chosen) > 25
    for expression in chosen:
        for word in expression.split(" or "):
            assert any(word in name for name in names), f"-k {expression} finds nothing"


def test_the_flags_of_the_readme_and_its_pages_exist_and_its_commands_are_read():
    flags = {f.name for f in dataclasses.fields(train.Settings)}
    elsewhere = "nproc_per_node nnodes node_rank rdzv_backend rdzv_endpoint max-restarts"
    elsewhere += " shutdown-timeout keep_adapter updates dist help"
    for page in PAGES:
        unknown = set(re.findall(r"--([a-z][\w-]+)", (HERE / page).read_text())) - flags
        unknown -= set(elsewhere.split())
        assert not unknown, f"{page} has {unknown}"
        for command in page_commands(page):
            if "--help" not in command:
                train.parse_settings(shlex.split(command))
    for _, cell in page_rows("README.md", "variant"):
        train.parse_settings(shlex.split(cell.strip("`")))


def test_the_loss_of_the_readme_runs_as_printed(seedling, tmp_path, monkeypatch):
    script = tmp_path / "cispo.py"
    [block] = readme_code("python", "def policy_loss")
    script.write_text(block)
    monkeypatch.setattr(grpo, "policy_loss", grpo.policy_loss)  # put back at the end
    policy_loss = runpy.run_path(str(script))["policy_loss"]
    assert grpo.policy_loss is policy_loss
    # ratio 1.5 is held at 1.2 and keeps its gradient, -1.2 A; 0.5 with A = -1: 0.5
    logprobs = torch.tensor([math.log(1.5), math.log(0.5)], requires_grad=True)
    inputs = dict(old_logprobs=torch.zeros(2), advantages=torch.tensor([1.0, -1.0]))
    losses, clipped = policy_loss(logprobs, lengths=torch.tensor([2]), clip_low=0.2, **inputs)
    close(torch.autograd.grad(losses.sum(), logprobs)[0], torch.tensor([-1.2, 0.5]))
    assert clipped.tolist() == [True, False]
    in_place = re.findall(r"`(loss = [^`]+)`", (HERE / "README.md").read_text())
    source = (HERE / "grpo.py").read_text()
    assert len(in_place) == 2 and in_place[0] in source
    changed = {}
    exec(source.replace(*in_place), changed)
    losses, _ = changed["policy_loss"](logprobs, lengths=torch.tensor([2]), **inputs)
    close(torch.autograd.grad(losses.sum(), logprobs)[0], torch.tensor([-1.2, 0.5]))
    code, log = train_apart(copy_start(seedling, tmp_path), script=str(script))
    assert code == 0, log
    assert any(row["train/learnt_tokens"] for row in learning_steps(tmp_path / "tiny"))


def test_the_reward_and_the_family_of_the_pages_run_as_printed(tmp_path, monkeypatch):
    file = tmp_path / "my_rewards.py"
    [block] = readme_code("python", "def brief")
    file.write_text(block)
    weights = f"format=0.9,{file}:brief=0.1,{file}:brief(2)=0"
    got = rewards(weights, [Response("abc"), Response("a" * 400)], [problem(), problem()])
    assert got[f"{file}:brief"] == [1, 0] and got[f"{file}:brief(2)"] == [0, 0]
    monkeypatch.setattr(model, "FAMILIES", dict(model.FAMILIES))
    [block] = readme_code("python", "FAMILIES", "assets/families.md")
    exec(block, {})
    assert model.FAMILIES["my_vl"] == model.FAMILIES["internvl"]


def test_the_rows_of_the_readme_are_read_as_printed(tmp_path):
    [line] = readme_code("json")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(line)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(red())
    for split in ("train", "test"):
        [row] = data.load_problems(tmp_path, split)
        assert row.question == "<image>Which colour is the square?"
        assert (row.answer, row.images) == ("red", (red(),))


def test_the_notebook_of_the_readme_runs_as_printed(seedling, tmp_path):
    copy_start(seedling, tmp_path / "runs")
    (tmp_path / "runs" / "tiny").mkdir()
    (tmp_path / "runs" / "tiny" / "model").symlink_to(tmp_path / "runs" / "tiny-model")
    [block] = readme_code("python", "from model import Actor", "assets/families.md")
    (tmp_path / "notebook.py").write_text(block)
    printed = run_apart("run_in_folder", str(tmp_path), "notebook.py").splitlines()[-1]
    row = data.load_problems(seedling / "figures", "test")[0]
    assert printed.startswith(f"{row.question} {row.answer} [")


def run_in_folder(folder, script):
    os.chdir(folder)
    runpy.run_path(script, run_name="__main__")


def test_the_picture_of_a_pack_shows_what_make_pack_lays_out():
    from assets import draw_pack

    picture = draw_pack.FILE.read_text()
    assert picture == draw_pack.draw(), "run python -m assets.draw_pack"
    pack = draw_pack.example()
    count = len(draw_pack.NAMES)
    sees = torch.zeros(count, count, dtype=torch.bool)
    for queries, real, keys, mask in model.padded_batches(pack.layout, 1000, "cpu"):  # wide
        for segment in range(len(queries)):
            for i, query in enumerate(queries[segment]):
                if real[segment, i]:
                    sees[query, keys[segment][mask[segment, 0, i]]] = True
    drawn = [kind == "seen" for kind in re.findall(r'class="(seen|unseen)"', picture)]
    assert drawn == sees.flatten().tolist()


def test_the_pages_name_every_family_every_reward_and_every_data_set_with_its_flag(pictures):
    listed = " ".join(row[1] for row in page_rows("assets/families.md", "family"))
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(model.FAMILIES)
    listed = " ".join(row[0] for row in page_rows("assets/rewards.md", "reward"))
    assert set(re.findall(r"`(\w+)[`(]", listed)) == {*reward.REWARDS, *reward.BATCHED}
    shown = set()
    for cell, flags in page_rows("assets/data.md", "your rows look like this"):
        columns = re.search(r"--columns (\S+)", flags.strip("`"))
        for name in re.split(", ", cell.split(":")[0]):
            if name in SHAPES and name != "EasyR1":  # whose test renames a column
                row = dict(SHAPES[name][0])
                if name == "MMMU":
                    row |= {f"image_{i}": PICTURE for i in range(3, 8)}
                    row["question"] += "".join(f"<image {i}>" for i in range(3, 8))
                file = write_rows(pictures / "train.parquet", row)
                [loaded] = data.load_problems(file, columns=columns[1] if columns else "")
                assert loaded.images and loaded.answer, name
                if "exact=1" in flags or "choice=1" in flags or "numeric=1" in flags:
                    assert SHAPES[name][5] + "=1" in flags
            shown.add(name)
    assert shown >= set(SHAPES)


def test_what_fits_is_computed_as_the_readme_says():
    notes = {"lora_rank": "LoRA", "rollout_tp": "tp 4", "max_tokens_per_pack": "8192"}
    settings, _ = train.parse_settings(["--preset", "geo3k"])
    gpu = 79.1 * memory.GIB
    for name, *cells in page_rows("README.md", "Qwen2.5-VL"):
        for i, cell in enumerate(cells):
            ranks, expected = 2**i, "no"
            for changes in ({}, *memory.possible_changes(settings, ranks)):
                changed = dataclasses.replace(settings, **changes)
                if memory.sampler_fraction(QWEN25[name], changed, ranks, gpu):
                    learning, _ = memory.gpu_bytes(QWEN25[name], changed, ranks)
                    made = [notes[flag] for flag, value in changes.items() if value]
                    expected = ", ".join([f"{learning / memory.GIB:.0f}", *made])
                    break
            assert cell == expected, f"{name} on {ranks} GPUs"


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
# support/figures.py, tiny_model.py


@pytest.fixture(scope="module")
def figures_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    figures.make_figures(folder, train=420, test=210, seed=3)
    return folder


def test_the_same_seed_draws_the_same_files_and_another_seed_others(tmp_path, figures_folder):
    for folder, seed in (("first", 5), ("again", 5), ("other", 4)):
        figures.make_figures(tmp_path / folder, train=20, test=20, seed=seed)
    for name in ("train.parquet", "test.parquet"):
        first, again = (tmp_path / folder / name for folder in ("first", "again"))
        assert first.read_bytes() == again.read_bytes()
    some, others = (
        {problem.images for problem in data.load_problems(folder)}
        for folder in (tmp_path / "other", figures_folder)
    )
    assert some and not some & others


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


def test_the_tiny_model_is_the_same_for_the_same_seed(tmp_path):
    weights = [
        (
            tiny_model.build_tiny(tmp_path / name, ["a b"], seed=seed) / "model.safetensors"
        ).read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert weights[0] == weights[1] != weights[2]


# --------------------------------------------------------------------------------------------------
# On a GPU: pytest -m gpu


GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


def measured(device, work):
    """Result of the second call, its milliseconds, and GiB at most (0 on a CPU)."""
    work()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    took = 1000 * (time.perf_counter() - start)
    return result, took, torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


def off(got, expected):
    """Distance as a share of the expected norm."""
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def large_actor(folder, device, layers=8):
    """A random Qwen2.5-VL of 7B's width, in bfloat16; the tiny one on a CPU. The same each time."""
    if device == "cpu":
        return model.Actor.from_pretrained(str(folder), torch.bfloat16)
    gc.collect()  # the last test's
    processor = AutoProcessor.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        config = sized_config(folder, "7B", layers, depth=8)
        network = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return model.Actor(network.eval(), processor)


def large_groups(actor, device, count=5):
    """Packs of 16,375 tokens for 5 groups."""
    if device == "cpu":
        return random_groups(actor, (0, 1), ((3, 5), (2, 4)))
    return [group for _ in range(count) for group in bench_group(actor, 400, [575] * 5)]


def sharded(actor, device, **options):
    actor.shard(torch.device(device), torch.bfloat16, **options)
    return actor


@each_device
@pytest.mark.parametrize("window", [None, 64])
def test_gpu_kernel_and_dense_attention_agree(device, window, table, monkeypatch):
    # proves on a GPU: causal to the bottom right, window, grouped heads, and all of it backward
    prompt, responses, size, dtype = 400, (1, 17, 500, 2048), 128, torch.bfloat16
    if device == "cpu":
        prompt, responses, size, dtype = 9, (1, 3, 5), 16, torch.float32
        window = window and 4
        force_kernels(monkeypatch, plain_varlen)
    segments, t = [(0, prompt, 0, 0)], prompt
    for length in responses:
        segments.append((t, t + length, 0, prompt))
        t += length
    layout = model.Layout(segments)
    for heads, key_heads in ((28, 4), (16, 2)):
        shapes = [(1, n, t, size) for n in (heads, key_heads, key_heads)]
        inputs = [torch.randn(shape, device=device) for shape in shapes]
        grad = torch.randn(1, t, heads, size, device=device)

        def run(kernel, dtype, inputs=inputs, grad=grad):
            monkeypatch.setattr(model, "kernel_runs", lambda q: kernel)
            leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
            options = dict(scaling=size**-0.5, sliding_window=window, layout=layout)
            out, _ = model.shared_attention(None, *leaves, None, **options)
            out.backward(grad.to(dtype))
            return out.detach(), *(x.grad for x in leaves)

        exact = run(False, torch.float32)
        dense = list(map(off, run(False, dtype), exact))
        kernel = list(map(off, run(True, dtype), exact))
        name = f"attention {heads}/{key_heads} window {window}"
        table(device, f"{name} dense", **dict(zip(("out", "dq", "dk", "dv"), dense, strict=True)))
        table(device, f"{name} kernel", **dict(zip(("out", "dq", "dk", "dv"), kernel, strict=True)))
        assert all(a < 3 * b + 1e-5 for a, b in zip(kernel, dense, strict=True))


@pytest.mark.parametrize(
    "device, size",
    [("cpu", "tiny"), *(pytest.param("cuda", size, marks=GPU) for size in ("tiny", "large"))],
)
def test_gpu_packing_in_bfloat16_is_within_its_floor(device, size, tiny, table):
    if size == "tiny":
        actor = model.Actor.from_pretrained(str(tiny[False]), torch.bfloat16)
        actor.model.to(device)
    else:
        actor = large_actor(tiny[False], device)
    for name, counts in (("different", (2, 0)), ("equal", (1, 1))):
        prompts = prompts_with(actor, *counts)
        if name == "equal":
            prompts[1] = prompts[0]
        gaps = actor.packing_gaps(prompts)
        names = ("nats", "slope", "noise", "slope_noise")
        table(device, f"packing {size}, {name} prompts", **dict(zip(names, gaps, strict=True)))
    actor.check_packing(prompts_with(actor, 2, 0))


@each_device
def test_gpu_update_at_full_width(device, tiny, table, process_group):
    actor = large_actor(tiny[False], device)
    actor.model.gradient_checkpointing_enable()
    sharded(actor, device)
    groups = large_groups(actor, device)
    optimizer = torch.optim.AdamW(actor.model.parameters(), 1e-6, fused=device == "cuda")

    def update():
        logprobs, _ = actor.logprobs(groups)
        logprobs.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return logprobs

    logprobs, ms, peak = measured(device, update)
    assert logprobs.isfinite().all()
    tokens = sum(len(p.ids) + sum(len(r) for [r] in responses) for p, responses in groups)
    layers = actor.model.model.language_model.layers
    weights = sum(model.full(p).numel() for p in layers.parameters() if p.ndim > 1)
    head = actor.model.get_output_embeddings().weight.numel()
    operations = 6 * (weights * tokens + head * len(logprobs))  # nothing counted twice
    rates = dict(tokens_per_s=1000 * tokens / ms, tflops=operations / ms / 1e9)
    table(device, "update, 7B's width, 8 layers", ms=ms, tokens=tokens, gib=peak, **rates)


@each_device
def test_gpu_tower_in_one_call(device, tiny, table, monkeypatch):
    if device == "cpu":
        force_kernels(monkeypatch, plain_varlen)
    actor = large_actor(tiny[False], device)
    tower = actor.model.model.visual
    grid = torch.tensor([[1, 34, 42]] * 6 if device == "cuda" else [[1, 8, 6]] * 2, device=device)
    pixels = torch.randn(int(grid.prod(-1).sum()), 1176, device=device, dtype=torch.bfloat16)
    results = {}
    for name in ("sdpa", "flash_tower"):
        actor.model.set_attn_implementation({"vision_config": name})

        def both_ways():
            out = tower(pixels, grid_thw=grid).pooler_output
            tower.zero_grad()
            out.float().square().sum().backward()
            return out.detach(), tower.patch_embed.proj.weight.grad

        with torch.no_grad():
            _, ms, _ = measured(device, lambda: tower(pixels, grid_thw=grid))
        results[name], both_ms, peak = measured(device, both_ways)
        table(device, f"tower {name}", ms=ms, with_backward_ms=both_ms, gib=peak)
    errors = list(map(off, results["flash_tower"], results["sdpa"]))
    table(device, "tower flash_tower against sdpa", out=errors[0], gradient=errors[1])
    assert all(error < 0.05 for error in errors)


@each_device
@pytest.mark.parametrize("entropy", ["none", "value", "gradient"])
def test_gpu_head_against_float32(device, entropy, table):
    n, width, vocabulary = (4096, 3584, 152064) if device == "cuda" else (40, 16, 300)
    h = torch.randn(n, width, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).bfloat16()
    weight = weight.requires_grad_()
    targets = torch.randint(8, vocabulary, (n,), device=device)
    banned = torch.tensor([7], device=device)
    request = model.Request(targets, banned, 1.0, None, entropy, 1024)

    def head():
        logprobs, entropies = model.ChunkedLogprobs.apply(h, weight, request)
        (logprobs + (entropies if entropy == "gradient" else 0)).sum().backward()
        grads = h.grad, weight.grad
        h.grad = weight.grad = None
        return logprobs.detach(), entropies.detach(), *grads

    got, ms, peak = measured(device, head)
    wide_h = h.detach().float().requires_grad_()
    wide_weight = weight.detach().float().requires_grad_()
    logps = (wide_h @ wide_weight.T).index_fill(-1, banned, -torch.inf).log_softmax(-1)
    exact = logps.gather(-1, targets[:, None])[:, 0]
    exact_entropy = -(logps.exp() * logps.masked_fill(logps == -torch.inf, 0)).sum(-1)
    (exact + (exact_entropy if entropy == "gradient" else 0)).sum().backward()
    errors = dict(
        nats=(got[0] - exact).abs().mean().item(),
        dh=off(got[2], wide_h.grad),
        dw=off(got[3], wide_weight.grad),
    )
    if entropy != "none":
        errors["entropy"] = (got[1] - exact_entropy).abs().mean().item()
    table(device, f"head, entropy {entropy}", ms=ms, gib=peak, **errors)
    assert all(error < 0.05 for error in errors.values())


@each_device
def test_gpu_reference_on_the_cpu_scores_the_same(device, tiny, table, process_group):
    def score(offload):
        actor = large_actor(tiny[False], device)
        actor.model.requires_grad_(False)
        sharded(actor, device, offload=offload)
        groups = large_groups(actor, device, 1)
        with torch.no_grad():
            scored, ms, peak = measured(device, lambda: actor.logprobs(groups, entropy="none")[0])
        table(device, f"reference, offload {offload}", ms=ms, gib=peak)
        return scored

    torch.manual_seed(0)
    expected = score(offload=False)
    torch.manual_seed(0)
    close(score(offload=True), expected, atol=1e-3)


@each_device
def test_gpu_sampling_with_gathered_shards_is_scored_alike(device, tiny, table, process_group):
    actor = sharded(large_actor(tiny[False], device), device)
    prompts = prompts_with(actor, 1, 0)
    drawn = draw(rollout.HFEngine(actor, 32), prompts, n=4)
    with torch.no_grad():
        logprobs, _ = actor.logprobs(as_groups(prompts, drawn))
    gap = (logprobs.cpu() - sampled(drawn)).abs()
    table(device, "transformers' sampler in bf16", nats=gap.mean(), most=gap.max())
    assert gap.mean() < 0.05


@each_device
def test_gpu_weights_one_at_a_time(device, tiny, table, process_group, tmp_path):
    actor = sharded(large_actor(tiny[False], device), device)

    def count():
        return sum(weight.numel() for _, weight in actor.weights(torch.bfloat16))

    numbers, ms, peak = measured(device, count)
    before = time.perf_counter()
    state = {name: p.detach() for name, p in actor.model.named_parameters()}
    saving = torch.distributed.checkpoint.async_save(state, checkpoint_id=str(tmp_path / "saved"))
    blocked = time.perf_counter() - before
    saving.result()
    seconds = time.perf_counter() - before
    rates = dict(billions=numbers / 1e9, ms=ms, gib=peak)
    table(device, "weights in bf16", **rates, save_blocks_s=blocked, save_takes_s=seconds)
    assert numbers == sum(model.full(p).numel() for p in actor.model.parameters())


@each_device
def test_gpu_frozen_and_trained_towers_and_two_backwards(device, tiny, table, process_group):
    results = []
    for frozen in (False, True):
        actor = large_actor(tiny[False], device)
        if frozen:
            actor.freeze("tower", "projector")
        sharded(actor, device)
        groups = random_groups(actor, (1, 2), ((40, 60), (30, 70)))
        with torch.no_grad():
            results.append(actor.logprobs(groups)[0])
    gradients_of = []
    for _ in range(2):
        actor.model.zero_grad()
        actor.logprobs(groups)[0].mean().backward()
        gradients_of.append([p.grad for p in actor.model.parameters() if p.requires_grad])
    same = sum(map(torch.equal, *map(lambda g: map(model.full, g), gradients_of)))
    gap = (results[0] - results[1]).abs().mean().item()
    share = same / len(gradients_of[0])
    table(device, "frozen against trained tower", nats=gap, equal_gradients=share)
    assert gap < 0.05
    assert share == 1 or device == "cuda"  # atomics add in any order there


# --------------------------------------------------------------------------------------------------
# The benchmark


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
    before = reset_peak()
    start = time.perf_counter()
    if variant == "padded, all":
        logprobs = padded_with_all_logits(actor, groups)
    else:
        logprobs, _ = actor.logprobs(groups, features, entropy="none")
    (-logprobs.mean()).backward()
    return time.perf_counter() - start, mebibytes("VmHWM") - before, logprobs.detach()


def give_back_blocks_of(size):
    """Freed blocks of so many bytes and more go back to the system at once."""
    ctypes.CDLL("libc.so.6").mallopt(-3, size)


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
            give_back_blocks_of(2**20)  # what is freed is not counted, and what is used is new
            memory, logprobs = {}, {}
            for variant in variants:
                _, memory[variant], logprobs[variant] = measured_update(actor, groups, variant)
                close(logprobs[variant], logprobs["padded"], atol=1e-4)
            give_back_blocks_of(2**25)
            runs = {variant: [] for variant in variants}
            for _ in range(3):  # interleaved, so that a slow minute of the machine hits all alike
                for variant in variants:
                    runs[variant].append(measured_update(actor, groups, variant)[0])
            seconds = {variant: sorted(times)[1] for variant, times in runs.items()}
            gain, saved = (x["padded"] / x["shared"] for x in (seconds, memory))
            bars[tower, prompt, length] = gain, saved
            cells = [
                f"{seconds[v]:.2f} s, {memory[v]:.0f} MiB" if v in seconds else ""
                for v in ("padded, all", "padded", "packed", "shared", "shared, kept")
            ]
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
    globals()[sys.argv[1]](*map(json.loads, sys.argv[2:]))
