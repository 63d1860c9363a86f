"""Score an image: bytes to pixels, pixels to crops, crops to a logit, a logit to `p_ai` and a verdict.

What needs torch is `models` with the networks in it, `weights`, `detector` and `onnx_export`. This package
imports only `patchscan.common`, because every model archive carries a copy of it.
"""
