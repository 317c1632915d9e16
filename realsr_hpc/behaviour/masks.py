# pyright: strict, reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""The grammar's masks as tensors on the device: the sampler and the loss's scorer read the same table.

The grammar (vlcot/grammar.py) defines the masks. This table adds the recipe's temperature and guidance of each mask and
pads the vocabulary to the size that the model holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from realsr_hpc.config.learning import RolloutConfig
from realsr_hpc.vlcot.grammar import Grammar


class MaskTable:
    """A grammar's M masks over V tokens (`padded_vocab_size`), with the sampling options of each mask.

    Example: `table.allowed[mask_ids]` are the tokens [n, V] that are allowed at n positions, drawn at temperatures
    `table.temperature[mask_ids]` [n].
    """

    def __init__(self, grammar: Grammar, config: RolloutConfig, padded_vocab_size: int, device: torch.device):
        # the logits have columns up to the padded vocabulary size, a multiple of tp
        padding = padded_vocab_size - grammar.codec.vocabulary.size
        self.allowed = F.pad(torch.from_numpy(grammar.mask_table), (0, padding)).to(device)
        """bool [M, V]; never the padding."""
        self.forced = torch.from_numpy(grammar.forced).to(device)
        """bool [M]: one token is allowed."""
        self.image = torch.from_numpy(grammar.image_rows).to(device)
        """bool [M]: the allowed tokens are image codes."""
        text = config.temperature if config.text_temperature is None else config.text_temperature
        self.temperature = torch.where(self.image, config.temperature, text)
        """float32 [M]."""
        self.guided = config.cfg_scale != 1.0
        """Whether logits are guided: each row then has an unconditional twin."""
        self.cfg_scale = torch.where(self.image, config.cfg_scale, 1.0)
        """float32 [M]: text is never guided."""
        # the one mask that allows image codes
        image = grammar.mask_table[int(grammar.image_rows.argmax())].nonzero()[0]
        self.image_columns = slice(int(image[0]), int(image[-1]) + 1)
        """Smallest range of vocabulary columns that holds all image codes."""
        self.continues_block = torch.from_numpy(grammar.continues_block).to(device)
        """bool [vocabulary]: the token continues an image block.

        Sampler and scorer both limit the context of the unconditional stream by this rule.
        """


def everything_allowed(vocab_size: int, padded_vocab_size: int, device: torch.device) -> Bool[Tensor, "1 V"]:
    """The one mask of the plain distribution: every token but the padding. Supervised losses score under it."""
    return (torch.arange(padded_vocab_size, device=device) < vocab_size)[None]
