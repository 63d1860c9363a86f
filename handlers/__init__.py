"""TorchServe's way in: `image_detector.py` is the handler of every archive."""
