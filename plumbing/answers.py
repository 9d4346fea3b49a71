"""Extracts a completion's answer and compares it with the reference answer: exact numbers, normalised strings,
math-verify.

This code reads model output, and RL exploits every hole in it. So no function raises, no text is evaluated as code, and
every step takes linear or bounded time.
"""

import functools
import json
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

MAX_ANSWER_CHARS = 1_000  # a longer answer is never right; bounds the time of every later step

# ---- Extraction ----------------------------------------------------------------------------------------------------


def remove_thinking(text: str) -> str:
    """The completion without its thinking; "" if nothing is left.

    An unclosed <think> runs to the end of the text. If a </think> has no opening tag, everything before it is thinking:
    some chat templates open the block in the prompt.
    """
    visible, start, inside = [], 0, False
    for tag in re.finditer(r"</?think>", text):
        if tag.group() == "<think>":
            if not inside:
                visible.append(text[start : tag.start()])
            inside = True
        else:
            if not inside:
                visible = []
            inside, start = False, tag.end()
    if not inside:
        visible.append(text[start:])
    return "\n".join(visible)


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed \boxed{...} or \fbox{...}; None if there is none.

    If boxes are nested, the inner one counts.
    """
    open_braces = []  # for each open brace: where a box's content starts, None if it is no box
    last_start, last_end = -1, -1
    # The regex only finds the tokens. Matching braces on a stack takes one pass, however many boxes stay open.
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        if token.group() == "{":
            open_braces.append(None)
        elif token.group() == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and start > last_start:
                last_start, last_end = start, token.start()
        elif len(token.group()) > 2:  # a box; the tokens of two characters are escapes such as \{
            open_braces.append(token.end())
    return text[last_start:last_end] if last_start >= 0 else None


def extract_answer(text: str) -> str | None:
    r"""The final answer of a completion, as text; None if there is none.

    The answer is the last <answer>...</answer> outside the thinking, else the last \boxed{...}, else the text after
    the last "####" up to the end of its line. A box or #### inside the <answer> is unwrapped. The last one counts even
    if it is empty: then there is no answer.
    """
    text = remove_thinking(text)
    answer = None
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if start >= 0:
        answer = text = text[start + len("<answer>") : text.find("</answer>", start)]
    boxed = last_boxed(text)
    if boxed is not None:
        answer = boxed
    elif "####" in text:
        answer = text[text.rfind("####") + len("####") :].partition("\n")[0]
    return (answer or "").strip() or None


# ---- Comparison ----------------------------------------------------------------------------------------------------

# Words that are no unit: after "18" they make another answer (18 or 20), another number (18 million), or a function.
NOT_A_UNIT = (
    r"(?i:\b(?:and|or|plus|minus|times|over|mod|half|halves|thirds?|hundred|thousand|million|billion"
    r"|trillion|dozen|squared|cubed|sqrt|sin|cos|tan|log|exp)\b)"
)
TEXT_COMMAND = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*"
# A unit is a listed short one, a word of three or more letters after a space, or of four or more without one. One or
# two letters may be variables: 2k and 2ab are not 2.
UNIT = (
    rf"(?!.*{NOT_A_UNIT})"
    r"(?:\s*%|\s*(?:cm|mm|km|kg|mg|ml|lbs?|oz|ft|in|mi|mph|hrs?|mins?|secs?)(?![A-Za-z])|\s+[A-Za-z]{3}|[A-Za-z]{4})"
    r"(?:[A-Za-z .,'()/-]|\^\{?[23]\}?)*"
)
LATEX_UNIT = rf"(?<=[0-9}})])\s*{TEXT_COMMAND}\{{(?!.*{NOT_A_UNIT})[A-Za-z ./]*\}}(?:\^\{{?[23]\}}?)?$"  # 5\text{ m}^2
# [0-9], because \d matches the digits of all scripts. At most three digits of exponent, because
# Fraction("1e999999999") would fill the memory.
DECIMAL = (
    r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"  # 1,234.50  18.  .5
    r"(?:[eE][+-]?[0-9]{1,3})?"
)
NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/))?"  # the 1 of 1 1/2
    rf"(?P<top>{DECIMAL})(?:\s*/\s*(?P<bottom>{DECIMAL}))?\s*(?:{UNIT})?"
)
TEXT = re.compile(TEXT_COMMAND + r"\{([^{}]*)\}")
FRACTION = re.compile(r"\\frac\s*\{\s*(-?[0-9.,]+)\s*\}\s*(?:\{\s*([0-9.,]+)\s*\}|([0-9]))")
# Applied in this order. (?<!\\): the second backslash of a line break \\ does not start a command.
CLEANING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"[\u2010-\u2015\u2212]", "-"),  # unicode minus and dashes
        (r"(?<!\\)\\!\s*", ""),
        (r"(?<=[0-9])(?:\{,\}|\\,)(?=[0-9]{3})", ","),  # 10{,}080 and 10\,080
        (r"(?<!\\)\\[,;: ()\[\]]|\\?\$|[€£¥₹~]", " "),
        (r"\\(?:left|right)\.?(?![A-Za-z])|\\displaystyle(?![A-Za-z])", ""),
        (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*([0-9])\s*(?=[0-9{])", r"\\frac{\1}"),  # \frac12 and \frac1{2}
        (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\%", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?|°", ""),
        (r"\s+", " "),
        (r"^[ *\"'`“‘]+|[ *\"'`”’.,;:]+$", ""),  # no dot at the front: .5
        (LATEX_UNIT, ""),
    ]
]


def clean(text: str) -> str:
    """Removes the parts of an answer that mean nothing: $, quotes, final dot, thin spaces, LaTeX units."""
    for pattern, replacement in CLEANING:
        text = pattern.sub(replacement, text)
    return text


def parse_number(text: str) -> Fraction | None:
    """The exact value of a cleaned answer that is one plain number, with or without a unit; else None."""
    text = FRACTION.sub(r" \1/\2\3 ", TEXT.sub(r" \1 ", text)).strip()
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    top, bottom = (Fraction((match[name] or "1").replace(",", "")) for name in ("top", "bottom"))
    if bottom == 0:
        return None
    value = int(match["whole"] or 0) + top / bottom
    return -value if match["sign"] == "-" else value


@functools.lru_cache(maxsize=10_000)  # a group of completions gives the same answer many times
def read_answer(text: str) -> tuple[str, Fraction | None]:
    """An answer, cleaned, and its value if it is one plain number."""
    text = clean(text)
    return text, parse_number(text)


def normalise(text: str) -> str:
    r"""The string to compare for a cleaned answer: lower case, without \text{} and needless spaces."""
    text = TEXT.sub(r" \1 ", text).lower()
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(text.split()))  # the space of "1 2" stays: it is not 12
    return re.sub(r"^\(([a-z])\)$", r"\1", text)  # (C) in multiple choice


def answers_match(predicted: str | None, gold: str) -> bool:
    r"""True if an extracted answer (or None) is the gold answer.

    Plain numbers are compared exactly (1,000 = 1000, 1 1/2 = 1.5 = \frac{3}{2}, 0.333 is not 1/3). Units are
    ignored, even if they differ. Percent is a unit too: 50% = 50, not 0.5. "5 million" and "10 or 18" are not plain
    numbers. Other answers match if their normalised strings are equal. If not, and if they contain mathematics,
    math-verify (if installed) compares them, to 12 decimals if one of them is a decimal number. A number in another
    base (52_8) only matches as a string. None, "", nan and inf match nothing.
    """
    return matched_by(predicted, gold) is not None


def matched_by(predicted: str | None, gold: str) -> str | None:
    """How answers_match finds the answers equal: by "rule" or "symbolic" (math-verify); None if they differ."""
    if not predicted or not gold or max(len(predicted), len(gold)) > MAX_ANSWER_CHARS:
        return None
    (predicted, number), (gold, gold_number) = read_answer(predicted), read_answer(gold)
    if number is not None and gold_number is not None:
        return "rule" if number == gold_number else None
    strings = normalise(predicted), normalise(gold)
    if any(string.lstrip("+-") in ("", "nan", "inf", "infinity") for string in strings):
        return None
    if strings[0] == strings[1]:
        return "rule"
    return "symbolic" if is_mathematics(predicted, gold) and math_verify_match(predicted, gold) else None


# ---- math-verify ---------------------------------------------------------------------------------------------------


# Answers that math-verify would misread. It drops the base of 52_8 and everything after \approx, adds two adjacent
# numbers (10 \quad 8, (10)(8) and {10}{8} would be 18), and reads only a part of a text that ends in a backslash or
# contains the word "answer".
MISREAD = re.compile(
    r"[0-9]\s*_|\\approx|[0-9](?:[\s(){'\"]|\\q?quad|\\l?dots)+[0-9]|(?:^|[\s(])\{[^{}]*\}\s*[({0-9]|\\$|(?i:answer)"
)
# Answers that would only run into the time limit: powers such as 9^{9^9} and 9^{99999999}, factorials of factorials,
# brackets nested ten deep.
TOO_LARGE = re.compile(r"\^[\s{(]*-?[\s{(]*(?:[0-9]{4}|[0-9]+[\s})]*\^)|![\s)}]*!|(?:[({\[][^(){}\[\]]*){10}")
MATHEMATICS = re.compile(r"[\\^=+*/(\[{<>,-]|sqrt")


def is_mathematics(predicted: str, gold: str) -> bool:
    """True if math-verify should compare the two cleaned answers."""
    if any(pattern.search(text) for pattern in (MISREAD, TOO_LARGE) for text in (predicted, gold)):
        return False
    return any(MATHEMATICS.search(text) for text in (predicted, gold))


math_verify_process: subprocess.Popen | None = None
math_verify_lock = threading.Lock()


@functools.lru_cache(maxsize=10_000)
def math_verify_match(predicted: str, gold: str) -> bool:
    """True if math-verify finds the two cleaned answers equal; False if it fails or is missing.

    It runs in a separate process (math_verify_process.py): some texts make sympy hang or fill the memory in ways that
    no filter foresees, and the package's own time limit is an alarm signal, which works only in the main thread. A
    process can be limited from any thread, and its limit counts CPU time, so that a busy machine does not trigger it.
    """
    global math_verify_process
    if os.name != "posix" or find_spec("math_verify") is None:
        return False
    with math_verify_lock:
        reply = ""
        try:
            if math_verify_process is None:
                # -P: the modules of this folder must not shadow those that sympy imports
                math_verify_process = subprocess.Popen(
                    [sys.executable, "-P", str(Path(__file__).with_name("math_verify_process.py"))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # Ctrl-C must not reach it
                )
            math_verify_process.stdin.write(json.dumps([predicted, gold]) + "\n")
            math_verify_process.stdin.flush()
            reply = math_verify_process.stdout.readline()
        except OSError:
            pass
        finally:
            # Also after an interrupt: a reply left in the pipe would be read as the answer to the next question.
            if not reply and math_verify_process is not None:
                math_verify_process.kill()
                math_verify_process.wait()
                math_verify_process = None
        return reply == "true\n"
