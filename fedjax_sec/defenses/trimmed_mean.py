"""Coordinate-wise trimmed means: the three variants of ALIE's Section 2.3 and its k-means kin."""

from fedjax_sec.core import ANY_SCALE, COUNT, ConfigError, Stage, numeric, registry, static
from fedjax_sec.defenses._bounds import check_num_byzantine
from fedjax_sec.ops import coordinatewise


@registry.defenses.register("trimmed_mean")
class TrimmedMean(Stage):
    r"""Mean of each coordinate after discarding the values that look extreme.

    .. math:: agg_j = \frac{1}{|U_j|} \sum_{i \in U_j} u_{ij}

    with n clients, f = `num_byzantine` and, by `variant`,

    - `extremes`: U_j without the f largest and f smallest values (Yin et al. 2018);
    - `nearest_n_minus_f`: the n - f values nearest the median (Xie et al. 2018);
    - `nearest_n_minus_2f`: the n - 2f values nearest the median (El Mhamdi et al. 2018), the
      variant of ALIE's experiments;
    - `kmeans`: the optimal two 1-D clusters; where their centres are further apart than
      `threshold`, the smaller cluster is discarded (Shen et al. 2016; equal sizes: nothing is).

    `updates [K, D] -> [D]`, unweighted. Of two values equally far from the median the smaller is
    kept. Clients whose update is not finite are left out, and n is the number of the others.

    Raises: `ConfigError` unless 2 f < K, or for a field that the variant does not read.

    Source: Baruch et al. 2019, Section 2.3, Equation 1. `convention="author"` keeps one value
    fewer, n - f - 1, as ALIE's code does (`defences.py`, `trimmed_mean`).

    Example:
        >>> import fedjax_sec
        >>> updates = [[0.0], [1.0], [2.0], [90.0]]
        >>> print(fedjax_sec.aggregate(updates, "trimmed_mean", num_byzantine=1))
        [1.5]
    """

    stage = "aggregate"
    num_byzantine: int | None = static(
        None,
        "f, the Byzantine clients to tolerate (default: the threat's num_malicious).",
        low=0,
        high=COUNT,
        default_from="num_malicious",
    )
    variant: str = static(
        "extremes",
        "Which values are kept.",
        choices=("extremes", "nearest_n_minus_f", "nearest_n_minus_2f", "kmeans"),
    )
    threshold: float | None = numeric(
        None,
        "kmeans: distance between the centres above which the smaller cluster is discarded, in "
        "units of the update (null: 0, always; the paper gives no value).",
        low=0,
        unbounded=ANY_SCALE,
    )
    convention: str = static(
        "paper",
        "`author`: n - f - 1 values, with nearest_n_minus_f only.",
        choices=("paper", "author"),
    )

    def check(self, path, setting):
        if self.variant != "kmeans":
            check_num_byzantine(
                path,
                "trimmed_mean",
                self.num_byzantine,
                setting.num_clients,
                (setting.num_clients - 1) // 2,
                "2 f < K",
            )
            if self.threshold is not None:
                raise ConfigError(
                    f"{path}.threshold is read by variant 'kmeans' only, but variant is "
                    f"{self.variant!r}."
                )
        if self.convention == "author" and self.variant != "nearest_n_minus_f":
            raise ConfigError(
                f"{path}.convention 'author' goes with variant 'nearest_n_minus_f' only, but "
                f"variant is {self.variant!r}."
            )

    def apply(self, key, updates, state, view):
        f = self.num_byzantine
        if self.variant == "extremes":
            out = coordinatewise.trimmed_mean(updates, view.valid, f)
        elif self.variant == "kmeans":
            threshold = 0.0 if self.threshold is None else self.threshold
            out = coordinatewise.kmeans_mean(updates, view.valid, threshold)
        else:
            drop = 2 * f if self.variant == "nearest_n_minus_2f" else f
            drop += self.convention == "author"
            out = coordinatewise.mean_near_median(updates, view.valid, drop)
        return out[0], state, {"kept": out[1]}
