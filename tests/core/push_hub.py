"""A hub of one process that takes what push_to_hub sends: huggingface.co's HTTP for a commit, on loopback.

`python push_hub.py FOLDER` prints its address and keeps what is committed as FOLDER/<owner>/<name>/<file>.
"""

import base64
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body, status=200, **headers):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        repo = "/".join(self.path.split("/")[3:5])  # /api/models/OWNER/NAME/...
        address = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            self.answer({"url": f"{address}/{wanted['organization']}/{wanted['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:  # every file inside the commit, none through LFS
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    path = self.server.folder / repo / line["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            commit = "0" * 40
            self.answer(
                {
                    "commitUrl": f"{address}/{repo}/commit/{commit}",
                    "commitOid": commit,
                    "pullRequestUrl": None,
                }
            )
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self):  # such as the model card that a repository may have
        self.answer({"error": self.path}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = Path(sys.argv[1])
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
