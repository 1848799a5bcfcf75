"""The training example: its sampler and recipe, kills and resumptions, and the checkpoint that it made."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Finished
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import digits
import finetune_digits
from finetune_digits import Part, Settings, Training
from mvit_export.data.folders import read_image_folder
from mvit_export.data.pictures import ArrayPictures
from mvit_export.data.preprocessing import FAMILY_PREPROCESSING, Preprocessing
from mvit_export.errors import UsageError, WeightsError
from mvit_export.families.mobilevit.network import create_mobilevit
from mvit_export.families.mobilevit.weights import load_weights
from mvit_export.models.own_files import save_weights

SCRIPT = ROOT / "examples" / "finetune_digits.py"
TRAINED = ROOT / "examples" / "digits_xxs.safetensors"
SMALL = ((32, 32), (64, 64))


def make_pictures(folder: Path, counts: dict[str, int], side: int = 40) -> Path:
    """Noise that is brighter on the left ("left") or on the right (any other class)."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture = rng.integers(0, 100, (side, side, 3), dtype=np.uint8)
            half = slice(0, side // 2) if name == "left" else slice(side // 2, side)
            picture[:, half] += 120
            Image.fromarray(picture).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures") / "data", {"left": 32, "right": 32})


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> Settings:
    out = tmp_path / "out.safetensors"
    return Settings(out, data=folder, sizes=SMALL, image_size=(32, 32), batch=4, epochs=2, threads=1, save_every=1)


def arguments(settings: Settings) -> list[str]:
    return [
        *("--out", str(settings.out), "--data", str(settings.data), "--sizes", "32,64", "--image-size", "32"),
        *("--batch", "4", "--epochs", str(settings.epochs), "--threads", "1", "--save-every", "1"),
    ]


# The sampler


def plans(count: int, sizes: Any, batch: int, epochs: int) -> list[list[finetune_digits.Step]]:
    return [finetune_digits.plan_epoch(count, sizes, batch, np.random.default_rng(epoch)) for epoch in range(epochs)]


PAPER = tuple((side, side) for side in (160, 192, 256, 288, 320))


@pytest.mark.parametrize(
    ("count", "sizes", "batch"),
    [
        (1343, Settings.sizes, Settings.batch),
        (5000, PAPER, 32),
        (1000, ((64, 96), (32, 32)), 8),
        (5, ((32, 32), (96, 96)), 4),
    ],
)
def test_every_picture_once_an_epoch(count: int, sizes: Any, batch: int) -> None:
    for plan in plans(count, sizes, batch, 20):
        indices = np.concatenate([step.indices for step in plan])
        assert sorted(indices) == list(range(count))
        assert all(len(step.indices) and step.size in sizes for step in plan)
    assert count == 5 or (indices != np.arange(count)).any(), "in another order"


@pytest.mark.parametrize(("count", "sizes", "batch"), [(1343, Settings.sizes, Settings.batch), (5000, PAPER, 32)])
def test_work_per_step_is_level(count: int, sizes: Any, batch: int) -> None:
    """Pixels a step: within one picture of its share everywhere, within 15 % from step to step."""
    nominal = batch * max(height * width for height, width in sizes)
    for plan in plans(count, sizes, batch, 5):
        work = [step.size[0] * step.size[1] * len(step.indices) for step in plan]
        assert max(work) <= 1.15 * min(work)
        assert 0.8 * nominal <= np.mean(work) <= nominal
        for step, pixels in zip(plan, work, strict=True):
            assert abs(pixels - np.mean(work)) <= 2 * step.size[0] * step.size[1]


def test_small_sizes_have_large_batches() -> None:
    (plan,) = plans(10_000, Settings.sizes, 8, 1)
    batches = {size: max(len(step.indices) for step in plan if step.size == size) for size in Settings.sizes}
    assert batches == {(96, 96): 8, (64, 64): 18, (32, 32): 72}


def test_sizes_are_drawn_evenly_and_are_multiples_of_32() -> None:
    drawn = Counter(step.size for plan in plans(1343, Settings.sizes, 8, 30) for step in plan)
    assert set(drawn) == set(Settings.sizes)
    assert min(drawn.values()) > 0.8 * max(drawn.values())
    assert all(side % 32 == 0 for size in Settings.sizes for side in size)


# The recipe


def test_learning_rate_rises_then_falls_to_a_tenth(settings: Settings) -> None:
    rates = [finetune_digits.learning_rate(progress, settings) for progress in np.linspace(0, 1, 101)]
    assert math.isclose(rates[0], 0.1 * settings.lr) and math.isclose(rates[-1], 0.1 * settings.lr)
    assert math.isclose(rates[10], settings.lr) and np.argmax(rates) == 10
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_average_takes_its_share_of_weights_and_statistics() -> None:
    average, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    model.weight.data[:] = 3.0
    model.running_mean[:] = torch.tensor([4.0, 8.0])
    model.num_batches_tracked.fill_(5)
    finetune_digits.average_into(average, model, 0.75)
    assert average.weight.tolist() == [1.5, 1.5]
    assert average.running_mean.tolist() == [1.0, 2.0]
    assert average.num_batches_tracked == 5


def test_only_matrices_decay(settings: Settings) -> None:
    model = create_mobilevit("xxs", num_classes=2)
    decaying, free = finetune_digits.make_optimizer(model, settings).param_groups
    assert (decaying["weight_decay"], free["weight_decay"]) == (settings.weight_decay, 0.0)
    assert {p.ndim for p in decaying["params"]} == {2, 4} and {p.ndim for p in free["params"]} == {1}
    assert len(decaying["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_jitter_about_the_centre() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    still = {"turn": 0.0, "scale": 1.0, "shift": (0.0, 0.0), "mirror": False}
    assert (finetune_digits.jitter(picture, **still) == picture).all()
    assert (finetune_digits.jitter(picture, **{**still, "mirror": True}) == picture[:, ::-1]).all()
    shifted = finetune_digits.jitter(picture, **{**still, "shift": (4 / 32, 1 / 32)})
    assert (shifted[1:, 4:] == picture[:-1, :-4]).all(), "4 to the right, 1 down"
    assert not shifted[0].any() and not shifted[:, :4].any(), "black from outside"
    quarter = finetune_digits.jitter(picture, **{**still, "turn": 90.0})
    assert np.abs(quarter.astype(int) - np.rot90(picture, -1)).max() <= 1, "clockwise; truncated after interpolation"


def test_jitter_scales() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[24:40, 24:40] = 255
    larger = finetune_digits.jitter(picture, 0.0, 1.5, (0.0, 0.0), False)
    assert math.isclose(larger.mean() / picture.mean(), 1.5**2, rel_tol=0.05)
    assert abs(int(larger[:, :32].sum()) - int(larger[:, 32:].sum())) <= larger.sum() * 0.02


# Training


@pytest.mark.slow
def test_brief_training_sees_the_loss_fall(settings: Settings) -> None:
    result = finetune_digits.finetune(replace(settings, epochs=6, batch=8, sizes=((32, 32),)))
    assert result["losses"][-1] < 0.7 * result["losses"][0]
    assert (result["classes"], result["train"], result["held_out"]) == (2, 48, 16)
    held = finetune_digits.load_dataset(settings.data).val
    assert result["top1"] == finetune_digits.top1(finetune_digits.predict(settings.out, held), held.labels)
    found = load_weights(str(settings.out))
    assert found.labels == ("left", "right")
    assert found.preprocessing == Preprocessing("RGB", (32, 32), resize_ratio=1.0, source="finetune_digits.py")
    assert not settings.out.with_suffix(".training.pt").exists(), "done with"


@pytest.mark.slow
def test_brief_training_on_the_digits_sees_the_loss_fall(tmp_path: Path) -> None:
    """A few steps at the smallest size."""
    settings = Settings(tmp_path / "out.safetensors", sizes=((32, 32),), batch=64, epochs=2, threads=1)
    training = Training(settings, finetune_digits.load_dataset(None).train, 10)
    assert sum(training.run_epoch()) == 1343
    assert sum(training.run_epoch()) == 1343
    assert training.losses[1] < training.losses[0] - 0.2


@pytest.mark.slow
def test_seed_decides(settings: Settings, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        finetune_digits.finetune(replace(settings, out=tmp_path / f"{name}.safetensors", seed=seed, epochs=1))
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.slow
def test_half_stores_fp16(settings: Settings) -> None:
    finetune_digits.finetune(replace(settings, half=True, epochs=1))
    kinds = {tensor.dtype for tensor in load_file(settings.out).values()}
    assert kinds == {torch.float16, torch.int64}, "int64 counts BatchNorm's batches"
    assert {tensor.dtype for tensor in load_weights(str(settings.out)).state.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(("classes", "kept"), [(2, True), (5, False)])
def test_init_keeps_what_fits(classes: int, kept: bool, settings: Settings, tmp_path: Path) -> None:
    """The body and the preprocessing always (BGR stays BGR); the classifier where the classes are as many."""
    torch.manual_seed(7)
    start, file = create_mobilevit("xs", num_classes=classes), tmp_path / "init.safetensors"
    save_weights(start, file, preprocessing=FAMILY_PREPROCESSING["ml-cvnets"])
    model, preprocessing = finetune_digits.build_model(replace(settings, init=str(file)), 2)
    assert preprocessing == FAMILY_PREPROCESSING["ml-cvnets"].with_size((32, 32))
    assert torch.equal(model.stem.conv.weight, start.stem.conv.weight)
    assert model.classifier.out_features == 2
    assert kept == (
        model.classifier.weight.shape == start.classifier.weight.shape
        and torch.equal(model.classifier.weight, start.classifier.weight)
    )


def arrays(images: list[np.ndarray]) -> Part:
    count = len(images)
    return Part(ArrayPictures("made", np.stack(images)), np.zeros(count, np.int64), tuple(map(str, range(count))))


def test_preprocessing_is_that_of_the_network(settings: Settings) -> None:
    """A red picture reaches a BGR network as BGR."""
    red = np.zeros((40, 40, 3), np.uint8)
    red[..., 0] = 255
    training = Training(settings, arrays([red, red]), 2)
    training.preprocessing = FAMILY_PREPROCESSING["hf"]
    images, _ = training.batch(finetune_digits.Step((64, 32), np.array([1])), np.random.default_rng(0))
    assert images.shape == (1, 3, 64, 32)
    assert images[0].amax(dim=(1, 2)).tolist() == [0.0, 0.0, 1.0]


def test_flip_mirrors_half(settings: Settings) -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, :8] = 255
    training = Training(settings, arrays([picture] * 64), 2)
    step = finetune_digits.Step((32, 32), np.arange(64))
    for flip, least, most in ((False, 0, 0), (True, 16, 48)):
        training.settings = replace(settings, flip=flip)
        images, _ = training.batch(step, np.random.default_rng(0))
        mirrored = images[..., 16:].sum(dim=(1, 2, 3)) > images[..., :16].sum(dim=(1, 2, 3))
        assert least <= int(mirrored.sum()) <= most


def test_gradients_are_clipped(settings: Settings) -> None:
    training = Training(replace(settings, clip=1e-3), part_of(settings), 2)
    next(training.run_epoch())
    norm = math.hypot(*(float(p.grad.norm()) for p in training.model.parameters() if p.grad is not None))
    assert math.isclose(norm, 1e-3, rel_tol=0.01)


def part_of(settings: Settings) -> Part:
    return finetune_digits.load_dataset(settings.data).train


# Kills


def states(training: Training) -> dict[str, Any]:
    return {**training.model.state_dict(), **{f"average {k}": v for k, v in training.average.state_dict().items()}}


def finish(training: Training) -> Training:
    while training.epoch < training.settings.epochs:
        for _ in training.run_epoch():
            pass
    return training


@pytest.mark.slow
def test_resumed_at_any_step_equals_uninterrupted(settings: Settings, tmp_path: Path) -> None:
    whole = finish(Training(settings, part_of(settings), 2))
    for stop in (1, whole.steps // 2, len(whole.plan()), whole.steps):
        now = replace(settings, out=tmp_path / f"{stop}.safetensors")
        killed = Training(now, part_of(now), 2)
        while killed.steps < stop:
            next(killed.run_epoch())  # a fresh plan each time, as after a kill
            if killed.step == len(killed.plan()):
                killed.epoch, killed.step = killed.epoch + 1, 0
        torch.manual_seed(stop)  # what else ran in between must not matter
        resumed = Training(now, part_of(now), 2)
        assert resumed.resume() and resumed.steps == stop
        finish(resumed)
        assert resumed.losses == whole.losses
        expected = states(whole)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in states(resumed).items()), stop


def start(settings: Settings) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, str(SCRIPT), *arguments(settings)]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(settings: Settings, tmp_path: Path) -> None:
    settings = replace(settings, epochs=4)
    whole = start(replace(settings, out=tmp_path / "whole.safetensors"))
    expected, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    assert err.splitlines()[-1].startswith("epoch 4/4: loss "), "a line an epoch where there is no terminal"
    assert len(expected.splitlines()) == 1
    for _ in range(2):
        process = start(settings)
        kill_after_a_save(process, settings.out.with_suffix(".training.pt"))
    process = start(settings)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert settings.out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    found, wanted = json.loads(out), json.loads(expected)
    assert (found["resumed"], wanted["resumed"]) == (True, False)
    assert (found["losses"], found["steps"], found["top1"]) == (wanted["losses"], wanted["steps"], wanted["top1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "whole.safetensors"]


def kill_after_a_save(process: subprocess.Popen[str], file: Path) -> None:
    before = file.stat().st_mtime_ns if file.exists() else 0
    deadline = time.monotonic() + 120
    while not file.exists() or file.stat().st_mtime_ns == before:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had not ended yet"


@pytest.mark.slow
def test_resuming_another_run_is_refused(settings: Settings) -> None:
    training = Training(settings, part_of(settings), 2)
    next(training.run_epoch())
    Training(replace(settings, half=True, save_every=9), part_of(settings), 2).resume()  # these may change
    with pytest.raises(WeightsError, match=r"out\.training\.pt: an unfinished run with --epochs 2: give the same"):
        Training(replace(settings, epochs=3), part_of(settings), 2).resume()
    fewer = finetune_digits.choose(read_image_folder(settings.data), np.arange(64) > 0)
    with pytest.raises(WeightsError, match="an unfinished run with other pictures: give the same"):
        Training(settings, fewer, 2).resume()


def test_damaged_state_is_one_line(settings: Settings) -> None:
    settings.out.with_suffix(".training.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(WeightsError, match=r"out\.training\.pt: damaged, delete it to start over"):
        Training(settings, part_of(settings), 2).resume()


def test_no_state_is_no_resumption(settings: Settings) -> None:
    """What a kill left in the middle of a save is removed; other files stay."""
    half_written = settings.out.with_name(".out.training.pt.123.tmp")
    other = settings.out.with_name(".other.training.pt.123.tmp")
    half_written.touch()
    other.touch()
    assert not Training(settings, part_of(settings), 2).resume()
    assert (half_written.exists(), other.exists()) == (False, True)


# Folders of pictures


def test_folder_with_train_and_val(tmp_path: Path) -> None:
    make_pictures(tmp_path / "train", {"left": 3, "right": 2})
    make_pictures(tmp_path / "val", {"left": 1, "right": 4})
    dataset = finetune_digits.load_dataset(tmp_path)
    assert dataset.classes == ("left", "right")
    assert (dataset.train.labels.tolist(), dataset.val.labels.tolist()) == ([0, 0, 0, 1, 1], [0, 1, 1, 1, 1])
    assert {file.parts[-3] for file in dataset.train.pictures.files} == {"train"}


def test_folder_is_split_in_the_same_way_each_time(folder: Path) -> None:
    one, two = finetune_digits.load_dataset(folder), finetune_digits.load_dataset(folder)
    assert one.val.names == two.val.names and not set(one.val.names) & set(one.train.names)
    assert np.bincount(one.val.labels).tolist() == [8, 8]


def test_digits_are_named_by_their_part() -> None:
    dataset = finetune_digits.load_dataset(None)
    assert (len(dataset.train.labels), len(dataset.val.labels)) == (1343, 454)
    assert dataset.train.digest() != dataset.val.digest()


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda folder: None, "no class folders in it, expected"),
        (lambda folder: (folder / "left").mkdir(), "left: no pictures in it, expected some ("),
        (lambda folder: make_pictures(folder, {"left": 4}), "one class only (left), expected at least two class"),
        (
            lambda folder: make_pictures(folder, {"left": 4, "right": 1}),
            "class right has no picture left to train on, expected at least 2 in all",
        ),
        (
            lambda folder: (
                make_pictures(folder / "train", {"left": 2, "right": 2}),
                make_pictures(folder / "val", {"left": 2, "up": 2}),
            ),
            "class right is only in one of train and val, expected the same classes in both",
        ),
        (
            lambda folder: (make_pictures(folder, {"left": 4, "right": 4}) / "left" / "2.png").write_bytes(b"no"),
            "2.png: cannot identify image file",
        ),
    ],
)
def test_unusable_folders(
    fill: Callable[[Path], object],
    message: str,
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    fill(folder)
    with pytest.raises(SystemExit) as ended:
        finetune_digits.main([*arguments(replace(settings, data=folder, epochs=1))])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith(f"finetune_digits.py: error: {folder}") and message in err
    assert not settings.out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "32,48"], "--sizes has 48, expected multiples of 32, the network's stride"),
        (["--sizes", "big"], "--sizes is 'big', expected N or HxW with commas, such as 160,192,256x320"),
        (["--image-size", "16"], "--image-size is 16, expected at least 32 on each side"),
        (["--variant", "m"], "--variant is m, expected one of xxs, xs, s"),
        (["--batch", "3"], "--batch is 3, expected at least 4, because BatchNorm compares pictures"),
        (["--epochs", "0"], "--epochs is 0, expected at least 1"),
        (["--lr", "0"], "--lr is 0.0, expected more than 0"),
        (["--ema", "1"], "--ema is 1.0, expected a share from 0 to below 1"),
        (["--seed", "-1"], "--seed is -1, expected at least 0"),
        (["--save-every", "0"], "--save-every is 0, expected at least 1"),
        (["--out", "weights.pt"], "--out is weights.pt, expected NAME.safetensors in a folder that exists"),
        (["--out", "no/such/w.safetensors"], "--out is no/such/w.safetensors, expected NAME.safetensors in a folder"),
        (["--init", "no.pt"], "no.pt: no such file, expected a checkpoint: check the path"),
    ],
)
def test_unusable_options(
    options: list[str], message: str, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        finetune_digits.main([*arguments(settings), *options])
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(err.splitlines()) == 1 and message in err


def test_loss_that_is_no_number_is_said(settings: Settings) -> None:
    training = Training(settings, part_of(settings), 2)
    nn.init.constant_(training.model.classifier.weight, math.nan)
    with pytest.raises(UsageError, match=r"^the loss is nan in epoch 1: lower --lr \(now 0\.001\)$"):
        finish(training)
    assert training.steps == 0


def test_defaults_on_the_command_line_are_those_of_the_settings(tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    assert finetune_digits.read_settings(["--out", str(out)]) == Settings(out)
    given = finetune_digits.read_settings(
        ["--out", str(out), "--sizes", "64,96x128,64", "--image-size", "96x64", "--flip"]
    )
    assert (given.sizes, given.image_size, given.flip) == (((64, 64), (96, 128)), (96, 64), True)


# The trained checkpoint


@pytest.mark.slow
def test_trained_checkpoint_knows_the_held_out_digits() -> None:
    images, labels = digits.held_out()
    logits = finetune_digits.predict(TRAINED, Part(ArrayPictures("digits", images), labels, ()))
    assert finetune_digits.top1(logits, labels) >= 0.985


def test_trained_checkpoint_carries_what_it_needs() -> None:
    found = load_weights(str(TRAINED))
    assert (found.variant, found.family, found.labels) == ("xxs", "mvit-export", digits.CLASSES)
    assert found.preprocessing == Preprocessing("RGB", (64, 64), resize_ratio=1.0, source="finetune_digits.py")
    assert {tensor.dtype for tensor in load_file(TRAINED).values()} == {torch.float16, torch.int64}
    assert TRAINED.stat().st_size < 2_500_000


def test_trained_checkpoint_is_the_one_on_the_card() -> None:
    card = (ROOT / "examples" / "digits_xxs.md").read_text(encoding="utf-8")
    assert load_weights(str(TRAINED)).sha256 in card


@pytest.mark.slow
def test_trained_checkpoint_exports(cli: Callable[..., Finished], tmp_path: Path) -> None:
    done = cli("--to", "onnx", "--weights", TRAINED, "--image-size", "64", "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "mobilevit_xxs" / "onnx-fp32" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["weights"]["trained"] is True
    assert manifest["model"]["labels"] == list(digits.CLASSES)
