"""Regenerates the figures of FedSecurity: `fedjax-sec paper fedsecurity`.

    python scripts/fedsecurity.py exp1 --scale paper --out results/fedsecurity

Finished runs in the output folder are kept and not run again.
"""

from fedjax_sec.cli import paper

if __name__ == "__main__":
    paper.run("fedsecurity")
