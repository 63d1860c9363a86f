"""`patchscan import` of PyTorch programs: they score as in PyTorch, and nothing that they bring along runs outside."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from patchscan.detector.engines import load_detector
from patchscan.detector.graph_check import GraphError
from patchscan.training.exported_program import read_program
from patchscan.training.import_config import Input
from patchscan.training.import_onnx import import_onnx
from patchscan.training.torch_program import to_onnx
from tests.import_kit import CONFIG, SIDE
from tests.serving_kit import picture, png

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
WEIGHTS = "plain/data/weights/model_weights_config.json"
Edit = Callable[[dict[str, bytes]], None]


class Theirs(nn.Module):
    """A small network with what real ones have: weights, buffers, steps in place, sizes that depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.norm(self.conv(x)))
        tokens = x[:, :, ::4, ::4].reshape(x.size(0), 8, -1).transpose(1, 2)
        found: torch.Tensor = self.out(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))
        return found


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.conv(x).relu().amax([2, 3]))
        return found


def exported(path: Path, model: nn.Module, images: int = 2) -> Path:
    """The model as a file of torch.export, for any number of pictures, or for one."""
    shapes = ({0: torch.export.Dim("n")} if images > 1 else None,)
    example = (torch.rand(images, 3, SIDE, SIDE),)
    torch.export.save(torch.export.export(model.eval(), example, dynamic_shapes=shapes), path)
    return path


def scripted(path: Path, model: nn.Module) -> Path:
    torch.jit.script(model.eval()).save(str(path))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torch.export for the tests to change."""
    return exported(tmp_path_factory.mktemp("plain") / "plain.pt2", Plain())


def changed(plain: Path, folder: Path, edit: Edit) -> Path:
    """The same with other members."""
    with zipfile.ZipFile(plain) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    with zipfile.ZipFile(folder / "changed.pt2", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return folder / "changed.pt2"


def in_json(member: str, edit: Callable[[Any], None]) -> Edit:
    def apply(members: dict[str, bytes]) -> None:
        content = json.loads(members[member])
        edit(content)
        members[member] = json.dumps(content).encode()

    return apply


def nodes(edit: Callable[[list[dict[str, Any]]], None]) -> Edit:
    return in_json("plain/models/model.json", lambda content: edit(content["graph_module"]["graph"]["nodes"]))


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def imported(file: Path, folder: Path) -> float:
    """The logit of a picture after an import of the file."""
    (folder / "theirs.yaml").write_text(CONFIG.format(output="{ai: 0}"))
    import_onnx(file, folder / "run", folder / "theirs.yaml")
    detector = load_detector(folder / "run")
    return detector.logits([detector.prepare(png(1, 20, 20)).crops.pixels])[0]


def in_torch(model: nn.Module) -> float:
    pixels = torch.from_numpy(picture(1, 20, 20)[2:18, 2:18].copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        ai, real = model(((pixels - mean) / std)[None])[0].tolist()
    return float(ai - real)


def test_a_file_of_torch_export_scores_as_in_torch_and_its_pickle_is_not_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Theirs()
    file, marker = exported(tmp_path / "plain.pt2", model), tmp_path / "marker"

    def poison(members: dict[str, bytes]) -> None:
        members["plain/data/sample_inputs/model.pt"] = pickle.dumps(Touches(marker))

    poisoned = changed(file, tmp_path, poison)
    assert imported(poisoned, tmp_path) == pytest.approx(in_torch(model), abs=1e-4)
    assert not marker.exists()
    with pytest.raises(Exception, match="error when deserializing"):
        torch.export.load(poisoned)
    assert marker.exists()  # the pickle would have worked


def test_a_torchscript_file_scores_as_in_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Plain()
    assert imported(scripted(tmp_path / "theirs.ts", model), tmp_path) == pytest.approx(in_torch(model), abs=1e-4)


def test_a_program_that_mixes_its_pictures_takes_one_at_a_time(tmp_path: Path) -> None:
    class Mixes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - x.mean()).amax([2, 3])

    (tmp_path / "theirs.yaml").write_text(CONFIG.format(output="{}").replace("resize: 20", "views: grid\n  count: 4"))
    (tmp_path / "theirs.yaml").write_text((tmp_path / "theirs.yaml").read_text().replace("  filter: bicubic\n", ""))
    with pytest.raises(GraphError, match="takes 1 pictures at a time"):
        import_onnx(scripted(tmp_path / "theirs.ts", Mixes()), tmp_path / "run", tmp_path / "theirs.yaml")


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (
            in_json(
                "plain/data/weights/model_weights_config.json",
                lambda c: c["config"]["out.bias"].update(use_pickle=True),
            ),
            "keeps out.bias as a pickle",
        ),
        (nodes(lambda all_: all_[0].update(target="os.system")), "needs the operator os.system"),
        (nodes(lambda all_: all_[0].update(target="torch.ops.aten.from_file.default")), "aten.from_file"),
        (nodes(lambda all_: all_[0].update(target="torch.ops.higher_order.cond")), "higher_order.cond"),
        (
            nodes(lambda all_: all_[0]["inputs"][3]["arg"].update(as_ints=["1); evil("])),
            "passes an argument as_int",
        ),
        (
            nodes(lambda all_: all_[0]["inputs"].append({"name": "a=b", "arg": {"as_int": 1}, "kind": 2})),
            "an argument is named 'a=b'",
        ),
        (nodes(lambda all_: all_[0]["inputs"][0]["arg"]["as_tensor"].update(name="y")), "cannot be read"),
        (in_json("plain/models/model.json", lambda c: c["schema_version"].update(major=9)), "is of schema"),
        (lambda members: members.update({"plain/data/weights/weight_0": b"1234"}), "cannot be read"),
    ],
)
def test_what_a_file_of_torch_export_may_not_hold(edit: Edit, why: str, plain: Path, tmp_path: Path) -> None:
    file = changed(plain, tmp_path, edit)
    with pytest.raises(GraphError, match=why):
        read_program(file, file.read_bytes(), (3, SIDE, SIDE))


class OpensFile(nn.Module):
    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean([2, 3]) + torch.from_file(self.file, True, 3)


class Fills(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean([2, 3]) + torch.ones([100000, 1000000]).mean()


class Loops(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool(x.sum() > -1.0):
            x = x * 0.5
        return x.mean([2, 3])


def test_one_number_for_all_pictures_is_told(tmp_path: Path) -> None:
    class Scalar(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean()

    (tmp_path / "theirs.yaml").write_text(CONFIG.format(output="{}"))
    with pytest.raises(GraphError, match="not a number or a row for each picture"):
        import_onnx(scripted(tmp_path / "theirs.ts", Scalar()), tmp_path / "run", tmp_path / "theirs.yaml")


def test_torchscript_cannot_open_files(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    script = torch.jit.script(OpensFile(str(marker)))
    script.save(str(tmp_path / "theirs.ts"))
    with pytest.raises(GraphError, match=r"cannot be converted to ONNX here .*Too many open files"):
        to_onnx(tmp_path / "theirs.ts", Input(size=SIDE))
    assert not marker.exists()
    script(torch.rand(1, 3, SIDE, SIDE))
    assert marker.exists()  # here it would have


@pytest.mark.parametrize(
    ("model", "why"), [(Loops(), r"it took more than 1 s"), (Fills(), "can't allocate memory: you tried to allocate")]
)
def test_torchscript_has_limits(model: nn.Module, why: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=why):
        to_onnx(scripted(tmp_path / "theirs.ts", model), Input(size=SIDE), time_s=1)


def test_other_archives_are_named(plain: Path, tmp_path: Path) -> None:
    torch.save(Plain().state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(GraphError, match="is a checkpoint: weights without"):
        to_onnx(tmp_path / "theirs.pth", Input(size=SIDE))

    def rename(members: dict[str, bytes]) -> None:
        members["plain/other"] = members.pop("plain/archive_format")

    with pytest.raises(GraphError, match="is no ONNX file, no TorchScript and no program"):
        to_onnx(changed(plain, tmp_path, rename), Input(size=SIDE))


def test_another_size_than_the_program_was_made_for_is_said(plain: Path) -> None:
    with pytest.raises(GraphError, match=r"its input is \[None, 3, 16, 16\] .* but size and"):
        read_program(plain, plain.read_bytes(), (3, 32, 32))
