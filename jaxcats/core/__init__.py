"""Pure JAX and Optax, arrays in and arrays out; start at step.py."""
