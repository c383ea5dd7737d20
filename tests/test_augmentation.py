"""Augmentation: what it makes of images, and who is augmented."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import same_bits, small
from programs import program_of, replicas_of

import fedjax_sec
from fedjax_sec.algorithms.augmentations import _images
from fedjax_sec.algorithms.clients import _local_sgd
from fedjax_sec.core import ConfigError, InputSpec, numeric, registry
from fedjax_sec.runs.config import from_mapping
from fedjax_sec.testing import world

MEAN = (0.49, 0.48, 0.45)
SPEC = InputSpec("pixels", (12, 10, 3), 255.0, MEAN, (0.25, 0.24, 0.26))


def images(count=7, shape=(12, 10, 3), seed=0):
    return np.random.default_rng(seed).random((count, *shape)).astype(np.float32)


# --- The parts, given the draws -------------------------------------------------------------------


def by_hand(x, offsets, flips, centers, padding, length, fill):
    """Crop, flip and Cutout pixel by pixel."""
    out = np.zeros_like(x)
    count, height, width, _ = x.shape
    for n in range(count):
        for r in range(height):
            for s in range(width):
                column = width - 1 - s if flips[n] else s
                row, column = r + offsets[n][0] - padding, column + offsets[n][1] - padding
                if 0 <= row < height and 0 <= column < width:
                    out[n, r, s] = x[n, row, column]
                top, left = centers[n][0] - length // 2, centers[n][1] - length // 2
                if top <= r < top + 2 * (length // 2) and left <= s < left + 2 * (length // 2):
                    out[n, r, s] = fill
    return out


@pytest.mark.parametrize(("padding", "length"), [(4, 6), (1, 5), (2, 1), (3, 40)])
def test_the_parts_do_with_given_draws_what_is_done_by_hand(padding, length):
    rng, x = np.random.default_rng(1), images()
    offsets = rng.integers(0, 2 * padding + 1, (7, 2))
    offsets[:2] = [[0, 0], [2 * padding, 2 * padding]]  # the farthest windows
    flips = rng.random(7) < 0.5
    centers = np.stack([rng.integers(0, 12, 7), rng.integers(0, 10, 7)], axis=1)
    centers[:2] = [[0, 0], [11, 9]]  # squares that the border cuts
    moved = _images.shifted(jnp.asarray(x), jnp.asarray(offsets), padding)
    moved = _images.flipped(moved, jnp.asarray(flips))
    moved = _images.with_holes(moved, jnp.asarray(centers), length, MEAN)
    fill = np.asarray(MEAN, np.float32)
    expected = by_hand(x, offsets, flips, centers, padding, length, fill)
    np.testing.assert_array_equal(moved, expected)
    assert (expected != x).any()


def test_fedml_cifar_is_its_three_parts_in_order():
    """Padding is black, and Cutout comes last: neither crop nor flip moves its square."""
    augmentation = registry.augmentations.build(
        {"name": "fedml_cifar", "padding": 2, "flip": 0.5, "cutout": 6}
    )
    x, key = images(40), jax.random.key(5)
    keys = jax.random.split(key, 3)
    offsets = np.asarray(_images.draw_offsets(keys[0], 40, 2))
    flips = np.asarray(jax.random.bernoulli(keys[1], 0.5, (40,)))
    centers = np.asarray(_images.draw_centers(keys[2], jnp.asarray(x)))
    moved = augmentation.apply(jax.random.key(5), jnp.asarray(x), SPEC)
    fill = np.asarray(MEAN, np.float32)
    np.testing.assert_array_equal(moved, by_hand(x, offsets, flips, centers, 2, 6, fill))
    assert 5 < flips.sum() < 35 and len(np.unique(offsets)) == 5
    assert (np.asarray(moved) == 0).any()  # some of the padding is seen


def test_the_hole_is_what_the_network_sees_as_zero():
    """FedML normalises first and writes zeros: exactly so."""
    cutout = registry.augmentations.build({"name": "cutout", "length": 6})
    x = images()
    normal = np.asarray(SPEC.normalize(cutout.apply(jax.random.key(0), jnp.asarray(x), SPEC)))
    before = np.asarray(SPEC.normalize(jnp.asarray(x)))
    hole = (normal != before).any(axis=-1)
    assert hole.any(axis=(1, 2)).all()
    np.testing.assert_array_equal(normal[hole], 0.0)
    for one in hole:  # a rectangle of at most 6 x 6
        rows, columns = np.flatnonzero(one.any(axis=1)), np.flatnonzero(one.any(axis=0))
        assert one.sum() == len(rows) * len(columns) and max(len(rows), len(columns)) <= 6


def test_draws_are_uniform():
    """9 offsets in both directions, every pixel a center, half of the images flipped."""
    offsets = np.asarray(_images.draw_offsets(jax.random.key(1), 9000, 4))
    for column in offsets.T:
        counts = np.bincount(column, minlength=9)
        assert counts.shape == (9,)
        assert ((counts - 1000) ** 2 / 1000).sum() < 26.12  # 99.9% of chi-square with 8
    centers = np.asarray(_images.draw_centers(jax.random.key(2), jnp.zeros((6000, 12, 10, 1))))
    counts = np.bincount(centers[:, 0] * 10 + centers[:, 1], minlength=120)
    assert counts.shape == (120,) and ((counts - 50) ** 2 / 50).sum() < 172.4  # with 119
    flip = registry.augmentations.build("flip")
    x = jnp.broadcast_to(jnp.arange(2.0)[None, None, :, None], (4000, 1, 2, 1))
    share = flip.apply(jax.random.key(3), x, SPEC)[:, 0, 0, 0].mean()
    assert abs(share - 0.5) < 0.04
    # Rows and columns, crop, flip and hole: none is another's.
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.05 and abs(np.corrcoef(centers.T)[0, 1]) < 0.05


# --- Who is augmented -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Nothing:
    """An augmentation that changes nothing."""

    def apply(self, key, x, inputs):
        return x


@dataclasses.dataclass(frozen=True)
class _Black:
    """All pixels to zero, whatever the key."""

    def apply(self, key, x, inputs):
        return jnp.zeros_like(x)


CLIENTS = [{"steps": 3}, {"epochs": 2}, {"steps": 2, "sampling": "uniform"}]


def trained(place, client, seed=3):
    state = client.init(place.task.dim)
    result = client.apply(
        jax.random.key(seed), place.params(), state, place.local_data(7), place.task
    )
    return np.asarray(result.delta)


@pytest.mark.parametrize("steps", CLIENTS)
def test_without_an_augmentation_a_client_trains_as_ever(steps):
    """Draws of an augmentation come from numbers of their own: batches and dropout keep theirs."""
    place = world("pixels")
    plain = registry.clients.build({"name": "sgd", "batch_size": 4, **steps})
    same_bits(
        trained(place, dataclasses.replace(plain, augmentation=(_Nothing(),))),
        trained(place, plain),
    )
    black = trained(place, dataclasses.replace(plain, augmentation=(_Black(),)))
    assert np.abs(black - trained(place, plain)).max() > 1e-4


def test_an_augmentation_is_applied_to_each_batch_by_a_key_of_its_own():
    """The keys of all steps and parts differ."""
    place, keys = world("pixels"), []

    @dataclasses.dataclass(frozen=True)
    class Note:
        def apply(self, key, x, inputs):
            jax.debug.callback(
                lambda data: keys.append(np.asarray(data).tobytes()), jax.random.key_data(key)
            )
            return x

    for seed in (3, 4):
        for steps in ({"steps": 4}, {"epochs": 2}):
            keys.clear()
            plain = registry.clients.build({"name": "sgd", "batch_size": 4, **steps})
            trained(place, dataclasses.replace(plain, augmentation=(Note(), Note())), seed)
            jax.effects_barrier()
            assert len(keys) == 2 * 4 == len(set(keys))


def test_numbers_of_draws_lie_beyond_all_others():
    """Of batches, dropout and examples: the largest that the fields' ranges allow."""
    largest = {f.name: f.metadata.get("high") for f in dataclasses.fields(_local_sgd.LocalSgd)}
    with_steps = 3 * largest["steps"]
    number = largest["epochs"] * _local_sgd._EPOCH
    assert max(with_steps, 2 * number + 1, (1 << 30) + number) < _local_sgd._AUGMENT
    assert _local_sgd._AUGMENT + max(largest["steps"], number) < 2**32


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epochs_last_batch_is_left_out_where_it_is_smaller(drop_last):
    """As FedML's loaders do; a client with less than a batch then learns nothing."""
    place, masks = world("pixels"), []

    class Note(type(registry.clients.build({"name": "sgd", "steps": 1}))):
        def examples(self, key, params, x, y, mask, task):
            jax.debug.callback(lambda mask: masks.append(int(mask.sum())), mask)
            return x, y

    spec = {"name": "sgd", "batch_size": 4, "epochs": 2, "drop_last": drop_last}
    client = registry.clients.build(spec)
    client = Note(**{f.name: getattr(client, f.name) for f in dataclasses.fields(client)})

    def steps_of(count):
        masks.clear()
        data = place.local_data(count)
        result = client.apply(jax.random.key(3), place.params(), (), data, place.task)
        jax.effects_barrier()
        return float(result.steps), list(masks), np.abs(result.delta).max()

    steps, seen, moved = steps_of(7)
    assert (steps, seen) == ((2, [4, 4]) if drop_last else (4, [4, 3, 4, 3])) and moved > 0
    assert steps_of(8)[:2] == (4, [4, 4, 4, 4])
    steps, _, moved = steps_of(3)
    assert (steps, moved > 0) == ((0, False) if drop_last else (2, True))


def test_a_list_is_applied_in_order():
    place = world("pixels")
    spec = {"name": "sgd", "batch_size": 4, "steps": 2}
    flip, crop = {"name": "flip", "probability": 1.0}, {"name": "crop", "padding": 1}
    one, other, single = (
        trained(place, registry.clients.build(spec | {"augmentation": items}))
        for items in ([flip, crop], [crop, flip], flip)
    )
    assert np.abs(one - other).max() > 1e-5 and np.abs(one - single).max() > 1e-5
    assert len(registry.clients.build(spec | {"augmentation": "crop"}).augmentation) == 1


def test_adversarial_examples_are_made_of_augmented_inputs():
    """Black images moved by at most eps stay within eps of black."""
    place = world("pixels")
    seen = []

    class Seen(type(registry.clients.build({"name": "adversarial", "steps": 1, "batch_size": 4}))):
        def examples(self, key, params, x, y, mask, task):
            moved, y = super().examples(key, params, x, y, mask, task)
            seen.append((np.asarray(x), np.asarray(moved)))
            return moved, y

    client = registry.clients.build(
        {"name": "adversarial", "steps": 1, "batch_size": 4, "fraction": 1.0, "pgd_steps": 2}
    )
    values = {f.name: getattr(client, f.name) for f in dataclasses.fields(client)}
    trained(place, Seen(**values | {"augmentation": (_Black(),), "eps": 0.2}))
    ((x, moved),) = seen
    np.testing.assert_array_equal(x, 0.0)
    assert 0 < moved.max() <= 0.2 + 1e-6


IMAGES = {"data": {"num_clients": 5, "max_train": 43, "max_test": 20}}
CROPPED = {
    "name": "sgd",
    "steps": 1,
    "batch_size": 4,
    "augmentation": "fedml_cifar",
    "optimizer": {"name": "sgd", "learning_rate": 0.2},
}


def test_evaluation_is_never_augmented():
    """A network that learns nothing is measured alike; one that learns is not."""
    still = CROPPED | {"optimizer": {"name": "sgd", "learning_rate": 0.0}}
    plain = {name: one for name, one in still.items() if name != "augmentation"}
    with_it, without = (
        fedjax_sec.run(
            small(**IMAGES, rounds=1, client=client), **{"data.local_test": {"share": 0.3}}
        )
        for client in (still, plain)
    )
    assert with_it.metrics.keys() == without.metrics.keys()
    assert {"accuracy", "loss"} < with_it.metrics.keys()
    assert any(name.startswith("local") for name in with_it.metrics)
    for name, values in with_it.metrics.items():
        if ("loss" in name and "train" not in name) or "accuracy" in name:
            same_bits(values, without.metrics[name])
    assert with_it.metrics["train_loss"][-1] != without.metrics["train_loss"][-1]


def test_a_run_with_augmentation_is_reproducible_and_differs_from_one_without():
    one, two = (fedjax_sec.run(small(**IMAGES, client=CROPPED)) for _ in range(2))
    same_bits(one.params, two.params)
    plain = {name: value for name, value in CROPPED.items() if name != "augmentation"}
    other = fedjax_sec.run(small(**IMAGES, client=plain))
    leaves = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
    assert max(np.abs(a - b).max() for a, b in leaves) > 1e-3


@pytest.mark.parametrize("augment", [False, True])
def test_the_servers_examples_are_augmented_only_where_the_root_says_so(augment):
    root = {"size": 5, "augment": augment}
    spec = small(**IMAGES, client=CROPPED, server={"root": root}, defense="fltrust")
    experiment = from_mapping(spec)
    assert bool(experiment.trainer.augmentation) == augment
    assert experiment.client.augmentation
    program = program_of(experiment)
    replicas = replicas_of([experiment])
    assert bool(replicas.components.trainer.augmentation) == augment
    _, metrics = program.advance(program.init(replicas), replicas, 0, 1)
    assert np.isfinite(metrics["train_loss"]).all()


def test_what_would_do_nothing_is_refused():
    for spec, message in (
        ({"name": "crop", "padding": 0}, "padding 0 moves no image"),
        ({"name": "flip", "probability": 0.0}, "probability 0 flips no image"),
        ({"name": "cutout", "length": 1}, "length 1 covers no pixel"),
        ({"name": "fedml_cifar", "padding": 0, "flip": 0, "cutout": 0}, "changes no image"),
    ):
        with pytest.raises(ConfigError, match=f"client.augmentation: .*{message}"):
            from_mapping(small(client=CROPPED | {"augmentation": spec}))
    with pytest.raises(ConfigError, match="server.root.augment is for the clients' augmentation"):
        from_mapping(small(server={"root": {"size": 5, "augment": True}}, defense="fltrust"))


def test_inputs_that_are_no_images_are_refused():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)).astype(np.float32), np.arange(60) % 3
    spec = {"data": {"num_clients": 3}, "client": CROPPED, "rounds": 1}
    with pytest.raises(ConfigError, match="'fedml_cifar' works on pixels"):
        fedjax_sec.run(spec, data=fedjax_sec.data.arrays(x[:40], y[:40], x[40:], y[40:]))
    bytes_ = (255 * rng.random((60, 4))).astype(np.uint8)
    with pytest.raises(ConfigError, match=r"needs images \[H, W, C\], and .* shape \[4\]"):
        fedjax_sec.run(spec, data=fedjax_sec.data.arrays(bytes_[:40], y[:40], bytes_[40:], y[40:]))


def test_an_augmentation_of_ones_own_is_one_class():
    @registry.augmentations.register("brighter")
    class Brighter(fedjax_sec.core.Augmentation):
        """Adds a random brightness to each image.

        Source: none, a test.

        Example:
            >>> Brighter().amount
            0.1
        """

        inputs = frozenset({"pixels"})
        amount: float = numeric(0.1, "Largest change.", low=0, high=1)

        def apply(self, key, x, inputs):
            more = self.amount * jax.random.uniform(key, (x.shape[0], 1, 1, 1))
            return jnp.clip(x + more, inputs.low, inputs.high)

    try:
        fedjax_sec.testing.check_component(Brighter)
        result = fedjax_sec.run(small(**IMAGES, client=CROPPED | {"augmentation": "brighter"}))
        assert np.isfinite(result.metrics["train_loss"][1:]).all()
    finally:
        del registry.augmentations._entries["brighter"]
