"""One iteration of train_grpo.py on one prompt, every number shown: prints docs/one-iteration.md.

    python benchmarks/one_iteration.py > docs/one-iteration.md

tests/test_docs.py runs it again and compares.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from data import Problem, decode, encode_problems  # noqa: E402
from rewards import RewardFlags, reward_weights, score_completions, sum_rewards  # noqa: E402
from train_grpo import Args as GRPO  # noqa: E402
from train_grpo import group_advantages, grpo_loss  # noqa: E402

PROBLEM, RIGHT = Problem("14+9-6=", "17"), "<think>23 17</think><answer>17</answer>"
PAGE = """# One iteration of GRPO, number by number

The embedded model, one prompt, eight completions, and two updates on them (a default run makes one; the second shows
what ratio and clip do). `python benchmarks/one_iteration.py` prints this page, and a test runs it again. Each heading
links to the line of train_grpo.py that does the step. Read it beside the docstring of
[train_grpo.py](../train_grpo.py), which has the equations.

```
problems (P)  --1 sample-->  completions (B, T)  --2 reward-->  rewards (P, G)  --4 advantages-->  A (B, T)
                                    |                                                                 |
                                    +--3 old logprobs (B, T); with a KL also the reference's ---------+
                                    |                                                                 v
                                    +--5 update: logprobs (R, T) with gradient, R rows at a time --> loss
```

P prompts in a batch (here 1, by default 32), G completions of each (8), so B = P x G rows; T tokens in the longest
completion. A mask (B, T) says which tokens are real.

## {sample}

The prompt is `{question}`, {prompt_tokens} tokens (this model's chat template adds none). The policy writes eight
completions at temperature 1. A completion ends with the token `{eos}`, which is trained too.

## {reward}

`accuracy` is 1 if the answer equals the gold answer, {answer}. `format` is 1 if the text is one think block and one
answer. The reward is `accuracy + {format_weight} format`.

## {logprob}

By default a batch has one update. The policy is then still the one that sampled, so nothing is computed here: the
loss takes the update's own logprobs, detached, as `old_logprobs` ({old_line}). If a batch has several updates, as on
this page, one extra forward pass computes the old logprobs before the first. The sampler's own logprobs are not used:
they differ by rounding, and the first ratios would not be exactly 1.

## {advantage}

The group's mean is {mean:.3f} and its standard deviation {std:.3f} (with Bessel's correction). The advantage is
(reward - mean) / (std + 1e-4). The division gives every group the same scale: if all eight answers were wrong and
only their formats differed, the rewards would differ by 0.2, and the advantages would still be as large as these. If
all rewards are equal, every A is 0 and the group teaches nothing. The eight advantages sum to {total:.4f}.

{completions}

## {loss_line}

The ratio is exp(logprob - old logprob): the token's probability now over its probability when it was sampled. A
token's weight is 1 / (its completion's tokens) / (the minibatch's completions), by default ({weights_line}), so each
completion counts the same, however long it is. A token's loss term ({summed_line}) is

    weight x -min(ratio x A, clip(ratio, 0.8, 1.2) x A)

In the first update the ratio is 1, but its gradient is not 0: the old logprob is detached, so only the new one has a
gradient. The gradient of exp(logprob - old logprob) is ratio x grad log pi, here grad log pi. So a term's gradient is
-weight x A x grad log pi. With one update, GRPO is the plain policy gradient with A as the advantage.

The table shows completion {row}, whose advantage is {row_advantage:+.3f} and whose weight is 1 / {length} / {rows} =
{weight:.5f}. The second update is on the same completions, as with `--update-epochs 2`: the policy has moved, the old
logprobs have not.

{tokens}

Summed over all tokens of all completions, the first loss is {first_loss:.6f}: the advantages of a group sum to 0, and
every completion counts the same. The norm of its gradient is {norm:.3f}. A norm above `--max-grad-norm` (1.0) is
scaled down to it.

## {step}

AdamW makes one step with the learning rate 1e-4. The probability that a sample is exactly `{right}`:

{probabilities}

The second loss is {second_loss:+.6f}, below 0: on average, tokens with A > 0 have become more likely and tokens with
A < 0 less likely. Not every token has: `<think>` also begins the wrong completions. The advantages of all completions
that begin with it sum to {think_sum:+.3f}, so it has become less likely (its ratio above is {think_ratio:.4f}).

Once a ratio is above 1.2 with A > 0, or below 0.8 with A < 0, the clipped term is the minimum, and that token has no
gradient. Here it happens to {clipped_count} of {real_tokens} tokens: the `{clipped_token}` of completion
{clipped_row} (A = {clipped_a:+.3f}) has the ratio {clipped_ratio:.3f}. So it adds
nothing to the second update's gradient.

A default run does the first update only, {iterations} times, each with 32 new prompts. Its learning rate rises to
1e-4 over the first 10 iterations, so `--iterations 5` hardly moves the model. Next: [what the curves
show](curves.md), or [change a line](forking.md).
"""


@dataclass
class Args:
    seed: int = 1
    """seed of the samples"""


def link(title: str, code: str) -> str:
    """The title, linked to the first line of train_grpo.py that has the code."""
    lines = (ROOT / "train_grpo.py").read_text().splitlines()
    number = next(number for number, line in enumerate(lines, 1) if code in line)
    return f"[{title}](../train_grpo.py#L{number})"


def heading(title: str, code: str) -> str:
    return f"{link(title, code)}: `{re.sub(r'[(,]$', '(...)', code.strip())}`"


def table(header: list[str], rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def main(args: Args) -> None:
    defaults = GRPO()
    G, limit, clip_low, clip_high = defaults.group_size, defaults.max_new_tokens, defaults.clip_low, defaults.clip_high
    tokenizer = common.load_tokenizer(defaults.model)
    policy = common.load_policy(defaults.model, tokenizer)
    optimizer = common.MasterAdamW(policy, defaults.learning_rate)
    batch = encode_problems(tokenizer, [PROBLEM], "", policy.config, limit)

    rollout = common.sample_groups(policy, [batch[0].prompt_ids], G, limit, 1.0, args.seed)
    texts = decode(tokenizer, rollout)
    components = score_completions(texts, batch, rollout, RewardFlags(), limit)
    weights = reward_weights(RewardFlags(), 0)
    rewards, scored = sum_rewards(components, weights, texts, batch)
    advantages = group_advantages(rewards, True, scored).flatten()
    wide = advantages[:, None].expand_as(rollout.mask)
    token_weights = common.token_weights(rollout.mask, defaults.loss_norm, limit)
    rows = list(range(G))
    old, _ = common.rollout_logprobs(policy, rollout, 4096)
    target_ids = tokenizer(RIGHT, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    target = common.make_rollout([batch[0].prompt_ids], [target_ids])

    def loss_of(logprobs, weights):
        return grpo_loss(logprobs, old, None, wide, rollout.mask, weights, clip_low, clip_high, 0.0)[0]

    row = next(i for i in rows if advantages[i] > 0)
    n, updates, probabilities = rollout.lengths[row].item(), [], []
    for _ in range(2):
        probabilities.append(common.rollout_logprobs(policy, target, 4096)[0].sum().exp().item())
        logprobs, _ = common.completion_logprobs(policy, rollout, rows, 1.0)
        loss = loss_of(logprobs, token_weights)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, 1.0).item()
        terms = []
        for t in range(n):  # the loss of this token alone
            alone = torch.zeros_like(token_weights)
            alone[row, t] = token_weights[row, t]
            terms.append(loss_of(logprobs.detach(), alone).item())
        updates.append((loss.item(), norm, logprobs.detach()[row, :n].tolist(), terms))
        ratios = (logprobs.detach() - old).exp()  # in the end, those of the second update
        optimizer.step()
        optimizer.zero_grad()
    probabilities.append(common.rollout_logprobs(policy, target, 4096)[0].sum().exp().item())

    stopped = ((wide > 0) & (ratios > 1 + clip_high)) | ((wide < 0) & (ratios < 1 - clip_low))
    clipped = (rollout.mask & stopped).nonzero().tolist()
    i, t = clipped[0]

    (first_loss, norm, _, first_terms), (second_loss, _, second, second_terms) = updates
    tokens = [
        [
            f"`{tokenizer.decode([token])}`",
            f"{o:.4f}",
            f"{f:+.5f}",
            f"{s:.4f}",
            f"{ratio:.4f}",
            f"{g:+.5f}",
        ]
        for token, o, f, s, ratio, g in zip(
            rollout.completion_ids[row, :n].tolist(),
            old[row, :n].tolist(),
            first_terms,
            second,
            ratios[row, :n].tolist(),
            second_terms,
            strict=True,
        )
    ]
    completions = [
        [i, f"`{text}`", *(f"{components[name][0, i]:.0f}" for name in ("accuracy", "format")), f"{rewards[0, i]:.1f}"]
        + [f"{advantages[i]:+.3f}"]
        for i, text in enumerate(texts)
    ]
    print(
        PAGE.format(
            sample=heading("1 sample", "rollout = common.sample_groups("),
            reward=heading("2 reward", "components = score_completions("),
            advantage=heading("4 advantages", "advantages = group_advantages("),
            logprob=heading("3 logprobs", "if not one_update:"),
            loss_line=heading("5 update: the loss", "per_token = -torch.min("),
            step=heading("5 update: the step", "optimizer.step()"),
            weights_line=link("here", "common.token_weights("),
            summed_line=link("summed here", "return (weights * per_token"),
            old_line=link("here", "old = logprobs.detach()"),
            question=PROBLEM.question,
            answer=PROBLEM.answer,
            prompt_tokens=len(batch[0].prompt_ids),
            eos=tokenizer.eos_token,
            format_weight=weights["format"],
            mean=rewards.mean(),
            std=rewards.std(),
            total=abs(advantages.sum()),
            completions=table(["", "completion", "accuracy", "format", "reward", "A"], completions),
            row=row,
            rows=G,
            row_advantage=advantages[row],
            length=n,
            weight=token_weights[row, 0],
            tokens=table(
                ["token", "old logprob", "first loss term", "second logprob", "ratio", "second loss term"], tokens
            ),
            first_loss=abs(first_loss),
            second_loss=second_loss,
            norm=norm,
            clipped_count=len(clipped),
            real_tokens=rollout.mask.sum().item(),
            clipped_token=tokenizer.decode(rollout.completion_ids[i, t : t + 1]),
            clipped_row=i,
            clipped_a=advantages[i],
            clipped_ratio=ratios[i, t],
            think_sum=sum(a for a, text in zip(advantages.tolist(), texts, strict=True) if text.startswith("<think>")),
            think_ratio=ratios[row, 0],
            right=RIGHT,
            probabilities=table(
                ["before", "after the first update", "after the second"], [[f"{p:.4f}" for p in probabilities]]
            ),
            iterations=defaults.iterations,
        ),
        end="",
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
