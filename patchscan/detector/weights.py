"""Read a run folder's weights."""

import json
import struct
from pathlib import Path

import torch

from patchscan.common.errors import UserError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}


class WeightsError(UserError):
    """A weights file cannot be downloaded, cannot be read or does not fit the model; the message says what to do."""


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, by name. Raises WeightsError if it is not one."""
    # Not read with the safetensors package, because an archive must run on a TorchServe that has torch and nothing
    # else. The format is a JSON header before raw bytes: https://github.com/huggingface/safetensors#format
    data = bytearray(path.read_bytes())
    try:
        (header_size,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + header_size])
        header.pop("__metadata__", None)
        # No two tensors may share bytes: a small file could be made to fill the memory.
        sizes = [end - begin for begin, end in (entry["data_offsets"] for entry in header.values())]
        if min(sizes, default=0) < 0 or 8 + header_size + sum(sizes) > len(data):
            raise ValueError("its tensors have more bytes than the file")
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            raw = data[8 + header_size + begin : 8 + header_size + end]
            flat = torch.frombuffer(raw, dtype=_DTYPES[entry["dtype"]]) if raw else torch.empty(0)
            tensors[name] = flat.reshape(entry["shape"])
        return tensors
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise WeightsError(f"{path} is not a safetensors file that this version can read: {error}") from error
