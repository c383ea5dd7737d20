"""FedML's data, model and training sections as ours.

Facts are those of FedML's code: `data/data_loader.py` and the loaders that it calls,
`model/model_hub.py`, `ml/trainer/`, and the scripts beside the security examples.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from fedjax_sec.core import ConfigError, shown, suggestion
from fedjax_sec.fedml.arguments import Arguments


class _Users(NamedTuple):
    """A data set that comes by user: FedML overwrites `client_num_in_total` with their number.

    `batch` is the batch size that its loader takes whatever the configuration says (0: that),
    `ours` our data set's name and options where they are not FedML's.
    """

    number: int
    partition: Any
    batch: int = 0
    said: str = ""
    ours: Mapping[str, Any] = MappingProxyType({})


_USERS = {
    "femnist": _Users(
        3400,
        "natural",
        20,
        "FedML weighs a client by its numbers of batches, training and test together",
    ),
    "shakespeare": _Users(
        715,
        "natural",
        0,
        "FedML's number of roles is that of its files, 715 are TensorFlow Federated's; it numbers "
        "characters from 0",
        {"targets": "last"},
    ),
    "fed_shakespeare": _Users(715, "natural", 4, ours={"name": "shakespeare"}),
    "mnist": _Users(
        1000,
        {"name": "by_label", "shards_per_client": 2},
        0,
        "FedML's 1,000 users of two digits each, whose sizes follow a power law, are not at hand; "
        "two shards of sorted examples stand in, of equal size",
    ),
}
#: Data sets of FedML that are dealt out by `partition_method`.
_DEALT = ("cifar10", "cifar100")
#: Data sets that FedML's loader knows, and we do not.
_UNKNOWN = (
    "fed_cifar100",
    "stackoverflow_lr",
    "stackoverflow_nwp",
    "ILSVRC2012",
    "gld23k",
    "gld160k",
    "cinic10",
)
#: (model, data set or None: any) -> our model, and how it differs.
_MODELS: dict[tuple[str, str | None], tuple[Any, str]] = {
    ("lr", "mnist"): (
        "logistic_regression",
        "FedML puts a sigmoid between the linear layer and the cross-entropy",
    ),
    ("lr", "cifar10"): (
        "logistic_regression",
        "FedML puts a sigmoid between the linear layer and the cross-entropy",
    ),
    ("cnn", "mnist"): ("cnn_dropout", "FedML's has 62 outputs for the ten digits"),
    ("cnn", "femnist"): ("cnn_dropout", ""),
    ("rnn", "shakespeare"): ("fedml_rnn", ""),
    ("rnn", "fed_shakespeare"): ({"name": "fedml_rnn", "predicts": "every"}, ""),
    ("resnet20", None): ({"name": "fedml_resnet", "depth": 20}, ""),
    ("resnet56", None): ({"name": "fedml_resnet", "depth": 56, "block": "bottleneck"}, ""),
    ("lenet", None): (
        {"name": "lenet", "variant": "lenet5"},
        "FedML has it on devices only",
    ),
}


def data(args: Arguments) -> tuple[dict, int, int]:
    """(our section `data`, N, K)."""
    name = args.text("dataset")
    number = args.count("client_num_in_total", low=1)
    per_round = args.count("client_num_per_round", low=1)
    method = args.text("partition_method", "hetero")
    alpha = args.number("partition_alpha", 0.5)
    if name in _USERS:
        users = _USERS[name]
        number = _by_user(args, name, users, number)
        partition = users.partition
    elif name in _DEALT:
        partition = _partition(args, method, alpha)
    else:
        raise ConfigError(_no_data(args, name))
    if per_round > number:
        raise ConfigError(
            f"{args.at('client_num_per_round')} = {per_round} exceeds the {number} clients; FedML "
            f"stops."
        )
    if name == "cifar10":
        text = "FedML deals CIFAR-10 out by seed 10, whatever random_seed says; here by the seed"
        args.note("differs", args.at("partition_method", "data_args"), text)
    ours = {"name": name} | dict(_USERS[name].ours if name in _USERS else {})
    return ours | {"num_clients": number, "partition": partition}, number, per_round


def _by_user(args: Arguments, name: str, users: _Users, number: int) -> int:
    """N, with notes on what FedML's loader does not read."""
    if number != users.number:
        args.note(
            "idle",
            args.at("client_num_in_total"),
            f"FedML overwrites {number} with the number of users of {name}, here {users.number}",
        )
    for key in ("partition_method", "partition_alpha"):
        if key in args:
            args.note("idle", args.at(key), f"FedML deals {name} out by user")
    if users.said:
        args.note("differs", args.at("dataset"), users.said)
    return users.number


def _partition(args: Arguments, method: str, alpha: float) -> Any:
    if method == "homo":
        if "partition_alpha" in args:
            text = "partition_method 'homo' does not read it"
            args.note("idle", args.at("partition_alpha"), text)
        return "iid"
    if method == "hetero":
        return {"name": "dirichlet", "alpha": alpha, "min_examples": 10, "balanced": True}
    known = ("homo", "hetero")
    raise ConfigError(
        f"{args.at('partition_method')} must be one of {known}, got {shown(method)}: 'hetero-fix' "
        f"reads a file that FedML does not ship.{suggestion(method, known)}"
    )


def _no_data(args: Arguments, name: str) -> str:
    at, known = args.at("dataset", "data_args"), (*_DEALT, *_USERS)
    if name in _UNKNOWN:
        return f"{at}: {name} has no counterpart. Known: {', '.join(known)}."
    return (
        f"{at}: FedML's loader has no data set {shown(name)}, and reads CIFAR-10 in its place; "
        f"name that.{suggestion(name, (*known, *_UNKNOWN))} Known: {', '.join(known)}."
    )


def model(args: Arguments) -> Any:
    """Our model."""
    name, dataset = args.text("model"), args.text("dataset")
    known = _MODELS.get((name, dataset)) or _MODELS.get((name, None))
    at = args.at("model", "model_args")
    if known is None:
        others = sorted({one for one, _ in _MODELS})
        pairs = sorted(data for one, data in _MODELS if one == name and data)
        if pairs:
            raise ConfigError(
                f"{at}: FedML has no {name!r} for {dataset}, and stops; it has one for "
                f"{', '.join(pairs)}."
            )
        raise ConfigError(
            f"{at}: {shown(name)} has no counterpart.{suggestion(name, others)} Known: "
            f"{', '.join(others)}."
        )
    ours, said = known
    if said:
        args.note("differs", at, said)
    return dict(ours) if isinstance(ours, dict) else ours


def client(args: Arguments) -> dict:
    """Our section `client`."""
    size = args.count("batch_size", low=-(2**31))
    taken = _USERS[args.text("dataset")].batch if args.text("dataset") in _USERS else 0
    if taken and taken != size:
        text = f"FedML's loader of {args.text('dataset')} takes batches of {taken}"
        args.note("idle", args.at("batch_size"), text)
        size = taken
    if size <= 0:
        raise ConfigError(
            f"{args.at('batch_size')} = {size} trains on all examples at once; give a number, the "
            f"largest client's examples."
        )
    optimizer, rate = args.text("client_optimizer"), args.number("learning_rate")
    if rate is None:
        raise ConfigError(f"{args.at('learning_rate', 'train_args')} is missing; FedML stops.")
    decay = args.number("weight_decay", 0.0)
    ours = {"name": "sgd", "epochs": args.count("epochs", low=1), "batch_size": size}
    if args.text("dataset") in _DEALT:
        ours["augmentation"] = "fedml_cifar"
        args.note(
            "differs",
            args.at("batch_size"),
            "FedML leaves out a client's last batch where it is not full",
        )
    if optimizer == "sgd":
        if decay:
            args.note(
                "idle",
                args.at("weight_decay"),
                "FedML's trainer hands it to Adam only; with sgd there is none",
            )
        return ours | {"optimizer": {"name": "sgd", "learning_rate": rate}}
    if optimizer != "adam":
        text = f"FedML takes Adam for whatever is not sgd, so for {shown(optimizer)} too"
        args.note("idle", args.at("client_optimizer"), text)
    ours["optimizer"] = {"name": "amsgrad", "learning_rate": rate}
    return ours | ({"l2": decay} if decay else {})


#: Keys of the server, and the algorithms that read them.
_READERS = {
    "server_optimizer": ("FedOpt",),
    "server_lr": ("FedOpt", "SCAFFOLD"),
    "server_momentum": ("FedOpt",),
    "fedprox_mu": ("FedProx",),
}


def algorithm(args: Arguments) -> tuple[Any, dict]:
    """(our algorithm, our server optimizer or nothing)."""
    name, at = args.text("federated_optimizer", "FedAvg"), args.at("federated_optimizer")
    for key, readers in _READERS.items():
        if name not in readers and args.get(key) is not None:
            args.note("idle", args.at(key), f"{name} does not read it")
    if name == "FedAvg":
        return "fedavg", {}
    if args.text("training_type", "simulation") != "simulation":
        args.note("idle", at, f"FedML stops: its cross-silo server has FedAvg, not {name}")
    if name == "FedProx":
        return {"name": "fedprox", "mu": args.number("fedprox_mu", 0.01)}, {}
    rate = args.number("server_lr", 1.0)
    if name == "SCAFFOLD":
        args.note(
            "differs",
            at,
            "FedML returns the last client's update, not the mean, and keeps no client's variate",
        )
        return "scaffold", {"name": "sgd", "learning_rate": rate}
    if name == "FedOpt":
        if args.get("server_optimizer") is None:
            raise ConfigError(
                f"{args.at('server_optimizer', 'train_args')} is missing, which FedOpt asks for; "
                f"FedML stops."
            )
        step = {"name": args.text("server_optimizer").lower(), "learning_rate": rate}
        momentum = args.number("server_momentum", 0.0)
        if momentum and step["name"] == "sgd":
            step["momentum"] = momentum
        elif momentum:
            text = f"momentum is of sgd alone, not of {step['name']}; left out"
            args.note("missing", args.at("server_momentum"), text)
        return "fedavg", step
    known = ("FedAvg", "FedProx", "FedOpt", "SCAFFOLD")
    raise ConfigError(
        f"{at}: {shown(name)} has no counterpart.{suggestion(name, known)} Known: "
        f"{', '.join(known)}."
    )
