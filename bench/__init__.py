"""The speed of everything, measured side by side: `make bench`, `make bench-quick`, or `python -m bench --help`."""

import os

# As the product does (patchscan/detector/onnx_detector.py), where a measurement loads ONNX Runtime before it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
