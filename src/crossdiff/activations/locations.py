"""From a path or URL to a folder, and the pointer of a run whose store is elsewhere.

Such a run has a pointer in its `activations/`, with copies of the manifest and the table of documents, so that a report needs
no network:

    store.json               url: URL of the store; sha256: digest of its manifest
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from crossdiff.activations.folder import DOCUMENTS, MANIFEST, Folder, LocalFolder
from crossdiff.errors import UserError
from crossdiff.files import read_json, sha256, write_json

POINTER = "store.json"


def open_folder(location: str | Path | Folder) -> Folder:
    """Return the folder at a path or URL. A `UserError` names a URL that cannot be read on this machine."""
    if isinstance(location, Folder):
        return location
    text = str(location)
    if "://" not in text:
        return LocalFolder(Path(location))
    if text.startswith("file://"):
        return LocalFolder(Path(text.removeprefix("file://")))
    from crossdiff.activations.remote import RemoteFolder

    return RemoteFolder(text)


class Pointer(NamedTuple):
    """URL of a run's store, and the SHA-256 of its manifest."""

    url: str
    sha256: str


def leave_pointer(target: Path, url: str) -> None:
    """Make `target`, the `activations` folder of a run, point to the finished store at `url`."""
    store = open_folder(url)
    for name in (MANIFEST, DOCUMENTS):
        shutil.copyfile(store.fetch(name), target / name)
    write_json(target / POINTER, Pointer(url, sha256(target / MANIFEST))._asdict())


def read_pointer(folder: Folder) -> Pointer | None:
    """Return the pointer in a local folder, or None. A `UserError` names a damaged one."""
    if not isinstance(folder, LocalFolder) or not (folder.location / POINTER).is_file():
        return None
    found = read_json(folder.location / POINTER)
    match found:
        case {"url": str(url), "sha256": str(digest)} if "://" in url:
            return Pointer(url, digest)
    raise UserError(
        f"{folder.path_of(POINTER)} is damaged: expected the url of a store and the sha256 of its manifest, found {found}"
    )
