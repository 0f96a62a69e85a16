"""What may run a mechanism faster, beside its XLA form."""
