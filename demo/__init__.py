"""The main job on embedded defaults, from sample images to a report: `python -m demo` (`make demo`)."""
