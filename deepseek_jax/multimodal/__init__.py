"""Janus: pictures in and out of a language model."""
