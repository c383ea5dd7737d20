"""Regenerates Table III of FLTrust, and curves over what changes it: `fedjax-sec paper fltrust`.

    python scripts/fltrust.py table3 --dataset har_windows --out results/fltrust-har

Finished runs in the output folder are kept and not run again.
"""

from fedjax_sec.cli import paper

if __name__ == "__main__":
    paper.run("fltrust")
