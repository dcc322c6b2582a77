"Laws of htlab.launch, and of evaluation in several processes: the same result as in one, a failure that is named, and nobody left behind."
import os, shlex, signal, socket, subprocess, sys, threading, time

import cloudpickle
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import BIN
from hypothesis import given, strategies as st
from torch import nn
from torch.distributed.run import get_args_parser

from htlab.evaluate import auroc_score, dice_score, evaluate_classification, evaluate_segmentation, loglik_score
from htlab.launch import LaunchFailed, command, everywhere, fit_on, launch
from htlab.report import execute
from htlab.train import TrainConfig, fit

cloudpickle.register_pickle_by_value(sys.modules[__name__])    # as what a notebook defines
CONFIG = TrainConfig(epochs=3, batch_size=4, lr=.02, validate_every=1, patience=0, device='cpu', seed=3)


class Squares:
    "Noisy squares in images of 8 x 8, whose native size is 16 x 16."
    def __init__(self, n=23): self.n = n
    def __len__(self): return self.n
    def native_mask(self, i):
        m = np.zeros((16, 16), bool); side = i % 4 * 3
        m[3:3 + side, 4:4 + side] = True
        return m
    def __getitem__(self, i):
        mask = torch.tensor(self.native_mask(i)[::2, ::2])
        noise = torch.tensor(np.random.default_rng(i).standard_normal((3, 8, 8)), dtype=torch.float32)
        return dict(image=mask + .5 * noise, mask=mask.long(), label=int(i % 4 > 1), id=str(i))
    def to_native(self, p, i): return nn.functional.interpolate(p[None], size=(16, 16), mode='bilinear')[0]
    def row(self, i): return dict(id=str(i), group=f'g{i // 2}', label=['small', 'large'][i % 4 > 1], spacing_mm=.5 if i % 3 else None)

class Pixels(nn.Module):
    "A convolution, the mask, and with `whole` the class of the image instead."
    def __init__(self, whole=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.whole = nn.Conv2d(3, 2, 3, padding=1), whole
    def output(self, batch): return self.conv(batch['image']).mean((2, 3)) if self.whole else self.conv(batch['image'])
    def predict(self, batch):
        if getattr(self, 'bad', None) in batch['id']: raise ValueError(f'id {self.bad} is bad')
        with torch.no_grad(): return self.output(batch).softmax(1)
    def forward(self, batch): return dict(loss=nn.functional.cross_entropy(o := self.output(batch), batch['label' if self.whole else 'mask']), output=o)

def job(folder):
    "What one process does alone or several together: train, evaluate, fail."
    segment, classify, data = Pixels(), Pixels(whole=True), Squares()
    history = fit(segment, Squares(23), Squares(9), CONFIG, folder, score=dice_score, progress=False)
    weights = {k: v.clone() for k, v in segment.state_dict().items()}
    torch.manual_seed(1)
    with torch.no_grad(): [p.copy_(torch.randn_like(p)) for t in (segment, classify) for p in t.parameters()]    # the same for all: rows must not differ in a bit
    rows = [evaluate_segmentation(segment, data, batch_size=4, progress=False), evaluate_segmentation(segment, data, batch_size=50, empty='nan', progress=False),
            evaluate_classification(classify, data, batch_size=3, progress=False)]
    scores = [dice_score(segment, data, 5), auroc_score(classify, data, 5), loglik_score(classify, data, 5)]
    said = []
    for wrong in (dict(bad='21', training=True), dict(bad='3', training=False)):
        vars(segment).update(wrong)
        try: evaluate_segmentation(segment, data, batch_size=4, progress=False)
        except ValueError as e: said.append((str(e), segment.training))
    return history, weights, rows, scores, said

def same(one, many, tolerance=1e-6):
    history, weights, rows, scores, said = one
    for i, (h, w, r, s, e) in enumerate(many):
        pd.testing.assert_frame_equal(h.drop(columns='seconds'), history.drop(columns='seconds'), check_exact=False, rtol=0, atol=tolerance)
        assert h.attrs['best_epoch'] == history.attrs['best_epoch']
        for k in weights: torch.testing.assert_close(w[k], weights[k], rtol=0, atol=tolerance)
        for a, b in zip(r, rows): pd.testing.assert_frame_equal(a, b, check_exact=True)
        assert s == scores
        assert [t for _, t in e] == [True, False]    # every process had the error, and its task is in the mode it was in
        owner = (21 // 4 % 2, 3 // 4 % 2)
        assert [t for t, _ in e] == [f'id {b} is bad' if i == o else f'process {o}: id {b} is bad' for b, o in zip((21, 3), owner)]

@pytest.fixture(scope='module')
def one(tmp_path_factory): return job(tmp_path_factory.mktemp('one'))

def test_two_processes_are_one(one, tmp_path, capsys):
    "Training within rounding, evaluation bit by bit, in every process the same, errors too."
    same(one, everywhere(2, job, tmp_path / 'run', progress=False))
    assert capsys.readouterr() == ('', '') and sorted(p.name for p in (tmp_path / 'run').iterdir()) == ['best.safetensors', 'history.csv', 'last.ckpt']

def test_accelerate_launch(one, tmp_path):
    "The same two processes, started by accelerate."
    (tmp_path / 'program.py').write_text('import sys\nfrom htlab.launch import _called\n_called(sys.argv[1])\n')
    torch.save((job, (tmp_path / 'run',), {}), tmp_path / 'call', pickle_module=cloudpickle, pickle_protocol=5)
    line = [BIN / 'accelerate', 'launch', '--multi_gpu', '--num_processes=2', '--num_machines=1', '--mixed_precision=no', '--dynamo_backend=no', '--main_process_port=0', tmp_path / 'program.py', tmp_path]
    run = subprocess.run(line, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', HF_HOME=str(tmp_path)))
    assert run.returncode == 0, run.stderr[-2000:]
    same(one, [torch.load(tmp_path / f'answer{r}', weights_only=False) for r in range(2)])


class Stop:
    "A data set that is interrupted in epoch 2."
    def __init__(self): self.data = Squares(23)
    def __len__(self): return len(self.data)
    def set_epoch(self, epoch): self.epoch = epoch
    def __getitem__(self, i):
        if self.epoch == 2: raise RuntimeError('stopped\nin epoch 2')
        return self.data[i]

def test_fit_on_goes_on(one, tmp_path):
    "Stopped in epoch 2 and taken up again by two processes: the history and the weights of one, in the task that was given; another number of processes is refused."
    with pytest.raises(LaunchFailed, match=r'^process [01]: RuntimeError: stopped \[.*launch\.log\]$'): fit_on(2, Pixels(), Stop(), Squares(9), CONFIG, tmp_path, dice_score, progress=False)
    assert 'in epoch 2' in (tmp_path / 'launch.log').read_text()
    history = fit_on(2, task := Pixels().train(), Squares(23), Squares(9), CONFIG, tmp_path, dice_score, progress=False)
    pd.testing.assert_frame_equal(history.drop(columns='seconds'), one[0].drop(columns='seconds'), rtol=0, atol=1e-6)
    assert history.attrs == pytest.approx(one[0].attrs) and not task.training and not (tmp_path / 'launch.log').exists()
    for k, v in task.state_dict().items(): torch.testing.assert_close(v, one[1][k], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="processes=2, asked is processes=1"): fit_on(1, Pixels(), Squares(23), Squares(9), CONFIG, tmp_path, progress=False)

def test_segment_on_two_processes(tmp_path):
    "The template: a complete run folder, and the metrics of one process."
    one, two = (execute('segment', dict(limit=4, epochs=1, adapter='none', processes=p), tmp_path, progress=False) for p in (1, 2))
    assert sorted(f.name for f in one.path.iterdir()) == sorted(f.name for f in two.path.iterdir())
    for m in ('dice', 'hd95'): assert two.metrics[m]['value'] == pytest.approx(one.metrics[m]['value'], rel=1e-3, abs=1e-3)
    np.testing.assert_allclose(two.history.train_loss, one.history.train_loss, rtol=1e-5)
    assert 'output_stderr' not in two.report.read_text(encoding='utf-8').split('<body>')[1]


# starting and ending

names = st.text('abc_/.', min_size=1).map(lambda t: t + '.py')

@given(names, st.lists(st.text('-xy =', min_size=1), max_size=3), st.integers(1, 64), st.integers(1, 9), st.data())
def test_torchrun_reads_what_command_says(program, args, processes, nodes, data):
    rank = data.draw(st.integers(0, nodes - 1))
    where = data.draw(st.sampled_from(['node0:29500', '10.0.0.1:1'] + [''] * (nodes == 1)))
    line = command(program, args, processes, nodes, rank, where)
    assert line[:3] == [sys.executable, '-m', 'torch.distributed.run'] and shlex.split(shlex.join(line)) == line
    read = get_args_parser().parse_args(line[3:])
    assert (read.nnodes, read.nproc_per_node, read.node_rank, read.module, read.training_script) == (str(nodes), str(processes), rank, True, 'htlab.launch')
    assert read.training_script_args == [program, *args]
    assert (f'{read.master_addr}:{read.master_port}' == where) if where else read.rdzv_endpoint.startswith('127.0.0.1:')

@pytest.mark.parametrize('wrong', [dict(processes=0), dict(processes=True), dict(nodes=1.5), dict(node_rank=1), dict(nodes=2, rendezvous='a:1', node_rank=2), dict(nodes=2), dict(rendezvous='a')])
def test_command_refuses(wrong):
    with pytest.raises(ValueError) as e: command('a.py', **wrong)
    text = str(e.value)
    assert '\n' not in text and any(f'{k}={v!r}' in text for k, v in wrong.items())

def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.py'): launch(tmp_path / 'none.py')
    with pytest.raises(ValueError, match='processes=0'): fit_on(0, Pixels(), Squares(), None, CONFIG, tmp_path)

def program(tmp_path, text):
    (tmp_path / 'program.py').write_text(text)
    return tmp_path / 'program.py'

def test_two_nodes(tmp_path):
    "Two machines, here both this one: four processes that know of each other."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    p = program(tmp_path, "import os, sys, torch.distributed as d\nd.init_process_group('gloo')\nx = [None] * d.get_world_size()\nd.all_gather_object(x, os.environ['GROUP_RANK'])\nprint(*x, *sys.argv[1:])")
    said = {}
    def node(n): said[n] = launch(p, ['--a', 'b c'], processes=1, nodes=2, node_rank=n, rendezvous=f'127.0.0.1:{port}', progress=False)
    both = [threading.Thread(target=node, args=(n,)) for n in (1, 0)]
    for t in both: t.start()
    for t in both: t.join(120)
    assert said == {n: f'[{n}] 0 1 --a b c\n' for n in (0, 1)}

def test_the_first_failure_is_named(tmp_path):
    "One that raises while the other waits for it; and one that is killed, which cannot say so itself."
    p = program(tmp_path, "import os, sys, signal, torch.distributed as d\nd.init_process_group('gloo')\nif d.get_rank() == 1:\n    if sys.argv[1] == 'raise': {}['a\\nb']\n    os.kill(os.getpid(), signal.SIGKILL)\nd.barrier()")
    for how, words in ('raise', "process 1: KeyError: 'a"), ('kill', 'process 1 was killed by signal 9 (SIGKILL)'):
        with pytest.raises(LaunchFailed) as e: launch(p, [how], log=tmp_path / 'log', progress=False)
        assert str(e.value).startswith(words) and str(e.value).endswith(f'[what all 2 said: {tmp_path}/log]') and '\n' not in str(e.value)

@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL], ids=['ctrl-c', 'killed'])
def test_nobody_is_left(tmp_path, how):
    "Whoever called `launch` is interrupted or killed: torchrun and all its processes end."
    p = program(tmp_path, f"import os, pathlib, time\npathlib.Path({str(tmp_path)!r}, 'pid' + os.environ['RANK']).write_text(f'{{os.getpid()}} {{os.getppid()}}')\ntime.sleep(300)")
    caller = subprocess.Popen([sys.executable, '-c', f'from htlab.launch import launch; launch({str(p)!r}, progress=False, log={str(tmp_path / "log")!r})'], stderr=subprocess.PIPE, text=True)
    def pids(): return {int(n) for f in tmp_path.glob('pid*') for n in f.read_text().split()}
    until = time.monotonic() + 120
    while len(pids()) < 3 and time.monotonic() < until: time.sleep(.2)
    assert len(all_ := pids()) == 3, (tmp_path / 'log').read_text()
    caller.send_signal(how)
    assert ('KeyboardInterrupt' in caller.communicate(timeout=30)[1]) == (how == signal.SIGINT)
    alive = lambda: [n for n in all_ if psutil.pid_exists(n) and psutil.Process(n).status() != psutil.STATUS_ZOMBIE]
    until = time.monotonic() + 60
    while alive() and time.monotonic() < until: time.sleep(.2)
    assert not alive()
