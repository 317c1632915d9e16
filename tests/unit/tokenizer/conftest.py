"""A torchvision built for CUDA must not stop transformers from importing beside a CPU build of torch."""

import torch

from realsr_hpc.quality.pyiqa_adapter import declare_torchvision_operators

torch.set_num_threads(1)
declare_torchvision_operators()
