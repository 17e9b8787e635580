"""Run docker/slurm.sh on a real Slurm of two nodes, which have their own networks, names and processes on this machine.

This needs root and Debian's slurmctld, slurmd and munge: `make slurm-test`.
"""
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROGRAMS = ('slurmctld', 'slurmd', 'sbatch', 'munged', 'mungekey', 'ip', 'unshare')
NODES = ('node1', 'node2')
ADDRESSES = dict(head='10.98.77.254', node1='10.98.77.1', node2='10.98.77.2')
# Nodes claim the 8 GPUs and 64 cores that docker/slurm.sh requests. A node that is silent for 10 s is down.
CONFIGURATION = '''
ClusterName=test
SlurmctldHost=head({head})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
SlurmdTimeout=10
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeAddr={node1} CPUs=64 Gres=gpu:8
NodeName=node2 NodeAddr={node2} CPUs=64 Gres=gpu:8
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL PriorityTier=2
'''


def call(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f'{command}: {done.stdout}{done.stderr}'
    return done.stdout


def until(condition, seconds=30):
    """Wait until a condition is true and return its value."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f'not after {seconds} s'
        time.sleep(0.2)
    return result


class Cluster:
    """A controller (head) and two nodes in namespaces. They share the file system, as in a cluster."""

    def __init__(self, folder):
        self.folder, self.processes = folder, {}
        self.prefix = f'mml{os.getpid() % 100000}'
        self.env = dict(os.environ, SLURM_CONF=str(folder / 'slurm.conf'), OMP_NUM_THREADS='1',
                        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]))

    def namespace(self, host):
        return f'{self.prefix}{host}'

    def start(self):
        folder = self.folder
        for name in ('state', *(f'spool-{node}' for node in NODES)):
            (folder / name).mkdir()
        (folder / 'slurm.conf').write_text(CONFIGURATION.format(folder=folder, **ADDRESSES))
        (folder / 'gres.conf').write_text('Name=gpu File=/dev/tty[0-7]\n')  # any devices
        call('mungekey', '--create', '--keyfile', folder / 'munge.key')
        for host, address in ADDRESSES.items():
            space = self.namespace(host)
            call('ip', 'netns', 'add', space)
            call('ip', '-n', space, 'link', 'set', 'lo', 'up')
            if host == 'head':
                call('ip', '-n', space, 'link', 'add', 'eth0', 'type', 'bridge')
            else:
                call('ip', '-n', space, 'link', 'add', 'eth0', 'type', 'veth', 'peer', 'name', host, 'netns',
                     self.namespace('head'))
                call('ip', '-n', self.namespace('head'), 'link', 'set', host, 'up', 'master', 'eth0')
            call('ip', '-n', space, 'addr', 'add', f'{address}/24', 'dev', 'eth0')
            call('ip', '-n', space, 'link', 'set', 'eth0', 'up')
            # On Debian, a host's own name resolves to 127.0.1.1.
            names = ''.join(f'{"127.0.1.1" if name == host else other} {name}\n' for name, other in ADDRESSES.items())
            (folder / f'hosts-{host}').write_text(f'127.0.0.1 localhost\n{names}')
        self.run('head', 'munge', 'munged', '--foreground', '--force', f'--key-file={folder}/munge.key',
                 f'--socket={folder}/munge.socket', f'--pid-file={folder}/munge.pid',
                 f'--log-file={folder}/munge.log', f'--seed-file={folder}/munge.seed')
        until((folder / 'munge.socket').exists)
        self.run('head', 'head', 'slurmctld', '-D')
        for node in NODES:
            self.power_on(node)
        until(lambda: self('sinfo', '-h', '-o', '%t %D') == 'idle 2\n')

    def inside(self, host, *command):
        """Return a command that runs on a host, with its network, name, /etc/hosts and process namespace."""
        return ['nsenter', f'--net=/run/netns/{self.namespace(host)}', 'unshare', '--uts', '--mount', '--pid', '--fork',
                '--kill-child', '--mount-proc', 'sh', '-c',
                f'hostname {host} && mount --bind {self.folder}/hosts-{host} /etc/hosts && exec "$@"', 'sh', *command]

    def run(self, host, name, *command):
        with open(self.folder / f'{name}.out', 'a') as output:
            self.processes[name] = subprocess.Popen(self.inside(host, *command), env=self.env, stdout=output,
                                                    stderr=output, start_new_session=True)

    def power_on(self, node):
        self.run(node, node, 'slurmd', '-D')

    def power_off(self, node):
        """Kill all processes of a node at once: slurmd, steps, trainings."""
        process = self.processes.pop(node)
        process.kill()
        process.wait()

    def stop(self):
        for name in list(self.processes):
            self.power_off(name)
        for host in ADDRESSES:
            subprocess.run(['ip', 'netns', 'del', self.namespace(host)], capture_output=True)

    def __call__(self, *command):
        """Run one of Slurm's commands and return its output."""
        return call(*self.inside('head', *map(str, command)), env=self.env, cwd=ROOT)

    def show(self, job):
        return dict(re.findall(r'(\w+)=(\S*)', self('scontrol', 'show', 'job', job)))

    def logs(self):
        return '\n'.join(f'==== {path.name}\n{path.read_text(errors="replace")[-3000:]}'
                         for path in sorted(self.folder.glob('*.*')) if path.suffix in ('.log', '.out'))


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid():
        pytest.fail(f'needs root, slurmctld, slurmd, slurm-client, munge and iproute2; missing: {missing}')
    # munged needs a folder that nobody else may write to; pytest's is.
    cluster = Cluster(tmp_path_factory.mktemp('cluster'))
    try:
        cluster.start()
        yield cluster
    except Exception:
        print(cluster.logs())
        raise
    finally:
        cluster.stop()


EPOCHS = 8
# Slurm checks time limits every 30 s, so this training takes longer.
MORE_EPOCHS = 60


class Job:
    """docker/slurm.sh as a user submits it. Only the path of the log is overridden."""

    def __init__(self, cluster, folder, data, epochs=EPOCHS):
        self.cluster, self.folder, self.epochs = cluster, folder, epochs
        self.log = folder / 'job.log'
        options = [f'{name}_dataloader.dataset.data_root={data}' for name in ('train', 'val')]
        self.id = cluster(
            'env', 'PROCESSES=1', 'sbatch', '--parsable', '--output', self.log, 'docker/slurm.sh', 'tools/train.py',
            'configs/localvmamba-nano_digits.py', '--launcher', 'pytorch', '--resume', '--work-dir', folder,
            '--cfg-options', *options, 'train_dataloader.batch_size=4', f'train_cfg.max_epochs={epochs}').strip()

    def text(self):
        return self.log.read_text() if self.log.exists() else ''

    def wait_for(self, *states):
        """Wait until the job is in one of the states and return its description."""
        def there():
            job = self.cluster.show(self.id)
            assert job['JobState'] in states or job['JobState'] not in ('FAILED', 'CANCELLED', 'TIMEOUT'), self.text()
            return job if job['JobState'] in states else None
        return until(there, 600)

    def is_training(self):
        """Wait until the training is in the second epoch, after a checkpoint."""
        until(lambda: re.search(r'Epoch\(train\)\s+\[2\]', self.text()), 300)

    def restart(self):
        """Restart the job now. Slurm itself does so after 2 minutes (BeginTime), or at once if a node was lost.

        The restart is not in the same second, because nodes refuse a credential that is as old as the end of the
        previous run ("Job credential revoked"), which fails the job.
        """
        job = self.wait_for('PENDING', 'RUNNING')
        assert job['Restarts'] == '1', job
        if job['JobState'] == 'PENDING':
            assert job['Reason'] in ('BeginTime', 'None', 'Resources', 'Priority'), job
            self.cluster('scontrol', 'update', f'JobId={self.id}', 'StartTime=now+10')

    def result(self):
        job = self.wait_for('COMPLETED')
        assert job['ExitCode'] == '0:0'
        checkpoint = torch.load(self.folder / f'epoch_{self.epochs}.pth', weights_only=False)
        return {name: checkpoint[name] for name in ('state_dict', 'optimizer', 'param_schedulers')}


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.fixture(scope='module')
def whole(cluster, tiny_digits, tmp_path_factory):
    """Return a function that gives the result of an uninterrupted training."""
    results = {}

    def result(epochs):
        if epochs not in results:
            results[epochs] = Job(cluster, tmp_path_factory.mktemp('whole'), tiny_digits, epochs).result()
        return results[epochs]

    return result


@pytest.fixture
def job(request, cluster, tiny_digits, tmp_path, whole):
    """Start a job that trains, with the result that it must have."""
    epochs = getattr(request, 'param', EPOCHS)
    whole = whole(epochs)
    job = Job(cluster, tmp_path, tiny_digits, epochs)
    job.whole = whole
    job.is_training()
    yield job
    print(job.text()[-3000:])
    subprocess.run(cluster.inside('head', 'scancel', job.id), env=cluster.env)
    until(lambda: cluster('sinfo', '-h', '-o', '%t %D') == 'idle 2\n', 120)


def preempted(job):
    """Check that a job exits with a checkpoint, restarts, and ends with the result of an uninterrupted training."""
    until(lambda: 'preempted after iteration' in job.text(), 60)
    job.restart()
    assert equal(job.result(), job.whole)
    assert job.text().count('preempted after iteration') == 1


def test_signalled(job):
    """`--signal` sends SIGUSR1 to all processes of both nodes, and Slurm restarts the job by itself."""
    job.cluster('scancel', '--signal=USR1', job.id)
    until(lambda: job.cluster.show(job.id)['Restarts'] == '1', 120)
    assert equal(job.result(), job.whole)
    assert job.text().count('preempted after iteration') == 1


@pytest.mark.parametrize('job', [MORE_EPOCHS], indirect=True)
def test_time_limit(job):
    """Slurm sends the signal two minutes before the time limit."""
    job.cluster('scontrol', 'update', f'JobId={job.id}', 'TimeLimit=2')
    until(lambda: job.cluster.show(job.id)['Restarts'] == '1', 120)
    job.cluster('scontrol', 'update', f'JobId={job.id}', 'TimeLimit=60')
    preempted(job)


def test_requeued(job):
    job.cluster('scontrol', 'requeue', job.id)
    preempted(job)


def test_preempted_by_an_urgent_job(job):
    job.cluster('srun', '--partition=urgent', '--nodes=2', '--gpus-per-node=8', 'true')
    preempted(job)


@pytest.mark.parametrize('node', NODES)
def test_a_node_is_lost(job, node):
    """Either node is lost, and the job continues from the last regular checkpoint."""
    job.cluster.power_off(node)
    until(lambda: job.cluster.show(job.id)['Restarts'] == '1', 180)
    job.cluster.power_on(node)
    job.restart()
    assert equal(job.result(), job.whole)
