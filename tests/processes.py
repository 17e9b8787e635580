"""Processes of their own for tests: one, or two that train together."""
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable, '-W', 'ignore']


def port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


def start(*command, new_session=False, **env):
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=new_session,
                            env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', **env))


def finish(*processes, returncode=0):
    """Their output. All must end within two minutes and with this code; none is left when one does not."""
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == returncode, output
    return ''.join(outputs)


def run_on_two(*command, returncode=0):
    """As torchrun would start it on two processes."""
    number = port()
    finish(*[start(*command, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                   MASTER_PORT=number) for rank in range(2)], returncode=returncode)
