"""The ops: schema, fake, gradient, choice of implementation. Importing this registers them all."""

import importlib
import pkgutil

from .. import backends

# Each op's own module; those with a leading underscore are what they share.
for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

# The kernels register themselves when their libraries are loaded, so that torch.ops.reg_kernels is
# complete from here on.
backends.load_libraries()
