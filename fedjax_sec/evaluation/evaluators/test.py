"""The task's metrics on the test examples."""

from fedjax_sec.core import COUNT, Evaluator, registry, static
from fedjax_sec.evaluation.metrics import task_metrics


@registry.evaluators.register("test")
class TaskMetrics(Evaluator):
    """The task's own metrics on all test examples, such as accuracy and loss; always measured.

    Source: none needed.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.evaluators.build("test").batch_size
        2500
    """

    prefix = ""
    batch_size: int = static(2500, "Test examples evaluated at once.", low=1, high=COUNT)

    def measure(self, key, params, x, y, task, adversary):
        return task_metrics(params, x, y, task, self.batch_size)
