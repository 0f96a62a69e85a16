"""Chat formats of releases that publish a program and no template: DeepSeek-V3.2 and V4."""
