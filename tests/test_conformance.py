"""The conformance kit: its closed forms against autograd of what is enumerated, and that it flags what it should."""

import importlib.util
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from conformance import checks, exact, mutants, ours, run, template, toy
from conformance.exact import Formula, Rows, coefficients
from conformance.toy import EOS, Case, Exact, make_model
from train_grpo import grpo_loss
from train_kimi import kimi_loss
from train_ppo import ppo_loss

PROMPT = [toy.BOS, toy.A, toy.B]


def rows_of(completions, rewards=None, groups=None) -> Rows:
    n = len(completions)
    trained = [[True] * len(ids) for ids in completions]
    finished = [ids[-1] == EOS for ids in completions]
    values = [[0.0] * len(ids) for ids in completions]
    return Rows([PROMPT] * n, completions, rewards or [None] * n, groups or [*range(n)], trained, finished, values)


def gradient(value: torch.Tensor, model) -> torch.Tensor:
    gradients = torch.autograd.grad(value, [*model.parameters()], allow_unused=True, retain_graph=True)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), gradients, strict=True)]
    return torch.cat([g.flatten() for g in zeros])


@pytest.fixture(params=["rotary", "learned"])
def enumerated(request):
    """A float64 model, all completions of PROMPT, and their probabilities with gradient."""
    model = Exact.of(make_model(request.param))
    distribution = Exact(model, PROMPT).distribution(2)
    return model, [list(ids) for ids in distribution], torch.stack([*distribution.values()])


# ---- The kit is exact


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_enumeration_is_what_the_model_computes(positions):
    """Catches: a token scored off by one or after another prefix. Each completion alone, in the fp32 model."""
    model = make_model(positions)
    distribution = Exact(Exact.of(model), PROMPT, temperature=0.7).distribution()
    assert len(distribution) == 156 and sum(distribution.values()).item() == pytest.approx(1.0, abs=1e-12)
    for ids in [*distribution][::9]:
        logits = model(torch.tensor([PROMPT + list(ids)])).logits[0, len(PROMPT) - 1 : -1] / 0.7
        logp = logits.log_softmax(-1)[range(len(ids)), list(ids)].sum()
        assert logp.exp().item() == pytest.approx(distribution[ids].item(), rel=1e-5)


def test_the_policy_gradient_is_that_of_the_enumerated_reward(enumerated):
    """Catches: a wrong sign or weight in the kit's own gradient. All completions, weighted by their probability."""
    model, completions, probabilities = enumerated
    rewards = [toy.reward(PROMPT, ids) for ids in completions]
    rows, case = rows_of(completions, rewards), Case(max_new_tokens=2)
    logp = exact.table(model, rows, 1.0, "real")
    c = coefficients(Formula("pg", "constant", baseline="none"), case, rows, *3 * [logp.detach()])
    ours = gradient((len(rewards) * 2 * probabilities.detach()[:, None] * c * logp).sum(), model)
    expected = gradient(-(probabilities * torch.tensor(rewards, dtype=torch.float64)).sum(), model)
    assert (ours - expected).abs().max() < 1e-10


def test_grpo_without_std_is_half_the_gradient_of_the_enumerated_reward(enumerated):
    """All groups of two, weighted by their probability: the group's mean takes (G - 1) / G of the gradient."""
    model, completions, probabilities = enumerated
    n, rewards = len(completions), [toy.reward(PROMPT, ids) for ids in completions]
    index = torch.cartesian_prod(torch.arange(n), torch.arange(n)).flatten().tolist()  # of rows, two a group
    rows = rows_of([completions[i] for i in index], [rewards[i] for i in index], [i // 2 for i in range(len(index))])
    logp = exact.table(model, rows, 1.0, "real")
    formula = Formula("grpo", "constant", std="none")
    c = coefficients(formula, Case(max_new_tokens=2), rows, *3 * [logp.detach()])
    p = probabilities.detach()[index].view(-1, 2).prod(1).repeat_interleave(2)
    ours = gradient((len(index) * 2 / 2 * p[:, None] * c * logp).sum(), model)
    expected = gradient(-(probabilities * torch.tensor(rewards, dtype=torch.float64)).sum(), model)
    assert (ours - expected / 2).abs().max() < 1e-10


@pytest.mark.parametrize(("kl", "reverse"), [("rho k3", True), ("k2", True), ("k3", False)])
def test_a_kl_estimators_gradient_is_that_of_the_enumerated_kl(kl, reverse):
    """Catches: KL(pi || ref) and KL(ref || pi) confused. Every first token, weighted by its probability."""
    model = Exact.of(make_model())
    ref = Exact(Exact.of(make_model(seed=1)), PROMPT).steps[0].detach()
    logp = Exact(model, PROMPT).steps[0]
    rows, case = rows_of([[token] for token in range(toy.V)], [0.0] * toy.V), Case(max_new_tokens=1, kl_coef=0.3)
    given = [values.detach()[:, None] for values in (logp, logp, ref)]
    c = coefficients(Formula("grpo", "constant", kl=kl), case, rows, *given)[:, 0] * toy.V
    ours = gradient((logp.detach().exp() * c * logp).sum(), model)
    true = (logp.exp() * (logp - ref)).sum() if reverse else (ref.exp() * (ref - logp)).sum()
    assert (ours - gradient(0.3 * true, model)).abs().max() < 1e-10


def test_dpo_and_sft_are_the_gradients_of_their_enumerated_losses():
    """All pairs of first tokens, and a teacher's distribution over them."""
    model, case = Exact.of(make_model()), Case()
    logp = Exact(model, PROMPT).steps[0]
    ref = Exact(Exact.of(make_model(seed=1)), PROMPT).steps[0].detach()
    pairs = torch.cartesian_prod(torch.arange(toy.V), torch.arange(toy.V))
    tokens = pairs.flatten()
    given = logp.detach()[tokens, None], logp.detach()[tokens, None], ref[tokens, None]
    delta = (logp - ref)[pairs[:, 0]] - (logp - ref)[pairs[:, 1]]
    margin = logp[pairs[:, 0]] - logp[pairs[:, 1]]
    losses = {"dpo": -logsigmoid(0.7 * delta), "ipo": (delta - 1 / 1.4) ** 2, "simpo": -logsigmoid(0.7 * margin - 1.0)}
    for name, loss in losses.items():
        c = coefficients(Formula(name, beta=0.7), case, rows_of(tokens[:, None].tolist()), *given)[:, 0]
        assert (gradient((c * logp[tokens]).sum(), model) - gradient(loss.mean(), model)).abs().max() < 1e-10, name
    rows = rows_of([[token] for token in range(toy.V)])
    c = coefficients(Formula("sft"), case, rows, *3 * [logp.detach()[:, None]])[:, 0]
    teacher = ref.exp() * toy.V  # (the kit's weights are 1/V)
    expected = gradient(-(ref.exp() * logp).sum(), model)
    assert (gradient((teacher * c * logp).sum(), model) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("ratio", ["token", "sequence", "gspo"])
@pytest.mark.parametrize("loss_norm", ["sequence", "token", "constant"])
def test_away_from_the_sampling_policy_the_closed_forms_are_autograds(ratio, loss_norm):
    """Catches: a clip on the wrong side, or a ratio's gradient that misses the other tokens of its completion."""
    torch.manual_seed(0)
    completions = [[3, 4, 1], [3, 1], [5, 5, 3], [1], [4, 4, 1], [3, 3, 3]]
    rows = rows_of(completions, torch.rand(6).tolist(), [0, 0, 0, 1, 1, 1])
    mask = exact.padded(rows.trained, False, torch.bool)
    logp, old, ref = (mask * torch.randn(6, 3, dtype=torch.float64) / 3 for _ in range(3))
    logp.requires_grad_()
    case = Case(kl_coef=0.3)
    formula = Formula("grpo", loss_norm, ratio=ratio, kl="rho k3")
    w, ppo, kimi = exact.normalizer(mask, loss_norm, 3), Formula("ppo", loss_norm), Formula("kimi", tau=0.4)
    A = {f.objective: exact.advantages(rows, f, old, ref, mask, case) for f in (formula, ppo, kimi)}
    losses = [
        (formula, grpo_loss(logp, old, ref, A["grpo"], mask, w, 0.2, 0.2, 0.3, ratio, unbiased_kl=True)),
        (ppo, ppo_loss(logp, old, A["ppo"], mask, w, 0.2, 0.2)),
        (kimi, kimi_loss(logp, old, A["kimi"][:, 0], mask, 0.4)),
    ]
    for stated, (loss, _) in losses:
        c = coefficients(stated, case, rows, logp.detach(), old, ref)
        assert (c - torch.autograd.grad(loss, logp)[0]).abs().max() < 1e-10


def test_check_b_tells_a_temperature_from_another():
    """Catches: a test that rejects true samples, or that would take T 0.8 for T 1."""
    distribution = Exact(Exact.of(make_model()), PROMPT).distribution()
    probabilities = {ids: p.item() for ids, p in distribution.items()}
    weights, seen = torch.tensor([*probabilities.values()]), [*probabilities]
    torch.manual_seed(0)
    values = []
    for power in (1.0, 1.25):
        draws = torch.multinomial(weights**power, 1000, replacement=True)
        values.append(checks.p_value(Counter(seen[i] for i in draws), probabilities))
    assert values[0] > 0.01 and values[1] < checks.LEVEL
    never = dict.fromkeys(seen[:5], 0.0)
    assert checks.p_value(Counter(seen[:5]), probabilities | never) == 0.0


# ---- It flags what it should


@pytest.mark.parametrize("adapter", [*ours.ADAPTERS, *template.ADAPTERS], ids=lambda adapter: adapter.name)
def test_our_updates_are_exact(adapter):
    result, world = checks.check_update(adapter)
    assert result.holds and world is None, result.line


FLAGGED_BY = {"accumulation's factor": "micro-batches", "KL with the wrong sign": "KL", "leaked rows": "no reward"}


@pytest.mark.parametrize("mutant", mutants.ADAPTERS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_flagged_by_name(mutant):
    """A kit that only says that something is wrong leaves the search to its user."""
    name = FLAGGED_BY.get(mutant.name.removeprefix("mutant: "))
    if name:
        (check,) = (c for c in checks.INVARIANCES if c.name == name and "grpo" in c.objectives)
        result = checks.check_invariance(mutant, check, None)
    elif "sampling" in mutant.name:
        result = checks.check_sampling(mutant, None)
    else:
        result, _ = checks.check_update(mutant)
    assert result.holds is False and result.line == mutant.flagged


def test_a_temperature_of_the_update_is_named():
    """The trainer samples at T 1.3 and differentiates at T 1."""

    class Tempered(ours.Ours):
        def sample(self, case):
            return super().sample(replace(case, temperature=1.3 * case.temperature))

    result = checks.check_sampling(Tempered("tempered", ours.GRPO), None)
    assert result.line == "sampled at T 1.3, differentiated at T 1"


def test_a_check_that_could_not_fail_says_so():
    """Catches: "holds" where no completion was cut, so that nothing was tested."""

    class OneToken(ours.Ours):
        def reward(self, case, rollout):
            return [1.0] * len(rollout.mask)  # no advantage: every wrong update is the same as the right one

    check = next(c for c in checks.INVARIANCES if c.name == "truncated")
    result = checks.check_invariance(OneToken("uniform", ours.GRPO), check, None)
    assert result.holds is None and result.line.startswith("says nothing")


def test_rows_that_are_no_groups_of_completions_are_one_line():
    """Catches: a trainer's padding taken for tokens, or its rows for another prompt's."""

    class Missing(ours.Ours):
        def step(self, case):
            step = super().step(case)
            return replace(step, prompts=step.prompts[1:], completions=step.completions[1:])

    class Padded(ours.Ours):
        def step(self, case):
            step = super().step(case)
            return replace(step, completions=[ids + [toy.PAD] * (3 - len(ids)) for ids in step.completions])

    class Interleaved(ours.Ours):
        def step(self, case):
            step = super().step(case)
            return replace(step, prompts=[i % 3 for i in range(12)])

    lines = [checks.check_update(kind("mine", ours.GRPO))[0].line for kind in (Missing, Padded, Interleaved)]
    assert lines[0] == "11 completions came back, not 12"
    assert "is no completion of 1 to 3 tokens that ends at its first EOS" in lines[1]
    assert lines[2] == "completions of different prompts stand in one group"


def test_without_trl_it_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run.load("trl") == []
    assert capsys.readouterr().err == "trl is not installed, so its trainers are left out: pip install trl==1.16.0\n"


@pytest.mark.parametrize("name", ["gone.py", "conformance/toy.py"])
def test_a_file_without_adapters_is_one_line(name):
    with pytest.raises(SystemExit, match=f"{name}: (neither a file nor one of|has no list ADAPTERS)"):
        run.load(name)


@pytest.mark.slow
def test_the_table():
    """All of ours hold, each mutant is flagged, and what TRL's trainers differ in is explained, and on the page."""
    done = subprocess.run([sys.executable, "conformance/run.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line[19:] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert len(found) > 15 and not [line for line in found if line.startswith("unexplained")]
    page = Path("docs/conformance.md").read_text().replace("`", "").replace("\\|", "|")
    assert [line for line in found if line not in page] == []
