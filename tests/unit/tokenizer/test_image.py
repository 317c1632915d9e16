"""Image tokenizer: equality with transformers, files, shapes, learning of the codebook."""

import pytest
import torch
import transformers
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

from realsr_hpc.config.schema import ImageTokenizerConfig
from realsr_hpc.tokenizer.codebook import CodebookAverages
from realsr_hpc.tokenizer.image import ImageTokenizer
from realsr_hpc.tokenizer.image_file import load_image_tokenizer, save_image_tokenizer

TINY = ImageTokenizerConfig(
    codebook_size=64, base_channels=32, latent_channels=16, decoder_channel_multiplier=(1, 1, 2),
    decoder_output_shuffle=2,
)  # fmt: skip
DEEP = ImageTokenizerConfig(
    downsample=16,
    codebook_size=128,
    embed_dim=12,
    latent_channels=24,
    base_channels=32,
    channel_multiplier=(1, 1, 2, 2, 4),
    num_res_blocks=2,
    decoder_base_channels=None,
    decoder_norm=True,
    decoder_patch_out=False,
    decoder_channel_multiplier=None,
    decoder_output_shuffle=1,
)
"""Chameleon's levels and blocks with fewer channels."""
LLAMAGEN = DEEP.model_copy(
    update={"downsample": 8, "channel_multiplier": (1, 2, 2, 4), "embed_dim": 8, "normalised_codes": True}
)


def tokenizer_of(config: ImageTokenizerConfig) -> ImageTokenizer:
    """Random weights, codebook spread over the features so that many codes occur."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(config).eval()
    with torch.no_grad():
        features = tokenizer.features(torch.rand(2, 3, 128, 128) * 2 - 1).flatten(0, 2)
        tokenizer.quantize.embedding.weight.copy_(features[torch.arange(config.codebook_size) % len(features)])
    return tokenizer


def hf_model(config: ImageTokenizerConfig) -> ChameleonVQVAE:
    """transformers' model of the same configuration."""
    return ChameleonVQVAE(
        transformers.ChameleonVQVAEConfig(
            embed_dim=config.embed_dim,
            num_embeddings=config.codebook_size,
            latent_channels=config.latent_channels,
            base_channels=config.base_channels,
            channel_multiplier=list(config.channel_multiplier),
            num_res_blocks=config.num_res_blocks,
            resolution=128,
            double_latent=False,
        )
    )


@pytest.mark.parametrize("config", [TINY, DEEP], ids=["tiny", "chameleon"])
def test_same_codes_as_transformers(config: ImageTokenizerConfig) -> None:
    """Our weights without the decoder load strictly into transformers' class, and give the same codes."""
    ours, theirs = tokenizer_of(config), hf_model(config)
    weights = {k: v for k, v in ours.state_dict().items() if not k.startswith("decoder.")}
    theirs.load_state_dict(weights, strict=True)
    images = torch.rand(1, 3, 128, 128) * 2 - 1
    codes = ours.encode(images)
    assert torch.equal(codes.flatten(), theirs.encode(images.clone())[2])
    assert len(codes.unique()) > 10


@pytest.mark.parametrize("config", [TINY, DEEP, LLAMAGEN], ids=["tiny", "chameleon", "llamagen"])
def test_any_size_goes_in_and_the_same_size_comes_out(config: ImageTokenizerConfig) -> None:
    """Grids are 1/downsample; decoded images have the input's size and range."""
    tokenizer = tokenizer_of(config)
    height, width, factor = 96, 64, config.downsample
    codes = tokenizer.encode(torch.rand(2, 3, height, width) * 2 - 1)
    assert codes.shape == (2, height // factor, width // factor)
    images = tokenizer.decode(codes)
    assert images.shape == (2, 3, height, width)
    assert images.abs().max() <= 1


def test_sides_that_do_not_divide_are_refused() -> None:
    """The message names the remedy."""
    with pytest.raises(ValueError, match="multiples of downsample = 8"):
        ImageTokenizer(TINY).encode(torch.zeros(1, 3, 60, 64))


def test_chameleon_full_size_builds() -> None:
    """The 7B model's VQ: 8192 x 256 codes, f = 16; encoder and quantiser have transformers' shapes."""
    config = DEEP.model_copy(
        update={"codebook_size": 8192, "embed_dim": 256, "latent_channels": 256, "base_channels": 128}
    )
    with torch.device("meta"):
        ours, theirs = ImageTokenizer(config), hf_model(config)
    shapes = {k: v.shape for k, v in ours.state_dict().items() if not k.startswith("decoder.")}
    assert shapes == {k: v.shape for k, v in theirs.state_dict().items()}


def test_normalised_codes_compare_angles() -> None:
    """Scaling the stored codebook changes neither codes nor images."""
    tokenizer = tokenizer_of(LLAMAGEN)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    codes = tokenizer.encode(images)
    pixels = tokenizer.decode(codes)
    tokenizer.quantize.embedding.weight.data *= torch.rand(LLAMAGEN.codebook_size, 1) + 0.5
    assert torch.equal(tokenizer.encode(images), codes)
    torch.testing.assert_close(tokenizer.decode(codes), pixels, rtol=0, atol=1e-4)


def test_gradients_pass_the_quantiser() -> None:
    """Straight through to the encoder; the codebook learns by averages, not by gradients."""
    tokenizer = tokenizer_of(TINY)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    reconstruction, codes, commitment = tokenizer(images)
    assert codes.shape == (1, 4, 4)
    (reconstruction - images).square().mean().backward(retain_graph=True)
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0
    assert tokenizer.quantize.embedding.weight.grad is None
    commitment.backward()
    assert tokenizer.quantize.embedding.weight.grad is None


def test_file_round_trip(tmp_path) -> None:
    """Weights are read back unchanged; a small model keeps float32 exactly."""
    tokenizer = tokenizer_of(TINY)
    path = tmp_path / "vq.safetensors"
    save_image_tokenizer(tokenizer, path)
    assert [p.name for p in tmp_path.iterdir()] == ["vq.safetensors"]
    loaded = load_image_tokenizer(TINY.model_copy(update={"weights": str(path)}), "cpu")
    for key, value in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert not any(p.requires_grad for p in loaded.parameters())


def test_files_that_do_not_fit_are_refused(tmp_path) -> None:
    """Missing, written for another architecture, or without metadata and of another shape."""
    from safetensors.torch import save_file

    path = tmp_path / "vq.safetensors"
    config = TINY.model_copy(update={"weights": str(path)})
    with pytest.raises(ValueError, match="does not exist.*tokenizer_tiny"):
        load_image_tokenizer(config, "cpu")
    save_image_tokenizer(tokenizer_of(TINY), path)
    with pytest.raises(ValueError, match="written for"):
        load_image_tokenizer(config.model_copy(update={"codebook_size": 32}), "cpu")
    save_file(tokenizer_of(TINY).state_dict(), path)
    with pytest.raises(ValueError, match="does not fit.*quantize.embedding.weight"):
        load_image_tokenizer(config.model_copy(update={"codebook_size": 32}), "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample": 4}, "levels, which downsample by 8"),
        ({"channel_multiplier": (1, 1, 1, 2)}, "all ones"),
        ({"base_channels": 48}, "multiple of 32"),
        ({"decoder_output_shuffle": 1}, "decoder enlarges by 4"),
    ],
)
def test_architectures_that_cannot_be_are_refused(change: dict, message: str) -> None:
    """Each message names the field."""
    with pytest.raises(ValueError, match=message):
        ImageTokenizer(TINY.model_copy(update=change))


def test_codebook_averages_find_cluster_means() -> None:
    """Entries converge to the means of the features that are assigned to them."""
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[10.0, 0.0], [0.0, 10.0], [60.0, 70.0]])
    codebook = torch.tensor([[5.0, 0.1], [0.1, 5.0], [60.0, 60.0]])
    averages = CodebookAverages(codebook, decay=0.5)
    for _ in range(60):
        features = means.repeat(20, 1) + 0.1 * torch.randn(60, 2, generator=generator)
        codes = torch.cdist(features, codebook).argmin(1)
        averages.update(codebook, features, codes, generator)
    assert torch.cdist(means, codebook).min(1).values.max() < 0.1


def test_dead_entries_move_onto_features() -> None:
    """An entry without assigned features is replaced by a feature of the batch; used entries stay."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.tensor([[1.0, 1.0], [500.0, 500.0]])
    averages = CodebookAverages(codebook, decay=0.5)
    features = torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    moved = averages.update(codebook, features, torch.zeros(2, dtype=torch.long), generator)
    assert moved == 1
    torch.testing.assert_close(codebook[0], torch.tensor([1.0, 2.0]))
    assert codebook[1].tolist() in features.tolist()
