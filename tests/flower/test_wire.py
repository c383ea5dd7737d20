"""Answers of nodes are checked before they are read; nothing is unpickled."""

import io

import jax
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedjax_sec.flower import wire
from fedjax_sec.flower.exchange import Ask, Download, Reply

WANTED = (
    jax.ShapeDtypeStruct((3,), np.dtype("float32")),
    jax.ShapeDtypeStruct((), np.dtype("float32")),
)


def reply(client, value=1.0):
    message = (np.full(3, value, np.float32), np.float32(7))
    return Reply(client, message, {"train_loss": 0.5, "attacked": 0.0}, 10.0, 11.0)


def answer(clients=(4, 9), value=1.0):
    return wire.to_answer([reply(client, value) for client in clients], 9.0, 12.0)


def read(content, clients=(4, 9)):
    return wire.from_answer(content, list(clients), WANTED)


def saved(value, **options):
    stream = io.BytesIO()
    np.save(stream, value, **options)
    return stream.getvalue()


def test_an_answer_comes_back_as_it_was():
    replies, worked = read(answer())
    assert worked == (9.0, 12.0) and [one.client for one in replies] == [4, 9]
    for one in replies:
        assert one.metrics == {"train_loss": 0.5, "attacked": 0.0}
        assert (one.begin, one.end) == (10.0, 11.0)
        np.testing.assert_array_equal(one.message[0], np.ones(3, np.float32))
        assert one.message[1] == 7 and one.message[0].dtype == np.float32


def test_nan_is_no_reason_to_refuse():
    assert np.isnan(read(answer(value=np.nan))[0][0].message[0]).all()


@pytest.mark.parametrize("shared", [True, False])
def test_a_question_comes_back_as_it_was(shared):
    leaf = np.arange(3.0, dtype=np.float32) if shared else np.arange(9.0, dtype=np.float32)
    leaves = (leaf if shared else leaf.reshape(3, 3),)
    ask = Ask(5, (2, 4, 9), Download(leaves, shared), WANTED)
    content = wire.to_question(ask, [4, 9], "print")
    index, clients, download = wire.from_question(content, WANTED[:1], "print")
    assert (index, clients) == (5, [4, 9])
    for place in range(2):
        wanted = leaf if shared else leaf.reshape(3, 3)[place + 1]
        np.testing.assert_array_equal(download.row(place)[0], wanted)
    with pytest.raises(wire.Refused, match="another experiment"):
        wire.from_question(content, WANTED[:1], "other")


def with_array(array, name="0"):
    content = answer()
    content["messages"] = ArrayRecord(dict(content["messages"]) | {name: array})
    return content


def lying(dtype, shape, data):
    return Array(dtype, shape, "numpy.ndarray", data)


GOOD = np.ones((2, 3), np.float32)
BOMB = saved(GOOD).replace(b"(2, 3)", b"(2, 9)")  # the header promises more than there is


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: with_array(Array(np.ones((2, 4), np.float32))), r"float32 \(2, 4\), not float32"),
        (lambda: with_array(Array(np.ones((2, 3), np.float64))), r"float64 \(2, 3\), not float32"),
        (lambda: with_array(Array(np.ones((2, 90000), np.float32))), "takes 720128 bytes"),
        (lambda: with_array(lying("float32", (2, 3), saved(GOOD * 1.0))), None),
        (lambda: with_array(lying("float32", (2, 3), saved(GOOD.T))), r"float32 \(3, 2\), not"),
        (lambda: with_array(lying("float32", (2, 3), BOMB)), r"float32 \(2, 9\), not float32"),
        (lambda: with_array(lying("float32", (2, 3), saved(GOOD)[:-4])), "cannot be read"),
        (lambda: with_array(lying("float32", (2, 3), b"PK\x03\x04")), "NumPy's format"),
        (
            lambda: with_array(
                lying("float32", (2, 3), saved(np.array([{}], object), allow_pickle=True))
            ),
            r"object \(1,\), not float32",
        ),
        (
            lambda: with_array(Array("float32", (2, 3), "torch.tensor", saved(GOOD))),
            "torch.tensor, not a numpy.ndarray",
        ),
        (lambda: with_array(Array(GOOD), "2"), "3 arrays, not 2"),
        (lambda: answer((4,)), r"of the clients \[4\], not \[4, 9\]"),
        (lambda: answer((9, 4)), r"of the clients \[9, 4\], not \[4, 9\]"),
        (lambda: RecordDict({"messages": answer()["messages"]}), "not messages and replies"),
        (lambda: changed(begin=[1.0]), "'begin' does not hold 2 numbers"),
        (lambda: changed(begin=["a", "b"]), "'begin' does not hold 2 numbers"),
        (lambda: changed(more=b"0" * 100000), "fields take 100"),
    ],
)
def test_other_forms_are_refused(content, message):
    if message is None:
        assert len(read(content())[0]) == 2
        return
    with pytest.raises(wire.Refused, match=message):
        read(content())


def changed(**fields):
    content = answer()
    content["replies"] = ConfigRecord(dict(content["replies"]) | fields)
    return content
