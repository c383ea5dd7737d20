"""Random changes of a client's training images, one component a file."""
