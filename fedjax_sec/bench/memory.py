"""Peak memory of a process while a rule runs, beside the stack that it reads."""

import subprocess
import sys
from collections.abc import Iterator, Sequence

from fedjax_sec.bench.aggregators import rules

SHAPE = (100, 1_000_000)
#: Linux keeps a process's peak, and lets it be set back to what is in use: after compilation here.
CHILD = """
import re, sys
import jax
from fedjax_sec.api import _aggregate
from fedjax_sec.bench.aggregators import arguments, rules

def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

num_rows, dim = int(sys.argv[2]), int(sys.argv[3])
stack = jax.block_until_ready(jax.random.normal(jax.random.key(0), (num_rows, dim)))
args = arguments(rules(num_rows, dim)[sys.argv[1]].defense, stack)
function = _aggregate.lower(*args).compile()
open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
function(*args).block_until_ready()
print(kib("VmHWM") - before)
"""


def run(only: Sequence[str] = (), shape=SHAPE) -> Iterator[dict]:
    """One row a rule, each measured in a process of its own; Linux only."""
    num_rows, dim = shape
    stack = 4 * num_rows * dim / 2**20
    for name in rules(num_rows, dim):
        if only and name not in only:
            continue
        command = [sys.executable, "-c", CHILD, name, str(num_rows), str(dim)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        beyond = int(done.stdout) / 2**10
        yield {
            "rule": name,
            "K": num_rows,
            "D": dim,
            "stack MiB": stack,
            "beyond the stack MiB": beyond,
            "peak / stack": 1 + beyond / stack,
        }
