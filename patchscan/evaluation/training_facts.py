"""What a report says of a model's training: the initial weights, epochs and precision."""

from typing import Any

from patchscan.detector.card import Card


def training_facts(card: Card) -> dict[str, Any]:
    """Return the single values of the card's training, and of its recipe `initial_weights` (`none` for a training from
    nothing) and `epochs`; these two and `precision` are None where the card does not say."""
    training = card.training
    recipe = training.get("recipe", {})
    facts = {key: value for key, value in training.items() if isinstance(value, str | int | float)}
    return {"precision": None} | facts | {"initial_weights": _initial_weights(card), "epochs": recipe.get("epochs")}


def _initial_weights(card: Card) -> str | None:
    recipe = card.training.get("recipe", {})
    if "epochs" not in recipe:  # imported, or joined of others: the card tells no training
        return None
    weights: dict[str, str] | None = card.training.get("weights")
    # Cards of version 0.1 have the recipe's word alone. A model may leave that unused; then the description is empty.
    return recipe.get("weights") if weights is None else weights.get("source", "none")


def training_text(facts: dict[str, Any]) -> str:
    """Return the facts in a line, such as `initial weights none, 10 epochs, bf16`."""
    if "trained_by" in facts:
        return "imported from {source}; trained by: {trained_by}; on: {trained_on}; licence: {licence}".format(**facts)
    weights, epochs, precision = (facts[key] for key in ("initial_weights", "epochs", "precision"))
    told = [f"initial weights {weights}" if weights else "initial weights not on the card"]
    return ", ".join(told + [f"{epochs} epochs"] * bool(epochs) + [precision] * bool(precision))
