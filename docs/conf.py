"""Sphinx configuration."""

from msfp.version import __version__

project = "msfp and fpformats"
author = "The msfp authors"
copyright = "2026, the msfp authors"  # noqa: A001 - Sphinx's name
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "msfp"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_numpy_docstring = False
copybutton_prompt_text = ">>> |\\$ |\\.\\.\\. "
copybutton_prompt_is_regexp = True
