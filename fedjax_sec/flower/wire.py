"""Messages of Flower that carry a round's question and its answers, checked before they are read.

A node's answer is data of somebody else's: its size, names, dtypes and shapes are compared with
what was asked for before an array is read, and nothing is ever unpickled.
"""

import io
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedjax_sec.flower.exchange import Ask, Download, Leaves, Reply

#: Bytes that NumPy's header of an array may take beside its numbers.
HEADER = 4096
#: Bytes that the other fields of an answer may take for each client.
FIELDS = 4096


class Refused(ValueError):
    """An answer that cannot be used, with the reason."""


# --- Arrays -------------------------------------------------------------------------------------


def to_arrays(leaves: Sequence[np.ndarray]) -> ArrayRecord:
    """Arrays by their place in a sequence.

    >>> list(to_arrays([np.zeros(2), np.ones(())]))
    ['0', '1']
    """
    return ArrayRecord({str(i): Array(np.asarray(leaf)) for i, leaf in enumerate(leaves)})


def from_arrays(record: Mapping, wanted: Sequence[jax.ShapeDtypeStruct]) -> Leaves:
    """The arrays of `to_arrays`, which must have exactly these shapes and dtypes.

    Raises: `Refused`, before an array is read.

    >>> shapes = [jax.ShapeDtypeStruct((2,), np.float32)]
    >>> from_arrays(to_arrays([np.zeros(2, np.float32)]), shapes)
    (array([0., 0.], dtype=float32),)
    >>> from_arrays(to_arrays([np.zeros(3, np.float32)]), shapes)
    Traceback (most recent call last):
    fedjax_sec.flower.wire.Refused: array 0 is float32 (3,), not float32 (2,)
    """
    names = [str(i) for i in range(len(wanted))]
    if sorted(record) != sorted(names):
        raise Refused(f"it holds {len(record)} arrays, not {len(names)}")
    return tuple(
        read_array(record[name], want.shape, want.dtype, name)
        for name, want in zip(names, wanted, strict=True)
    )


def read_array(array: Array, shape: Sequence[int], dtype, name: str) -> np.ndarray:
    """The array, if it is of that shape and dtype, by its description and by its bytes.

    Raises: `Refused` before memory is taken for it.
    """
    shape, dtype = tuple(shape), np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if len(array.data) > size + HEADER:
        raise Refused(f"array {name} takes {len(array.data)} bytes, where {size} are due")
    if array.stype != "numpy.ndarray":
        raise Refused(f"array {name} is a {array.stype}, not a numpy.ndarray")
    said = [(array.dtype, tuple(array.shape)), _header(array.data, name)]
    for kind, sizes in said:
        if (str(kind), sizes) != (str(dtype), shape):
            raise Refused(f"array {name} is {kind} {sizes}, not {dtype} {shape}")
    try:
        return np.load(io.BytesIO(array.data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise Refused(f"array {name} cannot be read: {error}") from None


def _header(data: bytes, name: str) -> tuple[np.dtype, tuple[int, ...]]:
    """Dtype and shape that the bytes of an array in NumPy's format say."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read(stream, max_header_size=HEADER)
    except (ValueError, KeyError, EOFError) as error:
        raise Refused(f"array {name} is not in NumPy's format: {error}") from None
    return dtype, tuple(shape)


# --- Questions ----------------------------------------------------------------------------------


def to_question(ask: Ask, clients: Sequence[int], fingerprint: str) -> RecordDict:
    """A round's question to those of its clients that one node holds."""
    download = ask.download.of([ask.clients.index(client) for client in clients])
    config = ConfigRecord(
        {
            "index": ask.index,
            "clients": list(clients),
            "shared": download.shared,
            "experiment": fingerprint,
        }
    )
    return RecordDict({"round": config, "download": to_arrays(download.leaves)})


def from_question(
    content: RecordDict, wanted: Sequence[jax.ShapeDtypeStruct], fingerprint: str
) -> tuple[int, list[int], Download]:
    """(the round's number, the clients, what they get) of a question.

    `wanted` are the shapes and dtypes of one client's download.

    Raises: `Refused` where it comes from another experiment.
    """
    config = content["round"]
    if config["experiment"] != fingerprint:
        raise Refused("the server runs another experiment than this node")
    clients, shared = list(config["clients"]), config["shared"]
    rows = () if shared else (len(clients),)
    shapes = [jax.ShapeDtypeStruct((*rows, *one.shape), one.dtype) for one in wanted]
    return config["index"], clients, Download(from_arrays(content["download"], shapes), shared)


# --- Answers ------------------------------------------------------------------------------------


def to_answer(replies: Sequence[Reply], begin: float, end: float) -> RecordDict:
    """The answers of a node's clients, and when the node began and ended to work on them."""
    stacked = [np.stack(leaves) for leaves in zip(*(r.message for r in replies), strict=True)]
    names = sorted({name for reply in replies for name in reply.metrics})
    times = {"begin": [r.begin for r in replies], "end": [r.end for r in replies]}
    metrics = {f"metric/{name}": [r.metrics[name] for r in replies] for name in names}
    config = ConfigRecord(
        {
            "clients": [reply.client for reply in replies],
            "node": [begin, end],
            **times,
            **metrics,
        }
    )
    return RecordDict({"replies": config, "messages": to_arrays(stacked)})


def from_answer(
    content: RecordDict, clients: Sequence[int], wanted: Sequence[jax.ShapeDtypeStruct]
) -> tuple[list[Reply], tuple[float, float]]:
    """(the replies of exactly these clients, when the node began and ended).

    Raises: `Refused` for an answer of another form or size.
    """
    count = len(clients)
    if sorted(content) != ["messages", "replies"]:
        raise Refused(f"it holds the records {sorted(content)}, not messages and replies")
    config, arrays = content["replies"], content["messages"]
    if not isinstance(config, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise Refused("its records are of other kinds")
    if (size := config.count_bytes()) > FIELDS * (1 + count):
        raise Refused(f"its fields take {size} bytes, where {FIELDS * (1 + count)} are allowed")
    if config.get("clients") != list(clients):
        raise Refused(f"it is of the clients {config.get('clients')}, not {list(clients)}")
    names = [name for name in config if name.startswith("metric/")]
    lists = {name: _numbers(config, name, count) for name in ("begin", "end", *names)}
    begin, end = _numbers(config, "node", 2)
    stacks = from_arrays(
        arrays, [jax.ShapeDtypeStruct((count, *one.shape), one.dtype) for one in wanted]
    )
    replies = [
        Reply(
            client,
            tuple(stack[i] for stack in stacks),
            {name.removeprefix("metric/"): lists[name][i] for name in names},
            lists["begin"][i],
            lists["end"][i],
        )
        for i, client in enumerate(clients)
    ]
    return replies, (begin, end)


def _numbers(config: Mapping, name: str, count: int) -> list[float]:
    """A field with so many real numbers."""
    values = config.get(name)
    good = isinstance(values, list) and len(values) == count
    if not good or not all(isinstance(one, (int, float)) for one in values):
        raise Refused(f"its field {name!r} does not hold {count} numbers")
    return [float(one) for one in values]
