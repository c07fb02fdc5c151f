"""Families of interchangeable parts, found by name or by dotted path, each with its own settings in the YAML.

A family is a package. A module in it whose name does not begin with `_` is a member, and the file's name is the
member's name; a dotted path (`my_package.my_noise`) names a module of the user's own in its place. No decorator runs
and no list is kept. `names` lists the members without importing them, so a member whose optional library is missing
hurts only the runs that use it.

    registry.names("megadiff.optim.members")                # ["adamw", "laprop", "muon"]
    registry.member("megadiff.optim.members", "laprop")     # the module; ConfigError with a suggestion if unknown

A section of the configuration lets a member declare the section's remaining keys:

    PROCESSES = Family("megadiff.diffusion.processes", key="process")

    class NoiseConfig(Section):
        process: str = "gidd_snr"                           # the key that names the member
        min_log_snr: float = -9.0                           # a key that every member has

    class RunConfig(Section):
        noise: Annotated[NoiseConfig, PROCESSES] = PROCESSES.default(NoiseConfig)
        hooks: tuple[Annotated[HookConfig, HOOKS], ...] = ()

and the member, in its own file:

    class Settings(Section):                                # optional: a member without it has the shared keys alone
        shift: float = 0.0
        '''Docstring of the key, shown by `--keys` and in docs/configuration.md.'''

The value of such a key (`config.noise`) is an instance of both classes, frozen and flat: `config.noise.shift`,
`config.noise.min_log_snr`, `isinstance(config.noise, gidd_snr.Settings)`. A member may declare a shared key again to
give it another default or other bounds, and its validators see the shared keys too. Settings that derive from the
section itself (`class Settings(NoiseConfig)`) work the same way and let a type checker know the shared keys.
The value is dumped with the member's keys and reads back as itself. Members are imported when a configuration names
them, so a member that must stay quick to check imports torch inside its functions, or is a folder with the heavy part
in a second file.

In code: `PROCESSES.build(NoiseConfig, process="gidd_snr", shift=1.0)`; for any member's class,
`PROCESSES.section(NoiseConfig, "gidd_snr")`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from pydantic import Field, GetCoreSchemaHandler, ValidationError, ValidationInfo, create_model
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from megadiff.config.section import Section
from megadiff.config.suggestions import did_you_mean
from megadiff.errors import ConfigError, MegadiffError

S = TypeVar("S", bound=Section)


def names(package: str) -> list[str]:
    """Return the names of a family's members, sorted, without importing any of them."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"{package} is not a package")  # a fault of this package: users never name the family itself
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(module.name for module in found if not module.name.startswith("_"))


def member(package: str, name: str) -> ModuleType:
    """Return the module of a member: `laprop` in the family's package, or `my_package.my_noise` from outside.

    Raises:
        ConfigError: no member has this name, the outside module does not exist, or a library it needs is missing.
    """
    if "." in name:
        return _outside(package, name)
    known = names(package)
    if name not in known:
        hint = did_you_mean(name, known)
        listed = ", ".join(known) if known else "none"
        raise ConfigError(
            f"unknown name `{name}`{hint}{' ' if hint else '; '}{package} has: {listed}; a module of your own is given "
            "by its dotted path"
        )
    return _imported(f"{package}.{name}", f"`{name}` in {package}")


def call(module: ModuleType, function: str, *arguments: Any) -> Any:
    """Call a function of a member, which may be a module of the user's own.

    Raises:
        ConfigError: the function of a module from outside cannot be called so, or raises anything.
    """
    if is_own(module):
        return getattr(module, function)(*arguments)
    check_arguments(module, function, *arguments)
    with naming(module, function):
        return getattr(module, function)(*arguments)


@contextmanager
def naming(module: ModuleType, function: str) -> Iterator[None]:
    """Turn any exception of a function of the user's module into a sentence with the line that raised it.

    Raises:
        ConfigError: the function raised something that is not an error of this package.
    """
    try:
        yield
    except MegadiffError:
        raise
    except Exception as error:
        if is_own(module):
            raise
        raise ConfigError(
            f"`{function}` of the module {module.__name__} failed: {account_of(error, module.__file__ or '')}; correct "
            "it or the setting that it was given"
        ) from error


def is_own(module: ModuleType) -> bool:
    """Return whether a module is this package's."""
    return module.__name__.split(".")[0] == __name__.split(".")[0]


def check_arguments(module: ModuleType, function: str, *arguments: Any) -> None:
    """Refuse a function that does not take these arguments, as that of a member of another family.

    Raises:
        ConfigError: it does not.
    """
    try:
        inspect.signature(getattr(module, function)).bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"`{function}` of the module {module.__name__} is called with {len(arguments)} argument(s) here, which it "
            f"does not take ({error}); is the module meant for another key?"
        ) from None


def account_of(error: BaseException, file: str) -> str:
    """Return an exception with file and line of its innermost frame in a file, or else of its innermost frame."""
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1])
    return f"{reason} ({Path(frame.filename).name}, line {frame.lineno})"


@dataclass(frozen=True)
class Family:
    """Annotation of a section whose remaining keys are declared by the member that one of its keys names.

    Args:
        package: the package whose modules are the members.
        key: the field of the section that holds the member's name.
    """

    package: str
    key: str = "name"

    def names(self) -> list[str]:
        """Return the names of the members, sorted, without importing any of them."""
        return names(self.package)

    def member(self, name: str) -> ModuleType:
        """Return the module of a member.

        Raises:
            ConfigError: there is none of this name, or a library it needs is missing.
        """
        return member(self.package, name)

    def section(self, shared: type[S], name: str) -> type[S]:
        """Return the section's class for a member: the shared keys of `shared` and those of its `Settings`.

        Raises:
            ConfigError: there is no such member, or what it calls `Settings` is not a `Section`.
        """
        settings = getattr(self.member(name), "Settings", None)
        if settings is None:
            return shared
        if not (isinstance(settings, type) and issubclass(settings, Section)):
            raise ConfigError(f"`Settings` of `{name}` must be a subclass of megadiff.config.section.Section")
        return _joined(shared, settings)

    def sections(self, shared: type[S]) -> Iterator[tuple[str, type[S]]]:
        """Yield each member's name and class, leaving out members that cannot be imported on this machine."""
        for name in self.names():
            try:
                yield name, self.section(shared, name)
            except ConfigError:
                continue

    def build(self, shared: type[S], **values: Any) -> S:
        """Return the section with these values, checked by the member they name or by the default member.

        Raises:
            ValidationError: a value is wrong, or the member does not exist.
        """
        return self._read(shared, values, None)

    def default(self, shared: type[Section]) -> Any:
        """Return the default of a section that may be left out: the default member with its own defaults."""
        return Field(default_factory=functools.partial(self.build, shared))

    def __get_pydantic_core_schema__(self, source: type[Section], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by the member's class and write out all of its keys; called by pydantic."""

        def read(data: Any, _: Any, info: ValidationInfo) -> Any:
            return self._read(source, data, info.context)

        return core_schema.with_info_wrap_validator_function(
            read, handler(source), serialization=core_schema.simple_ser_schema("any")
        )

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: Any) -> dict[str, Any]:
        """Describe the section as an object whose keys depend on the member; called by pydantic."""
        return {"type": "object"}

    def _read(self, shared: type[S], data: Any, context: Any) -> S:
        """Return `data` as the class of the member it names, or raise pydantic's errors with their places."""
        is_strict = bool(isinstance(context, Mapping) and context.get("strict")) or None
        if isinstance(data, shared):
            if isinstance(data, self._section(shared, getattr(data, self.key))):
                return data
            data = data.model_dump(exclude_unset=True, by_alias=True)  # built without the member's own keys
        name = data.get(self.key, shared.model_fields[self.key].default) if isinstance(data, Mapping) else None
        if isinstance(name, str):
            return self._section(shared, name).model_validate(data, strict=is_strict, context=context)
        if not isinstance(data, Mapping):  # a word, perhaps, for which the section has a validator
            return self._read(shared, shared.model_validate(data, strict=is_strict, context=context), context)
        known = {key: value for key, value in data.items() if key in _keys(shared)}
        named = shared.model_validate(known, strict=is_strict, context=context)  # refuses, or replaces null, say
        return self._read(shared, {**data, self.key: str(getattr(named, self.key))}, context)

    def _section(self, shared: type[S], name: str) -> type[S]:
        """Return a member's class, or raise a pydantic error at the key that names the member."""
        try:
            return self.section(shared, name)
        except ConfigError as error:
            reason = PydanticCustomError("member", "{reason}", {"reason": str(error)})
            raise ValidationError.from_exception_data(
                shared.__name__, [{"type": reason, "loc": (self.key,), "input": name}]
            ) from None


@functools.cache
def _joined(shared: type[S], settings: type[Section]) -> type[S]:
    """Return one class with the fields and validators of both, those of the member first."""
    if issubclass(settings, shared):
        return cast("type[S]", settings)
    joined: Any = create_model(
        shared.__name__, __base__=(settings, shared), __module__=settings.__module__, __doc__=settings.__doc__
    )
    return joined


def _keys(section: type[Section]) -> set[str]:
    return {field.alias or name for name, field in section.model_fields.items()}


def _outside(package: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"`{name}` is neither a name in {package} nor a dotted module such as my_pkg.my_part")
    top = name.split(".")[0]
    if importlib.util.find_spec(top) is None:
        is_here = Path(top).is_dir() or Path(f"{top}.py").is_file()
        adds = f"`export PYTHONPATH=.` adds this folder, which holds `{top}`"
        remedy = adds if is_here else f"add the folder that holds `{top}`, as in `export PYTHONPATH=FOLDER`"
        raise ConfigError(
            f"the module `{name}` cannot be found: no package `{top}` is installed or on PYTHONPATH; {remedy}"
        )
    return _imported(name, f"the module `{name}`")


def _imported(module: str, subject: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module == missing or module.startswith(f"{missing}."):
            raise ConfigError(f"{subject} cannot be found: no module `{missing}`") from None
        raise ConfigError(f"{subject} needs `{missing}`, which is not installed") from error
    except Exception as error:  # as user code may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{subject} fails on import ({reason}); `python -c 'import {module}'` shows where") from error
