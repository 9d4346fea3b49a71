"""Continues completions after inserted tokens: a user's next turn, or text written in the model's place."""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from common import Rollout, make_rollout, sample_groups
from data import as_dicts, token_ids


def continue_groups(
    model: PreTrainedModel,
    rollout: Rollout,
    inserts: list[list[int] | None],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Rollout:
    """Appends the token ids inserts[i] to row i and samples at most max_new_tokens more tokens; a row whose insert is
    None stays as it is. Returns the new Rollout. Inserted tokens, such as a user's next turn, are real (in `mask`) but
    not trained (not in `loss_mask`), because the policy did not write them."""
    G, device = rollout.group_size, rollout.mask.device
    rows = [row for row, insert in enumerate(inserts) if insert is not None]
    completions = [ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.mask, strict=True)]
    logprobs = [values[mask].tolist() for values, mask in zip(rollout.sampler_logprobs, rollout.mask, strict=True)]
    trained = [values[mask].tolist() for values, mask in zip(rollout.trained, rollout.mask, strict=True)]
    finished = rollout.finished.clone()
    if rows:
        heads = [rollout.prompt_ids[row // G] + completions[row] + inserts[row] for row in rows]
        rest = sample_groups(model, heads, 1, max_new_tokens, temperature, seed)
        for i, row in enumerate(rows):
            new = rest.mask[i]
            completions[row] += inserts[row] + rest.completion_ids[i][new].tolist()
            logprobs[row] += [0.0] * len(inserts[row]) + rest.sampler_logprobs[i][new].tolist()
            trained[row] += [False] * len(inserts[row]) + [True] * int(new.sum())
        finished[rows] = rest.finished
    whole = make_rollout(rollout.prompt_ids, completions, G, device)
    whole.sampler_logprobs[whole.mask] = torch.tensor([value for row in logprobs for value in row], device=device)
    whole.loss_mask = whole.mask.clone()
    whole.loss_mask[whole.mask] = torch.tensor([value for row in trained for value in row], device=device)
    return replace(whole, finished=finished)


def follow_up_ids(tokenizer, text: str, finished: bool = True) -> list[int]:
    """Token ids of a user's next turn, to append to a completion's ids; they end where the assistant's next text
    begins. finished: the completion ends with its EOS; if it does not, the ids first close the assistant's turn."""
    if not tokenizer.chat_template:
        return token_ids(tokenizer, ["\n\n" + text])[0]
    turns = as_dicts((("user", "-"), ("assistant", "%%"), ("user", text)))
    rest = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False).partition("%%")[2]
    return token_ids(tokenizer, [rest.removeprefix(tokenizer.eos_token if finished else "")])[0]
