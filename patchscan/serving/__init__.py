"""Archives and their proof, TorchServe and the gate before it, and the versions of a served model."""
