"""`make lab` as typed: a real JupyterLab, on this machine only, behind its random token."""
import json

from browser import get
from conftest import ROOT


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
