"""Name -> component class: the only mutable module-level state of the package.

A component is one file in one of the folders below, found by its import: dropping the file in is
all it takes to have it in configurations, in `fedjax-sec list` and `show`, and in the contract
tests. Modules whose names begin with an underscore are helpers and are not imported.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping

from fedjax_sec import schema
from fedjax_sec.advice import shown, suggestion
from fedjax_sec.schema import ConfigError

#: What stands for no component of a kind.
_NOTHING = {
    "attack": " null (None in Python) means no attack.",
    "defense": " Without a defence the rule is 'mean'.",
    "evasion": " null (None in Python) means none.",
}


class Registry:
    """Components of one kind, discovered in the given packages on first use."""

    def __init__(self, kind: str, *packages: str):
        self.kind = kind
        self._one = f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
        self._packages = packages
        self._entries: dict[str, type] = {}
        self._discovered = False

    def register(self, name: str):
        """Class decorator: makes a frozen dataclass pytree of the class and files it under `name`.

        Fields declared `schema.static` become part of the pytree's structure, all others leaves.
        """

        def decorate(cls):
            known = self._entries.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by {known.__module__}; "
                    f"rename one of the two."
                )
            cls = schema.pytree(cls)
            cls.registered_name = name
            self._entries[name] = cls
            return cls

        return decorate

    def _discover(self) -> None:
        if self._discovered:
            return
        for package_name in self._packages:
            package = importlib.import_module(package_name)
            for module in pkgutil.iter_modules(package.__path__):
                if not module.name.startswith("_"):
                    importlib.import_module(f"{package_name}.{module.name}")
        self._discovered = True

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted."""
        self._discover()
        return tuple(sorted(self._entries))

    def get(self, name: str, path: str = "") -> type:
        """The class registered as `name`, or a `ConfigError` that suggests the nearest name."""
        at = f"{path}: " if path else ""
        if not isinstance(name, str):
            raise ConfigError(f"{at}the name of {self._one} is text, got {shown(name)}.")
        if name not in self.names():
            advice = _NOTHING.get(self.kind, "") if name.lower() in ("none", "null", "no") else ""
            raise ConfigError(
                f"{at}unknown {self.kind} {shown(name)}.{advice or suggestion(name, self.names())} "
                f"Known: {', '.join(self.names())}."
            )
        return self._entries[name]

    def build(self, spec, path: str = ""):
        """Builds a component from its name or from a mapping with `name` and fields.

        >>> defenses.build({"name": "krum", "num_byzantine": 2}).num_byzantine
        2
        """
        path = path or self.kind
        if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
            self.get(getattr(spec, "registered_name", type(spec).__name__), path)
            return schema.rebuild(spec, path, builders())
        spec = schema.plain(spec)
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping):
            advice = _NOTHING.get(self.kind, "") if not spec else ""
            raise ConfigError(
                f"{path}: expected the name of {self._one} or a mapping with 'name', "
                f"got {shown(spec)}.{advice}"
            )
        if "name" not in spec:
            raise ConfigError(
                f"{path}: 'name' is missing. Known {self.kind} names: {', '.join(self.names())}."
            )
        fields = dict(spec)
        cls = self.get(schema.plain(fields.pop("name")), f"{path}.name")
        return schema.build(cls, fields, path, builders())


datasets = Registry("dataset", "fedjax_sec.datasets")
partitions = Registry("partition", "fedjax_sec.partitions")
models = Registry("model", "fedjax_sec.models")
clients = Registry("client", "fedjax_sec.clients")
attacks = Registry("attack", "fedjax_sec.attacks.data", "fedjax_sec.attacks.update")
defenses = Registry("defense", "fedjax_sec.defenses")
evasions = Registry("evasion", "fedjax_sec.attacks.evasion")

KINDS = {
    registry.kind: registry
    for registry in (datasets, partitions, models, clients, attacks, defenses, evasions)
}


def builders() -> dict:
    """kind -> function that builds a component of that kind from its specification."""
    # Optimizers are optax's own, pipelines are lists: neither is a registry.
    from fedjax_sec import optimizers, pipeline

    return {kind: registry.build for kind, registry in KINDS.items()} | {
        "optimizer": optimizers.build,
        "attack pipeline": pipeline.Attack.build,
        "defense pipeline": pipeline.Defense.build,
    }


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
    return inspect.getdoc(cls).splitlines()[0]
