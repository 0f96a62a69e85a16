"""config.json as it is published: one file for each naming tradition, and what they share."""
