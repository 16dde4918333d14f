"""A Hub on the loopback interface, in memory: enough of its HTTP interface to publish and load models offline.

    with HubServer() as hub:
        subprocess.run(..., env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"})
        hub.files("someone/model")["config.json"]

Every file is a regular one: it travels inside the commit, and its ETag is the id that git gives it.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Files of every commit by path, oldest commit first. The last one is `main`."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    def resolve(self, revision: str) -> str | None:
        if revision == "main":
            return next(reversed(self.commits))
        return revision if revision in self.commits else None

    def commit(self, lines: list[dict[str, Any]]) -> str:
        files = dict(self.commits[self.resolve("main")])
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    pass
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise ValueError(f"Commits with {other!r} are not supported.")
        tree = "".join(f"{path} {git_oid(content)}\n" for path, content in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)}\n{tree}".encode()).hexdigest()
        self.commits[oid] = files
        return oid


class HubServer(ThreadingHTTPServer):
    """Serves on a free port inside a `with` block.

    Attributes:
        endpoint: what `HF_ENDPOINT` must be.
        repositories: by id.
        requests: method and path of every request.
        unsupported: those of them that this server does not know.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.unsupported: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    def files(self, repo_id: str) -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve("main")]


class HubError(Exception):
    """An answer with an error status; the client tells the cases apart by `code`."""

    def __init__(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        self.status, self.code, self.message, self.commit = status, code, message, commit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer
    # A path in the repository, and a revision, come percent-encoded.
    routes = [
        ("POST", r"/api/repos/create", "create_repo"),
        ("DELETE", r"/api/repos/delete", "delete_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        request = f"{self.command} {self.path}"
        method = "GET" if self.command == "HEAD" else self.command
        with self.server.lock:
            self.server.requests.append(request)
            for wanted, pattern, name in self.routes:
                match = re.fullmatch(pattern, url.path)
                if match and method == wanted:
                    parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    try:
                        getattr(self, name)(body, **parts)
                    except HubError as error:
                        headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
                        if error.commit:
                            headers["X-Repo-Commit"] = error.commit
                        self.reply({"error": error.message}, error.status, headers)
                    return
            self.server.unsupported.append(request)
            self.reply({"error": f"not supported: {request}"}, 404)

    do_GET = do_HEAD = do_POST = do_DELETE = handle_request

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def find(self, repo_id: str, revision: str = "main") -> tuple[Repository, str]:
        """A repository and the id of the commit that `revision` means."""
        repository = self.server.repositories.get(repo_id)
        if repository is None:
            raise HubError(404, "RepoNotFound", f"Repository {repo_id} not found")
        commit = repository.resolve(revision)
        if commit is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def create_repo(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        status = 409 if repo_id in self.server.repositories else 200
        self.server.repositories.setdefault(repo_id, Repository())
        self.reply({"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id}, status)

    def delete_repo(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        self.find(repo_id)
        del self.server.repositories[repo_id]
        self.reply({})

    def validate_yaml(self, body: bytes) -> None:
        self.reply({"errors": [], "warnings": []})

    def info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        repository, commit = self.find(repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        self.reply({"id": repo_id, "modelId": repo_id, "sha": commit, "private": False, "siblings": siblings})

    def tree(self, body: bytes, repo_id: str, revision: str, path: str = "") -> None:
        repository, commit = self.find(repo_id, revision)
        recursive = "recursive=true" in urlsplit(self.path).query.lower()
        prefix = f"{path.rstrip('/')}/" if path else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, content in sorted(repository.commits[commit].items()):
            if not name.startswith(prefix):
                continue
            folders = name.removeprefix(prefix).split("/")[:-1]
            for depth in range(1, len(folders) + 1):
                folder = prefix + "/".join(folders[:depth])
                if recursive or depth == 1:
                    entries[folder] = {"type": "directory", "path": folder, "oid": git_oid(folder.encode()), "size": 0}
            if recursive or not folders:
                entries[name] = {"type": "file", "path": name, "oid": git_oid(content), "size": len(content)}
        if path and not entries:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}", commit)
        self.reply(list(entries.values()))

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        repository, commit = self.find(repo_id, revision)
        present = repository.commits[commit]
        answers = []
        for wanted in json.loads(body)["files"]:
            answer = {"path": wanted["path"], "uploadMode": "regular", "shouldIgnore": False}
            if wanted["path"] in present:
                answer["oid"] = git_oid(present[wanted["path"]])  # the client leaves out what did not change
            answers.append(answer)
        self.reply({"files": answers})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repository, _ = self.find(repo_id, revision)
        oid = repository.commit([json.loads(line) for line in body.splitlines()])
        self.reply({"success": True, "commitOid": oid, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{oid}"})

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        repository, commit = self.find(repo_id, revision)
        if path not in repository.commits[commit]:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}", commit)
        content = repository.commits[commit][path]
        headers = {
            "ETag": f'"{git_oid(content)}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self.reply(content, headers=headers)
            return
        start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        if start >= len(content):
            self.reply(b"", 416, {**headers, "Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.reply(content[start:stop], 206, headers)
