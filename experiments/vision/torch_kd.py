"""Plain distillation in PyTorch, as RepDistiller does it, answering on a pipe.

It runs under a Python that has torch and NumPy and needs nothing of kdjax. In the
folder that it is given, ``settings.json`` holds the numbers, ``teacher.npz`` and
``test.npz`` arrays, and ``seed-<n>.npz`` a student's initial weights and its batches.
For every seed that it reads, it trains, and prints the test accuracy and the seconds
of a step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNorm(nn.Module):
    """A 3x3 convolution, batch normalisation and ReLU, from arrays of kdjax's side."""

    def __init__(self, arrays: Mapping[str, np.ndarray], path: str, stride: int):
        super().__init__()
        kernel = torch.tensor(arrays[f"{path}/conv/kernel"]).permute(3, 2, 0, 1)
        width, channels = kernel.shape[:2]
        self.stride = stride
        self.conv = nn.Conv2d(channels, width, 3, stride=stride, bias=False)
        self.norm = nn.BatchNorm2d(width)
        with torch.no_grad():
            self.conv.weight.copy_(kernel)
            for ours, theirs in (
                (self.norm.weight, "scale"),
                (self.norm.bias, "bias"),
                (self.norm.running_mean, "mean"),
                (self.norm.running_var, "var"),
            ):
                assert ours is not None
                ours.copy_(torch.tensor(arrays[f"{path}/norm/{theirs}"]))

    def forward(self, x: Tensor) -> Tensor:
        # As XLA's SAME: where one pixel is missing, it is added at the end.
        missing = [
            max((-(-size // self.stride) - 1) * self.stride + 3 - size, 0)
            for size in x.shape[2:]
        ]
        (top, bottom), (left, right) = ((n // 2, -(-n // 2)) for n in missing)
        return F.relu(self.norm(self.conv(F.pad(x, (left, right, top, bottom)))))


class Cnn(nn.Module):
    """The network of that name, channels first, with given weights."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        super().__init__()
        layers = []
        for stage in itertools.count():
            for index in itertools.count():
                path = f"stages/{stage}/{index}"
                if f"{path}/conv/kernel" not in arrays:
                    break
                layers.append(ConvNorm(arrays, path, stride=1 if index else 2))
            if not index:
                break
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(*arrays["head/kernel"].shape)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor(arrays["head/kernel"]).T)
            self.head.bias.copy_(torch.tensor(arrays["head/bias"]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q = F.log_softmax(student / temperature, dim=1)
    p = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


class Comparison:
    """Trains students on what lies in a folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._settings = json.loads((folder / "settings.json").read_text())
        self._teacher = Cnn(np.load(folder / "teacher.npz")).eval()
        self._test = dict(np.load(folder / "test.npz"))

    def run(self, seed: int) -> tuple[float, float]:
        """Test accuracy, and seconds of a step."""
        given = dict(np.load(self._folder / f"seed-{seed}.npz"))
        student = Cnn(given)
        settings, steps = self._settings, len(given["x"])
        optimizer = torch.optim.SGD(
            student.parameters(),
            lr=settings["learning_rate"],
            momentum=0.9,
            nesterov=True,
            weight_decay=settings["weight_decay"],
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
        )
        started = time.perf_counter()
        for pixels, label in zip(given["x"], given["label"], strict=True):
            x, labels = self._images(pixels), torch.from_numpy(label).long()
            with torch.no_grad():
                target = self._teacher(x)
            logits = student(x)
            soft = distillation(logits, target, settings["temperature"])
            hard = F.cross_entropy(logits, labels)
            loss = settings["hard_weight"] * hard + settings["soft_weight"] * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = (time.perf_counter() - started) / steps
        return self._accuracy(student.eval()), seconds

    @torch.no_grad()
    def _accuracy(self, student: Cnn) -> float:
        guesses = [
            student(self._images(part)).argmax(1).numpy()
            for part in np.array_split(self._test["x"], 10)
        ]
        return float((np.concatenate(guesses) == self._test["label"]).mean())

    def _images(self, x: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(x).permute(0, 3, 1, 2).float()
        mean, deviation = (
            torch.tensor(self._settings[name])[:, None, None]
            for name in ("mean", "deviation")
        )
        return ((pixels - mean) / deviation).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    comparison = Comparison(options.folder)
    for line in sys.stdin:
        print(*comparison.run(int(line)), flush=True)


if __name__ == "__main__":
    main()
