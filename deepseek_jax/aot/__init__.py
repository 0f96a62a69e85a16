"""Full-size models compiled ahead of time for TPU topologies, with no accelerator: memory, traffic, time."""
