"""Speed measurements: our time beside a peer's and the machine's own limit, in one run."""
