r"""Finding the answer in a response: in the last `\boxed{...}`, or between `<answer>` and `</answer>`."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"[^\s${}]+")


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` (or `\fbox{...}`); None if there is no box.

    Braces are counted as in TeX: escaped ones do not pair. If the last box never closes, as in a response that was cut
    short, the result is None, because an earlier box is not the answer that the response was about to state.
    `\boxed 2` is read as `\boxed{2}`.

    >>> extract_boxed(r"so $\boxed{1}$, no, $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    last = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if last < 0 or not (box := _BOX.match(text, last)):
        return None
    start = box.end()
    if not text.startswith("{", start):
        bare = _BARE.match(text, start)
        return bare.group() if bare else None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start + 1 : brace.start()].strip()
    return None


def extract_answer(text: str) -> str | None:
    r"""Return the answer of a response to the R1-Zero prompt; None if the format is wrong.

    The prompt ends in `<think>`, so the format is right if the response contains `</think> <answer>` and `</answer>`
    (DeepSeek-AI 2025, section 2.2). The answer is the text between the last `<answer>` and the `</answer>` after it. If
    that contains a `\boxed{...}`, the answer is the content of the box, or "" if the box never closes.

    >>> extract_answer(r"2 + 2 is 4. </think> <answer> \boxed{4} </answer>")
    '4'
    """
    if "</think> <answer>" not in text or "</answer>" not in text:
        return None
    answer = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    if "\\boxed" in answer or "\\fbox" in answer:
        return extract_boxed(answer) or ""
    return answer
