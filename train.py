"""GRPO for vision-language models, in twelve lines and the functions that do them.

     1  for each step:                                            train
     2      take its problems, from seed and number alone          data.batch_indices
     3      problem -> prompt: token ids and pixels                data.Reader
     4      SAMPLE n responses to each prompt                      sample_groups, engine.generate
     5      SCORE each response by its named rewards               score, reward.compute_rewards
     6      all ranks exchange their groups; advantages            grpo.group_advantages
     7      cut groups into minibatches, deal, cut into packs      plan_minibatches
     8      SCORE TOKENS: log-probs before the policy moves        score_tokens
     9      LEARN: for each minibatch: log-probs of each pack      update, model.Actor.logprobs
    10          loss = sum_t w_t (clipped surrogate + beta KL)     pack_loss, grpo.policy_loss
    11          gradient over all packs and ranks; one step        update
    12      REPORT: the engine gets the weights; metrics           engine.sync, report.Log

    python train.py                                 no GPU: a tiny Qwen2.5-VL learns figures
    torchrun --nproc_per_node=8 train.py            GPUs: Qwen2.5-VL-7B on Geometry3K
    python train.py --steps 0 --model M --data D    evaluates M and writes its responses

The same code runs on 1 and on N processes: weights, gradients and optimizer state are sharded by
FSDP2, every rank samples its share of the prompts, and all ranks then know all responses of the
step (ids are small), so that any group can be learnt from on any rank. A step is one batch of
rollouts, an update is one optimizer step on a minibatch.

The path of this file ends at the line "from here on": the loop, the loss, groups and packs. Not
here: the model (model.py), sampling (rollout.py), formulas (grpo.py), grading (reward.py), rows
(data.py).

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
import importlib.util
import math
import random
import re
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
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
from data import INSTRUCTION, VideoLimits
from model import Actor, Bundle, full, join_turns, prompts_of, turns_of
from rollout import (
    Conversations,
    Engine,
    HFEngine,
    Rollout,
    build_engine,
    choose_engine,
    evaluate,
    find_environment,
    one_line,
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
from support.tables import parse_columns
from support.tiny_model import TINY_INSTRUCTION, WARM_UP_UPDATES, build_warm_tiny

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, set_seed


def train(run: Run) -> None:
    """The algorithm."""
    s = run.settings
    log = report.Log(run)
    meter = SavedTensors()  # counts what the first update keeps for its backward; then None
    if run.step == 0:
        evaluation(run, log)
    for step in log.progress(range(run.step, s.steps)):
        clock = report.Clock()
        # for what may draw from the global random states: a reward, dropout
        set_seed(random.Random(f"{s.seed} {step} {dist.get_rank()}").getrandbits(32))

        # SAMPLE and SCORE: n responses to every problem of the step, and their rewards
        drawn = draw_groups(run, step, clock)
        groups = with_advantages(choose_groups(drawn, s.prompts_per_step), s.advantage)
        with clock("sleep"):
            run.engine.sleep()
        if step + 1 < s.steps:  # a thread makes the next prompts meanwhile
            _, coming = own_problems(run, batch_numbers(s, step + 1)[0])
            run.reader.ahead(coming)

        # SCORE TOKENS: under the policy as it is before it moves, and under the reference
        with clock("logprobs"):
            plans = plan_minibatches(groups, s, dist.get_world_size(), run.actor.packing)
            minibatches = [scored_minibatch(run, plan, i == 0) for i, plan in enumerate(plans)]

        # LEARN: one optimizer step for each minibatch
        updates = []
        with clock("learn"):
            for _ in range(s.epochs):
                for minibatch in minibatches:
                    updates.append(update(run, minibatch, step, meter))
        meter = measure_memory(run, meter, updates[-1])

        # REPORT: the engine gets the new weights; rollouts to look at, metrics, evaluation and
        # checkpoint
        with clock("report"):
            show_rollouts(run, log, groups)
        with clock("sync"):
            synced = run.engine.sync(run.actor)
        run.step = step + 1
        log.step(run.step, drawn, minibatches, updates, clock.seconds, synced)
        is_last = run.step == s.steps
        is_due = s.save_every > 0 and run.step % s.save_every == 0
        accuracy = NOT_EVALUATED
        if is_last or run.step % s.eval_every == 0:
            accuracy = evaluation(run, log)
        # a signal to one rank stops all of them after the same step
        stop = int(all_max(max(run.signals, default=0)))
        if stop or is_last or is_due:
            save_checkpoint(run, accuracy)
        if stop:
            leave(run, stop)


def draw_groups(run: Run, step: int, clock: report.Clock) -> list[Group]:
    """The groups of a step; with dynamic sampling, further batches while too many are flat."""
    s = run.settings
    groups = []
    for batch in batch_numbers(s, step):
        groups += sample_groups(run, batch, clock)
        if sum(not group.is_flat() for group in groups) >= s.prompts_per_step:
            break
    return groups


def batch_numbers(s: Settings, step: int) -> range:
    """The batches of problems that a step may draw."""
    per_step = s.dynamic_sampling + 1
    return range(step * per_step, (step + 1) * per_step)


def own_problems(run: Run, batch: int) -> tuple[list[int], list[data.Problem]]:
    """What this rank takes of a batch, every world-th problem: rows of the training set, and the
    problems that they hold."""
    s = run.settings
    indices = data.batch_indices(s.seed, batch, s.prompts_per_step, len(run.train_set))
    own = indices[dist.get_rank() :: dist.get_world_size()]
    return own, [run.train_set[i] for i in own]


def sample_groups(run: Run, batch: int, clock: report.Clock) -> list[Group]:
    """Draw and score one batch of problems: every rank takes some, then all know all groups.

    Args:
        batch: number of the batch; it fixes the problems and, with the weights, the responses.

    Returns:
        One Group per problem, in the order of the problems, the same on every rank.
    """
    s = run.settings
    n = s.responses_per_prompt
    indices, problems = own_problems(run, batch)
    with clock("sample"):
        prompts = [run.reader(problem) for problem in problems]
        seed = random.Random(f"{s.seed} {batch}").getrandbits(63)
        conversations = [[prompt] for prompt in prompts]  # of one turn so far
        rollouts = run.engine.generate(conversations, n, seed)
    with clock("score"):
        tokenizer = run.actor.processor.tokenizer
        # name of a reward -> (problems, n)
        scores = score(rollouts, problems, n, tokenizer, s.reward_weights, run.grader)
        vision = torch.tensor(run.actor.banned_ids)  # the tokens of images and videos
        mine = []
        for p, prompt in enumerate(prompts):
            mine.append(
                Group(
                    index=indices[p],
                    prompt_tokens=len(prompt.ids),
                    image_tokens=int(torch.isin(prompt.ids, vision).sum()),
                    rollouts=rollouts[p],
                    scores={name: values[p].tolist() for name, values in scores.items()},
                )
            )
        by_rank = gather_objects(mine)
    # problem i was drawn by rank i % world, as its number i // world
    world = len(by_rank)
    return [by_rank[i % world][i // world] for i in range(s.prompts_per_step)]


def choose_groups(drawn: list[Group], wanted: int) -> list[Group]:
    """The groups that a step learns from, in the order of the problems; flat ones only fill up."""
    uneven = [i for i, group in enumerate(drawn) if not group.is_flat()]
    flat = [i for i, group in enumerate(drawn) if group.is_flat()]
    return [drawn[i] for i in sorted((uneven + flat)[:wanted])]


def with_advantages(groups: list[Group], scale: str) -> list[Group]:
    """Compare the responses of each group. Every rank knows all groups here, so an advantage that
    needs the whole batch is computed right, and once."""
    rewards = torch.tensor([group.scores["reward"] for group in groups])  # (P, n)
    advantages = grpo.group_advantages(rewards, scale)
    return [replace(group, advantages=advantages[i]) for i, group in enumerate(groups)]


@torch.no_grad()
def score_tokens(run: Run, pack: TrainPack, is_first: bool) -> TrainPack:
    """The pack with its old_logprobs, with ref_logprobs where there is a reference, and with
    white_logprobs where tokens that look weigh more.

    The first minibatch's packs get no old_logprobs: the policy has not moved when they are learnt
    from, so that update's own forward gives them, --lora_dropout included, and no extra pass is
    made.
    """
    old = ref = white = None
    if not is_first:
        old, _ = run.actor.logprobs(pack.bundles, pack.features, entropy="none")
    if run.reference is not None:
        with run.reference.without_adapters():
            ref, _ = run.reference.logprobs(pack.bundles, pack.features, entropy="none")
    if run.settings.look_weight:
        white = score_white(run, pack)
    return replace(pack, old_logprobs=old, ref_logprobs=ref, white_logprobs=white)


def update(
    run: Run, minibatch: Minibatch, step: int, meter: SavedTensors | None
) -> dict[str, float]:
    """One optimizer step. The loss is a sum over tokens with global weights, pack by pack.

    Returns:
        Sums over the minibatch's tokens, over all ranks, beside `tokens`, their count; {} if
        nothing was learnt because every group was flat.

    Raises:
        RuntimeError: sampler and trainer disagree by more than --max_sampler_gap, or more updates
            than --max_not_finite were not finite.
    """
    s = run.settings
    if not minibatch.packs:
        return {}
    entropy_kind = "gradient" if s.uses_entropy else "value"
    sums = collections.Counter()
    gap_max = 0.0  # of a token, nats between sampler_logprobs and old_logprobs
    for pack in minibatch.packs:
        with meter or contextlib.nullcontext():
            logprobs, entropy = run.actor.logprobs(pack.bundles, pack.features, entropy_kind)
        if pack.old_logprobs is None:  # first forward of the step: the policy has not moved
            pack.remember(logprobs.detach())
        loss, measured = pack_loss(s, minibatch, pack, logprobs, entropy)
        # FSDP averages gradients over ranks, but the loss is their sum
        (loss * dist.get_world_size()).backward()
        for name, values in measured.items():
            sums[name] += pack.weight * values.detach().double().sum()
        sums["tokens"] += pack.weight * len(logprobs)
        sums["loss"] += loss.detach()
        gap_max = max(gap_max, pack.weight * measured["gap"].max().item())
    totals = all_sum(sums, run.device)
    # the optimizer's own tensors: after a forward FSDP's root may show others in model.parameters()
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    trained = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    grad_norm = full(norm).item()  # looked at before clipping, which spreads a nan to all gradients
    if not math.isfinite(grad_norm) or not math.isfinite(totals["loss"]):
        leave_out(run, minibatch, step, f"loss {totals['loss']}, gradient norm {grad_norm}")
        return {}
    check_gap(totals["gap"] / totals["tokens"], s.max_sampler_gap, step)
    torch.nn.utils.clip_grads_with_norm_(trained, s.max_grad_norm, norm)
    run.optimizer.step()
    gradient_bytes = local_bytes(p.grad for p in trained)
    run.optimizer.zero_grad()
    run.schedule.step()
    measured = {"grad_norm": grad_norm, "gap_max": all_max(gap_max)}
    return totals | measured | {"gradient_bytes": gradient_bytes}


def pack_loss(
    s: Settings, minibatch: Minibatch, pack: TrainPack, logprobs: Tensor, entropy: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a pack adds to the loss of its minibatch. A loss of your own goes here, or into
    grpo.policy_loss.

    Args:
        logprobs, entropy: (N,) nats, with gradient (entropy only with --entropy_coefficient).

    Returns:
        A scalar; and (N,) each, to be summed for the metrics, see assets/metrics.md.
    """
    old = pack.old_logprobs
    losses, clipped = grpo.policy_loss(
        logprobs,
        old,
        pack.advantages,
        pack.lengths,
        clip_low=s.clip_low,
        clip_high=s.clip_high,
        clip_dual=s.clip_dual,
        ratio=s.ratio,
    )
    losses = losses * grpo.importance_weights(
        old, pack.sampler_logprobs, pack.lengths, cap=s.importance_cap, level=s.importance
    )
    kl = torch.zeros_like(losses)
    if pack.ref_logprobs is not None:
        kl = grpo.kl_estimate(logprobs, pack.ref_logprobs, s.kl_estimator)
    weights = grpo.token_weights(
        pack.lengths,
        s.aggregation,
        total_tokens=minibatch.plan.tokens,
        total_responses=minibatch.plan.responses,
        max_response_tokens=s.max_response_tokens,
    )
    if pack.white_logprobs is not None:
        looks = old - pack.white_logprobs
        weights = weights * grpo.look_weights(looks, pack.lengths, s.look_weight)
    per_token = losses + s.kl_coefficient * kl - s.entropy_coefficient * entropy
    loss = pack.weight * (weights * per_token).sum()
    gap = (pack.sampler_logprobs - old).abs()
    sampler_kl = grpo.kl_estimate(pack.sampler_logprobs, old, "k3")
    return loss, dict(kl=kl, entropy=entropy, clipped=clipped, gap=gap, sampler_kl=sampler_kl)


# --------------------------------------------------------------------------------------------------
# Groups -> minibatches -> packs


@dataclass(frozen=True)
class Group:
    """The n rollouts of one problem, as every rank knows them after sampling."""

    index: int  # row of the training set
    prompt_tokens: int  # image tokens included
    image_tokens: int  # of images and videos
    rollouts: list[Rollout]
    scores: dict[str, list[float]]  # n for each named reward, and "reward", their weighted sum
    advantages: Tensor | None = None  # (n,), known after the ranks have exchanged their groups

    def is_flat(self) -> bool:
        """Whether all responses earned the same, so that there is nothing to compare."""
        return len(set(self.scores["reward"])) == 1

    def teaches(self, s: Settings) -> bool:
        """Whether learning from this group has any gradient: an advantage, or a term of its own."""
        return bool(self.advantages.any() or s.kl_coefficient or s.uses_entropy)

    @property
    def response_tokens(self) -> int:
        return sum(len(rollout.response) for rollout in self.rollouts)


Part = tuple[Group, list[int]]  # a group, and which of its responses


@dataclass(frozen=True)
class Plan:
    """One update: the packs of every rank, and the global counts that normalise its loss."""

    packs: list[list[list[Part]]]  # of every rank: its packs, each some parts of groups
    filler: list[Part]  # a pack that counts nothing, for ranks that have fewer
    tokens: int
    responses: int
    imbalance: float  # dearest rank's cost over the mean, minus 1


def plan_minibatches(groups: list[Group], s: Settings, ranks: int, packing: str) -> list[Plan]:
    """Cut the step's groups into minibatches, deal each over the ranks, and cut what a rank gets
    into packs.

    Every rank plans for all ranks, so no rank has to be asked how many packs it has. Groups that
    teach nothing are left out; they still count in the normalisation.
    """
    plans = []
    for i in range(0, len(groups), s.minibatch_prompts):
        chosen = groups[i : i + s.minibatch_prompts]
        teaching = [group for group in chosen if group.teaches(s)]
        costs = [learning_cost(group) for group in teaching]
        packs = []
        loads = []
        for indices in deal(costs, ranks):
            own = [teaching[j] for j in indices]
            packs.append(cut_into_packs(own, s.max_tokens_per_pack, shared=packing == "shared"))
            loads.append(sum(costs[j] for j in indices))
        plans.append(
            Plan(
                packs=packs,
                filler=[(group, [0]) for group in teaching[:1]],
                tokens=sum(group.response_tokens for group in chosen),
                responses=sum(len(group.rollouts) for group in chosen),
                imbalance=max(loads) * ranks / sum(loads) - 1 if teaching else 0.0,
            )
        )
    return plans


@dataclass
class TrainPack:
    """One forward pass of one rank, with all that its loss needs, flat over its N tokens."""

    bundles: list[Bundle]  # for Actor.logprobs
    lengths: Tensor  # (R,) tokens that the policy wrote in each response
    advantages: Tensor  # (N,)
    sampler_logprobs: Tensor  # (N,) nats, like the next two
    old_logprobs: Tensor | None = None  # None until the policy has been asked, see score_tokens
    ref_logprobs: Tensor | None = None
    white_logprobs: Tensor | None = None  # old_logprobs with white pictures, for --look_weight
    features: dict | None = None  # of a frozen vision tower, computed once for all passes
    weight: float = 1.0  # 0 for a filler: all ranks make equally many forward passes

    def remember(self, old_logprobs: Tensor) -> None:
        """Keep what the policy thought when the step began, for the epochs to come."""
        self.old_logprobs = old_logprobs


@dataclass(frozen=True)
class Minibatch:
    """One update on this rank: its packs, and the plan with the counts that normalise the loss."""

    packs: list[TrainPack]
    plan: Plan


def scored_minibatch(run: Run, plan: Plan, is_first: bool) -> Minibatch:
    """This rank's packs of a plan, on its device, each scored as soon as it is there: a GPU works
    while the prompts of the next pack are made."""
    own = plan.packs[dist.get_rank()]
    packs = [score_tokens(run, load_pack(run, parts), is_first) for parts in own]
    for _ in range(max(map(len, plan.packs)) - len(own)):
        filler = score_tokens(run, load_pack(run, plan.filler), is_first)
        packs.append(replace(filler, weight=0.0))
    return Minibatch(packs, plan)


def load_pack(run: Run, parts: list[Part], problems: data.Problems | None = None) -> TrainPack:
    """One pack; prompts that were sampled elsewhere are made again from their rows, those of the
    training set unless told. An advantage per token would be spread here."""
    problems = run.train_set if problems is None else problems
    bundles, rollouts, advantages = [], [], []
    for group, chosen in parts:
        prompt = run.reader(problems[group.index])
        picked = [group.rollouts[i] for i in chosen]
        bundles.append((prompt, [rollout.completion(run.reader) for rollout in picked]))
        rollouts += picked
        advantages.append(group.advantages[chosen])
    lengths = torch.tensor([len(rollout.response) for rollout in rollouts])
    sampler_logprobs = torch.cat([rollout.sampler_logprobs for rollout in rollouts])
    return TrainPack(
        bundles=bundles,
        features=run.actor.image_features(turns_of(bundles)),
        lengths=lengths.to(run.device),
        advantages=grpo.spread(torch.cat(advantages), lengths).to(run.device),
        sampler_logprobs=sampler_logprobs.to(run.device),
    )


# --------------------------------------------------------------------------------------------------
# --- from here on: what surrounds the algorithm. First: groups over ranks and packs


def learning_cost(group: Group) -> float:
    """Estimated work of learning from a group, in tokens: its prompt and every response once.

    By operation count at Qwen2.5-VL-7B's shape, the vision tower adds a third of a token's work to
    an image token, and a token's attention over 30,000 keys costs as much as the rest of its layer.
    """
    lengths = [rollout.tokens for rollout in group.rollouts]
    tokens = group.prompt_tokens + sum(lengths)
    pairs = group.prompt_tokens**2 / 2
    pairs += sum(length * (group.prompt_tokens + length / 2) for length in lengths)
    return tokens + group.image_tokens / 3 + pairs / 30_000


def deal(costs: list[float], ranks: int) -> list[list[int]]:
    """Deal items out so that all ranks have about the same cost: the dearest first, each to the
    least loaded rank. Returns each rank's items by index, ascending."""
    loads = [0.0] * ranks
    dealt = [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        loads[least] += costs[i]
        dealt[least].append(i)
    return [sorted(items) for items in dealt]


def cut_into_packs(groups: list[Group], max_tokens: int, shared: bool = True) -> list[list[Part]]:
    """Cut groups into packs of at most `max_tokens` tokens where possible.

    Groups stay whole where they fit and are split along responses where not (each part then repeats
    the prompt); a single response that does not fit gets a pack of its own. Without sharing every
    response brings its prompt.
    """
    sized = []  # (tokens, part)
    for group in groups:
        repeated = 0 if shared else group.prompt_tokens
        chosen, used = [], group.prompt_tokens
        for i, rollout in enumerate(group.rollouts):
            if chosen and used + rollout.tokens + repeated > max_tokens:
                sized.append((used, (group, chosen)))
                chosen, used = [], group.prompt_tokens
            used += rollout.tokens + (repeated if chosen else 0)
            chosen.append(i)
        sized.append((used, (group, chosen)))
    sized.sort(key=lambda pair: -pair[0])
    packs, filled = [], []  # first fit, largest first
    for used, part in sized:
        fitting = [i for i, tokens in enumerate(filled) if tokens + used <= max_tokens]
        if fitting:
            packs[fitting[0]].append(part)
            filled[fitting[0]] += used
        else:
            packs.append([part])
            filled.append(used)
    return packs


@torch.no_grad()
def score_white(run: Run, pack: TrainPack) -> Tensor:
    """(N,) log-probs of the pack's tokens where all its pictures are white: one more forward."""

    def white_turns(turns: list) -> list:
        return [t if isinstance(t, Tensor) else data.whitened(t, run.reader) for t in turns]

    bundles = []
    for prompt, completions in pack.bundles:
        white = [white_turns(turns) for turns in completions]
        bundles.append((data.whitened(prompt, run.reader), white))
    logprobs, _ = run.actor.logprobs(bundles, entropy="none")
    return logprobs


# --------------------------------------------------------------------------------------------------
# What stops a run: a gap, what is not finite, a signal; and what the first update took

NOT_EVALUATED = -1.0  # in place of an accuracy: below every one


def leave_out(run: Run, minibatch: Minibatch, step: int, why: str) -> None:
    """Forget an update that is not finite; every rank keeps its packs for study, as plain tensors
    and texts.

    RuntimeError if there are now more than --max_not_finite of them.
    """
    run.not_finite += 1
    broken = []
    for name, p in run.actor.model.named_parameters():
        if p.grad is not None and not full(p.grad).isfinite().all():
            broken.append(name)
    name = f"step-{step:06d}-{run.not_finite}-rank-{dist.get_rank()}.pt"
    file = run.settings.folder / "not-finite" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    packs = [plain_pack(pack, run.actor.positions) for pack in minibatch.packs]
    torch.save({"why": why, "broken_gradients": broken, "packs": packs}, file)
    run.optimizer.zero_grad()
    message = (
        f"step {step}: {why}; the weights were left as they were, and the minibatch is in {file}"
    )
    say(message)
    limit = run.settings.max_not_finite
    if run.not_finite > limit:
        raise RuntimeError(
            f"{message}. It was number {run.not_finite}, --max_not_finite is {limit}. Usual "
            "causes: a learning rate too high, or a reward that is not finite"
        )


def plain_pack(pack: TrainPack, positions: Callable) -> dict:
    """A pack as tensors and texts alone, which torch.load reads with weights_only=True."""
    plain = {name: value for name, value in vars(pack).items() if isinstance(value, Tensor)}
    groups = []
    for prompt, completions in pack.bundles:
        ids = [join_turns(turns, positions)[0] for turns in completions]
        groups.append((prompt.problem.where, prompt.ids, ids))
    return plain | {"groups": groups}


def check_gap(gap: float, limit: float, step: int) -> None:
    """Stop a run whose rollouts are not its policy's: `gap` and `limit` are mean nats per token."""
    if not gap <= limit:
        raise RuntimeError(
            f"step {step}: sampler and trainer disagree by {gap:.3f} nats per token "
            f"(--max_sampler_gap {limit}), so the rollouts are not the policy's. Usual causes: "
            "weights not synced, another temperature, another image resize, or tokens re-encoded "
            "from text"
        )


def leave(run: Run, number: int) -> None:
    """End this process as the signal asks, once the checkpoint is whole."""
    finish_checkpoint(run)
    name = signal.Signals(number).name
    say(f"step {run.step}: {name}; the checkpoint is written, go on with --resume auto")
    sys.exit(128 + number)


def check_against_sampler(engine: Engine, actor: Actor, prompts: list) -> None:
    """Before training, sample a few tokens and compare the sampler's log-probs with the trainer's.

    check_packing compares with the padded forward, which may be wrong itself; the sampler is
    another implementation. All ranks together, with the same prompts, after the first sync; the
    rank that is worst off counts.

    Raises:
        RuntimeError: they differ by more than rounding does.
    """
    limit = 0.05 if actor.compute.itemsize == 2 else 1e-3  # nats
    longest = engine.max_response_tokens
    engine.max_response_tokens = min(32, longest)  # in 16 bits a few tokens say little
    try:
        drawn = engine.generate([[prompt] for prompt in prompts], n=1, seed=0)
    finally:
        engine.max_response_tokens = longest
    bundles = [(prompt, [rollout.turns]) for prompt, [rollout] in zip(prompts, drawn, strict=True)]
    sampled = torch.cat([rollout.sampler_logprobs for [rollout] in drawn])
    with torch.no_grad():
        logprobs, _ = actor.logprobs(bundles, entropy="none")
    gap = all_max((logprobs.cpu() - sampled).abs().mean().nan_to_num(torch.inf).item())
    say(f"sampler and trainer: {gap:.1g} nats per token apart on the first {len(sampled)} tokens")
    if not gap <= limit:
        raise RuntimeError(
            f"before training, sampler and trainer disagree by {gap:.3g} nats per token (limit "
            f"{limit}) with packing {actor.packing!r}, so one of them computes another model. "
            "Usual causes: logits changed behind the head (a softcap), a prompt that sees forwards "
            "(prefix attention), a sliding window, per-token inputs that one of them does not get, "
            "another image resize. See FAMILIES in model.py, and try the other --engine and "
            "--packing padded to learn which of them differs"
        )


def measure_memory(run: Run, meter: SavedTensors | None, totals: dict) -> SavedTensors | None:
    """Say once what an update took. Returns the meter for the next update, None when it is done."""
    if meter is None or not totals:
        return meter
    states = [state for moments in run.optimizer.state.values() for state in moments.values()]
    sizes = dict(
        parameters=local_bytes(run.actor.model.parameters()),
        gradients=totals["gradient_bytes"],
        optimizer=local_bytes(states),
        activations=meter.bytes,
    )
    if run.reference not in (None, run.actor):
        sizes["reference"] = local_bytes(run.reference.model.parameters())
    if run.device.type == "cuda":
        sizes["most at a time"] = torch.cuda.max_memory_allocated()
    told = ", ".join(f"{name} {size / 2**30:.3f}" for name, size in sizes.items())
    say(f"memory of rank 0 in GiB, measured: {told}")
    return None


# --------------------------------------------------------------------------------------------------
# Evaluation, and rollouts to look at


def evaluation(run: Run, log: report.Log) -> float:
    """Evaluate; before and after training with other images too, which tells how much the model
    looks.

    Returns:
        Accuracy with the problems' own images.
    """
    s = run.settings
    views = data.VIEWS
    images = {hash(problem.images) for problem in run.test_set if problem.images}
    if 0 < run.step < s.steps or len(images) < 2:
        views = ("own",)
    accuracy = {}
    for view in views:
        metrics, records, rollouts = evaluate(
            run.engine,
            run.test_set,
            run.reader,
            n=s.eval_samples,
            seed=s.seed,
            weights=s.reward_weights,
            grader=run.grader,
            rows=s.eval_rows,
            view=view,
        )
        accuracy[view] = metrics["accuracy"]
        if view == "own":
            metrics |= measure_looks(run, rollouts)
        name = "eval" if view == "own" else view
        log.write(run.step, {f"{name}/{metric}": value for metric, value in metrics.items()})
        say(f"step {run.step}: {name}, {len(records)} responses: {one_line(metrics)}")
        log.responses(name, records)
    log.check_looks(run.step)
    log.page()
    return accuracy["own"]


LOOKED_AT = 64  # held-out problems


@torch.no_grad()
def measure_looks(run: Run, rollouts: dict[int, Rollout]) -> dict[str, float]:
    """How much answers owe to the pictures of the first held-out problems that have some.

    Returns:
        `looks`, mean nats over the tokens that the policy wrote, of log p(token | picture) -
        log p(token | white picture), and `looks_answer`, over those inside the last box; nothing
        where there is no picture or no box.
    """
    seen = [i for i in sorted(rollouts) if run.test_set[i].images or run.test_set[i].videos]
    seen = seen[:LOOKED_AT]
    # an evaluation alone with vLLM leaves the actor in main memory, where a forward takes too long
    if not seen or run.actor.device.type != run.device.type:
        return {}
    own = seen[dist.get_rank() :: dist.get_world_size()]
    groups = [looked_at(run, i, rollouts[i]) for i in own]
    # vLLM may be awake beside this, so the packs are small
    packs = cut_into_packs(groups, run.settings.max_tokens_per_pack // 4)
    filler = [(looked_at(run, seen[0], rollouts[seen[0]]), [0])]
    sums = dict(looks=0.0, tokens=0.0, looks_answer=0.0, answer_tokens=0.0)
    for i in range(int(all_max(len(packs)))):  # equally many on every rank
        parts = packs[i] if i < len(packs) else filler
        pack = load_pack(run, parts, run.test_set)
        logprobs, _ = run.actor.logprobs(pack.bundles, pack.features, entropy="none")
        looks = (logprobs - score_white(run, pack)).cpu()
        if i >= len(packs):
            continue
        inside = []
        for group, _ in parts:
            texts = report.token_texts(run.actor.processor.tokenizer, group.rollouts[0].response)
            inside += reward.inside_box(texts)
        inside = torch.tensor(inside)
        sums["looks"] += looks.sum().item()
        sums["tokens"] += len(looks)
        sums["looks_answer"] += looks[inside].sum().item()
        sums["answer_tokens"] += inside.sum().item()
    totals = all_sum(sums, run.device)
    metrics = {"looks": totals["looks"] / totals["tokens"]}
    if totals["answer_tokens"]:
        metrics["looks_answer"] = totals["looks_answer"] / totals["answer_tokens"]
    return metrics


def looked_at(run: Run, index: int, rollout: Rollout) -> Group:
    """A held-out problem and a response to it, to be laid into a pack."""
    prompt = run.reader(run.test_set[index])
    return Group(index, len(prompt.ids), 0, [rollout], scores={}, advantages=torch.zeros(1))


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
        pack = load_pack(run, [(group, chosen)])
        logprobs, _ = run.actor.logprobs(pack.bundles, pack.features, entropy="none")
        moved = (logprobs - pack.sampler_logprobs).split(pack.lengths.tolist())
        [(prompt, completions)] = pack.bundles
        looks = None
        if any(turn.images or turn.videos for turn in prompts_of(turns_of(pack.bundles))):
            looks = (logprobs - score_white(run, pack)).split(pack.lengths.tolist())
        tokenizer = run.actor.processor.tokenizer
        shown.append(report.shown_group(prompt, completions, group, moved, tokenizer, looks))
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
    engine: Engine
    optimizer: torch.optim.Optimizer | None  # None, as the schedule: --steps 0 evaluates alone
    schedule: torch.optim.lr_scheduler.LRScheduler | None
    train_set: data.Problems
    test_set: data.Problems
    grader: reward.Grader
    reader: data.Reader
    state: dict[str, Tensor] = field(default_factory=dict)  # of your own, saved in checkpoints:
    # tensors on the CPU, equal on all ranks
    step: int = 0  # steps done
    not_finite: int = 0  # updates left out
    best: tuple[float, int] = (-1.0, 0)  # accuracy and step of the best checkpoint
    signals: list[int] = field(default_factory=list)  # that asked this process to stop
    saving: Future | None = None  # the checkpoint that is being written
    saving_group: dist.ProcessGroup | None = None  # for the thread that writes it


class Together(torch.optim.Optimizer):
    """Optimizers of different weights as one, which shares their groups and state: schedules and
    checkpoints look there."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self) -> None:
        for part in self.parts:
            part.step()


def build_optimizer(
    s: Settings, actor: Actor
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """What moves the trained weights of an actor that is sharded, and how far.

    Weights come with their names, by which checkpoints keep what the optimizer holds. Muon
    (arXiv:2502.16982) takes the matrices of the language model but its tables of tokens, at the
    root mean square of an AdamW step, so that one learning rate serves both. Weight decay covers
    norms and biases too, as in verl; Hugging Face's Trainer exempts them.
    """
    tables = {actor.model.get_input_embeddings().weight, actor.model.get_output_embeddings().weight}
    matrices, rest = [], []
    for name, p in actor.model.named_parameters():
        hidden_matrix = actor.part(name) == "language" and p.ndim == 2 and p not in tables
        if p.requires_grad and s.optimizer == "muon" and hidden_matrix:
            matrices.append((name, p))
        elif p.requires_grad:
            rest.append((name, p))
    common = dict(lr=s.learning_rate, weight_decay=s.weight_decay)
    parts = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common))
    if rest:
        fused = actor.device.type == "cuda"
        parts.append(torch.optim.AdamW(rest, betas=(0.9, s.beta2), fused=fused, **common))
    optimizer = parts[0] if len(parts) == 1 else Together(parts)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, s.rate)


def build(s: Settings, device: torch.device) -> Run:
    """Load, check and shard everything that the loop needs, in five steps; where --steps is 0, only
    what an evaluation needs."""
    with explained_loading(s.model):
        choose_engine(s.engine, s.model, s.temperature)  # refuses before weights and data are read
    actor = load_actor(s, device)
    reader, train_set, test_set, rows = load_data(s, actor)
    # vLLM measures the free memory of the GPU when it starts, so it comes before the trainer's
    # weights
    engine = load_engine(s, actor, reader, rows)
    reference = optimizer = schedule = None
    if s.steps:
        engine.sleep()
        videos = any(row.videos for row in rows)
        shard_actor(s, actor, device, videos)
        check_packing(actor, check_prompts(train_set, reader))
        reference = load_reference(s, actor, device, videos)
        optimizer, schedule = build_optimizer(s, actor)
    elif isinstance(without_conversations(engine), HFEngine):
        actor.model.to(device)
        actor.use_packing(actor.packing)  # the tower's attention depends on the device
    judge = reward.Judge(s.judge_url, s.judge_model, s.judge_strict) if s.judge_model else None
    run = Run(
        settings=s,
        device=device,
        actor=actor,
        reference=reference,
        engine=engine,
        optimizer=optimizer,
        schedule=schedule,
        train_set=train_set,
        test_set=test_set,
        grader=reward.Grader(rounding=s.rounding, judge=judge),
        reader=reader,
    )
    # what is here stays, and need not be looked at again by the collections of every sleep
    gc.collect()
    gc.freeze()
    return run


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
def explained_loading(model: str) -> Iterator[None]:
    """ValueError where transformers finds no such model, or no file of it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--model {model} cannot be loaded: {error}") from error


def load_data(
    s: Settings, actor: Actor
) -> tuple[data.Reader, data.Problems, data.Problems, list[data.CheckedRow]]:
    """What makes all prompts, the problems to train on (none for --steps 0), the held-out ones, and
    what their check has seen in every row of both.

    Raises:
        ValueError: a file or row is unusable, a file is in both sets, or no row has a source that
            --rewards names.
    """
    environment = find_environment(s.task)
    reader = data.Reader(
        actor.processor,
        s.min_pixels,
        s.max_pixels,
        s.instruction,
        s.video_limits,
        first=(lambda problem: environment(problem).first) if environment else None,
        # of this step and the next: those sampled here, those learnt from here, and later turns
        kept=4 * math.ceil(s.prompts_per_step / dist.get_world_size()),
    )
    test_set = open_data(s, s.test_data or s.data, s.test_split)
    train_set = open_data(s, s.data, s.split) if s.steps else data.Problems([])
    both = train_set.files & test_set.files
    if both:
        raise ValueError(
            f"{min(both)} would be trained on and held out; set --test_data or --test_split"
        )
    limits = (s.max_prompt_tokens, s.skip_bad_rows)
    test_set, checked = data.usable_problems(test_set, reader, *limits)
    say(f"held out: {checked}")
    rows = checked.rows
    if s.steps:
        train_set, checked = data.usable_problems(train_set, reader, *limits)
        say(f"to train on: {checked}")
        guessed = chance(train_set, test_set)
        say(f"a question's commonest answer in training would score {guessed:.3f} on held-out ones")
        rows = checked.rows + rows
    unknown = set(s.reward_weights) - {""} - {row.source for row in rows}
    if unknown:
        raise ValueError(
            f"--rewards names sources that no problem has: {sorted(unknown)}; name their column "
            "with --columns source=NAME"
        )
    return reader, train_set, test_set, rows


def open_data(s: Settings, path: str, split: str) -> data.Problems:
    """The rows of a data set, and a sentence on what was taken for what."""
    problems = data.load_problems(path, split, s.columns, s.image_folder)
    for sentence in data.describe(problems):
        say(f"{path}, {split}: {sentence}")
    return problems


def chance(train_set, test_set) -> float:
    """Accuracy of the best answer that never looks: a question's commonest gold in training."""
    golds = collections.defaultdict(collections.Counter)
    for problem in train_set:
        golds[problem.question][problem.answer] += 1
    commonest = {question: counts.most_common(1)[0][0] for question, counts in golds.items()}
    return sum(p.answer == commonest.get(p.question) for p in test_set) / len(test_set)


def load_engine(
    s: Settings, actor: Actor, reader: data.Reader, rows: list[data.CheckedRow]
) -> Engine:
    """What samples, awake, with the conversations of --task around it; `rows`: of all problems,
    whose images, beside those that an environment adds, are the most in a conversation."""
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
        max_images=max(row.images for row in rows) + getattr(environment, "images", 0),
        max_videos=max(row.videos for row in rows),
    )
    say(why)
    if environment:
        return Conversations(engine, environment, reader, s.max_prompt_tokens)
    return engine


def without_conversations(engine: Engine) -> Engine:
    """The engine itself, where --task has put conversations around it."""
    return engine.engine if isinstance(engine, Conversations) else engine


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
        actor.model.gradient_checkpointing_enable({"use_reentrant": False})
    actor.shard(device, s.compute_dtype(device), videos=videos, shard_ranks=s.shard_ranks)
    say(actor.summarize_trained())


def check_prompts(problems: data.Problems, reader: data.Reader) -> list[data.Prompt]:
    """Two prompts for the checks before training, where there are such: of different lengths, and
    one with an image."""
    some = problems[:100]
    first = next((problem for problem in some if problem.images), some[0])
    length = len(reader(first).ids)
    second = next((problem for problem in some if len(reader(problem).ids) != length), some[-1])
    return [reader(first), reader(second)]


def check_packing(actor: Actor, prompts: list[data.Prompt]) -> None:
    """RuntimeError if this model's packed forward does not score as its padded one does."""
    if actor.packing != "padded":
        gap = actor.check_packing(prompts)
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
    "": (make_figures, "figures", "tiny-model", WARM_UP_UPDATES),
    "codeword": (make_codewords, "codewords", "codeword-model", 30),
}


def prepare_tiny(s: Settings) -> Settings:
    """Fill in --data and --model where they are empty: generated problems, and the tiny model
    warmed up on them.

    Both are made once, under --out, by rank 0; delete the folders to make them again. ValueError
    for a --task whose problems are not generated, without --data.
    """
    if s.model and s.data:
        return s
    if s.task not in GENERATED and not s.data:
        raise ValueError(
            f"no problems are generated for --task {s.task}; give --data, and --model, or the tiny "
            "one is warmed up on them"
        )
    if s.task in GENERATED:
        make, problems_name, model_name, updates = GENERATED[s.task]
        problems = Path(s.out) / problems_name
    else:  # an environment of one's own, and its problems
        make = None
        problems = Path(s.data)
        updates = WARM_UP_UPDATES
        model_name = f"{s.task.rpartition(':')[2].lower()}-model"
    model = Path(s.out) / model_name
    if dist.get_rank() == 0:
        if make and not problems.exists():
            say(f"no --data given: drawing problems into {problems}")
            partial = problems.with_suffix(".partial")
            make(partial)
            partial.rename(problems)
        if not s.model and not model.exists():
            say(
                f"no --model given: building a tiny Qwen2.5-VL in {model}, and warming it up with "
                f"{updates} updates on {problems}"
            )
            warm_up_tiny(s, problems, model, updates)
    dist.barrier()
    return dataclasses.replace(s, model=s.model or str(model), data=s.data or str(problems))


def warm_up_tiny(s: Settings, problems: Path, model: Path, updates: int) -> None:
    """Build the tiny model, warmed up on problems by playing the task's environment."""
    named = () if s.task in GENERATED else (s.split, s.columns, s.image_folder)
    rows = data.load_problems(str(problems), *named)
    partial = model.with_suffix(".partial")
    environment = find_environment(s.task)
    build_warm_tiny(partial, rows, s.instruction, s.seed, updates=updates, environment=environment)
    partial.rename(model)


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
Fraction = Annotated[float, Range(0, 1)]
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
        "what columns are called, image=pictures,answer=a.b+c: a dot reaches into a struct, a + "
        "joins; usual names are found (image, video, problem, answer, choices, type, source)",
    )
    image_folder: str = setting("", "where paths of images begin; empty: at the file of their row")
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
        "all",
        "layers with an adapter, such as q_proj,v_proj, or experts; all: every linear layer",
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
    memory_fraction: Fraction = setting(
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
        "named rewards with their weights, by source (see assets/rewards.md)",
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
        group="SCORE TOKENS (the policy before it moves, and the reference)",
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
    clip_low: Fraction = setting(0.2, "how far the probability ratio may fall below 1")
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
    look_weight: Fraction = setting(
        0.0, "how far tokens that look at the picture weigh more (VPPO); costs one more forward"
    )
    minibatch_prompts: Count = setting(128, "prompts per update, over all ranks")
    epochs: Count = setting(1, "passes over the rollouts of a step")
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "adamw, or muon for the language model's matrices and adamw for the rest"
    )
    learning_rate: Weight = setting(1e-6, "after warm-up")
    warmup_updates: CountOr0 = setting(0, "updates over which the learning rate rises from 0")
    schedule: Literal["linear", "cosine"] = setting("linear", "how the learning rate then falls")
    final_learning_rate: Fraction = setting(
        1.0, "share of the learning rate that is left at the end"
    )
    weight_decay: Weight = setting(0.01, "of all that is trained, norms and biases too, as in verl")
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
        parse_columns(self.columns)
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"--wandb {self.wandb} needs the package wandb; pip install wandb, or leave the "
                "flag out"
            )
        if self.name and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                f"--name {self.name!r} is not a plain folder name; --out gives its place"
            )

    @property
    def uses_entropy(self) -> bool:
        """Whether the loss has a term of the entropy, which then has a gradient, in flat groups
        too. Say so here for a term of your own."""
        return self.entropy_coefficient != 0

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
        freeze_vision=True, steps=80, prompts_per_step=64, responses_per_prompt=8,
        minibatch_prompts=32, max_response_tokens=24, max_tokens_per_pack=8192, kl_coefficient=0.0,
        learning_rate=6e-4, beta2=0.98, warmup_updates=5, final_learning_rate=0.1, eval_every=20,
        save_every=40,
    ),
    "geo3k": dict(
        model="Qwen/Qwen2.5-VL-7B-Instruct", data="hiyouga/geometry3k", min_pixels=262144,
        max_prompt_tokens=2048, gradient_checkpointing=True, save_in_background=True,
    ),
}  # fmt: skip


PRESETS["codeword"] = PRESETS["tiny"] | dict(task="codeword", prompts_per_step=32)


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
    types = setting_types()
    values = {}
    for f in dataclasses.fields(Settings):
        if f.name in given:
            values[f.name] = read_value(f, types[f.name], getattr(given, f.name))
    preset = values.get("preset", "auto")
    why = "asked for"
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
        gc.unfreeze()  # else libraries report at exit what was never freed
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
    with run.grader, run.engine:
        try:
            with advice_on_memory(s):
                if s.steps:
                    run.engine.sync(run.actor)
                    prompts = check_prompts(run.train_set, run.reader)
                    check_against_sampler(without_conversations(run.engine), run.actor, prompts)
                run.signals = catch_signals()
                train(run)
        except Exception as error:
            explain_failure(error)  # first: what is being written may take a while
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


@contextlib.contextmanager
def advice_on_memory(s: Settings) -> Iterator[None]:
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
