"""The architectures are the study's, layer by layer, and weights come and go without a pickle."""

import gzip
import hashlib
import importlib.util
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from patchscan.detector.efficientnet import BLOCKS
from patchscan.detector.models import NoInitialWeights, ResNet50, SimpleCNN, SSPLite, ai_logit, build_network
from patchscan.detector.presets import to_tensor
from patchscan.detector.weights import WeightsError, read_safetensors
from patchscan.training import pretrained
from patchscan.training.pretrained import load_imagenet, load_state, read_state_dict
from tests.imagenet_weights import lite0_state, resnet50_state


def test_simplecnn_is_the_studys() -> None:
    layers = [layer for layer in SimpleCNN().modules() if isinstance(layer, nn.Conv2d | nn.Linear | nn.Dropout)]
    shapes = [layer.p if isinstance(layer, nn.Dropout) else tuple(layer.weight.shape) for layer in layers]
    convolutions = [(32, 3, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3)]
    assert shapes == [*convolutions, (512, 256 * 14 * 14), 0.5, (2, 512)]


@pytest.mark.slow
@torch.inference_mode()
def test_resnet50_is_torchvisions_with_dropout_and_two_outputs() -> None:
    import torchvision  # imported here because it takes seconds

    model = ResNet50()
    backbone = torchvision.models.resnet50(weights=None)
    backbone.fc = nn.Identity()
    model.resnet.load_state_dict(backbone.state_dict())
    crops = torch.randn(2, 3, 64, 96)
    for mode in (True, False):  # one after the other: a pass in training changes the statistics
        assert torch.equal(model.resnet.train(mode)(crops), backbone.train(mode)(crops))
    assert model.resnet.state_dict().keys() == backbone.state_dict().keys()
    assert (model.dropout.p, model.fc.out_features) == (0.5, 2)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torchvision.models.ResNet50_Weights.IMAGENET1K_V2.url == pretrained.RESNET50["url"]


def test_untrained_convolutions_are_drawn_as_torchvisions() -> None:
    """From a normal distribution whose variance keeps that of the gradients."""
    weight = ResNet50().resnet.state_dict()["layer3.1.conv2.weight"]
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert weight.abs().max() > 4 * weight.std()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["ssp", "resnet50", "simplecnn", "efficientnet-lite0"])
def test_weights_are_not_drawn_for_those_who_load_others(architecture: str) -> None:
    before = torch.get_rng_state()
    with NoInitialWeights():
        model = build_network(architecture)
    assert torch.equal(torch.get_rng_state(), before)
    drawn = build_network(architecture)
    model.load_state_dict(drawn.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), drawn.buffers(), strict=True))


def test_ssp_learns_everything_but_its_filters() -> None:
    model = build_network("ssp")
    assert "srm.kernel" not in dict(model.named_parameters())
    assert all(name.startswith("disc.") for name, _ in model.named_parameters())


def test_ssp_lite_has_under_a_million_parameters_and_sees_noise_only() -> None:
    model = SSPLite().eval()
    assert sum(one.numel() for one in model.parameters()) < 1_000_000
    patch = torch.randn(2, 3, 32, 32)
    brighter = patch + torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1)
    torch.testing.assert_close(model(patch), model(brighter), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "size"),
    [("simplecnn", 224), ("resnet50", 224), ("ssp", 32), ("ssp-lite", 32), ("efficientnet-lite0", 128)],
)
@torch.inference_mode()
def test_every_architecture_gives_one_logit_a_crop(architecture: str, size: int) -> None:
    model = build_network(architecture).eval()
    crops = torch.zeros(2, 3, size, size)
    assert ai_logit(model(crops)).shape == (2,)
    assert model.penultimate(crops).shape[0] == 2


def test_two_outputs_become_the_logit_of_ai() -> None:
    outputs = torch.tensor([[1.0, 3.0]])
    assert torch.sigmoid(ai_logit(outputs)).item() == pytest.approx(torch.softmax(outputs, 1)[0, 1].item())


def test_an_unknown_architecture_names_the_known() -> None:
    with pytest.raises(ValueError, match="simplecnn, resnet50, ssp, ssp-lite, efficientnet-lite0"):
        build_network("ssp2")


def test_safetensors_are_read_as_the_library_wrote_them(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.arange(5), "empty": torch.zeros(0, 2), "c": torch.tensor(2.5)}
    save_file(state, tmp_path / "x.safetensors")
    read = read_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x02\x00\x00\x00\x00\x00\x00\x00[]", b"PK\x03\x04 not tensors"])
def test_a_damaged_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match="not a safetensors file"):
        read_safetensors(tmp_path / "x.safetensors")


class Exploit:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Exploit(tmp_path / "executed")))
    with pytest.raises(WeightsError, match="plain tensors"):
        read_state_dict(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_often_saved_in_place_of_weights_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "weights.pth"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load_imagenet(build_network("ssp"), str(file))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf <!doctype html>", "is a web page"),
        ("<HTML><body>Sign in".encode("utf-16"), "is a web page"),
        ("\n<html>".encode("utf-16-be"), "is a web page"),
        (b'{"error": "Repository not found"}', "is JSON"),
        (b"Not Found", "is a text"),
        (b"outs:\n- md5: abc\n  path: w.pth\n", "is a DVC pointer.*dvc pull"),
        (b"md5: abc\nfrozen: true\nouts:\n- md5: abc\n", "is a DVC pointer.*dvc pull"),
        (b"/annex/objects/SHA256E-s1--abc.pth\n", "is a git-annex pointer.*git annex get"),
        (b"../.git/annex/objects/aa/SHA256E-s1--abc.pth", "is a git-annex pointer.*git annex get"),
        (b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"version https://hawser.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (gzip.compress(b"x"), "packed with gzip"),
        (b"PK\x03\x04\0\0\0\0 cut", "damaged or cut short"),
    ],
)
def test_what_is_no_weights_is_told_in_one_line_of_ours(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_state_dict(tmp_path / name)
    told = str(caught.value)
    assert len(told) - len(str(tmp_path)) < 160
    assert told.isprintable()
    assert "weights_only" not in told


def test_a_whole_model_is_told_in_one_line_of_ours(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"holds more \(torch.nn.modules.linear.Linear\)") as caught:
        read_state_dict(tmp_path / "model.pth")
    assert "weights_only" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights_of_a_wrapped_model_are_read_by_what_the_file_is(tmp_path: Path, name: str, wrapper: str) -> None:
    state = {f"{wrapper}a.module.weight": torch.zeros(2)}
    torch.save(state, tmp_path / name)
    assert list(read_state_dict(tmp_path / name)) == ["a.module.weight"]
    save_file(state, tmp_path / name)
    assert list(read_state_dict(tmp_path / name)) == ["a.module.weight"]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the names and shapes of torchvision's ResNet50."""
    file = tmp_path_factory.mktemp("imagenet") / "resnet50.pth"
    torch.save(resnet50_state(), file)
    return file


def test_a_checkpoint_of_a_wrapped_model_is_read(tmp_path: Path) -> None:
    """From DataParallel, and with an optimiser beside it."""
    state = SSPLite().state_dict()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({"model_state_dict": wrapped, "epoch": 3}, tmp_path / "wrapped.pth")
    assert read_state_dict(tmp_path / "wrapped.pth").keys() == state.keys()


@pytest.mark.parametrize(
    "saved",
    [
        lambda state: {"net": state, "acc": 91.5, "epoch": 3},
        lambda state: {"weights": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        lambda state: {"ema": state, "step": torch.tensor(3)},
        lambda state: {"model": state, "ema": {name: value + 1 for name, value in state.items()}},
        lambda state: {"state_dict": {"model": state}, "global_step": 3},
        lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}, "epoch": 3},
        lambda state: {f"net._orig_mod.{name}": value for name, value in state.items()},
        lambda state: {"n_averaged": torch.tensor(5), **{f"module.{name}": value for name, value in state.items()}},
        lambda state: {name: value.half() for name, value in state.items() if "num_batches" not in name},
    ],
)
def test_a_checkpoint_of_other_programs_is_read(tmp_path: Path, saved: Any) -> None:
    own, loaded = SSPLite(), SSPLite()
    state = {name: value.half().to(value.dtype) for name, value in own.state_dict().items()}
    torch.save(saved(state), tmp_path / "saved.pth")
    load_state(loaded, read_state_dict(tmp_path / "saved.pth"), "saved.pth")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_a_checkpoint_of_several_models_is_told_in_one_line(tmp_path: Path) -> None:
    several = {"generator": {"a": torch.zeros(1)}, "discriminator": {"a": torch.ones(1)}}
    endless: dict[str, Any] = {}
    endless["model"] = endless
    saved: Any
    for saved in (several, endless, [], {"a": {}}):
        torch.save(saved, tmp_path / "several.pth")
        with pytest.raises(WeightsError, match="no state dict, or several"):
            read_state_dict(tmp_path / "several.pth")


def test_a_checkpoint_of_another_model_is_told_in_one_line(tmp_path: Path) -> None:
    """It begins alike, then blocks have another shape, and most are not there."""
    other = {name: value for name, value in ResNet50().resnet.state_dict().items() if not name.startswith("layer")}
    other |= {"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3), "layer1.0.conv4.weight": torch.zeros(1)}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(WeightsError) as caught:
        load_imagenet(build_network("resnet50"), str(tmp_path / "other.pth"))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400
    for said in ("missing, such as layer1.0.bn1", "not the model's, such as layer1.0.conv4", "(64, 64, 3, 3) for (64"):
        assert said in str(caught.value)


def test_efficientnet_folds_the_batch_normalisation_of_its_imagenet_weights(tmp_path: Path) -> None:
    torch.save(lite0_state(), tmp_path / "lite0.pth")
    model = build_network("efficientnet-lite0").eval()
    load_imagenet(model, str(tmp_path / "lite0.pth"))
    x = (torch.arange(2 * 3 * 64 * 64) * 7919 % 256).float().reshape(2, 3, 64, 64)
    expected = reference_features(lite0_state(), (x - 127) / 128)
    features = model.penultimate(to_tensor(x.permute(0, 2, 3, 1).to(torch.uint8)))
    torch.testing.assert_close(features, expected, atol=1e-3, rtol=1e-3)


def reference_features(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 written out, batch normalisation and all."""

    def layer(x: torch.Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)
        mean, var, gain, bias = (state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, gain, bias, eps=1e-3)

    x = layer(x, "_conv_stem", "_bn0", 2).clamp(0, 6)
    for number, (expansion, _, stride, before, after) in enumerate(BLOCKS):
        block, y = f"_blocks.{number}.", x
        if expansion > 1:
            y = layer(y, f"{block}_expand_conv", f"{block}_bn0").clamp(0, 6)
        y = layer(y, f"{block}_depthwise_conv", f"{block}_bn1", stride, before * expansion).clamp(0, 6)
        y = layer(y, f"{block}_project_conv", f"{block}_bn2")
        x = x + y if stride == 1 and before == after else y
    return torch.cat([x.mean((2, 3)), (x.var((2, 3), correction=0) + 1e-4).sqrt()], dim=1)


def test_an_efficientnet_file_of_other_names_is_refused(tmp_path: Path) -> None:
    state = lite0_state()
    state["_blocks.3._project_conv.weight"] = torch.zeros(1, 2, 3, 4)
    torch.save(state, tmp_path / "shapes.pth")
    del state["_blocks.7._bn1.running_var"]
    torch.save(state, tmp_path / "names.pth")
    for name in ("shapes", "names"):
        with pytest.raises(WeightsError, match="does not hold the weights of efficientnet-lite0"):
            load_imagenet(build_network("efficientnet-lite0"), str(tmp_path / f"{name}.pth"))


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "LITE0_PACKAGE", "no_such_package")
    with pytest.raises(WeightsError, match="backbone"):
        load_imagenet(build_network("efficientnet-lite0"), "imagenet")


def test_a_package_with_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lite0_forged" / "models").mkdir(parents=True)
    (tmp_path / "lite0_forged" / "__init__.py").touch()
    torch.save(lite0_state(), tmp_path / "lite0_forged" / pretrained.LITE0_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "LITE0_PACKAGE", "lite0_forged")
    with pytest.raises(WeightsError, match="is not the file that is expected"):
        load_imagenet(build_network("efficientnet-lite0"), "imagenet")


def test_the_packages_weights_load() -> None:
    model = build_network("efficientnet-lite0")
    load_imagenet(model, "imagenet")
    assert model.state_dict()["stem.conv.weight"].std().item() > 0.3


def test_the_card_names_the_licence_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "mine.pth").write_bytes(b"x")
    assert pretrained.describe_weights("efficientnet-lite0", "imagenet")["licence"] == "Apache-2.0"
    assert pretrained.describe_weights("resnet50", "imagenet")["licence"] == "BSD-3-Clause"
    assert pretrained.describe_weights("ssp", "none") == {}
    assert pretrained.describe_weights("simplecnn", "imagenet") == {}  # it has no place for them
    mine = pretrained.describe_weights("ssp", str(tmp_path / "mine.pth"))
    assert (mine["source"], mine["licence"], len(mine["sha256"])) == ("mine.pth", "unknown", 64)


def test_a_file_of_the_published_weights_is_described_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = importlib.util.find_spec(pretrained.LITE0_PACKAGE)
    assert package is not None
    assert package.origin is not None
    shutil.copy(Path(package.origin).parent / pretrained.LITE0_FILE, tmp_path / "renamed.pth")
    described = pretrained.describe_weights("efficientnet-lite0", str(tmp_path / "renamed.pth"))
    assert described == pretrained.describe_weights("efficientnet-lite0", "imagenet")
    (tmp_path / "resnet50.pth").write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    monkeypatch.setitem(pretrained.RESNET50, "url", f"https://download.pytorch.org/models/resnet50-{digest[:8]}.pth")
    described = pretrained.describe_weights("ssp", str(tmp_path / "resnet50.pth"))
    assert described == pretrained.RESNET50 | {"sha256": digest}


@pytest.mark.parametrize("name", pretrained.PUBLISHED)
def test_a_file_that_only_has_the_name_of_published_weights_is_refused(name: str, tmp_path: Path) -> None:
    torch.save(lite0_state(), tmp_path / name)
    model = build_network("resnet50" if name.startswith("resnet50") else "efficientnet-lite0")
    with pytest.raises(WeightsError, match="its SHA-256 does not begin with"):
        load_imagenet(model, str(tmp_path / name))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet50", "ssp"])
def test_imagenet_weights_load_from_a_file(imagenet: Path, architecture: str) -> None:
    model = build_network(architecture)
    load_imagenet(model, str(imagenet))
    loaded = model.state_dict()
    name = next(key for key in loaded if key.endswith("layer1.0.conv1.weight"))
    assert torch.equal(loaded[name], read_state_dict(imagenet)["layer1.0.conv1.weight"])


def test_offline_imagenet_weights_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match="--weights FILE, or start from scratch with --weights none"):
        load_imagenet(build_network("resnet50"), "imagenet")


@pytest.mark.slow
def test_torchvisions_cached_weights_are_used(imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    # torch checks the first eight hex digits of the file's SHA-256 against its name only when it downloads.
    (cache / "resnet50-11ad3fa6.pth").symlink_to(imagenet)
    model = build_network("resnet50")
    load_imagenet(model, "imagenet")
    assert torch.equal(model.state_dict()["resnet.conv1.weight"], read_state_dict(imagenet)["conv1.weight"])


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="does not hold the weights of torchvision's resnet50"):
        load_imagenet(build_network("ssp"), str(tmp_path / "other.pth"))
