"""Train or fine-tune a MobileViT; on scikit-learn's handwritten digits, or on your own pictures with --data.

    python examples/finetune_digits.py --out digits.safetensors --half        # a few minutes on two cores
    python examples/finetune_digits.py --out pets.safetensors --data pets --init mobilevit_xs.pt --flip \
        --image-size 256 --sizes 160,192,224,256,288,320 --batch 8
    mvit-export --to all --weights digits.safetensors                         # preprocessing and labels are inside

--data takes FOLDER/CLASS/PICTURE, of which a quarter is held out (`mvit_export.data.folders.hold_out`), or FOLDER/train
and FOLDER/val, each of that form. The recipe is the paper's: AdamW, warm-up and cosine, label smoothing, an average of
the weights, and a sampler that draws an image size for each step; gradients are clipped.

After `kill -9`, the same command resumes from the last save, and with the same number of threads ends with the same
bits: everything random here is a function of --seed, epoch and step, so there is no generator whose state could be
lost. The last line on stdout is JSON; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import digits
from mvit_export.data.folders import ImageFolder, hold_out, read_image_folder
from mvit_export.data.pictures import ArrayPictures, FolderPictures, Pictures, UnreadablePicture
from mvit_export.data.preprocessing import Preprocessing, Size, to_tensor
from mvit_export.errors import MvitExportError, UsageError, WeightsError
from mvit_export.families.mobilevit.network import VARIANTS, MobileViT
from mvit_export.families.mobilevit.weights import load_weights
from mvit_export.formats.choices import parse_size
from mvit_export.models.own_files import save_weights
from mvit_export.system.files import remove_leftovers, write_whole

# The options and their defaults. Those in FREE may change between a kill and the resumption.


@dataclass(frozen=True)
class Settings:
    out: Path
    data: Path | None = None
    init: str | None = None
    variant: str = "xxs"
    image_size: Size = (64, 64)
    sizes: tuple[Size, ...] = ((32, 32), (64, 64), (96, 96))
    batch: int = 8
    epochs: int = 40
    lr: float = 1e-3
    clip: float = 1.0
    warmup: float = 0.1
    weight_decay: float = 0.01
    smoothing: float = 0.1
    ema: float = 0.99
    flip: bool = False
    half: bool = False
    seed: int = 0
    threads: int = 2
    save_every: int = 20


FREE = ("out", "half", "threads", "save_every")
HELP = {
    "out": "the safetensors file to write; OUT.training.pt lies beside it until the end",
    "data": "folder of class folders, or of train/ and val/ (default: the digits)",
    "init": "weights to start from, anything that mvit-export accepts as --weights (default: from scratch)",
    "variant": f"{', '.join(VARIANTS)}; with --init, that of the file",
    "image_size": "N or HxW, the size to evaluate at and to export for",
    "sizes": "sizes to train at, multiples of 32 separated by commas",
    "batch": "pictures per step at the largest size; more at smaller sizes, so that every step is equal work",
    "epochs": "how often each picture is seen",
    "lr": "highest learning rate",
    "clip": "largest norm of the gradient; without a limit, single steps throw the training back",
    "warmup": "share of the training in which the learning rate rises",
    "weight_decay": "of matrices and kernels; biases and norms have none",
    "smoothing": "label smoothing",
    "ema": "share that the average of the weights keeps at each step",
    "flip": "mirror half of the pictures; not for digits",
    "half": "store the weights as fp16",
    "seed": "of weights, order, sizes, jitter and dropout; the split does not depend on it",
    "threads": "CPU threads",
    "save_every": "steps between saves",
}


def read_settings(arguments: Sequence[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    parse: dict[str, Callable[[str], Any]] = {"out": Path, "data": Path, "image_size": parse_size, "sizes": parse_sizes}
    for name, text in HELP.items():
        default = getattr(Settings, name, None)
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", help=text)
            continue
        shown = f"{text} (default: {show(default)})" if default is not None else text
        kind = parse.get(name, str if default is None else type(default))
        parser.add_argument(flag, type=kind, required=name == "out", help=shown, metavar=name.upper())
    settings = Settings(**vars(parser.parse_args(arguments)))
    check(settings)
    return settings


def parse_sizes(text: str) -> tuple[Size, ...]:
    try:
        return tuple(dict.fromkeys(parse_size(part) for part in text.split(",")))
    except UsageError as error:
        raise UsageError(f"--sizes is {text!r}, expected N or HxW with commas, such as 160,192,256x320") from error


def show(value: Any) -> str:
    """Sizes as they are written on the command line."""
    if isinstance(value, tuple) and isinstance(value[0], tuple):
        return ",".join(map(show, value))
    return "x".join(map(str, dict.fromkeys(value))) if isinstance(value, tuple) else str(value)


def check(settings: Settings) -> None:
    """Refuse what could not work, before anything is loaded. Raises UsageError."""
    odd = next((size for size in settings.sizes if size[0] % 32 or size[1] % 32), None)
    if odd is not None:
        raise UsageError(f"--sizes has {show(odd)}, expected multiples of 32, the network's stride")
    expected = {
        "variant": (settings.variant in VARIANTS, f"one of {', '.join(VARIANTS)}"),
        "image_size": (min(settings.image_size) >= 32, "at least 32 on each side"),
        "batch": (settings.batch >= 4, "at least 4, because BatchNorm compares pictures"),
        "epochs": (settings.epochs >= 1, "at least 1"),
        "lr": (settings.lr > 0, "more than 0"),
        "clip": (settings.clip > 0, "more than 0"),
        "warmup": (0 <= settings.warmup < 1, "a share from 0 to below 1"),
        "weight_decay": (settings.weight_decay >= 0, "at least 0"),
        "smoothing": (0 <= settings.smoothing < 1, "a share from 0 to below 1"),
        "ema": (0 <= settings.ema < 1, "a share from 0 to below 1"),
        "seed": (settings.seed >= 0, "at least 0"),
        "threads": (settings.threads >= 1, "at least 1"),
        "save_every": (settings.save_every >= 1, "at least 1"),
        "out": (
            settings.out.suffix == ".safetensors" and settings.out.parent.is_dir(),
            "NAME.safetensors in a folder that exists",
        ),
    }
    for name, (fine, what) in expected.items():
        if not fine:
            raise UsageError(f"--{name.replace('_', '-')} is {show(getattr(settings, name))}, expected {what}")


# Pictures


@dataclass(frozen=True)
class Part:
    """Labelled pictures; `names` say which they are."""

    pictures: Pictures
    labels: np.ndarray  # (len(pictures),) int64
    names: tuple[str, ...]

    def read(self, index: int, preprocessing: Preprocessing) -> np.ndarray:
        """uint8 RGB (H, W, 3), resized and cropped. Raises UnreadablePicture."""
        try:
            return self.pictures.read(index, preprocessing)
        except UnreadablePicture as error:
            raise UnreadablePicture(f"{error}: repair the picture or remove it") from error

    def digest(self) -> str:
        text = "\n".join(f"{label} {name}" for label, name in zip(self.labels, self.names, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Dataset:
    classes: tuple[str, ...]
    train: Part
    val: Part  # held out: seen once, at the end


def load_dataset(data: Path | None) -> Dataset:
    """The digits for None. Raises UsageError if a class has nothing to train on."""
    dataset = load_digits() if data is None else load_folder(data)
    if len(dataset.classes) < 2:
        raise UsageError(f"{data}: one class only ({dataset.classes[0]}), expected at least two class folders")
    for label, name in enumerate(dataset.classes):
        if label not in dataset.train.labels:
            raise UsageError(f"{data}: class {name} has no picture left to train on, expected at least 2 in all")
    return dataset


def load_digits() -> Dataset:
    train, val = (
        Part(ArrayPictures("digits", images), labels, tuple(f"{part} {i}" for i in range(len(labels))))
        for part, (images, labels) in (("train", digits.training()), ("val", digits.held_out()))
    )
    return Dataset(digits.CLASSES, train, val)


def load_folder(data: Path) -> Dataset:
    if (data / "train").is_dir() and (data / "val").is_dir():
        train, val = read_image_folder(data / "train"), read_image_folder(data / "val")
        if train.classes != val.classes:
            odd = sorted(set(train.classes) ^ set(val.classes))[0]
            raise UsageError(f"{data}: class {odd} is only in one of train and val, expected the same classes in both")
        return Dataset(train.classes, choose(train, train.labels >= 0), choose(val, val.labels >= 0))
    found = read_image_folder(data)
    held = hold_out(names_of(found), found.labels)
    return Dataset(found.classes, choose(found, ~held), choose(found, held))


def names_of(found: ImageFolder) -> tuple[str, ...]:
    return tuple(file.relative_to(found.folder).as_posix() for file in found.files)


def choose(found: ImageFolder, mask: np.ndarray) -> Part:
    """The pictures for which `mask` holds."""
    files = tuple(compress(found.files, mask))
    return Part(FolderPictures(str(found.folder), files), found.labels[mask], tuple(compress(names_of(found), mask)))


def jitter(picture: np.ndarray, turn: float, scale: float, shift: tuple[float, float], mirror: bool) -> np.ndarray:
    """Turn (degrees), scale and shift (shares of the size) about the centre; uint8 (H, W, 3), black outside."""
    height, width = picture.shape[:2]
    x, y = width / 2, height / 2  # Pillow counts from the corner, pixel centres at .5
    cos, sin = math.cos(math.radians(turn)) / scale, math.sin(math.radians(turn)) / scale
    to_x, to_y = x + shift[0] * width, y + shift[1] * height  # where the centre goes
    back = (cos, sin, x - cos * to_x - sin * to_y, -sin, cos, y + sin * to_x - cos * to_y)  # from new place to old
    image = Image.fromarray(picture[:, ::-1] if mirror else picture)
    return np.asarray(image.transform((width, height), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR))


# The multi-scale sampler


@dataclass(frozen=True)
class Step:
    size: Size
    indices: np.ndarray


def plan_epoch(count: int, sizes: Sequence[Size], batch: int, rng: np.random.Generator) -> list[Step]:
    """Every index below `count` once, in steps of random sizes whose batches make the work equal.

    The paper's b_t = H_n * W_n * b / (H_t * W_t), with (H_n, W_n) the largest size and b its batch. Steps are drawn
    until they hold all pictures; the excess of the last one is taken from all of them, in proportion, since a short
    last step would be unlike the others and BatchNorm cannot train on one picture.
    """
    largest = max(height * width for height, width in sizes)
    drawn: list[Size] = []
    batches: list[int] = []
    while sum(batches) < count:
        size = sizes[int(rng.integers(len(sizes)))]
        drawn.append(size)
        batches.append(largest * batch // (size[0] * size[1]))
    ends = np.cumsum(batches) * count // sum(batches)
    parts = np.split(rng.permutation(count), ends[:-1])
    return [Step(size, part) for size, part in zip(drawn, parts, strict=True) if len(part)]


# The model


def build_model(settings: Settings, classes: int) -> tuple[MobileViT, Preprocessing]:
    """From scratch, or from `init`; a classifier for another number of classes is replaced by a fresh one."""
    torch.manual_seed(settings.seed)
    if settings.init is None:
        model = MobileViT(replace(VARIANTS[settings.variant], num_classes=classes))
        return model, Preprocessing("RGB", settings.image_size, resize_ratio=1.0, source="finetune_digits.py")
    found = load_weights(settings.init)
    for note in found.notes:
        print(f"finetune_digits.py: {note}", file=sys.stderr)
    model = MobileViT(replace(found.config, num_classes=classes))
    state = dict(found.state)
    if found.config.num_classes != classes:
        state |= {f"classifier.{name}": tensor for name, tensor in model.classifier.state_dict().items()}
    model.load_state_dict(state)
    return model, found.preprocessing.with_size(settings.image_size)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr)


def learning_rate(progress: float, settings: Settings) -> float:
    """Linear warm-up, then a cosine to a tenth, as in the paper; `progress` runs from 0 to 1."""
    if progress < settings.warmup:
        return settings.lr * (0.1 + 0.9 * progress / settings.warmup)
    along = (progress - settings.warmup) / (1 - settings.warmup)
    return settings.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * along)) / 2)


@torch.no_grad()
def average_into(average: nn.Module, model: nn.Module, keep: float) -> None:
    """average = keep * average + (1 - keep) * model, statistics of BatchNorm included."""
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - keep)
        else:
            mean.copy_(value)


# Training


class Training:
    """The state of a run: weights, their average, the optimizer, the place in the sampler, the losses so far."""

    def __init__(self, settings: Settings, part: Part, classes: int) -> None:
        self.settings, self.part = settings, part
        self.model, self.preprocessing = build_model(settings, classes)
        self.average = copy.deepcopy(self.model).eval()
        self.optimizer = make_optimizer(self.model, settings)
        self.epoch = self.step = self.steps = 0  # the next step to do is `step` of `epoch`; `steps` are done
        self.losses = [0.0] * settings.epochs  # mean over the pictures of each epoch
        self.pool = ThreadPoolExecutor(settings.threads)
        self.file = settings.out.with_suffix(".training.pt")

    def run_epoch(self) -> Iterator[int]:
        """Train to the end of this epoch; yields the number of pictures of each step after it."""
        self.model.train()
        plan = self.plan()
        for step in plan[self.step :]:
            self.learn(step, len(plan))
            if self.steps % self.settings.save_every == 0:
                self.save()
            yield len(step.indices)
        self.epoch, self.step = self.epoch + 1, 0

    def plan(self) -> list[Step]:
        rng = np.random.default_rng((self.settings.seed, self.epoch, 0))
        return plan_epoch(len(self.part.labels), self.settings.sizes, self.settings.batch, rng)

    def learn(self, step: Step, steps: int) -> None:
        """One step of the optimizer."""
        rng = np.random.default_rng((self.settings.seed, self.epoch, 1 + self.step))
        torch.manual_seed(int(rng.integers(2**62)))  # for dropout
        images, labels = self.batch(step, rng)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate((self.epoch + self.step / steps) / self.settings.epochs, self.settings)
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.settings.smoothing)
        if not loss.isfinite():
            raise UsageError(
                f"the loss is {loss.item()} in epoch {self.epoch + 1}: lower --lr (now {self.settings.lr})"
            )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.step, self.steps = self.step + 1, self.steps + 1
        average_into(self.average, self.model, min(self.settings.ema, self.steps / (self.steps + 10)))
        self.losses[self.epoch] += loss.item() * len(labels) / len(self.part.labels)

    def batch(self, step: Step, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) and (B,), jittered by `rng`."""
        preprocessing = self.preprocessing.with_size(step.size)
        count = len(step.indices)
        turns, scales = rng.uniform(-10, 10, count), rng.uniform(0.85, 1.15, count)
        shifts, mirrors = rng.uniform(-0.08, 0.08, (count, 2)), rng.random(count) < (0.5 if self.settings.flip else 0)

        def load(i: int) -> np.ndarray:
            picture = self.part.read(step.indices[i], preprocessing)
            return jitter(picture, turns[i], scales[i], tuple(shifts[i]), mirrors[i])

        images = to_tensor(np.stack(list(self.pool.map(load, range(count)))), preprocessing)
        return torch.from_numpy(images), torch.from_numpy(self.part.labels[step.indices])

    # Saving and resuming

    def identity(self) -> dict[str, str]:
        """What must be the same for a saved run to be this one."""
        fixed = {name: show(value) for name, value in asdict(self.settings).items() if name not in FREE}
        return {**fixed, "data": self.part.digest()}

    def save(self) -> None:
        state = {name: getattr(self, name) for name in ("epoch", "step", "steps", "losses")}
        modules = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
        content = io.BytesIO()
        torch.save({"identity": self.identity(), **state, **modules}, content)
        write_whole(self.file, content.getvalue())

    def resume(self) -> bool:
        """Resume a run that was killed; False if there is none. Raises WeightsError if it was a different run."""
        remove_leftovers(self.file)
        if not self.file.exists():
            return False
        try:
            state = torch.load(self.file, weights_only=True)
        except Exception as error:  # torch raises anything on damaged files
            raise WeightsError(f"{self.file}: damaged, delete it to start over ({type(error).__name__})") from error
        self.compare(state["identity"])
        for name in ("epoch", "step", "steps", "losses"):
            setattr(self, name, state[name])
        for name in ("model", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        return True

    def compare(self, saved: dict[str, str]) -> None:
        for name, ours in self.identity().items():
            if saved.get(name) != ours:
                what = "other pictures" if name == "data" else f"--{name.replace('_', '-')} {saved.get(name)}"
                advice = "give the same options to resume it, or delete it to start over"
                raise WeightsError(f"{self.file}: an unfinished run with {what}: {advice}")


# Evaluation


@torch.no_grad()
def predict(weights: Path, part: Part, *, batch: int = 64) -> np.ndarray:
    """Logits (N, classes) of a saved network, with the preprocessing in its file."""
    found = load_weights(str(weights))
    model = MobileViT(found.config).eval()
    model.load_state_dict(dict(found.state))
    logits = []
    for start in range(0, len(part.labels), batch):
        indices = range(start, min(start + batch, len(part.labels)))
        images = np.stack([part.read(index, found.preprocessing) for index in indices])
        logits.append(model(torch.from_numpy(to_tensor(images, found.preprocessing))))
    return torch.cat(logits).numpy()


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


# The whole run


def finetune(settings: Settings) -> dict[str, Any]:
    """Train, save, and evaluate the saved file on what was held out."""
    torch.set_num_threads(settings.threads)
    dataset = load_dataset(settings.data)
    training = Training(settings, dataset.train, len(dataset.classes))
    resumed = training.resume()
    start = time.monotonic()
    train(training)
    dtype = torch.float16 if settings.half else torch.float32
    model, preprocessing = training.average, training.preprocessing
    save_weights(model, settings.out, preprocessing=preprocessing, labels=dataset.classes, dtype=dtype)
    logits = predict(settings.out, dataset.val)
    training.file.unlink(missing_ok=True)
    return {
        "out": str(settings.out),
        "bytes": settings.out.stat().st_size,
        "classes": len(dataset.classes),
        "train": len(dataset.train.labels),
        "held_out": len(dataset.val.labels),
        "top1": top1(logits, dataset.val.labels),
        "size": show(settings.image_size),
        "losses": [round(loss, 4) for loss in training.losses],
        "steps": training.steps,
        "resumed": resumed,
        "seconds": round(time.monotonic() - start, 1),  # of this process
    }


def train(training: Training) -> None:
    """To the last epoch, with a progress bar; a line for each epoch."""
    epochs, count = training.settings.epochs, len(training.part.labels)
    console = Console(stderr=True)
    columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        done = training.epoch * count + sum(len(step.indices) for step in training.plan()[: training.step])
        task = bar.add_task("", total=epochs * count, completed=done, epoch=training.epoch + 1)
        while training.epoch < epochs:
            bar.update(task, epoch=training.epoch + 1)
            for pictures in training.run_epoch():
                bar.advance(task, pictures)
            loss = training.losses[training.epoch - 1]
            console.print(f"epoch {training.epoch}/{epochs}: loss {loss:.4f}", highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        print(json.dumps(finetune(read_settings(arguments))))
    except MvitExportError as error:
        print(f"finetune_digits.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("finetune_digits.py: stopped; the same command resumes from the last save", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
