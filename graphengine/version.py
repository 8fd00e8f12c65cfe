"""Which version of the package is this? The same as in pyproject.toml."""

__version__ = "0.1.0"
