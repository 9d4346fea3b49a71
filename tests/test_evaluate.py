"""The figures that everybody will quote."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import EMBEDDED

import common
import evaluate
from data import Problem, encode_prompts, load_problems
from evaluate import interval, majority_answer, pass_at_k, summarize


def test_pass_at_k_is_the_unbiased_estimate():
    """Chen et al. 2021: the mean over all subsets of k of n samples, not 1 - (1 - c/n)^k."""
    from itertools import combinations

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
    assert (s["truncated"], s["no_answer"], s["majority"]) == (0.25, 0.25, 1.0)
    assert (s["pass_at_1"], s["pass_at_2"]) == (0.5, 1.0)
    nobody_right = [r | {"completions": [c | {"correct": False} for c in r["completions"]]} for r in records()]
    assert summarize(nobody_right)["majority"] == 0.0


def test_records_match_the_texts_and_keep_their_order(embedded):
    """Batches are sorted by length inside; the records come back in the order of the problems, and every flag can be
    recomputed from the text."""
    from rewards import accuracy_reward, extract_answer, format_reward

    policy, tokenizer = embedded
    problems = load_problems("arithmetic", "eval", 40)
    prompts = encode_prompts(tokenizer, [p.question for p in problems])
    found = evaluate.evaluate(policy, tokenizer, problems, prompts, 3, 40, batch_size=10)
    assert [r["question"] for r in found] == [p.question for p in problems]
    for record in found:
        assert len(record["completions"]) == 3
        for c in record["completions"]:
            assert c["correct"] == bool(accuracy_reward(c["text"], record["answer"]))
            assert c["answer"] == extract_answer(c["text"]) and c["format"] == format_reward(c["text"])
            assert c["length"] == len(tokenizer(c["text"]).input_ids) + c["finished"]
    assert len({c["text"] for c in found[5]["completions"]}) > 1  # they are sampled


def test_the_embedded_model_is_the_base_that_its_card_describes(embedded):
    """RL must have something to do: sampled accuracy at most 0.5, the hardest difficulty mostly wrong greedily."""
    policy, tokenizer = embedded
    problems = load_problems("arithmetic", "eval", 300)
    prompts = encode_prompts(tokenizer, [p.question for p in problems])
    sampled = summarize(evaluate.evaluate(policy, tokenizer, problems, prompts, 2, 40))
    greedy = evaluate.evaluate(policy, tokenizer, problems, prompts, 1, 40, temperature=0.0)
    by_difficulty = {d: summarize(group)["accuracy"] for d, group in evaluate.by(greedy, "difficulty").items()}
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
    assert set(lines[0]) == {"question", "answer", "id", "topic", "difficulty", "completions"}
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
    problems = load_problems(str(path), "all")
    prompts = encode_prompts(tokenizer, [p.question for p in problems])
    found = evaluate.evaluate(policy, tokenizer, problems, prompts, 1, 40)
    assert evaluate.by(found, "difficulty") == {} and evaluate.by(found, "topic") == {}
    assert common.derive_seed(1, "a") != common.derive_seed(1, "b")


# ---- Thinking budget and modes, stages side by side ------------------------------------------------------------------


def test_a_thinking_budget_is_kept_to_the_token(embedded):
    """Thoughts of exactly `budget` tokens, then the stop sentence, then the answer, all of it counted; what has ended
    its thoughts before is the same as without a budget."""
    policy, tokenizer = embedded
    problems = load_problems("arithmetic:5-6", "eval", 12)
    prompts = encode_prompts(tokenizer, [p.question for p in problems])
    budget, stop = 6, tokenizer("...</think>", add_special_tokens=False).input_ids
    rollout = evaluate.sample_within_budget(policy, prompts, 3, 10, 1.0, 5, tokenizer, budget, "...</think>")
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
    assert stopped > 5 and rollout.finished.float().mean() > 0.8
    records = evaluate.evaluate(policy, tokenizer, problems, prompts, 1, 10, think_budget=budget)
    assert all(c["length"] <= budget + 1 + 10 for r in records for c in r["completions"])


def test_the_greedy_answer_after_the_stop_is_the_models(embedded):
    """Greedy, the second call continues exactly what one sequence alone would."""
    policy, tokenizer = embedded
    prompts = encode_prompts(tokenizer, ["12+7-5+3-2+8="])
    rollout = evaluate.sample_within_budget(policy, prompts, 1, 10, 0.0, 5, tokenizer, 4, "</think>")
    ids = rollout.completion_ids[0][rollout.mask[0]].tolist()
    stop = tokenizer("</think>", add_special_tokens=False).input_ids
    alone = common.sample_groups(policy, [prompts[0] + ids[: 4 + len(stop)]], 1, 10, 0.0)
    assert ids[4 + len(stop) :] == alone.completion_ids[0][alone.mask[0]].tolist()


def test_stages_and_modes_are_rows(capsys, tmp_path):
    args = {"eval_problems": 6, "device": "cpu", "temperatures": (0.5,)}
    evaluate.main(evaluate.Args(stages=(f"base={EMBEDDED}", f"again={EMBEDDED}"), modes="think,no_think", **args))
    device, *lines = capsys.readouterr().out.splitlines()
    assert device == "device: cpu" and "T=0.5" in lines[0]
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "base, think",
        "base, no_think",
        "again, think",
        "again, no_think",
    ]
    assert lines[2].split()[2:] == lines[4].split()[2:]
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
    from test_bad_input import refuse

    assert message in refuse(evaluate.main, evaluate.Args(model=EMBEDDED, device="cpu", **changes), capsys)


# ---- Who says that an answer is right --------------------------------------------------------------------------------


class Judge(evaluate.Verifier):
    """A judge that finds numbers equal which differ by one."""

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
    assert verify.asked == [(problem, "17"), (problem, "3")]  # each question once; no answer, no question
    assert verify.summary() == {"verifier/rule": 0.2, "verifier/symbolic": 0.0, "verifier/model": 0.4}
    assert verify.summary() == {}
    assert evaluate.Verifier()(texts, [problem] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_judge_is_asked_for_the_probability_of_its_two_words(tmp_path):
    """P(yes) > P(no), each over all its spellings that are one token, by one causal LM's softmax."""
    from conftest import make_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "yes", "No", "no", "Question", ":", "18", "17", "9", "+", "=", "answer"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    seen = set()
    for seed in range(20):
        model = make_model("llama", seed=seed, max_position_embeddings=128)
        common.save_checkpoint(tmp_path / str(seed), model, tokenizer)
        verify = evaluate.Verifier(evaluate.Args(judge_model=str(tmp_path / str(seed))))
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
    """Above 0 is right: the score of the answer as the completion of question and reference."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(EMBEDDED, num_labels=1))
    tokenizer = common.load_tokenizer(EMBEDDED)
    common.save_checkpoint(tmp_path / "rm", model, tokenizer)
    verify = evaluate.Verifier(evaluate.Args(verifier_model=str(tmp_path / "rm")))
    problem, answers = Problem("9+9=", "18"), [str(i) for i in range(40, 70)]
    found = verify([f"<answer>{a}</answer>" for a in answers], [problem] * 30)
    prompt = encode_prompts(tokenizer, ["Question: 9+9=\nReference answer: 18"])[0]
    for answer, right in zip(answers, found, strict=True):
        rollout = common.make_rollout([prompt], [[*tokenizer(answer).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            assert (common.completion_scores(verify.model, rollout, [0]).item() > 0) == bool(right)
    assert 0 < sum(found) < 30
