"""The published file holds the packaged weights, and a file that is worse is not written."""
import publish
import pytest
import torch

from mmlocalmamba.files import SCHEME, load_checkpoint, load_safetensors

NANO = f'{SCHEME}localvim-nano_digits'


@pytest.mark.slow
def test_publish(configuration, tmp_path, capsys):
    cfg = configuration('localvim-nano_digits')
    cfg.dump(str(tmp_path / 'config.py'))
    torch.save(load_checkpoint(NANO), tmp_path / 'trained.pth')
    command = [str(tmp_path / 'config.py'), str(tmp_path / 'trained.pth'), str(tmp_path / 'small.safetensors')]
    publish.main(command)
    assert 'accuracy/top1' in capsys.readouterr().out
    small = load_checkpoint(tmp_path / 'small.safetensors')
    assert small['meta']['dataset_meta']['classes'] == tuple('0123456789')
    packaged = load_safetensors(NANO)['state_dict']
    assert all(torch.equal(value, small['state_dict'][name]) for name, value in packaged.items())
    with pytest.raises(SystemExit, match='16 bits cost more than -100.00%.*\n.*accuracy/top1'):
        publish.main([*command[:2], str(tmp_path / 'worse.safetensors'), '--tolerance', '-1'])
    assert not (tmp_path / 'worse.safetensors').exists()
