"""The experiment on pictures of shapes: its reader is right on true pictures, and its script runs."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest


@pytest.fixture(scope="module")
def shapes(root):
    path = root / "experiments/janus_shapes/shapes.py"
    spec = importlib.util.spec_from_file_location("janus_shapes_pictures", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_reader_is_right_on_true_pictures(shapes):
    scenes, images = shapes.drawn_set(288, seed=3)
    assert (images.shape, images.dtype) == ((288, 32, 32, 3), np.float32)
    assert np.abs(images).max() <= 1
    found = shapes.matches(images, scenes)
    assert min(found[name] for name in shapes.ATTRIBUTES) > 0.97
    assert shapes.matches(images, scenes[::-1])["mean"] < 0.6
    assert shapes.matches(np.zeros_like(images), scenes)["mean"] == 0


def test_every_scene_is_as_frequent_and_has_a_caption_of_its_own(shapes):
    scenes, _ = shapes.drawn_set(288, seed=4)
    assert {scenes.count(scene) for scene in shapes.SCENES} == {2}
    assert len({scene.caption for scene in shapes.SCENES}) == len(shapes.SCENES) == 144


def test_a_caption_is_what_its_tokens_say(root, shapes, monkeypatch):
    monkeypatch.syspath_prepend(root / "experiments/janus_shapes")
    spec = importlib.util.spec_from_file_location("janus_shapes_run", root / "experiments/janus_shapes/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = module.tokenizer()
    for scene in shapes.SCENES:
        assert words.decode(words.encode(scene.caption).ids) == scene.caption


@pytest.mark.slow
def test_it_runs(root, tmp_path):
    command = [sys.executable, "experiments/janus_shapes/run.py", "--smoke", "--out", str(tmp_path / "out.json")]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads((tmp_path / "out.json").read_text())
    assert {"captions", "reader_on_decoded", "drawn_w1", "drawn_w5", "commit", "machine"} <= set(record)
