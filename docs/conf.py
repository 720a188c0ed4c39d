"""How Sphinx makes the site, for docs/build.py. Fonts and scripts are the theme's own files."""

from __future__ import annotations

from dlmctl import __version__

project = "dlmctl"
version = release = __version__
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
highlight_language = "none"
smartquotes = False  # they make a dash of --

html_theme = "furo"
html_title = f"dlmctl {version}"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
