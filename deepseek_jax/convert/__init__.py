"""Published checkpoints: reading, writing, verifying."""
