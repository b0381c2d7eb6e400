"""What a run shows: metrics, loggers, the console's progress, and report.html, one page offline.

    a step --Log--> metrics.jsonl, rollouts.jsonl, responses/ --write_report--> report.html

The page is support/report.html with the data of a run put in; the files beside it hold them all.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from support.checkpoint import write_aside
from support.processes import say

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

# what report.html shows; then it is small
SHOWN_STEPS = 20  # of a run
SHOWN_GROUPS = 4  # of a step
SHOWN_RESPONSES = 8  # of a group
SHOWN_IMAGES = 6  # of a prompt or of an observation
SHOWN_TEXT = 4000  # characters of a prompt or of an observation
SHOWN_TOKENS = 1000  # of a turn
SHOWN_POINTS = 500  # of a curve
REPORT_BYTES = 19_000_000  # beyond it the rollouts of every second step are left out

PLAIN_EVERY = 10  # steps between two lines of progress where there is no terminal


class Clock:
    """Seconds per phase of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start


class Log:
    """Writes what the run did, on rank 0: files in the run's folder (see assets/metrics.md),
    loggers, and a line of progress."""

    def __init__(self, run):
        s = run.settings
        self.run = run
        self.folder = s.folder
        self.main = dist.get_rank() == 0
        evaluations = s.steps / s.eval_every
        self.show_every = s.eval_every * max(1, round(evaluations / SHOWN_STEPS))  # steps
        self.bar = None
        self.loggers = []
        self.due = 0.0  # when the page is to be written again
        if self.main:
            self._forget_later_steps()
            self.loggers = open_loggers(s)

    def _forget_later_steps(self) -> None:
        """What came after the checkpoint comes again, and what an earlier run wrote is not ours."""
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            lines = []
            for row in read_jsonl(self.folder / name) if self.run.step else []:
                if row["step"] <= self.run.step:
                    lines.append(json.dumps(row) + "\n")
            write_aside(self.folder / name, "".join(lines))

    def progress(self, steps: range):
        """The steps, with a bar where there is a terminal."""
        self.bar = tqdm(
            steps,
            "step",
            disable=None if self.main else True,  # None: where there is no terminal
            initial=steps.start,
            total=steps.stop,
            dynamic_ncols=True,
        )
        return self.bar

    def step(self, step, groups, minibatches, updates, seconds, synced) -> None:
        """Metrics of one step, each a sum over a global count.

        Args:
            groups: all that were drawn, also those that were not learnt from.
            updates: what train.update returned, {} for one that taught nothing.
            seconds: by phase.
            synced: what the engine says about the weights that it took.
        """
        row = rollout_metrics(groups) | update_metrics(updates)
        row["train/imbalance"] = mean([m.plan.imbalance for m in minibatches])
        row["train/learning_rate"] = self.run.schedule.get_last_lr()[0]
        for phase, taken in seconds.items():
            row[f"seconds/{phase}"] = taken
        row["seconds/step"] = sum(seconds.values())
        for name, value in synced.items():
            row[f"sync/{name}"] = value
        self.write(step, row)
        if self.main:
            self._tell(step, row, seconds)

    def _tell(self, step: int, row: dict, seconds: dict) -> None:
        """On the bar; without a terminal in a plain line, now and then."""
        phases = " ".join(f"{phase} {x:.1f}" for phase, x in seconds.items() if x >= 0.05)
        if self.run.reference is None:
            policy = f"entropy {row['train/entropy']:.2f}"
        else:
            policy = f"kl {row['train/kl']:.3f}"
        line = (
            f"reward {row['train/reward']:.2f} acc {row['train/accuracy']:.2f} {policy} "
            f"len {row['train/response_tokens']:.0f} gap {row['train/gap']:.1e} | s: {phases}"
        )
        steps = self.run.settings.steps
        if not self.bar.disable:
            self.bar.set_postfix_str(line, refresh=False)
        elif step % PLAIN_EVERY == 0 or step in (1, steps):
            say(f"step {step} of {steps}: {line}")

    def shows(self, step: int) -> bool:
        """Whether this step's rollouts are kept for the page."""
        return step in (1, self.run.settings.steps) or step % self.show_every == 0

    def rollouts(self, step: int, drawn: int, shown: list[dict]) -> None:
        """Keep the groups of a step, see shown_group."""
        if self.main:
            append_line(self.folder / "rollouts.jsonl", dict(step=step, drawn=drawn, groups=shown))

    def responses(self, name: str, records: list[dict]) -> None:
        """Keep every response of an evaluation."""
        if self.main:
            path = self.folder / "responses" / f"{name}-{self.run.step:06d}.jsonl"
            path.parent.mkdir(exist_ok=True)
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            path.write_text("".join(lines))

    def page(self) -> None:
        """Write report.html anew."""
        if self.main:
            write_report(self.folder)
            self.due = time.monotonic() + 30  # seconds

    def check_looks(self, step: int) -> None:
        """Say so where the model may have stopped looking."""
        if self.main:
            warning = looks_away(read_jsonl(self.folder / "metrics.jsonl"))
            if warning:
                say(f"step {step}: {warning}")

    def write(self, step: int, row: dict[str, float]) -> None:
        """Keep metrics, in the file and with the loggers; the page follows twice a minute."""
        if not self.main:
            return
        append_line(self.folder / "metrics.jsonl", {"step": step} | row)
        for log in self.loggers:
            log(row, step=step)
        if time.monotonic() > self.due:
            self.page()


def looks_away(rows: list[dict]) -> str:
    """A warning where accuracy rose over the last two evaluations while the answers came to owe the
    pictures less than half of what they did at the start; "" where not.

    Args:
        rows: of metrics.jsonl.
    """
    told = [row for row in rows if "eval/looks_answer" in row]
    if len(told) < 3:
        return ""
    oldest, older, newest = [row["eval/accuracy"] for row in told[-3:]]
    first = told[0]["eval/looks_answer"]
    last = told[-1]["eval/looks_answer"]
    if not (oldest < older < newest and last < first / 2):
        return ""
    warning = (
        f"it may be answering without looking: accuracy rose from {oldest:.3f} to {newest:.3f} "
        f"while eval/looks_answer fell from {first:.2f} at the start to {last:.2f} nats"
    )
    blank = [row for row in rows if "blank/accuracy" in row]
    if blank:
        accuracy = blank[-1]["blank/accuracy"]
        step = blank[-1]["step"]
        warning += f"; with white pictures it scored {accuracy:.3f} at step {step}"
    return warning


def open_loggers(s) -> list[Callable]:
    """Functions log(row, step=step): TensorBoard's where it is installed, and Weights & Biases'."""
    loggers = []
    with contextlib.suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(s.folder)

        def log_to_board(row: dict, step: int) -> None:
            for name, value in row.items():
                board.add_scalar(name, value, step)

        loggers.append(log_to_board)
    if s.wandb:
        import wandb

        session = wandb.init(
            project=s.wandb, name=s.folder.name, dir=s.folder, config=dataclasses.asdict(s)
        )
        loggers.append(session.log)
    return loggers


# --------------------------------------------------------------------------------------------------
# Metrics


def mean(values: list) -> float:
    return sum(values) / len(values)


def rollout_metrics(groups: list) -> dict[str, float]:
    """Means over all responses of the groups that were drawn, and over these groups."""
    row = {}
    rollouts = []
    for group in groups:
        rollouts += group.rollouts
    for name in groups[0].scores:
        scores = []
        for group in groups:
            scores += group.scores[name]
        row[f"train/{name}"] = mean(scores)
    row["train/response_tokens"] = mean([len(r.response) for r in rollouts])
    row["train/turns"] = mean([len(r.written_turns) for r in rollouts])
    row["train/truncated"] = mean([r.truncated for r in rollouts])
    row["train/flat_groups"] = mean([g.is_flat() for g in groups])
    return row


def update_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over the tokens learnt from, in all updates of a step; 0 if nothing was learnt."""
    updates = [u for u in updates if u]
    tokens = sum(u["tokens"] for u in updates)
    row = {"train/learnt_tokens": tokens}
    for name in ("kl", "entropy", "clipped", "gap", "sampler_kl"):
        row[f"train/{name}"] = sum(u[name] for u in updates) / max(tokens, 1)
    for name in ("loss", "grad_norm"):
        row[f"train/{name}"] = sum(u[name] for u in updates) / max(len(updates), 1)
    row["train/gap_max"] = max((u["gap_max"] for u in updates), default=0.0)
    return row


# --------------------------------------------------------------------------------------------------
# The page


def shown_group(prompt, responses, group, moved, tokenizer, looks=None) -> dict:
    """What the page shows of a group.

    Args:
        prompt: data.Prompt of the group.
        responses: of each response shown, its turns: ids that the policy wrote, and the Prompts of
            what it read between them.
        group: train.Group.
        moved: of each response shown (N,) nats, what the step's updates did to its tokens.
        looks: of each response shown (N,) nats, what the picture gave its tokens: their log-prob
            minus that with white pictures. None where there is no picture.
    """
    shown = []
    for i, turns in enumerate(responses):
        rollout = group.rollouts[i]
        scores = {"advantage": float(group.advantages[i])}
        for name, values in group.scores.items():
            scores[name] = values[i]
        columns = [rollout.sampler_logprobs, moved[i].cpu()]
        if looks is not None:
            columns.append(looks[i].cpu())
        parts = shown_turns(turns, torch.stack(columns), tokenizer)
        shown.append(dict(scores=scores, truncated=rollout.truncated, turns=parts))
    answer = prompt.problem.answer[:400]
    where = prompt.problem.where
    return shown_prompt(prompt) | dict(where=where, answer=answer, responses=shown)


def shown_prompt(prompt) -> dict:
    images = [thumbnail(image) for image in prompt.images[:SHOWN_IMAGES]]
    return dict(question=prompt.problem.question[:SHOWN_TEXT], images=images)


def shown_turns(turns: list, numbers: Tensor, tokenizer) -> list[dict]:
    """What the policy wrote, as tokens with their `numbers` (2 or 3, N), and what it read."""
    written = [len(turn) if isinstance(turn, Tensor) else 0 for turn in turns]
    shown = []
    for turn, of_turn in zip(turns, numbers.split(written, dim=1), strict=True):
        if isinstance(turn, Tensor):
            shown.append(dict(tokens=shown_tokens(turn, of_turn, tokenizer)))
        else:
            shown.append(shown_prompt(turn))
    return shown


def shown_tokens(ids: Tensor, numbers: Tensor, tokenizer) -> list[list]:
    """[text, its numbers ...] of each token; a long turn loses its middle."""
    tokens = []
    for text, column in zip(token_texts(tokenizer, ids), numbers.T.tolist(), strict=True):
        tokens.append([text[:32], *[round(x, 4) for x in column]])
    cut = len(tokens) - SHOWN_TOKENS
    if cut > 0:
        half = SHOWN_TOKENS // 2
        tokens[half:-half] = [[f" [{cut} tokens left out] ", 0, 0]]
    return tokens


def token_texts(tokenizer, ids: Tensor) -> list[str]:
    """What each token adds to the text; a character spread over several tokens comes with the last
    of them."""
    texts, held = [], []
    for token in ids.tolist():
        held.append(token)
        text = tokenizer.decode(held)
        is_part = text.endswith("\ufffd") and len(held) < 4  # UTF-8 has no longer characters
        texts.append("" if is_part else text)
        if not is_part:
            held = []
    return texts


def write_report(folder: str | Path) -> None:
    """Build FOLDER/report.html, a page that needs no network, from what a run has written into
    FOLDER so far.

    Text stays data whatever a model writes: JSON without any "<", in a script element that no
    browser runs.
    """
    folder = Path(folder)
    report = dict(
        name=folder.name,
        settings=json.loads((folder / "run.json").read_text()),
        written=time.strftime("%H:%M:%S"),
        curves=read_curves(folder / "metrics.jsonl"),
        warning=looks_away(read_jsonl(folder / "metrics.jsonl")),
        steps=read_jsonl(folder / "rollouts.jsonl"),
    )
    text = encode(report)
    while len(text) > REPORT_BYTES and len(report["steps"]) > 2:
        del report["steps"][1:-1:2]
        text = encode(report)
    template = Path(__file__).with_suffix(".html").read_bytes()
    write_aside(folder / "report.html", template.replace(b"REPORT_DATA", text))


def read_curves(path: Path) -> dict[str, list[list[float]]]:
    """[step, value] of every metric; where there are too many, neighbours are averaged."""
    points = collections.defaultdict(list)
    for row in read_jsonl(path):
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                points[name].append((row["step"], value))
    curves = {}
    for name, of_name in points.items():
        size = math.ceil(len(of_name) / SHOWN_POINTS)
        curves[name] = []
        for i in range(0, len(of_name), size):
            steps, values = zip(*of_name[i : i + size], strict=True)
            curves[name].append([float(f"{mean(x):.6g}") for x in (steps, values)])
    return curves


def encode(report: dict) -> bytes:
    """JSON without any "<"; a lone surrogate, which UTF-8 has no bytes for, becomes a question
    mark."""
    text = json.dumps(report, ensure_ascii=False)
    return text.replace("<", r"\u003c").encode(errors="replace")


def append_line(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a file of JSON lines, without a last one that a kill has cut; none where there is no
    file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def thumbnail(image: Image.Image, side: int = 320) -> str:
    """A small copy of an RGB image, at most side x side pixels, as a data URL for a web page."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
