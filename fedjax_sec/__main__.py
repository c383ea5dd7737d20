"""`python -m fedjax_sec`: the command `fedjax-sec`, where that is not on the path."""

from fedjax_sec.cli import main

if __name__ == "__main__":
    main()
