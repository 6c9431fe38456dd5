"""One upload on its way into the store: named parts streamed into a staging folder of its own.

Owns the staging folder, its lock, the running size cap and the list of file names that are taken. Invariant: nothing
in staging is ever visible; leaving the `with` block removes the folder whatever happened, and a folder whose owner
died is recognised by its free lock.
"""

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from adapters_store.errors import CorruptUpload, UnsupportedAdapter, UploadTooLarge, storage_errors
from adapters_store.file_system import FileSystem, open_regular
from adapters_store.formats import Declared, check_parts, is_config_part, parts_in, refuse_name
from adapters_store.locks import lock_folder
from adapters_store.made_by import MAX_PROVENANCE_PART_BYTES, PROVENANCE_PART, read_provenance
from adapters_store.parts import staged_name
from adapters_store.proof import NO_ENGINE, Proving
from adapters_store.registry import AdapterVersion
from adapters_store.signatures import Sent
from adapters_store.signing.bundle import MAX_BUNDLE_BYTES, SIGNATURE_PART
from adapters_store.strict_json import Json

# the same limit as the config's reader: refused before it is stored
_MAX_CONFIG_BYTES = 1 << 20
_COPY_CHUNK_BYTES = 1 << 20
# what is said about the files; no converter reads it
_ASIDE = {SIGNATURE_PART: MAX_BUNDLE_BYTES, PROVENANCE_PART: MAX_PROVENANCE_PART_BYTES}


class PartWriter:
    """Receives one file of an upload. Close it, or use it as a context manager."""

    def __init__(self, upload: "Upload", path: Path, max_bytes: int) -> None:
        self._upload = upload
        self._name = path.name
        self._max_bytes = max_bytes
        self._num_bytes = 0
        with storage_errors():
            self._descriptor: int | None = upload.files.create(path)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes.

        Raises:
            UploadTooLarge: this part or the upload as a whole passes its limit. StoreFull, StorageFailed: the disk.
        """
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            raise UploadTooLarge(f"{self._name} is larger than {self._max_bytes} bytes", param=self._name)
        self._upload.count(len(data))
        assert self._descriptor is not None, "the part was closed"
        with storage_errors():
            self._upload.files.write(self._descriptor, data)

    def close(self) -> None:
        """End the part; further calls do nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with storage_errors():
                self._upload.files.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Wish:
    """What the uploader wants besides the bytes.

    `by` names them, `staged` leaves the name where it is, `once`: no second version of the same bytes.
    """

    by: str = ""
    staged: bool = False
    once: bool = False


class Upload:
    """A staging folder: `source/` holds the parts, `object/` what the converter makes of them."""

    def __init__(
        self,
        staging: Path,
        files: FileSystem,
        *,
        max_bytes: int,
        publish: Callable[["Upload", str, Declared], AdapterVersion],
    ) -> None:
        """Create the folder and lock it; the caller holds the store's lock, so no sweep can come between."""
        self.files = files
        self.folder = staging / uuid.uuid4().hex
        self.proving: Proving = NO_ENGINE
        self.wish = Wish()
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._publish = publish
        self._parts: dict[str, PartWriter] = {}
        self._aside: dict[str, PartWriter] = {}
        with storage_errors():
            files.make_dir(self.folder)
            self._lock = lock_folder(self.folder)
            try:
                for path in (self.source, self.object):
                    files.make_dir(path)
            except OSError:
                self.close()
                raise

    @property
    def source(self) -> Path:
        """Folder of the uploaded parts."""
        return self.folder / "source"

    @property
    def object(self) -> Path:
        """Folder of the canonical adapter, until it is renamed to its place."""
        return self.folder / "object"

    @property
    def probe_folder(self) -> Path:
        """Folder of what a probe writes; it does not exist before."""
        return self.folder / "probe"

    def open_part(self, filename: str) -> PartWriter:
        """Begin one file of the upload.

        Raises:
            UnsupportedFormat: a pickle that nothing restricts. CorruptUpload: an unknown name, or a part sent twice.
        """
        if filename in self._parts or filename in self._aside:
            raise CorruptUpload(f"{filename} was sent twice", param="files")
        if filename in _ASIDE:
            aside = PartWriter(self, self.folder / filename, _ASIDE[filename])
            self._aside[filename] = aside
            return aside
        refuse_name(filename)
        cap = _MAX_CONFIG_BYTES if is_config_part(filename) else self._max_bytes
        part = PartWriter(self, self.source / staged_name(filename), cap)
        self._parts[filename] = part
        return part

    def sent(self) -> Sent:
        """Return the files as the client named them, and the signature over them."""
        files = {filename: self.source / staged_name(filename) for filename in self._parts}
        provenance = self.folder / PROVENANCE_PART if PROVENANCE_PART in self._aside else None
        if SIGNATURE_PART not in self._aside:
            return Sent(files, provenance=provenance)
        with storage_errors(), (self.folder / SIGNATURE_PART).open("rb") as file:
            return Sent(files, file.read(), provenance)

    def provenance(self) -> dict[str, Json]:
        """Return what came along about how the adapter was made, nothing without it; raises CorruptUpload."""
        if PROVENANCE_PART not in self._aside:
            return {}
        with storage_errors():
            return read_provenance(self.folder / PROVENANCE_PART)

    def count(self, num_bytes: int) -> None:
        """Add to the upload's size; raises UploadTooLarge at the limit."""
        self._num_bytes += num_bytes
        if self._num_bytes > self._max_bytes:
            raise UploadTooLarge(f"the upload is larger than {self._max_bytes} bytes (max_upload_bytes)", param="files")

    def commit(
        self,
        name: str,
        declared: Declared | None = None,
        *,
        proving: Proving = NO_ENGINE,
        wish: Wish | None = None,
    ) -> AdapterVersion:
        """Convert, validate, prove and publish the upload as the next version of `name`; durable when this returns.

        Args:
            declared: what the uploader says about the files; nothing: their format is found by their names.
            proving: runs the adapter on the base before it becomes visible, or says why nobody does.
            wish: nothing: the name means the version from then on.
        Raises:
            StoreError: the subclass says why; nothing was published. Or what the probe raised.
        """
        self.proving, self.wish = proving, wish if wish is not None else Wish()
        for part in (*self._parts.values(), *self._aside.values()):
            part.close()
        declared = declared if declared is not None else Declared()
        check_parts(self._parts.keys(), declared.format)
        return self._publish(self, name, declared)

    def close(self) -> None:
        """Remove the staging folder; further calls do nothing. What cannot be removed is left to the next sweep."""
        for part in (*self._parts.values(), *self._aside.values()):
            part.close()
        self._parts.clear()
        self._aside.clear()
        try:
            self.files.remove_tree(self.folder)
        except FileNotFoundError:
            return
        except OSError:
            pass
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def copy_parts(folder: Path, upload: Upload, declared: Declared, *, trusted: bool) -> None:
    """Copy the files of an adapter's folder into an upload; other files are not read.

    Raises:
        StoreError: a file is missing, no regular file, or of a kind that is not served.
    """
    refuse_foreign_parts(folder)
    with storage_errors():
        names = parts_in(folder, declared.format)
    for filename in [*names, *aside_in(folder)]:
        with open_part_file(folder, filename, trusted=trusted) as file, upload.open_part(filename) as part:
            while chunk := file.read(_COPY_CHUNK_BYTES):
                part.write(chunk)


def aside_in(folder: Path) -> list[str]:
    """Return the names of what lies beside an adapter's files and is sent with them."""
    return [name for name in _ASIDE if os.path.lexists(folder / name)]


def open_part_file(folder: Path, filename: str, *, trusted: bool) -> BinaryIO:
    """Open one file of a folder; raises CorruptUpload unless it may be read."""
    try:
        return open_regular(folder / filename, is_trusted=trusted)
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "is not a regular file with one name"
        raise CorruptUpload(f"{filename} {reason}", param="files") from error


def refuse_foreign_parts(folder: Path) -> None:
    """Refuse a folder with a file that changes the model in a way that is not served; other files are not read."""
    if os.path.exists(folder / "new_embeddings.safetensors"):
        raise UnsupportedAdapter(
            "the folder holds new_embeddings.safetensors; a changed vocabulary is not served yet", param="files"
        )
