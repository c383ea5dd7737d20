"""Backdoor on vectors of features: some of them are set to one value."""

from fedjax_sec.core import COUNT, ConfigError, Trigger, numeric, registry, static


@registry.attacks.register("feature_trigger")
class FeatureTrigger(Trigger):
    r"""Sets every so many-th feature to `value`; such examples are to be read as class `target`.

    Features `first`, `first` + `every`, ... of x [B, ...], counted over the flattened example.
    Every malicious client poisons floor(`fraction` * n) of its n examples, the same ones in every
    round. Success is the share of all test examples, poisoned so, that are read as `target`.

    Raises: `ConfigError` for a class that does not exist, and a first feature beyond the last.

    Source: Cao et al. 2021 (FLTrust), Section VI-A, Scaling attack on HAR: "setting every 20th
    feature to 0", target "walking upstairs". That the first of them is feature 0 is a choice.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sec.core import registry
        >>> attack = registry.attacks.build({"name": "feature_trigger", "every": 2})
        >>> print(attack.trigger((), jnp.ones((1, 5))))
        [[0. 1. 0. 1. 0.]]
    """

    inputs = frozenset({"pixels", "features"})
    every: int = static(20, "Distance between two of the features.", low=1, high=COUNT)
    first: int = static(0, "The first of the features.", low=0, high=COUNT)
    value: float = numeric(0.0, "What they are set to.", unbounded="features have any scale")
    target: int = static(1, "The attacker's label.", low=0, high=COUNT)
    fraction: float = numeric(0.5, "Share of a malicious client's examples.", above=0, high=1)
    num_images: int = static(
        1000, "Examples an `alie_backdoor` trains on in a round.", low=1, high=10**6
    )

    def check(self, path, setting):
        if setting.num_classes is not None and self.target >= setting.num_classes:
            raise ConfigError(
                f"{path}.target must be < {setting.num_classes}, the number of classes, got "
                f"{self.target}."
            )
        if setting.example_shape is not None:
            size = 1
            for length in setting.example_shape:
                size *= length
            if self.first >= size:
                raise ConfigError(
                    f"{path}.first must be < {size}, an example's features, got {self.first}."
                )

    def trigger(self, state, x, rank=None, task=None):
        """The examples with these features set."""
        flat = x.reshape(x.shape[0], -1)
        return flat.at[:, self.first :: self.every].set(self.value).reshape(x.shape)
