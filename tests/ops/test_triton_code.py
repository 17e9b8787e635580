"""What the compiler makes of the Triton kernels for GPUs that are not here. No GPU is needed.

triton_code.json has what was counted with one version of Triton and its ptxas; kernels may not get worse than that.
`python tests/ops/test_triton_code.py` writes it anew.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_code
import pytest
import torch
import triton_code

from mmlocalmamba.ops.backends.triton import host

pytest.importorskip('triton')
ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_suffix('').with_name('triton_code.json')
FAST = {
    'stage 1': dict(),
    'stage 1, batch 63, 160x188': dict(batch=63, size=(40, 47), passes=['forward'], kernels=['scan_forward']),
    'N = 4': dict(N=4, passes=['forward']),
}
SLOW = {
    'N = 1': dict(N=1),
    'stage 1, float32': dict(dtype='float32'),
    'stage 3': dict(size=(14, 14), width=768, rank=24),
    'LocalVim-T': dict(size=(14, 14), middle_token=True, width=384, rank=12, in_scan_order=True),
    'detection': dict(size=(200, 333), batch=2),
    'stage 3, N = 1': dict(size=(14, 14), width=768, rank=24, N=1),
    'odd': dict(size=(7, 9), width=37, rank=3, N=5, batch=1),
}


def compile_cases(cases, target='sm_90', **options):
    """Compile in another process, since this one may interpret kernels."""
    environment = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    environment['PYTHONPATH'] = os.pathsep.join([str(ROOT), str(ROOT / 'tools'), environment.get('PYTHONPATH', '')])
    arguments = json.dumps(dict(target=target, cases=cases, **options))
    done = subprocess.run([sys.executable, triton_code.__file__, arguments], text=True, capture_output=True,
                          env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def fast():
    return compile_cases(FAST)


def kernel(rows, name):
    row, = (row for row in rows if row['kernel'] == name)
    return row


def check_against_record(compiled, names):
    record = json.loads(RECORD.read_text())
    if record['toolchain'] != compiled['toolchain']:
        pytest.skip(f'counts are recorded for {record["toolchain"]}, here is {compiled["toolchain"]}')
    for name in names:
        scans = [row for row in compiled[name] if row['kernel'] in gpu_code.SCANS]
        for before, now in zip(record[name], scans, strict=True):
            assert now['kernel'] == before['kernel']
            assert now['instructions'] <= 1.005 * before['instructions'], (name, before, now)
            assert now['programs'] >= before['programs'], (name, before, now)
            assert now['spilled'] <= before['spilled'], (name, before, now)


def test_no_kernel_needs_more_than_recorded(fast):
    check_against_record(fast, FAST)


@pytest.mark.slow
def test_no_kernel_needs_more_than_recorded_elsewhere():
    check_against_record(compile_cases(SLOW), SLOW)


def test_sixteen_programs_of_the_forward_pass_run_at_once(fast):
    assert kernel(fast['stage 1'], 'scan_forward')['programs'] == 16


def test_batch_and_image_size_compile_nothing_anew(fast):
    first, second = (kernel(fast[name], 'scan_forward') for name in ('stage 1', 'stage 1, batch 63, 160x188'))
    assert first['hash'] == second['hash']


def test_four_states_are_one_load(fast):
    assert kernel(fast['N = 4'], 'scan_forward')['widest load'] == 128


@pytest.mark.slow
@pytest.mark.parametrize('target', ['sm_80', 'sm_89', 'sm_120'])
def test_compiles_for_other_gpus(target):
    """The interpreter accepts more than the compiler."""
    compiled = compile_cases({name: {**FAST, **SLOW}[name] for name in ('stage 1', 'detection', 'odd')}, target,
                             convolution=True)
    assert all(row['registers'] <= 255 for name, rows in compiled.items() if name != 'toolchain' for row in rows)
    assert [row['kernel'] for row in compiled['convolution']] == [
        'conv_forward', 'conv_forward', 'conv_backward', 'conv_forward', 'conv_backward']


def test_fused_multiply_adds_are_asked_for():
    """Triton 3.10 has another default."""
    launches = [*triton_code.launches(rank=24), *triton_code.launches(size=(200, 333), batch=1),
                *triton_code.convolutions()]
    assert {name for name, *_ in launches} == {'scan_pack', 'step_sizes', 'scan_forward', 'scan_local', 'scan_carry',
                                              'scan_backward', 'conv_forward', 'conv_backward'}
    assert all(options['enable_fp_fusion'] for *_, options in launches)


@pytest.mark.parametrize('rows,stride,wide', [(2 ** 10, 2 ** 21 - 1, False), (2 ** 10, 2 ** 21, True)])
def test_offsets_have_64_bits_from_2_to_the_31(rows, stride, wide):
    """The tensors have no memory."""
    u = torch.empty(1, rows, stride, dtype=torch.bfloat16, device='meta')[..., :32]
    delta, B = torch.empty(1, 1, rows, 32, device='meta'), torch.empty(1, 1, rows, 2, device='meta')
    A = torch.empty(1, 32, 2, device='meta')
    inputs = dict(delta=delta, A=A, B=B, C=B, D=None, src=None, tokens=rows, delta_bias=None, dt_weight=None,
                  delta_softplus=True, in_scan_order=False)
    with gpu_code.recorded() as launches:
        y, _, checkpoints = host._forward(u=u, save=True, **inputs)
        # Only the gradient of y has large strides here.
        grad_y = torch.empty(1, 1, rows, stride, device='meta')[..., :32]
        host._backward(u=y[:, 0], grad_y=grad_y, grad_last=None, checkpoints=checkpoints, wanted=[True] * 7, **inputs)
    found = {name: options['WIDE'] for name, _, _, options in launches if name in gpu_code.SCANS}
    assert found and set(found) >= {'scan_forward', 'scan_backward'} and set(found.values()) == {wide}


def test_the_command_prints_the_table(monkeypatch, capsys, tmp_path):
    """Compiled code is replaced by figures; see the other tests for the compiler."""
    import benchmark_scan
    monkeypatch.setattr(gpu_code, 'toolchain', lambda: 'some compiler')
    monkeypatch.setattr(gpu_code, 'count', lambda target, launch: dict(
        kernel=launch[0], registers=128, programs=16, **(dict(instructions=8.) if launch[0] in gpu_code.SCANS else {})))
    table = tmp_path / 'code.csv'
    monkeypatch.setattr(sys, 'argv', ['benchmark_scan.py', '--compile', 'sm_90', '--dtype', 'bfloat16', '--batch', '64',
                                      '--states', '16', '--shapes', 'stage 1', 'stage 3', '--csv', str(table)])
    benchmark_scan.main()
    printed = capsys.readouterr().out
    # 64 images, 4 directions, 3136 steps, 192 channels, 16 states; 4 x 132 schedulers at 1.755 GHz.
    elements = 64 * 4 * 3136 * 192 * 16
    assert f'{8 * elements / 32 / (4 * 132 * 1.755e9) * 1e3:.3g}' in printed and 'a prediction' in printed
    assert 'scan_backward' in table.read_text()
    # Step sizes of stage 3 are written in full: 64 images, 4 directions, 196 tokens, 768 channels, 4 bytes.
    assert f'step_sizes: full {64 * 4 * 196 * 768 * 4 / 1e6:.0f}, ' in printed


def write_record():
    compiled = compile_cases({**FAST, **SLOW})
    keys = ('kernel', 'registers', 'spilled', 'programs', 'instructions')
    lines = [f' "toolchain": {json.dumps(compiled.pop("toolchain"))}']
    for name, rows in compiled.items():
        kept = [json.dumps({key: row[key] for key in keys}) for row in rows if row['kernel'] in gpu_code.SCANS]
        lines.append(f' {json.dumps(name)}: [\n  ' + ',\n  '.join(kept) + '\n ]')
    RECORD.write_text('{\n' + ',\n'.join(lines) + '\n}\n')


if __name__ == '__main__':
    write_record()
