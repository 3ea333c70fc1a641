"""One training step: stages, executor, transport, gradients, update."""
