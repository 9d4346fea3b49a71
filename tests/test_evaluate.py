"""The figures that everybody will quote."""

import json
import math
from dataclasses import replace

import pytest
from conftest import EMBEDDED

import common
import evaluate
from data import encode_prompts, load_problems
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
    nobody_right = [r | {"answer": "0", "completions": r["completions"]} for r in records()]
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
