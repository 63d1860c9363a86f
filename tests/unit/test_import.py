"""`patchscan import`: somebody else's ONNX file scores as its makers say, and one that reaches outside is refused."""

import json
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner

from handlers.image_detector import ImageDetector
from patchscan.cli import app
from patchscan.common.errors import UserError
from patchscan.common.shipped import shipped
from patchscan.detector import graph_check
from patchscan.detector.answer import Answer
from patchscan.detector.card import NOT_CALIBRATED, Card, CardError
from patchscan.detector.engines import load_detector
from patchscan.detector.ensemble_graph import split_graph
from patchscan.detector.graph_check import GraphError, parse_graph
from patchscan.detector.graph_detector import seal
from patchscan.detector.onnx_detector import OnnxDetector
from patchscan.detector.presets import EnsemblePreset, WholeImagePreset
from patchscan.serving.archive import archive
from patchscan.serving.verify import VerifyError, verify
from patchscan.training.ensemble import build_ensemble
from patchscan.training.import_config import ImportConfigError, read_config
from patchscan.training.import_onnx import import_onnx
from patchscan.training.import_ssp import import_official
from patchscan.training.probe import train_probe
from patchscan.training.run_folder import RunFolderError
from tests.import_kit import CONFIG, graph, imported_run, write
from tests.serving_kit import picture, png, rewritten


def middle(rgb: np.ndarray, width: int = 20) -> np.ndarray:
    """The middle of a picture, resized so that its height is 20, uint8 (16, 16, 3)."""
    left = (width - 16) // 2
    return np.asarray(Image.fromarray(rgb).resize((width, 20), Image.Resampling.BICUBIC))[2:18, left : left + 16]


def normalised(pixels: np.ndarray) -> np.ndarray:
    """float32 (3, 16, 16)."""
    mean, std = (np.array(values, np.float32) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    x: np.ndarray = (pixels.astype(np.float32) / 255 - mean) / std
    return x.transpose(2, 0, 1)


def given(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """What the graph gives for one prepared picture."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run([model.graph.output[-1].name], {"x": x[None]})[0][0]
    return result.astype(np.float64)


def theirs(model: onnx.ModelProto, rgb: np.ndarray) -> np.ndarray:
    """What the graph itself gives for a square picture, prepared by the book."""
    return given(model, normalised(middle(rgb)))


def log_odds(p: float) -> float:
    return float(np.log(p / (1 - p)))


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 21])
@pytest.mark.parametrize(
    ("classes", "last", "output", "expected"),
    [
        (1, None, "{}", lambda y: y[0]),
        (1, None, "{positive: real}", lambda y: -y[0]),
        (1, "Sigmoid", "{kind: probabilities}", lambda y: log_odds(y[0])),
        (2, None, "{ai: 0}", lambda y: y[0] - y[1]),
        (3, None, "{ai: 2, kind: sigmoid}", lambda y: y[2]),
        (3, None, "{ai: 2}", lambda y: y[2] - np.log(np.exp(y[:2]).sum())),
        (3, "Softmax", "{ai: 2, kind: probabilities}", lambda y: log_odds(y[2])),
    ],
)
def test_it_scores_as_its_graph_says(
    classes: int, last: str | None, output: str, expected: Any, opset: int, tmp_path: Path
) -> None:
    model = graph(classes, opset, last)
    file, config = write(tmp_path, model, output)
    card = import_onnx(file, tmp_path / "run", config)
    answer = load_detector(tmp_path / "run").score([png(1, 40, 40)])[0]
    assert isinstance(answer, Answer)
    assert answer.logit == pytest.approx(expected(theirs(model, picture(1, 40, 40))), abs=1e-5)
    assert (card.architecture, card.training["trained_on"]) == ("imported", "unknown")
    assert card.all_warnings[0] == NOT_CALIBRATED
    assert "trained by an unknown party on unknown data" in card.all_warnings[1]


def channels_last() -> onnx.ModelProto:
    model = graph(2)
    model.graph.node[0].input[0] = "turned"
    model.graph.node.insert(0, helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 3, 1, 2]))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 16, 16, 3]))
    return model


def of_bytes() -> onnx.ModelProto:
    model = graph(2)
    model.graph.node[0].input[0] = "numbers"
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["numbers"], to=TensorProto.FLOAT))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    return model


def with_another_output() -> onnx.ModelProto:
    """Its first output is not the one that is asked for."""
    model = graph(2)
    model.graph.node.append(helper.make_node("Neg", ["y"], ["other"]))
    model.graph.output.insert(0, helper.make_tensor_value_info("other", TensorProto.FLOAT, [None, 2]))
    return model


def declared(model: onnx.ModelProto, classes: int | None) -> onnx.ModelProto:
    """A model that says that it has so many classes; its last node hides how many there are."""
    model.graph.node[-1].output[0] = "scores"
    model.graph.node.append(helper.make_node("Shape", ["scores"], ["shape"]))
    model.graph.node.append(helper.make_node("Reshape", ["scores", "shape"], ["y"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, classes]))
    return model


def taking(kind: int) -> onnx.ModelProto:
    """A model whose input is of this type of numbers."""
    model = of_bytes()
    model.graph.input[0].type.tensor_type.elem_type = kind
    return model


AS_THEY_ARE = {"scale": 1, "mean": [0, 0, 0], "std": [1, 1, 1]}
GRID = {"views": "grid", "count": 4, "resize": None}


@pytest.mark.parametrize(
    ("model", "changes", "output", "prepare"),
    [
        (graph(2), {}, {}, lambda rgb: [normalised(middle(rgb, 24))]),
        (graph(2), {"rounding": "nearest"}, {}, lambda rgb: [normalised(middle(rgb, 25))]),
        (graph(2), {"channels": "bgr"}, {}, lambda rgb: [normalised(middle(rgb, 24)[..., ::-1])]),
        (channels_last(), {"layout": "nhwc"}, {}, lambda rgb: [normalised(middle(rgb, 24)).transpose(1, 2, 0)]),
        (of_bytes(), AS_THEY_ARE, {}, lambda rgb: [middle(rgb, 24).transpose(2, 0, 1)]),
        (taking(TensorProto.DOUBLE), {}, {}, lambda rgb: [normalised(middle(rgb, 24)).astype(np.float64)]),
        (declared(graph(2), None), {}, {"classes": 2}, lambda rgb: [normalised(middle(rgb, 24))]),
        (with_another_output(), {}, {"name": "y"}, lambda rgb: [normalised(middle(rgb, 24))]),
        (graph(2, last="Gelu", domain="com.microsoft"), {}, {}, lambda rgb: [normalised(middle(rgb, 24))]),
        (
            graph(2),
            GRID,
            {},
            lambda rgb: [normalised(rgb[y : y + 16, x : x + 16]) for y in (0, 16) for x in (2, 22)],
        ),
    ],
)
def test_pictures_are_prepared_as_described(
    model: onnx.ModelProto, changes: dict[str, Any], output: dict[str, Any], prepare: Any, tmp_path: Path
) -> None:
    (tmp_path / "theirs.onnx").write_bytes(model.SerializeToString())
    described = yaml.safe_load(CONFIG.format(output=json.dumps(output)))
    described["input"] = {key: value for key, value in (described["input"] | changes).items() if value is not None}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(described))
    import_onnx(tmp_path / "theirs.onnx", tmp_path / "run", tmp_path / "theirs.yaml")
    answer = load_detector(tmp_path / "run").score([png(1, 41, 33)])[0]
    assert isinstance(answer, Answer)
    rows = [given(model, x) for x in prepare(picture(1, 41, 33))]
    assert answer.logit == pytest.approx(np.mean([real_ai[1] - real_ai[0] for real_ai in rows]), rel=1e-5)


def test_a_vector_gets_a_head(tmp_path: Path) -> None:
    model = graph(5)
    file, config = write(tmp_path, model, "{head: {file: head.json}}")
    head = {"weights": [1.0, -2.0, 3.0, 0.5, 0.25], "bias": -0.5}
    (tmp_path / "head.json").write_text(json.dumps(head))
    import_onnx(file, tmp_path / "run", config)
    vector = theirs(model, picture(1, 40, 40))
    expected = vector / np.linalg.norm(vector) @ head["weights"] - 0.5
    detector = load_detector(tmp_path / "run")
    assert detector.logits([detector.prepare(png(1, 40, 40)).crops.pixels]) == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("name", ["patchscan:scores", "patchscan:0:constant0", "logit"])
def test_a_graph_may_use_our_own_names(tmp_path: Path, name: str) -> None:
    model = graph(1)
    model.graph.node[-1].output[0] = model.graph.output[0].name = name
    file, config = write(tmp_path, model)
    import_onnx(file, tmp_path / "run", config)
    detector = load_detector(tmp_path / "run")
    expected = theirs(model, picture(1, 40, 40))
    assert detector.logits([detector.prepare(png(1, 40, 40)).crops.pixels]) == pytest.approx(expected, abs=1e-5)


def test_an_export_is_read_as_it_lies(tmp_path: Path) -> None:
    model = graph(2)
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "Fake-Image", "1": "real"}}))
    preprocessor = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "resample": 3}
    preprocessor |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 0.00392156862745098}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    assert CliRunner().invoke(app, ["import", str(folder), "--run", str(tmp_path / "run")]).exit_code == 0
    y = theirs(model, picture(1, 40, 40))
    detector = load_detector(tmp_path / "run")
    assert detector.logits([detector.prepare(png(1, 40, 40)).crops.pixels]) == pytest.approx([y[0] - y[1]], abs=1e-5)
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx" / "model.onnx")
    for named in (folder, folder / "onnx" / "model.onnx"):
        assert import_onnx(named, tmp_path / "again").name == "export"
    whole = shutil.copytree(folder, tmp_path / "onnx")
    (whole / "onnx/model.onnx").rename(whole / "model.onnx")
    assert import_onnx(whole / "model.onnx", tmp_path / "again").name == "onnx"
    (folder / "onnx" / "model.onnx").rename(folder / "onnx" / "model_int8.onnx")
    with pytest.raises(GraphError, match=r"holds no model.onnx: name one of .*export/onnx/model_int8.onnx"):
        import_onnx(folder, tmp_path / "other")
    (folder / "onnx" / "model_int8.onnx").write_bytes(graph(3).SerializeToString())
    with pytest.raises(GraphError, match="has 3 classes, but 2 are described"):
        import_onnx(folder / "onnx" / "model_int8.onnx", tmp_path / "other")
    (folder / "onnx" / "model_int8.onnx").unlink()
    with pytest.raises(GraphError, match=r"holds no model.onnx: export the model to ONNX first"):
        import_onnx(folder, tmp_path / "other")
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "cat", "1": "dog"}}))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ImportConfigError, match="which of the labels cat, dog means AI is not clear"):
        import_onnx(folder, tmp_path / "other")


def test_no_file_or_training_is_written_over(tmp_path: Path) -> None:
    """The export's own model.onnx was replaced, and so was the card of a run that took hours to train."""
    file, config = write(tmp_path, graph(2))
    own = file.rename(tmp_path / "model.onnx")
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    for run in (tmp_path, tmp_path / "run" / "..", tmp_path / "link"):
        with pytest.raises(RunFolderError, match="would be replaced by what is made of it"):
            import_onnx(own, run, config)
        with pytest.raises(RunFolderError, match="would be replaced by what is made of it"):
            train_probe(own, config, "data", run)
    trained = shutil.copytree(shipped("model_store") / "ssp-lite", tmp_path / "trained")
    (tmp_path / "under-way").mkdir()
    (tmp_path / "under-way" / "checkpoint.pt").touch()
    for run in (trained, tmp_path / "under-way"):
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        attempts: list[Callable[[], object]] = [
            partial(import_onnx, own, run, config),
            partial(train_probe, own, config, "data", run),
            partial(build_ensemble, [trained, tmp_path / "other"], run, "both"),
            partial(import_official, own, run, "photos"),
        ]
        for attempt in attempts:
            with pytest.raises(UserError, match="would be lost"):
                attempt()
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    import_onnx(own, tmp_path / "run", config)
    import_onnx(own, tmp_path / "run", config)  # an imported one is made again from its file


def test_generators_that_it_may_be_calibrated_on_are_on_its_card(tmp_path: Path) -> None:
    file, config = write(tmp_path, graph(2))
    config.write_text(config.read_text() + "seen: [sd, ldm]\n")
    assert import_onnx(file, tmp_path / "run", config).training["seen"] == ["ldm", "sd"]


def test_who_trained_it_is_on_its_card_where_it_is_told(tmp_path: Path) -> None:
    file, config = write(tmp_path, graph(2))
    config.write_text(config.read_text() + "trained_by: A. Maker\ntrained_on: GenImage\nlicence: MIT\n")
    card = import_onnx(file, tmp_path / "run", config)
    assert (card.training["trained_by"], card.training["licence"]) == ("A. Maker", "MIT")
    assert "trained by A. Maker on GenImage" in card.all_warnings[1]


def test_the_page_describes_what_can_be_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "import.md").read_text()
    (tmp_path / "theirs.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    described = read_config(tmp_path / "theirs.yaml")
    assert described.input.preset() == WholeImagePreset(size=224, resize=256, filter="bicubic", round_down=True)


def external() -> onnx.ModelProto:
    model = graph(2)
    weights = model.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="/etc/passwd")
    return model


def sparse_external() -> onnx.ModelProto:
    """Weights that are few numbers and zeros, the numbers in another file."""
    model = graph(2)
    del model.graph.initializer[:]
    weights = model.graph.sparse_initializer.add(dims=[3, 2])
    weights.values.CopyFrom(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2]))
    weights.values.data_location = TensorProto.EXTERNAL
    weights.values.external_data.add(key="location", value="theirs.bin")
    weights.indices.CopyFrom(TensorProto(data_type=TensorProto.INT64, dims=[2], int64_data=[0, 3]))
    return model


def still_training() -> onnx.ModelProto:
    model = graph(2)
    model.graph.node.append(helper.make_node("BatchNormalization", ["x"] * 5, ["n", "m", "v"], training_mode=1))
    return model


def circular() -> onnx.ModelProto:
    """An answer that is made of itself."""
    model = graph(2)
    model.graph.node[-1].CopyFrom(helper.make_node("Identity", ["y"], ["y"]))
    return model


def whole_numbers() -> onnx.ModelProto:
    model = graph(2)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    return model


def labels() -> onnx.ModelProto:
    model = graph(2)
    model.graph.node[-1].output[0] = "scores"
    model.graph.node.append(helper.make_node("ArgMax", ["scores"], ["y"], axis=1, keepdims=0))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.INT64, [None]))
    return model


def flattened() -> onnx.ModelProto:
    """Two classes of one picture, as if they were one number of two pictures."""
    model = graph(2)
    model.graph.node[-1].output[0] = "scores"
    model.graph.node.append(helper.make_node("Squeeze", ["scores"], ["y"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [None]))
    return model


def over_the_batch() -> onnx.ModelProto:
    """Probabilities over the pictures, not over the classes: 1 for each that is alone."""
    model = graph(2, last="Softmax")
    model.graph.node[-1].attribute.append(helper.make_attribute("axis", 0))
    return model


def probabilities(classes: int, then: list[str]) -> onnx.ModelProto:
    """Probabilities with these operators behind them: the one of class 1, 1 less each, or quantised."""
    model = graph(classes, last="Sigmoid" if classes == 1 else "Softmax")
    names = ["y", *(f"then{number}" for number in range(len(then)))]
    inputs = {"Gather": ["{}", "one"], "Sub": ["1.0", "{}"]}
    for operator, before, after in zip(then, names, names[1:], strict=False):
        given = [name.format(before) for name in inputs.get(operator, ["{}", "step", "zero"])]
        attributes: dict[str, Any] = {"axis": 1} if operator == "Gather" else {}
        model.graph.node.append(helper.make_node(operator, given, [after], **attributes))
    constants = {"one": np.int64(1), "1.0": np.float32(1), "step": np.float32(1 / 255), "zero": np.uint8(0)}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in constants.items())
    shape = [None] if then == ["Gather"] else [None, classes]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, shape))
    return model


def softmax_by_hand() -> onnx.ModelProto:
    model = graph(2, last="Exp")
    model.graph.node.append(helper.make_node("ReduceL1", ["y"], ["sum"], axes=[1]))
    model.graph.node.append(helper.make_node("Div", ["y", "sum"], ["share"]))
    model.graph.output[0].name = "share"
    return model


def normalised_over_the_batch() -> onnx.ModelProto:
    """Less the batch's mean, as it is in training: a picture that is alone has nothing left."""
    model = graph(2)
    model.graph.node[0].input[0] = "centred"
    model.graph.node.insert(0, helper.make_node("Sub", ["x", "mean"], ["centred"]))
    model.graph.node.insert(0, helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0, 2, 3]))
    return model


def future() -> onnx.ModelProto:
    model = graph(2)
    model.ir_version = 99
    return model


def hidden_loop() -> onnx.ModelProto:
    """A loop in a branch of a node."""
    model = graph(2)
    loop = helper.make_node("Loop", ["", "c"], ["z"], body=helper.make_graph([], "body", [], []))
    branch = helper.make_graph([loop], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))
    return model


def elsewhere() -> onnx.ModelProto:
    return graph(2, last="Softmax", domain="elsewhere")


def dropping(mode: str) -> onnx.ModelProto:
    """Opset 12 and later say in a third input, a tensor, whether a Dropout trains."""
    model = graph(2)
    model.graph.node.append(helper.make_node("Dropout", ["x", "", mode], ["dropped"]))
    return model


def test_a_dropout_that_is_told_not_to_train_is_taken(tmp_path: Path) -> None:
    model = dropping("mode")
    model.graph.initializer.append(numpy_helper.from_array(np.array(False), "mode"))
    assert onnx.load_model_from_string(model.SerializeToString()) == parse_graph(tmp_path, model.SerializeToString())


def contributed(operator: str) -> onnx.ModelProto:
    """A node of one of ONNX Runtime's own operators."""
    model = graph(2)
    model.graph.node.append(helper.make_node(operator, ["x"], ["z"], domain="com.microsoft"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def with_functions(*bodies: list[onnx.NodeProto], **attributes: Any) -> onnx.ModelProto:
    """A graph that calls the first of its functions f0, f1, ... with these nodes, from x to y."""
    model = graph(2)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("elsewhere", 1)]
    for number, nodes in enumerate(bodies):
        function = helper.make_function("elsewhere", f"f{number}", ["x"], ["y"], nodes, opsets, **attributes)
        model.functions.append(function)
    model.graph.node.append(helper.make_node("f0", ["x"], ["z"], domain="elsewhere"))
    return model


def twice(function: str) -> list[onnx.NodeProto]:
    """Nodes that call a function twice."""
    return [helper.make_node(function, [a], [b], domain="elsewhere") for a, b in (("x", "t"), ("t", "y"))]


def doubling() -> onnx.ModelProto:
    """25 functions that each call the next twice: 2 KB, and 33 million nodes."""
    return with_functions(*(twice(f"f{number + 1}") for number in range(24)), [helper.make_node("Abs", ["x"], ["y"])])


def hidden_in_a_function() -> onnx.ModelProto:
    """A loop in a graph that a function's attribute is by default."""
    loop = helper.make_node("Loop", ["", "c"], ["z"], body=helper.make_graph([], "body", [], []))
    default = helper.make_attribute("branch", helper.make_graph([loop], "branch", [], []))
    return with_functions([helper.make_node("Abs", ["x"], ["y"])], attribute_protos=[default])


@pytest.mark.parametrize(
    ("model", "output", "why"),
    [
        (external(), "{}", "keeps weights in another file"),
        (hidden_loop(), "{}", "has a node Loop"),
        (elsewhere(), "{}", "needs the operator elsewhere.Softmax of another library"),
        (graph(2, second_input=True), "{}", r"has 2 inputs \(x, mask\)"),
        (graph(2), "{ai: 2}", "there is no class 2"),
        (graph(2), "{name: z}", "has the outputs y"),
        (graph(2, opset=10), "{}", "is of opset 10"),
        (graph(2, last="Nonsense"), "{}", "fails on a test picture"),
        (sparse_external(), "{}", "keeps weights in another file"),
        (still_training(), "{}", r"still trains: export the model after .eval\(\)"),
        (dropping("mode"), "{}", r"Dropout that still trains: export the model after .eval\(\)"),
        (contributed("BeamSearch"), "{}", "needs ONNX Runtime's operator BeamSearch"),
        (contributed("EPContext"), "{}", "needs ONNX Runtime's operator EPContext"),
        (doubling(), "{}", "has more than 100,000 nodes, its functions put where they are called"),
        (with_functions(twice("f1"), twice("f0")), "{}", "has a function that calls itself"),
        (with_functions(twice("f1")), "{}", "needs the operator elsewhere.f1 of another library"),
        (hidden_in_a_function(), "{}", "has a node Loop"),
        (circular(), "{}", "fails on a test picture"),
        (whole_numbers(), "{}", "takes whole numbers, which are pixels as they are"),
        (labels(), "{}", "are these labels, not scores"),
        (flattened(), "{}", r"shape \[2\] to 1 at a time"),
        (over_the_batch(), "{kind: probabilities}", "gives the same answer to 4 pictures"),
        (graph(2, last="Softmax"), "{}", "say kind: probabilities"),
        (graph(2), "{kind: probabilities}", "is no probability: is it of kind: logits"),
        (declared(graph(2), 1), "{}", r"its output is \[0, 1\] \(0: any\), but gives \[1, 2\]"),
        (declared(graph(3), 2), "{}", r"its output is \[0, 2\] \(0: any\), but gives \[1, 3\]"),
        (declared(graph(2), None), "{}", r"theirs.yaml, line 8: .* is not stated: say it \(classes\)"),
        (declared(graph(3), None), "{classes: 2}", r"its output is \[0, 2\] \(0: any\), but gives \[1, 3\]"),
        (graph(2), "{classes: 3}", "theirs.yaml, line 8: .* has 2 classes, but 3 are described"),
        (probabilities(2, ["Gather"]), "{}", "say kind: probabilities"),
        (probabilities(1, ["Sub"]), "{}", "say kind: probabilities"),
        (probabilities(2, ["QuantizeLinear", "DequantizeLinear"]), "{}", "say kind: probabilities"),
        (softmax_by_hand(), "{}", "add up to 1, .*: say kind: probabilities"),
        (normalised_over_the_batch(), "{}", "gives the same answer to 4 pictures"),
        (future(), "{}", r"fails on a test picture: ONNX Runtime cannot run this model: [^\n]*99[^\n]*\Z"),
        (taking(TensorProto.INT8), "{}", "input x is of type INT8; FLOAT, FLOAT16, DOUBLE and UINT8 are taken"),
        (graph(1), "{ai: 0}", "say `positive: ai` or `positive: real`, not `ai`"),
        (graph(2), "{positive: real}", "has 2 classes: say `ai`"),
    ],
)
def test_a_graph_that_cannot_be_trusted_or_read_is_refused(
    model: onnx.ModelProto, output: str, why: str, tmp_path: Path
) -> None:
    file, config = write(tmp_path, model, output)
    with pytest.raises(GraphError, match=why):
        import_onnx(file, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_a_function_of_the_models_own_is_taken(tmp_path: Path) -> None:
    file, config = write(tmp_path, with_functions(twice("f1"), [helper.make_node("Abs", ["x"], ["y"])]))
    import_onnx(file, tmp_path / "run", config)


@pytest.mark.parametrize(
    ("limit", "least", "why"),
    [("MAX_NODES", 3, "has more than 2 nodes"), ("MAX_BYTES", len(graph(2).SerializeToString()), "more than 2 GB")],
)
def test_a_graph_is_bounded(limit: str, least: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, config = write(tmp_path, graph(2))
    monkeypatch.setattr(graph_check, limit, least)
    import_onnx(file, tmp_path / "run", config)
    monkeypatch.setattr(graph_check, limit, least - 1)
    with pytest.raises(GraphError, match=why):
        import_onnx(file, tmp_path / "other", config)


@pytest.mark.parametrize(
    ("model", "old", "new", "why"),
    [
        (graph(2), "output: {}", "output:\n  ai: 2", r"theirs.yaml, line 9: .*theirs.onnx has 2 classes"),
        (graph(2), "output: {}", "output:\n  name: z", r"theirs.yaml, line 9: .*theirs.onnx has the outputs y"),
        (graph(2), "output: {}", "output: {kind: probabilities}", r"theirs.yaml, line 8: .*is no probability"),
        (
            normalised_over_the_batch(),
            "resize: 20",
            "views: grid\n  count: 4",
            "theirs.yaml, line 4: .*another answer beside others than alone",
        ),
        (graph(2), "size: 16", "size: 18", r"theirs.yaml, line 3: .*its input is \[0, 3, 16, 16\]"),
        (graph(2), "resize: 20", "layout: nhwc", r"theirs.yaml, line 3: .*layout say \[0, 16, 16, 3\]"),
        (whole_numbers(), "", "", r"theirs.yaml, line 2: .*takes whole numbers"),
    ],
)
def test_a_mistake_that_only_the_graph_shows_is_named_with_its_line(
    model: onnx.ModelProto, old: str, new: str, why: str, tmp_path: Path
) -> None:
    file, config = write(tmp_path, model)
    config.write_text(config.read_text().replace(old, new) if old else config.read_text())
    with pytest.raises(GraphError, match=why):
        import_onnx(file, tmp_path / "run", config)


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_onnx_file_is_said_in_one_line(data: bytes, tmp_path: Path) -> None:
    file, config = write(tmp_path, graph(2))
    file.write_bytes(data)
    with pytest.raises(GraphError, match="is not an ONNX file"):
        import_onnx(file, tmp_path / "run", config)


# Each mapping holds the one before it four times.
MERGES = "\n".join(["a: &a0 {k: v}", *(f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * 4}]}}" for n in range(1, 12))])


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("resize: 20", "reszie: 20", r"theirs.yaml, line 4: input.reszie: .*did you mean resize\?"),
        ("filter: bicubic", "filter: cubic", "theirs.yaml, line 5: input.filter"),
        ("std: [0.2, 0.3, 0.4]", "std: [0.2, 0.3, 0]", "theirs.yaml, line 2: input: std and scale must be positive"),
        ("std: [0.2, 0.3, 0.4]", "std: [.inf, 1, 1]", "line 7: input.std.0: Input should be a finite number"),
        (
            "mean: [0.5, 0.4, 0.3]",
            "mean: [123.7, 116.3, 103.5]",
            "line 2: input: mean is above the largest value of a pixel, 1",
        ),
        ("filter: bicubic", "resize: 24", "line 5 is not YAML: resize stands here twice"),
        ("  size", "\tsize", r"line 3 is not YAML: found character .* that cannot start"),
        ("resize: 20", "resize: 12", "resize is 12, but the middle of size 16"),
        ("filter: bicubic", "views: grid", "resize is not for views: grid"),
        ("name: theirs", 'name: "a\\nb"', "line 1: name: this must be one line of 1 to 100 characters"),
        ("size: 16", "size: 5", "a side must be 8 to 1024 pixels"),
        ("name: theirs", "name: [", "is not YAML"),
        ("name: theirs", "name: us/theirs", "line 1: name: a model's name is one line .* without a slash"),
        (
            "name: theirs",
            "name: theirs\nversion: 1.0",
            "line 2: version: Input should be a valid string: put it in quotes",
        ),
        ("name: theirs", "name: no", "line 1: name: Input should be a valid string: put it in quotes"),
        ("std: [0.2, 0.3, 0.4]", "std: [58.4, 57.1, 57.4]", "std is far above the largest value of a pixel, 1"),
        ("size: 16", "size: 16\n  scale: 1.0e-310", "std and scale must be positive"),
        ("name: theirs", MERGES, "line 8 is not YAML: over 10,000 keys are merged"),
        (
            "output: {}",
            "output: {kind: softmax}",
            "line 8: output.kind: .* softmax say probabilities, .* before one, log",
        ),
        ("output: {}", "output: {kind: logit}", "line 8: output.kind: say logits"),
    ],
)
def test_a_mistake_in_the_description_is_named_with_its_line(old: str, new: str, why: str, tmp_path: Path) -> None:
    file, config = write(tmp_path, graph(2))
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(ImportConfigError, match=why):
        import_onnx(file, tmp_path / "run", config)


def test_what_an_imported_detector_cannot_do_is_one_line(tmp_path: Path) -> None:
    file, config = write(tmp_path, graph(2))
    import_onnx(file, tmp_path / "run", config)
    with pytest.raises(CardError, match="with --engine onnx on a CPU"):
        load_detector(tmp_path / "run", engine="torch")
    run = str(tmp_path / "run")
    for command in (
        ["archive", run, "--engine", "torch"],
        ["export", run],
    ):
        with pytest.raises(UserError, match="is an imported detector"):
            app(command, standalone_mode=False)


def load_in_torchserve(mar: Path, folder: Path) -> None:
    """What a worker of TorchServe does first, with the archive unpacked."""
    with zipfile.ZipFile(mar) as archive:
        archive.extractall(folder)
    properties = {"gpu_id": None, "model_dir": str(folder)}
    settings = {"handler": {"engine": "onnx"}}
    metrics = SimpleNamespace(add_metric_to_cache=lambda *_, **__: None)
    context = SimpleNamespace(
        system_properties=properties, model_yaml_config=settings, metrics=metrics, model_name="theirs"
    )
    threads = torch.get_num_threads()
    try:
        ImageDetector().initialize(context)
    finally:
        torch.set_num_threads(threads)


def test_an_archive_of_it_is_verified_and_loaded(tmp_path: Path) -> None:
    mar = archive(imported_run(tmp_path / "run"), tmp_path, version="2.0")
    assert zipfile.ZipFile(mar).read("model.onnx") == (tmp_path / "run" / "model.onnx").read_bytes()
    assert "model.safetensors" not in zipfile.ZipFile(mar).namelist()
    assert verify(mar).card.training["trained_on"] == "unknown"
    load_in_torchserve(mar, tmp_path / "unpacked")


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (external, "keeps weights in another file"),
        (sparse_external, "keeps weights in another file"),
        (hidden_loop, "has a node Loop"),
        (elsewhere, "of another library"),
    ],
)
def test_an_archive_with_a_graph_that_import_refuses_is_refused(
    harm: Callable[[], onnx.ModelProto], why: str, tmp_path: Path
) -> None:
    mar = archive(imported_run(tmp_path / "run"), tmp_path)
    bad = harm().SerializeToString()
    sealed = seal(bad, Card.read(tmp_path / "run").weights_sha256)
    changed = rewritten(mar, tmp_path / "changed.mar", {"model.onnx": sealed})
    with pytest.raises(VerifyError, match=why):
        verify(changed)
    with pytest.raises(GraphError, match=why):
        load_in_torchserve(changed, tmp_path / "unpacked")


def test_an_archive_with_another_graph_than_its_card_names_is_refused(tmp_path: Path) -> None:
    mar = archive(imported_run(tmp_path / "run"), tmp_path)
    other = (imported_run(tmp_path / "other" / "run", classes=3) / "model.onnx").read_bytes()
    with pytest.raises(VerifyError, match=r"was made of other weights than those of .*: import the detector again"):
        verify(rewritten(mar, tmp_path / "changed.mar", {"model.onnx": other}))


@pytest.mark.usefixtures("pictures")
def test_a_member_with_an_unused_output_is_taken_out_of_an_ensemble_whole(tmp_path: Path) -> None:
    """As of an LSTM whose last state only is used: the name of its first output is empty."""
    model = graph(2)
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(0, 1, (1, 8, 3)), "r": rng.normal(0, 1, (1, 8, 2))}
    del model.graph.initializer[:]
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axes"))
    model.graph.initializer.extend(
        numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()
    )
    model.graph.node.pop()
    model.graph.node.extend(
        [
            helper.make_node("Unsqueeze", ["flat", "axes"], ["steps"]),
            helper.make_node("LSTM", ["steps", "w", "r"], ["", "state"], hidden_size=2),
            helper.make_node("Squeeze", ["state", "axes"], ["y"]),
        ]
    )
    file, config = write(tmp_path / "files", model)
    import_onnx(file, tmp_path / "lstm", config)
    card = build_ensemble(
        [tmp_path / "lstm", imported_run(tmp_path / "other", name="other")], tmp_path / "both", "both"
    )
    assert isinstance(card.preset, EnsemblePreset)
    (part, _), _ = split_graph((tmp_path / "both" / "model.onnx").read_bytes(), card.preset)
    alone = load_detector(tmp_path / "lstm")
    crops = alone.prepare(png(1, 40, 40)).crops.pixels
    assert OnnxDetector(alone.card, part).logits([crops]) == pytest.approx(alone.logits([crops]))


def test_it_is_explained_by_covering_parts_of_the_picture(tmp_path: Path) -> None:
    run = imported_run(tmp_path / "run")
    (tmp_path / "photo.png").write_bytes(png(1, 40, 40))
    done = CliRunner().invoke(
        app, ["explain", str(tmp_path / "photo.png"), "--run", str(run), "--out", str(tmp_path / "why.png")]
    )
    assert done.exit_code == 0, done.output
    (view,) = json.loads(done.stdout)["views"]
    detector = load_detector(run)
    crop = detector.prepare(png(1, 40, 40)).crops.pixels
    grey = np.broadcast_to(crop.mean(axis=(0, 1, 2)).astype(np.uint8), crop.shape)
    whole, covered = detector.logits([crop, grey])
    assert view["weight"] == [[pytest.approx(whole - covered)]]
    with Image.open(tmp_path / "why.png") as drawn:
        assert drawn.width > 300


def test_a_folder_is_scanned_with_it(tmp_path: Path) -> None:
    file, config = write(tmp_path, graph(2))
    import_onnx(file, tmp_path / "run", config)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(png(1, 40, 40))
    arguments = ["scan", str(photos), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
