"""What the first process of several measures and prints, in the process that started them."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator

from fedjax_sec.core.optional import require

#: What a message in the queue holds: an evaluation, or text for one of these two streams.
_EVALUATION, _STREAMS = "evaluation", ("stdout", "stderr")


class Reports:
    """Messages of the first process, in a queue of Ray's on this node."""

    def __init__(self, ray, purpose: str, on_evaluation: Callable | None):
        strategies = require("ray.util.scheduling_strategies", purpose)
        here = strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        options = {"num_cpus": 0, "scheduling_strategy": here}
        self.queue = require("ray.util.queue", purpose).Queue(actor_options=options)
        self._ray, self._on_evaluation = ray, on_evaluation
        self.next = self.queue.actor.get.remote()

    def hand_on(self, patience: float = 0.0) -> None:
        """Prints text, and calls `on_evaluation`; waits for so many seconds for another message.

        `next` is ready where there is something to hand on.
        """
        while self._ray.wait([self.next], timeout=patience)[0]:
            kind, *content = self._ray.get(self.next)
            self.next = self.queue.actor.get.remote()
            if kind != _EVALUATION:
                print(*content, end="", file=getattr(sys, kind), flush=True)
            elif self._on_evaluation is not None:
                self._on_evaluation(*content)

    def close(self) -> None:
        self.queue.shutdown(force=True)


@contextlib.contextmanager
def sent(queue) -> Iterator[Callable[[int, list[dict]], None]]:
    """What Python prints here goes into the queue; the function given sends an evaluation."""
    with contextlib.ExitStack() as redirected:
        for name, redirect in zip(
            _STREAMS, (contextlib.redirect_stdout, contextlib.redirect_stderr), strict=True
        ):
            redirected.enter_context(redirect(redirected.enter_context(_Lines(queue, name))))
        yield lambda done, rows: queue.put((_EVALUATION, done, rows))


class _Lines(io.TextIOBase):
    """A stream that puts whole lines, and on `flush` or `close` the rest, into a queue."""

    def __init__(self, queue, name: str):
        self._queue, self._name, self._rest = queue, name, ""

    def write(self, text: str) -> int:
        lines, end, rest = (self._rest + text).rpartition("\n")
        self._rest = rest
        if end:
            self._queue.put((self._name, lines + end))
        return len(text)

    def flush(self) -> None:
        if self._rest:
            self._queue.put((self._name, self._rest))
            self._rest = ""
