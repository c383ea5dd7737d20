"""Networks as `Model(init, apply)`, one component a file. They and `ops.interception` use flax."""
