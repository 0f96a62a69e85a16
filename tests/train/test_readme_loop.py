"""README's training loop, run as it stands there."""

import re

import numpy as np
import pytest

import deepseek_jax as dsj


@pytest.mark.slow
def test_the_training_loop_of_readme_learns_and_exports(root, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (root / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "update_router_bias" in block]
    (tmp_path / "checkpoints").symlink_to(root / "checkpoints")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    told = re.findall(r"(\d+): (\S+), held out (\S+) bits a token", capsys.readouterr().out)
    assert [int(step) for step, *_ in told] == [16, 32, 48, 64]
    bits = [float(value) for *_, value in told]
    # 11 bits: 2048 tokens, all alike.
    assert bits[-1] < bits[0] < 11
    model = dsj.load_pretrained(tmp_path / "my-model", dtype=None)
    assert model.cfg.n_layers == 2
    bias = model.stacks[1].ffn.router.bias.get_value()
    assert np.abs(np.asarray(bias)).max() > 0.01
    np.testing.assert_array_equal(model.head.get_value(), names["params"].head.get_value())
