"""Recipes: YAML files for the command line, shipped inside the package."""
