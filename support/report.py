"""What a run shows: metrics, loggers, the progress bar, and report.html, one page that needs no network."""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import io
import json
import math
import time
from pathlib import Path

from support.checkpoint import write_aside

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm


class Clock:
    """Seconds per phase of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Log:
    """Writes what the run did, on rank 0: files in the run's folder (see the README), loggers, the
    progress bar."""

    def __init__(self, run):
        s = run.settings
        self.run, self.folder, self.main = run, s.folder, dist.get_rank() == 0
        self.show_every = s.eval_every * max(
            1, round(s.steps / s.eval_every / SHOWN_STEPS)
        )  # steps
        self.bar, self.loggers, self.due = None, [], 0.0
        if not self.main:
            return
        for name in (
            "metrics.jsonl",
            "rollouts.jsonl",
        ):  # what came after the checkpoint comes again
            rows = read_jsonl(self.folder / name) if run.step else []
            lines = (json.dumps(row) + "\n" for row in rows if row["step"] <= run.step)
            write_aside(self.folder / name, "".join(lines))
        with contextlib.suppress(ImportError):  # TensorBoard is optional
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(self.folder)
            self.loggers.append(
                lambda row, step: [
                    board.add_scalar(name, value, step) for name, value in row.items()
                ]
            )
        if s.wandb:
            import wandb

            session = wandb.init(
                project=s.wandb, name=s.folder.name, dir=s.folder, config=dataclasses.asdict(s)
            )
            self.loggers.append(session.log)

    def progress(self, steps):
        self.bar = tqdm(
            steps,
            "step",
            disable=not self.main,
            initial=steps.start,
            total=steps.stop,
            dynamic_ncols=True,
        )
        return self.bar

    def step(self, step, groups, minibatches, updates, seconds, synced) -> None:
        """Metrics of one step, each a sum over a global count."""
        rollouts, updates = [r for g in groups for r in g.rollouts], [u for u in updates if u]
        means = {name: [x for g in groups for x in g.scores[name]] for name in groups[0].scores}
        means |= {
            "response_tokens": [len(r.response) for r in rollouts],
            "truncated": [r.truncated for r in rollouts],
        }
        means |= {
            "flat_groups": [g.is_flat() for g in groups],
            "imbalance": [m.imbalance for m in minibatches],
        }
        row = {f"train/{name}": sum(values) / len(values) for name, values in means.items()}
        tokens = sum(u["tokens"] for u in updates)
        for name in ("kl", "entropy", "clipped", "gap", "sampler_kl"):
            row[f"train/{name}"] = sum(u[name] for u in updates) / max(tokens, 1)
        for name in ("loss", "grad_norm"):
            row[f"train/{name}"] = sum(u[name] for u in updates) / max(len(updates), 1)
        row["train/learnt_tokens"] = tokens
        row["train/gap_max"] = max((u["gap_max"] for u in updates), default=0.0)
        row["train/learning_rate"] = self.run.schedule.get_last_lr()[0]
        row |= {f"seconds/{k}": v for k, v in seconds.items()} | {
            f"sync/{k}": v for k, v in synced.items()
        }
        row["seconds/step"] = sum(seconds.values())
        self.write(step, row)
        if self.main:
            phases = " ".join(f"{k} {v:.1f}" for k, v in seconds.items() if v >= 0.05)
            self.bar.set_postfix_str(
                f"reward {row['train/reward']:.2f} acc {row['train/accuracy']:.2f} kl {row['train/kl']:.3f} "
                f"len {row['train/response_tokens']:.0f} gap {row['train/gap']:.1e} | s: {phases}"
            )

    def shows(self, step: int) -> bool:
        """Whether this step's rollouts are kept for the page."""
        return step in (1, self.run.settings.steps) or step % self.show_every == 0

    def rollouts(self, step: int, drawn: int, shown: list[dict]) -> None:
        """Keep the groups of a step, see shown_group."""
        if self.main:
            with (self.folder / "rollouts.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "drawn": drawn, "groups": shown}) + "\n")

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

    def write(self, step: int, row: dict[str, float]) -> None:
        if not self.main:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | row) + "\n")
        for log in self.loggers:
            log(row, step=step)
        if time.monotonic() > self.due:
            write_report(self.folder)
            self.due = time.monotonic() + 30  # seconds


# --------------------------------------------------------------------------------------------------
# The page


# what report.html shows: of a run, of a step, of a group, of a prompt, of a response, of a metric;
# then it is small
SHOWN_STEPS, SHOWN_GROUPS, SHOWN_RESPONSES, SHOWN_IMAGES, SHOWN_TOKENS, SHOWN_POINTS = (
    20,
    4,
    8,
    6,
    1000,
    500,
)


REPORT_BYTES = 19_000_000  # beyond it the rollouts of every second step are left out


def shown_group(prompt, group, moved: list[Tensor], processor) -> dict:
    """What the page shows of a group.

    Args:
        prompt: data.Prompt of the group.
        group: train.Group.
        moved: (R,) nats for each response shown, what the step's updates did to its tokens.
    """
    responses = []
    for i, nats in enumerate(moved):
        rollout = group.rollouts[i]
        texts = token_texts(processor.tokenizer, rollout.response)
        sampled = rollout.sampler_logprobs.tolist()
        tokens = [
            [text[:32], round(logprob, 4), round(change, 4)]
            for text, logprob, change in zip(texts, sampled, nats.tolist(), strict=True)
        ]
        cut = len(tokens) - SHOWN_TOKENS
        if cut > 0:
            middle = [[f" [{cut} tokens left out] ", 0, 0]]
            tokens = tokens[: SHOWN_TOKENS // 2] + middle + tokens[-SHOWN_TOKENS // 2 :]
        scores = {"advantage": group.advantages[i].item()}
        scores |= {name: values[i] for name, values in group.scores.items()}
        responses.append(dict(scores=scores, truncated=rollout.truncated, tokens=tokens))
    return dict(
        where=prompt.problem.where,
        question=prompt.problem.question[:4000],
        answer=prompt.problem.answer[:400],
        images=[thumbnail(image) for image in prompt.images[:SHOWN_IMAGES]],
        responses=responses,
    )


def write_report(folder: str | Path) -> None:
    """Build FOLDER/report.html, a page that needs no network, from what a run has written into
    FOLDER so far.

    Text stays data whatever a model writes: JSON without any "<", in a script element that no
        browser runs.
    """
    folder, curves = Path(folder), collections.defaultdict(list)
    for row in read_jsonl(folder / "metrics.jsonl"):
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                curves[name].append((row["step"], value))
    for name, points in curves.items():  # neighbours are averaged where there are too many
        size = math.ceil(len(points) / SHOWN_POINTS)
        parts = (points[i : i + size] for i in range(0, len(points), size))
        curves[name] = [
            [float(f"{sum(x) / len(x):.6g}") for x in zip(*part, strict=True)] for part in parts
        ]
    steps = read_jsonl(folder / "rollouts.jsonl")
    settings = json.loads((folder / "run.json").read_text())
    report = dict(name=folder.name, settings=settings, curves=curves, steps=steps)

    def encoded() -> (
        bytes
    ):  # a lone surrogate, which UTF-8 has no bytes for, becomes a question mark
        return (
            json.dumps(report, ensure_ascii=False).replace("<", r"\u003c").encode(errors="replace")
        )

    while len(text := encoded()) > REPORT_BYTES and len(steps) > 2:
        del steps[1:-1:2]
    template = Path(__file__).with_suffix(".html").read_bytes()
    write_aside(folder / "report.html", template.replace(b"REPORT_DATA", text))


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a file of JSON lines, without a last one that a kill has cut; none where there is no
    file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def thumbnail(image: Image.Image, side: int = 320) -> str:
    """A small copy of an RGB image, at most side x side pixels, as a data URL for a web page."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def token_texts(tokenizer, ids: Tensor) -> list[str]:
    """What each token adds to the text; a character spread over several tokens comes with the last
    of them."""
    texts, held = [], []
    for token in ids.tolist():
        text = tokenizer.decode(held := [*held, token])
        held = (
            held if text.endswith("\ufffd") and len(held) < 4 else []
        )  # UTF-8 has no longer characters
        texts.append("" if held else text)
    return texts
