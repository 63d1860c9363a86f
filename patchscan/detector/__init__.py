"""Score an image: bytes to pixels, pixels to crops, crops to a logit, a logit to `p_ai` and a verdict.

`images`, `patches`, `presets`, `answer` and `card` import without torch; `srm`, `models`, `weights` and `detector`
need it. This package imports only `patchscan.common`, because every model archive carries a copy of it.
"""
