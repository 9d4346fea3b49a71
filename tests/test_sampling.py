"""The sampler draws from the plain softmax, stops where it must, and returns what it drew."""

import pytest
import torch
from conftest import EMBEDDED, EOS, SHAPE, VOCABULARY, make_model, ragged_prompts
from transformers import AutoModelForCausalLM, Qwen2Config

import common
from common import completion_logprobs, join_groups, load_policy, make_rollout, sample_groups, sample_tokens
from data import decode
from plumbing import engine
from plumbing.engine import (
    BATCHES,
    GROWTH,
    GraphDecoder,
    GroupDecoder,
    PackedGroups,
    PaddedRows,
    PlainDecoder,
    batch_class,
)


def reference_logits(model, ids: list[int]) -> torch.Tensor:
    """Next-token logits of one sequence alone: no padding, no cache."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def test_greedy_equals_a_loop_without_cache_or_padding(model):
    """Catches: wrong position ids under left padding; a KV cache expanded or compacted to the wrong rows."""
    prompts = ragged_prompts()
    rollout = sample_groups(model, prompts, 2, 12, temperature=0)
    for row in range(len(prompts) * 2):
        ids, expected = list(prompts[row // 2]), []
        while len(expected) < 12 and EOS not in expected:
            expected.append(reference_logits(model, ids + expected).argmax().item())
        assert rollout.completion_ids[row][rollout.mask[row]].tolist() == expected


def test_greedy_equals_generate(model):
    prompt = [5, 6, 7]
    ours = sample_groups(model, [prompt], 1, 15, temperature=0)
    theirs = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 3), max_new_tokens=15, do_sample=False, pad_token_id=0
    )
    assert ours.completion_ids[0][ours.mask[0]].tolist() == theirs[0, 3:].tolist()


def test_which_models_take_groups(model, capsys):
    """A check chooses the slow path and says so once; it leaves nothing else changed."""
    implementation = model.config._attn_implementation
    expected = model.config.model_type != "mistral"
    assert (batch_class(model) is PackedGroups) is expected
    assert (model.config._attn_implementation == "groups") is expected
    assert expected or model.config._attn_implementation == implementation
    batch_class(model)
    assert capsys.readouterr().err.count("slow path") == (0 if expected else 1)


def test_an_attention_that_ignores_the_groups_is_found_out(capsys):
    """Catches: a model that drops unknown keywords, computes one long row of all prompts and raises no error."""
    model = make_model("llama")
    for layer in model.base_model.layers:
        layer.self_attn.forward = lambda *args, forward=layer.self_attn.forward, groups=None, **kwargs: forward(
            *args, **kwargs
        )
    assert batch_class(model) is PaddedRows
    assert "slow path (PackedGroups: Expected attn_mask" in capsys.readouterr().err  # and why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_model_takes_groups_in_both_precisions(dtype):
    """Catches: a check on special tokens, where bf16's rounding alone moves a trained model's hidden states by half."""
    policy = load_policy(EMBEDDED, None, dtype=dtype)
    assert batch_class(policy) is PackedGroups
    del BATCHES[policy]
    for layer in policy.base_model.layers:  # a model that drops the groups is still found out
        layer.self_attn.forward = lambda *args, forward=layer.self_attn.forward, groups=None, **kwargs: forward(
            *args, **kwargs
        )
    assert batch_class(policy) is PaddedRows


def test_ordinary_calls_are_as_before(model):
    """A padded batch with a mask, before and after the model's attention has become ours."""
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        before = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
        batch_class(model)
        after = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    assert torch.allclose(before, after, atol=1e-4)


@pytest.mark.parametrize("decoder", [PlainDecoder, GroupDecoder])
@pytest.mark.parametrize("limit", [1, GROWTH, GROWTH + 1, 2 * GROWTH + 5])
def test_the_decoders_agree_at_every_length(decoder, limit, monkeypatch):
    """Catches: a full cache buffer; wrong slots of a prompt after some of its rows, or all of them, have ended."""
    model = make_model("llama", max_position_embeddings=256)
    prompts = [[5], list(range(2, 39)), [7, 8, 9], [11, 12]]
    assert batch_class(model) is PackedGroups
    monkeypatch.setattr(common, "decoder_class", lambda model: decoder)
    rollout = sample_groups(model, prompts, 5, limit, temperature=1.5, seed=8, eos_token_ids=[EOS, 3])
    assert limit == 1 or len(set(rollout.lengths.tolist())) > 5 or limit < GROWTH
    logprobs, _ = completion_logprobs(model, rollout, list(range(20)), 1.5)
    assert (logprobs - rollout.sampler_logprobs).abs().max() < 1e-4
    monkeypatch.setattr(common, "decoder_class", lambda model: PlainDecoder)
    other = sample_groups(model, prompts, 5, limit, temperature=1.5, seed=8, eos_token_ids=[EOS, 3])
    assert torch.equal(rollout.completion_ids, other.completion_ids)


class Recomputed:
    """Stands for a CUDA graph: reads the tensors that were there at its capture, and writes where it wrote then."""

    def __init__(self, decoder, R):
        self.run = lambda: GroupDecoder.compute(decoder, decoder.tokens[:R], decoder.positions[:R])
        self.logits = self.run()

    def replay(self):
        self.logits.copy_(self.run())


def test_the_graphs_decoder_equals_the_plain_one(monkeypatch):
    """Its logic without a GPU: buffers of full size, rows that stay although they have ended, halving, later batches in
    the first one's buffers, and weights that change in between."""
    captured = []

    def capture(decoder, R):
        captured.append(R)
        graph = Recomputed(decoder, R)
        return graph, graph.logits

    model = make_model("llama", max_position_embeddings=256)
    assert batch_class(model) is PackedGroups
    monkeypatch.setattr(GraphDecoder, "capture", capture)
    long = list(range(2, 39)) * 2  # beyond 64 tokens: wider buffers, so new graphs
    batches = [([[5], long[:28], [7, 8]], 8), ([[6, 5], [9, 10, 11], [12]], 8), ([[6, 5]], 8)]
    batches += [([[5], long, [7, 8]], 8), ([[6, 5], [9, 10, 11], [12]], 8), ([[6], long[::-1], [9, 8]], 8)]
    for number, (prompts, group_size) in enumerate(batches):
        rollouts = []
        for decoder in (PlainDecoder, GraphDecoder):
            monkeypatch.setattr(common, "decoder_class", lambda model, decoder=decoder: decoder)
            rollouts.append(sample_groups(model, prompts, group_size, 40, 1.3, number, [EOS, 3]))
        plain, graph = rollouts
        assert torch.equal(plain.completion_ids, graph.completion_ids)
        assert torch.equal(plain.mask, graph.mask) and torch.equal(plain.finished, graph.finished)
        assert (plain.sampler_logprobs - graph.sampler_logprobs).abs().max() < 1e-4
        with torch.no_grad():
            model.base_model.layers[0].mlp.up_proj.weight.add_(0.1)
    assert captured[:2] == [24, 12] and captured.count(24) == 2 and 8 in captured  # once for each width of prompts


def test_sampler_logprobs_are_the_trainers(model):
    """Catches: sampler and trainer that disagree (cache, padding, temperature)."""
    rollout = sample_groups(model, ragged_prompts(), 4, 12, temperature=0.7, seed=3)
    logprobs, _ = completion_logprobs(model, rollout, list(range(12)), 0.7)
    assert (logprobs - rollout.sampler_logprobs).abs().max() < 1e-4
    assert rollout.sampler_logprobs[~rollout.mask].abs().sum() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_tokens_follow_the_softmax(temperature):
    """Catches: top-k or top-p at sampling against a full softmax in training; a wrong temperature. Chi-square test."""
    model = make_model("llama")
    draws = 4000
    rollout = sample_groups(model, [[5, 6]], draws, 1, temperature, seed=1)
    probabilities = (reference_logits(model, [5, 6]) / temperature).softmax(-1)
    counts = rollout.completion_ids[:, 0].bincount(minlength=VOCABULARY).float()
    likely = probabilities * draws >= 5
    chi2 = ((counts - probabilities * draws)[likely] ** 2 / (probabilities * draws)[likely]).sum().item()
    degrees = likely.sum().item() - 1
    assert degrees >= 5
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5  # mean + 4 standard deviations


def test_generation_config_changes_nothing():
    """Catches: generation_config.json silently setting top_k, top_p, a temperature or a repetition penalty."""
    model = make_model("qwen3")
    clean = sample_groups(model, ragged_prompts(), 4, 8, seed=5)
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=9.0)
    poisoned = sample_groups(model, ragged_prompts(), 4, 8, seed=5)
    assert torch.equal(clean.completion_ids, poisoned.completion_ids)


def test_every_eos_id_stops():
    """Catches: only one of several EOS ids stops a row. The EOS is part of the completion; a cut one isn't finished."""
    model = make_model("llama")
    ids = list(range(1, 12))
    rollout = sample_groups(model, ragged_prompts(), 32, 10, temperature=1.5, eos_token_ids=ids)
    model.generation_config.eos_token_id = ids
    again = sample_groups(model, ragged_prompts(), 32, 10, temperature=1.5)
    assert torch.equal(rollout.completion_ids, again.completion_ids)
    last = rollout.completion_ids.gather(1, rollout.lengths[:, None] - 1)[:, 0]
    stopped = torch.isin(last, torch.tensor(ids))
    assert torch.equal(stopped, rollout.finished)
    assert len(set(last[stopped].tolist())) > 3
    before_last = rollout.mask.clone().scatter_(1, rollout.lengths[:, None] - 1, False)
    assert not torch.isin(rollout.completion_ids[before_last], torch.tensor(ids)).any()
    assert (rollout.lengths[~rollout.finished] == 10).all()


def test_a_completion_of_eos_alone_has_one_token():
    """Catches: EOS left out of the mask, so that stopping is never trained."""
    rollout = sample_groups(make_model("llama"), [[5, 6]], 3, 6, eos_token_ids=list(range(VOCABULARY)))
    assert rollout.mask.sum(1).tolist() == [1, 1, 1]
    assert rollout.finished.all()


def test_a_row_draws_the_same_whoever_else_is_in_the_batch():
    """Compaction: rows that end early must change nothing for the others."""
    model = make_model("llama")
    together = sample_groups(model, [[5, 6, 7]], 8, 12, seed=2)
    never = sample_groups(model, [[5, 6, 7]], 8, 12, seed=2, eos_token_ids=[VOCABULARY + 1])
    assert together.finished.any() and not together.finished.all()
    for row in range(8):
        n = together.lengths[row]
        assert torch.equal(together.completion_ids[row, :n], never.completion_ids[row, :n])


def test_prompts_computed_in_slices_are_the_same(monkeypatch):
    """Catches: a slice's keys padded to its own width, or given to other groups."""
    model, prompts = make_model("qwen2"), ragged_prompts()
    whole = sample_groups(model, prompts, 4, 12, seed=2)
    monkeypatch.setattr(engine, "PREFILL_TOKENS", max(map(len, prompts)))  # one prompt at a time
    slices = sample_groups(model, prompts, 4, 12, seed=2)
    assert torch.equal(whole.completion_ids, slices.completion_ids)
    assert torch.allclose(whole.sampler_logprobs, slices.sampler_logprobs, atol=1e-4)


def test_seeds():
    model = make_model("gpt2")
    first, second, other = (sample_groups(model, ragged_prompts(), 4, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert not torch.equal(first.completion_ids, other.completion_ids)


def test_rows_belong_to_their_prompts(embedded):
    """Catches: groups interleaved wrongly (repeat against repeat_interleave): row p*G + g answers prompt p."""
    policy, tokenizer = embedded
    questions = ["50+1=", "60+2=", "70+3="]
    prompts = [tokenizer(q).input_ids for q in questions]
    rollout = sample_groups(policy, prompts, 4, 40, temperature=0)
    texts = tokenizer.batch_decode([ids[m] for ids, m in zip(rollout.completion_ids, rollout.mask, strict=True)])
    assert [t.split("</think>")[0] for t in texts[::4]] == ["<think>51", "<think>62", "<think>73"]
    assert all(len(set(texts[p * 4 : p * 4 + 4])) == 1 for p in range(3))


@pytest.mark.parametrize("limit", [1, 2])
def test_short_limits_and_one_prompt(limit):
    rollout = sample_groups(make_model("llama"), [[5]], 1, limit)
    assert rollout.completion_ids.shape[0] == 1
    assert 1 <= rollout.completion_ids.shape[1] <= limit


def test_inverse_cdf_never_leaves_the_support():
    """A uniform number of 0, or the largest below 1, must not reach a token of probability 0."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).repeat(3, 1)
    tokens, logprobs = sample_tokens(logits, 1.0, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert tokens.tolist() == [1, 2, 2]
    assert torch.isfinite(logprobs).all()


def test_join_groups_keeps_rows_together():
    a = make_rollout([[1], [2]], [[3], [4, 4], [5, 5, 5], [6]], group_size=2)
    b = make_rollout([[7]], [[8, 8], [9]], group_size=2)
    rewards = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    parts = [([1], a, rewards), ([0], b, 9 + rewards[:1]), ([], a, rewards)]
    joined, kept = join_groups(parts, limit=2)
    assert kept.tolist() == [[2, 3], [9, 10]]
    assert join_groups(parts, limit=1)[0].prompt_ids == [[2]] and join_groups(parts, 1)[1].tolist() == [[2, 3]]
    assert joined.prompt_ids == [[2], [7]]
    rows = [ids[m].tolist() for ids, m in zip(joined.completion_ids, joined.mask, strict=True)]
    assert rows == [[5, 5, 5], [6], [8, 8], [9]]
    assert joined.loss_mask is None


def test_join_groups_keeps_the_loss_mask():
    """Catches: given tokens that are trained once their groups have been joined with others."""
    parts, rewards = [], torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    for lengths in ((1, 2, 3, 1), (2, 1, 1, 4)):
        rollout = make_rollout([[1], [2]], [[5] * n for n in lengths], group_size=2)
        rollout.loss_mask = rollout.mask & (torch.rand(rollout.mask.shape) < 0.5)
        parts.append(([1], rollout, rewards))
    joined, _ = join_groups(parts, limit=2)
    assert joined.mask.sum(1).tolist() == [3, 1, 1, 4] and joined.loss_mask.shape == joined.mask.shape
    for row, (rollout, source) in enumerate([(parts[i][1], 2 + j) for i in range(2) for j in range(2)]):
        n = rollout.mask.shape[1]
        assert torch.equal(joined.loss_mask[row, :n], rollout.loss_mask[source])
        assert not joined.loss_mask[row, n:].any()
    assert joined.lengths.tolist() == (joined.mask & joined.loss_mask).sum(1).tolist()


def test_no_eos_anywhere_is_an_error():
    model = make_model("llama")
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_id"):
        sample_groups(model, [[5]], 2, 3)


def test_decode(embedded):
    """Texts end before the EOS; a think block that the prompt opens is part of the text."""
    _, tokenizer = embedded
    prompts = [tokenizer("1+1=").input_ids, tokenizer("1+2=<think>\n").input_ids]
    completions = [tokenizer(t).input_ids + [tokenizer.eos_token_id] for t in ("a", "b", "c</think>", "d")]
    rollout = make_rollout(prompts, completions, group_size=2)
    assert decode(tokenizer, rollout) == ["a", "b", "<think>c</think>", "<think>d"]


@pytest.mark.parametrize("first", [3, 16, 21, 35])
def test_a_uniform_of_zero_draws_the_first_token_that_is_possible(first):
    """Catches: a token of probability 0 drawn before the first possible one, in its block or in an earlier one."""
    logits = torch.full((1, 40), -torch.inf)
    logits[0, first:] = 0.0
    tokens, logprobs = sample_tokens(logits, 1.0, torch.zeros(1))
    assert tokens.tolist() == [first] and logprobs.isfinite().all()


def test_logits_that_are_not_numbers_draw_a_token_of_the_vocabulary():
    """Catches: an index past the end, which on a GPU ends the process before the run can save or say anything."""
    tokens, _ = sample_tokens(torch.full((2, 37), torch.nan), 1.0, torch.tensor([0.0, 0.99]))
    assert (tokens >= 0).all() and (tokens < 37).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_16_bit_decoding_and_training_are_one_model(seed):
    """Catches: scores rounded to 16 bits before the softmax; with keys as large as Qwen2.5's, sampler and trainer then
    disagree. Their gap must be a fraction of the error that 16-bit weights and activations cause anyway."""
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 224}
    config = Qwen2Config(**SHAPE | {"vocab_size": 200}, **heads, num_hidden_layers=4, intermediate_size=256)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
            if name.endswith(("k_proj.bias", "q_proj.bias")):
                parameter.normal_(0, 27 if name.endswith("k_proj.bias") else 3)
    model.generation_config.eos_token_id = EOS
    model = model.to(torch.bfloat16)
    rollout = sample_groups(model, [[5, 6, 7, 8, 9, 10] * 4, [12] * 3, [13, 14, 15]], 4, 40, seed=3)
    assert batch_class(model) is PackedGroups
    rows = list(range(12))
    with torch.no_grad():
        trained, _ = completion_logprobs(model, rollout, rows)
        exact, _ = completion_logprobs(model.float(), rollout, rows)
    gap, cost = ((trained - other)[rollout.mask].abs().mean() for other in (rollout.sampler_logprobs, exact))
    assert gap < 0.3 * cost
