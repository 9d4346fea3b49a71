"""What a fork's author writes the obvious way is right, or ends in one line: each test does what a naive fork did."""

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED, EOS, make_model, refusal, remember, rl_args, run, scalars, short_args

import common
import data
import rewards
import train_dpo
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_sft
from common import continue_groups, join_groups, make_rollout, sample_groups
from data import Problem, ProblemSampler
from plumbing import flags, logs, runs
from rewards import RewardFlags, Verifier, sum_rewards


def double(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def edited(load_script):
    """A function: (script, {old text: new text}) -> the module of the script with these edits."""

    def edit(script: str, edits: dict[str, str]):
        source = Path(script).read_text()
        for old, new in edits.items():
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        return load_script(source)

    return edit


# ---- The loop over micro-batches, masks and weights ------------------------------------------------------------------


def test_a_loss_term_that_would_be_dropped_ends_the_run(edited, tmp_path, capsys):
    """An entropy bonus without the line in section 4: rows whose advantage is 0 have no backward pass."""
    backward = "                    common.backward(loss)\n"
    bonus = "                    loss = loss - 0.01 * (weights[micro] * entropy).sum()\n"
    module = edited("train_grpo.py", {backward: bonus + backward})
    assert "Set `trains` in section 4" in refusal(module.main, rl_args(module, tmp_path), capsys)


def test_a_loss_without_a_gradient_may_be_0():
    common.backward(torch.zeros(()))
    weight = torch.ones((), requires_grad=True)
    common.backward(3 * weight)
    assert weight.grad == 3


@pytest.mark.parametrize("level", ["token", "sequence", "gspo"])
def test_a_weight_of_0_takes_a_token_out_of_the_loss_but_not_out_of_the_ratio(level):
    """One tensor for both: a sequence ratio went from 4.48 to 1.65 when two of three weights were 0."""
    logprobs, A = torch.tensor([[0.5, 0.5, 0.5]]).double(), torch.ones(1, 3).double()
    mask, weights = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[1.0, 0.0, 0.0]]).double()
    clip = {"clip_low": 9.0, "clip_high": 9.0, "kl_coef": 0.0, "ratio_level": level}
    loss, metrics = train_grpo.grpo_loss(logprobs, 0 * logprobs, None, A, mask, weights, **clip)
    ratio = {"token": 0.5, "sequence": 1.5, "gspo": 0.5}[level]
    assert loss.item() == pytest.approx(-torch.tensor(ratio).exp().item())
    assert metrics["ratio_max"] == pytest.approx(-loss.item())


def test_losses_ignore_what_is_not_in_the_mask():
    """Weights that are not 0 on a tool's tokens change nothing, neither do NaN and infinite values there."""
    mask = torch.tensor([[True, False, True], [True, True, False]])
    weights, A = torch.rand(2, 3).double(), double(2, 3)
    old, ref, values = double(2, 3), double(2, 3), double(2, 3)
    losses = {
        "grpo": lambda x: train_grpo.grpo_loss(x, old, ref, A, mask, weights, 0.2, 0.2, 0.1),
        "ppo": lambda x: train_ppo.ppo_loss(x, old, A, mask, weights, 0.2, 0.2),
        "ppo value": lambda x: train_ppo.value_loss(x, values, A, mask, weights, 0.2),
        "pg": lambda x: train_pg.pg_loss(x, A, mask, weights),
        "pg value": lambda x: train_pg.value_loss(x, A, mask, weights),
        "kimi": lambda x: train_kimi.kimi_loss(x, old, A[:, 0], mask, 0.1),
        "sft": lambda x: train_sft.sft_loss(x, mask, weights),
        "dpo": lambda x: (train_dpo.sequence_logps(x, mask, True).sum(), {}),
    }
    clean = double(2, 3)
    for name, loss in losses.items():
        x = clean.clone().requires_grad_()
        expected, metrics = loss(x)
        expected.backward()
        assert (x.grad[~mask] == 0).all() and (x.grad[mask] != 0).any(), name
        for garbage in (torch.nan, torch.inf, -1e30):
            again, again_metrics = loss(clean.masked_fill(~mask, garbage))
            assert again.item() == expected.item() and again_metrics == metrics, name


# ---- Tokens that the policy did not write ----------------------------------------------------------------------------


@pytest.mark.parametrize("compute_gae", [train_pg.compute_gae, train_ppo.compute_gae])
def test_gae_takes_no_step_on_a_tools_tokens(compute_gae):
    """With a tool's tokens in the middle: what it is without them, whatever stands there."""
    mask = torch.tensor([[True, True, False, False, True, True], [True, False, True, False, False, False]])
    r, values = double(2, 6), double(2, 6)
    expected = [torch.zeros(2, 6).double(), torch.zeros(2, 6).double()]
    for row in range(2):
        own = mask[row]
        alone = compute_gae(r[row, own][None], values[row, own][None], torch.ones(1, int(own.sum())).bool(), 0.9, 0.8)
        for whole, part in zip(expected, alone, strict=True):
            whole[row, own] = part[0]
    for garbage in (0.0, 5.0, torch.nan):
        given = r.masked_fill(~mask, garbage), values.masked_fill(~mask, garbage)
        for got, want in zip(compute_gae(*given, mask, 0.9, 0.8), expected, strict=True):
            assert torch.allclose(got, want)


def test_the_kl_in_the_reward_is_paid_for_the_policys_own_tokens():
    mask = torch.tensor([[True, False, True, False], [False, False, False, False]])
    logprobs, ref = double(2, 4), double(2, 4)
    shaped = train_ppo.shape_rewards(torch.tensor([3.0, 5.0]).double(), logprobs, ref, mask, 0.5)
    expected = -0.5 * (logprobs - ref)[0]
    assert torch.allclose(shaped[0], torch.stack([expected[0], 0 * expected[0], expected[2] + 3.0, 0 * expected[0]]))
    assert (shaped[1] == 0).all()


def insert_tokens(monkeypatch, places: slice) -> list[common.Rollout]:
    """From now on sample_groups returns Rollouts whose tokens at `places` count as inserted. Returns the Rollouts."""
    sample, made = common.sample_groups, []

    def sampling(*args, **kwargs):
        rollout = sample(*args, **kwargs)
        rollout.loss_mask = rollout.mask.clone()
        rollout.loss_mask[:, places] = False
        made.append(rollout)
        return rollout

    monkeypatch.setattr(common, "sample_groups", sampling)
    return made


@pytest.mark.parametrize("script", [train_ppo, train_pg], ids=lambda module: module.__name__)
def test_ppo_and_pg_reward_and_advantages_are_on_the_policys_own_tokens(script, tmp_path, monkeypatch):
    """The masks that reach GAE, the KL and the whitening, in a run in which tokens 2 and 3 are a tool's."""
    given, made = slice(1, 3), insert_tokens(monkeypatch, slice(1, 3))
    names = [name for name in ("compute_gae", "shape_rewards", "whiten") if hasattr(script, name)]
    calls = {name: remember(monkeypatch, script, name) for name in names}
    run(script.main, rl_args(script, tmp_path, iterations=1))
    assert calls["compute_gae"]
    for name in names:
        for arguments, result in calls[name]:
            assert torch.equal(arguments["mask"], made[0].trained), name
            for tensor in result if isinstance(result, tuple) else [result]:
                assert (tensor[:, given] == 0).all(), name


# ---- What belongs to a batch -----------------------------------------------------------------------------------------


def test_after_dynamic_sampling_every_name_is_of_the_same_rows(edited, tmp_path):
    """Components, texts and problems were another batch's than rollout and rewards: for 13 to 15 of 32 rows."""
    banner = "        old_logprobs = ref_logprobs = None  # (B, T) each, if needed\n"
    remember = "        seen.append((rollout, batch, texts, components, rewards, scored, component_weights))\n"
    module = edited("train_grpo.py", {banner: remember + banner})
    module.seen = []
    options = {"dynamic_sampling": True, "max_sampling_rounds": 4, "problems": "arithmetic:1-3", "temperature": 0.7}
    run_dir = run(module.main, rl_args(module, tmp_path, iterations=4, prompts_per_step=8, **options))
    assert scalars(run_dir)["loss/policy"][-1][0] > 4 * 32, "no iteration took a second batch"
    tokenizer = common.load_tokenizer(EMBEDDED)
    for rollout, batch, texts, components, total, scored, weights in module.seen:
        assert [tuple(ids) for ids in rollout.prompt_ids] == [problem.prompt_ids for problem in batch]
        assert data.decode(tokenizer, rollout) == texts
        right = Verifier()(texts, [problem for problem in batch for _ in range(4)])
        assert components["accuracy"].flatten().tolist() == right
        assert torch.equal(sum(weights[name] * values for name, values in components.items()), total)
        assert total.shape == scored.shape == (len(batch), 4)


def test_groups_are_joined_with_all_that_belongs_to_them():
    first, second = (
        make_rollout([[1], [2], [3]], [[p, g] for p in (a, a + 1, a + 2) for g in (7, 8)], 2) for a in (10, 20)
    )
    second = replace(second, loss_mask=torch.zeros_like(second.mask), filtered=True)
    parts = [
        ([2], first, ["p0", "p1", "p2"], [f"t{i}" for i in range(6)], {"x": torch.arange(6).view(3, 2)}),
        ([0, 1], second, ["q0", "q1", "q2"], [f"u{i}" for i in range(6)], {"x": 10 + torch.arange(6).view(3, 2)}),
    ]
    rollout, prompts, texts, components = join_groups(parts, 2)
    assert prompts == ["p2", "q0"] and texts == ["t4", "t5", "u0", "u1"]
    assert components["x"].tolist() == [[4, 5], [10, 11]]
    assert rollout.completion_ids.tolist() == [[12, 7], [12, 8], [20, 7], [20, 8]] and rollout.filtered
    assert rollout.trained.tolist() == [[True, True]] * 2 + [[False, False]] * 2 and rollout.group_size == 2


def test_rates_go_to_the_problems_that_are_given():
    """Rates that come late, or of some problems only, went to the last drawn ones."""
    problems = [Problem(f"{i}+0=", str(i)) for i in range(6)]
    sampler = ProblemSampler(problems, "prioritized", seed=1)
    first = sampler.draw(2)
    sampler.draw(3)
    sampler.record(first[::-1], [1.0, 0.5])
    expected = {first[1].question: 1.0, first[0].question: 0.5}
    assert [sampler.successes[i] for i in range(6)] == [expected.get(p.question, 0.0) for p in problems]
    sampler.record([replace(first[0], prompt_ids=(1, 2))], [None])  # not judged: nothing is learned about it
    assert sum(sampler.attempts) == 2
    with pytest.raises(ValueError, match="not a problem of this sampler"):
        sampler.record([Problem("other", "1")], [1.0])


# ---- A batch that another policy sampled -----------------------------------------------------------------------------

LAP = '        clock.lap("sample")\n'
STALE = """
        pending.append((rollout, batch))
        rollout, batch = pending.pop(0) if len(pending) > 1 else pending[0]
"""


def test_a_stale_rollout_is_warned_of_once(edited, tmp_path, capsys):
    """Rollouts that are one iteration old trained with a ratio of 1, and nothing said so."""
    module = edited("train_grpo.py", {LAP: STALE + LAP})
    module.pending = []
    run(module.main, rl_args(module, tmp_path, iterations=4, learning_rate=1e-3, warmup_iterations=0))
    warned = capsys.readouterr().err
    assert warned.count("another policy sampled this batch") == 1
    run(train_grpo.main, rl_args(train_grpo, tmp_path, iterations=4, learning_rate=1e-3, warmup_iterations=0))
    assert "another policy" not in capsys.readouterr().err


def test_a_filter_is_named_and_not_taken_for_another_policy(edited, tmp_path, capsys):
    seed = '            common.derive_seed(args.seed, "sample", global_step),\n'
    module = edited("train_grpo.py", {seed: seed + "            filter=lambda logits: logits * 2,\n"})
    run(module.main, rl_args(module, tmp_path))
    warned = capsys.readouterr().err
    assert "the sampler's `filter`" in warned and "another policy" not in warned
    run(module.main, rl_args(module, tmp_path, dtype="bfloat16"))  # where rounding would explain the gap
    assert "the sampler's `filter`" in capsys.readouterr().err


# ---- Hooks of the sampler --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral"])  # packed, and the plain decoder
def test_a_stop_ends_a_completion_like_an_eos(name):
    model, prompts = make_model(name), [[5, 6, 7], [12], [13, 14]]
    plain = sample_groups(model, prompts, 4, 12, seed=1)
    seen = []

    def stop(ids: list[int]) -> bool:
        seen.append(ids)
        return len(ids) >= 3 and sum(ids) % 2 == 0

    stopped = sample_groups(model, prompts, 4, 12, seed=1, stop=stop)
    ended = 0
    for row in range(12):
        ids = plain.completion_ids[row][plain.mask[row]].tolist()
        end = next((n for n in range(3, len(ids) + 1) if sum(ids[:n]) % 2 == 0), None)
        kept = stopped.completion_ids[row][stopped.mask[row]].tolist()
        assert kept == ids[:end] and bool(stopped.finished[row]) == (end is not None or ids[-1] == EOS)
        ended += end is not None and end < len(ids)
    assert ended > 2 and stopped.trained.sum() == stopped.mask.sum() and not stopped.filtered
    assert all(EOS not in ids[:-1] for ids in seen)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_a_filter_changes_the_distribution_and_its_logprobs(name, temperature):
    model, allowed = make_model(name), torch.arange(40) % 3 == 1  # EOS is among them

    def keep(logits):
        return logits.masked_fill(~allowed, -torch.inf)

    rollout = sample_groups(model, [[5, 6, 7], [12]], 4, 8, temperature, seed=2, filter=keep)
    assert rollout.filtered and allowed[rollout.completion_ids[rollout.mask]].all()
    for row in range(8):
        ids = rollout.completion_ids[row][rollout.mask[row]].tolist()
        prompt = rollout.prompt_ids[row // 4]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
        scaled = keep(logits / (temperature or 1.0)).log_softmax(-1)
        expected = scaled.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert torch.allclose(rollout.sampler_logprobs[row][rollout.mask[row]], expected, atol=1e-4)
        if temperature == 0:
            assert scaled.argmax(-1).tolist() == ids


def test_a_filter_that_leaves_nothing_is_one_line(capsys):
    nothing = lambda logits: torch.full_like(logits, -torch.inf)  # noqa: E731
    for wrong in (nothing, lambda logits: logits[:, :5]):
        assert "`filter` must return" in refusal(
            lambda _, wrong=wrong: sample_groups(make_model("llama"), [[5]], 2, 4, filter=wrong), None, capsys
        )


def test_each_completion_may_have_a_limit():
    model, limits = make_model("llama"), [3, 1, 9, 5]
    free = sample_groups(model, [[5, 6], [7]], 2, 9, seed=3, eos_token_ids=99)
    limited = sample_groups(model, [[5, 6], [7]], 2, limits, seed=3, eos_token_ids=99)
    assert limited.mask.sum(1).tolist() == limits and not limited.finished.any()
    for row, limit in enumerate(limits):
        assert torch.equal(limited.completion_ids[row, :limit], free.completion_ids[row, :limit])


def test_a_continued_row_keeps_to_its_limit_and_to_the_context(capsys):
    """717 tokens were sampled in a model of 256, without an error; the limit was the same for all rows."""
    model = make_model("llama")  # a context of 64
    rollout = sample_groups(model, [[5, 6, 7]], 4, 6, seed=1, eos_token_ids=99)
    inserts, limits = [[8, 9], None, [8, 9], []], [4, 7, 0, 2]
    model.generation_config.eos_token_id = 99
    longer = continue_groups(model, rollout, inserts, limits, seed=2)
    assert longer.mask.sum(1).tolist() == [12, 6, 8, 8]
    assert longer.lengths.tolist() == [10, 6, 6, 8] and not longer.finished.any()
    assert longer.completion_ids[0, 6:8].tolist() == [8, 9] and not longer.trained[0, 6:8].any()
    full = continue_groups(model, rollout, [[8] * 40, None, None, None], 15, seed=2)
    assert full.mask[0].sum() == 6 + 40 + 15  # with the prompt's 3 tokens: 64
    assert continue_groups(model, rollout, inserts, [-3] * 4, seed=2).mask.sum(1).tolist() == [8, 6, 8, 6]
    for insert, limit in (([8] * 40, 16), ([8] * 56, 0)):
        error = refusal(lambda _, i=insert, n=limit: continue_groups(model, rollout, [i] * 4, n), None, capsys)
        assert "the model's context has 64" in error


def test_a_turn_draws_numbers_of_its_own():
    """With the same seed, or without one, a second turn was drawn with the first one's numbers."""
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is equally likely: equal numbers, equal tokens
    rollout = sample_groups(model, [[5, 6, 7]], 4, 12, seed=1, eos_token_ids=99)
    model.generation_config.eos_token_id = 99
    longer = continue_groups(model, rollout, [[]] * 4, 12, seed=1)
    assert (longer.completion_ids[:, :12] == longer.completion_ids[:, 12:]).float().mean() < 0.3


def test_a_stop_in_a_continued_row_sees_its_new_tokens():
    model = make_model("llama")
    rollout = sample_groups(model, [[5, 6, 7]], 2, 4, seed=1, eos_token_ids=99)
    longer = continue_groups(model, rollout, [[8], [9]], 6, seed=2, stop=lambda ids: len(ids) == 2)
    assert longer.mask.sum(1).tolist() == [7, 7] and longer.finished.all()


# ---- A second model --------------------------------------------------------------------------------------------------


def test_a_model_of_another_vocabulary_is_refused(tmp_path, capsys):
    """A teacher of another vocabulary was accepted. Equal sizes prove nothing, and padded sizes may differ."""
    tokenizer = common.load_tokenizer(EMBEDDED)
    other = common.load_tokenizer(EMBEDDED)
    text = other.backend_tokenizer.to_str().replace('"7":', '"@@":', 1).replace('"8":', '"7":', 1)
    text = text.replace('"@@":', '"8":', 1)
    other.backend_tokenizer.from_str(text)
    model = common.load_policy(EMBEDDED, None)
    runs.save_model(tmp_path / "swapped", model, type(other)(tokenizer_object=other.backend_tokenizer.from_str(text)))
    for load in (common.load_policy, common.load_value_model):
        error = refusal(lambda _, load=load: load(str(tmp_path / "swapped"), tokenizer), None, capsys)
        assert "has another vocabulary" in error and "2 tokens have other ids" in error
    config = common.load_config(EMBEDDED)
    config.vocab_size = 128  # padded
    runs.save_model(tmp_path / "padded", type(model)(config), tokenizer)
    assert common.load_policy(str(tmp_path / "padded"), tokenizer).config.vocab_size == 128


# ---- Rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_ends_the_run(edited, tmp_path, capsys, value):
    """One NaN made every update of its minibatch be skipped: a run "finished" with the start model."""
    place = "        component_weights = reward_weights("
    own = f"        components['mine'] = [float('{value}') if i == 5 else 1.0 for i in range(len(texts))]\n"
    source = Path("train_grpo.py").read_text()
    line = next(line for line in source.splitlines() if line.startswith(place))
    module = edited("train_grpo.py", {line: own + line + "\n        component_weights['mine'] = 0.5"})
    error = refusal(module.main, rl_args(module, tmp_path), capsys)
    assert f"reward 'mine' is {value}" in error and "problem '" in error and "completion '" in error


def test_a_reward_without_a_weight_is_an_error():
    with pytest.raises(ValueError, match="'mine' has no weight"):
        sum_rewards({"mine": [1.0, 2.0]}, {}, ["a", "b"], [Problem("1+1=", "2")])


def test_a_reward_may_be_unknown():
    problems, texts = [Problem("1+1=", "2"), Problem("1+2=", "3")], ["a", "b", "c", "d"]
    components = {"x": [1.0, None, 0.5, 0.25], "y": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    total, scored = sum_rewards(components, {"x": 2.0, "y": 1.0}, texts, problems)
    assert scored.tolist() == [[True, False], [True, True]]
    assert total[scored].tolist() == [3.0, 4.0, 4.5]
    assert total[~scored].isnan().all() and components["x"][~scored].isnan().all()
    assert rewards.success_rates(components["x"], scored) == [1.0, 0.375]
    assert rewards.success_rates(components["x"], torch.tensor([[False, False], [True, False]])) == [None, 0.5]


def test_a_baseline_that_forgets_the_unknown_rewards_is_no_number(edited, tmp_path, capsys):
    """A mean over a group took them for 0, and the run went on with other advantages."""
    naive = {"    advantages = rewards - mean\n": "    advantages = given - given.mean(1, keepdim=True)\n"}
    start = "    n, uniform = scored.sum"
    module = edited("train_grpo.py", naive | {start: "    given = rewards\n" + start})
    module.Verifier = lambda *_: Verifier(are_right=lambda texts, _: [None, *[True, False] * len(texts)][: len(texts)])
    run(module.main, rl_args(module, tmp_path, iterations=1))
    assert "warning: loss nan" in capsys.readouterr().err


@pytest.mark.parametrize("normalize_std", [True, False])
def test_an_unknown_reward_is_in_no_statistic_of_its_group(normalize_std):
    r, scored = double(3, 5), torch.ones(3, 5, dtype=torch.bool)
    scored[0, [1, 3]] = scored[1, :4] = scored[2] = False
    r[~scored] = torch.nan
    A = train_grpo.group_advantages(r, normalize_std, scored)
    kimi = train_kimi.group_advantages(r, 0.3, "log-z", scored)
    assert torch.allclose(A[0, scored[0]], train_grpo.group_advantages(r[:1, scored[0]], normalize_std)[0])
    assert torch.allclose(kimi[0, scored[0]], train_kimi.group_advantages(r[:1, scored[0]], 0.3, "log-z")[0])
    for advantages in (A, kimi):
        assert (advantages[~scored] == 0).all() and (advantages[1:] == 0).all()
    equal = torch.full((1, 8), 0.1)
    some = torch.arange(8)[None] > 2
    assert (train_grpo.group_advantages(equal, True, some) == 0).all()


def test_a_completion_without_a_reward_is_as_if_it_were_not_there():
    """Its weights are 0, and the others' are those that they have without it."""
    rollout = make_rollout([[1], [2]], [[3, 4], [5], [6, 7, 8], [9]], group_size=2)
    out = torch.tensor([[False, True], [False, False]])
    without = rollout.without(out)
    assert without.trained.sum(1).tolist() == [2, 0, 3, 1] and torch.equal(without.mask, rollout.mask)
    assert rollout.without(torch.zeros(2, 2, dtype=torch.bool)) is rollout
    for norm in ("sequence", "token", "constant"):
        weights = common.token_weights(without.trained, norm, 10)
        assert torch.allclose(weights[[0, 2, 3]], common.token_weights(rollout.mask[[0, 2, 3]], norm, 10))


SCRIPTS = pytest.mark.parametrize(
    "script",
    [train_grpo, *(pytest.param(s, marks=pytest.mark.slow) for s in (train_pg, train_ppo, train_kimi))],
    ids=lambda module: module.__name__,
)


@SCRIPTS
def test_a_verifier_may_take_the_whole_batch_and_fail_for_some(script, tmp_path, monkeypatch):
    """64 completions at 50 ms took 4.9 s one by one. Where the judge fails, no token has a gradient."""
    batches, gradients = [], []

    def are_right(texts, problems):
        batches.append(len(texts))
        return [None if i % 4 == 1 else i % 4 == 2 for i in range(len(texts))]

    logprobs = common.completion_logprobs

    def remembering(model, rollout, micro, *others):
        values, entropy = logprobs(model, rollout, micro, *others)
        if values.requires_grad:
            values.register_hook(lambda g, rows=list(micro): gradients.extend(zip(rows, g, strict=True)))
        return values, entropy

    monkeypatch.setattr(script, "Verifier", lambda *_: Verifier(are_right=are_right))
    monkeypatch.setattr(common, "completion_logprobs", remembering)
    values = scalars(run(script.main, rl_args(script, tmp_path, iterations=1, format_weight=0.0)))
    assert 16 in batches and values["reward/unscored"][0][1] == 0.25
    assert gradients and all((g == 0).all() for row, g in gradients if row % 4 == 1)
    assert any((g != 0).any() for row, g in gradients)
    assert values["reward/accuracy"][0][1] == pytest.approx(1 / 3)


def test_advantages_can_be_set_token_by_token(edited, tmp_path, monkeypatch):
    """They were one number a row, expanded: to set one token to 0 set all of the row's."""
    line = "        trained = rollout.trained  # (B, T)"
    module = edited("train_grpo.py", {line: "        advantages[:, 0] = 0.0\n" + line})
    calls = remember(monkeypatch, module, "grpo_loss")
    run(module.main, rl_args(module, tmp_path, iterations=1))
    assert any((arguments["advantages"][:, 1:] != 0).any() for arguments, _ in calls)
    assert all((arguments["advantages"][:, 0] == 0).all() for arguments, _ in calls)


def test_a_checkpoint_that_no_resume_could_read_is_refused_when_it_is_written(edited, tmp_path):
    module = edited(
        "train_grpo.py", {"before=before, scores=scores)\n": "before=before, scores=scores, last=rollout)\n"}
    )
    with pytest.raises(TypeError, match="run.checkpoint: last: .* no Rollout"):
        run(module.main, rl_args(module, tmp_path, iterations=1))


def test_a_verifier_with_too_few_verdicts_or_a_nan_is_one_line(capsys):
    problems = [Problem("1+1=", "2")] * 2
    for verdicts, said in (([True], "1 verdicts for 2 completions"), ([True, float("nan")], "'accuracy' is nan")):
        verify = Verifier(are_right=lambda texts, problems, v=verdicts: v)
        assert said in refusal(lambda _, verify=verify: verify(["a", "b"], problems), None, capsys)


@pytest.mark.parametrize("budget", [64, 640])
def test_the_budget_of_tokens_reaches_every_judge(budget, tmp_path, monkeypatch):
    """8,192 tokens were hard-coded, so --micro-batch-tokens did not help a reward model that ran out of memory."""
    model = common.load_reward_model(EMBEDDED, None, new_head=True)
    runs.save_model(tmp_path / "rm", model, common.load_tokenizer(EMBEDDED))
    seen, score = [], common.rollout_scores

    def scores(model, rollout, max_tokens):
        seen.append(max_tokens)
        return score(model, rollout, max_tokens)

    monkeypatch.setattr(common, "rollout_scores", scores)
    path = str(tmp_path / "rm")
    options = {"iterations": 1, "reward_model": path, "verifier_model": path, "micro_batch_tokens": budget}
    run(train_grpo.main, rl_args(train_grpo, tmp_path / "runs", **options))
    assert set(seen) == {budget} and len(seen) > 1


# ---- Flags and directories -------------------------------------------------------------------------------------------


def test_a_flag_that_collides_is_named(capsys):
    @dataclass
    class Mine:
        reward_model: str = ""
        rewards: flags.Group[RewardFlags] = field(default_factory=RewardFlags)

    globals()["Mine"] = Mine
    error = refusal(lambda _: flags.parse_args(Mine, []), None, capsys)
    assert "--reward-model: both Args and the group `rewards` (RewardFlags)" in error


def test_runs_that_start_together_have_directories_of_their_own(tmp_path):
    """13 of 100 pairs shared one, or one of the two died."""
    args, barrier, made = short_args(train_grpo, tmp_path), threading.Barrier(12), []

    def start():
        barrier.wait()
        made.append(runs.run_directory(args))

    threads = [threading.Thread(target=start) for _ in range(12)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(made) == len(set(made)) == 12 and all(path.is_dir() for path in made)


def test_a_name_is_taken_by_one_run(tmp_path, capsys):
    args = short_args(train_grpo, tmp_path, run_name="mine")
    assert runs.run_directory(args) == tmp_path / "mine"
    assert "exists; --resume it, or take another name" in refusal(runs.run_directory, args, capsys)


def test_warnings_are_printed_once(capsys, tmp_path):
    health = logs.Health(tmp_path, None, 3)
    for _ in range(8):
        health.watch({"loss/entropy": 0.001, "rollout/logprob_gap_mean": 0.5})
    printed = capsys.readouterr().err
    assert printed.count("loss/entropy 0.001 for 5 iterations") == printed.count("rollout/logprob_gap_mean 0.5") == 1
