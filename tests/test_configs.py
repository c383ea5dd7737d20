"""Every file in `configs/` is read and checked, and a round of it traced where its data is there.

One file of each kind is run.
"""

import itertools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import program_of, replicas_of

import fedjax_sec
from fedjax_sec import papers, sweeps
from fedjax_sec.core import ConfigError
from fedjax_sec.data import MissingDataError
from fedjax_sec.runs import config
from fedjax_sec.runs.prepare import prepare
from fedjax_sec.runs.source import load_source

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
TEST_DATA = os.environ.get("FEDJAX_SEC_TEST_DATA")


def name_of(path):
    return str(path.relative_to(FOLDER))


def experiments(path):
    """The experiments of a file: its own, or those of the first and last cell of a sweep."""
    content = config.read_yaml(path)
    if "grid" in content or "experiment" in content:
        cells = sweeps.load(path)[1]
        return [cell.experiment for cell in (cells[0], cells[-1])]
    return [config.load(path)]


def test_there_are_configurations():
    assert len(FILES) >= 4


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_is_read_and_says_how_it_is_run(path):
    got = experiments(path)
    assert all(one.rounds >= 1 for one in got)
    content = config.read_yaml(path)
    assert ("data" in content) != ("grid" in content)
    text = path.read_text()
    assert text.startswith("# ")
    command = "sweep" if "grid" in content else "run"
    # The commands of its comment can be typed as they stand.
    assert f"fedjax-sec {command} configs/{name_of(path)}" in text
    for part in ("/work/", "/home/", "/tmp/"):
        assert part not in text


# The others differ from these in their data and network; unoptimised, those take minutes.
RUN = (
    "alie/mnist.yaml",
    "demo/digits.yaml",
    "demo/sweep.yaml",
    "fat/mnist.yaml",
    "fltrust/har_windows.yaml",
    "fltrust/mnist-0.5.yaml",
    "rlr/fashion_mnist.yaml",
)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_round(path):
    for one in experiments(path):
        # As many rounds as there must be for one that is attacked.
        changes = {"rounds": one.threat.start + 1, "evaluation.every": 1}
        if one.data.name != "digits":
            if not TEST_DATA:
                pytest.skip("FEDJAX_SEC_TEST_DATA is not set: no data but the digits")
            changes |= {"data.data_dir": str(Path(TEST_DATA, "tfds")), "data.download": False}
            changes |= {"data.max_test": 100, "client.batch_size": 4}
            # All clients and the whole network, on few examples; users come with all of theirs.
            if one.data.partition.registered_name != "natural":
                # Where data are poisoned, enough for a share of one class to hold an example.
                examples = 40 if one.attack.data_stages else 20
                changes |= {"data.max_train": examples * one.data.num_clients}
        if one.evaluation.evasions:  # and few steps of PGD, both in training and in testing
            changes |= {"evaluation.evasion_images": 10, "evaluation.evasions.0.steps": 2}
            changes |= {"client.pgd_steps": 2}
        one = config.from_mapping(one.to_dict(), changes)
        try:
            source = load_source(one)
        except MissingDataError as error:
            pytest.skip(str(error).splitlines()[0])
        if one.data.partition.registered_name == "natural":
            users = len(np.unique(source.users_train))
            if users < one.data.num_clients:
                pytest.skip(f"{source.origin}: {users} of the {one.data.num_clients} users")
        if name_of(path) not in RUN:
            assert_round_keeps_its_shapes(one)
            continue
        result = fedjax_sec.run(one)
        assert result.metrics["round"].tolist() == [0, 1]
        assert np.isfinite(result.metrics["loss"]).all()


def assert_round_keeps_its_shapes(experiment):
    """Traces a round, on real data."""
    program = program_of(experiment)
    replicas = replicas_of([experiment])
    before = program.state_shapes(replicas)
    args = (before, replicas, program.pool, jnp.array(0), program.test)
    after, metrics = jax.eval_shape(program._advance(1), *args)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), part) for part in (before, after)]
    assert shapes[0] == shapes[1]
    variables = jax.eval_shape(program.problem.model.init, jax.random.key(0))
    dim = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert before.server.params.shape == (1, dim)
    assert metrics["train_loss"].shape == (1,)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("scale", ["smoke", "small"])
@pytest.mark.parametrize("paper", papers.names())
def test_every_part_of_a_paper_has_its_data(paper, scale):
    """What a scale changes leaves enough examples and users for every experiment of a paper."""
    if not TEST_DATA:
        pytest.skip("FEDJAX_SEC_TEST_DATA is not set: no data but the digits")
    changes = {"data.data_dir": str(Path(TEST_DATA, "tfds")), "data.download": False}
    one_paper = papers.find(paper)
    options = [
        {option.name: (value,) if option.many else value}
        for option in one_paper.options
        if option.name == "dataset"
        for value in option.values
    ]
    seen, missing, prepared = set(), [], 0
    for item, option in itertools.product(one_paper.items, options or [{}]):
        try:
            made = papers.experiments(paper, item, scale=scale, changes=changes, **option)
        except ConfigError as error:
            assert "not in the paper" in str(error)  # this table with this data set
            continue
        for one in made.values():
            data = str(one.to_dict()["data"])
            if data not in seen:
                seen.add(data)
                try:
                    prepared += bool(prepare(one).population.counts.sum() > 0)
                except MissingDataError as error:
                    missing.append(str(error).splitlines()[0])
    if not prepared and missing:
        pytest.skip(missing[0])
    assert prepared + len(missing) == len(seen)
