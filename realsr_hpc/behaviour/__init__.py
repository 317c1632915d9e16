"""The exact sampling distribution: one definition for the sampler and the loss."""
