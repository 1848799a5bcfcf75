"""What a network returns, as files can hold it; and labels as text, whoever gives them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from outs import Answer

from mvit_export import export, load_model, verify
from mvit_export.errors import ModelError, UsageError
from mvit_export.models.outputs import check_outputs, name_outputs, read_labels, valid_names

OUTS = Path(__file__).parent / "outs.py"
ONE = torch.ones(1, 4)

# Names


@pytest.mark.parametrize(
    ("names", "valid"),
    [
        (["logits", "boxes_2"], ["logits", "boxes_2"]),
        (["cls-logits", "0"], ["cls_logits", "output_0"]),
        (["a.b", "a_b", "a/b"], ["a_b_2", "a_b", "a_b_3"]),
        (["0", "output_0"], ["output_0_2", "output_0"]),
        (["state", "fp16"], ["output_state", "output_fp16"]),
        (["caf\u00e9", ""], ["caf_", "output"]),
    ],
)
def test_valid_names(names: list[str], valid: list[str]) -> None:
    assert valid_names(names) == valid


def test_a_valid_name_is_kept_beside_one_that_becomes_it() -> None:
    assert list(name_outputs({"a-b": ONE, "a_b": ONE + 1})) == ["a_b_2", "a_b"]
    assert name_outputs({"a-b": ONE, "a_b": ONE + 1})["a_b"].tolist() == (ONE + 1).tolist()


def test_an_earlier_artifact_keeps_its_names() -> None:
    assert list(name_outputs({"cls-logits": ONE}, ["cls-logits"])) == ["cls-logits"]


@pytest.mark.slow
def test_every_format_takes_the_names(tmp_path: Path) -> None:
    model = load_model(model=f"{OUTS}:named", image_size=32)
    assert model.output_names == ("cls_logits", "output_0", "output_state")
    assert model.notes == (
        "output 'cls-logits' is called cls_logits in the files",
        "output '0' is called output_0 in the files",
        "output 'state' is called output_state in the files",
    )
    for result in export(model, out=tmp_path):
        assert result.artifact.manifest.output_names == model.output_names
        assert result.parity is not None
        assert result.parity.status == "pass"


@pytest.mark.parametrize("name", ["classLabel", "classLabel_probs", "probabilities"])
def test_names_that_a_classifier_adds_are_refused(name: str, tmp_path: Path) -> None:
    model = load_model(model=f"{OUTS}:probable", image_size=32, labels=list("abcd"))
    model = replace(model, output_names=(name,))
    expected = f"^output '{name}' has the name of one that a Core ML classifier adds; rename it"
    with pytest.raises(UsageError, match=expected):
        export(model, to="coreml", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_the_input_is_refused() -> None:
    with pytest.raises(ModelError, match="an output is named 'image' like the input; rename it"):
        check_outputs({"image": ONE})


# Types and structures


@pytest.mark.slow
def test_other_types_are_cast_and_said(tmp_path: Path) -> None:
    model = load_model(model=f"{OUTS}:precise", image_size=32)
    assert model.notes == (
        "output 'output_0' is float64 in the network and float32 in the files",
        "output 'output_1' is float16 in the network and float32 in the files",
    )
    for result in export(model, to=["onnx", "coreml"], precision="fp32", out=tmp_path):
        assert [spec.dtype for spec in result.artifact.manifest.outputs] == ["float32", "float32"]
        assert result.parity is not None
        assert result.parity.status == "pass"
    assert {verdict.status for verdict in verify(tmp_path, against="golden")} == {"pass"}


@pytest.mark.slow
def test_a_dataclass_is_taken_by_its_names(tmp_path: Path) -> None:
    model = load_model(model=f"{OUTS}:record", image_size=32)
    assert model.output_names == ("scores",)
    (result,) = export(model, to="onnx", out=tmp_path)
    assert result.parity is not None
    assert result.parity.status == "pass"


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        ((ONE, None), "a tuple whose element 1 is None"),
        ([ONE, [ONE]], "a list whose element 1 is a list"),
        ((ONE, (ONE, None)), "a tuple whose element 1 is a tuple"),
        ({"y": ONE, "states": (ONE,)}, "a dict whose element 'states' is a tuple"),
        (OrderedDict(y=ONE, loss=0.5), "a OrderedDict whose element 'loss' is a float"),
        (Answer(scores=[ONE]), "a Answer whose element 'scores' is a list"),
    ],
)
def test_the_element_that_is_no_tensor_is_named(outputs: Any, found: str) -> None:
    with pytest.raises(ModelError) as caught:
        name_outputs(outputs)
    assert str(caught.value).startswith(f"the model returned {found}, expected tensors alone; ")


@pytest.mark.parametrize(("outputs", "kind"), [((), "tuple"), ({}, "dict"), ({"a": None}, "dict")])
def test_no_output_at_all(outputs: Any, kind: str) -> None:
    with pytest.raises(ModelError, match=f"^the model returned an empty {kind}, expected a tensor"):
        name_outputs(outputs)


# Labels


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("two\nlines", r"^labels: label 2 is 'two\\nlines', expected text on one line; rename it$"),
        ("two\u2028lines", "expected text on one line"),
        ("two\rlines", "expected text on one line"),
        ("bell\x07", "expected text on one line"),
        ("\x1b[2Jgone", "expected text on one line"),
        ("caf\udce9", "expected text on one line"),
        ("end\n", r"^label 2 is 'end\\n', expected no spaces or line breaks around it; strip it$"),
        (" wide ", "expected no spaces or line breaks around it"),
        ("", r"^labels has an empty label at line 2$"),
        (7, r"^label 2 is 7 \(int\), expected text$"),
        (None, r"^label 2 is None \(NoneType\), expected text$"),
    ],
)
def test_labels_from_python_are_refused_as_in_a_file(label: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_labels(["first", label], 2)


def test_what_a_file_may_hold(tmp_path: Path) -> None:
    names = ("n01440764\ttench", "a family \U0001f468\u200d\U0001f469", "no\u00a0break", "caf\u00e9, cup")
    file = tmp_path / "labels.txt"
    file.write_text("\n".join(names) + "\n", encoding="utf-8")
    assert read_labels(file, 4) == read_labels(names, 4) == names


def test_a_control_character_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(b"first\nsec\x1b[2Jond\n")
    with pytest.raises(UsageError, match=r"labels\.txt: label 2 is 'sec\\x1b\[2Jond', expected text on one line"):
        read_labels(file, 2)
