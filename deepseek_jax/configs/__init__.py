"""What a model is: frozen, hashable dataclasses, and the releases described with them."""
