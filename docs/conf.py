"""How `make docs` makes a site of README, these pages and the docstrings.

The sources' root is the repository's, so that the same relative links hold here and where the
files are read as they are.
"""

project = html_title = "reg_kernels"
root_doc = "README"
include_patterns = ["*.md", "docs/**", "bench/NOTES.md", "bench/results/**"]
exclude_patterns = [".*", "build", "csrc", "dist", "reg_kernels", "runs", "tests"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_argparse_cli",
]
autodoc_mock_imports = ["lightning"]  # which a callback is for
html_theme = "furo"
myst_heading_anchors = 3  # GitHub's own, to which pages link
suppress_warnings = [
    "myst.header",  # a page of results begins at the level that it has in another page
    "toc.not_included",  # reports are reached by links
]
default_role = "py:obj"  # `name` links to what the reference has, and else is code
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

CONTENTS = """

```{toctree}
:hidden:

docs/installing
docs/swap
docs/migration
docs/layers
docs/optimizers
docs/augmentation
docs/mixing_and_losses
docs/adversarial
docs/recipes
docs/early_stopping
docs/distributed
docs/export
docs/security
docs/training
docs/comparing
docs/tuning
docs/implementations
docs/numerics
docs/random_numbers
docs/how_fast
docs/benchmarks
docs/figures
docs/gallery
docs/limits
docs/errors
docs/reference/index
CONTRIBUTING
bench/NOTES
CHANGELOG
```
"""


def add_contents(app, name, source):
    """The list of pages at README's end, which would be shown as it is elsewhere."""
    if name == root_doc:
        source[0] += CONTENTS


def setup(app):
    app.connect("source-read", add_contents)
