"""Regenerates the tables and figures of FAT: `fedjax-sec paper fat`.

    python scripts/fat.py table1 table3 curves --scale small --out results/fat
    python scripts/fat.py table2 figure1 figure2 --users mnist_by_writer --out results/fat-users

Finished runs in the output folder are kept and not run again.
"""

from fedjax_sec.cli import paper

if __name__ == "__main__":
    paper.run("fat")
