"""Several processes, on CPUs through gloo: the same training as on one, sharding, elastic restarts, several nodes."""
import json
import os
import shutil
import signal
import socket
import subprocess

import pytest
import torch
from processes import PYTHON, ROOT, finish, run_on_two, start
from test_jobs import same

from mmlocalmamba.files import load_checkpoint

STEPS = 3
# UperNet pools to one pixel, which BatchNorm cannot take in batches of one image. Across processes, BatchNorm works
# apart, and SyncBN needs GPUs.
TASKS = [dict(config='localvim-nano_digits'),
         dict(config='mask-rcnn_localvmamba-nano_digits'),
         dict(config='upernet_localvmamba-nano_digits',
              options={'model.decode_head.norm_cfg': dict(type='GN', num_groups=8)})]


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(tiny_digits, tmp_path):
    """One image for each process, and one process that accumulates the gradients of two images.

    Losses of detectors are divided by what each process found in its images, so that it must be the same images. No
    process may leave a parameter without a gradient: DistributedDataParallel would fail in the second step.
    """
    for name in ('one', 'two'):
        (tmp_path / name).mkdir()
    program = [*PYTHON, ROOT / 'tests/helpers/loss_task.py', tiny_digits]
    single = [dict(task, iterations=2 * STEPS, options={**task.get('options', {}),
                                                         'optim_wrapper.accumulative_counts': 2}) for task in TASKS]
    finish(start(*program, tmp_path / 'one', json.dumps(single)))
    run_on_two(*program, tmp_path / 'two', json.dumps([dict(task, iterations=STEPS) for task in TASKS]))
    one, *two = (json.loads((tmp_path / name).read_text()) for name in
                 ('one/losses0.json', 'two/losses0.json', 'two/losses1.json'))
    for task, alone, *shared in zip(TASKS, one, *two):
        together = [losses for pair in zip(*shared) for losses in pair]
        assert len(alone) == len(together) == 2 * STEPS
        for step, (a, b) in enumerate(zip(alone, together)):
            assert a.keys() == b.keys() and a == pytest.approx(b, rel=2e-4, abs=1e-6), (task['config'], step)
        assert alone[0]['loss'] != alone[-1]['loss']


@pytest.mark.slow
def test_sharded_parameters_take_the_same_steps(tmp_path):
    """FSDP through MMEngine's FlexibleRunner: the checkpoint of two processes that hold half of the weights each."""
    program = [*PYTHON, ROOT / 'tests/helpers/fsdp_task.py']
    alone = start(*program, tmp_path / 'one')
    run_on_two(*program, tmp_path / 'two')
    finish(alone)
    # MMEngine's own hook wrote it, with Python objects.
    one, two = (load_checkpoint(tmp_path / name / 'iter_2.pth')['state_dict'] for name in ('one', 'two'))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    whole, *parts = (int((tmp_path / name).read_text()) for name in
                     ('one/parameters0', 'two/parameters0', 'two/parameters1'))
    assert max(parts) < 0.6 * whole and sum(parts) == pytest.approx(whole, rel=0.1)


def job(work_dir, **options):
    task = dict(work_dir=str(work_dir), launcher='pytorch', **options)
    return [*PYTHON, ROOT / 'tests/helpers/job_task.py', json.dumps(task)]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The end of a training on two processes that nothing interrupts."""
    folder = tmp_path_factory.mktemp('whole')
    run_on_two(*job(folder, workers=1))
    return [torch.load(folder / f'state{rank}.pt') for rank in range(2)]


def check(folder, whole):
    for rank in range(2):
        assert same(torch.load(folder / f'state{rank}.pt'), whole[rank])


@pytest.mark.slow
def test_all_leave_when_one_is_signalled(tmp_path, whole):
    run_on_two(*job(tmp_path, workers=1, signal_at=4), returncode=75)
    assert torch.load(tmp_path / 'preempted.pth', weights_only=True)['meta']['iter'] == 4
    run_on_two(*job(tmp_path, workers=1, resume=True))
    check(tmp_path, whole)


def launch(*arguments):
    return [*PYTHON, ROOT / 'tools/launch.py', *arguments]


def local(restarts=0):
    return ['--nproc-per-node', 2, '--max-restarts', restarts, '--rdzv-backend', 'c10d', '--rdzv-endpoint',
            '127.0.0.1:0', '--local-addr', '127.0.0.1']


@pytest.mark.slow
def test_elastic_restart_goes_on_from_the_last_checkpoint(tmp_path, whole):
    """Also if a process is late, so that another could find the address that it had in its first life."""
    task = job(tmp_path, workers=1, resume=True, kill_at=5)
    output = finish(start(*launch(*local(restarts=1)), *task[3:], LATE_AFTER_RESTART='4'))
    assert 'Signal 9 (SIGKILL)' in output or 'exitcode: -9' in output, output
    check(tmp_path, whole)


@pytest.mark.slow
def test_launcher_says_that_it_was_preempted(tmp_path, whole):
    """The launcher is signalled, and signals the processes with their dataloader workers."""
    task = job(tmp_path, workers=1, slow=0.1)
    process = start(*launch(*local()), *task[3:])
    while not (tmp_path / 'epoch_1.pth').exists():
        try:
            process.wait(0.2)
            break
        except subprocess.TimeoutExpired:
            pass
    process.send_signal(signal.SIGUSR1)
    finish(process, returncode=75)
    assert (tmp_path / 'last_checkpoint').read_text().endswith('preempted.pth')
    finish(start(*launch(*local()), *job(tmp_path, workers=1, resume=True)[3:]))
    check(tmp_path, whole)


def namespaces():
    """Two network namespaces with a cable between them; their names."""
    names = [f'mmlm{os.getpid()}{side}' for side in 'ab']
    commands = [f'ip netns add {name}' for name in names]
    commands += [f'ip link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}']
    for number, name in enumerate(names, 1):
        commands += [f'ip -n {name} addr add 10.98.76.{number}/24 dev {name}', f'ip -n {name} link set {name} up',
                     f'ip -n {name} link set lo up']
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f'network namespaces are not permitted here: {command}: {done.stderr.strip()}')
        yield names
    finally:
        for name in names:
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


two_nodes = pytest.fixture(namespaces)


@pytest.mark.skipif(None in map(shutil.which, ('ip', 'unshare')), reason='iproute2 or util-linux is not installed')
@pytest.mark.slow
def test_two_nodes(two_nodes, tmp_path, whole):
    """One process on each of two hosts that see each other over a network alone, and share the work directory.

    Their names lead to 127.0.1.1, as Debian's do: gloo would listen there, and the other host not reach it.
    """
    (tmp_path / 'hosts').write_text(f'127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n')
    debian = ['unshare', '--mount', 'sh', '-c', f'mount --bind {tmp_path}/hosts /etc/hosts && exec "$@"', 'sh']
    arguments = launch('--nnodes', 2, '--nproc-per-node', 1, '--rdzv-backend', 'c10d', '--rdzv-id', 'job',
                       '--rdzv-endpoint', '10.98.76.1:29400')
    task = job(tmp_path, workers=1)[3:]
    # torchrun finds the host of the rendezvous by its name, which these two share.
    processes = [start('ip', 'netns', 'exec', name, *debian, *arguments, '--local-addr', f'10.98.76.{number}',
                       '--rdzv-conf', f'is_host={number == 1}', *task)
                 for number, name in enumerate(two_nodes, 1)]
    finish(*processes)
    states = [torch.load(tmp_path / f'state{rank}.pt') for rank in range(2)]
    check(tmp_path, whole if same(states[0]['model'], whole[0]['model']) else whole[::-1])
