"""Group relative policy optimisation: pure functions of tensors and numbers."""
