"""Networks as `Model(init, apply)`, one component a file. The only importer of flax but `ops.interception`."""
