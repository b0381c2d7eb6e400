"""GRPO for vision-language models: sample, score, freeze, learn, report.

    problem -> prompt -> rollouts (a group) -> rewards -> advantages -> loss -> update -> sync

    python train.py                                  with no GPU: a tiny Qwen2.5-VL learns generated figures, in minutes
    torchrun --nproc_per_node=8 train.py             with GPUs: Qwen2.5-VL-7B on Geometry3K

The same code runs on 1 and on N processes: weights, gradients and optimizer state are sharded by FSDP2, every rank
samples its share of the prompts, and all ranks then know all responses of the step (ids are small), so that any group
can be learnt from on any rank. A step is one batch of rollouts, an update is one optimizer step on a minibatch.

Not here: the model (model.py), sampling (rollout.py), the formulas (grpo.py), grading (reward.py), rows (data.py).

Legend  N tokens written by the policy, R responses, n responses per prompt
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import heapq
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import data
import grpo
import reward
from model import TINY_INSTRUCTION, Actor, build_warm_tiny, full, gather_objects, prompts_of, start_processes
from rollout import ENVIRONMENTS, Conversations, HFEngine, Rollout, VLLMEngine, build_engine, describe, evaluate, score

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm
from transformers import HfArgumentParser


def setting(default, help: str):
    """A field of Settings with its line of --help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """The whole command line. --preset changes the defaults; a flag that is given wins over the preset."""

    preset: str = setting("auto", "tiny (CPU, minutes), geo3k (GPUs), or auto: geo3k where there is a GPU, else tiny")
    name: str = setting("", "folder of this run under --out; empty: the preset's name")
    out: str = setting("runs", "where runs are written")
    seed: int = setting(0, "fixes the order of the problems and, on one machine, the responses drawn")
    # model
    model: str = setting("", "directory or hub name of a vision-language model; empty: build and warm up the tiny one")
    freeze_vision: bool = setting(False, "do not train the vision tower and its projector")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward: less memory, 1/3 more time")
    packing: str = setting("shared", "shared: each prompt once per group; packed: once per response; padded: plain")
    max_tokens_per_pack: int = setting(16384, "tokens in one forward pass of one rank; lower it when memory runs out")
    # data
    instruction: str = setting(data.INSTRUCTION, "appended to every question")
    data: str = setting("", "parquet file, folder, glob or hub data set to train on; empty: generated figures")
    test_data: str = setting("", "held-out rows; empty: the same place as --data")
    split: str = setting("train", "split of --data, where it has splits")
    test_split: str = setting("test", "split of --test_data, where it has splits")
    image_key: str = setting("images", "column of images")
    problem_key: str = setting("problem", "column of questions, with <image> where an image stands")
    answer_key: str = setting("answer", "column of gold answers")
    type_key: str = setting("type", "column of question types, for accuracy by type; may be absent")
    min_pixels: int = setting(56 * 56, "images with fewer pixels are enlarged")
    max_pixels: int = setting(1280 * 28 * 28, "images with more pixels are reduced")
    video_key: str = setting("videos", "column of videos: files or lists of frames; questions hold <video>")
    video_fps: float = setting(2.0, "frames per second that are taken from a video, and at which a list of frames runs")
    max_frames: int = setting(32, "most frames of a video; longer ones are sampled more thinly")
    max_frame_pixels: int = setting(128 * 28 * 28, "frames with more pixels are reduced")
    max_prompt_tokens: int = setting(1024, "problems with longer prompts are left out, never truncated; longer "
                                     "conversations end")  # fmt: skip
    skip_bad_rows: bool = setting(False, "count broken rows and go on, instead of stopping at the first")
    # sampling
    task: str = setting("", "environment that prompts begin and go on with, whose reward replaces --rewards: codeword")
    engine: str = setting("auto", "vllm, hf (transformers), or auto: vllm where it is installed and usable")
    rollout_tp: int = setting(1, "ranks that share one vLLM engine (tensor parallelism)")
    memory_fraction: float = setting(0.6, "of each GPU, for vLLM's weights and cache while it samples")
    eager: bool = setting(False, "no CUDA graphs in vLLM: slower tokens, a faster start")
    steps: int = setting(60, "batches of rollouts")
    prompts_per_step: int = setting(512, "prompts per step, over all ranks")
    responses_per_prompt: int = setting(5, "the group size n")
    dynamic_sampling: int = setting(0, "most further batches in a step, drawn to replace flat groups (DAPO)")
    max_response_tokens: int = setting(2048, "a response that reaches this is cut and marked truncated")
    temperature: float = setting(1.0, "of the distribution that is sampled, scored and trained")
    # reward and loss
    rewards: str = setting("accuracy=0.9,format=0.1", "named rewards with their weights")
    advantage: str = setting("std", "std: GRPO; none: Dr. GRPO; loo: RLOO")
    ratio: str = setting("token", "token: GRPO; sequence: GSPO")
    clip_low: float = setting(0.2, "how far the probability ratio may fall below 1")
    clip_high: float = setting(0.3, "how far the probability ratio may rise above 1 (DAPO: higher than --clip_low)")
    aggregation: str = setting("token", "mean over tokens (token), over responses (sequence), Dr. GRPO's (constant)")
    kl_coefficient: float = setting(0.01, "weight of the KL to the starting policy; 0: no reference is loaded")
    kl_estimator: str = setting("k3", "k1, k2 or k3")
    importance: str = setting("token", "truncated importance sampling against the sampler's gap: none, token, sequence")
    importance_cap: float = setting(2.0, "largest importance weight")
    max_sampler_gap: float = setting(0.2, "stop if sampler and trainer disagree by more nats per token, on average")
    # optimizer
    minibatch_prompts: int = setting(128, "prompts per update, over all ranks")
    epochs: int = setting(1, "passes over the rollouts of a step")
    learning_rate: float = setting(1e-6, "of AdamW, after warm-up")
    warmup_updates: int = setting(0, "updates over which the learning rate rises from 0")
    final_learning_rate: float = setting(1.0, "share of the learning rate that is left at the end; it falls linearly")
    weight_decay: float = setting(0.01, "of AdamW")
    beta2: float = setting(0.999, "of AdamW: how slowly it forgets the size of gradients")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    # evaluation and files
    eval_every: int = setting(5, "steps between evaluations; there is one before and one after training in any case")
    eval_rows: int = setting(0, "held-out rows used; 0: all")
    eval_samples: int = setting(1, "responses drawn per held-out row; 1 takes the likeliest tokens instead (greedy)")
    save_every: int = setting(0, "steps between checkpoints; 0: only the last")
    resume: bool = setting(False, "go on from the newest checkpoint of --name")

    def __post_init__(self):
        if self.responses_per_prompt < 2:
            raise ValueError(
                f"--responses_per_prompt is {self.responses_per_prompt}; a response is compared with the others to its "
                "prompt, so there must be at least 2"
            )
        for name in ("prompts_per_step", "max_response_tokens", "minibatch_prompts", "epochs",
                     "max_tokens_per_pack", "eval_every", "eval_samples", "steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)} is none of {', '.join(choices)}")
        reward.parse_weights(self.rewards)
        if self.prompts_per_step % self.minibatch_prompts:
            raise ValueError(
                f"--prompts_per_step {self.prompts_per_step} is not a multiple of --minibatch_prompts "
                f"{self.minibatch_prompts}, so the last update of a step would weigh less than the others"
            )
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"--min_pixels {self.min_pixels} is above --max_pixels {self.max_pixels}")
        if self.temperature <= 0:
            raise ValueError(f"--temperature is {self.temperature}; the policy is trained as a distribution, above 0")

    def rate(self, done: int) -> float:
        """Share of the learning rate after `done` updates: up over the warm-up, then down to the final share."""
        total = self.steps * self.epochs * (self.prompts_per_step // self.minibatch_prompts)
        return min(1.0, (done + 1) / (self.warmup_updates + 1)) * (1 - (1 - self.final_learning_rate) * done / total)

    @property
    def video_limits(self) -> "data.VideoLimits":
        return data.VideoLimits(self.video_fps, self.max_frames, self.max_frame_pixels)

    @property
    def reward_weights(self) -> dict[str, float]:
        return reward.parse_weights(self.rewards)

    @property
    def folder(self) -> Path:
        return Path(self.out) / (self.name or self.preset)


CHOICES = dict(
    task=("", *ENVIRONMENTS),
    packing=("shared", "packed", "padded"), engine=("auto", "vllm", "hf"), advantage=("std", "none", "loo"),
    ratio=("token", "sequence"), aggregation=("token", "sequence", "constant"), kl_estimator=("k1", "k2", "k3"),
    importance=("none", "token", "sequence"),
)  # fmt: skip
PRESETS = {
    "tiny": dict(
        instruction=TINY_INSTRUCTION, min_pixels=56 * 56, max_pixels=56 * 56, max_prompt_tokens=256,
        steps=200, prompts_per_step=64, responses_per_prompt=8, minibatch_prompts=32, max_response_tokens=24,
        max_tokens_per_pack=8192, kl_coefficient=0.02, learning_rate=6e-4, beta2=0.98, warmup_updates=5,
        final_learning_rate=0.1, eval_every=50,
    ),
    "geo3k": dict(
        model="Qwen/Qwen2.5-VL-7B-Instruct", data="hiyouga/geometry3k", min_pixels=262144, max_prompt_tokens=2048,
        gradient_checkpointing=True,
    ),
}  # fmt: skip
PRESETS["codeword"] = PRESETS["tiny"] | dict(
    task="codeword", steps=80, prompts_per_step=32, kl_coefficient=0.0, eval_every=20
)


def parse_settings(argv: list[str] | None = None) -> tuple[Settings, str]:
    """Read the command line.

    Returns:
        The Settings, and a sentence that says which preset they come from and why.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(Settings, allow_abbrev=False)
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", default="auto", choices=["auto", *PRESETS])
    chooser.add_argument("--task", default="")
    chosen, _ = chooser.parse_known_args(argv)
    preset, why = chosen.preset, "asked for"
    if preset == "auto" and chosen.task in PRESETS:
        preset = chosen.task
    if preset == "auto":
        gpu = torch.cuda.is_available()
        preset, why = ("geo3k", "there is a GPU") if gpu else ("tiny", "there is no GPU")
    parser.set_defaults(**PRESETS[preset])
    settings = dataclasses.replace(parser.parse_args_into_dataclasses(argv)[0], preset=preset)
    return settings, f"preset {preset} ({why})"


def say(*parts) -> None:
    """Print on rank 0, above the progress bar."""
    if dist.get_rank() == 0:
        tqdm.write(" ".join(map(str, parts)))


# ---------------------------------------------------------------------------------------------------------------------
# Groups: from responses to minibatches


@dataclass
class Group:
    """The n rollouts of one problem, as every rank knows them after sampling."""

    index: int  # row of the training set
    prompt_tokens: int  # image tokens included
    image_tokens: int  # of images and videos
    rollouts: list[Rollout]
    scores: dict[str, list[float]]  # n for each named reward, and "reward", their weighted sum
    advantages: Tensor  # (n,)

    def is_flat(self) -> bool:
        """Whether all responses earned the same, so that there is nothing to learn."""
        return not self.advantages.any()

    @property
    def cost(self) -> float:
        """Estimated work of learning from this group, in tokens, each prompt and every response counted once.

        By operation count at Qwen2.5-VL-7B's shape, the vision tower adds a third of a token's work to an image token,
        and a token's attention over 30,000 keys costs as much as the rest of its layer.
        """
        lengths = [r.tokens for r in self.rollouts]
        pairs = self.prompt_tokens**2 / 2 + sum(n * (self.prompt_tokens + n / 2) for n in lengths)
        return self.prompt_tokens + self.image_tokens / 3 + sum(lengths) + pairs / 30_000


def deal(costs: list[float], ranks: int) -> list[list[int]]:
    """Share items out so that all ranks have about the same cost, by the largest differencing method.

    Karmarkar and Karp 1982: partial deals are kept in a heap, and the two most uneven ones are merged, the heaviest
    share of one with the lightest of the other.

    Returns:
        For each rank, the indices of its items, ascending.
    """
    heap = [(-cost, i, [(0.0, [])] * (ranks - 1) + [(cost, [i])]) for i, cost in enumerate(costs)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, i, a), (_, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        merged = [(x + y, p + q) for (x, p), (y, q) in zip(a, reversed(b), strict=True)]
        merged.sort(key=lambda share: share[0])
        heapq.heappush(heap, (merged[0][0] - merged[-1][0], i, merged))
    return [sorted(items) for _, items in heap[0][2]] if heap else [[] for _ in range(ranks)]


def cut_into_packs(groups: list[Group], max_tokens: int, shared: bool = True) -> list[list[tuple[Group, list[int]]]]:
    """Cut groups into forward passes of at most `max_tokens` tokens where possible.

    Groups stay whole where they fit and are split along responses where not (each part then repeats the prompt); a
    single response that does not fit gets a pass of its own. Without sharing every response brings its prompt.

    Returns:
        Packs, each a list of (group, indices of its responses).
    """
    parts = []
    for group in groups:
        part, used, repeated = [], group.prompt_tokens, 0 if shared else group.prompt_tokens
        for i, rollout in enumerate(group.rollouts):
            if part and used + rollout.tokens + repeated > max_tokens:
                parts.append((used, group, part))
                part, used = [], group.prompt_tokens
            used += rollout.tokens + (repeated if part else 0)
            part.append(i)
        parts.append((used, group, part))
    packs = []  # first fit, largest first
    for used, group, part in sorted(parts, key=lambda p: -p[0]):
        for pack in packs:
            if pack[0] + used <= max_tokens:
                pack[0] += used
                pack[1].append((group, part))
                break
        else:
            packs.append([used, [(group, part)]])
    return [pack for _, pack in packs]


@dataclass
class TrainPack:
    """One forward pass of one rank, with all that its loss needs, flat over its N tokens."""

    groups: list[tuple]  # (prompt, [turns, ...]) pairs for Actor.logprobs
    lengths: Tensor  # (R,) tokens that the policy wrote in each response
    advantages: Tensor  # (R,)
    sampler_logprobs: Tensor  # (N,) nats, like the next two
    old_logprobs: Tensor | None = None  # None: the same forward gives them, because this update is on-policy
    ref_logprobs: Tensor | None = None
    features: dict | None = None  # of a frozen vision tower, computed once for all passes over this pack
    weight: float = 1.0  # 0 for a filler, which a rank runs so that all ranks make the same number of passes


@dataclass
class Minibatch:
    """This rank's passes of one update, and the global counts by which its loss is normalised."""

    packs: list[TrainPack]
    tokens: int
    responses: int
    imbalance: float  # dearest rank's cost over the mean, minus 1


def plan_minibatches(run: "Run", groups: list[Group], prompts: dict) -> list[Minibatch]:
    """Cut the step's groups into minibatches, deal each over the ranks and cut every rank's share into packs.

    Every rank plans for all ranks, so no rank has to be asked how many passes it makes. Groups whose advantages are
    all 0 are left out where nothing else gives them a gradient; they still count in the normalisation.
    """
    s, rank, world = run.settings, dist.get_rank(), dist.get_world_size()
    minibatches, shared = [], s.packing == "shared"
    for i in range(0, len(groups), s.minibatch_prompts):
        chosen = groups[i : i + s.minibatch_prompts]
        teaching = [g for g in chosen if not g.is_flat() or s.kl_coefficient]
        costs = [g.cost for g in teaching]
        shares = deal(costs, world)
        plans = [cut_into_packs([teaching[j] for j in share], s.max_tokens_per_pack, shared) for share in shares]
        passes = max(map(len, plans))
        packs = [build_pack(run, plan, prompts) for plan in plans[rank]]
        while len(packs) < passes:
            filler = build_pack(run, [(teaching[0], [0])], prompts)
            packs.append(dataclasses.replace(filler, weight=0.0))
        loads = [sum(costs[j] for j in share) for share in shares]
        minibatches.append(
            Minibatch(
                packs=packs,
                tokens=sum(len(r.response) for g in chosen for r in g.rollouts),
                responses=sum(len(g.rollouts) for g in chosen),
                imbalance=max(loads) * world / sum(loads) - 1 if teaching else 0.0,
            )
        )
    return minibatches


def build_pack(run: "Run", plan: list[tuple[Group, list[int]]], prompts: dict) -> TrainPack:
    """Bring a planned pass onto this rank's device; prompts sampled elsewhere are made again from their rows."""
    rollouts = [group.rollouts[i] for group, chosen in plan for i in chosen]
    for group, _ in plan:
        if group.index not in prompts:
            prompts[group.index] = run.prompt(run.train_set[group.index])
    groups = [(prompts[group.index], [group.rollouts[i].turns(run.observe) for i in chosen]) for group, chosen in plan]
    return TrainPack(
        groups=groups,
        features=run.actor.image_features(prompts_of(groups)),
        lengths=torch.tensor([len(r.response) for r in rollouts], device=run.device),
        advantages=torch.cat([group.advantages[chosen] for group, chosen in plan]).to(run.device),
        sampler_logprobs=torch.cat([r.sampler_logprobs for r in rollouts]).to(run.device),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run


def make_prompt(s: Settings, actor: Actor, problem: data.Problem) -> data.Prompt:
    """A problem as the run's settings pose it; in a conversation, what the policy reads first."""
    first = ENVIRONMENTS[s.task](problem).first if s.task else problem
    prompt = data.make_prompt(first, actor.processor, s.min_pixels, s.max_pixels, s.instruction, s.video_limits)
    return dataclasses.replace(prompt, problem=problem)


def observer(s: Settings, actor: Actor):
    """The function that makes a later turn's Prompt of its Problem, and remembers it for the other copies."""
    limits = dict(min_pixels=s.min_pixels, max_pixels=s.max_pixels, instruction="", video=s.video_limits, later=True)
    return functools.lru_cache(512)(functools.partial(data.make_prompt, processor=actor.processor, **limits))


@dataclass
class Run:
    """Everything that the loop needs, built once by main()."""

    settings: Settings
    device: torch.device
    actor: Actor
    reference: Actor | None
    engine: HFEngine | VLLMEngine
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    train_set: data.Problems
    test_set: data.Problems
    grader: reward.Grader
    observe: Callable | None  # Problem -> Prompt of a later turn; None without a task
    step: int = 0  # steps done

    def prompt(self, problem: data.Problem) -> data.Prompt:
        return make_prompt(self.settings, self.actor, problem)

    def evaluate(self, change=None) -> tuple[dict[str, float], list[dict]]:
        """Metrics and responses on the held-out problems, each passed through `change` first, if given."""
        s = self.settings
        problems = self.test_set[: s.eval_rows or len(self.test_set)]
        problems = problems if change is None else [change(problem) for problem in problems]
        return evaluate(self.engine, problems, self.prompt, s.eval_samples, s.seed, s.reward_weights, self.grader)


def train(run: Run) -> None:
    """The algorithm."""
    s, log = run.settings, Log(run)
    log.evaluation(run.step, run.evaluate())
    for step in log.progress(range(run.step, s.steps)):
        clock = Clock()

        # SAMPLE and SCORE: n responses to every problem of the step, their rewards, advantages within every group
        groups, prompts = [], {}
        for extra in range(s.dynamic_sampling + 1):
            groups += sample_groups(run, step * (s.dynamic_sampling + 1) + extra, prompts, clock)
            if sum(not g.is_flat() for g in groups) >= s.prompts_per_step:
                break
        drawn = groups
        chosen = sorted(range(len(drawn)), key=lambda i: drawn[i].is_flat())[: s.prompts_per_step]
        groups = [drawn[i] for i in sorted(chosen)]  # those that teach before flat ones, in the order of the problems
        with clock("sleep"):
            run.engine.sleep()

        # FREEZE: log-probs under the policy as it is before it moves, and under the reference
        with clock("freeze"):
            minibatches = plan_minibatches(run, groups, prompts)
            freeze(run, minibatches)

        # LEARN: one optimizer step for each minibatch
        with clock("learn"):
            updates = [update(run, minibatch, step) for _ in range(s.epochs) for minibatch in minibatches]

        # REPORT: the engine gets the new weights; metrics, evaluation and checkpoint
        with clock("sync"):
            synced = run.engine.sync(run.actor)
        run.step = step + 1
        log.step(run.step, drawn, minibatches, updates, clock.seconds, synced)
        if run.step % s.eval_every == 0 or run.step == s.steps:
            log.evaluation(run.step, run.evaluate())
        if run.step == s.steps or (s.save_every and run.step % s.save_every == 0):
            save_checkpoint(run)
    # what is left without the pictures tells how much the model looks
    log.evaluation(run.step, run.evaluate(data.blank_images), "blank")


def sample_groups(run: Run, batch: int, prompts: dict, clock: "Clock") -> list[Group]:
    """Draw and score one batch of problems: every rank does its share, and then all ranks know all groups.

    Args:
        batch: number of the batch; it fixes the problems and, with the weights, the responses.
        prompts: this rank's prompts by row; those of its share are added.
    """
    s, rank, world = run.settings, dist.get_rank(), dist.get_world_size()
    with clock("sample"):
        indices = data.batch_indices(s.seed, batch, s.prompts_per_step, len(run.train_set))[rank::world]
        problems = [run.train_set[i] for i in indices]
        prompts.update({i: run.prompt(problem) for i, problem in zip(indices, problems, strict=True)})
        seed = random.Random(f"{s.seed} {batch}").getrandbits(63)
        rollouts = run.engine.generate([prompts[i] for i in indices], s.responses_per_prompt, seed)
    with clock("score"):
        tokenizer = run.actor.processor.tokenizer
        scores = score(rollouts, problems, s.responses_per_prompt, tokenizer, s.reward_weights, run.grader)
        advantages = grpo.group_advantages(scores["reward"], s.advantage)
        vision = torch.tensor(run.actor.banned_ids)
        mine = [
            Group(i, len(prompts[i].ids), int(torch.isin(prompts[i].ids, vision).sum()), rollouts[p],
                  {k: v[p].tolist() for k, v in scores.items()}, advantages[p])
            for p, i in enumerate(indices)
        ]  # fmt: skip
        shares = gather_objects(mine)
    return [shares[i % world][i // world] for i in range(s.prompts_per_step)]  # in the order of the problems


@torch.no_grad()
def freeze(run: Run, minibatches: list[Minibatch]) -> None:
    """Fill in old_logprobs, and ref_logprobs where there is a reference.

    With a single update per step the policy has not moved when it is scored, so that update's own forward gives the
    old log-probs and no extra pass is made.
    """
    on_policy = len(minibatches) * run.settings.epochs == 1
    for pack in (pack for minibatch in minibatches for pack in minibatch.packs):
        if not on_policy:
            pack.old_logprobs, _ = run.actor.logprobs(pack.groups, pack.features, entropy=False)
        if run.reference is not None:
            pack.ref_logprobs, _ = run.reference.logprobs(pack.groups, pack.features, entropy=False)


def update(run: Run, minibatch: Minibatch, step: int) -> dict[str, float]:
    """One optimizer step. The loss is a sum over tokens with global weights, accumulated pack by pack.

    Returns:
        Sums over the minibatch's tokens, over all ranks, beside `tokens`, their count; {} if nothing was learnt
        because every group was flat.

    Raises:
        RuntimeError: sampler and trainer disagree by more than --max_sampler_gap, or a gradient is not finite.
    """
    s, world, sums = run.settings, dist.get_world_size(), collections.defaultdict(float)
    if not minibatch.packs:
        return {}
    for pack in minibatch.packs:
        logprobs, entropy = run.actor.logprobs(pack.groups, pack.features)
        old = logprobs.detach() if pack.old_logprobs is None else pack.old_logprobs
        advantages = grpo.spread(pack.advantages, pack.lengths)
        losses, clipped = grpo.policy_loss(
            logprobs, old, advantages, pack.lengths, s.clip_low, s.clip_high, s.ratio
        )  # (N,)
        losses = losses * grpo.importance_weights(
            old, pack.sampler_logprobs, pack.lengths, s.importance_cap, s.importance
        )
        kl = torch.zeros_like(losses)
        if pack.ref_logprobs is not None:
            kl = grpo.kl_estimate(logprobs, pack.ref_logprobs, s.kl_estimator)
        weights = grpo.token_weights(
            pack.lengths, s.aggregation, minibatch.tokens, minibatch.responses, s.max_response_tokens
        )
        loss = pack.weight * (weights * (losses + s.kl_coefficient * kl)).sum()
        (loss * world).backward()  # FSDP averages gradients over ranks, and this loss is a share of one sum
        gap = (pack.sampler_logprobs - old).abs()
        drift = grpo.kl_estimate(pack.sampler_logprobs, old, "k3")
        for name, values in dict(kl=kl, entropy=entropy, clipped=clipped, gap=gap, sampler_kl=drift).items():
            sums[name] += pack.weight * values.detach().double().sum()
        sums["tokens"] += pack.weight * len(logprobs)
        sums["loss"] += loss.detach()
        sums["gap_max"] = max(sums["gap_max"], float(gap.max() * pack.weight))
    gap_max = all_max(sums.pop("gap_max"))
    totals = all_sum(sums, run.device)
    check_gap(totals["gap"] / totals["tokens"], s.max_sampler_gap, step)
    grad_norm = full(torch.nn.utils.clip_grad_norm_(run.actor.model.parameters(), s.max_grad_norm)).item()
    if not math.isfinite(grad_norm) or not math.isfinite(totals["loss"]):
        raise RuntimeError(
            f"step {step}: loss {totals['loss']}, gradient norm {grad_norm}; the weights were left as they were. Usual "
            "causes: a learning rate too high, or a reward that is not finite"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.schedule.step()
    return totals | {"grad_norm": grad_norm, "gap_max": gap_max}


def check_gap(gap: float, limit: float, step: int) -> None:
    """Stop a run whose rollouts are not its policy's: `gap` and `limit` are mean nats per token."""
    if not gap <= limit:
        raise RuntimeError(
            f"step {step}: sampler and trainer disagree by {gap:.3f} nats per token (--max_sampler_gap {limit}), so "
            "the rollouts are not the policy's. Usual causes: weights not synced, another temperature, another image "
            "resize, or tokens re-encoded from text"
        )


def all_sum(sums: dict[str, float | Tensor], device) -> dict[str, float]:
    """Sums over all ranks; every rank brings the same names."""
    totals = torch.tensor([float(v) for v in sums.values()], dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return dict(zip(sums, totals.tolist(), strict=True))


def all_max(value: float) -> float:
    return max(gather_objects(value))


def chance(train_set, test_set) -> float:
    """Accuracy of the best answer that never looks: a question's commonest gold in training."""
    golds = collections.defaultdict(collections.Counter)
    for problem in train_set:
        golds[problem.question][problem.answer] += 1
    commonest = {question: counts.most_common(1)[0][0] for question, counts in golds.items()}
    return sum(p.answer == commonest.get(p.question) for p in test_set) / len(test_set)


# ---------------------------------------------------------------------------------------------------------------------
# Reports


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
    """Writes what the run did, on rank 0: metrics.jsonl, curves.png, responses of evaluations, TensorBoard, the bar."""

    def __init__(self, run: Run):
        self.folder, self.main, self.steps = run.settings.folder, dist.get_rank() == 0, run.settings.steps
        self.run, self.rows, self.bar, self.board = run, [], None, None
        if not self.main:
            return
        path = self.folder / "metrics.jsonl"
        if run.step and path.exists():  # what the steps after the checkpoint wrote is written again
            lines = path.read_text().splitlines(keepends=True)
            rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill can cut the last one
            self.rows = [row for row in rows if row["step"] < run.step + ("train/reward" in row)]
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        with contextlib.suppress(ImportError):  # TensorBoard is optional
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.folder)

    def progress(self, steps):
        self.bar = tqdm(steps, "step", disable=not self.main, initial=steps.start, total=self.steps, dynamic_ncols=True)
        return self.bar

    def step(self, step, groups, minibatches, updates, seconds, synced) -> None:
        """Metrics of one step, each a sum over a global count."""
        rollouts = [r for g in groups for r in g.rollouts]
        row = {f"train/{k}": sum(sum(g.scores[k]) for g in groups) / len(rollouts) for k in groups[0].scores}
        row["train/response_tokens"] = sum(len(r.response) for r in rollouts) / len(rollouts)
        row["train/truncated"] = sum(r.truncated for r in rollouts) / len(rollouts)
        row["train/flat_groups"] = sum(g.is_flat() for g in groups) / len(groups)
        updates = [u for u in updates if u]
        tokens = sum(u["tokens"] for u in updates)
        for name in ("kl", "entropy", "clipped", "gap", "sampler_kl"):
            row[f"train/{name}"] = sum(u[name] for u in updates) / max(tokens, 1)
        for name in ("loss", "grad_norm"):
            row[f"train/{name}"] = sum(u[name] for u in updates) / max(len(updates), 1)
        row["train/learnt_tokens"] = tokens
        row["train/gap_max"] = max((u["gap_max"] for u in updates), default=0.0)
        row["train/learning_rate"] = self.run.schedule.get_last_lr()[0]
        row["train/imbalance"] = sum(m.imbalance for m in minibatches) / len(minibatches)
        row |= {f"seconds/{k}": v for k, v in seconds.items()} | {f"sync/{k}": v for k, v in synced.items()}
        row["seconds/step"] = sum(seconds.values())
        self.write(step, row)
        if self.main:
            phases = " ".join(f"{k} {v:.1f}" for k, v in seconds.items() if v >= 0.05)
            self.bar.set_postfix_str(
                f"reward {row['train/reward']:.2f} acc {row['train/accuracy']:.2f} kl {row['train/kl']:.3f} "
                f"len {row['train/response_tokens']:.0f} gap {row['train/gap']:.1e} | s: {phases}"
            )

    def evaluation(self, step: int, result: tuple[dict, list], name: str = "eval") -> None:
        """Metrics and responses of an evaluation, and the curves so far."""
        metrics, records = result
        self.write(step, {f"{name}/{k}": v for k, v in metrics.items()})
        if not self.main:
            return
        say(f"step {step}: {name}, {len(records)} responses: {describe(metrics)}")
        (self.folder / "responses").mkdir(exist_ok=True)
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (self.folder / "responses" / f"{name}-{step:06d}.jsonl").write_text("".join(lines))
        self.curves()

    def write(self, step: int, row: dict[str, float]) -> None:
        if not self.main:
            return
        self.rows.append({"step": step} | row)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        for name, value in row.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def curves(self) -> None:
        """Draw curves.png."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 6), layout="constrained")
        panels = [("eval/accuracy", "train/accuracy"), ("train/reward", "train/format"), ("train/response_tokens",),
                  ("train/entropy", "train/kl"), ("train/grad_norm",), ("seconds/sample", "seconds/learn")]  # fmt: skip
        for axes, names in zip(figure.subplots(2, 3).flat, panels, strict=True):
            for name in names:
                points = [(row["step"], row[name], row.get(name + "_se", 0.0)) for row in self.rows if name in row]
                if points:
                    x, y, error = zip(*points, strict=True)
                    axes.errorbar(x, y, error if any(error) else None, label=name, marker="." if any(error) else None)
                    axes.legend(fontsize=8)
            axes.set_xlabel("step")
        FigureCanvasAgg(figure).print_png(self.folder / "curves.png")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(run: Run) -> None:
    """Weights, optimizer and schedule, sharded as they are; written aside and renamed when complete."""
    final = run.settings.folder / "checkpoints" / f"step-{run.step:06d}"
    aside = final.with_name(final.name + ".partial")
    model, optimizer = get_state_dict(run.actor.model, run.optimizer)
    state = {"model": model, "optimizer": optimizer, "schedule": run.schedule.state_dict(), "step": run.step}
    dcp.save(state, checkpoint_id=aside)
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    dist.barrier()


def load_checkpoint(run: Run) -> None:
    """Go on from the newest complete checkpoint of this run, on any number of ranks."""
    found = sorted(p for p in (run.settings.folder / "checkpoints").glob("step-*") if p.suffix != ".partial")
    if not found:
        raise ValueError(f"--resume found no checkpoint in {run.settings.folder}; leave it out to start anew")
    model, optimizer = get_state_dict(run.actor.model, run.optimizer)
    state = {"model": model, "optimizer": optimizer, "schedule": run.schedule.state_dict(), "step": 0}
    dcp.load(state, checkpoint_id=found[-1])
    set_state_dict(run.actor.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    run.step = state["step"]
    say(f"resumed from {found[-1]}")


# ---------------------------------------------------------------------------------------------------------------------
# Building a run


GENERATED = {  # task -> what draws its problems, their folder, the tiny model's, updates of its warm-up
    "": (data.make_figures, "figures", "tiny-model", 150),
    "codeword": (data.make_codewords, "codewords", "codeword-model", 30),
}


def prepare_tiny(s: Settings) -> Settings:
    """Fill in what the settings leave empty: generated problems, and the tiny model warmed up on them.

    Both are made once, under --out, by rank 0; delete the folders to make them again.
    """
    make, *names, updates = GENERATED[s.task]
    problems, model = (Path(s.out) / name for name in names)
    if dist.get_rank() == 0 and not (s.model and s.data):
        if not problems.exists():
            make(problems.with_suffix(".partial"))
            problems.with_suffix(".partial").rename(problems)
        if not s.model and not model.exists():
            rows = data.load_problems(str(problems))
            say(f"no --model given: building the tiny Qwen2.5-VL in {model} and warming it up")
            build_warm_tiny(model.with_suffix(".partial"), rows, s.instruction, s.seed, updates=updates)
            model.with_suffix(".partial").rename(model)
    dist.barrier()
    return dataclasses.replace(s, model=s.model or str(model), data=s.data or str(problems))


def build(s: Settings, device: torch.device) -> Run:
    """Load, check and shard everything that the loop needs."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = dict(pixels=(s.min_pixels, s.max_pixels), temperature=s.temperature, packing=s.packing)
    actor = Actor.from_pretrained(s.model, dtype, **options)
    keys = dict(image_key=s.image_key, problem_key=s.problem_key, answer_key=s.answer_key, type_key=s.type_key,
                video_key=s.video_key)  # fmt: skip
    sets = []
    for path, split in ((s.data, s.split), (s.test_data or s.data, s.test_split)):
        problems, kept = data.usable_problems(
            data.load_problems(path, split, **keys), actor.processor, s.min_pixels, s.max_pixels, s.max_prompt_tokens,
            s.instruction, s.skip_bad_rows, s.video_limits,
        )  # fmt: skip
        say(f"{path}, {split}: {kept}")
        sets.append(problems)
    say(f"a question's commonest answer in training would score {chance(*sets):.3f} on the held-out problems")
    max_videos = max(len(p.videos) for problems in sets for p in problems)
    # vLLM measures the free memory of the GPU when it starts, so it comes before the trainer's weights
    engine, why = build_engine(
        s.engine, actor, s.model, tp=s.rollout_tp, memory_fraction=s.memory_fraction, eager=s.eager,
        max_prompt_tokens=s.max_prompt_tokens, max_response_tokens=s.max_response_tokens,
        max_images=max(len(p.images) for problems in sets for p in problems), max_videos=max_videos,
        min_pixels=s.min_pixels, max_pixels=s.max_pixels,
    )  # fmt: skip
    say(why)
    observe = observer(s, actor) if s.task else None
    if s.task:
        engine = Conversations(engine, ENVIRONMENTS[s.task], observe, s.max_prompt_tokens)
    engine.sleep()
    if s.freeze_vision:
        actor.freeze_vision()
    if s.gradient_checkpointing:
        actor.checkpoint_activations()
    actor.shard(device, videos=max_videos > 0)
    say(actor.report())
    if s.packing != "padded":
        with_image = [p for p in sets[0][:100] if p.images][:1]
        gap = actor.check_packing([make_prompt(s, actor, p) for p in [*with_image, sets[0][0]]])
        say(f"packing {s.packing}: log-probs within {gap:.1g} nats of the padded forward")
    reference = None
    if s.kl_coefficient:
        reference = Actor.from_pretrained(s.model, dtype, **options)
        reference.model.requires_grad_(False)
        reference.shard(device, videos=max_videos > 0)
    trained = [p for p in actor.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.learning_rate, weight_decay=s.weight_decay, betas=(0.9, s.beta2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, s.rate)
    return Run(s, device, actor, reference, engine, optimizer, schedule, *sets, reward.Grader(), observe)


def set_aside(folder: Path) -> Path:
    """Rename the folder of an earlier run, so that no file of it is taken for this one's."""
    free = next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
    folder.rename(free)
    return free


def main(argv: list[str] | None = None) -> None:
    settings, why = parse_settings(argv)
    device = start_processes()
    say(f"{why}: {dist.get_world_size()} process(es) on {device.type}, results in {settings.folder}")
    try:
        if dist.get_rank() == 0:
            if settings.folder.exists() and not settings.resume:
                say(f"{settings.folder} exists; its files move to {set_aside(settings.folder)}")
            settings.folder.mkdir(parents=True, exist_ok=True)
        settings = prepare_tiny(settings)
        if dist.get_rank() == 0:
            (settings.folder / "settings.json").write_text(json.dumps(dataclasses.asdict(settings), indent=2))
        run = build(settings, device)
        if settings.resume:
            load_checkpoint(run)
        with run.grader, contextlib.closing(run.engine):
            run.engine.sync(run.actor)
            train(run)
            run.actor.save(settings.folder / "model")
        say(f"model exported to {settings.folder / 'model'}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
