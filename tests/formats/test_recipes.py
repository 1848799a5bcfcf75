"""What quantization is told: recipes, pictures and calibration data, good and bad."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from mvit_export.data.calibration import NOISE_PICTURES, open_calibration
from mvit_export.data.pictures import Reading, open_labelled, open_pictures, spread
from mvit_export.data.preprocessing import Preprocessing, to_tensor
from mvit_export.errors import UsageError
from mvit_export.formats.recipes import NAMED, Recipe, Rule, read_recipe, write_toml
from mvit_export.formats.table import FORMATS, WITH_RECIPE
from mvit_export.formats.targets import find_recipe, plan_targets, recipe_name

RGB = Preprocessing("RGB", crop=(32, 32), resize_ratio=None)


def save(path: Path, seed: int, size: tuple[int, int] = (40, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


# Recipes


def test_first_rule_that_fits_decides_and_the_rest_stays_float():
    recipe = Recipe("r", (Rule("float", ("linear",), "head.*"), Rule("static", ("linear",)), Rule("weight", ("conv",))))
    assert recipe.use("linear", "head.fc") == "float"
    assert recipe.use("linear", "ahead.fc") == "static"  # the whole path must match
    assert recipe.use("conv", "stem") == "weight"
    assert recipe.use("softmax", "any") == "float"


def test_recipe_file_reads_back_as_written(tmp_path):
    rules = (Rule("float", modules=r'stages\.[01]\.".*'), Rule("dynamic", ("linear", "conv1x1")), Rule("weight"))
    recipe = Recipe("mine", rules, note='measured: 0.7 "here"\nand there')
    file = tmp_path / "mine.toml"
    file.write_text(write_toml(recipe))
    assert read_recipe(file) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[rules]]\nuse = "half"', "use is 'half', expected one of float, weight, dynamic, static"),
        ('[[rules]]\nuse = "static"\nkinds = ["dense"]', "kind is 'dense', expected one of conv, conv1x1"),
        ('[[rules]]\nuse = "static"\nmodules = "["', "is not a regular expression"),
        ('[[rules]]\nkinds = ["conv"]', "expected use"),
        ('name = "x"', "expected name, note and [[rules]]"),
        ('speed = 1\n[[rules]]\nuse = "float"', "expected name, note and [[rules]]"),
        ("[[rules", "is not a recipe"),
        ("rules = [1]", "a rule is 1, expected a table with use"),
        ("rules = [[1]]", "a rule is [1], expected a table with use"),
        (f'[[rules]]\nuse = "float"\nmodules = "{"(" * 5000}"', "is not a regular expression"),
    ],
)
def test_wrong_recipe_is_one_line(tmp_path, text, words):
    file = tmp_path / "r.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_recipe(file)
    assert words in str(caught.value) and str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_format_has_every_named_recipe():
    assert all(tuple(row.recipes) == NAMED for row in FORMATS.values())


def test_named_recipes_make_directories_of_their_own(tmp_path):
    names = [plan_targets("onnx", precision="int8", recipe=name)[0].name for name in NAMED]
    assert names == ["onnx-int8", "onnx-int8-fast", "onnx-int8-small"]
    (target,) = plan_targets("onnx", precision="int8")
    assert find_recipe(target, None) == FORMATS["onnx"].recipes["accurate"]
    file = tmp_path / "tuned.toml"
    file.write_text(write_toml(Recipe("best", (Rule("weight"),))))
    (target,) = plan_targets("onnx", precision="int8", recipe=recipe_name(file))
    assert target.name == "onnx-int8-best"
    assert find_recipe(target, file).name == "best"


def test_recipe_for_a_precision_without_one_is_refused():
    with pytest.raises(UsageError, match=f"--recipe is for --precision {', '.join(WITH_RECIPE)}"):
        plan_targets("onnx", precision="fp16", recipe="fast")
    with pytest.raises(UsageError, match="expected one of accurate, fast, small"):
        recipe_name("quick")


@pytest.mark.parametrize(("fmt", "precision"), [("coreml", "int16"), ("onnx", "palette4"), ("tflite", "palette8")])
def test_precision_that_a_format_has_not_is_refused_with_its_list(fmt, precision):
    with pytest.raises(UsageError, match=", ".join(FORMATS[fmt].precisions)):
        plan_targets(fmt, precision=precision)


def test_deployment_target_too_old_for_a_precision_is_refused():
    with pytest.raises(UsageError, match="iOS16 has no int8, expected iOS17 or later"):
        plan_targets("coreml", precision="int8", deployment_target="iOS16")
    assert plan_targets("coreml", precision="int4-weight")[0].deployment_target == "iOS18"


# Pictures


def test_folder_is_streamed_through_the_checkpoints_preprocessing(tmp_path):
    paths = [save(tmp_path / "a" / f"{i}.png", i) for i in range(3)]
    calibration = open_calibration(tmp_path, preprocessing=RGB, size=(32, 32), trained=True)
    tensors = list(calibration.tensors())
    assert len(tensors) == len(paths) == calibration.check()
    with Image.open(paths[1]) as image:
        resized = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(tensors[1], to_tensor(resized[None], RGB))
    assert any("only 3 calibration pictures" in warning for warning in calibration.warnings)


def test_unreadable_picture_is_named_and_left_out(tmp_path):
    good = [save(tmp_path / f"{i}.png", i) for i in range(9)]
    (tmp_path / "broken.png").write_bytes(good[0].read_bytes()[:200])
    (tmp_path / "text.jpg").write_text("no picture")
    calibration = open_calibration(tmp_path, preprocessing=RGB, size=(32, 32), trained=True)
    assert calibration.check() == 9
    (warning,) = calibration.warnings
    assert "2 unreadable pictures were left out" in warning and "broken.png" in warning
    assert calibration.to_json()["skipped"] == 2


def test_limit_takes_pictures_from_all_over(tmp_path):
    levels = np.arange(100, dtype=np.uint8)[:, None, None, None]
    np.savez(tmp_path / "x.npz", images=np.broadcast_to(levels, (100, 32, 32, 3)))
    reading = Reading(open_pictures(tmp_path / "x.npz"), RGB, 10)
    assert [index for index, _ in reading] == spread(100, 10) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]


def write_npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


GOOD = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": GOOD}, "has arrays x, expected `images`"),
        ({"images": GOOD[0]}, "images are uint8 (32, 32, 3), expected uint8 (N, H, W, 3)"),
        ({"images": GOOD.astype(np.float32)}, "images are float32"),
        ({"images": GOOD[:0]}, "expected uint8 (N, H, W, 3) RGB, N from 1"),
        ({"images": GOOD.transpose(0, 3, 1, 2)}, "expected uint8 (N, H, W, 3)"),
    ],
)
def test_wrong_npz_is_one_line(tmp_path, arrays, words):
    with pytest.raises(UsageError) as caught:
        open_pictures(write_npz(tmp_path / "x.npz", **arrays))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, "has no array `labels`"),
        (np.zeros(3, int), "of shape (3,), expected 4 class indices"),
        (np.zeros(4), "labels are float64"),
        (np.array([0, 1, -1, 2]), "expected 4 class indices from 0"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(tmp_path, labels, words):
    arrays = {"images": GOOD} | ({} if labels is None else {"labels": labels})
    with pytest.raises(UsageError) as caught:
        open_labelled(write_npz(tmp_path / "x.npz", **arrays))
    assert words in str(caught.value)


def test_damaged_npz_is_one_line(tmp_path):
    path = write_npz(tmp_path / "x.npz", images=GOOD)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UsageError, match=r"x\.npz"):
        open_pictures(path)


# The command


def export_int8(cli, out: Path, *arguments):
    return cli("--to", "onnx", "--model", TINY, "--precision", "int8", "--out", out, *arguments)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder.mkdir(), "holds no pictures"),
        (lambda folder: (folder.mkdir(), (folder / "x.png").write_text("x")), "none of 1 pictures can be read"),
        (lambda folder: [save(folder / f"{i}.png", 0) for i in range(4)], "all 4 calibration pictures are equal"),
        (lambda folder: None, "is neither a folder nor a .npz file"),
    ],
)
def test_bad_calibration_leaves_nothing(cli, tmp_path, make, words):
    make(tmp_path / "data")
    done = export_int8(cli, tmp_path / "out", "--calibration", tmp_path / "data")
    assert done.code == 2
    assert words in done.err and len(done.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_static_int8_of_weights_that_may_be_trained_wants_calibration(cli, tmp_path):
    done = export_int8(cli, tmp_path / "out")
    assert done.code == 2 and "pass --calibration DIR or FILE.npz" in done.err
    assert not (tmp_path / "out").exists()


def test_untrained_network_calibrates_on_seeded_noise():
    calibration = open_calibration(None, preprocessing=RGB, size=(32, 32), trained=False)
    first, second = (np.concatenate(list(calibration.pictures())) for _ in range(2))
    assert len(first) == NOISE_PICTURES and np.array_equal(first, second)
    assert calibration.to_json()["source"] == "seeded noise"


def test_calibration_for_a_precision_without_it_is_refused(cli, tmp_path):
    done = cli("--to", "onnx", "--model", TINY, "--calibration", tmp_path, "--out", tmp_path / "out")
    assert done.code == 2 and "--calibration is for precisions that lose bits" in done.err


@pytest.mark.slow
def test_manifest_keeps_recipe_and_calibration(cli, tmp_path):
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(1).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8))
    done = export_int8(cli, tmp_path / "out", "--calibration", tmp_path / "data.npz", "--recipe", "fast")
    assert done.code in (0, 1), done.err
    manifest = json.loads((tmp_path / "out/tiny/onnx-int8-fast/manifest.json").read_text())
    assert manifest["quantization"]["recipe"]["name"] == "fast"
    assert manifest["quantization"]["calibration"] == {
        "source": str(tmp_path / "data.npz"), "method": "minmax", "pictures": 20, "skipped": 0, "warnings": [],
    }  # fmt: skip


@pytest.mark.slow
def test_skipped_pictures_are_told_to_the_user(cli, tmp_path):
    for seed in range(9):
        save(tmp_path / "data" / f"{seed}.png", seed)
    (tmp_path / "data/broken.png").write_text("no picture")
    done = export_int8(cli, tmp_path / "out", "--calibration", tmp_path / "data")
    assert "1 unreadable pictures were left out, the first:" in done.out and "broken.png" in done.out


@pytest.mark.slow
def test_few_bit_weights_are_checked_on_the_pictures_that_are_given(cli, tmp_path):
    for seed in range(9):
        save(tmp_path / "data" / f"{seed}.png", seed)
    arguments = ("--to", "onnx", "--model", TINY, "--precision", "int8-weight", "--out", tmp_path / "out", "--json")
    assert cli(*arguments).json["artifacts"][0]["parity"][0]["inputs"] == 9  # the usual ones
    given = cli(*arguments, "--overwrite", "--calibration", tmp_path / "data").json["artifacts"][0]["parity"][0]
    assert given["inputs"] == 8 and given["worst_case"].startswith("sample-")
