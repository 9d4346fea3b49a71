"""Problems, prompts and samplers."""

import gzip
import json
import runpy
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import EMBEDDED

import common
from curate import decontaminate, drop_duplicates
from data import (
    Problem,
    ProblemSampler,
    add_mode,
    encode_completions,
    encode_problems,
    encode_prompts,
    follow_up_ids,
    is_held_out,
    load_demonstrations,
    load_eval_problems,
    load_problems,
    load_train_problems,
    read_problems,
)
from plumbing.files import write_jsonl
from plumbing.pairs import load_preference_pairs
from plumbing.rows import can_match
from rewards import accuracy_reward, format_reward
from tasks.arithmetic import demonstrations


def test_generated_problems_are_right_and_balanced():
    for problem in load_problems("arithmetic", "train", 600):
        terms = problem.question.rstrip("=").replace("-", "+-").split("+")
        totals = [sum(map(int, terms[: i + 1])) for i in range(len(terms))]
        assert totals[-1] == int(problem.answer) and all(0 <= total <= 99 for total in totals)
        assert problem.difficulty == len(terms) - 1
        signs = {int(term) > 0 for term in terms[1:]}
        assert problem.topic == ("mixed" if len(signs) == 2 else "add" if signs == {True} else "subtract")
    difficulties = [p.difficulty for p in load_problems("arithmetic", "eval", 60)]
    assert sorted(difficulties) == sorted(list(range(1, 7)) * 10)


def test_splits_are_disjoint_as_problems():
    """No question is in both splits, whatever the seeds; the hash decides, so nothing can leak later either."""
    train = {p.question for seed in (0, 1) for p in load_problems("arithmetic", "train", 6000, seed)}
    held_out = {p.question for seed in (0, 1) for p in load_problems("arithmetic", "eval", 3000, seed)}
    assert not train & held_out
    assert not any(map(is_held_out, train)) and all(map(is_held_out, held_out))
    assert 0.05 < sum(is_held_out(f"question {i}") for i in range(1000)) / 1000 < 0.15


def test_a_seed_fixes_the_problems_and_a_smaller_limit_takes_the_first():
    assert load_problems("arithmetic", "eval", 60) == load_problems("arithmetic", "eval", 60)
    assert load_problems("arithmetic", "eval", 60) == load_problems("arithmetic", "eval", 600)[:60]
    assert load_problems("arithmetic", "eval", 60, seed=1) != load_problems("arithmetic", "eval", 60)


def test_demonstrations_are_sloppy_but_not_random():
    texts = [completion for _, completion in demonstrations(2000)]
    right_format = sum(format_reward(text) for text in texts) / 2000
    assert 0.7 < right_format < 0.9
    right = 0
    for question, text in demonstrations(2000):
        terms = question.rstrip("=").replace("-", "+-").split("+")
        right += accuracy_reward(text, str(sum(map(int, terms))))
    assert 0.25 < right / 2000 < 0.55


def write(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_jsonl_problems(tmp_path):
    """question or prompt; GSM8K's worked solutions; numbers as answers; blank lines; optional fields."""
    path = write(
        tmp_path / "p.jsonl",
        {"question": "a?", "answer": "worked <<1+1=2>>2\n#### 1,072"},
        "",
        {"prompt": "b?", "answer": 18, "id": "b", "topic": "t", "difficulty": 3},
        {"question": "c?", "answer": "x^2"},
    )
    a, b, c = load_problems(path, "all")
    assert (a.question, a.answer, a.difficulty) == ("a?", "1,072", None)
    assert (b.question, b.answer, b.id, b.topic, b.difficulty) == ("b?", "18", "b", "t", 3)
    assert a.id == f"{path}:1" and c.id == f"{path}:4"


def test_a_row_keeps_its_columns_on_the_way_through_a_file(embedded, tmp_path):
    """Catches: lost columns; a pass rate or turns that come back as something else; token ids in a file."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]
    rows = [
        {"question": "1+1=", "answer": "2", "id": "a", "topic": "t", "difficulty": 3, "pass_rate": 0.25}
        | {"source": "gsm8k", "tests": [{"in": 1}], "nothing": None, "meta": {"level": 5}},
        {"question": turns, "answer": "1", "id": "b", "topic": "", "difficulty": None},
        {"question": "c", "answer": "1", "id": "c", "topic": "", "difficulty": None, "pass_rate": 0.0},
    ]
    path = write(tmp_path / "p.jsonl", *rows)
    problems = load_problems(path, "all")
    first, second, third = problems
    assert first.columns == {"source": "gsm8k", "tests": [{"in": 1}], "nothing": None, "meta": {"level": 5}}
    assert (first.pass_rate, second.pass_rate, third.pass_rate) == (0.25, None, 0.0)
    assert second.messages == (("system", "s"), ("user", "b")) and second.question == "b"
    assert first.messages is None and second.columns == {}
    encoded = encode_problems(embedded[1], problems, "", embedded[0].config, 8)
    assert all(problem.prompt_ids and isinstance(problem.prompt_ids, tuple) for problem in encoded)
    assert encoded == problems  # ids don't count in comparisons
    assert [problem.to_row() for problem in encoded] == rows
    write_jsonl(str(tmp_path / "again.jsonl"), [problem.to_row() for problem in encoded])
    again = load_problems(str(tmp_path / "again.jsonl"), "all")
    assert again == problems and [problem.columns for problem in again] == [problem.columns for problem in problems]
    assert len({*problems, *encoded, *again}) == 3  # hashable, columns or not
    assert replace(first, pass_rate=0.5) != first and replace(second, messages=None) != second


def test_a_jsonl_file_is_split_by_hash_unless_eval_data_is_given(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"question": f"q{i}", "answer": i} for i in range(200)))
    train, held_out = load_problems(path, "train"), load_problems(path, "eval")
    assert len(train) + len(held_out) == 200 and 5 < len(held_out) < 40
    assert load_eval_problems(path, None, 1000) == held_out
    assert load_train_problems(path, None) == train
    other = write(tmp_path / "e.jsonl", *({"question": f"e{i}", "answer": i} for i in range(20)))
    chosen = load_eval_problems(path, other, 7)
    assert len(chosen) == 7 and {p.question[0] for p in chosen} == {"e"}
    assert [p.question for p in chosen] != [f"e{i}" for i in range(7)]  # a random choice, not the first rows
    assert len(load_train_problems(path, other)) == 200  # with --eval-data nothing is held out of it


BAD_ROWS = [
    ('{"question": "a"', "p.jsonl:2: "),
    ("[1, 2]", "p.jsonl:2: a JSON object is expected, not list"),
    ({"question": "a"}, "p.jsonl:2: no field 'answer' (it has 'question')"),
    ({"answer": "a"}, "p.jsonl:2: no field 'question' (it has 'answer'); names that are read: question, prompt, "),
    ({"question": "a", "answer": ["b", "c"]}, "p.jsonl:2: field 'answer' is of type list"),
    ({"question": "a", "answer": True}, "p.jsonl:2: field 'answer' is of type bool"),
    ({"question": " ", "answer": "1"}, "p.jsonl:2: field 'question' is empty"),
    ({"question": "a", "answer": "####"}, "p.jsonl:2: field 'answer' has nothing after '####'"),
    ("[" * 100_000, "p.jsonl:2: "),
    (
        {"question": "a" * 10_000_000, "answer": "1"},
        "p.jsonl:2: field 'question' has 10000000 characters, at most 1000000",
    ),
    ({"question": "a", "answer": "1" * 10_000_000}, "p.jsonl:2: field 'answer' has 10000000 characters"),
    ({"b" * 10_000_000: 1}, "p.jsonl:2: no field 'answer'"),
    ({"question": "\ud800", "answer": "1"}, "p.jsonl:2: field 'question' holds half a surrogate pair"),
    ('{"question": "a", "answer": ' + "9" * 5000 + "}", "p.jsonl:2: "),
    ({"question": "a", "solution": "1 + 1 is 2."}, "p.jsonl:2: field 'solution' has no \\boxed{...} or '####'"),
    ({"question": "a", "answer": "1", "system": ["s"]}, "p.jsonl:2: field 'system' is of type list"),
    (
        {"question": "[{'role': 'user'}]", "answer": "1"},
        "p.jsonl:2: field 'question' is a text with a list of messages",
    ),
]


@pytest.mark.parametrize("row,message", BAD_ROWS, ids=[str(row)[:40] for row, _ in BAD_ROWS])
def test_a_bad_line_is_named(row, message, tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", {"question": "fine", "answer": "1", "id": "first"}, row)
    with pytest.raises(SystemExit) as stopped:
        load_problems(path, "all")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and len(error) < 1000


def test_many_bad_lines_are_all_counted(tmp_path, capsys):
    """Catches: a thousand lines of one error, or errors left out without a count."""
    rows = [{"question": "a", "answer": {}, f"b{i}": 1} for i in range(9)]
    refused(load_problems, write(tmp_path / "p.jsonl", *rows), "all")
    assert capsys.readouterr().err.endswith(
        "p.jsonl:1: field 'answer' is of type dict, text is expected (and 8 more like it)\n"
    )
    refused(load_problems, write(tmp_path / "p.jsonl", *({f"b{i}": 1} for i in range(9))), "all")
    error = capsys.readouterr().err
    assert all(f"p.jsonl:{line}: no field" in error for line in range(1, 6))
    assert error.count("\n") == 6 and "... and 4 other errors" in error


BAD_OPTIONS = [
    ({"difficulty": "7/8"}, "column 'difficulty' is not read in 1 of 2 rows: field 'difficulty' is '7/8', a number"),
    ({"difficulty": float("nan")}, "column 'difficulty' is not read in 1 of 2 rows: field 'difficulty' is 'nan'"),
    ({"difficulty": float("inf")}, "column 'difficulty' is not read in 1 of 2 rows: field 'difficulty' is 'inf'"),
    ({"topic": ["a"]}, "column 'topic' is not read in 1 of 2 rows: field 'topic' is of type list"),
    ({"subject": {"x": 1}}, "column 'subject' is not read in 1 of 2 rows: field 'subject' is of type dict"),
    ({"id": "first"}, "column 'id' is not read in 1 of 2 rows: field 'id' is 'first' a second time"),
    ({"id": ["x"]}, "column 'id' is not read in 1 of 2 rows: field 'id' is of type list"),
    (
        {"pass_rate": 1.5},
        "column 'pass_rate' is not read in 1 of 2 rows: field 'pass_rate' is 1.5, a number from 0 to 1",
    ),
    ({"pass_rate": "high"}, "column 'pass_rate' is not read in 1 of 2 rows: field 'pass_rate' is 'high', a number"),
]


@pytest.mark.parametrize(("column", "note"), BAD_OPTIONS, ids=[str(column) for column, _ in BAD_OPTIONS])
def test_an_optional_column_never_blocks(column, note, tmp_path, capsys):
    """Catches: a data set refused for a column that it need not have; such a column ignored in silence, or lost."""
    rows = {"question": "fine", "answer": "1", "id": "first"}, {"question": "a", "answer": "1"} | column
    first, second = load_problems(write(tmp_path / "p.jsonl", *rows), "all")
    assert second == Problem("a", "1", f"{tmp_path}/p.jsonl:2") and first.id == "first"
    assert f"note: {tmp_path}/p.jsonl: {note}" in capsys.readouterr().out
    assert "id" in column or str(column)[1:-1] in str(second.to_row())


def test_invalid_utf8_and_empty_and_missing_files(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_bytes(b'{"question": "\xff", "answer": "1"}\n')
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "zipped.jsonl").write_bytes(b"PK\3\4\0\0")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-4])
    (tmp_path / "long.csv").write_text("question,answer\n1,2,3\n")
    (tmp_path / "pretty.json").write_text(json.dumps({"question": "a", "answer": "1"}, indent=1))
    cases = [("zipped.jsonl", "neither UTF-8 text"), ("cut.jsonl.gz", "can't be read: Compressed file ended")]
    cases += [("long.csv", "can't be read: line 2 has more cells"), ("pretty.json", "if they take several: jq -c .")]
    for name, message in cases:
        refused(load_problems, str(tmp_path / name), "all")
        assert message in capsys.readouterr().err
    for name, message in (("bad", "bad.jsonl:1: invalid UTF-8"), ("empty", "is empty"), ("gone", "can't be read")):
        with pytest.raises(SystemExit):
            load_problems(str(tmp_path / f"{name}.jsonl"), "all")
        assert message in capsys.readouterr().err


FIRST, SECOND = {"question": "1+1=", "answer": "2"}, {"question": "2, or\n3?", "answer": "3"}
LINES = "".join(json.dumps(row) + "\n" for row in (FIRST, SECOND)).encode()


def parquet(rows: list[dict]) -> bytes:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(pyarrow.Table.from_pylist(rows), stream := pyarrow.BufferOutputStream())
    return stream.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.json", json.dumps([FIRST, SECOND], indent=1).encode()),
        ("a.csv", b'question,answer,gold,topic\r\n1+1=,,2,\r\n"2, or\n3?",3,,\r\n'),
        ("a.tsv", b'question\tanswer\n1+1=\t2\n"2, or\n3?"\t3\n'),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.json.gz", gzip.compress(json.dumps([FIRST, SECOND]).encode())),
        ("a.csv.gz", gzip.compress(b'question,answer\n1+1=,2\n"2, or\n3?",3\n')),
        ("a.parquet", [FIRST, SECOND]),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "content",
)
def test_formats(name, content, tmp_path, capsys):
    """Catches: a file that people have, read as other rows than JSON Lines, or turned away."""
    (tmp_path / name).write_bytes(parquet(content) if isinstance(content, list) else content)
    read = load_problems(str(tmp_path / name), "all")
    assert [(p.question, p.answer, p.topic) for p in read] == [("1+1=", "2", ""), ("2, or\n3?", "3", "")]
    assert f"problems: 2 from {tmp_path / name} (all); longest prompt: 8 characters\n" == capsys.readouterr().out


def test_parquet_without_its_library_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(load_problems, str(tmp_path / "a.parquet"), "all")
    assert capsys.readouterr().err == f"error: {tmp_path}/a.parquet: to read Parquet: pip install datasets\n"


VERL = {"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "q"}]}
PROBLEM_SHAPES = [
    (VERL | {"reward_model": {"ground_truth": "72", "style": "rule"}, "extra_info": {"index": 0}}, ("q", "72")),
    ({"problem": "q", "solution": r"So it is \boxed{\frac{1}{2}}.", "level": "Level 5"}, ("q", r"\frac{1}{2}")),
    ({"prompt": "q", "solution": r"$\dfrac{1}{2}$"}, ("q", r"$\dfrac{1}{2}$")),
    ({"ID": "2024-I-1", "Problem": "q", "Solution": "worked", "Answer": 204}, ("q", "204")),
    ({"question": "q", "final_answer": ["2"], "answer": None}, ("q", "2")),
    ({"problem": "q", "expected_answer": r"\boxed{5}"}, ("q", "5")),
    ({"query": "q", "ground_truth": 1.5}, ("q", "1.5")),
    ({"instruction": "Add.", "input": "1 and 2", "output": "So\n#### 3"}, ("Add.\n\n1 and 2", "3")),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}], "answer": "1"}, ("q", "1")),
    ({"question": "q", "answer": "1", "system": "s"}, ("q", "1")),
    ({"prompt": "\n\nHuman: q\n\nAssistant:", "answer": "1"}, ("q", "1")),
    ({"question": "q\nA) 1\nB) 2", "choices": ["1", "2"], "answer": "B"}, ("q\nA) 1\nB) 2", "B")),
]


@pytest.mark.parametrize(("row", "read"), PROBLEM_SHAPES, ids=[str(row)[:50] for row, _ in PROBLEM_SHAPES])
def test_columns_of_problems(row, read, tmp_path):
    """Catches: a published data set's question or answer read from the wrong column, or not at all."""
    (problem,) = load_problems(write(tmp_path / "p.jsonl", row), "all")
    assert (problem.question, problem.answer) == read
    system = "system" in row or "conversations" in row
    assert problem.messages == ((("system", "s"), ("user", "q")) if system else None)
    again = write(tmp_path / "again.jsonl", problem.to_row())
    assert load_problems(again, "all") == [problem]


def test_an_unread_column_that_the_question_needs_is_refused(tmp_path, capsys):
    """Catches: problems that nobody could answer, trained on in silence."""
    cases = {"choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "Body": "Ann has 3.", "context": "text"}
    for name, value in (cases | {"images": [{"bytes": "x"}], "tools": [{"name": "f"}], "input": 17}).items():
        refused(load_problems, write(tmp_path / "p.jsonl", {"question": "q?", "answer": "1", name: value}), "all")
        error = capsys.readouterr().err
        assert f"p.jsonl:1: field {name!r} is not read, but the question may need it: write it into 'question'" in error
    empty = {"choices": [], "input": "", "context": None, "options": {"A": None}}
    assert load_problems(write(tmp_path / "p.jsonl", {"question": "q?", "answer": "1"} | empty), "all")


def test_one_line_about_the_data(tmp_path, capsys):
    """Catches: gold answers that nothing can match, found after a day of training; and false alarms."""
    never = ["NaN", "$$", "The answer is 1.", "3 of the 5 boys", "5 < 6> </answer>"]
    fine = [
        "18",
        "9 (apples)",
        "18 eggs",
        "1,072",
        r"\frac{1}{2}",
        "x^2+1",
        "(C)",
        "New York",
        r"x=1 \text{ or } x=-2",
        "sin(2x)",
    ]
    fine += [r"\left( 3, \frac{\pi}{2} \right)", r"12\pi \text{ cm}", "even", r"(-\infty, 2) \cup (3, \infty)", "1:30"]
    assert [answer for answer in never + fine if not can_match(answer)] == never
    rows = [{"question": "q" * 1200, "answer": answer} for answer in (*never[:4], "1")]
    load_problems(write(tmp_path / "p.jsonl", *rows, {"nums": [1, 2], "target": 3}), "all")
    assert capsys.readouterr().out == (
        f"problems: 6 from {tmp_path}/p.jsonl (all); answers that match nothing, or only their very text: 4, such as "
        "'NaN', '$$', 'The answer is 1.'; repeated questions: 4; longest prompt: 1,200 characters\n"
    )


def test_no_held_out_problem_left_names_the_flag(tmp_path, capsys):
    question = next(f"q{i}" for i in range(100) if not is_held_out(f"q{i}"))
    path = write(tmp_path / "p.jsonl", {"question": question, "answer": "1"})
    with pytest.raises(SystemExit):
        load_eval_problems(path, None, 10)
    assert "--eval-data" in capsys.readouterr().err


def test_hub_datasets_through_the_datasets_library(tmp_path, capsys):
    """`datasets` reads a directory of files as a dataset, so the code for hub names runs here too."""
    pytest.importorskip("datasets")
    for split, count in (("train", 30), ("test", 5)):
        write(
            tmp_path / f"{split}.jsonl", *({"question": f"{split}{i}", "answer": f"w\n#### {i}"} for i in range(count))
        )
    assert len(load_problems(str(tmp_path), "train")) == 30
    assert [p.answer for p in load_problems(str(tmp_path), "eval")] == list("01234")
    named = load_problems(f"{tmp_path}::test", "all")  # a split that is named is used as a file is
    assert len(named) == 5 == len(load_eval_problems("arithmetic", f"{tmp_path}::test", 10))
    assert len(load_problems(f"{tmp_path}::train", "train")) == sum(not is_held_out(f"train{i}") for i in range(30))
    refused(load_problems, f"{tmp_path}::valid", "all")
    assert f"no rows in split 'valid' (it has train, test); to name one: {tmp_path}::train" in capsys.readouterr().err
    asked = {p.question for p in load_problems(str(tmp_path), "all")}
    assert len(asked) == 30 and not any("test" in question for question in asked)  # Catches: training on the test split


def test_an_unreachable_hub_dataset_is_one_line(capsys):
    pytest.importorskip("datasets")
    with pytest.raises(SystemExit):
        load_problems("nobody/nothing", "train")
    assert "nobody/nothing: neither a file nor a hub dataset" in capsys.readouterr().err


def test_prompts_of_the_embedded_model(embedded):
    """The system prompt is ignored by its template; no text crashes its tokenizer; the tags are single tokens that
    survive decoding without special tokens."""
    _, tokenizer = embedded
    (plain,), (with_system,) = encode_prompts(tokenizer, ["1+1="]), encode_prompts(tokenizer, ["1+1="], "Use tags.")
    assert plain == with_system and tokenizer.decode(plain) == "1+1="
    strange = "é\0\u202e<think> \n\t{{ x }}{% 中 <eos>"
    assert encode_prompts(tokenizer, [strange])[0]
    text = "<think>19 14</think><answer>14</answer>"
    (ids,) = encode_completions(tokenizer, [text], [[5]])
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert len(ids) == 4 + 5 + 2 + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


SYSTEM_REFUSED = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "[{{ m.content }}]{% endfor %}"
)


def test_templates(embedded):
    """Without a template the prompt is the bare question. If it refuses a system turn, that text begins the user's
    turn. A BOS that the template writes is not doubled."""
    tokenizer = common.load_tokenizer(EMBEDDED)
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompts(tokenizer, ["7+1="], "Think.")[0]) == "7+1="
    tokenizer.chat_template = SYSTEM_REFUSED
    assert tokenizer.decode(encode_prompts(tokenizer, ["7+1="], "Think.")[0]) == "[Think.\n\n7+1=]"
    tokenizer.bos_token = "<eos>"
    tokenizer.chat_template = "{{ bos_token }}{{ messages[-1].content }}"
    assert encode_prompts(tokenizer, ["7+1="])[0].count(tokenizer.bos_token_id) == 1


def refused(load, *arguments):
    with pytest.raises(SystemExit) as stopped:
        load(*arguments)
    assert stopped.value.code == 2


def turn(role, content):
    return {"role": role, "content": content}


def test_conversations_are_understood(tmp_path):
    """TRL's formats: prompts, completions and pairs as messages; a single user turn equals its text."""
    asked = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": [turn("user", "plain")], "answer": "1"},
        {"prompt": asked, "answer": "2"},
        {"messages": asked, "answer": "3", "id": "x"},
    )
    first, second, third = load_problems(path, "all")
    turns = tuple((message["role"], message["content"]) for message in asked)
    assert (first.question, first.messages) == ("plain", None)
    assert (second.question, second.messages) == (third.question, third.messages) == ("a\n\nb\n\nc", turns)

    answer = [turn("assistant", "d")]
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": asked, "completion": answer},
        {"messages": asked + answer},
        {"prompt": "q", "completion": "d"},
        {"messages": [turn("user", "q"), turn("assistant", "d")]},
    )
    made = [(d.question, d.messages, d.completion) for d in load_demonstrations(path, 0)]
    assert made == [(second.question, turns, "d")] * 2 + [("q", None, "d")] * 2

    worse = [turn("assistant", "e")]
    path = write(
        tmp_path / "c.jsonl",
        {"prompt": asked, "chosen": answer, "rejected": worse},
        {"chosen": [turn("user", "q")] + answer, "rejected": [turn("user", "q")] + worse},
        {"prompt": "r", "chosen": "d", "rejected": "e"},
    )
    pairs = load_preference_pairs(path)
    assert [(p.question, p.chosen, p.rejected) for p in pairs] == [(q, "d", "e") for q in (second.question, "q", "r")]
    assert [p.messages for p in pairs] == [turns, None, None]


def test_a_mode_stands_at_the_end_of_the_users_last_turn():
    """The mode is added to the text, by which the sample is found again, and to the turn, which the model reads; "" and
    None change nothing."""
    turns = (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    for mode in ("", None):
        assert add_mode("a\n\nb\n\nc", turns, mode) == ("a\n\nb\n\nc", turns)
    asked = add_mode("a\n\nb\n\nc", turns, "no_think")
    assert asked == ("a\n\nb\n\nc /no_think", (*turns[:3], ("user", "c /no_think")))
    assert add_mode("1+1=", None, "think") == ("1+1= /think", None)


def test_a_system_turn_or_a_mode_makes_no_other_problem(tmp_path):
    """With a system turn or a mode a question keeps its split and is still a duplicate; decontamination does not look
    at system turns."""
    rows = [{"prompt": [turn("system", "s"), turn("user", f"q{i}")], "answer": "1"} for i in range(50)]
    for i, chat in enumerate(load_problems(write(tmp_path / "p.jsonl", *rows), "all")):
        assert chat.messages[0] == ("system", "s")
        assert is_held_out(f"q{i}") == is_held_out(chat.question) == is_held_out(add_mode(f"q{i}", None, "no_think")[0])
        assert is_held_out(chat.question) == is_held_out(add_mode(chat.question, chat.messages, "think")[0])
    system = " ".join(f"word{i}" for i in range(20))
    rows = [{"prompt": [turn("system", system), turn("user", f"{who} has 7 apples")], "answer": "7"} for who in "ab"]
    ours, theirs = load_problems(write(tmp_path / "q.jsonl", *rows), "all")
    problems, dropped = [ours, Problem("a has 7 apples", "7", "2")], Counter()
    assert drop_duplicates(problems, 1.0, dropped) == problems[:1]
    assert decontaminate(problems, [theirs], 13, dropped) == problems


def test_conversations_reach_the_template(embedded):
    """All turns arrive in order; a conversation's own system turn stays; a mode ends the last user turn."""
    tokenizer = common.load_tokenizer(EMBEDDED)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}[{{ m.content }}]{% endfor %}"
    short, long = (("user", "1"), ("assistant", "2"), ("user", "3")), "4"
    own = ("system", "5"), ("user", "6")
    assert [tokenizer.decode(ids) for ids in encode_prompts(tokenizer, [short, long, own], "S")] == [
        "s[S]u[1]a[2]u[3]",
        "s[S]u[4]",
        "s[5]u[6]",
    ]
    _, asked = add_mode("1\n\n2\n\n3", short, "think")
    assert tokenizer.decode(encode_prompts(tokenizer, [asked])[0]) == "u[1]a[2]u[3 /think]"
    problem = Problem("1\n\n2\n\n3", "4", messages=short)
    (encoded,) = encode_problems(tokenizer, [problem], "S", embedded[0].config, 8, mode="think")
    assert tokenizer.decode(encoded.prompt_ids) == "s[S]u[1]a[2]u[3 /think]" and encoded == problem
    tokenizer.chat_template = SYSTEM_REFUSED
    assert [tokenizer.decode(ids) for ids in encode_prompts(tokenizer, [short, long, own], "S")] == [
        "[S\n\n1][2][3]",
        "[S\n\n4]",
        "[5\n\n6]",
    ]
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompts(tokenizer, [own])[0]) == "5\n\n6"


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_follow_up_is_the_rest_of_the_conversation(embedded):
    """Prompt, completion and follow-up together equal the template's text of the whole conversation, with one end of
    the turn, whether the completion ended or was cut."""
    tokenizer = common.load_tokenizer(EMBEDDED)
    assert tokenizer.decode(follow_up_ids(tokenizer, "2+2=")) == "2+2="
    assert tokenizer.decode(follow_up_ids(tokenizer, "2+2=", finished=False)) == "<eos>2+2="
    tokenizer.chat_template = None
    assert tokenizer.decode(follow_up_ids(tokenizer, "2+2=")) == "\n\n2+2="

    tokenizer = common.load_tokenizer(EMBEDDED)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    head = tokenizer.decode(follow_up_ids(tokenizer, "Check it."))
    assert head == "\n<|im_start|>user\nCheck it.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(follow_up_ids(tokenizer, "Check it.", finished=False)) == "<|im_end|>" + head
    whole = (("user", "1+1="), ("assistant", "2"), ("user", "Check it."))
    (prompt,), (expected,) = encode_prompts(tokenizer, ["1+1="]), encode_prompts(tokenizer, [whole])
    (completion,) = encode_completions(tokenizer, ["2"], [prompt])
    assert prompt + completion + follow_up_ids(tokenizer, "Check it.") == expected
    assert prompt + completion[:-1] + follow_up_ids(tokenizer, "Check it.", finished=False) == expected


def test_a_follow_up_may_hold_any_text(embedded):
    """Catches: a marker that is found in the user's text."""
    for text in ("50%% of 8", "%%", "%%%"):
        assert embedded[1].decode(follow_up_ids(embedded[1], text)) == text


BAD_CONVERSATIONS = [
    ({"prompt": [turn("assistant", "a")], "answer": "1"}, "field 'prompt': a prompt must end with the user's turn"),
    ({"prompt": [], "answer": "1"}, "field 'prompt' is empty"),
    ({"prompt": ["a"], "answer": "1"}, "field 'prompt': each message needs a role and a content"),
    ({"prompt": [{"role": "user"}], "answer": "1"}, "field 'prompt': each message needs a role and a content"),
    ({"prompt": [turn("user", [{"type": "image"}])], "answer": "1"}, "field 'prompt': roles and contents must be text"),
    ({"prompt": [turn("user", " ")], "answer": "1"}, "field 'prompt': the user's turn is empty"),
]
BAD_DEMONSTRATIONS = [
    ({"messages": [turn("user", "a")]}, "no field 'completion'"),
    ({"messages": "a"}, "no field 'completion'"),
    ({"prompt": "a", "completion": [turn("user", "b")]}, "field 'completion': its last turn must be the assistant's"),
    ({"prompt": "a", "completion": [turn("user", "b"), turn("assistant", "c")]}, "field 'completion': its first turns"),
    ({"prompt": "a", "completion": " "}, "field 'completion' is empty"),
    ({"prompt": "a", "completion": "b", "label": False}, "field 'label' is false"),
    ({"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}, "field 'tools' is not read"),
    (
        {"messages": [turn("user", "a"), turn("assistant", "b") | {"tool_calls": [1]}]},
        "field 'messages': a message has",
    ),
]


@pytest.mark.parametrize("row,message", BAD_CONVERSATIONS + BAD_DEMONSTRATIONS)
def test_a_bad_conversation_is_named(row, message, tmp_path, capsys):
    load = load_problems if "answer" in row else load_demonstrations
    path = write(tmp_path / "p.jsonl", row)
    with pytest.raises(SystemExit) as stopped:
        load(path, "all" if "answer" in row else 0)
    assert stopped.value.code == 2
    assert f"p.jsonl:1: {message}" in capsys.readouterr().err


def chat(*texts, system=()):
    """Turns that alternate between user and assistant, the last one the assistant's."""
    roles = ["assistant", "user"] * len(texts)
    return [*system, *(turn(role, text) for role, text in zip(roles[len(texts) - 1 :: -1], texts, strict=True))]


def test_chat():
    assert chat("a", "b") == [turn("user", "a"), turn("assistant", "b")] and chat("b") == [turn("assistant", "b")]


SYSTEM = ({"role": "system", "content": "s"},)
HH = "\n\nHuman: q\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
PAIR_SHAPES = [
    ({"chosen": HH + "d", "rejected": HH + "e"}, "q\n\nb\n\nc", None),
    ({"prompt": HH, "chosen": " d", "rejected": " e"}, "q\n\nb\n\nc", None),
    ({"prompt": chat("q", "b", "c", "x")[:3], "chosen": chat("d"), "rejected": chat("e")}, "q\n\nb\n\nc", None),
    (
        {"prompt": chat("q", "x")[:1], "chosen": chat("b", "c", "d"), "rejected": chat("b", "c", "e")},
        "q\n\nb\n\nc",
        None,
    ),
    ({"prompt": "q", "chosen": chat("q", "b", "c", "d"), "rejected": chat("q", "b", "c", "e")}, "q\n\nb\n\nc", None),
    ({"prompt": "q", "chosen": chat("q", "d"), "rejected": chat("q", "e"), "messages": chat("q", "d")}, "q", None),
    ({"chosen": chat("q", "d", system=SYSTEM), "rejected": chat("q", "e", system=SYSTEM)}, "q", "s"),
    ({"prompt": [*SYSTEM, turn("user", "q")], "chosen": chat("q", "d"), "rejected": chat("q", "e")}, "q", "s"),
    ({"system": "s", "chosen": chat("q", "d"), "rejected": chat("q", "e")}, "q", "s"),
    ({"system": "s", "question": "q", "chosen": "d", "rejected": "e"}, "q", "s"),
    (
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "d"}}
        | {"rejected": {"from": "gpt", "value": "e"}},
        *("q", None),
    ),
]


@pytest.mark.parametrize(("row", "question", "system"), PAIR_SHAPES, ids=[str(row)[:50] for row, *_ in PAIR_SHAPES])
def test_columns_of_pairs(row, question, system, tmp_path):
    """Catches: a prompt that is lost, doubled, or cut; a pair of whole conversations."""
    (pair,) = load_preference_pairs(write(tmp_path / "c.jsonl", row))
    assert (pair.question, pair.chosen.strip(), pair.rejected.strip()) == (question, "d", "e")
    turns = [turn for turn in pair.messages or (("user", question),) if turn[0] != "system"]
    assert "\n\n".join(text for _, text in turns) == question and [role for role, _ in turns] == (
        ["user", "assistant", "user"] if "\n" in question else ["user"]
    )
    assert ((pair.messages or ())[:1] == (("system", "s"),)) == (system == "s")


def test_pairs_that_contradict_themselves_are_refused_and_useless_ones_counted(tmp_path, capsys):
    """Catches: chosen answers of another prompt than the row's; a large data set refused for two equal answers."""
    other = {"prompt": "q", "chosen": chat("x", "d"), "rejected": chat("x", "e")}
    systems = {"system": "t", "chosen": chat("q", "d", system=SYSTEM), "rejected": chat("q", "e", system=SYSTEM)}
    tools = {"chosen": chat("q", "d"), "rejected": chat("q", "e"), "tools": [{"name": "f"}]}
    told = "'chosen': its first turns are not the prompt's", "different system turns", "field 'tools' is not read"
    for row, message in zip((other, systems, tools), told, strict=True):
        refused(load_preference_pairs, write(tmp_path / "c.jsonl", row))
        assert message in capsys.readouterr().err
    good, useless = {"prompt": "q", "chosen": "d", "rejected": "e"}, {"prompt": "r", "chosen": "d", "rejected": "d"}
    assert len(load_preference_pairs(write(tmp_path / "c.jsonl", good, useless, useless | {"rejected": ""}))) == 1
    assert "dropped: 2 equal or empty completions" in capsys.readouterr().out


THINKING = turn("assistant", "2") | {"reasoning_content": "1+1\n", "tool_calls": None}
DEMONSTRATION_SHAPES = [
    ({"messages": [turn("user", "q"), THINKING]}, ("q", "<think>\n1+1\n</think>\n\n2", None)),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ("q", "a", None)),
    ({"instruction": "i", "input": "x", "output": "a"}, ("i\n\nx", "a", None)),
    ({"instruction": "i", "input": "", "output": "a", "system": "s"}, ("i", "a", (("system", "s"), ("user", "i")))),
    ({"system_prompt": "s", "question": "q", "response": "a"}, ("q", "a", (("system", "s"), ("user", "q")))),
    (
        {"problem": "q", "solution": r"So \boxed{2}", "messages": chat("q", r"So \boxed{2}")},
        ("q", r"So \boxed{2}", None),
    ),
    ({"prompt": "q", "completion": "a", "label": True}, ("q", "a", None)),
    (
        {"prompt": chat("q", "x")[:1], "completion": [turn("assistant", [{"type": "text", "text": "a"}])]},
        ("q", "a", None),
    ),
]


@pytest.mark.parametrize(("row", "read"), DEMONSTRATION_SHAPES, ids=[str(row)[:50] for row, _ in DEMONSTRATION_SHAPES])
def test_columns_of_demonstrations(row, read, tmp_path):
    """Catches: reasoning, an input or a system text that is lost on the way to SFT."""
    (d,) = load_demonstrations(write(tmp_path / "d.jsonl", row), 0)
    assert (d.question, d.completion, d.messages) == read


def test_demonstrations_and_pairs_from_the_hub(tmp_path):
    """Catches: names of hub data sets that only --problems understands."""
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", {"prompt": "q", "completion": "a", "chosen": "a", "rejected": "b"})
    assert [d.completion for d in load_demonstrations(str(tmp_path), 0)] == ["a"]
    assert [p.rejected for p in load_preference_pairs(f"{tmp_path}::train")] == ["b"]


def test_a_bad_conversational_pair_is_named(tmp_path, capsys):
    chosen, rejected = ([turn("user", q), turn("assistant", q)] for q in "ab")
    with pytest.raises(SystemExit):
        load_preference_pairs(write(tmp_path / "p.jsonl", {"chosen": chosen, "rejected": rejected}))
    assert "p.jsonl:1: chosen and rejected differ before their last turns" in capsys.readouterr().err


def test_sampler_shows_every_problem_once_an_epoch_and_resumes_exactly():
    problems = load_problems("arithmetic", "train", 50)
    sampler, same, other = (ProblemSampler(problems, seed=seed) for seed in (1, 1, 2))
    draws = [sampler.draw(20) for _ in range(10)]
    flat = sum(draws, [])
    assert all(Counter(flat[i : i + 50]) == Counter(problems) for i in (0, 50, 100, 150))
    assert flat[:50] != flat[50:100]
    assert other.draw(20) != draws[0]
    first = [same.draw(20) for _ in range(4)]
    same.record(first[3], [0.5] * 20)
    with pytest.raises(SystemExit):  # the problem file has changed since
        ProblemSampler(problems[:-1], seed=1).load_state_dict(same.state_dict())
    resumed = ProblemSampler(problems, seed=1)
    resumed.load_state_dict(json.loads(json.dumps(same.state_dict())))
    assert first + [resumed.draw(20) for _ in range(6)] == draws
    for i, problem in enumerate(problems):
        assert resumed.attempts[i] == (problem in first[3]) and resumed.successes[i] == 0.5 * (problem in first[3])


@pytest.mark.parametrize("mode", ["uniform", "curriculum", "prioritized"])
def test_a_rate_is_recorded_for_its_problem(mode):
    """Catches: a rate recorded for another problem, also if a draw holds one twice (where an epoch ends, or with fewer
    items than asked for)."""
    problems = [Problem("same", str(i), difficulty=i % 2) for i in range(4)]
    sampler = ProblemSampler(problems, mode, seed=3)
    attempts, successes = [0] * 4, [0.0] * 4
    for step in range(6):
        drawn = sampler.draw(6, step)  # six of four: two or more come twice
        rates = [(step + place) / 20 for place in range(6)]
        for problem, rate in zip(drawn, rates, strict=True):
            attempts[int(problem.answer)] += 1
            successes[int(problem.answer)] += rate
        sampler.record(drawn, rates)
        assert sampler.attempts == attempts and sampler.successes == pytest.approx(successes)
    assert sum(attempts) == 36
    rates = [s / n for s, n in zip(successes, attempts, strict=True)]
    assert sampler.summary() | {"sampler/unweighted": 0} == pytest.approx(
        {"sampler/seen": 1.0, "sampler/success_rate": sum(rates) / 4, "sampler/unweighted": 0}
    )
    with pytest.raises(ValueError):
        sampler.record(drawn[:5], rates[:5])  # five rates for six draws


def test_a_sampler_takes_any_items():
    """Demonstrations and pairs as well as problems; only a curriculum looks at them."""
    assert sorted(ProblemSampler(["a", "b", "c"], seed=1).draw(3)) == ["a", "b", "c"]
    with pytest.raises(SystemExit):
        ProblemSampler([Problem("a", "1")], "curriculum")


def test_a_curriculum_begins_with_the_easiest_and_ends_with_all():
    """Catches: a run stuck at the easy ones; a run resumed with more iterations drawing others; repeats in a draw."""
    problems = load_problems("arithmetic", "train", 600)
    sampler, draws = ProblemSampler(problems, "curriculum", seed=1, iterations=60), []
    for step in range(60):
        draws.append(sampler.draw(20, step))
        assert len({p.id for p in draws[-1]}) == 20
        if step == 30:
            state = json.loads(json.dumps(sampler.state_dict()))
    difficulties = [[p.difficulty for p in draw] for draw in draws]
    assert set(difficulties[0]) == {1} and max(difficulties[19]) == 2 and set(difficulties[59]) == {1, 2, 3, 4, 5, 6}
    means = [sum(sum(d) for d in difficulties[i : i + 10]) / 200 for i in range(0, 60, 10)]
    assert means == sorted(means) and 3.0 < means[-1] < 3.5
    after = [p.difficulty for step in range(60, 80) for p in sampler.draw(20, step)]
    assert 3.3 < sum(after) / 400 < 3.7
    longer = ProblemSampler(problems, "curriculum", seed=1, iterations=200)
    longer.load_state_dict(state)
    assert [longer.draw(20, step) for step in range(31, 60)] == draws[31:]
    other = ProblemSampler(problems, "curriculum", seed=2, iterations=60)
    assert other.draw(20, 0) != draws[0]
    with pytest.raises(ValueError, match="paced by iterations"):
        other.draw(20)


def test_rounds_of_an_iteration_do_not_hurry_a_curriculum():
    """Catches: a curriculum paced by draws, which the further rounds of dynamic sampling run through too fast; a round
    that draws the problems of the one before."""
    problems = load_problems("arithmetic", "train", 600)
    once, often = (ProblemSampler(problems, "curriculum", seed=1, iterations=60) for _ in range(2))
    for iteration in range(31):
        single = [once.draw(20, iteration)]
        rounds = [often.draw(20, iteration) for _ in range(4)]
    assert len({p.id for draw in rounds for p in draw}) > 60
    hardest = sorted(p.difficulty for p in problems)[300 - 1]
    for draws in (single, rounds):
        assert max(p.difficulty for draw in draws for p in draw) == hardest == 3


def test_prioritized_prefers_what_fails_and_loses_nothing_for_good():
    """The chance is proportional to 1 - recent success rate, at least 0.05: problems solved half the time come about
    ten times as often as problems always solved. A resumed sampler draws the same."""
    problems = load_problems("arithmetic", "train", 20)
    sampler, solved = ProblemSampler(problems, "prioritized", seed=1), set(problems[:10])
    for _ in range(8):  # the recent rate goes half of the way each time
        everything = sampler.draw(20)
        assert set(everything) == set(problems)
        sampler.record(everything, [1.0 if problem in solved else 0.5 for problem in everything])
    assert sampler.rates[0] == pytest.approx(1 - 0.5**8) and sampler.rates[19] == pytest.approx(0.5 - 0.5**9)
    state = json.loads(json.dumps(sampler.state_dict()))
    draws = [sampler.draw(1)[0] for _ in range(4000)]
    share = sum(problem in solved for problem in draws) / 4000
    assert 0.05 / 0.55 - 0.02 < share < 0.05 / 0.55 + 0.02
    assert set(draws) == set(problems)
    assert len(set(sampler.draw(20))) == 20 and len(sampler.draw(50)) == 50
    resumed = ProblemSampler(problems, "prioritized", seed=1)
    resumed.load_state_dict(state)
    assert [resumed.draw(1)[0] for _ in range(100)] == draws[:100]
    assert resumed.summary() == {"sampler/seen": 1.0, "sampler/success_rate": 0.75, "sampler/unweighted": 0}
    with pytest.raises(ValueError, match="mode"):
        ProblemSampler(problems, "random")


def test_prioritized_begins_with_known_pass_rates():
    """Catches: known rates ignored, so that problems look alike until each was drawn, for which 1,920 draws don't
    suffice; a difficulty, which may mean anything, taken for a rate; problems of unknown rate drawn first, or last."""
    problems = [Problem(str(i), "1", difficulty=i / 100, pass_rate=1.0 if i < 50 else 0.5) for i in range(100)]
    problems += [Problem("unknown", "1", difficulty=1.0)]
    sampler = ProblemSampler(problems, "prioritized", seed=1)
    assert sampler.rates == [1.0] * 50 + [0.5] * 50 + [0.75]
    drawn = [p for _ in range(300) for p in sampler.draw(5)]
    share = sum(p.pass_rate == 1.0 for p in drawn) / 1500
    assert 0.05 / 0.55 - 0.03 < share < 0.05 / 0.55 + 0.03


def test_without_a_floor_what_is_solved_is_left_until_nothing_else_is():
    problems = [Problem(str(i), "1", pass_rate=1.0 if i < 6 else 0.5) for i in range(10)]
    sampler = ProblemSampler(problems, "prioritized", seed=1, floor=0.0)
    assert all({p.pass_rate for p in sampler.draw(4)} == {0.5} for _ in range(20))
    assert sampler.summary()["sampler/unweighted"] == 0
    seven = [sampler.draw(7) for _ in range(30)]
    assert all(sum(p.pass_rate == 0.5 for p in draw) == 4 for draw in seven)
    assert len({p.question for draw in seven for p in draw}) == 10 and sampler.summary()["sampler/unweighted"] == 90


def test_demonstrations_from_jsonl(tmp_path, capsys):
    path = write(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"}, {"question": "c", "completion": "d"})
    assert [(d.question, d.completion) for d in load_demonstrations(path, 0)] == [("a", "b"), ("c", "d")]
    with pytest.raises(SystemExit):
        load_demonstrations(write(tmp_path / "e.jsonl", {"prompt": "a", "answer": "b"}), 0)
    assert "e.jsonl:1: no field 'completion'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shipped_in", "flags"), [(EMBEDDED, ()), ("models/tiny-countdown", ("--characters", "等一下"))]
)
def test_make_tiny_writes_the_shipped_tokenizer(shipped_in, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", str(tmp_path), *flags])
    runpy.run_path("models/make_tiny.py", run_name="__main__")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == Path(shipped_in, name).read_text()
    made, shipped = (json.loads(Path(d, "config.json").read_text()) for d in (tmp_path, shipped_in))
    assert made | {"transformers_version": ""} == shipped | {"transformers_version": ""}


def test_maths_own_columns_are_read():
    """MATH has other column names; if they are not read, there is no answer, difficulty or topic."""
    row = {"problem": "1+1?", "solution": r"So $1+1 = \boxed{2}$.", "level": "Level 5", "type": "Algebra"}
    hub = {"problem": "x", "answer": "3", "solution": r"\boxed{4}", "level": 2, "subject": "Geometry"}
    ours = {"question": "y", "answer": "5", "difficulty": 7, "topic": "mine", "level": "Level 1", "type": "z"}
    odd = {"question": "z", "answer": "6", "level": "hard", "type": ["a"]}
    read = read_problems([(str(i), row) for i, row in enumerate((row, hub, ours, odd))], "rows")
    assert [(p.answer, p.difficulty, p.topic) for p in read] == [
        ("2", 5, "Algebra"),
        ("3", 2, "Geometry"),
        ("5", 7, "mine"),
        ("6", None, ""),
    ]
    with pytest.raises(SystemExit):
        read_problems([("row", {"problem": "x", "solution": "no box"})], "rows")
