r"""How MATH's grader judges gold answers that are written another way, and answers to other problems.

    python -m bench.grading --data DIR      a folder with test.json or test.jsonl, as HuggingFaceH4/MATH-500 has it

Each rewrite keeps the meaning: of the whole answer, or of a part where the answer has such a part. Every gold answer is
judged against those of 20 other problems, and what is accepted is listed. It takes two minutes.
"""

import argparse
import random
import re
from collections.abc import Callable

from tasks import math as task
from tasks.data import rows


def around(before: str, after: str) -> Callable[[str], str]:
    """The gold answer in a box with these around it."""
    return lambda gold: f"The answer is \\boxed{{{before}{gold}{after}}}."


def changed(pattern: str, by: str) -> Callable[[str], str | None]:
    """The gold answer in a box with a part of it written another way; None where it has no such part."""
    return lambda gold: f"\\boxed{{{re.sub(pattern, by, gold)}}}" if re.search(pattern, gold) else None


WHOLE = {
    "as it is": around("", ""),
    "full stop": around("", "."),
    "spaces": around(" ", " \n"),
    "thin spaces": around(r"\,", r"\;"),
    "dollars": around("$", "$"),
    r"\( \)": around(r"\(", r"\)"),
    r"\mathbf": around(r"\mathbf{", "}"),
    r"\boldsymbol": around(r"\boldsymbol{", "}"),
    r"\mathrm": around(r"\mathrm{", "}"),
    r"\bf": around(r"\bf ", ""),
    r"{\bf }": around(r"{\bf ", "}"),
    r"\text": around(r"\text{", "}"),
    r"\textbf": around(r"\textbf{", "}"),
    r"\displaystyle": around(r"\displaystyle ", ""),
    "braces": around("{", "}"),
    r"\color": around(r"\color{blue}{", "}"),
    "two boxes": around(r"\boxed{", "}"),
    r"\boxed {": lambda gold: f"\\boxed {{{gold}}}",
    "a new line": lambda gold: f"$$\\boxed\n{{{gold}}}$$",
}
PARTS = {
    r"\dfrac": changed(r"\\d?frac", r"\\dfrac"),
    r"\tfrac12": changed(r"\\d?frac\{(\d)\}\{(\d)\}", r"\\tfrac\1\2"),
    "1/2": changed(r"^(-?)\\d?frac\{(\d+)\}\{(\d+)\}", r"\1\2/\3"),
    r"no \left": changed(r"\\(left|right)", ""),
    "no \\text": changed(r"^\\text\{([A-Za-z ]+)\}$", r"\1"),
    "2,220": changed(r"^(\d{1,3})(\d{3})$", r"\1,\2"),
    r"2\,220": changed(r"^(\d{1,3})(\d{3})$", r"\1\\,\2"),
    "10080": changed(r"(\d),\\!\s*(?=\d{3})", r"\1"),
    "42.0": changed(r"^(-?\d+)$", r"\1.0"),
    "x = 42": changed(r"^(-?\d+)$", r"x = \1"),
    "8_{5}": changed(r"_(\d)$", r"_{\1}"),
    "degrees": changed(r"\^\\circ", r" \\text{ degrees}"),
    r"\cdot": changed(r"(\d) ?(\\sqrt|\\pi)", r"\1 \\cdot \2"),
    "bmatrix": changed("pmatrix", "bmatrix"),
    "π": changed(r"\\pi", "π"),
    "°": changed(r"\^\\circ", "°"),
    "∞": changed(r"\\infty", "∞"),
    "the minus −": changed("-", "−"),  # noqa: RUF001
}


def right(gold: str, response: str) -> bool:
    """The grader's judgement of a response."""
    answer = task.boxed(response)
    return bool(answer and task.equal(gold, answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    golds = [row["answer"] for _, row in rows(parser.parse_args().data, "test", ("problem", "answer"))]
    total = kept = 0
    for name, rewrite in (WHOLE | PARTS).items():
        responses = [(gold, response) for gold in golds if (response := rewrite(gold))]
        wrong = [(gold, response) for gold, response in responses if not right(gold, response)]
        total, kept = total + len(responses), kept + len(responses) - len(wrong)
        print(f"{name:16} {len(responses) - len(wrong):4} of {len(responses):4}", *wrong[:4], flush=True)
    print(f"right: {kept} of {total} rewrites, {kept / total:.2%}\n\naccepted, of 20 others each:")
    rng, others = random.Random(0), 0
    for gold in golds:
        for other in rng.sample(sorted({each for each in golds if each != gold}), 20):
            others += 1
            if right(gold, f"\\boxed{{{other}}}"):
                print(f"    {gold}    {other}")
    print(f"of {others}")


if __name__ == "__main__":
    main()
