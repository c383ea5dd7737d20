"""Networks as `Model(init, apply)`, one component a file. They import flax; others do not."""
