"""The ``deepseek-jax`` command line, one file a command."""
