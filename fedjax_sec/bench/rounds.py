"""Whole rounds: ours, PyTorch's (a loop, vmap) with ByzFL's rules, and the limit by arithmetic."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from fedjax_sec.bench import peers
from fedjax_sec.bench.busy import busy_share
from fedjax_sec.bench.timing import Case, Rates, compiling_anew, take_turns
from fedjax_sec.core import value_of
from fedjax_sec.ops.backend import on_cpu
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs.execution import choose_layout
from fedjax_sec.runs.prepare import Prepared, make_replicas, prepare
from fedjax_sec.runs.program import Program


def _resnet20() -> tuple[int, int]:
    """ResNet20 on 32 x 32 images: the first layer's and all layers' multiplications."""
    first = 32**2 * 9 * 3 * 16
    every, channels = first, 16
    for width, places in ((16, 32**2), (32, 16**2), (64, 8**2)):
        every += places * width * (9 * channels + 5 * 9 * width)
        every += places * width * channels * (width != channels)  # the shortcut
        channels = width
    return first, every + 64 * 10


#: Multiplications of one image's forward pass: the first layer's, and all layers'.
PRODUCTS = {
    "fedml_resnet": _resnet20(),
    "mlp": (784 * 100, 784 * 100 + 100 * 10),
    "fltrust_cnn": (26**2 * 9 * 30, 26**2 * 9 * 30 + 11**2 * 270 * 50 + 1250 * 100 + 100 * 10),
    "rlr_cnn": (26**2 * 9 * 32, 26**2 * 9 * 32 + 24**2 * 288 * 64 + 9216 * 128 + 128 * 10),
}
#: Replicas of a run that trains so long that everything pays which makes its rounds faster.
FOR_LONG = 10**9
#: The same rounds in PyTorch: one client after another, and all side by side by `torch.func.vmap`.
PEERS = ("PyTorch loop", "PyTorch vmap")
ALIE = {"name": "alie", "z": 1.5}
DEFENSES = {
    "mean": {"name": "mean", "weighted": False},
    "median": {"name": "median"},
    "trimmed mean": {"name": "trimmed_mean"},
    "Krum": {"name": "krum"},
    "Bulyan": {"name": "bulyan"},
}
PGD = {"eps": 0.3, "step_size": 0.01, "pgd_steps": 40, "fraction": 0.5}


class Workload(NamedTuple):
    """A round to time: our configuration, rounds in one timed call, and what it must compute."""

    experiment: dict
    rounds: int
    images: int  # forward and backward passes of the weights
    attacked: int = 0  # forward and backward passes of inputs alone
    peers: bool = True  # whether the PyTorch loop has this network and attack


def workloads(data_dir: str | None = None) -> dict[str, Workload]:
    """All benchmarked rounds by name."""
    data = {"data_dir": data_dir} if data_dir else {}
    threat = {"num_malicious": 12, "placement": "first"}
    momentum = {"name": "sgd", "learning_rate": 1.0, "momentum": 0.9}
    known = {}
    for attack_name, attack in (("no attack", None), ("ALIE", ALIE)):
        for name, defense in DEFENSES.items():
            needs_f = {} if name in ("mean", "median") else {"num_byzantine": 12}
            known[f"ALIE MNIST, {attack_name}, {name}"] = Workload(
                {
                    "data": {"name": "mnist", "num_clients": 51, **data},
                    "model": "mlp",
                    "client": {"name": "sgd", "steps": 1, "batch_size": 83, "l2": 1e-4},
                    "server": {"optimizer": momentum},
                    "threat": threat if attack else {},
                    "attack": attack,
                    "defense": defense | needs_f,
                },
                15,
                51 * 83,
            )
    for name in ("mean", "median", "Krum"):
        needs_f = {"num_byzantine": 20} if name == "Krum" else {}
        known[f"FLTrust CNN, {name}"] = Workload(
            {
                "data": {"name": "fashion_mnist", "num_clients": 100, **data},
                "model": "fltrust_cnn",
                "client": {"name": "sgd", "steps": 1, "batch_size": 32},
                "defense": DEFENSES[name] | needs_f,
            },
            2,
            100 * 32,
        )
    known["PGD-40 CNN, mean"] = Workload(
        {
            "data": {"name": "fashion_mnist", "num_clients": 51, **data},
            "model": "fltrust_cnn",
            "client": {"name": "adversarial", "steps": 1, "batch_size": 64, **PGD},
            "defense": DEFENSES["mean"],
        },
        1,
        51 * 64,
        51 * 32 * PGD["pgd_steps"],
    )
    known["RLR Fashion-MNIST, mean"] = Workload(
        {
            "data": {"name": "fashion_mnist", "num_clients": 10, **data},
            "model": "rlr_cnn",
            "client": {
                "name": "sgd",
                "epochs": 2,
                "batch_size": 256,
                "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
            },
            "defense": DEFENSES["mean"],
        },
        1,
        2 * 60_000,
    )
    known["FedSecurity Exp 1, random, mean"] = Workload(
        {
            "data": {
                "name": "cifar10",
                "num_clients": 10,
                "partition": {"name": "dirichlet", "alpha": 0.5, "balanced": True},
                "max_train": 2_000,
                "max_test": 1_000,
                **data,
            },
            "model": {"name": "fedml_resnet", "depth": 20},
            "client": {
                "name": "sgd",
                "epochs": 1,
                "batch_size": 10,
                "optimizer": {"name": "sgd", "learning_rate": 0.03},
                "augmentation": "fedml_cifar",
            },
            "threat": {"num_malicious": 1, "redraw": True},
            "attack": {"name": "byzantine", "mode": "random"},
            "defense": "mean",
        },
        1,
        2_000,
        peers=False,
    )
    return known


def products(workload: Workload) -> tuple[int, int]:
    """The multiplications of the workload's network for one image."""
    model = workload.experiment["model"]
    return PRODUCTS[model if isinstance(model, str) else model["name"]]


def flops(name: str, workload: Workload) -> float:
    """Operations that nobody can avoid: per image a forward pass, the weights' gradients, and the
    inputs' gradients of all layers but the first; for PGD, of all layers, without the weights'.

    >>> round(flops("", Workload({"model": "mlp"}, 1, images=1)) / 79_400, 2)
    4.03
    """
    first, every = products(workload)
    return 2 * (workload.images * (3 * every - first) + workload.attacked * 2 * every)


def run(
    rates: Rates,
    only: Sequence[str] = (),
    repeats: int = 5,
    data_dir: str | None = None,
    with_peers: bool = True,
    at_most: float = 60.0,
) -> Iterator[dict]:
    """One row a workload: rounds per second, ratios, compile seconds, memory."""
    for name, workload in workloads(data_dir).items():
        if not only or any(word in name for word in only):
            yield _row(name, workload, rates, repeats, with_peers, at_most)


def lasting_program(prepared: Sequence[Prepared]) -> Program:
    """The program of experiments as if they trained for long: layout measured, XLA's own level."""
    tuning = choose_layout(prepared[0], replicas=FOR_LONG)
    return Program(prepared[0], tuning=tuning).compile(prepared)


def _row(name, workload, rates, repeats, with_peers, at_most) -> dict:
    rounds = workload.rounds
    changes = {"rounds": rounds, "evaluation.every": rounds, "evaluation.diagnostics": False}
    experiment = config_lib.from_mapping(workload.experiment, changes)
    prepared = prepare(experiment)
    with compiling_anew():
        program = lasting_program([prepared])
    replicas = make_replicas([prepared])
    state = program.init(replicas)

    def ours():
        nonlocal state
        state, _ = program.advance(state, replicas, 0, rounds)
        jax.block_until_ready(state)

    cases = [Case("ours", ours)]
    with_peers = with_peers and workload.peers
    for peer in PEERS if with_peers else ():
        if (theirs := torch_round(experiment, program, peer)) is not None:
            cases.append(Case(peer, lambda theirs=theirs: [theirs() for _ in range(rounds)]))
    timings = take_turns(cases, repeats, at_most)
    seconds = timings["ours"].median / rounds
    limit = rates.seconds(flops(name, workload), 0.0)
    memory = program.compiled[f"advance {rounds}"]
    row = {
        "round": name,
        "ours rounds/s": 1 / seconds,
        "ours ms": 1e3 * seconds,
        "fastest ms": 1e3 * timings["ours"].fastest / rounds,
        "slowest ms": 1e3 * timings["ours"].slowest / rounds,
        "limit ms": 1e3 * limit,
        "times the limit": seconds / limit,
        "compile s": program.compile_seconds,
        "temporary MiB": memory.get("temporary_bytes", 0) / 2**20,
        "arguments MiB": memory.get("argument_bytes", 0) / 2**20,
        "computed as": str(program.tuning.choice),
        "ways ms": program.tuning.milliseconds,
    }
    row |= {} if on_cpu() else busy_share(ours)
    for peer in PEERS:
        if peer in timings:
            theirs_seconds = timings[peer].median / rounds
            row[f"{peer} ms"] = 1e3 * theirs_seconds
            row[f"faster than {peer}"] = theirs_seconds / seconds
    return row


def torch_round(experiment, program, peer: str = "PyTorch loop") -> Callable | None:
    """One round of a peer on the same data; None where it or ByzFL's rule is missing.

    It leaves out the server's momentum and the L2 term, which only spares it work.
    """
    if peers.missing():
        return None
    (stage,) = experiment.defense.stages
    f = value_of(stage, "num_byzantine") or 0
    known = peers.byzfl_aggregators(f, 3, 100.0)
    if stage.registered_name not in known:
        return None
    from fedjax_sec.bench import torch_loop

    population = program.prepared.population
    client = experiment.client
    optimizer = client.optimizer.dump_spec()
    attack = None
    if experiment.attack.stages:
        attack = torch_loop.alie(experiment.threat.num_malicious, experiment.attack.stages[0].z)
    pgd = None
    if client.registered_name == "adversarial":
        names = ("fraction", "eps", "step_size", "pgd_steps", "random_start")
        pgd = {name: getattr(client, name) for name in names}
    kinds = {"PyTorch loop": torch_loop.Simulator, "PyTorch vmap": torch_loop.Vectorised}
    simulator = kinds[peer](
        torch_loop.network(experiment.model.registered_name),
        program.source.x_train,
        program.source.y_train,
        [row[:count] for row, count in zip(population.index, population.counts, strict=True)],
        batch_size=client.batch_size,
        steps=client.steps,
        epochs=client.epochs,
        learning_rate=optimizer["learning_rate"],
        momentum=optimizer.get("momentum") or 0.0,
        aggregate=known[stage.registered_name],
        attack=attack,
        pgd=pgd,
        mean=program.source.mean[0],
        std=program.source.std[0],
        device="cuda" if jax.default_backend() == "gpu" else "cpu",
    )
    return simulator.round
