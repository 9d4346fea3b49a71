"""What people's files and hub datasets hold: rows, columns under many names, conversations. data.py makes problems,
samples and demonstrations of them. Below common.py."""

import codecs
import csv
import functools
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from plumbing.answers import answers_match, extract_answer, read_answer
from plumbing.flags import fail, reason

# ---- Files and hub datasets ----------------------------------------------------------------------------------------


def is_file(source: str) -> bool:
    return bool(re.search(r"\.(jsonl?|csv|tsv|parquet)(\.gz)?$", source)) or Path(source).is_file()


def is_undivided(source: str) -> bool:
    """True for a file and for a named split of a hub dataset, which can be used as a whole."""
    return is_file(source) or source.count(":") == 2


def placed_rows(source: str) -> list[tuple[str, dict]]:
    """(place, row) for every row of a file, or of a hub dataset's train split or the split that it names. place, such
    as "file:line", is for error messages."""
    return file_rows(source) if is_file(source) else hub_rows(source, "train")[0]


def file_rows(path: str) -> list[tuple[str, dict]]:
    """The rows of JSON Lines, of a JSON array, of CSV or TSV (by its name), and of Parquet; also compressed by gzip.
    Malformed rows end the program; the error names the first five."""
    good, errors = [], []
    try:
        content = Path(path).read_bytes()
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        if (megabytes := len(content) / 1e6) > 50:  # measured on 200 MB of GSM8K's rows, SmolLM2's tokenizer, 2 cores
            takes = f"about {0.4 * megabytes:.0f} seconds and {7 * megabytes / 1000:.1f} GB of memory"
            print(f"note: {path}: {megabytes:.0f} MB take {takes} to read and encode (curate.py --limit keeps a part)")
        rows = parse_file(path, content)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error) as error:
        fail(f"{path}: can't be read: {getattr(error, 'strerror', None) or reason(error)}")
    for place, row in rows:
        try:
            if isinstance(row, bytes):  # a line
                row = json.loads(row.decode())
            if not isinstance(row, dict):
                raise ValueError(f"a JSON object is expected, not {type(row).__name__}")
            good.append((place, row))
        except (ValueError, RecursionError) as error:
            errors.append((place, "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else error))
    if not good and len(errors) > 2 and content.lstrip().startswith(b"{"):
        fail(f"{path}: a JSON object is expected on each line; if they take several: jq -c . {path}")
    fail_on(errors, path)
    if not good:
        fail(f"{path}: is empty")
    return good


def parse_file(path: str, content: bytes) -> Iterable[tuple[str, object]]:
    """(place, row) for every row; the rows of JSON Lines are still bytes, one at a time."""
    if content.startswith(b"PAR1"):
        return [(f"{path} row {i}", row) for i, row in enumerate(read_parquet(path, content))]
    if b"\0" in content[:1000]:
        raise ValueError("neither UTF-8 text (JSON Lines, a JSON array, CSV) nor Parquet, nor one of them in gzip")
    content = content.removeprefix(codecs.BOM_UTF8)
    if re.search(r"\.[ct]sv(\.gz)?$", path):
        return [(f"{path}:{line}", row) for line, row in read_csv(content.decode(), "\t" if ".tsv" in path else ",")]
    if re.match(rb"\s*\[", content):
        return [(f"{path} row {i}", row) for i, row in enumerate(json.loads(content))]
    return ((f"{path}:{i}", line) for i, line in enumerate(io.BytesIO(content), 1) if line.strip())


def read_csv(text: str, delimiter: str) -> list[tuple[int, dict]]:
    """(line number, row) of a table with a header line. Empty cells are None."""
    csv.field_size_limit(2 * MAX_FIELD_CHARS)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = [(reader.line_num, {name: cell or None for name, cell in row.items()}) for row in reader]
    if more := next((line for line, row in rows if None in row), None):
        raise ValueError(f"line {more} has more cells than the header")
    return rows


def read_parquet(path: str, content: bytes) -> list[dict]:
    try:
        from pyarrow import BufferReader, parquet
    except ImportError:
        fail(f"{path}: to read Parquet: pip install datasets")
    return parquet.read_table(BufferReader(content)).to_pylist()


def hub_rows(source: str, split: str) -> tuple[list[tuple[str, dict]], bool]:
    """The rows of a hub dataset `name`, `name:config` or `name:config:split` (see load_problems), and whether the
    dataset itself has a held-out split."""
    try:
        import datasets
    except ImportError:
        fail(f"{source}: no such file; to read it as a hub dataset: pip install datasets")
    name, config, part = (source.split(":", 2) + ["", ""])[:3]
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # of many kinds: no such dataset, no network, a config is needed, ...
        fail(f"{source}: neither a file nor a hub dataset that can be loaded: {reason(error)}")
    held_out = None if part else next((name for name in ("test", "validation") if name in splits), None)
    part = part or (held_out if split == "eval" and held_out else "train")
    if not len(splits.get(part, [])):
        have, other = ", ".join(splits), next(iter(splits))
        fail(f"{source}: no rows in split {part!r} (it has {have}); to name one: {name}:{config}:{other}")
    return [(f"{source} {part} row {i}", row) for i, row in enumerate(splits[part])], bool(held_out)


def fail_on(errors: list[tuple[str, Exception]], source: str) -> None:
    """Fails with the first five of the errors (place, error), if there are any; with equal ones once."""
    places: dict[str, list[str]] = {}
    for place, error in errors:
        places.setdefault(str(error)[:400], []).append(place)
    lines = [f"{at[0]}: {text}" + f" (and {len(at) - 1} more like it)" * (len(at) > 1) for text, at in places.items()]
    if lines:
        fail("\n".join(lines[:5]) + f"\n... and {len(lines) - 5} other errors in {source}" * (len(lines) > 5))


# ---- Columns: their names, and the types of what is in them --------------------------------------------------------

# What our own fields are called in the data that people have, the first that a row has counts; upper case is allowed,
# and a.b is the key b of column a.
NAMES = {
    "question": ("question", "prompt", "problem", "messages", "conversations", "instruction", "query", "input"),
    "answer": (
        *("answer", "final_answer", "expected_answer", "ground_truth", "reward_model.ground_truth", "gold"),
        *("solution", "output", "response"),
    ),
    "completion": ("completion", "response", "output", "solution"),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "system": ("system", "system_prompt"),
    "topic": ("topic", "subject", "type"),
    "difficulty": ("difficulty", "level"),
}
WORKED = "solution", "output", "response"  # columns of worked solutions, in which the answer is marked
ADDED = "input", "context"  # belong to an `instruction` (Alpaca, Dolly)
# What a question can't be answered without, unless its text contains it.
NEEDED = (
    *("choices", "options", "body", "context", "input", "passage", "history", "table"),
    *("image", "images", "audio", "video", "tools"),
)
EMPTY = None, "", [], {}
UNKEPT = "question", "prompt", "problem", "messages", "answer", "task", "completions", "mode"  # not in Problem.columns


@functools.lru_cache(maxsize=1000)
def by_lower_case(names: tuple[str, ...]) -> dict[str, str]:
    return {name.lower(): name for name in names} | {name: name for name in names}


def find(row: dict, kind: str, first: tuple[str, ...] = ()) -> tuple[str, object] | None:
    """(name, value) of the row's first column that is called `kind` or by one of its NAMES; None without one. first:
    names that go before them."""
    columns = by_lower_case(tuple(row))
    for name in (*first, *NAMES.get(kind, (kind,))):
        outer, _, inner = name.partition(".")
        value = row.get(columns.get(outer))
        if inner:
            value = value.get(inner) if isinstance(value, dict) else None
        if value is not None:
            return f"{columns[outer]}.{inner}".rstrip("."), value
    return None


def required(row: dict, kind: str, first: tuple[str, ...] = ()) -> tuple[str, object]:
    """`find`; raises ValueError if there is none."""
    if found := find(row, kind, first):
        return found
    has = ", ".join(repr(name) for name in row)[:200]
    raise ValueError(f"no field {kind!r} (it has {has}); names that are read: {', '.join(NAMES.get(kind, (kind,)))}")


def answer_field(row: dict) -> str:
    """The gold answer: what is marked as one by #### (GSM8K), a box or <answer>, else the whole text."""
    name, value = required(row, "answer")
    text = as_text(name, value[0] if isinstance(value, list) and len(value) == 1 else value).strip()
    if re.search(r"####|\\(?:boxed|fbox)\s*\{|<answer>", text):
        if not (answer := extract_answer(text)):
            raise ValueError(f"field {name!r} has nothing after '####' or in its box")
        return answer
    plain = read_answer(text)[1] is not None or re.fullmatch(r"\$[^$]+\$", text)
    if name.lower() in WORKED and not plain:
        raise ValueError(f"field {name!r} has no \\boxed{{...}} or '####', and there is no field 'answer'")
    return text


def can_match(answer: str) -> bool:
    """False for a gold answer that no completion's answer matches, such as nan or $$, and for prose that only its very
    text matches: more than three words without mathematics, or words around a number, such as 3 of 5 boys."""
    if extract_answer(f"<answer>{answer}</answer>") != answer or not answers_match(answer, answer):
        return False
    text, tree = read_answer(answer)
    words = re.findall(r"(?<![\\A-Za-z])(?!(?:and|or)\b)[A-Za-z]{3,}(?=[\s.,;:!?)]|$)", text)
    return tree is not None or (len(text.split()) <= 3 and not (words and re.search("[0-9]", text)))


def optional_field(row: dict, kind: str, read: Callable, ignored: dict):
    """The value of an optional column, by `read`; None without one, or if it is of another type. Then the error is
    added to `ignored`, because such a column must not make a dataset useless."""
    name, value = find(row, kind) or ("", None)
    try:
        return None if value in EMPTY else read(name, value)
    except ValueError as error:
        ignored.setdefault(name, []).append(error)
        return None


def as_number(name: str, value) -> float:
    """A number; of a text such as "Level 5" (MATH) or "5" (CSV), the number in it. NaN is none."""
    if isinstance(value, str) and (match := re.fullmatch(r"(?:Level )?(-?[0-9]{1,9}(\.[0-9]*)?)", value.strip())):
        value = float(match[1]) if match[2] else int(match[1])
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise ValueError(f"field {name!r} is {str(value)[:80]!r}, a number is expected")
    return value


def as_share(name: str, value) -> float:
    if not 0 <= as_number(name, value) <= 1:
        raise ValueError(f"field {name!r} is {value}, a number from 0 to 1 is expected")
    return as_number(name, value)


MAX_FIELD_CHARS = 1_000_000


def as_text(name: str, value) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"field {name!r} is of type {type(value).__name__}, text is expected")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"field {name!r} is {value}, no text: leave it out, or put it in quotes")
    text = str(value)
    if not text.strip():
        raise ValueError(f"field {name!r} is empty")
    return check_text(name, text)


def check_text(name: str, text: str) -> str:
    if len(text) > MAX_FIELD_CHARS:
        raise ValueError(f"field {name!r} has {len(text)} characters, at most {MAX_FIELD_CHARS} are allowed")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"field {name!r} holds half a surrogate pair, which no tokenizer accepts")
    return text


# ---- Conversations: a column may be a list of messages {"role": ..., "content": ...} instead of a text -------------

KEYS = {"from": "role", "value": "content"}  # ShareGPT's
ROLES = {"human": "user", "gpt": "assistant"}
REASONING = "reasoning_content", "reasoning", "thinking"


def read_messages(name: str, value: list) -> list[dict]:
    """The role and content of each message in a list, also by ShareGPT's names. Reasoning that stands beside a content
    is put in front of it as a think block. Raises ValueError if something is missing, not text, or would be lost."""
    messages = []
    for message in value:
        message = {KEYS.get(key, key): item for key, item in message.items()} if isinstance(message, dict) else {}
        role, content = message.pop("role", None), message.pop("content", None)
        thoughts = [message.pop(key) for key in REASONING if isinstance(message.get(key), str) and message[key]]
        if lost := [key for key, item in message.items() if item not in EMPTY]:
            raise ValueError(f"field {name!r}: a message has {lost[0]!r}, which can't be used: remove it")
        if role is None or content is None:
            raise ValueError(f"field {name!r}: each message needs a role and a content")
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            content = "".join(str(part.get("text")) for part in content)
        if not isinstance(content, str) or not isinstance(role, str):
            raise ValueError(f"field {name!r}: roles and contents must be text")
        content = "".join(f"<think>\n{text.strip()}\n</think>\n\n" for text in thoughts[:1]) + content
        check_text(name, role + content)
        messages.append({"role": ROLES.get(role, role), "content": content})
    if not messages:
        raise ValueError(f"field {name!r} is empty")
    return messages


TURN = re.compile(r"\n\n(Human|Assistant):")  # hh-rlhf's transcripts


def read_turns(name: str, value, role: str) -> list[dict]:
    """The turns of a column: messages, a transcript like hh-rlhf's, or one text of the role."""
    if isinstance(value, dict) and {"content", "value"} & value.keys():
        value = [value]
    if isinstance(value, list):
        return read_messages(name, value)
    text = as_text(name, value) if str(value).strip() or role == "user" else ""
    if re.match(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]""", text):
        raise ValueError(f"field {name!r} is a text with a list of messages: save it as a list, in JSON or Parquet")
    if not text.startswith("\n\nHuman:"):
        return [{"role": role, "content": text}]
    _, *parts = TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def prompt_turns(row: dict, first: tuple[str, ...] = (), needed: tuple[str, ...] = NEEDED) -> tuple[str, list[dict]]:
    """(column, turns) of a row's question, with the row's `system` text as system turn. first: see `find`. Raises
    ValueError if there is none, or if a column that it needs (NEEDED) would be lost."""
    name, value = required(row, "question", first)
    turns = read_turns(name, value, "user")
    if len(turns) > 1 and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()  # the end of a transcript, where the completion is to come
    if name.lower() == "instruction":
        added = [as_text(*found) for extra in ADDED if (found := find(row, extra)) and str(found[1]).strip()]
        turns[-1]["content"] = "\n\n".join((turns[-1]["content"], *added))
    check_needed(row, name, turns, needed)
    return name, with_system(turns, system_turns(row))


def check_needed(row: dict, name: str, turns: list[dict], needed: tuple[str, ...] = NEEDED) -> None:
    """Raises ValueError if the row has a column that its question, read from column `name`, needs and lacks."""
    text = "\n".join(turn["content"] for turn in turns)
    for extra, value in row.items():
        if extra.lower() in needed and extra != name and not all(leaf in text for leaf in leaves(value)):
            raise ValueError(
                f"field {extra!r} is not read, but the question may need it: write it into {name!r} or remove it"
            )


def leaves(value) -> list[str]:
    """All texts and numbers in nested lists and dicts, as texts."""
    if isinstance(value, list | dict):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]
    return [] if value is None else [str(value).strip()]


def system_turns(row: dict) -> list[dict]:
    name, value = find(row, "system") or ("", "")
    return [{"role": "system", "content": as_text(name, value)}] if str(value).strip() else []


def with_system(turns: list[dict], system: list[dict]) -> list[dict]:
    """The turns after the system turn, if they have none of their own."""
    if system and turns[0]["role"] == "system" and turns[0] != system[0]:
        raise ValueError("two columns have different system turns")
    return turns if turns[0]["role"] == "system" else system + turns


def continued(prompt: list[dict], name: str, value) -> list[dict]:
    """The prompt's turns and those of a completion's column, which may repeat the prompt. Without a prompt, the
    column's. Raises ValueError if it repeats another prompt, or does not end with the assistant's turn."""
    turns = read_turns(name, value, "assistant")
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"field {name!r}: its last turn must be the assistant's")
    if turns[0]["role"] == "assistant":
        return prompt + turns
    asked, own = ([turn for turn in part if turn["role"] != "system"] for part in (prompt, turns))
    if own[: len(asked)] != asked:
        raise ValueError(f"field {name!r}: its first turns are not the prompt's")
    return with_system(turns, [turn for turn in prompt[:1] if turn["role"] == "system"])


def as_prompt(name: str, messages: list[dict]) -> tuple[str, tuple | None]:
    """(question, messages) from a prompt's turns: question is their text without the system turn."""
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"field {name!r}: a prompt must end with the user's turn")
    if not messages[-1]["content"].strip():
        raise ValueError(f"field {name!r}: the user's turn is empty")
    question = "\n\n".join(message["content"] for message in messages if message["role"] != "system")
    return question, None if len(messages) == 1 else tuple((m["role"], m["content"]) for m in messages)
