"""Human activities: features by hand, UCI's files as users have them, and the packed signals."""

import os

import numpy as np
import pytest

from fedjax_sec.data import MissingDataError
from fedjax_sec.data.sources import _har_features
from fedjax_sec.data.sources._har import by_user
from fedjax_sec.data.sources.har import Har
from fedjax_sec.data.sources.har_windows import HarWindows


def signals(count=7, seed=0):
    """Body acceleration, angular velocity and total acceleration [count, 128, 3]."""
    rng = np.random.default_rng(seed)
    body, gyro = rng.normal(size=(2, count, 128, 3))
    return body, gyro, body + rng.normal(size=(count, 128, 3))


def test_there_are_561_in_the_order_of_the_list():
    body, gyro, total = signals()
    result = _har_features.features(body, gyro, total)
    assert result.shape == (7, 561) and np.isfinite(result).all()
    np.testing.assert_allclose(result[:, 0:3], body.mean(1))  # tBodyAcc-mean()-X, Y, Z
    np.testing.assert_allclose(result[:, 3:6], body.std(1))
    np.testing.assert_allclose(result[:, 40:43], (total - body).mean(1), atol=1e-12)  # tGravityAcc
    np.testing.assert_allclose(result[:, 120:123], gyro.mean(1))  # tBodyGyro
    np.testing.assert_allclose(result[:, 200], np.linalg.norm(body, axis=2).mean(1))  # tBodyAccMag
    spectrum = np.abs(np.fft.fft(body, axis=1))[:, :64]
    np.testing.assert_allclose(result[:, 265:268], spectrum.mean(1))  # fBodyAcc-mean()
    energy = (spectrum[:, 0:8, 0] ** 2).sum(1)  # fBodyAcc-bandsEnergy()-1,8 of the first axis
    np.testing.assert_allclose(result[:, 302], energy)
    gravity = (total - body).mean(1)
    cosine = gravity[:, 2] / np.linalg.norm(gravity, axis=1)
    np.testing.assert_allclose(result[:, 560], cosine)  # angle(Z, gravityMean)


def test_statistics_by_hand():
    x = np.array([1.0, 2.0, 4.0, 9.0])[None, :, None]
    mean, std, mad, top, low, sma, energy, iqr, entropy = _har_features._common(x)
    assert (mean.item(), mad.item(), top.item(), low.item()) == (4.0, 1.5, 9.0, 1.0)
    assert sma.item() == 4.0 and energy.item() == 25.5 and std.item() == pytest.approx(9.5**0.5)
    assert iqr.item() == pytest.approx(5.25 - 1.75)
    p = np.array([1, 2, 4, 9]) / 16
    assert entropy.item() == pytest.approx(-(p * np.log(p)).sum() / np.log(4))


def test_burg_finds_the_coefficients_of_an_autoregression():
    rng = np.random.default_rng(0)
    x = np.zeros(20_000)
    for t in range(2, len(x)):
        x[t] = 0.6 * x[t - 1] - 0.3 * x[t - 2] + rng.normal()
    result = _har_features.burg(x[None, :, None], order=3)[0, 0]
    np.testing.assert_allclose(result, [-0.6, 0.3, 0.0], atol=0.03)


def test_constant_signals_have_finite_features():
    still = np.zeros((2, 128, 3))
    assert np.isfinite(_har_features.features(still, still, still + np.eye(3)[2])).all()


def test_three_quarters_of_each_user_train_and_the_rest_tests():
    users = np.repeat(np.arange(3), (8, 4, 11))
    x = np.arange(23, dtype=np.float32)[:, None]
    source = by_user("har", x, np.zeros(23, int), users, "nowhere")
    assert np.bincount(source.users_train).tolist() == [6, 3, 8]
    assert np.bincount(source.users_test).tolist() == [2, 1, 3]
    both = np.concatenate([source.x_train, source.x_test])[:, 0]
    assert sorted(both.tolist()) == list(range(23))
    assert (users[source.x_train[:, 0].astype(int)] == source.users_train).all()
    drawn = source.x_train[source.users_train == 2, 0]
    assert drawn.tolist() != sorted(drawn.tolist()), "not drawn, but the first ones"


def write_uci(root, count=12):
    """A small folder as UCI's zip file holds it; its first windows are user 1's."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "test"):
        place = root / "UCI HAR Dataset" / part
        (place / "Inertial Signals").mkdir(parents=True)
        x = rng.uniform(-1, 1, (count, 561)).round(4)
        np.savetxt(place / f"X_{part}.txt", x, fmt="%16.7e")
        np.savetxt(place / f"y_{part}.txt", np.arange(count) % 6 + 1, fmt="%d")
        subject = np.repeat([1, 2], count // 2) + 2 * (part == "test")
        np.savetxt(place / f"subject_{part}.txt", subject, fmt="%d")
        raw = dict(
            zip(("body_acc", "body_gyro", "total_acc"), signals(count, len(arrays)), strict=True)
        )
        for kind, values in raw.items():
            for axis, letter in enumerate("xyz"):
                path = place / "Inertial Signals" / f"{kind}_{letter}_{part}.txt"
                np.savetxt(path, values[..., axis], fmt="%16.7e")
        arrays[part] = x, raw
    return arrays


def test_the_folder_that_users_download(tmp_path):
    arrays = write_uci(tmp_path)
    source = Har().load(str(tmp_path))
    assert source.sizes == (16, 8) and source.is_subset  # 4 of each user's 6 windows
    assert np.unique(source.users_train).tolist() == [0, 1, 2, 3]
    assert source.y_train.min() == 0 and source.x_train.dtype == np.float32
    known = np.concatenate([arrays[part][0] for part in ("train", "test")]).astype(np.float32)
    result = np.concatenate([source.x_train, source.x_test])
    np.testing.assert_allclose(np.sort(result[:, 0]), np.sort(known[:, 0]))


def test_raw_signals_of_that_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_SEC_CACHE", str(tmp_path / "cache"))
    arrays = write_uci(tmp_path)
    source = HarWindows().load(str(tmp_path))
    again = HarWindows().load(str(tmp_path))  # from the cache
    np.testing.assert_array_equal(source.x_train, again.x_train)
    assert source.sizes == (16, 8) and np.abs(source.x_train).max() == 1
    raw = [
        np.concatenate([arrays[p][1][kind] for p in ("train", "test")])
        for kind in ("body_acc", "body_gyro", "total_acc")
    ]
    expected = _har_features.scaled(_har_features.features(*raw))
    result = np.concatenate([source.x_train, source.x_test])
    order = lambda a: a[np.lexsort(a.T)]  # noqa: E731
    np.testing.assert_allclose(order(result), order(expected), atol=1e-4)


@pytest.mark.parametrize("loader", [Har(), HarWindows()])
def test_missing_data_says_where_to_get_it(loader, tmp_path):
    with pytest.raises(MissingDataError, match="archive.ics.uci.edu"):
        loader.load(str(tmp_path))


def test_files_that_do_not_fit_are_refused(tmp_path):
    write_uci(tmp_path)
    np.savetxt(tmp_path / "UCI HAR Dataset" / "train" / "y_train.txt", [1, 2], fmt="%d")
    with pytest.raises(MissingDataError, match="2 labels"):
        Har().load(str(tmp_path))


def test_packed_signals_are_all_windows_of_the_thirty_users():
    folder = os.environ.get("FEDJAX_SEC_TEST_DATA")
    if not folder:
        pytest.skip("FEDJAX_SEC_TEST_DATA names no folder with raw/har inside")
    source = HarWindows().load(f"{folder}/tfds")
    assert not source.is_subset and source.sizes == (7715, 2584)
    counts = np.bincount(source.users_train) + np.bincount(source.users_test)
    # FLTrust, Section VI-A: 30 users with 281 to 409 windows, 343 on average.
    assert (len(counts), counts.min(), counts.max(), round(counts.mean())) == (30, 281, 409, 343)
    # Standing and walking differ in how much anybody moves: tBodyAcc-std()-X.
    moving = source.x_train[:, 3]
    assert moving[source.y_train == 0].mean() > moving[source.y_train == 4].mean() + 0.3
