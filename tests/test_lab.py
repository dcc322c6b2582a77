"""`make lab` as typed: a real JupyterLab, on this machine only, behind its random token."""
import json, os, shutil, socket, subprocess, time
import urllib.error, urllib.request

import pytest
from conftest import ROOT

LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url, token=None):
    "Status and body of a GET, redirects followed."
    request = urllib.request.Request(url, headers={"Authorization": f"token {token}"} if token else {})
    try:
        with LOCAL.open(request, timeout=20) as answer: return answer.status, answer.url, answer.read().decode()
    except urllib.error.HTTPError as e: return e.code, url, ""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The Makefile's own command, run with this environment's programs; what the server says of itself."
    if not shutil.which("make"): pytest.skip("no make on this machine")
    home = tmp_path_factory.mktemp("jupyter")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = f"LABFLAGS=--no-browser --port {port} --ServerApp.port_retries=0"
    recipe = subprocess.run(["make", "-n", "-o", ".venv/.ready", "lab", flags], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = "exec " + recipe[recipe.index("jupyter lab"):].splitlines()[0]
    env = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER_")} | {k: str(home / k) for k in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    log = (home / "log").open("w")
    server = subprocess.Popen(["sh", "-c", command], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            if (facts := next((home / "JUPYTER_RUNTIME_DIR").glob("jpserver-*.json"), None)) or server.poll() is not None: break
            time.sleep(0.25)
        assert facts, f"JupyterLab did not start:\n{command}\n{(home / 'log').read_text()[-3000:]}"
        yield json.loads(facts.read_text())
    finally:
        server.terminate()
        server.wait(30)


def test_only_this_machine_and_only_with_the_token(lab):
    assert lab["hostname"] == "127.0.0.1" and len(lab["token"]) >= 32
    assert get(lab["url"] + "api/contents")[0] == 403
    assert get(lab["url"] + "api/contents", "0" * 48)[0] == 403
    assert "/login" in get(lab["url"] + "lab")[1], "without the token the lab shows its login page"
    assert get(lab["url"] + "lab", lab["token"])[0] == 200


def test_opens_on_the_lessons(lab):
    status, _, body = get(lab["url"] + "api/contents/lessons", lab["token"])
    assert status == 200
    here = {p.name for p in (ROOT / "nbs/lessons").glob("*.ipynb")}
    assert here <= {item["name"] for item in json.loads(body)["content"]}
    assert "/lab/tree/lessons" in get(lab["url"], lab["token"])[1]


def test_offers_this_environments_kernel(lab):
    specs = json.loads(get(lab["url"] + "api/kernelspecs", lab["token"])[2])
    assert specs["default"] == "python3"
