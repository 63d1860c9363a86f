"""The recipes, one YAML file a model; `training.recipe` reads and checks them."""
