"""What a verdict is: bytes to pixels, pixels to crops, crops to a logit, a logit to `p_ai` and a verdict.

`images`, `patches`, `presets`, `answer` and `card` import without torch; `srm`, `models`, `weights` and `detector`
need it. This package knows no other package of the project and travels whole inside every archive.
"""
