"""Names on the hub, through huggingface_hub itself and a small server in its place."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from model_inputs import fast_model, reference_model

from mamba_fast import CheckpointError, MambaLMHeadModel

NAME, COMMITS = "state-spaces/mamba-test", {"main": "a" * 40, "old": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: HEAD and GET of /NAME/resolve/REVISION/FILE."""

    protocol_version = "HTTP/1.1"

    def answer(self, send):
        name, _, rest = self.path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        commit = COMMITS.get(revision, revision)
        folder = self.server.folders.get(commit)
        if file:
            self.server.asked.append((self.command, commit, file))
        missing = None
        if name != NAME:
            missing = "RepoNotFound"
        elif folder is None:
            missing = "RevisionNotFound"
        elif not (folder / file).is_file():
            missing = "EntryNotFound"
        body = b"" if missing else (folder / file).read_bytes()
        self.send_response(404 if missing else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash((commit, file))}"')
        if missing:
            self.send_header("X-Error-Code", missing)
        self.end_headers()
        if send:
            self.wfile.write(body)

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with two revisions of one model, and an empty cache; yields the server and the cache."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.folders = [], {}
    for seed, commit in enumerate(COMMITS.values()):
        server.folders[commit] = tmp_path / commit[:3]
        fast_model(reference_model(seed)).save_pretrained(server.folders[commit])
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server, tmp_path / "cache"
    server.shutdown()
    thread.join()
    server.server_close()


def same(model, seed):
    weights = reference_model(seed).float().state_dict()
    return all(v.equal(weights[k]) for k, v in model.state_dict().items())


def test_a_name_is_downloaded_once(hub):
    server, cache = hub
    assert same(MambaLMHeadModel.from_pretrained(NAME, cache_dir=cache), 0)
    got = [file for command, _, file in server.asked if command == "GET"]
    assert sorted(got) == ["config.json", "pytorch_model.bin"]
    assert same(MambaLMHeadModel.from_pretrained(NAME, cache_dir=cache), 0)
    assert [file for command, _, file in server.asked if command == "GET"] == got
    asked = len(server.asked)
    assert same(MambaLMHeadModel.from_pretrained(NAME, cache_dir=cache, local_files_only=True), 0)
    assert len(server.asked) == asked


@pytest.mark.parametrize("revision", ["old", COMMITS["old"]], ids=["branch", "commit"])
def test_a_revision(hub, revision):
    _, cache = hub
    assert same(MambaLMHeadModel.from_pretrained(NAME, revision=revision, cache_dir=cache), 1)


def test_config_and_weights_are_of_one_commit(hub, monkeypatch):
    """The branch moves just after config.json was read: the weights still come from the same commit."""
    server, cache = hub
    answer = Hub.answer

    def moving(self, send):
        answer(self, send)
        if send and "config.json" in self.path:
            monkeypatch.setitem(COMMITS, "main", COMMITS["old"])

    monkeypatch.setattr(Hub, "answer", moving)
    monkeypatch.setitem(COMMITS, "main", COMMITS["main"])  # put back at the end
    assert same(MambaLMHeadModel.from_pretrained(NAME, cache_dir=cache), 0)
    assert {commit for _, commit, _ in server.asked} == {"a" * 40}


def test_shards(hub):
    server, cache = hub
    folder = server.folders["a" * 40]
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    index = dict.fromkeys(reference_model().state_dict(), "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}), "utf-8")
    assert same(MambaLMHeadModel.from_pretrained(NAME, cache_dir=cache), 0)


UNASKED = f"{NAME}: expected a file config.json, found none in the cache, and the hub was not asked"


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("state-spaces/mamba-none", {}, "state-spaces/mamba-none: no such folder, and not found on the hub"),
        (NAME, {"revision": "new"}, f"{NAME} at revision 'new': no such folder, and not found on the hub"),
        ("no such/folder/here", {}, "no such/folder/here: no such folder, and no name on the hub"),
        (NAME, {"local_files_only": True}, UNASKED),
    ],
    ids=["name", "revision", "path", "offline"],
)
def test_what_is_not_there(hub, name, options, said):
    _, cache = hub
    with pytest.raises(CheckpointError) as caught:
        MambaLMHeadModel.from_pretrained(name, cache_dir=cache, **options)
    assert str(caught.value).startswith(said)
    assert caught.value.__cause__ is not None
