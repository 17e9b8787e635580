"""Frames arrive by the clock, and the script reports those that are not answered in time."""
import csv
import json
import sys

import latency
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper


class Clock:
    """A clock that advances only when the code sleeps or the test moves it."""

    def __init__(self):
        self.now = 100.

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += max(seconds, 1e-6)


@pytest.mark.parametrize(('work', 'answered', 'missed', 'last'), [
    (0.01, 50, 0, 0.01),  # all answers are in time
    (0.05, 41, 50, 0.05),  # all answers are late, and every fifth frame is dropped
    (0.10, 21, 50, 0.10),  # two of three frames are dropped
])
def test_play(monkeypatch, work, answered, missed, last):
    """50 frames arrive in 2 seconds, one every 40 ms. An answer is due before the next frame."""
    clock = Clock()
    monkeypatch.setattr(latency, 'time', clock)
    shown = []

    def run(image):
        shown.append(int(image[0, 0, 0, 0] * latency.STD[0] + latency.MEAN[0] + 0.5))
        clock.now += work

    frames = [np.full((4, 4, 3), index, dtype=np.uint8) for index in range(50)]
    latencies, count, lost = latency.play(run, frames, 4, 25, 2, 0.04)
    assert count == 50 and lost == missed
    assert abs(len(latencies) - answered) <= 1
    assert shown == sorted(set(shown)) and shown[0] == 0  # the newest frame each time, and none twice
    assert latencies[0] == pytest.approx(work, abs=1e-5)
    # The answer of a frame that waited is late by at most one period.
    assert max(latencies) <= work + 0.04 + 1e-4 and min(latencies) >= last - 1e-6


@pytest.fixture
def model(tmp_path):
    """Write an ONNX file that computes the means of the channels of 16x16 pixels."""
    graph = helper.make_graph([helper.make_node('GlobalAveragePool', ['images'], ['out'])], 'g',
                              [helper.make_tensor_value_info('images', TensorProto.FLOAT, [1, 3, 16, 16])],
                              [helper.make_tensor_value_info('out', TensorProto.FLOAT, [1, 3, 1, 1])])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)
    helper.set_model_props(made, dict(mmlocalmamba=json.dumps(dict(height=16, width=16))))
    onnx.save(made, tmp_path / 'mean.onnx')
    return str(tmp_path / 'mean.onnx')


@pytest.fixture
def video(tmp_path):
    import cv2
    path = str(tmp_path / 'clip.avi')
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*'MJPG'), 25, (32, 24))
    for index in range(5):
        writer.write(np.full((24, 32, 3), 40 * index, dtype=np.uint8))
    writer.release()
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['latency.py', *map(str, arguments)])
    latency.main()


def test_of_a_file(monkeypatch, model, video, tmp_path, capsys):
    """Both modes run, a second call measures nothing again, and the picture is drawn."""
    table, plot = tmp_path / 'table.csv', tmp_path / 'plot.png'
    for rate in (200, 0):
        run(monkeypatch, model, '--source', video, '--rate', rate, '--seconds', 0.2, '--threads', 1,
            '--csv', table)
    assert 'missed' in capsys.readouterr().out
    run(monkeypatch, model, '--source', video, '--rate', 200, '--threads', 1, '--csv', table, '--plot', plot)
    assert capsys.readouterr().out == '' and plot.stat().st_size > 1000
    with table.open() as file:
        playing, in_turn = csv.DictReader(file)
    assert (playing['size'], playing['frames'], playing['runtime']) == ('16', '40', 'onnxruntime')
    assert 0 <= float(playing['missed']) <= 1 and in_turn['missed'] == ''
    for row in (playing, in_turn):
        assert 0 < float(row['p50_ms']) <= float(row['p95_ms']) <= float(row['p99_ms'])
        assert 10 < int(row['peak_mb']) < 400  # that process does not load PyTorch


@pytest.mark.parametrize(('arguments', 'message'), [
    (('MODEL', '--source', 'nowhere'), 'no such file or folder'),
    (('MODEL', '--source', __file__), 'OpenCV can read no frame'),
    (('Swin-XXL', '--source', 'VIDEO'), 'neither a file (.onnx, .pt2) nor one of'),
])
def test_bad_input(monkeypatch, model, video, arguments, message):
    arguments = [dict(MODEL=model, VIDEO=video).get(argument, argument) for argument in arguments]
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *arguments)
    assert message in str(error.value)
