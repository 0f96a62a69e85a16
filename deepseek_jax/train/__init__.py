"""The mathematics of a training step: losses, load balance, optimizers, recipes; all of it pure."""
