"""
A Hub on this machine: a small HTTP server that speaks the part of the Hub's protocol that `huggingface_hub` needs to
create, fill, list and download repositories. For tests; nothing here is part of the package.

    with HubServer(folder) as hub:
        subprocess.run(command, env=hub.environment(home))

A repository is a graph of commits, as in git: a commit names all its files by the hash of their content, so every
old revision stays loadable. Contents lie in `folder`, one file for each hash; the graph lives in memory. As on the
Hub, text is kept in the repository and served directly; anything else is uploaded by the LFS protocol and served by a
redirect to another address, in ranges if asked to (the client's xet protocol has to be off, see `environment`).
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml
from hub_repositories import Commit, HubError, Repository, StoredFile


LARGE = 10 * 1024 * 1024  # bytes from which on text, too, is an LFS file
TEXT_ENDS = "*.json", "*.md", "*.py", "*.txt", "*.csv", "*.jsonl", ".git*"


# ---- what it answers -------------------------------------------------------------------------------------------


@dataclass
class Request:
    """A call as the functions below see it."""

    query: dict[str, list[str]]
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """What goes back."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes after which the connection breaks


def _json(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []
_REPO = r"(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
_WEB_REPO = r"(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+?)"


def _route(methods: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    def note(function: Callable[..., Answer]) -> Callable[..., Answer]:
        _ROUTES.extend((method, re.compile(f"/{pattern}/?"), function) for method in methods.split())
        return function

    return note


class HubServer:
    """
    The server, running from `with` on, at a free port of this machine.

    Args:
        folder (`Path`): where contents are kept.
        token (`str`, *optional*, defaults to `"hf_test"`): shown by a client that may write, and see what is private.
        user (`str`, *optional*, defaults to `"user"`): whose token that is.

    Attributes:
        requests (`list[tuple[str, str, str | None]]`): every request so far: method, path, asked-for range of bytes.
    """

    def __init__(self, folder: Path, token: str = "hf_test", user: str = "user") -> None:
        self.folder, self.token, self.user = folder, token, user
        self.folder.mkdir(parents=True, exist_ok=True)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self._cuts: dict[str, int] = {}
        self._lock = threading.Lock()

        class Handler(_Handler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """Its address, for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, token: bool = True) -> dict[str, str]:
        """Variables under which a new process takes this server for the Hub; with `home` as its cache."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        hub = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        shown = {"HF_TOKEN": self.token} if token else {}
        return {**kept, **hub, **shown, "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}

    def cut(self, ending: str, after: int) -> None:
        """Break the connection once, `after` so many bytes of the next download whose path has this ending."""
        self._cuts[ending] = after

    def put(self, kind: str, name: str, files: dict[str, bytes]) -> None:
        """A repository with these files, as if somebody had pushed them."""
        made = self.repositories[kind, name] = Repository(kind, name, private=False)
        stored = {path: (self._store(content), len(content)) for path, content in files.items()}
        made.add("main", {path: StoredFile(*oid_and_size, lfs=True) for path, oid_and_size in stored.items()}, "put")

    def answer(self, method: str, path: str, request: Request) -> Answer:
        """The answer to any request."""
        with self._lock:
            self.requests.append((method, path, request.headers.get("Range")))
            for allowed, pattern, function in _ROUTES:
                found = pattern.fullmatch(path) if allowed == method else None
                if found:
                    return function(self, request, **found.groupdict())
        raise HubError(404, "NotFound", f"This Hub does not know {method} {path}")

    # ---- what it keeps ---------------------------------------------------------------------------------------

    def _is_known(self, request: Request) -> bool:
        return request.headers.get("Authorization") == f"Bearer {self.token}"

    def _repository(self, request: Request, kind: str, name: str, writes: bool = False) -> Repository:
        found = self.repositories.get((kind, unquote(name)))
        known = self._is_known(request)
        if found is None or (found.private and not known):  # a private one looks as if it were not there
            raise HubError(404 if known else 401, "RepoNotFound", "Repository not found")
        if writes and not known:
            raise HubError(401, "", "Invalid credentials in Authorization header")
        return found

    def _store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        (self.folder / oid).write_bytes(content)
        return oid

    def _text(self, commit: Commit, path: str) -> str:
        return (self.folder / commit.files[path].oid).read_text(encoding="utf-8") if path in commit.files else ""

    # ---- accounts, repositories, revisions -------------------------------------------------------------------

    @_route("GET", "api/whoami-v2")
    def _whoami(self, request: Request) -> Answer:
        if not self._is_known(request):
            raise HubError(401, "", "Invalid credentials in Authorization header")
        return _json({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    @_route("POST", "api/repos/create")
    def _create(self, request: Request) -> Answer:
        if not self._is_known(request):
            raise HubError(401, "", "Invalid credentials in Authorization header")
        asked = request.json
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or self.user}/{asked['name']}"
        where = f"{self.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.repositories:
            return _json({"url": where, "error": "You already created this repository"}, 409)
        made = self.repositories[kind, name] = Repository(kind, name, asked.get("visibility") == "private")
        made.add("main", {}, "initial commit")
        return _json({"url": where, "name": name, "id": name})

    @_route("GET", f"api/{_REPO}/refs")
    def _refs(self, request: Request, kind: str, name: str) -> Answer:
        repository = self._repository(request, kind, name)

        def listed(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in names.items()]

        own = {name: oid for name, oid in repository.branches.items() if not name.startswith("refs/")}
        asked = {name: oid for name, oid in repository.branches.items() if name.startswith("refs/pr/")}
        refs = {"branches": listed(own, "refs/heads/"), "tags": listed(repository.tags, "refs/tags/"), "converts": []}
        return _json({**refs, "pullRequests": listed(asked, "")})

    @_route("POST", f"api/{_REPO}/branch/(?P<branch>[^/]+)")
    def _branch(self, request: Request, kind: str, name: str, branch: str) -> Answer:
        repository = self._repository(request, kind, name, writes=True)
        if unquote(branch) in repository.branches:
            raise HubError(409, "", "Reference already exists")
        repository.branches[unquote(branch)] = repository.find(request.json.get("startingPoint") or "main")
        return _json({})

    @_route("POST", f"api/{_REPO}/tag/(?P<revision>[^/]+)")
    def _tag(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repository = self._repository(request, kind, name, writes=True)
        if request.json["tag"] in repository.tags:
            raise HubError(409, "", "Tag already exists")
        repository.tags[request.json["tag"]] = repository.find(unquote(revision))
        return _json({})

    @_route("GET", f"api/{_REPO}/commits/(?P<revision>[^/]+)")
    def _history(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repository = self._repository(request, kind, name)
        entries, oid = [], repository.find(unquote(revision))
        while oid:
            commit = repository.commits[oid]
            entries.append({"id": oid, "title": commit.title, "message": "", "date": commit.date, "authors": []})
            oid = commit.parent or ""
        return _json(entries)

    # ---- what is inside --------------------------------------------------------------------------------------

    @_route("GET", f"api/{_REPO}(/revision/(?P<revision>[^/]+))?")
    def _info(self, request: Request, kind: str, name: str, revision: str | None) -> Answer:
        repository = self._repository(request, kind, name)
        oid = repository.find(unquote(revision or "main"))
        commit = repository.commits[oid]
        card = _metadata(self._text(commit, "README.md"))
        library = [card["library_name"]] if "library_name" in card else []
        about = {name: card[name] for name in ("pipeline_tag", "library_name") if name in card}
        state = {"private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        dates = {"createdAt": commit.date, "lastModified": commit.date}
        siblings = [{"rfilename": path, "size": file.size} for path, file in commit.files.items()]
        inside = {"tags": [*library, *(card.get("tags") or [])], "cardData": card, "siblings": siblings}
        return _json({"id": repository.name, "sha": oid, **state, **dates, **about, **inside})

    @_route("GET", f"api/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?")
    def _tree(self, request: Request, kind: str, name: str, revision: str, path: str | None) -> Answer:
        repository = self._repository(request, kind, name)
        commit = repository.commits[repository.find(unquote(revision))]
        within = unquote(path or "").strip("/")
        entries = list(_entries(commit, f"{within}/" if within else ""))
        if within and not entries:
            raise HubError(404, "EntryNotFound", f"{within} does not exist")
        deep = request.query.get("recursive", ["false"])[0].lower() == "true"
        depth = within.count("/") + 1 if within else 0
        return _json([entry for entry in entries if deep or entry["path"].count("/") == depth])

    @_route("POST", f"api/{_REPO}/paths-info/(?P<revision>[^/]+)")
    def _paths(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repository = self._repository(request, kind, name)
        commit = repository.commits[repository.find(unquote(revision))]
        wanted = parse_qs(request.body.decode()).get("paths", [])
        return _json([entry for entry in _entries(commit, "") if entry["path"] in wanted])

    @_route("GET HEAD", f"{_WEB_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, request: Request, kind: str | None, name: str, revision: str, path: str) -> Answer:
        repository = self._repository(request, "dataset" if kind else "model", name)
        oid = repository.find(unquote(revision))
        headers = {"X-Repo-Commit": oid, "Content-Disposition": f'inline; filename="{Path(unquote(path)).name}";'}
        file = repository.commits[oid].files.get(unquote(path))
        if file is None:
            return Answer(404, b"Entry not found", {**headers, "X-Error-Code": "EntryNotFound"})
        if not file.lfs:
            return self._content(request, file.oid, path, headers)
        linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
        elsewhere = self.endpoint.replace("127.0.0.1", "localhost")  # clients take the address itself for the Hub
        return Answer(302, b"", {**headers, **linked, "Location": f"{elsewhere}/large-files/{file.oid}/{path}"})

    @_route("GET HEAD", "large-files/(?P<oid>[0-9a-f]{64})/(?P<path>.+)")
    def _large_file(self, request: Request, oid: str, path: str) -> Answer:
        return self._content(request, oid, path, {})

    def _content(self, request: Request, oid: str, path: str, headers: dict[str, str]) -> Answer:
        content = (self.folder / oid).read_bytes()
        headers = {**headers, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        ending = next((ending for ending in self._cuts if unquote(path).endswith(ending)), None)
        cut = None if ending is None or not content else self._cuts.pop(ending)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if asked is None:
            return Answer(200, content, headers, cut)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Answer(206, content[first : last + 1], headers, cut)

    # ---- uploads ---------------------------------------------------------------------------------------------

    @_route("POST", "api/validate-yaml")
    def _validate(self, request: Request) -> Answer:
        try:
            _metadata(request.json["content"])
        except ValueError as error:
            return _json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return _json({"errors": [], "warnings": []})

    @_route("POST", f"api/{_REPO}/preupload/(?P<revision>[^/]+)")
    def _preupload(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        self._repository(request, kind, name, writes=True).find(unquote(revision))
        modes = [
            {"path": file["path"], "uploadMode": _mode(file), "shouldIgnore": False} for file in request.json["files"]
        ]
        return _json({"files": modes})

    @_route("POST", rf"{_WEB_REPO}\.git/info/lfs/objects/batch")
    def _batch(self, request: Request, kind: str | None, name: str) -> Answer:
        self._repository(request, "dataset" if kind else "model", name, writes=True)
        objects = []
        for entry in request.json["objects"]:
            missing = not (self.folder / entry["oid"]).is_file()
            action = {"actions": {"upload": {"href": f"{self.endpoint}/uploads/{entry['oid']}"}}} if missing else {}
            objects.append({**entry, **action})
        return _json({"transfer": "basic", "objects": objects})

    @_route("PUT", "uploads/(?P<oid>[0-9a-f]{64})")
    def _upload(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "", "The content does not have the hash it was announced with")
        self._store(request.body)
        return Answer()

    @_route("POST", f"api/{_REPO}/commit/(?P<revision>[^/]+)")
    def _commit(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repository = self._repository(request, kind, name, writes=True)
        branch, more = unquote(revision), {}
        if request.query.get("create_pr"):
            branch = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repository.branches) + 1}"
            repository.branches[branch] = repository.find(unquote(revision))
            more = {"pullRequestUrl": f"{self.endpoint}/{repository.name}/discussions/{branch.rpartition('/')[2]}"}
        files, title = dict(repository.commits[repository.find(branch)].files), ""
        for line in request.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                title = value["summary"]
            elif operation["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = StoredFile(self._store(content), len(content), lfs=False)
            elif operation["key"] == "lfsFile":
                size = (self.folder / value["oid"]).stat().st_size
                files[value["path"]] = StoredFile(value["oid"], size, lfs=True)
            else:  # "deletedFile" or "deletedFolder"
                gone = value["path"].rstrip("/")
                files = {
                    path: file for path, file in files.items() if path != gone and not path.startswith(f"{gone}/")
                }
        oid = repository.add(branch, files, title)
        return _json({"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{name}/commit/{oid}", **more})


def _mode(file: dict[str, Any]) -> str:
    is_text = b"\0" not in base64.b64decode(file["sample"])
    named = any(fnmatch.fnmatch(Path(file["path"]).name, end) for end in TEXT_ENDS)
    return "regular" if is_text and named and file["size"] < LARGE else "lfs"


def _metadata(card: str) -> dict[str, Any]:
    """The block of YAML a card begins with."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        values = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata is no YAML: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise ValueError("The metadata must be names and values.")
    return values or {}


def _entries(commit: Commit, prefix: str) -> Iterable[dict[str, Any]]:
    """Files and folders below a prefix."""
    folders = set()
    for path, file in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        parents = [str(parent) for parent in Path(path).parents if str(parent) != "."]
        for parent in reversed(parents):
            if parent.startswith(prefix) and parent not in folders:
                folders.add(parent)
                yield {
                    "type": "directory",
                    "path": parent,
                    "oid": hashlib.sha1(parent.encode()).hexdigest(),
                    "size": 0,
                }
        yield file.described(path)


# ---- HTTP ------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    """Reads requests and writes answers."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def _serve(self) -> None:
        address = urlsplit(self.path)
        body = self._body()
        try:
            answer = self.hub.answer(self.command, address.path, Request(parse_qs(address.query), self.headers, body))
        except HubError as error:
            answer = _json({"error": str(error)}, error.status)
            answer.headers |= {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815  the names the base class calls

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, quote(value, safe="/:;=\"'., -?&*%()+[]_") if not value.isascii() else value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: answer.cut_after])
        if answer.cut_after is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: `HubServer.requests` has them."""


__all__ = ["HubServer"]
