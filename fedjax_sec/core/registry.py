"""Name -> component class: the package's components, and those of plug-ins.

A component is one file in one of the folders below, found by its import: dropping the file in is
all it takes to have it in configurations, in `fedjax-sec list` and `show`, and in the contract
tests. Modules whose names begin with an underscore are helpers and are not imported. Components of
other packages, and of single files, come in by `fedjax_sec.core.plugins`.
"""

import contextlib
import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fedjax_sec.core import host, objects, plugins
from fedjax_sec.core.advice import shown, suggestion
from fedjax_sec.core.builder import build, rebuild
from fedjax_sec.core.components import STAGES, with_defaults
from fedjax_sec.core.fields import ConfigError, pytree
from fedjax_sec.core.values import name_of, own_name, plain

#: Values that stand for no component of a kind.
_NOTHING = {
    "attack": " null (None in Python) means no attack.",
    "defense": " Without a defence the rule is 'mean'.",
    "evasion": " null (None in Python) means none.",
}


#: kind -> function that builds a component of that kind from its specification and path. Registries
#: enter themselves; optimizers (which are optax's) and pipelines (which are lists) do so in their
#: own modules.
BUILDERS: dict[str, Callable] = {}


class Registry:
    """Components of one kind, discovered in the given packages on first use."""

    def __init__(self, kind: str, *packages: str):
        self.kind = kind
        BUILDERS[kind] = self.build
        self._one = f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
        self.packages = packages
        self._entries: dict[str, type] = {}
        self._given: dict[str, type] = {}  # given as objects, under their qualified names
        self._discovered = False

    def register(self, name: str):
        """Class decorator: makes a frozen dataclass pytree of the class and files it under `name`.

        Fields declared `static` become part of the pytree's structure, all others leaves.
        A class may be defined and registered again, as in a notebook: the new one counts. Another
        class under a name that is taken is a `ValueError`.
        """

        def decorate(cls):
            if not cls.__module__.startswith(self.packages):
                self._discover()  # so that a name of ours is known to be taken
            known = self._entries.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by {known.__module__}; "
                    f"rename one of the two."
                )
            cls = with_defaults(pytree(cls), self.kind)
            cls.registered_name = name
            self._entries[name] = cls
            return cls

        return decorate

    def _discover(self) -> None:
        if self._discovered:
            return
        with host.imports_unnoticed():  # networks import flax, which imports rich
            for package_name in self.packages:
                package = importlib.import_module(package_name)
                for module in pkgutil.iter_modules(package.__path__):
                    if not module.name.startswith("_"):
                        importlib.import_module(f"{package_name}.{module.name}")
        self._discovered = True
        plugins.load_installed()

    def holds(self, cls: type) -> bool:
        """Whether the class is registered here."""
        self._discover()
        return self._entries.get(getattr(cls, "registered_name", "")) is cls

    def gives(self, cls: type) -> bool:
        """Whether the class was given as an object in this process, and no file can name it."""
        return self._given.get(name_of(cls)) is cls

    @contextlib.contextmanager
    def lent(self, cls: type) -> Iterator[None]:
        """Knows a class that is not registered for a while, under a name that nobody has."""
        given, name = vars(cls).get("registered_name", ""), cls.__name__.lower()
        free = given or name
        while free in self.names():
            free += "_"
        cls.registered_name, self._entries[free] = free, cls
        try:
            yield
        finally:
            del self._entries[free]
            cls.registered_name = given

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted."""
        self._discover()
        return tuple(sorted(self._entries))

    def get(self, name: str, path: str = "") -> type:
        """The class registered as `name`, or a `ConfigError` that suggests the nearest name."""
        at = f"{path}: " if path else ""
        if not isinstance(name, str):
            raise ConfigError(
                f"{at}the name of {self._one} is text, got {shown(name)}.{self._advice(name)}"
            )
        if name in self._given:
            return self._given[name]
        if name not in self.names():
            if "." in name:
                raise ConfigError(
                    f"{at}{shown(name)} is a class of Python's own and in no file; give an "
                    f"instance of it again, or register it in a file that `imports` names."
                )
            advice = _NOTHING.get(self.kind, "") if name.lower() in ("none", "null", "no") else ""
            raise ConfigError(
                f"{at}unknown {self.kind} {shown(name)}.{advice or suggestion(name, self.names())} "
                f"Known: {', '.join(self.names())}.{plugins.broken()}"
            )
        return self._entries[name]

    def build(self, spec: Any, path: str = ""):
        """Builds a component from its name or from a mapping with `name` and fields.

        An instance is checked and returned, whether or not its class is registered. A class that is
        not, or an instance of it, is known by its qualified name from then on; functions and flax
        modules are held by the components that are made for them.

        >>> defenses.build({"name": "krum", "num_byzantine": 2}).num_byzantine
        2
        """
        path, spec = path or self.kind, objects.held(self.kind, spec)
        self._refuse_others(spec, path)
        cls = spec if isinstance(spec, type) else type(spec)
        if not own_name(cls) and objects.is_component(cls, self.kind):
            spec = objects.instance(spec, self.kind, path)
            cls = type(spec)
            cls.registered_name = name_of(cls)
            self._given[cls.registered_name] = cls
        ours = own_name(cls) or objects.is_component(cls, self.kind)
        if dataclasses.is_dataclass(spec) and not isinstance(spec, type) and ours:
            name = cls.registered_name
            if any(one._entries.get(name) is type(spec) for one in KINDS.values() if one != self):
                self.get(name, path)
            return rebuild(spec, path, BUILDERS)
        given, spec = spec, plain(spec)
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping):
            raise ConfigError(
                f"{path}: expected the name of {self._one} or a mapping with 'name', "
                f"got {shown(given)}.{self._advice(given)}"
            )
        if "name" not in spec:
            raise ConfigError(
                f"{path}: 'name' is missing. Known {self.kind} names: {', '.join(self.names())}."
            )
        fields = dict(spec)
        cls = self.get(plain(fields.pop("name")), f"{path}.name")
        return build(cls, fields, path, BUILDERS)

    def _refuse_others(self, spec, path: str) -> None:
        """Raises `ConfigError` for an object whose stage is another kind's."""
        stage, kinds = getattr(spec, "stage", None), STAGES
        if isinstance(spec, Mapping | str) or stage in kinds.get(self.kind, (stage,)):
            return
        for kind, stages in kinds.items():
            if stage in stages:
                other = KINDS[kind]._one
                cls = spec if isinstance(spec, type) else type(spec)
                name = getattr(spec, "registered_name", "") or cls.__name__
                raise ConfigError(f"{path} must be {self._one}, and {name!r} is {other}.")

    def _advice(self, given) -> str:
        """Advice on the value to give in place of an object, or of nothing."""
        if isinstance(given, (type(None), bool, int, float, list, tuple)):
            return _NOTHING.get(self.kind, "") if not given else ""
        name = getattr(given, "registered_name", None)
        if isinstance(given, type) and name and self._entries.get(name) is given:
            return f" Give its name, {name!r}, or an instance, {given.__name__}()."
        if self.kind == "model" and (advice := objects.advice_on_module(given)):
            return advice
        return (
            f" To use {self._one} of your own, derive its class from "
            f"{' or '.join(objects.bases_of(self.kind))} of fedjax_sec.core and give an instance, "
            f"or register it and give the name: @registry.{self.kind}s.register('NAME'), see "
            f"CONTRIBUTING.md."
        )


#: The registry of one kind of components.
datasets = Registry("dataset", "fedjax_sec.data.sources")
partitions = Registry("partition", "fedjax_sec.data.partitions")
models = Registry("model", "fedjax_sec.models")
tasks = Registry("task", "fedjax_sec.tasks")
algorithms = Registry("algorithm", "fedjax_sec.algorithms")
clients = Registry("client", "fedjax_sec.algorithms.clients")
augmentations = Registry("augmentation", "fedjax_sec.algorithms.augmentations")
attacks = Registry("attack", "fedjax_sec.attacks.data", "fedjax_sec.attacks.update")
defenses = Registry("defense", "fedjax_sec.defenses")
evasions = Registry("evasion", "fedjax_sec.attacks.evasion")
privacy_attacks = Registry("privacy_attack", "fedjax_sec.attacks.privacy")
monitors = Registry("monitor", "fedjax_sec.monitors")
evaluators = Registry("evaluator", "fedjax_sec.evaluation.evaluators")

#: kind -> its registry, in the order in which they are listed.
KINDS = {
    registry.kind: registry
    for registry in (
        datasets,
        partitions,
        models,
        tasks,
        algorithms,
        clients,
        augmentations,
        attacks,
        defenses,
        evasions,
        privacy_attacks,
        monitors,
        evaluators,
    )
}


def headlines() -> tuple[str, ...]:
    """The metrics that tasks are judged by, each once."""
    return tuple(sorted({tasks.get(name).headline for name in tasks.names()}))


def headline_in(metrics: Iterable[str]) -> str:
    """The metric of those given that a task is judged by.

    >>> headline_in(["loss", "accuracy"])
    'accuracy'
    """
    names = set(metrics)
    return next(name for name in headlines() if name in names)


def find(name: str, others: Iterable[str] = ()) -> tuple[Registry, type]:
    """The registry and class of `name`, whatever its kind.

    Raises `ConfigError` with the nearest name, also of `others`, when no kind has it.
    """
    for registry in KINDS.values():
        if name in registry.names():
            return registry, registry.get(name)
    everything = [*others, *(n for registry in KINDS.values() for n in registry.names())]
    raise ConfigError(f"Nothing is called {shown(name)}.{suggestion(name, everything)}")


def summary(cls) -> str:
    """The first line of a component's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]
