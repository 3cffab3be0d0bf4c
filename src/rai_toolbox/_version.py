"""The version: that of the installed distribution, which is that of the tag it was built from."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("rai-toolbox")
except PackageNotFoundError:  # run from the sources, without being installed
    __version__ = "0+unknown"
