"""SuperNodes on this machine: the same numbers as a simulation, faults, TLS and authentication.

Every round starts a Python process on each node, so that these tests take minutes.
"""

import datetime
import ipaddress
import subprocess
import time

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import fedjax_sec
from fedjax_sec.flower import deploy, write_app
from fedjax_sec.flower.folder import PACKAGE
from fedjax_sec.flower.loopback import processes
from fedjax_sec.flower.trace import read_journal
from fedjax_sec.runs.experiment import read_result
from fedjax_sec.runs.results import RunFolder

BASE = {
    "data": {"name": "digits", "num_clients": 5},
    "model": "logistic_regression",
    "threat": {"num_malicious": 1},
    "attack": "sign_flip",
    "defense": "median",
    "evaluation": {"every": 1, "diagnostics": False},
    "rounds": 2,
}

#: A node's app whose modifier of messages does harm where its node's configuration says so.
CLIENT = """
import os
import signal
import time

import numpy as np
from flwr.app import Array, ArrayRecord

from fedjax_sec.flower import client_app


def harm(message, context, call):
    asked = message.content.config_records.get("round")
    fault = context.node_config.get("fault")
    if asked is None or asked["index"] != context.node_config.get("at"):
        return call(message, context)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hangs":
        time.sleep(10**4)
    answer = call(message, context)
    kinds = {
        "shape": np.ones((1, 3), np.float32),
        "bytes": np.ones((1, 5 * 10**6), np.float32),
        "nan": np.full_like(answer.content["messages"]["0"].numpy(), np.nan),
    }
    arrays = dict(answer.content["messages"]) | {"0": Array(kinds[fault])}
    answer.content["messages"] = ArrayRecord(arrays)
    return answer


app = client_app(mods=[harm])
"""


def finished(out):
    run = RunFolder(out / "run")
    return read_result(run.experiment(), run)


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def rounds_in(out):
    path = out / "rounds.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_deployed_run_is_the_simulated_one_and_resumes(tmp_path):
    deployed = deploy(BASE, out=tmp_path, nodes=2)
    more = deploy(BASE | {"rounds": 3}, out=tmp_path, nodes=1, resume=True)
    simulated = fedjax_sec.run(BASE, rounds=3)
    np.testing.assert_allclose(more.metrics["accuracy"], simulated.metrics["accuracy"], atol=1e-6)
    np.testing.assert_allclose(more.metrics["loss"], simulated.metrics["loss"], rtol=1e-4)
    np.testing.assert_array_equal(more.metrics["loss"][:3], deployed.metrics["loss"])
    rows = read_journal(tmp_path)
    assert [row["round"] for row in rows] == [1, 2, 3] and not any(r["missing"] for r in rows)
    assert [len(row["nodes"]) for row in rows] == [2, 2, 1]


def test_faults_cost_their_clients_alone(tmp_path):
    """A client killed in mid-round, one that hangs, bad answers, and a SuperNode lost and back."""
    faults = [("killed", 1), ("hangs", 2), ("shape", 3), ("bytes", 3), ("nan", 3)]
    out, rounds = tmp_path / "out", 6
    app = write_app(
        BASE | {"rounds": rounds, "threat": {}, "attack": None}, tmp_path / "app", out, timeout=90
    )
    (app / PACKAGE / "client.py").write_text(CLIENT)
    with processes(tmp_path / "flower") as running:
        running.link()
        for number, (fault, at) in enumerate(faults):
            running.node(number, 5, fault=fault, at=at)
        run = running.run(app)
        wait_for(lambda: rounds_in(out) >= 3, 900)
        running.kill("node-1")  # the hung one; the fifth round is without it
        wait_for(lambda: rounds_in(out) >= 5, 900)
        running.node(1, 5)
        run.wait(timeout=900)
    rows = {row["round"]: row["missing"] for row in read_journal(out)}
    assert len(rows) == rounds and rows[1] == {}
    assert set(rows[2]) == {"0"} and set(rows[3]) == {"1"}
    assert "did not answer within 90 s" in rows[3]["1"]
    assert {"2", "3"} <= set(rows[4])
    assert "is float32 (1, 3), not float32 (1, 650)" in rows[4]["2"]
    assert "takes 20000128 bytes" in rows[4]["3"]
    assert set(rows[5]) == {"1"}
    result = finished(out)
    assert result.metrics["excluded"][4] == 1 and np.nansum(result.metrics["excluded"]) == 1
    assert np.isfinite(result.metrics["loss"]).all()
    assert result.metrics["absent"][1:].tolist() == [len(rows[i]) for i in range(1, rounds + 1)]
    assert result.metrics["accuracy"][-1] > result.metrics["accuracy"][0]


def certificates(folder):
    """A certificate authority of our own, and the server's certificate and key."""
    now, folder = datetime.datetime.now(datetime.UTC), folder
    folder.mkdir()
    day = datetime.timedelta(days=1)

    def save(name, *parts):
        (folder / name).write_bytes(b"".join(parts))
        return str(folder / name)

    def private(key):
        return key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def certificate(name, key, issuer, issuer_key, authority):
        at = x509.SubjectAlternativeName(
            [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        )
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(at, critical=False)
            .sign(issuer_key, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )

    def named(text):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root, name = named("authority"), named("127.0.0.1")
    return {
        "root": save("root.pem", certificate(root, root_key, root, root_key, True)),
        "certificate": save("server.pem", certificate(name, key, root, root_key, False)),
        "key": save("server.key", private(key)),
    }


def node_key(folder, number):
    """The paths of a node's private and public key."""
    key = ec.generate_private_key(ec.SECP384R1())
    private, public = folder / f"node-{number}", folder / f"node-{number}.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    )
    return str(private), str(public)


def test_tls_and_authentication(tmp_path):
    """Only a node whose key is registered takes part, and everything goes over TLS."""
    files = certificates(tmp_path / "tls")
    app = write_app(BASE | {"rounds": 1}, tmp_path / "app", tmp_path / "out", timeout=120)
    link = ["--ssl-certfile", files["certificate"], "--ssl-keyfile", files["key"]]
    link += ["--ssl-ca-certfile", files["root"], "--enable-supernode-auth"]
    trusting = ["--root-certificates", files["root"]]
    access = {"insecure": False, "root-certificates": files["root"]}
    with processes(tmp_path / "flower") as running:
        running.link(*link)
        known, public = node_key(tmp_path / "tls", 0)
        stranger, _ = node_key(tmp_path / "tls", 1)
        running.point(**access)
        done = subprocess.run(
            [running.tool("flwr"), "supernode", "register", public, "local"],
            env=running.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        running.node(0, 1, *trusting, "--auth-supernode-private-key", known)
        running.node(1, 2, *trusting, "--auth-supernode-private-key", stranger)
        running.run(app, **access).wait(timeout=600)
        assert RunFolder(tmp_path / "out" / "run").finished, running.said("run")
        refused = (tmp_path / "flower" / "node-1.log").read_text()
    (row,) = read_journal(tmp_path / "out")
    assert row["missing"] == {} and len(row["nodes"]) == 1
    assert "Failed to activate SuperNode" in refused and "Receiving" not in refused
