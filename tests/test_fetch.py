"Laws of fetching: nothing but https is asked, what has a name was checked, what broke off goes on, and a hostile archive writes nothing."
import errno, hashlib, io, json, os, random, re, signal, socket, struct, subprocess, sys, tarfile, threading, time, zipfile
from contextlib import contextmanager, suppress
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from htlab import fetch as F
from htlab.fetch import FetchError, File, check_url, download, fetch, hosted, unpack, where, zenodo_files
from htlab.importers import IMPORTERS
from htlab.source import BadFile

DATA = random.Random(0).randbytes(300_000)
DIGEST = sha256(DATA).hexdigest()
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
fast = dict(progress=False, wait=0, timeout=5)


def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} if folder.exists() else None


class Server(ThreadingHTTPServer):
    "Files by name, and `plan`: what to do with the next requests, in order; then it behaves."
    daemon_threads = True
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.plan, self.asked, self.ranges, self.etag = {"set.zip": DATA}, [], [], True, True
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": .01}, daemon=True).start()
    def url(self, name="set.zip"): return f"http://127.0.0.1:{self.server_port}/{name}"
    def handle_error(self, *_): pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def do_GET(self):
        s, name = self.server, self.path[1:].split("?")[0]
        s.asked.append((name, self.headers["Range"], self.headers["If-Range"]))
        do = s.plan.pop(0) if s.plan else {}
        if callable(do): return do(self)
        data, status = do.get("data", s.files.get(name)), do.get("status")
        if status or data is None:
            body = do.get("body", b"no")
            self.send_response(status or 404)
            for k, v in do.get("headers", {}).items(): self.send_header(k, v)
            self.send_header("Content-Length", str(len(body))); self.end_headers()
            self.wfile.write(body); return
        etag = do.get("etag", f'"{hashlib.md5(data).hexdigest()}"' if s.etag else None)
        m = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        part = m and s.ranges and not do.get("ignore") and (self.headers["If-Range"] in (None, etag) or do.get("careless"))
        start = int(m[1]) if part else 0
        if part and start >= len(data):
            self.send_response(416); self.send_header("Content-Range", f"bytes */{len(data)}"); self.send_header("Content-Length", "0"); self.end_headers(); return
        start = do.get("start", start)
        self.send_response(206 if part else 200)
        if part: self.send_header("Content-Range", do.get("span", f"bytes {start}-{len(data) - 1}/{len(data)}"))
        if etag: self.send_header("ETag", etag)
        if do.get("length", "") is not None: self.send_header("Content-Length", str(do.get("length", len(data) - start)))
        self.send_header("Connection", "close"); self.end_headers()
        self.close_connection = True
        with suppress(OSError):
            self.wfile.write(data[start:][:do.get("cut")])
            while do.get("endless"): self.wfile.write(bytes(1 << 16))
            time.sleep(do.get("hang", 0))


@pytest.fixture
def server():
    s = Server()
    yield s
    s.shutdown(); s.server_close()


# ---- where a request may go

pieces = st.sampled_from(["http", "https", "HTTP", "HtTpS", "file", "ftp", "data", "jar", "", "://", ":", "/", "//", "\\", "@", "?", "#", "[::1]", "[", "]", "127.0.0.1", "127.0.0.1.example.org", "localhost",
    "localhost.example.org", "example.org", ":80", ":x", ":0", "%40", "%2e", "%00", "\t", "\n", "\r\n", " ", "\x00", "é", "<URL:", ">", "user:pass", "0x7f.1", "2130706433", "127.1", "[::ffff:127.0.0.1]", "..", ";"])


@given(st.one_of(st.lists(pieces, max_size=9).map("".join), st.text(max_size=40), st.tuples(st.sampled_from(["http://", "https://"]), st.lists(pieces, max_size=6).map("".join)).map("".join)))
@example("http://127.0.0.1@example.org/")
@example("https://example.org\\@127.0.0.1/")
@example("http://localhost\t.example.org/")
@example("http://0[::1]")
@example("https://%00")
@settings(max_examples=400, deadline=None)
def test_nothing_but_https_or_this_machine_is_ever_opened(url):
    opened = []
    class Spy(F.urllib.request.OpenerDirector):
        def open(self, request, data=None, timeout=None): opened.append(request); raise URLError("not here")
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(F.urllib.request, "OpenerDirector", Spy); mp.setattr(F.ssl, "create_default_context", lambda: None) # reading all certificates takes its time
        with suppress(F._Refused, URLError): F._ask(url, {}, 1)
    for r in opened: # judged by what the library made of it, not by what we parsed
        host = re.sub(r":\d*$", "", r.host).strip("[]").lower()
        assert r.type == "https" or (r.type == "http" and host in F.LOOPBACK), (url, r.type, r.host)
        assert host == (urlsplit(url).hostname or "") and "@" not in r.host and 0 < (urlsplit(url).port or 443) < 65536


@pytest.mark.parametrize("url", ["https://example.org", "https://example.org/", "https://EXAMPLE.org:8443/a/b%20c?q=x&y=[1]#z", "https://[2001:db8::1]:443/x", "HTTP://LOCALHOST:80/x", "http://[::1]:8000/x", "https://scholar.cu.edu.eg/?q=afahmy/pages/dataset"])
def test_what_is_an_address_is_one(url): assert check_url(url) == url


@pytest.mark.parametrize("to", ["http://example.org/set.zip", "file:///etc/passwd", "ftp://example.org/x", "//example.org/set.zip", "http://127.0.0.1@example.org/", "", "http://[::1", "data:,x", "http://localhost.example.org/"])
def test_a_redirect_is_judged_like_the_first_address(server, tmp_path, to):
    server.plan = [dict(status=302, headers={"Location": to} if to else {})] * 9 # '' leads to itself, for ever
    with pytest.raises(FetchError, match="(refused|redirects)"): download(server.url(), tmp_path / "a", **fast)
    assert not tree(tmp_path) and len(server.asked) <= 1 + F.REDIRECTS


def test_redirects_within_bounds_are_followed_and_the_range_goes_along(server, tmp_path):
    to = lambda n: [dict(status=code, headers={"Location": server.url()}) for code in (301, 302, 303, 307, 308)[:n]]
    server.plan = to(5) + [dict(cut=1000)] + to(2)
    assert download(server.url("old"), tmp_path / "a", sha256=DIGEST, **fast).read_bytes() == DATA
    assert server.asked[-1][1] == "bytes=1000-"
    server.plan = to(5) + to(1)
    with pytest.raises(FetchError, match="more than 5 times"): download(server.url("old"), tmp_path / "b", **fast)


def test_the_body_of_a_redirect_is_not_read(server, tmp_path):
    def endless(h):
        h.send_response(302); h.send_header("Location", server.url()); h.send_header("Connection", "close"); h.end_headers(); h.close_connection = True
        with suppress(OSError):
            while True: h.wfile.write(bytes(1 << 16))
    server.plan = [endless]
    assert download(server.url("old"), tmp_path / "a", sha256=DIGEST, **fast).read_bytes() == DATA


def test_an_http_proxy_of_the_environment_is_not_asked_and_certificates_are_verified(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9"); monkeypatch.delenv("no_proxy", raising=False)
    assert download(server.url(), tmp_path / "a", sha256=DIGEST, **fast).read_bytes() == DATA
    made = []
    real = F.urllib.request.HTTPSHandler
    monkeypatch.setattr(F.urllib.request, "HTTPSHandler", lambda context: made.append(context) or real(context=context))
    F._ask(server.url(), {}, 5).close()
    assert made[0].verify_mode == F.ssl.CERT_REQUIRED and made[0].check_hostname


# ---- breaking off, going on

def test_a_broken_download_asks_for_the_rest_of_the_same_version(server, tmp_path):
    server.plan = [dict(cut=120_000), dict(cut=50_000)]
    assert download(server.url(), tmp_path / "a", **fast).read_bytes() == DATA
    tag = f'"{hashlib.md5(DATA).hexdigest()}"'
    assert server.asked == [("set.zip", None, None), ("set.zip", "bytes=120000-", tag), ("set.zip", "bytes=170000-", tag)]
    assert list(tree(tmp_path)) == ["a"]


@given(st.lists(st.tuples(st.one_of(st.integers(0, 3000), st.sampled_from([0, 1, 2999, 3000])), st.booleans(), st.sampled_from(["", "", "ignore", "careless", "status", "chunked"])), max_size=8), st.booleans(), st.booleans(), st.booleans())
@quick
def test_wherever_it_breaks_the_bytes_are_those_of_the_file(cuts, ranges, etag, pinned):
    import tempfile
    data, s = DATA[:3000], Server()
    try:
        s.files["set.zip"], s.ranges, s.etag = data, ranges, etag
        s.plan = [dict(status=503) if how == "status" else {"cut": cut, **({how: True} if how in ("ignore", "careless") else {"length": None} if how == "chunked" and pinned else {})} for cut, _, how in cuts]
        with tempfile.TemporaryDirectory() as tmp:
            for _ in range(len(cuts) + 1): # the same call again, as often as it takes
                try: p = download(s.url(), Path(tmp, "a"), len(data) if pinned else None, sha256(data).hexdigest() if pinned else "", **fast, retries=1); break
                except FetchError: assert not Path(tmp, "a").exists()
            assert p.read_bytes() == data and os.listdir(tmp) == ["a"]
    finally: s.shutdown(); s.server_close()


def test_a_file_that_changes_meanwhile_is_never_mixed(server, tmp_path):
    new = DATA[::-1]
    for careless in (False, True): # a server that minds If-Range sends all; one that does not sends a part with another ETag
        server.files["set.zip"], server.plan = new, [dict(cut=100_000, data=DATA), dict(careless=careless)]
        assert download(server.url(), tmp_path / f"{careless}", **fast).read_bytes() == new
    server.files["set.zip"], server.plan = new[:5000], [dict(cut=100_000, data=DATA), dict(careless=True)] # it has no such part: 416
    assert download(server.url(), tmp_path / "shorter", **fast).read_bytes() == new[:5000]


def test_without_etag_and_checksum_it_begins_anew_and_with_a_checksum_it_goes_on(server, tmp_path):
    server.etag, server.plan = False, [dict(cut=100_000)]
    assert download(server.url(), tmp_path / "a", **fast).read_bytes() == DATA and [r for _, r, _ in server.asked] == [None, None]
    server.plan, server.asked = [dict(cut=100_000)], []
    assert download(server.url(), tmp_path / "b", sha256=DIGEST, **fast).read_bytes() == DATA and [r for _, r, _ in server.asked] == [None, "bytes=100000-"]
    server.plan, server.asked = [dict(cut=100_000, etag='W/"1"')], []
    assert download(server.url(), tmp_path / "c", **fast).read_bytes() == DATA and [r for _, r, _ in server.asked] == [None, None]


def test_the_next_mirror_goes_on_where_the_first_stopped_and_a_wrong_beginning_is_found(server, tmp_path):
    urls = [server.url("first"), server.url()]
    server.files["first"], server.plan = DATA, [dict(cut=200_000), dict(status=404)]
    assert download(urls, tmp_path / "a", len(DATA), DIGEST, **fast).read_bytes() == DATA
    assert server.asked[-1] == ("set.zip", "bytes=200000-", None)
    server.files["first"], server.plan = bytes(len(DATA)), [dict(cut=200_000), dict(status=404)]
    assert download(urls, tmp_path / "b", len(DATA), DIGEST, **fast).read_bytes() == DATA
    assert [r for n, r, _ in server.asked if n == "set.zip"][-2:] == ["bytes=200000-", None], "once more from the beginning"


@pytest.mark.parametrize("span, start", [("bytes 0-299999/300000", 0), ("bytes 99999-299999/300000", 99_999), ("bytes 150000-299999/300000", 150_000), ("bytes x", 0), ("", 0), ("bytes */300000", 0), ("bytes 100000-299999/*", 100_000)])
def test_another_part_than_asked_for_is_not_appended(server, tmp_path, span, start):
    server.plan = [dict(cut=100_000), dict(span=span, start=start)]
    assert download(server.url(), tmp_path / "a", **fast).read_bytes() == DATA


def test_a_part_that_is_whole_already_is_not_asked_for_again(server, tmp_path):
    for name, size in (("a", len(DATA)), ("b", None)): # b: the server says so, by 416
        (tmp_path / f"{name}.partial").write_bytes(DATA); (tmp_path / f"{name}.partial.json").write_text(json.dumps(dict(url=server.url(), tag="")))
        assert download(server.url(), tmp_path / name, size, DIGEST, **fast).read_bytes() == DATA
    assert [r for _, r, _ in server.asked] == ["bytes=300000-"]


@pytest.mark.parametrize("note", ["", "{", "[]", '{"url": 1}', "null", '{"url": "x", "tag": "y"}', None])
@pytest.mark.parametrize("rest", [b"", b"junk", DATA + b"more"])
def test_a_rest_of_unknown_origin_does_no_harm(server, tmp_path, note, rest):
    (tmp_path / "a.partial").write_bytes(rest)
    if note is not None: (tmp_path / "a.partial.json").write_text(note)
    for sums in ({}, dict(sha256=DIGEST)):
        assert download(server.url(), tmp_path / "a", **sums, **fast).read_bytes() == DATA
        assert list(tree(tmp_path)) == ["a"]


# ---- what a server says, and what it sends

def test_a_length_is_a_promise_and_not_a_fact(server, tmp_path):
    server.plan = [dict(length=len(DATA) + 1000)] * 9 # too long: the rest never comes, and the next request says that there is none
    assert download(server.url(), tmp_path / "a", sha256=DIGEST, **fast).read_bytes() == DATA and server.asked[1][1] == "bytes=300000-"
    server.plan = [dict(length=len(DATA) + 1000)] * 9
    with pytest.raises(FetchError, match="offers 301,000 bytes, where 300,000 are published"): download(server.url(), tmp_path / "b", len(DATA), DIGEST, **fast)
    for known in (dict(size=len(DATA)), dict(sha256=DIGEST)): # too short
        server.plan = [dict(length=1000)] * 9
        with pytest.raises(FetchError, match="(offers 1,000 bytes|other bytes than published)"): download(server.url(), tmp_path / "b", **known, **fast)
    server.plan = [dict(length="-5"), dict(length="many")]
    assert download(server.url(), tmp_path / "c", sha256=DIGEST, **fast).read_bytes() == DATA
    assert list(tree(tmp_path)) == ["a", "c"]


def test_a_stream_without_end_is_cut_at_what_may_come(server, tmp_path):
    for i, bound in enumerate((dict(size=len(DATA)), dict(limit=400_000))):
        server.plan = [dict(length=None, endless=True)]
        with pytest.raises(FetchError, match="sends more than the [34]00,000 bytes"): download(server.url(), tmp_path / f"{i}", **bound, **fast)
    with pytest.raises(FetchError, match="offers 300,000 bytes: too many"): download(server.url(), tmp_path / "x", limit=1000, **fast)
    assert not tree(tmp_path)


def test_wrong_bytes_never_get_the_name_and_the_next_mirror_is_tried(server, tmp_path):
    server.files |= {"bad": DATA[:-1] + b"?", "login": b"<html>log in"}
    assert download([server.url("bad"), server.url("login"), server.url()], tmp_path / "a", sha256=DIGEST, **fast).read_bytes() == DATA
    for sums in (dict(sha256=DIGEST), dict(md5=hashlib.md5(DATA).hexdigest())):
        with pytest.raises(FetchError, match=r"^b: not downloaded .*other bytes than published"): download([server.url("bad"), server.url("login"), server.url("none")], tmp_path / "b", **sums, **fast)
    assert list(tree(tmp_path)) == ["a"]


@given(st.integers(0, len(DATA) - 1), st.integers(0, 7))
@quick
def test_one_wrong_bit_anywhere_is_found(tmp_path, at, bit):
    (p := tmp_path / "x").write_bytes(DATA[:at] + bytes([DATA[at] ^ 1 << bit]) + DATA[at + 1:])
    assert F._wrong(p, len(DATA), sha256=DIGEST) and F._wrong(p, None, md5=hashlib.md5(DATA).hexdigest()) and not F._wrong(p, len(DATA))


@pytest.mark.parametrize("status, tries", [(400, 1), (401, 1), (403, 1), (404, 1), (410, 1), (204, 1), (304, 1), (429, 4), (500, 4), (503, 4)])
def test_what_is_permanent_is_asked_once_and_what_may_pass_a_few_times(server, tmp_path, status, tries):
    server.plan = [dict(status=status)] * 20
    with pytest.raises(FetchError, match=rf"127.0.0.1: answers {status}"): download(server.url(), tmp_path / "a", retries=3, **fast)
    assert len(server.asked) == tries and not tree(tmp_path)


def test_pauses_double_and_end(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(F.time, "sleep", pauses.append)
    server.plan = [dict(status=503)] * 20
    with pytest.raises(FetchError): download(server.url(), tmp_path / "a", retries=7, progress=False)
    assert pauses == [2, 4, 8, 16, 30, 30, 30]


def test_silence_ends(server, tmp_path):
    server.plan = [dict(cut=1000, hang=3), dict(cut=0, hang=3)]
    with pytest.raises(FetchError, match="does not answer.*1,000 bytes are kept"): download(server.url(), tmp_path / "a", progress=False, wait=0, timeout=.3, retries=0)
    assert download(server.url(), tmp_path / "a", **fast).read_bytes() == DATA and server.asked[-1][1] == "bytes=1000-"


def test_nobody_there_is_one_line(tmp_path, monkeypatch):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    with pytest.raises(FetchError, match="127.0.0.1: refuses the connection: offline?") as e: download(f"http://127.0.0.1:{port}/a", tmp_path / "a", **fast)
    assert "\n" not in str(e.value)
    faults = {socket.gaierror(-2, "Name or service not known"): "its name is not known", TimeoutError("timed out"): "does not answer", F.ssl.SSLCertVerificationError("x"): "certificate cannot be verified",
        F.ssl.SSLError(1, "wrong version number"): "wrong version number", OSError(errno.ENETUNREACH, "Network is unreachable"): "Network is unreachable"}
    for fault, said in faults.items():
        tried = []
        def open_(*_, **__): tried.append(1); raise URLError(fault)
        monkeypatch.setattr(F.urllib.request.OpenerDirector, "open", open_)
        with pytest.raises(FetchError, match=said): download("https://example.org/a", tmp_path / "a", **fast)
        assert (len(tried) == 1) == ("name" in said or "certificate" in said)
    assert not tree(tmp_path)


@pytest.mark.parametrize("junk", [b"", b"\r\n\r\n", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc",
    b"HTTP/1.1 200 OK\r\n" + b"a" * 70_000, b"HTTP/1.1 99999999 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nx", b"\xff" * 1000, b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 5-9/10\r\nContent-Length: 5\r\n\r\nabcde"])
def test_no_answer_crashes(server, tmp_path, junk):
    def say(h): h.wfile.write(junk); h.wfile.flush(); h.close_connection = True
    server.plan = [say] * 9
    with pytest.raises(FetchError, match=r"^a: not downloaded \(127.0.0.1: ") as e: download(server.url(), tmp_path / "a", sha256=DIGEST, retries=1, **fast)
    assert "\n" not in str(e.value) and not (tmp_path / "a").exists()


def test_what_was_compressed_on_the_way_is_not_taken_for_the_file(server, tmp_path):
    def gzipped(h): h.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx"); h.close_connection = True
    server.plan = [gzipped]
    with pytest.raises(FetchError, match="in another form than asked for"): download(server.url(), tmp_path / "a", **fast)
    assert not tree(tmp_path)


# ---- the disk, the user, a second one

def test_a_full_disk_keeps_what_has_come(server, tmp_path, monkeypatch):
    real = open
    class Full(io.FileIO):
        def write(self, b):
            if self.tell() + len(b) > 100_000:
                if self.tell() >= 100_000: raise OSError(errno.ENOSPC, "No space left on device")
                b = b[:100_000 - self.tell()] # as a disk does: the last piece is short
            return super().write(b)
    monkeypatch.setattr(F, "open", lambda p, mode="r", *a, **k: Full(p, "a") if str(p).endswith(".partial") and "a" in mode else real(p, mode, *a, **k), raising=False)
    with pytest.raises(FetchError, match="^a: no space left on the disk; free some; 100,000 bytes are kept"): download([server.url(), server.url("other")], tmp_path / "a", sha256=DIGEST, **fast)
    assert len(server.asked) == 1, "another mirror does not help"
    monkeypatch.undo()
    assert download(server.url(), tmp_path / "a", sha256=DIGEST, **fast).read_bytes() == DATA and server.asked[-1][1] == "bytes=100000-"
    monkeypatch.setattr(F.shutil, "disk_usage", lambda p: type("U", (), {"free": 1000}))
    with pytest.raises(FetchError, match="^b: needs 300,000 more bytes than the disk has room for"): download(server.url(), tmp_path / "b", **fast)


def test_a_folder_that_may_not_be_written_is_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "a.partial.json").mkdir() # stands in the way, also of root
    with pytest.raises(FetchError, match="^a: cannot be written"): download(server.url(), tmp_path / "a", **fast)


def test_ctrl_c_keeps_what_has_come(server, tmp_path, monkeypatch):
    server.plan = [dict(cut=200_000, hang=.2)]
    class Bar:
        def __init__(self, **k): pass
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def update(self, n): raise KeyboardInterrupt
    with monkeypatch.context() as mp:
        mp.setattr(F, "tqdm", Bar)
        with pytest.raises(KeyboardInterrupt): download(server.url(), tmp_path / "a", **fast)
    had = (tmp_path / "a.partial").stat().st_size
    assert had > 0 and download(server.url(), tmp_path / "a", **fast).read_bytes() == DATA and server.asked[-1][1] == f"bytes={had}-"


def test_a_killed_download_goes_on(server, tmp_path):
    server.plan = [dict(cut=150_000, hang=20)]
    run = subprocess.Popen([sys.executable, "-c", f"from htlab.fetch import download; download({server.url()!r}, {str(tmp_path / 'a')!r}, progress=False)"])
    until = time.monotonic() + 60
    while not ((p := tmp_path / "a.partial").exists() and p.stat().st_size == 150_000) and time.monotonic() < until: time.sleep(.02)
    run.send_signal(signal.SIGKILL); run.wait()
    assert download(server.url(), tmp_path / "a", **fast).read_bytes() == DATA
    assert server.asked[-1][1] == "bytes=150000-" and list(tree(tmp_path)) == ["a"], "nor does its lock stand in the way"


def test_two_at_once(server, tmp_path):
    server.plan, got = [dict(cut=1000, hang=1)], []
    first = threading.Thread(target=lambda: got.append(download(server.url(), tmp_path / "a", **fast)))
    first.start()
    until = time.monotonic() + 30
    while not (tmp_path / "a.partial").exists() and time.monotonic() < until: time.sleep(.01)
    with pytest.raises(FetchError, match="^a: another download of it is running"): download(server.url(), tmp_path / "a", **fast)
    first.join()
    assert got[0].read_bytes() == DATA and list(tree(tmp_path)) == ["a"]


def test_a_file_that_is_there_and_right_is_not_asked_for_and_a_wrong_one_is_replaced_only_by_a_right_one(server, tmp_path):
    (p := tmp_path / "a").write_bytes(DATA)
    assert download(server.url(), p, len(DATA), DIGEST, **fast) == p and server.asked == []
    p.write_bytes(b"mine")
    with pytest.raises(FetchError): download(server.url("none"), p, len(DATA), DIGEST, **fast)
    assert p.read_bytes() == b"mine"
    assert download(server.url(), p, len(DATA), DIGEST, **fast).read_bytes() == DATA
    p.write_bytes(b"mine")
    assert download(server.url(), p, len(DATA), **fast).read_bytes() == DATA, "also by its size alone"


@pytest.mark.parametrize("bad", [dict(sha256="abc"), dict(md5="z" * 32), dict(sha256=DIGEST + "0")])
def test_a_checksum_that_is_none_is_refused(server, tmp_path, bad):
    with pytest.raises(ValueError, match="hexadecimal digits"): download(server.url(), tmp_path / "a", **bad, **fast)
    assert server.asked == []


# ---- unpacking

def zipped(path, *entries, method=zipfile.ZIP_DEFLATED): # (name, bytes[, mode])
    with zipfile.ZipFile(path, "w", method) as z:
        for name, data, *mode in entries:
            info = zipfile.ZipInfo(name); info.compress_type = method; info.external_attr = (mode or [0])[0] << 16
            z.writestr(info, data)
    return path


def tarred(path, *entries, mode="w:gz"): # (name, bytes or TarInfo type)
    with tarfile.open(path, mode) as t:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes) and len(data) > 1 or data == b"": info.size = len(data); t.addfile(info, io.BytesIO(data))
            else: info.type, info.linkname = data, "/etc/passwd"; t.addfile(info)
    return path


names = st.lists(st.sampled_from(["a", "b", "images", "x.png", "A", "é", "with space"]), min_size=1, max_size=4).map("/".join)


@given(st.dictionaries(names, st.binary(max_size=300), min_size=1, max_size=6), st.sampled_from(["zip", "stored", "tar", "tar.gz"]))
@quick
def test_an_honest_archive_is_unpacked_byte_by_byte_or_refused_whole(tmp_path_factory, files, kind):
    tmp = tmp_path_factory.mktemp("u")
    clash = any(a != b and b.startswith(a + "/") for a in files for b in files)
    src = zipped(tmp / "s", *files.items(), method=zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED) if "tar" not in kind else tmp / "s"
    if "tar" in kind:
        with tarfile.open(src, "w:gz" if "gz" in kind else "w") as t:
            for n, d in files.items(): (i := tarfile.TarInfo(n)).size = len(d); t.addfile(i, io.BytesIO(d))
    try: unpack(src, tmp / "out", progress=False)
    except BadFile as e: assert clash and "a file and a folder at once" in str(e) and not (tmp / "out").exists()
    else: assert tree(tmp / "out") == files and not clash
    assert {p.name for p in tmp.iterdir()} <= {"s", "out"}


hostile = {
    "climbs": lambda p: zipped(p, ("ok", b"x"), ("../../escaped", b"x")), "backslash": lambda p: zipped(p, ("..\\escaped", b"x")), "absolute": lambda p: zipped(p, ("/tmp/escaped", b"x")), "drive": lambda p: zipped(p, ("C:/escaped", b"x")),
    "link": lambda p: zipped(p, ("images", b"/etc", 0o120777), ("images/x", b"x")), "ratio": lambda p: zipped(p, ("big", bytes(300 << 20))), "sum": lambda p: zipped(p, *((f"{i}", bytes(900_000)) for i in range(90))),
    "tar climbs": lambda p: tarred(p, ("../escaped", b"xx")), "tar link": lambda p: tarred(p, ("l", tarfile.SYMTYPE)), "tar hard link": lambda p: tarred(p, ("l", tarfile.LNKTYPE)), "tar device": lambda p: tarred(p, ("l", tarfile.CHRTYPE)), "tar pipe": lambda p: tarred(p, ("l", tarfile.FIFOTYPE)),
    "twice": lambda p: zipped(p, ("a/b", b"x"), ("a//b", b"y")), "bzip2": lambda p: zipped(p, ("a", b"x" * 999), method=zipfile.ZIP_BZIP2), "lzma": lambda p: zipped(p, ("a", b"x" * 999), method=zipfile.ZIP_LZMA), "text": lambda p: (p.write_text("dear"), p)[1], "empty": lambda p: (p.write_bytes(b""), p)[1]}


@pytest.mark.parametrize("kind", hostile)
def test_a_hostile_archive_writes_nothing(tmp_path, kind):
    src = hostile[kind](tmp_path / "src")
    before = tree(tmp_path)
    with pytest.raises(ValueError) as e: unpack(src, tmp_path / "deep/er/out", progress=False)
    assert "\n" not in str(e.value) and {k: v for k, v in tree(tmp_path).items() if not k.endswith(".lock")} == before
    assert not any((tmp_path / "deep/er").glob("*")) if (tmp_path / "deep/er").exists() else True


@pytest.mark.parametrize("says, is_", [(100, 50_000_000), (5_000, 4_000), (0, 5000)])
def test_a_directory_that_lies_is_found_and_costs_no_memory(tmp_path, says, is_):
    src = zipped(tmp_path / "s", ("ok", b"x"), ("lie", bytes(is_)))
    src.write_bytes(src.read_bytes().replace(struct.pack("<I", is_), struct.pack("<I", says)))
    import tracemalloc
    tracemalloc.start()
    with pytest.raises(ValueError): unpack(src, tmp_path / "out", progress=False)
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    assert list(tree(tmp_path)) == ["s"]


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=12), st.booleans())
@quick
def test_flipped_bytes_give_the_files_or_one_line(tmp_path_factory, flips, tar):
    tmp = tmp_path_factory.mktemp("u")
    (tmp / "in").mkdir()
    make = tarred if tar else zipped
    data = bytearray(make(tmp / "in/s", ("a/b", DATA[:500]), ("c", b"text" * 50)).read_bytes())
    for at, value in flips: data[at % len(data)] = value
    (tmp / "in/s").write_bytes(data)
    try: unpack(tmp / "in/s", tmp / "in/out", progress=False)
    except (ValueError, FetchError) as e: assert "\n" not in str(e) and not (tmp / "in/out").exists()
    assert [p.name for p in tmp.iterdir()] == ["in"] and {p.name for p in (tmp / "in").iterdir()} <= {"s", "out"}


def test_unpacking_is_all_or_nothing_and_spares_what_is_there(tmp_path, monkeypatch):
    src = zipped(tmp_path / "s.zip", ("a", DATA), ("b", DATA))
    (tmp_path / "mine").mkdir(); (tmp_path / "mine/x").write_text("x")
    with pytest.raises(FileExistsError, match="holds other files"): unpack(src, tmp_path / "mine", progress=False)
    with pytest.raises(ValueError, match="folder already"): unpack(tmp_path / "mine", tmp_path / "out", progress=False)
    with pytest.raises(FileNotFoundError): unpack(tmp_path / "none.zip", tmp_path / "out", progress=False)
    blocks = F.Source.blocks
    def full(source, name):
        yield from blocks(source, name)
        if name == "b": raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(F.Source, "blocks", full)
    with pytest.raises(FetchError, match="s.zip: no space left on the disk; free some; after 1 of 2 files, of which nothing was kept"): unpack(src, tmp_path / "out", progress=False)
    monkeypatch.undo()
    assert set(tree(tmp_path)) == {"s.zip", "mine/x"}
    (tmp_path / "out.partial").mkdir(); (tmp_path / "out.partial/rest").write_text("of a kill")
    (tmp_path / "out").mkdir()
    assert tree(unpack(src, tmp_path / "out", progress=False)) == {"a": DATA, "b": DATA} and not (tmp_path / "out.partial").exists()


# ---- cards, where, fetch

@pytest.fixture
def cards(tmp_path, monkeypatch):
    "A working folder with cards of its own, which come first."
    (tmp_path / "data_manifests").mkdir(); monkeypatch.chdir(tmp_path); monkeypatch.setenv("HTLAB_DATA", str(tmp_path / "home"))
    def card(name, *lines): (tmp_path / f"data_manifests/{name}.md").write_text("\n".join(["# A set", "## Source", "here", "## Download", *lines, "## Licence", "CC BY 4.0", "## Citation", "Me"]))
    return card


def table(*rows): return ["| file | bytes | sha256 | mirrors |", "|---|---|---|---|", *(f"| {' | '.join(map(str, r))} |" for r in rows)]


@pytest.mark.parametrize("name", IMPORTERS)
def test_every_set_of_the_importers_says_how_it_is_had(name):
    h, text = hosted(name), where(name)
    assert h.licence and (h.page or h.by_hand) and bool(h.files) != bool(h.by_hand)
    assert f"htlab data import {name} " in text and (not h.page or h.page in text) and all(f.name in text and f.sha256 in text for f in h.files)
    for f in h.files: assert len(f.sha256) == 64 and f.mirrors and all(u.startswith("https://") for u in f.mirrors), "what a card fetches is pinned"
    if h.files and not h.ask: assert h.licence.startswith("CC BY 4.0"), "without asking only what is free"


def test_facts_that_we_were_given():
    assert hosted("busi").files[0].sha256 == "b2ce09f6063a31a73f628b6a6ee1245187cbaec225e93e563735691d68654de7" and hosted("busi").ask
    assert hosted("prostate").files[0].sha256 == "031645dc30948314e379d0a0a7d54bad1cd4e1f3f918b77455d69810aa05dce3"
    assert "8231412" in hosted("busbra").page and hosted("ln-int").by_hand and hosted("ln-ext").by_hand


@pytest.mark.parametrize("name", ["phantom", "nothing", "../busi", "", "a\nb", "/etc/passwd"])
def test_a_set_without_the_section_is_one_line(name):
    for f in (hosted, where, fetch):
        with pytest.raises(FileNotFoundError, match="section Download") as e: f(name)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("lines", [["nothing"], ["Zenodo record: x1"], table(("../x", 1, "", "https://example.org/x")), table(("x", "1 MB", "", "https://example.org/x")), table(("x", 1, "abc", "https://example.org/x")), table(("x", 1, "", "http://example.org/x")),
    table(("x", 1, "", "")), table(("x", 1, "")), table((".x", 1, "", "https://example.org/x")), table(("x", 1, "", "https://example.org/x file:///etc/passwd"))])
def test_a_line_of_a_card_that_cannot_be_used_is_named(cards, lines):
    cards("demo", *lines)
    with pytest.raises(ValueError, match="^demo.md: ") as e: hosted("demo")
    assert "\n" not in str(e.value)


def test_fetch_one_file(cards, server, tmp_path, capsys):
    cards("demo", "Page: https://example.org/demo", *table(("set.zip", len(DATA), DIGEST, server.url())))
    p = fetch("demo", progress=False)
    assert p == tmp_path / "home/downloads/demo/set.zip" and p.read_bytes() == DATA and capsys.readouterr().out == ""
    assert fetch("demo") == p and len(server.asked) == 1
    assert "CC BY 4.0" in (out := capsys.readouterr().out) and "cite: Me" in out and "sha256 as in the card" in out


def test_fetch_several_files_unpacks_the_archives_beside_the_others(cards, server, tmp_path):
    zipped(tmp_path / "z", ("training_set/000_HC.png", b"pixels"))
    server.files |= {"t.zip": (z := (tmp_path / "z").read_bytes()), "t.csv": b"a,b\n"}
    cards("demo", *table(*((n, "", sha256(server.files[n]).hexdigest(), server.url(n)) for n in ("t.zip", "t.csv"))))
    for _ in range(2): assert tree(fetch("demo", tmp_path / "to", progress=False)) == {"t.zip": z, "t.csv": b"a,b\n", "t/training_set/000_HC.png": b"pixels"}
    assert "FOLDER" in where("demo")


def test_hc18_as_fetched_is_what_its_importer_reads(cards, server, tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image
    def png(a): Image.fromarray(a).save(out := io.BytesIO(), "png"); return out.getvalue()
    yy, xx = np.mgrid[:60, :80]
    ring = lambda r: ((abs(((yy - 30) ** 2 + (xx - 40) ** 2) ** .5 - r) < 1) * 255).astype(np.uint8)
    entries = [e for i in range(4) for e in ((f"training_set/{i:03d}_HC.png", png(ring(10 + i) // 2 + np.uint8(i))), (f"training_set/{i:03d}_HC_Annotation.png", png(ring(10 + i))))]
    zipped(tmp_path / "z", *entries)
    server.files |= {"training_set.zip": (tmp_path / "z").read_bytes(), "training_set_pixel_size_and_HC.csv": b"filename,pixel size(mm),head circumference (mm)\n" + b"".join(b"%03d_HC.png,0.1,200\n" % i for i in range(4))}
    cards("hc18", *table(*((n, len(server.files[n]), sha256(server.files[n]).hexdigest(), server.url(n)) for n in ("training_set.zip", "training_set_pixel_size_and_HC.csv"))))
    assert [f.name for f in hosted("hc18").files] == ["training_set.zip", "training_set_pixel_size_and_HC.csv"]
    assert len(IMPORTERS["hc18"](fetch("hc18", progress=False), tmp_path / "hc18", progress=False)) == 4


def test_what_is_not_allowed_is_not_asked_for(cards, server, tmp_path):
    cards("asks", "Ask first: statements conflict", *table(("set.zip", "", DIGEST, server.url())))
    cards("hand", "By hand: private", "Page: https://example.org/hand")
    for name, line in (("asks", "statements conflict.*--accept-licence"), ("hand", "hand cannot be fetched: private")):
        with pytest.raises(FetchError, match=line) as e: fetch(name, progress=False)
        assert str(e.value).endswith(where(name)) and f"htlab data import {name}" in str(e.value)
    assert server.asked == [] and not (tmp_path / "home").exists()
    with pytest.raises(FetchError, match="private"): fetch("hand", accept=True)
    assert fetch("asks", accept=True, progress=False).read_bytes() == DATA


@pytest.mark.parametrize("fault", [dict(status=404), dict(status=403), dict(cut=1000), "closed"])
def test_what_did_not_work_is_one_line_and_then_what_to_do(cards, server, tmp_path, fault):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); closed = f"http://127.0.0.1:{s.getsockname()[1]}/x"
    cards("demo", "Page: https://example.org/demo", *table(("set.zip", "", DIGEST, closed if fault == "closed" else server.url())))
    server.plan = [fault] + [dict(status=500)] * 9
    with pytest.raises(FetchError) as e: fetch("demo", **fast)
    line, *rest = str(e.value).splitlines()
    assert line.startswith("set.zip: not downloaded (127.0.0.1: ") and "\n".join(rest) == where("demo") and "  - visit https://example.org/demo" in rest and "  - then run: htlab data import demo set.zip" in rest
    kept = fault == dict(cut=1000)
    assert ("1,000 bytes of set.zip" in rest[-1] and "`htlab data fetch demo` goes on from there" in rest[-1]) == kept
    if kept: server.plan = []; assert fetch("demo", **fast).read_bytes() == DATA and server.asked[-1][1] == "bytes=1000-"


def test_mirrors_of_ones_own_come_first_and_are_bound_by_the_checksum(cards, server, tmp_path):
    server.files |= {"own/set 1.zip": DATA, "own/set%201.zip": DATA}
    cards("demo", *table(("set 1.zip", len(DATA), DIGEST, server.url("none"))))
    assert fetch("demo", mirrors=[server.url("own")], progress=False).read_bytes() == DATA and len(server.asked) == 1
    with pytest.raises(FetchError, match="is refused"): fetch("demo", tmp_path / "b", mirrors=["http://example.org/"], progress=False)
    cards("loose", *table(("set.zip", len(DATA), "", server.url())))
    with pytest.raises(FetchError, match="anything could come from there"): fetch("loose", mirrors=[server.url("own")])


# ---- Zenodo

def record(server, **change):
    f = {"id": "x", "key": "set.zip", "size": len(DATA), "checksum": f"md5:{hashlib.md5(DATA).hexdigest()}", "links": {"self": server.url("api/records/7/files/set.zip/content")}} | change
    return json.dumps({"id": 7, "metadata": {"license": {"id": "cc-by-4.0"}}, "files": [f]}).encode()


def test_a_record_says_names_sizes_and_md5_and_the_user_is_told_the_sha256(cards, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(F, "ZENODO", server.url("api/records/{}"))
    server.files |= {"api/records/7": record(server), "api/records/7/files/set.zip/content": DATA}
    cards("demo", "Zenodo record: 7")
    assert "https://zenodo.org/records/7" in where("demo")
    assert zenodo_files("7") == (File("set.zip", (server.url("api/records/7/files/set.zip/content"),), len(DATA), "", hashlib.md5(DATA).hexdigest()),)
    assert fetch("demo", progress=False).read_bytes() == DATA
    assert DIGEST in (out := capsys.readouterr().out) and "not in the card" in out and "(size, md5)" in out
    server.files["api/records/7/files/set.zip/content"] = DATA[::-1]
    with pytest.raises(FetchError, match="other bytes than published"): fetch("demo", tmp_path / "b", progress=False)


@pytest.mark.parametrize("change", [dict(key="../x"), dict(key="a/b"), dict(key=".x"), dict(key=""), dict(size=-1), dict(size="many"), dict(size=None), dict(checksum="md5:zz"), dict(checksum=None), dict(checksum="sha1:" + "0" * 40), dict(links={}), dict(links=None),
    dict(links={"self": "http://example.org/x"}), dict(links={"self": "file:///etc/passwd"}), b"", b"{", b"[]", b"null", b'{"files": []}', b'{"files": 3}', b'{"files": [3]}', b"[" * 100_000, b"\xff"], ids=lambda c: str(c)[:40])
def test_an_answer_of_zenodo_that_cannot_be_used_is_one_line(cards, server, tmp_path, monkeypatch, change):
    monkeypatch.setattr(F, "ZENODO", server.url("api/records/{}"))
    server.files["api/records/7"] = change if isinstance(change, bytes) else record(server, **change)
    cards("demo", "Zenodo record: 7")
    with pytest.raises(FetchError, match="^Zenodo record 7: ") as e: zenodo_files("7")
    assert "\n" not in str(e.value)
    with pytest.raises(FetchError, match="htlab data import demo"): fetch("demo", progress=False)
    assert not (tmp_path / "home").exists() and len(server.asked) == 2


def test_zenodo_away_is_one_line(cards, server, monkeypatch):
    monkeypatch.setattr(F, "ZENODO", server.url("api/records/{}"))
    with pytest.raises(FetchError, match="^Zenodo record 8: answers 404"): zenodo_files(8)
    server.plan = [dict(status=302, headers={"Location": "http://example.org"})]
    with pytest.raises(FetchError, match="^Zenodo record 8: .*refused"): zenodo_files(8)
    monkeypatch.setattr(F, "ZENODO", "http://127.0.0.1:9/{}")
    with pytest.raises(FetchError, match="^Zenodo record 8: refuses the connection"): zenodo_files(8)
