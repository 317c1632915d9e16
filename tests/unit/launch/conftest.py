"""What launching's own tests train on."""

from tests.slurm.conftest import image_tokenizer

__all__ = ["image_tokenizer"]
