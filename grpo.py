"""GRPO on plain tensors: rewards -> advantages -> loss.

    rewards (P, n) --group_advantages--> (P, n) --spread over tokens--> (N,)
    logprobs, old_logprobs, advantages (N,) --policy_loss--> (N,)
    losses (N,) --times token_weights, summed--> scalar

No model, no GPU, no torch.distributed: all of it is checked against numbers worked out by hand.
Per-token quantities are flat vectors over the tokens that the policy wrote, response after
response; `lengths` says where each ends. The path of this file ends at the line "from here on"; a
new loss goes into `policy_loss`.

Legend  P prompts, n responses per prompt, R responses, N tokens written by the policy (all
        responses, end to end)
Papers  GRPO arXiv:2402.03300; PPO's clip arXiv:1707.06347; dual clip arXiv:1912.09729;
        DAPO arXiv:2503.14476; Dr. GRPO arXiv:2503.20783; GSPO arXiv:2507.18071;
        RLOO arXiv:2402.14740; KL estimators http://joschu.net/blog/kl-approx.html;
        truncated importance sampling https://fengyao.notion.site/off-policy-rl
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # nats; e^20 is beyond every clip, and e^89 is inf in float32
MAX_K3 = 10.0  # nats per token


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """Score each response against the others drawn for the same prompt.

    Args:
        rewards: (P, n) float; row p holds the rewards of prompt p's responses.
        scale: "std" divides by the group's sample standard deviation, over n - 1 (GRPO, section
            4.1.2, as verl, EasyR1, TRL and slime read it); "none" only centres (Dr. GRPO); "loo"
            compares each response with the mean of the other n - 1 (RLOO).

    Returns:
        (P, n) float32; every row sums to 0, and a row of equal rewards is exactly 0, never 0/0.

    Raises:
        ValueError: n < 2 (the mean of a group of one is its own reward), or an unknown scale.
    """
    n = rewards.shape[-1]
    if n < 2:
        raise ValueError(f"a group of {n} has nothing to be compared with; draw at least 2")
    rewards = rewards.float()
    centred = rewards - rewards.mean(-1, keepdim=True)
    if scale == "std":
        advantages = centred / (rewards.std(-1, correction=1, keepdim=True) + 1e-6)
    elif scale == "loo":  # r_i - mean of the others = (r_i - mean) n / (n - 1)
        advantages = centred * n / (n - 1)
    elif scale == "none":
        advantages = centred
    else:
        raise ValueError(f"advantage scale {scale!r} is none of std, none, loo")
    # a float mean of equal numbers can be off by one rounding, which std would blow up
    is_flat = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    return advantages.masked_fill(is_flat, 0.0)


def spread(values: Tensor, lengths: Tensor) -> Tensor:
    """One number per response (R,) -> one per token (N,)."""
    return values.repeat_interleave(lengths)


def response_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """One number per token (N,) -> its sum over each response (R,)."""
    owner = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    return values.new_zeros(len(lengths)).index_add(0, owner, values)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float = 0.0,
    ratio: str = "token",
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    The log ratio is held within +-20 nats before exp, as verl and EasyR1 do: beyond, no token has a
    gradient.

    Args:
        logprobs: (N,) nats, with gradient, under the policy as it is.
        old_logprobs: (N,) nats, under the policy at the start of the step.
        advantages: (N,); GRPO's is the same for every token of a response.
        lengths: (R,) tokens of each response; they add up to N.
        clip_low, clip_high: how far the ratio may fall below and rise above 1; DAPO takes
            clip_high > clip_low.
        clip_dual: c, above 1 + clip_high; where A < 0 the loss is at most c |A|, and does not grow
            with r without bound. 0: no such limit.
        ratio: "token" is pi / pi_old of the token (GRPO); "sequence" is the response's geometric
            mean of it (GSPO, equation 7), one ratio for all tokens of a response.

    Returns:
        (N,) loss per token, to be weighted by `token_weights` and summed; (N,) bool, where a clip
        cut the gradient.
    """
    log_ratio = logprobs - old_logprobs
    if ratio == "sequence":
        log_ratio = spread(response_sums(log_ratio, lengths) / lengths, lengths)
    elif ratio != "token":
        raise ValueError(f"ratio {ratio!r} is neither token nor sequence")
    r = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    surrogate = r * advantages
    clipped = r.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -torch.minimum(surrogate, clipped)
    is_cut = clipped < surrogate
    if clip_dual:
        limit = -clip_dual * advantages
        beyond = (advantages < 0) & (loss > limit)
        loss = torch.where(beyond, limit, loss)
        is_cut = is_cut | beyond
    return loss, is_cut.detach()


def token_weights(
    lengths: Tensor,
    aggregation: str,
    total_tokens: int,
    total_responses: int,
    max_response_tokens: int,
) -> Tensor:
    """What each token's loss counts for, so that the loss of a minibatch is the plain sum over all
    its tokens.

    The totals are the minibatch's, over all ranks and packs, so the sum does not depend on how it
    is cut or dealt. verl takes the same; TRL those of all minibatches of the step.

    Args:
        lengths: (R,) tokens of the responses at hand.
        aggregation: "token" is the mean over tokens (DAPO, equation 8); "sequence" the mean over
            responses of each one's mean over tokens (GRPO, equation 3); "constant" the sum over
            tokens divided by `max_response_tokens`, then the mean over responses, so that length
            has no pull (Dr. GRPO).
        total_tokens, total_responses: of the whole minibatch, over all ranks.

    Returns:
        (N,) float32; over a whole minibatch the weights of "token" and "sequence" sum to 1.
    """
    if aggregation == "token":
        weights = torch.full_like(lengths, 1.0 / total_tokens, dtype=torch.float32)
    elif aggregation == "sequence":
        weights = 1.0 / (lengths * total_responses).float()
    elif aggregation == "constant":
        weight = 1.0 / (max_response_tokens * total_responses)
        weights = torch.full_like(lengths, weight, dtype=torch.float32)
    else:
        raise ValueError(f"aggregation {aggregation!r} is none of token, sequence, constant")
    return spread(weights, lengths)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens drawn by the policy.

    With d = logprobs - ref_logprobs: k1 = d (unbiased, can be negative), k2 = d^2 / 2 (biased, low
    variance), k3 = exp(-d) - 1 + d (unbiased, never negative; GRPO's equation 4). For k3, d is held
    within +-20 nats and the result at 10, as verl and EasyR1 do, so that one token which the policy
    gave up cannot become the whole loss.

    As a loss, k1 says nothing about the reference, whose part has no gradient; k2 has the gradient
    of the true KL in expectation; k3 that of the estimator alone. TRL 1.16 multiplies k3 by
    pi / pi_old, whose gradient is, on-policy, that of k2.

    Takes (N,) and returns (N,), all in nats.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return (torch.expm1(-d) + d).clamp(max=MAX_K3)
    raise ValueError(f"KL estimator {estimator!r} is none of k1, k2, k3")


def importance_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    lengths: Tensor,
    cap: float = 2.0,
    level: str = "token",
) -> Tensor:
    """Correct for a sampler that is not quite the policy: min(pi_old / pi_sampler, cap), without
    gradient.

    The rollout engine computes in another precision and with other kernels than the trainer, so its
    tokens are drawn from a slightly different policy. Truncated importance sampling (TIS) reweights
    them and bounds the variance. With GSPO, level "token" weighs every token's loss, as TRL and
    slime do; verl keeps these weights inside the sequence's ratio.

    Args:
        old_logprobs, sampler_logprobs: (N,) nats, of the trainer and of the engine.
        lengths: (R,) tokens of each response.
        cap: largest weight, above 1.
        level: "token" weighs every token by its own ratio; "sequence" a whole response by the
            product over its tokens; "none" leaves everything at 1.

    Returns:
        (N,) weights in (0, cap].
    """
    gap = (old_logprobs - sampler_logprobs).detach()
    if level == "none":
        return torch.ones_like(gap)
    if level == "sequence":
        gap = spread(response_sums(gap, lengths), lengths)
    elif level != "token":
        raise ValueError(f"importance level {level!r} is none of none, token, sequence")
    return gap.exp().clamp(max=cap)


# --- from here on: an option that weighs tokens by what they owe to the picture


def look_weights(looks: Tensor, lengths: Tensor, strength: float) -> Tensor:
    """Weigh a response's tokens by how much each owes to the picture: a soft form of VPPO's filter
    (arXiv:2510.09285), which keeps the tokens that look most and drops the others.

    With s = |looks|: 1 + strength (s / mean(s) - 1), the mean over the response, so that a
    response's weights average 1 and its pull stays what it was.

    Args:
        looks: (N,) nats, log p(token | picture) - log p(token | white picture).
        lengths: (R,) tokens of each response.
        strength: from 0, every token alike, to 1, in proportion to s.

    Returns:
        (N,) weights, at least 0; 1 in a response that owes nothing to a picture.
    """
    size = looks.abs()
    mean = spread(response_sums(size, lengths) / lengths, lengths)
    share = torch.where(mean > 0, size / mean.clamp(min=1e-30), 1.0)
    return 1 + strength * (share - 1)
