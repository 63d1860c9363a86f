"""The demo's generators: small autoencoders, trained on photographs for some seconds, that reproduce a photograph with
the kind of upsampling layers in which large generators end."""

from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from demo.family import Family
from patchscan.training.augment import random_region

CROP = 64
BATCH = 8
LEARNING_RATE = 2e-3


class Up(nn.Module):
    """Doubles the resolution as generators of this kind do: (n, before, H, W) to (n, after, 2H, 2W)."""

    def __init__(self, kind: str, before: int, after: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "transposed":
            self.conv: nn.Module = nn.ConvTranspose2d(before, after, 4, 2, 1)
        else:
            self.conv = nn.Conv2d(before, after, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "nearest":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        result: torch.Tensor = self.conv(x)
        return result


class AutoEncoder(nn.Module):
    """A convolutional autoencoder. Its latent is wide, because only the traces of the decoder matter here."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        widths = [factor * family.width for factor in (1, 3, 6, 8)][: family.factor.bit_length()]
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = [nn.Conv2d(family.latent, widths[-1], 3, padding=1), nn.SiLU()]
        for narrow, wide in pairwise(widths):
            encoder += [nn.Conv2d(3 if not encoder else narrow, wide, 4, 2, 1), nn.SiLU()]
        for wide, narrow in pairwise(reversed(widths)):
            decoder += [nn.Conv2d(wide, wide, 3, padding=1), nn.SiLU(), Up(family.up, wide, narrow), nn.SiLU()]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(widths[-1], family.latent, 1))
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(widths[0], 3, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in -1..1, (n, 3, H, W), H and W multiples of the factor, to reproduced pixels of the same shape."""
        result: torch.Tensor = self.decoder(self.encoder(x))
        return result


def spectral_loss(drawn: torch.Tensor, photo: torch.Tensor) -> torch.Tensor:
    """Mean difference of log amplitude spectra: makes fine detail as strong as in photographs, in any phase."""
    spectra = (torch.fft.rfft2(pixels, norm="ortho").abs() for pixels in (drawn, photo))
    first, second = (torch.log(amplitudes + 0.02) for amplitudes in spectra)
    return (first - second).abs().mean()


def train_generator(family: Family, photos: list[np.ndarray], steps: int, seed: int = 0) -> AutoEncoder:
    """Train one generator on random crops of photographs, each uint8 (H, W, 3), at least 64 x 64; L1 and spectral loss.

    Returns it in evaluation mode.
    """
    torch.manual_seed(seed)
    random = np.random.RandomState(seed)
    model = AutoEncoder(family).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=1e-4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * (1 - step / steps) ** 0.5
        chosen = (photos[random.randint(len(photos))] for _ in range(BATCH))
        photo = _pixels(np.stack([random_region(one, CROP, CROP, random) for one in chosen]))
        drawn = model(photo)
        loss = (drawn - photo).abs().mean() + 0.05 * spectral_loss(drawn, photo)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def redraw(model: AutoEncoder, photo: np.ndarray) -> np.ndarray:
    """Reproduce a photograph, uint8 (H, W, 3) with H and W multiples of 16; returns the same shape, not compressed."""
    drawn = model(_pixels(photo[None]))[0]
    result: np.ndarray = drawn.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return result


def _pixels(photos: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(photos)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
