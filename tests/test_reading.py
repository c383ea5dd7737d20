"""Files and overrides that cannot be read: one line, with the remedy."""

import pytest
from helpers import small
from omegaconf import OmegaConf

import fedjax_sec
from fedjax_sec import sweeps
from fedjax_sec.core import ConfigError
from fedjax_sec.core.yaml import parse
from fedjax_sec.runs import config

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "\n".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "tab": (b"rounds:\n\t3", "line 2, column 1: not readable YAML: while scanning for"),
    "bracket": (b"rounds: [1, 2", "line 1, column 14: not readable YAML: while parsing a fl"),
    "twice": (b"rounds: 3\nrounds: 4", "line 2, column 1: not readable YAML: while constructin"),
    "utf-16": ("rounds: 3".encode("utf-16"), "is no text in UTF-8"),
    "binary": (bytes(range(128, 256)), "is no text in UTF-8"),
    "control": (b"rounds: \x003", "not readable YAML"),
    "deep": (b"[" * 5000 + b"]" * 5000, "more than 40 levels inside one another"),
    "deep mapping": (
        "\n".join(" " * i + "a:" for i in range(99)).encode(),
        "more than 40 levels inside",
    ),
    "bomb": (BOMB.encode(), "more than 100000 values, so it is no configuration"),
    "itself": (b"a: &a [*a]", "the alias *a stands for itself, or for nothing"),
    "large": (b"# " + b"x" * 2**20, "is larger than 1048576 bytes"),
    "list": (b"- 1\n- 2", "must hold a mapping of keys to values, got [1, 2]."),
    "text": (b"hello", "must hold keys and values, got 'hello'."),
    "documents": (b"---\nrounds: 3\n---\nrounds: 4", "expected a single document in the stream"),
    "key": (b"? [1]\n: 2", "not readable YAML: while constructing a mapping found unhashable"),
    "digits": (b"rounds: " + b"9" * 5000, "not readable YAML: Exceeds the limit"),
    "object": (b"rounds: !!python/object:os.system {}", "could not determine a constructor"),
    "date": (b"seed: !!timestamp 2020-01-01", "not readable YAML"),
    "environment": (
        b"data: {data_dir: '${oc.env:HOME}'}",
        "data.data_dir: '${oc.env:HOME}' takes its value from outside the file. Give it on the "
        "command line instead, KEY.PATH=VALUE (a data folder also by --data-dir or TFDS_DATA_DIR)",
    ),
    "inside": (b"data: {data_dir: 'x/${a.${oc.env:HOME}}/y'}", "from outside the file"),
    "disguised": (b"a: oc.env\ndata: {data_dir: '${${a}:HOME}'}", "from outside the file"),
    "in a key": (b"'${oc.env:HOME}': 3", "from outside the file"),
    "other resolver": (b"rounds: ${oc.decode:'3'}", "from outside the file"),
    "open": (b"data: {data_dir: '${rounds'}", "not readable YAML"),
    "absent": (b"rounds: ${round}", "not readable YAML: Interpolation key 'round' not found"),
    "circle": (b"rounds: ${seed}\nseed: ${rounds}", "not readable YAML"),
    "references": (
        b"a0: 1\n" + b"\n".join(b"a%d: '${a%d}${a%d}'" % (i + 1, i, i) for i in range(40)),
        "80 references, of which 32 are allowed",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read(name, tmp_path):
    content, message = FILES[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    for read in (fedjax_sec.run, sweeps.load):
        with pytest.raises(ConfigError) as error:
            read(path)
        text = str(error.value)
        assert text.startswith(str(path)) and message in text and "\n" not in text


def test_references_to_keys_of_the_file_stay(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("rounds: 4\nevaluation: {every: '${rounds}'}\nbase: &b 7\nseed: *b")
    assert config.read_yaml(path) == {
        "rounds": 4,
        "evaluation": {"every": 4},
        "base": 7,
        "seed": 7,
    }
    path.write_bytes("\ufeffrounds: 4".encode())  # a byte order mark, as some editors write
    assert config.load(path).rounds == 4
    assert parse("", "text") == {}


@pytest.mark.parametrize(
    "mapping",
    [
        {"data": {"data_dir": "${oc.env:HOME}"}},
        OmegaConf.create({"data": {"data_dir": "${oc.env:HOME}"}}),
        {"data": OmegaConf.create({"data_dir": "x${oc.env:HOME}"})},
    ],
)
def test_the_environment_does_not_come_in_by_python(mapping):
    with pytest.raises(ConfigError, match=r"data.data_dir: '\$\{...\}' in 'x?\$\{oc.env:HOME\}' "):
        config.from_mapping(mapping)
    for text in ("data.data_dir=${oc.env:HOME}", "evaluation.every=${rounds}"):
        with pytest.raises(ConfigError, match="is a reference, which only a file resolves"):
            config.from_mapping({}, [text])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1\nrounds: 5", "Override 'seed=1\\nrounds: 5', line 2, column 1: not readable YAML"),
        ("seed=1\n- 2", "Override 'seed=1\\n- 2': more than one value."),
        ("a..b=1", "The key of an override is text such as client.l2, got 'a..b'."),
        (".=1", "The key of an override is text such as client.l2, got '.'."),
        (3, "An override is text such as rounds=3, got 3."),
        ("defense.²=mean", "a list of 2 has no entry '²'"),
        ("defense." + "9" * 400 + "=mean", "a list of 2 has no entry '999"),
        ("defense." + "9" * 5000 + "=mean", "The key of an override is text such as client.l2, g"),
        ("seed=" + "[" * 3000, "more than 40 levels inside one another"),
        ("seed=!!python/name:os.system x", "could not determine a constructor"),
    ],
    ids=range(10),
)
def test_bad_overrides(override, message):
    with pytest.raises(ConfigError) as error:
        config.from_mapping(small(defense=["clip_norm", "median"]), [override])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_bad_keys_of_overrides_in_python():
    for key in (3, None, ("a", "b"), b"rounds", ""):
        with pytest.raises(ConfigError, match="The key of an override is text such as client.l2"):
            config.from_mapping(small(), {key: 1})


def test_a_mapping_that_holds_itself():
    mapping = small()
    mapping["model"] = mapping
    with pytest.raises(ConfigError, match="More than 40 levels of mappings and lists inside one"):
        config.from_mapping(mapping)


@pytest.mark.parametrize("wrong", [3, None, 2.5, b"x.yaml", ["a"], object()])
def test_what_is_no_configuration_at_all(wrong):
    with pytest.raises(ConfigError, match="Expected the path of a configuration file or a mapping"):
        fedjax_sec.run(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defense": {"name": ["krum"]}}, "defense.name: the name of a defense is text, got ['kr"),
        ({"attack": {"name": {}}}, "attack.name: the name of an attack is text, got"),
        ({"data": {"name": 3}}, "data.name: expected a string, got 3 (int)."),
        ({"data": {"name": None}}, "data.name: expected a string, got null."),
        ({"data": "mnist"}, "data: expected a mapping of fields, such as {name: mnist}, got 'mn"),
        ({"data": [1, 2]}, "data: expected a mapping of fields, got [1, 2]."),
        ({"model": 3}, "model: expected the name of a model or a mapping with 'name', got 3."),
        ({"model": {"name": b"mlp"}}, "model.name: the name of a model is text, got b'mlp'."),
        ({3: 4}, "The experiment: unknown key 3."),
        ({None: 4}, "The experiment: unknown key None."),
        ({"x" * 10_000: 4}, "The experiment: unknown key 'xxx"),
        ({"defense": "x" * 10_000}, "defense.name: unknown defense 'xxx"),
        ({"threat": {"knowledge": {"a": 1}}}, "threat.knowledge: expected a string, got {'a': 1}"),
        (
            {"client": {"optimizer": {"name": ["sgd"]}}},
            "client.optimizer.name: the name of optax's",
        ),
        ({"evaluation": {"evasions": {"name": ["pgd"]}}}, "the name of an evasion is text"),
        ({"rounds": {"schedule": ["steps"], "values": {}}}, "rounds fixes shapes or control flow"),
        ({"client": {"l2": {"schedule": ["steps"], "values": {0: 1}}}}, "client.l2.schedule: unk"),
        ({"client": {"l2": {"schedule": "steps", "values": {"²": 1}}}}, "a round must be an int"),
        ({"client": {"l2": {"schedule": "steps", "values": {(1,): 1}}}}, "a round must be an int"),
        ({"seed": "2020-01-01"}, "seed: expected an integer, got '2020-01-01' (str)."),
    ],
)
def test_odd_names_and_types(change, message):
    with pytest.raises(ConfigError) as error:
        config.from_mapping(small() | change)
    text = str(error.value)
    assert message in text and "\n" not in text and len(text) < 600


def test_odd_sweeps(tmp_path):
    path = tmp_path / "sweeps.yaml"
    for content, message in (
        ("grid: {3: [1]}", "grid: an axis is a dotted key such as client.l2, got 3."),
        ("grid: {seed: 3}", "grid.seed: expected a list or {label: value}, got 3."),
        ("grid: {defense: []}", "grid.defense is empty."),
        ("grid: [1]", "grid: expected a mapping, got [1] (list)."),
        ("seeds: []", "seeds must be a list of one or more integers, got []."),
        ("seeds: 3", "seeds: expected a list (an integer each), got 3 (int)."),
        ("seeds: [4294967296]", "seeds[0] must be >= 0 and <= 4294967295, got 4294967296."),
        ("experiment: 3", "experiment: expected a string or a mapping, got 3 (int)."),
        ("experiment: absent.yaml", "No configuration file"),
        ("overrides: {a: {b: 1}}", "The experiment: unknown key 'a'."),
        (
            f"grid: {{client.l2: {list(range(400))}, rounds: {list(range(400))}}}",
            "grid: 160000 cells, of which 100000 are allowed.",
        ),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError) as error:
            sweeps.load(path)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="seeds must be a list of one or more integers, got 3"):
        sweeps.make_cells({}, {}, seeds=3)
    with pytest.raises(ConfigError, match=r"grid must be a mapping of dotted keys, got \['a'\]"):
        sweeps.make_cells({}, ["a"])
