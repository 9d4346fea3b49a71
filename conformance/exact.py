"""The exact update: each objective's gradient in closed form, on enumerated logprobs, in float64.

Every objective's gradient is a sum over tokens of a number times grad log pi(token). `coefficients` computes these
numbers from the papers' equations. They share no code with any trainer, and need no loss and no autograd.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from conformance.toy import EOS, Case, Exact, T


@dataclass
class Rows:
    """The completions of one step, row by row, as they were sampled or given."""

    prompts: list[list[int]]
    completions: list[list[int]]  # token ids; EOS included where one was sampled
    rewards: list[float | None]  # None: unknown
    groups: list[int]  # rows with the same number share a baseline
    trained: list[list[bool]]  # False: a token that the policy did not write
    finished: list[bool]  # ended by EOS, not by the length limit
    values: list[list[float]]  # a critic's values at sampling time; 0 without one


@dataclass
class Formula:
    """An objective by name with its options, as the trainer states them; minimized by SGD with learning rate 1."""

    objective: str  # "pg", "ppo", "grpo", "kimi", "dpo", "ipo", "simpo", "sft"
    loss_norm: str = "sequence"  # or "token" or "constant", see `normalizer`
    baseline: str = "group"  # grpo: "group" or "batch" mean; pg: "none", "batch" or "value" (GAE)
    std: str = "group"  # grpo divides by it + 1e-4: "group" (Bessel), "biased", "batch", or "none"
    clip: tuple[float, float] | None = (0.2, 0.2)  # low, high; None: no clip
    ratio: str = "token"  # "token", "sequence" (product over the completion), "gspo" (its geometric mean)
    old: str = "sampled"  # pi_old: the policy that sampled, or "current": renewed at every update, so every ratio is 1
    kl: str = "k3"  # estimator whose gradient is taken: "k1", "k2", "k3", "rho k3"; PPO has it in the reward
    kl_sign: float = 1.0
    beta: float = 0.1  # DPO, IPO, SimPO
    gamma: float = 1.0  # SimPO's margin
    tau: float = 0.1  # Kimi
    gae_lambda: float = 0.95
    whiten: bool = True  # PPO
    # rows without a reward: "absent" | "counted" in the means over rows and tokens | "baseline": reward 0 in their
    # group's mean, but no loss | "zero": reward 0
    unscored: str = "absent"
    # completions that the length limit cut: "case": as the case asks | "masked": no loss, but counted in the means |
    # "scored": like the others | "absent": no loss, and in no mean
    truncated: str = "case"
    reference: str = "case"  # or "policy": the starting policy; "none"
    temperature: float | None = None  # None: the case's
    positions: str = "real"  # or "padded": the prompts' left padding counts


def padded(values: list[list], fill=0.0, dtype=torch.float64) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in values], True, fill)


def normalizer(mask: Tensor, loss_norm: str, max_new_tokens: int) -> Tensor:
    """(B, T) weight of each token in the loss. Rows without a token don't count. "sequence": mean over a row's tokens,
    then over rows; "token": mean over all tokens; "constant": sum / max_new_tokens, mean over rows."""
    m, rows = mask.double(), mask.any(1).sum()
    weights = {
        "sequence": m / m.sum(1, keepdim=True).clamp(min=1) / rows,
        "token": m / m.sum(),
        "constant": m / (rows * max_new_tokens),
    }
    return weights[loss_norm]


def group_advantages(rewards: Tensor, groups: Tensor, known: Tensor, formula: Formula) -> Tensor:
    """(B,) r - mean, divided by the std as the formula says. A group of one keeps its reward."""
    A = torch.zeros_like(rewards)
    batch_std = rewards[known].std()
    for group in groups.unique():
        rows = (groups == group) & known
        r, alone = rewards[rows], (groups == group).sum() == 1
        if len(r) < 2 and not alone:
            continue
        mean = rewards[known].mean() if formula.baseline == "batch" else 0.0 if alone else r.mean()
        std = {"group": r.std() if not alone else 1.0, "biased": r.std(correction=0), "batch": batch_std, "none": 1.0}
        A[rows] = (r - mean) / (std[formula.std] + (1e-4 if formula.std != "none" and not alone else 0.0))
    return A


def masks(formula: Formula, case: Case) -> bool:
    """True if completions that the length limit cut get no loss."""
    return case.truncated == "mask" if formula.truncated in ("case", "absent") else formula.truncated == "masked"


def gae(rows: Rows, rewards: Tensor, trained: Tensor, gae_lambda: float) -> Tensor:
    """(B, T) sum_k lambda^k delta_{t+k} over a row's trained tokens, gamma 1; rewards (B, T)."""
    A = torch.zeros_like(rewards)
    for i, mask in enumerate(trained):
        after, next_value = 0.0, 0.0
        for t in reversed(mask.nonzero()[:, 0].tolist()):
            value = rows.values[i][t]
            after = rewards[i, t] + next_value - value + gae_lambda * after
            A[i, t], next_value = after, value
    return A


def advantages(rows: Rows, formula: Formula, old: Tensor, ref: Tensor, trained: Tensor, case: Case) -> Tensor:
    """(B, T) advantage of each token."""
    known = torch.tensor([r is not None or formula.unscored in ("baseline", "zero") for r in rows.rewards])
    r = torch.tensor([0.0 if r is None else r for r in rows.rewards], dtype=torch.float64)
    if formula.objective in ("grpo", "kimi"):
        if formula.objective == "kimi":
            formula = replace(formula, std="none")
        A = group_advantages(r, torch.tensor(rows.groups), known, formula)[:, None].expand(trained.shape)
    elif formula.objective == "pg" and formula.baseline != "value":
        A = (r - (r[known].mean() if formula.baseline == "batch" else 0.0))[:, None].expand(trained.shape)
    else:  # the score at the last token that the policy wrote, minus PPO's KL at each
        shaped = -case.kl_coef * formula.kl_sign * (old - ref) * trained
        shaped = torch.zeros_like(shaped) if formula.objective == "pg" else shaped
        for i, mask in enumerate(trained):
            if mask.any():
                shaped[i, mask.nonzero()[-1, 0]] += r[i]
        A = gae(rows, shaped, trained, formula.gae_lambda)
        if formula.objective == "ppo" and formula.whiten:
            A = (A - A[trained].mean()) / (A[trained].std() + 1e-8)
    if masks(formula, case):
        A = A * torch.tensor(rows.finished)[:, None]
    if formula.unscored == "counted":
        A = A * known[:, None]
    return A


def coefficients(formula: Formula, case: Case, rows: Rows, logp: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    """(B, T) numbers c such that the loss's gradient is sum c grad log pi. logp, old, ref: (B, T) log pi of each token
    under the policy, the one that sampled, and the reference, without gradient; 0 on padding."""
    trained = padded(rows.trained, False, torch.bool)
    if case.unscored and formula.unscored in ("absent", "baseline"):
        trained = trained & torch.tensor([r is not None for r in rows.rewards])[:, None]
    if masks(formula, case) and formula.truncated == "absent":
        trained = trained & torch.tensor(rows.finished)[:, None]
    w = normalizer(trained, formula.loss_norm, case.max_new_tokens)
    logp, old, ref = (values * trained for values in (logp, old, ref))
    if formula.objective == "sft":
        return -w
    if formula.objective in ("dpo", "ipo", "simpo"):  # rows are chosen, rejected, chosen, ...
        mean, lengths = formula.objective == "simpo", trained.sum(1)
        sums = logp.sum(1) / lengths if mean else (logp - ref).sum(1)
        margin = sums[0::2] - sums[1::2]
        slope = {
            "dpo": -formula.beta * torch.sigmoid(-formula.beta * margin),
            "ipo": 2 * (margin - 1 / (2 * formula.beta)),
            "simpo": -formula.beta * torch.sigmoid(formula.gamma - formula.beta * margin),
        }[formula.objective] / len(margin)
        c = torch.stack([slope, -slope], 1).flatten()
        return (c / lengths if mean else c)[:, None] * trained
    A = advantages(rows, formula, old, ref, trained, case)
    if formula.objective == "pg":
        return -w * A
    if formula.objective == "kimi":  # -A d + tau/2 d^2 with d = sum_t (log pi - log pi_anchor), mean over rows
        d = (logp - old).sum(1, keepdim=True)
        return trained * (-A + formula.tau * d) / trained.any(1).sum()
    log_ratio = logp - old
    rho = token_rho = log_ratio.exp()
    share = w  # weight of log pi(token) in the weighted ratios of its completion
    if formula.ratio != "token":
        length = trained.sum(1, keepdim=True).clamp(min=1) if formula.ratio == "gspo" else 1
        rho = (log_ratio.sum(1, keepdim=True) / length).exp().expand_as(logp)
        share = trained * w.sum(1, keepdim=True) / length
    low, high = formula.clip or (torch.inf, torch.inf)
    clipped = ((A > 0) & (rho > 1 + high)) | ((A < 0) & (rho < 1 - low))
    c = -share * A * rho * ~clipped  # min(rho A, clip(rho) A): no gradient where the clip binds
    if formula.objective == "grpo" and case.kl_coef:
        kl = {
            "k1": torch.ones_like(logp),
            "k2": logp - ref,
            "k3": 1 - (ref - logp).exp(),
            "rho k3": token_rho * (logp - ref),
        }[formula.kl]
        c = c + formula.kl_sign * case.kl_coef * w * kl
    return c


def table(model: nn.Module, rows: Rows, temperature: float, positions: str) -> Tensor:
    """(B, T) log pi of every token, from the enumeration, with gradient; 0 on padding."""
    longest = max(map(len, rows.prompts)) if positions == "padded" else 0
    ids = padded(rows.completions, 0, torch.long)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows.completions])[:, None]
    logp = torch.zeros(ids.shape, dtype=torch.float64)
    for prompt in {tuple(prompt) for prompt in rows.prompts}:
        mine = torch.tensor([tuple(p) == prompt for p in rows.prompts]).nonzero()[:, 0]
        exact = Exact(model, list(prompt), temperature, max(0, longest - len(prompt)))
        logp = logp.index_put((mine,), exact.logprobs(ids[mine]))
    return logp.masked_fill(~mask, 0.0)


def exact_update(formula: Formula, case: Case, rows: Rows) -> Tensor:
    """All parameters' change in one vector, after case.updates steps of SGD from case.model, which stays as it is."""
    options = case.temperature if formula.temperature is None else formula.temperature, formula.positions
    model, old = Exact.of(case.model), None
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    for _ in range(case.updates):
        logp = table(model, rows, *options)
        current = logp.detach()
        if old is None:  # the policy that sampled
            old = ref = current
            if formula.reference == "case" and (case.kl_coef or formula.objective in ("dpo", "ipo")):
                ref = table(Exact.of(case.reference), rows, *options).detach()
            ref = 0 * ref if formula.reference == "none" else ref
        c = coefficients(formula, case, rows, current, current if formula.old == "current" else old, ref)
        gradients = torch.autograd.grad((c * logp).sum(), [*model.parameters()], allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.0 if gradient is None else gradient
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


# ---- What a wrong update may be: worlds in which it would be exact --------------------------------------------------


def again(case: Case, ids: list[int]) -> list[int]:
    """A completion as text, encoded again."""
    text = case.tokenizer.decode([token for token in ids if token != EOS])
    return case.tokenizer(text, add_special_tokens=False).input_ids + [EOS] * (ids[-1] == EOS)


def with_completions(rows: Rows, completions: list[list[int]]) -> Rows:
    ones = [[True] * len(ids) for ids in completions]
    return replace(rows, completions=completions, trained=ones, values=[[0.0] * len(ids) for ids in completions])


def encoded_again(rows: Rows, case: Case) -> Rows:
    return with_completions(rows, [again(case, ids) or ids for ids in rows.completions])


def joined(rows: Rows, case: Case) -> Rows:
    """Prompt and completion as one text. The completion starts where a pair's ids first differ from the prompt's."""
    decode = case.tokenizer.decode
    both = zip(rows.prompts, rows.completions, strict=True)
    wholes = [case.tokenizer(decode(p[1:]) + decode(ids)).input_ids for p, ids in both]
    shared = [
        sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(p, ids, strict=False)))
        for p, ids in zip(rows.prompts, wholes, strict=True)
    ]
    starts = [min(shared[i - i % 2 : i - i % 2 + 2]) for i in range(len(wholes))]
    rows = replace(rows, prompts=[p[:n] for p, n in zip(rows.prompts, starts, strict=True)])
    return with_completions(rows, [ids[n:] for ids, n in zip(wholes, starts, strict=True)])


def eos_appended(rows: Rows, case: Case) -> Rows:
    return with_completions(rows, [ids if EOS in ids else (ids + [EOS])[:T] for ids in rows.completions])


def without_eos(rows: Rows, case: Case) -> Rows:
    both = zip(rows.trained, rows.completions, strict=True)
    return replace(rows, trained=[[a and t != EOS for a, t in zip(*row, strict=True)] for row in both])


def all_trained(rows: Rows, case: Case) -> Rows:
    return with_completions(rows, rows.completions)


def groups_of_one(rows: Rows, case: Case) -> Rows:
    return replace(rows, groups=[*range(len(rows.groups))])


def interleaved(rows: Rows, case: Case) -> Rows:
    return replace(rows, groups=[i % (max(rows.groups) + 1) for i in range(len(rows.groups))])


def pad_ends(rows: Rows, case: Case) -> Rows:
    return replace(rows, finished=[ids[-1] in (EOS, case.tokenizer.pad_token_id) for ids in rows.completions])


def two_bos(rows: Rows, case: Case) -> Rows:
    return replace(rows, prompts=[[prompt[0], *prompt] for prompt in rows.prompts])


def no_bos(rows: Rows, case: Case) -> Rows:
    return replace(rows, prompts=[prompt[1:] for prompt in rows.prompts])


def swapped(rows: Rows, case: Case) -> Rows:
    return with_completions(rows, [rows.completions[i ^ 1] for i in range(len(rows.prompts))])


FIELDS = [  # what a trainer may compute instead -> the formula's fields
    ("a mean over each completion's tokens, then over completions (loss_norm sequence)", {"loss_norm": "sequence"}),
    ("a mean over all tokens of the batch (loss_norm token)", {"loss_norm": "token"}),
    ("a sum over tokens divided by max_new_tokens (loss_norm constant)", {"loss_norm": "constant"}),
    ("the baseline is the batch's mean, not the group's", {"baseline": "batch"}),
    ("advantages are divided by the group's std", {"std": "group"}),
    ("advantages are divided by the group's std without Bessel's correction", {"std": "biased"}),
    ("advantages are divided by the batch's std", {"std": "batch"}),
    ("advantages are not divided by the std", {"std": "none"}),
    ("no ratio is clipped", {"clip": None}),
    ("every ratio is 1: the old logprobs are renewed at each update", {"old": "current"}),
    ("the KL's sign is wrong: it is maximized", {"kl_sign": -1.0}),
    ("there is no KL", {"kl_sign": 0.0}),
    ("the KL's reference is the starting policy", {"reference": "policy"}),
    ("the reference does not count", {"reference": "none"}),
    ("the KL is k1: no KL's gradient", {"kl": "k1"}),
    ("the KL is k2", {"kl": "k2"}),
    ("the KL is k3 without the ratio: the gradient of KL(ref || pi)", {"kl": "k3"}),
    ("the KL is k3 times the ratio: the gradient of KL(pi || ref)", {"kl": "rho k3"}),
    ("a ratio per token", {"ratio": "token"}),
    ("a ratio per completion, the product over its tokens", {"ratio": "sequence"}),
    ("a ratio per completion, its geometric mean (GSPO)", {"ratio": "gspo"}),
    ("advantages are not whitened", {"whiten": False}),
    ("completions that the length limit cut get a loss", {"truncated": "scored"}),
    ("completions that the length limit cut get no loss", {"truncated": "masked"}),
    ("completions that the length limit cut get no loss and count in no mean", {"truncated": "absent"}),
    ("position ids count the left padding", {"positions": "padded"}),
    ("completions without a reward count in the means over rows and tokens", {"unscored": "counted"}),
    ("completions without a reward leak into their group's baseline, as 0", {"unscored": "baseline"}),
    ("completions without a reward are trained, as 0", {"unscored": "zero"}),
]
ROWS = [  # the same, for the rows
    ("each completion is a group of its own: no baseline", groups_of_one),
    ("groups hold completions of different prompts", interleaved),
    ("completions that end with <pad> count as finished", pad_ends),
    ("EOS is not trained", without_eos),
    ("the tokens of the second turn's prompt are trained", all_trained),
    ("trained tokens are not the sampled ones: text was encoded again", encoded_again),
    ("prompt and completion were encoded as one text: tokens merge at the prompt's end", joined),
    ("an EOS is appended to completions that were cut", eos_appended),
    ("the prompt begins with two BOS", two_bos),
    ("the prompt has no BOS", no_bos),
    ("chosen and rejected are swapped", swapped),
]


@dataclass
class World:
    """What a trainer computes, in words, and how formula and rows change for it to be exact."""

    line: str
    change: object  # (formula, rows, case) -> formula, rows


WORLDS = [
    *(World(line, lambda f, rows, case, fields=fields: (replace(f, **fields), rows)) for line, fields in FIELDS),
    *(World(line, lambda f, rows, case, change=change: (f, change(rows, case))) for line, change in ROWS),
]
TEMPERATURES = [t / 10 for t in range(4, 21)]
