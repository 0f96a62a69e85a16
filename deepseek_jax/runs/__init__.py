"""The operation of a training run: its folder, checkpoints, feed, guards, reports, and the loop around the steps."""
