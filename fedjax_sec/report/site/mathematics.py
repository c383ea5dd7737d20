"""Mathematics of docstrings as MathML, which browsers show without a script or a request."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple
from xml.etree import ElementTree

from fedjax_sec.core import ConfigError
from fedjax_sec.core.optional import require

_DIRECTIVE = re.compile(r"( *)\.\. math::(.*)")
#: A role, as a pattern of its own for parsers of Markdown.
ROLE = r":math:`([^`]+)`"
_TEXT = r"\\(?:text|mathrm|mathcal|operatorname|begin|end)\{[^}]*\}|\\[A-Za-z]+"
_WORD = r"(?:[A-Za-z]|\\_){3,}"
#: How many parts elements have, where that is fixed.
_PARTS = {"mfrac": 2, "mroot": 2} | dict.fromkeys(("msub", "msup", "munder", "mover"), 2)
_PARTS |= {"msubsup": 3, "munderover": 3}
#: What latex2mathml writes -> what browsers set as TeX does: bars without spaces, the relation of a
#: random variable, signs that begin a term, names of operators before a bracket or a term.
_SPACING = (
    (
        r'<mo stretchy="false">(&#x0007C;)</mo>',
        r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>',
    ),
    (r"<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>"),
    (
        r"((?:<mrow>|>(?:&#x00028;|\[|&#x0007B;|&#x0002C;|&#x0003D;|&#x02190;)</mo>))<mo>&#x02212;",
        r'\1<mo form="prefix">&#x02212;',
    ),
    (
        r"<mo>(min|max)(?=</mo>(</?mrow>)*<mo)",
        r'<mo movablelimits="true" lspace="0.17em" rspace="0">\1',
    ),
    (
        r"<mo>(min|max|arg)</mo>",
        r'<mo movablelimits="true" lspace="0.17em" rspace="0.17em">\1</mo>',
    ),
    (r"(<mi>(?:log|ln|cos|exp|tanh)</mi>)(?=<m[^o])", r'\1<mspace width="0.17em"/>'),
)
_LETTER = r'<mi mathvariant="normal">([^<]+)</mi>'


class _Piece(NamedTuple):
    """A line of text, or a directive's formula and its indentation."""

    line: str = ""
    formula: str = ""
    indent: str = ""


def _pieces(text: str) -> Iterator[_Piece]:
    """A directive's text goes on in the lines that are indented deeper than it."""
    lines = text.split("\n")
    while lines:
        match = _DIRECTIVE.fullmatch(line := lines.pop(0))
        if match is None:
            yield _Piece(line)
            continue
        latex = [match[2]]
        while next(filter(str.strip, lines), "").startswith(f"{match[1]} "):
            latex.append(lines.pop(0))
        yield _Piece("", " ".join(" ".join(latex).split()), match[1])


def formulas(text: str) -> tuple[list[str], list[str]]:
    r"""The LaTeX of a docstring's formulas: those of directives, and those within lines.

    >>> formulas("With :math:`a > 0`,\n\n.. math:: b =\n          a^2\n\nand so on.")
    (['b = a^2'], ['a > 0'])
    """
    pieces = list(_pieces(text))
    rest = "\n".join(piece.line for piece in pieces)
    blocks = [piece.formula for piece in pieces if piece.formula]
    return blocks, [" ".join(latex.split()) for latex in re.findall(ROLE, rest)]


def _prepared(latex: str) -> str:
    r"""LaTeX with the names upright, and limits below their operators.

    >>> print(_prepared(r"agg = \sum_i s_i, \; score = \arg\min_c s_c"))
    \mathrm{agg} = \sum\limits_i s_i, \; \mathrm{score} = \operatorname{arg}\min\limits_c s_c
    """
    latex = re.sub(
        f"{_TEXT}|({_WORD})",
        lambda match: rf"\mathrm{{{match[0]}}}" if match[1] else match[0],
        latex,
    )
    latex = re.sub(r"\\arg(?![A-Za-z])", r"\\operatorname{arg}", latex)
    return re.sub(r"\\(sum|prod|min|max)(?=\s*_)", r"\\\1\\limits", latex)


@functools.cache
def mathml(latex: str, block: bool = False) -> str:
    """A formula as one `<math>` element; a `block` stands alone.

    Raises: `ConfigError` for LaTeX that cannot be converted, or of which a command would be left.

    >>> mathml("a").removeprefix('<math xmlns="http://www.w3.org/1998/Math/MathML" ')
    'display="inline"><mrow><mi>a</mi></mrow></math>'
    """
    converter = require("latex2mathml.converter", "A page's mathematics")
    try:
        display = "block" if block else "inline"
        result = converter.convert(_prepared(" ".join(latex.split())), display=display)
    except Exception as error:
        raise ConfigError(f"The formula {latex!r} cannot be shown: {error!r}.") from error
    if left := re.search(r"\\[A-Za-z]+", result):
        raise ConfigError(f"The formula {latex!r} cannot be shown: {left[0]} is not known.")
    for element in ElementTree.fromstring(result).iter():
        parts = _PARTS.get(element.tag.rpartition("}")[2])
        if parts not in (None, len(element)):
            raise ConfigError(f"The formula {latex!r} cannot be shown: something is missing in it.")
    name = lambda match: f"<mi>{''.join(re.findall(_LETTER, match[0]))}</mi>"  # noqa: E731
    result = re.sub(f"(?:{_LETTER}){{2,}}", name, result)
    for pattern, better in _SPACING:
        result = re.sub(pattern, better, result)
    return result


def replace_blocks(text: str, store: Callable[[str], str]) -> str:
    r"""The text with what `store` makes of the MathML of each directive in its place.

    A directive that is indented stays in the item of the list around it.

    >>> replace_blocks("Thus\n\n.. math:: a\n\nholds.", lambda html: html[:5])
    'Thus\n\n<math\n\nholds.'
    >>> replace_blocks("- Thus\n\n  .. math:: a\n\n  holds.", lambda html: html[:5])
    '- Thus\n  <math\n  holds.'
    """
    done: list[str] = []
    joined = False  # the next lines go on in an item
    for piece in _pieces(text):
        if piece.formula:
            while piece.indent and done and not done[-1].strip():
                done.pop()
            done.append(piece.indent + store(mathml(piece.formula, block=True)))
            joined = bool(piece.indent)
        elif piece.line.strip() or not joined:
            done.append(piece.line)
            joined = False
    return "\n".join(done)
