"""Mutated configurations: one line that says what is wrong, or an experiment that can be written.

Derandomised and bounded: a failure is found again by running the test again.
"""

import copy
import datetime
import enum
import math
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedjax_sec import sweeps
from fedjax_sec.core import ConfigError, optimizers, registry
from fedjax_sec.core.advice import SYNONYMS
from fedjax_sec.core.yaml import parse
from fedjax_sec.data import MissingDataError
from fedjax_sec.report import keys
from fedjax_sec.runs import config
from fedjax_sec.runs.prepare import prepare

pytestmark = pytest.mark.slow

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
FUZZ = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Colour(enum.Enum):
    RED = "krum"


class Odd:
    def __repr__(self):
        return "odd\nobject " * 200


NAMES = sorted(
    {name for result in registry.KINDS.values() for name in result.names()}
    | set(optimizers.OPTIMIZERS)
    | set(optimizers.SCHEDULES)
    | set(optimizers.UNUSABLE)
    | set(SYNONYMS)
)
KEYS = sorted(
    {row.key for cls in keys.SECTIONS.values() for row in keys.fields(cls)}
    | {"name", "learning_rate", "eps", "alpha", "size", "z", "schedule", "values"}
)
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    255,
    2**31 - 1,
    2**31,
    2**32,
    2**63,
    10**400,
    -(2**63),
    0.0,
    -0.0,
    0.5,
    1.5,
    1e-50,
    1e-8,
    1e18,
    1e38,
    1e39,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    3.0,
]
ODD = [
    None,
    True,
    False,
    "",
    " ",
    "none",
    "null",
    "a.b",
    "${rounds}",
    "${oc.env:HOME}",
    "${",
    "???",
    "1e-3",
    "2020-01-01",
    "x" * 3000,
    "a\nb",
    "\x00",
    "é²٣",
    b"bytes",
    [],
    {},
    (),
    set(),
    [[]],
    {"name": []},
    {"name": {}},
    {"name": None},
    {None: 1},
    {1: 2},
    {(1, 2): 3},
    [None],
    {"a": {}},
    {"schedule": "steps", "values": {0: 1, 2: 3}},
    {"schedule": "linear", "values": {0: 0.1, 9: 1}},
    {"schedule": "steps", "values": {"a": 1}},
    {"schedule": [], "values": 3},
    {"values": {}},
    {"name": "cosine_decay_schedule", "init_value": 0.1, "decay_steps": 3},
    Colour.RED,
    Path("x"),
    Odd(),
    object(),
    int,
    len,
    datetime.date(2020, 1, 1),
    1j,
    range(3),
    np.float32(0.5),
    np.float32("nan"),
    np.float64(-1),
    np.int64(3),
    np.uint8(200),
    np.True_,
    np.str_("krum"),
    np.array(2),
    np.array(2.5),
    np.arange(3),
    np.ones((2, 2)),
    np.array([]),
    np.datetime64("2020-01-01"),
    np.longdouble(1),
    np.complex64(1),
    np.array([None]),
    jnp.float32(0.5),
    jnp.int32(2),
    jnp.bfloat16(1),
    jnp.arange(2),
    jnp.array(True),
]
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(ODD),
    st.sampled_from(NAMES),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.builds(lambda name: {"name": name}, st.sampled_from(NAMES)),
    st.lists(st.sampled_from(NAMES), max_size=3),
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(NUMBERS + ODD), max_size=3),
)


def places(node, path=()):
    """Every place in nested mappings and lists."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if isinstance(value, (dict, list)) and value:
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


def mutate(draw, tree):
    """The tree with some keys dropped, doubled under another name, or replaced."""
    tree = copy.deepcopy(tree)

    def value():
        # A copy: the next step may change what this one has put there.
        drawn = draw(VALUES)
        return copy.deepcopy(drawn) if isinstance(drawn, (dict, list)) else drawn

    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(tree), key=str)))
        if not path:
            tree[draw(st.sampled_from(KEYS))] = value()
            continue
        node = tree
        for key in path[:-1]:
            node = node[key]
        way = draw(st.sampled_from(("replace", "replace", "add", "drop", "rename")))
        if way == "replace":
            node[path[-1]] = value()
        elif way == "drop":
            del node[path[-1]]
        elif isinstance(node, dict):
            moved = value() if way == "add" else node.pop(path[-1])
            node[draw(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)))] = moved
        else:
            node.append(value())
    return tree


def bases():
    for path in CONFIGS:
        if "sweep" not in path.name:
            yield config.read_yaml(path)
    yield small()
    yield config.from_mapping(
        small(
            attack={"name": "hybrid", "main": {"name": "alie", "z": 0.3}, "solo": "zero"},
            threat={"num_malicious": 2},
            defense=["clip_norm", {"name": "trimmed_mean"}, "gaussian_noise"],
            evaluation={"evasions": ["fgsm", {"name": "pgd", "steps": 2}], "backdoor": "pattern"},
            server={"root": {"size": 9}, "optimizer": {"name": "adam", "learning_rate": 0.1}},
        )
    ).to_dict()


BASES = list(bases())


def one_line(error: ConfigError) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 3000, text
    assert any(key in text for key in (*KEYS, "verride")), f"no field is named: {text}"


def check_written(experiment):
    """An accepted configuration can be written, read and is the same again."""
    text = config.dump_yaml(experiment.to_dict())
    again = config.from_mapping(parse(text, "config.yaml"))
    assert again == experiment and hash(again.structure()) == hash(experiment.structure())
    assert again.to_dict() == experiment.to_dict()


@st.composite
def mutated(draw, trees=BASES):
    return mutate(draw, draw(st.sampled_from(trees)))


@FUZZ
@given(mutated())
def test_a_mutated_configuration_is_refused_in_a_line_or_can_be_written(mapping):
    try:
        experiment = config.from_mapping(mapping)
    except ConfigError as error:
        one_line(error)
        return
    check_written(experiment)


@settings(FUZZ, max_examples=60)
@given(mutated([BASES[-1], BASES[-2]]))
def test_what_the_schema_accepts_the_data_refuses_in_a_line(mapping):
    try:
        experiment = config.from_mapping(mapping)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            if experiment.data.name == "digits" and experiment.data.num_clients < 2000:
                prepare(experiment)
    except MissingDataError:
        return
    except ConfigError as error:
        one_line(error)
    except ValueError as error:  # data and partitions have their own
        assert "must be" in str(error) and "\n" not in str(error)


DOTTED = st.one_of(
    st.sampled_from(
        [
            "rounds",
            "client",
            "client.l2",
            "client.optimizer.learning_rate",
            "defense.0.max_norm",
            "data",
            "attack.z",
            "defense",
            "evaluation.evasions.1.eps",
            "server.root.size",
            "a.b.c",
            "",
            ".",
            "..",
            "client.",
            ".client",
            "defense.99",
            "defense.-1",
            "defense.²",
            "rounds.x.y",
            "client.optimizer.learning_rate.values.0",
            "x" * 3000,
            "name",
            "defense.0.0.0",
        ]
    ),
    st.text(max_size=6),
    st.lists(st.sampled_from(KEYS), min_size=1, max_size=4).map(".".join),
    st.sampled_from([3, None, ("a",), b"rounds", 2.5]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(NAMES),
    st.sampled_from(
        [
            "",
            "null",
            "1e-3",
            "{a: 1}",
            "[1, 2",
            "!!python/name:os.system",
            "*a",
            "&a 1",
            "- 1",
            "a: b",
            "1\n2",
            "[" * 99,
            "{name: krum}",
            "{schedule: steps, values: {0: 1}}",
            "${seed}",
            "1_000",
            "0x10",
            "1:30",
            ".nan",
            ".inf",
            "~",
            "yes",
            "2020-01-01",
            "!!binary aGk=",
            "? [1]\n: 2",
        ]
    ),
)


@FUZZ
@given(st.sampled_from(BASES), DOTTED, st.one_of(VALUES, TEXTS), st.booleans())
def test_odd_overrides_are_refused_in_a_line_or_can_be_written(mapping, key, value, as_text):
    changes = [f"{key}={value if isinstance(value, str) else 3}"] if as_text else {key: value}
    before = config.dump_yaml(mapping)
    try:
        experiment = config.from_mapping(mapping, changes)
    except ConfigError as error:
        one_line(error)
        return
    finally:
        assert config.dump_yaml(mapping) == before, "the caller's mapping was changed"
    check_written(experiment)


SWEEPS = [
    {"experiment": small(), "grid": {"client.l2": [0.0, 1e-4]}, "seeds": [0, 1], "at_once": 1},
    {
        "experiment": small(defense=["clip_norm", "mean"]),
        "overrides": {"rounds": 2},
        "grid": {
            "(setting)": {"a": {"rounds": 4}, "b": {"rounds": 5}},
            "defense.0.max_norm": [1, 2],
        },
    },
]


@FUZZ
@given(mutated(SWEEPS))
def test_a_mutated_sweep_is_refused_in_a_line_or_has_cells_that_can_be_written(spec):
    try:
        built = sweeps.from_mapping(spec)
    except ConfigError as error:
        one_line(error)
        return
    _, cells = built
    assert cells and len({cell.name for cell in cells}) == len(cells)
    check_written(cells[0].experiment)


PIECES = [
    "rounds: 3\n",
    "seed",
    ": ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "\t",
    "&a ",
    "*a",
    "!!set ",
    "? ",
    "|\n",
    "${",
    "rounds}",
    "'",
    '"',
    "#",
    "\n",
    "  ",
    "---\n",
    "<<: ",
    "1e400",
    "0" * 50,
    "\ufeff",
]


@FUZZ
@given(
    content=st.one_of(
        st.text(max_size=40).map(lambda text: text.encode(errors="ignore")),
        st.binary(max_size=40),
        st.lists(st.sampled_from(PIECES), max_size=12).map(lambda some: "".join(some).encode()),
    )
)
def test_any_text_is_a_configuration_or_refused_in_a_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    try:
        experiment = config.load(path)
    except ConfigError as error:
        assert str(error).startswith((str(path), "The experiment")) or one_line(error) is None
        assert "\n" not in str(error)
        return
    check_written(experiment)
