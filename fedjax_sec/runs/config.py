"""The schema of an experiment: strict YAML in, fully resolved YAML out."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from omegaconf import OmegaConf

from fedjax_sec import core
from fedjax_sec.core import (
    COUNT,
    SEED,
    ConfigError,
    Setting,
    check_components,
    component,
    fill_defaults,
    optimizers,
    plugins,
    registry,
    section,
    static,
)
from fedjax_sec.core.advice import SYNONYMS, letters, likeness, shown
from fedjax_sec.core.objects import parts_of
from fedjax_sec.core.values import own_name
from fedjax_sec.core.yaml import LEVELS, holds, parse, read_text
from fedjax_sec.data import Source
from fedjax_sec.data.arrays import NAME, named
from fedjax_sec.data.local_test import build_local_test
from fedjax_sec.data.root import build_root
from fedjax_sec.evaluation.robustness import surrogates_of
from fedjax_sec.ops.client_axis import STRATEGIES
from fedjax_sec.round.pipeline import Attack, Defense
from fedjax_sec.runs import loggers


def _build_influence(spec: Any, path: str):
    """The monitor from true, false or a mapping of its fields."""
    if core.plain(spec) is False:
        return None
    if core.plain(spec) is True:
        spec = {}
    if isinstance(spec, Mapping):
        spec = {"name": "influence", **spec}
    elif not dataclasses.is_dataclass(spec):
        raise ConfigError(
            f"{path} must be true, false, null or a mapping of fields, got {shown(spec)}."
        )
    return registry.monitors.build(spec, path)


@dataclasses.dataclass(frozen=True)
class Options:
    """The fields of the data set's own component, as pairs: a structure's key must be hashable."""

    pairs: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def build(cls, spec: Any, path: str) -> "Options":
        """From null or a mapping."""
        if isinstance(spec, Options):
            return spec
        if spec is None:
            return cls()
        if not isinstance(spec, Mapping):
            raise ConfigError(f"{path} must be a mapping of fields, got {shown(spec)}.")
        return cls(tuple(sorted((str(key), core.plain(one)) for key, one in spec.items())))

    def dump_spec(self) -> dict | None:
        """The mapping from which `build` makes equal options."""
        return dict(self.pairs) or None


registry.BUILDERS |= {
    "influence": _build_influence,
    "dataset options": Options.build,
    "root": build_root,
    "local test": build_local_test,
}

#: Where data and files of components lie, and where measurements go, changes no result.
_WHEREABOUTS = ("data.data_dir", "data.download", "imports", "logging")


@dataclasses.dataclass(frozen=True)
class Data:
    """Which data, and how it is spread over the clients."""

    name: str = static("digits", "Data set, see `fedjax-sec list datasets`.")
    options: Any = component(
        "dataset options",
        None,
        "Fields of the data set itself, which may also stand beside `name`.",
    )
    num_clients: int = static(20, "N, registered clients.", low=1, high=10**6)
    partition: Any = component(
        "partition", "iid", "How examples are dealt to the clients.", compiles=False
    )
    local_test: Any = component(
        "local test",
        None,
        "Test data of each client: true (a tenth of its own examples), `users`, `dealt`, or the "
        "fields of `fedjax_sec.data.local_test.LocalTest` (null: none).",
        optional=True,
    )
    data_dir: str | None = static(
        None, "Folder of prepared tensorflow-datasets (null: TFDS_DATA_DIR, then TFDS's default)."
    )
    download: bool = static(True, "Download and prepare the data where it is missing.")
    max_train: int | None = static(
        None, "Keep only the first training examples.", low=1, high=COUNT
    )
    max_test: int | None = static(None, "Keep only the first test examples.", low=1, high=COUNT)
    mean: tuple[float, ...] | None = static(
        None,
        "Subtracted from pixels in [0, 1], a number a channel (null: the data set's own).",
        unbounded="features have any scale",
    )
    std: tuple[float, ...] | None = static(
        None,
        "Pixels are divided by it, a number a channel (null: the data set's own).",
        above=0,
        high=1e6,
    )

    def dataset(self):
        """The data set's component, with its own fields."""
        spec = {"name": self.name, **dict(self.options.pairs)}
        registry.datasets.get(self.name, "data.name")
        return registry.datasets.build(spec, "data")


@dataclasses.dataclass(frozen=True)
class Server:
    """The clients of a round, and the server's step along the aggregate."""

    clients_per_round: int | None = static(
        None, "K, drawn without replacement every round (null: all N).", low=1, high=COUNT
    )
    dropout: float = static(
        0.0,
        "Probability that a client of the round sends nothing and learns nothing.",
        low=0,
        below=1,
        compiles=lambda server: server.dropout > 0,
    )
    optimizer: Any = component(
        "optimizer",
        {"name": "sgd", "learning_rate": 1.0},
        "An optimizer of optax (`fedjax-sec show optimizer`); minus the aggregate is its gradient.",
    )
    root: Any = component(
        "root",
        None,
        "Examples that the server holds and no client: true, or their fields (null: none).",
        optional=True,
    )


def _sometimes(threat: "Threat") -> bool:
    """Whether there are rounds without an attack."""
    return threat.start > 0 or threat.every > 1


@dataclasses.dataclass(frozen=True)
class Threat:
    """The adversary's clients and its knowledge."""

    num_malicious: int = static(
        0, "m, malicious clients among the N.", low=0, high=COUNT, compiles=False
    )
    knowledge: str = static(
        "corrupted",
        "Updates (and data) the adversary sees: of its `corrupted` clients, or all (`omniscient`).",
        choices=("corrupted", "omniscient"),
    )
    placement: str = static(
        "random",
        "Which clients are malicious: drawn by the seed, or the `first` m.",
        choices=("random", "first"),
        compiles=False,
    )
    start: int = static(
        0,
        "Round in which the attack begins; before it malicious clients are honest.",
        low=0,
        high=COUNT,
        compiles=_sometimes,
    )
    every: int = static(
        1,
        "Attack in every so many-th round from `start` on; in others all are honest.",
        low=1,
        high=COUNT,
        compiles=_sometimes,
    )
    per_round: int | None = static(
        None,
        "Malicious clients among the K of every attacked round (null: as many as chance draws).",
        low=1,
        high=COUNT,
    )
    redraw: bool = static(False, "Draw the m malicious clients anew in every round.")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The measurements, and when they are made."""

    every: int = static(
        10, "Rounds between evaluations; the last round is always one.", low=1, high=COUNT
    )
    batch_size: int = static(2500, "Test examples evaluated at once.", low=1, high=COUNT)
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
        compiles=lambda evaluation: evaluation.evasions,  # their numbers are constants
    )
    evasion_images: int | None = static(
        None, "Test examples that are attacked, the first ones (null: all).", low=1, high=COUNT
    )
    influence: Any = component(
        "influence",
        None,
        "Measure net influence every round: true, or fields of the monitor `influence` (null: do "
        "not).",
        optional=True,
    )
    monitors: Any = component(
        "monitor", None, "What looks at rounds beside the diagnostics, one or a list.", many=True
    )
    evaluators: Any = component(
        "evaluator",
        None,
        "What is measured beside the task's metrics, one or a list.",
        many=True,
        compiles=lambda evaluation: evaluation.evaluators,  # their numbers are constants
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When the state is saved, so that an interrupted run can go on."""

    every: int = static(10, "Evaluations between checkpoints.", low=1, high=COUNT)
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
    chunk: int | None = static(None, "Clients side by side under `chunked`.", low=1, high=COUNT)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run, complete: every top-level key of a configuration file."""

    data: Data = section(Data, "The data and its partition.")
    model: Any = component("model", "mlp", "The network.")
    task: Any = component(
        "task", None, "What is learned (null: what the data set is made for).", optional=True
    )
    algorithm: Any = component(
        "algorithm", "fedavg", "What clients send, and what the server makes of it."
    )
    client: Any = component(
        "client",
        {"name": "sgd", "steps": 1, "batch_size": 32},
        "Local training; the default's `steps` yield to `epochs` that are given.",
        either=("steps", "epochs"),
    )
    server: Server = section(Server, "Participation and the server's step.")
    threat: Threat = section(Threat, "The adversary.")
    attack: Any = component("attack pipeline", None, "null, an attack, or a list of them.")
    defense: Any = component("defense pipeline", "mean", "An aggregator, or a list of stages.")
    evaluation: Evaluation = section(Evaluation, "Metrics.")
    checkpoint: Checkpoint = section(Checkpoint, "Resuming.")
    execution: Execution = section(Execution, "Layout of the work on the device.")
    start_from: str | None = static(
        None,
        "Folder of a finished run whose final parameters this one starts from (null: the model's "
        "initial ones, by the seed).",
        compiles=False,
    )
    rounds: int = static(100, "Federated rounds.", low=1, high=COUNT)
    seed: int = static(0, "Seed of everything random.", low=0, high=SEED, compiles=False)
    imports: tuple[str, ...] = static(
        (),
        "Modules and Python files that register components of your own, imported first; paths are "
        "relative to the configuration's file.",
        compiles=False,
    )
    logging: tuple[str, ...] = static(
        (),
        "Where measurements go beside the run's folder, one or a list of `tensorboard` and "
        "`wandb`; it changes no result and is not compared.",
        compiles=False,
    )

    @property
    def clients_per_round(self) -> int:
        """K."""
        return self.server.clients_per_round or self.data.num_clients

    @property
    def malicious_in_each_round(self) -> int | None:
        """How many malicious clients an attacked round has; None where chance decides."""
        if self.clients_per_round >= self.data.num_clients:
            return self.threat.num_malicious
        return self.threat.per_round

    @property
    def trainer(self):
        """How the server trains on its root data set: as the clients do, with its own batch.

        Its examples are not augmented, unless the root says so.
        """
        root = self.server.root
        if root is None:
            return None
        changes = {"batch_size": root.batch_size or root.size}
        if core.value_of(self.client, "augmentation") and not root.augment:
            changes["augmentation"] = ()
        return dataclasses.replace(self.client, **changes)

    @property
    def backdoor(self):
        """The attack on data whose success evaluation measures, or None."""
        given = self.evaluation.backdoor
        return self.attack.backdoor if given is None else given

    def to_dict(self, objects: bool = False) -> dict:
        """The fully resolved configuration as a plain mapping.

        With `objects`, components that hold objects of Python's own stay as they are, so that
        `from_mapping` makes the experiment again.
        """
        return core.dump(self, objects)

    @property
    def in_no_file(self) -> list[str]:
        """Names of functions, flax modules, arrays, and classes that nobody has registered."""
        names = [NAME] if self.data.name == NAME else []
        for part in parts_of(self):
            if getattr(part, "from_python", False):
                names += [text for key, text in core.dump(part).items() if key != "name"]
            elif any(one.gives(type(part)) for one in registry.KINDS.values()):
                names.append(part.registered_name)
        return names

    def fingerprint(self) -> str:
        """A digest of the resolved configuration without places: that of equal runs is equal.

        >>> one, two = from_mapping({}), from_mapping({"data": {"data_dir": "elsewhere"}})
        >>> one.fingerprint() == two.fingerprint() != from_mapping({"seed": 1}).fingerprint()
        True
        """
        spec = self.to_dict()
        for key in _WHEREABOUTS:
            *path, name = key.split(".")
            part = spec
            for one in path:
                part = part[one]
            part.pop(name, None)
        return hashlib.sha256(json.dumps(spec).encode()).hexdigest()

    def structure(self):
        """A hashable key; experiments with equal keys run in one compiled program.

        Of components it holds the static fields and what is nested in them; of sections everything
        but the fields that say `compiles=False` where they are declared.
        """
        return _structure(self)

    @property
    def monitors(self) -> tuple:
        """All that look at a round."""
        options = self.evaluation
        diagnostics = [registry.monitors.build("diagnostics")] if options.diagnostics else []
        influence = [] if options.influence is None else [options.influence]
        return (*diagnostics, *influence, *options.monitors)

    @property
    def evaluators(self) -> tuple:
        """All that measure a model between rounds, but attacks on inputs and local test data."""
        size, exclude = self.evaluation.batch_size, self.evaluation.exclude_target
        backdoor = {"name": "backdoor", "batch_size": size, "exclude_target": exclude}
        measured = [{"name": "test", "batch_size": size}]
        measured += [] if self.backdoor is None else [backdoor]
        return (*map(registry.evaluators.build, measured), *self.evaluation.evaluators)

    @property
    def complete_algorithm(self):
        """The algorithm with the experiment's client and server optimizer in its `given` fields."""
        parts = {"client": self.client, "optimizer": self.server.optimizer}
        names = {field.name for field in dataclasses.fields(self.algorithm)}
        return dataclasses.replace(
            self.algorithm, **{name: part for name, part in parts.items() if name in names}
        )

    def check(self, **known) -> None:
        """Raises `ConfigError` for combinations that cannot be run or would silently do nothing.

        `known` are fields of `Setting` that only the data tells: capacity, shape and classes.
        """
        # Python code may have put anything into a field, also components that have no name.
        core.rebuild(self, "", dict.fromkeys(registry.BUILDERS, _admit_again))
        n, k, m = self.data.num_clients, self.clients_per_round, self.threat.num_malicious
        self.data.dataset()
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
        after_start = self.rounds - 1 - self.threat.start
        last = self.threat.start + after_start // self.threat.every * self.threat.every
        core.refuse_warm_up(self.attack.stages, "attack", last + 1)
        if self.threat.every > 1 and m == 0:
            raise ConfigError(
                f"threat.every = {self.threat.every} does nothing without malicious clients; set "
                f"threat.num_malicious to 1..{n}, or threat.every to 1."
            )
        self._check_per_round(n, k, m)
        self._check_steps()
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
        self._check_local_training()
        if self.data.local_test is not None:
            self.data.local_test.check("data.local_test")
        self._check_local_test()
        setting = self.setting(**known)
        check_components((self.model,), "model", setting)
        check_components((self.client,), "client", setting)
        check_components((self.algorithm,), "algorithm", setting)
        check_components((self.data.partition,), "data.partition", setting)
        check_components(self.attack.stages, "attack", setting)
        check_components(self.defense.stages, "defense", setting)
        evasions = self.evaluation.evasions
        check_components(evasions, "evaluation.evasions", setting)
        surrogates_of(evasions, "evaluation.evasions")
        check_components(self.evaluation.monitors, "evaluation.monitors", setting)
        check_components(self.evaluation.evaluators, "evaluation.evaluators", setting)
        if (influence := self.evaluation.influence) is not None:
            check_components((influence,), "evaluation.influence", setting)
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

    def setting(self, **known) -> Setting:
        """The setting of the components' checks; `known` are fields that only the data tells."""
        n, k = self.data.num_clients, self.clients_per_round
        return Setting(
            k,
            self.threat.num_malicious,
            sampled=k < n,
            knowledge=self.threat.knowledge,
            malicious_per_round=self.malicious_in_each_round,
            sends=self.algorithm.sends,
            registered=n,
            client=self.client,
            **known,
        )

    def _check_per_round(self, n: int, k: int, m: int) -> None:
        threat = self.threat
        if threat.redraw and (m == 0 or threat.placement == "first"):
            raise ConfigError(
                f"threat.redraw draws the malicious clients anew in every round; it needs "
                f"threat.num_malicious > 0, got {m}, and threat.placement 'random', got "
                f"{threat.placement!r}."
            )
        if threat.per_round is None:
            return
        if k == n:
            raise ConfigError(
                f"threat.per_round = {threat.per_round} needs server.clients_per_round < "
                f"data.num_clients = {n}; where all clients take part, so do all malicious ones: "
                f"set threat.num_malicious."
            )
        low, high = max(1, k - (n - m)), min(m, k)
        if not low <= threat.per_round <= high:
            allowed = f"{low}..{high}" if low <= high else "nothing"
            raise ConfigError(
                f"threat.per_round: with {n} clients, {m} malicious, and {k} in a round, {allowed} "
                f"is possible, got {threat.per_round}."
            )

    def _check_steps(self) -> None:
        for name in ("steps", "epochs"):  # a client's batches are numbered through all rounds
            a_round = core.value_of(self.client, name) or 0
            if self.rounds * a_round > COUNT:
                raise ConfigError(
                    f"rounds = {self.rounds} times client.{name} = {a_round} is "
                    f"{self.rounds * a_round}, beyond {COUNT}, the largest number in int32; lower "
                    f"one of them."
                )

    def _check_local_test(self) -> None:
        """Raises where an attack is to poison test data and nobody has any, or nobody poisons."""
        for one in self.attack.backdoors:
            if not one.local_test:
                continue
            if self.data.local_test is None:
                raise ConfigError(
                    f"attack: local_test of {one.registered_name!r} poisons the clients' own test "
                    f"data, and they have none; set data.local_test, or local_test to false."
                )
            if not any(one is stage for stage in self.attack.data_stages):
                raise ConfigError(
                    f"attack: local_test of {one.registered_name!r} would do nothing, since no "
                    f"client's data is poisoned by it; set it to false."
                )

    def _check_root(self) -> None:
        stages = list(self.defense.stages)
        if self.threat.knowledge == "omniscient":  # others do not see what the server learns
            stages += self.attack.stages
        needing = core.needing(stages, "root")
        if self.server.root is None:
            if needing:
                raise ConfigError(
                    f"{needing[0]!r} needs examples that the server holds itself; set server.root, "
                    f"such as {{size: 100}}."
                )
            return
        self.server.root.check("server.root")
        if self.server.root.augment and not core.value_of(self.client, "augmentation"):
            raise ConfigError(
                "server.root.augment is for the clients' augmentation, and there is none; give "
                "client.augmentation, or set it to false."
            )
        if self.client.keeps_state:
            raise ConfigError(
                "server.root: the server trains as the clients do but keeps no state between "
                "rounds; set client.keep_optimizer_state to false."
            )

    def _check_server_rate(self) -> None:
        if self.complete_algorithm.rate is not None:
            return
        remedy = (
            f"needs a server whose step is a rate times the aggregate; set server.optimizer to sgd "
            f"with a learning_rate alone, got {self.server.optimizer.dump_spec()}"
        )
        if needing := core.needing(self.attack.stages, "rate"):
            raise ConfigError(
                f"attack: {needing[0]!r} multiplies updates by what the server's weights and rate "
                f"make necessary, so it {remedy}, or give the attack a factor of its own."
            )
        if needing := core.needing(self.defense.stages, "rate"):
            raise ConfigError(f"defense: {needing[0]!r} {remedy}.")

    def _check_local_training(self) -> None:
        stages = self.defense.client_stages
        if stages and "hooks" not in inspect.signature(self.algorithm.train).parameters:
            raise ConfigError(
                f"defense: {stages[0].registered_name!r} acts in local training, and the algorithm "
                f"{self.algorithm.registered_name!r} hands no hooks to it; choose another "
                f"algorithm, such as 'fedavg'."
            )


def _admit_again(component, path: str):
    """The gate for a component of a built experiment, whether it is registered or not."""
    if isinstance(component, Attack | Defense):
        for stage in component.stages:
            _admit_again(stage, path)
        return component
    if isinstance(component, optimizers.Optimizer):
        return optimizers.build(component, path)
    if isinstance(component, Options):
        return component
    if not dataclasses.is_dataclass(component):
        raise ConfigError(f"{path}: expected a component that is built, got {shown(component)}.")
    return core.rebuild(component, path, dict.fromkeys(registry.BUILDERS, _admit_again))


def from_mapping(mapping: Mapping, overrides: Mapping | Iterable[str] = ()) -> Experiment:
    """An experiment from a plain mapping and overrides, checked and with nothing left open.

    `overrides` are `{"client.l2": 1e-4}` or strings `"client.l2=1e-4"`. A Byzantine bound left
    open becomes `threat.num_malicious` when all clients take part, else `threat.per_round`; the
    last round of a defence that asks for it becomes `rounds`.

    >>> from_mapping({"defense": "krum", "threat": {"num_malicious": 3}}).defense.stages[0]
    Krum(num_byzantine=3, convention='paper')
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"An experiment must be a mapping of keys to values, got {shown(mapping)}."
        )
    spec = apply_overrides(mapping, overrides)
    if "imports" in spec:
        spec["imports"] = plugins.import_all(spec["imports"], "imports")
    if "logging" in spec:
        spec["logging"] = loggers.names_of(spec["logging"])
    _refuse_arrays(spec.get("data"))
    spec = _with_options(spec)
    try:
        experiment = core.build(Experiment, spec, "", registry.BUILDERS)
    except core.UnknownKey as error:
        raise _with_advice(error, spec) from None
    known = {"num_malicious": experiment.malicious_in_each_round, "rounds": experiment.rounds}
    stages = tuple(fill_defaults(stage, known) for stage in experiment.defense.stages)
    experiment = dataclasses.replace(experiment, defense=Defense(stages))
    experiment = dataclasses.replace(
        experiment,
        client=experiment.client.resolve_auto(),
        data=_resolved(experiment.data),
        attack=Attack(tuple(map(_with_files, experiment.attack.stages))),
        evaluation=_with_files(experiment.evaluation),
    )
    if experiment.start_from is not None:  # the same run wherever this one is taken up again
        start = str(Path(experiment.start_from).expanduser().absolute())
        experiment = dataclasses.replace(experiment, start_from=start)
    experiment.check()
    return experiment


def _with_files(part):
    """The component with open fields filled of every data set that attacks in it name."""
    changes = {}
    for field in dataclasses.fields(part):
        value, kind = getattr(part, field.name), field.metadata.get("kind")
        if kind == "dataset":
            changes[field.name] = value.resolve_auto()
        elif kind == "attack" and value is not None:
            changes[field.name] = _with_files(value)
    changes = {name: one for name, one in changes.items() if one != getattr(part, name)}
    return dataclasses.replace(part, **changes) if changes else part


def _resolved(data: Data) -> Data:
    """The section with fields of the data set filled that were left open."""
    given = data.dataset()
    full = given.resolve_auto()
    if full == given:
        return data
    options = {name: one for name, one in core.dump(full).items() if name != "name"}
    return dataclasses.replace(data, options=Options.build(options, "data.options"))


def _with_options(spec: Mapping) -> dict:
    """The specification with fields of the data set's own component moved to `data.options`."""
    data = spec.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        return dict(spec)
    if data["name"] not in registry.datasets.names():
        return dict(spec)
    fields = {field.name for field in core.declared(registry.datasets.get(data["name"]))}
    known = {field.name for field in dataclasses.fields(Data)}
    options = {key: one for key, one in data.items() if key in fields - known}
    if not options:
        return dict(spec)
    rest = {key: one for key, one in data.items() if key not in options}
    return {**spec, "data": {**rest, "options": {**(rest.get("options") or {}), **options}}}


def _structure(obj):
    """A hashable key of what a compiled program depends on."""
    if isinstance(obj, Attack | Defense) or getattr(type(obj), "registered_name", None) is not None:
        return jax.tree.structure(obj)
    if not dataclasses.is_dataclass(obj):
        return obj if not isinstance(obj, tuple) else tuple(map(_structure, obj))
    parts = []
    for field in dataclasses.fields(obj):
        compiles = field.metadata.get("compiles", True)
        if callable(compiles):
            parts.append((field.name, compiles(obj)))
        elif compiles:
            parts.append((field.name, _structure(getattr(obj, field.name))))
    return type(obj), tuple(parts)


def _refuse_arrays(data) -> None:
    """Raises where arrays are given for `data`, which takes the name of a data set."""
    if isinstance(data, Mapping):
        known = {field.name for field in dataclasses.fields(Data)} - {"name"}
        given = [value for key, value in data.items() if key not in known]
    else:
        given = list(data) if isinstance(data, (list, tuple)) else [data]
    nested = [item for value in given for item in (value if isinstance(value, list) else [value])]
    if any(getattr(item, "ndim", 0) for item in nested):
        raise ConfigError(
            "data: arrays cannot be given here, only the name of a data set, such as {name: "
            "digits}; give them as fedjax_sec.run(config, data=fedjax_sec.data.arrays(x_train, "
            "y_train, x_test, y_test)), or register your own, "
            "@registry.datasets.register('NAME'), see CONTRIBUTING.md."
        )


def _with_advice(error: core.UnknownKey, spec: Mapping) -> ConfigError:
    """The error with the whole dotted key, where the key is known in another place."""
    if error.cls is Experiment and {"grid", "experiment"} & spec.keys():
        return ConfigError(
            f"This is a sweep, not an experiment: it has the key {shown(error.key)}. Run it with "
            f"`fedjax-sec sweep FILE --out DIR`."
        )
    key = letters(error.key)
    if key in map(letters, error.near):
        return error
    places = list(_places(spec))
    same = [place for place in places if letters(place.rpartition(".")[2]) == key]
    if not same and not error.near:
        meant = SYNONYMS.get(key, ())
        same = [place for place in places if place.rpartition(".")[2] in meant]
    near = [place for place in same if place.startswith(f"{error.path}.")] or same
    if not near:
        return error
    beside = [name for name in error.near if likeness(error.key, name) > 0.8]
    advice = f" Did you mean {' or '.join(map(repr, [*beside, *near[:3]]))}?"
    return core.UnknownKey(error.cls, error.path, error.key, advice)


def _places(spec) -> Iterator[str]:
    """The dotted keys of an experiment, those of the components that are named in `spec`."""
    for field in dataclasses.fields(Experiment):
        given = spec.get(field.name)
        if section := field.metadata.get("section"):
            for inner in dataclasses.fields(section):
                yield f"{field.name}.{inner.name}"
                below = given.get(inner.name) if isinstance(given, Mapping) else None
                yield from _places_inside(f"{field.name}.{inner.name}", inner, below)
        else:
            yield from _places_inside(field.name, field, given)


def _places_inside(path: str, field, given) -> Iterator[str]:
    kind = field.metadata.get("kind", "").removesuffix(" pipeline")
    if kind == "optimizer":
        yield from (f"{path}.{name}" for name in ("learning_rate", "momentum"))
    if kind not in registry.KINDS:
        return
    name = core.default_spec(field).get("name") if given is None else given
    if isinstance(given, Mapping):
        name = (core.default_spec(field) | given).get("name")
    known = registry.KINDS[kind]
    if isinstance(name, str) and name in known.names():
        for inner in dataclasses.fields(known.get(name)):
            yield f"{path}.{inner.name}"
            yield from _places_inside(f"{path}.{inner.name}", inner, None)


def load(path: str | Path, overrides: Mapping | Iterable[str] = ()) -> Experiment:
    """An experiment from a YAML file and overrides; see `from_mapping`."""
    return from_mapping(read_yaml(path), overrides)


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file; `ConfigError` names the file and line where it cannot be read.

    Files among `imports` are given relative to it, and returned with their absolute paths.
    """
    content = parse(read_text(path), str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {shown(content)}.")
    if isinstance(given := content.get("imports"), (str, list)):
        folder, named = Path(path).absolute().parent, [given] if isinstance(given, str) else given
        content["imports"] = [plugins.resolved(one, f"{path}: imports", folder) for one in named]
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
        if dotted == "data" and _is_arrays(value):
            for key, one in named(value).items():
                _assign(tree, f"data.{key}", one)
        else:
            _assign(tree, dotted, _plain(value))
    if _is_arrays(tree.get("data")):
        tree["data"] = named(tree["data"])
    return tree


def _is_arrays(given: Any) -> bool:
    """Whether it is what `fedjax_sec.data.arrays` returns."""
    return isinstance(given, Source) and given.name == NAME


def parse_override(text: str) -> tuple[str, object]:
    """The dotted key and the YAML value of a string `key.path=value`."""
    if not isinstance(text, str):
        raise ConfigError(f"An override is text such as rounds=3, got {shown(text)}.")
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"An override must look like key.path=value, got {shown(text)}.")
    where = f"Override {shown(text)}"
    # As an entry of a list, so that a line break cannot begin another key.
    parsed = parse(f"- {value}", where, with_references=False)
    if not isinstance(parsed, list) or len(parsed) != 1:
        raise ConfigError(f"{where}: more than one value.")
    return key.strip(), parsed[0]


def _plain(value, level: int = 0):
    """A deep copy in plain containers, with components written as their specification."""
    if level > LEVELS:
        raise ConfigError(f"More than {LEVELS} levels of mappings and lists inside one another.")
    if OmegaConf.is_config(value):  # as text: resolving could copy the environment
        value = OmegaConf.to_container(value)
    if own_name(type(value)) or type(value).__module__ == __name__:
        value = core.dump(value, objects=True)
    if getattr(value, "from_python", False):
        return value
    if isinstance(value, Mapping):
        return {core.plain(key): _plain(item, level + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return [_plain(item, level + 1) for item in value]
    return value


def _assign(tree: dict, dotted: str, value) -> None:
    if not isinstance(dotted, str) or not all(dotted.split(".")) or len(dotted) > 500:
        raise ConfigError(f"The key of an override is text such as client.l2, got {shown(dotted)}.")
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
            raise ConfigError(f"{dotted}: {at} is {shown(child)}, which has no keys.")
        node[key] = child
        node = child
    node[_key(node, last, dotted)] = value


def _key(node, name: str, dotted: str):
    number = int(name) if name.isascii() and name.isdigit() and len(name) < 11 else None
    if isinstance(node, dict):  # the rounds of a schedule are integers
        return number if number in node and number is not None else name
    if number is None or number >= len(node):
        raise ConfigError(f"{dotted}: a list of {len(node)} has no entry {shown(name)}.")
    return number


def dump_yaml(mapping: Mapping) -> str:
    """A mapping as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(mapping)))


def is_written(path: Path, config: Mapping) -> bool:
    """Whether a file plainly holds a configuration, as `dump_yaml` writes it: quicker to tell.

    False says nothing: `differences` knows more.
    """
    return holds(read_text(path), json.loads(json.dumps(config)))


def differences(known: Mapping, config: Mapping) -> list[str]:
    """The dotted keys in which a configuration differs from a known one, but where the data lies.

    >>> differences({"rounds": 5}, from_mapping({"seed": 1, "rounds": 5}).to_dict())
    ['seed']
    """
    known, config = (json.loads(json.dumps(one)) for one in (known, config))
    if known == config:
        return []
    with contextlib.suppress(ConfigError):  # a later version may have added keys
        known = json.loads(json.dumps(from_mapping(known).to_dict()))
    return sorted(set(_differences(known, config)) - set(_WHEREABOUTS))


def _differences(a, b, path=""):
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            at = f"{path}.{key}" if path else key
            if key not in a or key not in b:
                yield at
            else:
                yield from _differences(a[key], b[key], at)
    elif a != b:
        yield path
