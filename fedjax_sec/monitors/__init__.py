"""Who may look at a round, one component a file."""
