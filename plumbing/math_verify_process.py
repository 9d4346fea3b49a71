"""Runs math-verify in a separate process with time and memory limits (see answers.math_verify_match).

It reads one JSON list [predicted, gold] per line from stdin and writes true or false for each, until stdin closes.
"""

import json
import logging
import os
import resource
import signal
import sys

MATH_VERIFY_SECONDS = 0.8  # CPU time per comparison; most take 0.01 to 0.1
MATH_VERIFY_BYTES = 2 << 30


def main() -> None:
    import math_verify
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig

    replies, sys.stdout, sys.stderr = sys.stdout, open(os.devnull, "w"), open(os.devnull, "w")
    logging.disable(logging.CRITICAL)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MATH_VERIFY_BYTES, MATH_VERIFY_BYTES))
    except (ValueError, OSError):  # macOS has no such limit
        pass
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # by default it ends the process, even inside C code
    # LaTeX only: the package's other parser passes the text to sympy's parse_expr, which evaluates it. units=False,
    # because it treats letters such as m, s and ab as units, and 5m would equal 5.
    latex = math_verify.LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
        )
    )

    def parse(text: str) -> list:
        return math_verify.parse(f"${text}$", [latex], fallback_mode="no_fallback", parsing_timeout=None)

    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, MATH_VERIFY_SECONDS)
        try:
            predicted, gold = (parse(text) for text in json.loads(line))
            matched = math_verify.verify(gold, predicted, float_rounding=12, timeout_seconds=None)
        except Exception:
            matched = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(matched)), file=replies, flush=True)


if __name__ == "__main__":
    main()
