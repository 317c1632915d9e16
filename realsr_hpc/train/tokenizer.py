"""Train the small image tokenizer and text tokenizer from scratch; read `main` first.

Plain PyTorch in one process, on its GPU or the CPU: the tokenizer is small and trained once. There is neither an
adversarial nor a downloaded perceptual loss; a multi-scale gradient loss rewards sharpness. The published weights are
the moving average of the trained ones.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from realsr_hpc import runfolder
from realsr_hpc.config.exit_codes import DONE, STOPPED
from realsr_hpc.config.schema import RunConfig, TokenizerTrainingConfig
from realsr_hpc.files import replacing
from realsr_hpc.parallel import backend
from realsr_hpc.tokenizer.codebook import CodebookAverages
from realsr_hpc.tokenizer.image import ImageTokenizer
from realsr_hpc.tokenizer.image_file import save_image_tokenizer
from realsr_hpc.tokenizer.start import start_decoder, start_encoder
from realsr_hpc.tracking.tracker import Tracker
from realsr_hpc.train.tokenizer_images import TokenizerImages, heldout_images, photographs_of
from realsr_hpc.train.tokenizer_measures import bicubic, psnr_db, reconstruction_loss, write_grid
from realsr_hpc.train.tokenizer_text import train_recipe_text_tokenizer
from realsr_hpc.train.training_run import Stop

AVERAGE_DECAY = 0.995
KMEANS_ROUNDS = 10
EVALUATED_AT_ONCE, GRID_COLUMNS = 16, 24
"""Number of held-out images per batch, and number of images that the grid shows."""
_CPU = torch.device("cpu")


def main(config: RunConfig, run_dir: Path, stop: Stop = lambda: False) -> int:
    """Train, resuming from `runfolder.tokenizer_checkpoint`, and write grids and both tokenizers to `run_dir`.

    Returns the exit code (see config/exit_codes.py).
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    files = runfolder.tokenizer_files(run_dir)
    train_recipe_text_tokenizer(config, files["text_tokenizer.path"])
    training = config.tokenizer_training
    photographs = photographs_of(config, config.data.train_split)
    images = TokenizerImages(photographs, training, config.seed, config.data.num_threads)
    heldout = heldout_images(config)
    state = TokenizerTraining(config, backend.device())
    # the start weights are fitted to batches that training does not use
    if not state.resume(runfolder.tokenizer_checkpoint(run_dir)):
        state.start([images.batch(training.num_steps + number) for number in range(training.start_batches)])
    tracker = Tracker.open(config, run_dir, writer=True)
    tracker.truncate(state.step)
    while state.step < training.num_steps:
        metrics = state.update(images.batch(state.step))
        # every step that is logged also saves a checkpoint, from which a resumed run continues
        stopping = stop() or state.step == config.checkpoint.stop_at_step
        if stopping or state.step % training.log_every_steps == 0 or state.step == training.num_steps:
            grid = runfolder.reconstructions(run_dir, state.step)
            metrics |= state.evaluate(heldout, grid)
            tracker.log_metrics(state.step, metrics)
            tracker.log_artifact(grid, "reconstructions")
            save_image_tokenizer(state.average, files["image_tokenizer.weights"])
            state.save(runfolder.tokenizer_checkpoint(run_dir))
        tracker.progress(state.step, training.num_steps, f"loss {metrics['tokenizer/loss/step']:.3f}")
        if stopping and state.step < training.num_steps:
            tracker.close("KILLED")
            return STOPPED
    tracker.close("FINISHED")
    return DONE


class TokenizerTraining:
    """The state that changes from step to step (weights, optimizer, codebook averages), and the step itself."""

    def __init__(self, config: RunConfig, device: torch.device = _CPU) -> None:
        torch.manual_seed(config.seed)
        self.config, self.training, self.step, self.device = config, config.tokenizer_training, 0, device
        # convolutions on a CPU, and in bf16 on a GPU, are fastest with the channels of a pixel side by side
        self.tokenizer = ImageTokenizer(config.image_tokenizer).to(device)
        self.tokenizer.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # not in torch's types
        self.average = copy.deepcopy(self.tokenizer).requires_grad_(False)
        self.codebook = self.tokenizer.quantize.embedding.weight.requires_grad_(False)
        self.codebook_averages = CodebookAverages(self.codebook, self.training.codebook_decay)
        for layer in (self.tokenizer.encoder.conv_in, *self.tokenizer.encoder.down[:-2]):
            layer.requires_grad_(False)  # gathers patches: nothing to learn
        if self.training.freeze_encoder:
            self.tokenizer.encoder.requires_grad_(False)
            self.tokenizer.quant_conv.requires_grad_(False)
        weights = [p for p in self.tokenizer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=1e-4)

    def update(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, float]:
        """One optimizer step, then the codebook's and the moving average's."""
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.training, self.step)
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        with self._autocast(not self.training.freeze_encoder):
            features = self.tokenizer.features(images)  # [B, h, w, E]
        features = features.float()
        # codes [B, h, w]; `quantised` passes its gradient straight through to `features`
        quantised, codes = self.tokenizer.quantise(features)
        commitment = functional.mse_loss(features, functional.embedding(codes, self.tokenizer.quantize.codebook()))
        with self._autocast(True):
            reconstruction = self.tokenizer.reconstruct(quantised)
        loss = reconstruction_loss(reconstruction.float(), images, self.training.gradient_weight)
        self.optimizer.zero_grad()
        (loss + self.training.commitment_weight * commitment).backward()
        torch.nn.utils.clip_grad_norm_(self.tokenizer.parameters(), 1.0)
        self.optimizer.step()
        frozen = self.training.freeze_encoder
        moved = 0 if frozen else self._update_codebook(features.detach().flatten(0, 2), codes.flatten())
        # a short average at first, so that it does not keep the start weights for hundreds of steps
        decay = min(AVERAGE_DECAY, self.step / (self.step + 10))
        for average, current in zip(self.average.parameters(), self.tokenizer.parameters(), strict=True):
            average.lerp_(current.detach(), 1 - decay)
        self.step += 1
        return {
            "tokenizer/loss/step": loss.item(),
            "tokenizer/commitment/step": commitment.item(),
            "tokenizer/moved_codes/step": moved,
        }

    def _autocast(self, trained: bool) -> torch.autocast:
        """bfloat16 if the recipe asks for it and the part is trained: a frozen encoder must give the codes of fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=trained and self.training.precision == "bf16")

    def _update_codebook(self, features: Float[Tensor, "N E"], codes: Int[Tensor, " N"]) -> int:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        return self.codebook_averages.update(self.codebook, features, codes, generator)

    @torch.no_grad()
    def start(self, batches: list[Float[Tensor, "B 3 H W"]]) -> None:
        """Initialise in closed form instead of learning: principal components, k-means, least squares."""
        batches = [batch.to(self.device) for batch in batches]
        start_encoder(self.tokenizer, batches)
        features = torch.cat([self.tokenizer.features(batch).flatten(0, 2) for batch in batches])
        generator = torch.Generator().manual_seed(self.config.seed)
        chosen = torch.randperm(len(features), generator=generator)[: len(self.codebook)]
        self.codebook.copy_(features[chosen.to(self.device)])
        # with decay 0 an update of the averages is one round of k-means
        self.codebook_averages.decay = 0.0
        for _ in range(KMEANS_ROUNDS):
            self.codebook_averages.update(self.codebook, features, self.tokenizer.quantize.nearest(features), generator)
        self.codebook_averages.decay = self.training.codebook_decay
        start_decoder(self.tokenizer, batches)
        self.average.load_state_dict(self.tokenizer.state_dict())
        self.average.encoder.recognise_gathering()

    def evaluate(self, images: Float[Tensor, "B 3 H W"], grid: Path) -> dict[str, float]:
        """PSNR in dB and number of codes in use on held-out images; `grid` shows truths above reconstructions."""
        shown = [(self.average.encode(part), part) for part in images.to(self.device).split(EVALUATED_AT_ONCE)]
        # [B, h, w] codes, in parts of EVALUATED_AT_ONCE images, which bounds memory
        codes = torch.cat([codes for codes, _ in shown]).cpu()
        reconstruction = torch.cat([self.average.decode(codes) for codes, _ in shown]).cpu()
        columns = min(len(images), GRID_COLUMNS)
        write_grid(torch.cat([images[:columns], reconstruction[:columns]]), columns, grid)
        return {
            "heldout/psnr_db/mean": psnr_db(reconstruction, images),
            "heldout/bicubic_psnr_db/mean": psnr_db(bicubic(images, self.tokenizer.config.downsample), images),
            "heldout/codes/count": len(codes.unique()),
        }

    def save(self, path: Path) -> None:
        """Weights of both copies, optimizer and step, in one file."""
        parts = ("tokenizer", "average", "optimizer", "codebook_averages")
        with replacing(path) as aside:
            torch.save({"step": self.step} | {part: getattr(self, part).state_dict() for part in parts}, aside)

    def resume(self, path: Path) -> bool:
        """Continue exactly from `path`; False if there is none. Images and random choices depend on the step alone."""
        if not path.exists():
            return False
        stored = torch.load(path, weights_only=True, map_location=_CPU)  # load_state_dict copies to the device
        self.step = stored.pop("step")
        for part, state in stored.items():
            getattr(self, part).load_state_dict(state)
        for tokenizer in (self.tokenizer, self.average):
            tokenizer.encoder.recognise_gathering()
        return True


def learning_rate(training: TokenizerTrainingConfig, step: int) -> float:
    """Linear warm-up, then a cosine to 2 % of `lr`."""
    warmup = min(1.0, (step + 1) / max(1, training.warmup_steps))
    return training.lr * warmup * (0.51 + 0.49 * math.cos(math.pi * step / training.num_steps))
