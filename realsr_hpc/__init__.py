"""Train, compare, resume, evaluate and export VLCoT super-resolution models with GRPO."""

__version__ = "0.1.0"
