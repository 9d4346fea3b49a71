"""Evaluation: scores, intervals, samplers, thinking budgets and modes, and who decides that an answer is right."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from conftest import EMBEDDED, EOS, make_model, ragged_prompts
from test_bad_input import refuse
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

import common
import evaluate
import plumbing.evaluation
from common import continue_groups
from data import Problem, encode_problems, encode_prompts, follow_up_ids, load_problems
from evaluate import sample_within_budget
from plumbing.evaluation import HeldOut
from plumbing.runs import save_model
from plumbing.statistics import diversity, group_by, interval, majority_accuracy, majority_answer, pass_at_k, summarize
from rewards import Verifier, accuracy_reward, extract_answer, format_reward


def arithmetic(embedded, source: str, count: int) -> list[Problem]:
    """Held-out problems with their prompts' token ids."""
    policy, tokenizer = embedded
    return encode_problems(tokenizer, load_problems(source, "eval", count), "", policy.config, 40)


def test_pass_at_k_is_the_unbiased_estimate():
    """Chen et al. 2021: the mean over all subsets of k of n samples, not 1 - (1 - c/n)^k."""
    samples = [True, True, False, False, False]
    for k in range(1, 6):
        subsets = list(combinations(samples, k))
        assert pass_at_k(5, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(4, 0, 2) == 0.0 and pass_at_k(4, 4, 1) == 1.0 and pass_at_k(4, 3, 2) == 1.0


def test_majority_counts_other_writings_of_the_same_answer():
    assert majority_answer(["7", "14.0", "7", "14", "$14"]) == "14.0"
    assert majority_answer(["7", None, "8"]) == "7"
    assert majority_answer([None, None]) is None


def test_interval_covers_what_it_says():
    """Exact binomial coverage of the Wilson interval near 95%; never empty and never outside 0..1."""
    for n, p in ((50, 0.5), (200, 0.9), (500, 0.3)):
        coverage = 0.0
        for c in range(n + 1):
            low, high = interval(c / n, n)
            coverage += math.comb(n, c) * p**c * (1 - p) ** (n - c) * (low <= p <= high)
        assert 0.93 < coverage < 0.97
    assert interval(0.0, 20)[0] == 0.0 and interval(1.0, 20)[1] == 1.0 and interval(1.0, 20)[0] < 0.9


def records() -> list[dict]:
    def completion(answer, correct, length, finished=True):
        fields = {"text": "", "answer": answer, "correct": correct, "format": 1.0, "reward": float(correct)}
        return fields | {"length": length, "finished": finished}

    problem = {"question": "q", "id": "", "topic": "t", "difficulty": 1}
    return [
        problem | {"answer": "1", "completions": [completion("1", True, 4), completion("2", False, 8)]},
        problem | {"answer": "5", "completions": [completion(None, False, 9, False), completion("5", True, 3)]},
    ]


def test_summary_by_hand():
    s = summarize(records())
    assert (s["accuracy"], s["length"], s["length_right"], s["length_wrong"]) == (0.5, 6.0, 3.5, 8.5)
    assert (s["truncated"], s["no_answer"], majority_accuracy(records())) == (0.25, 0.25, 1.0)
    assert (s["pass_at_1"], s["pass_at_2"]) == (0.5, 1.0)
    nobody_right = [r | {"completions": [c | {"correct": False} for c in r["completions"]]} for r in records()]
    assert majority_accuracy(nobody_right) == 0.0


def test_records_match_the_texts_and_keep_their_order(embedded):
    """Problems are sorted by length inside; the records come back in the order of the problems, and every field can be
    recomputed from the text."""
    policy, tokenizer = embedded
    problems = arithmetic(embedded, "arithmetic", 40)
    found = evaluate.evaluate(policy, tokenizer, problems, 3, 40, batch_size=10)
    assert [r["question"] for r in found] == [p.question for p in problems]
    for record in found:
        assert len(record["completions"]) == 3
        for c in record["completions"]:
            assert c["correct"] == bool(accuracy_reward(c["text"], record["answer"]))
            assert c["answer"] == extract_answer(c["text"]) and c["format"] == format_reward(c["text"])
            assert c["length"] == len(tokenizer(c["text"]).input_ids) + c["finished"]
            assert c["reward"] == c["correct"]
    assert len({c["text"] for c in found[5]["completions"]}) > 1  # they are sampled


def test_the_embedded_model_is_the_base_that_its_card_describes(embedded):
    """Room for RL: sampled accuracy is at most 0.5, and greedy decoding mostly fails at the hardest difficulty."""
    problems = arithmetic(embedded, "arithmetic", 300)
    sampled = summarize(evaluate.evaluate(*embedded, problems, 2, 40))
    greedy = evaluate.evaluate(*embedded, problems, 1, 40, temperature=0.0)
    by_difficulty = {d: summarize(group)["accuracy"] for d, group in group_by(greedy, "difficulty").items()}
    assert 0.25 < sampled["accuracy"] <= 0.5
    assert 0.6 < sampled["format"] < 0.95
    assert all(by_difficulty[d] > 0.9 for d in (1, 2, 3, 4)) and by_difficulty[6] < 0.6


def test_the_command_writes_a_samples_file(tmp_path, capsys):
    output = tmp_path / "samples.jsonl"
    args = evaluate.Args(model=EMBEDDED, eval_problems=12, num_samples=4, output=str(output), device="cpu")
    evaluate.main(args)
    printed = capsys.readouterr().out
    assert "95% interval" in printed and "difficulty 6" in printed and "pass_at_4" in printed and "majority" in printed
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 12
    assert set(lines[0]) == {"question", "answer", "id", "task", "topic", "difficulty", "completions"}
    assert {"text", "reward", "correct", "length", "finished"} <= set(lines[0]["completions"][0])
    rate = sum(c["correct"] for line in lines for c in line["completions"]) / 48
    assert f"{rate:.3f}" in printed
    before = output.read_bytes()
    evaluate.main(args)
    assert output.read_bytes() == before  # same seed, same file
    evaluate.main(replace(args, seed=1))
    assert output.read_bytes() != before


def test_problems_without_difficulty_have_no_such_rows(embedded, tmp_path):
    policy, tokenizer = embedded
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+1=", "answer": i + 1}) + "\n" for i in range(10, 20)))
    problems = encode_problems(tokenizer, load_problems(str(path), "all"), "", policy.config, 40)
    found = evaluate.evaluate(policy, tokenizer, problems, 1, 40)
    assert group_by(found, "difficulty") == {} and group_by(found, "topic") == {}
    assert common.derive_seed(1, "a") != common.derive_seed(1, "b")


# ---- Evaluations of a custom task ------------------------------------------------------------------------------------


def test_a_function_says_what_is_right_and_others_are_rewards(embedded):
    """Catches: a function that gets another problem's text, or whose verdict the rules overrule; columns of a row lost
    on the way to its record."""
    problems = arithmetic(embedded, "arithmetic", 12)
    problems = [replace(p, answer="no number", columns={"place": i}) for i, p in enumerate(problems)]
    seen = []

    def is_right(text: str, problem: Problem) -> bool:
        seen.append((text, problem.columns["place"]))
        return len(text) % 2 == 0

    rewards = {"place": lambda text, problem: problem.columns["place"], "tags": lambda text, _: text.count("<") / 2}
    verify = Verifier(is_right=is_right)
    found = evaluate.evaluate(*embedded, problems, 3, 40, batch_size=10, verify=verify, rewards=rewards)
    for i, record in enumerate(found):
        assert {name: record[name] for name in problems[i].to_row()} == problems[i].to_row() and record["place"] == i
        for c in record["completions"]:
            assert c["correct"] == c["reward"] == (len(c["text"]) % 2 == 0)
            assert c["place"] == i and c["tags"] == c["text"].count("<") / 2
    assert sorted(seen) == sorted((c["text"], i) for i, record in enumerate(found) for c in record["completions"])
    assert 0 < summarize(found)["accuracy"] < 1
    verify = Verifier(are_right=lambda texts, problems: [len(text) % 2 == 0 for text in texts])
    assert evaluate.evaluate(*embedded, problems, 3, 40, batch_size=10, verify=verify, rewards=rewards) == found


def test_a_samplers_rollout_is_what_is_evaluated(embedded):
    """Sampler, verifier and rewards reach both evaluations of a training script, sampled and greedy; a length counts
    the policy's own tokens, not inserted ones."""
    policy, tokenizer = embedded
    problems, calls = arithmetic(embedded, "arithmetic", 6), []

    def two_turns(policy, prompts, group_size, max_new_tokens, temperature, seed):
        calls.append((group_size, max_new_tokens, temperature, seed))
        rollout = common.sample_groups(policy, prompts, group_size, max_new_tokens, temperature, seed)
        inserts = [follow_up_ids(tokenizer, "1+1=", ended) for ended in rollout.finished.tolist()]
        return continue_groups(policy, rollout, inserts, max_new_tokens, temperature, seed + 1)

    (record, *_) = evaluate.evaluate(policy, tokenizer, problems, 2, 20, seed=3, sample=two_turns)
    prompts = [p.prompt_ids for p in sorted(problems, key=lambda p: len(p.prompt_ids))]
    rollout = two_turns(policy, prompts, *calls[0])
    first = 2 * prompts.index(problems[0].prompt_ids)
    for row, completion in enumerate(record["completions"], first):
        text = tokenizer.decode(rollout.completion_ids[row][rollout.mask[row]])
        assert completion["text"] == text.replace("<eos>", "") and "1+1=" in text
        assert completion["length"] == rollout.lengths[row] == len(tokenizer(text).input_ids) - len("1+1=")

    calls.clear()
    options = {"sample": two_turns, "rewards": {"long": lambda text, problem: len(text)}}
    always = Verifier(is_right=lambda *_: True)
    scores = HeldOut(tokenizer, problems, 20, "answer-tags", 256, 5, always, **options).evaluate(policy)
    assert [call[0::2] for call in calls] == [(plumbing.evaluation.SAMPLES, 1.0), (1, 0.0)]
    assert scores["eval/accuracy"] == scores["eval/accuracy_greedy"] == scores["eval/pass_at_k"] == 1.0
    found = evaluate.evaluate(policy, tokenizer, problems, 4, 20, seed=5, sample=two_turns)
    lengths = [len(c["text"]) for record in found for c in record["completions"]]
    assert scores["eval/long"] == pytest.approx(sum(lengths) / 24)
    assert "eval/length_wrong" not in scores and not any(math.isnan(score) for score in scores.values())


def test_completions_that_nobody_could_judge_are_left_out(embedded):
    """Catches: an unknown verdict that counts as wrong, and pass@k of a problem with fewer samples."""
    policy, tokenizer = embedded
    problems = arithmetic(embedded, "arithmetic", 6)

    def are_right(texts, asked):
        return [None if p is problems[0] or i % 4 == 0 else True for i, p in enumerate(asked)]

    verify = Verifier(are_right=are_right)
    found = evaluate.evaluate(policy, tokenizer, problems, 4, 20, verify=verify)
    assert [record["question"] for record in found] == [problem.question for problem in problems[1:]]
    assert all(len(record["completions"]) == 3 for record in found)
    assert summarize(found)["accuracy"] == summarize(found)["pass_at_2"] == 1.0
    nobody = Verifier(are_right=lambda texts, _: [None] * len(texts))
    assert HeldOut(tokenizer, problems, 20, "answer-tags", 256, 5, nobody).evaluate(policy) == {}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_completion_goes_on_after_inserted_tokens(name):
    """Catches: inserted tokens that are trained, scored or counted; a row without an insert that changes; logprobs of
    the continuation that differ from the whole sequence's."""
    model = make_model(name)
    first = common.sample_groups(model, ragged_prompts(), 2, 6, 0.7, seed=4)
    inserts = [[20, 21, 22], None, [], [23], None, [24, 25]]
    whole = continue_groups(model, first, inserts, 7, 0.7, seed=5)
    assert whole.prompt_ids == ragged_prompts() and whole.group_size == 2
    went_on = 0
    for row, insert in enumerate(inserts):
        head = first.completion_ids[row][first.mask[row]].tolist()
        ids = whole.completion_ids[row][whole.mask[row]].tolist()
        values = whole.sampler_logprobs[row][whole.mask[row]]
        trained = whole.trained[row][whole.mask[row]].tolist()
        start = len(head) + len(insert or [])
        assert ids[:start] == head + (insert or [])
        assert torch.equal(values[: len(head)], first.sampler_logprobs[row][first.mask[row]])
        assert (values[len(head) : start] == 0).all()
        assert trained == [True] * len(head) + [False] * len(insert or []) + [True] * (len(ids) - start)
        assert whole.lengths[row] == len(ids) - len(insert or [])
        if insert is None:
            assert ids == head and whole.finished[row] == first.finished[row]
        else:
            went_on += 1
            assert 1 <= len(ids) - start <= 7 and bool(whole.finished[row]) == (ids[-1] == EOS)
    assert went_on == 4 and len(set(whole.lengths.tolist())) > 1
    assert torch.equal(
        whole.mask,
        common.make_rollout(
            [[1]] * 6, [ids[m].tolist() for ids, m in zip(whole.completion_ids, whole.mask, strict=True)]
        ).mask,
    )  # no holes
    theirs, _ = common.rollout_logprobs(model, whole, 64, temperature=0.7)
    assert torch.allclose(whole.sampler_logprobs[whole.trained], theirs[whole.trained], atol=1e-4)
    assert (theirs[whole.mask & ~whole.trained] != 0).all()  # given tokens have logprobs, which no loss may use
    assert not whole.trained[~whole.mask].any() and (whole.sampler_logprobs[~whole.trained] == 0).all()

    again = continue_groups(model, whole, [None] * 6, 7)
    assert torch.equal(again.trained, whole.trained) and torch.equal(again.completion_ids, whole.completion_ids)
    assert torch.equal(again.sampler_logprobs, whole.sampler_logprobs) and torch.equal(again.finished, whole.finished)
    third = continue_groups(model, whole, [[30]] + [None] * 5, 3, 0.7, seed=6)  # turn after turn
    assert third.lengths[0] == whole.lengths[0] + third.mask[0].sum() - whole.mask[0].sum() - 1
    assert third.lengths[1:].tolist() == whole.lengths[1:].tolist()
    theirs, _ = common.rollout_logprobs(model, third, 64, temperature=0.7)
    assert torch.allclose(third.sampler_logprobs[third.trained], theirs[third.trained], atol=1e-4)


# ---- Thinking budget and modes, stages side by side ------------------------------------------------------------------


def test_a_thinking_budget_is_kept_to_the_token(embedded):
    """A completion that is stopped has exactly `budget` tokens of thinking, the stop sentence, which its length leaves
    out, and the answer. One that ended its thinking before is the same as without a budget."""
    policy, tokenizer = embedded
    problems = arithmetic(embedded, "arithmetic:5-6", 12)
    prompts = [list(p.prompt_ids) for p in problems]
    budget, stop = 6, tokenizer("...</think>", add_special_tokens=False).input_ids
    rollout = sample_within_budget(policy, prompts, 3, 10, 1.0, 5, tokenizer, budget, "...</think>")
    free = common.sample_groups(policy, prompts, 3, budget, 1.0, 5)
    closing = tokenizer("</think>", add_special_tokens=False).input_ids[0]
    stopped = 0
    for row in range(36):
        ids = rollout.completion_ids[row][rollout.mask[row]].tolist()
        head = free.completion_ids[row][free.mask[row]].tolist()
        assert ids[: len(head)] == head and len(ids) <= budget + len(stop) + 10
        if not free.finished[row] and closing not in head and "<think>" in tokenizer.decode(head):
            stopped += 1
            assert ids[budget : budget + len(stop)] == stop
        elif free.finished[row]:
            assert ids == head
        if rollout.finished[row]:
            assert ids[-1] == tokenizer.eos_token_id
        closed = ids[budget : budget + len(stop)] == stop and not free.finished[row]
        assert rollout.lengths[row] == len(ids) - closed * len(stop)
    assert stopped > 5 and rollout.finished.float().mean() > 0.8
    sample = partial(sample_within_budget, tokenizer=tokenizer, budget=budget, stop_sentence="</think>")
    found = evaluate.evaluate(policy, tokenizer, problems, 1, 10, sample=sample)
    assert all(c["length"] <= budget + 10 for r in found for c in r["completions"])
    assert any(c["length"] > budget for r in found for c in r["completions"])


def test_entropy_under_a_budget_is_of_the_sampled_tokens(embedded):
    """Catches: inserted tokens, whose logprob is 0, among the tokens over which entropy and length are taken. By hand:
    tokens of -1 and -2 nats, an inserted one, tokens of -3 and -4 nats; and a completion of one token of -5."""
    policy, tokenizer = embedded
    rollout = common.make_rollout([[15, 16]], [[17, 18, 7, 19, 1], [1]], 2)
    rollout.sampler_logprobs[:] = torch.tensor([[-1.0, -2, 0, -3, -4], [-5, 0, 0, 0, 0]])
    rollout = replace(rollout, loss_mask=torch.tensor([[True, True, False, True, True], [True] * 5]))
    problem = Problem("1+1=", "2", prompt_ids=(15, 16))
    records = evaluate.evaluate(policy, tokenizer, [problem], 2, 10, sample=lambda *_: rollout)
    assert [c["length"] for c in records[0]["completions"]] == [4, 1]
    assert diversity(records)["entropy"] == pytest.approx((1 + 2 + 3 + 4 + 5) / 5)


def test_the_greedy_answer_after_the_stop_is_the_models(embedded):
    """With greedy decoding the second call continues as one whole sequence would."""
    policy, tokenizer = embedded
    prompts = encode_prompts(tokenizer, ["12+7-5+3-2+8="])
    rollout = sample_within_budget(policy, prompts, 1, 10, 0.0, 5, tokenizer, 4, "</think>")
    ids = rollout.completion_ids[0][rollout.mask[0]].tolist()
    stop = tokenizer("</think>", add_special_tokens=False).input_ids
    alone = common.sample_groups(policy, [prompts[0] + ids[: 4 + len(stop)]], 1, 10, 0.0)
    assert ids[4 + len(stop) :] == alone.completion_ids[0][alone.mask[0]].tolist()


def test_stages_and_modes_are_rows(capsys, tmp_path):
    args = {"eval_problems": 6, "device": "cpu", "temperatures": (0.5,), "max_new_tokens": 12}
    evaluate.main(evaluate.Args(stages=(f"base={EMBEDDED}", f"again={EMBEDDED}"), modes="think,no_think", **args))
    device, *lines = capsys.readouterr().out.splitlines()
    assert device == "device: cpu" and "T=0.5" in lines[0]
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "base, think",
        "base, no_think",
        "again, think",
        "again, no_think",
    ]
    assert "minus the first" in lines[0]
    assert lines[4].split()[-4:] == ["+0.000", "+0.000", "to", "+0.000"]  # paired: the same model on the same problems
    assert lines[2].split()[2:] == lines[4].split()[2:-4]
    evaluate.main(evaluate.Args(model=EMBEDDED, think_budget=3, **args))
    assert "difficulty 6" in capsys.readouterr().out


BAD = [
    (
        {"think_budget": 250},
        "--think-budget + --stop-sentence + --max-new-tokens 291 exceed the model's context of 256",
    ),
    ({"modes": "think,no_think", "output": "samples.jsonl"}, "--output: holds the samples of one model in one mode"),
    ({"judge_model": EMBEDDED, "verifier_model": EMBEDDED}, "only one of them"),
]


@pytest.mark.parametrize("changes,message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(changes, message, capsys):
    assert message in refuse(evaluate, {"model": EMBEDDED, "device": "cpu"} | changes, capsys)


# ---- Who says that an answer is right --------------------------------------------------------------------------------


class Judge(Verifier):
    """A judge that accepts exactly the answers that are off by one."""

    def __init__(self):
        super().__init__()
        self.model, self.asked = object(), []

    def ask(self, pairs):
        self.asked += pairs
        return [abs(int(answer) - int(problem.answer)) == 1 for problem, answer in pairs]


def test_the_rule_comes_before_the_model_and_each_is_counted():
    problem = Problem("9+9=", "18")
    texts = ["<answer>18</answer>", "<answer>17</answer>", "<answer>17</answer>", "<answer>3</answer>", "nothing"]
    verify = Judge()
    assert verify(texts, [problem] * 5) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert verify.asked == [(problem, "17"), (problem, "3")]  # each answer once; no question without an answer
    assert verify.summary() == {"verifier/rule": 0.2, "verifier/symbolic": 0.0, "verifier/model": 0.4}
    assert verify.summary() == {}
    assert Verifier()(texts, [problem] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_judge_is_asked_for_the_probability_of_its_two_words(tmp_path):
    """Right if P(yes) > P(no) in the causal LM's softmax, each summed over the word's spellings that are one token."""
    words = ["<pad>", "<eos>", "<unk>", "yes", "No", "no", "Question", ":", "18", "17", "9", "+", "=", "answer"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    seen = set()
    for seed in range(20):
        model = make_model("llama", seed=seed, max_position_embeddings=128)
        save_model(tmp_path / str(seed), model, tokenizer)
        verify = Verifier(evaluate.Args(judge_model=str(tmp_path / str(seed))))
        assert (verify.yes, verify.no) == ([3], [4, 5])
        problem = Problem("9+9=", "18")
        text = "Question: 9+9=\nReference answer: 18\nGiven answer: 17\n"
        text += "Is the given answer the same as the reference answer? Reply with yes or no."
        with torch.no_grad():
            probabilities = model(torch.tensor([tokenizer(text).input_ids])).logits[0, -1].softmax(-1)
        expected = bool(probabilities[3] > probabilities[4] + probabilities[5])
        assert verify(["<answer>17</answer>"], [problem]) == [float(expected)]
        seen.add(expected)
    assert seen == {True, False}


def test_a_reward_model_as_verifier(tmp_path):
    """An answer is right if its score, as the completion of question and reference, is above 0."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(EMBEDDED, num_labels=1))
    tokenizer = common.load_tokenizer(EMBEDDED)
    save_model(tmp_path / "rm", model, tokenizer)
    verify = Verifier(evaluate.Args(verifier_model=str(tmp_path / "rm")))
    problem, answers = Problem("9+9=", "18"), [str(i) for i in range(40, 70)]
    found = verify([f"<answer>{a}</answer>" for a in answers], [problem] * 30)
    prompt = encode_prompts(tokenizer, ["Question: 9+9=\nReference answer: 18"])[0]
    for answer, right in zip(answers, found, strict=True):
        rollout = common.make_rollout([prompt], [[*tokenizer(answer).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            assert (common.completion_scores(verify.model, rollout, [0]).item() > 0) == bool(right)
    assert 0 < sum(found) < 30


def test_any_stop_sentence_closes_the_think_block(embedded):
    """Catches: a sentence without the tag that leaves the block open, so that no completion has an answer."""
    policy, tokenizer = embedded
    problems = arithmetic(embedded, "arithmetic:5-6", 6)
    sentence = "Given limited time, I'll provide a direct answer now."
    closed = tokenizer("...</think>", add_special_tokens=False).input_ids
    assert evaluate.stop_ids(tokenizer, "...</think>", [[5], [6]]) == [closed, closed]
    sample = partial(sample_within_budget, tokenizer=tokenizer, budget=4, stop_sentence=sentence)
    records = evaluate.evaluate(policy, tokenizer, problems, 2, 20, sample=sample)
    texts = [c["text"] for r in records for c in r["completions"]]
    stopped = [text for text in texts if sentence in text]
    assert len(stopped) > 3 and all(sentence + "</think>" in text for text in stopped)
    sample = partial(sample_within_budget, tokenizer=tokenizer, budget=4, stop_sentence="...")
    records = evaluate.evaluate(policy, tokenizer, problems, 2, 20, sample=sample)
    assert sum(c["answer"] is not None for r in records for c in r["completions"] if "..." in c["text"]) > 3


def test_entropy_and_distinct_completions(embedded):
    """The estimate from samples agrees with the entropy of the logits; equal texts count once in `distinct`."""
    policy, tokenizer = embedded
    problems = arithmetic(embedded, "arithmetic", 30)
    records = evaluate.evaluate(policy, tokenizer, problems, 16, 40)
    found = diversity(records)
    rollout = common.sample_groups(policy, [p.prompt_ids for p in problems], 16, 40, 1.0, 9)
    _, entropy = common.completion_logprobs(policy, rollout, list(range(480)))
    exact = (entropy * rollout.mask).sum() / rollout.mask.sum()
    assert found["entropy"] == pytest.approx(exact.item(), rel=0.1)
    assert found["distinct"] == sum(len({c["text"] for c in r["completions"]}) for r in records) / 30 > 2
    greedy = diversity(evaluate.evaluate(policy, tokenizer, problems[:3], 4, 20, temperature=0.0))
    assert greedy["distinct"] == 1.0
