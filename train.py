"""GRPO for vision-language models: sample, score, freeze, learn, report.

    problem -> prompt -> rollouts (a group) -> rewards -> advantages -> loss -> update -> sync

    python train.py                                  with no GPU: a tiny Qwen2.5-VL learns generated
    figures, in minutes torchrun --nproc_per_node=8 train.py             with GPUs: Qwen2.5-VL-7B on
    Geometry3K

The same code runs on 1 and on N processes: weights, gradients and optimizer state are sharded by
FSDP2, every rank samples its share of the prompts, and all ranks then know all responses of the
step (ids are small), so that any group can be learnt from on any rank. A step is one batch of
rollouts, an update is one optimizer step on a minibatch.

Not here: the model (model.py), sampling (rollout.py), the formulas (grpo.py), grading (reward.py),
rows (data.py).

Legend  N tokens written by the policy, R responses, n responses per prompt
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import difflib
import functools
import gc
import heapq
import importlib.util
import math
import random
import re
import shlex
import signal
import sys
import textwrap
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    get_args,
    get_origin,
    get_type_hints,
)

import data
import grpo
import reward
from data import COLUMNS, INSTRUCTION, VideoLimits
from model import Actor, full, lay_out, prompts_of, turns_of
from rollout import (
    Conversations,
    HFEngine,
    Rollout,
    VLLMEngine,
    build_engine,
    describe,
    evaluate,
    find_environment,
    score,
)
from support import report
from support.checkpoint import (
    catch_signals,
    finish_checkpoint,
    load_checkpoint,
    open_folder,
    record_launch,
    save_checkpoint,
)
from support.figures import make_codewords, make_figures
from support.memory import ModelSize, SavedTensors, fit, local_bytes
from support.processes import (
    all_max,
    all_sum,
    end_failed,
    explain_failure,
    gather_objects,
    quieten_libraries,
    say,
    start_processes,
)
from support.tiny_model import TINY_INSTRUCTION, build_warm_tiny

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, set_seed


def train(run: Run) -> None:
    """The algorithm."""
    s, log, meter = run.settings, report.Log(run), SavedTensors()
    if run.step == 0:
        evaluation(run, log)
    for step in log.progress(range(run.step, s.steps)):
        clock = report.Clock()
        # for what may draw from the global random states: a reward, dropout
        set_seed(random.Random(f"{s.seed} {step} {dist.get_rank()}").getrandbits(32))

        # SAMPLE and SCORE: n responses to every problem of the step, their rewards, advantages
        # within every group
        groups = []
        for extra in range(s.dynamic_sampling + 1):
            groups += sample_groups(run, step * (s.dynamic_sampling + 1) + extra, clock)
            if sum(not g.is_flat() for g in groups) >= s.prompts_per_step:
                break
        drawn = groups
        chosen = sorted(range(len(drawn)), key=lambda i: drawn[i].is_flat())[: s.prompts_per_step]
        groups = [
            drawn[i] for i in sorted(chosen)
        ]  # those that teach before flat ones, in the order of the problems
        with clock("sleep"):
            run.engine.sleep()

        # FREEZE: log-probs under the policy as it is before it moves, and under the reference
        with clock("freeze"):
            minibatches = plan_minibatches(run, groups)
            freeze(run, minibatches)

        # LEARN: one optimizer step for each minibatch
        with clock("learn"):
            updates = [
                update(run, minibatch, step, meter)
                for _ in range(s.epochs)
                for minibatch in minibatches
            ]
        meter = measure_memory(run, meter, updates[-1])

        # REPORT: the engine gets the new weights; rollouts to look at, metrics, evaluation and
        # checkpoint
        with clock("report"):
            show_rollouts(run, log, groups)
        with clock("sync"):
            synced = run.engine.sync(run.actor)
        run.step = step + 1
        log.step(run.step, drawn, minibatches, updates, clock.seconds, synced)
        last = run.step == s.steps
        accuracy = evaluation(run, log) if last or run.step % s.eval_every == 0 else -1.0
        stop = int(
            all_max(max(run.signals, default=0))
        )  # a signal to one rank stops all of them after the same step
        if stop or last or (s.save_every and run.step % s.save_every == 0):
            save_checkpoint(run, accuracy)
        if stop:
            finish_checkpoint(run)
            say(
                f"step {run.step}: {signal.Signals(stop).name}; the checkpoint is written, go on with --resume auto"
            )
            sys.exit(128 + stop)


def sample_groups(run: Run, batch: int, clock: report.Clock) -> list[Group]:
    """Draw and score one batch of problems: every rank does its share, and then all ranks know all
    groups.

    Args:
        batch: number of the batch; it fixes the problems and, with the weights, the responses.
    """
    s, rank, world = run.settings, dist.get_rank(), dist.get_world_size()
    with clock("sample"):
        indices = data.batch_indices(s.seed, batch, s.prompts_per_step, len(run.train_set))
        mine = indices[rank::world]
        problems = [run.train_set[i] for i in mine]
        prompts = [run.reader(problem) for problem in problems]
        seed = random.Random(f"{s.seed} {batch}").getrandbits(63)
        conversations = [[prompt] for prompt in prompts]
        rollouts = run.engine.generate(conversations, s.responses_per_prompt, seed)
    with clock("score"):
        tokenizer = run.actor.processor.tokenizer
        scores = score(
            rollouts, problems, s.responses_per_prompt, tokenizer, s.reward_weights, run.grader
        )
        advantages = grpo.group_advantages(scores["reward"], s.advantage)
        vision = torch.tensor(run.actor.banned_ids)
        groups = [
            Group(
                index=index,
                prompt_tokens=len(prompts[p].ids),
                image_tokens=int(torch.isin(prompts[p].ids, vision).sum()),
                rollouts=rollouts[p],
                scores={name: values[p].tolist() for name, values in scores.items()},
                advantages=advantages[p],
            )
            for p, index in enumerate(mine)
        ]
        shares = gather_objects(groups)
    # in the order of the problems
    return [shares[i % world][i // world] for i in range(s.prompts_per_step)]


@torch.no_grad()
def freeze(run: Run, minibatches: list[Minibatch]) -> None:
    """Fill in old_logprobs, and ref_logprobs where there is a reference.

    With a single update per step the policy has not moved when it is scored, so that update's own
    forward gives the old log-probs and no extra pass is made.
    """
    on_policy = len(minibatches) * run.settings.epochs == 1
    for pack in (pack for minibatch in minibatches for pack in minibatch.packs):
        if not on_policy:
            pack.old_logprobs, _ = run.actor.logprobs(pack.groups, pack.features, entropy=False)
        if run.reference is not None:
            with run.reference.without_adapters():
                pack.ref_logprobs, _ = run.reference.logprobs(
                    pack.groups, pack.features, entropy=False
                )


def update(
    run: Run, minibatch: Minibatch, step: int, meter: SavedTensors | None = None
) -> dict[str, float]:
    """One optimizer step. The loss is a sum over tokens with global weights, accumulated pack by
    pack.

    Returns:
        Sums over the minibatch's tokens, over all ranks, beside `tokens`, their count; {} if
        nothing was learnt because every group was flat.

    Raises:
        RuntimeError: sampler and trainer disagree by more than --max_sampler_gap, or as leave_out.
    """
    s, world, sums = run.settings, dist.get_world_size(), collections.defaultdict(float)
    if not minibatch.packs:
        return {}
    for pack in minibatch.packs:
        with meter or contextlib.nullcontext():
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
            pack.lengths,
            s.aggregation,
            minibatch.tokens,
            minibatch.responses,
            s.max_response_tokens,
        )
        loss = pack.weight * (weights * (losses + s.kl_coefficient * kl)).sum()
        (
            loss * world
        ).backward()  # FSDP averages gradients over ranks, and this loss is a share of one sum
        gap = (pack.sampler_logprobs - old).abs()
        drift = grpo.kl_estimate(pack.sampler_logprobs, old, "k3")
        for name, values in dict(
            kl=kl, entropy=entropy, clipped=clipped, gap=gap, sampler_kl=drift
        ).items():
            sums[name] += pack.weight * values.detach().double().sum()
        sums["tokens"] += pack.weight * len(logprobs)
        sums["loss"] += loss.detach()
        sums["gap_max"] = max(sums["gap_max"], float(gap.max() * pack.weight))
    gap_max = all_max(sums.pop("gap_max"))
    totals = all_sum(sums, run.device)
    trained = [p for p in run.actor.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    grad_norm = full(norm).item()  # looked at before clipping, which spreads a nan to all gradients
    if not math.isfinite(grad_norm) or not math.isfinite(totals["loss"]):
        leave_out(run, minibatch, step, f"loss {totals['loss']}, gradient norm {grad_norm}")
        return {}
    check_gap(totals["gap"] / totals["tokens"], s.max_sampler_gap, step)
    torch.nn.utils.clip_grads_with_norm_(trained, s.max_grad_norm, norm)
    run.optimizer.step()
    gradients = local_bytes(p.grad for p in trained)
    run.optimizer.zero_grad()
    run.schedule.step()
    return totals | {"grad_norm": grad_norm, "gap_max": gap_max, "gradient_bytes": gradients}


# --------------------------------------------------------------------------------------------------
# from here on: groups -> minibatches -> packs


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
        """Estimated work of learning from this group, in tokens, each prompt and every response
        counted once.

        By operation count at Qwen2.5-VL-7B's shape, the vision tower adds a third of a token's work
        to an image token, and a token's attention over 30,000 keys costs as much as the rest of its
        layer.
        """
        lengths = [r.tokens for r in self.rollouts]
        pairs = self.prompt_tokens**2 / 2 + sum(n * (self.prompt_tokens + n / 2) for n in lengths)
        return self.prompt_tokens + self.image_tokens / 3 + sum(lengths) + pairs / 30_000


def deal(costs: list[float], ranks: int) -> list[list[int]]:
    """Share items out so that all ranks have about the same cost, by the largest differencing
    method.

    Karmarkar and Karp 1982: partial deals are kept in a heap, and the two most uneven ones are
    merged, the heaviest share of one with the lightest of the other.

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


def cut_into_packs(
    groups: list[Group], max_tokens: int, shared: bool = True
) -> list[list[tuple[Group, list[int]]]]:
    """Cut groups into forward passes of at most `max_tokens` tokens where possible.

    Groups stay whole where they fit and are split along responses where not (each part then repeats
    the prompt); a single response that does not fit gets a pass of its own. Without sharing every
    response brings its prompt.

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
    old_logprobs: Tensor | None = (
        None  # None: the same forward gives them, because this update is on-policy
    )
    ref_logprobs: Tensor | None = None
    features: dict | None = (
        None  # of a frozen vision tower, computed once for all passes over this pack
    )
    weight: float = (
        1.0  # 0 for a filler, which a rank runs so that all ranks make the same number of passes
    )


@dataclass
class Minibatch:
    """This rank's passes of one update, and the global counts by which its loss is normalised."""

    packs: list[TrainPack]
    tokens: int
    responses: int
    imbalance: float  # dearest rank's cost over the mean, minus 1


def plan_minibatches(run: Run, groups: list[Group]) -> list[Minibatch]:
    """Cut the step's groups into minibatches, deal each over the ranks and cut every rank's share
    into packs.

    Every rank plans for all ranks, so no rank has to be asked how many passes it makes. Groups
    whose advantages are all 0 are left out where nothing else gives them a gradient; they still
    count in the normalisation.
    """
    s, rank, world = run.settings, dist.get_rank(), dist.get_world_size()
    minibatches, shared = [], run.actor.packing == "shared"
    for i in range(0, len(groups), s.minibatch_prompts):
        chosen = groups[i : i + s.minibatch_prompts]
        teaching = [g for g in chosen if not g.is_flat() or s.kl_coefficient]
        costs = [g.cost for g in teaching]
        shares = deal(costs, world)
        plans = [
            cut_into_packs([teaching[j] for j in share], s.max_tokens_per_pack, shared)
            for share in shares
        ]
        passes = max(map(len, plans))
        packs = [build_pack(run, plan) for plan in plans[rank]]
        while len(packs) < passes:
            filler = build_pack(run, [(teaching[0], [0])])
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


def build_pack(run: Run, plan: list[tuple[Group, list[int]]]) -> TrainPack:
    """Bring a planned pass onto this rank's device; prompts sampled elsewhere are made again from
    their rows."""
    groups, rollouts, advantages = [], [], []
    for group, chosen in plan:
        prompt = run.reader(run.train_set[group.index])
        picked = [group.rollouts[i] for i in chosen]
        groups.append((prompt, [rollout.read(run.reader) for rollout in picked]))
        rollouts += picked
        advantages.append(group.advantages[chosen])
    return TrainPack(
        groups=groups,
        features=run.actor.image_features(prompts_of(turns_of(groups))),
        lengths=torch.tensor([len(r.response) for r in rollouts], device=run.device),
        advantages=torch.cat(advantages).to(run.device),
        sampler_logprobs=torch.cat([r.sampler_logprobs for r in rollouts]).to(run.device),
    )


# --------------------------------------------------------------------------------------------------
# What stops a run: a gap, what is not finite; and what the first update took


def leave_out(run: Run, minibatch: Minibatch, step: int, why: str) -> None:
    """Forget an update that is not finite; every rank keeps its packs for study, as plain tensors
    and texts.

    RuntimeError if there are now more than --max_not_finite of them.
    """
    run.not_finite += 1
    file = (
        run.settings.folder
        / "not-finite"
        / f"step-{step:06d}-{run.not_finite}-rank-{dist.get_rank()}.pt"
    )
    gradients = {
        name: p.grad for name, p in run.actor.model.named_parameters() if p.grad is not None
    }
    broken = [name for name, gradient in gradients.items() if not full(gradient).isfinite().all()]
    places = run.actor.positions
    packs = [
        {key: value for key, value in vars(pack).items() if isinstance(value, Tensor)}
        | {
            "groups": [
                (
                    prompt.problem.where,
                    prompt.ids,
                    [lay_out(turns, places)[0] for turns in responses],
                )
                for prompt, responses in pack.groups
            ]
        }
        for pack in minibatch.packs
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"why": why, "broken_gradients": broken, "packs": packs}, file)
    run.optimizer.zero_grad()
    say(
        message
        := f"step {step}: {why}; the weights were left as they were, and the minibatch is in {file}"
    )
    if run.not_finite > (limit := run.settings.max_not_finite):
        causes = "Usual causes: a learning rate too high, or a reward that is not finite"
        raise RuntimeError(
            f"{message}. It was number {run.not_finite}, --max_not_finite is {limit}. {causes}"
        )


def check_gap(gap: float, limit: float, step: int) -> None:
    """Stop a run whose rollouts are not its policy's: `gap` and `limit` are mean nats per token."""
    if not gap <= limit:
        raise RuntimeError(
            f"step {step}: sampler and trainer disagree by {gap:.3f} nats per token (--max_sampler_gap {limit}), so "
            "the rollouts are not the policy's. Usual causes: weights not synced, another temperature, another image "
            "resize, or tokens re-encoded from text"
        )


def measure_memory(run: Run, meter: SavedTensors | None, totals: dict) -> None:
    """Say what the first update took."""
    if meter and totals:
        states = [state for moments in run.optimizer.state.values() for state in moments.values()]
        measured = memory_report(run, totals["gradient_bytes"], local_bytes(states), meter.bytes)
        peak = (
            f"; {torch.cuda.max_memory_allocated() / 2**30:.1f} at most"
            if run.device.type == "cuda"
            else ""
        )
        say(f"memory of rank 0 in GiB, measured: {measured}{peak}")


def memory_report(run: Run, gradients: float, optimizer: float, activations: float) -> str:
    """One line of GiB on rank 0, of bytes."""
    sizes = dict(
        parameters=local_bytes(run.actor.model.parameters()),
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
    )
    if run.reference not in (None, run.actor):
        sizes["reference"] = local_bytes(run.reference.model.parameters())
    return ", ".join(f"{name} {size / 2**30:.3f}" for name, size in sizes.items())


# --------------------------------------------------------------------------------------------------
# Evaluation, and rollouts to look at


def evaluation(run: Run, log: report.Log) -> float:
    """Evaluate; before and after training with other images too, which tells how much the model
    looks.

    Returns:
        Accuracy with the problems' own images.
    """
    s, views = run.settings, data.VIEWS
    if 0 < run.step < s.steps or len({hash(p.images) for p in run.test_set if p.images}) < 2:
        views = ("own",)
    accuracy = {}
    for view in views:
        metrics, records = evaluate(
            run.engine,
            run.test_set,
            run.reader,
            s.eval_samples,
            s.seed,
            s.reward_weights,
            run.grader,
            rows=s.eval_rows,
            view=view,
        )
        accuracy[view] = metrics["accuracy"]
        name = "eval" if view == "own" else view
        log.write(run.step, {f"{name}/{k}": v for k, v in metrics.items()})
        say(f"step {run.step}: {name}, {len(records)} responses: {describe(metrics)}")
        log.responses(name, records)
    log.page()
    return accuracy["own"]


@torch.no_grad()
def show_rollouts(run: Run, log: report.Log, groups: list[Group]) -> None:
    """Keep some groups for report.html, those that teach first, with what the step's updates did
    to each token.

    That takes one more forward of these groups, on all ranks, in the first step and in some that
    are evaluated.
    """
    if not log.shows(run.step + 1):
        return
    shown = []
    for group in sorted(groups, key=Group.is_flat)[: report.SHOWN_GROUPS]:
        chosen = list(range(len(group.rollouts)))[: report.SHOWN_RESPONSES]
        pack = build_pack(run, [(group, chosen)])
        logprobs, _ = run.actor.logprobs(pack.groups, pack.features, entropy=False)
        moved = (logprobs - pack.sampler_logprobs).split(pack.lengths.tolist())
        shown.append(report.shown_group(pack.groups[0][0], group, moved, run.actor.processor))
    log.rollouts(run.step + 1, len(groups), shown)


# --------------------------------------------------------------------------------------------------
# Building a run


@dataclass
class Run:
    """Everything that the loop needs, built once by main()."""

    settings: Settings
    device: torch.device
    actor: Actor
    reference: Actor | None
    engine: HFEngine | VLLMEngine
    optimizer: torch.optim.Optimizer | None  # None, as the schedule: --steps 0 evaluates alone
    schedule: torch.optim.lr_scheduler.LRScheduler | None
    train_set: data.Problems
    test_set: data.Problems
    grader: reward.Grader
    reader: data.Reader
    step: int = 0  # steps done
    not_finite: int = 0  # updates left out
    best: tuple[float, int] = (-1.0, 0)  # accuracy and step of the best checkpoint
    signals: list[int] = field(default_factory=list)  # that asked this process to stop
    saving: Future | None = None  # the checkpoint that is being written
    saving_group: dist.ProcessGroup | None = None  # for the thread that writes it


def build_optimizer(
    s: Settings, actor: Actor
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """What moves the trained weights, and how its learning rate falls."""
    trained = [p for p in actor.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=s.learning_rate, weight_decay=s.weight_decay, betas=(0.9, s.beta2)
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, s.rate)


def build(s: Settings, device: torch.device) -> Run:
    """Load, check and shard everything that the loop needs; where --steps is 0, only what an
    evaluation needs."""
    actor = load_actor(s, device)
    reader, train_set, test_set = load_data(s, actor)
    images, videos = most_media([*train_set, *test_set])
    # vLLM measures the free memory of the GPU when it starts, so it comes before the trainer's
    # weights
    engine = load_engine(s, actor, reader, images, videos)
    reference = optimizer = schedule = None
    if s.steps:
        engine.sleep()
        shard_actor(s, actor, device, videos > 0)
        check_scoring(actor, reader, train_set)
        reference = load_reference(s, actor, device, videos > 0)
        optimizer, schedule = build_optimizer(s, actor)
    elif isinstance(engine, HFEngine) or isinstance(getattr(engine, "engine", None), HFEngine):
        actor.model.to(device)
    judge = reward.Judge(s.judge_url, s.judge_model, s.judge_strict) if s.judge_model else None
    grader = reward.Grader(rounding=s.rounding, judge=judge)
    # what is here stays, and need not be looked at again by the collections of every sleep
    gc.collect()
    gc.freeze()
    return Run(
        settings=s,
        device=device,
        actor=actor,
        reference=reference,
        engine=engine,
        optimizer=optimizer,
        schedule=schedule,
        train_set=train_set,
        test_set=test_set,
        grader=grader,
        reader=reader,
    )


def load_actor(s: Settings, device: torch.device) -> Actor:
    """The policy, on the CPU and whole, in the dtype that it computes in. ValueError if there is no
    such model."""
    with explained_loading(s.model):
        return Actor.from_pretrained(
            s.model,
            s.compute_dtype(device),
            pixels=(s.min_pixels, s.max_pixels),
            temperature=s.temperature,
            packing=s.packing,
        )


@contextlib.contextmanager
def explained_loading(model: str):
    """ValueError where transformers finds no such model, or no file of it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--model {model} cannot be loaded: {error}") from error


def load_data(s: Settings, actor: Actor) -> tuple[data.Reader, data.Problems, data.Problems]:
    """What makes all prompts, the problems to train on (none for --steps 0) and the held-out ones,
    all of them looked at once.

    Raises:
        ValueError: a file or row is unusable, is in both sets, or has none of the sources that
            --rewards names.
    """
    environment = find_environment(s.task)
    share = math.ceil(s.prompts_per_step / dist.get_world_size())
    reader = data.Reader(
        actor.processor,
        s.min_pixels,
        s.max_pixels,
        s.instruction,
        s.video_limits,
        first=(lambda problem: environment(problem).first) if environment else None,
        kept=2 * share,  # of this step, and of the next, which are made meanwhile
    )
    splits = {"held out": (s.test_data or s.data, s.test_split)}
    if s.steps:
        splits["trained on"] = (s.data, s.split)
    sets = {"trained on": data.Problems([])}
    for use, (path, split) in splits.items():
        sets[use] = data.load_problems(path, split, **s.column_names)
    files = [{row[0] for row in problems.rows} for problems in sets.values()]
    both = set.intersection(*files)
    if both:
        raise ValueError(
            f"{min(both)} would be trained on and held out; set --test_data or --test_split"
        )
    for use, (path, split) in splits.items():
        limits = (s.max_prompt_tokens, s.skip_bad_rows)
        sets[use], kept = data.usable_problems(sets[use], reader, *limits)
        say(f"{use}: {path}, {split}: {kept}")
    train_set, test_set = sets["trained on"], sets["held out"]
    if s.steps:
        guessed = chance(train_set, test_set)
        say(f"a question's commonest answer in training would score {guessed:.3f} on held-out ones")
    check_sources(s, [*train_set, *test_set])
    return reader, train_set, test_set


def check_sources(s: Settings, problems: list[data.Problem]) -> None:
    """ValueError if --rewards names a source of data that no problem has."""
    unknown = set(s.reward_weights) - {""} - {problem.source for problem in problems}
    if unknown:
        raise ValueError(
            f"--rewards names sources that no problem has: {sorted(unknown)}; their column is "
            "--columns source=NAME"
        )


def chance(train_set, test_set) -> float:
    """Accuracy of the best answer that never looks: a question's commonest gold in training."""
    golds = collections.defaultdict(collections.Counter)
    for problem in train_set:
        golds[problem.question][problem.answer] += 1
    commonest = {question: counts.most_common(1)[0][0] for question, counts in golds.items()}
    return sum(p.answer == commonest.get(p.question) for p in test_set) / len(test_set)


def most_media(problems: list[data.Problem]) -> tuple[int, int]:
    """Most images and most videos of any problem."""
    images = max(len(problem.images) for problem in problems)
    videos = max(len(problem.videos) for problem in problems)
    return images, videos


def load_engine(s: Settings, actor: Actor, reader: data.Reader, images: int, videos: int):
    """What samples, with the conversations of --task around it; awake.

    Args:
        images, videos: most of any row; an environment adds its own images.
    """
    environment = find_environment(s.task)
    engine, why = build_engine(
        s.engine,
        actor,
        s.model,
        tp=s.rollout_tp,
        memory_fraction=s.memory_fraction or 0.6,
        eager=s.eager,
        max_prompt_tokens=s.max_prompt_tokens,
        max_response_tokens=s.max_response_tokens,
        max_images=images + getattr(environment, "images", 0),
        max_videos=videos,
    )
    say(why)
    if environment:
        engine = Conversations(engine, environment, reader, s.max_prompt_tokens)
    return engine


def shard_actor(s: Settings, actor: Actor, device: torch.device, videos: bool) -> None:
    """Freeze, add adapters and checkpoint as the settings say, then share the weights out over the
    ranks; `videos`: any rank may bring some."""
    frozen = ["tower"] if s.freeze_vision else []
    if s.freeze_projector:
        frozen.append("projector")
    if s.lora_rank:
        actor.add_lora(s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_targets)
    elif frozen:
        actor.freeze(*frozen)
    if s.gradient_checkpointing:
        actor.checkpoint_activations()
    actor.shard(device, s.compute_dtype(device), videos=videos, shard_ranks=s.shard_ranks)
    say(actor.report())


def check_scoring(actor: Actor, reader: data.Reader, problems: data.Problems) -> None:
    """RuntimeError if this model's packed forward does not score as its padded one does; with two
    prompts, of different lengths and one with an image where there are such."""
    if actor.packing == "padded":
        return
    some = problems[:100]
    first = next((problem for problem in some if problem.images), some[0])
    length = len(reader(first).ids)
    second = next((problem for problem in some if len(reader(problem).ids) != length), some[0])
    gap = actor.check_packing([reader(first), reader(second)])
    say(f"packing {actor.packing}: log-probs within {gap:.1g} nats of the padded forward")


def load_reference(s: Settings, actor: Actor, device: torch.device, videos: bool) -> Actor | None:
    """The policy as it was, for the KL; with LoRA it is the policy itself without its adapters."""
    if not s.kl_coefficient:
        return None
    if s.lora_rank:
        return actor
    say(f"loading {s.model} once more, as the KL's reference")
    reference = load_actor(s, device)
    reference.model.requires_grad_(False)
    reference.shard(
        device,
        s.compute_dtype(device),
        videos=videos,
        offload=s.reference_on_cpu,
        shard_ranks=s.shard_ranks,
    )
    return reference


# --------------------------------------------------------------------------------------------------
# What the settings leave empty: the demonstration's problems and model, the sampler's memory


# task -> what draws its problems, their folder, the tiny model's, updates of its warm-up
GENERATED = {
    "": (make_figures, "figures", "tiny-model", 150),
    "codeword": (make_codewords, "codewords", "codeword-model", 30),
}


def prepare_tiny(s: Settings) -> Settings:
    """Fill in --data and --model where they are empty: generated problems, and the tiny model
    warmed up on them.

    Both are made once, under --out, by rank 0; delete the folders to make them again. ValueError
    for a --task whose problems are not generated.
    """
    if s.model and s.data:
        return s
    if s.task not in GENERATED:
        raise ValueError(
            f"no problems are generated for --task {s.task}, so no tiny model can be warmed up on "
            "them; give --model and --data"
        )
    make, problems_name, model_name, updates = GENERATED[s.task]
    problems, model = Path(s.out) / problems_name, Path(s.out) / model_name
    if dist.get_rank() == 0:
        if not problems.exists():
            say(f"no --data given: drawing problems into {problems}")
            partial = problems.with_suffix(".partial")
            make(partial)
            partial.rename(problems)
        if not s.model and not model.exists():
            say(
                f"no --model given: building a tiny Qwen2.5-VL in {model}, and warming it up with "
                f"{updates} updates on {problems}"
            )
            partial = model.with_suffix(".partial")
            rows = data.load_problems(problems)
            warm_up = getattr(find_environment(s.task), "warm_up", ("ok",))
            build_warm_tiny(partial, rows, s.instruction, s.seed, updates=updates, warm_up=warm_up)
            partial.rename(model)
    dist.barrier()
    return dataclasses.replace(s, model=s.model or str(model), data=s.data or str(problems))


def fit_memory(s: Settings, device: torch.device) -> Settings:
    """Fill in --memory_fraction where it is 0. ValueError, before any weight is loaded, for a run
    that no GPU of this kind can hold; on a CPU all is left as it is."""
    if device.type != "cuda" or not s.steps:
        return s
    gpu = torch.cuda.get_device_properties(device).total_memory
    with explained_loading(s.model):
        size = measure_model(s.model)
    fraction = fit(size, s, dist.get_world_size(), gpu)
    return dataclasses.replace(s, memory_fraction=round(fraction, 2))


def measure_model(name: str) -> ModelSize:
    """The counts of a model that decide what it takes, from its configuration alone."""
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    actor = Actor(model, AutoProcessor.from_pretrained(name))
    sizes = {"tower": 0, "projector": 0, "language": 0}
    for parameter, weight in model.named_parameters():  # tied ones once
        sizes[actor.part(parameter)] += weight.numel()
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    text = config.get_text_config()
    return ModelSize(
        parameters=sum(sizes.values()),
        vision=sizes["tower"] + sizes["projector"],
        embeddings=sum(weight.numel() for weight in ends),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
    )


# --------------------------------------------------------------------------------------------------
# Settings


class Range(NamedTuple):
    """Bounds of a number, both included."""

    least: float
    most: float = 1e9

    def __str__(self) -> str:
        end = "" if self.most == 1e9 else f" to {self.most:g}"
        return f"{'from' if end else 'at least'} {self.least:g}{end}"


Count = Annotated[int, Range(1)]
CountOr0 = Annotated[int, Range(0)]
Weight = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 0.999999)]
Positive = Annotated[float, Range(1e-6)]


def setting(default, help: str, group: str = ""):
    """A field of Settings with its line of --help; `group` begins a group of settings there."""
    return field(default=default, metadata={"help": help, "group": group})


@dataclass(frozen=True)
class Settings:
    """The whole command line, each setting in one place: its type with bounds or choices, its
    default, its meaning. --preset changes defaults; a flag that is given wins over it."""

    preset: Literal["auto", *PRESETS] = setting(
        "auto", "defaults, see above; auto: geo3k where there is a GPU, else tiny", group="the run"
    )
    name: str = setting("", "folder of this run under --out; empty: the preset's name")
    out: str = setting("runs", "where runs are written")
    seed: int = setting(
        0, "fixes the order of the problems and, on one machine, the responses drawn"
    )
    steps: CountOr0 = setting(60, "batches of rollouts; 0: evaluate --model and end")
    resume: Literal["no", "auto", "must"] = setting(
        "no", "no: start anew; must: go on from the newest checkpoint; auto: go on if there is one"
    )
    timeout: Annotated[float, Range(0.01, 1e5)] = setting(
        30.0, "minutes that a process waits for the others before the run ends"
    )

    data: str = setting(
        "",
        "parquet file, folder, glob or hub data set to train on; empty: generated figures",
        group="data (rows -> problems -> prompts)",
    )
    split: str = setting("train", "split of --data, where it has splits")
    test_data: str = setting("", "held-out rows; empty: the same place as --data")
    test_split: str = setting("test", "split of --test_data, where it has splits")
    columns: str = setting(
        "",
        "names of columns where they differ, image=pictures,answer=gold, of image, video, problem, "
        "answer, type and source; a dot reaches into a struct",
    )
    instruction: str = setting(INSTRUCTION, "appended to every question")
    task: str = setting(
        "",
        "environment that prompts begin and go on with, whose reward replaces --rewards: codeword, "
        "or FILE.py:CLASS",
    )
    max_prompt_tokens: Count = setting(
        1024, "problems with longer prompts are left out, never truncated; longer conversations end"
    )
    skip_bad_rows: bool = setting(
        False, "count broken rows and go on, instead of stopping at the first"
    )
    min_pixels: Count = setting(56 * 56, "images with fewer pixels are enlarged")
    max_pixels: Count = setting(1280 * 28 * 28, "images with more pixels are reduced")
    video_fps: Annotated[float, Range(0.01, 1e5)] = setting(
        2.0, "frames per second that are taken from a video, and at which a list of frames runs"
    )
    max_frames: Count = setting(32, "most frames of a video; longer ones are sampled more thinly")
    max_frame_pixels: Count = setting(128 * 28 * 28, "frames with more pixels are reduced")

    model: str = setting(
        "",
        "directory or hub name of a vision-language model; empty: build and warm up the tiny one",
        group="model (what is trained, and how it lies in memory)",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto",
        "that training and vLLM compute in, trained weights being kept in float32; auto: bfloat16 "
        "on a GPU, else float32",
    )
    freeze_vision: bool = setting(False, "do not train the vision tower")
    freeze_projector: bool = setting(
        False, "do not train what brings the tower's features to the language model"
    )
    lora_rank: CountOr0 = setting(
        0, "train adapters of this rank on the language model's linear layers alone; 0: no LoRA"
    )
    lora_alpha: Weight = setting(
        32.0, "LoRA's scale; the adapter's product is multiplied by alpha / rank"
    )
    lora_dropout: Decay = setting(0.0, "of the adapters' inputs while learning")
    lora_targets: str = setting(
        "all", "layers with an adapter, such as q_proj,v_proj; all: every linear one"
    )
    packing: Literal["shared", "packed", "padded"] = setting(
        "shared", "shared: each prompt once per group; packed: once per response; padded: plain"
    )
    max_tokens_per_pack: Count = setting(
        16384, "tokens in one forward pass of one rank; lower it when memory runs out"
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward: less memory, 1/3 more time"
    )
    shard_ranks: CountOr0 = setting(
        0,
        "consecutive ranks, one machine's, that share one copy of weights and optimizer state; 0: "
        "all",
    )

    engine: Literal["auto", "vllm", "hf"] = setting(
        "auto",
        "vllm, hf (transformers), or auto: vllm where it is installed and usable",
        group="SAMPLE (prompts -> responses)",
    )
    rollout_tp: Count = setting(1, "ranks that share one vLLM engine (tensor parallelism)")
    memory_fraction: Share = setting(
        0.0,
        "of each GPU, for vLLM's weights and cache while it samples; 0: what fits beside training, "
        "0.6 at most",
    )
    eager: bool = setting(False, "no CUDA graphs in vLLM: slower tokens, a faster start")
    prompts_per_step: Count = setting(512, "prompts per step, over all ranks")
    responses_per_prompt: Annotated[int, Range(2)] = setting(
        5, "the group size n: a response is compared with the others to its prompt"
    )
    dynamic_sampling: CountOr0 = setting(
        0, "most further batches in a step, drawn to replace flat groups (DAPO)"
    )
    max_response_tokens: Count = setting(
        2048, "a response that reaches this is cut and marked truncated"
    )
    temperature: Annotated[float, Range(0.01, 100)] = setting(
        1.0, "of the distribution that is sampled, scored and trained"
    )

    rewards: str = setting(
        "accuracy=0.9,format=0.1",
        "named rewards with their weights, by source (see the README)",
        group="SCORE (responses -> rewards -> advantages)",
    )
    rounding: bool = setting(True, "accuracy: a decimal gold accepts what rounds to it")
    judge_url: str = setting(
        "", "OpenAI-compatible endpoint of the reward judge; its key is OPENAI_API_KEY's"
    )
    judge_model: str = setting("", "the model that judges")
    judge_strict: bool = setting(
        True, "stop when the judge fails, retries included; false: a failure earns 0"
    )
    advantage: Literal["std", "none", "loo"] = setting(
        "std", "std: GRPO; none: Dr. GRPO; loo: RLOO"
    )

    kl_coefficient: Weight = setting(
        0.01,
        "weight of the KL to the starting policy; 0: no reference is loaded",
        group="FREEZE (the policy before it moves, and the reference)",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = setting("k3", "how a token's KL is estimated")
    reference_on_cpu: bool = setting(
        False, "keep the KL's reference in the host's memory: less on the GPU, and slower"
    )
    importance: Literal["none", "token", "sequence"] = setting(
        "token", "truncated importance sampling against the sampler's gap: none, token, sequence"
    )
    importance_cap: Annotated[float, Range(1)] = setting(2.0, "largest importance weight")
    max_sampler_gap: Positive = setting(
        0.2, "stop if sampler and trainer disagree by more nats per token, on average"
    )

    ratio: Literal["token", "sequence"] = setting(
        "token", "token: GRPO; sequence: GSPO", group="LEARN (loss -> update)"
    )
    clip_low: Share = setting(0.2, "how far the probability ratio may fall below 1")
    clip_high: Weight = setting(
        0.3, "how far the probability ratio may rise above 1 (DAPO: higher than --clip_low)"
    )
    clip_dual: Weight = setting(
        3.0,
        "most loss of a token with a negative advantage, in advantages (arXiv:1912.09729); 0: off",
    )
    aggregation: Literal["token", "sequence", "constant"] = setting(
        "token", "mean over tokens (token), over responses (sequence), Dr. GRPO's (constant)"
    )
    entropy_coefficient: Weight = setting(
        0.0, "weight of the policy's entropy, which is then raised; 0: it has no gradient"
    )
    minibatch_prompts: Count = setting(128, "prompts per update, over all ranks")
    epochs: Count = setting(1, "passes over the rollouts of a step")
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "adamw, or muon for the language model's matrices and adamw for the rest"
    )
    learning_rate: Weight = setting(1e-6, "after warm-up")
    warmup_updates: CountOr0 = setting(0, "updates over which the learning rate rises from 0")
    schedule: Literal["linear", "cosine"] = setting("linear", "how the learning rate then falls")
    final_learning_rate: Share = setting(1.0, "share of the learning rate that is left at the end")
    weight_decay: Weight = setting(0.01, "of the optimizer")
    beta2: Decay = setting(0.999, "of AdamW: how slowly it forgets the size of gradients")
    max_grad_norm: Positive = setting(1.0, "gradients are scaled down to this norm")
    max_not_finite: CountOr0 = setting(
        0, "updates left out because a loss or gradient is not finite, before the run stops"
    )

    eval_every: Count = setting(
        5,
        "steps between evaluations; there is one before and one after training in any case",
        group="REPORT (evaluation and checkpoints)",
    )
    eval_rows: CountOr0 = setting(0, "held-out rows used; 0: all")
    eval_samples: Count = setting(
        1, "responses drawn per held-out row; 1 takes the likeliest tokens instead (greedy)"
    )
    save_every: CountOr0 = setting(5, "steps between checkpoints; 0: only the last")
    keep: Count = setting(
        2, "newest checkpoints that are kept, beside the one with the best evaluation"
    )
    save_in_background: bool = setting(
        False, "write checkpoints while training goes on, from a copy in main memory"
    )
    wandb: str = setting("", "project of Weights & Biases to log to; empty: none")

    def __post_init__(self):
        types = setting_types()
        for f in dataclasses.fields(self):
            check_setting(f, types[f.name], getattr(self, f.name))
        check_rewards(self)
        check_pairs(self)
        find_environment(self.task)
        self.column_names  # noqa: B018  raises for a name that is none
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"--wandb {self.wandb} needs the package wandb; pip install wandb, or leave the flag "
                "out"
            )
        if self.name and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                f"--name {self.name!r} is not a plain folder name; --out gives its place"
            )

    def rate(self, done: int) -> float:
        """Share of the learning rate after `done` updates: up over the warm-up, and from the first
        update to the last down to --final_learning_rate."""
        total = self.steps * self.epochs * (self.prompts_per_step // self.minibatch_prompts)
        warm = min(1.0, (done + 1) / (self.warmup_updates + 1))
        fallen = done / total
        if self.schedule == "cosine":
            fallen = (1 - math.cos(math.pi * fallen)) / 2
        return warm * (1 - (1 - self.final_learning_rate) * fallen)

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """What training and vLLM compute in."""
        if self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return getattr(torch, self.dtype)

    @property
    def video_limits(self) -> VideoLimits:
        return VideoLimits(self.video_fps, self.max_frames, self.max_frame_pixels)

    @property
    def reward_weights(self) -> dict[str, dict[str, float]]:
        return reward.parse_weights(self.rewards)

    @property
    def column_names(self) -> dict[str, str]:
        """Arguments of load_problems."""
        names = {}
        for pair in filter(None, self.columns.split(",")):
            ours, _, theirs = (word.strip() for word in pair.partition("="))
            if ours not in COLUMNS or not theirs:
                raise ValueError(
                    f"--columns {self.columns}: {pair!r} is not OURS=THEIRS with one of "
                    f"{', '.join(COLUMNS)}"
                )
            names[f"{ours}_key"] = theirs
        return names

    @property
    def folder(self) -> Path:
        """Where this run is written; an evaluation does not take a training's place."""
        name = self.preset if self.steps else f"{self.preset}-evaluation"
        return Path(self.out) / (self.name or name)


def check_setting(f: dataclasses.Field, allowed, value) -> None:
    """ValueError for a value that the annotation of its field does not allow."""
    meaning = f.metadata["help"]
    if get_origin(allowed) is Literal and value not in get_args(allowed):
        choices = ", ".join(get_args(allowed))
        raise ValueError(f"--{f.name} {value} is none of {choices} ({meaning})")
    if get_origin(allowed) is Annotated:
        bounds = get_args(allowed)[1]
        if not bounds.least <= value <= bounds.most:  # nan is in no range
            raise ValueError(f"--{f.name} is {value}, not {bounds} ({meaning})")


def check_rewards(s: Settings) -> None:
    """ValueError for rewards that nothing can be learnt from, or that nobody would give."""
    named = [weights for weights in s.reward_weights.values()]
    if not any(any(weights.values()) for weights in named):
        raise ValueError(
            f"--rewards {s.rewards} weighs everything 0, so nothing can be learnt; raise a weight"
        )
    judged = any("judge" in weights for weights in named)
    if judged and not (s.judge_url and s.judge_model):
        raise ValueError(
            "--rewards names judge; say whom to ask with --judge_url and --judge_model"
        )


def check_pairs(s: Settings) -> None:
    """ValueError for settings that exclude each other."""
    if s.prompts_per_step % s.minibatch_prompts:
        raise ValueError(
            f"--prompts_per_step {s.prompts_per_step} is not a multiple of --minibatch_prompts "
            f"{s.minibatch_prompts}, so the last update of a step would weigh less than the others"
        )
    if s.min_pixels > s.max_pixels:
        raise ValueError(f"--min_pixels {s.min_pixels} is above --max_pixels {s.max_pixels}")
    if 0 < s.clip_dual < 1:
        raise ValueError(
            f"--clip_dual {s.clip_dual} is below 1, where it would cut the loss of a ratio of 1; "
            "3 is usual, 0 turns it off"
        )
    if s.temperature > 2 and s.engine == "vllm":
        raise ValueError(
            f"--temperature {s.temperature} is above 2, the most that vLLM takes; lower it, or "
            "take --engine hf"
        )
    if s.reference_on_cpu and (s.lora_rank or not s.kl_coefficient):
        why = (
            "LoRA's is the policy without its adapters"
            if s.lora_rank
            else "--kl_coefficient 0 needs none"
        )
        raise ValueError(
            f"--reference_on_cpu moves the reference's weights, and there are none: {why}"
        )
    if s.rollout_tp > 1 and s.engine == "hf":
        raise ValueError(
            f"--rollout_tp {s.rollout_tp} is vLLM's; leave it out or take --engine vllm"
        )


PRESETS = {
    "tiny": dict(
        instruction=TINY_INSTRUCTION, min_pixels=56 * 56, max_pixels=56 * 56, max_prompt_tokens=256,
        steps=200, prompts_per_step=64, responses_per_prompt=8, minibatch_prompts=32,
        max_response_tokens=24, max_tokens_per_pack=8192, kl_coefficient=0.02, learning_rate=6e-4,
        beta2=0.98, warmup_updates=5, final_learning_rate=0.1, eval_every=50, save_every=50,
    ),
    "geo3k": dict(
        model="Qwen/Qwen2.5-VL-7B-Instruct", data="hiyouga/geometry3k", min_pixels=262144,
        max_prompt_tokens=2048, gradient_checkpointing=True, save_in_background=True,
    ),
}  # fmt: skip


PRESETS["codeword"] = PRESETS["tiny"] | dict(
    task="codeword", steps=80, prompts_per_step=32, kl_coefficient=0.0, eval_every=20
)


# --------------------------------------------------------------------------------------------------
# The command line


def setting_types() -> dict[str, Any]:
    """Name of a setting -> its annotation."""
    return get_type_hints(Settings, include_extras=True)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; python train.py --help lists all flags")


def make_parser() -> Parser:
    """The command line's parser: the values of flags that are given, as texts."""
    about = ["presets, by what they change (a flag that is given wins):"]
    for name, changes in PRESETS.items():
        flags = " ".join(f"--{key} {as_flag(value)}" for key, value in changes.items())
        about += ["", *textwrap.wrap(f"{name}: {flags}", 100, subsequent_indent="    ")]
    parser = Parser(
        prog="python train.py",
        usage="%(prog)s [--FLAG VALUE] ...",
        description="\n".join([__doc__.split("\n\n")[0], "", *about]),
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, width=100, max_help_position=36
        ),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    types = setting_types()
    for f in dataclasses.fields(Settings):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        values, bounds = describe_values(types[f.name])
        notes = [bounds] if bounds else []
        if f.default != "":
            notes.append(f"default {as_flag(f.default)}")
        help = f"{f.metadata['help']} [{'; '.join(notes)}]" if notes else f.metadata["help"]
        options = {"nargs": "?", "const": "true"} if f.type == "bool" else {}
        group.add_argument(f"--{f.name}", metavar=values, help=help.replace("%", "%%"), **options)
    return parser


def as_flag(value) -> str:
    """A value as the user types it."""
    return str(value).lower() if isinstance(value, bool) else shlex.quote(str(value))


def describe_values(allowed) -> tuple[str, str]:
    """What --help writes behind a flag, and its bounds."""
    if get_origin(allowed) is Literal:
        return "|".join(get_args(allowed)), ""
    if get_origin(allowed) is Annotated:
        kind, bounds = get_args(allowed)
        return "N" if kind is int else "X", str(bounds)
    return {bool: "true|false", int: "N", str: "TEXT"}[allowed], ""


def read_value(f: dataclasses.Field, allowed, text: str):
    """A flag's text as a value of its field's type; ValueError if it is none."""
    if get_origin(allowed) is Annotated:
        allowed = get_args(allowed)[0]
    if allowed is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if allowed not in (bool, int, float):
        return text
    try:
        return {int: int, float: float}[allowed](text)
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[allowed]
        meaning = f.metadata["help"]
        raise ValueError(f"--{f.name} is {text!r}, not {kind} ({meaning})") from None


def parse_settings(argv: list[str] | None = None) -> tuple[Settings, str]:
    """Read the command line.

    Returns:
        The Settings, and a sentence that says which preset they come from and why.

    Raises:
        ValueError: a flag is unknown, or its value is none that it may have.
    """
    given, unknown = make_parser().parse_known_args(argv)
    if unknown:
        names = [f"--{f.name}" for f in dataclasses.fields(Settings)]
        wrong = unknown[0].split("=")[0]
        near = difflib.get_close_matches(wrong, names, n=1)
        hint = f"did you mean {near[0]}?" if near else "python train.py --help lists all flags"
        raise ValueError(f"there is no flag {wrong}; {hint}")
    types, values = setting_types(), {}
    for f in dataclasses.fields(Settings):
        if f.name in given:
            values[f.name] = read_value(f, types[f.name], getattr(given, f.name))
    preset, why = values.get("preset", "auto"), "asked for"
    if preset == "auto" and values.get("task") in PRESETS:
        preset = values["task"]
    if preset == "auto":
        gpu = torch.cuda.is_available()
        preset, why = ("geo3k", "there is a GPU") if gpu else ("tiny", "there is no GPU")
    defaults = PRESETS.get(preset, {})
    return Settings(**defaults | values | {"preset": preset}), f"preset {preset} ({why})"


def main(argv: list[str] | None = None) -> None:
    """Do what the command line says. An error that a user can cause ends in its sentence, once for
    all ranks, and exit code 1."""
    quieten_libraries()
    try:
        settings, why = parse_settings(argv)
        device = start_processes(settings.timeout)
        say(f"{why}: {dist.get_world_size()} process(es) on {device.type}, in {settings.folder}")
        start_run(settings, device)
    except Exception as error:
        explain_failure(error)
        end_failed()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def start_run(s: Settings, device: torch.device) -> None:
    """Open the run's folder, build the run, train or evaluate, and export the model."""
    for flag, ranks in (("rollout_tp", s.rollout_tp), ("shard_ranks", s.shard_ranks or 1)):
        if dist.get_world_size() % ranks:
            raise ValueError(f"--{flag} {ranks} must divide the {dist.get_world_size()} processes")
    set_seed(s.seed)
    checkpoint = gather_objects(open_folder(s) if dist.get_rank() == 0 else None)[0]
    s = fit_memory(prepare_tiny(s), device)
    if dist.get_rank() == 0:
        record_launch(s)
    say(f"loading {s.model}")
    with advice_on_memory(s):
        run = build(s, device)
    if checkpoint:
        load_checkpoint(run, checkpoint)
    with run.grader:
        if s.steps:
            run.engine.sync(run.actor)
        run.signals = catch_signals()
        try:
            with advice_on_memory(s):
                train(run)
        except Exception as error:
            explain_failure(error)  # first: what is being written may take a while
            raise
        except SystemExit:  # a signal, after which all ranks stop together
            run.engine.close()
            raise
        finally:
            finish_checkpoint(run)
        judge = run.grader.judge
        failed = f", {judge.failures} that the judge failed on" if judge else ""
        say(
            f"answers on rank 0 over the time limit: {run.grader.timeouts}, that broke a grading "
            f"worker: {run.grader.crashes}{failed}"
        )
    if s.steps:
        run.actor.save(s.folder / "model")
        say(f"model exported to {s.folder / 'model'}")
    # not after a failure: the process ends anyway, and the others may be waiting in a collective
    run.engine.close()


@contextlib.contextmanager
def advice_on_memory(s: Settings):
    """Say which flags help where a GPU's memory is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"a GPU's memory is full; set --max_tokens_per_pack to {s.max_tokens_per_pack // 2} or "
            "--gradient_checkpointing true, and if it happened while sampling, --memory_fraction "
            f"to {0.8 * (s.memory_fraction or 0.6):.2f}. {error}"
        ) from error


if __name__ == "__main__":
    main()
