"""Commands for training: train, import, probe, import-ssp, ensemble, export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from patchscan.common.console import say
from patchscan.dataset.commands import INDEX


def add_to(app: typer.Typer) -> None:
    """Register this package's commands."""
    for command in (train, import_model, probe, import_ssp, ensemble, export):
        app.command("import" if command is import_model else None, rich_help_panel="Train")(command)


def train(
    recipe: Annotated[
        str, typer.Argument(help="simplecnn, resnet50, ssp, ssp-robust, ssp-lite, lite0, starter, or a YAML file.")
    ],
    data: Annotated[str, typer.Option(help="Folder or s3:// URL in GenImage's layout.")],
    run: Annotated[str, typer.Option(help="Where the run is kept: a folder or an s3:// URL.")],
    seen: Annotated[
        str | None, typer.Option(help="Generators to train on, separated by commas (default: the recipe's).")
    ] = None,
    unseen: Annotated[
        str | None, typer.Option(help="Generators kept for evaluation, separated by commas (default: the recipe's).")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Initial weights: imagenet, none, or a file (default: the recipe's).")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Number of epochs (default: the recipe's).")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed (default: the recipe's).")] = None,
    notice: Annotated[str | None, typer.Option(help="A warning to show with all of this model's verdicts.")] = None,
    protocol: Annotated[
        Literal["raw", "matched"],
        typer.Option(help="DATA as it is, or its matched version DATA-matched (built first if missing)."),
    ] = "raw",
    extra: Annotated[
        list[str] | None,
        typer.Option(
            help="Another folder to train on: its train images, or all if it has none; it may hold real images only. "
            "May be repeated."
        ),
    ] = None,
    index: INDEX = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda if there is a GPU).")] = None,
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(
            help="What convolutions and linear layers compute in (default: bf16 on a GPU, fp32 on a CPU). bf16 on a "
            "CPU needs AMX or avx512_bf16.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that load images (default: half as many as there are CPUs).")
    ] = None,
) -> None:
    """Train one recipe. Run the same command again to continue an interrupted run.

    The checkpoint is chosen on the seen generators' validation split; unseen generators are never read. SIGTERM and
    Ctrl-C save a checkpoint and end with exit code 75.

    \b
    Examples:
      patchscan train ssp --data /data/genimage --run runs/ssp
      patchscan train ssp-lite --data genimage-mini --run runs/lite --seen sd_v1,ldm --unseen stylegan2_ada
      patchscan train resnet50 --data s3://images/genimage --index genimage.parquet --run s3://models/resnet50
    """
    from patchscan.common.processes import available_cpus
    from patchscan.training.recipe import load_recipe, split_names

    named = {name: split_names(text) for name, text in (("seen", seen), ("unseen", unseen)) if text is not None}
    checked = load_recipe(recipe, **named, weights=weights, epochs=epochs, seed=seed, notice=notice)
    from patchscan.training.data import check_names

    check_names(data, index, extra or (), named.get("seen", ()), named.get("unseen", ()))
    from patchscan.training.train import train as train_recipe

    train_recipe(
        checked,
        data,
        run,
        index=index,
        device=device,
        precision=precision,
        workers=max(1, available_cpus() // 2) if workers is None else workers,
        protocol=protocol,
        extra=extra or (),
    )


def import_ssp(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that SSP's authors published.")],
    run: Annotated[Path, typer.Option(help="Run folder to write.")],
    trained_on: Annotated[str, typer.Option(help="What the authors trained it on, in words, for the card.")],
) -> None:
    """Convert a checkpoint that SSP's authors published into a run folder.

    \b
    Example:
      patchscan import-ssp sdv15.pth --run runs/official --trained-on "GenImage, Stable Diffusion v1.5"
    """
    from patchscan.training.import_ssp import import_official

    card = import_official(checkpoint, run, trained_on)
    say(f"{run}  digest:{card.digest[:12]}")


def import_model(
    model: Annotated[
        Path,
        typer.Argument(
            help="An ONNX file, one of torch.export.save (.pt2) or TorchScript, or the folder of a Hugging Face "
            "export that holds model.onnx."
        ),
    ],
    run: Annotated[Path, typer.Option(help="Run folder to write.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML that says what the graph takes and gives (docs/import.md).")
    ] = None,
) -> None:
    """Turn a detector that somebody else trained into a run folder, to be evaluated and scanned with like our own.

    \b
    Examples:
      patchscan import theirs.onnx --config theirs.yaml --run runs/theirs
      patchscan import theirs.pt2 --config theirs.yaml --run runs/theirs
      patchscan import ./their-export --run runs/theirs
    """
    from patchscan.training.import_onnx import import_onnx

    card = import_onnx(model, run, config)
    say(f"{run}  digest:{card.digest[:12]}; next: patchscan evaluate --run {run} --data DATA --out REPORT")


def probe(
    backbone: Annotated[
        Path, typer.Option(help="A network that gives a vector for a picture, in a file as for `patchscan import`.")
    ],
    config: Annotated[Path, typer.Option(help="YAML that says what it takes, as for `patchscan import`.")],
    data: Annotated[str, typer.Option(help="Folder or s3:// URL in GenImage's layout.")],
    run: Annotated[Path, typer.Option(help="Run folder to write.")],
    seen: Annotated[
        str | None,
        typer.Option(help="Generators to train on, separated by commas (default: all with train and val images)."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=2, help="Use at most this many train and val images of each generator and class.")
    ] = None,
    index: INDEX = None,
) -> None:
    """Train a linear head on somebody else's backbone: minutes on a CPU. The result is a detector like an imported one.

    Each image's features are computed once; a logistic regression follows.

    \b
    Example:
      patchscan probe --backbone backbone.onnx --config backbone.yaml --data data/genimage --run runs/probe
    """
    from patchscan.training.probe import train_probe
    from patchscan.training.recipe import split_names

    card = train_probe(backbone, config, data, run, split_names(seen or ""), index, limit)
    say(
        f"{run}: AUC {card.training['seen_val_auc']:.3f} on the val images of {', '.join(card.training['seen'])}; "
        f"next: patchscan evaluate --run {run} --data {data} --out REPORT"
    )


def ensemble(
    run: Annotated[list[Path], typer.Option(help="A run folder, preferably calibrated; give two or more.")],
    out: Annotated[Path, typer.Option(help="The new run folder.")],
    name: Annotated[str, typer.Option(help="The new model's name.")] = "ensemble",
) -> None:
    """Combine several runs into one model: the mean of their calibrated logits.

    The result is a run folder: evaluate it (which calibrates it), archive it and serve it as usual.

    \b
    Example:
      patchscan ensemble --run runs/ssp --run runs/ssp-lite --out runs/both --name both
    """
    from patchscan.training.ensemble import build_ensemble

    card = build_ensemble(run, out, name)
    say(f"{out}: {card.architecture}; next: patchscan evaluate --run {out} --data DATA --out REPORT")


def export(run: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")]) -> None:
    """Write model.onnx into run folders that have none: with it, scans need no torch.

    Trainings write it themselves. It is made of the folder's weights and bound to them: after a change of the weights,
    run this again.

    \b
    Example:
      patchscan export runs/ssp
    """
    from patchscan.detector.onnx_export import write_graph

    for one in run:
        say(str(write_graph(one)))
