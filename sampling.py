"""Group sampling: the Rollout that all training data lives in, the sampler that makes one, and its batches.

Shapes: P prompts x G completions = B rows, row p*G + g. T = longest completion. Per-token tensors are (B, T) over
completion tokens only; what stands where `mask` is False is padding that nothing may depend on.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Rollout:
    """P prompts with G completions each. Also holds demonstrations (G = 1) and preference pairs (G = 2: chosen,
    rejected), so that there is one logprob path."""

    prompt_ids: list[list[int]]  # P
    completion_ids: Tensor  # (B, T), right-padded
    mask: Tensor  # (B, T) bool: the completion's tokens, its EOS included; from the sampler, never from ids != pad
    sampler_logprobs: Tensor  # (B, T) of the tokens as they were sampled; 0 on padding
    finished: Tensor  # (B,) bool: ended by an EOS, not by the length limit
    group_size: int

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)


def join_groups(parts: list[tuple[Rollout, list[int]]]) -> Rollout:
    """One Rollout of the given groups of several."""
    G, T = parts[0][0].group_size, max(rollout.mask.shape[1] for rollout, _ in parts)

    def gather(field: str) -> Tensor:
        rows = [getattr(r, field)[[p * G + g for p in groups for g in range(G)]] for r, groups in parts if groups]
        return torch.cat([nn.functional.pad(t, (0, T - t.shape[1])) if t.dim() == 2 else t for t in rows])

    prompts = [rollout.prompt_ids[p] for rollout, groups in parts for p in groups]
    return Rollout(prompts, *map(gather, ("completion_ids", "mask", "sampler_logprobs", "finished")), G)


def make_rollout(prompts: list[list[int]], completions: list[list[int]], group_size: int = 1, device="cpu") -> Rollout:
    """A Rollout of given completions (token ids, EOS included), for training on data that nobody sampled here."""
    ids = pad_sequence([torch.tensor(c) for c in completions], batch_first=True).to(device)
    lengths = torch.tensor([len(c) for c in completions], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return Rollout(prompts, ids, mask, torch.zeros(ids.shape, device=device), mask.any(1), group_size)


def sample_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row and its logprob, from fp32 logits (R, V) and uniform numbers (R,); temperature 0 is argmax.

    Inverse of the cumulative distribution: exact, without a sort of the vocabulary, and a row's draw depends on its
    own number only.
    """
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    logprobs = (logits / temperature).log_softmax(-1)
    cdf = logprobs.exp().cumsum(-1)
    total = cdf[:, -1]  # 1 up to rounding
    below = torch.nextafter(total, torch.zeros_like(total))  # u * total may round up to total, past the last token
    tokens = torch.searchsorted(cdf, torch.minimum(uniforms * total, below)[:, None], right=True)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def decode(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[str]:
    """(B,) texts of the completions without EOS; for rewards and for people, never to be encoded again.

    Where the chat template opens the think block in the prompt, the tag is put back in front: it belongs to the text.
    """
    G, rows = rollout.group_size, zip(rollout.completion_ids.tolist(), rollout.lengths.tolist(), strict=True)
    texts = tokenizer.batch_decode([ids[:n] for ids, n in rows], skip_special_tokens=True)
    heads = tokenizer.batch_decode([prompt[-8:] for prompt in rollout.prompt_ids])
    return ["<think>" * heads[i // G].rstrip().endswith("<think>") + text for i, text in enumerate(texts)]


@torch.no_grad()
def sample_groups(
    model: PreTrainedModel,
    prompts: list[list[int]],
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    eos_token_ids: int | list[int] | None = None,
) -> Rollout:
    """`group_size` completions of every prompt, from the model's plain softmax at `temperature` (0: greedy): nothing
    else in the generation config (top-p, penalties) is looked at.

    Each prompt is computed once; its KV cache is then expanded to the group. A row that has ended leaves the batch.
    eos_token_ids: where a completion ends; None: those of the model's generation config.
    """
    device, P, G = model.device, len(prompts), group_size
    if eos_token_ids is None:
        eos_token_ids = model.generation_config.eos_token_id
    if eos_token_ids is None:
        raise ValueError("the model's generation config has no eos_token_id: give eos_token_ids")
    eos = torch.tensor(eos_token_ids, device=device).flatten()

    # Prefill, left-padded so that every row goes on at the same cache slot; position ids count real tokens only.
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(map(len, prompts))
    prompt_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    attention = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    output = model(prompt_ids, attention_mask=attention, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.reorder_cache(torch.arange(P, device=device).repeat_interleave(G))
    logits = output.logits[:, -1].float().repeat_interleave(G, 0)  # (B, V)
    attention, lengths = attention.repeat_interleave(G, 0), lengths.repeat_interleave(G)

    # All random numbers up front, on the CPU: a row's draws depend neither on the device nor on which rows ended.
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(P * G, max_new_tokens, generator=generator).to(device)
    completion_ids = torch.zeros(P * G, max_new_tokens, dtype=torch.long, device=device)
    mask = torch.zeros(P * G, max_new_tokens, dtype=torch.bool, device=device)
    sampler_logprobs = torch.zeros(P * G, max_new_tokens, device=device)
    finished = torch.zeros(P * G, dtype=torch.bool, device=device)
    rows = torch.arange(P * G, device=device)  # those that still sample

    for step in range(max_new_tokens):
        tokens, logprobs = sample_tokens(logits, temperature, uniforms[rows, step])
        completion_ids[rows, step], sampler_logprobs[rows, step], mask[rows, step] = tokens, logprobs, True
        ended = torch.isin(tokens, eos)
        finished[rows] = ended
        live = (~ended).nonzero()[:, 0]
        if len(live) == 0 or step == max_new_tokens - 1:
            break
        if len(live) < len(rows):
            cache.reorder_cache(live)
            rows, tokens, attention = rows[live], tokens[live], attention[live]
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], 1)
        positions = lengths[rows] + step
        output = model(
            tokens[:, None], attention_mask=attention, position_ids=positions[:, None], past_key_values=cache
        )
        logits = output.logits[:, -1].float()

    T = int(mask.sum(1).max())
    return Rollout(prompts, completion_ids[:, :T], mask[:, :T], sampler_logprobs[:, :T], finished, G)


# ---- Weights and batches -------------------------------------------------------------------------------------------


def token_weights(mask: Tensor, loss_norm: str, max_new_tokens: int) -> Tensor:
    """(B, T) weights with which a per-token loss is summed, exactly 0 where mask is False; of the whole minibatch at
    once, so that its split into micro-batches can't change the gradient.

    "sequence": mean over rows of the mean over each row's tokens (DeepSeekMath, arXiv:2402.03300, eq. 3).
    "token": mean over all tokens (DAPO, arXiv:2503.14476, eq. 8).
    "constant": sum over a row's tokens / max_new_tokens, mean over rows (Dr. GRPO, arXiv:2503.20783).
    """
    m = mask.float()
    if loss_norm == "sequence":
        return m / m.sum(1, keepdim=True).clamp(min=1) / len(m)
    if loss_norm == "token":
        return m / m.sum().clamp(min=1)
    if loss_norm == "constant":
        return m / (len(m) * max_new_tokens)
    raise ValueError(f"loss_norm is 'sequence', 'token' or 'constant', not {loss_norm!r}")


def minibatches(rollout: Rollout, size: int, seed: int) -> list[list[int]]:
    """Rows in random minibatches of `size` completions, always whole groups; the last one may be smaller."""
    G, P = rollout.group_size, len(rollout.prompt_ids)
    groups, per_batch = random.Random(seed).sample(range(P), P), max(1, size // G)
    batches = [groups[i : i + per_batch] for i in range(0, P, per_batch)]
    return [[p * G + g for p in batch for g in range(G)] for batch in batches]


def micro_batches(rollout: Rollout, rows: list[int], max_tokens: int) -> list[list[int]]:
    """`rows` in slices of at most max_tokens tokens, padding counted (a single row may exceed it): whole groups of
    similar length together, or a slice of one group that is too large."""
    G, lengths = rollout.group_size, rollout.lengths.tolist()
    size = {row: len(rollout.prompt_ids[row // G]) + lengths[row] for row in rows}
    groups: dict[int, list[int]] = {}
    for row in sorted(rows, key=lambda row: (size[row], row)):  # ascending: the last row added is the longest
        groups.setdefault(row // G, []).append(row)
    batches, batch = [], []
    for group in sorted(groups.values(), key=lambda group: size[group[-1]]):
        if len(group) * size[group[-1]] > max_tokens:
            piece = []
            for row in group:
                if piece and (len(piece) + 1) * size[row] > max_tokens:
                    batches.append(piece)
                    piece = []
                piece.append(row)
            batches.append(piece)
        elif batch and (len(batch) + len(group)) * size[group[-1]] > max_tokens:
            batches.append(batch)
            batch = list(group)
        else:
            batch += group
    return batches + [batch] if batch else batches


def pair_micro_batches(rollout: Rollout, max_tokens: int) -> list[list[int]]:
    """All rows of a Rollout of pairs in micro-batches of whole pairs, in the order chosen, rejected, chosen, ...: a
    pair's loss needs both rows. The budget is never under what the largest pair takes."""
    G, lengths = rollout.group_size, rollout.lengths.tolist()
    longest = max(len(rollout.prompt_ids[row // G]) + length for row, length in enumerate(lengths))
    batches = micro_batches(rollout, list(range(len(lengths))), max(max_tokens, G * longest))
    return [sorted(rows) for rows in batches]  # similar lengths together had put the shorter of a pair first
