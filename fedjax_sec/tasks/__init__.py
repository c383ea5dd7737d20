"""Tasks: outputs, losses and metrics, one component a file."""
