"""What a client sends and what the server makes of it, one component a file."""
