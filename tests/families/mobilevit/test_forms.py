"""The forms of a MobileViT: each is the same function, and whatever is no plain MobileViT block is left alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LABELS, TINY, Finished
from helpers import randomize
from tiny import CONFIG
from torch import nn

from mvit_export import export, load_model, verify
from mvit_export.converters import export as export_module
from mvit_export.errors import ArtifactError, ConversionError, UsageError
from mvit_export.families.mobilevit.forms import FORMS, algebra, difference, patches, take_form
from mvit_export.families.mobilevit.forms.blocks import OpenBlock, is_standard
from mvit_export.families.mobilevit.forms.cut_channels import CutConv, CutLinear, cut_convs, cut_linears
from mvit_export.families.mobilevit.forms.patches import PatchesBlock
from mvit_export.families.mobilevit.forms.winograd import WinogradConv
from mvit_export.families.mobilevit.network import ConvNormAct, MobileViT, MobileViTBlock, create_mobilevit
from mvit_export.formats.base import PLAIN
from mvit_export.formats.table import FORMATS, FULL
from mvit_export.formats.targets import plan_targets
from mvit_export.models.fold import fold_batch_norms
from mvit_export.readers.inspect import inspect_artifact
from mvit_export.runner.profile_ops import profile_tflite

pytestmark = pytest.mark.slow

PAIRS = [(fmt.name, form) for fmt in FORMATS.values() for form in fmt.forms if form != PLAIN]
KEYS = pytest.mark.parametrize("key", PAIRS, ids="-".join)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def folded(network: nn.Module, x: torch.Tensor) -> nn.Module:
    return fold_batch_norms(network.eval(), x)


def close(found: torch.Tensor, expected: torch.Tensor, rel: float = 5e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=rel * float(expected.abs().max()))


def test_every_form_that_can_be_asked_for_exists() -> None:
    assert {FORMATS[fmt].layout(form) for fmt, form in PAIRS} == {*FORMS}


# The same function


@KEYS
@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 3, 64, 96), (1, 3, 80, 72), (3, 3, 64, 64), (2, 3, 48, 80)])
@torch.no_grad()
def test_form_changes_nothing(key: tuple[str, str], shape: tuple[int, ...], tiny_model: Any) -> None:
    """Also where the patch does not divide the map, and in batches."""
    x = noise(*shape)
    network = folded(tiny_model.module, x)
    formed = take_form(network, key, x, batched=shape[0] > 1)
    assert formed is not None
    assert not any(type(part) is MobileViTBlock for part in formed.modules())
    close(formed(x), tiny_model.module(x))


@KEYS
@pytest.mark.parametrize("change", [{"patch_config": "B"}, {"output_stride": 8}, {"widths": (32, 48, 24)}])
@torch.no_grad()
def test_form_changes_nothing_in_other_networks(key: tuple[str, str], change: dict[str, Any]) -> None:
    network, x = randomize(MobileViT(replace(CONFIG, **change))), noise(1, 3, 128, 128)
    formed = take_form(folded(network, x), key, x)
    assert formed is not None
    close(formed(x), network(x))


@KEYS
def test_modules_with_weights_keep_their_paths(key: tuple[str, str], tiny_model: Any) -> None:
    x = noise(1, 3, 64, 64)
    network = folded(tiny_model.module, x)
    before = copy.deepcopy(network.state_dict())
    formed = take_form(network, key, x)
    assert formed is not None
    with_weights = {name.rpartition(".")[0] for name, _ in network.named_parameters()}
    assert with_weights <= {name for name, _ in formed.named_modules()}, "a recipe would not find these"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()), "the original changed"


def open_block(block: MobileViTBlock, *passes: Callable[[OpenBlock], None]) -> OpenBlock:
    opened = OpenBlock(copy.deepcopy(block))
    for rewrite in (algebra.scale_queries, *passes):
        rewrite(opened)
    return opened


@pytest.fixture
def block() -> Any:
    block = randomize(MobileViTBlock(48, 40, depth=2, patch=2, dropout=0.1))
    return folded(nn.Sequential(block), noise(1, 48, 8, 8))[0]  # type: ignore[index]


PASSES = {
    "scale_queries": (),
    "fold_norm_affine": (algebra.fold_norm_affine,),
    "move_value_bias": (algebra.move_value_bias,),
    "centre_stream": (algebra.fold_norm_affine, algebra.centre_stream),
    "cut_convs": (cut_convs,),
    "cut_linears": (cut_linears,),
}


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
@torch.no_grad()
def test_each_pass_changes_nothing(passes: tuple[Callable[[OpenBlock], None], ...], block: Any) -> None:
    x = noise(2, 48, 8, 8)
    close(PatchesBlock(open_block(block, *passes))(x), block(x))


@torch.no_grad()
def test_what_each_pass_is_for(block: Any) -> None:
    opened = open_block(
        block, algebra.fold_norm_affine, algebra.move_value_bias, algebra.centre_stream, cut_linears, cut_convs
    )
    tokens = noise(5, 48) @ opened.to_tokens.weight.flatten(1).T
    assert float(tokens.mean(dim=1).abs().max()) < 1e-6, "the stream is centred"
    assert len(opened.encoders[0].attention.qkv.biases) == 1, "k and v have no bias"
    assert isinstance(opened.norm, algebra.CentredNorm)
    assert isinstance(opened.local, CutConv)
    assert [conv.out_channels for conv in opened.local.conv] == [32, 16]
    for linear in (opened.encoders[0].attention.proj, opened.encoders[1].mlp.reduce):
        assert isinstance(linear, CutLinear)
        assert [len(weight) for weight in linear.weights] == [32, 8]


@pytest.mark.parametrize(("size", "width"), [((2, 2), 5), ((4, 10), 48), ((16, 8), 5)])
@torch.no_grad()
def test_winograd_is_the_convolution(size: tuple[int, int], width: int) -> None:
    layer = randomize(ConvNormAct(6, width, 3))
    layer = folded(nn.Sequential(layer), noise(1, 6, *size))[0]  # type: ignore[index]
    x = noise(2, 6, *size)
    found = WinogradConv(layer)(x).reshape(2, 2, 2, size[0] // 2, size[1] // 2, width)
    pixels = found.permute(2, 5, 3, 0, 4, 1).reshape(2, width, *size)  # (ph, pw, B, nh, nw, C) -> (B, C, H, W)
    close(pixels, layer(x))


@pytest.mark.parametrize(
    ("batch", "at_once", "parts"), [(1, 256, 1), (1, 4, 1), (1, 3, 2), (1, 1, 4), (3, 3, 4), (3, 2, 1), (1, 0, 1)]
)
@torch.no_grad()
def test_attention_in_parts(batch: int, at_once: int, parts: int, block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of 8x8 has 16 tokens to each of 4 places in a patch, so 4 * 16**2 attention weights; `at_once` of these."""
    taken: list[torch.Size] = []

    def attend(q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        taken.append(q.shape)
        return whole(q, *others)

    whole = patches.attend
    monkeypatch.setattr(patches, "attend", attend)
    monkeypatch.setattr(patches, "AT_ONCE", at_once * 4 * 16**2)
    x = noise(batch, 48, 8, 8)
    close(PatchesBlock(open_block(block))(x), block(x))
    assert taken == 2 * parts * [(4 * batch // parts, 4, 16, 10)]  # in two encoders


def test_file_with_attention_in_parts(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what files of 256x256 have. XNNPACK has fp16 kernels for what cuts and joins."""
    monkeypatch.setattr(patches, "AT_ONCE", 4 * 16**2)
    (result,) = export(tiny_model, to="tflite", out=tmp_path)
    assert result.parity is not None and result.parity.status == "pass", result.parity and result.parity.reason
    assert inspect_artifact(result.artifact)["operators"]["SOFTMAX"] > 4, "an encoder has more than one"
    rows = profile_tflite(str(result.artifact.model_path), {"image": noise(1, 3, 64, 64).numpy()}, runs=3, fp16=True)
    assert not [row["type"] for row in rows if "F32" in row["type"]]


# What is left alone


class Louder(MobileViTBlock):
    """A user's own block, which computes something else with the same parts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Lora(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.mean()


def replace_forward(block: Any) -> None:
    plain = block.forward
    block.forward = lambda x: 2 * plain(x)


def change_class(block: Any) -> None:
    block.__class__ = Louder


def replace_dropout(block: Any) -> None:
    block.encoders[0].dropout = nn.Hardtanh(-0.1, 0.1)


def subclass_linear(block: Any) -> None:
    block.encoders[0].mlp.expand.__class__ = Lora


def hook(block: Any) -> None:
    block.encoders[0].attention.register_forward_hook(lambda module, args, output: 2 * output)


def dilate(block: Any) -> None:
    block.local.conv.dilation = block.local.conv.padding = (2, 2)


def reflect(block: Any) -> None:
    conv = block.fuse.conv
    block.fuse.conv = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, padding_mode="reflect").eval()


def without_bias(block: Any) -> None:
    block.encoders[0].attention.qkv.bias = None


def without_affine(block: Any) -> None:
    block.norm = nn.LayerNorm(16, elementwise_affine=False)


def other_activation(block: Any) -> None:
    block.encoders[0].mlp.act = nn.GELU()


CHANGES = (
    change_class, replace_forward, replace_dropout, subclass_linear, hook, dilate, reflect, without_bias,
    without_affine, other_activation,
)  # fmt: skip


@pytest.mark.parametrize("key", [("onnx", "flat"), ("tflite", "winograd")], ids="-".join)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_block_keeps_its_form(change: Callable[[Any], None], key: tuple[str, str], tiny_model: Any) -> None:
    network, x = copy.deepcopy(tiny_model.module), noise(1, 3, 64, 64)
    change(network.stages[2][1])
    expected = network(x)
    assert float((expected - tiny_model.module(x)).abs().max()) > 1e-4, "the change computes something else"
    formed: Any = take_form(folded(network, x), key, x, batched=False)
    close(formed(x), expected)
    assert type(formed.stages[2][1]) is type(network.stages[2][1]) and type(formed.stages[3][1]) is not MobileViTBlock


def test_network_without_such_blocks_has_no_form() -> None:
    x = noise(1, 3, 64, 64)
    assert take_form(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), ("onnx", "flat"), x) is None
    assert not is_standard(MobileViTBlock(8, 16, depth=1, patch=2, dropout=0.0)), "its BatchNorms are not folded"


def test_network_that_reaches_into_its_blocks_is_refused() -> None:
    class Scaled(MobileViT):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.stages[2][1].to_tokens.weight.sum()  # type: ignore[index,union-attr]

    network, x = randomize(Scaled(CONFIG)), noise(1, 3, 64, 64)
    with pytest.raises(ConversionError, match=r"form patches changes the output 'logits' .*; pass --form plain"):
        take_form(folded(network, x), ("tflite", "patches"), x, names=("logits",))


@torch.no_grad()
def test_what_float32_rounds_away_is_not_the_form() -> None:
    """The outputs of a network with transformers' initial weights are denormal: a few hundred steps of float32."""
    torch.manual_seed(0)
    network, x = create_mobilevit("xxs", num_classes=10), noise(1, 3, 32, 32)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            nn.init.normal_(layer.weight, std=0.02)
    plain = folded(network, x)
    assert 0 < float(plain(x).abs().max()) < 1e-38
    errors = []
    for key in {FORMATS[fmt].layout(form): (fmt, form) for fmt, form in PAIRS}.values():
        formed = take_form(plain, key, x)
        assert formed is not None
        errors.append(difference(formed(x), plain(x)))
        wide = copy.deepcopy(formed).double(), copy.deepcopy(plain).double()
        assert difference(*(module(x.double()) for module in wide)) < 1e-6
    assert max(errors) > 1e-3, "float32 shows the differences that float64 must explain"


def test_output_of_nothing_but_zeros_is_the_same(tiny_model: Any) -> None:
    """A zero-initialised classifier, or a mask: there is no scale to hold an error against."""
    network, x = copy.deepcopy(tiny_model.module), noise(1, 3, 64, 64)
    nn.init.zeros_(network.classifier.weight)
    nn.init.zeros_(network.classifier.bias)
    for key in PAIRS:
        assert take_form(folded(network, x), key, x) is not None


def test_difference_of_outputs() -> None:
    one, inf, nan = torch.ones(2), torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.nan])
    assert difference(one, one) == difference(inf, inf) == difference(nan, nan) == 0
    assert difference(torch.zeros(2), torch.zeros(2)) == 0
    assert difference(1.5 * one, one) == pytest.approx(0.5)
    for found, expected in ((one, torch.zeros(2)), (inf, one), (one, nan), (torch.ones(3), one)):
        assert difference(found, expected) == float("inf")


@KEYS
@torch.no_grad()
def test_layers_that_stand_twice_are_rewritten_once(key: tuple[str, str], tiny_model: Any) -> None:
    network, x = copy.deepcopy(tiny_model.module), noise(1, 3, 64, 64)
    encoders = network.stages[3][1].encoders
    encoders[1] = encoders[0]
    formed = take_form(folded(network, x), key, x)
    assert formed is not None
    close(formed(x), network(x))


@KEYS
@torch.no_grad()
def test_convolutions_without_bias_or_norm(key: tuple[str, str]) -> None:
    network, x = randomize(MobileViT(replace(CONFIG, stages=(8, 8, 48, 16, 16)))), noise(1, 3, 64, 64)
    for part in network.modules():
        if isinstance(part, ConvNormAct):
            part.norm = nn.Identity()
    formed = take_form(folded(network, x), key, x)
    assert formed is not None
    close(formed(x), network(x))


# Files


def manifest(path: Path) -> Any:
    return json.loads((path / "manifest.json").read_text())


FILES = [(fmt.name, form) for fmt in FORMATS.values() for form in fmt.forms]


@pytest.mark.parametrize(("fmt", "form"), FILES)
def test_files_of_every_form_pass(fmt: str, form: str, tiny_artifact: Callable[..., Path]) -> None:
    place = tiny_artifact(fmt, form=form)
    results = verify(place)
    assert results
    for result in results:
        assert result.status == "pass", result.reason
        assert result.metrics is not None and result.metrics.psnr_db > 100
    assert manifest(place)["form"] == form
    suffix = "" if form == FORMATS[fmt].forms[0] else f"-{form}"
    assert place.name == f"{fmt}-fp32{suffix}"


def test_default_form_is_recorded(tiny_artifact: Callable[..., Path]) -> None:
    for fmt in ("onnx", "tflite", "coreml"):
        assert manifest(tiny_artifact(fmt))["form"] == FORMATS[fmt].forms[0]


def test_any_batch_and_pictures_and_labels(tmp_path: Path) -> None:
    model = load_model(model=TINY, labels=list(LABELS))
    (result,) = export(model, to="onnx", input="image", dynamic_batch=True, form="flat", out=tmp_path)
    assert result.parity is not None and result.parity.status == "pass", result.parity and result.parity.reason


@pytest.mark.parametrize(
    ("fmt", "form"), [("onnx", "flat"), ("tflite", "patches"), ("tflite", "winograd"), ("coreml", "channels")]
)
def test_locate_names_a_layer_in_the_file_s_own_form(
    fmt: str, form: str, small_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **options: Any) -> Any:
        formed: Any = take_form(*args, **options)
        weight = formed.stages[0][1].encoders[0].mlp.reduce.weight
        weight.data = weight.data.flip(0)
        return formed

    monkeypatch.setattr(export_module, "take_form", wrong)
    (made,) = export(small_model, to=fmt, precision="fp32", form=form, out=tmp_path, verify=False)
    (result,) = verify(made.artifact.path, find_layer=True)
    assert result.status == "fail" and result.located is not None and result.located.diverges
    assert result.located.module == "stages.0.1.encoders.0.mlp.reduce"


def test_locate_finds_nothing_in_a_right_file(tiny_artifact: Callable[..., Path]) -> None:
    for fmt in ("onnx", "tflite"):
        (result,) = verify(tiny_artifact(fmt), find_layer=True)
        assert result.status == "pass" and result.located is not None and not result.located.diverges


# What is refused


def test_names_of_targets() -> None:
    (target,) = plan_targets("tflite", form="winograd")
    assert (target.name, target.form) == ("tflite-fp32-winograd", "winograd")
    assert [t.name for t in plan_targets("tflite,onnx", form="plain")] == ["tflite-fp32-plain", "onnx-fp32-plain"]
    assert [t.default_form for t in plan_targets("onnx", precision=["fp16", "int8"])] == ["flat", "flat"]
    assert [t.default_form for t in plan_targets("tflite", precision=["fp16", "int8"])] == ["patches", "plain"]


def test_form_s_name_in_any_case() -> None:
    assert plan_targets("coreml", form="Channels")[0].form == "channels"
    with pytest.raises(UsageError, match="--deployment-target iOS15 has no form channels, expected iOS16 or later"):
        plan_targets("coreml", form="Channels", deployment_target="iOS15")


@pytest.mark.parametrize("count", [1, 3])
def test_form_that_not_all_blocks_could_have_is_refused(count: int, tiny_model: Any, tmp_path: Path) -> None:
    network = copy.deepcopy(tiny_model.module)
    for stage in network.stages[2 : 2 + count]:
        other_activation(stage[1])
    model = replace(tiny_model, module=network)
    with pytest.raises(UsageError, match=f"--form flat: {count} of 3 MobileViT blocks have a part that was replaced"):
        export(model, to="onnx", form="flat", out=tmp_path, verify=False)
    assert not list(tmp_path.iterdir())


def test_locate_in_a_form_that_is_not_known(copy: Callable[..., Path]) -> None:
    place = copy("onnx")
    data = manifest(place)
    for form, message in (("round", "form round of onnx is not known to this version"), (None, "not a valid manifest")):
        (place / "manifest.json").write_text(json.dumps({**data, "form": form}))
        with pytest.raises(ArtifactError, match=message):
            verify(place, find_layer=True)


def test_forms_of_fewer_bits_are_fixed() -> None:
    for precision in (p for fmt in FORMATS.values() for p in fmt.precisions if p not in FULL):
        fmt = next(f.name for f in FORMATS.values() if precision in f.precisions)
        with pytest.raises(UsageError, match=f"--form is for fp32 and fp16, not for {precision}"):
            plan_targets(fmt, precision=precision, form="plain")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx", "--form", "flatt"],
         "ONNX form 'flatt' is not known, expected one of flat, plain; did you mean flat?"),
        (["--to", "all", "--form", "flat"], "Core ML form 'flat' is not known, expected one of"),
        (["--to", "onnx", "--model", "timm:resnet10t", "--image-size", "64", "--form", "flat"],
         "--form flat needs MobileViT blocks, resnet10t has none; leave it out"),
        (["--to", "coreml", "--form", "channels", "--image-size", "64", "--image-size", "96"],
         "--form channels needs a single image size; leave it out"),
    ],
)  # fmt: skip
def test_mistakes(arguments: list[str], message: str, cli: Callable[..., Finished], tmp_path: Path) -> None:
    model = [] if "--model" in arguments else ["--model", TINY]
    done = cli(*arguments, *model, "--out", tmp_path / "out")
    assert done.code == 2
    assert message in done.err and len(done.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_other_networks_take_no_form(tmp_path: Path, cli: Callable[..., Finished]) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())\n"
    )
    done = cli(
        "--to", "onnx", "--model", f"{tmp_path / 'net.py'}:net", "--input-shape", "1,3,8,8", "--out", tmp_path / "out"
    )
    assert done.code == 0, done.err
    assert manifest(tmp_path / "out/net/onnx-fp32")["form"] == PLAIN
