r"""Reads the mathematics of an answer into a tree, and decides whether two trees say the same.

A tree is a tuple, such as ("+", ("number", Fraction(1)), ("symbol", "x")). A text with two readings, or with a part
that is no mathematics, is refused as a whole: \frac12x is read, 1/2x is not. Numbers stay exact fractions while they
can; roots, pi and sines are computed to 300 digits by mpmath, which torch brings with it. Expressions with variables
are compared at a few values of these. The texts come from a model: none is evaluated as code, and whatever could become
large is refused. To refuse is to raise one of REFUSED.
"""

import functools
import hashlib
import math
import re
import threading
from fractions import Fraction

REFUSED = ValueError, ArithmeticError, LookupError, TypeError, RecursionError, ImportError
MAX_TOKENS, MAX_DEPTH = 300, 20
MAX_BITS = 40_000  # of a fraction; 3000! has 30,000
DIGITS, PROBES = 300, 4  # of a number that is no fraction; values of each variable
ZERO = Fraction(1, 10**250)  # a sum this small, relative to its terms, is 0
LOST = Fraction(1, 10**100)  # a term this small, relative to the other, would be lost: the sum is refused

# ---- Tokens --------------------------------------------------------------------------------------------------------

TRIGONOMETRIC = "sin", "cos", "tan", "cot", "sec", "csc"
FUNCTIONS = {*TRIGONOMETRIC, "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "ln", "log", "lg", "exp"}
SIMPLER = [  # applied in this order
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?", "°"),
        (r"\\sqrt\s*\[([^][]*)\]", r"\\root{\1}"),
        (r"\\frac\s*([0-9])\s*(?=[0-9{])", r"\\frac{\1}"),  # \frac12 and \frac1{2}
        (r"\\(?:text|mathrm|mbox|textrm)\s*\{\s*,?\s*(and|or)\s*,?\s*\}", r" \1 "),
        (r"\\(?:le|leq|leqslant)(?![A-Za-z])", "<="),
        (r"\\(?:ge|geq|geqslant)(?![A-Za-z])", ">="),
        (r"\\(?:cdot|times|ast)(?![A-Za-z])", "*"),
        (rf"\\operatorname\s*\{{({'|'.join(FUNCTIONS)})\}}", r"\\\1"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\neq(?![A-Za-z])", r"\\ne"),
        (r"\\[lr]?vert(?![A-Za-z])|\\mid(?![A-Za-z])", "|"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\mathbb\s*\{?\s*([A-Z])\s*\}?", r"\\\1"),
    ]
]
# [0-9], because \d matches the digits of all scripts. At most three digits of exponent, for the number's size.
DECIMAL = (
    r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"  # 1,234.50  18.  .5
    r"(?:[eE][+-]?[0-9]{1,3}(?![0-9.]))?"
)
TOKEN = re.compile(
    r"(?P<space> +)"
    r"|(?P<fixed>[0-9]*\.[0-9]*)\\(?:overline|bar)\s*\{(?P<period>[0-9]+)\}"  # 0.1\overline{6}
    r"|(?P<fixed2>[0-9]*\.[0-9]*)\\dot\s*\{?(?P<first>[0-9])\}?(?:(?P<middle>[0-9]*)\\dot\s*\{?(?P<last>[0-9])\}?)?"
    r"|(?<![\^_0-9.])(?P<whole>[0-9]+)"  # 1\frac{1}{2} and 1 1/2
    r"(?:\s*\\frac\s*\{([0-9]+)\}\s*(?:\{([0-9]+)\}|([0-9])(?![0-9]))| +([0-9]+)\s*/\s*([0-9]+))(?!\s*[\^!])"
    r"|(?P<number>[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9])|" + DECIMAL + ")"
    r"|\\(?:begin|end)\s*\{(?P<matrix>[pb]matrix|array)\}(?:(?<=\{array\})\s*\{[clr| ]*\})?"
    r"|(?P<word>[A-Za-z]+)|(?P<other>\\[A-Za-z]+|\\[{}\\]|<=|>=|[^\W\d_]|[-+*/^_=<>(){}\[\]|!,;&'°])"
)
WORD = re.compile(rf"({'|'.join(sorted(FUNCTIONS, key=len, reverse=True))}|sqrt|and$|or$)?([A-Za-z]*)")
NAMES = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho sigma tau"
    " upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell emptyset"
)
NAMES = {"\\" + name for name in NAMES.split()} | {f"\\{letter}" for letter in "CNQRZ"}


def tokenise(text: str) -> list:
    r"""Fractions (numbers), letters, commands ("\\frac") and signs. The words and, or are commas; \sin is "sin"."""
    for pattern, replacement in SIMPLER if "\\" in text else []:
        text = pattern.sub(replacement, text)
    tokens, position, depth = [], 0, 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None or len(tokens) > MAX_TOKENS:
            raise ValueError("no mathematics, or too long")
        token, position = match.group(), match.end()
        if match["number"]:
            if re.fullmatch("(?:[02-9]|[0-9]{2,})e[+-][1-9][0-9]*", token):
                raise ValueError("2e-1 may be 2e - 1")
            if depth and "," in token and ", " not in text:  # (1,234) is a pair
                token = token.partition(",")[0]
                position = match.start() + len(token)
            tokens.append(Fraction(re.sub("[ ,]", "", token)))
        elif match["whole"]:
            whole, top, bottom = (int(part) for part in match.groups()[7:13] if part)
            if not top < bottom:
                raise ValueError("a product or a mixed number?")
            tokens.append(whole + Fraction(top, bottom))
        elif period := match["period"] or match["first"]:
            whole, _, fixed = (match["fixed"] or match["fixed2"]).partition(".")
            period += (match["middle"] or "") + (match["last"] or "")
            tokens.append((int(whole + fixed) + Fraction(int(period), 10 ** len(period) - 1)) / 10 ** len(fixed))
        elif match["word"]:
            function, letters = WORD.fullmatch(token).groups()
            prose = len(letters) > 1 and re.match("_| +[A-Za-z]{2}", text[position:])  # AB_{16} is a number
            if prose or len(letters) > (2 if function else 3):
                raise ValueError("prose")
            tokens += [{"sqrt": "\\sqrt"}.get(function, function)] * bool(function) + [*letters]
        elif not match["space"]:
            tokens.append(f"\\{match['matrix']}" if match["matrix"] else token[1:] if token[1:] in FUNCTIONS else token)
        depth += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
    return tokens


# ---- The parser ----------------------------------------------------------------------------------------------------

END = "end"
RELATIONS = "=", "<", ">", "<=", ">=", "\\ne", "\\in"
CLOSING = {"(": (")", "]"), "[": (")", "]"), "\\{": ("\\}",), "{": ("}",)}
MATRIX = "\\pmatrix", "\\bmatrix", "\\array"


class Parser:
    """Recursive descent: answer = item ("," item)*;  item = union (relation union)*;  union = sum ("∪" sum)*;
    sum = term (sign term)*;  term = signed (("*" | "/") signed | power)*;  signed = sign? power;
    power = atom ("^" exponent | "!" | "°")*"""

    def __init__(self, text: str):
        self.tokens = [*tokenise(text), END]
        self.last, self.depth, self.bars, self.degrees = None, 0, 0, False

    @property
    def next(self):
        return self.tokens[0]

    def take(self, *allowed):
        if allowed and self.next not in allowed:
            raise ValueError(f"{self.next}: not expected here")
        self.last = self.tokens.pop(0)
        return self.last

    def answer(self, *end) -> tuple:
        items, joins = self.items(end), set()
        while self.next in (",", ";", "and", "or"):
            joins.add(self.take())
            if self.next in ("and", "or"):  # 1, 2, and 3
                joins.add(self.take())
            items += self.items(end)
        self.take(*end)
        return items[0] if len(items) == 1 else ("or" if joins - {","} == {"or"} else "list", *items)

    def items(self, end: tuple) -> list[tuple]:
        r"""The next item of the answer or a set, or the two items that its \pm stands for. In brackets it waits."""
        relations, sides = [], [self.union()]
        while self.next in RELATIONS:
            relations.append(self.take())
            sides.append(self.union())
        tree = ("relation", tuple(relations), *sides) if relations else sides[0]
        if end not in ((END,), CLOSING["\\{"]):
            return [tree]
        signs = parts(tree, "\\pm") + parts(tree, "\\mp")
        if len(signs) > 1:
            raise ValueError("which signs go together?")
        return [with_sign(tree, 1), with_sign(tree, -1)] if signs else [tree]

    def union(self) -> tuple:
        sets = [self.sum()]
        while self.next == "\\cup":
            self.take()
            sets.append(self.sum())
        return ("union", *sets) if len(sets) > 1 else sets[0]

    def sum(self) -> tuple:
        tree = self.term()
        while self.next in ("+", "-", "\\pm", "\\mp"):
            sign = self.take()
            tree = ("+", tree, self.term() if sign == "+" else (sign, self.term()))
        if self.next in ("\\over", "\\choose"):  # {1 \over 2}
            tree = ("/" if self.take() == "\\over" else "\\binom", tree, self.sum())
        return tree

    def term(self) -> tuple:
        tree, slash = self.signed(), False
        while self.next in ("*", "/") or self.starts_factor():
            if self.next in ("*", "/"):
                slash = self.next == "/"
                tree = (self.take(), tree, self.signed())
            elif slash or isinstance(self.next, Fraction):
                raise ValueError("1/2x and x 2 have two readings")
            else:
                tree = ("*", tree, self.power())
        return tree

    def starts_factor(self, brackets=("(", "[", "{", "\\{")) -> bool:
        token = self.next
        return (
            isinstance(token, Fraction)
            or is_name(token)
            or token in FUNCTIONS
            or token in ("\\frac", "\\sqrt", "\\root", "\\binom", "\\lfloor", "\\lceil", "\\infty", *brackets)
            or (token == "|" and not self.bars)
        )

    def signed(self) -> tuple:
        if self.next not in ("+", "-", "\\pm", "\\mp"):
            return self.power()
        sign = self.take()
        return self.power() if sign == "+" else (sign, self.power())

    def power(self) -> tuple:
        tree = self.atom()
        while self.next in ("^", "!", "°"):
            sign = self.take()
            if sign == "^":
                tree = ("^", tree, self.exponent())
            elif sign == "!":
                tree = ("!", tree)
            elif self.degrees:  # elsewhere degrees are a unit, which says nothing
                tree = ("*", tree, ("/", ("symbol", "\\pi"), ("number", Fraction(180))))
            if sign != "°" and self.next == sign:
                raise ValueError("x^y^z and x!! have two readings")
        return tree

    def exponent(self) -> tuple:
        if self.next == "-":
            return (self.take(), self.atom())
        return self.atom()

    def atom(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("nested too deep")
        tree = self.read_atom(self.take())
        self.depth -= 1
        return tree

    def read_atom(self, token) -> tuple:
        if isinstance(token, Fraction):
            return ("number", token)
        if token in CLOSING:
            return self.brackets(token)
        if token in FUNCTIONS:
            return self.function(token)
        if is_name(token):
            return self.name(token)
        if token in MATRIX:
            return self.matrix(token)
        if token == "|":
            self.bars += 1
            tree = self.sum()
            self.bars -= 1
            self.take("|")
            return ("|", tree)
        if token in ("\\lfloor", "\\lceil"):
            tree = self.sum()
            self.take("\\r" + token[2:])
            if symbols(tree):
                raise ValueError("a few values don't tell roundings from each other")
            return (token, tree)
        if token == "\\sqrt":
            return ("\\root", ("number", Fraction(2)), self.argument("("))
        if token in ("\\frac", "\\binom", "\\root"):
            return ("/" if token == "\\frac" else token, self.argument(), self.argument())
        if token == "\\angle":
            while is_name(self.next):
                token += self.take()
            return ("symbol", token)
        if token == "\\infty":
            return (token,)
        raise ValueError(f"{token}: not expected here")

    def argument(self, bracket="{") -> tuple:
        r"""The argument of \frac or \sqrt: in braces, or a digit or a name."""
        if self.next in ("{", bracket) or is_name(self.next):
            return self.atom()
        if isinstance(self.next, Fraction) and self.next < 10 and self.next.denominator == 1:
            return ("number", self.take())
        raise ValueError(f"{self.next}: not an argument")

    def brackets(self, opening: str) -> tuple:
        bars, self.bars = self.bars, 0
        tree = self.answer(*CLOSING[opening])
        self.bars, closing = bars, self.last
        items = tree[1:] if tree[0] in ("list", "or") else (tree,)
        if opening == "\\{" or (opening == "{" and len(items) > 1):
            return ("set", *items)
        if len(items) > 1:
            return ("tuple", opening + closing, *items)
        if opening + closing not in ("()", "[]", "{}"):
            raise ValueError("brackets that don't match")
        return tree

    def matrix(self, kind: str) -> tuple:
        rows = [[self.sum()]]
        while self.next != kind:
            if self.take("&", "\\\\") == "&":
                rows[-1].append(self.sum())
            elif self.next != kind:  # else \\ after the last row
                rows.append([self.sum()])
        self.take()
        return ("matrix", *(("row", *row) for row in rows))

    def function(self, name: str) -> tuple:
        power = base = None
        while self.next in ("^", "_"):
            if self.next == "^" and power is None:
                self.take()
                power = self.exponent()
            elif self.next == "_" and name == "log" and base is None:
                self.take()
                base = self.argument()
            else:
                raise ValueError("a second power or an index")
        degrees, self.degrees = self.degrees, name in TRIGONOMETRIC
        brackets = self.next in ("(", "{", "[")
        argument = self.atom() if brackets else self.power()
        while not brackets and self.starts_factor(brackets=()) and self.next not in FUNCTIONS:
            argument = ("*", argument, self.power())
        if not brackets and self.next in ("/", "("):
            raise ValueError("sin x/2 and sin x(x+1) have two readings")
        self.degrees = degrees
        if name == "lg":
            name, base = "log", ("number", Fraction(10))
        if power == ("-", ("number", Fraction(1))):
            if name not in ("sin", "cos", "tan"):
                raise ValueError("an inverse or a power?")
            name, power = "arc" + name, None
        tree = (name, argument) if base is None else ("/", ("ln", argument), ("ln", base))
        return tree if power is None else ("^", tree, power)

    def name(self, name: str) -> tuple:
        while self.next == "'":
            name += self.take()
        if self.next == "_":
            self.take()
            name += repr(self.argument())
        if self.next == "(" and name[0] in "fghFGHPQ":  # other letters before a bracket are factors
            return ("call", name, self.atom())
        return ("symbol", name)


def is_name(token) -> bool:
    return isinstance(token, str) and (len(token) == 1 and token.isalpha() or token in NAMES)


def parts(tree, kind: str) -> list[tuple]:
    """The parts of a tree of one kind."""
    if not isinstance(tree, tuple):
        return []
    return [tree] * (tree[:1] == (kind,)) + [part for branch in tree for part in parts(branch, kind)]


def symbols(tree) -> set[str]:
    """The variables and functions in a tree."""
    found = {part[1] for kind in ("symbol", "call") for part in parts(tree, kind)}
    return found - {"e", "i", "\\pi"}


def with_sign(tree, sign: int):
    r"""The tree with + or - for each \pm."""
    if not isinstance(tree, tuple):
        return tree
    tree = tuple(with_sign(part, sign) for part in tree)
    if tree[:1] not in (("\\pm",), ("\\mp",)):
        return tree
    return tree[1] if (tree[0] == "\\pm") == (sign > 0) else ("-", tree[1])


def read(text: str) -> tuple | None:
    """The tree of a text; None if it is refused."""
    try:
        return Parser(text).answer(END)
    except REFUSED:
        return None


# ---- Values --------------------------------------------------------------------------------------------------------

lock = threading.Lock()  # mpmath's context has a state


@functools.cache
def context():
    import mpmath

    mp = mpmath.MPContext()
    mp.dps = DIGITS
    return mp


def inexact(value):
    return context().mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def checked(value):
    """A value, if its size allows to go on with it."""
    if isinstance(value, Fraction):
        if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
            raise ValueError("too large")
        return value
    if value == 0:
        return Fraction(0)
    if not context().isfinite(value) or abs(context().mag(value)) > MAX_BITS:
        raise ValueError("too large")
    return value


def are_equal(a, b) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = inexact(a), inexact(b)
    return abs(a - b) < inexact(ZERO) * max(abs(a), abs(b))


def add(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return checked(a + b)
    if a == 0 or b == 0:
        return b if a == 0 else a
    if are_equal(a, -b):
        return Fraction(0)
    a, b = inexact(a), inexact(b)
    if min(abs(a), abs(b)) < inexact(LOST) * max(abs(a), abs(b)):
        raise ValueError("a term would be lost")
    return checked(a + b)


def multiply(a, b):
    exact = isinstance(a, Fraction) and isinstance(b, Fraction)
    return checked(a * b if exact else inexact(a) * inexact(b))


def divide(a, b):
    return multiply(a, power(b, Fraction(-1)))


def power(base, exponent):
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
        if base == exponent == 0:
            raise ValueError("0^0")
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits > 1 and bits * abs(exponent) > 2 * MAX_BITS:
            raise ValueError("too large")
        return checked(base ** int(exponent))
    if base == 0:
        if context().re(inexact(exponent)) > 0:
            return Fraction(0)
        raise ZeroDivisionError
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and base > 0 and exponent.denominator < 100:
        degree = exponent.denominator  # sqrt(4/9) is exactly 2/3
        exact = Fraction(
            *(round(inexact(Fraction(n)) ** inexact(Fraction(1, degree))) for n in base.as_integer_ratio())
        )
        if exact**degree == base:
            return power(exact, Fraction(exponent.numerator))
    base, exponent = inexact(base), inexact(exponent)
    if abs(exponent) * (abs(context().mag(base)) + 10) > MAX_BITS:
        raise ValueError("too large")
    return checked(context().power(base, exponent))


def root(degree, value):
    if not isinstance(degree, Fraction) or degree.denominator > 1 or not 2 <= degree <= 100:
        raise ValueError("not a root")
    if degree % 2 and isinstance(value, Fraction) and value < 0:
        return -power(-value, 1 / degree)
    return power(value, 1 / degree)


def factorial(value):
    if isinstance(value, Fraction) and value.denominator == 1:
        if not 0 <= value <= 3000:
            raise ValueError("too large")
        return Fraction(math.factorial(int(value)))
    if abs(value) > 1000:
        raise ValueError("too large")
    return checked(context().gamma(inexact(value) + 1))


def binomial(n, k):
    if all(isinstance(value, Fraction) and value.denominator == 1 for value in (n, k)):
        if not 0 <= k <= n <= 3000:
            raise ValueError("too large")
        return Fraction(math.comb(int(n), int(k)))
    return divide(factorial(n), multiply(factorial(k), factorial(add(n, -k))))


def rounded(value, up: bool):
    if not isinstance(value, Fraction):
        nearest = Fraction(int(context().nint(value)))
        value = nearest if are_equal(value, nearest) else int(context().floor(value)) + Fraction(1, 2)
    return Fraction(math.ceil(value) if up else math.floor(value))


def function(name: str, value):
    mp = context()
    if name in ("tan", "cot", "sec", "csc"):
        sine, cosine, one = function("sin", value), function("cos", value), Fraction(1)
        return divide(*{"tan": (sine, cosine), "cot": (cosine, sine), "sec": (one, cosine), "csc": (one, sine)}[name])
    if name == "ln" and value == 0:
        raise ZeroDivisionError
    value = inexact(value)
    if name != "ln" and abs(value) > MAX_BITS / 2:
        raise ValueError("too large")
    result = getattr(mp, name.replace("arc", "a"))(value)
    # sin(pi) is 0, but sin(10^{-300}) is not
    return Fraction(0) if abs(result) < inexact(ZERO) * min(1, abs(value)) else checked(result)


def chosen_value(name: str, probe: int) -> Fraction:
    """The value of a variable: above 0 at the first probe, below 0 at the second. So |x| is not x."""
    digest = hashlib.sha256(f"{name} {probe}".encode()).digest()
    value = Fraction(int.from_bytes(digest[:4], "big"), 1_234_567_891)
    return value if probe == 0 or (probe > 1 and digest[4] % 2) else -value


@functools.lru_cache(maxsize=2_000)  # two sets are compared item by item
def evaluate(tree: tuple, probe: int):
    """The value of an expression: a Fraction, or a number of mpmath's. Sets and infinity have none."""
    kind, *branches = tree
    if kind == "number":
        return branches[0]
    if kind == "symbol":
        if branches[0] in ("e", "i", "\\pi"):
            mp = context()
            return {"e": +mp.e, "i": mp.mpc(0, 1), "\\pi": +mp.pi}[branches[0]]
        return chosen_value(branches[0], probe)
    if kind == "call":
        value = evaluate(branches[1], probe)
        return chosen_value(f"{branches[0]} {context().nstr(inexact(value), 100)}", probe)
    values = [evaluate(branch, probe) for branch in branches]
    if kind == "log":  # of an unknown base: e, 2 or 10
        return multiply(function("ln", *values), chosen_value("the base of log", probe))
    operations = {
        "+": add,
        "-": lambda value: -value,
        "*": multiply,
        "/": divide,
        "^": power,
        "|": abs,
        "!": factorial,
        "\\binom": binomial,
        "\\root": root,
        "\\lfloor": functools.partial(rounded, up=False),
        "\\lceil": functools.partial(rounded, up=True),
    }
    return function(kind, *values) if kind in FUNCTIONS else operations[kind](*values)


# ---- Comparison ----------------------------------------------------------------------------------------------------

INFINITY = ("\\infty",)
REALS = ("tuple", "()", ("-", INFINITY), INFINITY)
REVERSED = {">": "<", ">=": "<=", "\\in": "="}


@functools.lru_cache(maxsize=10_000)
def same(predicted: tuple, gold: tuple) -> bool:
    """True if a predicted tree says what the gold one says; False if one of them is refused."""
    with lock:
        try:
            return says(predicted, gold)
        except REFUSED:
            return False


def says(predicted: tuple, gold: tuple) -> bool:
    """An equation is compared with an equation, and with a value if it gives one: x = 5, but not 2x = 10."""
    predicted, gold = spread(predicted), spread(gold)
    if parts(predicted, "relation") and parts(gold, "relation"):
        if predicted[0] == gold[0] == "relation":
            return equal_relations(predicted, gold)
        return predicted[0] == gold[0] and unordered(predicted[1:], gold[1:], says)
    return equal(content(predicted, identities=True), content(gold))


def spread(tree: tuple) -> tuple:
    """x=1, 2 as x=1, x=2."""
    if tree[0] in ("list", "or") and tree[1][0] == "relation" and tree[1][1] == ("=",):
        name = tree[1][2]
        return (tree[0], *(item if item[0] == "relation" else ("relation", ("=",), name, item) for item in tree[1:]))
    return tree


def is_unknown(tree: tuple) -> bool:
    """A variable, also i and e, or a function of variables."""
    return tree[0] == "symbol" or (tree[0] in ("call", "tuple") and all(map(is_unknown, tree[2:])))


def solved(tree: tuple, identities=False) -> tuple | None:
    """(name, value) of x = value or x = a = ... = value; the value of an inequality is an interval. Else None.
    identities: 12 + 6 = 18 is 18, without a name."""
    relations, sides = [REVERSED.get(relation, relation) for relation in tree[1]], list(tree[2:])
    if {*relations} == {"="}:
        if len(sides) == 2 and is_unknown(sides[1]) and not is_unknown(sides[0]):  # 5 = x
            sides.reverse()
        if not is_unknown(sides[0]):
            sides.insert(0, ("", ""))
            if symbols(tree) or not identities:
                return None
        name, *values = sides
        right = name[1] not in symbols((*values,)) and all(equal(value, values[-1]) for value in values)
        return (name, values[-1]) if right else None
    if not {*relations} <= {"<", "<="} or len({relation[0] for relation in tree[1]}) > 1:
        return None
    if tree[1][0][0] == ">":
        sides.reverse()
        relations.reverse()
    if len(sides) == 2:  # x < 5 is -oo < x < 5
        first = is_unknown(sides[0])
        relations.insert(0 if first else 1, "<")
        sides.insert(0 if first else 2, ("-", INFINITY) if first else INFINITY)
    low, name, high, *more = sides
    if more or not is_unknown(name):
        return None
    return name, ("tuple", "(["[relations[0] == "<="] + ")]"[relations[1] == "<="], low, high)


def content(tree: tuple, identities=False) -> tuple:
    """The value that a tree gives: 5 for x = 5, (5, 3) for x = 5, y = 3, an interval for x > 2. ValueError if none."""
    if not parts(tree, "relation"):
        return tree
    items = tree[1:] if tree[0] in ("list", "or") else (tree,)
    pairs = [solved(item, identities) for item in items if item[0] == "relation"]
    if len(pairs) < len(items) or None in pairs:
        raise ValueError("not solved")
    names, values = zip(*pairs, strict=True)
    if len(items) == 1:
        return values[0]
    inequality = any(relation not in ("=", "\\in") for item in items for relation in item[1])
    if len({*names}) == 1:
        if inequality and tree[0] == "list":
            raise ValueError("an intersection")
        return ("union" if inequality else "list", *values)
    if len({*names}) < len(names) or inequality:
        raise ValueError("not solved")
    return ("tuple", "()", *values)


def equal(a: tuple, b: tuple) -> bool:
    """Whether two trees without relations are equal."""
    if a == b:
        return True
    a, b = (REALS if tree == ("symbol", "\\R") else tree for tree in (a, b))
    groups = "list", "or", "set"
    if a[0] in groups or b[0] in groups:
        return unordered(*(tree[1:] if tree[0] in groups else (tree,) for tree in (a, b)), equal)
    if a[0] == b[0] == "union":
        return unordered(a[1:], b[1:], equal)
    if a[0] == b[0] and a[0] in ("tuple", "matrix", "row"):
        start = 2 if a[0] == "tuple" else 1  # its brackets are equal too
        return a[1:start] == b[1:start] and len(a) == len(b) and all(map(equal, a[start:], b[start:]))
    if a[0] == b[0] == "-":
        return equal(a[1], b[1])
    return not parts((a, b), "\\infty") and equal_values(a, b)


def unordered(some: tuple, others: tuple, match) -> bool:
    """Whether each item of one matches its own item of the other."""
    others = list(others)
    for item in some:
        found = next((i for i, other in enumerate(others) if match(item, other)), None)
        if found is None:
            return False
        others.pop(found)
    return not others


def equal_values(a: tuple, b: tuple) -> bool:
    probes = range(PROBES if symbols((a, b)) else 1)
    return all(are_equal(evaluate(a, probe), evaluate(b, probe)) for probe in probes)


def equal_relations(predicted: tuple, gold: tuple) -> bool:
    """Whether two relations hold for the same values of their variables: solved for the same unknown with the same
    value, or with differences of their sides that are multiples of each other."""
    one, other = solved(predicted), solved(gold)
    if one and other and one[0] == other[0] and equal(one[1], other[1]):
        return True
    if other and not symbols(other[1]):  # the gold answer is a solution: 2x = 10 only states the question again
        return False
    if len(predicted[1]) > 1 or len(gold[1]) > 1:
        return predicted[1] == gold[1] and all(map(equal, predicted[2:], gold[2:]))
    relations = [REVERSED.get(tree[1][0], tree[1][0]) for tree in (predicted, gold)]
    if relations[0] != relations[1]:
        return False
    sides = [tree[:1:-1] if tree[1][0][0] == ">" else tree[2:] for tree in (predicted, gold)]
    differences = [[evaluate(("+", a, ("-", b)), probe) for probe in range(PROBES)] for a, b in sides]
    if any(all(are_equal(value, values[0]) for value in values) for values in differences):
        return False  # an identity, or a contradiction
    ratios = [divide(a, b) for a, b in zip(*differences, strict=True)]
    positive = abs(ratios[0]) == ratios[0] or relations[0] in ("=", "\\ne")
    return positive and all(are_equal(ratio, ratios[0]) for ratio in ratios)
