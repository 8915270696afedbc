"""One update of the tokenizer and of its discriminator, in one process or in several that average their gradients.

Gradients are averaged after the backward pass instead of by a wrapper around the model: the penalty on the
discriminator's slope needs gradients of gradients, and the names of parameters stay those of the model.

Shape letters: B batch, T frames, H W pixels, C the 3 colours, L bits per token, G groups, K codes of one group."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from schemas.errors import SpecError
from tokenizer.bsqvit import BSQViT
from tokenizer.code_usage import CodeCounts
from tokenizer.config import BSQViTConfig
from tokenizer.discriminator import Discriminator
from tokenizer.ema import MovingAverage
from tokenizer.losses import (
    Perceptual,
    discriminator_loss,
    generator_loss,
    ms_ssim,
    psnr,
    quantizer_loss,
    r1_penalty,
    reconstruction_loss,
)
from tokenizer.optimizers import make_optimizers
from tokenizer.ranks import average_gradients, compute_dtype, copy_from_first_rank, num_ranks
from tokenizer.schedule import clip_gradients, ramp, rate_factor
from tokenizer.train_config import TrainConfig, require_given_sizes
from tokenizer.train_state import TrainState, load_optimizer, optimizer_tensors
from tokenizer.vit import Block

Metrics = dict[str, Tensor]


class Learner:
    """Everything that learns: model, moving average, discriminator and their optimisers."""

    def __init__(self, config: TrainConfig, model: BSQViT, device: torch.device) -> None:
        """`model` as `starting_model` gives it.  Raises CheckpointError where LPIPS has no weights."""
        self.config, self.device = config, device
        self.model = model.to(device).train()
        self.usage = CodeUsage(model.config, device)
        losses, part = config.losses, config.optimizer
        self.perceptual = Perceptual(losses.lpips_folder or "").to(device) if losses.lpips_weight else None
        self.discriminator: Discriminator | None = None
        if losses.adversarial_weight:
            sizes = config.discriminator
            self.discriminator = Discriminator(
                model.config.image_size,
                channels=sizes.channels,
                max_channels=sizes.max_channels,
                seed=config.run.seed,
            ).to(device)
        for each in (self.model, self.discriminator):
            if each is not None:
                copy_from_first_rank(each)
        self.average = MovingAverage(self.model, part.ema)
        if part.learns == "decoder":
            for half in (self.model.encoder, self.model.to_latents):
                half.requires_grad_(False)
        self.optimizer = make_optimizers(self.model, part)
        self.discriminator_optimizer = (
            make_optimizers(self.discriminator, part, may_use_muon=False) if self.discriminator else None
        )
        if config.run.checkpoint_blocks:
            checkpoint_blocks(self.model)
        self._autoencode: Any = self._compiled(self.model.autoencode)
        # Compiled code has no gradients of gradients: the penalty always takes the module itself.
        self._judge: Any = self._compiled(self.discriminator)
        samples = part.batch_images * num_ranks() if part.per_sample else 1
        self.peak_learning_rate = part.learning_rate * samples

    def update(self, frames_BTHWC: Tensor, step: int) -> Metrics:
        """Learn from one batch of uint8 frames; returns scalars on the device.

        Gradients that are not finite change nothing, and `skipped` is 1."""
        rate = self._set_learning_rates(step)
        real_BCHW = pictures(frames_BTHWC.float() / 127.5 - 1)
        metrics, fake_BCHW = self._tokenizer_gradients(frames_BTHWC, real_BCHW, step)
        parameters = [each for each in self.model.parameters() if each.requires_grad]
        average_gradients(parameters)
        metrics["grad_norm"] = clip_gradients(parameters, self.config.optimizer.clip_norm)
        finite = bool(metrics["grad_norm"].isfinite())
        if finite:
            self.optimizer.step()
            self.average.update(self.model)
        self.optimizer.zero_grad()
        metrics["skipped"] = torch.tensor(float(not finite))
        metrics["learning_rate"] = torch.tensor(rate)
        if finite and self._is_adversarial(step):
            metrics |= self._update_discriminator(real_BCHW, fake_BCHW.detach(), step)
        return metrics

    def tensors(self) -> dict[str, Tensor]:
        """Everything that learns and what its optimisers remember, by dotted name."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.average.state().items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            tensors |= {f"discriminator.{name}": value for name, value in self.discriminator.state_dict().items()}
            moments = optimizer_tensors(self.discriminator_optimizer)
            tensors |= {f"discriminator_optimizer.{name}": value for name, value in moments.items()}
        return tensors

    def load(self, state: TrainState) -> None:
        """Put back what `tensors` gave."""
        self.model.load_state_dict(state.part("model"))
        self.average.load(state.part("ema"), state.values["ema_updates"])
        load_optimizer(self.optimizer, state.part("optimizer"))
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            self.discriminator.load_state_dict(state.part("discriminator"))
            load_optimizer(self.discriminator_optimizer, state.part("discriminator_optimizer"))

    def _tokenizer_gradients(self, frames_BTHWC: Tensor, real_BCHW: Tensor, step: int) -> tuple[Metrics, Tensor]:
        part = self.config.losses
        output = self._autoencode(frames_BTHWC)
        self.usage.add(output.quantized.bits)
        # Losses see what was made before it is clamped: a clamped pixel would have no gradient.
        fake_BCHW = pictures(output.unclamped)
        similarity, metrics = self._similarity(fake_BCHW, real_BCHW)
        quantizer, codebook_entropy = quantizer_loss(output.quantized.losses, self.model.quantizer.loss_config)
        entropy_weight = part.entropy_weight * ramp(step, start=part.entropy_start, steps=part.entropy_ramp_steps)
        metrics |= {
            "quantizer": quantizer,
            "codebook_entropy": codebook_entropy,
            "sample_entropy": output.quantized.losses.sample_entropy,
        }
        total = similarity + entropy_weight * quantizer
        if self._is_adversarial(step):
            assert self.discriminator is not None
            self.discriminator.requires_grad_(False)
            with self._autocast():
                metrics["generator"] = generator_loss(self._judge(fake_BCHW))
            self.discriminator.requires_grad_(True)
            total = total + part.adversarial_weight * metrics["generator"]
        torch.autograd.backward(total)
        metrics["loss"] = total
        metrics["psnr"] = psnr(output.frames.detach(), frames_BTHWC).mean()
        return {name: value.detach() for name, value in metrics.items()}, fake_BCHW

    def _similarity(self, fake_BCHW: Tensor, real_BCHW: Tensor) -> tuple[Tensor, Metrics]:
        """How far pictures are from what they should be: the weighted sum that is minimised, and its parts."""
        part = self.config.losses
        pixel = reconstruction_loss(part.reconstruction, fake_BCHW - real_BCHW)
        metrics: Metrics = {part.reconstruction: pixel}
        total = part.reconstruction_weight * pixel
        if part.ms_ssim_weight:
            # From black as 0: the term that compares brightness is made for means that are not negative.
            metrics["ms_ssim"] = ms_ssim(fake_BCHW + 1, real_BCHW + 1, taps=7).mean()
            total = total + part.ms_ssim_weight * (1 - metrics["ms_ssim"])
        if self.perceptual is not None:
            with self._autocast():
                metrics["lpips"] = self.perceptual(fake_BCHW, real_BCHW).mean()
            total = total + part.lpips_weight * metrics["lpips"]
        return total, metrics

    def _update_discriminator(self, real_BCHW: Tensor, fake_BCHW: Tensor, step: int) -> Metrics:
        assert self.discriminator is not None and self.discriminator_optimizer is not None
        part = self.config.losses
        with self._autocast():
            loss = discriminator_loss(self._judge(real_BCHW), self._judge(fake_BCHW))
        metrics = {"discriminator": loss.detach()}
        if part.r1_weight and (step - part.adversarial_start) % part.r1_every == 0:
            penalty = r1_penalty(self.discriminator, real_BCHW)
            metrics["r1"] = penalty.detach()
            loss = loss + part.r1_weight * part.r1_every * penalty
        torch.autograd.backward(loss)
        parameters = list(self.discriminator.parameters())
        average_gradients(parameters)
        metrics["discriminator_grad_norm"] = clip_gradients(parameters, 0)
        if bool(metrics["discriminator_grad_norm"].isfinite()):
            self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()
        return metrics

    def _compiled(self, function: Any) -> Any:
        return torch.compile(function, dynamic=False) if self.config.run.compile and function is not None else function

    def _is_adversarial(self, step: int) -> bool:
        return self.discriminator is not None and step >= self.config.losses.adversarial_start

    def _set_learning_rates(self, step: int) -> float:
        rate = self.peak_learning_rate * rate_factor(self.config.optimizer, step)
        self.optimizer.set_learning_rate(rate)
        if self.discriminator_optimizer is not None:
            self.discriminator_optimizer.set_learning_rate(rate * self.config.discriminator.learning_rate_factor)
        return rate

    def _autocast(self) -> AbstractContextManager[object]:
        if self.model.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.model.compute_dtype)


class CodeUsage:
    """Counts which bits and which codes of each group occur, over all processes."""

    def __init__(self, config: BSQViTConfig, device: torch.device) -> None:
        self._new = partial(CodeCounts, config.bits_per_token, config.group_size, device)
        self._counts = self._new()

    def add(self, bits: Tensor) -> None:
        """Count bool bits [..., L]."""
        self._counts.add(bits)

    def counts(self) -> dict[str, Tensor]:
        """The counts of this process, which may be written to."""
        return {"ones": self._counts.ones_L, "codes": self._counts.codes_GK}

    def take(self) -> tuple[list[float], float]:
        """Entropy of each channel in bits, and the share of each group's codes that occurred; then begin anew."""
        counts, self._counts = self._counts, self._new()
        if num_ranks() > 1:
            dist.all_reduce(counts.ones_L)
            dist.all_reduce(counts.codes_GK)
        return counts.channel_bits(), float((counts.codes_GK > 0).double().mean())


def starting_model(config: TrainConfig, device: torch.device) -> BSQViT:
    """The model at step 0: weights drawn from the seed, or those of `model.init_from` with its sizes adapted.

    Raises SpecError for a size that `model.init_from` has otherwise and that cannot be adapted."""
    from tokenizer.checkpoint import from_pretrained

    part = config.model
    dtype = compute_dtype(config.run, device)
    if part.init_from is None:
        return BSQViT(config.model_config(), seed=config.run.seed, compute_dtype=dtype)
    model = from_pretrained(part.init_from, image_size=part.image_size, max_frames=part.max_frames, compute_dtype=dtype)
    sizes = model.config
    halves = (sizes.encoder,) if part.decoder_layers is not None else (sizes.encoder, sizes.decoder)
    for half in halves:
        given = {name: getattr(part, name) for name in ("width", "layers", "heads")}
        require_given_sizes(given, dataclasses.asdict(half))
    given = {name: getattr(part, name) for name in ("head_width", "bits_per_token", "group_size")}
    require_given_sizes(given, dataclasses.asdict(sizes))
    if part.decoder_layers is not None:
        model = with_deeper_decoder(model, part.decoder_layers, seed=config.run.seed)
    model.config = dataclasses.replace(model.config, losses=config.losses.quantizer)
    model.quantizer.loss_config = config.losses.quantizer
    return model


@torch.no_grad()
def with_deeper_decoder(model: BSQViT, num_layers: int, *, seed: int) -> BSQViT:
    """The same function with more layers in its decoder, which add nothing yet.  Raises SpecError for fewer layers."""
    half = model.config.decoder
    if num_layers < half.layers:
        raise SpecError(f"model.decoder_layers is {num_layers}, but the decoder of model.init_from has {half.layers}.")
    sizes = dataclasses.replace(model.config, decoder=dataclasses.replace(half, layers=num_layers))
    deeper = BSQViT(sizes, seed=seed, compute_dtype=model.compute_dtype)
    for block in cast(list[Block], list(deeper.decoder.transformer.blocks[half.layers :])):
        for last in (block.attention.out, block.mlp_out):
            last.weight.zero_()
            last.bias.zero_()
    deeper.load_state_dict(model.state_dict(), strict=False)
    return deeper


def training_sizes(config: TrainConfig) -> tuple[int, int]:
    """Pixels of a frame's side and frames of a clip that the run's model takes."""
    from tokenizer.checkpoint import read_checkpoint

    part = config.model
    found = config.model_config() if part.init_from is None else read_checkpoint(part.init_from).config()
    return part.image_size or found.image_size, part.max_frames or found.max_frames


def checkpoint_blocks(model: BSQViT) -> None:
    """Make every transformer block forget its activations and compute them again in the backward pass."""
    for half in (model.encoder, model.decoder):
        for block in half.transformer.blocks:
            block.forward = _Recomputed(block.forward)


class _Recomputed:
    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, *arguments: Any) -> Any:
        return checkpoint(self._forward, *arguments, use_reentrant=False)


def pictures(frames_BTHWC: Tensor) -> Tensor:
    """All frames as planar pictures, [B * T, 3, H, W]."""
    return frames_BTHWC.permute(0, 1, 4, 2, 3).flatten(0, 1)
