"""The config of each release, a file an architecture."""
