"""Where progress is shown: a terminal, a log, a notebook."""

import html
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from fedjax_sec.progress.words import State, duration, sentence, speed

#: Seconds between two lines of a log.
EVERY = 10.0


class Display(Protocol):
    """Shows states; a context, at whose end the newest one stays."""

    def __enter__(self) -> "Display": ...

    def __exit__(self, *error) -> None: ...

    def show(self, state: State) -> None:
        """Shows a state in place of the one before."""
        ...


class Lines:
    """Plain lines, for a file or a pipe: one for each new title, then one now and then.

    What has no title is not mentioned before it has begun, so that an error stands alone.
    """

    def __init__(
        self,
        write: Callable[[str], Any] | None = None,
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._write = write or (lambda line: print(line, file=sys.stderr, flush=True))
        self._every, self._clock = every, clock
        self._last: State | None = None
        self._shown: State | None = None
        self._then = -float("inf")

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error) -> None:
        if self._last != self._shown and not any(error):
            self._print()

    def show(self, state: State) -> None:
        """Shows a state in place of the one before."""
        known, self._last = self._last, state
        if known is None and not state.title:
            return
        changed = self._shown is None or state.title != self._shown.title
        if changed or state.done >= state.total or self._clock() - self._then >= self._every:
            self._print()

    def _print(self) -> None:
        if self._last is not None:
            self._write(sentence(self._last))
        self._shown, self._then = self._last, self._clock()


class Terminal:
    """A bar of rich in a terminal; other lines of the same console are printed above it."""

    def __init__(self, console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task = None

    def __enter__(self) -> "Terminal":
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def show(self, state: State) -> None:
        """Shows a state in place of the one before."""
        left = "" if state.left is None else f"{duration(state.left)} left"
        note = ", ".join(filter(None, (speed(state.rate), left, state.note)))
        if self._task is None:
            self._task = self._bar.add_task("", total=state.total, note="")
        self._bar.update(
            self._task,
            description=state.title[:60],
            completed=state.done,
            total=state.total,
            note=note,
        )


class Notebook:
    """HTML below a notebook's cell, written anew in its place; no widget is needed."""

    def __init__(self):
        from IPython.display import HTML, display

        self._html, self._display = HTML, display
        self._handle = None

    def __enter__(self) -> "Notebook":
        return self

    def __exit__(self, *error) -> None:
        pass

    def show(self, state: State) -> None:
        """Shows a state in place of the one before."""
        page = self._html(as_html(state))
        if self._handle is None:
            self._handle = self._display(page, display_id=True)
        else:
            self._handle.update(page)


def as_html(state: State) -> str:
    """A state with a bar that browsers draw.

    >>> as_html(State("", 5, 10, None, None, "accuracy 50.0%"))
    '<progress value="5" max="10"></progress> round 5/10, accuracy 50.0%'
    """
    bar = f'<progress value="{state.done}" max="{state.total}"></progress>'
    return f"{bar} {html.escape(sentence(state))}"


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None and hasattr(module, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None


def choose(console=None) -> Display:
    """The display for this process; `console` is rich's, of a command (None: standard error)."""
    if in_notebook():
        return Notebook()
    if console is None:
        from rich.console import Console

        console = Console(stderr=True)
    if console.is_terminal:
        return Terminal(console)
    return Lines(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
