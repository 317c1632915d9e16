"""Train, compare, resume, evaluate and export VLCoT super-resolution models with GRPO."""

import warnings

__version__ = "0.1.0"

# What Megatron says on a machine without Apex or Transformer Engine, and of PyTorch functions that were renamed: it
# would bury what our commands say, and is said while it is imported, wherever that is.
for _message in (".*(Apex|Transformer Engine|transformer_engine|apex).*", "full scope is deprecated.*"):
    warnings.filterwarnings("ignore", message=_message)
for _module in (r"megatron\.", r"torch\.distributed\.c10d_logger"):
    warnings.filterwarnings("ignore", category=FutureWarning, module=_module)
