"""Container and cluster files are valid, and the files, commands and options that they name exist.

These tests build no image and run no scheduler; tests/systems does. They replay the steps of the build with an
interpreter that only records the calls of pip.
"""
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import cluster
import pytest
import torch
import yaml
from processes import ROOT, finish, port, start
from torch.distributed import run as torchrun

from mmlocalmamba.openmmlab.engine.preemption import EXIT_PREEMPTED, SIGNALS

DOCKER = ROOT / 'docker'
COMPOSE = yaml.safe_load((DOCKER / 'compose.yml').read_text())
SERVICE, JOB = yaml.safe_load_all((DOCKER / 'kubernetes.yml').read_text())
POD = JOB['spec']['template']['spec']
CONTAINER, = POD['containers']
# Seconds between torchrun's signal to its processes and SIGKILL.
TORCHRUN_GRACE = 30


def tool(name):
    """Return the path of a linter that is a Python package (requirements/dev.txt)."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]))
    return path or pytest.skip(f'{name} is not installed')


def succeeds(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- valid ----

def test_dockerfile_lint():
    succeeds(tool('hadolint'), DOCKER / 'Dockerfile')


def test_shell_lint():
    succeeds(tool('shellcheck'), DOCKER / 'slurm.sh', *sorted((ROOT / 'tools').glob('*.sh')))


def test_compose_schema():
    succeeds(tool('check-jsonschema'), '--builtin-schema', 'vendor.compose-spec', DOCKER / 'compose.yml')


@pytest.mark.parametrize('version', ['1.31', None])
def test_kubernetes_schema(version):
    """Check the first version in which podFailurePolicy is stable, and the latest."""
    validator = pytest.importorskip('kubernetes_validate')
    for resource in (SERVICE, JOB):
        validator.validate(resource, version or validator.latest_version(), strict=True)


# ---- the image ----

def instructions():
    """Yield (stage, instruction, arguments) of the Dockerfile."""
    text = re.sub(r'^#.*\n', '', (DOCKER / 'Dockerfile').read_text(), flags=re.M).replace('\\\n', ' ')
    stage = None
    for line in filter(None, text.splitlines()):
        name, arguments = line.split(maxsplit=1)
        if name == 'FROM':
            stage = arguments.partition(' AS ')[2] or 'image'
        yield stage, name, arguments


INSTRUCTIONS = list(instructions())
# Build arguments with their defaults. A stage repeats the names of those that it uses.
ARGS = {argument.partition('=')[0]: argument.partition('=')[2] for _, name, argument in reversed(INSTRUCTIONS)
        if name == 'ARG'}


def ignored(path):
    """Return True if .dockerignore excludes a file. The last line that matches it or a folder above it decides."""
    result = False
    for line in (ROOT / '.dockerignore').read_text().splitlines():
        if not line.startswith('#'):
            pattern = re.escape(line.lstrip('!')).replace(r'\*\*/', '(.*/)?').replace(r'\*', '[^/]*')
            if re.fullmatch(f'{pattern}(/.*)?', path):
                result = not line.startswith('!')
    return result


@pytest.fixture(scope='module')
def context(tmp_path_factory):
    """Copy the files that a build sees."""
    folder = tmp_path_factory.mktemp('context')
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('this is no git clone')
    for path in filter(None, listed.stdout.split('\0')):
        if not ignored(path) and (ROOT / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, folder / path)
    return folder


def test_context_holds_the_sources_alone(context):
    assert {path.name for path in context.iterdir()} == {
        line[1:] for line in (ROOT / '.dockerignore').read_text().splitlines() if line.startswith('!')}
    assert ignored('.git/config') and ignored('data/digits/x.json') and ignored('tools/__pycache__/x.pyc')
    assert ignored('mmlocalmamba/ops/_cpu.so') and not ignored('mmlocalmamba/ops/csrc/cpu.cpp')


# This interpreter makes virtual environments of itself, records the calls of pip, and passes all checks of installed
# packages, those of mmcv from the time on when it is installed.
STUB = '''#!/usr/bin/env bash
case "$*" in
    "-m venv "*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    "-m pip "*) echo "$*" >>"$PIP_LOG" ;;
    "- "*) cat >/dev/null; grep -q mmcv "$PIP_LOG" ;;
    -c*mmpretrain*) ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
'''


@pytest.mark.parametrize('stack', ['openmmlab', 'onedl'])
def test_layers_install_what_make_installs(stack, context, tmp_path):
    """Each layer has the files that its step of tools/install.sh reads, and no step runs twice."""
    stub = tmp_path / 'python'
    stub.write_text(STUB)
    stub.chmod(0o755)

    def install(folder, *options):
        env = dict(os.environ, PYTHON=str(stub), REAL_PYTHON=sys.executable, STACK=stack,
                   VENV_DIR=f'{folder}-venv', PIP_LOG=f'{folder}-pip')
        done = subprocess.run(['bash', 'tools/install.sh', *options], cwd=folder, env=env, capture_output=True,
                              text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    image, clone = tmp_path / 'image', tmp_path / 'clone'
    image.mkdir()
    outputs = []
    for stage, name, arguments in INSTRUCTIONS:
        if stage not in ('stack', 'package'):
            continue
        if name == 'COPY':
            *sources, target = arguments.replace('${STACK}', stack).split()
            for source in sources:
                if (context / source).is_dir():
                    shutil.copytree(context / source, image / target, dirs_exist_ok=True)
                else:
                    (image / target).mkdir(parents=True, exist_ok=True)
                    shutil.copy2(context / source, image / target)
        elif name == 'RUN':
            command = arguments.partition('bash tools/install.sh ')[2].partition('&&')[0]
            outputs.append(install(image, *command.split()))
    shutil.copytree(context, clone)
    install(clone, '--no-dev')
    # The stand-in for mmcv's ops is built in a folder of a random name.
    asked, wanted = (re.sub(r'\S+(?=/stand-in)', 'TMP', Path(f'{folder}-pip').read_text()) for folder in (image, clone))
    assert sorted(asked.splitlines()) == sorted(wanted.splitlines())  # a clone builds the package beside other steps
    assert all(part in asked for part in ('TMP/stand-in', '--editable .', f'requirements/mim-{stack}.txt'))
    assert [len(re.findall(r'done in', output)) for output in outputs] == [4, 2, 1]


def test_install_script_refuses_an_unknown_step():
    done = subprocess.run(['bash', ROOT / 'tools/install.sh', '--until=mmvc'], capture_output=True, text=True)
    assert done.returncode != 0 and 'unknown option --until=mmvc' in done.stderr


def test_versions_of_the_image():
    python = re.search(r'with Python ([\d.]+\d)', (ROOT / 'requirements/constraints-openmmlab.txt').read_text())[1]
    assert re.fullmatch(rf'python:{re.escape(python)}\.\d+-slim-\w+', ARGS['PYTHON_IMAGE'])
    pinned = re.search(r'^torch==(.+)$', (ROOT / 'requirements/torch.txt').read_text(), flags=re.M)[1]
    if torch.__version__.split('+')[0] == pinned and torch.version.cuda:
        assert torch.version.cuda == ARGS['CUDA'], 'nvcc and torch must have the same CUDA version'


def test_image_runs_as_a_job():
    of_image = {name: arguments for stage, name, arguments in INSTRUCTIONS if stage == 'image'}
    assert of_image['STOPSIGNAL'] == 'SIGTERM' and json.loads(of_image['ENTRYPOINT']) == ['tini', '--']
    assert of_image['USER'] == '${UID}' and int(ARGS['UID']) > 0
    assert json.loads(of_image['VOLUME']) == ['/data', '/work_dirs']
    assert isinstance(json.loads(of_image['CMD']), list)  # without a shell that would keep signals for itself
    stages = {stage for stage, *_ in INSTRUCTIONS}
    assert {f'{part}-{device}' for part in ('runtime', 'compiler') for device in ('cpu', 'gpu')} <= stages


# ---- commands in the image ----

def parse(command, monkeypatch):
    """Check the training of a command. Return torchrun's arguments if the command is a launcher, or None."""
    launcher = None
    assert command.pop(0) == 'python'
    if command[0] == 'tools/launch.py':
        launcher = torchrun.parse_args(command[1:])
        command = [launcher.training_script, *launcher.training_script_args]
    assert command[0] == 'tools/train.py'
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', command)
    import train
    configurations = []

    class Runner:
        train = staticmethod(lambda: None)
        register_hook = staticmethod(lambda hook: None)

    monkeypatch.setattr(train, 'build_runner', lambda cfg: configurations.append(cfg) or Runner)
    train.main()
    cfg, = configurations
    assert cfg.resume and cfg.load_from is None
    assert cfg.launcher == ('pytorch' if launcher else 'none')
    return launcher


def seconds(duration):
    value, unit = re.fullmatch(r'(\d+)([sm])', duration).groups()
    return int(value) * dict(s=1, m=60)[unit]


@pytest.mark.parametrize('name', COMPOSE['services'])
def test_compose_service(name, monkeypatch):
    service = COMPOSE['services'][name]
    launcher = parse(list(service['command']), monkeypatch)
    assert (launcher is not None) == (name == 'gpu')
    assert seconds(service['stop_grace_period']) > 2 * TORCHRUN_GRACE
    build = service['build']
    assert (DOCKER / build['context']).resolve() == ROOT and (ROOT / build['dockerfile']).is_file()
    assert build['args'].keys() <= ARGS.keys() and build['args']['DEVICE'] == name
    if name == 'gpu':
        default = ARGS['TORCH_CUDA_ARCH_LIST'].strip('"')
        assert build['args']['TORCH_CUDA_ARCH_LIST'] == f'${{TORCH_CUDA_ARCH_LIST:-{default}}}'
    assert {volume['target'] for volume in service['volumes']} == {'/data', '/work_dirs'}


def test_kubernetes_nodes_meet(monkeypatch):
    launcher = parse(list(CONTAINER['args']), monkeypatch)
    spec, name = JOB['spec'], JOB['metadata']['name']
    assert int(launcher.nnodes) == spec['completions'] == spec['parallelism']
    assert int(launcher.nproc_per_node) == CONTAINER['resources']['limits']['nvidia.com/gpu']
    assert POD['subdomain'] == SERVICE['metadata']['name'] and SERVICE['spec']['clusterIP'] == 'None'
    assert SERVICE['spec']['publishNotReadyAddresses']
    assert SERVICE['spec']['selector'] == {'batch.kubernetes.io/job-name': name}
    host, port = launcher.rdzv_endpoint.split(':')
    assert host == f'{name}-0.{POD["subdomain"]}' and int(port) and launcher.rdzv_backend == 'c10d'


class Network:
    """Replace the names, addresses and interfaces of this machine."""

    def __init__(self, monkeypatch, names, interfaces, routes):
        def resolve(name):
            if name not in names:
                raise socket.gaierror(name)
            return names[name]

        class Socket:
            __enter__ = lambda self: self  # noqa: E731
            __exit__ = lambda self, *args: None  # noqa: E731

            def connect(self, address):
                self.to = address[0] if address[0][0].isdigit() else resolve(address[0])
                if self.to not in routes:
                    raise OSError('Network is unreachable')

            def getsockname(self):
                return routes[self.to], 1

        monkeypatch.setattr(socket, 'gethostname', lambda: 'node0')
        monkeypatch.setattr(socket, 'gethostbyname', resolve)
        monkeypatch.setattr(socket, 'socket', lambda *args: Socket())
        monkeypatch.setattr(socket, 'if_nameindex', lambda: list(enumerate(interfaces)))

        def address_of(name):
            if interfaces[name] is None:
                raise OSError(name)
            return interfaces[name]

        monkeypatch.setattr(cluster, '_address_of', address_of)
        monkeypatch.setenv('GLOO_SOCKET_IFNAME', '')  # monkeypatch restores it, whoever sets it
        monkeypatch.delenv('GLOO_SOCKET_IFNAME')


LINKS = dict(lo='127.0.0.1', down=None, eth0='10.0.0.5', ib0='10.1.0.5')
ROUTES = {'127.0.1.1': '127.0.0.1', '10.1.0.4': '10.1.0.5', '192.0.2.1': '10.0.0.5'}
DEBIAN = dict(node0='127.0.1.1', other='10.1.0.4')
MACHINES = {
    'other-node': (DEBIAN, ROUTES, 'other:29400', 'ib0'),
    'first-node': (DEBIAN, ROUTES, 'node0:29400', 'eth0'),  # its own name resolves to itself
    'by-address': (DEBIAN, ROUTES, '10.1.0.4:29400', 'ib0'),
    'no-port': (DEBIAN, ROUTES, 'other', 'ib0'),
    'no-endpoint': (DEBIAN, ROUTES, '', 'eth0'),
    'endpoint-does-not-resolve': (DEBIAN, ROUTES, 'nobody:1', 'eth0'),
    'good-name': (dict(DEBIAN, node0='10.0.0.5'), ROUTES, 'other:29400', None),  # gloo finds the address
    'name-does-not-resolve': (dict(other='10.1.0.4'), ROUTES, 'other:29400', 'ib0'),
    'no-route': (DEBIAN, {}, 'other:29400', None),
    'unknown-interface': (DEBIAN, {'192.0.2.1': '10.9.9.9'}, 'node0:1', None)}


@pytest.mark.parametrize('machine', MACHINES)
def test_gloo_takes_the_interface_to_the_others(machine, monkeypatch):
    names, routes, endpoint, interface = MACHINES[machine]
    Network(monkeypatch, names, LINKS, routes)
    assert cluster.gloo_interface(endpoint) == interface


def test_interfaces_of_this_machine():
    """Every machine has the loopback."""
    assert cluster._address_of('lo') == '127.0.0.1'
    assert cluster._interface_to('127.0.0.1') is None
    with pytest.raises(OSError):
        cluster._address_of('nothing')


@pytest.mark.parametrize('arguments,interface', [
    (['--nnodes', '2'], 'ib0'), (['--nnodes', '1:4'], 'ib0'), (['--nnodes', '1'], None), (['--nnodes', '1:1'], None),
    (['--standalone'], None)])
def test_the_launcher_names_the_interface(arguments, interface, monkeypatch):
    Network(monkeypatch, DEBIAN, LINKS, ROUTES)
    args = torchrun.parse_args([*arguments, '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'other:29400', 'x.py'])
    cluster.prepare(args)
    assert os.environ.get('GLOO_SOCKET_IFNAME') == interface and args.rdzv_conf == ''
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'mine')
    cluster.prepare(args)
    assert os.environ['GLOO_SOCKET_IFNAME'] == 'mine'


@pytest.mark.parametrize('index,conf,extra', [
    ('0', '', 'is_host=true'), ('1', '', 'is_host=false'), ('10', 'join_timeout=9', 'join_timeout=9,is_host=false'),
    (None, '', ''), ('0', 'is_host=false', 'is_host=false')])
def test_the_first_pod_hosts_the_store(index, conf, extra, monkeypatch):
    """A pod uses its number, because it may not know its name yet."""
    monkeypatch.delenv('JOB_COMPLETION_INDEX', raising=False)
    if index is not None:
        monkeypatch.setenv('JOB_COMPLETION_INDEX', index)
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'eth0')
    endpoint = CONTAINER['args'][[a.startswith('--rdzv-endpoint') for a in CONTAINER['args']].index(True)]
    options = ['--nnodes', '2', '--rdzv-conf', conf, '--rdzv-backend']
    args = torchrun.parse_args([*options, 'c10d', endpoint, 'x.py'])
    cluster.prepare(args)
    assert args.rdzv_conf == extra
    # Elsewhere torchrun decides.
    for other in ([*options, 'etcd-v2', endpoint, 'x.py'], [*options, 'c10d', '--rdzv-endpoint=store.lan:1', 'x.py']):
        args = torchrun.parse_args(other)
        cluster.prepare(args)
        assert args.rdzv_conf == conf


@pytest.fixture
def pods(tmp_path):
    """Return a function that starts pods of the job on this machine.

    `pods.answer()` adds the first pod's names to the cluster's DNS. A pod knows its own name from its /etc/hosts, which
    kubelet writes, and other names from the DNS, which here is the same file.
    """
    namespaces = ['unshare', *(['--user', '--map-root-user'] if os.geteuid() else []), '--mount', '--uts']
    (tmp_path / 'nsswitch').write_text('hosts: files\n')
    name, service = JOB['metadata']['name'], SERVICE['metadata']['name']
    files, number = [], port()

    def pod(index, *task):
        files.append(tmp_path / f'hosts{index}')
        files[-1].write_text('127.0.0.1 localhost\n'
                             f'127.0.3.{index + 1} {name}-{index}.{service}.default.svc.cluster.local {name}-{index}\n')
        mounts = f'mount --bind {files[-1]} /etc/hosts && mount --bind {tmp_path}/nsswitch /etc/nsswitch.conf'
        arguments = [re.sub(r'(?<=^--nproc-per-node=).*', '1', argument).replace(':29400', f':{number}')
                     for argument in CONTAINER['args'][1:]]
        arguments = arguments[:arguments.index('tools/train.py')]
        script = f'hostname {name}-{index} && {mounts} && exec "$@"'
        return start('env', f'--chdir={ROOT}', *namespaces, 'sh', '-c', script, 'sh', sys.executable, *arguments, *task,
                     JOB_COMPLETION_INDEX=str(index), GLOO_SOCKET_IFNAME='lo')

    def answer():
        for file in files:
            with open(file, 'a') as hosts:  # append, because the file is mounted
                hosts.write(f'127.0.3.1 {name}-0.{service} {name}-0.{service}.default.svc.cluster.local\n')

    def hosts_store():
        with socket.socket() as sock:
            return sock.connect_ex(('127.0.3.1', int(number))) == 0

    trial = subprocess.run([*namespaces, 'mount', '--bind', tmp_path / 'nsswitch', '/etc/nsswitch.conf'],
                           capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f'namespaces are not permitted here: {trial.stderr.strip()}')
    pod.answer, pod.hosts_store = answer, hosts_store
    return pod


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('unshare') is None, reason='util-linux is not installed')
def test_pods_meet_though_the_dns_is_late(pods, tmp_path):
    """The first pod opens the store before its name resolves, and the others wait for the name."""
    task = json.dumps(dict(work_dir=str(tmp_path / 'job'), launcher='pytorch', epochs=1))
    processes = [pods(index, 'tests/helpers/job_task.py', task) for index in (0, 1)]
    try:
        end = time.monotonic() + 100
        while not pods.hosts_store() and all(process.poll() is None for process in processes):
            assert time.monotonic() < end, 'nobody hosts the store'
            time.sleep(0.1)
        assert not (tmp_path / 'job').exists()
        pods.answer()
        finish(*processes)
    finally:
        for process in processes:
            process.kill()
    assert {path.name for path in (tmp_path / 'job').glob('state*')} == {'state0.pt', 'state1.pt'}


def test_kubernetes_tries_again_after_preemption():
    spec = JOB['spec']
    codes = [rule['onExitCodes'] for rule in spec['podFailurePolicy']['rules']
             if rule['action'] == 'Ignore' and 'onExitCodes' in rule]
    assert codes == [dict(containerName=CONTAINER['name'], operator='In', values=[EXIT_PREEMPTED])]
    assert POD['restartPolicy'] == 'Never' and spec['completionMode'] == 'Indexed'
    assert POD['terminationGracePeriodSeconds'] > 2 * TORCHRUN_GRACE


def test_kubernetes_volumes():
    mounts = {mount['name']: mount['mountPath'] for mount in CONTAINER['volumeMounts']}
    assert mounts.keys() == {volume['name'] for volume in POD['volumes']}
    assert set(mounts.values()) == {'/data', '/work_dirs', '/dev/shm'}
    assert POD['securityContext']['runAsUser'] == int(ARGS['UID'])


# ---- Slurm ----

# This stub runs two nodes on this machine. Its exit code is the highest of the tasks', as srun's is.
SRUN = '''#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & pids[node]=$!; done
code=0
for pid in "${pids[@]}"; do wait "$pid"; done_with=$?; ((done_with > code)) && code=$done_with; done
exit $code
'''
SCONTROL = '''#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'localhost\\nother\\n'; else echo "$*" >>"$CALLS"; fi
'''


JOB_ID = str(os.getpid())  # the port comes from it


@pytest.fixture
def slurm(tmp_path):
    """Return a function that starts the script with stubs of Slurm's commands and of given programs."""
    stubs = tmp_path / 'bin'
    stubs.mkdir()
    calls = tmp_path / 'calls'
    calls.touch()

    def submit(*arguments, programs=None, env=None):
        for name, text in dict(srun=SRUN, scontrol=SCONTROL, **(programs or {})).items():
            (stubs / name).write_text(text)
            (stubs / name).chmod(0o755)
        path = os.pathsep.join([str(stubs), str(Path(sys.executable).parent), os.environ['PATH']])
        return start('env', f'--chdir={ROOT}', 'bash', DOCKER / 'slurm.sh', *arguments, PATH=path, CALLS=str(calls),
                     SLURM_JOB_ID=JOB_ID, SLURM_JOB_NODELIST='node[1-2]', **(env or {}))

    submit.calls = lambda: calls.read_text().splitlines()
    return submit


NOTE = '#!/usr/bin/env bash\necho "$*" >>"$CALLS"\ncodes=($CODE)\nexit "${codes[SLURM_NODEID]}"\n'


@pytest.mark.parametrize('codes,code', [
    ('0 0', 0), ('0 1', 1), ('1 0', 1), ('137 0', 137), ('0 255', 1), ('75 75', 75), ('0 75', 75), ('75 0', 75),
    ('137 75', 75), ('75 137', 75), ('75 255', 75)])
def test_slurm_requeues_what_was_preempted(slurm, codes, code):
    """The job is requeued if a node was preempted, even if the other one was killed for being slow, and only then."""
    finish(slurm('tools/train.py', 'CONFIG', '--resume', programs=dict(python=NOTE), env=dict(CODE=codes)),
           returncode=code)
    launches, others = slurm.calls()[:2], slurm.calls()[2:]
    assert others == ([f'requeue {JOB_ID}'] if code == EXIT_PREEMPTED else [])
    assert launches[0] == launches[1]
    name, *arguments = shlex.split(launches[0])
    arguments = torchrun.parse_args(arguments)
    assert name == 'tools/launch.py' and arguments.training_script_args == ['CONFIG', '--resume']
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.rdzv_id) == ('2', 'gpu', JOB_ID)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ('c10d', f'localhost:{20000 + int(JOB_ID) % 10000}')


SIGNALLED = '''#!/usr/bin/env bash
kill -USR1 $PPID; kill -TERM $PPID; sleep 0.5; exit 75
'''


def test_slurm_signals_the_shell_of_a_node_too(slurm):
    """Slurm signals all processes of a step, so the shell that reports the exit code must survive."""
    finish(slurm('tools/train.py', 'CONFIG', programs=dict(python=SIGNALLED)), returncode=EXIT_PREEMPTED)
    assert slurm.calls() == [f'requeue {JOB_ID}']


def test_slurm_in_a_container(slurm):
    env = dict(CODE='0 0', CONTAINER='image.sif', DATA='/datasets')
    finish(slurm('tools/train.py', 'CONFIG', programs=dict(apptainer=NOTE), env=env))
    call, same_call = slurm.calls()
    assert call == same_call
    assert call.startswith(f'exec --nv --bind /datasets:/data --bind {ROOT}/work_dirs:/work_dirs '
                           '--pwd /opt/mmlocalmamba image.sif python tools/launch.py --nnodes 2 ')


def test_slurm_signal():
    options = dict(re.findall(r'^#SBATCH --([\w-]+)=?(.*)$', (DOCKER / 'slurm.sh').read_text(), flags=re.M))
    name, left = options['signal'].split('@')
    assert f'SIG{name}' in {number.name for number in SIGNALS} and int(left) > 2 * TORCHRUN_GRACE
    assert 'requeue' in options and options['open-mode'] == 'append' and options['ntasks-per-node'] == '1'


@pytest.mark.slow
def test_slurm_trains_on_two_nodes(slurm, tmp_path):
    """Two launchers run a process each. If one node is preempted, the training exits on both."""
    task = json.dumps(dict(work_dir=str(tmp_path / 'job'), launcher='pytorch', signal_at=4))
    finish(slurm('tests/helpers/job_task.py', task, env=dict(PROCESSES='1')), returncode=EXIT_PREEMPTED)
    assert slurm.calls() == [f'requeue {JOB_ID}']
    assert torch.load(tmp_path / 'job/preempted.pth', weights_only=True)['meta']['iter'] == 4
