"""Backbones by name: the paper's, the committed minis, and any timm name."""
