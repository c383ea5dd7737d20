"""`check_component`: the whole contract for one class, whoever wrote it and wherever it lies."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from fedjax_sec.core import ConfigError, Setting, fill_defaults, pytree, registry
from fedjax_sec.core.components import BASES, STAGES, with_defaults
from fedjax_sec.testing import (
    augmentations,
    clients,
    data_attacks,
    defenses,
    fields,
    local_defenses,
    looking,
    materials,
    update_attacks,
)
from fedjax_sec.testing.worlds import kinds_of

#: Checks of how a component is compiled, on which the kind of input has no influence.
_ONCE = (
    clients.check_client_over_clients,
    clients.check_client_hooks,
    clients.check_client_fields,
    clients.check_algorithm_hooks,
    clients.check_algorithm_fields,
    augmentations.check_augmentation_fields,
)


def kind_of(cls: type) -> str:
    """The kind of a class: where it is registered, else by its base class or its `stage`."""
    for kind, known in registry.KINDS.items():
        if known.holds(cls):
            return kind
    for kind, base in BASES.items():
        bases = tuple(base.values()) if isinstance(base, dict) else (base,)
        if issubclass(cls, bases):
            return kind
    for kind, stages in STAGES.items():
        if vars(cls).get("stage") in stages:
            return kind
    raise ConfigError(
        f"{cls.__name__}: of what kind it is cannot be seen; derive it from a base class of "
        f"fedjax_sec.core, such as Stage or UpdateAttack, or say kind: {', '.join(registry.KINDS)}."
    )


@contextlib.contextmanager
def _registered(cls: type, kind: str) -> Iterator[tuple[registry.Registry, type]]:
    """The registry of the class, which knows it until the end at least."""
    known = registry.KINDS[kind]
    if known.holds(cls):
        yield known, cls
        return
    if "__dataclass_params__" not in vars(cls):
        cls = pytree(cls)
    cls = with_defaults(cls, kind)
    with known.lent(cls):
        yield known, cls


def checks_of(part, kind: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, check) of everything that the contract asks of one built component.

    Checks on inputs run on every kind of input that the component works on.
    """
    if kind == "defense":
        for check in local_defenses.CHECKS if part.stage == "client" else defenses.CHECKS:
            yield check.__name__, lambda check=check: check(part)
        return
    if kind == "attack" and part.stage == "update":
        for check in update_attacks.CHECKS:
            yield check.__name__, lambda check=check: check(part)
        return
    if kind == "dataset":
        yield "check_dataset", lambda: materials.check_dataset(part)
        return
    if kind == "partition":
        yield "check_partitioner", lambda: materials.check_partitioner(part)
        return
    checks: dict[str, tuple] = {
        "attack": data_attacks.CHECKS,
        "client": clients.CLIENT_CHECKS,
        "augmentation": augmentations.CHECKS,
        "algorithm": clients.ALGORITHM_CHECKS,
        "task": clients.TASK_CHECKS,
        "model": materials.MODEL_CHECKS,
        "evasion": (looking.check_evasion,),
        "monitor": (looking.check_monitor,),
        "evaluator": (looking.check_evaluator,),
        "privacy_attack": (looking.check_privacy_attack,),
    }
    for number, inputs in enumerate(kinds_of(part)):
        for check in checks[kind]:
            if number > 0 and check in _ONCE:
                continue
            yield f"{check.__name__} on {inputs}", lambda c=check, i=inputs: c(part, i)


def variants_of(base, kind: str) -> list:
    """The variants of a component on which the contract is checked."""
    setting = Setting(defenses.CLIENTS, fields.BYZANTINE)
    if kind == "client" and {"steps", "epochs", "batch_size"} <= _names(base):
        few = dataclasses.replace(base, batch_size=4, steps=None, epochs=None)
        changes: tuple[dict, ...] = ({"steps": 1}, {"steps": 3}, {"epochs": 2})
        if "sampling" in _names(base):
            changes += ({"steps": 2, "sampling": "uniform"},)
        return [dataclasses.replace(few, **one) for one in changes]
    if kind == "model":  # choices change no more than the initial values, or rounding
        return [materials.shallow(base)]
    if kind in ("dataset", "partition"):
        return [base]
    return fields.variants(base, setting, every_pair=kind != "attack")


def _names(part) -> set[str]:
    return {field.name for field in dataclasses.fields(part)}


def check_component(
    component: Any, kind: str | None = None, *, choices: bool = True, described: bool = True
) -> None:
    """Raises `AssertionError` unless the component keeps the contract of its kind.

    Args:
      component: a class, registered or not, also one that was typed into a notebook; or an
        instance, where some field has no default. A class without a base class gets its kind's
        defaults, as `register` gives them.
      kind: `attack`, `defense`, ..., where neither registry, base class nor `stage` tells.
      choices: whether to check every choice of the static fields, or the component as it comes.
      described: whether its docstring must name a source and show an example, as those of the
        package; not for a first draft in a notebook.

    What is checked: description, ranges and the gate of its fields, and all that the guide on
    extending says of its kind, with every choice of its static fields that its `check` accepts, on
    every kind of input that it declares in `inputs`, with jit and without it.

    >>> from fedjax_sec.core import registry
    >>> check_component(registry.defenses.get("median"))
    """
    cls = component if isinstance(component, type) else type(component)
    kind = kind_of(cls) if kind is None else kind
    if kind not in registry.KINDS:
        raise ConfigError(f"kind must be one of {', '.join(registry.KINDS)}, got {kind!r}.")
    with _registered(cls, kind) as (known, cls):
        name = cls.registered_name
        if described:
            with _named(name, "check_described"):
                fields.check_described(cls)
        with _named(name, "check_ends"):
            fields.check_ends(cls)
        base = known.build(name) if isinstance(component, type) else component
        base = fill_defaults(base, {"num_malicious": fields.BYZANTINE})
        with _named(name, "check_gate"):
            fields.check_gate(known, base)
        some = slice(None) if choices else slice(1)
        for part in fields.variants(base, Setting(defenses.CLIENTS, fields.BYZANTINE))[some]:
            with _named(name, "check_round_trip"):
                fields.check_round_trip(known, part)
        parts = variants_of(base, kind)[some]
        if not parts:
            raise AssertionError(f"{name}: its check refuses {defenses.CLIENTS} clients")
        for part in parts:
            for title, check in checks_of(part, kind):
                with _named(_label(part), title):
                    check()
        if kind == "defense":
            few = fill_defaults(
                known.build(name) if isinstance(component, type) else component,
                {"num_malicious": 1},
            )
            with _named(name, "check_merged_rows"):
                defenses.check_merged_rows(few)
        if kind == "attack" and base.stage == "update":
            for outer, field in update_attacks.fields_for_attacks(base):
                with _named(name, f"check_wrapped in {field}"):
                    for inner in ("scaling", {"name": "lazy_worker", "base": "client"}):
                        part = registry.attacks.build(inner)
                        update_attacks.check_wrapped(outer, field, part)


@contextlib.contextmanager
def _named(name: str, check: str) -> Iterator[None]:
    """Failures say which component failed which check."""
    try:
        yield
    except (AssertionError, TypeError, ValueError, NotImplementedError, KeyError) as error:
        said = str(error) or type(error).__name__
        raise AssertionError(f"{name}, {check}: {said}") from error


def _label(part) -> str:
    """The component's name with its choices."""
    values = [str(v) for v in vars(part).values() if isinstance(v, (str, bool))]
    return "-".join([part.registered_name, *values])
