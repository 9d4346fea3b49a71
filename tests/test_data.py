"""Problems, prompts and samplers."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import EMBEDDED

import common
from data import (
    Problem,
    ProblemSampler,
    arithmetic_demonstrations,
    conversation,
    decontaminate,
    drop_duplicates,
    encode_completions,
    encode_prompts,
    is_held_out,
    load_demonstrations,
    load_eval_problems,
    load_preference_pairs,
    load_problems,
    load_train_problems,
    mode_question,
    plain_text,
)
from rewards import accuracy_reward, format_reward


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
    texts = [completion for _, completion in arithmetic_demonstrations(2000)]
    right_format = sum(format_reward(text) for text in texts) / 2000
    assert 0.7 < right_format < 0.9
    right = 0
    for question, text in arithmetic_demonstrations(2000):
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


def test_a_jsonl_file_is_split_by_hash_unless_eval_data_is_given(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"question": f"q{i}", "answer": i} for i in range(200)))
    train, held_out = load_problems(path, "train"), load_problems(path, "eval")
    assert len(train) + len(held_out) == 200 and 5 < len(held_out) < 40
    assert load_eval_problems(path, None, 1000) == held_out
    assert load_train_problems(path, None) == train
    other = write(tmp_path / "e.jsonl", *({"question": f"e{i}", "answer": i} for i in range(20)))
    chosen = load_eval_problems(path, other, 7)
    assert len(chosen) == 7 and {p.question[0] for p in chosen} == {"e"}
    assert [p.question for p in chosen] != [f"e{i}" for i in range(7)]  # a choice, not the file's head
    assert len(load_train_problems(path, other)) == 200  # nothing is held out of the one where the other is given


BAD_ROWS = [
    ('{"question": "a"', "p.jsonl:2: "),
    ("[1, 2]", "p.jsonl:2: a JSON object is expected, not list"),
    ({"question": "a"}, "p.jsonl:2: no field 'answer' (it has 'question')"),
    ({"answer": "a"}, "p.jsonl:2: no field 'question' or 'prompt' or 'problem' or 'messages'"),
    ({"question": "a", "answer": ["b"]}, "p.jsonl:2: field 'answer' is of type list"),
    ({"question": "a", "answer": True}, "p.jsonl:2: field 'answer' is of type bool"),
    ({"question": " ", "answer": "1"}, "p.jsonl:2: field 'question' is empty"),
    ({"question": "a", "answer": "####"}, "p.jsonl:2: nothing stands behind '####'"),
    ({"question": "a", "answer": "1", "difficulty": "hard"}, "p.jsonl:2: field 'difficulty' is 'hard', a number"),
    ("[" * 100_000, "p.jsonl:2: "),
    (
        {"question": "a" * 10_000_000, "answer": "1"},
        "p.jsonl:2: field 'question' has 10000000 characters, at most 1000000",
    ),
    ({"question": "a", "answer": "1" * 10_000_000}, "p.jsonl:2: field 'answer' has 10000000 characters"),
    ({"b" * 10_000_000: 1}, "p.jsonl:2: no field 'answer'"),
    ({"question": "a", "answer": "1", "id": "first"}, "p.jsonl:2: id 'first' is the one of"),
    ({"question": "a", "answer": "1", "id": ["x"]}, "p.jsonl:2: field 'id' is of type list"),
    ({"question": "a", "answer": "1", "topic": {"x": 1}}, "p.jsonl:2: field 'topic' is of type dict"),
    ({"question": "\ud800", "answer": "1"}, "p.jsonl:2: field 'question' holds half a surrogate pair"),
    ('{"question": "a", "answer": "1", "difficulty": NaN}', "p.jsonl:2: field 'difficulty' is 'nan', a number"),
    ('{"question": "a", "answer": "1", "difficulty": 1e999}', "p.jsonl:2: field 'difficulty' is 'inf', a number"),
    ('{"question": "a", "answer": ' + "9" * 5000 + "}", "p.jsonl:2: "),
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
    path = write(tmp_path / "p.jsonl", *["{"] * 9)
    with pytest.raises(SystemExit):
        load_problems(path, "all")
    error = capsys.readouterr().err
    assert all(f"p.jsonl:{line}:" in error for line in range(1, 6))
    assert "... and 4 more" in error


def test_invalid_utf8_and_empty_and_missing_files(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_bytes(b'{"question": "\xff", "answer": "1"}\n')
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for name, message in (("bad", "bad.jsonl:1: invalid UTF-8"), ("empty", "is empty"), ("gone", "can't be read")):
        with pytest.raises(SystemExit):
            load_problems(str(tmp_path / f"{name}.jsonl"), "all")
        assert message in capsys.readouterr().err


def test_no_held_out_problem_left_names_the_flag(tmp_path, capsys):
    question = next(f"q{i}" for i in range(100) if not is_held_out(f"q{i}"))
    path = write(tmp_path / "p.jsonl", {"question": question, "answer": "1"})
    with pytest.raises(SystemExit):
        load_eval_problems(path, None, 10)
    assert "--eval-data" in capsys.readouterr().err


def test_hub_datasets_through_the_datasets_library(tmp_path):
    """A directory of files is a data set to `datasets`, so the path that a hub name takes runs here too."""
    pytest.importorskip("datasets")
    for split, count in (("train", 30), ("test", 5)):
        write(
            tmp_path / f"{split}.jsonl", *({"question": f"{split}{i}", "answer": f"w\n#### {i}"} for i in range(count))
        )
    assert len(load_problems(str(tmp_path), "train")) == 30
    assert [p.answer for p in load_problems(str(tmp_path), "eval")] == list("01234")
    asked = {p.question for p in load_problems(str(tmp_path), "all")}
    assert len(asked) == 30 and not any("test" in question for question in asked)  # Pins: training on the test split


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
    """None: the bare question. One that refuses a system turn: its text leads the user's turn. A BOS that the template
    writes is not doubled."""
    tokenizer = common.load_tokenizer(EMBEDDED)
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompts(tokenizer, ["7+1="], "Think.")[0]) == "7+1="
    tokenizer.chat_template = SYSTEM_REFUSED
    assert tokenizer.decode(encode_prompts(tokenizer, ["7+1="], "Think.")[0]) == "[Think.\n\n7+1=]"
    tokenizer.bos_token = "<eos>"
    tokenizer.chat_template = "{{ bos_token }}{{ messages[-1].content }}"
    assert encode_prompts(tokenizer, ["7+1="])[0].count(tokenizer.bos_token_id) == 1


def turn(role, content):
    return {"role": role, "content": content}


def test_conversations_are_understood(tmp_path):
    """TRL's formats: prompts, completions and pairs as messages; a lone user's turn is the same as its text."""
    asked = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": [turn("user", "plain")], "answer": "1"},
        {"prompt": asked, "answer": "2"},
        {"messages": asked, "answer": "3", "id": "x"},
    )
    first, second, third = load_problems(path, "all")
    assert first.question == "plain" and second.question == third.question
    assert conversation(second.question) == asked and plain_text(second.question) == "a\n\nb\n\nc"
    assert conversation("[not a list") == [turn("user", "[not a list")]
    assert conversation('[{"role": broken') == [turn("user", '[{"role": broken')]

    answer = [turn("assistant", "d")]
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": asked, "completion": answer},
        {"messages": asked + answer},
        {"prompt": "q", "completion": "d"},
        {"messages": [turn("user", "q"), turn("assistant", "d")]},
    )
    assert load_demonstrations(path, 0) == [(second.question, "d")] * 2 + [("q", "d")] * 2

    worse = [turn("assistant", "e")]
    path = write(
        tmp_path / "c.jsonl",
        {"prompt": asked, "chosen": answer, "rejected": worse},
        {"chosen": [turn("user", "q")] + answer, "rejected": [turn("user", "q")] + worse},
        {"prompt": "r", "chosen": "d", "rejected": "e"},
    )
    pairs = load_preference_pairs(path)
    assert [(p.question, p.chosen, p.rejected) for p in pairs] == [(q, "d", "e") for q in (second.question, "q", "r")]


def test_a_system_turn_or_a_mode_makes_no_other_problem(tmp_path):
    """The same split, and one of two duplicates, whichever way a question is written; decontamination does not look at
    what all problems have in common."""
    for i in range(50):
        chat = json.dumps([turn("system", "s"), turn("user", f"q{i}")])
        assert is_held_out(f"q{i}") == is_held_out(chat) == is_held_out(mode_question(f"q{i}", "no_think"))
        assert is_held_out(chat) == is_held_out(mode_question(chat, "think"))
    system = " ".join(f"word{i}" for i in range(20))
    ours, theirs = (json.dumps([turn("system", system), turn("user", f"{who} has 7 apples")]) for who in "ab")
    problems, dropped = [Problem(ours, "7", "1"), Problem("a has 7 apples", "7", "2")], Counter()
    assert drop_duplicates(problems, 1.0, dropped) == problems[:1]
    assert decontaminate(problems, [Problem(theirs, "7")], 13, dropped) == problems


def test_conversations_reach_the_template(embedded):
    """All turns, in order; a system turn of their own stays; a mode stands at the end of the last user's turn."""
    tokenizer = common.load_tokenizer(EMBEDDED)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}[{{ m.content }}]{% endfor %}"
    short, long = (json.dumps([turn("user", "1"), turn("assistant", "2"), turn("user", "3")]), "4")
    own = json.dumps([turn("system", "5"), turn("user", "6")])
    assert [tokenizer.decode(ids) for ids in encode_prompts(tokenizer, [short, long, own], "S")] == [
        "s[S]u[1]a[2]u[3]",
        "s[S]u[4]",
        "s[5]u[6]",
    ]
    assert conversation(mode_question(short, "think"))[-1]["content"] == "3 /think"
    tokenizer.chat_template = SYSTEM_REFUSED
    assert [tokenizer.decode(ids) for ids in encode_prompts(tokenizer, [short, long, own], "S")] == [
        "[S\n\n1][2][3]",
        "[S\n\n4]",
        "[5\n\n6]",
    ]
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompts(tokenizer, [own])[0]) == "5\n\n6"


BAD_CONVERSATIONS = [
    ({"prompt": [turn("assistant", "a")], "answer": "1"}, "field 'prompt': a prompt ends with the user's turn"),
    ({"prompt": [], "answer": "1"}, "field 'prompt' is empty"),
    ({"prompt": ["a"], "answer": "1"}, "field 'prompt': each message needs a role and a content"),
    ({"prompt": [{"role": "user"}], "answer": "1"}, "field 'prompt': each message needs a role and a content"),
    ({"prompt": [turn("user", [{"type": "image"}])], "answer": "1"}, "field 'prompt': roles and contents are texts"),
    ({"prompt": [turn("user", " ")], "answer": "1"}, "field 'prompt': the user's turn is empty"),
]
BAD_DEMONSTRATIONS = [
    ({"messages": [turn("user", "a")]}, "field 'messages': a list of messages that ends with the assistant's turn"),
    ({"messages": "a"}, "field 'messages': a list of messages that ends with the assistant's turn"),
    ({"prompt": "a", "completion": [turn("user", "b")]}, "field 'completion': one turn, the assistant's, is expected"),
]


@pytest.mark.parametrize("row,message", BAD_CONVERSATIONS + BAD_DEMONSTRATIONS)
def test_a_bad_conversation_is_named(row, message, tmp_path, capsys):
    load = load_problems if "answer" in row else load_demonstrations
    with pytest.raises(SystemExit):
        load(write(tmp_path / "p.jsonl", row), "all" if "answer" in row else 0)
    assert f"p.jsonl:1: {message}" in capsys.readouterr().err


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
    assert all(sorted(flat[i : i + 50]) == list(range(50)) for i in (0, 50, 100, 150))
    assert flat[:50] != flat[50:100]
    assert other.draw(20) != draws[0]
    first = [same.draw(20) for _ in range(4)]
    same.record(3, 0.5)
    with pytest.raises(SystemExit):  # the problem file has changed since
        ProblemSampler(problems[:-1], seed=1).load_state_dict(same.state_dict())
    resumed = ProblemSampler(problems, seed=1)
    resumed.load_state_dict(json.loads(json.dumps(same.state_dict())))
    assert first + [resumed.draw(20) for _ in range(6)] == draws
    assert resumed.attempts[3] == 1 and resumed.successes[3] == 0.5


def test_curriculum_goes_from_easy_to_hard_within_an_epoch():
    problems = load_problems("arithmetic", "train", 60)
    sampler = ProblemSampler(problems, "curriculum", seed=1)
    for _ in range(2):
        epoch = [problems[i] for i in sampler.draw(60)]
        assert [p.difficulty for p in epoch] == sorted(p.difficulty for p in problems)
        assert len({p.id for p in epoch}) == 60
    assert ProblemSampler(problems, "curriculum", seed=2).draw(10) != ProblemSampler(
        problems, "curriculum", seed=1
    ).draw(10)


def test_prioritized_prefers_what_fails_and_loses_nothing_for_good():
    """Chance proportional to 1 - success rate with a floor of 0.05: of ten problems always solved and ten solved half
    the time, the latter come about ten times as often; the same again after a resume."""
    problems = load_problems("arithmetic", "train", 20)
    sampler = ProblemSampler(problems, "prioritized", seed=1)
    for i in range(20):
        sampler.record(i, 1.0 if i < 10 else 0.5)
    state = json.loads(json.dumps(sampler.state_dict()))
    draws = [sampler.draw(1)[0] for _ in range(4000)]
    solved = sum(i < 10 for i in draws) / 4000
    assert 0.05 / 0.55 - 0.02 < solved < 0.05 / 0.55 + 0.02
    assert set(draws) == set(range(20))
    assert len(set(sampler.draw(20))) == 20 and len(sampler.draw(50)) == 50
    resumed = ProblemSampler(problems, "prioritized", seed=1)
    resumed.load_state_dict(state)
    assert [resumed.draw(1)[0] for _ in range(100)] == draws[:100]
    assert resumed.summary() == {"sampler/seen": 1.0, "sampler/success_rate": 0.75}
    with pytest.raises(ValueError, match="mode"):
        ProblemSampler(problems, "random")


def test_demonstrations_from_jsonl(tmp_path, capsys):
    path = write(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"}, {"question": "c", "completion": "d"})
    assert load_demonstrations(path, 0) == [("a", "b"), ("c", "d")]
    with pytest.raises(SystemExit):
        load_demonstrations(write(tmp_path / "e.jsonl", {"prompt": "a", "answer": "b"}), 0)
    assert "e.jsonl:1: no field 'completion'" in capsys.readouterr().err


def test_make_tiny_writes_the_shipped_tokenizer(tmp_path):
    subprocess.run([sys.executable, "models/make_tiny.py", str(tmp_path)], check=True, capture_output=True)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == Path(EMBEDDED, name).read_text()
    made, shipped = (json.loads(Path(d, "config.json").read_text()) for d in (tmp_path, EMBEDDED))
    assert made | {"transformers_version": ""} == shipped | {"transformers_version": ""}
