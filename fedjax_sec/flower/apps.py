"""The two halves of an experiment's Flower app."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedjax_sec.core import ConfigError
from fedjax_sec.core.host import undisturbed
from fedjax_sec.flower import wire
from fedjax_sec.flower.clients import Clients
from fedjax_sec.flower.limits import experiment_of
from fedjax_sec.flower.network import GridNetwork
from fedjax_sec.flower.rounds import Deployed
from fedjax_sec.flower.trace import Journal
from fedjax_sec.runs.config import Experiment, from_mapping
from fedjax_sec.runs.experiment import execute
from fedjax_sec.runs.prepare import prepare

#: The folder of the results within an app's `out`.
RUN = "run"


def _experiment(context: Context) -> Experiment:
    """The app's experiment, its data where the node's `data-dir` says, if it does."""
    experiment = experiment_of(str(context.run_config["experiment"]))
    folder = context.node_config.get("data-dir") or context.run_config.get("data-dir")
    if not folder:
        return experiment
    return from_mapping(experiment.to_dict(), {"data.data_dir": str(folder)})


def held_by(context: Context, num_clients: int) -> list[int]:
    """The clients that a node holds: its share, by its `partition-id` of `num-partitions`.

    Raises: `ConfigError` where the node's configuration does not say it, or the share is empty.
    """
    config = context.node_config
    try:
        number, parts = int(config["partition-id"]), int(config["num-partitions"])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            "node-config needs partition-id and num-partitions, such as "
            "'partition-id=0 num-partitions=5': which of how many equal shares of the clients the "
            "node holds."
        ) from None
    if not 0 <= number < parts <= num_clients:
        raise ConfigError(
            f"node-config: partition-id must be in 0 .. num-partitions - 1, and num-partitions at "
            f"most the {num_clients} clients, got {number} of {parts}."
        )
    return np.array_split(np.arange(num_clients), parts)[number].tolist()


def client_app(mods: Sequence[Callable] = ()) -> ClientApp:
    """The app of a node: its clients train as ours do, and the malicious ones attack.

    Which clients it holds its `node-config` says, `partition-id` and `num-partitions`; where its
    data lies, `data-dir`. A client's memory stays in the node's context. Errors are sent to the
    server, which goes on without the node's clients. `mods` are Flower's modifiers of messages.
    """
    app = ClientApp(mods=list(mods))

    @app.query()
    def query(message: Message, context: Context) -> Message:
        experiment = _experiment(context)
        clients = held_by(context, experiment.data.num_clients)
        content = RecordDict({"clients": ConfigRecord({"clients": clients})})
        return Message(content, reply_to=message)

    @app.train()
    @undisturbed
    def train(message: Message, context: Context) -> Message:
        begin, experiment = time.time(), _experiment(context)
        clients = Clients(prepare(experiment))
        wanted = jax.tree.leaves(clients.form)
        question = wire.from_question(message.content, wanted, experiment.fingerprint())
        index, numbers, download = question
        held, replies = held_by(context, experiment.data.num_clients), []
        for place, number in enumerate(numbers):
            if number not in held:
                raise ConfigError(f"client {number} is not this node's, which holds {held}.")
            name = f"client-{number}"
            before = context.state.get(name)
            memory = None if before is None else tuple(one.numpy() for one in before.values())
            reply, memory = clients.train(number, index, download.row(place), memory)
            if memory:
                context.state[name] = wire.to_arrays(memory)
            replies.append(reply)
        return Message(wire.to_answer(replies, begin, time.time()), reply_to=message)

    return app


def server_app() -> ServerApp:
    """The app of the server: the experiment's rounds over the network, its results in `out`/run.

    The run's configuration holds the `experiment`, `out`, `timeout` (seconds that a round waits),
    `quorum` (the smallest number of clients of a round; 0: the defence's bound), `resume` and
    `overwrite`.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config, experiment = context.run_config, _experiment(context)
        out = Path(str(config["out"]))
        logging.getLogger("fedjax_sec").setLevel(logging.INFO)

        def make(prepared):
            network = GridNetwork(
                grid,
                experiment.fingerprint(),
                experiment.data.num_clients,
                float(config["timeout"]),
                Journal(out, anew=bool(config["overwrite"])),
            )
            return Deployed(prepared, network, int(config["quorum"]) or None)

        execute(
            experiment,
            out=out / RUN,
            resume=bool(config["resume"]),
            overwrite=bool(config["overwrite"]),
            make_program=make,
        )

    return app
