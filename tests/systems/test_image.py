"""Build docker/Dockerfile with a real engine and run the image: `make image-test`.

This needs root, 25 GB and Debian's debootstrap, tinyproxy and docker.io (for ENGINE=podman, podman and runc instead;
for ENGINE=buildah, buildah too). The base image is made of Debian's packages from this machine's apt sources, so no
image registry is needed. pip's index is this machine's.

ENGINE       docker (default), podman, or buildah, whose image podman runs
IMAGE_CACHE  a folder that keeps the base image and the engine's layers for the next time (default: nothing is kept)
"""
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ENGINE = os.environ.get('ENGINE', 'docker')
PROGRAMS = dict(docker=['dockerd', '/usr/bin/docker'], podman=['podman', 'runc'], buildah=['buildah', 'podman', 'runc'])
BASE, IMAGE = 'mmlocalmamba-base:bookworm', 'mmlocalmamba:test'
UID = 1000  # the image's user
PREEMPTED = 75
WHEEL_PORT = 29489  # always the same, because another build argument would invalidate the layers
EPOCHS = 6
TRAIN = ('python', 'tools/train.py', 'configs/localvmamba-nano_digits.py', '--resume', '--cfg-options',
         'train_dataloader.batch_size=4', f'train_cfg.max_epochs={EPOCHS}')


def call(*command, code=0, **options):
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          **options)
    assert done.returncode == code, f'{command}: {done.returncode}\n{done.stdout[-5000:]}'
    return done.stdout


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f'not after {seconds} s'
        time.sleep(0.1)
    return result


# ---- this machine's sources ----

def debian_sources():
    """Return the address before /debian of apt's Debian mirror, and the lines of a sources.list."""
    rows = call('apt-get', 'indextargets', '--format', '$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)',
                'Created-By: Packages').splitlines()
    rows = [row.split('|')[1:] for row in rows if row.startswith('Debian|')]
    address = rows[0][0].rstrip('/')
    assert address.endswith('/debian'), f'apt has Debian from {address}, which is not laid out as a mirror'
    mirror = address.removesuffix('/debian')
    return mirror, sorted({' '.join(('deb', *row)) for row in rows
                           if row[0].startswith(f'{mirror}/') and row[1].startswith('bookworm')})


def pip_index():
    """Return this machine's index, or None if it is pip's default."""
    done = subprocess.run([sys.executable, '-m', 'pip', 'config', 'get', 'global.index-url'], capture_output=True,
                          text=True)
    return os.environ.get('PIP_INDEX_URL') or done.stdout.strip() or None


def mmcv_wheels(folder):
    """Copy ready wheels of mmcv if pip has any, because compiling takes 7 to 10 minutes."""
    folder.mkdir()
    for place in os.environ.get('PIP_FIND_LINKS', '').split():
        for wheel in Path(place).glob('*mmcv-*.whl'):
            shutil.copy(wheel, folder)
    return folder


def base_root(folder):
    """Make a Debian with Python. Its sources name a mirror that does not exist, so the build must get another one."""
    if folder.exists():
        return folder
    mirror, sources = debian_sources()
    new = folder.with_suffix('.new')
    shutil.rmtree(new, ignore_errors=True)
    packages = 'ca-certificates,python3,python3-venv,python3-dev'
    call('debootstrap', '--variant=minbase', f'--include={packages}', 'bookworm', new, f'{mirror}/debian')
    (new / 'etc/apt/sources.list').write_text('\n'.join(sources).replace(mirror, 'http://mirror.invalid') + '\n')
    for authority in Path('/usr/local/share/ca-certificates').glob('*.crt'):
        shutil.copy(authority, new / 'usr/local/share/ca-certificates')
    call('chroot', new, 'update-ca-certificates')
    return new.rename(folder)


class Service:
    """A program that runs until the end of the tests."""

    def __init__(self, log, *command, ready, **options):
        with open(log, 'w') as file:
            self.process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, **options)
        try:
            until(lambda: self.process.poll() is not None or ready(), 60)
            assert self.process.poll() is None, Path(log).read_text()[-3000:]
        except AssertionError:
            self.stop()
            raise

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def answers(port):
    import socket
    with socket.socket() as sock:
        return sock.connect_ex(('127.0.0.1', port)) == 0


def free_port():
    import socket
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


# ---- the engines ----

class Engine:

    def __init__(self, folder, store):
        self.folder, self.services, self.env = folder, [], dict(os.environ, DOCKER_BUILDKIT='1')
        self.name = ENGINE
        if ENGINE == 'docker':
            socket = folder / 'docker.socket'
            self.command = self.builder = ['/usr/bin/docker', '-H', f'unix://{socket}']
            # Its folder is separate from that of an installed engine.
            self.service(folder / 'dockerd.log', 'dockerd', '--data-root', store, '--exec-root', folder / 'exec', '-H',
                         f'unix://{socket}', '--pidfile', folder / 'docker.pid', ready=lambda: subprocess.run(
                             [*self.command, 'info'], capture_output=True).returncode == 0)
        else:
            # A root without CAP_SYS_RESOURCE may set these limits. runc supports mixed cgroups, crun does not.
            limits = ', '.join(f'"{name}=1024:1024"' for name in ('nofile', 'nproc'))
            (folder / 'containers.conf').write_text(
                f'[containers]\ndefault_ulimits = [{limits}]\n'
                '[engine]\ncgroup_manager = "cgroupfs"\nruntime = "runc"\n')
            self.env['CONTAINERS_CONF'] = str(folder / 'containers.conf')
            places = ['--root', str(store), '--runroot', str(folder / 'run')]
            self.command = ['podman', *places]
            self.builder = [ENGINE, *places]

    def service(self, *args, **options):
        self.services.append(Service(*args, **options))

    def __call__(self, *command, **options):
        return call(*self.command, *command, env=self.env, **options)

    def import_base(self, root):
        if not self('images', '--quiet', BASE).strip():
            call('sh', '-c', 'tar -C "$1" -c . | "$@"'.replace('"$@"', ' '.join([*self.command, 'import', '-', BASE])),
                 'sh', root, env=self.env)

    def build(self, context, *options):
        """Build the image and return the output of all steps."""
        options = ['--network=host', '--file', context / 'docker/Dockerfile', *options]
        if ENGINE == 'docker':
            options.append('--progress=plain')
        elif ENGINE == 'buildah':
            options += ['--layers', '--runtime=runc']
        return call(*self.builder, 'build', *options, context, env=self.env)

    def run(self, *command, options=(), code=0):
        return self('run', '--rm', '--network=none', *options, IMAGE, *command, code=code)

    def stop(self):
        for service in reversed(self.services):
            service.stop()


@pytest.fixture(scope='module')
def engine(tmp_path_factory):
    missing = [name for name in (*PROGRAMS[ENGINE], 'debootstrap', 'tinyproxy') if shutil.which(name) is None]
    if missing or os.geteuid():
        pytest.fail(f'needs root, debootstrap, tinyproxy and {PROGRAMS[ENGINE]}; missing: {missing}')
    folder = tmp_path_factory.mktemp('engine')
    cache = Path(os.environ.get('IMAGE_CACHE') or folder / 'cache').absolute()
    cache.mkdir(parents=True, exist_ok=True)
    engine = Engine(folder, cache / ('docker' if ENGINE == 'docker' else 'containers'))
    try:
        engine.import_base(base_root(cache / 'base'))
        yield engine
    finally:
        engine.stop()
        if not os.environ.get('IMAGE_CACHE'):
            shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope='module')
def context(tmp_path_factory):
    """Copy the files of a fresh clone."""
    folder = tmp_path_factory.mktemp('context')
    files = call('git', '-C', ROOT, 'ls-files', '-z', '--cached', '--others', '--exclude-standard').split('\0')
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope='module')
def options(engine, tmp_path_factory):
    """Return the arguments of a build: mirrors, an index, ready wheels, a proxy whose log is `proxy.log`."""
    folder, port = engine.folder, free_port()
    (folder / 'tinyproxy.conf').write_text(
        f'Port {port}\nListen 127.0.0.1\nTimeout 600\nLogFile "{folder}/proxy.log"\nLogLevel Connect\n')
    engine.service(folder / 'tinyproxy.out', 'tinyproxy', '-d', '-c', folder / 'tinyproxy.conf',
                   ready=lambda: answers(port))
    wheels = mmcv_wheels(folder / 'wheels')
    arguments = dict(PYTHON_IMAGE=BASE, DEBIAN_MIRROR=debian_sources()[0], TORCH_INDEX='', no_proxy='127.0.0.1',
                     http_proxy=f'http://127.0.0.1:{port}', https_proxy=f'http://127.0.0.1:{port}')
    if pip_index():
        arguments.update(PIP_INDEX_URL=pip_index())
    result = []
    if ENGINE == 'docker':  # Debian's docker has no --build-context
        engine.service(folder / 'wheels.log', sys.executable, '-m', 'http.server', '--bind', '127.0.0.1', WHEEL_PORT,
                       cwd=wheels, ready=lambda: answers(WHEEL_PORT))
        arguments.update(PIP_FIND_LINKS=f'http://127.0.0.1:{WHEEL_PORT}/')
    else:
        result = ['--build-context', f'wheels={wheels}']
    return result + [f'--build-arg={name}={value}' for name, value in arguments.items()]


@pytest.fixture(scope='module')
def image(engine, context, options):
    """Build the image and return the engine."""
    start = time.monotonic()
    output = engine.build(context, *options, '--tag', IMAGE)
    steps = re.findall(r'\[\w+\] done in \d+ s', output)
    print(f'\nbuilt by {ENGINE} in {time.monotonic() - start:.0f} s; {", ".join(steps)}\n{sizes(engine)}')
    return engine


def sizes(engine):
    """Return the sizes of the layers, the last one first."""
    return engine('history', '--format', '{{.Size}}\t{{.CreatedBy}}', IMAGE)


# ---- the image ----

def test_build_goes_through_the_proxy(image):
    """Without cached layers, Debian's packages and pip's go through the proxy."""
    log = (image.folder / 'proxy.log').read_text()
    hosts = set(re.findall(r'Established connection to host "([^"]+)"', log))
    if not os.environ.get('IMAGE_CACHE'):
        assert debian_sources()[0].partition('://')[2].partition(':')[0] in hosts and len(hosts) > 1, hosts


def test_doctor(image):
    """The image's default command runs without a network."""
    output = image.run()
    print(output)
    assert re.search(r'^  cpu +yes', output, flags=re.M), output


def test_user_and_process_1(image):
    assert image.run('sh', '-c', 'id -u; cat /proc/1/comm; readlink data work_dirs').split() == [
        str(UID), 'tini', '/data', '/work_dirs']


class Volumes:
    """Folders for /data and /work_dirs that belong to a user of the container."""

    def __init__(self, engine, folder, data, user=UID):
        self.engine, self.work = engine, folder / 'work_dirs'
        self.work.mkdir()
        os.chown(self.work, user, user)
        self.options = ['-v', f'{data}:/data', '-v', f'{self.work}:/work_dirs']
        # compose.yml sets these, too.
        self.environment = ['--env=OMP_NUM_THREADS=1', '--env=OMP_WAIT_POLICY=PASSIVE']

    def train(self, *options, code=0):
        return self.engine.run(*TRAIN, options=[*self.options, *self.environment, *options], code=code)

    @property
    def job(self):
        return self.work / 'localvmamba-nano_digits'

    def result(self):
        checkpoint = torch.load(self.job / f'epoch_{EPOCHS}.pth', weights_only=False)
        return {**checkpoint['state_dict'], 'optimizer': str(checkpoint['optimizer'])}


@pytest.fixture(scope='module')
def data(image, tmp_path_factory):
    """Write the digits with a script of the image, as the image's user."""
    folder = tmp_path_factory.mktemp('data')
    # Other users need access to these folders.
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    os.chown(folder, UID, UID)
    image.run('python', 'tools/dataset_converters/digits.py', 'data/digits', '--scale=tiny',
              options=['-v', f'{folder}:/data'])
    assert (folder / 'digits/imagenet').stat().st_uid == UID
    return folder


@pytest.fixture(scope='module')
def whole(image, data, tmp_path_factory):
    """Return the result of an uninterrupted training."""
    volumes = Volumes(image, tmp_path_factory.mktemp('whole'), data)
    volumes.train()
    return volumes.result()


def test_stop_and_resume_in_another_container(image, data, whole, tmp_path):
    volumes, name = Volumes(image, tmp_path, data), f'mmlocalmamba-{uuid.uuid4().hex[:8]}'
    image('run', '--detach', '--name', name, '--network=none', *volumes.options,
          *volumes.environment, IMAGE, *TRAIN)
    try:
        until(lambda: re.search(r'Epoch\(train\)\s+\[2\]', image('logs', name)))
        image('stop', '--time=120', name)
        assert image('inspect', '--format={{.State.ExitCode}}', name).strip() == str(PREEMPTED), image('logs', name)
        assert 'preempted after iteration' in image('logs', name)
    finally:
        image('rm', '--force', name)
    assert (volumes.job / 'preempted.pth').stat().st_uid == UID
    assert not (volumes.job / f'epoch_{EPOCHS}.pth').exists()
    volumes.train()
    result = volumes.result()
    assert result.keys() == whole.keys()
    for key, value in result.items():
        assert torch.equal(value, whole[key]) if isinstance(value, torch.Tensor) else value == whole[key], key


def test_read_only_root(image, data, tmp_path):
    """Only the volumes and /tmp, which is in memory, are writable."""
    volumes = Volumes(image, tmp_path, data)
    volumes.train('--read-only', '--tmpfs', '/tmp')
    assert volumes.result()


def test_another_user(image, data, tmp_path):
    """A user without a name in the image and without capabilities trains on read-only data."""
    user = 12345
    volumes = Volumes(image, tmp_path, data, user=user)
    volumes.options[1] += ':ro'
    volumes.train('--user', f'{user}:{user}', '--cap-drop=ALL', '--security-opt=no-new-privileges')
    assert (volumes.job / f'epoch_{EPOCHS}.pth').stat().st_uid == user


def test_a_changed_source_is_a_small_layer(image, context, options):
    """A new version of the package downloads nothing and adds small layers."""
    def layers():
        return [float(number) * dict(B=1, kB=1e3, KB=1e3, MB=1e6, GB=1e9)[unit] for number, unit in
                re.findall(r'^([\d.]+) ?(\w+)\t', sizes(image), flags=re.M)]

    def ids():
        return image('inspect', '--format={{json .RootFS.Layers}}', IMAGE)

    log = image.folder / 'proxy.log'
    before, ids_before, connections = layers(), ids(), log.read_text().count('Established')
    source = context / 'mmlocalmamba/ops/__init__.py'
    text = source.read_text()
    try:
        source.write_text(text + '\n# another version\n')
        start = time.monotonic()
        image.build(context, *options, '--tag', IMAGE)
        print(f'\nbuilt again in {time.monotonic() - start:.0f} s\n{sizes(image)}')
    finally:
        source.write_text(text)
    assert '# another version' in image.run('cat', 'mmlocalmamba/ops/__init__.py')
    assert log.read_text().count('Established') == connections
    old, new = (set(re.findall(r'sha256:\w+', text)) for text in (ids_before, ids()))
    assert len(new - old) == 2 and len(layers()) == len(before)  # the package, and the list of its files
    assert layers()[[size > 1e4 for size in layers()].index(True)] < 100e6


# ---- GPUs, without CUDA's own image ----

def test_gpu_stages(image, context, options, tmp_path):
    """Build the stages without nvcc on a stub of CUDA's image, a folder with an empty nvcc."""
    nvcc = tmp_path / 'root/usr/local/cuda-13.0/bin/nvcc'
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\n')
    nvcc.chmod(0o755)
    stub = 'mmlocalmamba-cuda-stub:1'
    call('sh', '-c', f'tar -C {tmp_path}/root -c . | {" ".join(image.command)} import - {stub}', env=image.env)
    tags = {}
    for target in ('runtime-gpu', 'compiler-gpu'):
        tags[target] = f'mmlocalmamba-{target}:test'
        image.build(context, *options, '--build-arg=DEVICE=gpu', f'--build-arg=CUDA_IMAGE={stub}',
                    f'--target={target}', '--tag', tags[target])

    def shell(target, script):
        return image('run', '--rm', '--network=none', tags[target], 'sh', '-c', script).split()

    # Triton compiles C.
    assert shell('runtime-gpu', 'echo "int main(){return 0;}" > /tmp/a.c && gcc /tmp/a.c -o /tmp/a && /tmp/a && '
                                'echo $NVIDIA_VISIBLE_DEVICES $NVIDIA_DRIVER_CAPABILITIES') == [
        'all', 'compute,utility']
    assert shell('compiler-gpu', 'g++ --version >/dev/null && test -x $CUDA_HOME/bin/nvcc && '
                                 'echo $FORCE_CUDA "$TORCH_CUDA_ARCH_LIST" "index=$TORCH_INDEX"') == [
        '1', '8.0', '9.0+PTX', 'index=']
