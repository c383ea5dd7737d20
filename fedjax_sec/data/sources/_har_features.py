"""Time and frequency features of windows of inertial signals, by UCI's list of 561."""

import numpy as np

BURG_ORDER = 4
#: Bins of 64 that are summed: [first, last), as UCI's `bandsEnergy`.
BANDS = (
    *((b, b + 8) for b in range(0, 64, 8)),
    *((b, b + 16) for b in range(0, 64, 16)),
    (0, 24),
    (24, 48),
)
_CHUNK = 1000  # windows at a time: about 200 MB


def features(body, gyro, total) -> np.ndarray:
    r"""Windows [n, 128, 3] of body and total acceleration and angular velocity -> [n, 561].

    The signals, the statistics of each and their order are those of UCI's `features_info.txt`; how
    each statistic is computed is ours, since it is not said there. Of signals x in time or of the
    64 magnitudes of their Fourier transform:

    - `mean`, `std` (divisor n), `mad` (median distance from the median), `max`, `min`, `iqr`;
    - `sma`, the sum over the axes of mean |x|; `energy`, the mean of x^2;
    - `entropy`, of |x| / sum |x|, divided by ln n; `correlation` of two axes, 0 for a constant one;
    - `arCoeff`, four autoregression coefficients by Burg's method;
    - `maxInds`, where the largest magnitude is, `meanFreq`, the mean bin weighted by magnitude,
      `skewness`, `kurtosis`, and `bandsEnergy`, sums of squares over bands;
    - `angle` between mean vectors and the mean gravity or an axis, as a cosine.

    Gravity is total minus body acceleration; jerk is the central difference in time; a magnitude is
    the Euclidean norm over the axes. Not scaled.
    """
    parts = [
        _features(*(a[i : i + _CHUNK].astype(np.float64) for a in (body, gyro, total)))
        for i in range(0, len(body), _CHUNK)
    ]
    return np.concatenate(parts)


def scaled(values: np.ndarray) -> np.ndarray:
    """Every column to [-1, 1] by its least and largest value, as UCI's features; float32.

    >>> scaled(np.array([[0.0, 5.0], [10.0, 5.0], [5.0, 5.0]])).tolist()
    [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    """
    low, high = values.min(0), values.max(0)
    width = np.where(high > low, high - low, 1.0)
    return np.where(high > low, 2 * (values - low) / width - 1, 0.0).astype(np.float32)


def _features(body, gyro, total):
    gravity = total - body
    jerk, gyro_jerk = np.gradient(body, axis=1), np.gradient(gyro, axis=1)
    triads = (body, gravity, jerk, gyro, gyro_jerk)
    norms = [np.linalg.norm(triad, axis=2, keepdims=True) for triad in triads]
    columns = [_in_time(triad) for triad in triads] + [_in_time(norm) for norm in norms]
    spectra = [_spectrum(triad) for triad in (body, jerk, gyro)]
    of_norms = [_spectrum(norms[i]) for i in (0, 2, 3, 4)]
    columns += [np.concatenate([_in_frequency(s), _bands(s)], axis=1) for s in spectra]
    columns += [_in_frequency(s) for s in of_norms]
    means = [triad.mean(1) for triad in (body, jerk, gyro, gyro_jerk)]
    down = gravity.mean(1)
    angles = [_cosine(mean, down) for mean in means]
    angles += [_cosine(np.broadcast_to(axis, down.shape), down) for axis in np.eye(3)]
    return np.concatenate([*columns, np.stack(angles, axis=1)], axis=1)


def _ratio(a, b):
    """a / b, and 0 where b is."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b != 0)


def _cosine(a, b):
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return _ratio((a * b).sum(-1), lengths)


def _spectrum(x):
    """Magnitudes [n, 64, axes] of the lower half of the Fourier transform."""
    return np.abs(np.fft.rfft(x, axis=1))[:, : x.shape[1] // 2]


def _common(x):
    """mean, std, mad, max, min; sma; energy, iqr, entropy: each [n, axes], sma [n, 1]."""
    middle = np.median(x, axis=1, keepdims=True)
    low, high = np.percentile(x, (25, 75), axis=1)
    share = _ratio(np.abs(x), np.abs(x).sum(1, keepdims=True))
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return [
        x.mean(1),
        x.std(1),
        np.median(np.abs(x - middle), axis=1),
        x.max(1),
        x.min(1),
        np.abs(x).mean(1).sum(1, keepdims=True),
        (x**2).mean(1),
        high - low,
        -(share * logs).sum(1) / np.log(x.shape[1]),
    ]


def _in_time(x):
    """40 features of three axes, 13 of one."""
    columns = _common(x)
    coefficients = burg(x)  # [n, axes, order]
    columns.append(coefficients.reshape(len(x), -1))
    if x.shape[2] == 3:
        centred = x - x.mean(1, keepdims=True)
        pairs = ((0, 1), (0, 2), (1, 2))
        columns.append(
            np.stack([_cosine(centred[..., a], centred[..., b]) for a, b in pairs], axis=1)
        )
    return np.concatenate(columns, axis=1)


def _in_frequency(x):
    """37 features of three axes, 13 of one; the bands come after."""
    bins = np.arange(x.shape[1])[None, :, None]
    centred = x - x.mean(1, keepdims=True)
    variance = (centred**2).mean(1)
    shape = np.stack(
        [
            _ratio((centred**3).mean(1), variance**1.5),
            _ratio((centred**4).mean(1), variance**2),
        ],
        axis=2,
    )
    columns = [
        *_common(x),
        x.argmax(1).astype(float),
        _ratio((x * bins).sum(1), x.sum(1)),
        shape.reshape(len(x), -1),
    ]
    return np.concatenate(columns, axis=1)


def _bands(x):
    """Sums of squares over the bands, axis by axis: [n, 14 axes]."""
    sums = [(x[:, a:b] ** 2).sum(1) for a, b in BANDS]
    return np.stack(sums, axis=2).reshape(len(x), -1)


def burg(x: np.ndarray, order: int = BURG_ORDER) -> np.ndarray:
    """Autoregression coefficients of [n, time, axes] by Burg's method: [n, axes, order].

    x_t = -(a_1 x_{t-1} + ... + a_order x_{t-order}) + noise; zeros for a signal of zeros.

    >>> x = np.cumprod(np.full((1, 50, 1), 0.5), axis=1)
    >>> print(burg(x, order=1).round(1))
    [[[-0.8]]]
    """
    x = np.moveaxis(x, 1, 2)
    forward, backward = x[..., 1:], x[..., :-1]
    columns = np.zeros((*x.shape[:2], 0))
    for _ in range(order):
        power = (forward**2 + backward**2).sum(-1, keepdims=True)
        k = -2 * _ratio((forward * backward).sum(-1, keepdims=True), power)
        columns = np.concatenate([columns + k * columns[..., ::-1], k], axis=-1)
        forward, backward = (forward + k * backward)[..., 1:], (backward + k * forward)[..., :-1]
    return columns
