"""A work directory belongs to one training: overlapping jobs, dead owners, copies, file systems without help."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import job_task
import pytest
from processes import finish
from test_jobs import start_jobs, train

from mmlocalmamba.openmmlab.engine import lock
from mmlocalmamba.openmmlab.engine.lock import LOCK_FILE, WorkDirLock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in dict(BEAT=0.05, SILENCE=0.4, PATIENCE=1.5, SETTLE=0.01).items():
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def other():
    """A living process."""
    process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])
    yield process
    process.kill()
    process.wait()


def owned(folder, **changes):
    """A lock that somebody else left there, of this process unless ``changes`` say otherwise."""
    own = WorkDirLock(str(folder))
    own.note.update(changes)
    assert own._claim(own._read())
    return own


def of_process(folder, pid, **changes):
    return owned(folder, pid=pid, start=lock._start_of(pid), **changes)


def test_a_living_owner_is_waited_for_and_named(tmp_path, other):
    theirs = of_process(tmp_path, other.pid)
    with pytest.raises(RuntimeError, match=f'{tmp_path} belongs to another training, process {other.pid} on .* remove '
                                           f'{tmp_path}/{LOCK_FILE}'):
        WorkDirLock(str(tmp_path)).acquire()
    threading.Timer(0.3, theirs.release).start()
    mine = WorkDirLock(str(tmp_path))
    mine.acquire()
    assert mine._is_mine()
    mine.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('end', ['killed', 'number taken again', 'own earlier training', 'copied', 'damaged'])
def test_an_owner_that_is_gone_loses_it(tmp_path, other, end, monkeypatch):
    """On the same host at once, without a sign of life that is missing: SILENCE is not waited for."""
    monkeypatch.setattr(lock, 'SILENCE', 0.4 if end == 'damaged' else 100.)
    if end == 'killed':
        of_process(tmp_path, other.pid)
        other.kill()  # a zombie until it is waited for
        while lock._start_of(other.pid) is not None:
            time.sleep(0.01)
    elif end == 'number taken again':  # as in a container, whose processes have small numbers
        owned(tmp_path, pid=other.pid, start='1')
    elif end == 'own earlier training':
        owned(tmp_path)
    elif end == 'copied':
        (tmp_path / 'first').mkdir()
        of_process(tmp_path / 'first', other.pid)
        shutil.copy2(tmp_path / 'first' / LOCK_FILE, tmp_path / LOCK_FILE)
    else:
        (tmp_path / LOCK_FILE).write_text('{"host"')
    mine = WorkDirLock(str(tmp_path))
    mine.acquire()
    assert json.loads((tmp_path / LOCK_FILE).read_text())['pid'] == os.getpid()
    mine.release()


def test_another_host_must_show_signs_of_life(tmp_path, other):
    """Numbers of processes mean nothing there. Its clock plays no part."""
    theirs = of_process(tmp_path, other.pid, host='another')
    beat = threading.Thread(target=theirs._beat)
    beat.start()
    with pytest.raises(RuntimeError, match='belongs to another training'):
        WorkDirLock(str(tmp_path)).acquire()
    theirs._released.set()
    beat.join()
    os.utime(tmp_path / LOCK_FILE, (2 ** 33, 2 ** 33))  # its clock was far ahead
    mine = WorkDirLock(str(tmp_path))
    mine.acquire()
    with pytest.raises(RuntimeError, match=f'process {os.getpid()} .*took the work directory from this training'):
        theirs.check()
    theirs.release()  # takes nothing from the new owner
    mine.check()
    mine.release()


def test_a_lock_that_was_removed_by_hand_is_written_again(tmp_path):
    mine = WorkDirLock(str(tmp_path))
    mine.acquire()
    (tmp_path / LOCK_FILE).unlink()
    mine.check()
    assert mine._is_mine()
    mine.release()


@pytest.mark.parametrize('links', [True, False])
def test_one_of_many_gets_it(tmp_path, links, monkeypatch):
    """At the same moment, also on a file system without hard links, and after a dead owner."""
    def fail(*args):
        raise PermissionError(1, 'not here')

    if not links:
        monkeypatch.setattr(os, 'link', fail)
    monkeypatch.setattr(lock, 'SETTLE', 0.8)
    for dead in (False, True):
        seen = owned(tmp_path, pid=2 ** 22 + 1, start='1')._read() if dead else None
        locks = [WorkDirLock(str(tmp_path)) for _ in range(6)]
        won = []
        barrier = threading.Barrier(len(locks))

        def claim(mine, barrier=barrier, won=won, seen=seen):
            barrier.wait()
            if mine._claim(seen):
                won.append(mine)

        threads = [threading.Thread(target=claim, args=(mine, )) for mine in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].release()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_requeued_job_that_overlaps_the_old_one(tmp_path):
    """The second training is refused while the first one runs, takes nothing from it, and goes on after its end."""
    first = start_jobs(dict(work_dir=str(tmp_path), epochs=2, slow=0.2, resume=True))
    while not (tmp_path / 'loaded').exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    with pytest.raises(RuntimeError, match=f'belongs to another training, process {first.pid}'):
        train(tmp_path, epochs=3, resume=True)
    finish(first)
    assert not (tmp_path / LOCK_FILE).exists()
    assert train(tmp_path, epochs=3, resume=True).iter == 18


def test_a_training_that_lost_its_directory_writes_nothing_more(tmp_path):
    def steal():
        path = Path(tmp_path, LOCK_FILE)
        path.write_text(json.dumps(dict(json.loads(path.read_text()), token='theirs', pid=1, name='elsewhere')))

    with pytest.raises(RuntimeError, match='process 1 on elsewhere.* writes nothing more'):
        train(tmp_path, epochs=1, interrupt=(3, steal))
    assert not list(tmp_path.glob('*.pth'))


def test_the_lock_ends_with_the_training(tmp_path):
    def fail():
        assert (tmp_path / LOCK_FILE).exists()
        raise OSError

    handler = signal.getsignal(signal.SIGTERM)
    for options in (dict(), dict(interrupt=(3, fail)), dict(signal_at=4)):
        runner = job_task.build(tmp_path, epochs=1, **options)
        try:
            runner.train()
        except (OSError, SystemExit):
            pass
        assert not (tmp_path / LOCK_FILE).exists(), options
    assert signal.getsignal(signal.SIGTERM) == handler
