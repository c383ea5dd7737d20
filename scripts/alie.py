"""Regenerates the tables and figures of *A Little Is Enough*: `fedjax-sec paper alie`.

    python scripts/alie.py all --scale paper --dataset mnist --seeds 3 --out results/alie

Finished runs in the output folder are kept and not run again.
"""

from fedjax_sec.cli import paper

if __name__ == "__main__":
    paper.run("alie")
