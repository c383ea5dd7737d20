"""The processes that compute a run together, watched from the one that started them."""

from collections.abc import Sequence

from fedjax_sec.core import ConfigError, one_line
from fedjax_sec.runs.together.reports import Reports

#: Seconds for which a death behind an error, and an end, are waited for; and a last message.
GRACE, LAST = 5.0, 0.2
#: Seconds of a wait, between two of which Ctrl-C is seen.
PAUSE = 0.5


class RunFailed(ConfigError):
    """A process of several that compute a run together failed or died; all others were ended."""


class Members:
    """Results of all processes, or the reason why there are none; `names` say where each one is.

    Meanwhile what the first process reports is handed on.
    """

    def __init__(self, ray, reports: Reports):
        self.ray, self.reports, self.names = ray, reports, None

    def results(self, refs: Sequence) -> list:
        """What each process returns, in order.

        Raises: `RunFailed` as soon as one fails.
        """
        left, values = list(refs), {}
        while left:
            ready, _ = self.ray.wait([*left, self.reports.next], timeout=PAUSE)
            self.reports.hand_on()
            done = [ref for ref in left if ref in ready]
            left = [ref for ref in left if ref not in ready]
            for ref in done:
                try:
                    values[ref] = self.ray.get(ref)
                except self.ray.exceptions.RayError as error:
                    self.reports.hand_on(LAST)
                    raise self._failed(refs, ref, error, left) from error
        self.reports.hand_on(LAST)
        return [values[ref] for ref in refs]

    def end(self, actors: Sequence, refs: Sequence) -> None:
        """Ends all processes, and waits until they are gone: the folder's lock is free then."""
        for actor in actors:
            self.ray.kill(actor)
        if refs:
            self.ray.wait(list(refs), num_returns=len(refs), timeout=GRACE)

    def _failed(self, refs, ref, error, left) -> RunFailed:
        """The reason: a process that died rather than the errors of others, who then miss it."""
        if not self._died(error) and not isinstance(error.cause, ConfigError) and left:
            late, _ = self.ray.wait(left, num_returns=len(left), timeout=GRACE)
            for other in late:
                try:
                    self.ray.get(other)
                except self.ray.exceptions.RayError as behind:
                    if self._died(behind):
                        ref, error = other, behind
                        break
        number = refs.index(ref)
        name = f"Process {number}" + (f" ({self.names[number]})" if self.names else "")
        if self._died(error):
            text = f"{name} died: {_reason(error)}"
        elif isinstance(error.cause, ConfigError):
            return RunFailed(f"{name}: {error.cause}")
        else:
            text = f"{name} failed: {type(error.cause).__name__}: {one_line(error.cause)}"
        return RunFailed(
            f"{text} The other processes were ended. A run in a folder goes on with resume, with "
            f"any number of processes."
        )

    def _died(self, error) -> bool:
        return not isinstance(error, self.ray.exceptions.RayTaskError)


def _reason(error) -> str:
    """Why Ray lost an actor: the last line of what it says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[-1] if lines else type(error).__name__)
