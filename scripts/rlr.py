"""Regenerates the tables and figures of the robust learning rate paper: `fedjax-sec paper rlr`.

    python scripts/rlr.py all --scale paper --out results/rlr

Finished runs in the output folder are kept and not run again.
"""

from fedjax_sec.cli import paper

if __name__ == "__main__":
    paper.run("rlr")
