"""The models that come with the planner: one file each, plain JAX and Flax, importing nothing of `partition`."""
