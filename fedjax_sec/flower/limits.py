"""Which experiments can be deployed: clients that are apart see their own messages alone."""

import json

from fedjax_sec.core import ConfigError
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs.config import Experiment


def check_deployable(experiment: Experiment) -> None:
    """Raises `ConfigError` for an experiment that only a simulation can run, with the reason.

    >>> check_deployable(config_lib.from_mapping({
    ...     "threat": {"num_malicious": 2}, "attack": "alie", "defense": "median"}))
    Traceback (most recent call last):
    fedjax_sec.core.fields.ConfigError: attack: 'alie' computes a malicious client's row from other
    clients' rows, and over a network each client sees its own alone; attacks whose rows stand
    alone are such as 'byzantine', 'sign_flip' and 'free_rider'. Simulate it (fedjax_sec.run).
    """
    threat = experiment.threat
    stages = experiment.attack.update_stages
    if stages and threat.knowledge == "omniscient":
        raise ConfigError(
            f"threat.knowledge: an omniscient adversary sees the messages of all clients, and over "
            f"a network each client sees its own alone, got attack "
            f"{stages[0].registered_name!r}. Simulate it (fedjax_sec.run), or choose "
            f"'corrupted'."
        )
    for stage in stages:
        if not stage.separable:
            raise ConfigError(
                f"attack: {stage.registered_name!r} computes a malicious client's row from other "
                f"clients' rows, and over a network each client sees its own alone; attacks whose "
                f"rows stand alone are such as 'byzantine', 'sign_flip' and 'free_rider'. Simulate "
                f"it (fedjax_sec.run)."
            )
    if experiment.monitors:
        names = [one.registered_name for one in experiment.monitors]
        raise ConfigError(
            f"evaluation: the monitors {names} look at messages before the attack, which reach "
            f"nobody over a network; leave them out (diagnostics: evaluation.diagnostics=false)."
        )
    algorithm = experiment.complete_algorithm
    if algorithm.personalizes and experiment.data.local_test is not None:
        raise ConfigError(
            f"data.local_test: with the algorithm {algorithm.registered_name!r} clients have "
            f"models of their own, which over a network stay with them; leave it out."
        )
    if experiment.server.dropout:
        raise ConfigError(
            f"server.dropout: over a network clients are lost by themselves, got "
            f"{experiment.server.dropout}; set it to 0."
        )
    spec_of(experiment)


def spec_of(experiment: Experiment) -> str:
    """The experiment as JSON, from which every node builds it again.

    Raises: `ConfigError` where it holds objects that were given from Python.

    >>> experiment = config_lib.from_mapping({"rounds": 3})
    >>> experiment_of(spec_of(experiment)) == experiment
    True
    """
    text = json.dumps(experiment.to_dict())
    try:
        same = experiment_of(text) == experiment
    except ConfigError:
        same = False
    if not same:
        raise ConfigError(
            "The experiment cannot be built again on a node: it holds objects that were given from "
            "Python. Name registered components instead."
        )
    return text


def experiment_of(spec: str) -> Experiment:
    """The inverse of `spec_of`."""
    return config_lib.from_mapping(json.loads(spec))
