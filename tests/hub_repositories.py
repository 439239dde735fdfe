"""The repositories of `hub_server.py`: commits of files, and the branches and tags that name them."""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any


class HubError(Exception):
    """An answer that is no success: status, the Hub's code for what went wrong, and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit: the hash its content is known by, its bytes, and whether it is an LFS file."""

    oid: str
    size: int
    lfs: bool

    def described(self, path: str) -> dict[str, Any]:
        """As the listing of a repository shows it."""
        pointer = {"lfs": {"oid": self.oid, "size": self.size, "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "oid": self.oid, "size": self.size, **pointer}


@dataclass(frozen=True)
class Commit:
    """One state of a repository, and how it came about."""

    files: dict[str, StoredFile]
    title: str
    parent: str | None
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    @property
    def oid(self) -> str:
        """The 40 digits that name it."""
        content = [sorted((path, file.oid) for path, file in self.files.items()), self.title, self.parent, self.date]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


@dataclass
class Repository:
    """Commits, and the names of some of them: branches move along, tags stay."""

    kind: str  # "model" or "dataset"
    name: str  # "owner/name"
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> str:
        """The commit of a branch, a tag, or of (the beginning of) its own name."""
        found = self.branches.get(revision) or self.tags.get(revision)
        if found is None and len(revision) >= 7:
            found = next((oid for oid in self.commits if oid.startswith(revision)), None)
        if found is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def add(self, branch: str, files: dict[str, StoredFile], title: str) -> str:
        """A new commit at the end of a branch."""
        commit = Commit(files, title, self.branches.get(branch))
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit.oid


__all__ = ["Commit", "HubError", "Repository", "StoredFile"]
