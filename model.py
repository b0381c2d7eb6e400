"""The actor: any Hugging Face vision-language model, scoring the tokens that the policy wrote.

    bundles [(prompt, [completion, ...]), ...] --make_pack--> Pack, one row without padding
    Pack --model forward--> hidden states --log-prob head--> logprobs (N,), entropy (N,), in nats

In GRPO the n responses of a group share their prompt and its images, so a pack holds each prompt
once. A response attends to its prompt and to itself, never to another response. Here prompt p is
followed by responses a and b, then the next prompt q by its response c; x: attends:

    position       0 1 2 3 4 3 4 5 0 1 2
                   p p p a a b b b q q c     the last p predicts both the first a and the first b;
                 p x                         each response goes on from its prompt's positions
                 p x x
                 p x x x                     an image's tokens stand in p like any others
                 a x x x x
                 a x x x x x
                 b x x x     x
                 b x x x     x x
                 b x x x     x x x
                 q                 x
                 q                 x x
                 c                 x x x

The result equals the padded forward of every (prompt, response) pair at a fraction of the work, and
check_packing makes sure of it before training. The head never holds more than `chunk` rows of
logits.

What is set in one place and used in another:

    layout=       keyword of the model's forward, which transformers hands on, unread, to the
                  attention of every layer: shared_attention
    head.request  what lm_head is to score, set around the forward, which gives it nothing but
                  hidden states: LogprobHead
    features      what a frozen tower made of the images, kept over several forwards; None, and the
                  tower runs, if it is trained, if packing is not "shared" (an image would be needed
                  several times), if there is no image, or if the forward takes no
                  mm_encoder_outputs: image_features
    anchors       prompts of one white image that shard makes where a sharded tower is trained; they
                  join packs without images, so that all ranks gather the tower together

Not here: the loss (grpo.py), sampling (rollout.py), the optimizer (train.py).

Legend  P tokens of a prompt, T tokens of a pack, N tokens written by the policy, W of them in one
        turn, S segments (prompts and responses) of a pack, L longest segment, K keys that it
        sees, H hidden size, V vocabulary
Papers  M-RoPE arXiv:2409.12191; FlashAttention's variable-length form arXiv:2307.08691
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import inspect
import itertools
import json
import math
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import data
from support import cpu  # noqa: F401  it mends two imports of transformers, so it comes first
from support.processes import quieten_libraries, run_command, this_rank

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, ParamWrapper
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
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
)
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
except ImportError:  # optional: torch's own kernel does the same
    flash_attn_varlen_func = None

# --------------------------------------------------------------------------------------------------
# One row, no padding


Turn = Tensor | data.Prompt  # ids (W,) that the policy wrote, or what it read
Completion = list[Turn]  # all that follows a prompt; a single response is a list of one
Bundle = tuple[data.Prompt, list[Completion]]  # a prompt, and what was drawn for it
Segment = tuple[int, int, int, int]  # start, end, prompt_start, prompt_end in tokens of the pack


@dataclass
class Pack:
    """The inputs of one forward pass over whole groups."""

    input_ids: Tensor  # (1, T)
    positions: Tensor  # (3, 1, T) time, height and width: all the same for text
    keep: Tensor  # (N,) where in the row each of `targets` is predicted
    targets: Tensor  # (N,) what the policy wrote
    layout: Layout


def make_pack(bundles: list[Bundle], positions: Callable, whole_images: str = "nowhere") -> Pack:
    """Lay bundles end to end: `[prompt_a | a_resp1 | a_resp2 | ... | prompt_b | ...]`.

    Args:
        bundles: (prompt, completions) pairs; a prompt may have no completion. A completion is one
            segment with all its turns, those of the environment included, which nothing is trained
            on.
        positions: Prompt -> (3, P).
        whole_images: layers in which a token of an image sees all of it: see Layout.

    Returns:
        A Pack whose N targets are the tokens that the policy wrote, end to end in the order given.
    """
    ids, pieces, segments, keep, targets = [], [], [], [], []
    t = 0  # tokens laid so far
    for prompt, completions in bundles:
        prompt_start = t
        prompt_positions = positions(prompt)
        ids.append(prompt.ids)
        pieces.append(prompt_positions)
        t += len(prompt.ids)
        prompt_end = t
        segments.append((prompt_start, prompt_end, prompt_start, prompt_start))
        first = prompt_positions.max() + 1  # every completion goes on from its prompt
        for completion in completions:
            row, row_positions, written = join_turns(completion, positions, first)
            predictor = torch.arange(t - 1, t - 1 + len(row))  # a token is predicted one before,
            predictor[0] = prompt_end - 1  # but a completion's first by the end of its prompt
            keep.append(predictor[written])
            targets.append(row[written])
            ids.append(row)
            pieces.append(row_positions)
            segments.append((t, t + len(row), prompt_start, prompt_end))
            t += len(row)
    images = None if whole_images == "nowhere" else image_numbers(turns_of(bundles))
    return Pack(
        input_ids=torch.cat(ids)[None],
        positions=torch.cat(pieces, 1)[:, None],
        keep=torch.cat(keep),
        targets=torch.cat(targets),
        layout=Layout(segments, images, whole_images),
    )


def join_turns(
    turns: list[Turn], positions: Callable, start: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the turns of a conversation into one row.

    Args:
        turns: Prompts, which the policy read, and Tensors of ids (W,), which it wrote, never empty.
        positions: Prompt -> (3, P), from 0. Each turn starts after the largest position of the
            one before it, the first at `start`.

    Returns:
        ids (T,), positions (3, T), and (T,) bool: written by the policy, so trained.
    """
    ids, pieces, written = [], [], []
    for turn in turns:
        is_written = isinstance(turn, Tensor)
        if is_written and len(turn) == 0:
            raise ValueError("an empty response has no token to score; drop it before packing")
        turn_ids = turn if is_written else turn.ids
        turn_positions = count_up(turn) if is_written else positions(turn)
        ids.append(turn_ids)
        pieces.append(start + turn_positions)
        written.append(torch.full((len(turn_ids),), is_written))
        start = pieces[-1].max() + 1
    return torch.cat(ids), torch.cat(pieces, 1), torch.cat(written)


@dataclass
class Layout:
    """Who attends to whom in a pack: a segment sees its prompt, then itself up to each token."""

    segments: list[Segment]  # every prompt, whose own prompt is empty, and every completion
    images: Tensor | None = None  # (T,) number of the image a token belongs to, -1 for text
    whole_images: str = "nowhere"  # or "everywhere" or "windows": layers with a sliding window
    _made: dict = field(default_factory=dict)

    def looks_ahead(self, window: int | None) -> bool:
        """Whether an image's tokens see all of it in a layer with this sliding window."""
        if self.whole_images == "windows":
            return bool(window)
        return self.whole_images == "everywhere"

    @property
    def batches(self) -> list[list[Segment]]:
        """Prompts, and completions if there are any: the former are long, the latter many."""
        prompts = [segment for segment in self.segments if segment[2] == segment[3]]
        completions = [segment for segment in self.segments if segment[2] < segment[3]]
        return [prompts, completions] if completions else [prompts]

    def once(self, make: Callable, *arguments):
        """make(layout, *arguments), made once for all layers of a forward."""
        key = (make, *arguments)
        if key not in self._made:
            self._made[key] = make(self, *arguments)
        return self._made[key]


# --------------------------------------------------------------------------------------------------
# Attention


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
        sliding_window: keys that a query sees, itself included; None: all.
        layout: the pack's Layout. Without one there is nothing that keeps the responses apart, so
            this refuses.

    Returns:
        (1, T, heads, head size) and None for the attention weights.
    """
    if layout is None or attention_mask is not None or dropout:
        raise ValueError(
            "shared attention runs on packs only: it needs layout=, no attention_mask, no dropout"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, heads, head size)
    if kernel_runs(q) and not layout.looks_ahead(sliding_window):
        return kernel_attention(q, k, v, layout, scaling, sliding_window)[None], None
    out = torch.empty_like(q)
    # prompts, then completions, side by side: rows of the queries (S, L), which of them are real,
    # rows of the keys (S, K), and who sees whom (S, 1, L, K); see padded_batch
    for rows, real, key_rows, mask in layout.once(padded_batches, sliding_window, q.device):
        attended = F.scaled_dot_product_attention(
            q[rows].transpose(1, 2),
            k[key_rows].transpose(1, 2),
            v[key_rows].transpose(1, 2),
            mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        out = out.index_copy(0, rows[real], attended.transpose(1, 2)[real])
    return out[None], None


# no mask function beside it, so no T x T mask is built
AttentionInterface.register("shared", shared_attention)


# --------------------------------------------------------------------------------------------------
# Log-probs without logits


@dataclass
class Request:
    """What the head is asked for in place of logits."""

    targets: Tensor  # (N,)
    banned: Tensor  # ids that have probability 0
    temperature: float
    softcap: float | None  # bound that logits approach, before the temperature
    entropy: str  # none, value or gradient
    chunk: int  # rows of logits alive at a time

    def chunks(self, rows: int) -> list[slice]:
        """The rows of every chunk."""
        return [slice(i, i + self.chunk) for i in range(0, rows, self.chunk)]

    def logits(self, h: Tensor, weight: Tensor) -> Tensor:
        """(rows, H) -> (rows, V) logits of the trained distribution, in float32."""
        z = (h @ weight.T).to(torch.promote_types(h.dtype, torch.float32))
        if self.softcap:
            z = self.softcap * (z / self.softcap).tanh()
        return z.div_(self.temperature).index_fill_(-1, self.banned, -torch.inf)

    def softcap_slope(self, z: Tensor) -> Tensor:
        """Derivative of the softcap where it gave the logits z; 0 for the banned tokens' -inf."""
        share = z * self.temperature / self.softcap  # from -1 to 1
        return 1 - share.clamp(min=-1).square()


class ChunkedLogprobs(torch.autograd.Function):
    """Log-prob of every target, and the entropy there, with at most `chunk` rows of logits alive.

    The backward computes the logits again, which is cheaper in time and memory than checkpointing
    chunks; the last chunk's probabilities alone are kept, so a pack of one chunk pays nothing.
    """

    @staticmethod
    def forward(ctx, h, weight, request):
        dtype = torch.promote_types(h.dtype, torch.float32)
        logprobs = torch.zeros(len(h), dtype=dtype, device=h.device)
        entropy = torch.zeros_like(logprobs)
        p = None  # (rows, V) probabilities, where they are wanted
        for rows in request.chunks(len(h)):
            logps = p = None  # the chunk before goes before this one comes
            logps = request.logits(h[rows], weight).log_softmax(-1)
            logprobs[rows] = logps.gather(-1, request.targets[rows, None])[:, 0]
            if request.entropy != "none" or ctx.needs_input_grad[0]:
                p = logps.exp_()  # in place, as in the backward: nothing in a run is larger
            if request.entropy != "none":
                entropy[rows] = torch.special.entr(p).sum(-1)  # sum of -p log p
        if request.entropy != "gradient":
            ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(h, weight, entropy)
        ctx.request = request
        ctx.last_p = None if request.softcap else p  # a softcap's slope needs the logits
        return logprobs, entropy

    @staticmethod
    def backward(ctx, logprobs_grad, entropy_grad):
        h, weight, entropy = ctx.saved_tensors
        request = ctx.request
        dh = torch.empty_like(h)
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        p = ctx.last_p
        ctx.last_p = None
        for rows in reversed(request.chunks(len(h))):
            g = logprobs_grad[rows, None]
            e = entropy_grad[rows, None]
            if p is None:
                z = request.logits(h[rows], weight)
                p = z.softmax(-1)
            # d log p[target] / dz = onehot - p, and dH / dz = -p log p - p H
            minus_p_log_p = torch.special.entr(p) if request.entropy == "gradient" else None
            dz = p.mul_(-g - e * entropy[rows, None])
            dz.scatter_add_(1, request.targets[rows, None], g)
            if minus_p_log_p is not None:
                dz += minus_p_log_p.mul_(e)
            if request.softcap:
                dz *= request.softcap_slope(z)
            dz = dz.div_(request.temperature).to(weight.dtype)
            dh[rows] = dz @ weight
            if dw is not None:
                dw.addmm_(dz.T, h[rows])
            p = z = dz = minus_p_log_p = None  # this chunk goes before the next one comes
        return dh, dw, None


class LogprobHead(nn.Linear):
    """What lm_head becomes: an ordinary Linear until `request` is set, then it returns log-probs
    and entropies.

    Swapping the head's class, not the head, keeps tied weights, PEFT and FSDP2's hooks as they
    were.
    """

    request: Request | None = None

    def forward(self, h: Tensor) -> Tensor:
        """(1, N, H) -> (1, N, V) logits, or (1, N, 2) log-prob and entropy while a request is
        set."""
        if self.request is None:
            return super().forward(h)
        logprobs, entropy = ChunkedLogprobs.apply(h[0], self.weight, self.request)
        return torch.stack([logprobs[None], entropy[None]], -1)  # no view, which FSDP2 warns of


# --------------------------------------------------------------------------------------------------
# The actor


class Actor:
    """A vision-language model with its processor, as policy, reference or sampler.

        actor = Actor.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")  # or Actor(model, processor)
        prompt = actor.prompt("<image>How many sides?", [picture])
        logprobs, entropy = actor.logprobs([(prompt, [[ids], [other_ids]])])  # (N,), (N,)

    Attributes:
        model, processor: the Hugging Face objects.
        temperature: of the trained distribution; logits are divided by it, in sampling and in
            scoring.
        banned_ids: vision tokens, which have probability 0 in sampling and in scoring alike: an
            <|image_pad|> in a response would ask for image features that do not exist.
        compute: dtype in which the blocks compute.
    """

    def __init__(
        self, model: nn.Module, processor, temperature: float = 1.0, packing: str = "shared"
    ):
        self.model = model
        self.processor = processor
        self.temperature = temperature
        self.family = family_of(model)
        self.dtype = self.compute = model.dtype
        self.lora = None
        # rows of logits alive at a time; fewer rows of bfloat16 products lose precision in dW
        self.chunk = 1024
        self.banned_ids = banned_token_ids(model.config)
        self.pad_id = processor.tokenizer.pad_token_id or 0
        self.eos_ids = end_token_ids(model, processor.tokenizer)
        self.anchors: dict[str, data.Prompt] = {}
        self.image_bounds = {}
        self.checking = False  # in check_packing nothing drops out
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

    def logprobs(
        self, bundles: list[Bundle], features: dict | None = None, entropy: str = "value"
    ) -> tuple[Tensor, Tensor]:
        """Score responses under the model, at `temperature` and without the banned tokens.

        Args:
            bundles: (prompt, [completion, ...]) pairs; a completion is a list of turns.
            features: image_features of the bundles, if they are at hand; else the tower runs on the
                pixels.
            entropy: "none": all 0, and free; "value": without a gradient; "gradient": with one, for
                a term of the loss.

        Returns:
            logprobs (N,) with gradient and entropy (N,), both float32 nats, over the tokens that
            the policy wrote, end to end in the order given.
        """
        self._choose_mode()
        if self.packing == "padded":
            return self._padded_logprobs(bundles, entropy)
        if self.packing == "packed":  # every response brings its own copy of the prompt
            bundles = one_by_one(bundles)
        anchors = [(anchor, []) for anchor in self._missing_anchors(bundles)]
        bundles = [*bundles, *anchors]
        turns = turns_of(bundles)
        if features is None:
            vision = self.multi_modal_inputs(turns)
        else:
            vision = {"mm_encoder_outputs": features}
        pack = make_pack(bundles, self.positions, self.whole_images)
        request = Request(
            targets=pack.targets.to(self.device),
            banned=self._banned(),
            temperature=self.temperature,
            softcap=self.softcap,
            entropy=entropy,
            chunk=self.chunk,
        )
        with self._head_asked(request):
            out = self.model(
                input_ids=pack.input_ids.to(self.device),
                position_ids=self.position_ids(pack.positions),
                logits_to_keep=pack.keep.to(self.device),
                layout=pack.layout,
                use_cache=False,
                **vision,
                **self.token_types([turns]),
            ).logits  # (1, N, 2)
        logprobs, entropies = out[0].unbind(-1)
        return logprobs, (entropies if entropy == "gradient" else entropies.detach())

    # --- from here on: the plain reference, layouts, the check of a packing, positions and inputs;
    # then freezing, LoRA, sharding, weights

    def _padded_logprobs(self, bundles, entropy):
        """The plain way, as a reference: one row per completion, behind its prompt, padded left."""
        bundles = one_by_one(bundles)
        rows = [[prompt, *completion] for prompt, [completion] in bundles]
        rows += [[anchor] for anchor in self._missing_anchors(bundles)]
        inputs, written = self.padded_inputs(rows)
        # position t - 1 predicts token t; where no row's token was written, logits are not needed
        predicted = written.any(0).nonzero()[:, 0]  # (C,) columns
        logits = self.model(
            **inputs,
            **self.multi_modal_inputs(itertools.chain.from_iterable(rows)),
            logits_to_keep=predicted - 1,
            use_cache=False,
        ).logits  # (B, C, V), softcapped by the model's own forward
        logps = self.trained_logprobs(logits)
        written = written[:, predicted]
        targets = inputs["input_ids"][:, predicted, None]
        logprobs = logps.gather(-1, targets)[..., 0][written]
        if entropy == "none":
            return logprobs, torch.zeros_like(logprobs)
        finite = logps.masked_fill(logps == -torch.inf, 0)
        entropies = -(logps.exp() * finite).sum(-1)[written]
        return logprobs, (entropies if entropy == "gradient" else entropies.detach())

    def padded_inputs(self, rows: list[list[Turn]]) -> tuple[dict[str, Tensor], Tensor]:
        """What the plain forward takes of rows of turns beside pixels, padded on the left: ids,
        mask, positions, token types (..., B, T); and (B, T) bool: written by the policy."""
        all_ids, all_positions, all_written = [], [], []
        for row in rows:
            row_ids, row_positions, row_written = join_turns(row, self.positions)
            all_ids.append(row_ids)
            all_positions.append(row_positions)
            all_written.append(row_written)
        mask = left_pad([torch.ones_like(row_ids) for row_ids in all_ids], 0)
        positions = left_pad(all_positions, 0).transpose(0, 1)  # (3, B, T)
        inputs = {
            "input_ids": left_pad(all_ids, self.pad_id).to(self.device),
            "attention_mask": mask.to(self.device),
            "position_ids": self.position_ids(positions),
        }
        return inputs | self.token_types(rows), left_pad(all_written, False).to(self.device)

    def _choose_mode(self):
        """Layers drop out and checkpoint while they are trained only."""
        self.model.train(torch.is_grad_enabled())
        if self.checking:
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()

    @contextlib.contextmanager
    def _head_asked(self, request: Request):
        """The head answers `request`, for a while. It caps the logits itself, so the forward, which
        would cap what comes from it, must not."""
        head = self.model.get_output_embeddings()
        text = self.model.config.get_text_config()
        head.request = request
        if request.softcap:
            text.final_logit_softcapping = None
        try:
            yield
        finally:
            head.request = None
            if request.softcap:
                text.final_logit_softcapping = request.softcap

    @property
    def softcap(self) -> float | None:
        """The bound that the model's logits approach, if it has one (Gemma 4)."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    @property
    def whole_images(self) -> str:
        """In which layers a token of an image sees all of it: see Layout."""
        text = self.model.config.get_text_config()
        if self.family.whole_images:
            return "everywhere"
        if getattr(text, "use_bidirectional_attention", None) == "vision":
            return "windows"
        return "nowhere"

    def use_packing(self, packing: str) -> None:
        """Choose how `logprobs` lays out its forward: "shared", "packed" (a prompt for every
        response) or "padded".

        The attention is set for good, not around each forward: gradient checkpointing runs the
        layers again in the backward. The vision tower's is its own, but for Qwen's windows on a
        GPU.
        """
        if packing not in ("shared", "packed", "padded"):
            raise ValueError(f"packing is {packing!r}, not one of shared, packed, padded")
        layers = getattr(self.model.config.get_text_config(), "layer_types", None) or ()
        kinds = set(layers) - {"full_attention", "sliding_attention"}
        if share_recurrent_layers(self.model):
            kinds.discard("linear_attention")
        if kinds and packing != "padded":
            # layers that are not known here may not tell the sequences of a row apart
            warnings.warn(
                f"layers of type {sorted(kinds)} cannot share a row: packing is padded",
                stacklevel=2,
            )
            packing = "padded"
        self.packing = packing
        attention = {"text_config": "sdpa" if packing == "padded" else "shared"}
        if self.family is QWEN:  # its towers attend window by window
            in_one_call = tower_in_one_call(self.device, self.compute)
            attention["vision_config"] = "flash_tower" if in_one_call else "sdpa"
        self.model.set_attn_implementation(attention)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        dtype: torch.dtype = torch.float32,
        pixels: tuple[int, int] | None = None,
        **options,
    ) -> Actor:
        """Load model and processor from a directory or the hub, on the CPU; its code is not run.

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

    def check_packing(self, prompts: list[data.Prompt]) -> float:
        """Compare the chosen packing with the padded forward: log-probs, and the gradient of one
        weight.

        Run once before training, so that no family is ever silently wrong. All ranks call this
        together, with the same prompts; gradients are cleared.

        Args:
            prompts: two or more, of different lengths: where all rows of a batch are equally long,
                rounding may be the same in every layout.

        Returns:
            Mean difference of the log-probs, in nats.

        Raises:
            RuntimeError: the packing is not exact for this model.
        """
        gap, slope_gap, noise, slope_noise = self.packing_gaps(prompts)
        # nats, and share of a gradient's norm
        limit, slope_limit = (0.05, 0.1) if self.compute.itemsize == 2 else (1e-4, 1e-3)
        if gap < limit + 3 * noise and slope_gap < slope_limit + 3 * slope_noise:
            return gap
        raise RuntimeError(
            f"packing {self.packing!r} is not exact for {type(self.model).__name__}: its log-probs "
            f"are {gap:.2g} nats (rounding: {noise:.2g}) and a gradient {slope_gap:.2g} of its "
            f"norm (rounding: {slope_noise:.2g}) away from the padded forward's; use --packing "
            "padded. Usual causes: a prompt that sees forwards, logits changed behind the head"
        )

    def packing_gaps(self, prompts: list[data.Prompt]) -> tuple[float, float, float, float]:
        """How far the chosen packing is from the padded forward: log-probs in nats, and a weight's
        gradient as a share of its norm; then both for the padded forward in several batches, which
        is what rounding alone does."""
        banned = {*self.banned_ids, *self.eos_ids}
        ids = torch.tensor([i for i in range(100) if i not in banned])
        bundles = [(prompt, [[ids[:5]], [ids[5:13]]]) for prompt in prompts]
        weight = self._probed_weight()
        packing = self.packing

        def measure(layout, batches):
            self.use_packing(layout)
            logprobs = torch.cat([self.logprobs(batch)[0] for batch in batches])
            logprobs.mean().backward()
            gradient = full(weight.grad).float()
            self.model.zero_grad()
            return logprobs.detach(), gradient

        def distance(logprobs, gradient):
            gap = (logprobs - expected).abs().mean()
            slope_gap = (gradient - expected_gradient).norm() / expected_gradient.norm()
            return gap.item(), slope_gap.item()

        self.model.zero_grad()
        self.checking = True
        expected, expected_gradient = measure("padded", [bundles])
        noise = distance(*measure("padded", [[bundle] for bundle in bundles]))
        gaps = distance(*measure(packing, [bundles]))
        self.checking = False
        return *gaps, *noise

    def _probed_weight(self):
        """A trained weight of the language model whose gradient is not 0 at the start: a fresh
        adapter's B is 0, and so A's gradient."""
        for name, p in self.model.named_parameters():
            if p.requires_grad and self.part(name) == "language" and "lora_A" not in name:
                return p

    def _missing_anchors(self, bundles):
        prompts = prompts_of(turns_of(bundles))
        missing = []
        for kind, anchor in self.anchors.items():
            if not any(getattr(prompt, kind) for prompt in prompts):
                missing.append(anchor)
        return missing

    def trained_logprobs(self, logits: Tensor) -> Tensor:
        """(..., V) log-probs, in float32, of the distribution that is sampled and trained."""
        logits = logits.float() / self.temperature
        return logits.index_fill(-1, self._banned(), -torch.inf).log_softmax(-1)

    def _banned(self):
        return torch.tensor(self.banned_ids, dtype=torch.long, device=self.device)

    def positions(self, prompt: data.Prompt) -> Tensor:
        """Positions of a prompt's tokens, (3, P) time, height and width.

        Explicit, because a Qwen forward without mm_token_type_ids falls back to 1-D positions
        without a word. Kept, because every forward of a prompt asks for them.
        """
        if prompt not in self._positions:
            self._positions[prompt] = self._make_positions(prompt)
        return self._positions[prompt]

    def position_ids(self, positions: Tensor) -> Tensor:
        """Positions (3, B, T) as the forward takes them: all with M-RoPE, else (B, T)."""
        has_axes = hasattr(self.model.model, "get_rope_index")
        return (positions if has_axes else positions[0]).to(self.device)

    def _make_positions(self, prompt: data.Prompt) -> Tensor:
        inner = self.model.model
        if not hasattr(inner, "get_rope_index") or not (prompt.images or prompt.videos):
            return count_up(prompt.ids)
        names = inspect.signature(inner.get_rope_index).parameters
        inputs = {name: value for name, value in prompt.inputs.items() if name in names}
        if "second_per_grid_ts" in inputs:  # vLLM rounds products of these in double precision
            inputs["second_per_grid_ts"] = inputs["second_per_grid_ts"].double()
        positions = inner.get_rope_index(prompt.ids[None], **inputs)[0][:, 0].cpu()
        return after_videos(positions, prompt.inputs["mm_token_type_ids"][0])

    def multi_modal_inputs(self, turns: Iterable[Turn]) -> dict[str, Tensor]:
        """Pixels and grids of the Prompts among turns, on the model's device, ready for the
        forward."""
        joined = join_inputs(prompts_of(turns), self.family.image_axis)
        inputs = extract_multi_modal_inputs(self.model, joined)
        return {name: value.to(self.device) for name, value in inputs.items()}

    def token_types(self, rows: list[list[Turn]]) -> dict[str, Tensor]:
        """The processor's per-token inputs of rows of turns, padded left with 0, as far as the
        forward takes them."""
        types = [join_token_types(row) for row in rows]
        padded = {}
        for name in extract_multi_modal_inputs(self.model, types[0]):
            padded[name] = left_pad([row[name] for row in types], 0).to(self.device)
        return padded

    @torch.no_grad()
    def image_features(self, turns: list[Turn]) -> dict | None:
        """What a frozen vision tower makes of the images and videos among turns, for `logprobs` to
        use again and again.

        Returns None where there is nothing to keep: no image, a tower that is trained, a model
        whose forward takes no `mm_encoder_outputs`, or a layout that needs an image several times.
        """
        model = self.model
        takes_features = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        if self.trains_vision() or self.packing != "shared" or not takes_features:
            return None
        inputs = self.multi_modal_inputs(turns)
        inputs.pop("second_per_grid_ts", None)  # only positions need it
        images = {name: value for name, value in inputs.items() if "video" not in name}
        videos = {name: value for name, value in inputs.items() if "video" in name}
        features = {}
        if images:
            features["image"] = model.get_image_features(**images, return_dict=True)
        if videos:
            features["video"] = model.get_video_features(**videos, return_dict=True)
        return features or None

    def prompt(self, question: str, images=(), instruction: str = "", videos=()) -> data.Prompt:
        """A Prompt of a question with `<image>` and `<video>` in it.

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
        if path & set(self.family.projector.split()):
            return "projector"
        return "tower" if path & set(self.family.tower.split()) else "language"

    def freeze(self, *parts: str) -> int:
        """Stop training the given parts ("tower", "projector"). Returns how many numbers they hold.

        RuntimeError if a part holds nothing that was trained, so that the freeze would do nothing.
        """
        frozen = 0
        for part in parts:
            weights = [p for name, p in self.model.named_parameters() if self.part(name) == part]
            if not any(p.requires_grad for p in weights):
                raise RuntimeError(
                    f"freezing the {part} froze nothing: no trained parameter of "
                    f"{type(self.model).__name__} has one of {getattr(self.family, part).split()} "
                    "on its path; correct its entry in FAMILIES"
                )
            for p in weights:
                p.requires_grad_(False)
            frozen += sum(p.numel() for p in weights)
        return frozen

    def add_lora(self, rank: int, alpha: float, dropout: float = 0.0, targets: str = "all") -> None:
        """Freeze every weight, and train low-rank adapters beside linear layers and experts of the
        language model instead.

        The layers are replaced in place, so the model keeps its class, names and forward. The base
        model stays what it was, bit for bit, and is the reference policy for free (see
        `without_adapters`).

        Args:
            targets: last names of the layers, separated by commas ("q_proj,v_proj"); "all" of the
                language model, but the head. "experts", or the last names of their weights, give
                every expert an adapter of its own.

        Raises:
            ValueError: the language model has no such layer, or dropout is asked for on experts.
        """
        head = self.model.get_output_embeddings()
        linear, experts = {}, {}  # full name -> what `targets` may call it
        for name, module in self.model.named_modules():
            is_layer = isinstance(module, nn.Linear) and module is not head
            if is_layer and self.part(name) == "language":
                linear[name] = {"all", name.split(".")[-1]}
        for name, p in self.model.named_parameters():
            if p.ndim == 3 and ".experts." in name and self.part(name) == "language":
                experts[name] = set(name.split(".")[-2:])
        wanted = set(targets.split(","))
        known = set().union(*linear.values(), *experts.values())
        if wanted - known:
            raise ValueError(
                f"--lora_targets {targets}: the language model has no layer "
                f"{', '.join(sorted(wanted - known))}; it has {', '.join(sorted(known))}"
            )
        layers = [name for name, called in linear.items() if called & wanted]
        weights = [name for name, called in experts.items() if called & wanted]
        if dropout and weights:
            raise ValueError(
                f"--lora_dropout {dropout:g} drops inputs of adapters, but an expert's has none: "
                "it is added to the weights; set it to 0, or leave experts out of "
                f"--lora_targets {targets}"
            )
        self.model.requires_grad_(False)
        self.lora = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=layers,
            target_parameters=weights,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same start on all ranks
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
            offload: the shards stay in the host's memory, and each block comes to the GPU when it
                is used; slower.
            shard_ranks: so many consecutive ranks, one node's, hold a copy together, and the next
                so many another one; 0: all ranks hold one. ValueError if it does not divide them.
        """
        mesh = shard_mesh(device, shard_ranks)
        offload = offload and device.type == "cuda"
        self.sharded_on = device
        self.compute = compute or self.dtype
        self.use_packing(self.packing)  # the tower's attention depends on device and dtype
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
                param_dtype=self.compute,
                reduce_dtype=torch.float32,
                # pixels become `compute` where they enter; what a block is handed in float32, such
                # as the angles of positions, stays so, and sharding changes no bit
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
        white = Image.new("RGB", (64, 64), "white")  # Mistral 3 cannot see a single token
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
        adapters = {}  # by the weight that they adapt
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                adapted = getattr(layer, "parameter_name", "weight")
                adapters[getattr(layer.get_base_layer(), adapted)] = layer
        names = collections.defaultdict(list)
        for name, tensor in weights.items():
            if ".lora_" not in name:
                names[id(tensor)].append(name)
        for first, *others in names.values():
            tensor = weights[first].detach()
            if tensor.is_floating_point():
                tensor = tensor.to(dtype)  # before the gather: half the bytes between ranks
            tensor = full(tensor)
            if weights[first] in adapters:
                product = adapter_product(adapters[weights[first]])
                scale = self.lora.lora_alpha / self.lora.r
                # a new tensor: the base stays as it is
                tensor = (tensor.float() + scale * product).to(dtype)
            for name in (first, *others):
                yield merged_name(name), tensor

    def save(self, folder: str | Path, merge: bool = True) -> None:
        """Write a Hugging Face directory, on rank 0; every rank must call this.

        Without `merge`, the LoRA adapter alone, as `PeftModel.from_pretrained` reads it; ValueError
        if there is none.
        """
        if not merge and self.lora is None:
            raise ValueError(
                "the adapter alone was asked for, but nothing was trained by LoRA; write the whole "
                "model"
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
    """The name of a weight without the layers that LoRA has put around it."""
    return name.replace(".base_layer", "")


def adapter_product(layer: LoraLayer) -> Tensor:
    """LoRA's B A, whole, in the layout of the weight: (out, in), or (E, out, in) or (E, in, out) of
    E experts."""
    a = full(layer.lora_A["default"].weight.detach()).float()
    b = full(layer.lora_B["default"].weight.detach()).float()
    if isinstance(layer, ParamWrapper):  # the experts' A lie one after another, their B interleaved
        a = a.unflatten(0, (layer.num_experts, -1))
        b = b.unflatten(1, (-1, layer.num_experts)).permute(2, 0, 1)
    is_transposed = getattr(layer.get_base_layer(), "is_transposed", False)
    return (b @ a).mT if is_transposed else b @ a


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
    if shard_ranks in (0, world):  # one copy: NCCL's average over a single rank may be wrong
        return init_device_mesh(device.type, (world,))
    if world % shard_ranks:
        raise ValueError(
            f"--shard_ranks {shard_ranks} does not divide the {world} processes of this run; "
            "give the GPUs of one node, or 0 for one copy over all"
        )
    sizes = (world // shard_ranks, shard_ranks)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("copy", "shard"))


# --------------------------------------------------------------------------------------------------
# Attention: what the dense form and the kernels are given


def padded_batches(layout: Layout, window: int | None, device) -> list[list[Tensor]]:
    """For dense attention: of prompts, and of completions, the rows of their queries (S, L), which
    of them are no padding (S, L), the rows of their keys (S, K), and the mask (S, 1, L, K), None
    for plain causal attention."""
    batches = []
    for segments in layout.batches:
        batch = padded_batch(layout, segments, window)
        batches.append([x if x is None else x.to(device) for x in batch])
    return batches


def padded_batch(layout: Layout, segments: list[Segment], window: int | None) -> tuple:
    """Some segments of a pack side by side, as in padded_batches."""
    start, end, prompt_start, prompt_end = torch.tensor(segments).T  # (S,) each
    looks_ahead = layout.looks_ahead(window)
    rows, real = side_by_side(start, end)  # (S, L)
    prompt_rows, prompt_real = side_by_side(prompt_start, prompt_end)
    key_rows = torch.cat([prompt_rows, rows], 1)  # (S, K)
    if not prompt_real.any() and not window and not looks_ahead:
        # prompts attend causally: their padding stands behind what is real, which never sees it
        return rows, real, key_rows, None
    key_real = torch.cat([prompt_real, real], 1)
    # a token's place in its sequence, prompt and segment
    prompt_place = torch.arange(prompt_rows.shape[1]).expand_as(prompt_rows)
    place = (prompt_end - prompt_start)[:, None] + torch.arange(rows.shape[1])
    key_place = torch.cat([prompt_place, place], 1)[:, None]  # (S, 1, K)
    place = place[..., None]  # (S, L, 1)
    mask = key_place <= place
    if looks_ahead:
        image = layout.images[rows][..., None]
        mask = mask | (layout.images[key_rows][:, None] == image) & (image >= 0)
    if window:
        mask = mask & (key_place > place - window)
    # padding sees everything: a query that sees nothing would be nan, in the backward too
    mask = mask & key_real[:, None] | ~real[..., None]
    return rows, real, key_rows, mask[:, None]


def side_by_side(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (S, L) in the pack of what lies from `starts` to `ends` (S,), padded on the right, and
    (S, L) bool: no padding."""
    lengths = ends - starts
    numbers = torch.arange(int(lengths.max()), device=starts.device)
    real = numbers < lengths[:, None]
    return torch.where(real, starts[:, None] + numbers, 0), real


def kernel_runs(q: Tensor) -> bool:
    """Whether FlashAttention computes this: on a GPU, in 16 bits, heads of at most 256 numbers."""
    return q.is_cuda and q.itemsize == 2 and q.shape[-1] <= 256


# torch 2.11 takes fewer heads of keys than of queries as they are, later ones want to be told
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen(q, k, v, queries, keys, longest_query, longest_key, scale, window) -> Tensor:
    """Attention of sequences that lie end to end, by the variable-length kernel: flash-attn's where
    it is installed, else torch's.

    Args:
        q, k, v: (tokens, heads, head size); k and v may have fewer heads (grouped queries).
        queries, keys: (sequences + 1,) int32, where each sequence begins and ends in q and in k.
        window: keys (before, behind) its own key that a query sees, -1: all. The last query's own
            key is the last key. (-1, 0) is causal.

    Returns:
        (query tokens, heads, head size).
    """
    sizes = (queries, keys, longest_query, longest_key)
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(
            q, k, v, *sizes, softmax_scale=scale, causal=window == (-1, 0), window_size=window
        )
    return varlen_attn(q, k, v, *sizes, scale=scale, window_size=window, **GROUPED)


def kernel_attention(q, k, v, layout: Layout, scaling: float, window: int | None) -> Tensor:
    """Attention of a pack by the variable-length kernel, as shared_attention; (T, heads, head size)
    all."""
    keys, *sizes = layout.once(kernel_index, q.device)
    k = k.index_select(0, keys)
    v = v.index_select(0, keys)
    return varlen(q, k, v, *sizes, scaling, (window - 1, 0) if window else (-1, 0))


def kernel_index(layout: Layout, device) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """(sum of keys,) rows of every segment's keys, (S + 1,) where each begins and ends among the
    queries and among the keys, and the longest of each."""
    rows, queries, keys = [], [0], [0]
    for start, end, prompt_start, prompt_end in layout.segments:
        rows += range(prompt_start, prompt_end)
        rows += range(start, end)
        queries.append(end)
        keys.append(len(rows))
    ends = torch.tensor([queries, keys], dtype=torch.int32)
    longest = ends.diff().amax(1).tolist()
    return torch.tensor(rows, device=device), *ends.to(device), *longest


def tower_attention(
    module, q, k, v, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **_
):
    """Attention of a vision tower in one call, not one for each of an image's windows.

    Args:
        q, k, v: (1, heads, patches, head size).
        cu_seq_lens_q: (windows + 1,) int32, where each window begins and ends.
        max_length_q: patches of the longest.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (patches, heads, head size)
    windows = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return varlen(q, k, v, *windows, scaling, (-1, -1))[None], None


def tower_in_one_call(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a tower with windows runs by tower_attention: on a GPU in 16 bits."""
    return device.type == "cuda" and dtype.itemsize == 2


# transformers tells where windows begin and end to an attention with "flash" in its name
AttentionInterface.register("flash_tower", tower_attention)


# --------------------------------------------------------------------------------------------------
# Turns and inputs


def turns_of(bundles: list[Bundle]) -> list[Turn]:
    """Every turn of bundles, in the order of their pack."""
    turns = []
    for prompt, completions in bundles:
        turns.append(prompt)
        for completion in completions:
            turns.extend(completion)
    return turns


def one_by_one(bundles: list[Bundle]) -> list[Bundle]:
    """The same completions in bundles of one, each with its prompt."""
    single = []
    for prompt, completions in bundles:
        for completion in completions:
            single.append((prompt, [completion]))
    return single


def prompts_of(turns: Iterable[Turn]) -> list[data.Prompt]:
    """The Prompts among turns; each holds the images that arrived with it."""
    return [turn for turn in turns if not isinstance(turn, Tensor)]


def join_token_types(turns: list[Turn]) -> dict[str, Tensor]:
    """The processor's per-token inputs (T,) of turns, end to end; 0 for what the policy wrote. The
    first turn is a Prompt; all Prompts have the same ones."""
    joined = {}
    for name in PER_TOKEN & turns[0].inputs.keys():
        pieces = []
        for turn in turns:
            is_written = isinstance(turn, Tensor)
            pieces.append(torch.zeros_like(turn) if is_written else turn.inputs[name][0])
        joined[name] = torch.cat(pieces)
    return joined


def image_numbers(turns: list[Turn]) -> Tensor:
    """(T,) number of the image or video that a token belongs to, -1 for text."""
    types = join_token_types(turns)
    kind = types["token_type_ids"] if "token_type_ids" in types else types["mm_token_type_ids"]
    inside = (kind == 1) | (kind == 2)  # 1: image, 2: video
    begins = inside & ~F.pad(inside, (1, -1))
    return torch.where(inside, begins.cumsum(0), -1)


def join_inputs(prompts: list[data.Prompt], axis: int = 0) -> dict[str, Tensor]:
    """Pixels and grids of several prompts, end to end in prompt order; a prompt without images adds
    nothing.

    Other axes than `axis` are filled up with zeros to the longest: LLaVA's images differ in their
    number of tiles, and its forward cuts the filling off again.
    """
    found = collections.defaultdict(list)
    for prompt in prompts:
        for name in prompt.inputs.keys() - PER_TOKEN:
            found[name].append(prompt.inputs[name])
    return {name: torch.cat(fill_up(tensors, axis), axis) for name, tensors in found.items()}


def fill_up(tensors: list[Tensor], axis: int) -> list[Tensor]:
    """Tensors with zeros behind them, so that they differ in size along `axis` alone."""
    longest = torch.tensor([t.shape for t in tensors]).amax(0).tolist()
    filled = []
    for tensor in tensors:
        shape = list(longest)
        shape[axis] = tensor.shape[axis]
        larger = tensor.new_zeros(shape)
        larger[tuple(map(slice, tensor.shape))] = tensor
        filled.append(larger)
    return filled


# processor outputs with one number per prompt token, (1, P), and of a model with cross attention
# more axes; all others are per image or per patch
PER_TOKEN = {
    "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "cross_attention_mask",
    "image_attention_mask", "image_embeds_position_mask",
}  # fmt: skip


def count_up(ids: Tensor) -> Tensor:
    """(3, P) positions of text: 0, 1, 2, ..."""
    return torch.arange(len(ids)).expand(3, -1)


def left_pad(rows: list[Tensor], value) -> Tensor:
    """Stack tensors along a new first axis, padded on the left of their last axis to the
    longest."""
    width = max(row.shape[-1] for row in rows)
    return torch.stack([F.pad(row, (width - row.shape[-1], 0), value=value) for row in rows])


def full(x: Tensor) -> Tensor:
    """The whole tensor of an FSDP2 shard; a plain tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def after_videos(positions: Tensor, types: Tensor) -> Tensor:
    """Let what follows a video begin after it, as in the released Qwen models and in vLLM.

    transformers 5 begins it after the frames' height and width alone, which a video of many seconds
    outlasts.

    Args:
        positions: (3, P).
        types: (P,) 0 for text, another number for each kind of media.
    """
    moved = positions.clone()
    changes = types.diff().nonzero()[:, 0] + 1
    for start in changes.tolist():
        missing = moved[:, :start].max() + 1 - moved[:, start].max()
        moved[:, start:] += missing.clamp(min=0)
    return moved


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


SETTINGS = {  # of a forward, and what a model makes of its inputs; no processor returns them
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy",
    "vision_aspect_ratio", "downsample_mode", "interpolate_pos_encoding", "use_audio_in_video",
    "mm_encoder_outputs", "per_layer_inputs", "cross_attention_states", "image_encoder_embeddings",
    "perceiver_embeddings", "self_conditioning_logits", "self_conditioning_mask",
}  # fmt: skip


def extract_multi_modal_inputs(model: nn.Module, batch: dict) -> dict:
    """The fields of a batch that this model's forward takes beyond text, as a new dict; None values
    are left out.

    The forward's own signature decides, so that a new family needs no list here: `pixel_values` and
    `image_grid_thw` for Qwen, `image_sizes` for LLaVA, `pixel_attention_mask` for SmolVLM. The
    model may be wrapped, by PEFT, DistributedDataParallel, FSDP1 or torch.compile.
    """
    models = (m for m in model.modules() if isinstance(m, PreTrainedModel))
    outermost = next(models, model)
    accepted = inspect.signature(outermost.forward).parameters.keys()
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
    """Pixtral bounds the longer side alone, and rounds sides up to patches, merged two by two."""
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
    """For processors that make all images the same size: looks what they make of a large one."""
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

    tower, projector: names of modules, with blanks between. A weight with one of `projector` on its
        path belongs to the projector, else with one of `tower` to the vision tower, else to the
        language model.
    bound: (image processor, least, most pixels) -> its settings that keep every image within about
        so many pixels.
    image_axis: axis of `pixel_values` along which the images of several prompts are joined.
    whole_images: a token of an image attends to its whole image, not only backwards.
    """

    tower: str
    projector: str
    bound: Callable[..., dict] = bound_pixels
    image_axis: int = 0
    whole_images: bool = False


# both inside `visual`; deepstack feeds the first layers too
QWEN = Family("visual", "merger deepstack_merger_list")
IDEFICS = Family("vision_model", "connector", bound_edge, image_axis=1)
LLAVA = Family("vision_tower", "multi_modal_projector")


FAMILIES = {  # by the config's model_type
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "qwen3_vl_moe": QWEN,
    "qwen3_5": QWEN,
    "glm4v": replace(QWEN, bound=bound_frames),
    "internvl": replace(LLAVA, bound=bound_tiles),
    "llava": replace(LLAVA, bound=bound_nothing),
    "llava_onevision": Family("vision_tower", "multi_modal_projector image_newline", bound_grids),
    "mistral3": replace(LLAVA, bound=bound_square),
    "smolvlm": IDEFICS,
    "idefics3": IDEFICS,
    "gemma3": replace(LLAVA, bound=bound_nothing, whole_images=True),
    "gemma4": Family("vision_tower", "embed_vision", bound_tokens),
}


USUAL = Family(  # names that many share
    "visual vision_tower vision_model",
    "merger deepstack_merger_list multi_modal_projector image_newline connector embed_vision",
    bound_nothing,
)


def family_of(model: nn.Module) -> Family:
    """The model's entry in FAMILIES, or the usual names; ValueError for an unknown model that has
    none of them."""
    kind = model.config.model_type
    found = FAMILIES.get(kind, USUAL)
    towers = found.tower.split()
    parts = itertools.chain.from_iterable(name.split(".") for name, _ in model.named_parameters())
    if not set(towers).intersection(parts):
        raise ValueError(
            f"{kind} is not in FAMILIES, and no module of {type(model).__name__} is called one of "
            f"{towers}; add an entry with the names of its vision tower and its "
            "projector"
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
    reach = weight.shape[1] - 1
    out = torch.empty_like(x)
    for segments in layout.batches:
        start, end, prompt_start, prompt_end = torch.tensor(segments, device=x.device).T  # (S,)
        rows, real = side_by_side(start, end)  # (S, L)
        before = prompt_end[:, None] + torch.arange(-reach, 0, device=x.device)  # (S, K - 1)
        is_there = before >= prompt_start[:, None]
        seen_rows = torch.cat([torch.where(is_there, before, 0), rows], 1)
        seen = x[0][:, seen_rows] * torch.cat([is_there, real], 1)  # (channels, S, K - 1 + L)
        convolved = plain(seen.transpose(0, 1), weight, bias, activation=activation, **rest)
        part = convolved.transpose(0, 1)[..., reach:]
        out = out.index_copy(2, rows[real], part[:, real][None])
    return out


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
    out = torch.empty_like(v[0])
    states = prompts = None
    for segments in layout.batches:
        start, end, prompt_start, _ = torch.tensor(segments, device=v.device).T
        if states is not None:
            mine = (prompt_start[:, None] == prompts).int().argmax(1)
            rest["initial_state"] = states.index_select(0, mine)
        prompts = start
        rows, real = side_by_side(start, end)  # (S, L)
        # padding neither decays the state nor writes into it
        still = g[0][rows] * real[..., None]
        silent = beta[0][rows] * real[..., None]
        part, states = plain(q[0][rows], k[0][rows], v[0][rows], g=still, beta=silent, **rest)
        out = out.index_copy(0, rows[real], part[real])
    return out[None], None


# --------------------------------------------------------------------------------------------------
# Recorded conversations


def make_trace(turns: list[tuple[data.Prompt, Tensor]], image_axis: int = 0) -> list[Turn]:
    """A recorded conversation as one training sequence: [prompt, ids, observation, ids, ...].

    Args:
        turns: (Prompt that the policy read, ids (W,) that it wrote) of every turn. A later Prompt
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
    cut = functools.partial(_cut, len(earlier) + 1)
    seen_ids = torch.cat([t if isinstance(t, Tensor) else t.ids for t in trace])
    seen_short_ids = torch.cat([t if isinstance(t, Tensor) else t.short_ids for t in trace])
    ids = cut("ids", prompt.ids, seen_ids)
    short_ids = cut("short_ids", prompt.short_ids, seen_short_ids)

    # images and videos stand in the order of their placeholders; their pixels are compared below
    images = prompt.images[sum(len(p.images) for p in earlier) :]
    videos = prompt.videos[sum(len(p.videos) for p in earlier) :]

    seen = join_inputs(earlier, image_axis)
    inputs = {}
    for name, value in prompt.inputs.items():
        if name in PER_TOKEN:
            inputs[name] = value[:, len(seen_ids) :]
        elif name in seen:
            inputs[name] = cut(name, value, seen[name], image_axis)
        else:
            inputs[name] = value
    inputs = {name: value for name, value in inputs.items() if value.numel()}
    return replace(
        prompt, ids=ids, short_ids=short_ids, images=images, videos=videos, inputs=inputs
    )


def _cut(turn: int, name: str, whole: Tensor, seen: Tensor, axis: int = 0) -> Tensor:
    """What `whole` holds behind `seen` on one axis; on the others LLaVA fills up to the image of
    most tiles. ValueError if it does not begin with `seen`."""
    same_place = whole[tuple(map(slice, seen.shape))]
    if not torch.equal(same_place, seen):
        raise ValueError(
            f"turn {turn} begins like the conversation, but its {name} are not those of earlier "
            "turns; go on from the token ids that were sampled and the images that were shown, "
            "never from text"
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
            f"{checkpoint} is no checkpoint of a run; give RUN/checkpoints/step-N, beside "
            "RUN/run.json"
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
    parser.add_argument("job", choices=["export"], help="as a directory for transformers and vLLM")
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step-N")
    parser.add_argument("out", type=Path, help="folder for the Hugging Face model directory")
    parser.add_argument(
        "--keep_adapter", action="store_true", help="write a LoRA adapter by itself, not merged"
    )
    args = parser.parse_args()
    quieten_libraries()
    export(args.checkpoint, args.out, merge=not args.keep_adapter)


if __name__ == "__main__":
    run_command(main)
