"""What is learned, one component a file."""
