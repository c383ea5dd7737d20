"""The schema of an experiment: strict YAML in, fully resolved YAML out."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedjax_sec import registry, schema
from fedjax_sec.datasets.local_test import build_local_test
from fedjax_sec.datasets.root import build_root
from fedjax_sec.evaluation.influence import build_influence
from fedjax_sec.evaluation.robustness import surrogates_of
from fedjax_sec.ops.client_axis import STRATEGIES
from fedjax_sec.pipeline import Defense, Setting, check_components, fill_num_byzantine, walk
from fedjax_sec.schema import ConfigError, component, section, static


@dataclasses.dataclass(frozen=True)
class Data:
    """Which data, and how it is spread over the clients."""

    name: str = static("digits", "Data set, see `fedjax-sec list datasets`.")
    num_clients: int = static(20, "N, registered clients.", low=1)
    partition: Any = component("partition", "iid", "How examples are dealt to the clients.")
    local_test: Any = component(
        "local test",
        None,
        "Test data of each client: true (a tenth of its own examples), `users`, `dealt`, or the "
        "fields of `fedjax_sec.datasets.local_test.LocalTest` (null: none).",
        optional=True,
    )
    data_dir: str | None = static(
        None, "Folder of prepared tensorflow-datasets (null: TFDS_DATA_DIR, then TFDS's default)."
    )
    download: bool = static(True, "Download and prepare the data where it is missing.")
    max_train: int | None = static(None, "Keep only the first training examples.", low=1)
    max_test: int | None = static(None, "Keep only the first test examples.", low=1)
    mean: tuple[float, ...] | None = static(
        None, "Subtracted from pixels in [0, 1], a number a channel (null: the data set's own)."
    )
    std: tuple[float, ...] | None = static(
        None, "Pixels are divided by it, a number a channel (null: the data set's own).", above=0
    )


@dataclasses.dataclass(frozen=True)
class Server:
    """Who takes part in a round, and how the aggregate changes the global parameters."""

    clients_per_round: int | None = static(
        None, "K, drawn without replacement every round (null: all N).", low=1
    )
    optimizer: Any = component(
        "optimizer",
        {"name": "sgd", "learning_rate": 1.0},
        "Any optax optimizer; minus the aggregate is its gradient.",
    )
    root: Any = component(
        "root",
        None,
        "Examples that the server holds and no client: true, or their fields (null: none).",
        optional=True,
    )


@dataclasses.dataclass(frozen=True)
class Threat:
    """Who the adversary is and what it sees."""

    num_malicious: int = static(0, "m, malicious clients among the N.", low=0)
    knowledge: str = static(
        "corrupted",
        "Updates (and data) the adversary sees: of its `corrupted` clients, or all (`omniscient`).",
        choices=("corrupted", "omniscient"),
    )
    placement: str = static(
        "random",
        "Which clients are malicious: drawn by the seed, or the `first` m.",
        choices=("random", "first"),
    )
    start: int = static(
        0, "Round in which the attack begins; before it malicious clients are honest.", low=0
    )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is measured, and when."""

    every: int = static(10, "Rounds between evaluations; the last round is always one.", low=1)
    batch_size: int = static(2500, "Test examples evaluated at once.", low=1)
    diagnostics: bool = static(
        True, "Record update norms and what each defence kept, in the round before an evaluation."
    )
    exclude_target: bool = static(
        True, "Attack success leaves out examples that truly are of the attacker's class."
    )
    backdoor: Any = component(
        "attack",
        None,
        "The backdoor whose success is measured (null: the attack's, if it has one). Given, it is "
        "measured without an attack too.",
        optional=True,
    )
    evasions: Any = component(
        "evasion",
        None,
        "Attacks on test inputs, one or a list; `robust_accuracy/NAME` is what withstands each.",
        many=True,
    )
    evasion_images: int | None = static(
        None, "Test examples that are attacked, the first ones (null: all).", low=1
    )
    influence: Any = component(
        "influence",
        None,
        "Measure net influence every round: true, or its fields (null: do not).",
        optional=True,
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When the state is saved, so that an interrupted run can go on."""

    every: int = static(10, "Evaluations between checkpoints.", low=1)
    keep_params: bool = static(
        False, "Write the final parameters to `params.npy`, also those of a sweep's cells."
    )


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the work is laid out on the device; changes results by rounding only."""

    clients: str = static(
        "auto",
        "Local training of the clients: all side by side (`vmap`), one after another inside the "
        "compiled round (`map`), `chunk` of them at a time (`chunked`), or dealt to all devices "
        "(`sharded`).",
        choices=("auto", *STRATEGIES),
    )
    chunk: int | None = static(None, "Clients side by side under `chunked`.", low=1)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run, complete: every top-level key of a configuration file."""

    data: Data = section(Data, "The data and its partition.")
    model: Any = component("model", "mlp", "The network.")
    client: Any = component(
        "client", {"name": "sgd", "steps": 1, "batch_size": 32}, "Local training."
    )
    server: Server = section(Server, "Participation and the server's step.")
    threat: Threat = section(Threat, "The adversary.")
    attack: Any = component("attack pipeline", None, "null, an attack, or a list of them.")
    defense: Any = component("defense pipeline", "mean", "An aggregator, or a list of stages.")
    evaluation: Evaluation = section(Evaluation, "Metrics.")
    checkpoint: Checkpoint = section(Checkpoint, "Resuming.")
    execution: Execution = section(Execution, "Layout of the work on the device.")
    rounds: int = static(100, "Federated rounds.", low=1)
    seed: int = static(0, "Seed of everything random.", low=0)

    @property
    def clients_per_round(self) -> int:
        """K."""
        return self.server.clients_per_round or self.data.num_clients

    @property
    def trainer(self):
        """How the server trains on its root data set: as the clients do, with its own batch."""
        root = self.server.root
        if root is None:
            return None
        return dataclasses.replace(self.client, batch_size=root.batch_size or root.size)

    @property
    def backdoor(self):
        """The attack on data whose success evaluation measures, or None."""
        given = self.evaluation.backdoor
        return self.attack.backdoor if given is None else given

    def to_dict(self) -> dict:
        """The fully resolved configuration as a plain mapping."""
        return schema.dump(self)

    def structure(self):
        """A hashable key; experiments with equal keys run in one compiled program.

        Everything except the seed, the malicious clients' number and placement, in which round
        after the first they begin, and the values of numeric fields.
        """
        leaves = (self.model, self.client, self.server.optimizer, self.attack, self.defense)
        rest = dataclasses.replace(
            self,
            seed=0,
            model=None,
            client=None,
            attack=None,
            defense=None,
            server=dataclasses.replace(self.server, optimizer=None, root=self._root_shape()),
            threat=dataclasses.replace(
                self.threat, num_malicious=0, placement="first", start=min(self.threat.start, 1)
            ),
        )
        data = dataclasses.replace(rest.data, partition=None)
        return (
            tuple(jax.tree.structure(part) for part in leaves),
            dataclasses.replace(rest, data=data),
        )

    def _root_shape(self):
        """What of the root data set shapes a program: not which examples are in it."""
        root = self.server.root
        if root is None:
            return None
        return dataclasses.replace(root, sampling="uniform", bias=None, biased_class=0)

    def check(self, **known) -> None:
        """Raises `ConfigError` for combinations that cannot be run or would silently do nothing.

        `known` are fields of `Setting` that only the data tells: capacity, shape and classes.
        """
        n, k, m = self.data.num_clients, self.clients_per_round, self.threat.num_malicious
        registry.datasets.get(self.data.name, "data.name")
        if (self.data.mean is None) != (self.data.std is None):
            raise ConfigError(
                f"data: give both of mean and std or neither, got mean={self.data.mean}, "
                f"std={self.data.std}."
            )
        if k > n:
            raise ConfigError(
                f"server.clients_per_round must be <= data.num_clients = {n}, got {k}."
            )
        if m > n:
            raise ConfigError(f"threat.num_malicious must be <= data.num_clients = {n}, got {m}.")
        if self.attack.stages and m == 0:
            names = ", ".join(stage.registered_name for stage in self.attack.stages)
            raise ConfigError(
                f"attack: {names} would do nothing, since threat.num_malicious is 0; "
                f"set threat.num_malicious to 1..{n}, or attack to null."
            )
        if self.threat.start > 0 and (m == 0 or self.threat.start >= self.rounds):
            raise ConfigError(
                f"threat.start = {self.threat.start} would leave no round with an attack; it needs "
                f"threat.num_malicious > 0, got {m}, and must be < rounds = {self.rounds}."
            )
        if self.evaluation.influence is not None and self.backdoor is None:
            raise ConfigError(
                "evaluation.influence compares a backdoor with the honest mapping, and attack has "
                "none; choose an attack on data, or set evaluation.influence to null."
            )
        if (self.execution.clients == "chunked") != (self.execution.chunk is not None):
            raise ConfigError(
                f"execution.chunk belongs to execution.clients 'chunked', and to that only; "
                f"got clients={self.execution.clients!r}, chunk={self.execution.chunk}."
            )
        self._check_root()
        self._check_server_rate()
        if self.data.local_test is not None:
            self.data.local_test.check("data.local_test")
        setting = Setting(k, m, sampled=k < n, knowledge=self.threat.knowledge, **known)
        check_components((self.client,), "client", setting)
        check_components(self.attack.stages, "attack", setting)
        check_components(self.defense.stages, "defense", setting)
        evasions = self.evaluation.evasions
        check_components(evasions, "evaluation.evasions", setting)
        surrogates_of(evasions, "evaluation.evasions")
        if self.evaluation.evasion_images is not None and not evasions:
            raise ConfigError(
                "evaluation.evasion_images does nothing without evaluation.evasions; give an "
                "attack such as 'pgd', or set it to null."
            )
        if (backdoor := self.evaluation.backdoor) is not None:
            if backdoor.stage != "data":
                raise ConfigError(
                    f"evaluation.backdoor must be an attack on data, got "
                    f"{backdoor.registered_name!r}."
                )
            # Nobody needs to stamp it.
            unattacked = setting._replace(num_malicious=None)
            check_components((backdoor,), "evaluation.backdoor", unattacked)

    def _check_root(self) -> None:
        stages = list(self.defense.stages)
        if self.threat.knowledge == "omniscient":  # others do not see what the server learns
            stages += self.attack.stages
        needing = [s.registered_name for s in stages if getattr(s, "needs_root", False)]
        if self.server.root is None:
            if needing:
                raise ConfigError(
                    f"{needing[0]!r} needs examples that the server holds itself; set server.root, "
                    f"such as {{size: 100}}."
                )
            return
        self.server.root.check("server.root")
        if self.client.keeps_state:
            raise ConfigError(
                "server.root: the server trains as the clients do but keeps no state between "
                "rounds; set client.keep_optimizer_state to false."
            )

    def _check_server_rate(self) -> None:
        optimizer = self.server.optimizer
        for stage in self.attack.stages:
            for _, part in walk(stage, "attack"):
                if getattr(part, "needs_server_rate", False) and optimizer.rate is None:
                    raise ConfigError(
                        f"attack: {part.registered_name!r} with accounts_for 'weights_and_rate' "
                        f"needs a server whose step is a rate times the aggregate; set "
                        f"server.optimizer to sgd with a learning_rate alone, got "
                        f"{optimizer.dump_spec()}, or accounts_for to clients."
                    )


def from_mapping(mapping: Mapping, overrides: Mapping | Iterable[str] = ()) -> Experiment:
    """An experiment from a plain mapping and overrides, checked and with nothing left open.

    `overrides` are `{"client.l2": 1e-4}` or strings `"client.l2=1e-4"`. A Byzantine bound left
    open becomes `threat.num_malicious` when all clients take part.

    >>> from_mapping({"defense": "krum", "threat": {"num_malicious": 3}}).defense.stages[0]
    Krum(num_byzantine=3, convention='paper')
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"An experiment must be a mapping of keys to values, got {mapping!r}.")
    spec = apply_overrides(mapping, overrides)
    own = {"influence": build_influence, "root": build_root, "local test": build_local_test}
    builders = registry.builders() | own
    experiment = schema.build(Experiment, spec, "", builders)
    if experiment.clients_per_round >= experiment.data.num_clients:
        stages = tuple(
            fill_num_byzantine(stage, experiment.threat.num_malicious)
            for stage in experiment.defense.stages
        )
        experiment = dataclasses.replace(experiment, defense=Defense(stages))
    if hasattr(experiment.client, "settled"):
        experiment = dataclasses.replace(experiment, client=experiment.client.settled())
    experiment.check()
    return experiment


def load(path: str | Path, overrides: Mapping | Iterable[str] = ()) -> Experiment:
    """An experiment from a YAML file and overrides; see `from_mapping`."""
    return from_mapping(read_yaml(path), overrides)


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file; `ConfigError` names the file and line where it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"No configuration file {str(path)!r}.")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {content!r}.")
    return content


def apply_overrides(mapping: Mapping, overrides: Mapping | Iterable[str]) -> dict:
    """The mapping with dotted keys replaced; the keys themselves are checked when it is built.

    >>> apply_overrides({"defense": "krum"}, ["defense.num_byzantine=2"])
    {'defense': {'name': 'krum', 'num_byzantine': 2}}
    """
    if isinstance(overrides, Mapping):
        pairs = list(overrides.items())
    else:
        pairs = [parse_override(text) for text in overrides]
    tree = _plain(mapping)
    for dotted, value in pairs:
        _assign(tree, dotted, _plain(value))
    return tree


def parse_override(text: str) -> tuple[str, object]:
    """The dotted key and the YAML value of a string `key.path=value`."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"An override must look like key.path=value, got {text!r}.")
    try:
        parsed = OmegaConf.to_container(OmegaConf.create(f"value: {value}"))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"Override {text!r}: the value is not readable YAML: {error}") from error
    return key.strip(), parsed["value"]


def _plain(value):
    """A deep copy in plain containers, with components written as their specification."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return schema.dump(value)
    return value


def _assign(tree: dict, dotted: str, value) -> None:
    *parents, last = dotted.split(".")
    node = tree
    for depth, name in enumerate(parents):
        key = _key(node, name, dotted)
        child = node.get(key) if isinstance(node, dict) else node[key]
        if child is None:
            child = {}
        if isinstance(child, str):  # a component given by its bare name
            child = {"name": child}
        if not isinstance(child, (dict, list)):
            at = ".".join(parents[: depth + 1])
            raise ConfigError(f"{dotted}: {at} is {child!r}, which has no keys.")
        node[key] = child
        node = child
    node[_key(node, last, dotted)] = value


def _key(node, name: str, dotted: str):
    if isinstance(node, dict):  # the rounds of a schedule are integers
        return int(name) if name.isdigit() and int(name) in node else name
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"{dotted}: a list of {len(node)} has no entry {name!r}.")
    return int(name)


def dump_yaml(mapping: Mapping) -> str:
    """A mapping as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(mapping)))
