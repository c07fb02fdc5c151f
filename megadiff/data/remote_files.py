"""Corpus files of object stores and other places with a URL (`s3://`, `gs://`, `hf://`), read through fsspec."""

from __future__ import annotations

import errno
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from megadiff.errors import DataError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z][A-Za-z0-9+.-]+)*://")
_INSTALL = "pip install 'megadiff[fsspec]'"
_REMEDY = "check the address, the network and the store's credentials"
_VERSIONS = ("ETag", "etag", "blob_id", "md5", "LastModified", "last_modified", "updated", "mtime", "created")
"""Keys under which stores give what changes with a file's content or at each write, the surest first."""


@dataclass(frozen=True)
class RemoteFacts:
    """A store's description of a file or folder."""

    is_folder: bool

    bytes: int | None
    """Size; None where the store does not give it."""

    version: str | None
    """Value that differs between versions of the file, with its name; None where the store gives none."""


class RemotePath:
    """The URL of a file or folder, with the part of `pathlib.Path` by which a corpus is read.

    What the store says of the file is looked up once and kept.

    Args:
        url: the URL.
        facts: the store's description, if it is known already.
    """

    def __init__(self, url: str, facts: RemoteFacts | None = None) -> None:
        self._url = url
        self._known = facts

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other._url == self._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self._url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        is_web = self._url.partition("://")[0].lower() in ("http", "https")
        return PurePosixPath(urlsplit(self._url).path if is_web else self._url).name

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on."""
        return PurePosixPath(self.name).suffix

    def exists(self) -> bool:
        """Return whether there is a file or folder."""
        return self._facts() is not None

    def is_file(self) -> bool:
        """Return whether there is a file."""
        facts = self._facts()
        return facts is not None and not facts.is_folder

    def is_dir(self) -> bool:
        """Return whether there is a folder."""
        facts = self._facts()
        return facts is not None and facts.is_folder

    def facts(self, *, is_fresh: bool = False) -> RemoteFacts:
        """Return what the store says of a file or folder.

        Args:
            is_fresh: look it up again, past everything that is kept.

        Raises:
            DataError: it does not exist, or the store cannot be reached.
        """
        if is_fresh:
            self._known = None
            self._store()[0].invalidate_cache()
        facts = self._facts()
        if facts is None:
            raise DataError(f"{self}: no such file; check the path after --input")
        return facts

    def open(self) -> io.RawIOBase:
        """Return the file open for reading bytes.

        Raises:
            DataError: it cannot be opened.
        """
        store, path = self._store()
        try:
            return _RemoteFile(store.open(path, "rb"))
        except Exception as error:
            raise self._unreadable(error) from error

    def matches(self) -> list[RemotePath]:
        """Return the files and folders that the URL, as a pattern, matches, sorted."""
        return self._listed("glob")

    def below(self) -> list[RemotePath]:
        """Return all files in the folder and its folders, sorted."""
        return self._listed("find")

    def relative_to(self, folder: RemotePath) -> PurePosixPath:
        """Return the path from a folder above to this file."""
        return PurePosixPath(self._store()[1]).relative_to(folder._store()[1])

    def _listed(self, way: str) -> list[RemotePath]:
        store, path = self._store()
        try:
            found: dict[str, dict[str, Any]] = getattr(store, way)(path, detail=True)
        except Exception as error:
            raise self._unreadable(error) from error
        protocol = self._url.partition("://")[0]
        urls = {name if "://" in name else f"{protocol}://{name}": facts for name, facts in found.items()}
        return [RemotePath(url, _facts_of(urls[url])) for url in sorted(urls)]

    def _facts(self) -> RemoteFacts | None:
        if self._known is None:
            store, path = self._store()
            try:
                self._known = _facts_of(store.info(path))
            except FileNotFoundError:
                return None
            except Exception as error:  # each store has exceptions of its own
                raise self._unreadable(error) from error
        return self._known

    def _store(self) -> tuple[Any, str]:
        """Return fsspec's file system for the URL, and the path in it."""
        protocol = self._url.partition("://")[0]
        try:
            from fsspec.core import url_to_fs  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise DataError(f"{self}: reading {protocol}:// needs fsspec; {_INSTALL}") from None
        try:
            return url_to_fs(self._url)
        except ImportError as error:
            raise DataError(f"{self}: reading {protocol}:// needs one more package ({error}); {_INSTALL}") from None
        except ValueError as error:
            remedy = "write for example s3://bucket/corpus/*.jsonl"
            raise DataError(f"{self}: fsspec cannot read it ({_sentence(error)}); {remedy}") from error
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"{self}: cannot be read ({_sentence(error)}); {_REMEDY}")


CorpusPath = Path | RemotePath
"""Path or URL of a corpus file."""


def corpus_path(given: str | CorpusPath) -> CorpusPath:
    """Return the path, or the URL, that a word of the command line names."""
    if isinstance(given, str):
        return RemotePath(given) if _URL.match(given) else Path(given)
    return given


class _RemoteFile(io.RawIOBase):
    """A file that fsspec has opened, whose failures are all `OSError`."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _as_os_errors():
            return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = 0) -> int:
        with _as_os_errors():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def _as_os_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise OSError(errno.EIO, _sentence(error)) from error


def _sentence(error: Exception) -> str:
    """Return the first line of an error, or its name."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]


def _facts_of(info: dict[str, Any]) -> RemoteFacts:
    version = next((f"{key} {_text(info[key])}" for key in _VERSIONS if info.get(key) is not None), None)
    size = info.get("size")
    return RemoteFacts(info.get("type") == "directory", None if size is None else int(size), version)


def _text(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value).strip('"')
