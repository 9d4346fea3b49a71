"""Filters of problems, demonstrations from samples, thinking modes: the functions, and the command."""

import json
from collections import Counter

import pytest
from conftest import EMBEDDED
from test_bad_input import refuse

import curate
import evaluate
from curate import fuse_modes
from data import (
    Demonstration,
    Problem,
    chosen_samples,
    encode_completions,
    encode_demonstrations,
    encode_prompts,
    is_held_out,
    load_demonstrations,
    load_problems,
    load_task,
    mix_demonstrations,
    placed_rows,
    read_samples,
)
from plumbing.flags import parse_args
from plumbing.pairs import balance, load_preference_pairs
from rewards import accuracy_reward, format_reward, verifier_prompt


def problem(question: str, answer: str = "1", **fields) -> Problem:
    return Problem(question, answer, fields.pop("id", question), **fields)


def completion(text: str, correct: bool, reward: float | None = None, finished: bool = True, **more) -> dict:
    return more | {
        "text": text,
        "correct": correct,
        "reward": float(correct) if reward is None else reward,
        "finished": finished,
    }


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def record(question: str, *completions: dict, **fields) -> dict:
    return {"question": question, "answer": "1", "id": question, "completions": list(completions)} | fields


def sampled(path, rates: dict[str, float], n: int = 4, **fields) -> str:
    def completions(rate):
        return [completion(f"<think>{i}</think><answer>1</answer>", i < rate * n) for i in range(n)]

    return write(path, [record(q, *completions(rate), **fields) for q, rate in rates.items()])


def rates_of(path: str, problems: list[Problem]) -> dict[str, float]:
    return curate.pass_rates(read_samples(placed_rows(path), path), path, problems)


def test_the_pass_rate_band(tmp_path):
    """The default keeps problems that are neither always right nor always wrong. The ends are inclusive: 0 to 0 keeps
    those that always failed. Problems that were not sampled are dropped; all drops are counted."""
    rates = {"a": 0.0, "b": 0.25, "c": 0.75, "d": 1.0}
    problems = [problem(q) for q in "abcde"]
    found = rates_of(sampled(tmp_path / "s.jsonl", rates), problems)
    assert found == rates
    for band, kept, why in (
        ((0.01, 0.99), "bc", {"not sampled": 1, "pass rate under the band": 1, "pass rate over the band": 1}),
        ((0.0, 0.0), "a", {"not sampled": 1, "pass rate over the band": 3}),
        ((0.5, 1.0), "cd", {"not sampled": 1, "pass rate under the band": 2}),
    ):
        dropped = Counter()
        assert "".join(p.id for p in curate.keep_pass_rates(problems, found, *band, dropped)) == kept
        assert dropped == why
    assert [p.difficulty for p in curate.label_difficulty(problems, found)] == [1.0, 0.75, 0.25, 0.0, None]


def test_a_cut_completion_is_not_right(tmp_path):
    path = write(tmp_path / "s.jsonl", [record("a", completion("x", True), completion("y", True, finished=False))])
    assert rates_of(path, [problem("a")]) == {"a": 0.5}


def test_lucky_guesses():
    dropped = Counter()
    kept = curate.drop_lucky_guesses([problem(q) for q in "abc"], {"a": 0.125, "b": 0.0}, dropped)
    assert [p.id for p in kept] == ["b", "c"] and dropped == {"right without reasoning": 1}


def test_multiple_choice_and_true_or_false():
    problems = [
        problem("Which one? (A) 3 (B) 4 (C) 5", "B"),
        problem("Which one?\nA. 3\nB. 4", "(B)"),
        problem(r"Which? $\\textbf{(A)}\\ 3 \\qquad \\textbf{(B)}\\ 4$", "A"),
        problem("Which? (A)3 (B)4", "(B) 4"),
        problem("a) 3\nb) 4", "b"),
        problem("Is it prime?", "True."),
        problem("Is it so?", "no"),
        problem("Name the side opposite to point A) of the triangle", "b"),  # no options: a variable
        problem("Compute (A) + (B) where A = 3, B = 4", "7"),  # options, but no letter
        problem("What is 3 + 4?", "7"),
    ]
    dropped = Counter()
    assert [p.answer for p in curate.drop_multiple_choice(problems, dropped)] == ["b", "7", "7"]
    assert dropped == {"multiple choice": 5, "true or false": 2}


def test_decontamination():
    """13 words in a row match anywhere; a shorter question matches as a whole, from 8 words on also inside another."""
    long = "a train leaves the station at nine and reaches the next town after two hours and ten minutes"
    short, tiny = "how many eggs are in the big basket now", "2 + 3 ="
    held_out = [problem(long), problem(short), problem(tiny)]
    problems = [
        problem("Yesterday " + long.upper() + "!"),
        problem("a train leaves the station at nine and reaches the next village"),  # 11 words of it
        problem("Ann asks: how many eggs are in the big basket now, and tomorrow?"),
        problem("2+3="),
        problem("12 + 3 = what"),
        problem("1+2+3="),  # holds the short one by chance
    ]
    dropped = Counter()
    kept = curate.decontaminate(problems, held_out, 13, dropped)
    assert [p.question[:9] for p in kept] == ["a train l", "12 + 3 = ", "1+2+3="]
    assert dropped == {"13-gram of a held-out question": 3}
    assert len(curate.decontaminate(problems, held_out, 8, Counter())) == 2


def test_the_same_question_in_another_unicode_is_the_same():
    """Catches: a copy that is composed otherwise, or has other dashes or digits, in both splits or beside itself."""
    numbers = range(400)
    plain = [
        f"Zoe\u0301's cafe\u0301 sells {i} x 5-inch pies; how many inches is that in all of the shop?" for i in numbers
    ]
    other = [text.replace("e\u0301", "\u00e9").replace("-", "\u2011").replace("5", "\uff15") for text in plain]
    assert [*map(is_held_out, plain)] == [*map(is_held_out, other)]
    assert len(curate.drop_duplicates([problem(plain[7]), problem(other[7])], 1.0, Counter())) == 1
    assert curate.decontaminate([problem(plain[7])], [problem(other[7])], 13, Counter()) == []


def test_duplicates():
    text = "Tom has 3 apples and buys 4 more at the market on a sunny day how many apples has he now"
    problems = [
        problem(text, id="1"),
        problem(
            "  tom has 3 apples, and buys 4 more at the market on a sunny day: how many apples has he now?", id="2"
        ),
        problem(text.replace("sunny", "rainy") + " then", id="3"),  # nearly the same, same numbers
        problem(text.replace("3", "5"), id="4"),  # another problem
        problem("12+7-5=", id="5"),
        problem("12-7+5=", id="6"),
    ]
    dropped = Counter()
    assert [p.id for p in curate.drop_duplicates(problems, 0.6, dropped)] == ["1", "4", "5", "6"]
    assert dropped == {"duplicate": 1, "near duplicate": 1}
    assert [p.id for p in curate.drop_duplicates(problems, 1.0, Counter())] == ["1", "3", "4", "5", "6"]
    others = ["Compute 5! + 3.", "Compute 5 + 3!", "f'(2)", "f(2)", "3.5 + 1", "3 5 + 1", "1.25", "1:25"]
    assert len(curate.drop_duplicates([problem(q) for q in others], 0.6, Counter())) == 8


def test_topic_balancing():
    problems = [problem(f"{t}{i}", topic=t) for t, n in (("x", 5), ("y", 2)) for i in range(n)]
    dropped = Counter()
    kept = balance(problems, "--balance-topics", "p", 0, dropped)
    assert Counter(p.topic for p in kept) == {"x": 2, "y": 2} and dropped == {"to balance topics": 3}


def test_chosen_samples():
    """Right and finished ones, each text once; one of them by its length or at random, the right format first."""
    completions = [
        completion("long and right", True, format=1.0, length=9),
        completion("right", True, format=1.0, length=5),
        completion("right", True, format=1.0, length=5),
        completion("short", True, format=0.0, length=2),
        completion("the longest, with another format", True, format=0.0, length=20),
        completion("wrong", False),
        completion("cut", True, finished=False),
    ]
    kept = {keep: chosen_samples(row(completions), keep) for keep in ("correct", "longest", "shortest", "random")}
    assert kept["correct"] == ["long and right", "right", "short", "the longest, with another format"]
    assert kept["longest"] == ["long and right"] and kept["shortest"] == ["right"]
    assert kept["random"] in (["long and right"], ["right"])
    assert chosen_samples(row(completions[3:5]), "longest") == ["the longest, with another format"]
    assert chosen_samples(row(completions[5:]), "shortest") == []


def row(completions: list[dict], question: str = "q") -> dict:
    return {"question": question, "completions": completions}


def test_a_random_choice_and_ties_do_not_go_by_length():
    """ "random" picked the shortest, and of equally good ones the shortest in secret: SFT on ever shorter thoughts."""
    texts = ["a" * n for n in (3, 30)]
    for keep, length in (("random", len), ("longest", lambda text: 7), ("shortest", lambda text: 7)):
        completions = [completion(text, True, length=length(text)) for text in texts]
        chosen = [chosen_samples(row(completions, str(i)), keep)[0] for i in range(200)]
        assert 70 < sum(text == texts[0] for text in chosen) < 130


def test_sft_reads_a_samples_file(tmp_path):
    rows = [record("a", completion("x", True), completion("longer", True)), record("b", completion("z", False))]
    path = write(tmp_path / "s.jsonl", rows)
    assert load_demonstrations(path, 0) == [Demonstration("a", "x"), Demonstration("a", "longer")]
    assert load_demonstrations(path, 0, keep="shortest") == [Demonstration("a", "x")]


def test_both_modes_from_one_sample():
    """/no_think keeps an empty think block and the same answer; a sample without a closed block makes neither."""
    good = record("1+1=", completion("<think>2</think><answer>2</answer>", True), messages=None)
    open_ended = record("1+2=", completion("<answer>3</answer>", True), messages=None)
    with_thinking, without = fuse_modes([good, open_ended])
    assert with_thinking == Demonstration("1+1= /think", "<think>2</think><answer>2</answer>")
    assert without == Demonstration("1+1= /no_think", "<think>\n\n</think>\n\n<answer>2</answer>")
    assert format_reward(without.completion) == accuracy_reward(without.completion, "2") == 1


def test_a_conversations_samples_become_its_demonstrations(tmp_path):
    """Catches: turns or the mode lost between a samples file and its demonstrations."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1="}]
    row = record("", completion("<think>2</think>2", True)) | {"question": turns}
    path = write(tmp_path / "s.jsonl", [row, row | {"mode": "think", "id": "again"}])
    plain, asked = load_demonstrations(path, 0)
    assert plain == Demonstration("1+1=", "<think>2</think>2", (("system", "s"), ("user", "1+1=")))
    assert asked == Demonstration("1+1= /think", "<think>2</think>2", (("system", "s"), ("user", "1+1= /think")))
    for demonstration in (plain, asked):
        again = load_demonstrations(write(tmp_path / "d.jsonl", [demonstration.to_row()]), 0)
        assert again == [demonstration]


def test_demonstrations_as_token_ids(embedded, capsys):
    """Prompts are encoded as in evaluations, completions end with one EOS, and a demonstration that exceeds the context
    is dropped and counted."""
    tokenizer = embedded[1]
    short, long = Demonstration("1+1=", "<think>2</think>"), Demonstration("1+1=", "2" * 300)
    encoded = encode_demonstrations(tokenizer, [short, long], "", 256)
    assert encoded == [short]  # ids don't count in comparisons
    assert [list(encoded[0].prompt_ids)] == encode_prompts(tokenizer, ["1+1="])
    assert tokenizer.decode(encoded[0].completion_ids) == "<think>2</think><eos>"
    assert len(encode_demonstrations(tokenizer, [long], "", 4 + 300 + 1)) == 1
    assert "note: 1 of 2 demonstrations exceed the context of 256: dropped\n" == capsys.readouterr().out
    assert encoded[0].to_row() == {"prompt": "1+1=", "completion": "<think>2</think>"}


def test_a_template_that_opens_the_think_block_gets_it_once():
    """Catches: <think> twice, in the prompt and in the demonstration made from a sample."""

    class Tokenizer:
        eos_token_id, eos_token = 0, "<eos>"

        def __call__(self, texts, add_special_tokens):
            return type("", (), {"input_ids": [[ord(c) for c in text] for text in texts]})

        def batch_decode(self, batch):
            return ["".join(map(chr, ids)) for ids in batch]

    opened, plain = [ord(c) for c in "q<think>\n"], [ord("q")]
    ids = encode_completions(Tokenizer(), ["<think>a", "<think>a"], [opened, plain])
    assert ids[0] == [ord("a"), 0] and len(ids[1]) == 9


def test_other_difficulties():
    problems = load_problems("arithmetic:7-8", "eval", 40)
    assert {p.difficulty for p in problems} == {7, 8} and len(problems) == 40
    for p in problems:
        assert eval(p.question.rstrip("=")) == int(p.answer) and is_held_out(p.question)
    assert {p.difficulty for p in load_problems("arithmetic:3", "train", 10)} == {3}
    assert load_problems("arithmetic", "eval", 30) == load_problems("arithmetic:1-6", "eval", 30)


# ---- The command -----------------------------------------------------------------------------------------------------


def args(tmp_path, **changes) -> curate.Args:
    return curate.Args(output=str(tmp_path / "out.jsonl"), **changes)


def rows(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_the_command_filters_and_labels(tmp_path, capsys):
    samples = sampled(tmp_path / "s.jsonl", {"a": 0.0, "b": 0.25, "c": 0.75, "d": 1.0})
    curate.main(args(tmp_path, samples=samples, label_difficulty=True))
    assert [(row["question"], row["difficulty"]) for row in rows(tmp_path)] == [("b", 0.75), ("c", 0.25)]
    printed = capsys.readouterr().out
    assert "2 of 4 problems kept" in printed and "1 pass rate under the band, 1 pass rate over the band" in printed
    assert len(load_problems(str(tmp_path / "out.jsonl"), "all")) == 2
    curate.main(args(tmp_path, samples=samples, min_pass_rate=0.0, max_pass_rate=0.0))
    assert [row["question"] for row in rows(tmp_path)] == ["a"]


@pytest.mark.parametrize("make", ["correct", "random", "fusion"])
def test_the_command_makes_demonstrations(make, tmp_path):
    samples = sampled(tmp_path / "s.jsonl", {"a": 0.5, "b": 1.0, "c": 0.0})
    curate.main(args(tmp_path, samples=samples, make=make))
    made = load_demonstrations(str(tmp_path / "out.jsonl"), 0)
    assert len(made) == {"correct": 2 + 4, "random": 2, "fusion": 2 * (2 + 4)}[make]


def test_from_sampling_to_filtered_problems(tmp_path, capsys):
    """curate.py reads the file that evaluate.py wrote."""
    samples = str(tmp_path / "s.jsonl")
    sampling = {"eval_problems": 30, "num_samples": 4, "device": "cpu"}
    evaluate.main(evaluate.Args(model=EMBEDDED, split="train", output=samples, **sampling))
    curate.main(args(tmp_path, samples=samples, problems="arithmetic"))
    kept = {row["id"] for row in rows(tmp_path)}
    assert 3 < len(kept) < 30
    for line in (tmp_path / "s.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert (row["id"] in kept) == (0 < sum(c["correct"] for c in row["completions"]) < 4)


def test_the_command_keeps_what_it_does_not_look_at(tmp_path):
    """Other columns and a conversation's turns survive, from a problem file or from a samples file alone."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    row = {
        "question": turns,
        "answer": "1",
        "id": "a",
        "topic": "",
        "difficulty": None,
        "source": "x",
        "pass_rate": 0.5,
    }
    samples = row | {"completions": [completion("1", True), completion("2", False)], "mode": "think"}
    files = {"problems": write(tmp_path / "p.jsonl", [row]), "samples": write(tmp_path / "s.jsonl", [samples])}
    for given in ({"samples": files["samples"]}, files | {"split": "all"}):
        curate.main(args(tmp_path, **given))
        assert rows(tmp_path) == [row]


BAD = [
    ({}, "--problems or --samples: one of them is needed"),
    ({"problems": "arithmetic", "make": "random"}, "--make random: needs --samples"),
    ({"samples": "S", "min_pass_rate": 0.6, "max_pass_rate": 0.5}, "--min-pass-rate 0.6: must be at most"),
    ({"samples": "S", "problems": "arithmetic"}, "samples of other problems: it asks 'a'"),
    ({"samples": "S", "problems": "P", "split": "all"}, "samples of other problems: it asks 'a', not 'other'"),
    ({"samples": "S", "min_pass_rate": 0.4, "max_pass_rate": 0.45}, "is not written: the filters leave nothing"),
    ({"samples": "WRONG", "make": "correct"}, "is not written: no completion is right and finished"),
    ({"samples": "P"}, "no field 'completions' with a list, as a samples file has"),
    ({"problems": "P", "min_pass_rate": -0.1}, "--min-pass-rate -0.1: must be 0 or more"),
    ({"problems": "P", "max_pass_rate": 1.1}, "--max-pass-rate 1.1: must be 0 or more and at most 1"),
    ({"problems": "P", "near_duplicate": 0}, "--near-duplicate 0.0: must be more than 0"),
    ({"problems": "P", "ngram": 0}, "--ngram 0: must be 1 or more"),
    ({"problems": "P", "limit": 0}, "--limit 0: must be 1 or more"),
    ({"samples": "S", "make": "fusion", "mode": "think"}, "--mode think: goes with problems, not with --make fusion"),
]


@pytest.mark.parametrize("changes,message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(changes, message, tmp_path, capsys):
    files = {
        "S": sampled(tmp_path / "s.jsonl", {"a": 0.0, "b": 0.25, "c": 0.75}),
        "WRONG": sampled(tmp_path / "w.jsonl", {"a": 0.0}),
        "P": write(tmp_path / "p.jsonl", [{"question": "other", "answer": "1", "id": "a"}]),
    }
    flags = {name: files.get(value, value) for name, value in changes.items()}
    assert message in refuse(curate, {"output": tmp_path / "out.jsonl"} | flags, capsys)
    assert not (tmp_path / "out.jsonl").exists()


# ---- Rates, right steps, pairs ---------------------------------------------------------------------------------------


def make(tmp_path, rows: list[dict], *flags: str) -> list[dict]:
    """The rows that curate.py writes from a samples file of these rows."""
    output = str(tmp_path / "out.jsonl")
    argv = ["--samples", write(tmp_path / "s.jsonl", rows), "--output", output, *flags]
    curate.main(parse_args(curate.Args, argv))
    return [row for _, row in placed_rows(output)]


def test_problems_in_a_thinking_mode(tmp_path):
    """A fused model is trained on prompts with its mode's flag; in a conversation the flag ends the last turn."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]
    file = write(tmp_path / "p.jsonl", [{"question": q, "answer": "1"} for q in ("a", turns)])
    curate.main(args(tmp_path, problems=file, split="all", mode="no_think"))
    plain, conversation = (row["question"] for row in rows(tmp_path))
    assert plain == "a /no_think" and [turn["content"] for turn in conversation] == ["s", "b /no_think"]


def test_pass_rates_are_written(tmp_path):
    """Catches: no pass rate for the sampler to begin with; difficulty, which may mean anything, overwritten."""
    half = [completion("<answer>1</answer>", True), completion("<answer>2</answer>", False)]
    (row,) = make(tmp_path, [record("a", *half, difficulty=7)])
    assert row["pass_rate"] == 0.5 and row["difficulty"] == 7
    (problem,) = load_problems(str(tmp_path / "out.jsonl"), "all")
    assert problem.pass_rate == 0.5


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        *(("18", True), ("18 eggs", True), (r"\frac{1}{2}", True), ("x^2+1", True), ("(C)", True), ("New York", True)),
        *(("The proof follows by induction on n", False), ("nan", False), ("9" * 1001, False), ("$", False)),
    ],
)
def test_gold_answers_that_no_rule_can_compare_are_dropped(answer, kept):
    dropped = Counter()
    assert bool(curate.drop_unverifiable([problem("q", answer)], dropped)) == kept
    assert dropped == ({} if kept else {"gold answer can't be verified": 1})


def test_what_a_task_judges_can_be_verified():
    countdown = Problem("1,2=3", "", columns={"nums": [1, 2], "target": 3}, task="countdown")
    assert curate.drop_unverifiable([countdown], Counter()) == [countdown]


@pytest.mark.parametrize(
    ("task", "text", "right"),
    [
        ("arithmetic", "<think>19 14</think><answer>14</answer>", True),
        ("arithmetic", "<think>18 14</think><answer>14</answer>", False),  # by luck
        ("arithmetic", "<think>14</think><answer>14</answer>", False),
        ("arithmetic", "<think>19 14 14</think><answer>14</answer>", False),
        ("arithmetic", "<think>19 14<answer>14</answer>", False),
        ("countdown", "<think>3+5-8=0 wait 3-5+8=6 等一下 3+5+8=16</think><answer>3+5+8</answer>", True),
        ("countdown", "<think>3+5-8=1 wait 3+5+8=16</think><answer>3+5+8</answer>", False),
        ("countdown", "<think>(3+5)*8=64 wait 8-5-3 = 0</think>", True),
        ("countdown", "<think>3/(5-5)=1</think>", False),
        ("countdown", "<think>hm</think><answer>3+5+8</answer>", False),
    ],
)
def test_a_task_knows_its_right_steps(task, text, right):
    question = {"arithmetic": "12+7-5=", "countdown": "3,5,8=16"}[task]
    assert load_task(task).steps_are_right(text, Problem(question, "14")) == right


def test_demonstrations_with_a_wrong_step_are_dropped(tmp_path, capsys):
    """Catches: a demonstration that is right by luck."""
    sound, lucky = "<think>19 14</think><answer>14</answer>", "<think>18 14</think><answer>14</answer>"
    rows = [record("12+7-5=", completion(sound, True), completion(lucky, True), answer="14", task="arithmetic")]
    assert [row["completion"] for row in make(tmp_path, rows, "--make", "correct")] == [sound, lucky]
    assert [row["completion"] for row in make(tmp_path, rows, "--make", "correct", "--right-steps")] == [sound]
    assert "completions dropped: 1 right answers after a wrong step" in capsys.readouterr().out
    others = [record("a", completion(sound, True))]
    flags = {"samples": write(tmp_path / "o.jsonl", others), "output": tmp_path / "x.jsonl", "right_steps": True}
    assert "has no problem of a task with steps_are_right" in refuse(curate, flags | {"make": "correct"}, capsys)
    assert "--right-steps: filters completions" in refuse(curate, flags, capsys)


def test_pairs_of_a_shorter_and_a_longer_right_answer(tmp_path):
    """Catches: a rejected completion that is wrong or cut; then the preference would be for being right."""
    texts = ["<think>long way</think><answer>1</answer>", "<answer>1</answer>", "<think>x</think><answer>1</answer>"]
    right = [completion(text, True) | {"length": len(text)} for text in texts]
    wrong = completion("", False) | {"length": 0}
    cut = completion("<think>" * 30, True, finished=False) | {"length": 999}
    rows = make(tmp_path, [record("a", *right, wrong, cut), record("b", right[0], wrong)], "--make", "shorter")
    assert rows == [{"prompt": "a", "chosen": texts[1], "rejected": texts[0]}]
    assert load_preference_pairs(str(tmp_path / "out.jsonl"))[0].chosen == texts[1]


def test_verifier_pairs_ask_as_the_verifier_does(tmp_path):
    right = [completion(f"<answer>{answer}</answer>", True) for answer in ("1", "1.0")]
    wrong = [completion(f"<answer>{answer}</answer>", False) for answer in ("2", "3", "2")]
    nothing = completion("<think>", False)
    rows = make(tmp_path, [record("a", *right, *wrong, nothing), record("b", *wrong)], "--make", "verifier")
    asked = ["Question: a\nReference answer: 1"] * 2 + ["Question: b\nReference answer: 1"] * 2
    assert [row["prompt"] for row in rows] == asked and asked[0] == verifier_prompt(problem("a", "1"))
    assert [(r["chosen"], r["rejected"]) for r in rows] == [("1", "2"), ("1.0", "3"), ("1", "2"), ("1", "3")]


def test_pairs_have_weights(tmp_path, capsys):
    rows = [
        {"prompt": "a", "chosen": "1", "rejected": "2", "weight": 3},
        {"prompt": "b", "chosen": "1", "rejected": "2"},
    ]
    assert [p.weight for p in load_preference_pairs(write(tmp_path / "p.jsonl", rows))] == [1.5, 0.5]
    for weight in (0, -1, "much", float("nan")):
        with pytest.raises(SystemExit):
            load_preference_pairs(write(tmp_path / "q.jsonl", [rows[0], rows[1] | {"weight": weight}]))
        assert "q.jsonl:2: field 'weight' is" in capsys.readouterr().err


def test_several_files_are_mixed(tmp_path, capsys):
    first = write(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "completion": "x"} for i in range(10)])
    second = write(tmp_path / "b.jsonl", [{"prompt": f"b{i}", "completion": "y"} for i in range(10)])
    mixed = [d.question for d in mix_demonstrations((first, f"{second}:3"), 100, "correct")]
    assert mixed[:10] == [f"a{i}" for i in range(10)] and len(set(mixed)) == 13 and mixed[10][0] == "b"
    assert len(mix_demonstrations((f"{first}:10", "arithmetic-demonstrations:7"), 100, "correct")) == 17
    for source in (f"{second}:11", f"{second}:0"):
        with pytest.raises(SystemExit) as stopped:
            mix_demonstrations((source,), 100, "correct")
        assert stopped.value.code == 2
        assert f"error: --data {source}: from 1 to 10 can be drawn from {second}\n" == capsys.readouterr().err
