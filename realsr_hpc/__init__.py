"""Train, compare, resume, evaluate and export VLCoT super-resolution models with GRPO."""

import warnings

__version__ = "0.1.0"

# On import, Megatron warns about missing Apex and Transformer Engine and about renamed PyTorch functions. The warnings
# would hide our commands' output. They are filtered here, because Megatron is imported in several places.
for _message in (".*(Apex|Transformer Engine|transformer_engine|apex).*", "full scope is deprecated.*"):
    warnings.filterwarnings("ignore", message=_message)
for _module in (r"megatron\.", r"torch\.distributed\.c10d_logger"):
    warnings.filterwarnings("ignore", category=FutureWarning, module=_module)
