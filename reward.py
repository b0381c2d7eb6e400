r"""Rewards: what a response earns, and a grader that nothing a model writes can hang.

    response --last_boxed--> answer --normalise--> LaTeX --quick_verdict--> True | False | None: --slow_verdict--> bool
    [(answer, gold)] --Grader.grade--> [bool]                                              (in a killable process)
    responses, problems --compute_rewards--> {"accuracy": [...], "format": [...], ..., "reward": weighted sum}

Strings in, values out: no torch, no model. Nothing is evaluated as code: the only parser is Math-Verify's LaTeX grammar
(its Python-expression extractor, which ends in `eval`, is left out), run by workers that import this file and
Math-Verify only. A new reward is one function: `@register("name")` on (response, problem) -> float.

What a gold accepts, beside every spelling of the same value:
  rounding  a decimal gold accepts what rounds to it at its own decimals (57.1: 57.14; 8.6: \sqrt{74}); other golds,
            or all with `rounding=False`, accept float noise below the sixth decimal only (8: 7.99999999, not 8.3).
  percent   with % on one side the bare number and its hundredth both pass (50: 50%; 50%: 0.5 and 50).
  units     dropped, degrees too, never converted: `\sin 30^\circ` is read in radians, so it is wrong.
  ratios    3:4 is the value 3/4, so 6:8 passes and 4:3 does not.
  chains    `x = \sqrt{74} \approx 8.6`: every member must hold, so a list of guesses with = between earns nothing.
  words     a gold in words or about figures (\angle 3 \cong \angle Z) compares as text; order around "and" and \cong
            is free. Words or variables in the answer to a number ("5 or 15", "x") make it wrong.

Source  Math-Verify, https://github.com/huggingface/Math-Verify
"""

import argparse
import contextlib
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import ROUND_HALF_UP, Context, Decimal
from itertools import accumulate
from multiprocessing.connection import wait

DEFAULT_WEIGHTS = {"accuracy": 0.9, "format": 0.1}
START_LIMIT = 60.0  # seconds for a worker to import Math-Verify; about 1 on an idle core
MEMORY_LIMIT = 2 * 1024**3  # bytes of address space per worker, so that a huge power fails instead of swapping
FLOAT_NOISE = 6  # decimals; Math-Verify's own tolerance for floats
WIDE = Context(prec=150, traps=[])  # digits; a longer number is refused, a power beyond all bounds becomes infinite

NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
CHAIN = r"(?:=|\\approx(?![a-zA-Z]))"
NAME = (  # the left side of `x = 4`, `m \angle ABC = 45`, `Area = 24`
    r"\s*(?:(?:m\s*)?\\(?:angle|triangle|overline|overarc|widehat)\s*\{?\s*\w{1,4}\s*\}?"
    r"|[a-zA-Z][a-zA-Z' ]{0,30}(?:_\s*\{?\s*\w{1,6}\s*\}?)?)\s*"
)
UNITS = (
    r"(?:square|sq\.?|cubic|cu\.?)?\s*(?:units?|[cmk]?m|ft|feet|foot|in|inch(?:es)?|yd|yards?|mi|miles?"
    r"|(?:centi|milli|kilo)?met(?:er|re)s?|deg|degrees?)\.?\s*(?:\^\s*\{?\s*[23]\s*\}?)?"
)
FIGURES = re.compile(r"\\(?:angle|triangle|cong|sim|parallel|perp|odot|overline\s*\{\s*[A-Z])(?![a-z])")
SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "√": r"\sqrt ", "°": " ",  # noqa: RUF001
    "≈": r"\approx ", "≤": r"\le ", "≥": r"\ge ", "∠": r"\angle ", "≅": r"\cong ", "²": "^2", "³": "^3", "$": "",
})  # fmt: skip
REWRITES = [(re.compile(pattern), latex) for pattern, latex in (
    (r"(?<=[0-9])(?:\{,\}|,?\\[,!])\s*(?=[0-9]{3}(?![0-9]))", ""),  # 4{,}000 and 4\,000
    (r"\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|\\[,;:! ]|~|\s+", " "),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:text|math|mbox|operatorname)(?:rm|bf|it|sf|normal)?\s*\{([^{}]*)\}", r" \1 "),
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\\(?:degree|circ)(?![a-zA-Z])|\\(?=$)", " "),
    (r"\\?%|(?<![a-zA-Z])percent(?![a-zA-Z])", r"\\%"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"^\s*(?:\\approx|\\sim|about|approximately)(?![a-zA-Z])", ""),
    (r"^\s*-\s+", "-"),
    (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan)(?![a-zA-Z])", r" \\\1 "),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*([0-9]+(?:\.[0-9]+)?)", r"\\sqrt{\1}"),  # 6 \sqrt 13; LaTeX itself would take the 1 only
    (r"(?<![0-9.}^_)])([0-9]+)\s*\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r"(\1+\\frac{\2}{\3})"),
    (r"(?<![0-9.}^_)])([0-9]+) +([0-9]+)\s*/\s*([0-9]+)", r"(\1+\\frac{\2}{\3})"),
    (r"(?<=[0-9]) +to +(?=[0-9])", ":"),
)]  # fmt: skip
# What an answer may hold besides the commands of its gold: \max(5, 14, 15) and 5 \equiv 15 are hedges, \sum only slow
COMMANDS = set("frac sqrt pi cdot times div pm approx sin cos tan log ln le leq ge geq lt gt infty cup cap in".split())
REFUSED = re.compile(  # long numbers, factorials, Python powers, `15_5` (read as 15), long exponents, towers, controls
    r"[0-9]{51}|!|\*\s*\*|[0-9})\]]\s*_|\^[\s{(+-]*[0-9]{4}|\^\s*(?:[0-9]+|[a-z])\s*\^|\^\s*[{(][^{}()]*\^"
    r"|[\x00-\x08\x0e-\x1f\x7f]"
)


def last_boxed(text: str) -> str | None:
    r"""Find the answer a response commits to: the content of its last \boxed{...} outside the thinking.

    Braces nest, escaped ones (\{) do not count. None if there is no box, the last one never closes, or `<think>` was
    opened and never closed; a response without think tags is searched whole.
    """
    answer = text.rpartition("</think>")[2]
    boxes = list(re.finditer(r"\\boxed\s*\{", answer))
    if not boxes or "<think>" in answer:
        return None
    depth, start = 1, boxes[-1].end()
    for brace in re.finditer(r"\\.|[{}]", answer[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return answer[start : start + brace.start()]
    return None


REWARDS: dict[str, Callable] = {}


def register(name: str) -> Callable[[Callable], Callable]:
    """Make a function of (response, problem) -> float a reward that weights can name; `problem` has `.answer`."""

    def add(function: Callable) -> Callable:
        REWARDS[name] = function
        return function

    return add


@register("format")
def format_reward(response: str, problem=None) -> float:
    r"""1.0 for `<think>not only blanks</think>` and then text with exactly one closed \boxed{}, else 0.0."""
    parts = re.fullmatch(r"\s*<think>(.*?)</think>(.*)", response, re.DOTALL)
    if not parts or not parts[1].strip() or "<think>" in parts[1] or "</think>" in parts[2]:
        return 0.0
    return float(parts[2].count(r"\boxed") == 1 and last_boxed(response) is not None)


def normalise(text: str) -> str:
    """Rewrite an answer or a gold the way a careful teacher reads it: decoration, units and `x =` gone, value kept."""
    text = text.replace(r"\$", "").translate(SYMBOLS)
    if not re.search(r"[(\[]|\\\{", text):  # (3,400) is a point, 3,400 a number
        text = re.sub(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", lambda m: m.group().replace(",", ""), text)
    for pattern, latex in REWRITES:
        text = pattern.sub(latex, text)
    value = without_unit(re.sub(rf"^(?:{NAME}{CHAIN})+", "", text))
    if not has_letters(value) and not FIGURES.search(value):
        text = value
    text = without_unit(text).strip().rstrip(" .,")
    sides = text.split(":")
    if len(sides) == 2 and all(sides) and not has_letters(text):
        return rf"\frac{{{sides[0].strip()}}}{{{sides[1].strip()}}}"
    return text


def has_letters(text: str) -> bool:
    """Tell whether LaTeX names a variable or a word, its commands aside."""
    return bool(re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", text)))


def without_unit(text: str) -> str:
    """Drop a trailing unit (`10 cm^2`, `5 m`); where other letters remain it may be algebra, and stays (`3x + 2 m`)."""
    value = re.sub(rf"(?<=[0-9}})\s])(?<![0-9](?=m\b)){UNITS}\s*$", "", text)
    return text if has_letters(value) else value


def is_text(gold: str) -> bool:
    """Tell whether a normalised gold is words or about figures; Math-Verify would read it as a product of letters."""
    plain = re.sub(r"\\[a-zA-Z]+", "", gold)
    return bool(FIGURES.search(gold) or re.search("[a-zA-Z]{3}", plain) or re.fullmatch("[A-Z]|[a-zA-Z ]{2,}", plain))


def as_text(text: str) -> list[str]:
    r"""Reduce words to what must agree: no case, spaces or braces; the sides of "and", "," and \cong in any order."""
    text = re.sub(r"(?<![a-z])and(?![a-z])", ",", text.casefold())
    return sorted(re.sub(r"[\s{}().]", "", part) for part in re.split(r"(,|\\cong)", text))


def same_number(answer: Decimal, gold: str, rounding: bool) -> bool:
    """Compare at the gold's own decimals (round half up) or, for an integer or without rounding, up to float noise."""
    if not answer.is_finite() or answer.adjusted() > 60:
        return False
    decimals = len(gold.partition(".")[2])
    step = Decimal(1).scaleb(-(decimals if decimals and rounding else max(decimals, FLOAT_NOISE)))
    return answer.quantize(step, ROUND_HALF_UP, WIDE) == Decimal(gold).quantize(step, ROUND_HALF_UP, WIDE)


def quick_verdict(answer: str, gold: str, rounding: bool, shortcut: bool = True) -> bool | None:
    """Decide what needs no algebra, on normalised strings, or None. With `shortcut`, equal strings are right."""
    if shortcut and answer == gold:
        return True
    if is_text(gold):
        return as_text(answer) == as_text(gold)
    depth = max(accumulate((c in "{([") - (c in "})]") for c in answer), default=0)
    commands, golden = (set(re.findall(r"\\([a-zA-Z]+)", text)) for text in (answer, gold))
    if not answer or depth > 12 or REFUSED.search(answer) or commands - golden - COMMANDS:
        return False
    if has_letters(answer) and not has_letters(gold):
        return False
    if NUMBER.fullmatch(answer) and NUMBER.fullmatch(gold):
        return same_number(Decimal(answer), gold, rounding)
    return None


def slow_verdict(answer: str, gold: str, rounding: bool) -> bool:
    """Decide by algebra, on normalised strings; for a worker, since it can take for ever.

    A chain `a = b \\approx c` holds if every member is the gold or what the gold rounds to, and one is the gold.
    """
    if "=" in gold:
        return "=" in answer and same_value(answer, gold, rounding)
    members = re.split(CHAIN, answer)
    held = [same_value(member, gold, rounding) for member in members]
    return any(held) and all(h or same_value(gold, member, rounding) for h, member in zip(held, members, strict=True))


def same_value(answer: str, gold: str, rounding: bool) -> bool:
    """Compare two LaTeX values by Math-Verify, percent signs taken as the header says, decimals rounded."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    if (r"\%" in answer) != (r"\%" in gold):
        plain = [text.replace(r"\%", "") for text in (answer, gold)]
        hundredth = [rf"\frac{{{p}}}{{100}}" if p != text else p for p, text in zip(plain, (answer, gold), strict=True)]
        return same_value(*plain, rounding) or same_value(*hundredth, rounding)
    answer, gold = answer.replace(r"\%", "").strip(), gold.replace(r"\%", "").strip()
    # units=False: Math-Verify's own list would drop single letters and a closing `\text{ or 5}`; normalise did units
    latex = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=latex)
    a, g = (parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None) for text in (answer, gold))
    real = [bool(e) and getattr(e[0], "is_number", False) and e[0].is_real for e in (a, g)]
    x, y = (Decimal(str(e[0].evalf(60))) if ok else None for e, ok in zip((a, g), real, strict=True))
    decimals = len(gold.partition(".")[2]) if NUMBER.fullmatch(gold) else 0
    if rounding and decimals and real[0] and same_number(x, gold, rounding):
        return True
    if all(real) and WIDE.subtract(x, y).copy_abs() > Decimal("0.001"):
        return False  # Math-Verify would first try to simplify the difference, for up to 0.3 s
    return verify(g, a, float_rounding=max(decimals, FLOAT_NOISE), timeout_seconds=None)


def serve(time_limit: float, rounding: bool) -> None:
    """Run a worker: JSON (answer, gold) lines come in on stdin, one byte goes out per verdict, until stdin closes.

    The kernel's timer ends a worker whose parent died: unlike a Python handler or a thread it needs no interpreter,
    which one long multiplication can hold for hours.
    """
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever a parser prints must not be read as a verdict
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    logging.disable(logging.CRITICAL)  # Math-Verify logs each parse it gives up on
    slow_verdict(r"\sqrt{4}", "2.5", True)  # compiles the grammar's tables before the clock runs
    os.write(replies, b"r")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, 2 * time_limit + 1)
        verdict = slow_verdict(*json.loads(line), rounding)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, b"1" if verdict else b"0")


def start_worker(time_limit: float, rounding: bool) -> subprocess.Popen:
    """Start a process that runs serve, and wait until it has imported Math-Verify. RuntimeError if it does not.

    A plain subprocess: fork would copy the trainer's threads and CUDA, multiprocessing's spawn would import train.py.
    """
    command = [sys.executable, os.path.abspath(__file__), "--worker", str(time_limit), str(int(rounding))]
    pipe = subprocess.PIPE
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)
    if reply := ask_worker(worker, b"", START_LIMIT):
        return worker
    end_worker(worker)
    raise RuntimeError(
        f"a grading worker {f'took over {START_LIMIT} s to start' if reply is None else 'died starting'}, so no answer "
        f"can be graded; is Math-Verify installed? See why with: echo | {sys.executable} {__file__} --worker 2 1"
    )


def ask_worker(worker: subprocess.Popen, line: bytes, limit: float) -> bytes | None:
    """Send a line and return the byte that answers it; b"" if the worker died, None after `limit` seconds."""
    try:
        worker.stdin.write(line)
    except BrokenPipeError:
        return b""
    return os.read(worker.stdout.fileno(), 1) if wait([worker.stdout], limit) else None


def end_worker(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.communicate()  # waits for the end, and closes the pipes


class Grader(contextlib.AbstractContextManager):
    """Grades answers in a few killable processes: `with Grader() as grader: grader.grade([("6", "6"), ("x", "7")])`.

    An answer over max_chars characters or time_limit seconds is wrong; a late worker is replaced, so a batch takes at
    most about (time_limit + 1) * (different hostile answers) / workers. For rounding see the header. `timeouts` counts
    late answers, `crashes` those that broke two workers (memory, recursion): wrong too. `seconds` holds what each
    normalised (answer, gold) that reached a worker took in the last call.
    """

    def __init__(self, workers: int = 2, time_limit: float = 2.0, max_chars: int = 300, rounding: bool = True):
        if workers < 1 or time_limit <= 0 or max_chars < 1:
            raise ValueError(f"{workers=}, {time_limit=}, {max_chars=} would grade nothing; all three must be positive")
        self.workers, self.time_limit, self.max_chars, self.rounding = workers, time_limit, max_chars, rounding
        self.timeouts = self.crashes = 0
        self.seconds: dict[tuple[str, str], float] = {}
        self.pool: list[subprocess.Popen] = []  # the idle workers; between calls, all of them

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; a later grade() starts new ones."""
        while self.pool:
            end_worker(self.pool.pop())

    def grade(self, pairs: Iterable[tuple[str | None, str]], shortcut: bool = True) -> list[bool]:
        """Grade (answer, gold) pairs, as written, in order; an answer of None was never given. Equal ones only once.

        With `shortcut`, equal strings are right; without, a gold against itself shows whether it can be graded at all.
        Raises RuntimeError if a worker does not start.
        """
        tasks = [
            None if answer is None or len(answer) > self.max_chars else (normalise(answer), normalise(gold))
            for answer, gold in pairs
        ]
        verdicts = {t: t is not None and quick_verdict(*t, self.rounding, shortcut) for t in dict.fromkeys(tasks)}
        hard = [task for task, verdict in verdicts.items() if verdict is None]
        self.seconds = {}
        with ThreadPoolExecutor(self.workers) as threads:  # each waits for its process
            for task, (reply, seconds) in zip(hard, threads.map(self._judge, hard), strict=True):
                verdicts[task], self.seconds[task] = reply == b"1", seconds
                self.timeouts += reply is None
                self.crashes += reply == b""
        return [verdicts[task] for task in tasks]

    def _judge(self, task: tuple[str, str]) -> tuple[bytes | None, float]:
        """A worker's reply to a task (see ask_worker), and its seconds. Runs in several threads."""
        for _ in range(2):  # one more try after a death: something else may have killed the worker
            try:
                worker = self.pool.pop()
            except IndexError:
                worker = start_worker(self.time_limit, self.rounding)
            start = time.monotonic()
            reply = ask_worker(worker, json.dumps(task).encode() + b"\n", self.time_limit)
            if reply:
                self.pool.append(worker)
                break
            end_worker(worker)
            if reply is None:
                break
        return reply, time.monotonic() - start


def compute_rewards(
    responses: Sequence[str],
    problems: Sequence,
    weights: dict[str, float],
    grader: Grader,
    truncated: Sequence[bool] | None = None,
) -> dict[str, list[float]]:
    """Score every response by every named reward; problems[i], with its `.answer`, is what responses[i] answers.

    A response that was truncated at the length limit has no format, however it begins: with nothing to lose by going on
    after the answer, a policy forgets how to end.

    Returns one list per reward, in order, and "reward", their sum weighted by `weights`; accuracy and format are there
    even without a weight. Raises ValueError for a name that is not registered.
    """
    check_names(weights)
    both = list(zip(responses, problems, strict=True))
    right = grader.grade([(last_boxed(response), problem.answer) for response, problem in both])
    scores = {"accuracy": [float(verdict) for verdict in right]}
    for name in {"format": None, **weights}:
        if name != "accuracy":
            scores[name] = [REWARDS[name](response, problem) for response, problem in both]
    if truncated is not None:
        scores["format"] = [0.0 if cut else score for cut, score in zip(truncated, scores["format"], strict=True)]
    total = [sum(weight * scores[name][i] for name, weight in weights.items()) for i in range(len(both))]
    return scores | {"reward": total}


def check_names(weights: Iterable[str]) -> None:
    known = ["accuracy", *REWARDS]
    for name in weights:
        if name not in known:
            raise ValueError(f"unknown reward {name!r}; known: {', '.join(known)} (add one with @register)")


def parse_weights(text: str) -> dict[str, float]:
    """Read "accuracy=0.9,format=0.1" into {name: weight}; ValueError for a bad name, a bad number, a repetition."""
    weights = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if not re.fullmatch(r"-?[0-9]*\.?[0-9]+", value) or name in weights:
            raise ValueError(f"weights {text!r}: {part!r} is not a new name=number; write accuracy=0.9,format=0.1")
        weights[name] = float(value)
    check_names(weights)
    return weights


def main() -> None:
    """Say how much of a data set can be graded, and how its responses do."""
    parser = argparse.ArgumentParser(description="grade every gold against itself, and the responses if there are any")
    parser.add_argument("file", help='parquet with a column "answer", or JSON lines of {"answer", "response"?}')
    parser.add_argument("--workers", type=int, default=2, help="grading processes")
    parser.add_argument("--time_limit", type=float, default=2.0, help="seconds before an answer counts as wrong")
    parser.add_argument("--no_rounding", action="store_true", help="decimal golds accept only their exact value")
    args = parser.parse_args()
    if args.file.endswith(".parquet"):
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(args.file, columns=["answer"]).to_pylist()
    else:
        with open(args.file, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
    if nameless := [n for n, row in enumerate(rows, 1) if "answer" not in row]:
        parser.error(f'{args.file} row {nameless[0]} has no gold to grade by; name it "answer"')
    golds = [str(row["answer"]) for row in rows]
    told = [(n, last_boxed(row["response"]), golds[n]) for n, row in enumerate(rows) if "response" in row]
    with Grader(args.workers, args.time_limit, rounding=not args.no_rounding) as grader:
        gradable = grader.grade([(gold, gold) for gold in golds], shortcut=False)
        seconds = grader.seconds
        right = grader.grade([(answer, gold) for _, answer, gold in told])
        seconds |= grader.seconds
    for n, gold in enumerate(golds):
        if not gradable[n]:
            print(f"row {n + 1}: gold {gold!r} is not equal to itself")
    for (n, answer, gold), verdict in zip(told, right, strict=True):
        if not verdict:
            print(f"row {n + 1}: answer {answer!r} is not gold {gold!r}")
    for (answer, gold), taken in sorted(seconds.items(), key=lambda item: -item[1])[:5]:
        print(f"slow: {taken:.2f} s for {answer!r} against {gold!r}")
    print(f"gradable golds: {sum(gradable)} of {len(golds)}; right responses: {sum(right)} of {len(told)}; "
          f"over the time limit: {grader.timeouts}; worker crashes: {grader.crashes}")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(float(sys.argv[2]), bool(int(sys.argv[3])))
    else:
        main()
