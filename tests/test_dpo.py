"""DPO's mathematics (identities in float64), its pairs, and whole runs."""

import json
import math
import shutil
from collections import Counter

import pytest
import torch
from conftest import EMBEDDED, assert_same_events, make_model, refusal, remember, run, scalars, short_args, weights
from test_bad_input import no_model, refuse  # noqa: F401  (a fixture)
from test_resume import StopAtIterationThree
from torch.nn.functional import logsigmoid

import common
import evaluate
import plumbing.runs
import train_dpo
from data import encode_prompts, is_held_out
from plumbing.engine import PaddedRows
from plumbing.flags import parse_args
from plumbing.pairs import (
    Pair,
    PairFlags,
    encode_pairs,
    length_metrics,
    load_preference_pairs,
    pair_micro_batches,
    pair_rollout,
)
from rewards import ABSENT, Verifier, accuracy_reward, format_reward
from train_dpo import dpo_loss, reference_logprobs, sequence_logps


def double(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def four(rows: int = 5) -> list[torch.Tensor]:
    """chosen, rejected, ref_chosen, ref_rejected"""
    return list(double(4, rows))


def pair_of(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    return Pair("", "", "", prompt_ids=tuple(prompt), chosen_ids=tuple(chosen), rejected_ids=tuple(rejected))


# ---- The loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_at_the_reference_the_loss_is_log_2(beta):
    chosen, rejected, _, _ = four()
    loss, metrics = dpo_loss(chosen, rejected, chosen, rejected, beta)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert metrics["rewards/margin"] == 0 and metrics["rewards/accuracy"] == 0.5


def test_swapped_pairs_negate_delta():
    """Catches: chosen and rejected swapped; the loss would still fall."""
    chosen, rejected, ref_chosen, ref_rejected = four()
    _, metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3)
    _, swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, 0.3)
    assert metrics["rewards/margin"] == pytest.approx(-swapped["rewards/margin"])
    assert metrics["rewards/chosen"] == pytest.approx(swapped["rewards/rejected"])
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)
    assert metrics["rewards/margin"] == pytest.approx(0.3 * delta.mean().item())


def test_the_gradient_is_beta_sigmoid_of_minus_beta_delta():
    """Section 4 of the paper: up for the chosen, down for the rejected, most if the pair is ranked wrongly."""
    chosen, rejected, ref_chosen, ref_rejected = four()
    chosen.requires_grad_(), rejected.requires_grad_()
    loss, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.7)
    loss.backward()
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)
    expected = 0.7 * torch.sigmoid(-0.7 * delta) / 5
    assert torch.allclose(chosen.grad, -expected) and torch.allclose(rejected.grad, expected)


def test_ipo_simpo_and_label_smoothing_by_hand():
    chosen, rejected, ref_chosen, ref_rejected = four()
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)
    ipo, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.1, "ipo")
    assert ipo.item() == pytest.approx(((delta - 5) ** 2).mean().item())  # 1 / (2 * 0.1) = 5
    simpo, _ = dpo_loss(chosen, rejected, None, None, 2.0, "simpo", gamma=1.0)
    assert simpo.item() == pytest.approx(-logsigmoid(2 * (chosen - rejected) - 1).mean().item())
    smooth, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.5, label_smoothing=0.1)
    expected = -0.9 * logsigmoid(0.5 * delta) - 0.1 * logsigmoid(-0.5 * delta)
    assert smooth.item() == pytest.approx(expected.mean().item())
    plain, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.5, gamma=3.0)
    assert plain.item() == pytest.approx(-logsigmoid(0.5 * delta).mean().item())  # gamma is SimPO's alone
    with pytest.raises(ValueError):
        dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 2.0, "simpo")


def test_row_weights_replace_the_mean():
    values, w = four(), torch.tensor([0.5, 0.0, 0.2, 0.2, 0.1], dtype=torch.float64)
    rows = torch.stack([dpo_loss(*(v[i : i + 1] for v in values), 0.5)[0] for i in range(5)])
    assert dpo_loss(*values, 0.5)[0].item() == pytest.approx(rows.mean().item())
    assert dpo_loss(*values, 0.5, row_weights=w)[0].item() == pytest.approx((w * rows).sum().item())


def test_sums_or_means_over_the_tokens():
    """Catches: a mean over the padded length, or a sum where the mean was asked for."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -2.0], [-1.0, -2.0, 0.0, 0.0]])
    assert sequence_logps(logprobs, mask, mean=False).tolist() == [-8.0, -3.0]
    assert sequence_logps(logprobs, mask, mean=True).tolist() == [-2.0, -1.5]


def bandit(beta: float, reward: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """The policy over arms that minimises DPO's loss on all pairs, weighted by how often ref draws them and by
    Bradley-Terry's chance that the first is preferred."""
    logits = ref.log().clone().requires_grad_()
    i, j = (index.flatten() for index in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    pair_weights = (ref[i] * ref[j] * torch.sigmoid(reward[i] - reward[j]))[i != j]
    i, j = i[i != j], j[i != j]
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0.0)

    def closure():
        optimizer.zero_grad()
        logps, ref_logps = logits.log_softmax(0), ref.log()
        loss, _ = dpo_loss(logps[i], logps[j], ref_logps[i], ref_logps[j], beta, row_weights=pair_weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)


def test_a_bandit_converges_to_the_tilted_reference():
    """ref * exp(r / beta) / Z, the optimum of E[r] - beta KL (eq. 4 of the paper): DPO's whole point."""
    reward = torch.tensor([1.0, 0.2, -0.5, 0.4], dtype=torch.float64)
    ref = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    distances = []
    for beta in (0.3, 1.0, 3.0):
        policy, expected = bandit(beta, reward, ref), ref * (reward / beta).exp()
        assert torch.allclose(policy, expected / expected.sum(), atol=1e-5)
        distances.append((policy * (policy / ref).log()).sum().item())
    assert distances[0] > distances[1] > distances[2] > 0  # the larger beta, the closer to the reference


def test_the_gradient_does_not_depend_on_micro_batches():
    """Catches: a loss normalised per micro-batch, a pair split over two of them, or swapped sides if the rejected
    completion is the shorter one, also in the logged lengths."""
    model = make_model("llama").double()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    completions = [([14, 15, 16, 17, 1], [18, 1]), ([19, 1], [20, 21, 22, 23, 24, 1]), ([25, 1], [26, 27, 1])]
    rollout = pair_rollout([pair_of(prompt, *sides) for prompt, sides in zip(prompts, completions, strict=True)], "cpu")
    assert rollout.prompt_ids == prompts and rollout.group_size == 2
    assert [ids[m].tolist() for ids, m in zip(rollout.completion_ids, rollout.mask, strict=True)] == sum(
        map(list, completions), []
    )
    assert [tokens.item() for tokens in length_metrics(rollout).values()] == pytest.approx([9 / 3, 11 / 3])
    row_weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    gradients = []
    for budget in (1, 28, 1000):
        batches = pair_micro_batches(rollout, budget)
        assert len(batches) == {1: 3, 28: 2, 1000: 1}[budget]
        for micro in batches:
            assert all(b == a + 1 and a % 2 == 0 for a, b in zip(micro[0::2], micro[1::2], strict=True))
            logprobs, _ = common.completion_logprobs(model, rollout, micro)
            logps = sequence_logps(logprobs, rollout.mask[micro], mean=False).double()
            ref = 0.9 * logps.detach()
            weights = row_weights[[row // 2 for row in micro[0::2]]]
            dpo_loss(logps[0::2], logps[1::2], ref[0::2], ref[1::2], 0.1, row_weights=weights)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, atol=1e-5 * gradients[0].abs().max().item())


# ---- The pairs -------------------------------------------------------------------------------------------------------


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sample(text: str, reward: float, finished: bool = True) -> dict:
    return {"text": text, "reward": reward, "correct": reward >= 1, "length": len(text), "finished": finished}


def test_all_pairs_of_a_samples_file(tmp_path, capsys):
    """Three different scores give three pairs, the better one chosen; drops are counted."""
    rows = [
        {
            "question": "1+1=",
            "topic": "add",
            "completions": [sample("a", 0.0), sample("b", 1.2, False), sample("c", 0.2)],
        },
        {"question": "1+1=", "completions": [sample("d", 0.0), sample("e", 1.0)]},
        {"question": "2+2=", "completions": [sample("f", 1.0), sample("f", 1.0), sample("g", 0.99)]},
        {"question": "3+3=", "completions": [sample("h", 1.0), sample("i", 1.0)]},
    ]
    file = write(tmp_path / "s.jsonl", rows)
    pairs = load_preference_pairs(file, flags=PairFlags(min_gap=0.05))
    assert {(p.chosen, p.rejected) for p in pairs} == {("b", "a"), ("b", "c"), ("c", "a")}
    assert {p.chosen_finished for p in pairs if p.chosen == "b"} == {False} and all(p.rejected_finished for p in pairs)
    assert all(p.topic == "add" and p.weight == 1.0 for p in pairs)
    printed = capsys.readouterr().out
    for text in ("3 of 1 prompts", "1 duplicate texts", "1 duplicate prompts", "1 near ties"):
        assert text in printed
    by_gap = load_preference_pairs(file, flags=PairFlags(min_gap=0.05, pair_weight="gap"))
    weighted = {(p.chosen, p.rejected): p.weight for p in by_gap}
    assert weighted["b", "a"] == pytest.approx(1.2 / 0.8) and weighted["c", "a"] == pytest.approx(0.2 / 0.8)
    assert sum(weighted.values()) == pytest.approx(3)
    assert len(load_preference_pairs(file, flags=PairFlags(min_gap=0.05, max_pairs_per_prompt=2))) == 2
    assert "1 over --max-pairs-per-prompt" in capsys.readouterr().out
    near = {(p.chosen, p.rejected) for p in load_preference_pairs(file, flags=PairFlags(min_gap=0.0))}
    assert ("f", "g") in near and not {("h", "i"), ("i", "h")} & near  # equal scores are no preference


def test_the_turns_and_the_mode_of_a_sample_reach_its_pair(tmp_path):
    """Catches: pairs trained on other prompts than their completions were sampled for; a problem's second mode taken
    for a duplicate of the first."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1="}]
    row = {"question": turns, "completions": [sample("a", 0.0), sample("b", 1.0)]}
    rows = [row, row | {"mode": "think"}, row | {"mode": "no_think"}, {**row, "question": "1+1=", "mode": "think"}]
    pairs = load_preference_pairs(write(tmp_path / "s.jsonl", rows[:3]))
    assert [(p.question, p.messages) for p in pairs] == [
        (asked, (("system", "s"), ("user", asked))) for asked in ("1+1=", "1+1= /think", "1+1= /no_think")
    ]
    (pair,) = load_preference_pairs(write(tmp_path / "t.jsonl", rows[3:]))
    assert (pair.question, pair.messages) == ("1+1= /think", None)


def test_a_sampled_pair_has_its_problem(tmp_path, capsys):
    """Catches: an answer that is a worked one, or 0, and so matches nothing; a task's columns lost to its verifier."""
    worked = {"question": "1+1=", "answer": "1+1 = 2\n#### 2", "mode": "think"}
    game = {"question": "make 3", "task": "countdown", "nums": [1, 2], "target": 3}
    rows = [worked, {"question": "1-1=", "answer": 0}, game, {"question": "Write a poem."}]
    rows = [row | {"completions": [sample("a", 0.0), sample("b", 1.0)]} for row in rows]
    problems = [pair.problem for pair in load_preference_pairs(write(tmp_path / "s.jsonl", rows))]
    assert [(p.question, p.answer) for p in problems[:2]] == [("1+1=", "2"), ("1-1=", "0")]
    texts = [f"<answer>{answer}</answer>" for answer in ("2", "0", "1+2", "x")]
    assert Verifier()(texts, problems) == [1.0, 1.0, 1.0, ABSENT]
    file = write(tmp_path / "t.jsonl", [rows[0] | {"answer": "####"}])
    assert "t.jsonl:1: field 'answer' has nothing after '####'" in refusal(load_preference_pairs, file, capsys)


def test_a_system_turn_makes_another_prompt(tmp_path):
    """Catches: pairs dropped as duplicates, or counted as one prompt's, because only their system turns differ."""
    rows = []
    for system in ("be brief", "be kind"):
        prompt = [{"role": "system", "content": system}, {"role": "user", "content": "1+1="}]
        rows += [{"prompt": prompt, "chosen": chosen, "rejected": "3"} for chosen in ("2", "two")]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    pairs = load_preference_pairs(str(file), flags=PairFlags(max_pairs_per_prompt=1))
    assert sorted(pair.messages[0][1] for pair in pairs) == ["be brief", "be kind"]
    assert len(load_preference_pairs(str(file))) == 4


def test_topics_are_balanced_by_dropping(tmp_path, capsys):
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b", "topic": "xyy"[i % 3]} for i in range(30)]
    balanced = PairFlags(balance_topics=True)
    pairs = load_preference_pairs(write(tmp_path / "p.jsonl", rows), flags=balanced)
    assert sorted(p.topic for p in pairs) == ["x"] * 10 + ["y"] * 10
    assert "10 to balance topics" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        load_preference_pairs(write(tmp_path / "q.jsonl", [row | {"topic": "x"} for row in rows]), flags=balanced)
    assert "does not name two topics" in capsys.readouterr().err


def test_lengths_are_balanced_by_dropping(embedded, capsys):
    """Catches: lengths balanced over both splits together, or counted in characters; other pairs in a second run; pairs
    of equal lengths dropped."""
    sides = [("1", "2 3"), ("4 5", "6"), ("4 5", "7"), ("4 5", "8"), ("1", "9"), ("14", "2")]
    pairs = [Pair(f"{i}+1=", *sides[i % 6]) for i in range(600)]
    encoded, balanced = (encode_pairs(embedded[1], pairs, "", 256, 1, PairFlags(balance_lengths=b)) for b in (0, 1))
    for held_out in (False, True):
        all_of, kept = ([p for p in some if is_held_out(p.question) == held_out] for some in (encoded, balanced))
        before, after = (Counter(len(p.chosen_ids) - len(p.rejected_ids) for p in some) for some in (all_of, kept))
        assert after[0] == before[0] > 0
        assert sum(after[d] for d in after if d > 0) == sum(after[d] for d in after if d < 0) > 0
    dropped = 600 - len(balanced)
    assert f"pairs: {600 - dropped} of 600 left; dropped: {dropped} to balance lengths\n" in capsys.readouterr().out
    again, other = (encode_pairs(embedded[1], pairs, "", 256, s, PairFlags(balance_lengths=True)) for s in (1, 2))
    assert again == balanced != other
    one_sided = [Pair(pair.question, "1 2", "3") for pair in pairs]
    flags = PairFlags(balance_lengths=True)
    said = refusal(lambda _: encode_pairs(embedded[1], one_sided, "", 256, 1, flags), None, capsys)
    assert "--balance-lengths: of completions that differ in length, the longer one is chosen in every pair" in said


def test_pairs_of_the_embedded_model():
    """The pairs are the same every time; the better completion is chosen; their questions are of both splits."""
    few = PairFlags(pair_problems=60)
    pairs = load_preference_pairs("arithmetic-pairs", flags=few)
    assert pairs == load_preference_pairs("arithmetic-pairs", flags=few)
    assert len({p.question for p in pairs}) > 40 and {is_held_out(p.question) for p in pairs} == {True, False}
    for pair in pairs:
        answer = str(eval(pair.question.rstrip("=")))
        chosen, rejected = (
            accuracy_reward(text, answer) + 0.2 * format_reward(text) for text in (pair.chosen, pair.rejected)
        )
        assert chosen > rejected


def test_the_samples_file_of_evaluate_is_read(tmp_path):
    """The right completions are chosen, because in that file a completion's reward is its correctness."""
    file = str(tmp_path / "samples.jsonl")
    args = {"model": EMBEDDED, "device": "cpu", "eval_problems": 24, "num_samples": 6, "split": "all"}
    evaluate.main(evaluate.Args(**args, output=file))
    pairs = load_preference_pairs(file)
    assert len(pairs) > 24 and all(pair.id.startswith(f"{file}:") and pair.topic for pair in pairs)
    for pair in pairs:
        answer = str(eval(pair.question.rstrip("=")))
        rewards = [accuracy_reward(text, answer) for text in (pair.chosen, pair.rejected)]
        assert rewards == [1.0, 0.0]


BAD_PAIRS = [
    ([{"prompt": "1+1=", "chosen": "2"}], "p.jsonl:2: no field 'rejected'"),
    ([{"prompt": "1+1=", "rejected": "2"}], "p.jsonl:2: no field 'chosen'"),
    ([{"chosen": "2", "rejected": "3"}], "p.jsonl:2: no field 'question'"),
    ([{"prompt": "1+1=", "chosen": ["2"], "rejected": "2"}], "p.jsonl:2: field 'chosen': each message needs a role"),
    ([{"prompt": "1+1=", "chosen": {"a": 1}, "rejected": "2"}], "p.jsonl:2: field 'chosen' is of type dict"),
    ([{"prompt": "1+" * 140 + "1=", "chosen": "2", "rejected": "3"}], "leaves no room in the model's context of 256"),
]
BAD_SAMPLES = [
    ([{"question": "2+2="}], "p.jsonl:2: no field 'completions'"),
    ([{"question": "2+2=", "completions": [{"text": "a"}]}], "p.jsonl:2: a completion's 'reward' is None"),
    ([{"question": "2+2=", "completions": [{"reward": 1.0}]}], "p.jsonl:2: a completion has no field 'text'"),
    ([], "no prompt has two completions whose scores differ"),
]


@pytest.mark.parametrize(
    "rows,message", BAD_PAIRS + BAD_SAMPLES, ids=[message for _, message in BAD_PAIRS + BAD_SAMPLES]
)
def test_bad_pairs_are_refused_by_line(rows, message, tmp_path, capsys, no_model):  # noqa: F811
    first = {"prompt": "0+1=", "chosen": "1", "rejected": "2"}
    if (rows, message) in BAD_SAMPLES:
        first = {"prompt": "0+1=", "completions": [sample("a", 1.0), sample("b", 1.0)]}
    flags = {"model": EMBEDDED, "data": write(tmp_path / "p.jsonl", [first, *rows]), "run_root": tmp_path / "r"}
    assert message in refuse(train_dpo, flags, capsys)
    assert not (tmp_path / "r").exists()


BAD_FLAGS = [
    ({"loss": "simpo", "kl_coef": 0.1}, "--loss simpo has no reference: --kl-coef doesn't go with it"),
    ({"label_smoothing": 0.5}, "--label-smoothing 0.5: must be under 0.5"),
    ({"loss": "ipo", "label_smoothing": 0.1}, "and 0 with --loss ipo"),
    ({"beta": 0.0}, "--beta 0.0: must be more than 0"),
    ({"max_pairs_per_prompt": 0}, "--max-pairs-per-prompt 0: must be 1 or more"),
    ({"pair_weight": "gap"}, "--pair-weight gap: "),
    ({"balance_lengths": True, "balance_topics": True}, "--balance-lengths: doesn't go with --balance-topics"),
    ({}, "--minibatch-size 64: only"),
]


@pytest.mark.parametrize("flags,message", BAD_FLAGS, ids=[message for _, message in BAD_FLAGS])
def test_bad_flags(flags, message, tmp_path, capsys, no_model):  # noqa: F811
    data = write(tmp_path / "p.jsonl", [{"prompt": "0+1=", "chosen": "1", "rejected": "2"}])
    flags = {"model": EMBEDDED, "device": "cpu", "data": data, "run_root": tmp_path / "r"} | flags
    assert message in refuse(train_dpo, flags, capsys)
    assert not (tmp_path / "r").exists()


class Merging:
    """A tokenizer that merges "=" and "2" where they meet in one text, adds a BOS unless told not to, and has a
    template that writes one."""

    eos_token_id, eos_token, chat_template, added_tokens_decoder = 1, "<eos>", "yes", {}
    ids = {"<bos>": 2, "=2": 3, "=": 4, "2": 5, "1": 6, "+": 7, "3": 8}

    def __call__(self, texts, add_special_tokens=True):
        def encode(text: str) -> list[int]:
            ids = [2] if add_special_tokens else []
            while text:
                token = next(token for token in self.ids if text.startswith(token))
                ids, text = [*ids, self.ids[token]], text[len(token) :]
            return ids

        class Encoded:
            input_ids = [encode(text) for text in texts]

        return Encoded

    def apply_chat_template(self, chat, add_generation_prompt, tokenize):
        return "<bos>" + chat[-1]["content"]

    def batch_decode(self, rows):
        return ["" for _ in rows]


def test_ids_are_concatenated_with_one_bos_and_an_eos():
    """Catches: prompt and completion tokenised as one text, so that tokens merge at the boundary; BOS twice; no EOS;
    an EOS after a completion that was cut."""
    pairs = [Pair("1+1=", "2", "3", rejected_finished=False)]
    (pair,) = encode_pairs(Merging(), pairs, "", 100)
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ((2, 6, 7, 6, 4), (5, 1), (8,))
    rollout = pair_rollout([pair], "cpu")
    ids = PaddedRows(rollout.prompt_ids, rollout.completion_ids, rollout.mask, torch.tensor([0, 0])).ids
    assert ids.tolist() == [[2, 6, 7, 6, 4, 5, 1], [2, 6, 7, 6, 4, 8, 0]]
    assert rollout.mask.tolist() == [[True, True], [True, False]]


def test_pairs_that_the_context_would_cut_are_dropped_and_counted(embedded, capsys):
    """Catches: truncation that cuts off a completion's end, or all of it."""
    pairs = [Pair("1+1=", "2", "3" * n) for n in (5, 300)] + [Pair("1+1=", "3" * 300, "2")]
    (kept,) = encode_pairs(embedded[1], pairs, "", 256)
    assert kept == pairs[0]
    assert all(ids[-1] == embedded[1].eos_token_id for ids in (kept.chosen_ids, kept.rejected_ids))
    assert len(encode_pairs(embedded[1], pairs, "", 4 + 300 + 1)) == 3  # to the token
    assert "pairs: 1 of 3 left; dropped: 2 longer than the context of 256" in capsys.readouterr().out


def test_a_think_tag_in_the_prompt_is_not_repeated(embedded):
    """If the template opens the think block, the prompt ends with the tag that decoding puts before the text."""
    tokenizer = common.load_tokenizer(EMBEDDED)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}<think>"
    pairs = [Pair("1+1=", "<think>2</think>2", "<think>3</think>3")]
    (pair,) = encode_pairs(tokenizer, pairs, "", 256)
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids[:-1]).replace(" ", "") == "1+1=<think>2</think>2"


# ---- The reference's logprobs ----------------------------------------------------------------------------------------


def test_the_references_logprobs_are_those_of_the_pairs(embedded):
    """Row 2i is pair i's chosen completion, row 2i + 1 its rejected one, in any micro-batch."""
    policy, tokenizer = embedded
    pairs = encode_pairs(tokenizer, [Pair("1+1=", "<think>2", "3"), Pair("12-5=", "7", "8</answer>")], "", 256)
    with torch.no_grad():
        expected = common.completion_logprobs(policy, pair_rollout(pairs, "cpu"), [0, 1, 2, 3])[0]
    for max_tokens in (4096, 1):
        assert torch.allclose(reference_logprobs(policy, pairs, max_tokens), expected, atol=1e-5)


# ---- Whole runs ------------------------------------------------------------------------------------------------------

TINY = {"pair_problems": 20, "eval_problems": 2, "max_new_tokens": 12}
TAGS = """
    rewards/chosen rewards/rejected rewards/margin rewards/accuracy logps/chosen logps/rejected
    rollout/length_chosen rollout/length_rejected
    loss/policy loss/pair_kl loss/entropy loss/grad_norm loss/learning_rate eval/pair_accuracy eval/pair_margin
    eval/pair_length eval/pair_loss eval/pairs eval/calibration eval/kl eval/win_rate eval/accuracy eval/accuracy_greedy
    eval/format eval/length
    time/update memory/peak_gb
""".split()


def assert_begins_at_the_reference(values: dict[str, list[float]]) -> None:
    """All tags are logged, and before the first update each pair is a tie."""
    assert not set(TAGS) - set(values)
    assert values["loss/policy"][0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(values["eval/pair_margin"][0]) < 1e-4 and values["eval/pair_accuracy"][0] == 0.5
    assert values["rewards/accuracy"][0] == 0.5
    assert values["eval/pair_loss"][0] == pytest.approx(math.log(2), abs=1e-4)
    assert values["eval/win_rate"][0] == 0.5 and abs(values["eval/kl"][0]) < 1e-4
    assert values["loss/pair_kl"][0] < 1e-8


@pytest.mark.slow
def test_a_short_run_learns_to_rank(tmp_path, capsys):
    """At the reference each pair is a tie; then held-out pairs are ranked right, and the policy moves away."""
    changes = {
        "pair_problems": 200,
        "eval_problems": 60,
        "iterations": 30,
        "minibatch_size": 32,
        "warmup_iterations": 3,
    }
    run_dir = run(train_dpo.main, short_args(train_dpo, tmp_path, **changes))
    values = {tag: [value for _, value in points] for tag, points in scalars(run_dir).items()}
    assert_begins_at_the_reference(values)
    assert values["eval/pair_accuracy"][-1] > 0.65
    assert values["eval/pair_loss"][-1] < values["eval/pair_loss"][0]
    assert values["loss/pair_kl"][-1] > 1e-8
    printed = capsys.readouterr().out
    assert "pair_accuracy" in printed and f"model: {run_dir / 'final'}" in printed
    common.load_policy(str(run_dir / "final"), None)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"loss": "simpo"}, {"loss": "ipo"}, {"length_normalize": True, "kl_coef": 1.0}])
def test_every_loss_runs(changes, tmp_path):
    values = scalars(run(train_dpo.main, short_args(train_dpo, tmp_path, **changes)))
    assert all(math.isfinite(value) for points in values.values() for _, value in points)
    assert ("eval/kl" in values) == ("loss/pair_kl" in values) == (changes.get("loss") != "simpo")


HELD_OUT = [question for question in (f"{i}+9=" for i in range(1, 300)) if is_held_out(question)][:6]
TRAINED = [question for question in (f"{i}+9=" for i in range(1, 300)) if not is_held_out(question)][:8]


@pytest.mark.parametrize("kind", ["samples", "preferences", "both kinds of samples"])
def test_the_policy_is_sampled_on_the_pairs_own_prompts(kind, tmp_path, monkeypatch):
    """Catches: eval/kl, eval/win_rate and eval/pair_length of other prompts, such as those of --problems; a prompt of
    several pairs counted as often; a win where nothing can judge."""
    rows = []
    for i, question in enumerate(HELD_OUT + TRAINED):
        if kind == "preferences":
            rows += [{"prompt": question, "chosen": chosen, "rejected": "<think>" * 9} for chosen in "12"]
        else:
            rows.append({"question": question, "completions": [sample("1", 1.0), sample("2", 1.0), sample("3", 0.0)]})
            rows[-1] |= {"answer": eval(question[:-1])} if kind == "samples" or i % 2 else {}
    sampled = remember(monkeypatch, common, "sample_groups")
    changes = {"data": write(tmp_path / "p.jsonl", rows), "iterations": 0, "eval_problems": 12, "max_new_tokens": 12}
    run_dir = run(train_dpo.main, short_args(train_dpo, tmp_path / "runs", **changes))
    tokenizer = common.load_tokenizer(EMBEDDED)
    judged = [rollout for _, rollout in sampled]
    assert sum((rollout.prompt_ids for rollout in judged), []) == encode_prompts(tokenizer, HELD_OUT)
    values = {tag: points[-1][1] for tag, points in scalars(run_dir).items()}
    assert values["eval/pair_length"] == pytest.approx(torch.cat([r.lengths for r in judged]).float().mean().item())
    assert values["eval/kl"] == pytest.approx(0, abs=1e-4) and values["eval/pairs"] == 12
    assert ("eval/win_rate" in values) == (kind != "preferences")


def test_a_win_is_a_right_sample_where_the_start_models_was_wrong(tmp_path, monkeypatch):
    """Catches: a win rate over prompts that only one of the two was judged on, or with its sign reversed."""
    (start, end) = [1.0, 0.0, 0.0, None, ABSENT], [0.0, 1.0, 1.0, 1.0, ABSENT]
    verdicts = iter([start, end])
    monkeypatch.setattr(train_dpo, "judge_samples", lambda *_: (next(verdicts), 0.0, 1.0))
    run_dir = run(train_dpo.main, short_args(train_dpo, tmp_path, **TINY, iterations=1))
    assert [value for _, value in scalars(run_dir)["eval/win_rate"]] == pytest.approx([0.5, 2 / 3])


def test_a_long_prompt_is_sampled_as_far_as_the_context_goes(embedded):
    """Catches: a run that ends at its first evaluation, because a held-out pair fits and --max-new-tokens does not."""
    policy, tokenizer = embedded
    pairs = [pair_of([15] * 250, [24, 1], [25, 1]), pair_of([15, 16], [24, 1], [25, 1])]
    verdicts, kl, length = train_dpo.judge_samples(policy, policy, tokenizer, pairs, train_dpo.Args())
    assert verdicts == [ABSENT] * 8 and kl == 0 and 1 <= length <= (6 + 40) / 2


def test_simpo_loads_no_reference_and_dpo_only_for_evaluations(tmp_path, monkeypatch):
    """Also, before its first update, all of DPO's pairs are ties."""
    loads, load = [], common.load_policy
    monkeypatch.setattr(common, "load_policy", lambda *a, **k: loads.append(a) or load(*a, **k))
    run(train_dpo.main, short_args(train_dpo, tmp_path, **TINY, loss="simpo", iterations=1))
    assert len(loads) == 2  # the pairs' sampler and the policy
    run_dir = run(train_dpo.main, short_args(train_dpo, tmp_path, iterations=1))
    assert len(loads) == 2 + 4
    assert_begins_at_the_reference({tag: [value for _, value in points] for tag, points in scalars(run_dir).items()})


def test_the_soft_penalty_keeps_the_policy_near_the_reference(tmp_path):
    """Catches: a penalty with the wrong sign."""
    changes = TINY | {"iterations": 10, "learning_rate": 3e-4, "warmup_iterations": 1}
    runs = [run(train_dpo.main, short_args(train_dpo, tmp_path, **changes, kl_coef=c)) for c in (0.0, 30.0)]
    free, held = (scalars(run_dir)["loss/pair_kl"][-1][1] for run_dir in runs)
    assert held < 0.7 * free


@pytest.mark.slow
@pytest.mark.parametrize("lost_work", [False, True])
def test_an_interrupted_run_equals_the_uninterrupted_one(lost_work, tmp_path, monkeypatch):
    """Catches: a resume that loses optimizer, data cursor or the start model's samples, or takes the checkpoint for the
    reference. Weights agree to the byte, events except times and memory to the bit."""
    args = short_args(train_dpo, tmp_path, **TINY, iterations=5, eval_every=3, save_every=2, kl_coef=0.1)
    whole = run(train_dpo.main, args)
    with monkeypatch.context() as patched:
        patched.setattr(plumbing.runs, "StopSignal", StopAtIterationThree)
        with pytest.raises(SystemExit) as stopped:
            train_dpo.main(args)
    assert stopped.value.code == 130
    (broken,) = set(tmp_path.iterdir()) - {whole}
    if lost_work:
        shutil.rmtree(broken / "checkpoints" / "step_000003")
    run(train_dpo.main, parse_args(train_dpo.Args, ["--resume", str(broken)]))
    assert weights(whole / "final") == weights(broken / "final")
    assert_same_events(whole, broken)


def test_prompts_are_the_chat_turns(embedded):
    """The policy is trained on the prompts that it is evaluated on."""
    (pair,) = encode_pairs(embedded[1], [Pair("1+1=", "2", "3")], "", 256)
    assert [list(pair.prompt_ids)] == encode_prompts(embedded[1], ["1+1="])
    turns = (("user", "1"), ("assistant", "2"), ("user", "3"))
    (pair,) = encode_pairs(embedded[1], [Pair("1\n\n2\n\n3", "2", "3", messages=turns)], "", 256)
    assert [list(pair.prompt_ids)] == encode_prompts(embedded[1], [turns])
