"""Train a detector: a recipe and a data set give a run folder with weights and their card."""
