"""Convert checkpoints that SSP's authors published into run folders."""

from pathlib import Path

from patchscan.common.files import sha256_of
from patchscan.detector.card import WEIGHTS_FILE, Card
from patchscan.detector.models import SSP
from patchscan.detector.onnx_export import write_graph
from patchscan.detector.presets import PatchPreset
from patchscan.training.checkpoint import write_weights
from patchscan.training.pretrained import load_state, read_state_dict
from patchscan.training.run_folder import check_free

# The authors choose among 64 crops; the study that this project follows chooses among 30.
OFFICIAL_PRESET = PatchPreset(rule="simplest", candidates=64)


def import_official(checkpoint: Path, run: Path, trained_on: str) -> Card:
    """Write a run folder from a published checkpoint (github.com/bcmi/SSP-AI-Generated-Image-Detection).

    `trained_on` says in words what the authors trained it on. Raises WeightsError if the file is no such checkpoint,
    RunFolderError if `run` is a trained run.
    """
    check_free(run)
    model = SSP()
    load_official_ssp(model, checkpoint)
    run.mkdir(parents=True, exist_ok=True)
    write_weights(run, model.state_dict())
    card = Card(
        name="ssp",
        version="1.0",
        architecture="ssp",
        preset=OFFICIAL_PRESET,
        weights_sha256=sha256_of(run / WEIGHTS_FILE),
        training={"recipe": {"weights": checkpoint.name}, "seen": [], "unseen": [], "trained_on": trained_on},
        warnings=[f"Imported from the authors' checkpoint, trained on {trained_on}; evaluate it on your data first."],
    )
    card.write(run)
    write_graph(run)
    return card


def load_official_ssp(model: SSP, path: Path) -> None:
    """Load such a checkpoint: `srm.kernel`, and `disc.*` with torchvision's ResNet50 names.

    Their label 1 is a real photograph, so the last layer changes sign. Raises WeightsError if the names do not fit.
    """
    renamed = {}
    for name, value in read_state_dict(path).items():
        if name.startswith("disc.fc."):
            renamed[name] = -value
        elif name.startswith("disc."):
            renamed["disc.resnet." + name.removeprefix("disc.")] = value
        else:
            renamed[name] = value
    load_state(model, renamed, "not an official SSP checkpoint")
