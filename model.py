"""The actor: any Hugging Face vision-language model, scoring the tokens that the policy wrote.

    groups [(prompt, [response, ...]), ...] --make_pack--> Pack, one row without padding
    (a response is ids (R,), or the turns of a conversation: ids, observation, ids, ...; see
    lay_out) Pack --model forward--> hidden states --log-prob head--> logprobs (N,), entropy (N,),
    in nats

In GRPO the n responses of a group share their prompt and its images. A pack holds each prompt once:

    [prompt_a | a_resp1 | a_resp2 | ... | prompt_b | b_resp1 | ...]

A response attends to its prompt and to itself, the last prompt token predicts the first token of
every response, and every response starts its positions after the prompt's largest. The result
equals the padded forward of every (prompt, response) pair, at a fraction of the work. The head
never holds more than `chunk` rows of logits.

Not here: the loss (grpo.py), sampling (rollout.py), the optimizer (train.py).

        Legend  P tokens of a prompt, T tokens of a pack, N tokens written by the policy, H hidden
        size, V vocabulary, S segments (prompts and responses) of a pack, R tokens of a segment, K
        keys that it sees
Papers  M-RoPE arXiv:2409.12191; FlashAttention's variable-length form arXiv:2307.08691
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import inspect
import json
import math
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import data
from support import cpu  # noqa: F401  it mends two imports of transformers, so it comes first
from support.processes import this_rank

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # optional: torch's own variable-length attention does the same
    flash_attn_varlen_func = None


# --------------------------------------------------------------------------------------------------
# One row, no padding


Turn = Tensor | data.Prompt  # ids (R,) that the policy wrote, or what it read
Group = tuple[
    data.Prompt, list[list[Turn]]
]  # a prompt, and what follows it: the turns of every response


@dataclass
class Pack:
    """The inputs of one forward pass over whole groups. `keep` (N,) are the positions that predict
    `targets` (N,)."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (3, 1, T) with M-RoPE, else (1, T)
    keep: Tensor
    targets: Tensor
    layout: Layout


def make_pack(groups: list[Group], positions: Callable, whole_images: bool = False) -> Pack:
    """Lay groups end to end: `[prompt_a | a_resp1 | a_resp2 | ... | prompt_b | ...]`.

    Args:
        groups: (prompt, responses) pairs; a prompt may have no response. A response is one segment
            with all its turns, those of the environment included, which nothing is trained on.
        positions: Prompt -> (3 or 1, P).
        whole_images: let the tokens of an image see all of it.

    Returns:
        A Pack whose N targets are the tokens that the policy wrote, end to end in the order given.
    """
    ids, places, segments, keep, targets = [], [], [], [], []
    t = 0  # tokens laid so far
    for prompt, responses in groups:
        prompt_start, prompt_end = t, t + len(prompt.ids)
        prompt_positions = positions(prompt)
        ids.append(prompt.ids)
        places.append(prompt_positions)
        segments.append((prompt_start, prompt_end, prompt_start, prompt_start))
        t = prompt_end
        for response in responses:
            row, row_positions, written = lay_out(response, positions, prompt_positions.max() + 1)
            predictor = torch.arange(t - 1, t - 1 + len(row))  # position t - 1 predicts token t,
            predictor[0] = prompt_end - 1  # but a response's first token follows its prompt
            keep.append(predictor[written])
            targets.append(row[written])
            ids.append(row)
            places.append(row_positions)
            segments.append((t, t + len(row), prompt_start, prompt_end))
            t += len(row)
    images = image_numbers(turns_of(groups)) if whole_images else None
    position_ids = join_positions(places)
    return Pack(
        input_ids=torch.cat(ids)[None],
        position_ids=position_ids[:, None] if len(position_ids) > 1 else position_ids,
        keep=torch.cat(keep),
        targets=torch.cat(targets),
        layout=Layout(segments, images),
    )


def image_numbers(turns: list[Turn]) -> Tensor:
    """(T,) number of the image that a token belongs to, -1 for text."""
    inside = join_token_types(turns)["token_type_ids"] == 1
    begins = inside & ~F.pad(inside, (1, -1))
    return torch.where(inside, begins.cumsum(0), -1)


def lay_out(turns: list, positions: Callable, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Write the turns of a conversation into one row.

    Args:
        turns: Prompts, which the policy read, and Tensors of ids (R,), which it wrote, never empty.
        positions: Prompt -> (3 or 1, P), from 0. Each turn starts after the largest position of the
            one before it, the first at `start`.

    Returns:
        ids (T,), positions (3 or 1, T), and (T,) bool: written by the policy, so trained.
    """
    ids, places, written = [], [], []
    for turn in turns:
        is_written = isinstance(turn, Tensor)
        if is_written and len(turn) == 0:
            raise ValueError("an empty response has no token to score; drop it before packing")
        ids.append(turn if is_written else turn.ids)
        places.append(start + (torch.arange(len(turn))[None] if is_written else positions(turn)))
        written.append(torch.full((len(ids[-1]),), is_written))
        start = places[-1].max() + 1
    return torch.cat(ids), join_positions(places), torch.cat(written)


def join_positions(places: list[Tensor]) -> Tensor:
    """(3 or 1, T) positions of pieces end to end; a piece of text has one row where one with images
    has 3."""
    rows = max(map(len, places))
    return torch.cat([place.expand(rows, -1) for place in places], 1)


@dataclass
class Layout:
    """Who attends to whom in a pack. Travels to the attention function as a keyword argument of the
    forward.

    segments: (start, end, prompt_start, prompt_end) of every prompt and response, in tokens; a
    prompt's own prompt range is empty. Keys of a segment are its prompt range, then itself. With
    `images`, a token of an image sees all of its image.
    """

    segments: list[tuple[int, int, int, int]]
    images: Tensor | None = (
        None  # (T,) number of the image a token belongs to, -1 for text; None where it is no matter
    )
    _cache: dict = field(default_factory=dict)

    def varlen(self, device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """For the variable-length kernel: key index (sum of keys,), cumulative query and key
        counts, their maxima."""
        if "varlen" not in self._cache:
            lengths = torch.tensor(
                [[b - a, b - a + d - c] for a, b, c, d in self.segments]
            )  # (S, 2)
            queries, keys = F.pad(lengths.cumsum(0), (0, 0, 1, 0)).int().T.contiguous().to(device)
            index = torch.cat(
                [
                    torch.cat([torch.arange(c, d), torch.arange(a, b)])
                    for a, b, c, d in self.segments
                ]
            )
            self._cache["varlen"] = index.to(device), queries, keys, *lengths.amax(0).tolist()
        return self._cache["varlen"]

    def padded(self, window: int | None, device) -> list[tuple]:
        """For dense attention: prompts and responses, each as (query index, key index, mask,
        places, real).

        Shapes (S, L), (S, K), (S, 1, L, K), (queries,) and (S, L). Two batches, because prompts are
        long and responses many; a mask of None is plain causal attention. `real` are the queries
        that are no padding, `places` their rows.
        """
        if ("padded", window, device) not in self._cache:
            kinds = [
                [s for s in self.segments if (s[2] == s[3]) == is_prompt]
                for is_prompt in (True, False)
            ]
            batches = [self._dense_batch(kind, window) for kind in kinds if kind]
            self._cache["padded", window, device] = [
                [x if x is None else x.to(device) for x in b] for b in batches
            ]
        return self._cache["padded", window, device]

    def _dense_batch(self, segments, window):
        a, b, c, d = (torch.tensor(x)[:, None] for x in zip(*segments, strict=True))  # each (S, 1)
        query, key = torch.arange(int((b - a).max())), torch.arange(int((b - a + d - c).max()))
        real = query < b - a  # (S, L)
        query_index = torch.where(real, a + query, a)
        key_index = torch.where(key < d - c, c + key, a + key - (d - c)).clamp(max=b - 1)  # (S, K)
        last = (d - c) + query  # (S, L) the key that is the query itself: the last one it may see
        mask = key <= last[..., None]  # (S, L, K)
        if self.images is not None:
            mine, its = self.images[query_index][..., None], self.images[key_index][:, None]
            mask |= (mine == its) & (mine >= 0)
        mask &= (key < b - a + d - c)[:, None]
        if window:
            mask &= key > last[..., None] - window
            mask |= ~real[
                ..., None
            ]  # a padding query that sees nothing would be nan, in the backward too
        # whole prompts: causal attention needs no mask
        plain = not window and self.images is None and bool((c == d).all() and real.all())
        return query_index, key_index, None if plain else mask[:, None], query_index[real], real


def shared_attention(
    module,
    q,
    k,
    v,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    layout=None,
    **_,
):
    """Attention of a pack, as transformers' AttentionInterface wants it.

    Args:
        q, k, v: (1, heads, T, head size); k and v may have fewer heads (grouped queries).
        layout: the pack's Layout. Without one there is nothing that keeps the responses apart, so
            this refuses.

    Returns:
        (1, T, heads, head size) and None for the attention weights.
    """
    if layout is None or attention_mask is not None or dropout:
        raise ValueError(
            "shared attention runs on packs only: it needs layout=, no attention_mask and no dropout"
        )
    if (
        q.is_cuda and q.itemsize == 2 and layout.images is None
    ):  # the kernels: causal attention in 16 bits only
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, heads, head size)
        key_index, *sizes = layout.varlen(q.device)
        k, v = k.index_select(0, key_index), v.index_select(0, key_index)
        window = (
            (sliding_window or 0) - 1,
            0,
        )  # (-1, 0) is plain causal, aligned to the bottom right
        if flash_attn_varlen_func is not None:
            out = flash_attn_varlen_func(
                q, k, v, *sizes, softmax_scale=scaling, causal=True, window_size=window
            )
        else:
            out = varlen_attn(q, k, v, *sizes, scale=scaling, window_size=window, enable_gqa=True)
        return out[None], None
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, heads, head size)
    out = torch.empty_like(q)
    for query_index, key_index, mask, places, real in layout.padded(sliding_window, q.device):
        batch = (
            x[i].transpose(1, 2) for x, i in ((q, query_index), (k, key_index), (v, key_index))
        )
        attended = F.scaled_dot_product_attention(
            *batch, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        out = out.index_copy(0, places, attended.transpose(1, 2)[real])
    return out[None], None


AttentionInterface.register(
    "shared", shared_attention
)  # no mask function beside it, so no T x T mask is built


# --------------------------------------------------------------------------------------------------
# Log-probs without logits


class ChunkedLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature, banned tokens at -inf)[target], with at most (chunk, V)
    logits alive.

    The backward computes the logits again, which is cheaper in time and memory than checkpointing
    chunks; only those of the last chunk are kept, so that a pack of one chunk pays nothing.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, banned, temperature, chunk, want_entropy):
        dtype = torch.promote_types(h.dtype, torch.float32)
        logprobs, entropy, lse = torch.zeros((3, len(targets)), dtype=dtype, device=h.device)
        for i in range(0, len(targets), chunk):
            s = slice(i, i + chunk)
            z = ChunkedLogprobs.logits(h[s], weight, banned, temperature, dtype)
            lse[s] = z.logsumexp(-1)
            z.sub_(lse[s, None])  # log-probs of the whole vocabulary
            logprobs[s] = z.gather(-1, targets[s, None])[:, 0]
            if want_entropy:
                entropy[s] = -(z.exp() * z.masked_fill(z == -torch.inf, 0)).sum(-1)
        ctx.kept = z.exp_() if len(targets) and ctx.needs_input_grad[0] else None
        ctx.save_for_backward(h, weight, targets, banned, lse)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        h, weight, targets, banned, lse = ctx.saved_tensors
        grad = grad / ctx.temperature
        dh, dw = torch.empty_like(h), torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i in reversed(range(0, len(targets), ctx.chunk)):
            s = slice(i, i + ctx.chunk)
            p, ctx.kept = ctx.kept, None
            if p is None:
                p = (
                    ChunkedLogprobs.logits(h[s], weight, banned, ctx.temperature, lse.dtype)
                    .sub_(lse[s, None])
                    .exp_()
                )
            dz = p.mul_(-grad[s, None])  # d log p[target] / dz = onehot - p
            dz = dz.scatter_add_(1, targets[s, None], grad[s, None]).to(weight.dtype)
            dh[s] = dz @ weight
            if dw is not None:
                dw.addmm_(dz.T, h[s])
        return dh, dw, None, None, None, None, None

    @staticmethod
    def logits(h, weight, banned, temperature, dtype):
        return (h @ weight.T).to(dtype).div_(temperature).index_fill_(-1, banned, -torch.inf)


class LogprobHead(nn.Linear):
    """What lm_head becomes: an ordinary Linear until `request` is set, then it returns log-probs
    and entropies.

    Swapping the head's class, not the head, keeps tied weights, PEFT and FSDP2's hooks as they
    were.
    """

    request: tuple | None = (
        None  # targets (N,), banned ids, temperature, chunk, whether entropies are wanted
    )

    def forward(self, h: Tensor) -> Tensor:
        """(1, N, H) -> (1, N, V) logits, or (1, N, 2) log-prob and entropy while a request is
        set."""
        if self.request is None:
            return super().forward(h)
        logprobs, entropy = ChunkedLogprobs.apply(h[0], self.weight, *self.request)
        return torch.stack([logprobs[None], entropy[None]], -1)


# --------------------------------------------------------------------------------------------------
# The actor


class Actor:
    """A vision-language model with its processor, as policy, reference or sampler.

        actor = Actor.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")               # or Actor(model,
        processor) prompt = actor.prompt("<image>How many sides?", [picture]) [responses] =
        actor.generate([prompt], n=4) logprobs, entropy = actor.logprobs([(prompt, [r.response for r
        in responses])])   # (N,), (N,)

    Attributes:
        model, processor: the Hugging Face objects.
        temperature: of the trained distribution; logits are divided by it, in sampling and in
            scoring.
        banned_ids: vision tokens, which the policy may not write: an <|image_pad|> in a response
            would ask for image features that do not exist. They have probability 0 in sampling and
            in scoring alike.
    """

    def __init__(
        self, model: nn.Module, processor, temperature: float = 1.0, packing: str = "shared"
    ):
        self.model, self.processor, self.temperature = model, processor, temperature
        self.family, self.dtype, self.lora = family_of(model), model.dtype, None
        self.chunk = 1024  # rows of logits alive at a time; fewer rows of bfloat16 products lose precision in dW
        self.banned_ids = banned_token_ids(model.config)
        self.pad_id = processor.tokenizer.pad_token_id or 0
        self.eos_ids = end_token_ids(model, processor.tokenizer)
        self.anchors: dict[str, data.Prompt] = {}
        self.image_bounds, self.checking = {}, False
        vision = processor.image_processor
        self.pixels = 1, 10**9  # least and most of an image
        if counts_pixels(vision):
            self.pixels = vision.size["shortest_edge"], vision.size["longest_edge"]
        self.sharded_on: torch.device | None = None
        self.generates = False  # weights are whole for a while, see `generating`
        self._positions = weakref.WeakKeyDictionary()  # of Prompts
        model._weight_conversions = conversions_of(model)
        model.get_output_embeddings().__class__ = LogprobHead
        self.use_packing(packing)

    def use_packing(self, packing: str) -> None:
        """Choose how `logprobs` lays out its forward: "shared", "packed" (a prompt for every
        response) or "padded".

        The language model's attention is set for good, not around each forward: gradient
        checkpointing runs the layers again in the backward. The vision tower keeps its own
        attention.
        """
        if packing not in ("shared", "packed", "padded"):
            raise ValueError(f"packing is {packing!r}, not one of shared, packed, padded")
        layers = getattr(self.model.config.get_text_config(), "layer_types", None) or ()
        kinds = set(layers) - {"full_attention", "sliding_attention"}
        if share_recurrent_layers(self.model):
            kinds -= {"linear_attention"}
        if (
            packing != "padded" and kinds
        ):  # a recurrent state (Qwen3.5) cannot tell the sequences of a row apart
            warnings.warn(
                f"layers of type {sorted(kinds)} cannot share a row: packing is padded",
                stacklevel=2,
            )
            packing = "padded"
        self.packing = packing
        self.model.set_attn_implementation(
            {"text_config": "sdpa" if packing == "padded" else "shared"}
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        dtype: torch.dtype = torch.float32,
        pixels: tuple[int, int] | None = None,
        **options,
    ) -> Actor:
        """Load model and processor from a directory or the hub, on the CPU. Remote code is never run.

        Args:
            pixels: least and most of an image, see bound_images; None: the processor's own.
            options: Actor's.
        """
        model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa"
        )
        actor = cls(model.eval(), AutoProcessor.from_pretrained(name), **options)
        if pixels:
            actor.bound_images(*pixels)
        return actor

    def bound_images(self, least: int, most: int) -> None:
        """Tell the processor, and a model that reads it too, how many pixels an image may have.

        It then leaves images alone that data.resize_image has brought within these bounds.
        ValueError if the family's images cannot be bounded so.
        """
        vision = self.processor.image_processor
        try:
            self.image_bounds = self.family.bound(vision, least, most)
        except ValueError as error:
            raise ValueError(
                f"--max_pixels {most} cannot be obeyed by {self.model.config.model_type}: {error}"
            ) from error
        self.pixels = least, most
        for setting, value in self.image_bounds.items():
            setattr(vision, setting, value)
            if hasattr(self.model.config, setting):  # LLaVA's forward reads the grids there
                setattr(self.model.config, setting, value)

    def logprobs(
        self, groups: list[tuple], features: dict | None = None, entropy=True
    ) -> tuple[Tensor, Tensor]:
        """Score responses under the model, at `temperature` and without the banned tokens.

        Args:
            groups: (prompt, [response, ...]) pairs; a response is ids (R,), or the turns of a
                conversation (lay_out).
            features: image_features of the groups, if they are at hand; else the tower runs on the
                pixels.
            entropy: compute entropies too; without, they are 0.

        Returns:
            logprobs (N,) with gradient and entropy (N,) without, both float32 nats, over the tokens
            that the policy wrote, end to end in the order given.
        """
        self.model.train(
            torch.is_grad_enabled()
        )  # layers drop out and checkpoint while they are trained only
        for module in self.model.modules() if self.checking else ():
            if isinstance(module, nn.Dropout):
                module.eval()
        if self.packing == "padded":
            return self._padded_logprobs(groups)
        if self.packing == "packed":  # every response brings its own copy of the prompt
            groups = [
                (prompt, [response]) for prompt, responses in groups for response in responses
            ]
        groups = [*groups, *((anchor, []) for anchor in self._missing_anchors(groups))]
        pack, device = make_pack(groups, self.positions, self.family.whole_images), self.device
        if features is not None:
            vision = {"mm_encoder_outputs": features}
        else:
            vision = self.multi_modal_inputs(prompts_of(turns_of(groups)))
        vision |= self.token_types([turns_of(groups)])
        head = self.model.get_output_embeddings()
        head.request = (
            pack.targets.to(device),
            self._banned(device),
            self.temperature,
            self.chunk,
            entropy,
        )
        try:
            out = self.model(
                input_ids=pack.input_ids.to(device),
                position_ids=pack.position_ids.to(device),
                logits_to_keep=pack.keep.to(device),
                layout=pack.layout,
                use_cache=False,
                **vision,
            ).logits  # (1, N, 2)
        finally:
            head.request = None
        return out[0, :, 0], out[0, :, 1].detach()

    def _padded_logprobs(self, groups):
        """The plain way, as a reference: one row per response with all it follows, padded left."""
        rows = [[prompt, *response] for prompt, responses in groups for response in responses]
        rows += [[anchor] for anchor in self._missing_anchors(groups)]
        ids, places, written = zip(*(lay_out(row, self.positions) for row in rows), strict=True)
        width = max(len(tokens) - len(row[0].ids) for tokens, row in zip(ids, rows, strict=True))
        mask = left_pad([torch.ones_like(tokens) for tokens in ids], 0)
        ids, positions, written = (
            left_pad(ids, self.pad_id),
            left_pad(places, 0),
            left_pad(written, False)[:, -width:],
        )
        logits = (
            self.model(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                use_cache=False,
                position_ids=(
                    positions.transpose(0, 1) if positions.shape[1] > 1 else positions[:, 0]
                ).to(self.device),
                logits_to_keep=width + 1,
                **self.multi_modal_inputs([prompt for row in rows for prompt in prompts_of(row)]),
                **self.token_types(rows),
            )
            .logits[:, :-1]
            .float()
            / self.temperature
        )  # (rows, R, V)
        logps = logits.index_fill(-1, self._banned(self.device), -torch.inf).log_softmax(-1)
        entropy = -(logps.exp() * logps.masked_fill(logps == -torch.inf, 0)).sum(-1)
        logprobs = logps.gather(-1, ids[:, -width:, None].to(self.device))[..., 0]
        return logprobs[written.to(self.device)], entropy[written.to(self.device)].detach()

    def check_packing(self, prompts: list) -> float:
        """Compare the chosen packing with the padded forward: log-probs, and the gradient of one
        weight.

        Run once before training, so that no family is ever silently wrong. All ranks call this
        together, with the same prompts; gradients are cleared. Returns the mean difference of the
        log-probs, in nats; RuntimeError if the packing is not exact for this model.
        """
        groups = self._random_groups(prompts, (5, 8))
        weight = next(
            p
            for name, p in self.model.named_parameters()  # a fresh adapter's B is 0, and so A's gradient
            if p.requires_grad and self.part(name) == "language" and "lora_A" not in name
        )
        packing, results, self.checking = self.packing, [], True
        self.model.zero_grad()
        # the padded forward in one batch and in several tells how much the rounding of this dtype
        # alone does
        for layout, batches in (
            ("padded", [groups]),
            ("padded", [[g] for g in groups]),
            (packing, [groups]),
        ):
            self.use_packing(layout)
            logprobs = torch.cat([self.logprobs(batch)[0] for batch in batches])
            logprobs.mean().backward()
            results.append((logprobs.detach(), full(weight.grad).float()))
            self.model.zero_grad()
        self.checking = False
        expected, rounded, got = results
        noise, gap = ((x[0] - expected[0]).abs().mean().item() for x in (rounded, got))
        slope_noise, slope = (
            ((x[1] - expected[1]).norm() / expected[1].norm()).item() for x in (rounded, got)
        )
        if not (gap < 1e-4 + 3 * noise and slope < 1e-3 + 3 * slope_noise):
            raise RuntimeError(
                f"packing {packing!r} is not exact for {type(self.model).__name__}: its log-probs are "
                f"{gap:.2g} nats (rounding: {noise:.2g}) and a gradient {slope:.2g} of its norm (rounding: "
                f"{slope_noise:.2g}) away from the padded forward's; use --packing padded"
            )
        return gap

    def _random_groups(self, prompts, lengths):
        generator = torch.Generator().manual_seed(0)
        allowed = torch.tensor(sorted(set(range(100)) - set(self.banned_ids) - set(self.eos_ids)))
        groups = []
        for prompt in prompts:
            picks = [torch.randint(len(allowed), (n,), generator=generator) for n in lengths]
            groups.append((prompt, [[allowed[pick]] for pick in picks]))
        return groups

    def _missing_anchors(self, groups):
        return [
            anchor
            for kind, anchor in self.anchors.items()
            if not any(getattr(prompt, kind) for prompt in prompts_of(turns_of(groups)))
        ]

    def _banned(self, device):
        return torch.tensor(self.banned_ids, dtype=torch.long, device=device)

    def positions(self, prompt) -> Tensor:
        """Positions of a prompt's tokens: (3, P) time, height, width for M-RoPE, else (1, P).
        Cached on the prompt.

        Explicit, because a Qwen forward without mm_token_type_ids falls back to 1-D positions
        without a word.
        """
        if prompt not in self._positions:
            self._positions[prompt] = self._make_positions(prompt)
        return self._positions[prompt]

    def _make_positions(self, prompt: data.Prompt) -> Tensor:
        inner = unwrap(self.model).model
        plain = torch.arange(len(prompt.ids))[None]
        if not hasattr(inner, "get_rope_index"):
            return plain
        if not prompt.images and not prompt.videos:
            return plain.expand(3, -1)
        names = inspect.signature(inner.get_rope_index).parameters
        inputs = {name: value for name, value in prompt.inputs.items() if name in names}
        if "second_per_grid_ts" in inputs:  # vLLM rounds products of these in double precision
            inputs["second_per_grid_ts"] = inputs["second_per_grid_ts"].double()
        positions = inner.get_rope_index(prompt.ids[None], **inputs)[0][:, 0].cpu()
        return after_videos(positions, prompt.inputs["mm_token_type_ids"][0])

    def multi_modal_inputs(self, prompts: list) -> dict[str, Tensor]:
        """Pixels and grids of the prompts, on the model's device, ready for the forward."""
        inputs = extract_multi_modal_inputs(
            self.model, join_inputs(prompts, self.family.image_axis)
        )
        return {name: value.to(self.device) for name, value in inputs.items()}

    def token_types(self, rows: list) -> dict[str, Tensor]:
        """The processor's per-token inputs of rows of turns, padded left with 0, as far as the
        forward takes them."""
        types = [join_token_types(row) for row in rows]
        return {
            name: left_pad([row[name] for row in types], 0).to(self.device)
            for name in extract_multi_modal_inputs(self.model, types[0])
        }

    @torch.no_grad()
    def image_features(self, prompts: list) -> dict | None:
        """What a frozen vision tower makes of the prompts' images and videos, for `logprobs` to use
        again and again.

        Returns None where there is nothing to keep: no image, a tower that is trained, a model
        whose forward takes no `mm_encoder_outputs`, or a layout that needs an image several times.
        """
        names, model = inspect.signature(unwrap(self.model).forward).parameters, unwrap(self.model)
        if self.trains_vision() or self.packing != "shared" or "mm_encoder_outputs" not in names:
            return None
        inputs, features = self.multi_modal_inputs(prompts), {}
        inputs.pop("second_per_grid_ts", None)
        videos = {name: inputs.pop(name) for name in list(inputs) if "video" in name}
        if inputs:
            features["image"] = model.get_image_features(**inputs, return_dict=True)
        if videos:
            features["video"] = model.get_video_features(**videos, return_dict=True)
        return features or None

    def prompt(self, question: str, images=(), instruction: str = "", videos=()) -> data.Prompt:
        """A Prompt of a question with `<image>` and `<video>` in it; a data.Reader makes those of rows.

        Args:
            images: a picture for each `<image>`.
            videos: the frames, pictures too, for each `<video>`.
        """
        stored = tuple(map(data.png, images))
        frames = tuple(tuple(map(data.png, video)) for video in videos)
        problem = data.Problem("prompt", question, stored, "", "", "", videos=frames)
        return data.Reader(self.processor, *self.pixels, instruction)(problem)

    def trains_vision(self) -> bool:
        """Whether any weight of the tower or the projector is trained."""
        return any(
            p.requires_grad and self.part(name) != "language"
            for name, p in self.model.named_parameters()
        )

    @property
    def device(self) -> torch.device:
        """Where inputs go: sharded weights may lie elsewhere, see `shard`'s offload."""
        return self.sharded_on or next(self.model.parameters()).device

    def part(self, name: str) -> str:
        """Which part of the model a parameter or module belongs to, by its full name: tower,
        projector or language."""
        path = set(name.split("."))
        if path & self.family.projector:
            return "projector"
        return "tower" if path & self.family.tower else "language"

    def freeze(self, *parts: str) -> int:
        """Stop training the given parts ("tower", "projector"). Returns how many numbers they hold.

        RuntimeError if a part holds nothing that was trained, so that the freeze would do nothing.
        """
        frozen = 0
        for part in parts:
            weights = [p for name, p in self.model.named_parameters() if self.part(name) == part]
            if not any(p.requires_grad for p in weights):
                raise RuntimeError(
                    f"freezing the {part} froze nothing: no trained parameter of {type(self.model).__name__} "
                    f"has one of {sorted(getattr(self.family, part))} on its path; correct its entry in FAMILIES"
                )
            for p in weights:
                p.requires_grad_(False)
            frozen += sum(p.numel() for p in weights)
        return frozen

    def add_lora(
        self, rank: int, alpha: float, dropout: float = 0.0, targets: str = "all", seed: int = 0
    ) -> None:
        """Freeze every weight, and train low-rank adapters beside linear layers of the language
        model instead.

        The layers are replaced in place, so the model keeps its class, names and forward. The base
        model stays what it was, bit for bit, and is the reference policy for free (see
        `without_adapters`).

        Args:
            targets: last names of the layers, separated by commas ("q_proj,v_proj"; ValueError if
                there are none); "all" of the language model, but the head.
            seed: of the adapters' start, the same on all ranks.
        """
        head = self.model.get_output_embeddings()
        linear = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
            and module is not head
            and self.part(name) == "language"
        ]
        last_names = {name: name.split(".")[-1] for name in linear}
        wanted = set(last_names.values()) if targets == "all" else set(targets.split(","))
        chosen = [name for name in linear if last_names[name] in wanted]
        if not chosen:
            known = ", ".join(sorted(set(last_names.values())))
            raise ValueError(
                f"--lora_targets {targets} names no linear layer of the language model; it has {known}"
            )
        self.model.requires_grad_(False)
        self.lora = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(self.lora, self.model)

    @contextlib.contextmanager
    def without_adapters(self):
        """The base model, for a while: what the policy was before LoRA; without LoRA, the model
        itself."""
        layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        for layer in layers:
            layer.set_scale("default", 0.0)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_scale("default", 1.0)

    def checkpoint_activations(self, on: bool = True) -> None:
        """Keep only the inputs of layers, and compute the rest again in the backward; or stop doing
        so."""
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def shard(
        self,
        device: torch.device,
        compute: torch.dtype | None = None,
        videos: bool = False,
        offload: bool = False,
        shard_ranks: int = 0,
    ) -> None:
        """Shard weights, gradients and optimizer state over ranks with FSDP2, block by block.

        Trained weights are kept in float32, so that small updates are not rounded away. Frozen
        vision weights stay whole on every rank: they need no gradient and no optimizer state, and a
        tower without collectives cannot hang when one rank's pack has no image.

        Args:
            compute: dtype that the blocks compute in; None: the one that the model was loaded in.
            videos: any rank may bring some.
            offload: the shards stay in the host's memory, and each block comes to the GPU when it is
                used; slower.
            shard_ranks: so many consecutive ranks, one node's, hold a copy together, and every other
                so many another one; 0: all ranks hold one. ValueError if it does not divide them.
        """
        mesh = shard_mesh(device, shard_ranks)
        offload = offload and device.type == "cuda"
        self.sharded_on = device
        whole = {
            p
            for name, p in self.model.named_parameters()
            if self.part(name) != "language" and not p.requires_grad
        }
        for p in whole:
            p.data = p.data.to(device)
        for module in (*self._blocks(whole), self.model):
            for p in module.parameters():
                # block by block, so that no rank ever holds the whole model in float32
                if p.requires_grad and not isinstance(p, DTensor):
                    p.data = p.data.to("cpu" if offload else device).float()
            precision = MixedPrecisionPolicy(
                param_dtype=compute or self.dtype,
                reduce_dtype=torch.float32,
                # pixels become `compute` where they enter; what a tower's blocks are handed in
                # float32, the angles of their positions, stays so, as in a tower that is not sharded
                cast_forward_inputs=module is self.model,
            )
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=precision,
                offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
                ignored_params=whole,
            )
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)
        self.model.register_forward_hook(self._reshard_without_gradient)
        if self.trains_vision():
            self._add_anchors(videos)

    def _blocks(self, whole: set[nn.Parameter]) -> list[nn.Module]:
        """The layers that are sharded and gathered one at a time."""
        kinds = self.model._no_split_modules
        layers = [m for m in self.model.modules() if type(m).__name__ in kinds]
        return [layer for layer in layers if not whole.intersection(layer.parameters())]

    def _reshard_without_gradient(self, *_) -> None:
        """Give back what a forward has gathered. FSDP2 keeps its root whole for a backward, and
        where none comes, `parameters()` would be other tensors than the optimizer's."""
        if not torch.is_grad_enabled() and not self.generates:
            self.model.reshard()

    def _add_anchors(self, videos: bool) -> None:
        """Prompts for packs without image or video. A sharded tower is gathered by all ranks
        together, once for the images and once for the videos of a pack, so a rank whose pack has
        none would leave the others waiting for ever. Nothing attends to them and their gradient is
        0."""
        white = Image.new("RGB", (1, 1), "white")
        self.anchors["images"] = self.prompt("<image>", [white])
        if videos:
            self.anchors["videos"] = self.prompt("<video>", videos=[[white]])

    def summarize_trained(self) -> str:
        """One line on which parameters are trained."""
        total = collections.Counter()
        trained = collections.Counter()
        for name, p in self.model.named_parameters():
            part = self.part(name)
            total[part] += p.numel()
            if p.requires_grad:
                trained[part] += p.numel()
        counts = [
            f"{part} {trained[part] / 1e6:.2f}M of {total[part] / 1e6:.2f}M"
            for part in ("language", "projector", "tower")
        ]
        return "parameters trained: " + ", ".join(counts)

    @contextlib.contextmanager
    def generating(self):
        """Make `model.generate` possible for a while: plain attention, and whole weights instead of
        shards, so that decoding token by token does not gather every block every time."""
        was_training = self.model.training
        self.model.eval()  # a layer that checkpoints keeps no key-value cache
        self.model.set_attn_implementation({"text_config": "sdpa"})
        shards = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        self.generates = True
        for m in shards:
            m.set_reshard_after_forward(False)
            m.unshard()
        try:
            yield
        finally:
            self.generates = False
            for m in shards:
                m.reshard()
                m.set_reshard_after_forward(m is not self.model)
            self.use_packing(self.packing)
            self.model.train(was_training)

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every weight with the hub's name and layout, as vLLM loads it, one at a time: whole even
        if FSDP2 has it sharded, LoRA merged in.

        Each step is a collective under FSDP2: all ranks must run the iteration to its end.
        transformers renames, transposes or stacks weights of the hub when it loads them; it undoes
        that here as soon as all parts of a weight of the hub's are there.
        """
        hub_names = self._hub_names()
        missing = collections.Counter(hub_names.values())  # parts of a weight of the hub's
        parts = collections.defaultdict(dict)
        for name, tensor in self._whole_weights(dtype):
            hub_name = hub_names[name]
            parts[hub_name][name] = tensor
            missing[hub_name] -= 1
            if not missing[hub_name]:
                yield from revert_weight_conversion(self.model, parts.pop(hub_name)).items()

    def _hub_names(self) -> dict[str, str]:
        """The hub's name for every weight; several weights may be parts of one."""
        undo = [c.reverse_transform() for c in reversed(self.model._weight_conversions)]
        renamings = [c for c in undo if isinstance(c, WeightRenaming)]
        converters = [c for c in undo if isinstance(c, WeightConverter)]
        hub_names = {}
        for name in map(merged_name, self.model.state_dict(keep_vars=True)):
            hub_names[name], _ = rename_source_key(name, renamings, converters, reverse=True)
        return hub_names

    def _whole_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every weight under the model's own name, as in `weights`.

        A tensor with two names (tied embeddings) is gathered once and comes under both, because
        vLLM may keep a copy for lm_head in another layout. state_dict puts FSDP2 back into its
        sharded state; weights gathered by a forward pass could be old.
        """
        weights = self.model.state_dict(keep_vars=True)
        names = collections.defaultdict(list)
        for name, tensor in weights.items():
            if ".lora_" not in name:
                names[id(tensor)].append(name)
        for first, *others in names.values():
            tensor = weights[first].detach()
            if tensor.is_floating_point():
                tensor = tensor.to(dtype)  # before the gather: half the bytes between ranks
            tensor = full(tensor)
            if first.endswith(".base_layer.weight"):
                adapter = first.removesuffix("base_layer.weight")
                a = full(weights[adapter + "lora_A.default.weight"].detach()).float()
                b = full(weights[adapter + "lora_B.default.weight"].detach()).float()
                scale = self.lora.lora_alpha / self.lora.r
                # a new tensor: the base stays as it is
                tensor = (tensor.float() + scale * (b @ a)).to(dtype)
            for name in (first, *others):
                yield merged_name(name), tensor

    def save(self, folder: str | Path, merge: bool = True) -> None:
        """Write a Hugging Face directory, on rank 0; every rank must call this.

        Without `merge`, the LoRA adapter alone, as `PeftModel.from_pretrained` reads it; ValueError
        if there is none.
        """
        if not merge and self.lora is None:
            raise ValueError(
                "the adapter alone was asked for, but nothing was trained by LoRA; write the whole model"
            )
        if merge:
            self._save_model(Path(folder))
        else:
            self._save_adapter(Path(folder))
        if dist.is_initialized():
            dist.barrier()

    def _save_model(self, folder: Path) -> None:
        # a tied weight stays one tensor under its two names
        to_cpu = functools.lru_cache(1)(Tensor.cpu)
        state = {}
        for name, tensor in self._whole_weights(self.dtype):
            if this_rank() == 0:
                state[name] = to_cpu(tensor)
        if this_rank() == 0:
            self.model.save_pretrained(folder, state_dict=state)  # under the hub's names
            self.processor.save_pretrained(folder)  # with the chat template
            path = folder / "config.json"
            config = json.loads(path.read_text())
            # not that of the float32 weights that are trained
            config["dtype"] = str(self.dtype).removeprefix("torch.")
            path.write_text(json.dumps(config, indent=2))

    def _save_adapter(self, folder: Path) -> None:
        state = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if ".lora_" in name:
                peft_name = f"base_model.model.{name.replace('.default', '')}"
                state[peft_name] = full(tensor.detach()).cpu()
        if this_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / "adapter_model.safetensors")
            self.lora.save_pretrained(folder)


def merged_name(name: str) -> str:
    """The name of a weight without the layer that LoRA has put around it."""
    return name.replace(".base_layer.", ".")


def conversions_of(model: nn.Module) -> list[WeightTransform]:
    """How transformers makes this model's weights of the hub's.

    A loaded model carries it; one that was built here gets the usual one, before FSDP2 gives its
    class another name, but for prefixes, which some checkpoints have and others not.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        usual = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in usual if not isinstance(c, PrefixChange)]
    for conversion in conversions:
        for operation in getattr(conversion, "operations", ()):
            if isinstance(operation, Transpose):
                # else it leaves alone what has the model's shape, and on the way back all have
                operation.check_dims = False
    return conversions


def shard_mesh(device: torch.device, shard_ranks: int) -> DeviceMesh:
    """All ranks, or (copies, ranks of a copy); a copy's ranks are consecutive."""
    world = dist.get_world_size()
    if not shard_ranks:
        return init_device_mesh(device.type, (world,))
    if world % shard_ranks:
        raise ValueError(
            f"--shard_ranks {shard_ranks} does not divide the {world} processes of this run; "
            "give the GPUs of one node, or 0 for one copy over all"
        )
    sizes = (world // shard_ranks, shard_ranks)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("copy", "shard"))


# --------------------------------------------------------------------------------------------------
# Turns and inputs


def turns_of(groups: list[Group]) -> list[Turn]:
    """Every turn of groups, in the order of their pack."""
    turns = []
    for prompt, responses in groups:
        turns.append(prompt)
        for response in responses:
            turns.extend(response)
    return turns


def prompts_of(turns: list[Turn]) -> list[data.Prompt]:
    """The Prompts among turns; each holds the images that arrived with it."""
    return [turn for turn in turns if not isinstance(turn, Tensor)]


def join_token_types(turns: list[Turn]) -> dict[str, Tensor]:
    """The processor's per-token inputs (T,) of turns, end to end; 0 for what the policy wrote."""
    names = {}
    for prompt in prompts_of(turns):
        names |= dict.fromkeys(filter(is_per_token, prompt.inputs))
    joined = {}
    for name in names:
        pieces = [
            torch.zeros_like(turn) if isinstance(turn, Tensor) else turn.inputs[name][0]
            for turn in turns
        ]
        joined[name] = torch.cat(pieces)
    return joined


def join_inputs(prompts: list, axis: int = 0) -> dict[str, Tensor]:
    """Pixels and grids of several prompts, end to end in prompt order; a prompt without images adds
    nothing.

    Other axes than `axis` are filled up with zeros to the longest: LLaVA's images differ in their
    number of tiles, and its forward cuts the filling off again.
    """
    joined = {}
    for name in dict.fromkeys(name for p in prompts for name in p.inputs if not is_per_token(name)):
        tensors = [p.inputs[name] for p in prompts if name in p.inputs]
        longest = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
        missing = [
            [0 if i == axis else longest[i] - t.shape[i] for i in range(t.ndim)] for t in tensors
        ]
        pads = [
            [n for size in reversed(sizes) for n in (0, size)] for sizes in missing
        ]  # the last axis first
        joined[name] = torch.cat(
            [F.pad(t, pad) for t, pad in zip(tensors, pads, strict=True)], axis
        )
    return joined


PER_TOKEN = {  # (1, P) and, of a model with cross attention, more axes
    "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "cross_attention_mask",
    "image_attention_mask", "image_embeds_position_mask",
}  # fmt: skip


def is_per_token(name: str) -> bool:
    """Whether a processor output has one number per prompt token (1, P); all others are per image
    or per patch."""
    return name in PER_TOKEN


def left_pad(rows: list[Tensor], value) -> Tensor:
    """Stack tensors along a new first axis, padded on the left of their last axis to the
    longest."""
    width = max(r.shape[-1] for r in rows)
    return torch.stack([F.pad(r, (width - r.shape[-1], 0), value=value) for r in rows])


def full(x: Tensor) -> Tensor:
    """The whole tensor of an FSDP2 shard; a plain tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def after_videos(positions: Tensor, types: Tensor) -> Tensor:
    """Let what follows a video begin after it, as in the released Qwen models and in vLLM.

    transformers 5 begins it after the frames' height and width alone, which a video of many seconds
    outlasts.
    """
    positions = positions.clone()
    for start in (types.diff().nonzero()[:, 0] + 1).tolist():
        positions[:, start:] += (positions[:, :start].max() + 1 - positions[:, start].max()).clamp(
            min=0
        )
    return positions


MEDIA_TOKEN = re.compile(r"(image|video|vision|audio|[be]oi|[be]oa)(_start|_end)?_token_(id|index)")


def banned_token_ids(config) -> list[int]:
    """Every token id that a model's config names as one of an image, a video or a sound, sorted."""
    named = {value for name, value in config.to_dict().items() if MEDIA_TOKEN.fullmatch(name)}
    # a model without sound or video keeps its config's default, a number that it has no token for
    return sorted(set(range(config.get_text_config().vocab_size)) & named)


def end_token_ids(model, tokenizer) -> list[int]:
    """The tokens that end a response: those of the generation config and the tokenizer's
    end-of-sequence token."""
    ids = model.generation_config.eos_token_id
    return sorted({*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None})


# --------------------------------------------------------------------------------------------------
# Families


TEXT_INPUTS = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels",
    "use_cache", "cache_position", "logits_to_keep", "rope_deltas", "kwargs", "encoder_outputs",
    "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "decoder_position_ids",
}  # fmt: skip


SETTINGS = {  # how a forward works, and what a model makes of its own inputs; no processor returns them
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy",
    "vision_aspect_ratio", "downsample_mode", "interpolate_pos_encoding", "use_audio_in_video",
    "mm_encoder_outputs", "per_layer_inputs", "cross_attention_states", "image_encoder_embeddings",
    "perceiver_embeddings", "self_conditioning_logits", "self_conditioning_mask",
}  # fmt: skip


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside PEFT, DistributedDataParallel, FSDP1 or torch.compile. FSDP2
    does not wrap."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(
            inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module
        ):
            model = inner
        else:
            return model


def extract_multi_modal_inputs(model: nn.Module, batch: dict) -> dict:
    """The fields of a batch that this model's forward takes beyond text, as a new dict; None values
    are left out.

    The forward's own signature decides, so that a new family needs no list here: `pixel_values` and
    `image_grid_thw` for Qwen, `image_sizes` for LLaVA, `pixel_attention_mask` for SmolVLM. The
    model may be wrapped, see unwrap.
    """
    accepted = inspect.signature(unwrap(model).forward).parameters.keys()
    names = accepted - TEXT_INPUTS - SETTINGS
    return {name: value for name, value in batch.items() if name in names and value is not None}


def counts_pixels(vision) -> bool:
    """Whether an image processor's `size` bounds an image's pixels, as Qwen's do, and not its
    sides."""
    return {"shortest_edge", "longest_edge"} <= set(dict(vision.size or {}))


def bound_pixels(vision, least: int, most: int) -> dict:
    return {"size": {"shortest_edge": least, "longest_edge": most}}


def bound_frames(vision, least: int, most: int) -> dict:
    """GLM counts an image's pixels once for each of the frames that it is taken for."""
    return bound_pixels(
        vision, least * vision.temporal_patch_size, most * vision.temporal_patch_size
    )


def bound_tiles(vision, least: int, most: int) -> dict:
    return {"max_patches": max(1, most // (vision.size["height"] * vision.size["width"]))}


def bound_grids(vision, least: int, most: int) -> dict:
    grids = sorted(vision.image_grid_pinpoints, key=math.prod)
    allowed = [sides for sides in grids if math.prod(sides) <= most]
    return {"image_grid_pinpoints": allowed or grids[:1]}


def bound_edge(vision, least: int, most: int) -> dict:
    tile = vision.max_image_size["longest_edge"]
    return {"size": {"longest_edge": tile * max(1, math.isqrt(most // tile**2))}}


def bound_square(vision, least: int, most: int) -> dict:
    """Pixtral bounds the longer side alone, and rounds sides up to patches, two of which are merged."""
    patch = 2 * vision.patch_size["height"]
    return {"size": {"longest_edge": max(patch, math.isqrt(most) // patch * patch)}}


def bound_tokens(vision, least: int, most: int) -> dict:
    """Gemma 4 takes one of five numbers of tokens, and enlarges every image to it."""
    pixels = (vision.patch_size * vision.pooling_kernel_size) ** 2  # of a token
    allowed = [tokens for tokens in (70, 140, 280, 560, 1120) if tokens * pixels <= most]
    if not allowed:
        raise ValueError(f"its images have at least {70 * pixels} pixels")
    return {"max_soft_tokens": allowed[-1]}


def bound_nothing(vision, least: int, most: int) -> dict:
    """For processors that make every image the same size: looks at what they make of a large one."""
    if counts_pixels(vision):
        return bound_pixels(vision, least, most)
    side = min(4096, 2 * math.isqrt(most) + 1)
    pixels = vision(images=[Image.new("RGB", (side, side))], return_tensors="pt")["pixel_values"]
    seen = pixels.numel() // 3
    if seen > most:
        raise ValueError(
            f"its image processor makes {seen} pixels of a large image, and which of its settings "
            "bounds them is not known; raise the flag, or add `bound` to its entry in FAMILIES"
        )
    return {}


@dataclass(frozen=True)
class Family:
    """What has to be known of a model family and can be read neither from its config nor from its
    forward.

    tower, projector: names of modules. A weight with one of `projector` on its path belongs to the
        projector, else with one of `tower` to the vision tower, else to the language model.
    bound: (image processor, least, most pixels) -> its settings that keep every image within about
        so many pixels.
    image_axis: axis of `pixel_values` along which the images of several prompts are joined.
    whole_images: a token of an image attends to its whole image, not only backwards.
    """

    tower: frozenset[str]
    projector: frozenset[str]
    bound: Callable[..., dict] = bound_pixels
    image_axis: int = 0
    whole_images: bool = False


def family(tower: str, projector: str, *rest, **special) -> Family:
    return Family(frozenset(tower.split()), frozenset(projector.split()), *rest, **special)


# both inside `visual`; deepstack feeds the first layers too
QWEN = family("visual", "merger deepstack_merger_list")
IDEFICS = family("vision_model", "connector", bound_edge, image_axis=1)
LLAVA = family("vision_tower", "multi_modal_projector")


FAMILIES = {  # by the config's model_type
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "qwen3_vl_moe": QWEN,
    "qwen3_5": QWEN,
    "glm4v": replace(QWEN, bound=bound_frames),
    "internvl": replace(LLAVA, bound=bound_tiles),
    "llava": replace(LLAVA, bound=bound_nothing),
    "llava_onevision": family("vision_tower", "multi_modal_projector image_newline", bound_grids),
    "mistral3": replace(LLAVA, bound=bound_square),
    "smolvlm": IDEFICS,
    "idefics3": IDEFICS,
    "gemma3": replace(LLAVA, bound=bound_nothing, whole_images=True),
    "gemma4": family("vision_tower", "embed_vision", bound_tokens),
}


USUAL = family(  # names that many share
    "visual vision_tower vision_model",
    "merger deepstack_merger_list multi_modal_projector image_newline connector embed_vision",
    bound_nothing,
)


def family_of(model: nn.Module) -> Family:
    """The model's entry in FAMILIES, or the usual names; ValueError for an unknown model that has
    none of them."""
    kind = model.config.model_type
    found = FAMILIES.get(kind, USUAL)
    if not any(found.tower & set(name.split(".")) for name, _ in model.named_parameters()):
        raise ValueError(
            f"{kind} is not in FAMILIES, and no module of {type(model).__name__} is called one of "
            f"{sorted(found.tower)}; add an entry with the names of its vision tower and its projector"
        )
    return found


# --------------------------------------------------------------------------------------------------
# Recurrent layers in a pack


def share_recurrent_layers(model: nn.Module) -> bool:
    """Teach the gated-delta layers of Qwen3.5 and its kin to read packs; whether there are any.

    Such a layer hands the pack's Layout on to two functions of its module, the short convolution
    and the delta rule (arXiv:2412.06464). Ours take their places, and do what they did where there
    is no Layout.
    """
    kinds = {type(m) for m in model.modules() if type(m).__name__.endswith("GatedDeltaNet")}
    for module in {sys.modules[kind.__module__] for kind in kinds}:
        if not hasattr(module, "conv_without_packs"):
            module.conv_without_packs = module.causal_conv1d_fn
            module.rule_without_packs = module.torch_chunk_gated_delta_rule
            module.causal_conv1d_fn = functools.partial(packed_conv, module.conv_without_packs)
            module.torch_chunk_gated_delta_rule = functools.partial(
                packed_delta_rule, module.rule_without_packs
            )
    return bool(kinds)


def packed_conv(plain, x, weight, bias=None, activation=None, layout=None, **rest) -> Tensor:
    """The causal convolution over each token and those before it in its own sequence: a response's
    first tokens look back into the prompt.

    Args:
        plain: the function of transformers.
        x: (1, channels, T).
        weight: (channels, K), the last column for the token itself.
    """
    if layout is None:
        return plain(x, weight, bias, activation=activation, **rest)
    before = tokens_before(layout.segments).to(x.device)
    seen = F.pad(x, (0, 1)).to(weight.dtype)  # the last column: what is before a sequence begins
    out = torch.zeros_like(seen)
    for column in reversed(range(weight.shape[1])):
        out = out + weight[:, column, None] * seen
        seen = seen.index_select(2, before)
    if bias is not None:
        out = out + bias[:, None]
    if activation is not None:
        out = ACT2FN[activation](out)
    return out[..., :-1].to(x.dtype)


def tokens_before(segments: list[tuple[int, int, int, int]]) -> Tensor:
    """(T + 1,) the token before each one in its sequence; T where there is none, and T's own."""
    total = max(end for _, end, _, _ in segments)
    before = torch.arange(-1, total)
    for start, _, prompt_start, prompt_end in segments:
        is_prompt = prompt_start == prompt_end
        before[start] = total if is_prompt else prompt_end - 1
    return torch.cat([before[:-1], torch.tensor([total])])


def packed_delta_rule(plain, q, k, v, *, g, beta, layout=None, **rest):
    """The gated delta rule of a pack: over all prompts side by side, then over all responses, each
    from the state in which its prompt has left it.

    Args:
        plain: the function of transformers.
        q, k, v: (1, T, heads, head size).
        g, beta: (1, T, heads) the decay of the state in log space, and how much a token writes.
    """
    if layout is None:
        return plain(q, k, v, g=g, beta=beta, **rest)
    rest = rest | dict(initial_state=None, output_final_state=True)
    prompts = [s for s in layout.segments if s[2] == s[3]]
    responses = [s for s in layout.segments if s[2] != s[3]]
    number = {prompt[0]: i for i, prompt in enumerate(prompts)}
    out = torch.empty_like(v[0])
    states = None
    for batch in (prompts, responses):
        if not batch:
            continue
        if states is not None:
            mine = torch.tensor([number[prompt_start] for _, _, prompt_start, _ in batch])
            rest["initial_state"] = states.index_select(0, mine.to(v.device))
        rows, real = side_by_side(batch, v.device)
        # padding neither decays the state nor writes into it
        still = g[0][rows] * real[..., None]
        silent = beta[0][rows] * real[..., None]
        part, states = plain(q[0][rows], k[0][rows], v[0][rows], g=still, beta=silent, **rest)
        out = out.index_copy(0, rows[real], part[real])
    return out[None], None


def side_by_side(segments: list[tuple[int, int, int, int]], device) -> tuple[Tensor, Tensor]:
    """Rows (S, L) in the pack of the tokens of segments, padded on the right, and (S, L) bool: no
    padding."""
    start, end, _, _ = torch.tensor(segments, device=device).T[..., None]  # (S, 1) each
    rows = start + torch.arange(int((end - start).max()), device=device)
    real = rows < end
    return torch.where(real, rows, start), real


# --------------------------------------------------------------------------------------------------
# Recorded conversations


def make_trace(turns: list[tuple[data.Prompt, Tensor]], image_axis: int = 0) -> list[Turn]:
    """A recorded conversation as one training sequence: [prompt, ids, observation, ids, ...].

    Args:
        turns: (Prompt that the policy read, ids (R,) that it wrote) of every turn. A later Prompt
            holds either what is new in it or, as agents send it, the whole conversation so far with
            all its images again.
        image_axis: that of the actor's family.

    Raises:
        ValueError: a turn repeats the conversation with other tokens or pixels, as after encoding
            its text again.
    """
    trace = []
    for prompt, response in turns:
        if trace and torch.equal(prompt.ids[: len(trace[0].ids)], trace[0].ids):
            prompt = _without(prompt, trace, image_axis)
        if len(prompt.ids):  # a policy may go on with nothing new to read
            trace.append(prompt)
        trace.append(response)
    return trace


def _without(prompt: data.Prompt, trace: list[Turn], image_axis: int) -> data.Prompt:
    """What a Prompt adds to the conversation that it begins with."""
    earlier = prompts_of(trace)
    seen_ids = torch.cat([t if isinstance(t, Tensor) else t.ids for t in trace])
    seen_short_ids = torch.cat([t if isinstance(t, Tensor) else t.short_ids for t in trace])
    ids = _cut("ids", prompt.ids, seen_ids)
    short_ids = _cut("short_ids", prompt.short_ids, seen_short_ids)

    # images and videos stand in the order of their placeholders, and their pixels tell if they are the same
    images = prompt.images[sum(len(p.images) for p in earlier) :]
    videos = prompt.videos[sum(len(p.videos) for p in earlier) :]

    seen = join_inputs(earlier, image_axis)
    inputs = {}
    for name, value in prompt.inputs.items():
        if is_per_token(name):
            inputs[name] = value[:, len(seen_ids) :]
        elif name in seen:
            inputs[name] = _cut(name, value, seen[name], image_axis)
        else:
            inputs[name] = value
    inputs = {name: value for name, value in inputs.items() if value.numel()}
    return replace(
        prompt, ids=ids, short_ids=short_ids, images=images, videos=videos, inputs=inputs
    )


def _cut(name: str, whole: Tensor, seen: Tensor, axis: int = 0) -> Tensor:
    """What `whole` holds behind `seen` on one axis; on the others LLaVA fills up to the image of
    most tiles. ValueError if it does not begin with `seen`."""
    same_place = whole[tuple(map(slice, seen.shape))]
    if not torch.equal(same_place, seen):
        raise ValueError(
            f"a turn begins like the conversation, but its {name} are not those of earlier turns; go "
            "on from the token ids that were sampled and the images that were shown, never from text"
        )
    return whole.tensor_split([seen.shape[axis]], axis)[1]


# --------------------------------------------------------------------------------------------------
# Export


def export(checkpoint: str | Path, out: str | Path, merge: bool = True) -> None:
    """Write a checkpoint of train.py, RUN/checkpoints/step-N, as a Hugging Face directory; `merge`
    as in Actor.save.

    What was not trained comes from the run's --model. ValueError for no checkpoint of a run there,
    or one without a weight of the model.
    """
    checkpoint = Path(checkpoint).resolve()
    record = checkpoint.parents[1] / "run.json"
    if not record.is_file() or not (checkpoint / "manifest.json").is_file():
        raise ValueError(
            f"{checkpoint} is no checkpoint of a run; give RUN/checkpoints/step-N, beside RUN/run.json"
        )
    s = json.loads(record.read_text())
    actor = Actor.from_pretrained(s["model"], torch.float32, (s["min_pixels"], s["max_pixels"]))
    actor.dtype = AutoConfig.from_pretrained(s["model"]).dtype or torch.float32
    if s["lora_rank"]:
        actor.add_lora(s["lora_rank"], s["lora_alpha"], s["lora_dropout"], s["lora_targets"])
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    stored = reader.read_metadata().state_dict_metadata
    state = {}
    for name, p in actor.model.named_parameters():
        if name in stored:
            state[name] = p.detach()
    if not state:
        raise ValueError(
            f"{checkpoint} holds no weight of {s['model']}, which run.json names as its --model"
        )
    dcp.load(state, storage_reader=reader, no_dist=True)
    actor.save(out, merge)


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a checkpoint of a run.")
    jobs = parser.add_subparsers(required=True, dest="job")
    exporter = jobs.add_parser(
        "export", help="a checkpoint as a directory for transformers and vLLM"
    )
    exporter.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step-N")
    exporter.add_argument("out", type=Path, help="folder for the Hugging Face model directory")
    exporter.add_argument(
        "--keep_adapter", action="store_true", help="write a LoRA adapter by itself, not merged"
    )
    args = parser.parse_args()
    export(args.checkpoint, args.out, merge=not args.keep_adapter)


if __name__ == "__main__":
    main()
