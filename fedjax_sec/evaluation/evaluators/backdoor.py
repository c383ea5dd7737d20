"""The success of a backdoor."""

from fedjax_sec.core import COUNT, Evaluator, registry, static
from fedjax_sec.evaluation.metrics import backdoor_metrics


@registry.evaluators.register("backdoor")
class Backdoor(Evaluator):
    """`attack_success_rate` and `backdoor_loss` of the backdoor; measured wherever there is one.

    Of a backdoor with several base classes, `per_base_attack_success_rate` has one for each. The
    backdoor is measured as it is by then, with the state that an attack with memory has
    learned. See `fedjax_sec.evaluation.metrics.backdoor_metrics` for the formulas.

    Source: none needed; the share of triggered test examples that are read as the attacker wishes.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.evaluators.build("backdoor").exclude_target
        True
    """

    prefix = ""
    needs_labels = True
    batch_size: int = static(2500, "Test examples evaluated at once.", low=1, high=COUNT)
    exclude_target: bool = static(
        True, "Leave out examples that truly are of the attacker's class."
    )

    def measure(self, key, params, x, y, task, adversary):
        if adversary is None:
            return {}
        backdoor, state = adversary
        return backdoor_metrics(
            params, x, y, task, backdoor, state, self.batch_size, self.exclude_target
        )
