"""Make trained JAX models smaller and faster."""
