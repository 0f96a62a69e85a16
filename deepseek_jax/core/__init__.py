"""The shared vocabulary of the package: parameters, linear maps, quantised leaves, norms, RoPE, context."""
