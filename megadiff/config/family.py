"""A family: a folder as a registry. A file's name is its member's name; a file that starts with `_` is none.

No decorator runs and no list is kept: `ls` answers "what can I put here?", and members are found without importing
them, so that one whose optional library is missing hurts only those who ask for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from megadiff.config.refusals import did_you_mean
from megadiff.errors import ConfigError


def names(package: str) -> list[str]:
    """The members of a family, sorted, for example `names("megadiff.optim")`; none of them is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"{package} is not a package")  # our own mistake: users never name the family itself
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(module.name for module in found if not module.name.startswith("_"))


def member(package: str, name: str) -> ModuleType:
    """The module behind a name: `laprop` in the family's folder, or `my_pkg.my_noise` from outside.

    Raises:
        ConfigError: no member has this name, the outside module does not exist, or a library it needs is missing.
    """
    if "." in name:
        return _outside(package, name)
    known = names(package)
    kind = package.rpartition(".")[2]
    if name not in known:
        hint = did_you_mean(name, known)
        end = " " if hint else "; "
        listed = ", ".join(known) if known else "none"
        raise ConfigError(f"unknown name `{name}` in {package}{hint}{end}names in {kind}: {listed}")
    return _imported(f"{package}.{name}", f"`{name}` in {package}")


def _outside(package: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"`{name}` is neither a name in {package} nor a dotted module such as my_pkg.my_part")
    top = name.split(".")[0]
    if importlib.util.find_spec(top) is None:
        raise ConfigError(f"the module `{name}` cannot be found: no package `{top}` is installed or on PYTHONPATH")
    return _imported(name, f"the module `{name}`")


def _imported(module: str, said: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module == missing or module.startswith(f"{missing}."):
            raise ConfigError(f"{said} cannot be found: no module `{missing}`") from None
        raise ConfigError(f"{said} needs `{missing}`, which is not installed") from error
