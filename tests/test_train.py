"Laws of htlab.train: nothing lost, nothing half, nothing frozen moves, the same result however a run came about."
import copy, json, multiprocessing, os, pickle, random, signal, socket, subprocess, sys, time, traceback
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn
from htlab.pace import fastest
from htlab.train import TrainConfig, batches, cosine_lr, fit, load_best, param_groups, seed_everything

torch.set_num_threads(1)


class Data:
    "Noisy points; jitter is a pure function of (epoch, index). `hang=(epoch, i)`: say so, then sleep; `stop`: KeyboardInterrupt."
    def __init__(self, n=24, hang=None, stop=None):
        self.x = np.random.default_rng(0).standard_normal((n, 4)).astype('float32')
        self.y, self.epoch, self.hang, self.stop = (self.x[:, 0] > 0).astype(int), 0, hang, stop
    def __len__(self): return len(self.x)
    def set_epoch(self, epoch): self.epoch = epoch
    def __getitem__(self, i):
        if self.stop == (self.epoch, i): raise KeyboardInterrupt
        if self.hang == (self.epoch, i): hang()
        noise = np.random.default_rng((self.epoch, i)).standard_normal(4).astype('float32')
        return dict(image=torch.tensor(self.x[i] + .1 * noise), label=int(self.y[i]), text='a', id=str(i))

class Toy(nn.Module):
    "A frozen layer in eval mode, a BatchNorm (moving buffers), dropout, a layer behind the last tap (no gradient)."
    def __init__(self, dropout=.2, norm=True, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 2))
        self.behind = nn.Linear(2, 2)
        self.register_buffer('grid', torch.arange(3.), persistent=False)
    def train(self, mode=True):
        super().train(mode); self.base.eval(); return self
    def forward(self, batch):
        out = self.head(self.base(batch['image']))
        return dict(loss=nn.functional.cross_entropy(out, batch['label']), output=out)

def score(task, data):
    with torch.no_grad():
        batch = torch.utils.data.default_collate([data[i] for i in range(len(data))])
        return -task(batch)['loss'].item() + 1e-3 * random.random()   # a score that draws random numbers must not break a resume

CONFIG = TrainConfig(epochs=6, batch_size=5, lr=.02, accumulate=2, validate_every=2, device='cpu', seed=3)

def run(folder, task=None, train=None, config=CONFIG, score=score, valid=True):
    task = task or Toy()
    return fit(task, train or Data(), Data(10) if valid else None, config, folder, score=score, progress=False), task

def same(a, b):
    (ha, ta), (hb, tb) = a, b
    pd.testing.assert_frame_equal(ha.drop(columns='seconds'), hb.drop(columns='seconds'), check_exact=True)
    for (k, v), w in zip(ta.state_dict().items(), tb.state_dict().values()): assert torch.equal(v, w), k

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp('alone')
    return folder, *run(folder)


# ---- interruption -------------------------------------------------------------------------------------------------

def hang(): Path(os.environ['HANG_FLAG']).touch(); time.sleep(100)

def child(folder, how, flag):
    "What the killed process runs: hang at the place `how`, and wait for the SIGKILL."
    os.environ['HANG_FLAG'] = str(flag)
    fsync, rename, seen = os.fsync, os.replace, []
    def half(fd):   # while last.ckpt of epoch 3 is being written: half of it is in the file
        fsync(fd); seen.append(fd)
        if len(seen) == 3 * 1 + 1 + 1: os.truncate(fd, os.fstat(fd).st_size // 2); hang()
    def before_rename(a, b):
        if str(b).endswith('last.ckpt') and Path(folder, 'best.safetensors').stat().st_mtime_ns != began: hang()
        rename(a, b)
    began = Path(folder, 'best.safetensors').stat().st_mtime_ns if how == 'rename' else 0
    if how == 'write': os.fsync = half
    if how == 'rename': os.replace = before_rename   # best.safetensors is new, last.ckpt still old
    run(folder, train=Data(hang=(2, 7)) if how == 'epoch' else None)

def forked(target, *args):
    "Run in a fork (no second import of torch); its exit code is 1 after an exception."
    def body():
        try: target(*args)
        except BaseException: traceback.print_exc(); os._exit(1)
        os._exit(0)
    p = multiprocessing.get_context('fork').Process(target=body)
    p.start()
    return p

forks = pytest.mark.skipif(sys.platform != 'linux', reason='forks')

@pytest.mark.parametrize('first', [pytest.param('fresh', id='mid-epoch-in-a-fresh-process'), pytest.param('fork', marks=forks, id='and-in-both-kinds-of-write')])
def test_sigkill(tmp_path, alone, first):
    folder, flag, lived = tmp_path / 'run', tmp_path / 'flag', []
    for how in ['epoch'] if first == 'fresh' else ['epoch', 'write', 'rename']:
        flag.unlink(missing_ok=True)
        if first == 'fresh': p = subprocess.Popen([sys.executable, __file__, folder, how, flag]); alive = lambda: p.poll() is None
        else: p = forked(child, folder, how, flag); alive = p.is_alive
        while not flag.exists() and alive(): time.sleep(.02)
        assert alive()
        os.kill(p.pid, signal.SIGKILL)
        p.wait() if first == 'fresh' else p.join()
        lived.append(len(pd.read_csv(folder / 'history.csv')))
    assert lived[0] == 1 and lived == sorted(lived) and lived[-1] < CONFIG.epochs
    if first == 'fork': assert list(folder.glob('.*.partial'))     # the kill did hit a write
    again = run(folder)
    same(again, alone[1:])
    assert not list(folder.glob('.*'))
    a, b = load_file(folder / 'best.safetensors'), load_file(alone[0] / 'best.safetensors')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    csv = [pd.read_csv(f / 'history.csv').drop(columns='seconds') for f in (folder, alone[0])]
    pd.testing.assert_frame_equal(*csv, check_exact=True)

@pytest.mark.parametrize('epoch', [1, 2, 6])
def test_stop_button_then_same_cell_again(tmp_path, alone, epoch):
    task = Toy()
    with pytest.raises(KeyboardInterrupt): run(tmp_path, task, Data(stop=(epoch, 3)))
    same(run(tmp_path, task), alone[1:])                    # the same spoilt object goes on from the last finished epoch

def test_finished_run_is_only_read(tmp_path, alone):
    a, b = run(tmp_path), None
    stamp = (tmp_path / 'last.ckpt').stat().st_mtime_ns
    b = run(tmp_path, Toy(seed=0), Data(stop=(1, 0)))       # would be interrupted if it trained
    same(a, b); same(a, alone[1:])
    assert (tmp_path / 'last.ckpt').stat().st_mtime_ns == stamp and a[0].equals(b[0])

def test_workers_see_the_epoch(tmp_path, alone): same(run(tmp_path, config=replace(CONFIG, workers=2))[:2], alone[1:])


# ---- what changes, what is saved -----------------------------------------------------------------------------------

def test_frozen_stays_learned_is_saved(alone):
    folder, history, task = alone
    before, after, saved = Toy().state_dict(), task.state_dict(), load_file(folder / 'best.safetensors')
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    learn = {k for k, p in task.named_parameters() if p.requires_grad}
    assert moved == {k for k in before if k.startswith('head.')}         # with the BatchNorm's running means
    assert learn <= saved.keys() and moved <= saved.keys() and not any(k.startswith('base') for k in saved)
    ckpt = torch.load(folder / 'last.ckpt', weights_only=True)
    assert not any(k.startswith('base') for k in ckpt['learned'])
    assert not task.training and '_is_accelerate_prepared' not in vars(task) and 'forward' not in vars(task)
    fresh = Toy(); head = load_best(fresh, folder)
    assert head['epoch'] == history.attrs['best_epoch'] and head['score'] == history.attrs['best_score'] == history.score.max()
    assert head['config']['lr'] == CONFIG.lr
    for k, v in fresh.state_dict().items(): assert torch.equal(v, after[k])

def test_only_matrices_decay():
    decay, plain = param_groups(Toy(), .3)
    assert decay['weight_decay'] == .3 and plain['weight_decay'] == 0
    assert all(p.ndim >= 2 and p.requires_grad for p in decay['params']) and all(p.ndim < 2 and p.requires_grad for p in plain['params'])
    assert len(decay['params']) + len(plain['params']) == sum(p.requires_grad for p in Toy().parameters())

def test_history_columns_and_validation_days(tmp_path):
    history, _ = run(tmp_path, config=replace(CONFIG, epochs=5, validate_every=3))
    assert list(history) == ['epoch', 'lr', 'train_loss', 'valid_loss', 'score', 'seconds']
    assert history.epoch[history.score.notna()].tolist() == history.epoch[history.valid_loss.notna()].tolist() == [3, 5]

@pytest.mark.parametrize('scores, best, length', [([1, 3, 3, 2], 2, 4), ([5, 1, 2, 3], 1, 3), ([None] * 4, 4, 4), ([float('nan'), 1, 1, 1], 2, 4)])
def test_best_ties_and_early_stopping(tmp_path, scores, best, length):
    "Ties keep the earlier; two validations without a gain stop; without a score the last epoch is the best."
    kept, say = [], iter(scores)
    def given(task, data):
        kept.append(copy.deepcopy(task.state_dict()))
        return next(say)
    history, task = run(tmp_path, config=replace(CONFIG, epochs=4, validate_every=1, patience=2), score=None if scores[0] is None else given, valid=False)
    assert history.attrs['best_epoch'] == best and len(history) == length and 'valid_loss' not in history
    if kept: assert all(torch.equal(v, task.state_dict()[k]) for k, v in kept[best - 1].items())


def test_auto_is_the_training_it_chose(tmp_path, monkeypatch):
    "Bit by bit, also when it is interrupted and taken up again; it is asked for once."
    asked = []
    def choose(task, batch, updates):
        asked.append((len(batch["image"]), updates))
        return fastest(task, batch, updates, steps=1)
    monkeypatch.setattr("htlab.train.fastest", choose)
    auto = replace(CONFIG, precision="auto")
    with pytest.raises(KeyboardInterrupt): run(tmp_path / "auto", train=Data(stop=(4, 3)), config=auto)
    got = run(tmp_path / "auto", config=auto)
    assert asked == [(5, 6 * 3)] and got[0].attrs["precision"] in ("fp32", "bf16") and got[0].attrs["torch_compile"] is False
    same(got, run(tmp_path / "named", config=replace(CONFIG, precision=got[0].attrs["precision"])))
    for name in ("precision", "torch_compile"): assert fit(Toy(), Data(), None, replace(CONFIG, epochs=1), tmp_path / "plain", progress=False).attrs[name] == getattr(CONFIG, name)


def test_compiled_training_learns_the_same(tmp_path):
    "Without dropout, whose masks a compiler draws otherwise. On a CPU only asked for by name."
    config = replace(CONFIG, epochs=2)
    a, b = run(tmp_path / "a", Toy(dropout=0.), config=config, score=None), run(tmp_path / "b", Toy(dropout=0.), config=replace(config, torch_compile=True), score=None)
    assert b[0].attrs["torch_compile"] and b[1]._compiled_call_impl is None
    np.testing.assert_allclose(a[0].train_loss, b[0].train_loss, rtol=1e-5)


# ---- the arithmetic ------------------------------------------------------------------------------------------------

@given(n=st.integers(1, 60), b=st.integers(1, 9), k=st.integers(1, 4), epoch=st.integers(1, 9), seed=st.integers(0, 99))
def test_plan_is_a_permutation_in_updates(n, b, k, epoch, seed):
    config = TrainConfig(batch_size=b, accumulate=k, seed=seed)
    plan = batches(n, config, epoch)
    flat = [i for update in plan for rows in update for i in rows]
    assert sorted(flat) == list(range(n)) and plan == batches(n, config, epoch)
    assert flat == [i for u in batches(n, TrainConfig(batch_size=b * k, seed=seed), epoch) for rows in u for i in rows]
    assert len(plan) == -(-n // (b * k)) and all(len(rows) == b for rows in [r for u in plan for r in u][:-1])

def test_orders_differ_by_epoch_and_seed():
    orders = {str(batches(30, TrainConfig(seed=s), e)) for s in range(3) for e in range(1, 4)}
    assert len(orders) == 9

@settings(max_examples=8)
@given(n=st.integers(3, 30), b=st.integers(1, 6), k=st.integers(2, 4))
def test_accumulation_is_a_larger_batch(tmp_path_factory, n, b, k):
    "Also where the last update is smaller and the last batch not full."
    out = []
    for c in (dict(batch_size=b, accumulate=k), dict(batch_size=b * k)):
        task = Toy(dropout=0, norm=False).double()
        data = Data(n); data.x = data.x.astype('float64')
        history, _ = run(tmp_path_factory.mktemp('acc'), task, data, TrainConfig(epochs=2, lr=.01, device='cpu', **c), score=None, valid=False)
        out.append((history.train_loss.to_numpy(), torch.cat([p.detach().flatten() for p in task.parameters()])))
    np.testing.assert_allclose(out[0][0], out[1][0], rtol=1e-5)
    torch.testing.assert_close(out[0][1], out[1][1], rtol=0, atol=1e-6)

class Pairs(Toy):
    "A loss over all pairs of the update's images; `joint` tells each batch of the others, those of other processes too."
    calls = 0
    def embed(self, batch): return self.head(self.base(batch['image']))
    def forward(self, batch):
        x = self.embed(batch)
        x = torch.cat([x, batch.get('others', x[:0])])
        return dict(loss=(x @ x.T - 1).square().mean(), output=x)
    def joint(self, parts):
        self.calls += 1
        with torch.no_grad(): seen = [self.embed(b) for b in parts]
        far = []
        if torch.distributed.is_initialized():
            torch.distributed.all_gather_object(every := [None] * torch.distributed.get_world_size(), torch.cat(seen))
            far = [e for r, e in enumerate(every) if r != torch.distributed.get_rank()]
        for i, b in enumerate(parts): yield b | dict(others=torch.cat([seen[0][:0], *seen[:i], *seen[i + 1:], *far]))

def pairs(folder, task=None, **c):
    task = task or Pairs(dropout=0, norm=False)
    return run(folder, task, config=replace(CONFIG, **dict(epochs=2, batch_size=8, accumulate=1) | c), score=None, valid=False)

def test_a_joint_loss_sees_the_whole_update(tmp_path):
    "Its update is that of one large batch (also a last one that is smaller); without `joint` it would not be, and with one batch an update nobody asks."
    Plain = type('Plain', (Pairs,), dict(joint=property()))          # has no attribute joint
    assert not hasattr(Plain(), 'joint')
    (ha, a), (hb, b), (hc, c) = pairs(tmp_path / 'a', batch_size=16), pairs(tmp_path / 'b', batch_size=4, accumulate=4), pairs(tmp_path / 'c', Plain(dropout=0, norm=False), batch_size=4, accumulate=4)
    flat = lambda t: torch.cat([p.detach().flatten() for p in t.parameters()])
    assert a.calls == 0 and b.calls == 4
    np.testing.assert_allclose(ha.train_loss, hb.train_loss, rtol=1e-4)
    torch.testing.assert_close(flat(a), flat(b), rtol=0, atol=1e-4)
    assert (flat(a) - flat(c)).abs().max() > 1e-2

@given(lr=st.floats(1e-6, 1), part=st.floats(0, 1), total=st.integers(1, 60))
def test_cosine_is_torch_s_and_falls(lr, part, total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=lr * part)
    ours, theirs = [cosine_lr(t, total, lr, lr * part) for t in range(total)], []
    for _ in range(total): theirs.append(optimizer.param_groups[0]['lr']); optimizer.step(); scheduler.step()
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12)
    assert ours[0] == pytest.approx(lr) and all(a >= b * (1 - 1e-12) for a, b in zip(ours, ours[1:]))

def test_lr_of_the_history(alone):
    per_epoch = len(batches(24, CONFIG, 1))
    assert alone[1].lr.tolist() == [cosine_lr(e * per_epoch - 1, 6 * per_epoch, CONFIG.lr, CONFIG.min_lr) for e in range(1, 7)]

def test_clipping_bounds_the_step(tmp_path):
    "The optimiser is handed a gradient no longer than `clip`."
    norms, step = [], torch.optim.AdamW.step
    def spy(self, *a, **k):
        norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g['params'] if p.grad is not None]).norm().item())
        return step(self, *a, **k)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.optim.AdamW, 'step', spy)
        run(tmp_path / 'a', config=replace(CONFIG, clip=.05)); clipped = max(norms); norms.clear()
        run(tmp_path / 'b', config=replace(CONFIG, clip=0)); free = max(norms)
    assert clipped <= .05 * 1.001 < free

def test_seed_everything():
    draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())
    seed_everything(5); a = draw(); seed_everything(5)
    assert draw() == a
    seed_everything(6)
    assert all(x != y for x, y in zip(draw(), a))

def test_precisions_share_a_process_and_leave_accelerate_alone(tmp_path, alone):
    AcceleratorState._reset_state(True)
    mine = Accelerator(cpu=True, mixed_precision='bf16')
    bf16 = run(tmp_path / 'bf16', config=replace(CONFIG, precision='bf16'))
    same(run(tmp_path / 'fp32', copy.deepcopy(Toy())), alone[1:])
    assert mine.mixed_precision == 'bf16' and AcceleratorState().mixed_precision == 'bf16' and PartialState().initialized
    AcceleratorState._reset_state(True)
    diff = (bf16[0].train_loss - alone[1].train_loss).abs().max()
    assert 1e-6 < diff < .1 and next(bf16[1].head.parameters()).dtype == torch.float32

def test_progress_goes_to_stderr(tmp_path, capsys):
    fit(Toy(), Data(), None, replace(CONFIG, epochs=2), tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert not out and 'epoch 2/2' in err and '100%' in err
    run(tmp_path / 'quiet')
    assert capsys.readouterr() == ('', '')

def rank(folder, rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), OMP_NUM_THREADS='1')
    for name in 'ab':   # twice in one process
        history, task = run(folder / name, Toy(dropout=0, norm=False), Data(21), TWO, score=lambda *a: rank + 1.)
        assert history.score.dropna().tolist() == [1.] and type(task) is Toy
    pairs(folder / 'pairs')
    halt, uneven = Data(23), replace(TWO, batch_size=6)    # the last batch, of five, does not divide; nor do those of the runs above, whose last one leaves a process without an image
    halt.set_epoch = lambda e: (_ for _ in ()).throw(KeyboardInterrupt) if e == 2 else None
    with pytest.raises(KeyboardInterrupt): run(folder / 'c', train=halt, config=uneven)
    steady = Data(23); steady.set_epoch = lambda e: None
    same(run(folder / 'c', train=steady, config=uneven), run(folder / 'd', train=steady, config=uneven))   # each process has its own dropout back

TWO = replace(CONFIG, epochs=2, batch_size=4)

@forks
def test_two_processes_are_one(tmp_path):
    "Under DDP (gloo): the weights, the losses and the score of one process; the main one alone writes."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    both = [forked(rank, tmp_path, r, port) for r in range(2)]
    for p in both: p.join(120)
    assert [p.exitcode for p in both] == [0, 0]
    one, task = run(tmp_path / 'one', Toy(dropout=0, norm=False), Data(21), TWO, score=lambda *a: 1.)
    a, b, c = (load_file(tmp_path / d / 'best.safetensors') for d in ('a', 'b', 'one'))
    for k in c:
        assert torch.equal(a[k], b[k])
        torch.testing.assert_close(a[k], c[k], rtol=0, atol=1e-5)
    two = pd.read_csv(tmp_path / 'a/history.csv')
    np.testing.assert_allclose(two[['train_loss', 'valid_loss', 'score']], one[['train_loss', 'valid_loss', 'score']], rtol=1e-5)
    pairs(tmp_path / 'one pairs')
    d, e = (load_file(tmp_path / n / 'best.safetensors') for n in ('pairs', 'one pairs'))
    for k in e: torch.testing.assert_close(d[k], e[k], rtol=0, atol=1e-4)


def test_of_takes_its_own_and_leaves_the_rest():
    given = dict(epochs=3, lr=.1, manifest='phantom', head='', np=np, accumulate=4)
    assert TrainConfig.of(given) == TrainConfig.of(**given) == TrainConfig(epochs=3, lr=.1, accumulate=4) and TrainConfig.of() == TrainConfig()
    assert TrainConfig.of(given, lr=.2).lr == .2 and TrainConfig.of(globals()) == TrainConfig()
    with pytest.raises(ValueError, match='epochs=0'): TrainConfig.of(dict(epochs=0))


# ---- refusals ------------------------------------------------------------------------------------------------------

def line(error, *words):
    text = str(error.value)
    assert '\n' not in text and all(w in text for w in words), text

@pytest.mark.parametrize('field, value', [
    ('epochs', 0), ('epochs', 2.5), ('epochs', '3'), ('epochs', True), ('batch_size', -1), ('lr', 0), ('lr', float('nan')), ('lr', None), ('min_lr', 1.),
    ('betas', (.9,)), ('betas', (.9, 1.)), ('betas', 3), ('weight_decay', -1), ('accumulate', 0), ('clip', -1), ('precision', 'fp16'),
    ('device', 'gpu'), ('seed', -1), ('seed', 2**31), ('validate_every', 0), ('patience', -1), ('workers', -1)])
def test_invalid_settings_are_named(field, value):
    with pytest.raises(ValueError) as e: TrainConfig.from_dict({field: value})
    line(e, field, repr(value))

@pytest.mark.parametrize('name, near', [('epoch', 'epochs'), ('batchsize', 'batch_size'), ('weight-decay', 'weight_decay'), ('Seed', 'seed'), ('zzz', 'epochs')])
def test_unknown_settings_say_the_nearest(name, near):
    with pytest.raises(ValueError) as e: TrainConfig.from_dict({name: 1})
    line(e, repr(name), near)

def test_config_round_trip():
    config = TrainConfig(lr=1, betas=[0, .5], seed=np.int64(4))
    assert TrainConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config and config.lr == 1. and type(config.seed) is int
    assert 'batch_size' in config._repr_html_()

@pytest.mark.parametrize('change', [dict(lr=.5), dict(epochs=7), dict(seed=4), dict(precision='bf16'), dict(batch_size=6), dict(betas=(.9, .99))])
def test_other_config_is_refused(alone, change):
    (field, value), = change.items()
    with pytest.raises(ValueError) as e: run(alone[0], config=replace(CONFIG, **change))
    line(e, 'last.ckpt', field, repr(value), repr(getattr(CONFIG, field)))

def test_other_task_or_data_is_refused(alone):
    with pytest.raises(ValueError) as e: run(alone[0], train=Data(25))
    line(e, 'training images', '24', '25')
    with pytest.raises(ValueError) as e: run(alone[0], Toy(norm=False))
    line(e, 'last.ckpt', 'head.1')
    wide = Toy(); wide.behind = nn.Linear(3, 2)
    with pytest.raises(ValueError) as e: run(alone[0], wide)
    line(e, 'behind.weight', '(2, 2)', '(2, 3)')
    with pytest.raises(ValueError) as e: load_best(wide, alone[0])
    line(e, 'best.safetensors', 'behind.weight')

def test_nothing_to_do_is_refused(tmp_path):
    with pytest.raises(ValueError) as e: run(tmp_path, Toy().requires_grad_(False))
    line(e, 'nothing learns')
    for train, valid, name in ([], Data(), 'train_set'), (Data(), [], 'valid_set'):
        with pytest.raises(ValueError) as e: fit(Toy(), train, valid, CONFIG, tmp_path, progress=False)
        line(e, name)

@settings(max_examples=12)
@given(where=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_damaged_checkpoint(tmp_path_factory, alone, where, cut):
    "Cut or flipped anywhere: a clear error, or (a flip in padding) no difference at all."
    folder = tmp_path_factory.mktemp('bad')
    data = bytearray((alone[0] / 'last.ckpt').read_bytes())
    at = int(where * len(data))
    if cut: data = data[:at]
    else: data[at] ^= 255
    (folder / 'last.ckpt').write_bytes(data)
    try: result = run(folder)
    except ValueError as e: assert 'last.ckpt' in str(e) and '\n' not in str(e)
    else:
        assert not cut
        same(result, alone[1:])

def test_checkpoint_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path / 'boom'),)
    torch.save(dict(config=Bomb()), tmp_path / 'last.ckpt')
    with pytest.raises(ValueError) as e: run(tmp_path)
    line(e, 'last.ckpt', 'delete it')
    (tmp_path / 'best.safetensors').write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError): load_best(Toy(), tmp_path)
    with pytest.raises(FileNotFoundError): load_best(Toy(), tmp_path / 'none')
    assert not (tmp_path / 'boom').exists()

@pytest.mark.parametrize('file', ['last.ckpt', 'best.safetensors', 'history.csv'])
def test_full_disk_keeps_the_earlier_epoch(tmp_path, alone, file):
    "/dev/full answers every write with a true ENOSPC."
    with pytest.raises(KeyboardInterrupt): run(tmp_path, train=Data(stop=(3, 0)))
    kept = (tmp_path / 'last.ckpt').read_bytes()
    (tmp_path / f'.{file}.partial').symlink_to('/dev/full')
    with pytest.raises(OSError) as e: run(tmp_path)
    line(e, 'No space left', file)
    assert not list(tmp_path.glob('.*'))
    if file == 'last.ckpt': assert (tmp_path / 'last.ckpt').read_bytes() == kept
    same(run(tmp_path), alone[1:])                          # after making room

def test_loss_that_explodes(tmp_path):
    with pytest.raises(FloatingPointError) as e: run(tmp_path, config=replace(CONFIG, lr=1e30, clip=0), score=None)
    line(e, 'epoch', 'lr=1e+30')

def test_no_gpu_is_said_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError) as e: run(tmp_path / 'new', config=replace(CONFIG, device='cuda'))
    line(e, 'cuda', 'auto')
    assert not (tmp_path / 'new').exists()

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_gpu(tmp_path, alone, precision):
    history, task = run(tmp_path, config=replace(CONFIG, device='cuda', precision=precision), score=None)
    assert next(task.parameters()).is_cuda and (history.train_loss - alone[1].train_loss).abs().max() < .2
    with pytest.raises(KeyboardInterrupt): run(tmp_path / 'b', train=Data(stop=(3, 0)), config=replace(CONFIG, device='auto'), score=None)
    again, _ = run(tmp_path / 'b', config=replace(CONFIG, device='auto'), score=None)
    whole, _ = run(tmp_path / 'c', config=replace(CONFIG, device='auto'), score=None)
    np.testing.assert_allclose(again.train_loss, whole.train_loss, rtol=1e-4)


if __name__ == '__main__': child(*sys.argv[1:])
