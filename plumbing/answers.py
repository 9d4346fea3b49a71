"""Extracts a completion's answer and compares it with the reference answer: as text, as a choice's letter, or as
mathematics (algebra.py).

This code reads model output, and RL exploits every hole in it. So no function raises, no text is evaluated as code, and
every step takes linear or bounded time.
"""

import functools
import re
import unicodedata

from plumbing import algebra

MAX_ANSWER_CHARS = 1_000  # a longer answer is never right; bounds the time of every later step

# ---- Unicode -------------------------------------------------------------------------------------------------------

# Signs with one meaning, as ASCII or LaTeX. Not NFKC: it makes 52 of 5².
SIGNS = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # fullwidth digits, letters, brackets, signs
SIGNS |= dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-") | dict.fromkeys("\u2044\u2215\u00f7", "/")
SIGNS |= dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000", " ")
SIGNS |= dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "") | {"。": ".", "、": ",", "º": "°"}
SIGNS |= dict.fromkeys("‘’‛′", "'") | dict.fromkeys("“”„", '"')
SIGNS |= {"×": "\\times ", "⋅": "\\cdot ", "·": "\\cdot ", "±": "\\pm ", "∓": "\\mp ", "√": "\\sqrt ", "∞": "\\infty "}
SIGNS |= {"≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in "}
SIGNS |= {"π": "\\pi ", "θ": "\\theta ", "ℝ": "\\mathbb{R}", "∅": "\\emptyset "}
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni")
UNICODE = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        ("[⁰¹²³⁴-⁹⁺⁻ⁿⁱ]+", lambda match: f"^{{{match[0].translate(RAISED)}}}"),  # x² is x^{2}
        (r"√\s*([0-9.]+|[^\W\d_])", r"\\sqrt{\1}"),
        ("[¼-¾⅐-⅞]", lambda match: r"\frac{" + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "}{") + "}"),
        (f"[{''.join(map(re.escape, SIGNS))}]", lambda match: SIGNS[match[0]]),
    ]
]


def plain_unicode(text: str) -> str:
    """The same text if it is ASCII. Else one writing for all that look alike: composed letters (NFC), and ASCII or
    LaTeX for the signs above. Answers are compared, questions split and found again by it."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", text)
    for pattern, replacement in UNICODE:
        text = pattern.sub(replacement, text)
    return text


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


BETWEEN_BOXES = re.compile(r"[\s$]*(?:[,;]|,?\s*(?:\\text\s*\{)?\s*(?:and|or)\s*\}?)[\s$]*")


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed \boxed{...} or \fbox{...}; None if there is none.

    If boxes are nested, the inner one counts. Boxes with only a comma, "and" or "or" between them are one answer:
    "1, 2" for \boxed{1}, \boxed{2}.
    """
    open_braces = []  # for each open brace: where a box and its content start, None if it is no box
    boxes, last = [], 0  # (start of the box, of its content, end) in the order of their ends; which one counts
    # The regex only finds the tokens. Matching braces on a stack takes one pass, however many boxes stay open.
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        if token.group() == "{":
            open_braces.append(None)
        elif token.group() == "}":
            if open_braces and (box := open_braces.pop()):
                boxes.append((*box, token.start()))
                last = max(last, len(boxes) - 1, key=lambda i: boxes[i][0])
        elif len(token.group()) > 2:  # a box; the tokens of two characters are escapes such as \{
            open_braces.append((token.start(), token.end()))
    if not boxes:
        return None
    start, *content = boxes[last]
    contents = [text[slice(*content)]]
    for earlier, *content, end in reversed([(start, content, end, end) for start, content, end in boxes[:last]]):
        if start - end > 40 or not BETWEEN_BOXES.fullmatch(text, end + 1, start):
            break
        start, contents = earlier, [text[slice(*content)], *contents]
    return ", ".join(contents) if len({*contents}) > 1 else contents[0]


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

UPRIGHT = r"\\(?:text|textit|textrm|textsf|mathrm|mathit|mathsf|mbox|operatorname)\s*\{[^{}]*\}"
TEXT = re.compile(UPRIGHT.replace("[^{}]*", "([^{}]*)"))
# Applied in this order. (?<!\\): the second backslash of a line break \\ does not start a command.
CLEANING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!\\)\\!\s*", ""),
        (r"(?<=[0-9])(?:\{,\}|\\,)(?=[0-9]{3})", ","),  # 10{,}080 and 10\,080
        (r"(?<!\\)\\[,;: ()\[\]]|\\q?quad(?![A-Za-z])|~|\\?\$|[€£¥₹]", " "),
        (r"\\(?:left|right|[bB]ig+[lr]?)\.?(?![A-Za-z])|\\displaystyle(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:boxed|fbox|textbf|mathbf|boldsymbol|bm)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\%", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
        (r"°\s*(?:\\(?:text|mathrm)\s*\{\s*[CF]\s*\}|[CF])$", "°"),
        (r"\s+", " "),
        (r"^ *'(.*)' *$", r"\1"),
        (r"^[ *\"`]+|[ *\"`.,;:]+$", ""),  # no dot at the front: .5
        (rf"^(?:{TEXT.pattern}|\{{([^{{}}]*)\}})$", r"\1\2"),  # all of it in braces
    ]
]


def clean(text: str) -> str:
    """Removes the parts of an answer that mean nothing: $, quotes, final dot, thin spaces, bold type."""
    text = plain_unicode(text)
    for pattern, replacement in CLEANING:
        text = pattern.sub(replacement, text)
    return text.strip()


# What can follow a number and say nothing about it: words that name things. Two or three letters may be variables, so a
# short word must be one of these; a single letter must be upright: 5\text{ m} is 5, 5m is not.
SHORT_UNITS = set(
    "cm mm km kg mg ml lb lbs oz ft in mi yd hr hrs min mins sec secs mph mpg kph rpm gal qt pt Hz kHz MHz kW kWh kJ kN"
    " Pa kPa eV mol rad deg USD EUR GBP m/s day egg men cup box bag can car ton pie bus dog cat jar pen kid boy hat yen"
    " won".split()
)
UPRIGHT_UNITS = set("m g s h L l J N W V A K".split())
AFTER_A_UNIT = set("a an of per the in on at for he she it his her its h s".split())
NUMBER = "four|six|seven|ten|eleven|[a-z]+teen|hundred|thousand|milliard|[a-z]*illion"
# Longer words that are no unit: they make another number (5 millions), a condition, or a function of what was a number.
NO_UNIT = re.compile(
    rf"(?:{NUMBER}|zero|one|two|three|five|eight|nine|twelve|[a-z]+ty|dozen|score|gross|lakh|crore|myriad|googol|grand)s?"
    rf"|(?:(?:{NUMBER}|[a-z]+tie)th|third|fifth|eighth|ninth|twelfth)s?|half|halves|[a-z]*fold|doubled?|tripled?"
    r"|twice|thrice|squared|cubed?|factorial|inverse|negative|infinity|infinite|percentile|power|root|reciprocal|choose"
    r"|modulo|times|plus|minus|over|under|above|below|divided|multiplied|added|subtracted|increased|decreased|reduced"
    r"|raised|and|nor|but|when|whenever|unless|while|where|whether|not|never|none|except|without|otherwise|than|then"
    r"|else|because|since|although|though|from|until|into|with|either|neither|both|least|most|about|almost|nearly|around"
    r"|roughly|approximately|maybe|perhaps|possibly|alpha|beta|gamma|delta|epsilon|zeta|theta|iota|kappa|lambda"
    r"|omicron|sigma|upsilon|omega"
    r"|(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|exp|sqrt|abs|gcd|lcm|det|max|min|arg|mod)[abntuvxyz]{0,2}",
    re.IGNORECASE,
)
UNIT = re.compile(  # [A-Za-z], not [A-Za-z]+, which would take exponential time
    r"(?:(?<=[0-9)}°])|(?<=\\pi))(?=[ (]*[A-Za-z\\%])"
    rf"(?:{UPRIGHT}|[A-Za-z]|\^\{{?-?[1-3]\}}?|\\cdot|[ .'()/%-])+(?<![-/])$"
)


def without_unit(text: str) -> str:
    """A cleaned answer without the unit at its end, if that can be a unit."""
    match = UNIT.search(text)
    if match is None:
        return text
    plain = re.findall("m/s|[A-Za-z]+", TEXT.sub(" ", match[0]).replace("\\cdot", ""))
    upright = re.findall("[A-Za-z]+", " ".join(TEXT.findall(match[0])))
    for words, short in (plain, SHORT_UNITS), (upright, SHORT_UNITS | UPRIGHT_UNITS):
        for i, word in enumerate(words):
            long = len(word) > 3 and re.search("[aeiouy]", word.lower()) and not NO_UNIT.fullmatch(word)
            if not (long or word in short or word in ("per", "of", "each") or (i and word in AFTER_A_UNIT)):
                return text
    named = (plain or upright or "%" in match[0]) and "\\operatorname" not in match[0]
    return text[: match.start()] if named else text


@functools.lru_cache(maxsize=10_000)  # a group of completions gives the same answer many times
def read_answer(text: str) -> tuple[str, tuple | None]:
    """An answer, cleaned, and its tree if it is mathematics (see algebra.py)."""
    text = clean(text)
    # upright text with at most one letter is that letter: \mathrm{i}
    value = re.sub(TEXT.pattern.replace("[^{}]*", "[^{}A-Za-z]*[A-Za-z]?[^{}A-Za-z]*"), r" \1 ", without_unit(text))
    return text, algebra.read(value.strip()) if is_mathematics(value) else None


def is_mathematics(text: str) -> bool:
    """True if a text has a digit or a sign of mathematics, or is one letter: words are compared as text."""
    return re.search(r"[0-9\\^=+*/(\[{<>,!|-]|^[A-Za-z]$", text) is not None


def normalise(text: str) -> str:
    r"""The string to compare for a cleaned answer, without \text{} and needless spaces."""
    text = re.sub(r"\(([0-9A-Za-z]+)\)_", r"\1_", TEXT.sub(r" \1 ", text))
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    return re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(text.split()))  # the space of "1 2" stays: it is not 12


LABEL = re.compile(r"(?:(?:option|choice) *)?(?:\(([a-j])\)|([a-j])(?:[).:]|$))(?: +(?=[\w\\])(.*))?", re.IGNORECASE)


def same_choice(predicted: str, gold: str) -> bool:
    """True for A), (A), A. 5 and Option A against A: the same letter, and no other one."""
    one, other = (LABEL.fullmatch(TEXT.sub(r"\1", text)) for text in (predicted, gold))
    if not one or not other or (one[1] or one[2]).lower() != (other[1] or other[2]).lower():
        return False
    texts = [match[3] or "" for match in (one, other)]
    return not all(texts) and not any(re.search(r"\b[A-J]\b|\b(?:or|and|not)\b", text) for text in texts)


def answers_match(predicted: str | None, gold: str) -> bool:
    r"""True if an extracted answer (or None) is the gold answer.

    Numbers are compared exactly (1,000 = 1000, 1 1/2 = 1.5 = \frac{3}{2}, 0.333 is not 1/3). Units are ignored, even if
    they differ. Percent is a unit too: 50% = 50, not 0.5. "5 million" and "10 or 18" are not numbers. Other mathematics
    is compared by its value (algebra.py), everything else as text. A number in another base (52_8) only matches as
    text. None, "", nan and inf match nothing.
    """
    return matched_by(predicted, gold) is not None


def matched_by(predicted: str | None, gold: str) -> str | None:
    """How answers_match finds the answers equal: by "rule" (text, numbers) or "symbolic"; None if they differ."""
    if not predicted or not gold or max(len(predicted), len(gold)) > MAX_ANSWER_CHARS:
        return None
    (predicted, tree), (gold, gold_tree) = read_answer(predicted), read_answer(gold)
    strings = normalise(predicted), normalise(gold)
    if any(string.lower().lstrip("+-") in ("", "nan", "inf", "infinity") for string in strings):
        return None
    if tree is None or gold_tree is None:  # in mathematics, X is not x
        strings = strings[0].lower(), strings[1].lower()
    if strings[0] == strings[1] or same_choice(predicted, gold):
        return "rule"
    if tree is None or gold_tree is None or not algebra.same(tree, gold_tree):
        return None
    return "rule" if tree[0] == gold_tree[0] == "number" else "symbolic"
