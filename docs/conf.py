"""Sphinx settings."""

project = "tailkd"
extensions = ["myst_parser"]
html_theme = "furo"
exclude_patterns = ["_build"]
