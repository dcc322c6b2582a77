"""What a run was made on and what it cost: known loads are found, counters wrap, and what a machine does not tell is said."""
import gc, os, subprocess, sys, threading, time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from htlab import record
from htlab.record import Meter, lock_differs, lock_hash, machine

FRESH = "import numpy as np\nfrom htlab.record import Meter\nwith Meter(every={every}) as m:\n    {work}\nr = m.read(); print(r['peak_memory_mb'] - r['start_memory_mb'])"


def zone(root, name, kind, uj, wraps=1000):
    (root / name).mkdir(exist_ok=True)
    for f, text in dict(name=kind, energy_uj=int(uj), max_energy_range_uj=int(wraps)).items(): (root / name / f).write_text(f"{text}\n")


def grown(work, every=.05): return float(subprocess.run([sys.executable, "-c", FRESH.format(work=work, every=every)], capture_output=True, text=True, check=True).stdout)


# memory

@pytest.mark.parametrize("mb", [100, 300])
@pytest.mark.parametrize("every", [.05, 3600])
def test_memory_gone_at_once_is_found(mb, every):
    if every > 1 and sys.platform != "linux": pytest.skip("the mark of a started program is inherited elsewhere")
    assert abs(grown(f"np.ones({mb * 125_000})", every) - mb) < .1 * mb


def test_memory_of_a_child_counts_and_what_is_shared_counts_once():
    if sys.platform != "linux": pytest.skip("fork")
    fork = "import os, time; a = np.ones(25_000_000); pid = os.fork()\n    if pid == 0: {}time.sleep(1.5); os._exit(0)\n    os.waitpid(pid, 0)"
    assert abs(grown(fork.format("")) - 200) < 20, "the child shares the 200 MB of its parent"
    assert abs(grown(fork.format("b = np.ones(12_500_000); ")) - 300) < 30, "100 MB are its own"


def test_an_old_peak_is_not_reported():
    np.ones(25_000_000)
    with Meter() as m: pass
    assert m.read()["peak_memory_mb"] - m.read()["start_memory_mb"] < 20


# energy

@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.integers(0, 999), min_size=1, max_size=8), start=st.integers(0, 999))
def test_joules_are_the_sum_of_the_steps_however_often_the_counter_starts_again(tmp_path_factory, steps, start):
    root = tmp_path_factory.mktemp("cap")
    zone(root, "intel-rapl:0", "package-0", start)
    s = record._Samples(root)
    for i in range(len(steps)):
        zone(root, "intel-rapl:0", "package-0", (start + sum(steps[:i + 1])) % 1000); s.look()
    assert s.joules["package-0"] == pytest.approx(sum(steps) / 1e6)


def test_parts_of_a_package_and_the_whole_platform_are_not_added(tmp_path):
    for name, kind in [("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram"), ("intel-rapl:1:1", "dram"), ("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0")]:
        zone(tmp_path, name, kind, 0, 10**9)
    with Meter(every=3600, powercap=tmp_path) as m:
        for i, z in enumerate(sorted(tmp_path.iterdir())): (z / "energy_uj").write_text("1000000")
    assert m.read()["energy_of"] == {"package-0": 1, "package-1": 1, "dram of intel-rapl:0": 1, "dram of intel-rapl:1": 1} and m.read()["energy_j"] == 4


def test_what_is_not_told_has_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_nvml", lambda: None)
    def read(root):
        with Meter(powercap=root) as m: pass
        return m.read()["energy_j"], m.read()["energy_note"]
    assert read(tmp_path / "absent") == (None, f"this machine has no energy counter in {tmp_path / 'absent'}")
    zone(tmp_path, "intel-rapl:0", "package-0", "1"); (tmp_path / "intel-rapl:0/energy_uj").write_text("")
    assert read(tmp_path)[0] is None and "cannot be read (ValueError)" in read(tmp_path)[1]
    def denied(self, *a, **k): raise PermissionError
    monkeypatch.setattr(record, "_rapl", denied)
    assert read(tmp_path) == (None, "the processor's energy counter may be read by root only")


class Nvml:  # three cards, as the library's C functions answer; the third does not count its energy
    joules = [10., 20., 0.]
    def nvmlDeviceGetCount_v2(self, n): n._obj.value = 3; return 0
    def nvmlDeviceGetHandleByIndex_v2(self, i, h): h._obj.value = i.value + 1; return 0 if i.value < 3 else 2
    def nvmlDeviceGetHandleByUUID(self, uuid, h): h._obj.value = 2; return 0 if uuid == b"GPU-b" else 6
    def nvmlSystemGetDriverVersion(self, text, n): text.value = b"580.1"; return 0
    def nvmlDeviceGetName(self, h, text, n): text.value = b"Card %d" % h.value; return 0
    def nvmlDeviceGetMemoryInfo(self, h, m): m[0] = 80 * 10**9; return 0
    def nvmlDeviceGetTotalEnergyConsumption(self, h, mj): mj._obj.value = int(self.joules[h.value - 1] * 1e3); return 0 if h.value < 3 else 3


@pytest.mark.parametrize("visible, cards", [(None, "0 1 2"), ("1", "1"), ("2,0", "2 0"), ("", ""), ("-1", ""), ("GPU-b", "GPU-b"), ("0,9,1", "0")])
def test_cards_are_those_this_process_may_use(monkeypatch, visible, cards):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list(record._handles(Nvml())) == cards.split() and [g["memory_gb"] for g in record._gpus(Nvml())] == [80.] * len(cards.split())
    assert set(record._cards(Nvml())) == {f"GPU {c}" for c in cards.split() if c != "2"}


def test_energy_of_cards_counts_only_where_torch_uses_them(monkeypatch, tmp_path):
    lib, cuda = Nvml(), type("cuda", (), dict(is_initialized=lambda: True, device_count=lambda: 2, max_memory_allocated=lambda i: [3e6, 7e6][i], reset_peak_memory_stats=lambda i: None))
    monkeypatch.setattr(record, "_nvml", lambda: lib); monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    def used():
        lib.joules = [10., 20., 0.]
        with Meter(every=3600, powercap=tmp_path) as m: lib.joules = [15., 21., 0.]
        return m.read()
    monkeypatch.setattr(record, "_torch_on_gpu", lambda: None)
    assert used()["energy_j"] is None and used()["gpu_peak_memory_mb"] is None
    monkeypatch.setattr(record, "_torch_on_gpu", lambda: type("torch", (), dict(cuda=cuda)))
    assert used()["energy_of"] == {"GPU 0": 5., "GPU 1": 1.} and used()["gpu_peak_memory_mb"] == 7 and "no energy counter" in used()["energy_note"]


# the meter

def test_a_meter_stops_and_goes_away():
    def threads(): return sum(t.name == "htlab-meter" for t in threading.enumerate())
    before = threads()
    with Meter(every=.01) as m: pass
    a = m.read(); assert a == m.read() and set(a) == {"wall_s", "cpu_s", "start_memory_mb", "peak_memory_mb", "gpu_peak_memory_mb", "energy_j", "energy_of", "energy_note"}
    lost = Meter(every=.01).start(); assert "wall_s" in str(lost) and "<table>" in lost._repr_html_()
    del lost; gc.collect()
    until = time.monotonic() + 20
    while threads() > before and time.monotonic() < until: time.sleep(.02)
    assert threads() <= before, "a meter that nobody holds is not sampled"
    with pytest.raises(ValueError, match="has not been started"): Meter().read()
    with pytest.raises(ValueError, match="every=-1"): Meter(every=-1)


def test_time_of_children_counts():
    with Meter() as m: subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < .5: pass"], check=True)
    assert m.read()["cpu_s"] >= .5 and m.read()["wall_s"] >= .5


# machine and lock

def test_the_machine_is_json_and_no_larger_than_the_system_says():
    import json
    m = machine()
    assert json.loads(json.dumps(m)) == m and 0 < m["cores"] <= os.cpu_count() and m["cpu"] and m["os"]
    m["cores"] = 0; assert machine()["cores"] > 0, "a copy"


@pytest.mark.parametrize("groups, limits", [({"": "max"}, []), ({"a/b": "max 100000", "a": "50000 100000"}, [["50000", "100000"]]), ({"a/b": "100000 100000", "": "400000 100000"}, [["100000", "100000"], ["400000", "100000"]]), ({"other": "1 100000"}, [])])
def test_limits_of_the_groups_around_count(tmp_path, groups, limits):
    (tmp_path / "proc").write_text("12:cpu:/old\n0::/a/b\n"); root = tmp_path / "cgroup"
    for g, text in groups.items(): (root / g).mkdir(parents=True, exist_ok=True); (root / g / "cpu.max").write_text(text + "\n")
    assert record._limits("cpu.max", tmp_path / "proc", str(root)) == limits and record._limits("cpu.max", tmp_path / "absent", str(root)) == []


def test_the_lock_is_read_as_pip_reads_it(tmp_path, monkeypatch):
    lock = tmp_path / "requirements.lock"
    for name, version in [("Some_Package", "1.0"), ("torch", "2.9.0+cpu"), ("pre", "3.0rc1")]: (tmp_path / "site" / f"{name}-{version}.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), str(tmp_path / "absent"), *sys.path])
    lock.write_text("# made by hand\nsome-package==1.0\n    # via x\ntorch==2.9.0\npre==3.0rc1\nabsent==1 ; python_version < '3'\n"); a = lock_hash(lock)
    assert lock_differs(lock) == {}
    lock.write_text("some-package==1.1\nabsent==1\n")
    assert lock_differs(lock) == {"some-package": ("1.1", "1.0"), "absent": ("1", None)} and lock_hash(lock) != a
    assert lock_hash(tmp_path / "no.lock") is None and lock_differs(tmp_path / "no.lock") == {}
