"""Runs our experiments on reconstruction: `fedjax-sec paper reconstruction`.

    python scripts/reconstruction.py tradeoff --scale small --out results/reconstruction

Finished runs in the output folder are kept and not run again.
"""

from fedjax_sec.cli import paper

if __name__ == "__main__":
    paper.run("reconstruction")
