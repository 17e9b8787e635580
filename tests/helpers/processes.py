"""Processes of their own for tests: one, or two that train together."""
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, '-W', 'ignore']


def port():
    """A free one, below those that systems hand out: no connection of another process gets it before it is used."""
    while True:
        number = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as free:
            try:
                free.bind(('127.0.0.1', number))
            except OSError:
                continue
            return str(number)


def start(*command, new_session=False, **env):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', PYTHONFAULTHANDLER='1', **env)
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=new_session, env=env)


def end(processes, number):
    """Signal them and all that they have started, these first."""
    for process in [process for process in processes if process.poll() is None]:
        try:
            parent = psutil.Process(process.pid)
            family = [*reversed(parent.children(recursive=True)), parent]
        except psutil.NoSuchProcess:
            continue
        for member in family:
            try:
                member.send_signal(number)
            except psutil.NoSuchProcess:
                pass


def finish(*processes, returncode=0, seconds=120):
    """Their output. All must end in time and with this code; none is left when one does not.

    What they do when their time is over stands in the error: they are aborted, and Python's fault handler writes it.
    """
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    except subprocess.TimeoutExpired:
        end(processes, signal.SIGABRT)
        outputs = [process.communicate(timeout=10)[0] for process in processes]
        raise AssertionError('\n'.join([f'not done after {seconds} s', *outputs])) from None
    finally:
        end(processes, signal.SIGKILL)
    for process, output in zip(processes, outputs):
        assert process.returncode == returncode, output
    return ''.join(outputs)


def run_on_two(*command, returncode=0):
    """As torchrun would start it on two processes."""
    number = port()
    finish(*[start(*command, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                   MASTER_PORT=number) for rank in range(2)], returncode=returncode)
