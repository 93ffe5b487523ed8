"""A server that keeps model repositories in memory, with the part of the Hub's interface that the client uses."""

from __future__ import annotations

import base64
import hashlib
import json
import threading

from flask import Flask, Response, jsonify, request
from werkzeug.serving import make_server

TOKEN = "hf_of_the_tests"


class HubServer:
    """Repositories as commits, each a dict of files; large files go through Git LFS, as on the Hub."""

    def __init__(self):
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.blobs: dict[str, bytes] = {}
        app = Flask(__name__)
        app.before_request(self._refuse_without_token)
        for rule, method, view in (
            ("/api/repos/create", "POST", self._create),
            ("/api/validate-yaml", "POST", lambda: jsonify({"warnings": [], "errors": []})),
            ("/api/models/<owner>/<name>/preupload/<revision>", "POST", self._preupload),
            ("/<owner>/<name>.git/info/lfs/objects/batch", "POST", self._batch),
            ("/blob/<oid>", "PUT", self._store),
            ("/api/models/<owner>/<name>/commit/<revision>", "POST", self._commit),
            ("/api/models/<owner>/<name>/revision/<revision>", "GET", self._info),
            ("/api/models/<owner>/<name>", "GET", self._info),
            ("/api/models/<owner>/<name>/tree/<revision>", "GET", self._tree),
            ("/<owner>/<name>/resolve/<revision>/<path>", "GET", self._resolve),
        ):
            app.add_url_rule(rule, f"{method}{rule}", view, methods=[method])
        self._server = make_server("127.0.0.1", 0, app, threaded=True)
        self.address = f"http://127.0.0.1:{self._server.port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()

    def _refuse_without_token(self):
        open_to_all = request.method == "GET" or request.path.startswith("/blob/")
        if open_to_all or request.headers.get("Authorization") == f"Bearer {TOKEN}":
            return None
        return jsonify({"error": "Invalid username or password."}), 401

    def _create(self):
        options = request.json
        repo = f"{options['organization']}/{options['name']}" if options.get("organization") else options["name"]
        if repo in self.commits:
            return jsonify({"url": f"{self.address}/{repo}", "id": repo}), 409
        self.commits[repo] = [{}]
        self.private[repo] = bool(options.get("private")) or options.get("visibility") == "private"
        return jsonify({"url": f"{self.address}/{repo}", "name": repo, "id": repo})

    def _preupload(self, owner, name, revision):
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].startswith("model.") else "regular",
                "shouldIgnore": False,
            }
            for file in request.json["files"]
        ]
        return jsonify({"files": modes})

    def _batch(self, owner, name):
        objects = []
        for blob in request.json["objects"]:
            href = {"href": f"{self.address}/blob/{blob['oid']}"}
            objects.append({**blob, "authenticated": True, "actions": {"upload": href}})
        return jsonify({"transfer": "basic", "objects": objects})

    def _store(self, oid):
        body = request.get_data()
        assert hashlib.sha256(body).hexdigest() == oid
        self.blobs[oid] = body
        return ""

    def _commit(self, owner, name, revision):
        repo = f"{owner}/{name}"
        files = dict(self.commits[repo][-1])
        for line in request.get_data().decode().splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                self.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        self.commits[repo].append(files)
        sha = self._sha(repo, len(self.commits[repo]) - 1)
        return jsonify({"success": True, "commitOid": sha, "commitUrl": f"{self.address}/{repo}/commit/{sha}"})

    @staticmethod
    def _sha(repo, number):
        return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()

    def _files(self, repo, revision):
        """The commit's number and files; None where there is none."""
        commits = self.commits.get(repo, [])
        numbers = {self._sha(repo, number): number for number in range(len(commits))}
        number = numbers.get(revision, len(commits) - 1 if revision == "main" and commits else None)
        return None if number is None else (number, commits[number])

    def _info(self, owner, name, revision="main"):
        repo = f"{owner}/{name}"
        commit = self._files(repo, revision)
        if commit is None:
            code = "RevisionNotFound" if repo in self.commits else "RepoNotFound"
            return Response("{}", 404, {"X-Error-Code": code})
        number, files = commit
        siblings = [{"rfilename": path} for path in files]
        return jsonify({"id": repo, "modelId": repo, "sha": self._sha(repo, number), "siblings": siblings})

    def _tree(self, owner, name, revision):
        _, files = self._files(f"{owner}/{name}", revision)
        return jsonify([{"type": "file", "path": p, "size": len(b), "oid": _etag(b)} for p, b in files.items()])

    def _resolve(self, owner, name, revision, path):
        repo = f"{owner}/{name}"
        number, files = self._files(repo, revision)
        body = files[path]
        return Response(body, 200, {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": self._sha(repo, number)})


def _etag(body):
    return hashlib.sha1(body).hexdigest()
