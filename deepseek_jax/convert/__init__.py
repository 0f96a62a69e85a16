"""Published checkpoints: the safetensors format, one table of names, loading, saving, conversion."""
