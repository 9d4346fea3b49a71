"""Models and tokenizers as people bring them: what their files say is respected, worked around, or refused in one
line."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from conftest import make_model, refusal, rl_args, run
from families import tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import common
import data
import train_grpo
import train_ppo
from plumbing import pairs, runs
from plumbing.engine import PlainDecoder, UncachedDecoder, batch_class, decoder_class

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def characters(special=SPECIAL, template=CHATML, **options) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters with the given special tokens; the first is its eos_token."""
    vocabulary = [*special, "?", *(chr(code) for code in range(32, 127) if chr(code) != "?"), "\n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    options = {"eos_token": special[0], "additional_special_tokens": special[1:], "chat_template": template} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def saved(tokenizer, directory, **config):
    """The directory of a small random model with this tokenizer, as its user has it."""
    model = make_model("llama", vocab_size=config.pop("vocab_size", len(tokenizer)), **config)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def sampled(tokenizer, text: str, stop: str | None = None, prompt: str = "?") -> common.Rollout:
    """A Rollout in which the policy wrote this text, and `stop`, if given, ended it."""
    (prompt_ids,) = data.encode_prompts(tokenizer, [prompt])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids += [] if stop is None else tokenizer.convert_tokens_to_ids([stop])
    return common.make_rollout([prompt_ids], [ids])


# ---- The end of a turn -----------------------------------------------------------------------------------------------


def test_a_turn_of_a_base_model_ends_as_its_template_says(tmp_path, capsys):
    """R1-Zero on a Qwen base: its eos_token is <|endoftext|>, its template ends turns with <|im_end|>. No completion
    ended there, SFT's targets did not, and a second turn doubled the token."""
    path = saved(characters(), tmp_path, eos_token_id=0)
    tokenizer = common.load_tokenizer(path)
    assert tokenizer.eos_token == "<|im_end|>"
    assert "ends a turn with <|im_end|>, not with the eos_token <|endoftext|>" in capsys.readouterr().out
    assert common.load_policy(path, tokenizer).generation_config.eos_token_id == [0, 2]
    assert data.encode_completions(tokenizer, ["ab"], data.encode_prompts(tokenizer, ["?"]))[0][-1] == 2
    follow_up = tokenizer.decode(data.follow_up_ids(tokenizer, "Sure?"))
    assert follow_up == "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    for stop in ("<|im_end|>", "<|endoftext|>"):
        rollout = sampled(tokenizer, "ab", stop)
        rollout.stop_ids = (0, 2)
        assert data.decode(tokenizer, rollout) == ["ab"]


@pytest.mark.parametrize(
    ("end", "template"),
    [
        ("<eos>", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"),  # no token ends a turn
        ("<eot>", "{% for m in messages %}{{ m.content | trim }}<eot>\n{% endfor %}<eos>"),  # Phi-3 ends the text, too
        ("<eot>", "{% for m in messages %}<sot>{{ m.content }}<eot>{% endfor %}"),  # Gemma
        ("<eos>", "{{ raise_exception('no') }}"),
        ("<eos>", None),
    ],
)
def test_the_token_that_ends_a_turn_is_found_by_rendering_one(end, template):
    assert common.end_of_turn(characters(["<eos>", "<sot>", "<eot>"], template)) == end


# ---- Text and token ids ----------------------------------------------------------------------------------------------


def metaspace(**options) -> PreTrainedTokenizerFast:
    """As Llama 2's: a text that is encoded alone begins with a space that nobody wrote."""
    vocabulary = ["</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", **options)


def test_a_completion_is_encoded_as_it_stands_after_its_prompt():
    tokenizer = metaspace()
    prompts = data.encode_prompts(tokenizer, ["1+2="])
    whole = tokenizer("1+2=three", add_special_tokens=False).input_ids
    assert tokenizer("three", add_special_tokens=False).input_ids != whole[len(prompts[0]) :]
    assert prompts[0] + data.encode_completions(tokenizer, ["three"], prompts)[0] == [*whole, 0]
    assert data.ids_after(tokenizer, prompts, [" x"])[0] == tokenizer.convert_tokens_to_ids(["▁", "x"])


def test_special_tokens_that_the_policy_wrote_are_text():
    """<think> as a special token was dropped from the text: format 0, and a right answer scored 0."""
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    tokenizer = characters([*SPECIAL, "<pad>", *tags], pad_token="<pad>")
    tokenizer.eos_token = "<|im_end|>"
    text = "<think>1</think><answer>2</answer>"
    assert data.decode(tokenizer, sampled(tokenizer, text, "<|im_end|>")) == [text]
    assert data.decode(tokenizer, sampled(tokenizer, text)) == [text]  # not finished: nothing is cut off
    assert data.decode(tokenizer, sampled(tokenizer, "<pad>1<pad>")) == ["1"]


@pytest.mark.parametrize("head", ["<think>", "<think>\n\n</think>\n\n"])
def test_a_think_block_of_the_template_counts_as_written(head):
    tokenizer = characters(template=CHATML.replace("assistant\n", "assistant\n" + head.replace("\n", "\\n")))
    tokenizer.chat_template = CHATML.replace("assistant\n", "assistant\n" + head)
    tokenizer.eos_token = "<|im_end|>"
    rollout = sampled(tokenizer, "1")
    assert data.decode(tokenizer, rollout) == [head + "1"]
    assert data.encode_completions(tokenizer, [head + "1"], rollout.prompt_ids)[0] == [
        *tokenizer("1").input_ids,
        tokenizer.eos_token_id,
    ]


def test_a_prompt_does_not_end_in_eos():
    """Some tokenizers append EOS to every text: the prompt of a model without a chat template ended in it."""
    tokenizer = characters(template=None)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenizer("1+2=").input_ids[-1] == 0
    assert tokenizer.decode(data.encode_prompts(tokenizer, ["1+2="])[0]) == "1+2="


@pytest.mark.parametrize("template", [CHATML, None])
def test_special_tokens_in_a_question_are_text(template):
    """A question about <|im_end|> closed its own turn."""
    tokenizer = characters(template=template)
    (ids,) = data.encode_prompts(tokenizer, ["What is <|im_end|>?"])
    assert "What is <|im_end|>?" in tokenizer.decode(ids)
    assert ids.count(2) == (1 if template else 0)  # the turn's own end
    plain = data.encode_prompts(tokenizer, ["What is it?"])[0]
    assert plain.count(2) == (1 if template else 0)


def test_a_target_ends_once():
    tokenizer = characters()
    prompts = data.encode_prompts(tokenizer, ["?"])
    (ids,) = data.encode_completions(tokenizer, ["ab<|endoftext|>"], prompts)
    assert ids.count(0) == 1 and ids[-1] == 0


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for m in messages %}{% for part in m.content if part.text %}{{ part.text }}{% endfor %}{% endfor %}",
            "it",
        ),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{% for %}", "Expected"),
    ],
)
def test_a_template_that_cannot_show_the_question_is_refused(template, said, capsys):
    error = refusal(lambda _: data.encode_prompts(characters(template=template), ["1+2="]), None, capsys)
    assert "can't render '1+2='" in error and said in error


# ---- Vocabularies ----------------------------------------------------------------------------------------------------


def test_ids_without_a_token_have_no_probability(tmp_path):
    """Padded embeddings: unused ids were sampled, decoded to nothing and got a reward."""
    path = saved(characters(), tmp_path, vocab_size=128, eos_token_id=0)
    tokenizer, plain = common.load_tokenizer(path), AutoModelForCausalLM.from_pretrained(path)
    policy, used = common.load_policy(path, tokenizer), len(tokenizer)
    rollout = common.sample_groups(policy, [[5, 6, 7], [8]], 32, 20, temperature=2.0, eos_token_ids=[1])
    assert rollout.completion_ids.max() < used < 128
    logprobs, entropy = common.completion_logprobs(policy, rollout, list(range(64)), 2.0)
    assert (logprobs - rollout.sampler_logprobs).abs().max() < 1e-4
    ids = torch.tensor([rollout.prompt_ids[0] + rollout.completion_ids[0][rollout.mask[0]].tolist()])
    expected = (plain(ids).logits[0, 2:-1, :used] / 2).log_softmax(-1)
    assert torch.allclose(logprobs[0][rollout.mask[0]], expected.gather(1, ids[0, 3:, None])[:, 0], atol=1e-4)
    assert torch.allclose(entropy[0][rollout.mask[0]], -(expected.exp() * expected).sum(-1), atol=1e-4)
    (logprobs.sum() + entropy.sum()).backward()
    gradient = policy.lm_head.weight.grad
    assert gradient.isfinite().all() and (gradient[used:] == 0).all() and (gradient[:used] != 0).any()
    generated = policy.generate(torch.tensor([[5, 6]]), do_sample=True, max_new_tokens=30, num_return_sequences=32)
    assert generated.max() < used  # transformers' own sampling leaves them out, too


def test_embeddings_smaller_than_the_vocabulary_are_refused(tmp_path, capsys):
    path = saved(characters(), tmp_path, vocab_size=90)
    error = refusal(lambda _: common.load_policy(path, common.load_tokenizer(path)), None, capsys)
    assert "past the model's 90 embeddings" in error


# ---- Configs and weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions", "output_router_logits"])
def test_output_flags_of_a_config_are_off(flag, tmp_path):
    """A traceback in the first pass, or a run that could not be saved at its end."""
    name = "mixtral" if "router" in flag else "llama"
    model = tiny_model(name)[0]
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {flag: True, "return_dict": False}))
    policy = common.load_policy(str(tmp_path), None)
    common.sample_groups(policy, [[5, 6]], 2, 4, eos_token_ids=1)
    runs.save_model(tmp_path / "final", policy, characters())
    assert not getattr(AutoModelForCausalLM.from_pretrained(tmp_path / "final").config, flag, False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path, capsys):
    """They were evaluated as an accuracy of 0, with exit code 0."""
    model = make_model("llama")
    model.lm_head.weight.data[3] = value
    model.save_pretrained(tmp_path)
    policy = common.load_policy(str(tmp_path), None)
    error = refusal(lambda _: common.sample_groups(policy, [[5]], 1, 2, eos_token_ids=1), None, capsys)
    assert "its outputs are NaN or infinite" in error


def test_a_way_that_is_not_exact_is_not_taken(capsys):
    """Layers that attend twice share a cache slot of the group decoder; others have no cache that could be used."""
    twice, recurrent = tiny_model("diffllama")[0], tiny_model("mamba")[0]
    assert decoder_class(twice) is PlainDecoder and "GroupDecoder: its outputs differ by" in capsys.readouterr().err
    assert decoder_class(recurrent) is UncachedDecoder and "which is slow" in capsys.readouterr().err
    broken = make_model("llama")
    broken.base_model.layers[0].self_attn.register_forward_hook(
        lambda _, __, out: (out[0] + out[0].mean(1, True), None)
    )
    error = refusal(lambda _: batch_class(broken), None, capsys)
    assert "can't be run exactly here" in error and "not causal" in error


def test_the_context_of_a_rope_that_changes_is_its_original_one():
    """Past it a row's logprobs depended on the other rows of its micro-batch."""
    assert common.context_length(tiny_model("phi3+rope_longrope")[1]) == 16
    assert common.context_length(tiny_model("llama")[1]) > 16


# ---- Saved models ----------------------------------------------------------------------------------------------------


def test_a_reward_model_scores_the_same_in_transformers(tmp_path):
    """With pad = EOS, transformers reads the token before the EOS."""
    tokenizer = characters(pad_token="<|endoftext|>")
    path = saved(tokenizer, tmp_path / "policy")
    rm = common.load_reward_model(path, None, new_head=True)
    rm.score.weight.data.normal_()
    rm.config.pad_token_id = tokenizer.pad_token_id = common.pad_apart(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    runs.save_model(tmp_path / "final", rm, tokenizer)
    texts = ["1+2=3", "1+20=21<|endoftext|>", "7"]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    ours = common.rollout_scores(rm, common.make_rollout([[i[0]] for i in ids], [i[1:] or i for i in ids]), 1000)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    reader = AutoTokenizer.from_pretrained(tmp_path / "final")
    with torch.no_grad():
        alone = torch.stack([plain(torch.tensor([i])).logits[0, 0] for i in ids])
        batched = plain(**reader(texts, add_special_tokens=False, padding=True, return_tensors="pt")).logits[:, 0]
    assert torch.allclose(ours[:2], alone[:2], atol=1e-5) and torch.allclose(alone, batched, atol=1e-5)


def test_a_checkpoint_takes_any_file(saved_run, tmp_path):
    """Named templates are a folder of the tokenizer; .DS_Store made a checkpoint count as damaged."""
    tokenizer = characters()
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML}
    target = tmp_path / "checkpoints" / "step_000001"
    runs.save_model(target, make_model("llama"), tokenizer, {"progress": {}})
    (target / ".DS_Store").write_text("")
    assert runs.load_checkpoint(str(tmp_path))["model"] == str(target)
    changed = next(path for path in target.rglob("*") if "tool_use" in path.name)
    changed.write_text("changed")
    with pytest.raises(SystemExit):
        runs.load_checkpoint(str(tmp_path))


ROPE = {"rope_type": "default", "rope_theta": 123456.0}


def test_a_saved_model_has_the_names_of_transformers_4(tmp_path):
    model = make_model("llama", rope_parameters=ROPE)
    runs.save_model(tmp_path / "final", model, characters())
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 123456.0 and not config["rope_scaling"]
    settings = json.loads((tmp_path / "final" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == SPECIAL[1:] and "extra_special_tokens" not in settings
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert again.config.rope_parameters["rope_theta"] == 123456.0
    assert AutoTokenizer.from_pretrained(tmp_path / "final").all_special_tokens == characters().all_special_tokens


READER = """
import sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer("1+2=3", add_special_tokens=False, return_tensors="pt").input_ids
print(model(ids).logits.double().sum().item(), ids.tolist())
"""


@pytest.mark.slow
def test_transformers_4_reads_a_saved_model(tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(target)]
    command += ["transformers==4.57.1", "huggingface_hub<1", "tokenizers<0.23"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("transformers 4 can't be installed here")
    tokenizer, model = characters(), make_model("llama", rope_parameters=ROPE, vocab_size=len(characters()))
    runs.save_model(tmp_path / "final", model, tokenizer)
    read = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "final")],
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert read.returncode == 0, read.stderr
    total, ids = read.stdout.strip().split(" ", 1)
    expected = tokenizer("1+2=3", add_special_tokens=False, return_tensors="pt").input_ids
    assert json.loads(ids) == expected.tolist()
    assert float(total) == pytest.approx(model(expected).logits.double().sum().item(), rel=1e-4)


# ---- Runs ------------------------------------------------------------------------------------------------------------


def test_a_run_on_a_base_model_stops_at_the_end_of_a_turn(tmp_path):
    """The field's first experiment, R1-Zero on a base with a chat template, on a random model that ends at random."""
    path = saved(characters(), tmp_path / "base", vocab_size=128, eos_token_id=0, max_position_embeddings=512)
    run_dir = run(train_grpo.main, rl_args(train_grpo, tmp_path, model=path, iterations=1, max_new_tokens=60))
    final = common.load_tokenizer(str(run_dir / "final"))
    assert final.eos_token == "<|im_end|>"
    assert AutoModelForCausalLM.from_pretrained(run_dir / "final").generation_config.eos_token_id == [0, 2]


def test_one_token_is_whitened_to_0():
    assert train_ppo.whiten(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("changed", ["prompt_ids", "answer"])
def test_a_resume_with_other_problems_is_refused(changed, capsys):
    """A shuffled file, another answer or a new date in the template went on in silence as another run."""
    problems = [data.Problem(f"{i}+1=", str(i + 1), prompt_ids=(i, 7)) for i in range(4)]
    state = data.ProblemSampler(problems).state_dict()
    data.ProblemSampler(list(problems)).load_state_dict(state)
    other = [*problems[:3], dataclasses.replace(problems[3], **{changed: (9, 9) if changed == "prompt_ids" else "5"})]
    for items in (other, problems[::-1]):
        said = refusal(lambda _, i=items: data.ProblemSampler(i).load_state_dict(state), None, capsys)
        assert "are not those of the run" in said
    assert ("the answers" if changed == "answer" else "the prompts' tokens") in said


def test_training_on_a_sample_trains_the_ids_that_were_sampled(tmp_path):
    """Encoded anew, a text may have other ids than the policy sampled; those of another tokenizer are not taken."""
    tokenizer = characters(["<|im_end|>", "ab"], template=None)  # "ab" is one token, or two
    question, sampled = "1+2=", tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    assert tokenizer("abc").input_ids != sampled
    completion = {"text": "abc", "reward": 1.0, "correct": True, "finished": True}
    for ids, trained in (
        (sampled, sampled),
        ([7, 8, 9], tokenizer("abc").input_ids),
        (None, tokenizer("abc").input_ids),
    ):
        own = completion | ({} if ids is None else {"ids": ids})
        worse = own | {"reward": 0.0, "correct": False, "text": "abcd"}
        row = {"question": question, "completions": [own, worse]}
        (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
        (demonstration,) = data.load_demonstrations(str(tmp_path / "samples.jsonl"), 1)
        (demonstration,) = data.encode_demonstrations(tokenizer, [demonstration], "", 64)
        assert list(demonstration.completion_ids) == [*trained, 0]
        (pair,) = pairs.encode_pairs(tokenizer, pairs.load_preference_pairs(str(tmp_path / "samples.jsonl")), "", 64)
        assert list(pair.chosen_ids) == [*trained, 0] and list(pair.rejected_ids) == [*tokenizer("abcd").input_ids, 0]


def test_a_temperature_that_leaves_no_number_is_refused(capsys):
    error = refusal(
        lambda _: common.sample_groups(make_model("llama"), [[5]], 1, 2, temperature=1e-40, eos_token_ids=1),
        None,
        capsys,
    )
    assert "NaN or infinite logprobs" in error
