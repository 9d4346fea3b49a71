"""There is one logprob path; it must be right to the token."""

import json

import pytest
import torch
from conftest import EMBEDDED, EOS, make_model, ragged_prompts
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Gemma2Config,
)

import common
from common import completion_logprobs, completion_scores, completion_values, make_rollout, sample_groups
from plumbing.runs import save_model

COMPLETIONS = [[3, 4, EOS], [9, EOS], [20, 21, 22, 23, EOS], [EOS], [0, 0, 7, EOS], [30, 31, 32]]


def batch(group_size: int = 2):
    return make_rollout(ragged_prompts(), COMPLETIONS, group_size)


def one_at_a_time(model, rollout, row: int, temperature: float = 1.0) -> torch.Tensor:
    """An autoregressive loop: for every token a forward pass over nothing but the tokens before it."""
    ids = list(rollout.prompt_ids[row // rollout.group_size])
    logprobs = []
    for token in rollout.completion_ids[row][rollout.mask[row]].tolist():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        logprobs.append((logits / temperature).log_softmax(-1)[token])
        ids.append(token)
    return torch.stack(logprobs)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_equal_to_an_autoregressive_loop(model, temperature):
    """Catches: positions wrong under padding; the first token scored off by one; a real token equal to pad (id 0)
    zeroed; temperature missing."""
    rollout = batch()
    logprobs, entropy = completion_logprobs(model, rollout, list(range(6)), temperature)
    for row in range(6):
        expected = one_at_a_time(model, rollout, row, temperature)
        assert torch.allclose(logprobs[row][rollout.mask[row]], expected, atol=1e-5)
        assert (logprobs[row][~rollout.mask[row]] == 0).all()
    assert (entropy[rollout.mask] > 0).all() and (entropy[~rollout.mask] == 0).all()


def test_rows_may_be_any_subset_in_any_order(model):
    rollout = batch()
    everything, _ = completion_logprobs(model, rollout, list(range(6)))
    some, _ = completion_logprobs(model, rollout, [4, 1, 2])
    assert torch.allclose(some, everything[[4, 1, 2]], atol=1e-5)


def test_what_stands_after_the_eos_changes_nothing(model):
    """Catches: tokens after EOS counted. Corrupting them changes neither logprobs nor gradients, to the bit."""
    gradients = []
    for garbage in (0, 17):
        rollout = batch()
        rollout.completion_ids[~rollout.mask] = garbage
        model.zero_grad()
        logprobs, _ = completion_logprobs(model, rollout, list(range(6)))
        logprobs.sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunked_head_equals_the_naive_one(model, chunk, monkeypatch):
    """Forward and backward through chunks of the head against one full log_softmax."""
    rollout, rows = batch(), list(range(6))
    coefficients = torch.randn(rollout.mask.shape) * rollout.mask

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        logprobs, _ = completion_logprobs(model, rollout, rows, 0.7)
        (logprobs * coefficients).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    monkeypatch.setattr(common, "logits_at_once", lambda device: chunk * model.config.vocab_size)
    ours = gradients()
    model.zero_grad()
    total = sum((one_at_a_time(model, rollout, r, 0.7) * coefficients[r][rollout.mask[r]]).sum() for r in rows)
    total.backward()
    naive = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(ours, naive, strict=True))


def test_gradient_checkpointing_changes_no_gradient(model):
    rollout, gradients = batch(), []
    for checkpointed in (False, True):
        if checkpointed:
            common.checkpoint_layers(model)
        model.zero_grad()
        logprobs, _ = completion_logprobs(model, rollout, list(range(6)))
        logprobs.sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_gradient_checkpointing_keeps_less():
    """Counts the values that autograd keeps for the backward pass."""
    kept = []
    for checkpointed in (False, True):
        model, sizes = make_model("llama", num_hidden_layers=8), []
        if checkpointed:
            common.checkpoint_layers(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            completion_logprobs(model, batch(), list(range(6)))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def softcapped():
    """Gemma-2 caps its logits with a tanh: hidden states times the head's weights would be another distribution."""
    config = Gemma2Config(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_a_head_that_is_not_plain_is_seen():
    model = softcapped()
    assert not common.has_plain_head(model)
    assert common.has_plain_head(make_model("llama"))
    logprobs, _ = completion_logprobs(model, batch(), [2])
    assert torch.allclose(logprobs[0][batch().mask[2]], one_at_a_time(model, batch(), 2), atol=1e-5)


@pytest.mark.parametrize("loss", ["entropy", "both"])
@pytest.mark.parametrize("head", ["plain", "softcapped"])
def test_the_entropys_gradient_is_autograds(head, loss, monkeypatch):
    """Catches: an entropy without gradient, with its temperature missing, or one whose gradient spoils the logprobs'.
    The reference is a plain log_softmax over each row alone."""
    model, rollout, rows = make_model("llama") if head == "plain" else softcapped(), batch(), list(range(6))
    assert common.has_plain_head(model) == (head == "plain")
    monkeypatch.setattr(common, "logits_at_once", lambda device: 3 * model.config.vocab_size)  # several slices
    a, b = torch.randn(2, *rollout.mask.shape)
    a = torch.zeros_like(a) if loss == "entropy" else a

    logprobs, entropy = completion_logprobs(model, rollout, rows, 0.7)
    ((b * entropy).sum() + ((a * logprobs).sum() if loss == "both" else 0.0)).backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    total = 0.0
    for row in rows:
        prompt, completion = rollout.prompt_ids[row // 2], rollout.completion_ids[row][rollout.mask[row]]
        ids, n = torch.tensor([prompt + completion.tolist()]), len(completion)
        log_softmax = (model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        expected = -(log_softmax.exp() * log_softmax).sum(-1)
        assert torch.allclose(entropy[row, :n], expected, atol=1e-5) and (entropy[row, n:] == 0).all()
        total = total + (b[row, :n] * expected).sum()
        total = total + (a[row, :n] * log_softmax.gather(1, completion[:, None])[:, 0]).sum()
    total.backward()
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    assert max(gradient.abs().max() for gradient in theirs) > 0.1
    assert all(torch.allclose(x, y, atol=1e-5, rtol=1e-4) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("head", ["plain", "softcapped"])
def test_an_entropy_that_no_loss_uses_changes_no_bit_of_the_gradient(head):
    """Catches: a bonus that leaks into losses without one. Unused, only logged, or weighted with 0: the same bytes."""
    rollout, gradients = batch(), []
    model = make_model("llama") if head == "plain" else softcapped()
    for use in (lambda entropy: 0.0, lambda entropy: entropy.detach().mean(), lambda entropy: 0.0 * entropy.sum()):
        model.zero_grad()
        logprobs, entropy = completion_logprobs(model, rollout, list(range(6)), 0.7)
        (logprobs.sum() + use(entropy)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


def test_softmax_is_taken_in_fp32():
    """Catches: log_softmax in bf16. The logprobs of a bf16 model are those of its logits, upcast; a second pass over
    the same rows gives the same bits, so that the first ratio is exactly 1."""
    model = make_model("llama").to(torch.bfloat16)
    rollout = batch()
    logprobs, _ = completion_logprobs(model, rollout, [2])
    rows = common.pack_rows(model, rollout, [2])
    logits = rows.run(model)[rows.predictor]
    expected = logits.float().log_softmax(-1).gather(1, rollout.completion_ids[2][:, None])[:, 0]
    assert logits.dtype == torch.bfloat16
    assert logprobs.dtype == torch.float32
    assert torch.allclose(logprobs[0], expected, atol=1e-5)
    again, _ = completion_logprobs(model, rollout, [2])
    assert torch.equal((again - logprobs).exp(), torch.ones_like(logprobs))


def test_dropout_is_off():
    """Catches: dropout on in rollouts or in the first update. A loaded policy is, and stays, in eval mode."""
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    rollout = sample_groups(model, ragged_prompts(), 4, 8)
    first, _ = completion_logprobs(model, rollout, list(range(12)))
    second, _ = completion_logprobs(model, rollout, list(range(12)))
    assert torch.equal(first, second)
    assert (first - rollout.sampler_logprobs).abs().max() < 1e-4
    assert not model.training


def test_a_head_that_can_not_be_tried_takes_the_slow_path():
    model = make_model("llama")
    model.get_output_embeddings = lambda: None
    assert not common.has_plain_head(model)
    logprobs, _ = completion_logprobs(model, batch(), [2])
    assert torch.allclose(logprobs[0][batch().mask[2]], one_at_a_time(model, batch(), 2), atol=1e-5)


def test_a_loaded_policy_keeps_nothing_of_a_generation_config_but_where_to_stop(tmp_path):
    """transformers refuses to save some hub models' sampling settings, such as a temperature without do_sample. The
    tokenizer's EOS always stops, whatever ids the config names."""
    model = make_model("llama", vocab_size=103)
    save_model(tmp_path / "model", model, common.load_tokenizer(EMBEDDED))
    poisoned = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": [7]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(poisoned))
    policy = common.load_policy(str(tmp_path / "model"), common.load_tokenizer(EMBEDDED))
    assert policy.generation_config.eos_token_id == [1, 7] and policy.generation_config.top_p in (None, 1.0)
    save_model(tmp_path / "again", policy, common.load_tokenizer(EMBEDDED))
    assert common.load_policy(str(tmp_path / "again"), None).generation_config.eos_token_id == [1, 7]


def test_values_are_read_before_the_token(model):
    """Catches: V misaligned by one. V(s_t) is read at the hidden state that predicts token t, so before it."""
    critic = AutoModelForTokenClassification.from_config(model.config, attn_implementation="eager").eval()
    rollout = batch()
    values = completion_values(critic, rollout, [4, 1])
    for row, got in zip((4, 1), values, strict=True):
        ids = list(rollout.prompt_ids[row // 2])
        for t, token in enumerate(rollout.completion_ids[row][rollout.mask[row]].tolist()):
            expected = critic(torch.tensor([ids]), use_cache=False).logits[0, -1, 0]
            assert torch.allclose(got[t], expected, atol=1e-5)
            ids.append(token)
    assert (values[~rollout.mask[[4, 1]]] == 0).all()


def test_a_critic_starts_at_zero():
    critic = common.load_value_model(EMBEDDED, None)
    prompts = [common.load_tokenizer(EMBEDDED)("1+1=").input_ids] * 3
    assert (completion_values(critic, make_rollout(prompts, COMPLETIONS), list(range(3))) == 0).all()
    assert not critic.training and critic.config.num_labels == 1


def test_scores_are_read_at_the_last_token_by_its_index(model):
    """Catches: the last token found by a search for the pad id, which stops short where a real token has that id. The
    mean kept in the config is subtracted."""
    model.config.num_labels = 1
    reward_model = AutoModelForSequenceClassification.from_config(model.config, attn_implementation="eager")
    reward_model.eval().config.score_mean = 0.5
    rollout = batch()
    rollout.completion_ids[4, 1] = rollout.completion_ids[4, 2] = 0  # the pad id, inside a completion
    scores = completion_scores(reward_model, rollout, [4, 1, 3])
    for row, score in zip((4, 1, 3), scores, strict=True):
        ids = rollout.prompt_ids[row // 2] + rollout.completion_ids[row][rollout.mask[row]].tolist()
        hidden = reward_model.base_model(torch.tensor([ids]), use_cache=False)[0][0, -1]
        assert torch.allclose(score, reward_model.score(hidden)[0] - 0.5, atol=1e-5)
