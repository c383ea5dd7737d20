"""What is measured between rounds, one component a file."""
