"""The model of the demonstration: a real Qwen2.5-VL of about 1M parameters, warmed up.

python -m support.tiny_model OUT --data FIGURES
"""

import argparse
import collections
import json
import random
from pathlib import Path

import data
from model import Actor
from support.processes import quieten_libraries, run_command

import torch
from torch import Tensor
from tqdm import tqdm

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_processor(texts: list[str]):
    """A Qwen2.5-VL processor whose byte-level BPE tokenizer learns its merges from `texts`; the
    rest falls to bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2Tokenizer,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    names = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
    special = [f"<|{name}|>" for name in names]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special,
    )
    tokenizer.add_tokens(["<think>", "</think>"])  # ordinary tokens, as Qwen3 has them
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE
    )


def build_tiny(
    out: str | Path, texts: list[str], seed: int = 0, tie_embeddings: bool = True
) -> Path:
    """Write a real Qwen2.5-VL of about 1M random parameters, as a normal Hugging Face directory."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    processor = tiny_processor(texts)
    tokenizer = processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    width, heads = 128, 4
    # not the usual 0.02: keeps the activations' scale near 1 at this width, and learns several
    # times faster
    std = 0.06
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=4,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=32768,
            initializer_range=std,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        ),
        vision_config=dict(
            depth=2,
            hidden_size=96,
            intermediate_size=192,
            num_heads=heads,
            out_hidden_size=width,
            fullatt_block_indexes=[1],
            initializer_range=std,
        ),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tie_embeddings,
        initializer_range=std,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return Path(out)


TINY_INSTRUCTION = " <think></think> \\boxed{}"


END = "<|im_end|>"


WARM_UP_UPDATES = 250


WARM_UP_RESPONSE = "<think>look</think>\\boxed{{{}}}" + END


def build_warm_tiny(
    out: str | Path,
    problems,
    instruction: str,
    seed: int = 0,
    updates: int = WARM_UP_UPDATES,
    environment: type | None = None,
) -> Path:
    """Write the tiny model, warmed up on the problems, turn by turn: what RL starts from.

    It learns the answer format, and more than guessing, by imitation of noisy labels: of half of
    them the answer is that of a random problem with the same question. The vision tower keeps its
    random start: as fixed features of the patches it serves this model better than trained so
    shortly.

    Args:
        updates: optimizer steps.
        environment: of rollout.ENVIRONMENTS or one's own, see `imitation`; None: single answers.
    """
    problems = list(problems)
    # the tokenizer learns an "ok" in any case
    before = "".join(text + END for text in getattr(environment, "warm_up", ("ok",)))
    texts = []
    for problem in problems:
        response = WARM_UP_RESPONSE.format(problem.answer)
        texts.append(problem.question + instruction + before + response)
    build_tiny(out, [CHAT_TEMPLATE, *texts], seed)
    actor = Actor.from_pretrained(str(out))
    actor.freeze("tower")
    kept = 8 * len(problems)  # the turns of conversations too
    reader = data.Reader(actor.processor, 56 * 56, 56 * 56, instruction, kept=kept)
    same_question = collections.defaultdict(list)
    for problem in problems:
        same_question[problem.question].append(problem.answer)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(actor.model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / 20))
    bar = tqdm(range(updates), "warm-up", disable=None)
    for _ in bar:
        groups = []
        for problem in rng.choices(problems, k=64):
            answer = problem.answer
            if rng.random() < 0.5:
                answer = rng.choice(same_question[problem.question])
            groups.append(imitation(problem, answer, reader, environment))
        logprobs, _ = actor.logprobs(groups)
        loss = -logprobs.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(actor.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    actor.model.save_pretrained(out)
    return Path(out)


def imitation(problem, answer: str, reader: data.Reader, environment: type | None) -> tuple:
    """A problem as (prompt, [turns]), with what the model shall say in each turn: what the
    environment's `warm_up` holds while it goes on, and then the answer."""
    tokenizer = reader.processor.tokenizer

    def tokens(text: str) -> Tensor:
        return torch.tensor(tokenizer.encode(text))

    first = problem
    turns = []
    if environment is not None:
        talk = environment(problem)
        first = talk.first
        for said in getattr(environment, "warm_up", ()):
            shown, _ = talk.step(said)
            if shown is None:
                break
            turns += [tokens(said + END), reader.later(shown)]
    turns.append(tokens(WARM_UP_RESPONSE.format(answer)))
    return reader(first), [turns]


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the tiny model and warm it up.")
    parser.add_argument("out", type=Path, help="folder for the Hugging Face model directory")
    parser.add_argument(
        "--data", required=True, help="figures, as `python -m support.figures FOLDER` draws them"
    )
    parser.add_argument(
        "--updates", type=int, default=WARM_UP_UPDATES, help="optimizer steps of the warm-up"
    )
    args = parser.parse_args()
    quieten_libraries()
    problems = data.load_problems(args.data)
    build_warm_tiny(args.out, problems, TINY_INSTRUCTION, updates=args.updates)


if __name__ == "__main__":
    run_command(main)
