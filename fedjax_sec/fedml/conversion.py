"""A configuration of FedML's FedSecurity as one of ours."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_sec.core import ConfigError, shown, suggestion
from fedjax_sec.core.yaml import parse, read_text
from fedjax_sec.fedml import security, training
from fedjax_sec.fedml.arguments import KINDS, Arguments, Note
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs.config import Experiment

#: Sections and further keys that say where and how FedML runs. They change no result.
_PLACE_SECTIONS = ("environment_args", "device_args", "comm_args", "tracking_args")
_PLACES = (
    "using_mlops",
    "config_version",
    "scenario",
    "model_file_cache_folder",
    "global_model_file_path",
    "client_id_list",
    "ci",
)
#: Keys of trainers that FedML does not run for the data sets that have a counterpart.
_OTHERS = {
    "lr": "FedML reads it for stackoverflow_lr only",
    "wd": "FedML reads it for stackoverflow_lr only",
}
#: Parts that a key of their own switches on.
_SECTIONS = {
    "privacy": "enable_dp",
    "encryption": "enable_fhe",
    "contribution": "enable_contribution",
}


class Converted(NamedTuple):
    """A configuration of ours as a mapping, and a note for each key that needs one."""

    spec: dict
    notes: tuple[Note, ...]

    def experiment(self) -> Experiment:
        """The experiment, checked. Raises `ConfigError` where our checks refuse it."""
        return config_lib.from_mapping(self.spec)

    def lines(self) -> list[str]:
        """The notes below their headings, one a line."""
        lines = []
        for kind, heading in KINDS.items():
            notes = [note for note in self.notes if note.kind == kind]
            if kind == "place" and notes:
                lines += [f"{heading}: {', '.join(note.key for note in notes)}."]
            elif notes:
                lines += [f"{heading}:", *(f"- {note}." for note in notes)]
        return lines

    def to_yaml(self, source: str = "") -> str:
        """A configuration file that opens with the notes as a comment."""
        begin = f"Made of {source} by `fedjax-sec import-fedml`." if source else ""
        comment = []
        for line in [begin, *self.lines()] if begin else self.lines():
            indent = "  " if line.startswith("-") else ""
            comment += textwrap.wrap(line, 96, subsequent_indent=indent, break_on_hyphens=False)
        head = "".join(f"# {line}\n" for line in comment)
        return head + config_lib.dump_yaml(self.spec)


def convert(
    config: str | Path | Mapping[str, Any], *, convention: str = "fedsecurity"
) -> Converted:
    """A FedSecurity configuration as one of ours, with notes on every key that is not the same.

    Args:
      config: a YAML file of FedML, or its sections as a mapping: `common_args`, `data_args`,
        `model_args`, `train_args`, `validation_args`, `attack_args`, `defense_args` and others. As
        in FedML, keys are read whatever their section, and of a key given twice the last.
      convention: `fedsecurity` gives rules as FedML computes them where ours have that convention,
        `paper` as their papers do.

    Attacks and defences are those that the configuration asks for, also where FedML would do
    nothing with them, which a note says.

    Raises: `ConfigError` for a data set, a model or an optimizer that has no counterpart, and for
    values with which FedML stops. The result is not checked; `Converted.experiment` does.

    >>> config = {
    ...     "data_args": {"dataset": "cifar10", "partition_method": "homo"},
    ...     "model_args": {"model": "lr"},
    ...     "train_args": {
    ...         "client_num_in_total": 4, "client_num_per_round": 4, "comm_round": 10,
    ...         "epochs": 1, "batch_size": 10, "client_optimizer": "sgd", "learning_rate": 0.03,
    ...     },
    ...     "defense_args": {"enable_defense": True, "defense_type": "wise_median"},
    ... }
    >>> result = convert(config)
    >>> result.spec["defense"], result.spec["rounds"]
    ({'name': 'median', 'middle': 'lower'}, 10)
    """
    if convention not in security.CONVENTIONS:
        raise ConfigError(
            f"convention must be one of {security.CONVENTIONS}, got {shown(convention)}."
            f"{suggestion(convention, security.CONVENTIONS) if isinstance(convention, str) else ''}"
        )
    source = ""
    if not isinstance(config, Mapping):
        source = str(config)
        config = parse(read_text(config), source)
    args = Arguments(config, source)
    data, registered, clients = training.data(args)
    algorithm, step = training.algorithm(args)
    spec: dict[str, Any] = {
        "data": data,
        "model": training.model(args),
        "client": training.client(args),
    }
    if algorithm != "fedavg":
        spec["algorithm"] = algorithm
    server = {"clients_per_round": clients} if clients < registered else {}
    if server or step:
        spec["server"] = server | ({"optimizer": step} if step else {})
    place = security.place_of(args, clients, registered, convention == "fedsecurity")
    attack, threat = security.attack(args, place)
    if threat:
        spec["threat"] = threat
    spec |= {"attack": attack, "defense": security.defense(args, place)}
    rounds = args.count("comm_round", low=1)
    spec["evaluation"] = {"every": args.count("frequency_of_the_test", 1, low=1)}
    spec |= {"rounds": rounds, "seed": args.count("random_seed", 0)}
    _note_rest(args)
    return Converted(spec, tuple(args.notes))


def _note_rest(args: Arguments) -> None:
    """A note for every key that nobody has read."""
    security.mark_rest(args)
    for what, key in _SECTIONS.items():
        if args.get(key, False):
            args.note("missing", args.at(key), f"{what} of FedML's has no counterpart")
    if "data_cache_dir" in args:
        args.get("data_cache_dir")
        args.note("place", f"{args.at('data_cache_dir')} (ours is --data-dir)", "")
    for key in args.unread():
        args.get(key)
        if key in _PLACES or args.at(key).startswith(_PLACE_SECTIONS):
            args.note("place", args.at(key), "")
        elif key in _OTHERS:
            args.note("idle", args.at(key), _OTHERS[key])
        else:
            args.note("missing", args.at(key), "a key that we do not know")
