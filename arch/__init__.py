"""Backbones built from the layers, and the registry that names them."""
