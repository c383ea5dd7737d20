"""Examples of docstrings, as blocks of code."""

import re


def fenced(text: str) -> str:
    r"""The text with each example outside code between fences, as Markdown shows it.

    An example begins with three angles and ends before an empty line.

    >>> fenced("So:\n\n>>> 1 + 1\n2\n\nand on").split("\n")
    ['So:', '', '```pycon', '>>> 1 + 1', '2', '```', '', 'and on']
    """
    done: list[str] = []
    fence = ""  # the fence that is open in the text itself
    inside = False
    for line in text.split("\n"):
        mark = re.match(r" *(`{3,}|~{3,})", line)
        if inside and not line.strip():
            done.append("```")
            inside = False
        elif mark and not inside:
            fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
        elif not fence and not inside and line.startswith(">>> "):
            done.append("```pycon")
            inside = True
        done.append(line)
    return "\n".join([*done, "```"] if inside else done)
