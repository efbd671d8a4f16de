r"""One canonical spelling for the many ways in which LaTeX can write the same answer.

`canonical` is not a parser. It rewrites the text by rules that keep its meaning, so that many equal answers become
equal strings, and so that the code that reads them afterwards has few cases to handle. In its output

- there is a space only where it has a meaning: between two digits, before a word, after a comma;
- `\frac`, `\sqrt`, `^` and `_` have their arguments in braces;
- `\text{...}` holds words, and nothing else is set as text;
- `°`, `%` and `$` are units; `\cdot` is the only product sign; `\begin{matrix}` the only matrix with brackets, and
  `\cr` ends its rows.
"""

import re
import unicodedata
from collections.abc import Callable

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑﹣－", "-"),
        **dict.fromkeys("⋅·∙•＊∗", r"\cdot "),
        **dict.fromkeys("“”‘’′", "'"),
        "×": r"\times ", "÷": r"\div ", "∕": "/", "±": r"\pm ", "∓": r"\mp ",
        "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
        "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",
        "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "⟨": r"\langle ",
        "⟩": r"\rangle ", "º": "°", "˚": "°", "％": "%", "＄": "$", "¢": " cents",
        "，": ",", "（": "(", "）": ")",
    }
)  # fmt: skip
_SCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789+-n0123456789")

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

# Characters that stand for commands.
_SYMBOLS: Rules = (
    (r"([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+)", lambda match: "^{" + match[1].translate(_SCRIPTS) + "}"),
    (r"([₀₁₂₃₄₅₆₇₈₉]+)", lambda match: "_{" + match[1].translate(_SCRIPTS) + "}"),
    (r"[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0])),
    (r"([0-9]+)⁄([0-9]+)", r"\\frac{\1}{\2}"),
    (r"√\s*([0-9.]+|[a-zA-Z])", r"\\sqrt{\1}"),
    (r"√", r"\\sqrt"),
)
# Layout, and constructs that can be written in several ways. Each rule is one pass; the order matters.
_SPELLINGS: Rules = (
    # Math delimiters, Markdown emphasis, sizes and styles.
    (r"^\s*(?:\\[\[(]|\*\*)|(?:\\[\])]|\*\*)\s*$", ""),
    (r"(?<!\\)\$", ""),
    (r"\\\$", "$"),
    (r"\\%", "%"),
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits)(?![a-zA-Z])\.?", ""),
    (r"\\(?:phantom|hphantom|vphantom)\s*(?:\{[^{}]*\}|[^{}])", ""),
    # Thousands separators: a comma with a negative space or braces, or a space. Then other space.
    (r"(?<=[0-9])(?:,\s*\\!|\{,\})\s*(?=[0-9])", ""),
    (r"\\!", ""),
    (r"\\(?:[,;:> ]|quad(?![a-zA-Z])|qquad(?![a-zA-Z])|hspace\s*\{[^{}]*\})|~|\s|\0", " "),
    (r"(?<![0-9.])[0-9]{1,3}(?: [0-9]{3})+(?![0-9]| ?/)", lambda match: match[0].replace(" ", "")),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:times|ast|bullet)(?![a-zA-Z])|(?<!\*)\*(?!\*)", r"\\cdot "),
    (r"\*\*", "^"),
    (r"\\(le|ge)q(?:slant)?(?![a-zA-Z])", r"\\\1 "),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
    (r"\\varnothing(?![a-zA-Z])|\\\{ *\\\}", r"\\emptyset "),
    (r"\\l(?:brace|angle)(?![a-zA-Z])", lambda match: r"\{" if match[0] == r"\lbrace" else r"\langle "),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\l?[vV]ert(?![a-zA-Z])|\\rvert(?![a-zA-Z])", "|"),
    (r"\\(begin|end) *\{(?:[pb]|small|psmall)?matrix\}", r"\\\1{matrix}"),
    (r"[(\[] *\\begin *\{(?:array|matrix)\} *(?:\{[clr| ]*\})?", r"\\begin{matrix}"),
    (r"\\end *\{(?:array|matrix)\} *[)\]]", r"\\end{matrix}"),
    (r"\^ *(?:\{ *\\circ *\}|\\circ(?![a-zA-Z])|°)|\\degree(?![a-zA-Z])", "°"),
    (r"^ *(?:\\approx(?![a-zA-Z])|\\therefore(?![a-zA-Z])|=)", ""),
    # Fonts: words keep one wrapper, symbols lose theirs.
    (r"\\(?:mathbf|mathit|mathsf|boldsymbol|bm|vec|hat)(?![a-zA-Z]) *(?:\{([^{}]*)\}|([a-zA-Z]))", r"\1\2"),
    (r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|hbox|mathrm) *\{([^{}]*)\}",
     lambda match: _text(match[1], match.string[: match.start()])),
    (r",? *\\text\{(?:and|or)\}|,?(?<![a-zA-Z\\]) *(?:and|or)(?![a-zA-Z])", ", "),
    # Names that were written without their backslash.
    (r"(?<![a-zA-Z\\])(?:infinity|infty|inf|oo)(?![a-zA-Z])", r"\\infty "),
    (r"(?<![a-zA-Z\\])(sqrt|pi|sin|cos|tan|cot|sec|csc|log|ln)(?![a-zA-Z])", r"\\\1 "),
    (r"\+ *\\infty", r"\\infty"),
    (r"(?<![a-zA-Z\\])percent(?![a-zA-Z])|\\text\{percent\}", "%"),
    (r"(?<=[0-9]) ?([aApP])\.[mM]\.?(?![a-zA-Z])", r"\\text{\1m}"),
    # One-token arguments get braces. `x^10` is read as people mean it, not as TeX reads it.
    (r"([\^_]) *(-?[0-9]+|[a-zA-Z]|\\(?:pi|theta|infty)(?![a-zA-Z]))", r"\1{\2}"),
    (r"\\sqrt *([0-9]|[a-zA-Z])", r"\\sqrt{\1}"),
    (r"\\frac *([0-9a-zA-Z]|\\pi(?![a-zA-Z]))", r"\\frac{\1}"),
    # 1/2x is half of x, as most people mean it.
    (r"(?<![0-9.,a-zA-Z}/])([0-9]+) ?/ ?([0-9]+)(?![0-9.^!]|,[0-9])", r"\\frac{\1}{\2}"),
    (r"(\\frac *\{(?:[^{}]|\{[^{}]*\})*\}) *([0-9a-zA-Z])", r"\1{\2}"),
)  # fmt: skip
_SYMBOL_RULES, _SPELLING_RULES = (
    tuple((re.compile(pattern), replacement) for pattern, replacement in rules) for rules in (_SYMBOLS, _SPELLINGS)
)
_PLAIN_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")  # most answers, which no rule would change
_ROUND_ARGUMENT = re.compile(r"(\\sqrt|\^) *\(")
_SPACE = re.compile(r" +")
_NEEDED_SPACE = re.compile(r"[0-9] [0-9.]|[a-zA-Z] [a-zA-Z]|, .|[0-9})!] [a-zA-Z]{2}")


def canonical(text: str) -> str:
    r"""Rewrite an answer in its canonical spelling; see the module docstring.

    >>> canonical(r"$\left( \dfrac12,\, 10,\!080 \right)$.")
    '(\\frac{1}{2}, 10080)'
    """
    if _PLAIN_NUMBER.fullmatch(text):
        return text
    rules = _SPELLING_RULES
    if not text.isascii():
        text, rules = text.translate(_CHARACTERS), _SYMBOL_RULES + rules
    # A double backslash ends the row of a matrix. Elsewhere it is a mistake.
    text = text.replace("\\\\", "\\cr " if "matrix" in text or "array" in text else "\\")
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    text = _brace_round_arguments(text)
    text = _SPACE.sub(_space, text.strip())
    return text.rstrip(".,;: \\")


def _text(words: str, before: str) -> str:
    r"""Rewrite `\text{words}`, which comes after the text `before`.

    Numbers and formulas are taken out of the wrapper, and so is a single letter, unless it is the unit of the text
    before. Choices listed in one wrapper get one each.
    """
    words = " ".join(words.split())
    if not any(character.isalpha() for character in words):
        return words
    if len(words) == 1:
        is_unit = before.rstrip()[-1:] in set("0123456789})")
        return rf"\text{{{words}}}" if is_unit and words != "i" else words
    if number := re.match(r"-?[0-9][0-9,.:/]*(?= ?[a-zA-Z])", words):
        return rf"{number[0]}\text{{{words[number.end() :].strip()}}}"
    if "\\" in words or "^" in words:
        return words
    pieces = [piece for piece in re.split(r" ?, ?| and | or ", words) if piece]
    return rf"\text{{{words}}}" if len(pieces) == 1 else ", ".join(_text(piece, "") for piece in pieces)


def _brace_round_arguments(text: str) -> str:
    """Replace the round brackets of arguments in plain text, such as `sqrt(x)` and `x^(1/2)`, by braces."""
    pieces, done = [], 0
    for found in _ROUND_ARGUMENT.finditer(text):
        if found.start() < done:
            continue
        depth = 1
        for position in range(found.end(), len(text)):
            depth += {"(": 1, ")": -1}.get(text[position], 0)
            if depth == 0:
                argument = _brace_round_arguments(text[found.end() : position])
                pieces += [text[done : found.start()], found[1], "{", argument, "}"]
                done = position + 1
                break
        else:
            break
    return "".join(pieces) + text[done:]


def _space(spaces: re.Match[str]) -> str:
    """Replace a run of spaces by one space where that has a meaning, and otherwise by nothing."""
    text, start, end = spaces.string, spaces.start(), spaces.end()
    return " " if _NEEDED_SPACE.match(f"{text[start - 1]} {text[end : end + 2]}") else ""
