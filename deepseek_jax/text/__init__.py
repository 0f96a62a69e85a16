"""Tokenizers and chat formats."""
