"""Whole networks: what the saved package computes against the PyTorch model it came from."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
import torch
from mil_models import Captured, capture, convert, import_timm, mobilevit, photo, psnr, randomise, reference, saved

import mvit_export.mil as mil
from mvit_export.mil import Program, load
from mvit_export.mil.modules import traced_path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def xxs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Packages of MobileViT-XXS by (way, precision), with module names stored."""
    folder, model, packages = tmp_path_factory.mktemp("xxs"), mobilevit("xxs"), {}
    for way in ("export", "trace"):
        captured = capture(model, photo(), way)
        for precision in ("fp32", "fp16"):
            mlmodel = convert(captured, precision)
            mil.store_module_names(mlmodel, mil.module_names(mlmodel, handles=captured.handles, model=model))
            packages[way, precision] = saved(mlmodel, folder, f"{way}_{precision}")
    return packages


LEAST_DB = {"fp32": 100, "fp16": 50}


@pytest.mark.parametrize("way", ["export", "trace"])
def test_xxs(way: str, xxs: dict[tuple[str, str], Path]) -> None:
    x = photo()
    expected = reference(mobilevit("xxs"), x)
    for precision, least in LEAST_DB.items():
        assert psnr(expected, load(xxs[way, precision])(image=x.numpy())["logits"]) >= least


@pytest.fixture(scope="session")
def small() -> Captured:
    """MobileViT-XXS at 64x64."""
    return capture(mobilevit("xxs"), photo(64))


@pytest.mark.parametrize("target", ["iOS16", "iOS17", "iOS18", "iOS26"])
def test_every_opset(target: str, small: Captured, tmp_path: Path) -> None:
    if not hasattr(ct.target, target):
        pytest.skip(f"this coremltools does not know {target}")
    x, mlmodel = photo(64), convert(small, minimum_deployment_target=ct.target[target])
    got = load(saved(mlmodel, tmp_path))(image=x.numpy())["logits"]
    assert psnr(reference(mobilevit("xxs"), x), got) >= 100


def test_another_size_takes_the_resize_branch(tmp_path: Path) -> None:
    model, x = mobilevit("xxs"), photo(224)  # 7x7 in the last stage, patches of 2
    program = load(saved(convert(capture(model, x)), tmp_path))
    assert any("resize" in op.type or "upsample" in op.type for op in program.ops)
    assert psnr(reference(model, x), program(image=x.numpy())["logits"]) >= 100


def test_fp16_accumulation_is_worse_but_close(small: Captured, tmp_path: Path) -> None:
    x = photo(64)
    package = saved(convert(small, "fp16"), tmp_path)
    expected = reference(mobilevit("xxs"), x)
    wide = psnr(expected, load(package)(image=x.numpy())["logits"])
    narrow = psnr(expected, load(package, accumulate="fp16")(image=x.numpy())["logits"])
    assert 30 < narrow < wide - 3


# Smallest of each family, with few of blocks that repeat: how it is captured, its size, what makes it shallow. Swin
# cannot be converted from torch.export ("Unsupported fx node alias").
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": ("export", 224, {"depth": 2}),
    "deit_tiny_patch16_224": ("export", 224, {"depth": 2}),
    "swin_tiny_patch4_window7_224": ("trace", 224, {"depths": (2, 2, 2, 1)}),
    "swinv2_tiny_window8_256": ("trace", 256, {"depths": (2, 2, 2, 1)}),
    "mixer_s32_224": ("export", 224, {}),
    "efficientformer_l1": ("export", 224, {}),
    "mobilenetv2_050": ("export", 224, {}),
    "mobilenetv3_small_050": ("export", 224, {}),
    "mobilevitv2_050": ("export", 256, {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_families(name: str, tmp_path: Path) -> None:
    way, size, fewer = FAMILIES[name]
    torch.manual_seed(0)
    model, x = randomise(import_timm().create_model(name, pretrained=False, **fewer)), photo(size)
    captured, expected = capture(model, x, way), reference(model, x)
    for target in (ct.target.iOS16, ct.target.iOS18):  # two generations of the same ops
        package = saved(convert(captured, minimum_deployment_target=target), tmp_path)
        assert psnr(expected, load(package)(image=x.numpy())["logits"]) >= 100


def linear(**options: object) -> cto.OptimizationConfig:
    return cto.OptimizationConfig(cto.OpLinearQuantizerConfig(mode="linear_symmetric", **options))


def palette(bits: int, **options: object) -> cto.OptimizationConfig:
    return cto.OptimizationConfig(cto.OpPalettizerConfig(nbits=bits, mode="uniform", **options))


PRUNE = cto.OptimizationConfig(cto.OpMagnitudePrunerConfig(target_sparsity=0.3))
BLOCKS = dict(dtype="int4", granularity="per_block", block_size=16)
COMPRESSIONS = {  # how, least dB against the uncompressed model
    "int8": (lambda m: cto.linear_quantize_weights(m, linear(dtype="int8")), 30),
    "palette 8": (lambda m: cto.palettize_weights(m, palette(8)), 25),
    "palette 6": (lambda m: cto.palettize_weights(m, palette(6)), 15),
    "palette 4": (lambda m: cto.palettize_weights(m, palette(4)), 0),
    "sparse": (lambda m: cto.prune_weights(m, PRUNE), 5),
    "int4 blocks": (lambda m: cto.linear_quantize_weights(m, linear(**BLOCKS)), 5),
    "palette groups": (
        lambda m: cto.palettize_weights(m, palette(4, granularity="per_grouped_channel", group_size=8)),
        0,
    ),
    "sparse int8": (
        lambda m: cto.linear_quantize_weights(
            cto.prune_weights(m, PRUNE), linear(dtype="int8"), joint_compression=True
        ),
        5,
    ),
    "sparse palette": (
        lambda m: cto.palettize_weights(cto.prune_weights(m, PRUNE), palette(6), joint_compression=True),
        5,
    ),
}
OF_IOS18 = {"int4 blocks", "palette groups", "sparse int8", "sparse palette"}


@pytest.fixture(scope="session")
def plain() -> dict[ct.target, ct.models.MLModel]:
    """MobileViT-XXS at 64x64 with an encoder in each block: every kind of layer, and the widths of the real one."""
    model = mobilevit("xxs")
    for stage in model.stages[2:]:
        stage[1].encoders = stage[1].encoders[:1]
    captured, targets = capture(model, photo(64)), (ct.target.iOS16, ct.target.iOS18)
    return {target: convert(captured, "fp16", minimum_deployment_target=target) for target in targets}


@pytest.fixture(scope="session")
def plain_logits(
    plain: dict[ct.target, ct.models.MLModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[ct.target, np.ndarray]:
    folder = tmp_path_factory.mktemp("plain")
    return {
        target: load(saved(model, folder, target.name))(image=photo(64).numpy())["logits"]
        for target, model in plain.items()
    }


# coremltools' pruner takes a percentile of fp16 weights, whose index leaves fp16
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning:numpy")
@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name in COMPRESSIONS
        for target in (ct.target.iOS16, ct.target.iOS18)
        if target == ct.target.iOS18 or name not in OF_IOS18
    ],
)
def test_compressed_weights(name: str, target: ct.target, plain: dict, plain_logits: dict, tmp_path: Path) -> None:
    """Exactly what coremltools' own decompression gives, and near the model before compression."""
    compress, least = COMPRESSIONS[name]
    x = photo(64).numpy()
    package = compress(plain[target])
    kinds = {op.op_type for op in package._mil_program.functions["main"].operations}
    assert any(kind.startswith("constexpr_") for kind in kinds)
    got = load(saved(package, tmp_path))(image=x)["logits"]
    opened = load(saved(cto.decompress_weights(package), tmp_path, "opened"))(image=x)["logits"]
    np.testing.assert_array_equal(got, opened)
    before = plain_logits[target]
    assert not np.array_equal(got, before)
    assert psnr(before, got) >= least


def test_trace_names_modules(xxs: dict[tuple[str, str], Path]) -> None:
    """Both ways of converting lead back to the modules, and agree on what each kind of op belongs to."""
    names = {name for name, _ in mobilevit("xxs").named_modules()}
    for way in ("export", "trace"):
        program = load(xxs[way, "fp32"])
        modules = [op.module for op in program.ops]
        assert sum(module in names for module in modules) > 0.95 * len(modules)
        assert {op.module for op in program.ops if op.type == "softmax"} == {
            f"stages.{stage}.1.encoders.{i}.attention"
            for stage, depth in ((2, 2), (3, 4), (4, 3))
            for i in range(depth)
        }


def test_traced_scopes_are_found_again_or_left_alone() -> None:
    paths = ["stem", "stem.conv", "stem.inner.conv", "stages.0.conv", "stages.1.conv", "stages.1"]
    assert traced_path(["stem", "conv", "x.1"], paths) == "stem.conv"
    assert traced_path(["1", "conv", "x.2"], paths) == "stages.1.conv"
    assert traced_path(["conv", "x.3"], ["a.conv", "b.conv"]) == "conv"  # two fit: not guessed
    assert traced_path(["x.4"], paths) is None
    assert traced_path(["__COREML__::TORCHSCRIPT_PLACEHOLDER", "x"], paths) is None


def test_intermediates_are_the_modules_outputs(xxs: dict[tuple[str, str], Path]) -> None:
    model, x, seen = mobilevit("xxs"), photo(), {}
    model.stages[3][1].encoders[1].norm2.register_forward_hook(lambda m, i, o: seen.update(out=o.detach()))
    reference(model, x)
    program = load(xxs["export", "fp32"])
    found = [
        tensor.numpy()
        for op, _, tensor in program.intermediates(image=x.numpy())
        if op.type == "layer_norm" and op.module == "stages.3.1.encoders.1.norm2"
    ]
    assert len(found) == 1 and psnr(seen["out"].numpy(), found[0]) > 100


def scaled_to_overflow() -> torch.nn.Module:
    """MobileViT-XXS whose `to_tokens` of stage 4 makes values far beyond fp16; the LayerNorms after it undo that."""
    model, seen = mobilevit("xxs"), {}
    block = model.stages[3][1]
    layer = block.to_tokens
    with torch.no_grad():  # half of the way by the layer before, so that the weights themselves fit into fp16
        block.local.norm.weight *= 300
        block.local.norm.bias *= 300
    hook = layer.register_forward_hook(lambda m, i, o: seen.update(peak=o.abs().max().item()))
    reference(model, photo())
    hook.remove()
    with torch.no_grad():
        layer.weight *= 3e5 / seen["peak"]
    assert layer.weight.abs().max() < 6e4
    return model


@pytest.mark.parametrize("way", ["export", "trace"])
def test_overflow_names_the_layer(way: str, tmp_path: Path) -> None:
    model, x = scaled_to_overflow(), photo()
    captured, traces = capture(model, x, way), {}
    for precision in ("fp32", "fp16"):
        mlmodel = convert(captured, precision)
        mil.store_module_names(mlmodel, mil.module_names(mlmodel, handles=captured.handles, model=model))
        program = load(saved(mlmodel, tmp_path, precision))
        traces[precision] = program.trace(image=x.numpy())
    assert traces["fp32"].first_overflow is None
    assert psnr(reference(model, x), traces["fp32"].outputs["logits"]) >= 100
    for found in (traces["fp16"].first_overflow, traces["fp32"].first_beyond_half):
        assert found is not None
        assert (found.op.type, found.op.module) == ("conv", "stages.3.1.to_tokens")
        assert 2e5 < found.max_abs < 4e5 and found.overflow > 0
    assert "conv" in str(traces["fp16"]) and "module stages.3.1.to_tokens overflows FLOAT16" in str(traces["fp16"])
    assert not np.isfinite(traces["fp16"].outputs["logits"]).all() or traces["fp16"].first_nan is not None


def test_trace_statistics(xxs: dict[tuple[str, str], Path]) -> None:
    program, x = load(xxs["export", "fp16"]), photo().numpy()
    trace = program.trace(image=x)
    np.testing.assert_array_equal(trace.outputs["logits"], program(image=x)["logits"])
    tensors = {name: tensor for _, name, tensor in program.intermediates(image=x)}
    assert trace.first_overflow is None and "no overflow" in str(trace)
    for stats in trace.tensors:
        tensor = tensors[stats.name].abs()
        present = tensor[tensor > 0]
        assert stats.max_abs == pytest.approx(float(tensor.max()), rel=1e-3)
        assert stats.share_small == pytest.approx(float((present < 1e-4).float().mean()), abs=1e-3)
        assert stats.share_large == pytest.approx(float((present > 1e2).float().mean()), abs=1e-3)


def test_memory_is_given_back(xxs: dict[tuple[str, str], Path]) -> None:
    """Every value dies after its last reader: at the end only constants and outputs are held."""
    program: Program = load(xxs["export", "fp32"])
    alive, most = [], 0
    for _, _, tensor in program.intermediates(image=photo().numpy()):
        alive = [ref for ref in alive if ref() is not None] + [weakref.ref(tensor)]
        most = max(most, len(alive))
    assert most < 10 < len(program.ops)
    dead = {slot for step in program._graph.steps for slot in step.dies}
    made = {slot for step in program._graph.steps for slot in step.writes}
    assert made - dead == {slot for slot, _ in program._graph.outputs.values()}
