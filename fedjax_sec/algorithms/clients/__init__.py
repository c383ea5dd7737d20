"""Local training, one component a file; the round vmaps it over the client axis."""
